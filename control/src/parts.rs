//! Fragments that came before the first one of their datagram, which wait here for it; and packets that are cut into parts, to fit a tunnel. Both go
//! through the data plane again afterwards.
//!
//! Nobody is kept waiting for long, and what a flood brings makes way for what comes after it: of too many datagrams the oldest goes, since what is held in
//! earnest is held for milliseconds.

use std::collections::{BTreeMap, VecDeque};

use rvs_datapath::conn::Addressing;
use rvs_datapath::csum;
use rvs_datapath::ct::V4;
use rvs_datapath::frag::Key;
use rvs_datapath::packet::{IP_TCP, IP_UDP, Ip, L3};

use crate::limits;

/// A frame that is to come in again, by this interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub ifindex: u32,
    pub frame: Vec<u8>,
}

#[derive(Debug)]
struct Datagram {
    since_ms: u64,
    parts: Vec<Part>,
}

impl Datagram {
    fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.frame.len()).sum()
    }
}

/// Datagrams that wait for their first fragment.
#[derive(Debug, Default)]
pub struct Waiting {
    datagrams: BTreeMap<Key, Datagram>,
    /// In the order in which they came; some are gone already.
    order: VecDeque<(u64, Key)>,
    /// How many there are of each source.
    sources: BTreeMap<(u8, u64), usize>,
    bytes: usize,
}

impl Waiting {
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }
    /// Of how many datagrams, and how many bytes of frames.
    pub fn held(&self) -> (usize, usize) {
        (self.datagrams.len(), self.bytes)
    }
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.datagrams.keys()
    }

    /// One more. How many are dropped: it, if its source or its datagram has more than its share; or what makes way for it.
    #[must_use]
    pub fn hold(&mut self, key: Key, part: Part, now_ms: u64) -> usize {
        let source = source(&key);
        match self.datagrams.get_mut(&key) {
            Some(there) if there.parts.len() >= limits::HELD_OF_DATAGRAM_MAX => return 1,
            Some(there) => {
                self.bytes += part.frame.len();
                there.parts.push(part);
            }
            None => {
                let of_source = self.sources.entry(source).or_default();
                if *of_source >= limits::HELD_OF_SOURCE_MAX {
                    return 1;
                }
                *of_source += 1;
                self.bytes += part.frame.len();
                self.datagrams.insert(key, Datagram { since_ms: now_ms, parts: vec![part] });
                self.order.push_back((now_ms, key));
            }
        }
        let mut dropped = 0;
        while self.datagrams.len() > limits::HELD_DATAGRAMS_MAX || self.bytes > limits::HELD_BYTES_MAX {
            dropped += self.drop_oldest();
        }
        dropped
    }

    /// Its first fragment has come: those that it left waiting, in the order in which they came.
    pub fn release(&mut self, key: &Key) -> Vec<Part> {
        let Some(datagram) = self.datagrams.remove(key) else { return Vec::new() };
        self.bytes -= datagram.bytes();
        let source = source(key);
        if let Some(of_source) = self.sources.get_mut(&source) {
            *of_source -= 1;
            if *of_source == 0 {
                self.sources.remove(&source);
            }
        }
        datagram.parts
    }

    /// Those that have waited for long enough are dropped: how many fragments.
    #[must_use]
    pub fn expire(&mut self, now_ms: u64) -> usize {
        let mut dropped = 0;
        while self.order.front().is_some_and(|(since_ms, _)| now_ms.saturating_sub(*since_ms) >= limits::HELD_MS) {
            dropped += self.drop_oldest();
        }
        dropped
    }

    fn drop_oldest(&mut self) -> usize {
        let Some((since_ms, key)) = self.order.pop_front() else { return 0 };
        // It may be gone, and another one of the same key be there.
        if self.datagrams.get(&key).is_none_or(|there| there.since_ms != since_ms) {
            return 0;
        }
        self.release(&key).len()
    }
}

/// Of whose share a datagram takes: family, and address or /64.
fn source(key: &Key) -> (u8, u64) {
    match (key.rest >> 8) as u8 {
        4 => (4, u64::from(V4::source(&[key.addresses[0]]))),
        family => (family, key.addresses[0]),
    }
}

