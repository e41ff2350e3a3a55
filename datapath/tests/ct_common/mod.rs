//! What the tests of the connection table share: flows whose entries crowd into a few buckets, and an audit of a table.
#![allow(dead_code, reason = "each test file uses a part of it")]

use rvs_datapath::conn::{self, Addressing, Conns};
use rvs_datapath::ct::{self, Buckets, Entry, Family, Found, Key, Seed, Slot, V4, V6};
use rvs_datapath::mem::MemConns;
use std::collections::{BTreeMap, BTreeSet};

/// Marsaglia's xorshift: small, and the same on every machine.
pub struct Rng(pub u64);
impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    pub fn seed(&mut self) -> Seed {
        Seed(std::array::from_fn(|_| self.next()))
    }
}

/// A family with addresses to number.
pub trait Fam: Addressing<Words: Send + Sync, Addr: Send + Sync> + Send + Sync {
    fn addr(n: u32) -> Self::Addr;
}
impl Fam for V4 {
    fn addr(n: u32) -> u32 {
        (0x0a00_0000 + n).to_be()
    }
}
impl Fam for V6 {
    fn addr(n: u32) -> [u64; 2] {
        [0x0000_b80d_0120, u64::from(n.to_be()) << 32]
    }
}

pub const VIP: u32 = 0xf0_0001;
pub const TWIN_VIP: u32 = 0xf0_0002;
const CLIENTS: u32 = 0x10_0000;
const SERVERS: u32 = 0x80_0000;
/// Low bits of the port that choose the home bucket.
const LOW: u32 = ct::MIN_BUCKETS - 1;

/// A flow and the dests that it may get.
pub struct Flow<F: Family> {
    pub key: Key<F::Words>,
    /// Dest and key of the replies from it.
    pub dests: Vec<(u32, Key<F::Words>)>,
}

/// Flows of a table with [`ct::MIN_BUCKETS`] buckets, forward and reverse keys at home in the first few of them, their other
/// buckets too.
pub struct Crowd<F: Addressing> {
    pub seed: Seed,
    pub flows: Vec<Flow<F>>,
    pub dests: BTreeMap<u32, (F::Addr, u16)>,
    /// All buckets where any of them may lie.
    pub buckets: BTreeSet<u32>,
}

pub fn key_of<F: Fam>(from: (u32, u16), to: (u32, u16), proto: u64) -> Key<F::Words> {
    Key::new(F::words(F::addr(from.0), F::addr(to.0)), from.1, to.1, proto)
}

/// Home (for a source port whose low bits are 0) and other bucket's distance.
fn place<F: Family>(key: &Key<F::Words>, seed: &Seed) -> (u32, u32) {
    let homes = ct::homes::<F>(key, seed);
    (homes.home & LOW, (homes.home ^ homes.other) & LOW)
}

impl<F: Fam> Crowd<F> {
    /// `buckets`: a power of two. Every `udp`th flow is UDP (0: none). `dests`: how many dests each flow has.
    pub fn new(seed: Seed, buckets: u32, flows: u32, udp: u32, dests: u32) -> Self {
        let mut crowd = Crowd { seed, flows: Vec::new(), dests: BTreeMap::new(), buckets: BTreeSet::new() };
        let (mut client, mut server) = (CLIENTS, SERVERS);
        for i in 0..flows {
            let proto = if udp > 0 && i % udp == 0 { conn::UDP } else { conn::TCP };
            // Of the two ports of a key, the high bits of the source port are hashed, the low ones choose the home bucket.
            let sport = loop {
                client += 1;
                let (home, distance) = place::<F>(&key_of::<F>((client, 0xc000), (VIP, 80), proto), &seed);
                if distance < buckets {
                    break 0xc000 | (home ^ (i % buckets)) as u16;
                }
            };
            let key = key_of::<F>((client, sport), (VIP, 80), proto);
            crowd.add_buckets(&key);
            let mut flow = Flow { key, dests: Vec::new() };
            for _ in 0..dests {
                let dport = loop {
                    server += 1;
                    let (home, distance) = place::<F>(&key_of::<F>((server, 0x1000), (client, sport), proto), &seed);
                    if distance < buckets {
                        break 0x1000 | (home ^ (server % buckets)) as u16;
                    }
                };
                let reverse = key_of::<F>((server, dport), (client, sport), proto);
                crowd.add_dest(&mut flow, F::addr(server), dport, reverse);
            }
            crowd.flows.push(flow);
        }
        crowd
    }

    /// For every `nth` flow another from the same client port to another virtual address, with the same dests: only one of
    /// the two can have a dest's reply tuple.
    pub fn with_twins(mut self, nth: usize) -> Self {
        let twins: Vec<_> = self.flows.iter().step_by(nth).map(|f| (f.key, f.dests.clone())).collect();
        for (key, dests) in twins {
            let words = F::words(F::source(&key.words), F::addr(TWIN_VIP));
            let key = Key::new(words, key.sport(), 8080, ct::proto(key.control));
            self.add_buckets(&key);
            self.flows.push(Flow { key, dests });
        }
        self
    }

    /// One more dest for every `nth` flow, that answers on the flow's own port (port 0).
    pub fn with_own_ports(mut self, nth: usize) -> Self {
        let mut flows = std::mem::take(&mut self.flows);
        for (i, flow) in flows.iter_mut().enumerate().step_by(nth) {
            let address = F::addr(SERVERS / 2 + i as u32);
            let words = F::words(address, F::source(&flow.key.words));
            let reverse = Key::new(words, flow.key.dport(), flow.key.sport(), ct::proto(flow.key.control));
            self.add_dest(flow, address, 0, reverse);
        }
        self.flows = flows;
        self
    }

