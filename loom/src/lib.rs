//! A connection table of three buckets, whose accesses loom schedules.
#![forbid(unsafe_code)]

use loom::sync::atomic::{AtomicI64, AtomicU64, Ordering::*, fence};
use rvs_datapath::conn::{self, Addressing, Conns, Policy, Row, Timeouts, class};
use rvs_datapath::ct::{self, Bucket, Buckets, Entry, Family, Found, Key, Rank, Seed, V4};
use rvs_datapath::proto::tcp;

pub const SEED: Seed = Seed([0x1234_5678_9abc_def1, 3, 5, 7, 11, 13]);
/// Numbers of the buckets that exist.
pub const HOME: u32 = 6;
pub const OTHER: u32 = 7;
pub const THIRD: u32 = 5;
const BUCKETS: [u32; 3] = [HOME, OTHER, THIRD];
const VIP: u32 = 0x0102_0304;
const LOW: u32 = ct::MIN_BUCKETS - 1;
/// Dests are numbered 1 to this.
pub const DESTS: u32 = 4;

pub struct Table {
    words: Vec<AtomicU64>,
    policy: Policy,
    now_s: u32,
    /// Address and port of each dest.
    pub dests: Vec<(u32, u16)>,
    active: Vec<AtomicI64>,
    inactive: Vec<AtomicI64>,
}

impl Table {
    /// `dests`: address and port of dest 1, 2, ...
    pub fn new(dests: &[(u32, u16)]) -> Table {
        Table {
            words: (0..BUCKETS.len() * V4::WORDS).map(|_| AtomicU64::new(0)).collect(),
            policy: Policy::new(&Timeouts::default()),
            now_s: 1000,
            dests: dests.to_vec(),
            active: (0..=DESTS).map(|_| AtomicI64::new(0)).collect(),
            inactive: (0..=DESTS).map(|_| AtomicI64::new(0)).collect(),
        }
    }
    /// Nobody may evict an established flow, however few packets it has seen.
    pub fn established_stay(mut self) -> Table {
        for rows in &mut self.policy.rows {
            rows[(conn::TCP << 4 | tcp::ESTABLISHED) as usize] = Row::new(900, class::NOT_LIVE, true);
        }
        self
    }
    pub fn entries(&self) -> Vec<Entry<[u64; 1]>> {
        BUCKETS.into_iter().flat_map(|n| ct::entries::<V4, _>(self, n)).collect()
    }
    /// What must hold when all threads have come to their end. Returns the live forward entries.
    pub fn at_rest(&self) -> Vec<Entry<[u64; 1]>> {
        let entries = self.entries();
        for e in &entries {
            assert!(ct::is_live(e.control), "left in the middle of being entered: {e:x?}");
            let Found::Live(hit) = ct::lookup::<V4, _>(self, &e.key::<V4>(&SEED)) else { panic!("not found: {e:x?}") };
            assert_eq!(hit.slot::<V4>(), e.slot, "two entries of one key: {entries:x?}");
        }
        let forward: Vec<_> = entries.into_iter().filter(|e| e.control & ct::REVERSE == 0).collect();
        for dest in 1..=DESTS {
            let (mut active, mut inactive) = (0, 0);
            for e in forward.iter().filter(|e| conn::dest(e.control) == dest) {
                if self.policy.row(e.control).active() { active += 1 } else { inactive += 1 }
            }
            let counted = [&self.active, &self.inactive].map(|c| c[dest as usize].load(SeqCst));
            assert_eq!(counted, [active, inactive], "counters of dest {dest}");
        }
        for e in forward.iter().filter(|e| e.control & ct::LINKED != 0) {
            let replies = self.entries().into_iter().filter(|r| r.control & ct::REVERSE != 0);
            assert_eq!(replies.filter(|r| conn::link_of(r.control) == e.slot).count(), 1, "reverse entries of {e:x?}");
        }
        forward
    }
    /// Free a flow, as an administrator or a sweep would.
    pub fn delete(&self, key: &Key<[u64; 1]>) -> bool {
        let Found::Live(hit) = ct::lookup::<V4, _>(self, key) else { return false };
        let freed = hit.free::<V4>();
        if freed {
            conn::release(self, &Entry { words: key.words, control: hit.control, slot: hit.slot::<V4>() });
        }
        freed
    }
    /// Reverse entries without a flow.
    pub fn orphans(&self) -> usize {
        self.entries().iter().filter(|e| conn::orphan(self, e)).count()
    }
    pub fn dest_of(&self, key: &Key<[u64; 1]>) -> Option<u32> {
        match ct::lookup::<V4, _>(self, key) {
            Found::Live(hit) => Some(conn::dest(hit.control)),
            Found::Weak(control) => Some(conn::dest(control)),
            Found::None => None,
        }
    }
}

/// The low bits of the source port with which `key` is at home in `home`, if its other bucket is then `other`.
fn low(key: &Key<[u64; 1]>, home: u32, other: u32) -> Option<u16> {
    let homes = ct::homes::<V4>(key, &SEED);
    ((homes.home ^ homes.other) & LOW == home ^ other).then_some(((homes.home ^ home) & LOW) as u16)
}
/// Keys of clients with these two buckets; different clients for different `first`.
pub fn keys(home: u32, other: u32, first: u32) -> impl Iterator<Item = Key<[u64; 1]>> {
    (first << 24..).filter_map(move |client| {
        let key = |low| Key::new(V4::words(client, VIP), 0xc000 | low, 80, conn::TCP);
        low(&key(0), home, other).map(key)
    })
}
/// Address and port of a dest whose replies to `client` have these two buckets.
pub fn dest_for(client: &Key<[u64; 1]>, home: u32, other: u32) -> (u32, u16) {
    let mut address = 0x0a00_0000;
    loop {
        address += 1;
        let words = V4::words(address, V4::source(&client.words));
        if let Some(low) = low(&Key::new(words, 0x1000, client.sport(), conn::TCP), home, other) {
            return (address, 0x1000 | low);
        }
    }
}

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
        let done = self.0[word].compare_exchange(old, new, SeqCst, SeqCst).is_ok();
        // Loom takes sequentially consistent accesses for acquire and release only; the kernel's is a full barrier.
        fence(SeqCst);
        done
    }
}
impl Buckets<V4> for Table {
    type B<'a> = Line<'a>;
    fn bucket(&self, n: u32) -> Line<'_> {
        match n & LOW {
            HOME => Line(&self.words[..V4::WORDS]),
            OTHER => Line(&self.words[V4::WORDS..2 * V4::WORDS]),
            THIRD => Line(&self.words[2 * V4::WORDS..]),
            n => panic!("there is no bucket {n}"),
        }
    }
    fn mask(&self) -> u32 {
        LOW
    }
    fn seed(&self) -> &Seed {
        &SEED
    }
    fn rank(&self, control: u64) -> Rank {
        conn::rank(&self.policy, control, self.now_s, |x| Buckets::<V4>::sign(self, x))
    }
}
impl Conns<V4> for Table {
    type Table = Table;
    fn table(&self) -> &Table {
        self
    }
    fn policy(&self) -> &Policy {
        &self.policy
    }
    fn now_s(&self) -> u32 {
        self.now_s
    }
    fn account(&self, dest: u32, active: i64, inactive: i64) {
        self.active[dest as usize].fetch_add(active, Relaxed);
        self.inactive[dest as usize].fetch_add(inactive, Relaxed);
    }
    fn dest_address(&self, dest: u32) -> Option<(u32, u16)> {
        self.dests.get(dest as usize - 1).copied()
    }
}
