//! Who times out when, and who goes first when the table is full.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[macro_use]
mod ct_common;

use ct_common::{Crowd, Fam, Rng, audit, class_of};
use rvs_datapath::conn::{self, Conns, Opened, Policy, Timeouts, class};
use rvs_datapath::ct::{self, Buckets, Found, Hit, Key};
use rvs_datapath::mem::{Line, MemConns};
use rvs_datapath::proto::tcp::{CLOSE, ESTABLISHED, FIN_WAIT, SYN_RECV};

for_both_families! {
    lives_as_long_as_promised_and_not_much_longer => timeouts,
    ranks_are_classes_then_idle_times => ranks,
    a_clock_that_ticked_elsewhere_makes_nobody_old => slack,
    ages_wrap_unseen_between_packets => wrap,
    a_flow_in_use_is_never_idle_in_coarse_units => coarse,
    the_least_valuable_goes_first => order,
    a_flood_moves_no_flow_in_use => flood,
    moved_flows_keep_their_tuples => moves,
    a_reverse_entry_that_costs_its_own_flow_is_no_flow => own,
    without_a_dest_there_is_no_flow => no_dest,
    one_reply_tuple_one_flow => twins,
    a_stale_reverse_entry_is_in_nobodys_way => stale,
}

/// 1 s to 31 days, on both sides of the units' limits.
const TIMEOUTS_S: [u32; 12] = [1, 2, 60, 120, 900, 1800, 1801, 3600, 3601, 86_400, 1_000_000, 2_678_400];

fn at<F: Fam>(t: &MemConns<F>, now_s: u32, then: impl FnOnce()) {
    let before = t.now_s();
    t.set_now(now_s);
    then();
    t.set_now(before);
}
fn live<'a, F: Fam>(t: &'a MemConns<F>, key: &Key<F::Words>) -> Option<Hit<Line<'a>>> {
    match ct::lookup::<F, _>(t, key) {
        Found::Live(hit) => Some(hit),
        Found::Weak(control) => panic!("tentative at rest: {control:x}"),
        Found::None => None,
    }
}
/// A flow of the crowd as it is after so many packets of its client.
fn enter<F: Fam>(crowd: &Crowd<F>, t: &MemConns<F>, flow: usize, linked: bool, state: u64, packets: u32) -> Opened {
    let flow = &crowd.flows[flow];
    let opened = conn::open(t, &flow.key, flow.dests[0].0, state, linked);
    if opened == Opened::New {
        for _ in 1..packets {
            let hit = live(t, &flow.key).expect("just opened");
            conn::touch(t, &hit, &flow.key.words, true, |s| s).expect("nobody else is there");
        }
    }
    opened
}
fn is_there<F: Fam>(crowd: &Crowd<F>, t: &MemConns<F>, flow: usize) -> bool {
    live(t, &crowd.flows[flow].key).is_some()
}
fn crowd<F: Fam>(buckets: u32, flows: u32) -> Crowd<F> {
    Crowd::new(Rng::new(11).seed(), buckets, flows, 0, 1)
}
fn unit_of(timeout_s: u32) -> u32 {
    1 << Policy::new(&Timeouts { tcp: timeout_s, ..Timeouts::default() }).rows[0][1 << 4 | 1].shift()
}

