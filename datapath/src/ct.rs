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

mod families;

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
    /// Number of buckets - 1.
    fn mask(&self) -> u32;
    /// Secret of this table: without it nobody can aim flows at one bucket.
    fn seed(&self) -> &Seed;
    /// How much an entry is worth now, from its control word; see [`Rank`].
    fn rank(&self, control: u64) -> Rank;
    /// May the entry change places? (Not if something holds its slot number.)
    fn movable(&self, control: u64) -> bool;
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
/// Ranks of this class and above are moved rather than evicted, always ...
const WORTH_A_MOVE: Rank = 2 << RANK_CLASS;
/// ... and from here on (all but expired flows) for as long as moves succeed.
const NOT_EXPIRED: Rank = 1 << RANK_CLASS;

/// Whether a move is tried before somebody half-open is evicted. In a table with room it nearly always succeeds, and nobody need go;
/// in a flood that has filled the table it costs much and never does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Patience(u32);

impl Patience {
    /// Inserts without a try after one that failed.
    const REST: u32 = 31;
    /// From which rank on the next insert is to be told [`Outcome::CROWDED`].
    #[inline(always)]
    pub fn spare(&mut self) -> Rank {
        if self.0 == 0 {
            return NOT_EXPIRED;
        }
        self.0 -= 1;
        WORTH_A_MOVE
    }
    #[inline(always)]
    pub fn learn(&mut self, moved: bool) {
        if !moved {
            self.0 = Patience::REST;
        }
    }
}

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
/// Entered for the replies of a flow.
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

/// The control word of the live entry in `slot`, if it has the addresses, the protocol and (but for the low bits of the source port,
/// which are not there) the ports of `key`.
#[inline(always)]
pub fn glance<F: Family, T: Buckets<F>>(t: &T, slot: Slot, key: &Key<F::Words>) -> Option<u64> {
    let (number, way) = t.place(slot);
    let bucket = t.bucket(number);
    let control = bucket.load(way * (F::KEYS + 1) + F::KEYS);
    let same = (control ^ key.control) & TUPLE == 0 && is_live(control);
    (same && keys_equal::<F, _>(&bucket, way, &key.words)).then_some(control)
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

/// What came of an insert, in one register (an enum with a payload would leave half of it undefined, which BPF's verifier minds).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome(u64);

impl Outcome {
    /// Nothing in the two buckets may be evicted, or too many CPUs fight over them.
    pub const FULL: Outcome = Outcome(0);
    /// Both are full of entries that are worth a move: see [`make_room`].
    pub const CROWDED: Outcome = Outcome(3);
    /// Entered in this slot.
    #[inline(always)]
    pub fn new(slot: Slot) -> Outcome {
        Outcome(u64::from(slot) << 4 | 1)
    }
    /// The key is there already (or is being entered).
    #[inline(always)]
    pub fn exists(control: u64) -> Outcome {
        Outcome(control & !STATE | 2)
    }
    #[inline(always)]
    pub fn is_new(self) -> bool {
        self.0 & STATE == 1
    }
    #[inline(always)]
    pub fn is_there(self) -> bool {
        self.0 & STATE == 2
    }
    /// Of a new entry.
    #[inline(always)]
    pub fn slot(self) -> Slot {
        (self.0 >> 4) as Slot
    }
    /// Of an entry that is there: its control word, without the state.
    #[inline(always)]
    pub fn control(self) -> u64 {
        self.0 & !STATE
    }
    #[inline(always)]
    pub fn word(self) -> u64 {
        self.0
    }
    #[inline(always)]
    pub fn from_word(word: u64) -> Outcome {
        Outcome(word)
    }
}

/// The entries that went for an insert, whatever its outcome; a control word of 0: none. The caller accounts for them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost<W> {
    pub evicted: Entry<W>,
    /// Lost in a move that an insert of the same flow crossed.
    pub lost: Entry<W>,
}

impl<W> Cost<W> {
    /// The outcome in the end: if the entry in slot `own` was evicted, all was in vain.
    #[inline(always)]
    pub fn settle(&self, outcome: Outcome, own: Slot) -> Outcome {
        if self.evicted.control != 0 && self.evicted.slot == own { Outcome::FULL } else { outcome }
    }
}

/// The first free way of a bucket, or 8. It would have the smallest rank, but nearly always there is one, and ranks are dear.
#[inline(always)]
fn free_way<F: Family, T: Buckets<F>>(t: &T, b: &T::B<'_>) -> u64 {
    let (mut best, mut way) = (8, F::WAYS);
    while way > 0 {
        way -= 1;
        let control = b.load(way * (F::KEYS + 1) + F::KEYS);
        let used = t.sign(control | control.wrapping_neg());
        best = best & used | way as u64 & !used;
    }
    best
}

