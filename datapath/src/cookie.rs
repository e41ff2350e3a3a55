//! SYN cookies, for services by NAT and by full NAT: when there are more SYNs than a service may be asked for, they are answered here, and
//! nothing is kept of them. What must be known again lies in the sequence number of the answer, and the client's ACK brings it back.
//!
//! ```text
//! client                         director                       real server
//!   SYN seq=c            ------->
//!           <-------  SYN,ACK seq=cookie ack=c+1 window 0
//!   ACK seq=c+1 ack=cookie+1  -->  is entered    SYN seq=c  ------->
//!                                           <-------  SYN,ACK seq=s ack=c+1
//!           <-------  ACK seq=cookie+1 ack=c+1, with the server's window
//!   data, ack=cookie+1   ------->           data, ack=s+1   ------->
//! ```
//! With a window of 0 the client does not send before there is a server to send to. Whatever it sends while there is none is a SYN
//! again: its probes of the window see to an ACK that is lost, and to a SYN. A client that waits for the server to speak first does not
//! acknowledge the opened window: when the server has sent its SYN,ACK again, it is acknowledged for the client.
//!
//! ```text
//! cookie   epoch:1 | offer:7 | mac:24
//! offer    mss:2 | window scale:4 | sack permitted:1
//! ```
//! The MAC is SipHash-2-4 of addresses, ports, the client's sequence number, the offer and the epoch of 64 s, which must be this one or the
//! one before.

use crate::conn::{Conns, fullnat as lent};
use crate::csum::Delta;
use crate::ct::{Key, Seed};
use crate::options::{Edit, Offer};
use crate::packet::{Flow, Ip, Packet, Window};
use crate::proto::tcp;
use crate::tables::{Of, Tables};
use crate::verdict::{Action, Reason, Stage, Verdict, drop, pass};
use crate::xmit;

/// Largest segments that a cookie can tell of.
const MSS: [u16; 4] = [536, 1220, 1440, 1460];
/// None (14 is the largest).
const NO_SCALE: u32 = 15;
/// The window scale that clients are told: Linux's own with default buffers, so that mostly nothing is to be converted.
const SCALE: u32 = 7;
/// Seconds of an epoch: a cookie is good for one to two.
const EPOCH_S: u32 = 64;
const MAC: u32 = 0x00ff_ffff;

/// In the number of [`Stage::Knock`]: the packet is to prove its client's address. Else it is the slot of a connection's forward entry.
pub const PROVE: u32 = u32::MAX;

/// What both sides can do, as far as it fits into a cookie.
#[inline(always)]
fn packed(offer: Offer) -> u32 {
    let mut mss = 0;
    while mss < 3 && MSS[mss as usize + 1] <= offer.mss {
        mss += 1;
    }
    let scale = match offer.scale {
        None => NO_SCALE,
        Some(scale) => u32::from(scale).min(14),
    };
    mss << 5 | scale << 1 | u32::from(offer.sack)
}

/// Of what a client offers, what its answer with a header of this length has room for.
#[inline(always)]
fn answerable(offer: Offer, header: u32) -> Offer {
    let scale = if header >= 28 { offer.scale } else { None };
    let sack = offer.sack && (header >= 32 || header >= 28 && scale.is_none());
    Offer { mss: offer.mss, scale, sack }
}

#[inline(always)]
fn mac<I: Ip>(seed: &Seed, key: &Key<I::Words>, sequence: u32, epoch: u32, offer: u32) -> u32 {
    let ports = u64::from(key.sport()) << 16 | u64::from(key.dport()) | u64::from(offer) << 32;
    siphash(seed, I::slice(&key.words), [ports, u64::from(epoch) << 32 | u64::from(sequence)]) as u32 & MAC
}

/// The sequence number for the answer to a SYN. Never 0, which says that there is none.
#[inline(always)]
fn make<I: Ip>(seed: &Seed, key: &Key<I::Words>, sequence: u32, now_s: u32, offer: u32) -> u32 {
    let epoch = now_s / EPOCH_S;
    ((epoch & 1) << 31 | offer << 24 | mac::<I>(seed, key, sequence, epoch, offer)).max(1)
}

