//! Racing CPUs: threads that fight over few keys in few buckets, and may lose the CPU at every access to the table.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[macro_use]
mod ct_common;

use ct_common::{Crowd, Fam, Rng, audit};
use rvs_datapath::conn::{self, Conns, Opened, Policy, Row, class};
use rvs_datapath::ct::{self, Bucket, Buckets, Entry, Found, Rank, Seed};
use rvs_datapath::mem::{Line, MemConns};
use rvs_datapath::proto::tcp::{CLOSE, ESTABLISHED, FIN_WAIT, SYN_RECV};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Barrier, Mutex};

for_both_families! {
    all_at_once => hammered,
    all_at_once_with_lost_cpus => hammered_slowly,
    everybody_opens_the_same_flow => same_flow,
    a_flow_that_moves_is_never_missed => never_missed,
}

/// A table whose accesses lose the CPU now and then: windows of nanoseconds become whole time slices.
struct Shaky<'t, F: Fam> {
    table: &'t MemConns<F>,
    /// One access in so many; 0: none.
    one_in: u64,
}
#[derive(Clone, Copy)]
struct ShakyLine<'a> {
    line: Line<'a>,
    one_in: u64,
}
thread_local! { static DICE: Cell<u64> = const { Cell::new(1) } }
fn lose_the_cpu(one_in: u64) {
    if one_in > 0 {
        let mut rng = Rng(DICE.get());
        if rng.below(one_in) == 0 {
            std::thread::yield_now();
        }
        DICE.set(rng.0);
    }
}
impl Bucket for ShakyLine<'_> {
    fn load(&self, word: usize) -> u64 {
        lose_the_cpu(self.one_in);
        self.line.load(word)
    }
    fn store(&self, word: usize, value: u64) {
        lose_the_cpu(self.one_in);
        self.line.store(word, value);
    }
    fn cas(&self, word: usize, old: u64, new: u64) -> bool {
        lose_the_cpu(self.one_in);
        self.line.cas(word, old, new)
    }
}
impl<F: Fam> Buckets<F> for Shaky<'_, F> {
    type B<'a>
        = ShakyLine<'a>
    where
        Self: 'a;
    fn bucket(&self, n: u32) -> ShakyLine<'_> {
        ShakyLine { line: self.table.bucket(n), one_in: self.one_in }
    }
    fn mask(&self) -> u32 {
        Buckets::<F>::mask(self.table)
    }
    fn seed(&self) -> &Seed {
        Buckets::<F>::seed(self.table)
    }
    fn rank(&self, control: u64) -> Rank {
        Buckets::<F>::rank(self.table, control)
    }
    fn movable(&self, control: u64) -> bool {
        Buckets::<F>::movable(self.table, control)
    }
}
impl<F: Fam> Conns<F> for Shaky<'_, F> {
    type Table = Self;
    fn table(&self) -> &Self {
        self
    }
    fn policy(&self) -> &Policy {
        self.table.policy()
    }
    fn now_s(&self) -> u32 {
        self.table.now_s()
    }
    fn account(&self, dest: u32, active: i64, inactive: i64) {
        lose_the_cpu(self.one_in);
        self.table.account(dest, active, inactive);
    }
    fn dest_address(&self, dest: u32) -> Option<(F::Addr, u16)> {
        self.table.dest_address(dest)
    }
}

const THREADS: u64 = 6;
fn in_threads(seed: u64, threads: u64, body: impl Fn(u64, Rng) + Sync) {
    std::thread::scope(|s| {
        for me in 0..threads {
            let body = &body;
            s.spawn(move || {
                DICE.set(Rng::new(seed * 1000 + me + 500).next());
                body(me, Rng::new(seed * 1000 + me + 1));
            });
        }
    });
}

/// That there was a race at all.
#[derive(Default)]
struct Seen {
    hits: AtomicU64,
    opened: AtomicU64,
    replies: AtomicU64,
}

