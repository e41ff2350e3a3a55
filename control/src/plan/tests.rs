//! The planner against maps in memory: whatever is asked, the maps say what the model says.

use std::net::Ipv4Addr;

use proptest::prelude::*;
use rvs_datapath::abi::ServiceState;
use rvs_datapath::sched::Kind;

use super::*;
use crate::model::{
    Command, Defence, Env, FwdMethod, Granularity, Proto, SchedFlags, ServiceSpec, Timeouts, Tunnel, TunnelChecksum,
    TunnelKind,
};
use crate::settings::Settings;

struct Host;
impl Env for Host {
    fn is_local(&self, _: IpAddr) -> bool {
        false
    }
    fn is_broadcast(&self, _: Ipv4Addr) -> bool {
        false
    }
    fn interface_mtu(&self, _: &str) -> Option<u32> {
        None
    }
}

/// What the maps would hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Maps {
    keys: BTreeMap<abi::ServiceKey, u64>,
    services: BTreeMap<u32, abi::Service>,
    state: BTreeMap<u32, ServiceState>,
    lists: BTreeMap<u32, ListEntry>,
    tables: BTreeMap<u32, u32>,
    locals: BTreeMap<u32, abi::Local>,
    dests: BTreeMap<u32, abi::Dest>,
    info: BTreeMap<u32, abi::DestInfo>,
    tunnels: BTreeMap<u32, abi::Tunnel>,
    hops: BTreeMap<u32, abi::Hop>,
    quiesced: BTreeSet<u32>,
    timeouts: [u32; 3],
    settings: [u32; abi::SETTINGS_MAX],
    watched: BTreeMap<abi::ServiceKey, u64>,
}

impl Maps {
    fn new() -> Self {
        Maps { timeouts: [900, 120, 300], settings: Settings::default().values(), ..Maps::default() }
    }

    fn apply(&mut self, ops: &[MapOp]) {
        for op in ops {
            match op {
                MapOp::Key { key, value: Some(value) } => {
                    assert!(self.services.contains_key(&(*value as u32)), "a key before its service");
                    self.keys.insert(*key, *value);
                }
                MapOp::Key { key, value: None } => drop(self.keys.remove(key)),
                MapOp::Service { index, value, .. } => drop(self.services.insert(*index, *value)),
                MapOp::List { service, old, change, first } => {
                    let machines = self.state.get(service).copied().unwrap_or_default();
                    let list = lists::List { entries: old.clone(), machines }.after(*change).unwrap();
                    for (i, e) in list.run().iter().enumerate() {
                        assert!(i == 0 || self.dests.contains_key(&e.dest), "a list before its dest");
                        self.lists.insert(first + i as u32, *e);
                    }
                    let record = self.services.get_mut(service).unwrap();
                    record.list = u64::from(*first) | (list.entries.len() as u64) << 32;
                    self.state.insert(*service, list.machines);
                }
                MapOp::Table { service, first, places } => {
                    self.tables.extend((*first..).zip(places.iter().copied()));
                    let record = self.services.get_mut(service).unwrap();
                    record.table = u64::from(*first) | (places.len() as u64) << 32;
                }
                MapOp::Locals { service, first, addresses } => {
                    self.locals.extend((*first..).zip(addresses.iter().copied()));
                    let record = self.services.get_mut(service).unwrap();
                    record.locals = u64::from(*first) | (addresses.len() as u64) << 32;
                }
                MapOp::Watch { key, bits: 0 } => assert!(self.watched.remove(key).is_some(), "not watched before"),
                MapOp::Watch { key, bits } => drop(self.watched.insert(*key, *bits)),
                MapOp::Dest { index, value } => drop(self.dests.insert(*index, *value)),
                MapOp::DestInfo { index, value } => drop(self.info.insert(*index, *value)),
                MapOp::Tunnel { index, value } => drop(self.tunnels.insert(*index, *value)),
                MapOp::Quiesced { index, quiesced: true } => drop(self.quiesced.insert(*index)),
                MapOp::Quiesced { index, quiesced: false } => drop(self.quiesced.remove(index)),
                MapOp::Hop { index, value } => drop(self.hops.insert(*index, *value)),
                MapOp::Timeouts(t) => self.timeouts = [t.tcp, t.tcp_fin, t.udp],
                MapOp::Settings(s) => self.settings = s.values(),
                MapOp::StatsIn { .. } | MapOp::StatsOut { .. } | MapOp::Zero { .. } => {}
            }
        }
    }