/// Smallest rank of one bucket, or `best`; the number of the way (0..2*WAYS) in the low bits.
#[inline(always)]
fn victim<F: Family, T: Buckets<F>>(t: &T, b: &T::B<'_>, first: usize, mut best: u64) -> u64 {
    let mut way = 0;
    while way < F::WAYS {
        let r = rank(t, b.load(way * (F::KEYS + 1) + F::KEYS), first + way);
        best ^= (best ^ r) & t.sign(r.wrapping_sub(best));
        way += 1;
    }
    best
}

/// Class 0 with the longest idle time is left to free ways.
#[inline(always)]
fn rank<F: Family, T: Buckets<F>>(t: &T, control: u64, way: usize) -> u64 {
    let r = t.rank(control);
    // All ones for a used way. No branch.
    let used = t.sign(control | control.wrapping_neg());
    r & used | way as u64
}

enum Rival {
    None,
    Wins(u64),
    Moving,
}

/// Step 4 of an insert for one other way.
#[inline(always)]
fn rival<F: Family, B: Bucket>(b: &B, way: usize, lower: bool, words: &F::Words, same: u64) -> Rival {
    let Some(control) = read::<F, B>(b, way, words, same) else { return Rival::None };
    if control & STATE != TENTATIVE || lower {
        return Rival::Wins(control);
    }
    // Killed; or else it went live or away this instant.
    if b.cas(way * (F::KEYS + 1) + F::KEYS, control, 0) { Rival::None } else { Rival::Moving }
}

/// Enter `key` right after a lookup that found nothing, with the given kind bits, payload and state in `rest`.
/// (Is the key there all the same, by a race, this says so and enters nothing, but may have evicted somebody for nothing.)
#[inline(always)]
pub fn insert<F: Family, T: Buckets<F>>(t: &T, key: &Key<F::Words>, rest: u64, cost: &mut Cost<F::Words>) -> Outcome {
    let done = try_insert::<F, T>(t, key, rest, NOT_EXPIRED, cost);
    if done != Outcome::CROWDED {
        return done;
    }
    make_room::<F, T>(t, key, cost);
    try_insert::<F, T>(t, key, rest, EVICTABLE, cost)
}

/// Move one flow out of the key's buckets, if one can be moved. At half load this meets one new flow in some hundreds, and nearly
/// always works.
#[inline(always)]
pub fn make_room<F: Family, T: Buckets<F>>(t: &T, key: &Key<F::Words>, cost: &mut Cost<F::Words>) -> bool {
    let homes = homes::<F>(key, t.seed());
    move_one::<F, T>(t, homes.home, &mut cost.lost) || move_one::<F, T>(t, homes.other, &mut cost.lost)
}

/// Rather than evict what has the rank `spare` or more, say [`Outcome::CROWDED`].
#[inline(always)]
pub fn try_insert<F: Family, T: Buckets<F>>(
    t: &T,
    key: &Key<F::Words>,
    rest: u64,
    spare: Rank,
    cost: &mut Cost<F::Words>,
) -> Outcome {
    let homes = homes::<F>(key, t.seed());
    let (a, b) = (t.bucket(homes.home), t.bucket(homes.other));
    // Both are needed, and may be in memory far away: a compare-and-swap waits for all earlier loads, and lets none begin before it.
    let _ = b.load(F::KEYS);
    let mut tries = 0;
    while tries < 4 {
        tries += 1;
        // Home first; the other bucket only when home is full, and then the less valuable of both.
        let mut best = free_way::<F, T>(t, &a);
        if best >= 8 {
            best = victim::<F, T>(t, &a, 0, u64::MAX >> 1);
        }
        if best >= 8 {
            best = victim::<F, T>(t, &b, F::WAYS, best);
        }
        if best >= spare && spare < EVICTABLE {
            return Outcome::CROWDED;
        }
        if best >= EVICTABLE || (best >= 8 && cost.evicted.control != 0) {
            break;
        }
        let me = best as usize & 7;
        let at_home = me < F::WAYS;
        let (mine, way) = if at_home { (a, me) } else { (b, me - F::WAYS) };
        let control = key.control | rest & !STATE | if at_home { 0 } else { OTHER };
        let number = if at_home { homes.home } else { homes.other } & t.mask();
        match claim::<F, T>(t, &mine, way, number, best, key, control, &mut cost.evicted) {
            true => {}
            false => continue,
        }
        let rivals = contest::<F, T>(&a, &b, me, key);
        let at = way * (F::KEYS + 1) + F::KEYS;
        match rivals {
            Rival::None => {
                if mine.cas(at, control | TENTATIVE, control | rest & STATE) {
                    return Outcome::new(number * F::WAYS as u32 + way as u32);
                }
            }
            Rival::Wins(winner) => {
                let _ = mine.cas(at, control | TENTATIVE, 0);
                return Outcome::exists(winner);
            }
            Rival::Moving => {
                let _ = mine.cas(at, control | TENTATIVE, 0);
            }
        }
    }
    Outcome::FULL
}

