//! What is rehearsed on a copy of the data plane is what then happens, and the rehearsal leaves no trace; and what the programs tell
//! `rvs trace` is what was.

use rvs_datapath::abi::{Iface, ServiceState, Stats, Trace, dest, service, tunnel};
use rvs_datapath::sched::Kind;
use rvs_datapath::verdict::{Action, COUNTERS, Reason};
use rvs_fixtures::case::{Code, Counted, Engine, FlowRow, START_S, Sent};
use rvs_fixtures::cases;
use rvs_fixtures::frame::{TCP, UDP, flag};
use rvs_fixtures::world::{
    BACK, BOTH, LAN, Layout, Net, ONE_ARMED, Out, REFUSED, SERVERS, SILENT, STRANGER, Server, Virtual, World,
};
use rvs_sys::bpf::attach::Hook;
use rvs_sys::bpf::{Dataplane, OBJECT, Outcome, Rehearsal};
use std::net::SocketAddr;

use crate::fixtures::{Bpffs, Kernel, RESOLVED, carried, director};

pub const CASES: &[crate::Case] = &[
    ("fixtures_are_rehearsed_as_they_are_played", || fixtures_are_rehearsed_as_they_are_played(Hook::XdpNative, &[])),
    ("fixtures_are_rehearsed_as_they_are_played_by_tc", || {
        fixtures_are_rehearsed_as_they_are_played(Hook::Tc, RESOLVED);
    }),
    ("any_packet_is_rehearsed_as_it_is_played", || any_packet_is_rehearsed_as_it_is_played(Hook::XdpNative)),
    ("any_packet_is_rehearsed_as_it_is_played_by_tc", || any_packet_is_rehearsed_as_it_is_played(Hook::Tc)),
];

/// The kernel, with rehearsals before packets.
struct Rehearsed {
    kernel: Kernel,
    copy: Rehearsal,
    hook: Hook,
    sent: usize,
    rehearsed: usize,
}

impl Rehearsed {
    fn open(hook: Hook, name: &str) -> (Rehearsed, Bpffs) {
        let ns = director();
        rvs_sys::netns::enter(&ns.name).expect("enter the namespace");
        let pins = Bpffs::mount(name);
        let kernel = Kernel::open(&pins, hook);
        let copy = kernel.dataplane.stage().expect("maps").open(OBJECT).expect("a copy");
        // (The thread keeps the namespace.)
        drop(ns);
        (Rehearsed { kernel, copy, hook, sent: 0, rehearsed: 0 }, pins)
    }

