//! VLAN tags as XDP sees them: in the frame. A tagged frame counts as come in by the VLAN device of that tag, if that has the program too, and
//! goes through the pipeline without its tags; what leaves by a VLAN device gets its tags here. (tc needs none of it: the kernel takes tags out of
//! frames, and a VLAN device takes what is redirected to it.)
//!
//! ```text
//! MAC addresses 12 | 0x8100 or 0x88a8 2 | priority:3 drop:1 id:12 | ... once more | ethertype 2 | packet
//! ```

use crate::abi::{self, VLANS_MAX, vlan_place};
use crate::packet::{ETHERTYPE, Frame, L3, Window};
use crate::tables::Tables;
use crate::verdict::{Action, Verdict};

/// Bytes of a tag.
const TAG: usize = 4;
const ID: u32 = 0x0fff;

/// The tags of a frame as they were, outer one high; the inner one may be none (0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tags(u64);

impl Tags {
    #[inline(always)]
    pub fn word(self) -> u64 {
        self.0
    }
    #[inline(always)]
    pub fn from_word(word: u64) -> Tags {
        Tags(word)
    }
}

/// Is this ethertype, as it lies in the frame, that of a tag?
#[inline(always)]
pub fn is_tag(ethertype: u16) -> bool {
    const Q: u16 = 0x8100u16.to_be();
    const AD: u16 = 0x88a8u16.to_be();
    matches!(ethertype, Q | AD)
}

/// The VLAN device over `lower` with this tag. A frame with a priority only (id 0) is one without a tag.
#[inline(always)]
fn device<T: Tables>(t: &T, lower: u32, tag: u32) -> Option<u32> {
    let tag = tag & (0xffff << 16 | ID);
    if tag & ID == 0 {
        return Some(lower);
    }
    let (first, mut i) = (vlan_place(lower, tag), 0);
    while i < abi::VLAN_PROBES {
        let vlan = t.vlan((first + i) & (VLANS_MAX - 1));
        if vlan.lower == lower && vlan.tag == tag {
            return Some(vlan.ifindex);
        }
        i += 1;
    }
    None
}

/// Take off the tags of a frame that came in by a VLAN device of ours, and make it one that came in there. `None`: it is none, and untouched.
#[inline(always)]
pub fn untag<P: Frame, T: Tables>(p: &mut P, t: &T) -> Option<Tags> {
    let (outer, next) = {
        let w = p.window(L3 + TAG)?;
        (u32::from_be(w.r32(ETHERTYPE)), w.r16(ETHERTYPE + TAG))
    };
    let by = device(t, p.ifindex(), outer)?;
    if !is_tag(next) {
        take_off::<P, TAG>(p)?;
        p.came_by(by);
        return Some(Tags(u64::from(outer) << 32));
    }
    let inner = u32::from_be(p.window(L3 + 2 * TAG)?.r32(ETHERTYPE + TAG));
    let by = device(t, by, inner)?;
    take_off::<P, { 2 * TAG }>(p)?;
    p.came_by(by);
    Some(Tags(u64::from(outer) << 32 | u64::from(inner)))
}

/// The MAC addresses move up to what follows the tags.
#[inline(always)]
fn take_off<P: Frame, const N: usize>(p: &mut P) -> Option<()> {
    let macs = macs(p)?;
    if !p.shrink_head(N) {
        return None;
    }
    set_macs(&mut p.window(L3)?, macs);
    Some(())
}

#[inline(always)]
fn macs<P: Frame>(p: &mut P) -> Option<[u32; 3]> {
    let w = p.window(L3)?;
    Some([w.r32(0), w.r32(4), w.r32(8)])
}
#[inline(always)]
fn set_macs(w: &mut impl Window, macs: [u32; 3]) {
    w.w32(0, macs[0]);
    w.w32(4, macs[1]);
    w.w32(8, macs[2]);
}

/// One tag more, in front of all there are.
#[inline(always)]
fn put_on<P: Frame>(p: &mut P, tag: u32) -> Option<()> {
    let macs = macs(p)?;
    if !p.grow_head(TAG) {
        return None;
    }
    let mut w = p.window(L3 + TAG)?;
    set_macs(&mut w, macs);
    w.w32(ETHERTYPE, tag.to_be());
    Some(())
}

/// As it came, for the kernel.
#[inline(always)]
pub fn tag_again<P: Frame>(p: &mut P, tags: Tags) -> Option<()> {
    let (outer, inner) = ((tags.0 >> 32) as u32, tags.0 as u32);
    if inner != 0 {
        put_on(p, inner)?;
    }
    put_on(p, outer)
}

/// What leaves by a VLAN device gets its tag, and that of the one below. The interface that it then leaves by; `None`: the device is gone.
#[inline(always)]
pub fn tag<P: Frame, T: Tables>(p: &mut P, t: &T, ifindex: u32) -> Option<u32> {
    let vlan = t.iface(ifindex);
    if vlan.ifindex != ifindex || vlan.lower == 0 {
        return None;
    }
    put_on(p, vlan.tag)?;
    let below = t.iface(vlan.lower);
    if below.ifindex != vlan.lower || below.lower == 0 {
        return Some(vlan.lower);
    }
    put_on(p, below.tag)?;
    Some(below.lower)
}

/// Has this packet more to be done to it before it leaves?
#[inline(always)]
pub fn concerns(verdict: Verdict, tags: Option<Tags>) -> bool {
    verdict.is_by_vlan() || tags.is_some() && verdict.action() == Action::Up
}