fn timeouts<F: Fam>() {
    let crowd = crowd::<F>(2, 1);
    for timeout_s in TIMEOUTS_S {
        let unit = unit_of(timeout_s);
        assert!(timeout_s <= 1800 && unit == 1 || unit <= timeout_s / 900, "{timeout_s} s in units of {unit}");
        for offset in [0, 1, unit / 2, unit - 1] {
            let mut t = crowd.table();
            t.policy = Policy::new(&Timeouts { tcp: timeout_s, ..Timeouts::default() });
            let start = 5_000_000 / unit * unit + offset;
            t.set_now(start);
            assert_eq!(enter(&crowd, &t, 0, true, ESTABLISHED, 1), Opened::New);
            for elapsed in [0, 1, timeout_s / 2, timeout_s - 1, timeout_s] {
                t.set_now(start + elapsed);
                let control = live(&t, &crowd.flows[0].key).expect("not swept").control;
                assert!(!conn::expired(&t.policy, control, t.now_s()), "{elapsed} of {timeout_s} s");
                let left = conn::seconds_left(&t.policy, control, t.now_s());
                assert!(left + elapsed + unit > timeout_s, "{left} s left, {elapsed} of {timeout_s} gone");
                assert!(left + elapsed < timeout_s + 2 * unit, "{left} s left, {elapsed} of {timeout_s} gone");
                crowd.sweep(&t);
                assert!(is_there(&crowd, &t, 0), "swept after {elapsed} of {timeout_s} s");
            }
            // Within one unit, beyond a timeout rounded up to whole units.
            t.set_now(start + timeout_s.next_multiple_of(unit) + unit);
            crowd.sweep(&t);
            assert!(audit(&crowd, &crowd.full_tuple(), &t).is_empty(), "still there after {timeout_s} s and a unit");
            assert_eq!(t.entries().count(), 0, "the reverse entry stayed");
        }
    }
}

/// `rank` is `class` without branches; over all protocols, states, ages and packet counts.
fn ranks<F: Fam>() {
    let crowd = crowd::<F>(2, 1);
    let mut rng = Rng::new(9);
    for timeout_s in TIMEOUTS_S {
        let mut t = crowd.table();
        t.policy = Policy::new(&Timeouts { tcp: timeout_s, tcp_fin: timeout_s / 2 + 1, udp: timeout_s });
        for i in 0..5_000 {
            t.set_now(rng.below(1 << 24) as u32);
            let idle = rng.below(if i % 2 == 0 { 2048 } else { 150 });
            let age = u64::from(t.now_s() >> t.policy.rows[0][17].shift()).wrapping_sub(idle) & 0x7ff;
            let proto = 1 + rng.below(3);
            let mut control = rng.next() & !(0x7ff << 4 | 3 << ct::PROTO_SHIFT) | age << 4 | proto << ct::PROTO_SHIFT;
            if i % 3 == 0 {
                // Established, many packets, a small number of units ago.
                control = control & !(0x7ff << 4 | ct::STATE | ct::REVERSE | 3 << ct::PROTO_SHIFT)
                    | (age.wrapping_add(idle).wrapping_sub(idle % 8) & 0x7ff) << 4
                    | conn::TCP << ct::PROTO_SHIFT
                    | 3 << 16
                    | ESTABLISHED;
            }
            let expect = match control {
                c if !ct::is_live(c) => class::NOT_LIVE,
                c if c & ct::REVERSE != 0 => (c >> 12) as u32 & 7,
                c => conn::class(&t.policy, c, t.now_s()),
            };
            assert_eq!(class_of(&t, control), expect, "{control:x} at {} s", t.now_s());
            // Used ways are told from free ones, and a second more of idling never makes a flow worth more.
            let rank = Buckets::<F>::rank(&t, control);
            assert!(rank & 7 == 0 && rank > 0, "{control:x}: {rank:x}");
            if ct::is_live(control) && control & ct::REVERSE == 0 && !conn::expired(&t.policy, control, t.now_s()) {
                t.set_now(t.now_s() + 1);
                assert!(Buckets::<F>::rank(&t, control) <= rank, "{control:x} at {} s", t.now_s());
            }
        }
    }
}

fn slack<F: Fam>() {
    let crowd = crowd::<F>(2, 1);
    let t = crowd.table();
    t.set_now(5000);
    enter(&crowd, &t, 0, false, ESTABLISHED, 4);
    let control = live(&t, &crowd.flows[0].key).expect("just opened").control;
    for behind in 0..=7 {
        assert_eq!(conn::seconds_left(&t.policy, control, 5000 - behind), 900);
        assert_eq!(conn::class(&t.policy, control, 5000 - behind), class::ESTABLISHED);
    }
    // So late that the age has wrapped but for those seven units, it is still seen as old.
    assert!(conn::expired(&t.policy, control, 5000 + 2040));
}

