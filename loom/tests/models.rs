//! The models. Each explores all interleavings with at most `BOUND` preemptions (default: as given with each model), with
//! loads as weak as the C11 memory model lets an acquire load be.

use loom::sync::Arc;
use loom::thread;
use rvs_datapath::conn::{self, Opened};
use rvs_datapath::ct::{self, Found, Key, V4};
use rvs_datapath::proto::tcp::{CLOSE, ESTABLISHED, SYN_RECV};
use rvs_loom::{HOME, OTHER, THIRD, Table, dest_for, keys};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

type K = Key<[u64; 1]>;

/// Runs a model with at most so many preemptions.
fn model(name: &str, bound: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let bound = std::env::var("BOUND").map_or(bound, |b| b.parse().expect("BOUND is a number"));
    builder.preemption_bound = Some(bound);
    builder.max_branches = 20_000;
    let runs = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    builder.check(move || {
        counted.fetch_add(1, SeqCst);
        f();
    });
    println!("{name}: {} executions, at most {bound} preemptions", runs.load(SeqCst));
}

fn table(dests: &[(u32, u16)]) -> Arc<Table> {
    Arc::new(Table::new(dests))
}
/// Dests that are never asked for their addresses.
const ANY: [(u32, u16); 4] = [(1, 1), (2, 1), (3, 1), (4, 1)];

fn open(t: &Table, key: &K, dest: u32) -> Opened {
    conn::open(t, key, dest, SYN_RECV, false)
}
#[test]
fn two_open_one_flow() {
    let key = keys(HOME, OTHER, 1).next().unwrap();
    model("two openers of one key", 3, move || {
        let t = table(&ANY);
        let u = t.clone();
        let other = thread::spawn(move || open(&u, &key, 2));
        let mine = open(&t, &key, 1);
        let told = [mine, other.join().unwrap()];
        let there = t.at_rest();
        assert_eq!(there.len(), 1, "{told:?}");
        assert_eq!(told.iter().filter(|o| **o == Opened::New).count(), 1, "{told:?}");
    });
}

/// A way changes hands twice (1, 2, 1) under a reader; the flows differ in nothing but the client's address and the dest.
#[test]
fn a_reader_of_a_recycled_way() {
    let k: Vec<K> = keys(HOME, OTHER, 1).take(2).collect();
    model("reader of a recycled way", 3, move || {
        let t = table(&ANY);
        let (one, two) = (k[0], k[1]);
        open(&t, &one, 1);
        let u = t.clone();
        let reader = thread::spawn(move || assert!(matches!(u.dest_of(&one), None | Some(1 | 3))));
        assert!(t.delete(&one));
        assert_eq!(open(&t, &two, 2), Opened::New);
        assert!(t.delete(&two));
        assert_eq!(open(&t, &one, 3), Opened::New);
        reader.join().unwrap();
        assert_eq!(t.at_rest().len(), 1);
    });
}

/// An update crosses a change of hands: it hits its own flow or nothing.
#[test]
fn a_toucher_of_a_recycled_way() {
    let k: Vec<K> = keys(HOME, OTHER, 1).take(2).collect();
    model("toucher of a recycled way", 3, move || {
        let t = table(&ANY);
        let (one, two) = (k[0], k[1]);
        open(&t, &one, 1);
        let u = t.clone();
        let toucher = thread::spawn(move || {
            if let Found::Live(hit) = ct::lookup::<V4, _>(&*u, &one) {
                let _ = conn::touch(&*u, &hit, &one.words, true, |_| CLOSE);
            }
        });
        t.delete(&one);
        assert_eq!(open(&t, &two, 2), Opened::New);
        toucher.join().unwrap();
        for e in t.at_rest().iter().filter(|e| e.words == two.words) {
            assert_eq!((conn::dest(e.control), ct::state(e.control)), (2, SYN_RECV), "touched for another");
        }
    });
}

