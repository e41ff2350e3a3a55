//! dh: by the hash of the packet's destination (`ip_vs_dh_schedule`). The table is built by the control plane ([`build`]), looked up here.

use super::{Member, folded, hash_32};
use crate::abi::Service;
use crate::packet::{Flow, Ip};
use crate::tables::Tables;

/// The kernel's default, `CONFIG_IP_VS_DH_TAB_BITS` 8.
const BITS: u32 = 8;
pub const SIZE: u32 = 1 << BITS;

#[inline(always)]
pub fn pick<I: Ip, T: Tables>(t: &T, s: &Service, flow: &Flow<I>) -> Option<u32> {
    if (s.table >> 32) as u32 != SIZE {
        return None;
    }
    let dest = t.table(s.table as u32 + hash_32(folded(&I::bytes(flow.destination())), BITS))?;
    // No other is looked for.
    t.available(dest).then_some(dest)
}

/// The lookup table of a service (`ip_vs_dh_reassign`), members in list order: round and round, whatever their weights. `out` has [`SIZE`] places.
pub fn build(members: &[Member], out: &mut [u32]) {
    out.fill(0);
    for (place, member) in out.iter_mut().zip(members.iter().cycle()) {
        *place = member.dest;
    }
}
