//! Entering an entry: where it goes, whom it costs a place, and how one that is worth it is moved out of the way. The protocol is that
//! of the parent module.

use super::{
    Bucket, Buckets, EVICTABLE, Entry, Family, Key, OTHER, RANK_CLASS, RESERVED, Rank, STATE, Slot, TENTATIVE,
    entry_at, homes, is_live, keys_equal, read, spread,
};

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
    /// None went. (A program has more to do for each word that is written.)
    #[inline(always)]
    pub fn clear(&mut self) {
        self.evicted.control = 0;
        self.lost.control = 0;
    }
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
