//! PROXY protocol version 2 (the specification of that name, 2.2): to real servers that are nobody's to change, a client is introduced by a
//! header in front of its first byte. The data plane puts it in, by full NAT and by NAT.
//!
//! ```text
//! client                          director                          real server
//!   SYN seq=c             ------->  seq=c+d                ------->
//!          <-------  ack=c+1, MSS and window less n   <-------  SYN,ACK ack=c+d+1
//!   ACK seq=c+1           ------->  seq=c+d+1, n bytes: the header  ------->
//!   data seq=c+1          ------->  seq=c+d+1, the header and the data   ------->     (as long as it is not acknowledged)
//!          <-------  ack=c+1          <-------  ack up to c+d+1+n
//!   data seq=c+1+k        ------->  seq=c+d+1+n+k          ------->
//! ```
//! Nothing is kept of the header but whether the server has acknowledged it. Until then it goes in front of whatever begins with the client's
//! first byte: the end of the handshake, data, a FIN, a probe of the byte before it. What the server acknowledges of the header alone the
//! client sees as nothing, so that its own retransmissions bring the header again; a client without data gets the SYN,ACK again, and
//! acknowledges that again.
//!
//! Under tc, a packet that is yet to be cut into segments goes on without the header, which the client's acknowledgement brought, or else its
//! retransmission brings: that is one segment. (What makes room in a packet would have the kernel send it uncut.)
//!
//! ```text
//! header   signature: 12 bytes | version 2, command PROXY: 0x21 | 0x11 TCP over IPv4, 0x21 IPv6 | length of what follows:16
//!          source and destination address | source and destination port
//! ```

use crate::conn::{self, Conns, fullnat as lent};
use crate::csum::Delta;
use crate::ct::{Key, Slot};
use crate::fullnat::{BARE, INTRODUCED};
use crate::packet::{Flow, Ip, Packet, Window};
use crate::proto::tcp;
use crate::tables::{Of, Tables};
use crate::verdict::{Action, Reason, Stage, Verdict, drop};
use crate::xmit;

/// Length of the header.
#[inline(always)]
pub const fn length<I: Ip>() -> usize {
    if I::FAMILY == 4 { 28 } else { 52 }
}

const SIGNATURE: [u32; 3] = [0x0d0a_0d0a, 0x000d_0a51, 0x5549_540a];
/// Version and command, family and protocol, length.
const TCP4: u32 = 0x2111_000c;
const TCP6: u32 = 0x2121_0024;

/// In the number of [`Stage::Announce`]: the packet is a server's SYN,ACK, made an acknowledgement of it in its client's place (`cookie`), and is
/// to be turned.
pub const TURNED: u32 = 1 << 31;

/// What becomes of a client's segment before the server has acknowledged the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    /// The header goes in front of it.
    header: bool,
    /// Added to its sequence number, before that counts as one behind the header.
    by: u32,
    /// ... if there turns out to be no room for the header.
    bare: u32,
}

/// `offset`: of the segment from the client's first byte; `n`: length of the header, of which the server `has` so much.
#[inline(always)]
fn place(offset: u32, flags: u8, empty: bool, has: u32, n: u32) -> Placed {
    let before = n.wrapping_neg();
    let only = |by| Placed { header: false, by, bare: by };
    if flags & tcp::RST != 0 {
        // Where the server is, or it takes no notice (RFC 5961 3.2). It says where when this was wrong, and the client resets again.
        only(has.wrapping_sub(n))
    } else if flags & tcp::ACK == 0 {
        only(0)
    } else if offset == 0 {
        Placed { header: true, by: before, bare: 0 }
    } else if offset == u32::MAX && empty {
        // A probe, one byte before (RFC 1122 4.2.3.6): the client has nothing else to send.
        Placed { header: true, by: before.wrapping_add(1), bare: before }
    } else {
        only(if offset >> 31 != 0 { before } else { 0 })
    }
}

