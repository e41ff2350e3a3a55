//! What the end-to-end tests share.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use libtest_mimic::{Completion, Failed};
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::load::{self, Load, Report};
use rvs_lab::netns::Output;
use rvs_lab::{Bridge, Director, End, Hook, Lab, Link, Node, NodeHandle, Topology, eventually};

/// For what happens within milliseconds; more is a fault.
pub const SOON: Duration = Duration::from_secs(10);

/// Why a test ended before its time.
#[derive(Debug)]
pub enum Stop {
    Failed(String),
    /// It can't be run here, for this reason.
    Skipped(String),
}

impl<E: Display> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}

pub type TestResult<T = ()> = Result<T, Stop>;

pub struct Test {
    pub name: String,
    pub run: Box<dyn FnOnce() -> Result<Completion, Failed> + Send>,
}

pub fn test(name: &str, run: impl FnOnce() -> TestResult + Send + 'static) -> Test {
    let run = || match run() {
        Ok(()) => Ok(Completion::Completed),
        Err(Stop::Skipped(why)) => Ok(Completion::ignored_with(why)),
        Err(Stop::Failed(why)) => Err(why.into()),
    };
    Test { name: name.to_owned(), run: Box::new(run) }
}

/// The test once for each hook, named for it.
pub fn on_hooks(name: &str, hooks: &[Hook], run: fn(Hook) -> TestResult) -> Vec<Test> {
    hooks.iter().map(|&hook| test(&format!("{name}_{hook}"), move || run(hook))).collect()
}

pub fn check(holds: bool, what: impl FnOnce() -> String) -> TestResult {
    if holds { Ok(()) } else { Err(Stop::Failed(what())) }
}

pub fn equal(what: &str, is: &str, should_be: &str) -> TestResult {
    check(is == should_be, || format!("{what} is\n{is}\nand should be\n{should_be}"))
}

static NEXT: AtomicU32 = AtomicU32::new(0);