fn wrap<F: Fam>() {
    let crowd = crowd::<F>(2, 1);
    let mut t = crowd.table();
    for timeout_s in TIMEOUTS_S {
        t.policy = Policy::new(&Timeouts { tcp: timeout_s, ..Timeouts::default() });
        t.set_now(0);
        enter(&crowd, &t, 0, false, ESTABLISHED, 4);
        let (mut now, step) = (0, timeout_s.max(2) / 2);
        // Over several wraps of 2048 units.
        while now < 5000 * unit_of(timeout_s) {
            now += step;
            t.set_now(now);
            crowd.sweep(&t);
            let hit = live(&t, &crowd.flows[0].key).expect("it was in use");
            assert!(conn::seconds_left(&t.policy, hit.control, now) + step + 2 * unit_of(timeout_s) > timeout_s);
            let touched = conn::touch(&t, &hit, &crowd.flows[0].key.words, true, |s| s).expect("nobody else is there");
            assert_eq!(conn::seconds_left(&t.policy, touched, now), timeout_s.next_multiple_of(unit_of(timeout_s)));
        }
        t = crowd.table();
    }
}

fn coarse<F: Fam>() {
    let crowd = crowd::<F>(2, 1);
    for timeout_s in TIMEOUTS_S.into_iter().filter(|s| *s >= 900) {
        let unit = unit_of(timeout_s);
        let mut t = crowd.table();
        t.policy = Policy::new(&Timeouts { tcp: timeout_s, ..Timeouts::default() });
        // A packet in the last second of a unit.
        t.set_now(100 * unit - 1);
        enter(&crowd, &t, 0, false, ESTABLISHED, 4);
        let control = live(&t, &crowd.flows[0].key).expect("just opened").control;
        for (idle, expect) in [(0, 6), (1, 6), (conn::IDLE_S - 1, 6), ((conn::IDLE_S + 2 * unit).min(timeout_s), 5)] {
            assert_eq!(conn::class(&t.policy, control, 100 * unit - 1 + idle), expect, "{idle} s idle, {timeout_s} s");
        }
    }
}

/// Two buckets full of flows of all classes: they go in the order of their classes, the longest idle first.
fn order<F: Fam>() {
    const NOW: u32 = 10_000;
    // State, packets, idle; in the order in which they are to go. The first is timed out.
    let all = [
        (CLOSE, 1, 15),
        (SYN_RECV, 1, 50),
        (SYN_RECV, 9, 40),
        (ESTABLISHED, 3, 1),
        (FIN_WAIT, 9, 110),
        (FIN_WAIT, 9, 100),
        (ESTABLISHED, 4, 800),
        (ESTABLISHED, 4, 120),
    ];
    let ways = 2 * F::WAYS;
    // Where there are fewer ways, without the second of a class.
    let skip = [2, 5, 7, 1];
    let kept: Vec<_> = (0..all.len()).filter(|i| !skip[..all.len() - ways].contains(i)).map(|i| all[i]).collect();
    let crowd = crowd::<F>(2, 200);
    let t = crowd.table();
    t.set_now(NOW);
    // Entered in another order than they are to go.
    for i in (0..ways).map(|i| i * 5 % ways) {
        let (state, packets, idle) = kept[i];
        at(&t, NOW - idle, || assert_eq!(enter(&crowd, &t, i, false, state, packets), Opened::New));
    }
    let names = crowd.full_tuple();
    assert_eq!(audit(&crowd, &names, &t).len(), ways);
    for i in 0..ways {
        assert_eq!(enter(&crowd, &t, ways + i, false, ESTABLISHED, 4), Opened::New);
        let left: Vec<usize> = audit(&crowd, &names, &t).into_keys().filter(|f| *f < ways).collect();
        assert_eq!(left, (i + 1..ways).collect::<Vec<_>>());
    }
    // Now there are only flows in use.
    t.set_now(NOW + conn::IDLE_S - 1);
    for flow in 2 * ways..200 {
        assert_eq!(enter(&crowd, &t, flow, false, SYN_RECV, 1), Opened::Full);
    }
    assert_eq!(audit(&crowd, &names, &t).into_keys().collect::<Vec<_>>(), (ways..2 * ways).collect::<Vec<_>>());
    t.set_now(NOW + conn::IDLE_S);
    assert_eq!(enter(&crowd, &t, 199, false, SYN_RECV, 1), Opened::New);
}

