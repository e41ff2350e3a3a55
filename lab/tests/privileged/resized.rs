//! Tables of another size while connections talk, by every method, and rvsd killed at any moment of it: none breaks, and the counters are right.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, Process, eventually};
use serde_json::Value;

use crate::support::{Test, TestResult, at, check, connections, lab_for, on_hooks, vip};
use crate::talk::{Talked, echo, talk};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("resized_under_way", &hooks, resized),
        on_hooks("resized_and_killed", &hooks, killed),
        on_hooks("what_a_table_can_not_be", &[Hook::Xdp], refused),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const LAYOUT: Layout = Layout::TwoArmed;
const METHODS: [(&str, u16); 4] = [("-m", 9000), ("-g", 9001), ("-i", 9002), ("--fullnat", 9003)];
/// To each of the eight virtual services.
const FLOWS: usize = 32;
const LONG: Duration = Duration::from_secs(120);

/// Services by each method, of both families, and flows to them that talk while `work` is done.
fn while_talking(hook: Hook, work: impl FnOnce(&mut Director<'_>) -> TestResult) -> TestResult {
    let lab = lab_for(hook, LAYOUT, Options { servers: 2, ..Options::default() })?;
    let interfaces: Vec<_> = LAYOUT.director_interfaces().iter().map(|&name| (name, Some(hook))).collect();
    let options = ["--conns", "16384", "--conns6", "16384"];
    let mut rvs = Director::start_with(lab.node("director")?, &interfaces, &options)?;
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
        let result = result.and_then(|()| counters(&rvs, targets.len()));
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
fn counters(rvs: &Director<'_>, targets: usize) -> TestResult {
    let flows = (targets * FLOWS) as u64;
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
fn resize(rvs: &Director<'_>, line: &str) -> TestResult<Process> {
    let mut command = Command::new(rvs_lab::director::program("rvs")?);
    command.args(line.split(' ')).env("RVS_SOCKET", rvs.socket());
    Ok(rvs.node().spawn("rvs", &mut command)?)
}

fn tables(rvs: &Director<'_>) -> TestResult<Value> {
    Ok(serde_json::from_str(&rvs.rvs("conntable show --json")?)?)
}

fn places(tables: &Value) -> [u64; 2] {
    [0, 1].map(|i| tables["tables"][i]["places"].as_u64().unwrap_or(0))
}

fn resized(hook: Hook) -> TestResult {
    while_talking(hook, |rvs| {
        for (line, should_be) in [
            ("conntable resize 65536", [131_072, 49_152]),
            ("conntable resize 8192 --ipv6 6144", [16_384, 12_288]),
            ("conntable resize --ipv6 100000", [16_384, 393_216]),
            ("conntable resize 16384 --ipv6 6144", [32_768, 12_288]),
        ] {
            // (A second, mostly for the kernel to look through the programs; a busy machine takes its time.)
            resize(rvs, line)?.wait(LONG)?;
            let now = tables(rvs)?;
            check(places(&now) == should_be && now.get("moving").is_none(), || format!("{line}: {now}"))?;
            counters(rvs, 2 * METHODS.len())?;
            println!("{line}:\n{}", rvs.rvs("conntable show")?);
        }
        left_over(rvs)
    })
}

/// After a resize nothing of the old data plane is left: no pin that says that it is under way, and one program of each kind, with its gates.
fn left_over(rvs: &Director<'_>) -> TestResult {
    let folders = ["next", "last", "elder"].map(|name| rvs.pins().join(name));
    check(folders.iter().all(|f| !f.exists()), || format!("one of {folders:?} is there"))?;
    eventually("the gates of programs that are gone to be closed", LONG, || {
        let links = std::fs::read_dir(rvs.pins().join("links")).map_err(|e| e.to_string())?.count();
        let gates = std::fs::read_dir(rvs.pins().join("gates")).map_err(|e| e.to_string())?.count();
        if gates <= links + 1 { Ok(()) } else { Err(format!("{gates} gates of {links} links")) }
    })?;
    Ok(())
}

/// At different moments of it.
fn killed(hook: Hook) -> TestResult {
    while_talking(hook, |rvs| {
        let mut small = false;
        for pause in [0, 30, 200, 500, 900, 1300, 1700, 2500] {
            small = !small;
            let (flows, places4) = if small { (8192, 16_384) } else { (65_536, 131_072) };
            let client = resize(rvs, &format!("conntable resize {flows}"))?;
            // (It is not known where that is: that is the point.)
            thread::park_timeout(Duration::from_millis(pause));
            rvs.kill();
            let _ = client.wait(LONG);
            rvs.start_again()?;
            eventually("the move to end", LONG, || {
                let now = tables(rvs).map_err(|e| format!("{e:?}"))?;
                if now.get("moving").is_none() { Ok(()) } else { Err(now.to_string()) }
            })?;
            let now = places(&tables(rvs)?);
            println!("{hook}, killed after {pause} ms: {now:?}");
            counters(rvs, 2 * METHODS.len())?;
            left_over(rvs)?;
            if now[0] != places4 {
                resize(rvs, &format!("conntable resize {flows}"))?.wait(LONG)?;
            }
        }
        Ok(())
    })
}

fn refused(hook: Hook) -> TestResult {
    while_talking(hook, |rvs| {
        let before = places(&tables(rvs)?);
        for (line, why) in [
            ("conntable resize", "how many connections"),
            ("conntable resize 4000000000", "too large"),
            ("conntable resize 8388608 --ipv6 99999999", "too large"),
        ] {
            let said = rvs.rvs(line).err().map(|e| e.to_string()).unwrap_or_default();
            check(said.contains(why), || format!("{line} said {said:?}"))?;
        }
        let now = places(&tables(rvs)?);
        check(now == before, || format!("{before:?} before, {now:?}"))
    })
}
