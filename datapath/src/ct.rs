//! The connection table's words: finding, entering, moving and freeing entries without locks.
//!
//! What an entry *means* (states, counters, links) is `conn`'s business; here it is a key, a control word and a rank.
//!
//! # Layout
//! An entry is some key words and one control word. Entries lie in buckets of whole 64-byte lines:
//! four IPv4 entries of 16 bytes in one line, or three IPv6 entries of 40 bytes in two lines.
//! A flow may sit in any way of its *home* bucket, or of its *other* bucket when home is full.
//!
//! ```text
//! IPv4   word 0: saddr (low half) | daddr (high half), as they lie in the packet
//! IPv6   words 0-3: saddr, daddr, as they lie in the packet
//! control word (high to low):
//!   dport:16 | sport_high:4 | proto:2 | REVERSE:1 | LINKED:1 | OTHER:1 | payload:35 | state:4
//! ```
//! **The whole tuple is there, without a digest.** The twelve low bits of the source port are not stored: they are XORed
//! into the number of the home bucket, so where an entry lies says what they are (`Entry::key`). The table therefore
//! has at least 2^12 buckets. A control word of 0 is a free way.
//!
//! # Concurrency protocol (no locks, no waiting)
//! Writers are BPF programs on any CPU. A way is owned through its control word, by compare-and-swap; key words are written
//! only by the owner.
//! ```text
//! insert 1. CAS  victim -> RESERVED     readers and other writers now ignore the way
//!        2. store the key words         nobody else writes the key words of a RESERVED way
//!        3. CAS  RESERVED -> TENTATIVE  full barrier: from here other inserters of this key see it
//!        4. look at all other ways for the same key: live -> mine loses; TENTATIVE in a lower way -> mine loses;
//!           TENTATIVE in a higher way -> kill it (CAS to 0). A loser frees its way and adopts the winner's dest.
//!        5. CAS  TENTATIVE -> live      fails if killed: start again, and find the winner
//! ```
//! Of two inserters at least one sees the other in step 4, and a live entry always wins: never two live entries of one key.
//! ```text
//! move   1-3 as above into the flow's other bucket;  4. CAS old place -> 0;  5. CAS TENTATIVE -> live
//! ```
//! If 4 fails (somebody touched the flow) the copy goes; if 5 fails (an inserter of the same key killed the copy) the flow is
//! gone and is reported as freed. Between 4 and 5 the flow is seen only as TENTATIVE: `lookup` reports it as `Weak`.
//! Moves go from home to other, never back: `lookup` and step 4 of an insert look at home first, so a flow that moves under
//! them is met in one place or the other. (Against their direction it would be missed, and entered twice.)
//! ```text
//! lookup    reads keys, control, keys, control and accepts only when both pairs agree; if only payload or state have
//!           changed (an update), it goes on with keys, control
//! update    CAS on the control word that was read; whoever wins it accounts for the change
//! ```
//! Limits: (a) a reader is fooled only if the way is re-owned three times between its adjacent loads and both words come
//! back equal; an update, if the way went to a flow with the very same control word. (b) Loads must not be reordered:
//! given by x86; elsewhere `Bucket::load` is an acquire load and `cas` a full barrier. (c) Who adopts the dest of a
//! TENTATIVE entry may adopt one that loses: that one packet goes to another dest than the next. (d) An owner must not die
//! between 1 and 5: a BPF program never does, and user space only looks.

use core::hint::cold_path;

mod enter;
mod families;

pub use enter::{Cost, Outcome, Patience, insert, make_room, try_insert};
pub use families::{V4, V6};

/// One bucket. Implementations mask or check `word`.
pub trait Bucket: Copy {
    /// Acquire load (program order among loads is part of the protocol).
    fn load(&self, word: usize) -> u64;
    /// Release store, to a word that the caller owns.
    fn store(&self, word: usize, value: u64);
    /// True if `old` was there. A full barrier, as the kernel's and BPF's cmpxchg are.
    fn cas(&self, word: usize, old: u64, new: u64) -> bool;
}