pub fn lab(topology: &Topology) -> TestResult<Lab> {
    Ok(Lab::up_as(&format!("e2e{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)), topology)?)
}

/// A lab whose endpoints leave checksums and segmentation to the device as far as the hook takes it.
pub fn lab_for(hook: Hook, layout: Layout, options: Options) -> TestResult<Lab> {
    lab(&layout.topology(&Options { offload: hook == Hook::Tc, ..options }))
}

/// Starts rvsd in the node `director`. A build of the data plane that has no tc programs is a reason to skip.
pub fn director<'a>(lab: &'a Lab, interfaces: &[&str], hook: Hook) -> TestResult<Director<'a>> {
    let wanted: Vec<_> = interfaces.iter().map(|&name| (name, Some(hook))).collect();
    match Director::start(lab.node("director")?, &wanted) {
        Ok(director) => Ok(director),
        Err(error) if hook == Hook::Tc && error.to_string().contains("has no program rvs_tc_in") => {
            Err(Stop::Skipped("this build of rvsd has no tc programs".to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

/// The VIP of a family with this port.
pub fn vip(lab: &Lab, ipv6: bool, port: u16) -> TestResult<SocketAddr> {
    Ok(SocketAddr::new(lab.topology().vip(ipv6).ok_or("the lab has no VIP")?, port))
}

/// A node's own address of a family with this port.
pub fn at(lab: &Lab, node: &str, ipv6: bool, port: u16) -> TestResult<SocketAddr> {
    let address = lab.topology().address(node, ipv6).ok_or_else(|| format!("{node} has no address"))?;
    Ok(SocketAddr::new(address, port))
}

/// A service with all servers of the lab, each with the same weight.
pub fn serve(lab: &Lab, director: &Director<'_>, kind: &str, vip: SocketAddr, method: &str, port: u16) -> TestResult {
    director.ipvsadm(&format!("-A {kind} {vip} -s rr"))?;
    if method == "--fullnat" {
        for local in lab.topology().locals(vip.is_ipv6()) {
            director.ipvsadm(&format!("-P {kind} {vip} -z {local}"))?;
        }
    }
    for server in lab.topology().servers() {
        let target = at(lab, &server.name, vip.is_ipv6(), port)?;
        director.ipvsadm(&format!("-a {kind} {vip} -r {target} {method} -w 1"))?;
    }
    Ok(())
}

/// Requests from the client, all of which must be answered.
pub fn http(lab: &Lab, target: SocketAddr, requests: usize) -> TestResult<Report> {
    answered(lab, &Load::new(target, requests))
}

fn answered(lab: &Lab, load: &Load) -> TestResult<Report> {
    let Load { target, requests, .. } = *load;
    let report = load::http(lab.node("client")?, load, &|_| {})?;
    check(report.failed == 0 && report.answered() == requests, || format!("{target}: {report}"))?;
    Ok(report)
}

/// Requests, one after another, of which each of these servers answered its number. (Two at once may take the same turn
/// of rr.)
pub fn shares(lab: &Lab, target: SocketAddr, due: &[(&str, usize)]) -> TestResult {
    let load = Load { concurrency: 1, ..Load::new(target, due.iter().map(|&(_, n)| n).sum()) };
    let report = answered(lab, &load)?;
    let due: BTreeMap<String, usize> = due.iter().map(|&(name, n)| (name.to_owned(), n)).collect();
    check(report.servers == due, || format!("{target}: the shares should be {due:?}: {report}"))
}

/// A command that is refused with this exit code and this on standard error, and changes nothing.
pub fn refused(director: &Director<'_>, line: &str, exit: i32, stderr: &str) -> TestResult {
    let before = director.ipvsadm("-Sn")?;
    let output = director.ipvsadm_output(line, "")?;
    check(output.status.code() == Some(exit) && output.stderr == stderr, || {
        format!("'ipvsadm {line}' should exit with {exit} and say {stderr:?}: {output:?}")
    })?;
    equal("what is configured after a refused command", &director.ipvsadm("-Sn")?, &before)
}

/// Looks until the listing is this.
pub fn eventually_lists(director: &Director<'_>, line: &str, should_be: &str) -> TestResult {
    eventually(&format!("'ipvsadm {line}' to print\n{should_be}"), SOON, || {
        let is = director.ipvsadm(line).map_err(|e| e.to_string())?;
        if is == should_be { Ok(()) } else { Err(is) }
    })?;
    Ok(())
}

/// ActiveConn and InActConn of each dest in `ipvsadm -Ln`, by its address and port.
pub fn connections(director: &Director<'_>) -> TestResult<BTreeMap<SocketAddr, [u64; 2]>> {
    let text = director.ipvsadm("-Ln")?;
    let row = |line: &str| {
        let words: Vec<&str> = line.strip_prefix("  -> ")?.split_whitespace().collect();
        Some((words.first()?.parse().ok()?, [words.get(3)?.parse().ok()?, words.get(4)?.parse().ok()?]))
    };
    Ok(text.lines().filter_map(row).collect())
}

/// Numbers of a line of `ipvsadm -Ln --stats --exact`: connections, packets in and out, bytes in and out.
pub fn stats_of(text: &str, name: &str) -> TestResult<[u64; 5]> {
    let line = text.lines().find(|l| l.split_whitespace().any(|w| w == name));
    let line = line.ok_or_else(|| format!("no line for {name} in\n{text}"))?;
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    Ok(numbers.try_into().map_err(|_| format!("no five numbers in '{line}'"))?)
}

/// Counters of the kernel (`/proc/net/snmp`, `/proc/net/snmp6`) by `Icmp.InTimeExcds` or `Icmp6InTimeExcds`.
pub fn icmp_counter(node: NodeHandle<'_>, name: &str) -> TestResult<u64> {
    let (kind, field) = name.split_once('.').unwrap_or(("", name));
    if kind.is_empty() {
        let text = node.ns().proc_net("snmp6")?;
        let value = text.lines().find_map(|l| l.strip_prefix(field).filter(|l| l.starts_with(char::is_whitespace)));
        return Ok(value.ok_or_else(|| format!("no counter {name}"))?.trim().parse()?);
    }
    let text = node.ns().proc_net("snmp")?;
    let mut rows = text.lines().filter_map(|l| l.strip_prefix(&format!("{kind}: ")));
    let (names, values) = (rows.next().unwrap_or_default(), rows.next().unwrap_or_default());
    let found = names.split(' ').zip(values.split(' ')).find(|(n, _)| *n == field);
    Ok(found.ok_or_else(|| format!("no counter {name}"))?.1.parse()?)
}

/// Standard output of a command that may say no.
pub fn said(output: &Output) -> String {
    format!("{}{}", output.stdout, output.stderr)
}

/// Networks wired by hand: hosts, switches, and cables between them.
#[derive(Default)]
pub struct Wiring(pub Topology);

impl Wiring {
    pub fn named(name: &str) -> Self {
        Self(Topology { name: name.to_owned(), ..Topology::default() })
    }

    pub fn host(&mut self, node: Node) {
        self.0.nodes.push(node);
    }

    pub fn switch(&mut self, name: &str) {
        let bridges = vec![Bridge { name: "br0".to_owned(), ..Bridge::default() }];
        self.0.nodes.push(Node { name: name.to_owned(), bridges, ..Node::default() });
    }

    /// A cable from an interface to a port of a switch. `plain`: the host finishes checksums and segments itself, as it
    /// must where XDP sends on what it made.
    pub fn plug(&mut self, node: &str, interface: &str, address: &str, switch: &str, plain: bool) -> TestResult {
        let off = [("tx".to_owned(), false), ("gso".to_owned(), false)];
        let own = End {
            node: node.to_owned(),
            interface: interface.to_owned(),
            addresses: vec![address.parse()?],
            offload: if plain { off.into() } else { BTreeMap::new() },
            ..End::default()
        };
        // XDP sends only to a veth whose other end has NAPI, which comes with GRO.
        let port = End {
            node: switch.to_owned(),
            interface: format!("to-{node}"),
            bridge: Some("br0".to_owned()),
            offload: [("gro".to_owned(), true)].into(),
            ..End::default()
        };
        self.0.links.push(Link { ends: [own, port] });
        Ok(())
    }
}

/// The first words of every answer of the client's `curl`, in order.
pub fn curl(client: NodeHandle<'_>, target: IpAddr, times: usize) -> TestResult<Vec<String>> {
    let url = if target.is_ipv6() { format!("http://[{target}]/") } else { format!("http://{target}/") };
    let mut names = Vec::new();
    for _ in 0..times {
        let answer = client.run(&["curl", "--silent", "--show-error", "--fail", "--max-time", "5", &url])?;
        names.push(answer.split(' ').next().unwrap_or_default().to_owned());
    }
    Ok(names)
}
