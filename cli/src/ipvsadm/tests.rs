//! What the recordings don't show: messages of rarer mistakes, columns that overflow, very large counters.

use std::net::{IpAddr, Ipv4Addr};

use rvs_control::api::{
    ConnOrigin, ConnRow, DestId, DestRow, DestSpec, EngineData, Family, Forward, Granularity, Proto, Rates,
    ServiceSpec, TunnelChecksum, TunnelKind,
};

use super::*;

struct Names;

impl Resolver for Names {
    fn host_to_v4(&mut self, name: &str) -> Option<Ipv4Addr> {
        (name == "www.example.org").then_some(Ipv4Addr::new(192, 0, 2, 80))
    }

    fn addr_to_host(&mut self, addr: IpAddr) -> Option<String> {
        match addr {
            IpAddr::V4(v4) if v4.octets()[3] == 80 => Some("www.example.org".into()),
            IpAddr::V4(v4) if v4.octets()[3] == 99 => Some(format!("{}.example.org", "long".repeat(20))),
            // Not to be asked for.
            IpAddr::V6(_) => Some("six.example.org".into()),
            IpAddr::V4(_) => None,
        }
    }

    fn service_to_port(&mut self, name: &str, proto: u8) -> Option<u16> {
        (name == "http" && proto == 6).then_some(80)
    }

    fn port_to_service(&mut self, port: u16, proto: u8) -> Option<String> {
        (port == 80 && proto == 6).then(|| "http".into())
    }
}

fn read(line: &str) -> Result<Action, Fail> {
    let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
    meaning(&LowArgs::split(&args), "ipvsadm", &mut Names)
}

fn command(line: &str) -> Command {
    match read(line) {
        Ok(Action::Command(command)) => command,
        other => panic!("{line}: {other:?}"),
    }
}