/// A client's segment before the server has acknowledged the header; or see [`TURNED`].
#[inline(always)]
pub fn announce<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, number: u32) -> Verdict {
    let c = I::conns(t);
    let slot = number & (conn::SLOTS_MAX - 1);
    let n = length::<I>();
    let turned = number & TURNED != 0;
    let known = if turned { lent::forward_of::<I, _>(c, &flow.key, slot).map(|(_, key)| key) } else { Some(flow.key) };
    let Some(key) = known else { return drop(Reason::Entering) };
    let Some(side) = lent::side::<I, _>(c, slot, &key) else { return drop(Reason::Entering) };
    let Some(d) = conn::dest_at::<I, _>(c, &key, slot).and_then(|index| t.dest(index)) else {
        return drop(Reason::Entering);
    };
    let Some((sequence, _, header)) = tcp::numbers::<I, P>(p) else { return drop(Reason::Internal) };
    let placed = if turned {
        Placed { header: true, by: 0, bare: 0 }
    } else {
        let empty = flow.transport_len() == header;
        place(sequence.wrapping_sub(side.first), flow.flags, empty, side.has_of_header(n as u32), n as u32)
    };
    let room = if d.mtu == 0 { 1500 } else { u32::from(d.mtu) };
    // (Behind a first fragment come others that say where in the datagram they belong.)
    let fits = flow.part.is_whole() && flow.len + n as u32 <= room;
    let mut number = slot | INTRODUCED;
    let (mut by, mut longer, mut delta, mut len) = (placed.by, Delta::default(), Delta::default(), flow.len);
    if placed.header {
        let done = fits && t.sized() && p.open_gap(I::L4 + 20, header as usize - 20, n);
        if done {
            match write::<I, P>(p, header, &key) {
                Some(written) => delta = written,
                None => return drop(Reason::Internal),
            }
            let before = flow.transport_len() as u16;
            longer = longer.replace16(before.to_be(), before.wrapping_add(n as u16).to_be());
            len += n as u32;
            lent::sent::<I, _>(c, slot, &side);
            if flow.flags & tcp::URG != 0 && !turned {
                match urge::<I, P>(p, n as u16) {
                    Some(more) => delta = delta.and(more),
                    None => return drop(Reason::Internal),
                }
            }
        } else {
            by = placed.bare;
            if !fits {
                number |= BARE;
            }
        }
    }
    let Some(renumbered) = tcp::renumber::<I, P>(p, by) else { return drop(Reason::Internal) };
    if !p.fix_transport(I::L4 + 16, false, longer, delta.and(renumbered)) {
        return drop(Reason::Internal);
    }
    if turned {
        if !xmit::turn::<I, P>(p) {
            return drop(Reason::Internal);
        }
        return Verdict::new(Action::Back, Reason::CookieServer);
    }
    t.keep(&Flow { len, ..*flow });
    Verdict::go(Stage::Fullnat, number)
}

/// The header, into the room for it behind a TCP header of this length. What it adds to the segment's sum.
#[inline(always)]
fn write<I: Ip, P: Packet>(p: &mut P, header: u32, key: &Key<I::Words>) -> Option<Delta> {
    let n = length::<I>();
    {
        let mut w = p.window(I::L4 + 20)?;
        I::grow(&mut w, n as u16);
    }
    let mut w = p.beyond(I::L4 + header as usize, n)?;
    let mut delta = Delta::default();
    let mut put = |at: usize, word: u32| {
        w.w32(at, word);
        delta = delta.replace(0, word);
    };
    put(0, SIGNATURE[0].to_be());
    put(4, SIGNATURE[1].to_be());
    put(8, SIGNATURE[2].to_be());
    put(12, if I::FAMILY == 4 { TCP4 } else { TCP6 }.to_be());
    let (source, destination) = (I::bytes(I::source(&key.words)), I::bytes(I::destination(&key.words)));
    let size = (n - 20) / 2;
    let mut i = 0;
    while i < size {
        let word = |a: &[u8; 16]| u32::from_ne_bytes([a[i], a[i + 1], a[i + 2], a[i + 3]]);
        put(16 + i, word(&source));
        put(16 + size + i, word(&destination));
        i += 4;
    }
    put(n - 4, (u32::from(key.sport()) << 16 | u32::from(key.dport())).to_be());
    Some(delta)
}

