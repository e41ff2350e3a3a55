//! ICMP errors about a flow of ours: a router's or the client's to the virtual address go to the real server, a real server's (or a router's
//! on its side) to the client, with what they quote as that end knows it (`ip_vs_in_icmp`, `ip_vs_out_icmp`, `ip_vs_nat_icmp`). They change
//! no state.
//!
//! ```text
//! IP header | ICMP 8 | quoted IP header | its extra headers | their first 8 bytes behind: the ports
//! ```

use crate::conn::{self, Addressing};
use crate::csum::{self, Delta};
use crate::ct::{Key, V4};
use crate::far::Extras;
use crate::packet::{IP_GRE, IP_SCTP, IP_TCP, IP_UDP, Ip, L3, Packet, Window};
use crate::xmit::End;

/// An error, and the packet that would go the other way than the one it quotes: the direction in which the error goes.
pub struct Related<I: Ip> {
    pub key: Key<I::Words>,
    pub ttl: u8,
    /// Bytes of extra headers in what it quotes.
    pub by: usize,
    /// Length of the whole IP packet.
    pub len: u32,
}

/// Start of the quoted IP header.
#[inline(always)]
const fn quote<I: Ip>() -> usize {
    I::L4 + 8
}

/// `None`: no error, or about nothing that a flow of ours could send. Its outer header has been looked at, but not its end; `by` bytes of
/// extra headers follow it.
#[inline(always)]
pub fn look<I: Extras, P: Packet>(p: &mut P, by: usize) -> Option<Related<I>> {
    let within = quote::<I>() - L3;
    let (len, ttl, from, to) = {
        let w = p.window(quote::<I>() + I::HEADER)?;
        let (from, to) = (I::address(&w, I::SOURCE + within), I::address(&w, I::DESTINATION + within));
        // An error goes to whom it quotes.
        if !I::is_error(w.r8(I::L4)) || I::address(&w, I::DESTINATION) != from {
            return None;
        }
        (I::total_len(&w), w.r8(I::TTL), from, to)
    };
    let (protocol, quoted_by) = I::find_quoted(p, within)?;
    // All of it within the packet, not in what Ethernet pads it with.
    if (len as usize) < within + I::HEADER + 8 + by + quoted_by {
        return None;
    }
    let proto = match protocol {
        IP_TCP => conn::TCP,
        IP_UDP => conn::UDP,
        // Its checksum is among what is quoted only by accident, and nobody looks at it.
        IP_SCTP => conn::SCTP,
        _ => return None,
    };
    let ports = u32::from_be(p.beyond(quoted_by, quote::<I>() + I::HEADER + 8)?.r32(quote::<I>() + I::HEADER));
    let key = Key::of(I::words(to, from), ports.rotate_left(16), proto);
    Some(Related { key, ttl, by: quoted_by, len })
}

/// Put an address and a port in the place of those of one end, and, in what is quoted (which has `by` bytes of extra headers), of the
/// other end: `end` is that of the error itself. `forward`: count the TTL down too. False: too short.
#[inline(always)]
pub fn translate<I: Ip, P: Packet>(p: &mut P, end: End, address: I::Addr, port: u16, by: usize, forward: bool) -> bool {
    let within = quote::<I>() - L3;
    let (at, quoted_at, port_at) = match end {
        End::Source => (I::SOURCE, I::DESTINATION + within, quote::<I>() + I::HEADER + 2),
        End::Destination => (I::DESTINATION, I::SOURCE + within, quote::<I>() + I::HEADER),
    };
    let port = port.to_be();
    let ports = {
        let Some(mut w) = p.beyond(by, quote::<I>() + I::HEADER + 8) else { return false };
        let old = w.r16(port_at);
        w.w16(port_at, port);
        Delta::default().replace16(old, port)
    };
    let (outer, rest) = {
        let Some(mut w) = p.window(quote::<I>() + I::HEADER) else { return false };
        let (old, quoted) = (I::address(&w, at), I::address(&w, quoted_at));
        I::set_address(&mut w, at, address);
        I::set_address(&mut w, quoted_at, address);
        let outer = I::delta(old, address);
        if forward {
            I::forward_header(&mut w, outer);
        } else {
            I::fix_header(&mut w, outer);
        }
        let inner = I::delta(quoted, address);
        (outer, ports.and(I::fix_quoted_header(&mut w, within, inner)))
    };
    // ICMPv6 sums up the addresses of the packet it is in, ICMP does not.
    let pseudo = if I::FAMILY == 6 { outer } else { Delta::default() };
    p.fix_transport(I::L4 + 2, false, pseudo, rest)
}

