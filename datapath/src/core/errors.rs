//! The way of ICMP errors about flows, to the other end: see [`crate::related`].

use super::{into_tunnel, is_nat};
use crate::abi::{Hop, dest};
use crate::conn::{self, Addressing, Conns, HitOf};
use crate::ct::{self, Found, V4};
use crate::far::Extras;
use crate::frag::Part;
use crate::icmp::{Answer, Error};
use crate::packet::{Flow, Ip, L3, Packet};
use crate::related::{self, Related};
use crate::tables::{Of, Route, Tables};
use crate::tunnel;
use crate::verdict::{Action, Reason, Stage, Verdict, drop, pass, stranger};
use crate::xmit::{self, End};

/// An ICMP packet, with `by` bytes of extra headers: an error about a flow goes to its other end; all else is the kernel's business.
#[inline(always)]
pub(super) fn related<I: Of<T> + Extras, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    by: usize,
    stage: Stage,
    number: u32,
) -> Verdict {
    if stage == Stage::ErrorOuter {
        return about_tunnel(p, t);
    }
    let Some(error) = related::look::<I, P>(p, by) else { return perhaps_about_tunnel::<I, P>(p, by) };
    if stage == Stage::ErrorTunnel {
        return error_into_tunnel(p, t, &error, number);
    }
    // Not for a router either: nobody is told of an error about an error.
    if error.ttl <= 1 {
        return pass(Reason::Icmp);
    }
    let c = I::conns(t);
    // It keeps no flow alive, and one that has timed out is none.
    let over = |control| conn::expired(c.policy(), control, c.now_s());
    match ct::lookup::<I, _>(c.table(), &error.key) {
        Found::Live(hit) if stage == Stage::ErrorLent => about_lent(p, t, &error, &hit),
        Found::Live(hit) if conn::fullnat::is_lent::<I, _>(c, hit.control) => Verdict::go(Stage::ErrorLent, 0),
        Found::Live(hit) if hit.control & ct::REVERSE != 0 => match conn::follow::<I, _>(c, &error.key, &hit) {
            Some(reply) if !over(reply.forward.control) => error_to_client(p, t, &error, &reply),
            _ => pass(Reason::Icmp),
        },
        Found::Live(hit) if !over(hit.control) => {
            error_to_server(p, t, &error, conn::dest(hit.control), I::source(&error.key.words))
        }
        _ => perhaps_about_tunnel::<I, P>(p, by),
    }
}

/// About no connection: the kernel's, unless what it quotes is a tunnel's packet of ours.
#[inline(always)]
fn perhaps_about_tunnel<I: Ip, P: Packet>(p: &mut P, by: usize) -> Verdict {
    if I::FAMILY == 4 && by == 0 && related::may_be_outer(p) {
        return Verdict::go(Stage::ErrorOuter, 0);
    }
    stranger(Reason::Icmp)
}

/// About the outer packet of a tunnel: the client is told the same about what is in it, from the virtual address (`ip_vs_in_icmp`).
#[inline(always)]
fn about_tunnel<P: Packet, T: Tables>(p: &mut P, t: &T) -> Verdict {
    let Some(outer) = related::outer(p) else { return stranger(Reason::Icmp) };
    let c = <V4 as Of<T>>::conns(t);
    let Found::Live(hit) = ct::lookup::<V4, _>(c.table(), &outer.key) else { return stranger(Reason::Icmp) };
    if hit.control & ct::REVERSE != 0 || conn::expired(c.policy(), hit.control, c.now_s()) {
        return pass(Reason::Icmp);
    }
    let index = conn::dest(hit.control);
    let (Some(d), Some(by)) = (t.dest(index), t.tunnel(index)) else { return drop(Reason::Internal) };
    let flags = d.out as u32;
    let ours =
        flags & (dest::METHOD | dest::V6 | dest::LOCAL) == dest::TUNNEL && V4::from_address(&d.address) == outer.to;
    // Who lets his packets be cut is told of no limit.
    if !ours || outer.said == FRAGMENTATION_NEEDED && outer.may_fragment {
        return pass(Reason::Icmp);
    }
    let mut rest = outer.rest;
    if outer.said == FRAGMENTATION_NEEDED {
        let (mtu, overhead) = (rest & 0xffff, tunnel::overhead::<V4>(by));
        rest = if mtu > 68 + overhead { mtu - overhead } else { mtu };
    }
    let (client, vip) = (V4::source(&outer.key.words), V4::destination(&outer.key.words));
    let mut hop = Hop::default();
    if t.route::<V4>([vip, client], V4::ICMP, outer.len, &mut hop) != Route::Hop {
        return pass(Reason::Icmp);
    }
    // Not what Ethernet pads it with.
    if !p.cut(L3 + outer.len as usize) {
        return drop(Reason::Internal);
    }
    let done = match outer.before {
        48 => p.strip(48),
        52 => p.strip(52),
        56 => p.strip(56),
        _ => p.strip(60),
    };
    if !done || !V4::answer(p, Error::Said(outer.said), rest, outer.key.sport()) {
        return drop(Reason::Internal);
    }
    t.count_out(index, outer.len);
    xmit::send(p, &hop, Reason::ErrorOut)
}

