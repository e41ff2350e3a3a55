//! The way of ICMP errors about flows, to the other end: see [`crate::related`].

use super::{has, into_tunnel, is_nat};
use crate::abi::{Hop, config, dest, hop};
use crate::conn::{self, Conns, HitOf};
use crate::ct::{self, Found};
use crate::far::{Extras, Far};
use crate::frag::Part;
use crate::icmp::{Answer, Error};
use crate::packet::{Flow, Frame, Ip, L3, Packet};
use crate::proto::{sctp, tcp};
use crate::related::{self, Related};
use crate::tables::{Of, Route, Tables};
use crate::tunnel;
use crate::verdict::{Action, Reason, Stage, Verdict, drop, pass, stranger};
use crate::xmit::{self, End};

/// An ICMP packet, with `by` bytes of extra headers: an error about a flow goes to its other end; all else is the kernel's business.
#[inline(always)]
pub(super) fn related<I: Of<T> + Extras + Answer, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    by: usize,
    stage: Stage,
    number: u32,
) -> Verdict {
    if stage == Stage::ErrorOuter {
        return about_tunnel::<I, P, T>(p, t);
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
        Found::None if has(t, config::SCHEDULE_ICMP) => {
            t.keep(&about(&error));
            Verdict::go(Stage::First, 0)
        }
        _ => perhaps_about_tunnel::<I, P>(p, by),
    }
}

/// The flow that an error is about, as one that may begin with it: of the quoted packet only the ports are sure to be there.
#[inline(always)]
fn about<I: Ip>(error: &Related<I>) -> Flow<I> {
    Flow {
        key: error.key,
        tcp: ct::proto(error.key.control) == conn::TCP,
        sctp: ct::proto(error.key.control) == conn::SCTP,
        flags: 0,
        ttl: error.ttl,
        by: 0,
        part: Part::WHOLE,
        len: error.len,
        cookie: 0,
        dest: 0,
        error: true,
    }
}

/// The same for callers that keep nothing, in the stages of a flow's beginning.
#[inline(always)]
pub(super) fn kept<I: Extras, P: Frame, T: Tables>(p: &mut P, t: &T, stage: Stage) -> Option<Flow<I>> {
    let begins = matches!(
        stage,
        Stage::First | Stage::Enter | Stage::Link | Stage::Lend | Stage::MakeWay | Stage::GiveUp | Stage::Linked
    );
    if !begins || !has(t, config::SCHEDULE_ICMP) {
        return None;
    }
    let by = I::find(p).ok()?.by;
    related::look::<I, _>(&mut Far::<I, P>::new(p, by), by).map(|error| about(&error))
}

/// Of no connection, and for no virtual service.
#[inline(always)]
pub(super) fn no_service<I: Ip, T: Tables>(t: &T, flow: &Flow<I>) -> Verdict {
    if flow.error {
        // It may quote what this host has sent in GUE.
        let udp = !flow.tcp && !flow.sctp;
        return if udp { Verdict::go(Stage::ErrorOuter, 0) } else { pass(Reason::Icmp) };
    }
    let ends = flow.tcp && flow.flags & tcp::RST != 0 || flow.sctp && flow.flags == sctp::ABORT;
    if has(t, config::NAT_ICMP_SEND) && !ends { Verdict::go(Stage::Reject, 0) } else { pass(Reason::NoService) }
}

/// ... from where a real server by NAT is: it is told that there is nothing to answer, as far as it would have been forwarded (`ip_vs_out_hook`).
#[inline(always)]
pub(super) fn reject<I: Of<T> + Answer, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>) -> Verdict {
    let pass = super::fragments::after_first(t, flow, pass(Reason::NoService));
    let Some(index) = t.server::<I>(flow.source(), flow.key.sport(), flow.protocol()) else { return pass };
    let Some(by) = t.tunnel(index) else { return pass };
    let own = I::from_address(&by.source);
    let mut hop = Hop::default();
    // What is for this host the kernel would not forward: a health check's answer, perhaps.
    let forwards = t.route::<I>([flow.source(), flow.destination()], flow.protocol(), flow.len, &mut hop);
    if flow.ttl <= 1 || own == I::Addr::default() || !matches!(forwards, Route::Hop | Route::NoNeighbour) {
        return pass;
    }
    sent(p, t, flow, Error::PortUnreachable, 0, Some(own), [Reason::ServerTold, Reason::ServerToldLimited])
}

/// Answer the client with an ICMP error about this packet.
#[inline(always)]
pub(super) fn answer<I: Ip + Answer, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    flow: &Flow<I>,
    error: Error,
    mtu: u32,
) -> Verdict {
    let reasons = match error {
        Error::TimeExceeded => [Reason::TtlExceeded, Reason::TtlLimited],
        Error::PortUnreachable => [Reason::NoDest, Reason::NoDestLimited],
        Error::TooBig | Error::Said(_) => [Reason::SentTooBig, Reason::TooBigLimited],
    };
    sent(p, t, flow, error, mtu, None, reasons)
}

