//! Services by each method, of both families, whose connections talk without a break while something is done to the director: none may break, and each is
//! counted once.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, Process, eventually};
use serde_json::Value;

use crate::support::{TestResult, at, check, connections, lab_for, vip};
use crate::talk::{Talked, echo, talk};

const LAYOUT: Layout = Layout::TwoArmed;
pub const METHODS: [(&str, u16); 4] = [("-m", 9000), ("-g", 9001), ("-i", 9002), ("--fullnat", 9003)];
/// To each of the eight virtual services.
pub const FLOWS: usize = 32;
pub const LONG: Duration = Duration::from_secs(120);

/// Services by each method, of both families, and flows to them that talk while `work` is done.
pub fn while_talking(hook: Hook, work: impl FnOnce(&mut Director<'_>) -> TestResult) -> TestResult {
    while_talking_by("rvsd", hook, work)
}

/// The same, of a director that begins as this program.
pub fn while_talking_by(
    program: &'static str,
    hook: Hook,
    work: impl FnOnce(&mut Director<'_>) -> TestResult,
) -> TestResult {
    let lab = lab_for(hook, LAYOUT, Options { servers: 2, ..Options::default() })?;
    let interfaces: Vec<_> = LAYOUT.director_interfaces().iter().map(|&name| (name, Some(hook))).collect();
    let options = ["--conns", "16384", "--conns6", "16384"];
    let mut rvs = Director::start_as(program, lab.node("director")?, &interfaces, &options)?;
    let targets = services(&lab, &rvs)?;
    let ports = METHODS.map(|(_, port)| port);
    let (over, started) = (AtomicBool::new(false), AtomicUsize::new(0));
    let talked = thread::scope(|scope| {
        let servers = ["rs1", "rs2"].map(|name| {
            let (lab, over, started) = (&lab, &over, &started);
            scope.spawn(move || -> TestResult { lab.node(name)?.enter(|| echo(&ports, over, started))? })
        });
        let client = scope.spawn(|| -> TestResult<Talked> {
            lab.node("client")?.enter(|| talk(&targets, FLOWS, 2, &over, &started))?
        });
        let result = under_way(&started, targets.len() * FLOWS, &client).and_then(|()| work(&mut rvs));
        // All of them once more, when it is done.
        let result = result.and_then(|()| counters(&rvs));
        over.store(true, Relaxed);
        let talked = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        for server in servers {
            server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        println!("{hook}: {talked:?}");
        result.and(talked)
    })?;
    check(talked.broken == 0, || format!("{hook}: {talked:?}"))?;
    // ... and what has ended since is counted as that. (Of who sends nothing any more by DR or a tunnel the director does not hear.)
    eventually("the counters to say what the tables hold", LONG, || {
        let all = connections(&rvs).map_err(|e| format!("{e:?}"))?;
        let counted = all.values().fold([0, 0], |sum, [active, ended]| [sum[0] + active, sum[1] + ended]);
        let listing = rvs.ipvsadm("-Lnc").map_err(|e| e.to_string())?;
        let (active, all) = (lines(&listing, "ESTABLISHED"), lines(&listing, "TCP "));
        if counted == [active, all - active] { Ok(()) } else { Err(format!("{counted:?}\n{listing}")) }
    })?;
    Ok(())
}

fn lines(listing: &str, with: &str) -> u64 {
    listing.lines().filter(|l| l.contains(with)).count() as u64
}

fn services(lab: &Lab, rvs: &Director<'_>) -> TestResult<Vec<SocketAddr>> {
    let mut targets = Vec::new();
    for server in ["rs1", "rs2"] {
        let vips = [vip(lab, false, 0)?.ip(), vip(lab, true, 0)?.ip()];
        let up = format!("up --mode tun --interface eth0 --vip {} --vip {}", vips[0], vips[1]);
        lab.node(server)?.realserver(&up)?;
    }
    for ipv6 in [false, true] {
        for (method, port) in METHODS {
            let target = vip(lab, ipv6, port)?;
            rvs.ipvsadm(&format!("-A -t {target} -s rr"))?;
            if method == "--fullnat" {
                for local in lab.topology().locals(ipv6) {
                    rvs.ipvsadm(&format!("-P -t {target} -z {local}"))?;
                }
            }
            for server in ["rs1", "rs2"] {
                rvs.ipvsadm(&format!("-a -t {target} -r {} {method} -w 1", at(lab, server, ipv6, port)?))?;
            }
            targets.push(target);
        }
    }
    Ok(targets)
}

/// Waits until all flows have been entered, by some packets each.
fn under_way(
    started: &AtomicUsize,
    flows: usize,
    client: &thread::ScopedJoinHandle<'_, TestResult<Talked>>,
) -> TestResult {
    eventually("the flows to be under way", LONG, || match started.load(Relaxed) {
        n if n >= flows + 2 || client.is_finished() => Ok(()),
        n => Err(format!("{n} of {flows}")),
    })?;
    Ok(())
}

/// ActiveConn of all real servers together is the number of flows, as is what the tables hold.
pub fn counters(rvs: &Director<'_>) -> TestResult {
    let flows = (2 * METHODS.len() * FLOWS) as u64;
    eventually("each flow to be counted once", LONG, || {
        let all = connections(rvs).map_err(|e| format!("{e:?}"))?;
        let active: u64 = all.values().map(|[active, _]| *active).sum();
        let listed = rvs.ipvsadm("-Lnc").map_err(|e| e.to_string())?;
        let listed = lines(&listed, "ESTABLISHED");
        if (active, listed) == (flows, flows) {
            Ok(())
        } else {
            Err(format!("{active} {listed}, {flows} flows; {all:?}"))
        }
    })?;
    Ok(())
}

/// `rvs` with these words, begun.
pub fn begin(rvs: &Director<'_>, line: &str) -> TestResult<Process> {
    let mut command = Command::new(rvs_lab::director::program("rvs")?);
    command.args(line.split(' ')).env("RVS_SOCKET", rvs.socket());
    Ok(rvs.node().spawn("rvs", &mut command)?)
}

pub fn tables(rvs: &Director<'_>) -> TestResult<Value> {
    Ok(serde_json::from_str(&rvs.rvs("conntable show --json")?)?)
}

pub fn places(tables: &Value) -> [u64; 2] {
    [0, 1].map(|i| tables["tables"][i]["places"].as_u64().unwrap_or(0))
}

/// When connections have been moved, nothing of the old data plane is left: no pin that says that it is under way, and one program of each kind, with its gates.
pub fn left_over(rvs: &Director<'_>) -> TestResult {
    let folders = ["next", "last", "elder"].map(|name| rvs.pins().join(name));
    check(folders.iter().all(|f| !f.exists()), || format!("one of {folders:?} is there"))?;
    eventually("the gates of programs that are gone to be closed", LONG, || {
        let links = std::fs::read_dir(rvs.pins().join("links")).map_err(|e| e.to_string())?.count();
        let gates = std::fs::read_dir(rvs.pins().join("gates")).map_err(|e| e.to_string())?.count();
        if gates <= links + 1 { Ok(()) } else { Err(format!("{gates} gates of {links} links")) }
    })?;
    Ok(())
}
