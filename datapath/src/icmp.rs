//! ICMP errors that the director itself sends: time exceeded and port unreachable, from the virtual address, quoting the packet as the
//! kernel does (`icmp_send`, `icmp6_send`): it came for a local address, so the answer comes from that address.

use crate::csum;
use crate::ct::{V4, V6};
use crate::packet::{Ip, L3, Packet, Window};
use crate::xmit::swapped_macs;

/// The packet becomes this error about itself. False: it can't (too short, no room in front).
pub trait Answer: Ip {
    /// `mtu`: for [`Error::TooBig`]; `from`: in the place of the address that the packet was for.
    fn answer<P: Packet>(p: &mut P, error: Error, mtu: u32, id: u16, from: Option<Self::Addr>) -> bool;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    TimeExceeded,
    PortUnreachable,
    /// Fragmentation needed, packet too big.
    TooBig,
    /// As another host said: type and code. `mtu` is all of the word behind them then.
    Said(u16),
}

/// An ICMPv4 error is at most 576 bytes long with its IP header (RFC 1812 4.3.2.3, `icmp_send`): the quote 548.
const QUOTE4: usize = 576 - 20 - 8;
/// An ICMPv6 error at most 1280 (RFC 4443 2.4): the quote 1232.
const QUOTE6: usize = 1280 - 40 - 8;
/// Longest quote, for whoever sums it.
pub const QUOTE_MAX: usize = QUOTE6;

/// TTL and hop limit of what the host sends.
const TTL: u16 = 64;

/// Space in front, frame cut to the quote. The quoted IP packet's length, and the sum over it.
#[inline(always)]
fn quote<I: Ip, P: Packet>(p: &mut P, most: usize) -> Option<(usize, u64)> {
    let quoted = (p.frame_len() as usize).checked_sub(L3)?.min(ip_length::<I, P>(p)?).min(most);
    if !p.cut(L3 + quoted) {
        return None;
    }
    let sum = p.sum_from(L3, most);
    p.grow_head(I::HEADER + 8).then_some((quoted, sum))
}

/// Length of the IP packet as its header says (padding of short frames is not quoted).
#[inline(always)]
fn ip_length<I: Ip, P: Packet>(p: &mut P) -> Option<usize> {
    let w = p.window(I::L4)?;
    let at = if I::FAMILY == 4 { L3 + 2 } else { L3 + 4 };
    let len = usize::from(u16::from_be(w.r16(at)));
    Some(if I::FAMILY == 4 { len } else { len + I::HEADER })
}

/// Back to where it came from: the MAC addresses of the frame, before anything is moved.
struct Ends<A> {
    macs: [u32; 3],
    client: A,
    vip: A,
    tos: u16,
}

#[inline(always)]
fn ends<I: Ip, P: Packet>(p: &mut P) -> Option<Ends<I::Addr>> {
    let w = p.window(I::L4)?;
    let macs = swapped_macs(&w);
    let tos = u16::from_be(w.r16(L3)) & 0xff;
    Some(Ends { macs, client: I::address(&w, I::SOURCE), vip: I::address(&w, I::DESTINATION), tos })
}

#[inline(always)]
fn ethernet(w: &mut impl Window, macs: [u32; 3], ethertype: u16) {
    w.w32(0, macs[0]);
    w.w32(4, macs[1]);
    w.w32(8, macs[2]);
    w.w16(12, ethertype.to_be());
}

impl Answer for V4 {
    #[inline(always)]
    fn answer<P: Packet>(p: &mut P, error: Error, mtu: u32, id: u16, from: Option<Self::Addr>) -> bool {
        let Some(ends) = ends::<V4, P>(p) else { return false };
        let own = from.unwrap_or(ends.vip);
        let Some((quoted, sum)) = quote::<V4, P>(p, QUOTE4) else { return false };
        let Some(mut w) = p.window(L3 + 28) else { return false };
        ethernet(&mut w, ends.macs, 0x0800);
        // TOS as icmp_send: the packet's own, with precedence "internetwork control".
        let tos = ends.tos & 0x1e | 0xc0;
        let header = [0x4500 | tos, 28 + quoted as u16, id, 0, TTL << 8 | 1, 0];
        let mut header_sum = u64::from(own) + u64::from(ends.client);
        let mut i = 0;
        while i < header.len() {
            let word = header[i].to_be();
            w.w16(L3 + 2 * i, word);
            header_sum += u64::from(word);
            i += 1;
        }
        w.w16(L3 + 10, !csum::fold(header_sum));
        V4::set_address(&mut w, V4::SOURCE, own);
        V4::set_address(&mut w, V4::DESTINATION, ends.client);
        let type_code: u16 = match error {
            Error::TimeExceeded => 11 << 8,
            Error::PortUnreachable => 3 << 8 | 3,
            Error::TooBig => 3 << 8 | 4,
            Error::Said(said) => said,
        };
        let mtu = mtu.to_be();
        w.w16(V4::L4, type_code.to_be());
        w.w16(V4::L4 + 2, !csum::fold(sum + u64::from(type_code.to_be()) + u64::from(mtu)));
        w.w32(V4::L4 + 4, mtu);
        true
    }
}

impl Answer for V6 {
    #[inline(always)]
    fn answer<P: Packet>(p: &mut P, error: Error, mtu: u32, _: u16, from: Option<Self::Addr>) -> bool {
        let Some(ends) = ends::<V6, P>(p) else { return false };
        let own = from.unwrap_or(ends.vip);
        let Some((quoted, sum)) = quote::<V6, P>(p, QUOTE6) else { return false };
        let Some(mut w) = p.window(L3 + 48) else { return false };
        ethernet(&mut w, ends.macs, 0x86dd);
        let len = 8 + quoted as u16;
        w.w32(L3, 0x6000_0000u32.to_be());
        w.w16(L3 + 4, len.to_be());
        w.w16(L3 + 6, (58 << 8 | TTL).to_be());
        V6::set_address(&mut w, V6::SOURCE, own);
        V6::set_address(&mut w, V6::DESTINATION, ends.client);
        let type_code: u16 = match error {
            Error::TimeExceeded => 3 << 8,
            Error::PortUnreachable => 1 << 8 | 4,
            Error::TooBig => 2 << 8,
            Error::Said(said) => said,
        };
        let mtu = mtu.to_be();
        let pseudo = V6::sum(own) + V6::sum(ends.client) + u64::from(len.to_be()) + u64::from(58u16.to_be());
        w.w16(V6::L4, type_code.to_be());
        let rest = u64::from(type_code.to_be()) + u64::from(mtu);
        w.w16(V6::L4 + 2, !csum::fold(u64::from(csum::fold(sum)) + pseudo + rest));
        w.w32(V6::L4 + 4, mtu);
        true
    }
}
