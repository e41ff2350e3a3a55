//! Random command lines: what is saved restores to the same table, and nothing that is typed makes the parser panic.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use proptest::prelude::*;
use rvs_control::capability::Capabilities;
use rvs_control::model::{Dest, DestKey, Model, ServiceConfig, ServiceKey};

use crate::world::World;

/// The table without its orders: a restored one has its dests in the order of the saved text.
fn table(model: &Model) -> BTreeMap<ServiceKey, (ServiceConfig, BTreeMap<DestKey, Dest>)> {
    let dests = |service: &rvs_control::model::Service| service.dests().map(|d| (d.key, *d)).collect();
    model.services().map(|(key, service)| (*key, (service.config, dests(service)))).collect()
}

fn service() -> impl Strategy<Value = String> {
    prop_oneof![
        (1_u8..4, 80_u16..83).prop_map(|(host, port)| format!("-t 192.0.2.{host}:{port}")),
        (1_u8..3).prop_map(|host| format!("-u 192.0.2.{host}:53")),
        Just("--sctp-service 192.0.2.1:9".to_owned()),
        (1_u8..3).prop_map(|host| format!("-t [2001:db8::{host}]:80")),
        prop_oneof![1_u32..4, Just(u32::MAX)].prop_map(|mark| format!("-f {mark}")),
        (1_u32..3).prop_map(|mark| format!("-f {mark} -6")),
    ]
}

/// Settings that a saved line can hold: stock ipvsadm saves no mask without -p, and no third flag of sh and mh.
fn settings() -> impl Strategy<Value = String> {
    let scheduler = prop_oneof![
        Just("-s rr"),
        Just("-s wlc -b flag-1,flag-3"),
        Just("-s sh -b sh-port"),
        Just("-s mh -b mh-port,mh-fallback"),
        Just(""),
        Just("-s none"),
    ];
    let persistence = prop_oneof![Just(""), Just("-p"), Just("-p 50"), Just("-p 60 -M 24"), Just("-p 60 --pe sip")];
    let ops = prop_oneof![3 => Just(""), 1 => Just("-o")];
    (scheduler, persistence, ops).prop_map(|parts| format!("{} {} {}", parts.0, parts.1, parts.2))
}

fn server() -> impl Strategy<Value = String> {
    let addr = prop_oneof![Just("10.0.0.11"), Just("10.0.0.12:8080"), Just("10.0.0.13:80"), Just("[fd00::11]:80")];
    let method = prop_oneof![
        Just("-m"),
        Just("-g"),
        Just(""),
        Just("-i"),
        Just("--fullnat"),
        Just("-i --tun-type gue --tun-port 6080 --tun-remcsum"),
        Just("-i --tun-type gre --tun-csum"),
    ];
    let weight = prop_oneof![Just(""), Just("-w 0"), Just("-w 2147483647")];
    (addr, method, weight).prop_map(|(addr, method, weight)| format!("-r {addr} {method} {weight}"))
}

fn line() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => (service(), settings()).prop_map(|(service, settings)| format!("-A {service} {settings}")),
        1 => (service(), settings()).prop_map(|(service, settings)| format!("-E {service} {settings}")),
        6 => (service(), server()).prop_map(|(service, server)| format!("-a {service} {server}")),
        2 => (service(), server()).prop_map(|(service, server)| format!("-e {service} {server}")),
        1 => (service(), server())
            .prop_map(|(service, server)| format!("-d {service} -r {}", server.split(' ').nth(1).unwrap())),
        1 => service().prop_map(|service| format!("-D {service}")),
    ]
}

fn words(line: &str) -> Vec<&str> {
    line.split_ascii_whitespace().collect()
}

proptest! {
    #[test]
    fn saved_is_restored(lines in proptest::collection::vec(line(), 1..40)) {
        let mut world = World::new(Capabilities::all());
        for line in &lines {
            let before = world.model.clone();
            let outcome = world.ipvsadm(&words(line), "", true);
            prop_assert!(outcome.exit == 0 || world.model == before, "{line:?} failed and changed something");
            prop_assert_eq!(outcome.exit == 0, outcome.stderr.is_empty());
        }
        for save in [&["-S", "-n"][..], &["-S"]] {
            let saved = world.ipvsadm(save, "", true);
            prop_assert_eq!(saved.exit, 0);
            let mut other = World::new(Capabilities::all());
            let restored = other.ipvsadm(&["-R"], &saved.stdout, true);
            prop_assert_eq!((restored.exit, restored.stderr.as_str()), (0, ""), "{}", saved.stdout);
            prop_assert_eq!(table(&other.model), table(&world.model));
            prop_assert_eq!(other.ipvsadm(save, "", true).stdout, saved.stdout);
        }
    }

    #[test]
    fn any_arguments_are_answered(
        args in proptest::collection::vec(
            prop_oneof![
                4 => proptest::sample::select(WORDS).prop_map(str::to_owned),
                1 => "\\PC{0,12}",
                1 => "-{1,2}[a-zA-Z0-9=]{0,6}",
            ],
            0..8,
        ),
    ) {
        let mut world = World::new(Capabilities::all());
        world.ipvsadm(&["-A", "-t", "192.0.2.1:80"], "", true);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let before = world.model.clone();
        let outcome = world.ipvsadm(&args, "-A -t 192.0.2.2:80\n", true);
        prop_assert!([0, 1, 2, 255].contains(&outcome.exit), "{outcome:?}");
        prop_assert_eq!(outcome.exit == 0, outcome.stderr.is_empty());
        if outcome.exit != 0 && !args.contains(&"-R") {
            prop_assert_eq!(&world.model, &before);
        }
    }

    #[test]
    fn any_input_of_a_restore_is_answered(input in "(\\PC{0,20}\n|-[AaEeDdCLSZ] [-trswgmi0-9.: ]{0,30}\n){0,6}") {
        let outcome = World::new(Capabilities::all()).ipvsadm(&["-R"], &input, true);
        prop_assert!([0, 1, 2, 255].contains(&outcome.exit), "{outcome:?}");
    }
}

