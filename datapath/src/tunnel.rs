//! Tunnelling (`-i`): the packet as it came, its TTL counted down, in an outer IP header to the real server, by IPIP, GRE or GUE
//! (`ip_vs_tunnel_xmit`, `ip_vs_tunnel_xmit_v6`).
//!
//! ```text
//! IPIP  outer IP | inner            RFC 2003, 2473: protocol 4 or 41 by the inner family
//! GRE   outer IP | 4 or 8 | inner   RFC 2784: C flag, ethertype of the inner; checksum and 0 with the flag
//! GUE   outer IP | UDP 8 | 4 | inner   draft-ietf-intarea-gue: version 0, protocol 4 or 41, no flags
//! ```
//! TTL of the outer header is that of the inner one as it goes on; TOS too, with ECN as RFC 3168 9.1.1 has it (full functionality); DF too, and
//! with it an id of 0, without it the inner packet's id. IPv6 has flow label 0.

use crate::abi::{Address, Hop, Tunnel, tunnel};
use crate::csum;
use crate::ct::{V4, V6};
use crate::packet::{ETHERTYPE, Flow, IP_GRE, IP_UDP, Ip, L3, Packet, Window};

/// Bytes that the outer headers take, from the outer IP header on.
#[inline(always)]
pub fn overhead<O: Ip>(t: &Tunnel) -> u32 {
    (O::HEADER + between(t)) as u32
}

/// ... and without it.
#[inline(always)]
fn between(t: &Tunnel) -> usize {
    match t.kind {
        tunnel::GUE => 12,
        tunnel::GRE if t.flags & tunnel::CSUM != 0 => 8,
        tunnel::GRE => 4,
        _ => 0,
    }
}

/// What the outer headers take from the inner packet.
#[derive(Clone, Copy)]
struct Inner {
    len: u16,
    tos: u8,
    ttl: u8,
    /// The word with the DF flag, as the outer header is to have it (host order).
    fragment: u16,
    id: u16,
    /// Ones-complement sum of the whole packet, if it can be known without reading all of it.
    sum: u64,
    summed: bool,
    /// A source port for GUE, the same for all packets of the flow.
    entropy: u16,
}

/// Into the tunnel: the frame then is ready to go by `hop`. False: no room in front.
#[inline(always)]
pub fn wrap<I: Ip, O: Ip, P: Packet>(p: &mut P, flow: &Flow<I>, t: &Tunnel, to: &Address, hop: &Hop) -> bool {
    let Some(inner) = look::<I, P>(p, flow, t) else { return false };
    // Sizes are constants wherever the packet is touched.
    match (t.kind, between(t)) {
        (tunnel::GUE, _) => put::<I, O, P, 12>(p, &inner, t, to, hop, IP_UDP),
        (tunnel::GRE, 8) => put::<I, O, P, 8>(p, &inner, t, to, hop, IP_GRE),
        (tunnel::GRE, _) => put::<I, O, P, 4>(p, &inner, t, to, hop, IP_GRE),
        _ => put::<I, O, P, 0>(p, &inner, t, to, hop, I::TUNNELLED),
    }
}

/// Count the TTL down, and see what the outer headers need.
#[inline(always)]
fn look<I: Ip, P: Packet>(p: &mut P, flow: &Flow<I>, t: &Tunnel) -> Option<Inner> {
    let (tos, fragment, id) = {
        let mut w = p.window(I::L4)?;
        I::count_down(&mut w);
        I::service(&w)
    };
    // The same for all packets of a flow, or all fragments of a datagram.
    let (mut noise, mut checked, mut sum) = (flow.part.id(), false, 0);
    // (Nobody else asks.)
    if flow.part.is_whole() && (t.kind == tunnel::GUE || t.flags != 0) {
        let w = p.window(I::L4 + 8)?;
        noise = w.r32(I::L4);
        // The sum of a TCP or UDP segment is that of its pseudo-header, inverted, if its checksum is right; and if it is not, the outer one
        // will not be either.
        checked = flow.tcp || w.r16(I::L4 + 6) != 0;
        sum = I::whole_sum(&w, flow.protocol(), flow.len - u32::from(flow.by));
    }
    let spread = (noise ^ noise >> 16).wrapping_mul(0x9e37_79b1) >> 18;
    Some(Inner {
        len: flow.len as u16,
        tos,
        ttl: flow.ttl.wrapping_sub(1),
        fragment,
        // Fragments of one datagram are packets of their own outside.
        id: id ^ flow.part.at().wrapping_mul(0x9e37),
        sum,
        summed: checked,
        // The range of RFC 6335 for what nobody registers.
        entropy: 0xc000 | spread as u16,
    })
}

/// ECN of the outer header: CE stays inside (`INET_ECN_encapsulate`).
#[inline(always)]
fn outer_tos(tos: u8) -> u8 {
    if tos & 3 == 3 { tos & !3 | 2 } else { tos }
}

