//! The engine: builds any topology, hands out its nodes, and leaves nothing behind.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use crate::director::program;
use crate::error::{Error, Result};
use crate::eventually::eventually;
use crate::netns::{Netns, Output};
use crate::process::Process;
use crate::service;
use crate::topology::{Bridge, Node, Topology, is_name};

/// All namespaces of all labs start so: what does not is never touched.
pub const PREFIX: &str = "rvslab-";

/// Files of all labs, a folder each, with a folder for each node in it.
const FOLDER: &str = "/run/rvs-lab";

/// Longest lab name.
const MAX_NAME: usize = 32;

/// What a command may take unless it is told otherwise.
const COMMAND_TIME: Duration = Duration::from_secs(30);

/// Links come up and addresses become usable within milliseconds; more is a fault.
const UP_TIME: Duration = Duration::from_secs(10);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A running lab; dropping it ends it, unless it is kept.
#[derive(Debug)]
pub struct Lab {
    name: String,
    topology: Topology,
    processes: Vec<Process>,
    kept: bool,
}

/// Whose a lab is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It was built to stay.
    Kept,
    /// The process of this id uses it, and ends it.
    InUse(u32),
    /// Its process is gone and it is still there.
    Leftover,
}

/// What is written down about a lab, so that another process can find it.
#[derive(Serialize, Deserialize)]
struct Record {
    owner: u32,
    kept: bool,
    topology: Topology,
}

