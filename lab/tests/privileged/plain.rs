//! The lab itself, without a director: clients reach the real servers by plain routing, and nothing is left behind.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use clap::ValueEnum;
use rvs_lab::layouts::{Gateway, Layout, Options};
use rvs_lab::load::{self, Load};
use rvs_lab::netns::Netns;
use rvs_lab::{Error, Lab, Route, State, Topology, service};

use crate::support::{Test, TestResult, check, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("http_reaches_every_server_in_both_families", http_reaches_every_server_in_both_families),
        test("dns_reaches_every_server_in_both_families", dns_reaches_every_server_in_both_families),
        test("big_files_arrive_whole_both_ways", big_files_arrive_whole_both_ways),
        test("every_layout_comes_up_and_leaves_nothing", every_layout_comes_up_and_leaves_nothing),
        test("what_fails_half_way_leaves_nothing", what_fails_half_way_leaves_nothing),
        test("a_kept_lab_is_found_and_ended_by_name", a_kept_lab_is_found_and_ended_by_name),
        test("commands_tell_what_went_wrong", commands_tell_what_went_wrong),
    ]
}

/// Without a director's program the director node is a router: the client asks each real server itself.
fn lab(gateway: Gateway, offload: bool) -> Result<Lab, Error> {
    Lab::up(&Layout::TwoArmed.topology(&Options { servers: 2, gateway, offload, ..Options::default() }))
}

fn targets(lab: &Lab, port: u16) -> Vec<(String, SocketAddr)> {
    let topology = lab.topology();
    let of = |name: &str| {
        let addresses = [false, true].into_iter().filter_map(|ipv6| topology.address(name, ipv6));
        addresses.map(|a| (name.to_owned(), SocketAddr::new(a, port))).collect::<Vec<_>>()
    };
    topology.servers().flat_map(|n| of(&n.name)).collect()
}

fn http_reaches_every_server_in_both_families() -> TestResult {
    for gateway in [Gateway::Both, Gateway::Router] {
        let lab = lab(gateway, false)?;
        let client = lab.node("client")?;
        for (server, target) in [targets(&lab, 80), targets(&lab, 8080)].concat() {
            let report = load::http(client, &Load::new(target, 50), &|_| {})?;
            let own = lab.topology().address("client", target.is_ipv6());
            check(report.failed == 0 && report.servers.get(&server) == Some(&50), || format!("{target}: {report}"))?;
            check(report.clients.keys().copied().map(Some).eq([own]), || format!("{target}, {own:?}: {report}"))?;
        }
    }
    Ok(())
}

fn dns_reaches_every_server_in_both_families() -> TestResult {
    let lab = lab(Gateway::Both, false)?;
    for (server, target) in targets(&lab, 53) {
        let report = load::dns(lab.node("client")?, &Load::new(target, 50), &|_| {})?;
        check(report.failed == 0 && report.servers.get(&server) == Some(&50), || format!("{target}: {report}"))?;
    }
    let nobody = SocketAddr::new(lab.topology().address("rs1", false).ok_or("rs1 has no address")?, 54);
    let report = load::dns(lab.node("client")?, &Load { concurrency: 1, ..Load::new(nobody, 3) }, &|_| {})?;
    check(report.failed == 3 && report.answered() == 0, || format!("a closed port answered: {report}"))
}

fn big_files_arrive_whole_both_ways() -> TestResult {
    let time = Duration::from_secs(20);
    for offload in [true, false] {
        let lab = lab(Gateway::Both, offload)?;
        let client = lab.node("client")?;
        for (server, target) in targets(&lab, 80) {
            let body = load::http_get(client, target, "/payload", time)?;
            check(body == service::payload(&server), || {
                format!("{target}: the download of {} bytes differs", body.len())
            })?;
            let sent = service::payload("client");
            load::http_put(client, target, "/upload/sent", &sent, time)?;
            let kept = std::fs::read(lab.node(&server)?.dir().join("web/upload/sent"))?;
            check(kept == sent, || format!("{target}: the upload of {} bytes differs", kept.len()))?;
        }
    }
    Ok(())
}