/// Is this what [`make`] made a short while ago?
#[inline(always)]
fn is_ours<I: Ip>(seed: &Seed, key: &Key<I::Words>, sequence: u32, now_s: u32, cookie: u32) -> bool {
    let this = now_s / EPOCH_S;
    let epoch = if this & 1 == cookie >> 31 { this } else { this.wrapping_sub(1) };
    let offer = cookie >> 24 & 0x7f;
    ((epoch & 1) << 31 | offer << 24 | mac::<I>(seed, key, sequence, epoch, offer)).max(1) == cookie
}

/// The scale that the client's windows have; 0: none.
#[inline(always)]
fn client_scale(cookie: u32) -> u32 {
    match cookie >> 25 & 0xf {
        NO_SCALE => 0,
        scale => scale,
    }
}

/// Does the client scale the windows that it gets, by [`SCALE`]?
#[inline(always)]
fn is_scaled(cookie: u32) -> bool {
    cookie >> 25 & 0xf != NO_SCALE
}

/// SipHash-2-4 of some words and two more.
#[inline(always)]
pub fn siphash(seed: &Seed, words: &[u64], last: [u64; 2]) -> u64 {
    let [.., k0, k1] = seed.0;
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    let n = words.len();
    let mut i = 0;
    while i < n + 3 {
        let word = match i {
            _ if i < n => words[i],
            _ if i < n + 2 => last[i - n],
            // The length in bytes, in the highest byte.
            _ => (n as u64 + 2) << 59,
        };
        v[3] ^= word;
        v = round(round(v));
        v[0] ^= word;
        i += 1;
    }
    v[2] ^= 0xff;
    v = round(round(round(round(v))));
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[inline(always)]
fn round([mut a, mut b, mut c, mut d]: [u64; 4]) -> [u64; 4] {
    a = a.wrapping_add(b);
    b = b.rotate_left(13) ^ a;
    a = a.rotate_left(32);
    c = c.wrapping_add(d);
    d = d.rotate_left(16) ^ c;
    a = a.wrapping_add(d);
    d = d.rotate_left(21) ^ a;
    c = c.wrapping_add(b);
    b = b.rotate_left(17) ^ c;
    c = c.rotate_left(32);
    [a, b, c, d]
}

/// A word of a packet, in network order, and what that changes in the sum.
#[inline(always)]
fn put(w: &mut impl Window, at: usize, word: u32, delta: &mut Delta) {
    let (old, new) = (w.r32(at), word.to_be());
    w.w32(at, new);
    *delta = delta.replace(old, new);
}

/// Words of options: the largest segment, and that selective acknowledgements and window scaling are known; NOP where not.
#[inline(always)]
fn words(mss: u16, sack: bool, scale: Option<u32>) -> [u32; 3] {
    [
        0x0204_0000 | u32::from(mss),
        if sack { 0x0101_0402 } else { 0x0101_0101 },
        match scale {
            Some(scale) => 0x0103_0300 | scale,
            None => 0x0101_0101,
        },
    ]
}

/// Data offset in words, flags and window: the fourth word of a TCP header.
#[inline(always)]
fn fourth(header: u32, flags: u8, window: u32) -> u32 {
    header << 26 | u32::from(flags) << 16 | window
}

/// A SYN: the answer to it, at once. `room`: what the client's segments are to have room for beside their own.
#[inline(always)]
pub fn challenge<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, room: u32) -> Verdict {
    let Some((sequence, _, header)) = tcp::numbers::<I, P>(p) else { return drop(Reason::Internal) };
    // Without data (of Fast Open; the next try comes without) and extra headers, and not in fragments.
    if flow.by != 0 || !flow.part.is_whole() || flow.len != I::HEADER as u32 + header {
        return drop(Reason::CookieRefused);
    }
    let Some((_, offer)) = p.edit_options::<I>(header, Edit::NONE) else { return drop(Reason::Internal) };
    let offer = answerable(offer, header);
    let now_s = I::conns(t).now_s();
    let cookie = make::<I>(&t.config().seed, &flow.key, sequence, now_s, packed(offer));
    let mut delta = Delta::default();
    let mss = 1500 - I::HEADER as u16 - 20 - room as u16;
    let [first, second, third] = words(mss, offer.sack, offer.scale.map(|_| SCALE));
    let mut at = 20;
    while at < 60 {
        if at < header {
            let word = match at {
                20 => first,
                24 if header >= 32 || offer.scale.is_none() => second,
                24 => third,
                28 => third,
                _ => 0x0101_0101,
            };
            let Some(mut w) = p.beyond(I::L4 + at as usize, 4) else { return drop(Reason::Internal) };
            put(&mut w, 0, word, &mut delta);
        }
        at += 4;
    }
    {
        let Some(mut w) = p.window(I::L4 + 20) else { return drop(Reason::Internal) };
        put(&mut w, I::L4 + 4, cookie, &mut delta);
        put(&mut w, I::L4 + 8, sequence.wrapping_add(1), &mut delta);
        put(&mut w, I::L4 + 12, fourth(header, tcp::SYN | tcp::ACK, 0), &mut delta);
    }
    if !xmit::turn::<I, P>(p) || !p.fix_transport(I::L4 + 16, false, Delta::default(), delta) {
        return drop(Reason::Internal);
    }
    Verdict::new(Action::Back, Reason::Cookie)
}