fn fails(line: &str) -> (String, u8) {
    match read(line) {
        Err(fail) => (fail.message, fail.exit),
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn names_are_looked_up_for_the_protocol() {
    let service = |proto| ServiceId::Virtual { proto, addr: "192.0.2.80".parse().unwrap(), port: 80 };
    assert_eq!(command("-D -t www.example.org:http"), Command::DelService { service: service(Proto::Tcp) });
    assert_eq!(command("-D -u www.example.org:80"), Command::DelService { service: service(Proto::Udp) });
    let illegal = "illegal virtual server address[:port] specified";
    for bad in [
        "-D -u www.example.org:http",
        "-D -t nosuch:80",
        "-D -t 80",
        "-D -t [2001:db8::1]",
        "-D -t [::1",
        "-D -t ::1]:80",
    ] {
        assert_eq!(fails(bad), (illegal.into(), 2), "{bad}");
    }
}

#[test]
fn a_server_takes_the_port_of_a_service_typed_before_it() {
    let dest = |line: &str| match command(line) {
        Command::AddDest { dest, .. } => dest.id.port,
        other => panic!("{other:?}"),
    };
    assert_eq!(dest("-a -t 192.0.2.1:80 -r 10.0.0.1 -m"), 80);
    assert_eq!(dest("-a -t 192.0.2.1:80 -r 10.0.0.1:8080 -m"), 8080);
    assert_eq!(dest("-a -t 192.0.2.1:80 -r 10.0.0.1:http -m"), 80);
    assert_eq!(dest("-a -r 10.0.0.1 -t 192.0.2.1:80 -m"), 0, "as in the original");
    assert_eq!(dest("-a -t 192.0.2.1:80 -r 10.0.0.1:8080 -g"), 80);
    assert_eq!(dest("-a -f 1 -r 10.0.0.1:8080 -g"), 8080);
}

#[test]
fn tunnel_options_follow_their_table() {
    let add = "-a -t 192.0.2.1:80 -r 10.0.0.1";
    let says = |rest: &str| fails(&format!("{add} {rest}"));
    assert_eq!(says("-m --tun-type gue --tun-port 1").0, "Tunnel options conflict with forward method");
    assert_eq!(says("-i --tun-type gue").0, "You need to supply the 'tun-port' option for the 'gue' tunnel type");
    assert_eq!(says("-i --tun-port 6080").0, "Illegal 'tun-port' option with the 'ipip' tunnel type");
    assert_eq!(
        says("-i --tun-type gre --tun-csum --tun-nocsum").0,
        "The option 'tun-csum' conflicts with the 'tun-nocsum' option in the 'gre' tunnel type"
    );
    assert_eq!(says("-i --tun-type gre --tun-remcsum").0, "Illegal 'tun-remcsum' option with the 'gre' tunnel type");
    assert_eq!(says("-i --tun-type vxlan"), ("illegal tunnel type specified".into(), 2));
    assert_eq!(says("-i --tun-type gue --tun-port 0"), ("illegal tunnel port specified".into(), 2));
    let gue = Forward::Tunnel { kind: TunnelKind::Gue, port: 6080, checksum: TunnelChecksum::Csum };
    let Command::AddDest { dest, .. } = command(&format!("{add} -i --tun-type gue --tun-port 6080 --tun-csum")) else {
        panic!()
    };
    assert_eq!(dest.forward, gue);
}

#[test]
fn a_mark_of_the_other_family_resets_the_mask() {
    let spec = |line: &str| match command(line) {
        Command::AddService { spec, .. } => spec.granularity,
        other => panic!("{other:?}"),
    };
    assert_eq!(spec("-A -f 1 -6 -p 5 -M 64"), Granularity::PrefixLen(64));
    assert_eq!(spec("-A -f 1 -M 255.0.0.0 -6 -p"), Granularity::PrefixLen(128));
    assert_eq!(spec("-A -M 255.0.0.0 -t 192.0.2.1:80"), Granularity::Netmask(Ipv4Addr::new(255, 0, 0, 0)));
    assert_eq!(spec("-A -M 255.0.0.0 -t [2001:db8::1]:80"), Granularity::PrefixLen(128));
}

#[test]
fn scheduler_flags_need_their_scheduler_first() {
    assert_eq!(fails("-A -t 192.0.2.1:80 -b mh-port").0, "incompatible scheduler flag `mh-port'");
    assert_eq!(fails("-A -t 192.0.2.1:80 -b sh-port -s sh").0, "incompatible scheduler flag `sh-port'");
    let Command::AddService { spec, .. } = command("-A -t 192.0.2.1:80 -s mh -b mh-port,,flag-3") else { panic!() };
    assert_eq!(spec.sched_flags, 6);
}

#[test]
fn long_names_are_cut_to_what_the_kernel_has_room_for() {
    let Command::AddService { spec, .. } = command("-A -t 192.0.2.1:80 -s aaaaaaaaaaaaaaaaaaaaaaaa") else { panic!() };
    assert_eq!(spec.scheduler, "a".repeat(16));
    let Command::StartDaemon(spec) = command("--start-daemon master --mcast-interface bbbbbbbbbbbbbbbbbbbbbbbb") else {
        panic!()
    };
    assert_eq!(spec.interface, "b".repeat(15));
}

#[test]
fn zero_takes_one_service_or_all() {
    assert_eq!(command("-Z"), Command::Zero { service: None });
    let service = Some(ServiceId::Fwmark { mark: 3, family: Family::V6 });
    assert_eq!(command("-Z -f 3 -6"), Command::Zero { service });
}

fn plain() -> Format {
    Format { numeric: true, ..Format::default() }
}

fn row(id: ServiceId, scheduler: &str) -> ServiceRow {
    let spec = ServiceSpec {
        scheduler: scheduler.into(),
        sched_flags: 0,
        persistence_s: None,
        granularity: Granularity::PrefixLen(128),
        engine: None,
        one_packet: false,
    };
    let stats = rvs_control::api::Stats { conns: 1_234_567_890_123, in_pkts: 100_000_000, ..Default::default() };
    ServiceRow { id, spec, stats, rates: Rates { in_bytes: 999_999_999, ..Default::default() } }
}

fn dest_row(addr: &str) -> DestRow {
    let id = DestId { addr: addr.parse().unwrap(), port: 65535 };
    DestRow {
        dest: DestSpec { id, forward: Forward::Local, weight: 100_000_000, upper: u32::MAX, lower: 0 },
        active: u32::MAX,
        inactive: 1,
        persistent: 12,
        stats: rvs_control::api::Stats { out_bytes: u64::MAX, ..Default::default() },
        rates: Rates { conns: 5, ..Default::default() },
    }
}

fn listed(id: ServiceId, dest: &str, format: Format) -> String {
    render::service(&row(id, "rr"), &[dest_row(dest)], format, &mut Names)
}

const LONG_V6: &str = "2001:db8:1111:2222:3333:4444:5555:6666";

#[test]
fn long_ipv6_entries_push_the_columns() {
    let id = ServiceId::Virtual { proto: Proto::Tcp, addr: LONG_V6.parse().unwrap(), port: 65535 };
    assert_eq!(
        listed(id, LONG_V6, plain()),
        "TCP  [2001:db8:1111:2222:3333:4444:5555:6666]:65535 rr\n  \
         -> [2001:db8:1111:2222:3333:4444:5555:6666]:65535 Local   100000000 4294967295 1         \n"
    );
    let stats = Format { columns: Columns::Stats, ..plain() };
    assert_eq!(
        listed(id, LONG_V6, stats),
        "TCP  [2001:db8:1111:2222:3333:4444:5555:6666]:65535    1234G  100000K        0        0        0\n  \
         -> [2001:db8:1111:2222:3333:4444:5555:6666]:65535        0        0        0        018446744T\n"
    );
}

#[test]
fn ipv4_services_cut_their_columns() {
    let id = ServiceId::Virtual { proto: Proto::Tcp, addr: "192.0.2.99".parse().unwrap(), port: 80 };
    let names = Format { numeric: false, ..Format::default() };
    // A dest of the other family is cut as well: the service's family counts.
    assert_eq!(
        listed(id, LONG_V6, names),
        "TCP  longlonglonglonglonglonglong rr\n  \
         -> [2001:db8:1111:2222:3333:444 Local   100000000 4294967295 1         \n"
    );
    let rule = Format { columns: Columns::Rule, ..names };
    let saved = listed(id, "10.0.0.1", rule);
    let kept = "longlonglonglonglonglonglonglonglonglonglonglonglonglonglon";
    assert_eq!(kept.len(), 59);
    assert_eq!(saved, format!("-A -t {kept} -s rr\n-a -t {kept} -r 10.0.0.1:65535 -g -w 100000000\n"));
}

#[test]
fn rates_and_exact_counters() {
    let id = ServiceId::Virtual { proto: Proto::Sctp, addr: "192.0.2.1".parse().unwrap(), port: 9 };
    let rate = Format { columns: Columns::Rate, ..plain() };
    assert_eq!(
        listed(id, "10.0.0.1", rate),
        "SCTP 192.0.2.1:9                         0        0        0  999999K        0\n  \
         -> 10.0.0.1:65535                      5        0        0        0        0\n"
    );
    let exact = Format { columns: Columns::Stats, exact: true, ..plain() };
    assert_eq!(
        listed(id, "10.0.0.1", exact),
        "SCTP 192.0.2.1:9                  1234567890123 100000000        0        0        0\n  \
         -> 10.0.0.1:65535                      0        0        0        0 18446744073709551615\n"
    );
}

#[test]
fn names_of_hosts_and_services() {
    let id = ServiceId::Virtual { proto: Proto::Tcp, addr: "192.0.2.80".parse().unwrap(), port: 80 };
    let names = Format { numeric: false, ..Format::default() };
    assert!(listed(id, "10.0.0.1", names).starts_with("TCP  www.example.org:http rr\n"));
    let v6 = ServiceId::Virtual { proto: Proto::Tcp, addr: "2001:db8::1".parse().unwrap(), port: 80 };
    assert!(listed(v6, "2001:db8::2", names).starts_with("TCP  [2001:db8::1]:http rr\n"));
    let udp = ServiceId::Virtual { proto: Proto::Udp, addr: "192.0.2.1".parse().unwrap(), port: 80 };
    assert!(listed(udp, "10.0.0.1", names).starts_with("UDP  192.0.2.1:80 rr\n"));
}

#[test]
fn connections_of_every_kind() {
    let any = |text: &str| -> IpAddr { text.parse().unwrap() };
    let conn = ConnRow {
        proto: 17,
        template: true,
        state: 1,
        expires_s: 2_678_400,
        client: (any("10.0.0.1"), 0),
        virt: (any("192.0.2.1"), 5060),
        dest: (any("10.0.0.2"), 5060),
        origin: ConnOrigin::Sync,
        engine: Some(EngineData { name: "sip".into(), data: "call\x1b[2J@host".into() }),
    };
    let engine = Format { engine: true, ..plain() };
    assert_eq!(
        render::connection(&conn, engine, &mut Names),
        "UDP 44640:00 ASSURED     10.0.0.1:0         192.0.2.1:5060     10.0.0.2:5060    sip                call?[2J@host\n"
    );
    assert_eq!(
        render::connection(&conn, plain(), &mut Names),
        "UDP 44640:00 ASSURED     10.0.0.1:0         192.0.2.1:5060     10.0.0.2:5060\n"
    );
    let mark = ConnRow { proto: 0, virt: (any("0.0.0.8"), 0), dest: (any("10.0.0.2"), 0), expires_s: 89, ..conn };
    assert_eq!(
        render::connection(&mark, plain(), &mut Names),
        "IP  01:29  ASSURED     10.0.0.1:0         0.0.0.8:0          10.0.0.2:0\n"
    );
}
