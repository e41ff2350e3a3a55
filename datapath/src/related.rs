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
use crate::packet::{IP_SCTP, IP_TCP, IP_UDP, Ip, L3, Packet, Window};
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
