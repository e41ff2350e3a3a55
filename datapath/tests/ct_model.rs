//! The connection table against a simple model: a map of flows with the second of their last packet.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod ct_common;

use ct_common::{Crowd, Fam, Rng, Side, Tuple, audit, class_of};
use proptest::prelude::*;
use rvs_datapath::conn::{self, Opened, Timeouts, class};
use rvs_datapath::ct::{self, Entry, Found, V4, V6};
use rvs_datapath::mem::MemConns;
use rvs_datapath::proto::{Way, tcp};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

/// Sweeps come at least this often; ages would wrap only after 240 s.
const SWEEP_S: u32 = 200;
/// The longest timeout in units of an age.
const UNITS: u32 = 1800;

#[derive(Clone, Debug)]
enum Op {
    /// A packet of the client; opens the flow (to the dest `which`, linked for NAT) if it is not there.
    Client {
        flow: usize,
        which: usize,
        linked: bool,
        flags: u8,
    },
    Reply {
        flow: usize,
        flags: u8,
    },
    Delete {
        flow: usize,
    },
    Clock(u32),
    Sweep,
    Timeouts(Timeouts),
}

fn op() -> impl Strategy<Value = Op> {
    use tcp::{ACK, FIN, RST, SYN};
    let flags = prop_oneof![
        6 => Just(ACK), 3 => Just(SYN), 1 => Just(SYN | ACK), 1 => Just(FIN | ACK), 1 => Just(RST), 1 => any::<u8>()
    ];
    let seconds = prop::sample::select(vec![1, 2, 60, 119, 900, 1799, 1800, 1801, 3601, 100_001, 2_678_400]);
    let timeouts =
        [seconds.clone(), seconds.clone(), seconds].prop_map(|[tcp, tcp_fin, udp]| Timeouts { tcp, tcp_fin, udp });
    let flow = any::<prop::sample::Index>().prop_map(|i| i.index(1 << 16));
    prop_oneof![
        24 => (flow.clone(), 0..3usize, any::<bool>(), flags.clone())
            .prop_map(|(flow, which, linked, flags)| Op::Client { flow, which, linked, flags }),
        10 => (flow.clone(), flags).prop_map(|(flow, flags)| Op::Reply { flow, flags }),
        2 => flow.prop_map(|flow| Op::Delete { flow }),
        2 => (0..4u32).prop_map(Op::Clock),
        1 => (0..1500u32).prop_map(Op::Clock),
        1 => Just(Op::Sweep),
        1 => timeouts.prop_map(Op::Timeouts),
    ]
}

/// The model's flow.
#[derive(Clone, Debug)]
struct Known {
    dest: u32,
    linked: bool,
    state: u64,
    /// From the client, as far as it is counted: 4 is many.
    packets: u64,
    seen: u32,
    /// Class when the last reply went by.
    hint: u32,
    /// Unit of the age in the table, and how much younger than the truth a change of unit may have made it.
    unit: u32,
    younger: u32,
    /// Turns of the epoch before the age was written.
    epoch: u32,
    /// Was due when a change of timeouts gave it more: may go or stay.
    doomed: bool,
}

fn timeout_s(proto: u64, state: u64, t: &Timeouts) -> u32 {
    match proto {
        conn::TCP => [2, t.tcp, 120, 60, t.tcp_fin, 120, 10, 60, 30, 120, 120][state as usize],
        _ => t.udp,
    }
}
fn unit_s(timeout_s: u32) -> u32 {
    (0..).map(|shift| 1 << shift).find(|unit| timeout_s.div_ceil(*unit) <= UNITS).unwrap()
}
fn next_state(proto: u64, state: u64, flags: u8, way: Way) -> u64 {
    if proto == conn::TCP { tcp::next(state, flags, way, false) } else { 0 }
}

