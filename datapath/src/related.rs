//! ICMP errors about a flow of ours: a router's or the client's to the virtual address go to the real server, a real server's (or a router's
//! on its side) to the client, with what they quote as that end knows it (`ip_vs_in_icmp`, `ip_vs_out_icmp`, `ip_vs_nat_icmp`). They change
//! no state.
//!
//! ```text
//! IP header | ICMP 8 | quoted IP header | its extra headers | their first 8 bytes behind: the ports
//! ```

use crate::conn;
use crate::csum::{self, Delta};
use crate::ct::Key;
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

/// An error about the outer packet of a tunnel, which has the family of the packet in it (`ip_vs_in_icmp`, which knows IPv4 only): what it says, and
/// the inner packet as far as it is quoted.
///
/// ```text
/// IP header | ICMP 8 | outer IP header | 0, 4, 8 or 12 by the kind of tunnel | inner IP header | 4: the ports
/// ```
pub struct Outer<I: Ip> {
    /// Type and code, and the word behind them.
    pub said: u16,
    pub rest: u32,
    /// The tunnel's far end.
    pub to: I::Addr,
    /// The client's packet in it.
    pub key: Key<I::Words>,
    pub may_fragment: bool,
    /// Bytes before the inner packet.
    pub before: usize,
    /// Length of the whole IP packet.
    pub len: u32,
}

/// A header of its family at `at`, of a packet in one piece, without extra headers? What follows it: its protocol.
#[inline(always)]
fn plain<I: Ip>(w: &impl Window, at: usize) -> Option<u8> {
    if I::FAMILY == 4 {
        (w.r8(at) == 0x45 && w.r16(at + 6) & 0x3fffu16.to_be() == 0).then(|| w.r8(at + 9))
    } else {
        (w.r8(at) >> 4 == 6).then(|| w.r8(at + 6))
    }
}

/// May an error be about a tunnel? Without a look at more than the first bytes of what it quotes.
#[inline(always)]
pub fn may_be_outer<I: Ip, P: Packet>(p: &mut P) -> bool {
    let Some(w) = p.window(quote::<I>() + I::HEADER) else { return false };
    let (at, within) = (quote::<I>(), quote::<I>() - L3);
    let ours = I::address(&w, I::DESTINATION) == I::address(&w, I::SOURCE + within);
    plain::<I>(&w, L3).is_some()
        && ours
        && I::is_error(w.r8(I::L4))
        && plain::<I>(&w, at).is_some_and(|protocol| protocol == I::TUNNELLED || matches!(protocol, IP_GRE | IP_UDP))
}

/// See [`Outer`]; after [`may_be_outer`]. `None`: of no tunnel of ours, or too little of it is quoted.
#[inline(always)]
pub fn outer<I: Ip, P: Packet>(p: &mut P) -> Option<Outer<I>> {
    let at = quote::<I>() + I::HEADER;
    let protocol = plain::<I>(&p.window(at)?, quote::<I>())?;
    // Sizes are constants wherever the packet is touched.
    if protocol == I::TUNNELLED {
        return inner::<I, P>(p, 0);
    }
    let ethertype = u32::from(I::ETHERTYPE);
    match protocol {
        IP_GRE => {
            let head = u32::from_be(p.window(at + 4)?.r32(at));
            match head ^ ethertype {
                0 => inner::<I, P>(p, 4),
                0x8000_0000 => inner::<I, P>(p, 8),
                _ => None,
            }
        }
        // Version 0, data, of this family, no optional fields. (Its port is the tunnel's, or no connection is found by it.)
        IP_UDP if p.window(at + 12)?.r32(at + 8) == (u32::from(I::TUNNELLED) << 16).to_be() => inner::<I, P>(p, 12),
        _ => None,
    }
}

#[inline(always)]
fn inner<I: Ip, P: Packet>(p: &mut P, between: usize) -> Option<Outer<I>> {
    let at = quote::<I>() + I::HEADER + between;
    let w = p.window(quote::<I>() + 2 * I::HEADER + between + 4)?;
    let len = I::total_len(&w);
    let protocol = plain::<I>(&w, at)?;
    if (len as usize) < at + I::HEADER + 4 - L3 {
        return None;
    }
    let proto = match protocol {
        IP_TCP => conn::TCP,
        IP_UDP => conn::UDP,
        IP_SCTP => conn::SCTP,
        _ => return None,
    };
    let ports = u32::from_be(w.r32(at + I::HEADER));
    let (source, destination) = (I::address(&w, I::SOURCE + at - L3), I::address(&w, I::DESTINATION + at - L3));
    Some(Outer {
        said: u16::from_be(w.r16(I::L4)),
        rest: u32::from_be(w.r32(I::L4 + 4)),
        to: I::address(&w, I::DESTINATION + quote::<I>() - L3),
        key: Key::of(I::words(source, destination), ports, proto),
        may_fragment: I::FAMILY == 4 && w.r8(at + 6) & 0x40 == 0,
        before: at - L3,
        len,
    })
}