fn hammered<F: Fam>() {
    for seed in 1..4 {
        hammer::<F>(seed, 4, 24, 40_000, 0);
    }
}
fn hammered_slowly<F: Fam>() {
    for seed in 1..3 {
        // Room for all; a third too many; two keys that all want.
        hammer::<F>(seed, 8, 16, 2_500, 20);
        hammer::<F>(seed, 4, 24, 2_500, 20);
        hammer::<F>(seed, 2, 2, 2_000, 8);
    }
}

/// Few flows, few buckets, everything at once; then all must add up.
fn hammer<F: Fam>(seed: u64, buckets: u32, flows: u32, rounds: u32, one_in: u64) {
    let crowd = Crowd::<F>::new(Rng::new(seed).seed(), buckets, flows, 0, 2).with_twins(8);
    let table = crowd.table();
    let seen = Seen::default();
    in_threads(seed, THREADS, |_, mut rng| {
        let t = Shaky { table: &table, one_in };
        for _ in 0..rounds {
            step(&crowd, &t, &mut rng, &seen);
        }
    });
    let orphans = slow_round(&crowd, &table);
    let there = audit(&crowd, &crowd.full_tuple(), &table);
    let strays: Vec<_> = table.entries().filter(|e| !crowd.buckets.contains(&(e.slot / F::WAYS as u32))).collect();
    assert!(strays.is_empty(), "outside of all flows' buckets: {strays:x?}");
    let [hits, opened, replies] = [&seen.hits, &seen.opened, &seen.replies].map(|n| n.load(SeqCst));
    println!("{hits} hits, {replies} replies, {opened} opened, {} left, {orphans} orphans", there.len());
    assert!(hits > 100 && replies > 20 && opened > 100, "that was no race");
    assert!(orphans * 20 <= opened, "{orphans} orphans of {opened} flows");
}

/// A reverse entry whose flow went before it was entered (and perhaps another came into its slot, whose dest it then has):
/// nobody but the slow round knows of it.
fn slow_round<F: Fam>(crowd: &Crowd<F>, t: &MemConns<F>) -> u64 {
    let mut orphans = 0;
    for e in t.entries().filter(|e| conn::orphan(t, e)) {
        if let Found::Live(hit) = ct::lookup::<F, _>(t, &e.key::<F>(&crowd.seed)) {
            orphans += u64::from(hit.free::<F>());
        }
    }
    orphans
}

fn step<F: Fam>(crowd: &Crowd<F>, t: &Shaky<F>, rng: &mut Rng, seen: &Seen) {
    let flow = &crowd.flows[rng.below(crowd.flows.len() as u64) as usize];
    let (dest, reverse) = flow.dests[rng.below(2) as usize];
    let state = [SYN_RECV, SYN_RECV, FIN_WAIT, ESTABLISHED, CLOSE][rng.below(5) as usize];
    let mine = |d: u32| assert!(flow.dests.iter().any(|(dest, _)| *dest == d), "another flow's dest");
    match rng.below(100) {
        0..50 => match ct::lookup::<F, _>(t, &flow.key) {
            Found::Live(hit) => {
                mine(conn::dest(hit.control));
                seen.hits.fetch_add(1, Relaxed);
                if let Some(control) = conn::touch(t, &hit, &flow.key.words, true, |_| state) {
                    assert_eq!(ct::state(control), state);
                }
            }
            Found::Weak(control) => mine(conn::dest(control)),
            Found::None => match conn::open(t, &flow.key, dest, state, rng.below(3) > 0) {
                Opened::New => {
                    seen.opened.fetch_add(1, Relaxed);
                }
                Opened::Exists(dest) => mine(dest),
                Opened::Full | Opened::ReverseInUse => {}
            },
        },
        50..80 => {
            if let Found::Live(hit) = ct::lookup::<F, _>(t, &reverse)
                && let Some(reply) = conn::follow(t, &reverse, &hit)
            {
                assert_eq!(conn::dest(reply.forward.control), dest, "the reply of another dest's flow");
                assert_eq!(reply.client, F::source(&flow.key.words));
                let to = F::words(reply.client, reply.virtual_address);
                let known = crowd.flows.iter().any(|f| f.key.words == to && f.key.dport() == reply.virtual_port);
                assert!(known, "VIP and port of two flows: {to:x?}");
                seen.replies.fetch_add(1, Relaxed);
                if let Some(control) = conn::touch(t, &reply.forward, &to, false, |_| state) {
                    conn::remember(t, &reverse, &hit, control, rng.below(256) as u8);
                }
            }
        }
        80..90 => {
            if let Found::Live(hit) = ct::lookup::<F, _>(t, &flow.key)
                && hit.free::<F>()
            {
                conn::release(t, &Entry { words: flow.key.words, control: hit.control, slot: hit.slot::<F>() });
            }
        }
        90..98 => {
            let n = rng.below(crowd.buckets.len() as u64) as usize;
            let mut gone = Vec::new();
            conn::sweep(t, *crowd.buckets.iter().nth(n).expect("one of them"), |e| gone.push(e));
            gone.iter().for_each(|e| conn::release(t, e));
        }
        _ => {
            t.table.now_s.fetch_add(10, Relaxed);
        }
    }
}