/// Type and code.
const FRAGMENTATION_NEEDED: u16 = 3 << 8 | 4;

/// ... about a flow by FULLNAT: first the end that other methods leave alone, then as for NAT.
#[inline(always)]
fn about_lent<'a, I: Of<T>, P: Packet, T: Tables>(
    p: &mut P,
    t: &'a T,
    error: &Related<I>,
    hit: &HitOf<'a, I, I::Conns>,
) -> Verdict {
    let c = I::conns(t);
    let over = |control| conn::expired(c.policy(), control, c.now_s());
    if hit.control & ct::REVERSE != 0 {
        return match conn::fullnat::follow::<I, _>(c, &error.key, hit) {
            Some((reply, port)) if !over(reply.forward.control) => {
                if !related::translate::<I, P>(p, End::Destination, reply.client, port, error.by, false) {
                    return drop(Reason::Internal);
                }
                error_to_client(p, t, error, &reply)
            }
            _ => pass(Reason::Icmp),
        };
    }
    if over(hit.control) {
        return pass(Reason::Icmp);
    }
    let Some(side) = conn::fullnat::side::<I, _>(c, hit.slot::<I>(), &error.key) else {
        return drop(Reason::Entering);
    };
    // Whoever sent it: the real server needs no route to there.
    if !related::translate::<I, P>(p, End::Source, side.address, side.port(), error.by, false) {
        return drop(Reason::Internal);
    }
    error_to_server(p, t, error, conn::dest(hit.control), side.address)
}

/// `source`: whom it comes from, as the server sees it.
#[inline(always)]
fn error_to_server<I: Ip, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    error: &Related<I>,
    index: u32,
    source: I::Addr,
) -> Verdict {
    let Some(d) = t.dest(index) else { return drop(Reason::Internal) };
    let flags = d.out as u32;
    if flags & dest::AVAILABLE == 0 {
        return drop(Reason::DestGone);
    }
    t.count_in(index, error.len);
    let local = flags & dest::LOCAL != 0;
    let masq = is_nat(d) || d.lends();
    if masq {
        let address = I::from_address(&d.address);
        let port = if d.port == 0 { error.key.dport() } else { d.port };
        if !related::translate::<I, P>(p, End::Destination, address, port, error.by, !local) {
            return drop(Reason::Internal);
        }
    }
    if local {
        return Verdict::new(Action::Up, Reason::ErrorIn);
    }
    if flags & dest::METHOD == dest::TUNNEL {
        return Verdict::go(Stage::ErrorTunnel, index);
    }
    let mut hop = t.hop((d.out >> 32) as u32).copied().unwrap_or_default();
    let address = I::from_address(&d.address);
    if hop.ifindex == 0 && t.route::<I>([source, address], I::ICMP, error.len, &mut hop) != Route::Hop {
        return drop(Reason::NoNeighbour);
    }
    if !masq && !xmit::count_down::<I, P>(p) {
        return drop(Reason::Internal);
    }
    xmit::send(p, &hop, Reason::ErrorIn)
}

/// Its outer headers have no checksum: there is none to make one of without reading it all.
#[inline(always)]
fn error_into_tunnel<I: Ip, P: Packet, T: Tables>(p: &mut P, t: &T, error: &Related<I>, index: u32) -> Verdict {
    let flow: Flow<I> = Flow {
        key: error.key,
        tcp: true,
        sctp: false,
        flags: 0,
        ttl: error.ttl,
        by: 0,
        part: Part::WHOLE,
        len: error.len,
        cookie: 0,
        dest: index,
    };
    into_tunnel(p, t, &flow, index, Reason::ErrorIn)
}

/// As from the virtual address, about a packet to it.
#[inline(always)]
fn error_to_client<I: Of<T>, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    error: &Related<I>,
    reply: &conn::ReplyOf<'_, I, I::Conns>,
) -> Verdict {
    t.count_out(conn::dest(reply.forward.control), error.len);
    let mut hop = Hop::default();
    let route = t.route::<I>([reply.virtual_address, reply.client], I::ICMP, error.len, &mut hop);
    let ready = route == Route::Hop;
    if !related::translate::<I, P>(p, End::Source, reply.virtual_address, reply.virtual_port, error.by, ready) {
        return drop(Reason::Internal);
    }
    if ready { xmit::send(p, &hop, Reason::ErrorOut) } else { Verdict::new(Action::Up, Reason::ErrorOut) }
}