/// A client's packet that the real server is to see as the client's SYN: the ACK that brings its cookie back (`number` is [`PROVE`]), or
/// whatever comes before the server has answered (the slot of the forward entry).
#[inline(always)]
pub fn knock<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, number: u32) -> Verdict {
    let Some((sequence, acknowledged, header)) = tcp::numbers::<I, P>(p) else { return drop(Reason::Internal) };
    let c = I::conns(t);
    let (first, cookie) = if number == PROVE {
        let cookie = acknowledged.wrapping_sub(1);
        // If the ACK was lost, a probe of the closed window comes in its place: its number may be that of the SYN (Linux's
        // tcp_xmit_probe_skb; others send the byte after it).
        let mut first = sequence.wrapping_sub(1);
        let mut tries = 0;
        while !is_ours::<I>(&t.config().seed, &flow.key, first, c.now_s(), cookie) {
            tries += 1;
            if tries == 2 {
                return pass(Reason::NoConnection);
            }
            first = sequence;
        }
        (first, cookie)
    } else {
        let Some(side) = lent::side::<I, _>(c, number, &flow.key) else { return drop(Reason::Entering) };
        (side.first.wrapping_sub(1), side.cookie)
    };
    let mut delta = Delta::default();
    let mut len = flow.len;
    if flow.transport_len() == 21 && header == 20 {
        // A probe of the window with a byte of data, which is not for a SYN.
        let Some(byte) = p.window(I::L4 + 21).map(|w| w.r8(I::L4 + 20)) else { return drop(Reason::Internal) };
        if !p.cut(I::L4 + 20) {
            return drop(Reason::Internal);
        }
        delta = delta.replace16(u16::from_ne_bytes([byte, 0]), 0);
        len -= 1;
    }
    // Who has been told of no options but these has none to send yet.
    if header != 20 || flow.by != 0 || !p.open_gap(I::L4 + 20, 0, OPTIONS) {
        return drop(Reason::CookieRefused);
    }
    {
        let Some(mut w) = p.window(I::L4 + 20 + OPTIONS) else { return drop(Reason::Internal) };
        I::grow(&mut w, (len + OPTIONS as u32).wrapping_sub(flow.len) as u16);
        put(&mut w, I::L4 + 4, first, &mut delta);
        put(&mut w, I::L4 + 8, 0, &mut delta);
        let window = u32::from(u16::from_be(w.r16(I::L4 + 14))) << client_scale(cookie);
        put(&mut w, I::L4 + 12, fourth(20 + OPTIONS as u32, tcp::SYN, window.min(0xffff)), &mut delta);
        let scale = if is_scaled(cookie) { Some(client_scale(cookie)) } else { None };
        let mss = match cookie >> 29 & 3 {
            0 => MSS[0],
            1 => MSS[1],
            2 => MSS[2],
            _ => MSS[3],
        };
        let options = words(mss, cookie >> 24 & 1 != 0, scale);
        let mut i = 0;
        while i < 3 {
            let word = options[i].to_be();
            w.w32(I::L4 + 20 + 4 * i, word);
            delta = delta.replace(0, word);
            i += 1;
        }
    }
    let length = (flow.len as u16).wrapping_sub(I::HEADER as u16);
    let after = (len as u16).wrapping_sub(I::HEADER as u16).wrapping_add(OPTIONS as u16);
    let longer = Delta::default().replace16(length.to_be(), after.to_be());
    if !p.fix_transport(I::L4 + 16, false, longer, delta) {
        return drop(Reason::Internal);
    }
    t.keep(&Flow { flags: tcp::SYN, len: len + OPTIONS as u32, cookie, ..*flow });
    if number == PROVE { Verdict::go(Stage::First, 0) } else { Verdict::go(Stage::Fullnat, number) }
}

