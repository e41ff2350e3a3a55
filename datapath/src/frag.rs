//! Fragments: the first one has the ports, goes the way of a packet, and leaves a note of where to; those after it follow the note.
//!
//! A note is for one datagram: its addresses, its id and protocol (RFC 791 3.2, RFC 8200 4.5), so direction is part of it. Notes lie in a
//! table of fixed size, four to a bucket, where the oldest goes first, and hold as long as the kernel would wait for the rest of a
//! datagram. Writers claim a place by compare-and-swap of its control word, and publish by it; readers take what they read if the control word is the
//! same before and after. (The same word with another key in between is of the same second, dest and length: one in a very great many.)
//!
//! A fragment that comes before its first one may be handed to the daemon, which holds it until there is a note. So that the first one of a datagram that
//! is none of ours does not leave the others waiting, it notes that ([`Kind::Elsewhere`]).
//!
//! What can't be told apart is not sent anywhere: an id used again for another way while a note holds turns that into a note of a conflict.
//! Fragments that reach into the first one, which says where they go to, are dropped.

use crate::abi::{FRAGMENTS_MAX, fragment};
use crate::ct::Seed;
use crate::tables::Tables;

/// Seconds that a note holds (`net.ipv4.ipfrag_time`).
pub const HOLDS_S: u32 = 30;
/// Places of a bucket.
const WAYS: u32 = 4;

/// Which part of a datagram a packet is: `id:32 | 0:15 | more:1 | at:16`, one word so that it stays in a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part(u64);

impl Part {
    pub const WHOLE: Part = Part(0);
    /// `at`: where it begins, in units of eight bytes; `more`: it is not the last.
    #[inline(always)]
    pub fn new(id: u32, at: u16, more: bool) -> Part {
        Part(u64::from(id) << 32 | u64::from(more) << 16 | u64::from(at))
    }
    #[inline(always)]
    pub fn word(self) -> u64 {
        self.0
    }
    #[inline(always)]
    pub fn from_word(word: u64) -> Part {
        Part(word)
    }
    #[inline(always)]
    pub fn id(self) -> u32 {
        (self.0 >> 32) as u32
    }
    #[inline(always)]
    pub fn at(self) -> u16 {
        self.0 as u16
    }
    #[inline(always)]
    pub fn is_first(self) -> bool {
        self.0 & 0x1_ffff == 0x1_0000
    }
    #[inline(always)]
    pub fn is_later(self) -> bool {
        self.at() != 0
    }
    #[inline(always)]
    pub fn is_whole(self) -> bool {
        self.0 & 0x1_ffff == 0
    }
}

/// Of which datagram: addresses as they lie in the packet (IPv4: the first word), `id:32 | family:8 | protocol:8`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Key {
    pub addresses: [u64; 4],
    pub rest: u64,
}

impl Key {
    #[inline(always)]
    pub fn new(words: &[u64], id: u32, family: u8, protocol: u8) -> Key {
        let mut addresses = [0; 4];
        let mut i = 0;
        while i < words.len() && i < 4 {
            addresses[i] = words[i];
            i += 1;
        }
        Key { addresses, rest: u64::from(id) << 32 | u64::from(family) << 8 | u64::from(protocol) }
    }
}

/// Where the datagram goes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Note {
    /// The source that it gets (a reply's: the virtual address; by FULLNAT: a local one). 0: its own.
    pub source: [u64; 2],
    /// The destination that it gets (a reply's, by FULLNAT: the client's). 0: its own, or what the dest says.
    pub destination: [u64; 2],
    pub dest: u32,
    /// End of the first fragment, in units of eight bytes.
    pub end: u16,
    pub kind: Kind,
}

impl Note {
    /// It is none of ours.
    pub const ELSEWHERE: Note = Note { source: [0; 2], destination: [0; 2], dest: 0, end: 0, kind: Kind::Elsewhere };
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A client's.
    Request,
    /// A reply (NAT, FULLNAT), from the virtual address.
    Reply,
    /// None of ours: the kernel's.
    Elsewhere,
}

/// The notes, to be read.
pub trait Notes {
    fn note_word(&self, place: u32, word: u32) -> u64;
    fn note_seed(&self) -> &Seed;
}
impl<T: Tables> Notes for T {
    #[inline(always)]
    fn note_word(&self, place: u32, word: u32) -> u64 {
        self.fragment(place, word)
    }
    #[inline(always)]
    fn note_seed(&self) -> &Seed {
        &self.config().seed
    }
}

/// Control word: `time:24 | conflict:1 | reply:1 | busy:1 | elsewhere:1 | 0:3 | end:13 | dest:20`; 0: free.
const DEST: u64 = 0xf_ffff;
const END: u32 = 20;
const ENDS: u64 = 0x1fff << END;
const ELSEWHERE: u64 = 1 << 36;
const BUSY: u64 = 1 << 37;
const REPLY: u64 = 1 << 38;
const CONFLICT: u64 = 1 << 39;
const TIME: u32 = 40;

