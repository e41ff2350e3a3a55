use proptest::prelude::*;

use super::*;

/// A host with 127/8, 10.0.0.1 and fe80::1 of its own, 10.0.0.255 as a broadcast address, and eth0.
struct Host;

impl Env for Host {
    fn is_local(&self, addr: IpAddr) -> bool {
        addr.is_loopback() || addr == ip("10.0.0.1") || addr == ip("fe80::1")
    }

    fn is_broadcast(&self, addr: Ipv4Addr) -> bool {
        addr == Ipv4Addr::new(10, 0, 0, 255)
    }

    fn interface_mtu(&self, name: &str) -> Option<u32> {
        match name {
            "eth0" => Some(1500),
            "jumbo0" => Some(9000),
            _ => None,
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn tcp(addr: &str, port: u16) -> ServiceKey {
    ServiceKey::Virtual { proto: Proto::Tcp, addr: ip(addr), port }
}

fn spec(family: Family) -> ServiceSpec {
    ServiceSpec {
        scheduler: "wlc".into(),
        sched_flags: SchedFlags::NONE,
        persistence_s: None,
        granularity: Granularity::host(family),
        engine: None,
        one_packet: false,
    }
}

fn dest(addr: &str, port: u16, method: FwdMethod) -> Dest {
    Dest { key: DestKey { addr: ip(addr), port }, method, weight: 1, upper: 0, lower: 0 }
}

fn daemon(role: DaemonRole, interface: &str) -> DaemonSpec {
    DaemonSpec { role, interface: interface.into(), syncid: 0, maxlen: None, group: None, port: None, ttl: None }
}

const MASQ: FwdMethod = FwdMethod::Masq;
const TUNNEL: FwdMethod = FwdMethod::Tunnel(Tunnel::IPIP);

/// A model with one IPv4 service, 192.0.2.1:80.
fn with_service() -> (Model, ServiceKey) {
    let mut model = Model::new();
    let key = tcp("192.0.2.1", 80);
    model.apply(&Command::AddService(key, spec(Family::V4)), &Host).unwrap();
    (model, key)
}

fn refused(model: &mut Model, command: &Command) -> CommandError {
    let before = model.clone();
    let error = model.apply(command, &Host).expect_err(&format!("{command:?}"));
    assert_eq!(*model, before, "{command:?} changed something");
    error
}

#[test]
fn services_exist_once() {
    let (mut model, key) = with_service();
    let bad_name = ServiceSpec { scheduler: "nosuch".into(), ..spec(Family::V4) };
    // Whether the service is there comes before whether the scheduler is.
    assert_eq!(refused(&mut model, &Command::AddService(key, bad_name.clone())), CommandError::ServiceExists);
    let other = tcp("192.0.2.1", 81);
    let missing = refused(&mut model, &Command::EditService(other, bad_name.clone()));
    assert_eq!(missing, CommandError::NoSuchService);
    let unknown = refused(&mut model, &Command::AddService(other, bad_name));
    assert_eq!(unknown, CommandError::NoSuchScheduler("nosuch".into()));
    let engine = ServiceSpec { engine: Some("nosuch".into()), ..spec(Family::V4) };
    let unknown = refused(&mut model, &Command::EditService(key, engine));
    assert_eq!(unknown, CommandError::NoSuchEngine("nosuch".into()));
    assert_eq!(refused(&mut model, &Command::DelService(other)), CommandError::NoSuchService);
    assert_eq!(refused(&mut model, &Command::Zero(Some(other))), CommandError::NoSuchService);
}

#[test]
fn a_service_may_have_no_scheduler() {
    let (mut model, key) = with_service();
    let none = ServiceSpec { scheduler: "none".into(), ..spec(Family::V4) };
    model.apply(&Command::EditService(key, none), &Host).unwrap();
    assert_eq!(model.service(&key).unwrap().config.scheduler, None);
}

#[test]
fn granularity_fits_the_family() {
    let mut model = Model::new();
    let v6 = tcp("2001:db8::1", 80);
    for bad in [Granularity::V6(0), Granularity::V6(129), Granularity::V4(Ipv4Addr::BROADCAST)] {
        let command = Command::AddService(v6, ServiceSpec { granularity: bad, ..spec(Family::V6) });
        assert_eq!(refused(&mut model, &command), CommandError::BadGranularity);
    }
    let zero = ServiceKey::Fwmark { mark: 0, family: Family::V4 };
    assert_eq!(refused(&mut model, &Command::AddService(zero, spec(Family::V4))), CommandError::ZeroMark);
}

#[test]
fn dests_come_newest_first_and_edits_do_not_move_them() {
    let (mut model, key) = with_service();
    for addr in ["10.0.0.11", "10.0.0.12", "10.0.0.13"] {
        model.apply(&Command::AddDest(key, dest(addr, 80, MASQ)), &Host).unwrap();
    }
    let edited = Dest { weight: 7, ..dest("10.0.0.12", 80, MASQ) };
    let change = model.apply(&Command::EditDest(key, edited), &Host).unwrap();
    assert_eq!(change, Change::DestEdited { service: key, before: dest("10.0.0.12", 80, MASQ) });
    let order = |model: &Model| -> Vec<(String, u32)> {
        model.service(&key).unwrap().dests().map(|d| (d.key.addr.to_string(), d.weight)).collect()
    };
    let all = [("10.0.0.13".to_owned(), 1), ("10.0.0.12".to_owned(), 7), ("10.0.0.11".to_owned(), 1)];
    assert_eq!(order(&model), all);
    // Taken out and put back by revert it has its old place; added again it is the newest.
    let first = DestKey { addr: ip("10.0.0.11"), port: 80 };
    let change = model.apply(&Command::DelDest(key, first), &Host).unwrap();
    model.revert(change);
    assert_eq!(order(&model), all);
    model.apply(&Command::DelDest(key, first), &Host).unwrap();
    model.apply(&Command::AddDest(key, dest("10.0.0.11", 80, MASQ)), &Host).unwrap();
    assert_eq!(order(&model)[0].0, "10.0.0.11");
}

#[test]
fn dr_and_tun_have_the_services_port() {
    let (mut model, key) = with_service();
    let change = model.apply(&Command::AddDest(key, dest("10.0.0.11", 8080, FwdMethod::Route)), &Host).unwrap();
    assert_eq!(change, Change::DestAdded { service: key, dest: DestKey { addr: ip("10.0.0.11"), port: 80 } });
    let again = Command::AddDest(key, dest("10.0.0.11", 80, TUNNEL));
    assert_eq!(refused(&mut model, &again), CommandError::DestExists);
    // Deleting goes by the port that is there.
    let typed = DestKey { addr: ip("10.0.0.11"), port: 8080 };
    assert_eq!(refused(&mut model, &Command::DelDest(key, typed)), CommandError::NoSuchDest);
    let mark = ServiceKey::Fwmark { mark: 1, family: Family::V4 };
    model.apply(&Command::AddService(mark, spec(Family::V4)), &Host).unwrap();
    model.apply(&Command::AddDest(mark, dest("10.0.0.11", 8080, FwdMethod::Route)), &Host).unwrap();
    assert!(model.service(&mark).unwrap().dest(&typed).is_some(), "a mark has no port to force");
}

#[test]
fn dests_must_be_unicast_or_local() {
    let (mut model, key) = with_service();
    for addr in ["0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "10.0.0.255"] {
        let command = Command::AddDest(key, dest(addr, 80, MASQ));
        assert_eq!(refused(&mut model, &command), CommandError::NotUnicast(ip(addr)));
    }
    for addr in ["127.0.0.1", "10.0.0.1", "8.8.8.8"] {
        model.apply(&Command::AddDest(key, dest(addr, 80, MASQ)), &Host).unwrap();
    }
    let v6 = tcp("2001:db8::1", 80);
    model.apply(&Command::AddService(v6, spec(Family::V6)), &Host).unwrap();
    for addr in ["::", "ff02::1", "fe80::2", "::ffff:10.0.0.1"] {
        let command = Command::AddDest(v6, dest(addr, 80, MASQ));
        assert_eq!(refused(&mut model, &command), CommandError::NotUnicast(ip(addr)));
    }
    for addr in ["::1", "fe80::1", "fd00::1"] {
        model.apply(&Command::AddDest(v6, dest(addr, 80, MASQ)), &Host).unwrap();
    }
}

#[test]
fn dest_values_are_in_range() {
    let (mut model, key) = with_service();
    let good = dest("10.0.0.11", 80, MASQ);
    let cross = Dest { upper: 10, lower: 20, ..good };
    let error = CommandError::ThresholdsCross { lower: 20, upper: 10 };
    assert_eq!(refused(&mut model, &Command::AddDest(key, cross)), error);
    let heavy = Dest { weight: limits::WEIGHT_MAX + 1, ..good };
    assert_eq!(refused(&mut model, &Command::AddDest(key, heavy)), CommandError::WeightOutOfRange(2_147_483_648));
    let gue = FwdMethod::Tunnel(Tunnel { kind: TunnelKind::Gue, port: 0, checksum: TunnelChecksum::None });
    assert_eq!(
        refused(&mut model, &Command::AddDest(key, Dest { method: gue, ..good })),
        CommandError::TunnelWithoutPort
    );
    model.apply(&Command::AddDest(key, Dest { weight: limits::WEIGHT_MAX, ..good }), &Host).unwrap();
    // An edit is checked before the dest is looked for, as in the kernel.
    let missing = Dest { upper: 10, lower: 20, ..dest("10.0.0.99", 80, MASQ) };
    assert_eq!(refused(&mut model, &Command::EditDest(key, missing)), error);
}

#[test]
fn another_family_needs_a_tunnel_and_no_daemon() {
    let (mut model, key) = with_service();
    let v6 = "2001:db8::9";
    let direct = Command::AddDest(key, dest(v6, 80, FwdMethod::Route));
    assert_eq!(refused(&mut model, &direct), CommandError::MixedFamily);
    model.apply(&Command::StartDaemon(daemon(DaemonRole::Master, "eth0")), &Host).unwrap();
    let tunnel = Command::AddDest(key, dest(v6, 80, TUNNEL));
    assert_eq!(refused(&mut model, &tunnel), CommandError::MixedFamilyWithDaemon);
    model.apply(&Command::StopDaemon(DaemonRole::Master), &Host).unwrap();
    model.apply(&tunnel, &Host).unwrap();
    // Now the daemon can't start, whatever its interface, until the dest is gone.
    let start = Command::StartDaemon(daemon(DaemonRole::Backup, "nosuch0"));
    assert_eq!(refused(&mut model, &start), CommandError::MixedFamilyWithDaemon);
    model.apply(&Command::DelService(key), &Host).unwrap();
    assert_eq!(refused(&mut model, &start), CommandError::NoSuchInterface("nosuch0".into()));
}

#[test]
fn daemons_fill_in_the_kernels_defaults() {
    let mut model = Model::new();
    let started = |model: &mut Model, spec: DaemonSpec| {
        let role = spec.role;
        model.apply(&Command::StartDaemon(spec), &Host).unwrap();
        let running = model.daemon(role).unwrap().clone();
        model.apply(&Command::StopDaemon(role), &Host).unwrap();
        running
    };
    let plain = started(&mut model, daemon(DaemonRole::Master, "jumbo0"));
    let expected =
        SyncDaemon { interface: "jumbo0".into(), syncid: 0, maxlen: 1472, group: ip("224.0.0.81"), port: 8848, ttl: 1 };
    assert_eq!(plain, expected);
    let group = Some(ip("ff02::5"));
    let v6 = started(&mut model, DaemonSpec { group, ..daemon(DaemonRole::Master, "eth0") });
    assert_eq!(v6.maxlen, 1452);
    let backup = started(&mut model, daemon(DaemonRole::Backup, "jumbo0"));
    assert_eq!(backup.maxlen, 8972, "a backup takes what its interface can carry");
    let small = started(&mut model, DaemonSpec { maxlen: Some(5), ..daemon(DaemonRole::Backup, "eth0") });
    assert_eq!(small.maxlen, 1024);
    let unicast = DaemonSpec { group: Some(ip("10.0.0.5")), ..daemon(DaemonRole::Master, "eth0") };
    assert_eq!(refused(&mut model, &Command::StartDaemon(unicast)), CommandError::NotMulticast(ip("10.0.0.5")));
    assert_eq!(refused(&mut model, &Command::StopDaemon(DaemonRole::Master)), CommandError::NoDaemon);
    model.apply(&Command::StartDaemon(daemon(DaemonRole::Master, "eth0")), &Host).unwrap();
    let again = Command::StartDaemon(daemon(DaemonRole::Master, "eth0"));
    assert_eq!(refused(&mut model, &again), CommandError::DaemonRuns);
    // The interface is looked for first.
    let nowhere = Command::StartDaemon(daemon(DaemonRole::Master, "nosuch0"));
    assert_eq!(refused(&mut model, &nowhere), CommandError::NoSuchInterface("nosuch0".into()));
}

#[test]
fn timeouts_change_one_by_one_or_not_at_all() {
    let mut model = Model::new();
    let set = |tcp_s, tcp_fin_s, udp_s| Command::SetTimeouts(Timeouts { tcp_s, tcp_fin_s, udp_s });
    model.apply(&set(0, 5, 0), &Host).unwrap();
    assert_eq!(model.timeouts(), Timeouts { tcp_s: 900, tcp_fin_s: 5, udp_s: 300 });
    assert_eq!(refused(&mut model, &set(1, 1, u32::MAX)), CommandError::BadTimeout(u32::MAX));
}

#[test]
fn local_addresses_are_a_set() {
    let (mut model, key) = with_service();
    let add = Command::AddLocalAddress(key, ip("10.0.0.50"));
    let del = Command::DelLocalAddress(key, ip("10.0.0.50"));
    assert_eq!(refused(&mut model, &del), CommandError::NoSuchLocalAddress);
    model.apply(&add, &Host).unwrap();
    assert_eq!(refused(&mut model, &add), CommandError::LocalAddressExists);
    model.apply(&del, &Host).unwrap();
}

#[test]
fn cookies_are_for_tcp_and_for_replies_that_come_by() {
    let (mut model, key) = with_service();
    let cookies = Defence { cookies_above: Some(0), rate: 5, source_rate: 0 };
    model.apply(&Command::Defend(key, cookies), &Host).unwrap();
    assert_eq!(model.service(&key).unwrap().defence, cookies);
    let udp = ServiceKey::Virtual { proto: Proto::Udp, addr: ip("192.0.2.1"), port: 53 };
    assert_eq!(refused(&mut model, &Command::Defend(udp, cookies)), CommandError::NoSuchService);
    model.apply(&Command::AddService(udp, spec(Family::V4)), &Host).unwrap();
    assert_eq!(refused(&mut model, &Command::Defend(udp, cookies)), CommandError::CookiesNotTcp);
    model.apply(&Command::Defend(udp, Defence { cookies_above: None, ..cookies }), &Host).unwrap();
    model.apply(&Command::Defend(key, Defence::default()), &Host).unwrap();
    let direct = dest("10.0.0.7", 80, FwdMethod::Route);
    model.apply(&Command::AddDest(key, direct), &Host).unwrap();
    assert_eq!(refused(&mut model, &Command::Defend(key, cookies)), CommandError::CookiesOneWay(direct.key.addr));
}

#[test]
fn proxy_headers_are_for_tcp_and_for_replies_that_come_by() {
    let (mut model, key) = with_service();
    let udp = ServiceKey::Virtual { proto: Proto::Udp, addr: ip("192.0.2.1"), port: 53 };
    assert_eq!(refused(&mut model, &Command::Proxy(udp, true)), CommandError::NoSuchService);
    model.apply(&Command::AddService(udp, spec(Family::V4)), &Host).unwrap();
    assert_eq!(refused(&mut model, &Command::Proxy(udp, true)), CommandError::ProxyNotTcp);
    model.apply(&Command::Proxy(udp, false), &Host).unwrap();
    // A real server by another method keeps them off ...
    let [direct, nat] = [FwdMethod::Route, FwdMethod::Masq].map(|method| dest("10.0.0.7", 80, method));
    let one_way = CommandError::ProxyOneWay(direct.key.addr);
    model.apply(&Command::AddDest(key, direct), &Host).unwrap();
    assert_eq!(refused(&mut model, &Command::Proxy(key, true)), one_way);
    // ... and they keep it out.
    model.apply(&Command::EditDest(key, nat), &Host).unwrap();
    model.apply(&Command::Proxy(key, true), &Host).unwrap();
    assert!(model.service(&key).unwrap().proxy);
    assert_eq!(refused(&mut model, &Command::EditDest(key, direct)), one_way);
    model.apply(&Command::DelDest(key, nat.key), &Host).unwrap();
    assert_eq!(refused(&mut model, &Command::AddDest(key, direct)), one_way);
    model.apply(&Command::Proxy(key, false), &Host).unwrap();
    model.apply(&Command::AddDest(key, direct), &Host).unwrap();
}

/// Few keys, so that commands meet each other.
fn any_key() -> impl Strategy<Value = ServiceKey> {
    prop_oneof![
        (0_u16..3, prop_oneof![Just(Proto::Tcp), Just(Proto::Udp)]).prop_map(|(port, proto)| ServiceKey::Virtual {
            proto,
            addr: ip("192.0.2.1"),
            port
        }),
        (80_u16..82).prop_map(|port| tcp("2001:db8::1", port)),
        (0_u32..2, prop_oneof![Just(Family::V4), Just(Family::V6)])
            .prop_map(|(mark, family)| ServiceKey::Fwmark { mark, family }),
    ]
}

fn any_spec(family: Family) -> impl Strategy<Value = ServiceSpec> {
    let names = prop_oneof![Just("rr"), Just("wlc"), Just("mh"), Just("none"), Just("nosuch")];
    let engine = prop_oneof![3 => Just(None), 1 => Just(Some("sip".to_owned())), 1 => Just(Some("x".to_owned()))];
    (names, 0_u8..8, proptest::option::of(1_u32..100), engine, any::<bool>()).prop_map(
        move |(scheduler, flags, persistence_s, engine, one_packet)| ServiceSpec {
            scheduler: scheduler.into(),
            sched_flags: SchedFlags::from_bits(flags).unwrap(),
            persistence_s,
            granularity: Granularity::host(family),
            engine,
            one_packet,
        },
    )
}

fn any_dest() -> impl Strategy<Value = Dest> {
    let addr = prop_oneof![Just("10.0.0.11"), Just("10.0.0.12"), Just("224.0.0.1"), Just("fd00::1"), Just("fe80::5")];
    let method = prop_oneof![Just(MASQ), Just(FwdMethod::Route), Just(TUNNEL), Just(FwdMethod::Fullnat)];
    (addr, 0_u16..3, method, 0_u32..3, 0_u32..4, 0_u32..3).prop_map(|(addr, port, method, weight, upper, lower)| Dest {
        weight,
        upper,
        lower,
        ..dest(addr, port, method)
    })
}

fn any_command() -> impl Strategy<Value = Command> {
    let role = || prop_oneof![Just(DaemonRole::Master), Just(DaemonRole::Backup)];
    let interface = prop_oneof![Just("eth0"), Just("nosuch0")];
    let service = || any_key().prop_flat_map(|key| (Just(key), any_spec(key.family())));
    let pool = || prop_oneof![Just(ip("10.0.0.50")), Just(ip("224.0.0.1"))];
    prop_oneof![
        4 => service().prop_map(|(key, spec)| Command::AddService(key, spec)),
        2 => service().prop_map(|(key, spec)| Command::EditService(key, spec)),
        1 => any_key().prop_map(Command::DelService),
        6 => (any_key(), any_dest()).prop_map(|(key, dest)| Command::AddDest(key, dest)),
        2 => (any_key(), any_dest()).prop_map(|(key, dest)| Command::EditDest(key, dest)),
        2 => (any_key(), any_dest()).prop_map(|(key, dest)| Command::DelDest(key, dest.key)),
        1 => Just(Command::Flush),
        1 => proptest::option::of(any_key()).prop_map(Command::Zero),
        1 => (0_u32..4, 0_u32..4, prop_oneof![Just(0_u32), Just(5), Just(u32::MAX)])
            .prop_map(|(tcp_s, tcp_fin_s, udp_s)| Command::SetTimeouts(Timeouts { tcp_s, tcp_fin_s, udp_s })),
        1 => (role(), interface).prop_map(|(role, interface)| Command::StartDaemon(daemon(role, interface))),
        1 => role().prop_map(Command::StopDaemon),
        1 => (any_key(), pool()).prop_map(|(key, addr)| Command::AddLocalAddress(key, addr)),
        1 => (any_key(), pool()).prop_map(|(key, addr)| Command::DelLocalAddress(key, addr)),
        1 => (any_key(), proptest::option::of(0..9u32), 0..9u32)
            .prop_map(|(key, cookies_above, rate)| Command::Defend(key, Defence { cookies_above, rate, source_rate: 0 })),
        1 => (any_key(), any::<bool>()).prop_map(|(key, on)| Command::Proxy(key, on)),
    ]
}

/// The model without its counter of numbers, which a revert does not set back.
fn without_counter(model: &Model) -> Model {
    Model { next: 0, ..model.clone() }
}

fn check_invariants(model: &Model) {
    let dests: Vec<(&ServiceKey, &Dest)> =
        model.services().flat_map(|(key, service)| service.dests().map(move |d| (key, d))).collect();
    assert_eq!(model.dest_count(), dests.len());
    assert_eq!(model.mixed_count, dests.iter().filter(|(key, d)| is_mixed(key, d)).count());
    assert_eq!(model.services_by_age().count(), model.service_count());
    for (key, service) in model.services() {
        assert_eq!(service.dests().count(), service.dest_count());
        for dest in service.dests() {
            assert_eq!(service.dest(&dest.key), Some(dest));
            assert!(dest.lower <= dest.upper);
            if let ServiceKey::Virtual { port, .. } = key
                && dest.method.keeps_port()
            {
                assert_eq!(dest.key.port, *port);
            }
        }
    }
    let daemons = model.master.is_some() || model.backup.is_some();
    assert!(!(daemons && model.mixed_count > 0));
}

proptest! {
    #[test]
    fn any_sequence_keeps_the_invariants(commands in proptest::collection::vec(any_command(), 1..60)) {
        let mut model = Model::new();
        for command in &commands {
            let before = model.clone();
            match model.apply(command, &Host) {
                Err(_) => prop_assert_eq!(&model, &before),
                Ok(change) => {
                    check_invariants(&model);
                    let mut undone = model.clone();
                    undone.revert(change);
                    check_invariants(&undone);
                    prop_assert_eq!(without_counter(&undone), without_counter(&before));
                }
            }
        }
    }
}