struct World<F: Fam> {
    crowd: &'static Crowd<F>,
    names: &'static BTreeMap<Tuple, Side>,
    table: MemConns<F>,
    flows: BTreeMap<usize, Known>,
    timeouts: Timeouts,
    now: u32,
    swept: u32,
    turns: u32,
}

impl<F: Fam> World<F> {
    fn new(crowd: &'static Crowd<F>, names: &'static BTreeMap<Tuple, Side>) -> Self {
        let timeouts = Timeouts::default();
        World { crowd, names, table: crowd.table(), flows: BTreeMap::new(), timeouts, now: 1000, swept: 1000, turns: 0 }
    }
    fn proto(&self, flow: usize) -> u64 {
        ct::proto(self.crowd.flows[flow].key.control)
    }
    fn timeout(&self, flow: usize) -> u32 {
        timeout_s(self.proto(flow), self.flows[&flow].state, &self.timeouts)
    }
    /// What the flow can count on: an age in the old unit can't hold more than so many units.
    fn promised(&self, flow: usize) -> u32 {
        let known = &self.flows[&flow];
        let timeout = self.timeout(flow);
        if known.epoch == self.turns { timeout } else { timeout.min(UNITS * known.unit) }
    }
    fn may_be_gone(&self, flow: usize) -> bool {
        let known = &self.flows[&flow];
        known.doomed || self.now - known.seen > self.promised(flow)
    }
    /// It has been idle so long that no rounding excuses it.
    fn must_be_gone(&self, flow: usize) -> bool {
        let known = &self.flows[&flow];
        let limit = self.promised(flow).div_ceil(known.unit);
        let rounding = if known.epoch == self.turns { 0 } else { unit_s(self.timeout(flow)) };
        !known.doomed && self.now - known.seen >= (limit + 1) * known.unit + known.younger + rounding
    }
    /// A new flow in need may take its place.
    fn evictable(&self, flow: usize) -> bool {
        let known = &self.flows[&flow];
        let busy = self.proto(flow) == conn::TCP
            && known.state == tcp::ESTABLISHED
            && known.packets == 4
            && self.now - known.seen < conn::IDLE_S;
        !busy || (known.linked && known.hint < class::ESTABLISHED) || self.may_be_gone(flow)
    }

    fn step(&mut self, op: &Op) {
        let n = self.crowd.flows.len();
        match *op {
            Op::Client { flow, which, linked, flags } => self.client(flow % n, which, linked, flags),
            Op::Reply { flow, flags } => self.reply(flow % n, flags),
            Op::Delete { flow } => self.delete(flow % n),
            Op::Clock(seconds) => {
                let mut left = seconds;
                while left > 0 {
                    let step = left.min(self.swept + SWEEP_S - self.now);
                    (self.now, left) = (self.now + step, left - step);
                    self.table.set_now(self.now);
                    if self.now == self.swept + SWEEP_S {
                        self.sweep();
                    }
                }
            }
            Op::Sweep => self.sweep(),
            Op::Timeouts(timeouts) => self.change(timeouts),
        }
        self.compare();
    }

    /// The table holds what the model holds, field by field.
    fn compare(&self) {
        let there = audit(self.crowd, self.names, &self.table);
        assert_eq!(there.keys().collect::<Vec<_>>(), self.flows.keys().collect::<Vec<_>>());
        for (flow, control) in there {
            let known = &self.flows[&flow];
            assert_eq!((conn::dest(control), ct::state(control)), (known.dest, known.state));
            assert_eq!(control & ct::LINKED != 0, known.linked);
            let left = conn::seconds_left(&self.table.policy, control, self.now);
            if known.epoch == self.turns && !known.doomed {
                let (timeout, elapsed) = (self.timeout(flow), self.now - known.seen);
                if known.unit == 1
                    && elapsed <= timeout
                    && self.proto(flow) == conn::TCP
                    && known.state == tcp::ESTABLISHED
                {
                    let expect = match known.packets {
                        4 if elapsed >= conn::IDLE_S + known.younger => class::IDLE,
                        4 if elapsed < conn::IDLE_S => class::ESTABLISHED,
                        4 => conn::class(&self.table.policy, control, self.now),
                        _ => class::FEW_PACKETS,
                    };
                    assert_eq!(conn::class(&self.table.policy, control, self.now), expect, "{known:?}");
                }
                // To the second where the unit is a second.
                let rounding = if known.unit == 1 { 0 } else { known.unit };
                let latest = timeout.saturating_sub(elapsed) + 2 * rounding + known.younger;
                assert!(
                    left + elapsed + rounding >= timeout && left <= latest,
                    "{left} s left, {elapsed} of {timeout} gone"
                );
            }
        }
    }