#[inline(always)]
fn word(note: &Note, now_s: u32) -> u64 {
    let kind = match note.kind {
        Kind::Request => 0,
        Kind::Reply => REPLY,
        Kind::Elsewhere => ELSEWHERE,
    };
    u64::from(now_s) << TIME | kind | u64::from(note.end & 0x1fff) << END | u64::from(note.dest) & DEST
}

/// Seconds since it was written.
#[inline(always)]
fn age_s(control: u64, now_s: u32) -> u32 {
    now_s.wrapping_sub((control >> TIME) as u32) & 0xff_ffff
}

#[inline(always)]
fn pair<T: Notes>(t: &T, place: u32, word: u32) -> [u64; 2] {
    [t.note_word(place, word), t.note_word(place, word + 1)]
}
#[inline(always)]
fn set_pair<T: Tables>(t: &T, place: u32, word: u32, pair: &[u64; 2]) {
    t.set_fragment(place, word, pair[0]);
    t.set_fragment(place, word + 1, pair[1]);
}

/// The first place of its bucket.
#[inline(always)]
fn bucket<T: Notes>(t: &T, key: &Key) -> u32 {
    let seed = &t.note_seed().0;
    let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let mut sum = mix(seed[0], key.rest);
    let mut i = 0;
    while i < 4 {
        sum = mix(sum, key.addresses[i] ^ seed[1]);
        i += 1;
    }
    (sum >> 32) as u32 & (FRAGMENTS_MAX - 1) & !(WAYS - 1)
}

/// Is a note for this key at this place? Its control word.
#[inline(always)]
fn is_at<T: Notes>(t: &T, place: u32, key: &Key, now_s: u32) -> Option<u64> {
    let control = t.note_word(place, fragment::CONTROL);
    if control == 0 || control & BUSY != 0 || age_s(control, now_s) > HOLDS_S {
        return None;
    }
    let mut other = t.note_word(place, fragment::REST) ^ key.rest;
    let mut i = 0;
    while i < 4 {
        other |= t.note_word(place, fragment::ADDRESSES + i) ^ key.addresses[i as usize];
        i += 1;
    }
    (other == 0).then_some(control)
}

/// What a later fragment finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    Note(Note),
    /// Two datagrams with this key.
    Conflict,
    /// It is none of ours.
    Elsewhere,
    None,
}

/// The note that the first fragment of this datagram left.
#[inline(always)]
pub fn find<T: Notes>(t: &T, key: &Key, now_s: u32) -> Found {
    let (first, mut i) = (bucket(t, key), 0);
    while i < WAYS {
        let place = first + i;
        i += 1;
        let Some(control) = is_at(t, place, key, now_s) else { continue };
        let (source, destination) = (pair(t, place, fragment::SOURCE), pair(t, place, fragment::DESTINATION));
        if t.note_word(place, fragment::CONTROL) != control {
            continue;
        }
        if control & CONFLICT != 0 {
            return Found::Conflict;
        }
        if control & ELSEWHERE != 0 {
            return Found::Elsewhere;
        }
        return Found::Note(Note {
            dest: (control & DEST) as u32,
            kind: if control & REPLY != 0 { Kind::Reply } else { Kind::Request },
            source,
            destination,
            end: (control >> END) as u16 & 0x1fff,
        });
    }
    Found::None
}

/// Leave a note for what comes after this first fragment. False: there is one that says otherwise, and this datagram goes nowhere. (If the first
/// fragment itself was cut once more, all else is the same, and the shorter one holds.)
#[inline(always)]
pub fn leave<T: Tables>(t: &T, key: &Key, note: &Note, now_s: u32) -> bool {
    let (first, mut i) = (bucket(t, key), 0);
    let (mut victim, mut oldest) = (first, 0);
    let new = word(note, now_s);
    while i < WAYS {
        let place = first + i;
        i += 1;
        if let Some(control) = is_at(t, place, key, now_s) {
            // The same again, as networks do, or another one.
            let same = ((control ^ new) & !ENDS) << (64 - TIME) == 0
                && pair(t, place, fragment::SOURCE) == note.source
                && pair(t, place, fragment::DESTINATION) == note.destination;
            let end = (control & ENDS).min(new & ENDS);
            let word = if same { new & !ENDS | end } else { new | CONFLICT };
            return t.swap_fragment(place, control, word) && same;
        }
        let control = t.fragment(place, fragment::CONTROL);
        let age = if control == 0 { u32::MAX } else { age_s(control, now_s) };
        if control & BUSY == 0 && age >= oldest {
            (victim, oldest) = (place, age);
        }
    }
    let control = t.fragment(victim, fragment::CONTROL);
    // Another CPU was faster: the rest of this datagram finds no note.
    if control & BUSY == 0 && t.swap_fragment(victim, control, new | BUSY) {
        let mut i = 0;
        while i < 4 {
            t.set_fragment(victim, fragment::ADDRESSES + i, key.addresses[i as usize]);
            i += 1;
        }
        t.set_fragment(victim, fragment::REST, key.rest);
        set_pair(t, victim, fragment::SOURCE, &note.source);
        set_pair(t, victim, fragment::DESTINATION, &note.destination);
        t.set_fragment(victim, fragment::CONTROL, new);
    }
    true
}