// ---- moves
/// The first moves to the third bucket to make place for one more; the rest fills home and other.
fn crowd() -> Vec<K> {
    keys(HOME, THIRD, 1).take(1).chain(keys(HOME, OTHER, 2).take(3)).chain(keys(OTHER, HOME, 3).take(4)).collect()
}
fn full(k: &[K]) -> Arc<Table> {
    let t = Arc::new(Table::new(&ANY).established_stay());
    for (i, key) in k.iter().enumerate() {
        let dest = if i == 0 { 1 } else { 2 };
        assert_eq!(conn::open(&*t, key, dest, ESTABLISHED, false), Opened::New);
    }
    t
}
fn newcomer() -> K {
    keys(HOME, OTHER, 4).next().unwrap()
}

/// The flow that moves is met in one place or the other, always.
#[test]
fn a_move_under_a_reader() {
    let k = crowd();
    model("move against a reader", 3, move || {
        let t = full(&k);
        let (u, moving) = (t.clone(), k[0]);
        let reader = thread::spawn(move || assert_eq!(u.dest_of(&moving), Some(1), "missed"));
        assert_eq!(open(&t, &newcomer(), 4), Opened::New);
        reader.join().unwrap();
        assert_eq!(t.at_rest().len(), 9);
    });
}

/// A packet of the flow that moves: what it changes stays changed.
#[test]
fn a_move_under_a_toucher() {
    let k = crowd();
    model("move against a toucher", 3, move || {
        let t = full(&k);
        let (u, moving) = (t.clone(), k[0]);
        let toucher = thread::spawn(move || match ct::lookup::<V4, _>(&*u, &moving) {
            Found::Live(hit) => conn::touch(&*u, &hit, &moving.words, true, |_| CLOSE).is_some(),
            Found::Weak(_) => false,
            Found::None => panic!("missed"),
        });
        open(&t, &newcomer(), 4);
        let touched = toucher.join().unwrap();
        let there = t.at_rest();
        let states: Vec<u64> = there.iter().filter(|e| e.words == k[0].words).map(|e| ct::state(e.control)).collect();
        // (In state CLOSE it may have been evicted.)
        assert!(touched && states.is_empty() || states == [if touched { CLOSE } else { ESTABLISHED }], "{states:?}");
    });
}

/// Another CPU, which saw nothing before the flow was entered, enters it again while it moves.
#[test]
fn a_move_under_an_inserter_of_the_same_flow() {
    let k = crowd();
    model("move against an inserter of the same key", 3, move || {
        let t = full(&k);
        let (u, moving) = (t.clone(), k[0]);
        let inserter = thread::spawn(move || conn::open(&*u, &moving, 3, ESTABLISHED, false));
        open(&t, &newcomer(), 4);
        let told = inserter.join().unwrap();
        let there: Vec<u32> =
            t.at_rest().iter().filter(|e| e.words == k[0].words).map(|e| conn::dest(e.control)).collect();
        match told {
            Opened::New => assert_eq!(there, [3]),
            told => assert_eq!(there, [1], "{told:?}"),
        }
    });
}

/// The way that is to move changes hands: no copy may show one flow with the other's dest.
#[test]
fn a_move_of_a_recycled_way() {
    let k = crowd();
    let next = keys(HOME, THIRD, 6).next().unwrap();
    model("move of a recycled way", 3, move || {
        let t = full(&k);
        let (u, old) = (t.clone(), k[0]);
        let mover = thread::spawn(move || open(&u, &newcomer(), 4));
        t.delete(&old);
        open(&t, &next, 3);
        assert!(matches!(t.dest_of(&old), None | Some(1)), "the new flow's dest");
        mover.join().unwrap();
        let there = t.at_rest();
        for (words, dest) in there.iter().map(|e| (e.words, conn::dest(e.control))) {
            assert!(words != old.words || dest == 1, "dest {dest} for the old flow");
            assert!(words != next.words || dest == 3, "dest {dest} for the new flow");
        }
    });
}