/// A reply goes by.
fn reply<F: Fam>(crowd: &Crowd<F>, t: &MemConns<F>, flow: usize) {
    let key = &crowd.flows[flow].dests[0].1;
    let reverse = live(t, key).expect("its replies find nothing");
    let reply = conn::follow(t, key, &reverse).expect("its replies lead nowhere");
    let control =
        conn::touch(t, &reply.forward, &crowd.flows[flow].key.words, false, |s| s).expect("nobody else is there");
    conn::remember(t, key, &reverse, control, 0);
}

fn flood<F: Fam>() {
    const BUSY: usize = 12;
    let crowd = crowd::<F>(16, 700);
    let t = crowd.table();
    for flow in 0..BUSY {
        assert_eq!(enter(&crowd, &t, flow, flow % 3 > 0, ESTABLISHED, 4), Opened::New);
    }
    let names = crowd.full_tuple();
    let mut refused = 0;
    for round in 0..4 {
        for flow in BUSY..crowd.flows.len() {
            t.set_now(1000 + 60 * round + flow as u32 / 20);
            // The flows in use see a packet now and then.
            let busy = flow % BUSY;
            let hit = live(&t, &crowd.flows[busy].key).expect("evicted by a flood");
            conn::touch(&t, &hit, &crowd.flows[busy].key.words, true, |s| s).expect("nobody else is there");
            if !busy.is_multiple_of(3) {
                reply(&crowd, &t, busy);
            }
            // (Those that are still there from the last round stay.)
            if !is_there(&crowd, &t, flow) && enter(&crowd, &t, flow, flow % 2 > 0, SYN_RECV, 1) == Opened::Full {
                refused += 1;
            }
        }
        let there = audit(&crowd, &names, &t);
        assert!((0..BUSY).all(|flow| there.contains_key(&flow)));
        assert!(there.len() > 2 * BUSY, "the flood has taken the rest");
    }
    assert!(refused < 4 * crowd.flows.len() / 10, "{refused} of the flood refused, though half-open flows could go");
}

/// Established flows until nothing fits: some had to make place for others by changing their bucket.
fn moves<F: Fam>() {
    let (mut moved, mut used) = (0, 0);
    for seed in 1..6 {
        let crowd = Crowd::<F>::new(Rng::new(seed).seed(), 16, 150, 0, 1);
        let t = crowd.table();
        let names = crowd.full_tuple();
        let mut slots = std::collections::BTreeMap::new();
        for flow in 0..crowd.flows.len() {
            enter(&crowd, &t, flow, flow % 4 == 0, ESTABLISHED, 4);
            // Their reverse entries too are in use.
            if flow % 4 == 0 && is_there(&crowd, &t, flow) {
                reply(&crowd, &t, flow);
            }
            audit(&crowd, &names, &t);
            for e in crowd.entries(&t) {
                let slot = slots.insert(ct_common::tuple::<F>(&e.key::<F>(&crowd.seed)), e.slot);
                if slot.is_some_and(|slot| slot != e.slot) {
                    moved += 1;
                    assert_eq!(e.control & ct::LINKED, 0, "moved, though a link names it: {e:x?}");
                }
            }
        }
        used += crowd.entries(&t).len();
    }
    assert!(moved >= 10, "only {moved} moves");
    assert!(used * 10 >= 5 * 16 * F::WAYS * 9, "full with {used} entries");
}

/// One way is left, and both entries of a NAT flow want it.
fn own<F: Fam>() {
    let crowd = crowd::<F>(2, 20);
    let t = crowd.table();
    let ways = 2 * F::WAYS;
    for flow in 0..ways - 1 {
        assert_eq!(enter(&crowd, &t, flow, false, ESTABLISHED, 4), Opened::New);
    }
    assert_eq!(enter(&crowd, &t, ways, true, SYN_RECV, 1), Opened::Full);
    assert_eq!(audit(&crowd, &crowd.full_tuple(), &t).len(), ways - 1);
    assert_eq!(t.counted(crowd.flows[ways].dests[0].0), (0, 0));
}