    fn list(&self, record: &abi::Service) -> Vec<ListEntry> {
        let (first, count) = (record.list as u32, (record.list >> 32) as u32);
        (1..=count).map(|i| self.lists[&(first + i)]).collect()
    }

    fn local_addresses(&self, record: &abi::Service) -> Vec<abi::Local> {
        let (first, count) = (record.locals as u32, (record.locals >> 32) as u32);
        (0..count).map(|i| self.locals[&(first + i)]).collect()
    }

    fn dump(&self) -> Dump {
        let services = self.keys.values().map(|v| {
            let index = *v as u32;
            let record = self.services[&index];
            DumpedService { index, record, list: self.list(&record), locals: self.local_addresses(&record) }
        });
        let dests = self.dests.iter().filter(|(_, d)| **d != abi::Dest::default());
        Dump {
            services: services.collect(),
            dests: dests
                .map(|(i, d)| DumpedDest { index: *i, record: *d, info: self.info[i], tunnel: self.tunnels[i] })
                .collect(),
            hops: self.hops.iter().map(|(i, h)| (*i, *h)).collect(),
            timeouts_s: self.timeouts,
            settings: self.settings,
            watched: self.watched.iter().map(|(k, v)| (*k, *v)).collect(),
        }
    }
}

const CAPACITY: Capacity = Capacity { services: 8, dests: 40, lists: 400, tables: 40_000, hops: 40 };

/// Model, planner and maps, moved together.
struct World {
    model: Model,
    planner: Planner,
    maps: Maps,
    now_ms: u64,
}

impl World {
    fn new() -> Self {
        World { model: Model::new(), planner: Planner::new(&CAPACITY), maps: Maps::new(), now_ms: 0 }
    }

    /// True: it was accepted. `fail`: the maps refuse it.
    fn command(&mut self, command: &Command, fail: bool) -> bool {
        self.now_ms += 100;
        self.planner.tick(self.now_ms);
        let Ok(change) = self.model.apply(command, &Host) else { return false };
        match self.planner.change(&self.model, &change, self.now_ms) {
            Ok(step) if fail => {
                self.planner.undo(step);
                self.model.revert(change);
                false
            }
            Ok(step) => {
                self.maps.apply(&step.ops);
                true
            }
            Err(_) => {
                self.model.revert(change);
                false
            }
        }
    }

    /// Look whose fragments may be ours. `fail`: the maps refuse it.
    fn watch(&mut self, fail: bool) {
        let step = self.planner.watch(&self.model);
        if fail {
            self.planner.undo(step);
        } else {
            self.maps.apply(&step.ops);
            assert!(self.planner.watch(&self.model).ops.is_empty());
            self.check_watched();
        }
    }