    /// Takes from the model what an insert evicted, after making sure that it was allowed to.
    fn evicted(
        &mut self,
        at_most: usize,
        buckets: &BTreeSet<u32>,
        before: &BTreeMap<usize, BTreeSet<u32>>,
        new: usize,
    ) {
        let there: BTreeSet<usize> = self.lying().into_keys().collect();
        let gone: Vec<usize> = self.flows.keys().copied().filter(|f| *f != new && !there.contains(f)).collect();
        assert!(gone.len() <= at_most, "{gone:?} had to go for one flow");
        for flow in gone {
            assert!(self.evictable(flow), "evicted a flow in use: {:?}", self.flows[&flow]);
            assert!(!before[&flow].is_disjoint(buckets), "evicted from a bucket that is none of the new flow's");
            self.flows.remove(&flow);
        }
    }
    /// In which buckets the entries of each flow lie.
    fn lying(&self) -> BTreeMap<usize, BTreeSet<u32>> {
        let (mut by_flow, mut by_slot): (BTreeMap<usize, BTreeSet<u32>>, BTreeMap<u32, usize>) = Default::default();
        let entries = self.crowd.entries(&self.table);
        let bucket = |e: &Entry<F::Words>| e.slot / F::WAYS as u32;
        for e in entries.iter().filter(|e| e.control & ct::REVERSE == 0) {
            if let Some(Side::Forward(flow)) = self.names.get(&ct_common::tuple::<F>(&e.key::<F>(&self.crowd.seed))) {
                by_flow.entry(*flow).or_default().insert(bucket(e));
                by_slot.insert(e.slot, *flow);
            }
        }
        for e in entries.iter().filter(|e| e.control & ct::REVERSE != 0) {
            if let Some(flow) = by_slot.get(&conn::link_of(e.control)) {
                by_flow.entry(*flow).or_default().insert(bucket(e));
            }
        }
        by_flow
    }

    fn client(&mut self, flow: usize, which: usize, linked: bool, flags: u8) {
        let spec = &self.crowd.flows[flow];
        let proto = self.proto(flow);
        match ct::lookup::<F, _>(&self.table, &spec.key) {
            Found::Live(hit) => {
                if !conn::expired(&self.table.policy, hit.control, self.now) {
                    assert!(!self.must_be_gone(flow), "still there: {:?}", self.flows[&flow]);
                    let way = if self.flows[&flow].linked { Way::Input } else { Way::InputOnly };
                    let next = |state| next_state(proto, state, flags, way);
                    let now = conn::touch(&self.table, &hit, &spec.key.words, true, next).unwrap();
                    self.seen(flow, |known| {
                        known.state = next(known.state);
                        known.packets = (known.packets + 1).min(4);
                    });
                    assert_eq!(ct::state(now), self.flows[&flow].state);
                    return;
                }
                assert!(self.may_be_gone(flow), "timed out too early: {:?} at {}", self.flows[&flow], self.now);
                self.delete(flow);
            }
            Found::Weak(control) => panic!("left tentative: {control:x}"),
            Found::None => assert!(!self.flows.contains_key(&flow), "lost: {:?}", self.flows[&flow]),
        }
        let way = if linked { Way::Input } else { Way::InputOnly };
        self.open(flow, which, linked, next_state(proto, tcp::NONE, flags, way));
    }

