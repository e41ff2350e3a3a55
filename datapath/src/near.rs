//! The near way of known connections by tunnel and by full NAT: what most of their packets need, as functions of the program that looked the
//! connection up, so that they do not pay for the way into another one. What comes back is the verdict, or the stage that the packet goes on
//! in: one that needs more goes there all the same.

use crate::abi::{Tunnel, dest, tunnel};
use crate::core::tunnelled;
use crate::ct::{Key, V4, V6};
use crate::frag::Part;
use crate::fullnat;
use crate::packet::{Flow, Ip, Packet, Window, parse};
use crate::tables::{Of, Tables};
use crate::verdict::{Reason, Stage, Verdict, drop};

/// Where a plain packet goes on, without leaving the program.
#[inline(always)]
pub fn go<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, verdict: Verdict) -> Verdict {
    match verdict.next() {
        Some((Stage::Tunnel, dest)) => into_tunnel::<I, P, T>(p, t, dest),
        Some((Stage::Fullnat, slot)) => request::<I, P, T>(p, t, slot),
        Some((Stage::FullnatReply, slot)) => {
            let verdict = reply::<I, P, T>(p, t, slot);
            match verdict.next() {
                Some((Stage::FullnatSend, number)) => send::<I, P, T>(p, t, number),
                _ => verdict,
            }
        }
        _ => verdict,
    }
}

/// Into a tunnel without a checksum outside, to a next hop that is known, if it fits.
#[inline(always)]
pub fn into_tunnel<I: Ip, P: Packet, T: Tables>(p: &mut P, t: &T, index: u32) -> Verdict {
    let further = Verdict::go(Stage::Tunnel, index);
    let (Some(d), Some(by)) = (t.dest(index), t.tunnel(index)) else { return further };
    let Some(hop) = t.hop((d.out >> 32) as u32) else { return further };
    if by.flags & (tunnel::CSUM | tunnel::REMCSUM) != 0 || hop.ifindex == 0 || !t.sized() {
        return further;
    }
    let (len, ttl) = {
        let Some(w) = p.window(I::L4) else { return further };
        (I::total_len(&w), w.r8(I::TTL))
    };
    // All that a tunnel without a checksum asks of its packets' flow.
    let flow = Flow::<I> {
        key: Key::default(),
        tcp: false,
        sctp: false,
        flags: 0,
        ttl,
        by: 0,
        part: Part::WHOLE,
        len,
        cookie: 0,
        dest: index,
        error: false,
    };
    let mtu = u32::from(d.mtu);
    let as_a = |kind| Tunnel { kind, flags: 0, ..*by };
    let to = &d.address;
    // What kind it is shows in the code, with the sizes.
    let sent = match (by.kind, d.out as u32 & dest::V6) {
        (tunnel::GUE, 0) => tunnelled::<I, V4, P>(p, &flow, &as_a(tunnel::GUE), to, hop, mtu, Reason::Tunnel),
        (tunnel::GRE, 0) => tunnelled::<I, V4, P>(p, &flow, &as_a(tunnel::GRE), to, hop, mtu, Reason::Tunnel),
        (_, 0) => tunnelled::<I, V4, P>(p, &flow, &as_a(tunnel::IPIP), to, hop, mtu, Reason::Tunnel),
        (tunnel::GUE, _) => tunnelled::<I, V6, P>(p, &flow, &as_a(tunnel::GUE), to, hop, mtu, Reason::Tunnel),
        (tunnel::GRE, _) => tunnelled::<I, V6, P>(p, &flow, &as_a(tunnel::GRE), to, hop, mtu, Reason::Tunnel),
        (_, _) => tunnelled::<I, V6, P>(p, &flow, &as_a(tunnel::IPIP), to, hop, mtu, Reason::Tunnel),
    };
    // Too large: that is said elsewhere.
    sent.unwrap_or(further)
}

/// A client's packet by full NAT.
#[inline(always)]
pub fn request<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, slot: u32) -> Verdict {
    let Some(flow) = known::<I, P, T>(p, t) else { return drop(Reason::Internal) };
    fullnat::request(p, t, &flow, slot)
}

/// A real server's reply by full NAT; then [`send`] sees to it.
#[inline(always)]
pub fn reply<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, slot: u32) -> Verdict {
    let Some(flow) = known::<I, P, T>(p, t) else { return drop(Reason::Internal) };
    fullnat::reply(p, t, &flow, slot)
}

#[inline(always)]
pub fn send<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, number: u32) -> Verdict {
    let Some(flow) = known::<I, P, T>(p, t) else { return drop(Reason::Internal) };
    fullnat::send(p, t, &flow, number)
}

/// What the packet said when its connection was looked up.
#[inline(always)]
fn known<I: Ip, P: Packet, T: Tables>(p: &mut P, t: &T) -> Option<Flow<I>> {
    t.kept().or_else(|| parse(p).ok())
}
