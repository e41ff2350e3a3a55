//! Thinning out the table while memory is short: `drop_entry` as `ip_vs_random_dropentry` has it. Each second a 32nd of the table is looked
//! through; half-open connections there go, and of those idle for a minute that never did much a part.

use super::{Addressing, Conns, PACKETS, PACKETS_SHIFT, REVERSE, SCTP, TCP, idle, idle_s};
use crate::ct::{self, Entry};
use crate::proto::{sctp, tcp};

/// Sweeps, of two seconds each, in which each bucket's turn comes once. (The kernel draws buckets.)
const SWEEPS: u32 = 16;
/// Connections that had a packet since then stay: time enough to go on.
const IDLE_S: u32 = 60;
/// Of those that had this many packets of their client, or fewer, one goes in as many as it had (`todrop_rate`, which goes up to 8: packets are counted
/// up to here).
const FEW: u64 = 3;
/// Packets of UDP are not counted: of those the rarest of `todrop_rate`.
const RARELY: u32 = 8;

/// Is it this bucket's turn?
#[inline(always)]
pub fn is_due(bucket: u32, sweep: u32) -> bool {
    (bucket ^ sweep) & (SWEEPS - 1) == 0
}

/// Does this entry have to go? `turn`: how often its bucket's turn has come.
#[inline(always)]
pub fn goes<F: Addressing, C: Conns<F> + ?Sized>(c: &C, entry: &Entry<F::Words>, turn: u32) -> bool {
    let control = entry.control;
    if !ct::is_live(control) || control & REVERSE != 0 {
        return false;
    }
    let (proto, state) = (ct::proto(control), ct::state(control));
    let half_open = proto == TCP && (state == tcp::SYN_RECV || state == tcp::SYNACK)
        || proto == SCTP && (state == sctp::INIT1 || state == sctp::INIT_AGAIN);
    if half_open {
        return true;
    }
    let counted = proto == TCP && state == tcp::ESTABLISHED || proto == SCTP && state == sctp::ESTABLISHED;
    let packets = ((control & PACKETS) >> PACKETS_SHIFT) + 1;
    if (proto == TCP || proto == SCTP) && (!counted || packets > FEW) {
        return false;
    }
    let row = c.policy().row(control);
    let one_in = if counted { packets as u32 } else { RARELY };
    // Any number that has nothing to do with the way of a bucket.
    let place = entry.slot.wrapping_mul(0x9e37_79b1) >> 16;
    idle_s(row, idle(row, control, c.now_s())) >= IDLE_S && turn.wrapping_add(place) % one_in == 0
}

/// Free the entry in this way of a bucket whose turn it is, if it has to go: it is to be released then (see [`super::sweep`]).
#[inline(always)]
pub fn one<F: Addressing, C: Conns<F> + ?Sized>(c: &C, bucket: u32, way: usize, sweep: u32) -> Option<Entry<F::Words>> {
    let entry = ct::entry::<F, _>(c.table(), bucket, way);
    (goes(c, &entry, sweep / SWEEPS) && ct::free::<F, _>(c.table(), &entry)).then_some(entry)
}
