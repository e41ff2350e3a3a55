use std::net::Ipv6Addr;

use proptest::prelude::*;

use super::*;
use crate::{limits, model};

fn encoded<T: Serialize>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    encode(value, &mut out).unwrap();
    assert_eq!(out.pop(), Some(b'\n'));
    assert!(!out.contains(&b'\n'), "a value is one line");
    out
}

fn longest_v6() -> IpAddr {
    IpAddr::V6(Ipv6Addr::from([0xffff; 8]))
}

fn some_service() -> ServiceId {
    ServiceId::Virtual { proto: Proto::Tcp, addr: "192.0.2.1".parse().unwrap(), port: 80 }
}

fn some_spec() -> ServiceSpec {
    ServiceSpec {
        scheduler: "wlc".into(),
        sched_flags: 3,
        persistence_s: Some(360),
        granularity: Granularity::Netmask(Ipv4Addr::BROADCAST),
        engine: Some("sip".into()),
        one_packet: true,
    }
}

fn some_dest() -> DestSpec {
    DestSpec {
        id: DestId { addr: "10.0.0.1".parse().unwrap(), port: 80 },
        forward: Forward::Tunnel { kind: TunnelKind::Gue, port: 6080, checksum: TunnelChecksum::Remcsum },
        weight: 1,
        upper: 10,
        lower: 5,
    }
}

fn commands() -> Vec<Command> {
    let service = some_service();
    let mark = ServiceId::Fwmark { mark: 7, family: Family::V6 };
    let addr = "10.0.0.9".parse().unwrap();
    vec![
        Command::AddService { service, spec: some_spec() },
        Command::EditService {
            service: mark,
            spec: ServiceSpec { granularity: Granularity::PrefixLen(64), ..some_spec() },
        },
        Command::DelService { service },
        Command::AddDest { service, dest: some_dest() },
        Command::EditDest { service, dest: DestSpec { forward: Forward::Masq, ..some_dest() } },
        Command::DelDest { service, dest: some_dest().id },
        Command::Flush,
        Command::Zero { service: None },
        Command::SetTimeouts(Timeouts { tcp_s: 1, tcp_fin_s: 2, udp_s: 3 }),
        Command::Set { name: "drop_entry".into(), value: 3 },
        Command::StartDaemon(DaemonSpec {
            role: DaemonRole::Backup,
            interface: "eth0".into(),
            syncid: 9,
            maxlen: Some(1400),
            group: Some("ff02::5".parse().unwrap()),
            port: Some(8849),
            ttl: Some(3),
        }),
        Command::StopDaemon { role: DaemonRole::Master },
        Command::AddLocalAddress { service, addr },
        Command::DelLocalAddress { service, addr },
        Command::Defend { service, defence: Defence { cookies_above: Some(5), rate: 6, source_rate: 7 } },
        Command::Proxy { service, on: true },
    ]
}

#[test]
fn requests_come_back_as_they_were() {
    let mut bodies: Vec<RequestBody> = commands().into_iter().map(RequestBody::Command).collect();
    bodies.extend([
        RequestBody::List(Filter::All),
        RequestBody::List(Filter::One(some_service())),
        RequestBody::Connections,
        RequestBody::Timeouts,
        RequestBody::Settings,
        RequestBody::Daemons,
        RequestBody::Drops,
        RequestBody::Stats,
        RequestBody::LocalAddresses(None),
        RequestBody::Status,
        RequestBody::Why(vec![Probe {
            proto: ProbeProto::Icmp,
            from: (longest_v6(), 0),
            to: (longest_v6(), 0),
            flags: 0,
            interface: Some("eth0".into()),
        }]),
        RequestBody::Trace("tcp port 80 and dropped".into()),
    ]);
    for body in bodies {
        let request = Request::new(7, body);
        assert_eq!(decode_request(&encoded(&request)).unwrap(), request);
    }
}