    fn open(&mut self, flow: usize, which: usize, linked: bool, state: u64) {
        let spec = &self.crowd.flows[flow];
        let (dest, reverse) = spec.dests[which % spec.dests.len()];
        let before = self.lying();
        let mut buckets = BTreeSet::new();
        for key in [Some(&spec.key), linked.then_some(&reverse)].into_iter().flatten() {
            let homes = ct::homes::<F>(key, &self.crowd.seed);
            buckets.extend([homes.home, homes.other].map(|n| n & (ct::MIN_BUCKETS - 1)));
        }
        let in_use = linked && self.flows.values().any(|other| other.linked && other.dest == dest);
        let opened = conn::open(&self.table, &spec.key, dest, state, linked);
        self.evicted(if linked { 2 } else { 1 }, &buckets, &before, flow);
        match opened {
            Opened::New => {
                let unit = unit_s(timeout_s(self.proto(flow), state, &self.timeouts));
                let (seen, epoch, hint) = (self.now, self.turns, class::HALF_OPEN);
                let known =
                    Known { dest, linked, state, packets: 1, seen, hint, unit, younger: 0, epoch, doomed: false };
                self.flows.insert(flow, known);
            }
            Opened::ReverseInUse => assert!(in_use, "nobody has the reply tuple"),
            Opened::Full => {
                // Of those there, everybody may be worth more; but not while one could have gone.
                let mut left = before.iter().filter(|(f, at)| self.flows.contains_key(f) && !at.is_disjoint(&buckets));
                let spared = left.find(|(f, _)| {
                    !linked
                        && !self.flows[f].linked
                        && self.flows[f].state != tcp::ESTABLISHED
                        && !self.may_be_gone(**f)
                });
                assert!(spared.is_none(), "refused, but flow {spared:?} could have gone");
            }
            Opened::Exists(dest) => panic!("looked up and not found, yet it has dest {dest}"),
        }
    }

    /// A packet of the flow has come: its age is new.
    fn seen(&mut self, flow: usize, change: impl FnOnce(&mut Known)) {
        let (proto, now, turns, timeouts) = (self.proto(flow), self.now, self.turns, self.timeouts);
        let known = self.flows.get_mut(&flow).unwrap();
        change(known);
        let unit = unit_s(timeout_s(proto, known.state, &timeouts));
        (known.seen, known.unit, known.epoch, known.younger, known.doomed) = (now, unit, turns, 0, false);
    }

    fn reply(&mut self, flow: usize, flags: u8) {
        let spec = &self.crowd.flows[flow];
        let known = self.flows.get(&flow).filter(|known| known.linked).cloned();
        for (dest, key) in &spec.dests {
            let mine = known.as_ref().is_some_and(|known| known.dest == *dest);
            let Found::Live(reverse) = ct::lookup::<F, _>(&self.table, key) else {
                assert!(!mine, "the replies of {known:?} find nothing");
                continue;
            };
            let reply = conn::follow(&self.table, key, &reverse).expect("at rest every reverse entry leads somewhere");
            if !mine {
                // Its twin's, which is to other virtual addresses.
                assert_ne!(reply.virtual_port, spec.key.dport());
                continue;
            }
            let whose = (F::source(&spec.key.words), F::destination(&spec.key.words), spec.key.dport());
            assert_eq!((reply.client, reply.virtual_address, reply.virtual_port), whose);
            if conn::expired(&self.table.policy, reply.forward.control, self.now) {
                assert!(self.may_be_gone(flow));
                continue;
            }
            let proto = self.proto(flow);
            let next = |state| next_state(proto, state, flags, Way::Output);
            let now = conn::touch(&self.table, &reply.forward, &spec.key.words, false, next).unwrap();
            conn::remember(&self.table, key, &reverse, now, 7);
            let hint = conn::class(&self.table.policy, now, self.now);
            self.seen(flow, |known| {
                known.state = next(known.state);
                known.hint = hint;
            });
            let Found::Live(reverse) = ct::lookup::<F, _>(&self.table, key) else { panic!("gone by being remembered") };
            assert_eq!((conn::hop(reverse.control), class_of(&self.table, reverse.control)), (7, hint));
        }
    }

