//! TCP options, changed in place, byte by byte.

use crate::csum::Delta;
use crate::packet::{Packet, Window};

const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;
const SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
const FAST_OPEN: u8 = 34;
/// The client's address (see `fullnat`); also RFC 6994's experiments, of which the old Fast Open is one.
pub const TOA: u8 = 254;

/// What to do with a segment's options.
#[derive(Clone, Copy)]
pub struct Edit {
    /// Blank timestamps: those of many clients would come from one address, and a server that has seen a later one drops the segment
    /// (RFC 7323 5).
    pub timestamps: bool,
    /// Blank Fast Open: what a client knows of one server is not true of another, and data would come before what is put in front of it.
    pub fast_open: bool,
    /// Blank the client's address: nobody but the director says it.
    pub toa: bool,
    /// Taken from the MSS.
    pub mss_less: u16,
    /// The largest MSS; 0: any.
    pub mss_most: u16,
    /// Added to the edges of SACK blocks.
    pub sack: u32,
    /// Blank them all.
    pub all: bool,
}
impl Edit {
    /// Only look.
    pub const NONE: Edit =
        Edit { timestamps: false, fast_open: false, toa: false, mss_less: 0, mss_most: 0, sack: 0, all: false };
}

/// What a SYN offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// 0: not said.
    pub mss: u16,
    pub scale: Option<u8>,
    pub sack: bool,
}

/// Longest options.
pub const MOST: usize = 40;

/// Options being edited, byte by byte: a packet calls [`Editing::step`] for each, in order, until it says that it is done.
pub struct Editing {
    edit: Edit,
    /// Where the TCP header begins, and its length.
    l4: usize,
    header: u32,
    /// `short:1 | done:8 | left:8 | kind:8`: the kind of the option (END: between two of them), how much of its body is left and how much is done;
    /// or the packet is shorter than it says.
    state: u32,
    delta: Delta,
    /// What was met: `mss:16 | scale:8 | has a scale:1 | sack:1`.
    offer: u32,
}
const SCALED: u32 = 2;
const SACKS: u32 = 1;

const SHORT: u32 = 1 << 24;

impl Editing {
    /// `nothing` is 0; who runs in BPF makes the verifier believe that it may be anything: in a loop it may.
    #[inline(always)]
    pub fn new(edit: Edit, l4: usize, header: u32, nothing: u32) -> Editing {
        Editing { edit, l4, header, state: nothing, delta: Delta::default(), offer: nothing }
    }
    /// The change of the checksum, and what was offered; `None`: the packet is shorter than it says. Options that are cut short or lie about
    /// their length end the walk, as in the kernel.
    #[inline(always)]
    pub fn end(&self) -> Option<(Delta, Offer)> {
        let scale = if self.offer & SCALED != 0 { Some((self.offer >> 8) as u8) } else { None };
        let offer = Offer { mss: (self.offer >> 16) as u16, scale, sack: self.offer & SACKS != 0 };
        (self.state & SHORT == 0).then_some((self.delta, offer))
    }
    /// The byte number `i` of the options. True: that is all.
    #[inline(always)]
    pub fn step<P: Packet>(&mut self, p: &mut P, i: usize) -> bool {
        if 20 + i as u32 >= self.header {
            return true;
        }
        match self.byte(p, i) {
            Some(done) => done,
            None => {
                self.state = SHORT;
                true
            }
        }
    }
    #[inline(always)]
    fn byte<P: Packet>(&mut self, p: &mut P, i: usize) -> Option<bool> {
        let at = self.l4 + 20 + i;
        let byte = p.beyond(at, 1)?.r8(0);
        let (kind, left, done) = (self.state as u8, self.state >> 8 & 0xff, self.state >> 16 & 0xff);
        if left != 0 {
            if done == 0 && kind == MSS {
                self.offer |= u32::from(u16::from_be(p.beyond(at, 2)?.r16(0))) << 16;
            } else if done == 0 && kind == SCALE {
                self.offer |= u32::from(byte) << 8 | SCALED;
            }
            self.delta = body(p, i, at, kind, done, &self.edit, self.delta)?;
            self.state = if left == 1 { 0 } else { (done + 1) << 16 | (left - 1) << 8 | u32::from(kind) };
        } else if kind != END {
            // Its length.
            if byte < 2 || i as u32 + 19 + u32::from(byte) > self.header {
                return Some(true);
            }
            let left = u32::from(byte) - 2;
            if kind == SACK_PERMITTED && left == 0 {
                self.offer |= SACKS;
            }
            if blank(kind, &self.edit) {
                self.delta = put(p, i - 1, at - 1, NOP, self.delta)?;
                self.delta = put(p, i, at, NOP, self.delta)?;
            }
            // Only whole values are looked at.
            let whole = (kind != MSS || left == 2) && (kind != SACK || left & 7 == 0) && (kind != SCALE || left == 1);
            let kind = if whole { kind } else { NOP };
            self.state = if left == 0 { 0 } else { left << 8 | u32::from(kind) };
        } else if byte == END {
            return Some(true);
        } else {
            self.state = if byte == NOP { 0 } else { u32::from(byte) };
        }
        Some(false)
    }
}