    fn add_dest(&mut self, flow: &mut Flow<F>, address: F::Addr, port: u16, reverse: Key<F::Words>) {
        let dest = self.dests.len() as u32 + 1;
        self.dests.insert(dest, (address, port));
        self.add_buckets(&reverse);
        flow.dests.push((dest, reverse));
    }
    fn add_buckets(&mut self, key: &Key<F::Words>) {
        let homes = ct::homes::<F>(key, &self.seed);
        self.buckets.extend([homes.home & LOW, homes.other & LOW]);
    }

    pub fn table(&self) -> MemConns<F> {
        let mut table = MemConns::new(ct::MIN_BUCKETS, self.seed, self.dests.len() as u32);
        table.dests = self.dests.clone();
        table
    }
    /// All entries of the crowd's buckets.
    pub fn entries(&self, t: &MemConns<F>) -> Vec<Entry<F::Words>> {
        self.buckets.iter().flat_map(|n| ct::entries::<F, _>(t, *n)).collect()
    }
    /// A sweep of the crowd's buckets.
    pub fn sweep<C: Conns<F>>(&self, c: &C) {
        for n in &self.buckets {
            let mut gone = Vec::new();
            conn::sweep(c, *n, |e| gone.push(e));
            gone.iter().for_each(|e| conn::release(c, e));
        }
    }
    pub fn full_tuple(&self) -> BTreeMap<Tuple, Side> {
        let mut all = BTreeMap::new();
        for (i, flow) in self.flows.iter().enumerate() {
            all.insert(tuple::<F>(&flow.key), Side::Forward(i));
            for (dest, reverse) in &flow.dests {
                // Twins share their reply tuples: it is the dest that tells.
                all.insert(tuple::<F>(reverse), Side::Reverse(*dest));
            }
        }
        all
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Index of the flow.
    Forward(usize),
    /// The dest that answers.
    Reverse(u32),
}

/// Words, sport, dport, proto.
pub type Tuple = (Vec<u64>, u16, u16, u64);
pub fn tuple<F: Family>(key: &Key<F::Words>) -> Tuple {
    (key.words.as_ref().to_vec(), key.sport(), key.dport(), ct::proto(key.control))
}

/// What must hold of any table at rest; returns the forward entries by flow.
pub fn audit<F: Fam>(crowd: &Crowd<F>, names: &BTreeMap<Tuple, Side>, t: &MemConns<F>) -> BTreeMap<usize, u64> {
    let mut forward = BTreeMap::new();
    let mut reverse: BTreeMap<Slot, usize> = BTreeMap::new();
    let (mut linked, mut sums) = (BTreeSet::new(), BTreeMap::new());
    for e in crowd.entries(t) {
        assert!(ct::is_live(e.control), "left in the middle of being entered: {e:x?}");
        let key = e.key::<F>(&crowd.seed);
        let side = names.get(&tuple::<F>(&key));
        let Some(side) = side else { panic!("an entry that gives back no flow's tuple: {e:x?}, {key:x?}") };
        let Found::Live(hit) = ct::lookup::<F, _>(t, &key) else { panic!("not found by its own key: {e:x?}") };
        assert_eq!(hit.slot::<F>(), e.slot, "two entries of one key: {e:x?}");
        match *side {
            Side::Forward(flow) => {
                assert_eq!(e.control & ct::REVERSE, 0);
                assert!(forward.insert(flow, e.control).is_none());
                let sum: &mut (i64, i64) = sums.entry(conn::dest(e.control)).or_default();
                if t.policy.row(e.control).active() {
                    sum.0 += 1
                } else {
                    sum.1 += 1
                }
                if e.control & ct::LINKED != 0 {
                    linked.insert(e.slot);
                }
            }
            Side::Reverse(dest) => {
                assert_ne!(e.control & ct::REVERSE, 0);
                *reverse.entry(conn::link_of(e.control)).or_default() += 1;
                assert!(!conn::orphan(t, &e), "a reverse entry without its flow: {e:x?}");
                let Some(reply) = conn::follow(t, &key, &hit) else { panic!("leads nowhere: {e:x?}") };
                assert_eq!(conn::dest(reply.forward.control), dest);
                assert_eq!(reply.forward.slot::<F>(), conn::link_of(e.control));
                assert_eq!((reply.client, key.dport()), (F::destination(&key.words), key.dport()));
                let client = F::words(reply.client, reply.virtual_address);
                let whose = Key::new(client, key.dport(), reply.virtual_port, ct::proto(key.control));
                let is = names.get(&tuple::<F>(&whose));
                assert!(matches!(is, Some(Side::Forward(_))), "a reply translated to no flow's address: {whose:x?}");
            }
        }
    }
    for slot in &linked {
        assert_eq!(reverse.remove(slot), Some(1), "reverse entries of the NAT flow in slot {slot}");
    }
    assert!(reverse.is_empty(), "links to no NAT flow: {reverse:?}");
    for dest in crowd.dests.keys() {
        assert_eq!(t.counted(*dest), sums.get(dest).copied().unwrap_or_default(), "counters of dest {dest}");
    }
    forward
}

/// Class of an entry's rank, and whether it is free.
pub fn class_of<F: Fam>(t: &MemConns<F>, control: u64) -> u32 {
    (Buckets::<F>::rank(t, control) >> ct::RANK_CLASS) as u32
}

/// The body of a test for both families.
#[macro_export]
macro_rules! for_both_families {
    ($($test:ident => $body:ident),+ $(,)?) => {
        mod v4 { $(#[test] fn $test() { super::$body::<rvs_datapath::ct::V4>() })+ }
        mod v6 { $(#[test] fn $test() { super::$body::<rvs_datapath::ct::V6>() })+ }
    };
}