    fn delete(&mut self, flow: usize) {
        let key = &self.crowd.flows[flow].key;
        let found = ct::lookup::<F, _>(&self.table, key);
        let known = self.flows.remove(&flow);
        assert_eq!(matches!(found, Found::Live(_)), known.is_some());
        if let Found::Live(hit) = found {
            assert!(hit.free::<F>());
            conn::release(&self.table, &Entry { words: key.words, control: hit.control, slot: hit.slot::<F>() });
        }
    }

    fn sweep(&mut self) {
        self.crowd.sweep(&self.table);
        self.swept = self.now;
        let there = self.lying();
        for flow in self.flows.keys().copied().collect::<Vec<_>>() {
            if !there.contains_key(&flow) {
                assert!(self.may_be_gone(flow), "swept too early: {:?} at {}", self.flows[&flow], self.now);
                self.flows.remove(&flow);
                continue;
            }
            assert!(!self.must_be_gone(flow), "not swept: {:?} at {}", self.flows[&flow], self.now);
            let (unit, turns) = (unit_s(self.timeout(flow)), self.turns);
            let known = self.flows.get_mut(&flow).unwrap();
            if known.epoch != turns {
                known.younger += if known.unit == 1 { 0 } else { 2 * known.unit };
                (known.unit, known.epoch) = (unit, turns);
            }
        }
    }

    fn change(&mut self, timeouts: Timeouts) {
        let units = |t: &Timeouts| [t.tcp, t.tcp_fin, t.udp].map(unit_s);
        let turn = units(&timeouts) != units(&self.timeouts);
        if turn {
            // What a caller has to see to: one turn at a time.
            self.sweep();
        }
        for flow in self.flows.keys().copied().collect::<Vec<_>>() {
            let due = self.may_be_gone(flow);
            self.flows.get_mut(&flow).unwrap().doomed |= due;
        }
        self.table.policy = self.table.policy.changed(&timeouts);
        self.timeouts = timeouts;
        self.turns += u32::from(turn);
    }
}

type Parts<F> = (Crowd<F>, BTreeMap<Tuple, Side>);
fn parts<F: Fam>() -> Parts<F> {
    let crowd = Crowd::new(Rng::new(3).seed(), 16, 70, 5, 2).with_twins(7).with_own_ports(9);
    let names = crowd.full_tuple();
    (crowd, names)
}
fn agrees<F: Fam>((crowd, names): &'static Parts<F>, ops: &[Op]) {
    let mut world = World::new(crowd, names);
    ops.iter().for_each(|op| world.step(op));
    // Nothing is left beyond the buckets that were looked at, nor in them when all has timed out.
    assert_eq!(world.table.entries().count(), crowd.entries(&world.table).len());
    world.step(&Op::Timeouts(Timeouts { tcp: 1, tcp_fin: 1, udp: 1 }));
    world.step(&Op::Sweep);
    world.step(&Op::Clock(SWEEP_S));
    world.step(&Op::Sweep);
    assert!(world.flows.values().all(|known| known.doomed || known.younger > 0), "{:?}", world.flows);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn agrees_with_a_map_of_flows_v4(ops in prop::collection::vec(op(), 1..400)) {
        static PARTS: OnceLock<Parts<V4>> = OnceLock::new();
        agrees(PARTS.get_or_init(parts), &ops);
    }
    #[test]
    fn agrees_with_a_map_of_flows_v6(ops in prop::collection::vec(op(), 1..400)) {
        static PARTS: OnceLock<Parts<V6>> = OnceLock::new();
        agrees(PARTS.get_or_init(parts), &ops);
    }
}