/// Bytes of the options of a SYN made here.
const OPTIONS: usize = 12;

/// What a server says to a SYN made here, options blanked: the client is to get an ACK of it, which opens the window. Or it is to be `turned`
/// (by [`xmit::turn`]), and the server is answered in the client's place: with an ACK, when its SYN,ACK comes again (its client has nothing to
/// say); with a RST, when it believes in another connection.
#[inline(always)]
pub fn opened<I: Ip, P: Packet>(p: &mut P, header: u32, flags: u8, scale: u8, turned: bool) -> Option<()> {
    let mut delta = Delta::default();
    {
        let mut w = p.window(I::L4 + 20)?;
        let (next, acknowledged) = (u32::from_be(w.r32(I::L4 + 4)).wrapping_add(1), u32::from_be(w.r32(I::L4 + 8)));
        let numbers = if turned { [acknowledged, next] } else { [next, acknowledged] };
        put(&mut w, I::L4 + 4, numbers[0], &mut delta);
        put(&mut w, I::L4 + 8, numbers[1], &mut delta);
        let mut window = u32::from(u16::from_be(w.r16(I::L4 + 14)));
        if !turned && window != 0 {
            // A SYN's is in bytes; an ACK's is not.
            window = (window >> scale.min(14)).max(1);
        }
        put(&mut w, I::L4 + 12, fourth(header, flags, window), &mut delta);
    }
    p.fix_transport(I::L4 + 16, false, Delta::default(), delta).then_some(())
}

/// A server's segment for a client that believes in a cookie: its window, and what is added to its sequence number.
#[inline(always)]
pub fn answer<I: Ip, P: Packet>(p: &mut P, side: &lent::Side<I::Addr>) -> Option<u32> {
    let (sequence, old) = {
        let w = p.window(I::L4 + 20)?;
        (u32::from_be(w.r32(I::L4 + 4)), w.r16(I::L4 + 14))
    };
    let new = window(side.cookie, side.scale(), u16::from_be(old)).to_be();
    if new != old {
        p.window(I::L4 + 20)?.w16(I::L4 + 14, new);
        if !p.fix_transport(I::L4 + 16, false, Delta::default(), Delta::default().replace16(old, new)) {
            return None;
        }
    }
    // A server that refuses has no numbers of its own yet.
    Some(if side.is_to_knock() { side.cookie.wrapping_add(1).wrapping_sub(sequence) } else { side.back() })
}