/// A byte of an option's body, `done` bytes into it.
#[inline(always)]
fn body<P: Packet>(p: &mut P, i: usize, at: usize, kind: u8, done: u32, edit: &Edit, delta: Delta) -> Option<Delta> {
    if blank(kind, edit) {
        put(p, i, at, NOP, delta)
    } else if kind == MSS && done == 0 && edit.mss_less | edit.mss_most != 0 {
        lower(p, i, at, edit, delta)
    } else if kind == SACK && done & 3 == 0 && edit.sack != 0 {
        shift(p, i, at, edit.sack, delta)
    } else {
        Some(delta)
    }
}

#[inline(always)]
fn blank(kind: u8, edit: &Edit) -> bool {
    edit.all || kind == TOA && edit.toa || kind == TIMESTAMPS && edit.timestamps || kind == FAST_OPEN && edit.fast_open
}

/// A byte at offset `i` of the options, which begin on an even one.
#[inline(always)]
fn put<P: Packet>(p: &mut P, i: usize, at: usize, byte: u8, delta: Delta) -> Option<Delta> {
    let mut w = p.beyond(at, 1)?;
    let old = w.r8(0);
    w.w8(0, byte);
    let word = |b: u8| if i.is_multiple_of(2) { u16::from_ne_bytes([b, 0]) } else { u16::from_ne_bytes([0, b]) };
    Some(delta.replace16(word(old), word(byte)))
}

/// A sum does not care for the order of bytes, but for which of a pair each is.
#[inline(always)]
fn paired(i: usize, word: u16) -> u16 {
    if i.is_multiple_of(2) { word } else { word.swap_bytes() }
}

#[inline(always)]
fn lower<P: Packet>(p: &mut P, i: usize, at: usize, edit: &Edit, delta: Delta) -> Option<Delta> {
    let mut w = p.beyond(at, 2)?;
    let old = w.r16(0);
    let mut mss = u16::from_be(old);
    // One that small is nobody's who means it.
    if mss > 2 * edit.mss_less {
        mss -= edit.mss_less;
    }
    if edit.mss_most != 0 && mss > edit.mss_most {
        mss = edit.mss_most;
    }
    let new = mss.to_be();
    w.w16(0, new);
    Some(delta.replace16(paired(i, old), paired(i, new)))
}

#[inline(always)]
fn shift<P: Packet>(p: &mut P, i: usize, at: usize, by: u32, delta: Delta) -> Option<Delta> {
    let mut w = p.beyond(at, 4)?;
    let old = w.r32(0);
    let new = u32::from_be(old).wrapping_add(by).to_be();
    w.w32(0, new);
    let delta = delta.replace16(paired(i, old as u16), paired(i, new as u16));
    Some(delta.replace16(paired(i, (old >> 16) as u16), paired(i, (new >> 16) as u16)))
}

/// What a director says of its client. Port and address as they lie in the packet; an IPv4 address is the first word.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Told {
    pub address: [u32; 4],
    pub port: u16,
    /// 1: IPv6.
    pub v6: u16,
}

/// The client's address in a TCP header, which is followed by anything up to its largest size. It is the first option, as the director puts
/// it in.
#[inline(always)]
pub fn told(header: &[u8; 60]) -> Option<Told> {
    let length = (header[12] >> 4) * 4;
    let word = |i: usize| u32::from_ne_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    let port = u16::from_ne_bytes([header[22], header[23]]);
    match (header[20], header[21]) {
        (TOA, 8) if length >= 28 => Some(Told { address: [word(24), 0, 0, 0], port, v6: 0 }),
        (TOA, 20) if length >= 40 => Some(Told { address: [word(24), word(28), word(32), word(36)], port, v6: 1 }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_address_is_read_and_nothing_else() {
        let mut four = [0u8; 60];
        four[12] = 7 << 4;
        four[20..28].copy_from_slice(&[254, 8, 0x12, 0x34, 192, 0, 2, 7]);
        let told_of = told(&four).unwrap();
        assert_eq!(told_of.address[0].to_ne_bytes(), [192, 0, 2, 7]);
        assert_eq!((told_of.port.to_ne_bytes(), told_of.v6), ([0x12, 0x34], 0));
        for (at, byte) in [(12, 6 << 4), (20, 253), (21, 7), (21, 20)] {
            let mut wrong = four;
            wrong[at] = byte;
            assert_eq!(told(&wrong), None, "byte {at} = {byte}");
        }
        let mut six = [0u8; 60];
        six[12] = 10 << 4;
        six[20..40].copy_from_slice(&[254, 20, 0, 80, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        let told_of = told(&six).unwrap();
        assert_eq!(told_of.address.map(u32::to_ne_bytes).concat(), six[24..40]);
        assert_eq!(told_of.v6, 1);
        six[12] = 9 << 4;
        assert_eq!(told(&six), None);
    }
}
