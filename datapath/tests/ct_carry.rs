//! Flows from one table to another of another size, in words of no layout: the same flow comes out, with its state, its age and all that FULLNAT keeps of
//! it, and each is counted once.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod ct_common;

use ct_common::{Fam, Rng, key_of};

use rvs_datapath::conn::carry::{self, Carried};
use rvs_datapath::conn::fullnat::{self, Tells};
use rvs_datapath::conn::{self, Conns, Opened};
use rvs_datapath::ct::{self, Found, MIN_BUCKETS, Seed, V4, V6};
use rvs_datapath::mem::MemConns;

const NOW: u32 = 100_000;
const VIP: u32 = 0xf0_0001;
const SERVER: u32 = 0x80_0000;
const LOCAL: u32 = 0x70_0000;
const DESTS: u32 = 8;

/// A table with dests of every kind: the first two by NAT, two more by direct routing, the rest by FULLNAT.
fn table<F: Fam>(buckets: u32, seed: Seed) -> MemConns<F> {
    let mut c = MemConns::<F>::new(buckets, seed, DESTS);
    for dest in 1..=DESTS {
        c.dests.insert(dest, (F::addr(SERVER + dest), 8080));
        if dest > 4 {
            c.lent.insert(dest);
        }
    }
    c.set_now(NOW);
    c
}

/// Flows in all states, of different ages.
fn fill<F: Fam>(c: &MemConns<F>, rng: &mut Rng, flows: u32) {
    for n in 0..flows {
        let proto = [conn::TCP, conn::UDP, conn::SCTP][rng.below(3) as usize];
        let states = [11, 1, 14][proto as usize - 1];
        let dest = 1 + rng.below(u64::from(DESTS)) as u32;
        let (linked, lent) = (!(3..=4).contains(&dest), dest > 4);
        let key = key_of::<F>((n, 1024 + rng.below(60_000) as u16), (VIP, 80), proto);
        c.set_now(NOW - rng.below(40) as u32);
        let state = rng.below(states);
        let done = conn::open_forward(c, &key, dest, state, if linked { ct::LINKED } else { 0 });
        assert!(done.is_new());
        if lent {
            let tells = [Tells::Nothing, Tells::Option, Tells::Header][rng.below(3) as usize];
            let local = (F::addr(LOCAL), 1024 + n as u16);
            fullnat::lend(c, &key, done.slot(), local, rng.next() as u32, tells);
            let row = || fullnat::side(c, done.slot(), &key).unwrap_or_else(|| panic!("its row"));
            let side = row();
            fullnat::begin(c, done.slot(), &side, rng.next() as u32, rng.next() as u32);
            let side = row();
            fullnat::answered(c, done.slot(), &side, rng.next() as u32, rng.below(15) as u8);
            let side = row();
            fullnat::sent(c, done.slot(), &side);
        }
        if linked {
            assert!(conn::link(c, &key, done.slot()).is_new());
        }
        // Packets of the client, and perhaps of the server.
        for _ in 0..rng.below(5) {
            let Found::Live(hit) = ct::lookup(c.table(), &key) else { panic!("it is there") };
            let _ = conn::touch(c, &hit, &key.words, true, |state| state);
        }
    }
    c.set_now(NOW);
}

fn all<F: Fam>(c: &MemConns<F>) -> Vec<(Carried<F::Addr>, u32)> {
    let read =
        |e: ct::Entry<F::Words>| Some((carry::read(c, &e)?, conn::seconds_left(c.policy(), e.control, c.now_s())));
    let mut all: Vec<_> = c.entries().filter_map(read).collect();
    all.sort_by_key(|(flow, _)| format!("{flow:?}"));
    all
}

fn there_and_back<F: Fam>(seed: u64) {
    let mut rng = Rng::new(seed);
    let secret = rng.seed();
    let small = table::<F>(MIN_BUCKETS, secret);
    fill(&small, &mut rng, 600);
    let flows = all(&small);
    assert!(flows.len() > 300, "seed {seed}: {} flows", flows.len());
    // A larger one, with a secret of its own, and back to one as small.
    let large = table::<F>(4 * MIN_BUCKETS, rng.seed());
    let again = table::<F>(MIN_BUCKETS, rng.seed());
    for (from, to) in [(&small, &large), (&large, &again)] {
        for (flow, _) in all(from) {
            assert_eq!(carry::enter(to, &flow), Opened::New, "seed {seed}: {flow:?}");
            // One that is there already (who moved it was killed before it left the old table) changes nothing.
            assert_eq!(carry::enter(to, &flow), Opened::Exists(flow.dest), "seed {seed}: {flow:?}");
        }
        assert_eq!(all(to), flows, "seed {seed}");
        for dest in 1..=DESTS {
            assert_eq!(to.counted(dest), to.recount(dest), "seed {seed}: dest {dest}");
        }
        assert!(to.entries().all(|e| !conn::orphan(to, &e)), "seed {seed}: replies find their flows");
    }
}

#[test]
fn a_flow_is_the_same_in_another_table() {
    for seed in 1..4 {
        there_and_back::<V4>(seed);
        there_and_back::<V6>(seed);
    }
}

/// Another flow has its reply tuple in the new table: it stays where it is, and nothing of it is left in the other.
#[test]
fn a_flow_that_has_no_place_is_not_entered() {
    let mut rng = Rng::new(7);
    let (old, new) = (table::<V4>(MIN_BUCKETS, rng.seed()), table::<V4>(MIN_BUCKETS, rng.seed()));
    let key = |vip| key_of::<V4>((1, 40_000), (vip, 80), conn::TCP);
    assert_eq!(conn::open(&old, &key(VIP), 1, 1, true), Opened::New);
    assert_eq!(conn::open(&new, &key(VIP + 1), 1, 1, true), Opened::New);
    let (flow, _) = all(&old)[0];
    assert_eq!(carry::enter(&new, &flow), Opened::ReverseInUse);
    assert_eq!((new.entries().count(), new.counted(1)), (2, new.recount(1)));
}

/// A packet that was under way where the flow came from changes its state: the new entry is told, once, unless it has gone on by itself.
#[test]
fn what_has_changed_meanwhile_is_made_up_for() {
    const ESTABLISHED: u64 = 1;
    const FIN_WAIT: u64 = 4;
    const TIME_WAIT: u64 = 5;
    let mut rng = Rng::new(9);
    let (old, new) = (table::<V4>(MIN_BUCKETS, rng.seed()), table::<V4>(MIN_BUCKETS, rng.seed()));
    let key = key_of::<V4>((1, 40_000), (VIP, 80), conn::TCP);
    assert_eq!(conn::open(&old, &key, 1, ESTABLISHED, true), Opened::New);
    let before = all(&old)[0].0;
    assert_eq!(carry::enter(&new, &before), Opened::New);
    let Found::Live(hit) = ct::lookup(old.table(), &key) else { panic!("it is there") };
    let _ = conn::touch(&old, &hit, &key.words, false, |_| FIN_WAIT);
    let told = rvs_datapath::abi::Move::new::<V4>(&all(&old)[0].0).since(before.state);
    carry::update::<V4, _>(&new, &told);
    assert_eq!((all(&new)[0].0.state, new.counted(1)), (FIN_WAIT, (0, 1)));
    let Found::Live(hit) = ct::lookup(new.table(), &key) else { panic!("it is there") };
    let _ = conn::touch(&new, &hit, &key.words, true, |_| TIME_WAIT);
    carry::update::<V4, _>(&new, &told);
    assert_eq!((all(&new)[0].0.state, new.counted(1)), (TIME_WAIT, (0, 1)));
}