    fn check_watched(&self) {
        let bits = |address: IpAddr| {
            let key = abi::ServiceKey { address: bytes(address), port: 0, protocol: 0, family: 4 };
            self.maps.watched.get(&key).copied().unwrap_or(0)
        };
        for (key, service) in self.model.services() {
            let ServiceKey::Virtual { addr, .. } = key else { continue };
            for address in service.local_addresses.iter().chain([addr]) {
                assert_ne!(bits(*address) & abi::watched::DESTINATION, 0, "{address}");
            }
            for dest in service.dests().filter(|d| d.method == FwdMethod::Masq) {
                assert_ne!(bits(dest.key.addr) & abi::watched::SOURCE, 0, "{}", dest.key.addr);
            }
        }
        let told = self.model.settings().level().flags & abi::config::NAT_ICMP_SEND != 0;
        for (key, bits) in self.maps.watched.iter().filter(|(key, _)| key.port != 0) {
            assert!(told && *bits as u32 == abi::watched::SERVER as u32, "{key:?}");
            let dest = self.maps.dests[&((bits >> 32) as u32)];
            let flags = dest.out as u32;
            assert_eq!(
                (dest.address.bytes(), dest.port, flags & flag::AVAILABLE),
                (key.address, key.port, flag::AVAILABLE)
            );
            assert!(flags & flag::METHOD == flag::MASQ || dest.lends_own(), "{dest:?}");
        }
        let most = self.model.services().map(|(_, s)| 1 + s.local_addresses.len()).sum::<usize>()
            + self.planner.dests.len() * 2;
        assert!(self.maps.watched.len() <= most, "{:?}", self.maps.watched);
    }

    /// The maps say what the model says, and nothing is used twice.
    fn check(&self) {
        let mut used = BTreeSet::new();
        let mut places = BTreeSet::new();
        assert_eq!(self.maps.keys.len(), self.model.service_count());
        for (key, service) in self.model.services() {
            let index = self.maps.keys[&abi_key(key)] as u32;
            assert_eq!(self.planner.service_index(key), Some(index));
            let record = &self.maps.services[&index];
            let list = self.maps.list(record);
            let dests: Vec<&Dest> = service.dests().collect();
            assert_eq!(list.len(), dests.len());
            for place in record.list as u32..=record.list as u32 + list.len() as u32 {
                assert!(places.insert(place), "list entry {place} is two services'");
            }
            let locals: Vec<_> =
                service.local_addresses.iter().map(|a| abi::Local { address: bytes(*a).into() }).collect();
            assert_eq!(self.maps.local_addresses(record), locals);
            let defence = Defence {
                cookies_above: record.cookies.checked_sub(1),
                rate: record.rate,
                source_rate: record.source_rate,
            };
            assert_eq!(defence, service.defence);
            assert_eq!(record.flags & service_flag::PROXY != 0, service.proxy);
            let replies_come_by = list.iter().all(|e| self.maps.dests[&e.dest].lends());
            assert_eq!(record.asks(), record.cookies != 0 && replies_come_by);
            assert_eq!(self.planner.asks(key), record.asks());
            for (entry, dest) in list.iter().zip(dests) {
                assert!(used.insert(entry.dest), "dest {} is in two places", entry.dest);
                let there = self.maps.dests[&entry.dest];
                assert_eq!((there.address, there.port), (bytes(dest.key.addr).into(), dest.key.port));
                let cookies = service.defence.cookies_above.is_some();
                let bits = there.out as u32 & (flag::METHOD | flag::OWN | flag::PROXY);
                assert_eq!(bits, method_bits(dest.method, cookies, service.proxy));
                assert_ne!(there.out as u32 & flag::AVAILABLE, 0);
                assert_eq!(entry.weight, dest.weight);
                assert_eq!(self.maps.info[&entry.dest].weight, dest.weight);
                assert_eq!(self.maps.quiesced.contains(&entry.dest), dest.weight == 0);
                assert_eq!(there.service, index);
            }
            let (first, size) = (record.table as u32, (record.table >> 32) as u32);
            let sizes = [(Kind::Mh, 4093), (Kind::Sh, 256), (Kind::Dh, 256)];
            if let Some((_, wanted)) = sizes.iter().find(|(s, _)| service.config.scheduler == Some(*s)) {
                assert_eq!(size, *wanted);
                let own: BTreeSet<u32> = list.iter().map(|e| e.dest).chain([0]).collect();
                assert!((first..first + size).all(|i| own.contains(&self.maps.tables[&i])));
            } else {
                assert_eq!(record.table, 0);
            }
        }
        for index in self.planner.trashed() {
            assert!(!used.contains(&index), "dest {index} is out of use and in a list");
            assert!(self.planner.dest_address(index).is_some());
        }
    }
}