/// Urgent data are that much further from the segment's beginning.
#[inline(always)]
fn urge<I: Ip, P: Packet>(p: &mut P, by: u16) -> Option<Delta> {
    let mut w = p.window(I::L4 + 20)?;
    let old = w.r16(I::L4 + 18);
    let new = u16::from_be(old).wrapping_add(by).to_be();
    w.w16(I::L4 + 18, new);
    Some(Delta::default().replace16(old, new))
}

/// What a server that owes an acknowledgement of the header has acknowledged (`answer`, as it counts; its windows have this scale): of
/// the header alone, it is nothing to the client, whose window ends where it will when the header is there. What that changes in the
/// segment's sum; `None`: the packet is too short.
#[inline(always)]
pub fn acknowledged<I: Ip, P: Packet, C: Conns<I>>(
    p: &mut P,
    c: &C,
    slot: Slot,
    side: &lent::Side<I::Addr>,
    answer: u32,
    scale: u32,
) -> Option<Delta> {
    let n = length::<I>() as u32;
    let behind = side.first.wrapping_add(side.delta);
    let past = answer.wrapping_sub(behind.wrapping_sub(n));
    if past >= n {
        // (Of an older connection with these ends it may be anything, but no header of this one has been sent then.)
        if side.has_sent_header() && (past - n) >> 31 == 0 {
            lent::told::<I, _>(c, slot, side);
        }
        return Some(Delta::default());
    }
    lent::lacks::<I, _>(c, slot, side, past);
    let mut w = p.window(I::L4 + 20)?;
    let (ack, window) = (w.r32(I::L4 + 8), w.r16(I::L4 + 14));
    let left = u32::from(u16::from_be(window)).saturating_sub(units(n - past, scale));
    let new = (behind.to_be(), (left as u16).to_be());
    w.w32(I::L4 + 8, new.0);
    w.w16(I::L4 + 14, new.1);
    Some(Delta::default().replace(ack, new.0).replace16(window, new.1))
}

/// Bytes of a window in its units, rounded up.
#[inline(always)]
fn units(bytes: u32, scale: u32) -> u32 {
    let scale = scale & 15;
    (bytes + (1 << scale) - 1) >> scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const N: u32 = 28;

    #[test]
    fn what_comes_before_the_first_byte() {
        let of = |offset: u32, flags, empty| place(offset, flags, empty, 5, N);
        let (minus, probe) = (N.wrapping_neg(), u32::MAX);
        assert_eq!(of(probe, tcp::ACK, true), Placed { header: true, by: minus + 1, bare: minus });
        assert_eq!(of(probe, tcp::ACK, false), Placed { header: false, by: minus, bare: minus });
        assert_eq!(of(probe - 9, tcp::ACK, true), Placed { header: false, by: minus, bare: minus });
        // Where the server is; and no header goes with a packet that no server takes.
        assert_eq!(of(0, tcp::RST | tcp::ACK, true), Placed { header: false, by: minus + 5, bare: minus + 5 });
        assert_eq!(of(0, tcp::FIN, true), Placed { header: false, by: 0, bare: 0 });
    }

    proptest! {
        /// Each byte of the client, whatever it comes in, is the same one to the server: the one as far behind the header as it is from the first.
        #[test]
        fn bytes_stay_in_their_places(
            offset in prop_oneof![Just(0u32), 0..100u32, any::<u32>()], fin: bool, empty: bool, has in 0..=N, n in prop_oneof![Just(28u32), Just(52)],
        ) {
            let offset = offset & 0x7fff_ffff;
            let flags = tcp::ACK | if fin { tcp::FIN } else { 0 };
            let placed = place(offset, flags, empty, has, n);
            prop_assert_eq!(placed.header, offset == 0);
            // Behind the header, as the packet goes on.
            let first = |by: u32| offset.wrapping_add(n).wrapping_add(by);
            let header = if placed.header { n } else { 0 };
            prop_assert_eq!(first(placed.by).wrapping_add(header), n + offset);
            prop_assert_eq!(first(placed.bare), n + offset);
            prop_assert_eq!(first(placed.by), if placed.header { 0 } else { n + offset });
        }

        /// Windows are taken away in whole units, never too few.
        #[test]
        fn windows_leave_room(bytes in 0..=52u32, scale in 0..=14u32) {
            let taken = units(bytes, scale) << scale;
            prop_assert!(taken >= bytes && taken < bytes + (1 << scale));
        }
    }
}