/// Where the words of one family lie, and how they are found.
pub trait Family: Copy + 'static {
    /// Key words of an entry; the control word follows them.
    const KEYS: usize;
    const WAYS: usize;
    /// Words of a bucket, a multiple of eight.
    const WORDS: usize;
    type Words: Copy + PartialEq + core::fmt::Debug + AsRef<[u64]> + AsMut<[u64]> + Default;
    /// Keyed hash of the key words and the key bits of the control word; see [`hash_pair`].
    fn hash(words: &Self::Words, control: u64, seed: &Seed) -> u64;
}

/// A power-of-two number of buckets, at least [`MIN_BUCKETS`]; `bucket` takes the low bits of `n`.
pub trait Buckets<F: Family> {
    type B<'a>: Bucket
    where
        Self: 'a;
    fn bucket(&self, n: u32) -> Self::B<'_>;
    /// What is kept beside this bucket's entries may be asked for next: a moment to begin to fetch it, while the bucket itself is on its way.
    #[inline(always)]
    fn beside(&self, _n: u32) {}
    /// Number of buckets - 1.
    fn mask(&self) -> u32;
    /// Secret of this table: without it nobody can aim flows at one bucket.
    fn seed(&self) -> &Seed;
    /// How much an entry is worth now, from its control word; see [`Rank`].
    fn rank(&self, control: u64) -> Rank;
    /// May the entry change places? (Not if something holds its slot number.)
    #[inline(always)]
    fn movable(&self, control: u64) -> bool {
        control & (LINKED | REVERSE) != LINKED
    }
    /// `way`, so that BPF's verifier no longer knows which one: it then goes on once for all ways, not once for each.
    /// `noise` is any number that it does not know.
    #[inline(always)]
    fn blur(&self, way: usize, _noise: u64) -> usize {
        way
    }
    /// Bucket and way of a slot. A method, so that BPF can show the verifier that the way is small.
    #[inline(always)]
    fn place(&self, slot: Slot) -> (u32, usize) {
        (slot / F::WAYS as u32, slot as usize % F::WAYS)
    }
    /// All ones if `x` is negative, else 0. A method, so that BPF can keep LLVM from turning the search back into branches.
    #[inline(always)]
    fn sign(&self, x: u64) -> u64 {
        (x as i64 >> 63) as u64
    }
}

/// Lower goes first: class in the high bits ([`EVICTABLE`] and above are never evicted), then longest idle.
/// The low three bits are zero: the search puts the way there.
pub type Rank = u64;
/// First rank that is not for eviction.
pub const EVICTABLE: Rank = 6 << RANK_CLASS;
/// Shift of a rank's class (0: expired, 1: first to go, ... 7: being entered).
pub const RANK_CLASS: u32 = 16;
pub const MIN_BUCKETS: u32 = 1 << QUOTIENT_BITS;
/// Bits of the source port that are in the bucket number instead of the entry.
pub const QUOTIENT_BITS: u32 = 12;
const QUOTIENT: u32 = MIN_BUCKETS - 1;

/// Key material of the hash.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seed(pub [u64; 6]);

// ---- the control word
pub const STATE: u64 = 0xf;
/// States from here on are not live.
pub const NOT_LIVE: u64 = 14;
const TENTATIVE: u64 = NOT_LIVE;
const RESERVED: u64 = 15;
pub const PAYLOAD_SHIFT: u32 = 4;
/// In the flow's other bucket, not at home.
const OTHER: u64 = 1 << 39;
/// A reverse entry names this entry by its slot.
pub const LINKED: u64 = 1 << 40;
/// Entered for the replies of a flow. (Such an entry's LINKED is the meaning's to use: no link leads to it.)
pub const REVERSE: u64 = 1 << 41;
pub const PROTO_SHIFT: u32 = 42;
const SPORT_HIGH_SHIFT: u32 = 44;
const DPORT_SHIFT: u32 = 48;
/// The bits of a control word that belong to the tuple.
const TUPLE: u64 = !((1 << PROTO_SHIFT) - 1);
/// ... and those that must agree between a key in one of its buckets and an entry there.
const SAME: u64 = TUPLE | OTHER;

#[inline(always)]
pub fn is_live(control: u64) -> bool {
    control != 0 && control & STATE < TENTATIVE
}
#[inline(always)]
pub fn state(control: u64) -> u64 {
    control & STATE
}
/// TCP 1, UDP 2, SCTP 3.
#[inline(always)]
pub fn proto(control: u64) -> u64 {
    control >> PROTO_SHIFT & 3
}
/// Destination port (host order).
#[inline(always)]
pub fn dport(control: u64) -> u16 {
    (control >> DPORT_SHIFT) as u16
}

