//! Sending: what each forwarding method changes in a packet.

use crate::abi::Hop;
use crate::csum::Delta;
use crate::packet::{Flow, Ip, L3, Packet, Window};
use crate::tables::Route;
use crate::verdict::{Action, Reason, Verdict, drop};

/// Which end of the packet NAT rewrites.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// Put an address and a port (host order) in the place of those of one end. `forward`: count the TTL down as well (not if the
/// kernel's own forwarding comes after us).
#[inline(always)]
pub fn translate<I: Ip, P: Packet>(
    p: &mut P,
    flow: &Flow<I>,
    end: End,
    address: I::Addr,
    port: u16,
    forward: bool,
) -> bool {
    let (at, port_at) = match end {
        End::Source => (I::SOURCE, I::L4),
        End::Destination => (I::DESTINATION, I::L4 + 2),
    };
    let port = port.to_be();
    let (addresses, delta, ports) = {
        let Some(mut w) = p.window(I::L4 + 8) else { return false };
        let (old, old_port, old_ports) = (I::address(&w, at), w.r16(port_at), w.r32(I::L4));
        I::set_address(&mut w, at, address);
        w.w16(port_at, port);
        let addresses = I::delta(old, address);
        if forward {
            I::forward_header(&mut w, addresses);
        } else {
            I::fix_header(&mut w, addresses);
        }
        (addresses, Delta::default().replace16(old_port, port), [old_ports, w.r32(I::L4)])
    };
    fix(p, flow, addresses, delta, ports)
}

/// The transport checksum. `rest`: the change of the transport header; `ports`: both of them, before and after.
#[inline(always)]
fn fix<I: Ip, P: Packet>(p: &mut P, flow: &Flow<I>, addresses: Delta, rest: Delta, ports: [u32; 2]) -> bool {
    if P::SCTP && flow.sctp {
        return p.fix_crc::<I>(0, flow.transport_len(), ports, addresses);
    }
    let tcp = flow.tcp;
    p.fix_transport(if tcp { I::L4 + 16 } else { I::L4 + 6 }, !tcp, addresses, rest)
}

/// Both ends of a packet, and what is added to the TCP sequence numbers of its direction and of the other.
pub struct Ends<A> {
    pub source: (A, u16),
    pub destination: (A, u16),
    pub sequence: u32,
    pub acknowledged: u32,
}

/// Put addresses and ports in the place of those of both ends (FULLNAT). `forward` as in [`translate`].
#[inline(always)]
pub fn readdress<I: Ip, P: Packet>(p: &mut P, flow: &Flow<I>, ends: &Ends<I::Addr>, forward: bool) -> bool {
    let (addresses, mut rest, ports) = {
        let Some(mut w) = p.window(I::L4 + 8) else { return false };
        let (from, to) = (I::address(&w, I::SOURCE), I::address(&w, I::DESTINATION));
        I::set_address(&mut w, I::SOURCE, ends.source.0);
        I::set_address(&mut w, I::DESTINATION, ends.destination.0);
        let moved = I::delta(from, ends.source.0).and(I::delta(to, ends.destination.0));
        if forward {
            I::forward_header(&mut w, moved);
        } else {
            I::fix_header(&mut w, moved);
        }
        let (old, new) = (w.r32(I::L4), (u32::from(ends.source.1) << 16 | u32::from(ends.destination.1)).to_be());
        w.w32(I::L4, new);
        (moved, Delta::default().replace(old, new), [old, new])
    };
    if flow.tcp {
        let Some(mut w) = p.window(I::L4 + 12) else { return false };
        let (sequence, acknowledged) = (w.r32(I::L4 + 4), w.r32(I::L4 + 8));
        let new = [
            u32::from_be(sequence).wrapping_add(ends.sequence).to_be(),
            u32::from_be(acknowledged).wrapping_add(ends.acknowledged).to_be(),
        ];
        w.w32(I::L4 + 4, new[0]);
        w.w32(I::L4 + 8, new[1]);
        rest = rest.replace(sequence, new[0]).replace(acknowledged, new[1]);
    }
    fix(p, flow, addresses, rest, ports)
}