/// The window that a client is to see for the server's.
#[inline(always)]
fn window(cookie: u32, server_scale: u32, window: u16) -> u16 {
    if !is_scaled(cookie) {
        return window;
    }
    // (A window that is open stays open.)
    let scaled = u32::from(window) << server_scale >> SCALE;
    if scaled == 0 && window != 0 { 1 } else { scaled.min(0xffff) as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conn;
    use crate::ct::V4;
    use proptest::prelude::*;

    fn seed(keys: [u64; 2]) -> Seed {
        Seed([1, 2, 3, 4, keys[0], keys[1]])
    }

    /// Of the paper's vectors, key and input the bytes 0, 1, 2, ...: the one of 16 bytes.
    #[test]
    fn siphash_is_siphash() {
        let words: Vec<u64> = (0..2).map(|w| u64::from_le_bytes(std::array::from_fn(|i| w * 8 + i as u8))).collect();
        let hash = siphash(&Seed([0, 0, 0, 0, words[0], words[1]]), &[], [words[0], words[1]]);
        assert_eq!(hash.to_le_bytes(), [0xdb, 0x9b, 0xc2, 0x57, 0x7f, 0xcc, 0x2a, 0x3f]);
    }

    proptest! {
        #[test]
        #[allow(deprecated, reason = "the standard library's own, to compare with")]
        fn siphash_of_any_words(keys: [u64; 2], words in proptest::collection::vec(any::<u64>(), 0..6), last: [u64; 2]) {
            use std::hash::Hasher;
            let mut theirs = std::hash::SipHasher::new_with_keys(keys[0], keys[1]);
            words.iter().chain(&last).for_each(|word| theirs.write(&word.to_le_bytes()));
            prop_assert_eq!(siphash(&seed(keys), &words, last), theirs.finish());
        }

        #[test]
        fn a_cookie_is_good_for_an_epoch_or_two(
            keys: [u64; 2], tuple: u64, ports: [u16; 2], sequence: u32, now_s: u32, later in 0..400u32, offer in 0..128u32,
        ) {
            let (seed, key) = (seed(keys), Key::new([tuple], ports[0], ports[1], conn::TCP));
            let now_s = now_s >> 1;
            let cookie = make::<V4>(&seed, &key, sequence, now_s, offer);
            let good = (now_s + later) / EPOCH_S - now_s / EPOCH_S <= 1;
            prop_assert_eq!(is_ours::<V4>(&seed, &key, sequence, now_s + later, cookie), good);
            prop_assert_eq!(cookie >> 24 & 0x7f, offer);
        }

        /// All that a client offers comes back, rounded down.
        #[test]
        fn an_offer_comes_back(mss: u16, scale in proptest::option::of(0..=255u8), sack: bool) {
            let cookie = packed(Offer { mss, scale, sack }) << 24;
            let told = MSS[(cookie >> 29 & 3) as usize];
            let largest = MSS.into_iter().rev().find(|m| *m <= mss).unwrap_or(MSS[0]);
            prop_assert_eq!(told, largest);
            prop_assert_eq!((is_scaled(cookie), client_scale(cookie)), (scale.is_some(), u32::from(scale.unwrap_or(0).min(14))));
            prop_assert_eq!(cookie >> 24 & 1 != 0, sack);
        }

        /// A window that a client sees is never larger than the server's, nor smaller by a unit or more, and closed only with it.
        #[test]
        fn windows_are_the_servers(scale in 0..=14u32, value: u16) {
            let cookie = packed(Offer { mss: 1460, scale: Some(7), sack: true }) << 24;
            let (seen, there) = (u64::from(window(cookie, scale, value)) << SCALE, u64::from(value) << scale);
            prop_assert!(seen <= there.max(1 << SCALE) && (seen + (1 << SCALE) > there || seen == 0xffff << SCALE));
            prop_assert_eq!(seen == 0, there == 0);
            let unscaled = packed(Offer { mss: 1460, scale: None, sack: true }) << 24;
            prop_assert_eq!(window(unscaled, scale, value), value);
        }
    }
}
