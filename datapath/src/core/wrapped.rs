//! The way of a packet into the tunnel to its dest: see [`crate::tunnel`].

use crate::abi::{Address, Hop, Tunnel, dest};
use crate::ct::{V4, V6};
use crate::packet::{Flow, Ip, Packet};
use crate::tables::{Route, Tables};
use crate::tunnel;
use crate::verdict::{Action, Reason, Stage, Verdict, drop};

/// In a tunnel to the dest, of whichever family.
#[inline(always)]
pub(super) fn into_tunnel<I: Ip, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    flow: &Flow<I>,
    index: u32,
    reason: Reason,
) -> Verdict {
    let Some(d) = t.dest(index) else { return drop(Reason::Internal) };
    if d.out as u32 & dest::V6 != 0 {
        wrap::<I, V6, P, T>(p, t, flow, index, reason)
    } else {
        wrap::<I, V4, P, T>(p, t, flow, index, reason)
    }
}

#[inline(always)]
fn wrap<I: Ip, O: Ip, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, index: u32, reason: Reason) -> Verdict {
    let (Some(d), Some(by)) = (t.dest(index), t.tunnel(index)) else { return drop(Reason::Internal) };
    let (source, to) = (O::from_address(&by.source), O::from_address(&d.address));
    if source == O::Addr::default() {
        // The way is not known yet, and so not by which of our addresses.
        return drop(Reason::NoRoute);
    }
    let mut by = *by;
    let unsummed = I::FAMILY == 6 && flow.by != 0 || !flow.part.is_whole() || flow.sctp;
    if !t.sized() || reason != Reason::Tunnel || unsummed {
        // Whoever cuts it into segments would not make an outer checksum of each; and nothing makes up for the sum of extension headers, of a
        // part of a datagram, or of SCTP, whose checksum is no sum.
        by.flags = 0;
    }
    let mut hop = t.hop((d.out >> 32) as u32).copied().unwrap_or_default();
    let mut mtu = u32::from(d.mtu);
    if hop.ifindex == 0 {
        match t.route::<O>([source, to], O::TUNNELLED, 0, &mut hop) {
            Route::Hop => mtu = 0,
            Route::NoNeighbour => return drop(Reason::NoNeighbour),
            _ => return drop(Reason::NoRoute),
        }
    }
    if !t.sized() {
        // (It is of segments, which fit.)
        mtu = u32::MAX;
    }
    let to = d.address;
    match tunnelled::<I, O, P>(p, flow, &by, &to, &hop, mtu, reason) {
        Ok(verdict) => verdict,
        Err(_) if reason != Reason::Tunnel => drop(Reason::TooBig),
        Err(room) if !I::may_fragment(p) => Verdict::go(Stage::TooBig, room),
        Err(room) if t.takes() => {
            // Its parts come by here again, and are counted then.
            t.uncount_in(index, flow.len);
            Verdict::go(Stage::Large, room)
        }
        Err(_) => drop(Reason::TooBig),
    }
}

/// The same to a next hop that is known. `Err`: how large it may be at most, as it came.
#[inline(always)]
pub fn tunnelled<I: Ip, O: Ip, P: Packet>(
    p: &mut P,
    flow: &Flow<I>,
    by: &Tunnel,
    to: &Address,
    hop: &Hop,
    mtu: u32,
    reason: Reason,
) -> Result<Verdict, u32> {
    // As large as an Ethernet frame, where nobody says otherwise.
    let (mtu, overhead) = (if mtu == 0 { 1500 } else { mtu }, tunnel::overhead::<O>(by));
    if flow.len + overhead > mtu {
        return Err(mtu.saturating_sub(overhead));
    }
    if !tunnel::wrap::<I, O, P>(p, flow, by, to, hop) {
        return Ok(drop(Reason::Internal));
    }
    let back = hop.ifindex == p.ifindex();
    Ok(Verdict::new(if back { Action::Back } else { Action::Out(hop.ifindex) }, reason))
}