/// Length of the smallest packet that everybody takes (RFC 791): parts are not shorter than that allows.
const SMALLEST: usize = 68;
const MORE: u16 = 0x2000;
const DONT: u16 = 0x4000;
const OFFSET: u16 = 0x1fff;

/// An IPv4 packet, behind its Ethernet header, in parts of up to `room` bytes, each with that header (`ip_fragment`). `None`: it is none, may not be cut,
/// or its lengths are wrong.
pub fn cut(frame: &[u8], room: usize) -> Option<Vec<Vec<u8>>> {
    let (ethernet, packet) = frame.split_at_checked(L3)?;
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    let word = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let (total, fragment) = (usize::from(word(2)?), word(6)?);
    let ipv4 = ethernet.get(12..14)? == V4::ETHERTYPE.to_be_bytes() && packet.first()? >> 4 == 4;
    if !ipv4 || header_len < V4::HEADER || fragment & DONT != 0 || room < SMALLEST {
        return None;
    }
    // What Ethernet pads it with is no part of it.
    let packet = packet.get(..total)?;
    let (header, data) = packet.split_at_checked(header_len)?;
    let mut data = data.to_vec();
    if fragment & (MORE | OFFSET) == 0 {
        finish(header, &mut data);
    }
    let step = (room - header_len) & !7;
    let count = data.len().div_ceil(step).max(1);
    let mut parts = Vec::with_capacity(count);
    for (i, piece) in data.chunks(step).enumerate() {
        let mut header = header.to_vec();
        if i > 0 {
            leave_out_options(&mut header);
        }
        let more = if i + 1 < count { MORE } else { fragment & MORE };
        // Of 13 bits: that a fragment lies within 64 KiB was seen to.
        let at = (fragment & OFFSET).wrapping_add((i * step / 8) as u16) & OFFSET;
        header[2..4].copy_from_slice(&((header_len + piece.len()) as u16).to_be_bytes());
        header[6..8].copy_from_slice(&(at | more).to_be_bytes());
        header[10..12].fill(0);
        let sum = !csum::fold(csum::sum(&header));
        header[10..12].copy_from_slice(&sum.to_ne_bytes());
        parts.push([ethernet, &header, piece].concat());
    }
    Some(parts)
}

/// Options that are for the first fragment alone are blank in others (RFC 791: those without the copied flag).
fn leave_out_options(header: &mut [u8]) {
    const END: u8 = 0;
    const BLANK: u8 = 1;
    const COPIED: u8 = 0x80;
    let mut at = V4::HEADER;
    while let Some(&kind) = header.get(at) {
        let len = match kind {
            END => return,
            BLANK => 1,
            _ => match header.get(at + 1) {
                Some(len) if *len >= 2 && at + usize::from(*len) <= header.len() => usize::from(*len),
                _ => return,
            },
        };
        if kind & COPIED == 0 {
            header[at..at + len].fill(BLANK);
        }
        at += len;
    }
}

