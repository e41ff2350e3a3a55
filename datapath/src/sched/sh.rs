//! sh: by the hash of the client's address (`ip_vs_sh_schedule`), with sh-port of its port too. The table is built by the control plane ([`build`]),
//! looked up here.

use super::{Member, folded, hash_32};
use crate::abi::{Service, service};
use crate::packet::{Flow, Ip};
use crate::tables::{Tables, Walker};

/// The kernel's default, `CONFIG_IP_VS_SH_TAB_BITS` 8.
const BITS: u32 = 8;
pub const SIZE: u32 = 1 << BITS;

/// `ip_vs_sh_hashkey`.
#[inline(always)]
fn place(client: u32, offset: u32) -> u32 {
    offset.wrapping_add(hash_32(client, BITS)) & (SIZE - 1)
}

#[inline(always)]
pub fn pick<I: Ip, T: Tables>(t: &T, s: &Service, flow: &Flow<I>) -> Option<u32> {
    let (first, size) = (s.table as u32, (s.table >> 32) as u32);
    if size != SIZE {
        return None;
    }
    let port = if s.flags & service::HASH_PORT != 0 { u32::from(flow.key.sport()) } else { 0 };
    let client = port.wrapping_add(folded(&I::bytes(flow.source())));
    let start = place(client, 0);
    let dest = t.table(first + start)?;
    if t.available(dest) {
        return Some(dest);
    }
    if s.flags & service::HASH_FALLBACK == 0 {
        return None;
    }
    let mut walk = Walk { first, client, start, dest: 0 };
    t.walk(SIZE, &mut walk);
    (walk.dest != 0).then_some(walk.dest)
}

struct Walk {
    first: u32,
    client: u32,
    start: u32,
    dest: u32,
}

impl<T: Tables> Walker<T> for Walk {
    /// `ip_vs_sh_get_fallback`: the key with another offset each time.
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        let w = self;
        match t.table(w.first + place(w.client, (i + w.start) % SIZE)) {
            Some(d) if t.available(d) => {
                w.dest = d;
                true
            }
            Some(_) => false,
            None => true,
        }
    }
}

/// The lookup table of a service (`ip_vs_sh_reassign`), members in list order: each takes as many places in a row as its weight says, at least one,
/// and so round until all [`SIZE`] places of `out` are taken.
pub fn build(members: &[Member], out: &mut [u32]) {
    out.fill(0);
    let mut turns = members.iter().cycle().flat_map(|m| core::iter::repeat_n(m.dest, m.weight.max(1) as usize));
    for place in out {
        *place = turns.next().unwrap_or(0);
    }
}