impl Lab {
    /// Builds the topology under a name that no other lab has.
    pub fn up(topology: &Topology) -> Result<Self> {
        Self::up_as(&format!("p{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)), topology)
    }

    /// Builds the topology under the name given. Fails when there is a lab of that name, or the topology can't be;
    /// whatever was made until then is taken down again.
    pub fn up_as(name: &str, topology: &Topology) -> Result<Self> {
        topology.check()?;
        check_name(name)?;
        let dir = Path::new(FOLDER).join(name);
        if dir.exists() || !Netns::with_prefix(&format!("{PREFIX}{name}-")).is_empty() {
            return Err(Error::Missing(format!("there is a lab '{name}' already: end it with 'rvs lab down {name}'")));
        }
        let mut lab = Self { name: name.to_owned(), topology: topology.clone(), processes: Vec::new(), kept: false };
        fs::create_dir_all(&dir).map_err(Error::file("make", &dir))?;
        lab.record()?;
        lab.make_nodes()?;
        lab.make_links()?;
        lab.configure()?;
        lab.wait_up()?;
        lab.start_services()?;
        Ok(lab)
    }

    /// A kept lab that another process made. Fails when there is none of that name.
    pub fn attach(name: &str) -> Result<Self> {
        check_name(name)?;
        let record = Record::read(name)
            .ok_or_else(|| Error::Missing(format!("there is no lab '{name}': see 'rvs lab status'")))?;
        Ok(Self { name: name.to_owned(), topology: record.topology, processes: Vec::new(), kept: true })
    }

    /// Lets the lab run on when this value and this process are gone.
    pub fn keep(mut self) -> Result<()> {
        self.kept = true;
        self.record()?;
        self.processes.drain(..).for_each(Process::detach);
        Ok(())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The folder of the lab's files; a folder for each node is in it.
    pub fn dir(&self) -> PathBuf {
        Path::new(FOLDER).join(&self.name)
    }

    /// Fails when the topology has no such node.
    pub fn node(&self, name: &str) -> Result<NodeHandle<'_>> {
        let node = self.topology.node(name).ok_or_else(|| Error::Missing(format!("the lab has no node '{name}'")))?;
        Ok(NodeHandle { lab: self, node })
    }

    pub fn nodes(&self) -> impl Iterator<Item = NodeHandle<'_>> {
        self.topology.nodes.iter().map(|node| NodeHandle { lab: self, node })
    }

    /// Every lab that has namespaces or files, by name.
    pub fn all() -> BTreeMap<String, State> {
        let folders =
            fs::read_dir(FOLDER).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
        let spaces = Netns::with_prefix(PREFIX);
        let owners = spaces.iter().filter_map(|ns| Some(ns.name().strip_prefix(PREFIX)?.split_once('-')?.0.to_owned()));
        let state = |name: &str| match Record::read(name) {
            Some(record) if record.kept => State::Kept,
            Some(record) if Path::new("/proc").join(record.owner.to_string()).exists() => State::InUse(record.owner),
            _ => State::Leftover,
        };
        folders.chain(owners).map(|name| (name.clone(), state(&name))).collect()
    }

    /// Ends the lab of that name, whoever made it: kills what runs in its namespaces, removes them and its files.
    /// A lab that is not there is ended already. Goes on after a failure and returns the first.
    pub fn down(name: &str) -> Result<()> {
        check_name(name)?;
        let nodes = Netns::with_prefix(&format!("{PREFIX}{name}-"));
        let mut results: Vec<Result<()>> = nodes.iter().filter(|ns| record_of(ns).exists()).map(not_a_server).collect();
        results.extend(nodes.iter().map(Netns::remove));
        let dir = Path::new(FOLDER).join(name);
        for mount in mounts_below(&dir) {
            let what = Error::io(format!("cannot unmount {}", mount.display()));
            results.push(umount2(&mount, MntFlags::MNT_DETACH).map_err(|e| what(e.into())));
        }
        if dir.exists() {
            results.push(fs::remove_dir_all(&dir).map_err(Error::file("remove", &dir)));
        }
        results.into_iter().collect()
    }

    fn record(&self) -> Result<()> {
        let path = self.dir().join("lab.json");
        let record = Record { owner: std::process::id(), kept: self.kept, topology: self.topology.clone() };
        let text = serde_json::to_string_pretty(&record).map_err(|e| Error::unexpected(path.display(), e))?;
        fs::write(&path, text).map_err(Error::file("write", &path))
    }

    fn make_nodes(&self) -> Result<()> {
        Netns::here().ip(&self.nodes().map(|n| format!("netns add {}", n.ns().name())).collect::<Vec<_>>())?;
        for node in self.nodes() {
            let dir = node.dir();
            fs::create_dir_all(&dir).map_err(Error::file("make", &dir))?;
            for (name, value) in BASE_SYSCTLS {
                node.ns().sysctl(name, value)?;
            }
            for (name, value) in &node.node.sysctls {
                node.ns().sysctl(name, value)?;
            }
        }
        Ok(())
    }

    fn make_links(&self) -> Result<()> {
        let ns = |node: &str| format!("{PREFIX}{}-{node}", self.name);
        let lines = self.topology.links.iter().map(|link| {
            let [a, b] = &link.ends;
            let (in_a, in_b) = (ns(&a.node), ns(&b.node));
            format!("link add {} netns {in_a} type veth peer name {} netns {in_b}", a.interface, b.interface)
        });
        Netns::here().ip(&lines.collect::<Vec<_>>())
    }

    fn configure(&self) -> Result<()> {
        for node in self.nodes() {
            node.ns().ip(&configuration(&self.topology, node.node))?;
            for end in self.topology.ends(node.name()) {
                for (feature, on) in &end.offload {
                    node.run(&["ethtool", "-K", &end.interface, feature, if *on { "on" } else { "off" }])?;
                }
            }
        }
        Ok(())
    }

    /// Waits until every link is up and every address may be used.
    fn wait_up(&self) -> Result<()> {
        for node in self.nodes() {
            eventually(&format!("links and addresses of {}", node.name()), UP_TIME, || {
                let text = node.run(&["ip", "-o", "addr", "show"]).map_err(|e| e.to_string())?;
                let links = node.run(&["ip", "-o", "link", "show"]).map_err(|e| e.to_string())?;
                match text.lines().chain(links.lines()).find(|l| l.contains(" tentative") || l.contains(" state DOWN"))
                {
                    None => Ok(()),
                    Some(line) => Err(line.to_owned()),
                }
            })?;
        }
        Ok(())
    }

    fn start_services(&mut self) -> Result<()> {
        let mut started = Vec::new();
        for node in self.topology.servers() {
            let handle = NodeHandle { lab: self, node };
            for service in &node.services {
                started.push(service::start(service, &node.name, &handle.ns(), &handle.dir())?);
            }
        }
        self.processes = started;
        Ok(())
    }
}

/// Letters and digits alone: the name is a folder's, and with a '-' one lab's namespaces could pass for another's.
fn check_name(name: &str) -> Result<()> {
    if is_name(name, MAX_NAME) && !name.contains('-') {
        return Ok(());
    }
    Err(Error::Missing(format!("'{name}' is no name for a lab: up to {MAX_NAME} letters and digits")))
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        self.processes.clear();
        if let Err(error) = Self::down(&self.name) {
            eprintln!("lab {}: not all of it could be taken down: {error}", self.name);
        }
    }
}

impl Record {
    fn read(name: &str) -> Option<Self> {
        let text = fs::read_to_string(Path::new(FOLDER).join(name).join("lab.json")).ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// What `rvs realserver` keeps of a namespace.
fn record_of(ns: &Netns) -> PathBuf {
    Path::new("/run/rvs").join(format!("realserver-{}.json", ns.name()))
}

/// What a real server's programs are attached to outlives its namespace.
fn not_a_server(ns: &Netns) -> Result<()> {
    ns.run(Command::new(program("rvs")?).args(["realserver", "down"]), "", COMMAND_TIME).map(drop)
}

/// A node of a running lab.
#[derive(Debug, Clone, Copy)]
pub struct NodeHandle<'a> {
    lab: &'a Lab,
    node: &'a Node,
}

impl<'a> NodeHandle<'a> {
    pub fn name(&self) -> &'a str {
        &self.node.name
    }

    pub fn ns(&self) -> Netns {
        Netns::named(format!("{PREFIX}{}-{}", self.lab.name, self.node.name))
    }

    /// The node's files; gone with the lab.
    pub fn dir(&self) -> PathBuf {
        self.lab.dir().join(&self.node.name)
    }