/// A flow's tuple in the form of the table.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Key<W> {
    pub words: W,
    /// dport, high bits of sport, proto; the rest 0.
    pub control: u64,
    /// Low bits of sport.
    quotient: u32,
}

impl<W: Copy> Key<W> {
    /// Ports in host order; `proto` as in [`proto`].
    #[inline(always)]
    pub fn new(words: W, sport: u16, dport: u16, proto: u64) -> Self {
        Key::of(words, (sport as u32) << 16 | dport as u32, proto)
    }
    /// Source port in the high half, destination port in the low half.
    #[inline(always)]
    pub fn of(words: W, ports: u32, proto: u64) -> Self {
        let dport = (ports as u64) << DPORT_SHIFT;
        let sport_high = ((ports >> (16 + QUOTIENT_BITS)) as u64) << SPORT_HIGH_SHIFT;
        Key { words, control: dport | sport_high | proto << PROTO_SHIFT, quotient: ports >> 16 & QUOTIENT }
    }
    #[inline(always)]
    pub fn sport(&self) -> u16 {
        ((self.control >> SPORT_HIGH_SHIFT & 0xf) << QUOTIENT_BITS) as u16 | self.quotient as u16
    }
    #[inline(always)]
    pub fn dport(&self) -> u16 {
        dport(self.control)
    }
}

/// The two buckets of a key. The odd difference makes them distinct in every table size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Homes {
    pub home: u32,
    pub other: u32,
}

/// Bucket number without the quotient, and the difference of the two buckets.
#[inline(always)]
fn spread<F: Family>(words: &F::Words, control: u64, seed: &Seed) -> (u32, u32) {
    let h = F::hash(words, control & TUPLE, seed);
    ((h >> 32) as u32, (h >> 20) as u32 | 1)
}

#[inline(always)]
pub fn homes<F: Family>(key: &Key<F::Words>, seed: &Seed) -> Homes {
    let (base, difference) = spread::<F>(&key.words, key.control, seed);
    let home = base ^ key.quotient;
    Homes { home, other: home ^ difference }
}

/// An entry copied out of the table.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Entry<W> {
    pub words: W,
    pub control: u64,
    /// Where it lay.
    pub slot: Slot,
}

impl<W: Copy + PartialEq> Entry<W> {
    /// The tuple, with the source port bits that the place stands for.
    #[inline(always)]
    pub fn key<F: Family<Words = W>>(&self, seed: &Seed) -> Key<W> {
        let (base, difference) = spread::<F>(&self.words, self.control, seed);
        let bucket = self.slot / F::WAYS as u32;
        let home = if self.control & OTHER == 0 { bucket } else { bucket ^ difference };
        Key { words: self.words, control: self.control & TUPLE, quotient: (home ^ base) & QUOTIENT }
    }
}

/// Number of the way in the whole table: bucket * WAYS + way.
pub type Slot = u32;

/// A live entry: where it is and the control word that was read.
#[derive(Clone, Copy)]
pub struct Hit<B> {
    bucket: B,
    way: usize,
    number: u32,
    pub control: u64,
}

#[derive(Clone, Copy)]
pub enum Found<B> {
    Live(Hit<B>),
    /// Being entered or moved this instant: its control word, good for the dest, not to be updated.
    Weak(u64),
    None,
}

impl<B: Bucket> Hit<B> {
    /// Replace the control word by `f(control)`, tried again when somebody else was faster.
    /// `Some((old, new))` if ours went in or nothing had to change; `None` if the entry is another flow's by now
    /// (or too many CPUs fight over it).
    #[inline(always)]
    pub fn update<F: Family>(&self, words: &F::Words, f: impl Fn(u64) -> u64) -> Option<(u64, u64)> {
        let mut old = self.control;
        let mut tries = 0;
        while tries < 4 {
            let new = f(old);
            if new == old || self.bucket.cas(self.at::<F>(), old, new) {
                return Some((old, new));
            }
            // The keys are looked at after the control word: they are its own, or the next compare-and-swap fails.
            old = self.bucket.load(self.at::<F>());
            let other_flow = (old ^ self.control) & (SAME | REVERSE) != 0 || !is_live(old);
            if other_flow || !keys_equal::<F, B>(&self.bucket, self.way, words) {
                return None;
            }
            tries += 1;
        }
        None
    }
    /// Free the entry if it still is as it was read. True: the caller accounts for it.
    #[inline(always)]
    pub fn free<F: Family>(&self) -> bool {
        self.bucket.cas(self.at::<F>(), self.control, 0)
    }
    #[inline(always)]
    pub fn slot<F: Family>(&self) -> Slot {
        self.number * F::WAYS as u32 + self.way as u32
    }
    #[inline(always)]
    fn at<F: Family>(&self) -> usize {
        self.way * (F::KEYS + 1) + F::KEYS
    }
}