#[inline(always)]
fn put<I: Ip, O: Ip, P: Packet, const BETWEEN: usize>(
    p: &mut P,
    inner: &Inner,
    t: &Tunnel,
    to: &Address,
    hop: &Hop,
    protocol: u8,
) -> bool {
    if !p.wrap::<O>(O::HEADER + BETWEEN, protocol) {
        return false;
    }
    {
        let Some(mut w) = p.window(O::L4 + BETWEEN) else { return false };
        w.w32(0, hop.macs[0]);
        w.w32(4, hop.macs[1]);
        w.w32(8, hop.macs[2]);
        w.w16(ETHERTYPE, O::ETHERTYPE.to_be());
        let ends = [O::from_address(&t.source), O::from_address(to)];
        let len = inner.len.wrapping_add(BETWEEN as u16);
        let tos = outer_tos(inner.tos);
        O::set_header(&mut w, ends, protocol, len, [tos, inner.ttl], [inner.id, inner.fragment]);
        match protocol {
            IP_UDP => put_gue::<I, O>(&mut w, inner, t, ends, len),
            IP_GRE => put_gre::<I, O>(&mut w, inner, BETWEEN == 8),
            _ => {}
        }
    }
    p.wrapped::<I>(O::HEADER + BETWEEN);
    true
}

#[inline(always)]
fn put_gue<I: Ip, O: Ip>(w: &mut impl Window, inner: &Inner, t: &Tunnel, ends: [O::Addr; 2], len: u16) {
    let at = O::L4;
    let ports = (u32::from(inner.entropy) << 16 | u32::from(t.port)).to_be();
    let gue = u16::from(I::TUNNELLED).to_be();
    w.w32(at, ports);
    w.w16(at + 4, len.to_be());
    w.w16(at + 8, gue);
    w.w16(at + 10, 0);
    let mut check = 0;
    // Over IPv6 a checksum is asked for, but for tunnels that say they do without (RFC 6935).
    if t.flags & (tunnel::CSUM | tunnel::REMCSUM) != 0 && inner.summed {
        let pseudo = O::sum(ends[0]) + O::sum(ends[1]) + u64::from(len.to_be()) + u64::from(u16::from(IP_UDP).to_be());
        let header = u64::from(ports) + u64::from(len.to_be()) + u64::from(gue);
        check = !csum::fold(pseudo + header + inner.sum);
        if check == 0 {
            check = 0xffff;
        }
    }
    w.w16(at + 6, check);
}

#[inline(always)]
fn put_gre<I: Ip, O: Ip>(w: &mut impl Window, inner: &Inner, summed: bool) {
    let at = O::L4;
    let (flags, ethertype) = (if summed { 0x8000u16.to_be() } else { 0 }, I::ETHERTYPE.to_be());
    w.w16(at, flags);
    w.w16(at + 2, ethertype);
    if summed {
        w.w16(at + 4, !csum::fold(u64::from(flags) + u64::from(ethertype) + inner.sum));
        w.w16(at + 6, 0);
    }
}

/// What a frame holds that came in a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    /// Bytes between the Ethernet header and the inner packet.
    pub outer: usize,
    /// The inner packet's.
    pub ethertype: u16,
}

/// The real server's end: is this frame a packet for a virtual address in one of our tunnels? If so a congestion mark of the outer header is
/// carried over to the inner one (RFC 6040). `vip`: is this address one, as it lies in the packet; `port`: that of GUE. Outer headers with
/// options and outer fragments are none of ours.
#[inline(always)]
pub fn open<P: Packet>(p: &mut P, port: u16, vip: impl Fn(&[u8; 16]) -> bool) -> Option<Opened> {
    let (family, protocol, marked) = {
        let w = p.window(V4::L4)?;
        match u16::from_be(w.r16(ETHERTYPE)) {
            V4::ETHERTYPE if w.r8(L3) == 0x45 && w.r16(L3 + 6) & 0x3fffu16.to_be() == 0 => {
                (4, w.r8(L3 + 9), w.r8(L3 + 1) & 3 == 3)
            }
            V6::ETHERTYPE => (6, w.r8(L3 + 6), w.r8(L3 + 1) >> 4 & 3 == 3),
            _ => return None,
        }
    };
    let outer = if family == 4 { V4::HEADER } else { V6::HEADER };
    // Sizes are constants wherever the packet is touched.
    match (family, protocol) {
        (_, 4 | 41) => at(p, outer, protocol, marked, vip),
        (4, IP_GRE) => gre::<V4, P>(p, marked, vip),
        (_, IP_GRE) => gre::<V6, P>(p, marked, vip),
        (4, IP_UDP) => gue::<V4, P>(p, port, marked, vip),
        (_, IP_UDP) => gue::<V6, P>(p, port, marked, vip),
        _ => None,
    }
}