fn nothing_left(name: &str) -> TestResult {
    let left = Netns::with_prefix(&format!("{}{name}-", rvs_lab::PREFIX));
    check(left.is_empty(), || format!("{left:?} are left"))?;
    check(!Path::new("/run/rvs-lab").join(name).exists(), || format!("the files of {name} are left"))
}

fn every_layout_comes_up_and_leaves_nothing() -> TestResult {
    for &layout in Layout::value_variants() {
        let lab = Lab::up(&layout.topology(&Options::default()))?;
        for ipv6 in [false, true] {
            let vip = lab.topology().vip(ipv6).ok_or("no VIP")?.to_string();
            lab.node("client")?.run(&["ping", "-n", "-c", "1", "-W", "2", &vip])?;
        }
        for (server, target) in targets(&lab, 80) {
            let report = load::http(lab.node("client")?, &Load::new(target, 4), &|_| {})?;
            check(report.servers.get(&server) == Some(&4), || format!("{layout:?} {target}: {report}"))?;
        }
        let name = lab.name().to_owned();
        drop(lab);
        nothing_left(&name)?;
    }
    Ok(())
}

fn what_fails_half_way_leaves_nothing() -> TestResult {
    let mut topology: Topology = Layout::TwoArmed.topology(&Options::default());
    let stray = Route { to: None, via: [10, 99, 99, 99].into(), from: None };
    topology.nodes.last_mut().ok_or("no node")?.routes = vec![stray];
    let name = format!("half{}", std::process::id());
    let error = Lab::up_as(&name, &topology).err().ok_or("a route by a gateway that is nowhere was taken")?;
    check(error.to_string().contains("route add default via 10.99.99.99"), || error.to_string())?;
    nothing_left(&name)
}

fn a_kept_lab_is_found_and_ended_by_name() -> TestResult {
    let name = format!("kept{}", std::process::id());
    Lab::up_as(&name, &Layout::OneArmed.topology(&Options { servers: 1, ..Options::default() }))?.keep()?;
    // Ends it whatever the checks say.
    let checks = || -> TestResult {
        let lab = Lab::attach(&name)?;
        let target = SocketAddr::new(lab.topology().address("rs1", false).ok_or("rs1 has no address")?, 80);
        let report = load::http(lab.node("client")?, &Load::new(target, 2), &|_| {})?;
        check(report.answered() == 2, || format!("{report}"))?;
        let twice = Lab::up_as(&name, &Topology::default());
        check(matches!(twice, Err(Error::Missing(_))), || "two labs of one name".to_owned())?;
        check(Lab::all().get(&name) == Some(&State::Kept), || format!("{:?}", Lab::all()))
    };
    let checked = checks();
    Lab::down(&name)?;
    checked?;
    nothing_left(&name)
}

fn commands_tell_what_went_wrong() -> TestResult {
    let lab = lab(Gateway::Both, false)?;
    let node = lab.node("rs1")?;
    let refused = node.run(&["ip", "link", "show", "nothing"]).err().ok_or("a link that is not there was shown")?;
    check(matches!(&refused, Error::Command { said, .. } if said.contains("nothing")), || refused.to_string())?;
    let absent = node.run(&["no-such-program"]).err().ok_or("a program that is not there ran")?;
    check(matches!(absent, Error::Start { .. }), || absent.to_string())?;
    let late = node.output(&["cat", "/dev/zero"], "", Duration::from_millis(50)).err().ok_or("endless output ended")?;
    check(matches!(late, Error::Timeout { .. }), || late.to_string())?;
    let output = node.output(&["sh", "-c", "cat; exit 3"], "words", Duration::from_secs(10))?;
    check(output.status.code() == Some(3) && output.stdout == "words", || format!("{output:?}"))
}