#[inline(always)]
fn keys_equal<F: Family, B: Bucket>(b: &B, way: usize, words: &F::Words) -> bool {
    let at = way * (F::KEYS + 1);
    let mut i = 0;
    while i < F::KEYS {
        if b.load(at + i) != words.as_ref()[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// The control word of `key` (with its OTHER bit) if it is in this way, live or tentative.
#[inline(always)]
fn read<F: Family, B: Bucket>(b: &B, way: usize, words: &F::Words, same: u64) -> Option<u64> {
    if !keys_equal::<F, B>(b, way, words) {
        return None;
    }
    let at = way * (F::KEYS + 1) + F::KEYS;
    let mut control = b.load(at);
    let mut tries = 0;
    loop {
        if (control ^ same) & SAME != 0 || control & STATE == RESERVED || !keys_equal::<F, B>(b, way, words) {
            return None;
        }
        let again = b.load(at);
        if again == control || tries == 2 {
            return Some(control);
        }
        cold_path();
        // An update; or the way has gone to a flow with the same ports.
        control = again;
        tries += 1;
    }
}

#[inline(always)]
fn find<'a, F: Family, T: Buckets<F>>(
    t: &'a T,
    number: u32,
    words: &F::Words,
    same: u64,
    weak: &mut u64,
) -> Option<Hit<T::B<'a>>> {
    let b = t.bucket(number);
    let mut way = 0;
    while way < F::WAYS {
        if let Some(control) = read::<F, _>(&b, way, words, same) {
            if control & STATE != TENTATIVE {
                return Some(Hit { bucket: b, way: t.blur(way, control), number, control });
            }
            *weak = control;
        }
        way += 1;
    }
    None
}

#[inline(always)]
pub fn lookup<'a, F: Family, T: Buckets<F>>(t: &'a T, key: &Key<F::Words>) -> Found<T::B<'a>> {
    let homes = homes::<F>(key, t.seed());
    t.beside(homes.home & t.mask());
    let mut weak = 0;
    if let Some(hit) = find::<F, T>(t, homes.home & t.mask(), &key.words, key.control, &mut weak) {
        return Found::Live(hit);
    }
    let same = key.control | OTHER;
    if let Some(hit) = find::<F, T>(t, homes.other & t.mask(), &key.words, same, &mut weak) {
        return Found::Live(hit);
    }
    if weak != 0 { Found::Weak(weak) } else { Found::None }
}

/// The live entry in `slot`, if it is that of `key`: exact, though the key is not stored whole, since the place belongs to it.
#[inline(always)]
pub fn at_slot<'a, F: Family, T: Buckets<F>>(t: &'a T, slot: Slot, key: &Key<F::Words>) -> Option<Hit<T::B<'a>>> {
    let (number, way) = t.place(slot);
    let homes = homes::<F>(key, t.seed());
    let same = if (homes.home ^ number) & t.mask() == 0 {
        key.control
    } else if (homes.other ^ number) & t.mask() == 0 {
        key.control | OTHER
    } else {
        return None;
    };
    let bucket = t.bucket(number);
    let control = read::<F, _>(&bucket, way, &key.words, same)?;
    is_live(control).then_some(Hit { bucket, way, number, control })
}

/// A live entry, and what lies there.
pub type Live<'a, F, T> = (Hit<<T as Buckets<F>>::B<'a>>, Entry<<F as Family>::Words>);

/// The live entry in `slot`, whosever it is, with its key words. ([`Entry::key`] has its key.)
#[inline(always)]
pub fn live_at<F: Family, T: Buckets<F>>(t: &T, slot: Slot) -> Option<Live<'_, F, T>> {
    let (number, way) = t.place(slot);
    let bucket = t.bucket(number);
    let entry = entry_at::<F, _>(&bucket, number & t.mask(), way);
    let control = read::<F, _>(&bucket, way, &entry.words, entry.control & SAME)?;
    is_live(control).then_some((Hit { bucket, way, number, control }, Entry { control, ..entry }))
}