/// What is on the wire today. If this has to change, [`VERSION`] has to.
#[test]
fn the_wire_format_is_pinned() {
    assert_eq!(VERSION, 1);
    let request =
        Request::new(1, RequestBody::Command(Command::AddDest { service: some_service(), dest: some_dest() }));
    let wire = r#"{"version":1,"id":1,"body":{"command":{"add_dest":{"service":{"virtual":{"proto":"tcp","addr":"192.0.2.1","port":80}},"dest":{"id":{"addr":"10.0.0.1","port":80},"forward":{"tunnel":{"kind":"gue","port":6080,"checksum":"remcsum"}},"weight":1,"upper":10,"lower":5}}}}}"#;
    assert_eq!(String::from_utf8(encoded(&request)).unwrap(), wire);
    let response = Response { id: 1, last: true, body: ResponseBody::Done };
    assert_eq!(String::from_utf8(encoded(&response)).unwrap(), r#"{"id":1,"last":true,"body":"done"}"#);
}

#[test]
fn a_full_chunk_of_the_largest_rows_fits_a_response_line() {
    let counters =
        Stats { conns: u64::MAX, in_pkts: u64::MAX, out_pkts: u64::MAX, in_bytes: u64::MAX, out_bytes: u64::MAX };
    let rates =
        Rates { conns: u64::MAX, in_pkts: u64::MAX, out_pkts: u64::MAX, in_bytes: u64::MAX, out_bytes: u64::MAX };
    let service = ListRow::Service(ServiceRow {
        id: ServiceId::Virtual { proto: Proto::Sctp, addr: longest_v6(), port: 65535 },
        spec: ServiceSpec {
            scheduler: "s".repeat(limits::SCHED_NAME_BYTES_MAX),
            sched_flags: 7,
            persistence_s: Some(u32::MAX),
            granularity: Granularity::Netmask(Ipv4Addr::BROADCAST),
            engine: Some("e".repeat(limits::ENGINE_NAME_BYTES_MAX)),
            one_packet: false,
        },
        stats: counters,
        rates,
    });
    let end = (longest_v6(), 65535);
    let conn = ConnRow {
        proto: 255,
        template: false,
        state: 255,
        expires_s: u32::MAX,
        client: end,
        virt: end,
        dest: end,
        origin: ConnOrigin::Local,
        // Control characters take six bytes each in JSON.
        engine: Some(EngineData {
            name: "e".repeat(limits::ENGINE_NAME_BYTES_MAX),
            data: "\u{1}".repeat(limits::ENGINE_DATA_BYTES_MAX),
        }),
    };
    let bodies = [
        ResponseBody::List(vec![service; limits::ROWS_PER_CHUNK]),
        ResponseBody::Connections(vec![conn; limits::ROWS_PER_CHUNK]),
        ResponseBody::Stats(Box::new(StatsReport {
            total: counters,
            rates,
            cpus: vec![CpuStats { cpu: u32::MAX, stats: counters }; limits::CPUS_MAX],
        })),
    ];
    for body in bodies {
        let response = Response { id: u64::MAX, last: false, body };
        let line = encoded(&response);
        assert!(line.len() <= limits::RESPONSE_BYTES_MAX, "{} bytes", line.len());
        assert_eq!(decode_response(&line).unwrap(), response);
    }
}

#[test]
fn commands_become_the_models_and_bounds_hold() {
    for command in commands() {
        model::Command::try_from(command).unwrap();
    }
    let service = some_service();
    let with = |spec: ServiceSpec| model::Command::try_from(Command::AddService { service, spec });
    let long = with(ServiceSpec { scheduler: "x".repeat(17), ..some_spec() });
    assert_eq!(long, Err(BadCommand::TooLong { what: "scheduler", bytes: 17, max: 16 }));
    let control = with(ServiceSpec { engine: Some("si\x1bp".into()), ..some_spec() });
    assert_eq!(control, Err(BadCommand::BadText { what: "persistence engine" }));
    assert_eq!(with(ServiceSpec { sched_flags: 8, ..some_spec() }), Err(BadCommand::SchedFlags(8)));
}

#[test]
fn model_values_survive_the_way_out_and_in() {
    for command in commands() {
        let Command::AddDest { service, dest } = &command else { continue };
        let inside = model::Dest::from(*dest);
        assert_eq!(DestSpec::from(&inside), *dest);
        assert_eq!(ServiceId::from(model::ServiceKey::from(*service)), *service);
    }
}

#[test]
fn garbage_is_an_error_not_a_panic() {
    for line in [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"{\"version\":1,\"id\":1}",
        b"{\"version\":1,\"id\":-1,\"body\":\"status\"}",
        b"{\"version\":1,\"id\":1,\"body\":\"nosuch\"}",
        b"{\"version\":1,\"id\":1,\"body\":\"status\",\"more\":1}",
        b"\xff\xfe",
    ] {
        assert!(decode_request(line).is_err(), "{line:?}");
    }
    let deep = [b"{\"body\":".repeat(5000), b"1".to_vec(), b"}".repeat(5000)].concat();
    assert!(decode_request(&deep).is_err());
}

#[test]
fn answers_are_cut_into_chunks() {
    let sizes = |rows: usize| -> Vec<(usize, bool)> {
        let row = DropRow { reason: "r".into(), packets: 1 };
        let lines = in_chunks(3, vec![row; rows].into_iter(), ResponseBody::Drops);
        lines
            .map(|line| match line.body {
                ResponseBody::Drops(rows) => (rows.len(), line.last),
                other => panic!("{other:?}"),
            })
            .collect()
    };
    let chunk = limits::ROWS_PER_CHUNK;
    assert_eq!(sizes(0), [(0, true)]);
    assert_eq!(sizes(1), [(1, true)]);
    assert_eq!(sizes(chunk), [(chunk, true)]);
    assert_eq!(sizes(chunk + 1), [(chunk, false), (1, true)]);
    assert_eq!(sizes(2 * chunk), [(chunk, false), (chunk, true)]);
}

struct ByWeight;

impl Counters for ByWeight {
    fn service(&self, service: &model::ServiceKey) -> (Stats, Rates) {
        let conns = if service.family() == model::Family::V6 { 6 } else { 4 };
        (Stats { conns, ..Stats::default() }, Rates::default())
    }

    fn dest(&self, _: &model::ServiceKey, dest: &model::DestKey) -> DestCounters {
        DestCounters { active: u32::from(dest.port), ..DestCounters::default() }
    }
}

struct Anywhere;

impl model::Env for Anywhere {
    fn is_local(&self, _: IpAddr) -> bool {
        true
    }

    fn is_broadcast(&self, _: Ipv4Addr) -> bool {
        false
    }

    fn interface_mtu(&self, _: &str) -> Option<u32> {
        Some(1500)
    }
}

#[test]
fn listings_have_services_by_age_and_dests_newest_first() {
    let v6 = ServiceId::Virtual { proto: Proto::Udp, addr: "2001:db8::1".parse().unwrap(), port: 53 };
    let v4 = some_service();
    let dest = |port| DestSpec {
        id: DestId { addr: "10.0.0.1".parse().unwrap(), port },
        forward: Forward::Masq,
        ..some_dest()
    };
    let mut model = model::Model::new();
    let spec6 = ServiceSpec { granularity: Granularity::PrefixLen(128), ..some_spec() };
    let daemon = commands().into_iter().find(|c| matches!(c, Command::StartDaemon(_))).unwrap();
    let local = "10.0.0.9".parse().unwrap();
    for command in [
        Command::AddService { service: v6, spec: spec6.clone() },
        Command::AddService { service: v4, spec: some_spec() },
        Command::AddDest { service: v4, dest: dest(1) },
        Command::AddDest { service: v4, dest: dest(2) },
        Command::AddLocalAddress { service: v4, addr: local },
        daemon,
    ] {
        model.apply(&command.try_into().unwrap(), &Anywhere).unwrap();
    }
    let shown = |filter| -> Vec<String> {
        list(&model, &filter, &ByWeight)
            .unwrap()
            .map(|row| match row {
                ListRow::Service(row) => format!("{:?} {}", row.id.family(), row.stats.conns),
                ListRow::Dest(row) => format!("{} {}", row.dest.id.port, row.active),
            })
            .collect()
    };
    assert_eq!(shown(Filter::All), ["V6 6", "V4 4", "2 2", "1 1"]);
    assert_eq!(shown(Filter::One(v6)), ["V6 6"]);
    let missing = Filter::One(ServiceId::Fwmark { mark: 1, family: Family::V4 });
    assert_eq!(list(&model, &missing, &ByWeight).err().unwrap().code, Code::NoSuchService);
    assert_eq!(daemons(&model).len(), 1);
    assert_eq!(local_addresses(&model, None).collect::<Vec<_>>(), [LocalAddressRow { service: v4, addr: local }]);
    assert_eq!(local_addresses(&model, Some(v6.into())).count(), 0);
}

#[test]
fn another_version_is_refused_by_value() {
    let mut request = Request::new(1, RequestBody::Status);
    assert_eq!(request.check_version(), Ok(()));
    request.version += 1;
    let request = decode_request(&encoded(&request)).unwrap();
    assert_eq!(request.check_version().unwrap_err().code, Code::BadVersion);
    let answer = Response::to_garbage(&decode_request(b"{").unwrap_err());
    assert!(matches!(answer.body, ResponseBody::Refused(Refusal { code: Code::BadRequest, .. })));
}

#[test]
fn states_have_the_kernels_names() {
    assert_eq!(conn_state_name(6, false, 1), "ESTABLISHED");
    assert_eq!(conn_state_name(6, false, 10), "SYNACK");
    assert_eq!(conn_state_name(6, false, 11), "ERR!");
    assert_eq!(conn_state_name(17, false, 0), "UDP");
    assert_eq!(conn_state_name(0, true, 1), "ASSURED");
    assert_eq!(conn_state_name(132, false, 8), "ESTABLISHED");
}

/// The lines a decoder gives when it is fed these pieces, and whether it ended with an error.
fn decode(pieces: &[&[u8]], max: usize) -> (Vec<Vec<u8>>, bool) {
    let mut decoder = LineDecoder::new(max);
    let mut lines = Vec::new();
    let mut failed = false;
    for piece in pieces {
        failed = decoder.feed(piece).is_err();
        while let Some(line) = decoder.next_line() {
            lines.push(line);
        }
    }
    (lines, failed)
}

#[test]
fn lines_are_cut_at_newlines_and_bounded() {
    assert_eq!(decode(&[b"ab", b"c\nd\n\ne"], 3), (vec![b"abc".to_vec(), b"d".to_vec(), Vec::new()], false));
    assert_eq!(decode(&[b"abcd"], 3), (Vec::new(), true));
    assert_eq!(decode(&[b"abc", b"d\nx\n"], 3), (Vec::new(), true));
    assert_eq!(decode(&[b"a\nbcdefg\nh\n", b"i\n"], 3), (vec![b"a".to_vec()], true));
    let mut decoder = LineDecoder::new(3);
    decoder.feed(b"ab").unwrap();
    assert!(decoder.has_partial());
    assert_eq!(decoder.feed(b"cdef"), Err(FrameError::TooLong { max: 3 }));
    assert_eq!(decoder.feed(b"\n"), Err(FrameError::TooLong { max: 3 }));
    assert_eq!(decoder.next_line(), None);
}

proptest! {
    #[test]
    fn where_a_stream_is_cut_does_not_matter(
        bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'a'), any::<u8>()], 0..200),
        cuts in proptest::collection::vec(0_usize..200, 0..8),
        max in 0_usize..40,
    ) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
        let whole = decode(&[&bytes], max);
        prop_assert_eq!(decode(&pieces, max), whole.clone());
        prop_assert!(whole.0.iter().all(|line| line.len() <= max && !line.contains(&b'\n')));
    }

    #[test]
    fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode_request(&bytes);
        let _ = decode_response(&bytes);
    }

    /// Near misses: a good request with some bytes replaced.
    #[test]
    fn damaged_requests_decode_or_fail(
        which in 0_usize..13,
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4),
    ) {
        let mut bytes = encoded(&Request::new(1, RequestBody::Command(commands()[which].clone())));
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(Request { body: RequestBody::Command(command), .. }) = decode_request(&bytes) {
            let _ = model::Command::try_from(command);
        }
    }
}