/// Two newcomers: what one moves the other evicts.
#[test]
fn a_move_under_an_evictor() {
    let k = crowd();
    let second = keys(HOME, OTHER, 5).next().unwrap();
    model("move against an evictor", 2, move || {
        let t = table(&ANY);
        // Worth a move, but the first to go; nobody else may.
        for key in &k {
            assert_eq!(conn::open(&*t, key, 1, ESTABLISHED, false), Opened::New);
        }
        for key in &k[1..] {
            for _ in 0..3 {
                let Found::Live(hit) = ct::lookup::<V4, _>(&*t, key) else { panic!("just opened") };
                assert!(conn::touch(&*t, &hit, &key.words, true, |s| s).is_some());
            }
        }
        let u = t.clone();
        let evictor = thread::spawn(move || open(&u, &second, 3));
        let told = [open(&t, &newcomer(), 4), evictor.join().unwrap()];
        let there = t.at_rest();
        for (key, told) in [newcomer(), second].iter().zip(told) {
            // The second newcomer may have put the first out: half-open is worth less than all others.
            let inside = there.iter().any(|e| e.words == key.words);
            assert!(!inside || told == Opened::New, "{told:?}");
        }
        assert!(told.contains(&Opened::New), "{told:?}");
        for key in &k[1..] {
            assert!(there.iter().any(|e| e.words == key.words), "a flow in use was evicted");
        }
    });
}

// ---- the two entries of a NAT flow
fn nat() -> (K, (u32, u16)) {
    let key = keys(HOME, OTHER, 1).next().unwrap();
    (key, dest_for(&key, OTHER, HOME))
}
fn open_nat(t: &Table, key: &K) -> Opened {
    conn::open(t, key, 1, ESTABLISHED, true)
}
fn reverse_of(t: &Table, key: &K) -> K {
    conn::reverse_key(t, key, key.control | 1 << conn::DEST_SHIFT, 0).unwrap()
}

/// The flow is freed while a reply goes by: both entries go, or (the reply was first) both stay.
#[test]
fn a_release_under_a_reply() {
    let (key, dest) = nat();
    model("release of a NAT pair against a reply", 3, move || {
        let t = table(&[dest]);
        assert_eq!(open_nat(&t, &key), Opened::New);
        let u = t.clone();
        let replier = thread::spawn(move || {
            let reply = reverse_of(&u, &key);
            let Found::Live(hit) = ct::lookup::<V4, _>(&*u, &reply) else { return };
            let Some(flow) = conn::follow(&*u, &reply, &hit) else { return };
            assert_eq!((flow.client, flow.virtual_port), (key.words[0] as u32, 80));
            if let Some(control) = conn::touch(&*u, &flow.forward, &key.words, false, |_| CLOSE) {
                conn::remember(&*u, &reply, &hit, control, 9);
            }
        });
        let deleted = t.delete(&key);
        replier.join().unwrap();
        assert_eq!(t.at_rest().len(), usize::from(!deleted));
        assert_eq!(t.orphans(), 0);
    });
}

/// The reverse entry is evicted while the client sends: the flow goes, however busy it is.
#[test]
fn a_reverse_entry_goes_under_its_busy_flow() {
    let (key, dest) = nat();
    model("eviction of a reverse entry against the client", 3, move || {
        let t = table(&[dest]);
        assert_eq!(open_nat(&t, &key), Opened::New);
        let u = t.clone();
        let client = thread::spawn(move || {
            for state in [CLOSE, ESTABLISHED] {
                if let Found::Live(hit) = ct::lookup::<V4, _>(&*u, &key) {
                    let _ = conn::touch(&*u, &hit, &key.words, true, |_| state);
                }
            }
        });
        let reply = reverse_of(&t, &key);
        assert!(t.delete(&reply), "nobody else touches it");
        client.join().unwrap();
        assert_eq!((t.at_rest().len(), t.orphans()), (0, 0));
    });
}

/// One CPU has freed the flow, and is to free its reverse entry, when another enters the flow again, perhaps in the same slot.
#[test]
fn a_release_under_the_same_flow_come_back() {
    let (key, dest) = nat();
    model("release of a NAT pair against the same flow come back", 2, move || {
        let t = table(&[dest]);
        assert_eq!(open_nat(&t, &key), Opened::New);
        let u = t.clone();
        let opener = thread::spawn(move || match ct::lookup::<V4, _>(&*u, &key) {
            Found::None => Some(open_nat(&u, &key)),
            _ => None,
        });
        assert!(t.delete(&key));
        let back = opener.join().unwrap() == Some(Opened::New);
        assert_eq!((t.at_rest().len(), t.orphans()), (usize::from(back), 0));
    });
}