/// The same of any packet with a flow: a fragment that is not the first one has no ports and no checksum.
#[inline(always)]
pub fn translate_any<I: Ip, P: Packet>(
    p: &mut P,
    flow: &Flow<I>,
    end: End,
    address: I::Addr,
    port: u16,
    forward: bool,
) -> bool {
    if !flow.part.is_later() {
        return translate::<I, P>(p, flow, end, address, port, forward);
    }
    match end {
        End::Source => readdress_later::<I, P>(p, Some(address), None, forward),
        End::Destination => readdress_later::<I, P>(p, None, Some(address), forward),
    }
}

/// Put addresses in the place of those of a fragment that is not the first one; `None`: it stays. `forward` as in [`translate`].
#[inline(always)]
pub fn readdress_later<I: Ip, P: Packet>(
    p: &mut P,
    source: Option<I::Addr>,
    destination: Option<I::Addr>,
    forward: bool,
) -> bool {
    let delta = {
        let Some(mut w) = p.window(I::L4) else { return false };
        let mut delta = Delta::default();
        for (at, address) in [(I::SOURCE, source), (I::DESTINATION, destination)] {
            if let Some(address) = address {
                delta = delta.and(I::delta(I::address(&w, at), address));
                I::set_address(&mut w, at, address);
            }
        }
        if forward {
            I::forward_header(&mut w, delta);
        } else {
            I::fix_header(&mut w, delta);
        }
        delta
    };
    p.changed_address::<I>(delta);
    true
}

/// Destination and source MAC addresses of a frame, the other way round.
#[inline(always)]
pub fn swapped_macs(w: &impl Window) -> [u32; 3] {
    let (a, b, c) = (w.r32(0), w.r32(4), w.r32(8));
    // dst(6) src(6) as three words; swapped: src(6) dst(6).
    if cfg!(target_endian = "little") {
        [b >> 16 | c << 16, c >> 16 | a << 16, a >> 16 | b << 16]
    } else {
        [b << 16 | c >> 16, c << 16 | a >> 16, a << 16 | b >> 16]
    }
}

/// Back to where it came from, as this host's own: MAC addresses, addresses and ports (no sum changes by that) and TTL. False: too short.
#[inline(always)]
pub fn turn<I: Ip, P: Packet>(p: &mut P) -> bool {
    const TTL: u8 = 64;
    let Some(mut w) = p.window(I::L4 + 4) else { return false };
    let macs = swapped_macs(&w);
    w.w32(0, macs[0]);
    w.w32(4, macs[1]);
    w.w32(8, macs[2]);
    let (source, destination) = (I::address(&w, I::SOURCE), I::address(&w, I::DESTINATION));
    I::set_address(&mut w, I::SOURCE, destination);
    I::set_address(&mut w, I::DESTINATION, source);
    let old = w.r8(I::TTL);
    w.w8(I::TTL, TTL);
    // (The IPv4 header has a sum, and the TTL begins a word of it.)
    I::fix_header(&mut w, Delta::default().replace16(u16::from_ne_bytes([old, 0]), u16::from_ne_bytes([TTL, 0])));
    let (from, to) = (w.r16(I::L4), w.r16(I::L4 + 2));
    w.w16(I::L4, to);
    w.w16(I::L4 + 2, from);
    true
}

/// Count the TTL down, nothing else (DR).
#[inline(always)]
pub fn count_down<I: Ip, P: Packet>(p: &mut P) -> bool {
    let Some(mut w) = p.window(I::L4) else { return false };
    I::count_down(&mut w);
    true
}

/// Off to the next hop that was found; or the kernel finds its MAC address (`resolve`), or forwards what is left to it translated.
#[inline(always)]
pub fn leave<P: Packet>(p: &mut P, route: Route, resolve: bool, hop: &Hop, reason: Reason) -> Verdict {
    match route {
        Route::Hop => send(p, hop, reason),
        _ if resolve => Verdict::resolve(hop.ifindex, reason),
        _ => Verdict::new(Action::Up, Reason::ByKernel),
    }
}

/// Address the frame, and out.
#[inline(always)]
pub fn send<P: Packet>(p: &mut P, hop: &Hop, reason: Reason) -> Verdict {
    let back = hop.ifindex == p.ifindex();
    let Some(mut w) = p.window(L3) else { return drop(Reason::Internal) };
    w.w32(0, hop.macs[0]);
    w.w32(4, hop.macs[1]);
    w.w32(8, hop.macs[2]);
    Verdict::new(if back { Action::Back } else { Action::Out(hop.ifindex) }, reason)
}