    fn state(&self) -> (Vec<(&'static str, Vec<u64>)>, Vec<String>) {
        let maps = &self.kernel.dataplane.maps;
        let mut keys: Vec<String> = maps.keys.iter().map(|k| format!("{:?}", k.expect("a key"))).collect();
        keys.sort();
        (self.kernel.dataplane.contents().expect("contents"), keys)
    }

    /// The rehearsal, which changes nothing.
    fn rehearse(&mut self, frame: &[u8], ifindex: u32) -> Outcome {
        let before = self.state();
        let outcome = self.copy.run(self.hook, ifindex, frame).expect("a rehearsal");
        assert!(before == self.state(), "the rehearsal has changed something: {outcome:?}");
        self.rehearsed += 1;
        outcome
    }
}

fn same(outcome: &Outcome, sent: &Sent) {
    assert_eq!((outcome.verdict.reason(), &outcome.bytes), (sent.reason, &sent.bytes));
    let code = match outcome.verdict.action() {
        Action::Out(_) => Code::Out,
        Action::Back => Code::Back,
        Action::Up => Code::Up,
        Action::Drop => Code::Drop,
    };
    // (By tc the addresses say whether it went out or back: there are none yet when the kernel has to find them.)
    assert!(outcome.verdict.is_to_resolve() || code == sent.code, "{outcome:?} {sent:?}");
}

impl Engine for Rehearsed {
    fn reset(&mut self) {
        self.sent = 0;
        self.kernel.reset();
    }
    fn load(&mut self, layout: &Layout) {
        self.kernel.load(layout);
    }
    fn set_now(&mut self, now_s: u32) {
        self.kernel.set_now(now_s);
    }
    fn set_machines(&mut self, service: u32, state: ServiceState) {
        self.kernel.set_machines(service, state);
    }
    fn set_lent(&mut self, dest: u32, lent: u64) {
        self.kernel.set_lent(dest, lent);
    }
    fn machines(&mut self, service: u32) -> ServiceState {
        self.kernel.machines(service)
    }
    fn send(&mut self, frame: &[u8], ifindex: u32) -> Option<Sent> {
        // Each copies all: of cases with thousands of packets some.
        self.sent += 1;
        let rehearse =
            carried(self.hook, frame) && ifindex != STRANGER && (self.sent <= 2 || self.sent.is_multiple_of(509));
        let outcome = rehearse.then(|| self.rehearse(frame, ifindex));
        let sent = self.kernel.send(frame, ifindex);
        if let (Some(outcome), Some(sent)) = (outcome, &sent) {
            same(&outcome, sent);
        }
        sent
    }
    fn flows(&mut self) -> Vec<FlowRow> {
        self.kernel.flows()
    }
    fn counted(&mut self, dest: u32) -> Counted {
        self.kernel.counted(dest)
    }
    fn verdicts(&mut self) -> [u64; COUNTERS] {
        self.kernel.verdicts()
    }
}

fn fixtures_are_rehearsed_as_they_are_played(hook: Hook, except: &[&str]) {
    let (mut engine, _pins) = Rehearsed::open(hook, &format!("rehearsal-{}", hook.name()));
    for case in cases::all().iter().filter(|c| !except.contains(&c.name)) {
        case.run(&mut engine);
    }
    println!("{} packets rehearsed and played", engine.rehearsed);
    assert!(engine.rehearsed > 300, "only {} packets were rehearsed", engine.rehearsed);
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

const FIRST_PORT: u16 = 80;

fn server(r: &mut Random, net: Net) -> Server {
    let (number, port) = (r.of(&[11, 12, 13, 14]), r.of(&[80, 8080, 0]));
    assert!(SERVERS.contains(&number));
    let method = r.of(&[dest::ROUTE, dest::MASQ, dest::TUNNEL]);
    let one = match r.below(8) {
        0 => Server::new(net.server(number, port), method, Out::Ask),
        1 => Server::new(net.server(SILENT, port), method, Out::Ask),
        2 => Server::new(SocketAddr::new(net.of(REFUSED), port), method, Out::Ask),
        3 => Server::new(net.own(port), r.of(&[dest::ROUTE, dest::MASQ]), Out::Local),
        4 => Server::new(net.server(ONE_ARMED, port), dest::ROUTE, Out::Ready(ONE_ARMED)),
        _ => Server::new(net.server(number, port), method, Out::Ready(number)),
    };
    let (kind, flags) =
        r.of(&[(tunnel::IPIP, 0), (tunnel::GRE, tunnel::CSUM), (tunnel::GUE, 0), (tunnel::GUE, tunnel::CSUM)]);
    let tunnel =
        if one.method == dest::TUNNEL { Server::tun(net, number, port, kind, flags).tunnel } else { one.tunnel };
    Server { weight: r.of(&[0, 1, 1, 2, 5]), available: !r.once_in(10), overloaded: r.once_in(10), tunnel, ..one }
}

fn world(r: &mut Random) -> World {
    let mut services = Vec::new();
    for port in 0..3 + r.below(5) as u16 {
        let net = r.of(&BOTH);
        let servers: Vec<Server> = (0..r.below(6)).map(|_| server(r, net)).collect();
        let mut one = Virtual::new(net.vip(FIRST_PORT + port), r.of(&[TCP, TCP, UDP]), &servers);
        one = one.by(r.of(&[Kind::Rr, Kind::Wrr, Kind::Wlc, Kind::Mh]));
        one.flags = r.of(&[service::LOCAL, service::LOCAL, service::LOCAL, service::NONLOCAL, 0])
            | r.of(&[0, service::HASH_PORT, service::HASH_FALLBACK]);
        services.push(one);
    }
    World { services, settings: [0; 2], takes: false }
}

/// To a service, to none, or from a real server.
fn packet(r: &mut Random, world: &World) -> (Vec<u8>, u32) {
    let client = 1000 + r.below(4) as u16;
    let to = r.below(world.services.len() as u64 + 1) as usize;
    let Some(v) = world.services.get(to) else {
        return (r.of(&BOTH).request(TCP, client, 79).flags(flag::SYN).bytes(), LAN);
    };
    let net = if v.at.is_ipv4() { Net::V4 } else { Net::V6 };
    let flags = r.of(&[flag::SYN, flag::SYN, flag::ACK, flag::ACK | flag::PSH, flag::FIN | flag::ACK, flag::RST]);
    let ttl = if r.once_in(12) { 1 } else { 64 };
    let nat: Vec<&Server> = v.servers.iter().filter(|s| s.method == dest::MASQ).collect();
    if r.once_in(3) && !nat.is_empty() {
        let s = r.of(&nat);
        let at = SocketAddr::new(s.at.ip(), if s.at.port() == 0 { v.at.port() } else { s.at.port() });
        let flags = r.of(&[flag::SYN | flag::ACK, flag::ACK, flag::FIN | flag::ACK]);
        return (net.reply(v.protocol, at, client, 11).flags(flags).ttl(ttl).bytes(), BACK);
    }
    (net.request(v.protocol, client, v.at.port()).flags(flags).ttl(ttl).bytes(), LAN)
}

fn any_packet_is_rehearsed_as_it_is_played(hook: Hook) {
    let (mut engine, _pins) = Rehearsed::open(hook, &format!("any-{}", hook.name()));
    let mut reasons = std::collections::BTreeMap::<Reason, usize>::new();
    for seed in 0..5 {
        let mut r = Random(seed);
        engine.reset();
        let (world, mut now_s) = (world(&mut r), START_S);
        engine.load(&world.layout());
        let maps = &engine.kernel.dataplane.maps;
        let all = Trace { reasons: [u64::MAX; 2], until_s: u32::MAX, ..Trace::default() };
        maps.trace.set(0, all).expect("tracing");
        for number in [LAN, BACK] {
            let there = maps.ifaces.get(number).expect("an interface");
            maps.ifaces.set(number, there.traced(true)).expect("tracing");
        }
        for n in 0..200 {
            if r.once_in(20) {
                now_s += r.of(&[1, 70, 400]);
                engine.set_now(now_s);
            }
            if r.once_in(2) {
                // What is rehearsed and not played then leaves nothing in the copy either.
                let (frame, ifindex) = packet(&mut r, &world);
                let _ = engine.rehearse(&frame, ifindex);
            }
            let (frame, ifindex) = packet(&mut r, &world);
            let outcome = engine.rehearse(&frame, ifindex);
            let dests = world.layout().dests.len() as u32;
            let stats = |e: &Rehearsed| (0..dests).map(|d| e.kernel.stats(d)).collect::<Vec<Stats>>();
            let before = stats(&engine);
            let sent = engine.kernel.send(&frame, ifindex).expect("a packet");
            let what = format!("seed {seed}, packet {n}: {outcome:?}");
            let same = std::panic::catch_unwind(|| same(&outcome, &sent));
            assert!(same.is_ok(), "{what}, but {sent:?}");
            let after = stats(&engine);
            let moved = (0..dests).find(|d| before[*d as usize] != after[*d as usize]);
            let opened = moved.is_some_and(|d| before[d as usize].connections != after[d as usize].connections);
            assert_eq!((outcome.dest, outcome.opens), (moved, opened), "{what}");
            // ... and it is told as it came.
            let (told, bytes) = engine.kernel.dataplane.ring.take().expect("a packet that is told of");
            assert_eq!((told.verdict, told.ifindex, &bytes), (outcome.verdict.word(), ifindex, &frame), "{what}");
            assert_eq!((told.len as usize, told.kept as usize), (frame.len(), frame.len()));
            assert!(engine.kernel.dataplane.ring.take().is_none(), "{what}: told of twice");
            *reasons.entry(sent.reason).or_default() += 1;
        }
    }
    println!("{}: {reasons:?}", hook.name());
    for met in [Reason::Route, Reason::Masq, Reason::MasqReply, Reason::Tunnel, Reason::NoDest, Reason::NotLocal] {
        assert!(reasons.contains_key(&met), "no packet met {met:?}: {reasons:?}");
    }
    let dataplane = &mut engine.kernel.dataplane;
    assert_eq!(dataplane.maps.untold().expect("a count"), 0);
    if hook == Hook::XdpNative {
        what_is_lost_is_counted(dataplane);
    }
}

/// More packets than the ring has room for, and nobody takes them. (They come by lo.)
fn what_is_lost_is_counted(dataplane: &mut Dataplane) {
    const LO: u32 = 1;
    const PACKETS: u32 = 100_000;
    let iface = Iface::new(LO, [0; 6], 0, 1500).traced(true);
    dataplane.maps.ifaces.set(LO, iface).expect("tracing");
    dataplane.test_run("rvs_xdp", &[0; 64], PACKETS).expect("packets");
    let told = std::iter::from_fn(|| dataplane.ring.take()).count() as u64;
    let lost = dataplane.maps.untold().expect("a count");
    assert!(told > 1000 && lost > 1000 && told + lost == u64::from(PACKETS), "{told} told, {lost} lost");
}