/// The change of a quoted IPv4 header's sum by its addresses, its own checksum put right.
#[inline(always)]
pub(crate) fn fix_checksum(w: &mut impl Window, at: usize, addresses: Delta) -> Delta {
    let old = w.r16(at);
    let new = csum::adjust(old, addresses);
    w.w16(at, new);
    addresses.replace16(old, new)
}

/// An error about the outer packet of a tunnel, IPv4 in IPv4 (`ip_vs_in_icmp` knows no others): what it says, and the inner packet as far as
/// it is quoted.
///
/// ```text
/// IP header | ICMP 8 | outer IP header | 0, 4, 8 or 12 by the kind of tunnel | inner IP header | 4: the ports
/// ```
pub struct Outer {
    /// Type and code, and the word behind them.
    pub said: u16,
    pub rest: u32,
    /// The tunnel's far end.
    pub to: u32,
    /// The client's packet in it.
    pub key: Key<[u64; 1]>,
    pub may_fragment: bool,
    /// Bytes before the inner packet.
    pub before: usize,
    /// Length of the whole IP packet.
    pub len: u32,
}

/// May an error be about a tunnel? Without a look at more than the first bytes of what it quotes.
#[inline(always)]
pub fn may_be_outer<P: Packet>(p: &mut P) -> bool {
    let Some(w) = p.window(quote::<V4>() + V4::HEADER) else { return false };
    let at = quote::<V4>();
    let whole = w.r8(L3) == 0x45 && w.r8(at) == 0x45 && w.r16(at + 6) & 0x3fffu16.to_be() == 0;
    let ours = w.r32(V4::DESTINATION) == w.r32(at + 12);
    whole && ours && V4::is_error(w.r8(V4::L4)) && matches!(w.r8(at + 9), 4 | IP_GRE | IP_UDP)
}

/// See [`Outer`]; after [`may_be_outer`]. `None`: of no tunnel of ours, or too little of it is quoted.
#[inline(always)]
pub fn outer<P: Packet>(p: &mut P) -> Option<Outer> {
    const AT: usize = quote::<V4>() + V4::HEADER;
    let protocol = p.window(AT)?.r8(quote::<V4>() + 9);
    // Sizes are constants wherever the packet is touched.
    match protocol {
        4 => inner::<P, 0>(p),
        IP_GRE => {
            let head = p.window(AT + 4)?.r32(AT);
            match u32::from_be(head) {
                0x0800 => inner::<P, 4>(p),
                0x8000_0800 => inner::<P, 8>(p),
                _ => None,
            }
        }
        // Version 0, data, IPv4, no optional fields. (Its port is the tunnel's, or no connection is found by it.)
        IP_UDP if p.window(AT + 12)?.r32(AT + 8) == 0x0004_0000u32.to_be() => inner::<P, 12>(p),
        _ => None,
    }
}

#[inline(always)]
fn inner<P: Packet, const BETWEEN: usize>(p: &mut P) -> Option<Outer> {
    let at = quote::<V4>() + V4::HEADER + BETWEEN;
    let w = p.window(quote::<V4>() + V4::HEADER + BETWEEN + V4::HEADER + 4)?;
    let len = V4::total_len(&w);
    let fragment = u16::from_be(w.r16(at + 6));
    if w.r8(at) != 0x45 || fragment & 0x3fff != 0 || (len as usize) < at + V4::HEADER + 4 - L3 {
        return None;
    }
    let proto = match w.r8(at + 9) {
        IP_TCP => conn::TCP,
        IP_UDP => conn::UDP,
        IP_SCTP => conn::SCTP,
        _ => return None,
    };
    let ports = u32::from_be(w.r32(at + V4::HEADER));
    Some(Outer {
        said: u16::from_be(w.r16(V4::L4)),
        rest: u32::from_be(w.r32(V4::L4 + 4)),
        to: w.r32(quote::<V4>() + 16),
        key: Key::of(V4::words(w.r32(at + 12), w.r32(at + 16)), ports, proto),
        may_fragment: fragment & 0x4000 == 0,
        before: at - L3,
        len,
    })
}