fn no_dest<F: Fam>() {
    let crowd = crowd::<F>(2, 2);
    let mut t = crowd.table();
    t.dests.clear();
    assert_eq!(enter(&crowd, &t, 0, true, SYN_RECV, 1), Opened::Full);
    assert_eq!((t.entries().count(), t.counted(crowd.flows[0].dests[0].0)), (0, (0, 0)));
    // Taken away later: the flow and its counter go as ever, the reverse entry when somebody asks.
    t.dests = crowd.dests.clone();
    assert_eq!(enter(&crowd, &t, 1, true, SYN_RECV, 1), Opened::New);
    t.dests.clear();
    t.set_now(1000 + 200);
    crowd.sweep(&t);
    assert_eq!(t.counted(crowd.flows[1].dests[0].0), (0, 0));
    let left = crowd.entries(&t);
    assert!(left.len() == 1 && conn::orphan(&t, &left[0]), "{left:x?}");
}

fn twins<F: Fam>() {
    let crowd = Crowd::<F>::new(Rng::new(5).seed(), 4, 1, 0, 1).with_twins(1);
    let t = crowd.table();
    let names = crowd.full_tuple();
    let dest = crowd.flows[0].dests[0].0;
    assert_eq!(enter(&crowd, &t, 0, true, ESTABLISHED, 4), Opened::New);
    assert_eq!(enter(&crowd, &t, 1, true, SYN_RECV, 1), Opened::ReverseInUse);
    assert_eq!(audit(&crowd, &names, &t).into_keys().collect::<Vec<_>>(), [0]);
    assert_eq!(t.counted(dest), (1, 0));
    assert_eq!(enter(&crowd, &t, 0, true, SYN_RECV, 1), Opened::Exists(dest));
    // Without NAT the two are in nobody's way.
    assert_eq!(enter(&crowd, &t, 1, false, SYN_RECV, 1), Opened::New);
    assert_eq!(t.counted(dest), (2, 0));
    // A client with the very tuple of the replies.
    assert_eq!(conn::open(&t, &crowd.flows[0].dests[0].1, dest, SYN_RECV, false), Opened::ReverseInUse);
    assert_eq!(audit(&crowd, &names, &t).len(), 2);
}

fn stale<F: Fam>() {
    let crowd = Crowd::<F>::new(Rng::new(5).seed(), 4, 2, 0, 1).with_twins(1);
    let t = crowd.table();
    let names = crowd.full_tuple();
    let (dest, reverse) = crowd.flows[0].dests[0];
    // Its forward entry goes alone, as if a race had parted them.
    let widow = || {
        assert_eq!(enter(&crowd, &t, 0, true, ESTABLISHED, 1), Opened::New);
        assert!(live(&t, &crowd.flows[0].key).expect("just opened").free::<F>());
        t.account(dest, -1, 0);
    };
    // The same flow again, in the same slot or another; then the twin that wants the same reply tuple.
    for (flow, filler) in [(0, false), (0, true), (2, false), (2, true)] {
        widow();
        if filler {
            assert_eq!(enter(&crowd, &t, 1, false, ESTABLISHED, 1), Opened::New);
        }
        assert_eq!(enter(&crowd, &t, flow, true, ESTABLISHED, 1), Opened::New);
        assert!(audit(&crowd, &names, &t).contains_key(&flow));
        reply(&crowd, &t, flow);
        t.set_now(t.now_s() + 1000);
        crowd.sweep(&t);
        assert_eq!(t.entries().count(), 0);
    }
    // Or a reply comes: it leads nowhere, and the entry goes.
    widow();
    let left = crowd.entries(&t);
    assert!(left.len() == 1 && conn::orphan(&t, &left[0]));
    assert_eq!(class_of(&t, left[0].control), class::HALF_OPEN);
    let hit = live(&t, &reverse).expect("it is there");
    assert!(conn::follow(&t, &reverse, &hit).is_none());
    assert_eq!(t.entries().count(), 0);
}