/// The live entry in `slot`, if it has the addresses, the protocol and (but for the low bits of the source port, which are not there) the
/// ports of `key`.
#[inline(always)]
pub fn glance<'a, F: Family, T: Buckets<F>>(t: &'a T, slot: Slot, key: &Key<F::Words>) -> Option<Hit<T::B<'a>>> {
    let (number, way) = t.place(slot);
    let bucket = t.bucket(number);
    let control = bucket.load(way * (F::KEYS + 1) + F::KEYS);
    let same = (control ^ key.control) & TUPLE == 0 && is_live(control);
    (same && keys_equal::<F, _>(&bucket, way, &key.words)).then_some(Hit { bucket, way, number, control })
}

/// The control word in a slot and its key words, as they are this instant (no promise that they belong together:
/// confirm with [`at_slot`]).
#[inline(always)]
pub fn peek<F: Family, T: Buckets<F>>(t: &T, slot: Slot) -> Entry<F::Words> {
    let (number, way) = t.place(slot);
    entry_at::<F, _>(&t.bucket(number), number & t.mask(), way)
}

#[inline(always)]
fn entry_at<F: Family, B: Bucket>(b: &B, number: u32, way: usize) -> Entry<F::Words> {
    let at = way * (F::KEYS + 1);
    let mut words = F::Words::default();
    let mut i = 0;
    while i < F::KEYS {
        words.as_mut()[i] = b.load(at + i);
        i += 1;
    }
    Entry { words, control: b.load(at + F::KEYS), slot: number * F::WAYS as u32 + way as u32 }
}

/// One bucket of the walk that frees what has expired. Only if `due` is not 0 for a control word (whatever it is), `look` gets each
/// live entry and says what to do with it; `freed` gets those that went by it.
#[inline(always)]
pub fn sweep<F: Family, T: Buckets<F>>(
    t: &T,
    number: u32,
    due: impl Fn(u64) -> u64,
    look: impl Fn(u64) -> Look,
    mut freed: impl FnMut(Entry<F::Words>),
) {
    let b = t.bucket(number);
    // One branch for a bucket: what lies in its ways is nothing that a processor could guess.
    let (mut any, mut way) = (0, 0);
    while way < F::WAYS {
        any |= due(b.load(way * (F::KEYS + 1) + F::KEYS));
        way += 1;
    }
    if any == 0 {
        return;
    }
    cold_path();
    way = 0;
    while way < F::WAYS {
        let at = way * (F::KEYS + 1) + F::KEYS;
        let control = b.load(at);
        if is_live(control) {
            match look(control) {
                Look::Keep => {}
                Look::Free => {
                    let entry = entry_at::<F, _>(&b, number, way);
                    if entry.control == control && b.cas(at, control, 0) {
                        freed(entry);
                    }
                }
                Look::Change(new) => {
                    let _ = b.cas(at, control, new);
                }
            }
        }
        way += 1;
    }
}

pub enum Look {
    Keep,
    Free,
    /// Replace the control word; left for the next sweep if somebody is faster.
    Change(u64),
}

/// Free an entry if it still is as it was read.
#[inline(always)]
pub fn free<F: Family, T: Buckets<F>>(t: &T, entry: &Entry<F::Words>) -> bool {
    let (number, way) = t.place(entry.slot);
    t.bucket(number).cas(way * (F::KEYS + 1) + F::KEYS, entry.control, 0)
}

/// The entry in one way of a bucket.
#[inline(always)]
pub fn entry<F: Family, T: Buckets<F>>(t: &T, number: u32, way: usize) -> Entry<F::Words> {
    entry_at::<F, _>(&t.bucket(number), number & t.mask(), way)
}

/// All entries of a bucket, for lists and tests.
pub fn entries<F: Family, T: Buckets<F>>(t: &T, number: u32) -> impl Iterator<Item = Entry<F::Words>> + '_ {
    (0..F::WAYS).map(move |way| entry_at::<F, _>(&t.bucket(number), number, way)).filter(|e| e.control != 0)
}