/// Steps 1 to 3 of an insert. False: somebody else was there first.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "inlined into one loop; a struct would go through BPF's small stack")]
fn claim<F: Family, T: Buckets<F>>(
    t: &T,
    mine: &T::B<'_>,
    way: usize,
    number: u32,
    best: u64,
    key: &Key<F::Words>,
    control: u64,
    evicted: &mut Entry<F::Words>,
) -> bool {
    let at = way * (F::KEYS + 1) + F::KEYS;
    let old = mine.load(at);
    // Still what was ranked? (A free way may be somebody's fresh entry by now.)
    let same = if best < 8 { old == 0 } else { rank(t, old, best as usize & 7) == best };
    if !same || !mine.cas(at, old, control | RESERVED) {
        return false;
    }
    if old != 0 {
        *evicted = Entry { control: old, ..entry_at::<F, _>(mine, number, way) };
    }
    let mut i = 0;
    while i < F::KEYS {
        mine.store(way * (F::KEYS + 1) + i, key.words.as_ref()[i]);
        i += 1;
    }
    mine.cas(at, control | RESERVED, control | TENTATIVE)
}

/// Step 4 of an insert: everybody else who holds or enters the same key.
#[inline(always)]
fn contest<F: Family, T: Buckets<F>>(a: &T::B<'_>, b: &T::B<'_>, me: usize, key: &Key<F::Words>) -> Rival {
    let mut found = Rival::None;
    let mut i = 0;
    while i < F::WAYS {
        if i != me {
            found = rival::<F, _>(a, i, i < me, &key.words, key.control);
        }
        if !matches!(found, Rival::None) {
            return found;
        }
        i += 1;
    }
    let mut i = 0;
    while i < F::WAYS {
        if F::WAYS + i != me {
            found = rival::<F, _>(b, i, F::WAYS + i < me, &key.words, key.control | OTHER);
        }
        if !matches!(found, Rival::None) {
            return found;
        }
        i += 1;
    }
    found
}

/// Make a free way in bucket `n` by moving one of the flows at home there to that flow's other bucket (cuckoo, one step).
/// False: nothing could be moved. `lost` (memory to work in) is set if the flow fell between two chairs.
#[inline(always)]
fn move_one<F: Family, T: Buckets<F>>(t: &T, n: u32, lost: &mut Entry<F::Words>) -> bool {
    let from = t.bucket(n);
    let mut way = 0;
    while way < F::WAYS {
        *lost = entry_at::<F, _>(&from, n & t.mask(), way);
        way += 1;
        if !is_live(lost.control) || lost.control & OTHER != 0 || !t.movable(lost.control) {
            continue;
        }
        // Or a copy would show, for an instant, one flow's keys with another's dest.
        if !keys_equal::<F, _>(&from, way - 1, &lost.words) {
            continue;
        }
        let (_, difference) = spread::<F>(&lost.words, lost.control, t.seed());
        let to = t.bucket(n ^ difference);
        let mut free = 0;
        while free < F::WAYS && to.load(free * (F::KEYS + 1) + F::KEYS) != 0 {
            free += 1;
        }
        if free < F::WAYS && relocate::<F, _>(&from, way - 1, &to, free, lost) {
            return true;
        }
    }
    lost.control = 0;
    false
}

/// True: `entry` has left its way. Its control word is 0 then, or else it was lost.
#[inline(always)]
fn relocate<F: Family, B: Bucket>(from: &B, way: usize, to: &B, free: usize, entry: &mut Entry<F::Words>) -> bool {
    let (at, old) = (free * (F::KEYS + 1) + F::KEYS, way * (F::KEYS + 1) + F::KEYS);
    let moved = entry.control ^ OTHER;
    let kept = moved & !STATE;
    if !to.cas(at, 0, kept | RESERVED) {
        return false;
    }
    let mut i = 0;
    while i < F::KEYS {
        to.store(free * (F::KEYS + 1) + i, entry.words.as_ref()[i]);
        i += 1;
    }
    if !to.cas(at, kept | RESERVED, kept | TENTATIVE) {
        return false;
    }
    // Fails if the flow was touched or replaced since it was read; the keys are then perhaps not its own either.
    if !keys_equal::<F, B>(from, way, &entry.words) || !from.cas(old, entry.control, 0) {
        let _ = to.cas(at, kept | TENTATIVE, 0);
        return false;
    }
    if to.cas(at, kept | TENTATIVE, moved) {
        entry.control = 0;
    }
    true
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