fn ip(n: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, n])
}

fn service(n: u16) -> ServiceKey {
    ServiceKey::Virtual { proto: Proto::Tcp, addr: IpAddr::from([192, 0, 2, 1]), port: 80 + n }
}

fn spec(scheduler: &str) -> ServiceSpec {
    ServiceSpec {
        scheduler: scheduler.into(),
        sched_flags: SchedFlags::NONE,
        persistence_s: None,
        granularity: Granularity::V4(Ipv4Addr::BROADCAST),
        engine: None,
        one_packet: false,
    }
}

fn dest(n: u8, weight: u32, masq: bool) -> Dest {
    let tunnel = Tunnel { kind: TunnelKind::Gue, port: 6080, checksum: TunnelChecksum::Csum };
    let method = match masq {
        true => FwdMethod::Masq,
        false if n.is_multiple_of(2) => FwdMethod::Tunnel(tunnel),
        false if n == 7 => FwdMethod::Fullnat,
        false => FwdMethod::Route,
    };
    Dest { key: DestKey { addr: ip(n), port: 80 }, method, weight, upper: 0, lower: 0 }
}

fn any_command() -> impl Strategy<Value = Command> {
    let key = || (0u16..4).prop_map(service);
    let dest = || (1u8..8, 0u32..4, any::<bool>()).prop_map(|(n, w, m)| dest(n, w, m));
    let sched = || prop_oneof![Just("rr"), Just("wrr"), Just("wlc"), Just("mh"), Just("sh"), Just("dh")].prop_map(spec);
    prop_oneof![
        4 => (key(), sched()).prop_map(|(k, s)| Command::AddService(k, s)),
        2 => (key(), sched()).prop_map(|(k, s)| Command::EditService(k, s)),
        1 => key().prop_map(Command::DelService),
        8 => (key(), dest()).prop_map(|(k, d)| Command::AddDest(k, d)),
        4 => (key(), dest()).prop_map(|(k, d)| Command::EditDest(k, d)),
        4 => (key(), dest()).prop_map(|(k, d)| Command::DelDest(k, d.key)),
        3 => (key(), 200u8..206).prop_map(|(k, n)| Command::AddLocalAddress(k, ip(n))),
        2 => (key(), 200u8..206).prop_map(|(k, n)| Command::DelLocalAddress(k, ip(n))),
        3 => (key(), prop::option::of(0u32..3), 0u32..3).prop_map(|(k, cookies_above, rate)| {
            Command::Defend(k, Defence { cookies_above, rate, source_rate: 7 })
        }),
        2 => (key(), any::<bool>()).prop_map(|(k, on)| Command::Proxy(k, on)),
        1 => Just(Command::Flush),
        1 => (0u32..5).prop_map(|n| Command::Set("drop_packet".into(), n)),
        2 => (0u32..2).prop_map(|n| Command::Set("nat_icmp_send".into(), n)),
        1 => (1u32..5000).prop_map(|udp_s| Command::SetTimeouts(Timeouts { tcp_s: 0, tcp_fin_s: 0, udp_s })),
    ]
}