#[inline(always)]
fn gre<O: Ip, P: Packet>(p: &mut P, marked: bool, vip: impl Fn(&[u8; 16]) -> bool) -> Option<Opened> {
    let (flags, ethertype) = {
        let w = p.window(O::L4 + 4)?;
        (u16::from_be(w.r16(O::L4)), u16::from_be(w.r16(O::L4 + 2)))
    };
    let protocol = match ethertype {
        V4::ETHERTYPE => V4::TUNNELLED,
        V6::ETHERTYPE => V6::TUNNELLED,
        _ => return None,
    };
    // With or without a checksum, which its sender made up from the inner one; no key, no sequence, version 0.
    match flags {
        0 => at(p, O::HEADER + 4, protocol, marked, vip),
        0x8000 => at(p, O::HEADER + 8, protocol, marked, vip),
        _ => None,
    }
}

#[inline(always)]
fn gue<O: Ip, P: Packet>(p: &mut P, port: u16, marked: bool, vip: impl Fn(&[u8; 16]) -> bool) -> Option<Opened> {
    let (to, head, protocol, flags) = {
        let w = p.window(O::L4 + 12)?;
        (u16::from_be(w.r16(O::L4 + 2)), w.r8(O::L4 + 8), w.r8(O::L4 + 9), w.r16(O::L4 + 10))
    };
    // Version 0, data, no optional fields.
    if to != port || head != 0 || flags != 0 {
        return None;
    }
    at(p, O::HEADER + 12, protocol, marked, vip)
}

/// The inner packet after `outer` bytes.
#[inline(always)]
fn at<P: Packet>(
    p: &mut P,
    outer: usize,
    protocol: u8,
    marked: bool,
    vip: impl Fn(&[u8; 16]) -> bool,
) -> Option<Opened> {
    match (outer, protocol) {
        (20, 4) => inner4::<P, 20>(p, marked, vip),
        (24, 4) => inner4::<P, 24>(p, marked, vip),
        (28, 4) => inner4::<P, 28>(p, marked, vip),
        (32, 4) => inner4::<P, 32>(p, marked, vip),
        (40, 4) => inner4::<P, 40>(p, marked, vip),
        (44, 4) => inner4::<P, 44>(p, marked, vip),
        (48, 4) => inner4::<P, 48>(p, marked, vip),
        (52, 4) => inner4::<P, 52>(p, marked, vip),
        (20, 41) => inner6::<P, 20>(p, marked, vip),
        (24, 41) => inner6::<P, 24>(p, marked, vip),
        (28, 41) => inner6::<P, 28>(p, marked, vip),
        (32, 41) => inner6::<P, 32>(p, marked, vip),
        (40, 41) => inner6::<P, 40>(p, marked, vip),
        (44, 41) => inner6::<P, 44>(p, marked, vip),
        (48, 41) => inner6::<P, 48>(p, marked, vip),
        (52, 41) => inner6::<P, 52>(p, marked, vip),
        _ => None,
    }
}

#[inline(always)]
fn inner4<P: Packet, const OUTER: usize>(p: &mut P, marked: bool, vip: impl Fn(&[u8; 16]) -> bool) -> Option<Opened> {
    let mut w = p.window(V4::L4 + OUTER)?;
    if w.r8(L3 + OUTER) >> 4 != 4 || !vip(&V4::bytes(w.r32(V4::DESTINATION + OUTER))) {
        return None;
    }
    let old = w.r16(L3 + OUTER);
    if marked && old & u16::from_be_bytes([0, 3]).to_be() != 0 {
        let new = old | u16::from_be_bytes([0, 3]).to_be();
        let check = w.r16(L3 + OUTER + 10);
        w.w16(L3 + OUTER, new);
        w.w16(L3 + OUTER + 10, csum::adjust(check, csum::Delta::default().replace16(old, new)));
    }
    Some(Opened { outer: OUTER, ethertype: V4::ETHERTYPE })
}

#[inline(always)]
fn inner6<P: Packet, const OUTER: usize>(p: &mut P, marked: bool, vip: impl Fn(&[u8; 16]) -> bool) -> Option<Opened> {
    let mut w = p.window(V6::L4 + OUTER)?;
    let to = [w.r64(V6::DESTINATION + OUTER), w.r64(V6::DESTINATION + OUTER + 8)];
    if w.r8(L3 + OUTER) >> 4 != 6 || !vip(&V6::bytes(to)) {
        return None;
    }
    let ecn = w.r8(L3 + OUTER + 1) >> 4 & 3;
    if marked && ecn != 0 {
        w.w16(L3 + OUTER, w.r16(L3 + OUTER) | 0x0030u16.to_be());
    }
    Some(Opened { outer: OUTER, ethertype: V6::ETHERTYPE })
}
