//! The tables in plain memory: what native tests, the simulation and the benchmark's native side run on.

mod packet;
mod tables;

pub use packet::{MemPacket, MemWindow};
pub use tables::{MemSizes, MemTables, Way};

use crate::conn::{self, Addressing, Conns, Policy, Timeouts};
use crate::ct::{self, Bucket, Buckets, Family, Rank, Seed};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::*};

/// The words of one connection table.
pub struct Words<F: Family> {
    words: Vec<AtomicU64>,
    mask: u32,
    seed: Seed,
    family: std::marker::PhantomData<F>,
}

impl<F: Family> Words<F> {
    /// `buckets`: a power of two, at least [`ct::MIN_BUCKETS`].
    pub fn new(buckets: u32, seed: Seed) -> Self {
        assert!(buckets.is_power_of_two() && buckets >= ct::MIN_BUCKETS);
        let words = (0..buckets as usize * F::WORDS).map(|_| AtomicU64::new(0)).collect();
        Words { words, mask: buckets - 1, seed, family: std::marker::PhantomData }
    }
    pub fn seed(&self) -> &Seed {
        &self.seed
    }
    /// Number of buckets - 1.
    pub fn mask(&self) -> u32 {
        self.mask
    }
}

/// One bucket of it.
#[derive(Clone, Copy)]
pub struct Line<'a>(&'a [AtomicU64]);
impl Bucket for Line<'_> {
    fn load(&self, word: usize) -> u64 {
        self.0[word].load(Acquire)
    }
    fn store(&self, word: usize, value: u64) {
        self.0[word].store(value, Release);
    }
    fn cas(&self, word: usize, old: u64, new: u64) -> bool {
        self.0[word].compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }
}

/// ActiveConn and InActConn of a dest.
#[derive(Default)]
pub struct Counters {
    pub active: AtomicI64,
    pub inactive: AtomicI64,
}

/// A connection table with its clock, policy, dests and their counters.
pub struct MemConns<F: Addressing> {
    pub words: Words<F>,
    pub policy: Policy,
    pub now_s: AtomicU64,
    pub dests: BTreeMap<u32, (F::Addr, u16)>,
    /// Dests by FULLNAT.
    pub lent: BTreeSet<u32>,
    sides: Vec<AtomicU64>,
    pub counters: Vec<Counters>,
}

impl<F: Addressing> MemConns<F> {
    /// Words of a row beside an entry.
    const SIDE: usize = conn::fullnat::ADDRESS + size_of::<F::AddrWords>() / 8;
    pub fn new(buckets: u32, seed: Seed, dests: u32) -> Self {
        MemConns {
            words: Words::new(buckets, seed),
            policy: Policy::new(&Timeouts::default()),
            now_s: AtomicU64::new(1000),
            dests: BTreeMap::new(),
            lent: BTreeSet::new(),
            sides: (0..buckets as usize * F::WAYS * Self::SIDE).map(|_| AtomicU64::new(0)).collect(),
            counters: (0..=dests).map(|_| Counters::default()).collect(),
        }
    }
    pub fn entries(&self) -> impl Iterator<Item = ct::Entry<F::Words>> + '_ {
        (0..=self.words.mask).flat_map(|n| ct::entries::<F, _>(self, n))
    }
    pub fn counted(&self, dest: u32) -> (i64, i64) {
        let c = &self.counters[dest as usize];
        (c.active.load(SeqCst), c.inactive.load(SeqCst))
    }
    /// ActiveConn and InActConn of a dest as the entries say.
    pub fn recount(&self, dest: u32) -> (i64, i64) {
        let mut sum = (0, 0);
        for e in self.entries().filter(|e| e.control & ct::REVERSE == 0 && conn::dest(e.control) == dest) {
            if self.policy.row(e.control).active() { sum.0 += 1 } else { sum.1 += 1 }
        }
        sum
    }
    /// A full sweep.
    pub fn sweep(&self) {
        self.sweep_buckets(0..self.words.mask + 1);
    }
    pub fn sweep_buckets(&self, buckets: std::ops::Range<u32>) {
        for n in buckets {
            let mut gone = Vec::new();
            conn::sweep(self, n, |e| gone.push(e));
            gone.iter().for_each(|e| conn::release(self, e));
        }
    }
    /// The buckets whose turn it is in this sweep, as with `drop_entry`.
    pub fn thin(&self, sweep: u32) {
        for n in (0..=self.words.mask).filter(|n| conn::thin::is_due(*n, sweep)) {
            let gone = (0..F::WAYS).filter_map(|way| conn::thin::one(self, n, way, sweep));
            gone.for_each(|e| conn::release(self, &e));
        }
    }
    pub fn set_now(&self, now_s: u32) {
        self.now_s.store(u64::from(now_s), SeqCst);
    }
}

impl<F: Addressing> Buckets<F> for MemConns<F> {
    type B<'a> = Line<'a>;
    fn bucket(&self, n: u32) -> Line<'_> {
        let at = (n & self.words.mask) as usize * F::WORDS;
        Line(&self.words.words[at..at + F::WORDS])
    }
    fn mask(&self) -> u32 {
        self.words.mask
    }
    fn seed(&self) -> &Seed {
        &self.words.seed
    }
    fn rank(&self, control: u64) -> Rank {
        conn::rank(&self.policy, control, self.now_s(), |x| Buckets::<F>::sign(self, x))
    }
}

impl<F: Addressing> Conns<F> for MemConns<F> {
    type Table = Self;
    fn table(&self) -> &Self {
        self
    }
    fn policy(&self) -> &Policy {
        &self.policy
    }
    fn now_s(&self) -> u32 {
        self.now_s.load(Relaxed) as u32
    }
    fn account(&self, dest: u32, active: i64, inactive: i64) {
        let c = &self.counters[dest as usize];
        assert!(c.active.fetch_add(active, SeqCst) + active >= -64);
        assert!(c.inactive.fetch_add(inactive, SeqCst) + inactive >= -64);
    }
    fn dest_address(&self, dest: u32) -> Option<(F::Addr, u16)> {
        self.dests.get(&dest).copied()
    }
    fn fullnat(&self, dest: u32) -> bool {
        self.lent.contains(&dest)
    }
    fn side(&self, slot: ct::Slot) -> Option<Line<'_>> {
        let at = slot as usize * Self::SIDE;
        self.sides.get(at..at + Self::SIDE).map(Line)
    }
}
