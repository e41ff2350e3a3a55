//! ICMP errors about a flow of ours: a router's or the client's to the virtual address go to the real server, a real server's (or a router's
//! on its side) to the client, with what they quote as that end knows it (`ip_vs_in_icmp`, `ip_vs_out_icmp`, `ip_vs_nat_icmp`). They change
//! no state.
//!
//! ```text
//! IP header | ICMP 8 | quoted IP header | its first 8 bytes: the ports
//! ```

use crate::conn;
use crate::csum::{self, Delta};
use crate::ct::Key;
use crate::packet::{IP_TCP, IP_UDP, Ip, L3, Packet, Window};
use crate::xmit::End;

/// An error, and the packet that would go the other way than the one it quotes: the direction in which the error goes.
pub struct Related<I: Ip> {
    pub key: Key<I::Words>,
    pub ttl: u8,
    /// Length of the whole IP packet.
    pub len: u32,
}

/// Start of the quoted IP header.
#[inline(always)]
const fn quote<I: Ip>() -> usize {
    I::L4 + 8
}

/// `None`: no error, or about nothing that a flow of ours could send. Its outer header has been looked at, but not its end.
#[inline(always)]
pub fn look<I: Ip, P: Packet>(p: &mut P) -> Option<Related<I>> {
    let w = p.window(quote::<I>() + I::HEADER + 8)?;
    let len = I::total_len(&w);
    // All of it within the packet, not in what Ethernet pads it with.
    if !I::is_error(w.r8(I::L4)) || len < (quote::<I>() - L3 + I::HEADER + 8) as u32 {
        return None;
    }
    let within = quote::<I>() - L3;
    let protocol = I::quoted_protocol(&w, within)?;
    let proto = match protocol {
        IP_TCP => conn::TCP,
        IP_UDP => conn::UDP,
        _ => return None,
    };
    let (from, to) = (I::address(&w, I::SOURCE + within), I::address(&w, I::DESTINATION + within));
    // An error goes to whom it quotes.
    if I::address(&w, I::DESTINATION) != from {
        return None;
    }
    let ports = u32::from_be(w.r32(quote::<I>() + I::HEADER));
    let key = Key::of(I::words(to, from), ports.rotate_left(16), proto);
    Some(Related { key, ttl: w.r8(I::TTL), len })
}

/// Put an address and a port in the place of those of one end, and, in what is quoted, of the other end: `end` is that of the error itself.
/// `forward`: count the TTL down too. False: too short.
#[inline(always)]
pub fn translate<I: Ip, P: Packet>(p: &mut P, end: End, address: I::Addr, port: u16, forward: bool) -> bool {
    let within = quote::<I>() - L3;
    let (at, quoted_at, port_at) = match end {
        End::Source => (I::SOURCE, I::DESTINATION + within, quote::<I>() + I::HEADER + 2),
        End::Destination => (I::DESTINATION, I::SOURCE + within, quote::<I>() + I::HEADER),
    };
    let port = port.to_be();
    let (outer, rest) = {
        let Some(mut w) = p.window(quote::<I>() + I::HEADER + 8) else { return false };
        let (old, quoted, old_port) = (I::address(&w, at), I::address(&w, quoted_at), w.r16(port_at));
        I::set_address(&mut w, at, address);
        I::set_address(&mut w, quoted_at, address);
        w.w16(port_at, port);
        let outer = I::delta(old, address);
        if forward {
            I::forward_header(&mut w, outer);
        } else {
            I::fix_header(&mut w, outer);
        }
        let inner = I::delta(quoted, address);
        let ports = Delta::default().replace16(old_port, port);
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