/// A sender on this machine may have left the transport checksum to a device: its field then holds the sum of the pseudo-header. In parts nobody could
/// make up for that.
fn finish(header: &[u8], data: &mut [u8]) {
    let protocol = header[9];
    let at = match protocol {
        IP_TCP => 16,
        IP_UDP => 6,
        _ => return,
    };
    let Some(field) = data.get(at..at + 2) else { return };
    let field = u16::from_ne_bytes([field[0], field[1]]);
    let mut pseudo = header[12..20].to_vec();
    pseudo.extend([0, protocol]);
    pseudo.extend((data.len() as u16).to_be_bytes());
    let pseudo = csum::sum(&pseudo);
    // (One that was finished, and holds that all the same, comes out as it was.)
    if csum::fold(pseudo) != field || protocol == IP_UDP && field == 0 {
        return;
    }
    data[at..at + 2].fill(0);
    let sum = !csum::fold(pseudo + csum::sum(data));
    let sum = if sum == 0 && protocol == IP_UDP { 0xffff } else { sum };
    data[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(source: u32, id: u32) -> Key {
        let words = V4::words(source.to_be(), u32::from_be_bytes([192, 0, 2, 1]).to_be());
        Key::new(&words, id, 4, IP_UDP)
    }
    fn part(byte: u8, len: usize) -> Part {
        Part { ifindex: 3, frame: vec![byte; len] }
    }

    #[test]
    fn what_waits_comes_out_once_in_order() {
        let mut waiting = Waiting::default();
        for n in 0..3 {
            assert_eq!(waiting.hold(key(1, 7), part(n, 100), u64::from(n)), 0);
            assert_eq!(waiting.hold(key(1, 8), part(n + 10, 100), u64::from(n)), 0);
        }
        assert_eq!(waiting.release(&key(1, 7)), [part(0, 100), part(1, 100), part(2, 100)]);
        assert_eq!((waiting.release(&key(1, 7)), waiting.held()), (vec![], (1, 300)));
        assert_eq!((waiting.expire(limits::HELD_MS - 1), waiting.expire(limits::HELD_MS)), (0, 3));
        assert!(waiting.is_empty() && waiting.sources.is_empty() && waiting.order.is_empty());
    }

    #[test]
    fn one_of_the_same_key_has_its_own_time() {
        let mut waiting = Waiting::default();
        assert_eq!(waiting.hold(key(1, 7), part(0, 100), 0), 0);
        waiting.release(&key(1, 7));
        assert_eq!(waiting.hold(key(1, 7), part(1, 100), 1000), 0);
        assert_eq!(waiting.expire(limits::HELD_MS), 0);
        assert_eq!(waiting.expire(limits::HELD_MS + 1000), 1);
    }

    #[test]
    fn nobody_has_more_than_his_share() {
        let mut waiting = Waiting::default();
        for id in 0..1000 {
            let more = (id as usize) >= limits::HELD_OF_SOURCE_MAX;
            assert_eq!(waiting.hold(key(1, id), part(0, 100), 0), usize::from(more));
        }
        for n in 0..1000 {
            let more = n >= limits::HELD_OF_DATAGRAM_MAX;
            assert_eq!(waiting.hold(key(2, 7), part(0, 8), 0), usize::from(more));
        }
        assert_eq!(waiting.held().0, limits::HELD_OF_SOURCE_MAX + 1);
    }

    /// However many sources a flood has, and however large its packets are: memory is bounded, and who comes during it waits for as long as hundreds
    /// of others need to come.
    #[test]
    fn a_flood_takes_no_more_than_there_is_and_makes_way() {
        for len in [64, 3000, 100_000] {
            let mut waiting = Waiting::default();
            let all = (limits::HELD_BYTES_MAX / len).min(limits::HELD_DATAGRAMS_MAX);
            let mut dropped = 0;
            for n in 0..10_000u32 {
                if n == 5_000 {
                    dropped += waiting.hold(key(u32::MAX, 1), part(1, 60), 0);
                }
                dropped += waiting.hold(key(n, n), part(0, len), 0);
                let (datagrams, bytes) = waiting.held();
                assert!(datagrams <= limits::HELD_DATAGRAMS_MAX && bytes <= limits::HELD_BYTES_MAX);
                if n == 5_000 + all as u32 - 2 {
                    assert_eq!(waiting.release(&key(u32::MAX, 1)), [part(1, 60)], "{len}");
                }
            }
            assert_eq!(dropped + waiting.held().0, 10_000, "one of each datagram, and one released");
            assert!(waiting.order.len() <= limits::HELD_DATAGRAMS_MAX + 2 && waiting.sources.len() <= all);
        }
    }

    /// An IPv4 packet in an Ethernet frame.
    fn frame(options: &[u8], fragment: u16, protocol: u8, data: &[u8]) -> Vec<u8> {
        let mut header = vec![0x45 + (options.len() / 4) as u8, 0];
        header.extend(((20 + options.len() + data.len()) as u16).to_be_bytes());
        header.extend([0x12, 0x34]);
        header.extend(fragment.to_be_bytes());
        header.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        header.extend(options);
        let sum = !csum::fold(csum::sum(&header));
        header[10..12].copy_from_slice(&sum.to_ne_bytes());
        [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0], &header[..], data].concat()
    }

    proptest! {
        #[test]
        fn parts_are_the_whole(
            data in prop::collection::vec(any::<u8>(), 1..3000),
            room in 68usize..1600,
            at in 0u16..7000,
            more: bool,
            options in prop::sample::select(vec![0usize, 4, 12, 40]),
        ) {
            let data = if more { data[..data.len() / 8 * 8].to_vec() } else { data };
            prop_assume!(!data.is_empty());
            let fragment = at | if more { MORE } else { 0 };
            let options = [[0x94, 4, 0, 0].repeat(options / 8), [7, 4, 0, 0].repeat(options / 4 - options / 8)].concat();
            let whole = frame(&options, fragment, 253, &data);
            let parts = cut(&[&whole[..], &[0; 9]].concat(), room).unwrap();
            let mut next = usize::from(at) * 8;
            let mut all: Vec<u8> = Vec::new();
            for (i, part) in parts.iter().enumerate() {
                let header = &part[14..34 + options.len()];
                prop_assert_eq!(csum::fold(csum::sum(header)), 0xffff, "its checksum");
                prop_assert!(part.len() - 14 <= room);
                prop_assert_eq!(&part[16..18], &((part.len() - 14) as u16).to_be_bytes()[..]);
                let word = u16::from_be_bytes([part[20], part[21]]);
                prop_assert_eq!(usize::from(word & OFFSET) * 8, next);
                prop_assert_eq!(word & MORE != 0, i + 1 < parts.len() || more);
                prop_assert_eq!(header[20..].contains(&7), i == 0 && options.contains(&7));
                prop_assert_eq!(header[20..].iter().filter(|b| **b == 0x94).count(), options.iter().filter(|b| **b == 0x94).count());
                next += part.len() - 34 - options.len();
                all.extend(&part[34 + options.len()..]);
            }
            prop_assert_eq!(all, data);
        }

        #[test]
        fn any_bytes_are_cut_or_not(bytes in prop::collection::vec(any::<u8>(), 0..200), room: u16) {
            let mut frame = bytes.clone();
            if frame.len() > 40 {
                frame[12..15].copy_from_slice(&[8, 0, 0x45]);
                frame[16..18].copy_from_slice(&(bytes.len() as u16 - 14).to_be_bytes());
            }
            let _ = (cut(&bytes, usize::from(room)), cut(&frame, usize::from(room)));
        }

        #[test]
        fn checksums_are_finished_once(data in prop::collection::vec(any::<u8>(), 8..400), tcp: bool) {
            let (protocol, at) = if tcp { (IP_TCP, 16) } else { (IP_UDP, 6) };
            prop_assume!(data.len() >= at + 2);
            let mut data = data;
            let header = frame(&[], 0, protocol, &data)[14..34].to_vec();
            let mut pseudo = header[12..20].to_vec();
            pseudo.extend([0, protocol]);
            pseudo.extend((data.len() as u16).to_be_bytes());
            data[at..at + 2].copy_from_slice(&csum::fold(csum::sum(&pseudo)).to_ne_bytes());
            finish(&header, &mut data);
            prop_assert_eq!(csum::fold(csum::sum(&pseudo) + csum::sum(&data)), 0xffff);
            let before = data.clone();
            finish(&header, &mut data);
            prop_assert_eq!(data, before);
        }
    }

    #[test]
    fn what_may_not_be_cut_is_not() {
        let data = [1; 1000];
        assert!(cut(&frame(&[], DONT, IP_UDP, &data), 500).is_none());
        assert!(cut(&frame(&[], 0, IP_UDP, &data), 67).is_none());
        let mut six = frame(&[], 0, IP_UDP, &data);
        six[12..14].copy_from_slice(&[0x86, 0xdd]);
        assert!(cut(&six, 500).is_none());
        let mut longer = frame(&[], 0, IP_UDP, &data);
        longer[16] = 0xff;
        assert!(cut(&longer, 500).is_none());
    }
}