/// `from`: as a router on the packet's way, in the place of whom it was for. The reasons are those of sent, and of not.
#[inline(always)]
fn sent<I: Ip + Answer, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    flow: &Flow<I>,
    error: Error,
    mtu: u32,
    from: Option<I::Addr>,
    [sent, limited]: [Reason; 2],
) -> Verdict {
    if !t.may_send_icmp() {
        return drop(limited);
    }
    if from.is_some() && !xmit::count_down::<I, P>(p) {
        return drop(Reason::Internal);
    }
    // The IP id only tells fragments apart; the error is never fragmented.
    if !I::answer(p, error, mtu, flow.key.sport(), from) {
        return drop(limited);
    }
    // By the VLAN device that it came in by, with its tag.
    let iface = t.iface(p.ifindex());
    let tagged = iface.ifindex == p.ifindex() && iface.lower != 0;
    Verdict::new(if tagged { Action::Out(iface.ifindex | hop::VLAN) } else { Action::Back }, sent)
}

/// About no connection: the kernel's, unless what it quotes is a tunnel's packet of ours.
#[inline(always)]
fn perhaps_about_tunnel<I: Ip, P: Packet>(p: &mut P, by: usize) -> Verdict {
    if by == 0 && related::may_be_outer::<I, P>(p) {
        return Verdict::go(Stage::ErrorOuter, 0);
    }
    stranger(Reason::Icmp)
}

/// About the outer packet of a tunnel: the client is told the same about what is in it, from the virtual address (`ip_vs_in_icmp`).
#[inline(always)]
fn about_tunnel<I: Of<T> + Answer, P: Packet, T: Tables>(p: &mut P, t: &T) -> Verdict {
    // (By way of a look for a service it comes here without.)
    if !related::may_be_outer::<I, P>(p) {
        return stranger(Reason::Icmp);
    }
    let Some(outer) = related::outer::<I, P>(p) else { return stranger(Reason::Icmp) };
    let c = I::conns(t);
    let Found::Live(hit) = ct::lookup::<I, _>(c.table(), &outer.key) else { return stranger(Reason::Icmp) };
    if hit.control & ct::REVERSE != 0 || conn::expired(c.policy(), hit.control, c.now_s()) {
        return pass(Reason::Icmp);
    }
    let index = conn::dest(hit.control);
    let (Some(d), Some(by)) = (t.dest(index), t.tunnel(index)) else { return drop(Reason::Internal) };
    let flags = d.out as u32 & (dest::METHOD | dest::V6 | dest::LOCAL);
    let tunnel = dest::TUNNEL | if I::FAMILY == 6 { dest::V6 } else { 0 };
    let too_big = outer.said == if I::FAMILY == 4 { FRAGMENTATION_NEEDED } else { PACKET_TOO_BIG };
    // Who lets his packets be cut is told of no limit.
    if flags != tunnel || I::from_address(&d.address) != outer.to || too_big && outer.may_fragment {
        return pass(Reason::Icmp);
    }
    let rest = if too_big { room::<I>(outer.rest, tunnel::overhead::<I>(by)) } else { outer.rest };
    let (client, vip) = (I::source(&outer.key.words), I::destination(&outer.key.words));
    let mut hop = Hop::default();
    if t.route::<I>([vip, client], I::ICMP, outer.len, &mut hop) != Route::Hop {
        return pass(Reason::Icmp);
    }
    // Not what Ethernet pads it with.
    if !p.cut(L3 + outer.len as usize) {
        return drop(Reason::Internal);
    }
    let first = 2 * I::HEADER + 8;
    // (By constants.)
    let done = match outer.before - first {
        0 => p.strip(first),
        4 => p.strip(first + 4),
        8 => p.strip(first + 8),
        _ => p.strip(first + 12),
    };
    if !done || !I::answer(p, Error::Said(outer.said), rest, outer.key.sport(), None) {
        return drop(Reason::Internal);
    }
    t.count_out(index, outer.len);
    xmit::send(p, &hop, Reason::ErrorOut)
}

/// What fits into a tunnel by a link of this MTU. No less than all links take is believed (IPv4), or heeded (IPv6, RFC 8201 4).
#[inline(always)]
fn room<I: Ip>(mtu: u32, overhead: u32) -> u32 {
    if I::FAMILY == 6 {
        return if mtu > 1280 + overhead { mtu - overhead } else { 1280 };
    }
    let mtu = mtu & 0xffff;
    if mtu > 68 + overhead { mtu - overhead } else { mtu }
}

/// Type and code.
const FRAGMENTATION_NEEDED: u16 = 3 << 8 | 4;
const PACKET_TOO_BIG: u16 = 2 << 8;

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
    let flow = Flow { tcp: true, sctp: false, dest: index, ..about(error) };
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