/// Round after round several threads enter one new key at the same time; one entry must come of it.
fn same_flow<F: Fam>() {
    let mut contested = 0;
    // Openers, flows: with room for all tries at once, and among neighbours that have to move or go.
    for (seed, openers, flows, one_in, rounds) in
        [(1, 3, 2, 0, 3_000), (2, 3, 2, 8, 500), (3, 3, 2, 30, 500), (4, 4, 40, 0, 1_000), (5, 4, 40, 16, 400)]
    {
        let crowd = Crowd::<F>::new(Rng::new(seed).seed(), 2, flows, 0, openers as u32);
        let names = crowd.full_tuple();
        let table = crowd.table();
        let (barrier, failed) = (Barrier::new(openers as usize), AtomicBool::new(false));
        let (told, won) = (Mutex::new(vec![]), AtomicU64::new(0));
        in_threads(seed, openers, |me, _| {
            let t = Shaky { table: &table, one_in };
            for round in 0..rounds {
                let number = (round % flows) as usize;
                let flow = &crowd.flows[number];
                barrier.wait();
                let opened = conn::open(&t, &flow.key, flow.dests[me as usize].0, SYN_RECV, round % 3 == 0);
                told.lock().unwrap().push((flow.dests[me as usize].0, opened));
                if barrier.wait().is_leader() {
                    let judged = catch_unwind(AssertUnwindSafe(|| {
                        let all = std::mem::take(&mut *told.lock().unwrap());
                        let orphans = slow_round(&crowd, &table);
                        assert!(orphans == 0 || flows > 2, "a flow in nobody's way lost its forward entry");
                        let there = audit(&crowd, &names, &table);
                        let winner = judge(there.get(&number).map(|control| conn::dest(*control)), &all, flows > 2);
                        won.fetch_add(u64::from(winner.is_some_and(|dest| dest != all[0].0)), Relaxed);
                        delete(&crowd, &table, (number + 1) % flows as usize);
                    }));
                    failed.store(judged.is_err(), SeqCst);
                }
                // The others must not wait for a thread that has panicked.
                barrier.wait();
                if failed.load(SeqCst) {
                    return;
                }
            }
        });
        assert!(!failed.into_inner(), "as said above");
        contested += won.into_inner();
    }
    println!("{contested} not won by the first to finish");
    assert!(contested > 50, "that was no race");
}
/// `crowded`: a winner may have been evicted by the next.
fn judge(there: Option<u32>, told: &[(u32, Opened)], crowded: bool) -> Option<u32> {
    let new: Vec<u32> = told.iter().filter(|(_, opened)| *opened == Opened::New).map(|(dest, _)| *dest).collect();
    for (_, opened) in told {
        match opened {
            Opened::Exists(dest) => assert!(told.iter().any(|(d, _)| d == dest), "a dest of nobody's: {told:?}"),
            // (Or evicted, and another flow was in its slot when the reverse entry was due.)
            Opened::ReverseInUse => assert!(crowded, "the reply tuples are all different: {told:?}"),
            Opened::New | Opened::Full => {}
        }
    }
    match there {
        Some(dest) if crowded => assert!(new.contains(&dest), "{dest} is there: {told:?}"),
        Some(dest) => assert_eq!(new, [dest], "{told:?}"),
        // Allowed only if somebody ran out of tries, or of ways, while the others relied on him.
        None => {
            assert!(crowded || new.is_empty() && told.iter().any(|(_, opened)| *opened == Opened::Full), "{told:?}")
        }
    }
    there
}
fn delete<F: Fam>(crowd: &Crowd<F>, t: &MemConns<F>, flow: usize) {
    let key = &crowd.flows[flow].key;
    if let Found::Live(hit) = ct::lookup::<F, _>(t, key)
        && hit.free::<F>()
    {
        conn::release(t, &Entry { words: key.words, control: hit.control, slot: hit.slot::<F>() });
    }
}