/// Frames are in hexadecimal digits; anything else is an error.
#[test]
fn frames_come_back_as_they_were() {
    let frame = Frame((0..=255).collect());
    let text = serde_json::to_string(&frame).unwrap();
    assert!(text.starts_with("\"000102") && text.ends_with("fdfeff\""), "{text}");
    assert_eq!(serde_json::from_str::<Frame>(&text).unwrap(), frame);
    for wrong in ["\"0\"", "\"0g\"", "\"+1\"", "\"\u{e9}\"", "1"] {
        assert!(serde_json::from_str::<Frame>(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_full_line_of_traced_packets_fits_a_response_line() {
    let row = TracedRow {
        at_ns: u64::MAX,
        interface: "i".repeat(limits::INTERFACE_NAME_BYTES_MAX),
        outcome: Outcome::Forwarded,
        reason: "r".repeat(32),
        out: Some("o".repeat(limits::INTERFACE_NAME_BYTES_MAX)),
        service: Some(ServiceId::Virtual { proto: Proto::Sctp, addr: longest_v6(), port: 65535 }),
        dest: Some(DestId { addr: longest_v6(), port: 65535 }),
        len: u32::MAX,
        bytes: Frame(vec![0xff; rvs_datapath::abi::TRACE_BYTES]),
    };
    let packets = vec![row; limits::TRACED_PER_LINE];
    let line = encoded(&Response { id: u64::MAX, last: false, body: ResponseBody::Traced { packets, lost: u64::MAX } });
    assert!(line.len() <= limits::RESPONSE_BYTES_MAX, "{} bytes", line.len());
}