    pub fn topology(&self) -> &'a Node {
        self.node
    }

    /// Runs a command; fails unless it exits with 0 within half a minute. Returns its standard output.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        self.ns().run(&mut self.command(words)?, "", COMMAND_TIME)
    }

    /// `rvs realserver LINE` there. What it sets up ends with the lab.
    pub fn realserver(&self, line: &str) -> Result<String> {
        let rvs = program("rvs")?.display().to_string();
        self.run(&[&rvs, "realserver"].into_iter().chain(line.split_whitespace()).collect::<Vec<_>>())
    }

    /// Runs a command with this standard input, whatever its exit code; fails only when it can't be run or takes longer.
    pub fn output(&self, words: &[&str], stdin: &str, deadline: Duration) -> Result<Output> {
        self.ns().output(&mut self.command(words)?, stdin, deadline)
    }

    /// Starts a command that runs until its [`Process`] is dropped; its output goes to `NAME.log` in the node's folder.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        Process::spawn(name, &self.ns(), command, &self.dir())
    }

    /// Runs `work` in a thread that is in the node's network.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.ns().enter(work)
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let (program, args) =
            words.split_first().ok_or_else(|| Error::Missing(format!("{}: no command given", self.name())))?;
        let mut command = Command::new(program);
        command.args(args);
        Ok(command)
    }
}

/// No host setting leaks in, and no time is lost: addresses are usable at once and nothing is learned from routers.
const BASE_SYSCTLS: [(&str, &str); 12] = [
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/ping_group_range", "0 0"),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/all/accept_redirects", "0"),
    ("net/ipv6/conf/default/accept_redirects", "0"),
];

/// The routing table of packets from one source address; rules and table are of one namespace, so one number is enough.
const FROM_TABLE: u32 = 100;

/// The lines for `ip -batch` that make a node what the topology says. Interfaces are up before routes name them.
fn configuration(topology: &Topology, node: &Node) -> Vec<String> {
    let mut lines = vec!["link set lo up".to_owned()];
    for Bridge { name, addresses, floods } in &node.bridges {
        let ageing = if *floods { " ageing_time 0" } else { "" };
        lines.push(format!("link add {name} type bridge stp_state 0 forward_delay 0{ageing}"));
        lines.extend(addresses.iter().map(|a| format!("addr add {a} dev {name}{}", nodad(a.addr().is_ipv6()))));
        lines.push(format!("link set {name} up"));
    }
    for end in topology.ends(&node.name) {
        if let Some(bridge) = &end.bridge {
            lines.push(format!("link set {} master {bridge}", end.interface));
        }
        lines.extend(
            end.addresses.iter().map(|a| format!("addr add {a} dev {}{}", end.interface, nodad(a.addr().is_ipv6()))),
        );
        lines.push(format!("link set {} up", end.interface));
    }
    lines.extend(node.loopback.iter().map(|a| format!("addr add {a} dev lo{}", nodad(a.addr().is_ipv6()))));
    for route in &node.routes {
        let to = route.to.map_or_else(|| "default".to_owned(), |to| to.to_string());
        let table = route.from.map(|_| format!(" table {FROM_TABLE}")).unwrap_or_default();
        lines.push(format!("route add {to} via {}{table}", route.via));
        if let Some(from) = route.from {
            let family = if from.is_ipv6() { "-6 " } else { "" };
            lines.push(format!("{family}rule add from {from} lookup {FROM_TABLE}"));
        }
    }
    lines
}

fn nodad(ipv6: bool) -> &'static str {
    if ipv6 { " nodad" } else { "" }
}

/// What is mounted below a folder, innermost first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = text.lines().filter_map(|l| l.split(' ').nth(1)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|p| p.starts_with(dir) && p != dir).collect();
    below.reverse();
    below
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layouts::{Layout, Options};

    #[test]
    fn a_real_server_has_its_vip_before_the_routes_that_need_it() {
        let topology = Layout::TwoArmed.topology(&Options { servers: 1, ..Options::default() });
        let lines = configuration(&topology, topology.node("rs1").unwrap());
        let at =
            |line: &str| lines.iter().position(|l| l == line).unwrap_or_else(|| panic!("no '{line}' in {lines:#?}"));
        assert!(at("link set eth0 up") < at("route add default via 203.0.113.20"));
        at("addr add 198.51.100.100/32 dev lo");
        at("addr add 2001:db8:f::100/128 dev lo nodad");
        at("route add default via 2001:db8:b::1 table 100");
        at("rule add from 198.51.100.100 lookup 100");
    }

    #[test]
    fn names_that_could_reach_another_folder_are_refused() {
        for name in ["", "../x", "a/b", "a-b"] {
            assert!(matches!(Lab::up_as(name, &Topology::default()), Err(Error::Missing(_))), "{name}");
            assert!(matches!(Lab::attach(name), Err(Error::Missing(_))), "{name}");
            assert!(matches!(Lab::down(name), Err(Error::Missing(_))), "{name}");
        }
    }
}