/// Refusals, complaints of popt's and other complaints come in the order of the lines, and the last line decides.
#[test]
fn a_restore_complains_in_order() {
    let restore = |input: &str| World::new(Capabilities::all()).ipvsadm(&["-R"], input, true);
    let exists = "Service already exists\n";
    let twice = "-A -t 192.0.2.1:80\n-A -t 192.0.2.1:80\n";
    let outcome = restore(twice);
    assert_eq!((outcome.stderr.as_str(), outcome.exit), (exists, 255));
    let outcome = restore(&format!("{twice}-A -t 192.0.2.2:80"));
    assert_eq!((outcome.stderr.as_str(), outcome.exit), (exists, 0), "the last line needs no newline");
    let outcome = restore(&format!("{twice}-A -t 192.0.2.1:81 -p -1\n-L -n\n"));
    assert_eq!((outcome.stderr, outcome.exit), (format!("{exists}-1: unknown option\n"), 0));
    assert_eq!(outcome.stdout.lines().count(), 4, "the listing shows the service");
    let outcome = restore(&format!("{twice}-A -t 192.0.2.1\n-A -t 192.0.2.3:80\n-L\n"));
    let zero = "Zero port specified for non-persistent service\n";
    assert_eq!((outcome.stderr, outcome.exit), (format!("{exists}{zero}"), 2));
    assert_eq!(outcome.stdout, "", "nothing after a line that is no command");
    let outcome = restore(&format!("{twice}-R\n"));
    assert!(outcome.stderr.starts_with(exists) && outcome.stderr.ends_with("for more information.\n"));
    assert_eq!(outcome.exit, 255);
    let outcome = restore(&format!("{twice}-v\n-L\n"));
    assert_eq!((outcome.stdout.lines().count(), outcome.exit), (1, 0));
    let outcome = restore(&format!("{twice}{}", "x".repeat(100_000)));
    assert_eq!((outcome.stderr.lines().count(), outcome.exit), (2, 255));
    // More commands than may be unanswered at once, all refused but one.
    let outcome = restore(&"-A -t 192.0.2.1:80\n".repeat(300));
    assert_eq!((outcome.stderr, outcome.exit), (exists.repeat(299), 255));
}

const WORDS: &[&str] = &[
    "-A",
    "-E",
    "-D",
    "-a",
    "-e",
    "-d",
    "-C",
    "-L",
    "-S",
    "-R",
    "-Z",
    "-P",
    "-Q",
    "-G",
    "--set",
    "-h",
    "-v",
    "--start-daemon",
    "--stop-daemon",
    "master",
    "backup",
    "-t",
    "-u",
    "-f",
    "--sctp-service",
    "192.0.2.1:80",
    "[2001:db8::1]:80",
    "[",
    "]",
    "[::",
    "[::]",
    "[::]:",
    ":",
    "-6",
    "-s",
    "sh",
    "-b",
    "sh-port,,",
    "-p",
    "-M",
    "255.0.0.0",
    "64",
    "-r",
    "10.0.0.1",
    "-m",
    "-g",
    "-i",
    "--fullnat",
    "-w",
    "5",
    "-x",
    "-y",
    "-1",
    "--tun-type",
    "gue",
    "--tun-port",
    "--tun-csum",
    "-n",
    "-c",
    "--stats",
    "--rate",
    "--timeout",
    "--daemon",
    "--mcast-group",
    "ff02::5",
    "--syncid",
    "-z",
    "--",
    "-",
    "",
];

/// Times are printed, not judged: they are there to see that a line costs no more in a long table than in a short one.
#[test]
fn fifty_thousand_lines_restore() {
    for services in [1_000, 10_000] {
        restore_and_list(services);
    }
}

/// This many services with 4 servers each.
fn restore_and_list(services: usize) {
    let mut text = String::new();
    for service in 0..services {
        let net = format!("{}.{}", service / 256, service % 256);
        let vip = format!("172.{}.{}.1:80", 16 + service / 256, service % 256);
        let _ = writeln!(text, "-A -t {vip} -s wrr");
        for server in 1..=4 {
            let _ = writeln!(text, "-a -t {vip} -r 10.{net}.{server}:80 -m -w {server}");
        }
    }
    let mut world = World::new(Capabilities::current());
    let start = Instant::now();
    let outcome = world.ipvsadm(&["-R"], &text, true);
    let restored = start.elapsed();
    assert_eq!((outcome.exit, outcome.stderr.as_str()), (0, ""));
    assert_eq!((world.model.service_count(), world.model.dest_count()), (services, 4 * services));
    let start = Instant::now();
    let listed = world.ipvsadm(&["-S", "-n"], "", true).stdout;
    println!("{} lines restored in {restored:?}, listed in {:?}", 5 * services, start.elapsed());
    let mut sorted: Vec<&str> = listed.lines().collect();
    let mut given: Vec<&str> = text.lines().collect();
    sorted.sort_unstable();
    given.sort_unstable();
    assert_eq!(sorted, given);
}