/// Each thread has flows of its own, which nobody else frees and nobody may evict, but which others move: it must find them
/// always, and once.
fn never_missed<F: Fam>() {
    let moved = AtomicU64::new(0);
    for (seed, one_in, rounds) in [(1, 0, 30_000), (2, 6, 1_500), (3, 25, 2_500), (4, 12, 2_500)] {
        let crowd = Crowd::<F>::new(Rng::new(seed).seed(), 8, 10 * F::WAYS as u32, 0, 8);
        let mut table = crowd.table();
        for rows in &mut table.policy.rows {
            rows[(conn::TCP << 4 | ESTABLISHED) as usize] = Row::new(900, class::NOT_LIVE, true);
        }
        in_threads(seed, THREADS, |me, mut rng| {
            let t = Shaky { table: &table, one_in };
            let mine: Vec<usize> = (0..crowd.flows.len()).filter(|f| *f as u64 % THREADS == me).collect();
            let (mut inside, mut turns) = (BTreeMap::new(), BTreeMap::new());
            for _ in 0..rounds {
                let number = mine[rng.below(mine.len() as u64) as usize];
                let flow = &crowd.flows[number];
                let Some((dest, slot)) = inside.get_mut(&number) else {
                    // Not the dest of last time: the word of a flow that was freed and entered again in a twinkling would
                    // be the old one, and a move that was under way would take the new flow with it (and report it lost).
                    let turn: &mut usize = turns.entry(number).or_default();
                    *turn += 1;
                    let dest = flow.dests[*turn % 8].0;
                    match conn::open(&t, &flow.key, dest, ESTABLISHED, false) {
                        Opened::New => assert!(inside.insert(number, (dest, None)).is_none()),
                        // (It may meet a copy of itself, made for a move before it was freed.)
                        Opened::Full | Opened::Exists(_) => {}
                        Opened::ReverseInUse => panic!("nobody entered a reverse entry"),
                    }
                    continue;
                };
                let found = ct::lookup::<F, _>(&t, &flow.key);
                assert!(!matches!(found, Found::None), "flow {number} was missed");
                let Found::Live(hit) = found else { continue };
                assert_eq!(conn::dest(hit.control), *dest);
                moved.fetch_add(
                    u64::from(slot.replace(hit.slot::<F>()).is_some_and(|slot| slot != hit.slot::<F>())),
                    Relaxed,
                );
                if rng.below(4) == 0 {
                    // (False if it is moved this instant.)
                    if hit.free::<F>() {
                        t.account(*dest, -1, 0);
                        inside.remove(&number);
                    }
                } else {
                    let _ = conn::touch(&t, &hit, &flow.key.words, true, |s| s);
                }
            }
        });
        audit(&crowd, &crowd.full_tuple(), &table);
    }
    println!("{} found in another place than before", moved.load(SeqCst));
    assert!(moved.into_inner() > 50, "hardly anything was moved");
}