#[derive(Clone, Debug)]
enum Op {
    Command(Command, bool),
    /// Of the indexes that are out of use these are idle (by their number in the list).
    Idle(BTreeSet<usize>),
    Ways(BTreeMap<u8, Option<u32>>),
    Watch(bool),
    Restart,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (any_command(), prop::bool::weighted(0.1)).prop_map(|(c, f)| Op::Command(c, f)),
        2 => prop::collection::btree_set(0usize..8, 0..4).prop_map(Op::Idle),
        2 => prop::collection::btree_map(1u8..8, prop::option::of(2u32..5), 0..6).prop_map(Op::Ways),
        2 => prop::bool::weighted(0.2).prop_map(Op::Watch),
        1 => Just(Op::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_maps_say_what_the_model_says(ops in prop::collection::vec(any_op(), 1..80)) {
        let mut w = World::new();
        for op in ops {
            match op {
                Op::Command(command, fail) => {
                    let maps = w.maps.clone();
                    if !w.command(&command, fail) {
                        prop_assert_eq!(&w.maps, &maps);
                    }
                }
                Op::Idle(which) => {
                    let trashed: Vec<u32> = w.planner.trashed().collect();
                    let idle = which.iter().filter_map(|i| trashed.get(*i)).copied().collect();
                    let step = w.planner.idle(&idle);
                    w.maps.apply(&step.ops);
                }
                Op::Ways(ways) => {
                    let ways = ways.into_iter().map(|(n, hop)| {
                        (ip(n), hop.map_or(Way::Local, |h| Way::Hop { macs: [h, 0, 0], ifindex: h, mtu: 1500, source: Some(ip(100 + h as u8)) }))
                    });
                    w.now_ms += 100;
                    w.planner.tick(w.now_ms);
                    let step = w.planner.ways(ways.collect(), w.now_ms);
                    w.maps.apply(&step.ops);
                    for (i, d) in w.maps.dests.iter().filter(|(_, d)| **d != abi::Dest::default()) {
                        let hop = (d.out >> 32) as u32;
                        let there = (hop != 0).then(|| w.maps.hops[&hop].ifindex);
                        let want = match w.planner.ways.get(&address(&d.address.bytes(), false)) {
                            Some(Way::Hop { ifindex, .. }) => Some(*ifindex),
                            _ => None,
                        };
                        prop_assert_eq!(there, want);
                        if let Some(ifindex) = want && d.out as u32 & flag::METHOD == flag::TUNNEL {
                            prop_assert_eq!(w.maps.tunnels[i].source, bytes(ip(100 + ifindex as u8)).into());
                        }
                    }
                }
                Op::Watch(fail) => w.watch(fail),
                Op::Restart => {
                    let (model, planner) = Planner::restore(&w.maps.dump(), &CAPACITY).unwrap();
                    prop_assert_eq!(save(&model), save(&w.model));
                    (w.model, w.planner) = (model, planner);
                }
            }
            w.check();
        }
    }
}

/// What `ipvsadm -S` would show, in the order of services and dests.
fn save(model: &Model) -> Vec<String> {
    let mut lines = vec![format!("{:?}", model.timeouts())];
    for (key, service) in model.services_by_age() {
        lines.push(format!("{key:?} {:?} {:?}", service.config, service.local_addresses));
        lines.extend(service.dests().map(|d| format!("{d:?}")));
    }
    lines
}

/// Those that are there, once for all services that have them, and only while they are to be told.
#[test]
fn servers_by_nat_are_known_by_their_ports_when_they_are_to_be_told() {
    let mut w = World::new();
    let servers = |w: &mut World| {
        w.watch(false);
        w.maps.watched.keys().filter(|key| key.port != 0).count()
    };
    for number in [0, 1] {
        assert!(w.command(&Command::AddService(service(number), spec("rr")), false));
        assert!(w.command(&Command::AddDest(service(number), dest(1, 1, true)), false));
        assert!(w.command(&Command::AddDest(service(number), dest(3, 1, false)), false));
    }
    assert!(w.command(&Command::AddDest(service(1), dest(2, 0, true)), false));
    assert_eq!(servers(&mut w), 0);
    assert!(w.command(&Command::Set("nat_icmp_send".into(), 1), false));
    assert_eq!(servers(&mut w), 2);
    assert!(w.command(&Command::DelDest(service(1), dest(2, 0, true).key), false));
    assert_eq!(servers(&mut w), 1);
    assert!(w.command(&Command::Set("nat_icmp_send".into(), 0), false));
    assert_eq!(servers(&mut w), 0);
}

#[test]
fn a_dest_added_again_gets_its_index_back_and_one_that_is_idle_does_not() {
    let mut w = World::new();
    assert!(w.command(&Command::AddService(service(0), spec("rr")), false));
    assert!(w.command(&Command::AddDest(service(0), dest(1, 1, true)), false));
    let index = |w: &World| w.planner.dest_indexes(&service(0), &dest(1, 1, true).key).unwrap().0;
    let first = index(&w);
    assert!(w.command(&Command::DelDest(service(0), dest(1, 1, true).key), false));
    assert_eq!(w.maps.dests[&first].out as u32 & flag::AVAILABLE, 0, "its connections are dropped");
    assert!(w.command(&Command::AddDest(service(0), dest(1, 1, true)), false));
    assert_eq!(index(&w), first);
    // Another method is another dest for the connections there are.
    assert!(w.command(&Command::EditDest(service(0), dest(1, 1, false)), false));
    assert_ne!(index(&w), first);
    assert_eq!(w.planner.dest_indexes(&service(0), &dest(1, 1, false).key).unwrap().1, [first]);
    assert_ne!(w.maps.dests[&first].out as u32 & flag::AVAILABLE, 0, "they go on");
    // The same over a removal: added with another method, the connections of the old one are forwarded again as they were.
    assert!(w.command(&Command::DelService(service(0)), false));
    assert!(w.command(&Command::AddService(service(0), spec("rr")), false));
    assert!(w.command(&Command::AddDest(service(0), dest(2, 1, true)), false));
    let second = w.planner.dest_indexes(&service(0), &dest(2, 1, true).key).unwrap().0;
    assert!(w.command(&Command::DelDest(service(0), dest(2, 1, true).key), false));
    assert!(w.command(&Command::AddDest(service(0), dest(2, 1, false)), false));
    assert_eq!(w.planner.dest_indexes(&service(0), &dest(2, 1, false).key).unwrap().1, [second]);
    assert_ne!(w.maps.dests[&second].out as u32 & flag::AVAILABLE, 0);
    assert!(w.command(&Command::AddDest(service(0), dest(1, 1, false)), false));
    let step = w.planner.idle(&BTreeSet::from([first]));
    w.maps.apply(&step.ops);
    assert_eq!(w.planner.dest_indexes(&service(0), &dest(1, 1, false).key).unwrap().1, [0u32; 0]);
    assert_eq!(w.maps.dests[&first], abi::Dest::default());
    w.check();
}

#[test]
fn no_room_is_said_and_changes_nothing() {
    let mut w = World::new();
    for n in 0..CAPACITY.services as u16 {
        assert!(w.command(&Command::AddService(service(n), spec("rr")), false));
    }
    let change = w.model.apply(&Command::AddService(service(99), spec("rr")), &Host).unwrap();
    let error = w.planner.change(&w.model, &change, w.now_ms).unwrap_err();
    assert_eq!(error.to_string(), "no room for another service: rvsd was started for 8");
    w.model.revert(change);
    w.check();
    // The room of one that left is used again after the grace period.
    assert!(w.command(&Command::DelService(service(3)), false));
    assert!(w.command(&Command::AddService(service(99), spec("mh")), false));
    w.check();
}

#[test]
fn local_addresses_open_and_close_services() {
    let mut w = World::new();
    assert!(w.command(&Command::AddService(service(0), spec("rr")), false));
    let flags = |w: &World| w.maps.services[&0].flags & service_flag::LOCAL;
    assert_eq!(flags(&w), 0);
    for (locals, expected) in [(vec![IpAddr::from([192, 0, 2, 1])], service_flag::LOCAL), (vec![], 0)] {
        let step = w.planner.locals(locals.into_iter().collect());
        w.maps.apply(&step.ops);
        assert_eq!(flags(&w), expected);
    }
}
