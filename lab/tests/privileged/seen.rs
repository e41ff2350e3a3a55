//! What `rvs why` foretells happens, and nothing by it; `rvs trace` shows what comes.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rvs_lab::director::program;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, Process, eventually};
use serde_json::Value;

use crate::support::{Stop, Test, TestResult, at, check, director, equal, lab_for, on_hooks, serve, vip};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("what_is_foretold_happens", &hooks, what_is_foretold_happens),
        on_hooks("packets_are_traced", &hooks, packets_are_traced),
        on_hooks("no_tracing_is_left", &[Hook::Xdp], no_tracing_is_left),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const LAYOUT: Layout = Layout::TwoArmed;
/// Loading a copy of the data plane, on a busy machine.
const LONG: Duration = Duration::from_secs(60);

fn lab_of(hook: Hook) -> TestResult<Lab> {
    lab_for(hook, LAYOUT, Options { servers: 2, ..Options::default() })
}

fn start<'a>(lab: &'a Lab, hook: Hook) -> TestResult<Director<'a>> {
    director(lab, LAYOUT.director_interfaces(), hook)
}

/// The only row of `rvs why --json`.
fn why(rvs: &Director<'_>, line: &str) -> TestResult<Value> {
    let text = rvs.rvs(&format!("why --json {line}"))?;
    let rows: Value = serde_json::from_str(&text)?;
    Ok(rows.get(0).cloned().ok_or("no row")?)
}

/// A request from this port; the name of who answers.
fn request(lab: &Lab, from: SocketAddr, vip: SocketAddr) -> TestResult<String> {
    let url = format!("http://{vip}/");
    let port = from.port().to_string();
    let words = ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", "--local-port", &port, &url];
    let answer = lab.node("client")?.run(&words)?;
    Ok(answer.split(' ').next().unwrap_or_default().to_owned())
}

/// All that operators see of the data plane, without what time changes.
fn shown(rvs: &Director<'_>) -> TestResult<String> {
    let verdicts = rvs.verdicts()?;
    let mut conns: Vec<String> = Vec::new();
    for line in rvs.ipvsadm("-Lnc")?.lines() {
        conns
            .push(line.split_whitespace().enumerate().filter(|(i, _)| *i != 1).map(|(_, w)| format!("{w} ")).collect());
    }
    conns.sort();
    let stats = rvs.ipvsadm("-Ln --stats --exact")?;
    Ok(format!("{} {} {}\n{stats}\n{conns:?}", verdicts.of("nat"), verdicts.of("nat_reply"), verdicts.of("no_service")))
}

fn what_is_foretold_happens(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let vip = vip(&lab, ipv6, 80)?;
        serve(&lab, &rvs, "-t", vip, "-m", 80)?;
        let names = [("rs1", at(&lab, "rs1", ipv6, 80)?), ("rs2", at(&lab, "rs2", ipv6, 80)?)];
        for n in 0..3 {
            // (A port of the client's is both families'.)
            let from = at(&lab, "client", ipv6, 45000 + 10 * u16::from(ipv6) + n)?;
            let before = shown(&rvs)?;
            let told = why(&rvs, &format!("tcp {from} {vip}"))?;
            equal("what is shown after rvs why", &shown(&rvs)?, &before)?;
            let dest: SocketAddr = SocketAddr::new(
                told["dest"]["id"]["addr"].as_str().ok_or("no dest")?.parse()?,
                told["dest"]["id"]["port"].as_u64().unwrap_or_default() as u16,
            );
            let words = ["interface", "outcome", "reason", "connection", "scheduler", "out"].map(|k| told[k].as_str());
            let due = [Some("front"), Some("forwarded"), Some("nat"), Some("new"), Some("rr"), Some("back")];
            check(words == due, || format!("{told}"))?;
            let answered = request(&lab, from, vip)?;
            check(names.contains(&(answered.as_str(), dest)), || format!("{answered} answered, foretold was {dest}"))?;
            let now = why(&rvs, &format!("tcp {from} {vip} --flags ack"))?;
            check(now["connection"] == "known" && now["dest"] == told["dest"], || format!("{now} after {told}"))?;
            // Its reply, from the other side.
            let reply = why(&rvs, &format!("tcp {dest} {from} --flags ack --interface back"))?;
            check(reply["reason"] == "nat_reply" && reply["out"] == "front", || format!("{reply}"))?;
        }
        let text = rvs.rvs(&format!("why tcp {} {}", at(&lab, "client", ipv6, 1)?, SocketAddr::new(vip.ip(), 81)))?;
        check(text.contains("  passed up     no_service: no virtual service") && text.contains("what to do"), || text)?;
    }
    let (from, to) = (at(&lab, "client", false, 1)?, vip(&lab, true, 80)?);
    let refused = rvs.rvs(&format!("why tcp {from} {to}"));
    check(refused.as_ref().is_err_and(|e| e.to_string().contains("one address is IPv4")), || format!("{refused:?}"))?;
    let refused = rvs.rvs(&format!("why tcp {from} {} --interface lo", vip(&lab, false, 80)?));
    check(refused.as_ref().is_err_and(|e| e.to_string().contains("lo has no program")), || format!("{refused:?}"))
}

fn trace(rvs: &Director<'_>, name: &str, words: &[&str]) -> TestResult<Process> {
    let mut command = Command::new(program("rvs")?);
    command.arg("trace").args(words).env("RVS_SOCKET", rvs.socket());
    Ok(rvs.node().spawn(name, &mut command)?)
}

/// Requests until it has seen enough; what it printed.
fn until_ended(lab: &Lab, process: &Process, vip: SocketAddr) -> TestResult<String> {
    let url = format!("http://{vip}/");
    eventually("rvs trace to end", LONG, || {
        let _ = lab.node("client").and_then(|node| node.run(&["curl", "--silent", "--max-time", "5", &url]));
        if process.has_ended() { Ok(()) } else { Err("it goes on".to_owned()) }
    })?;
    Ok(std::fs::read_to_string(process.log())?)
}

fn packets_are_traced(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = start(&lab, hook)?;
    let (client, vip) = (at(&lab, "client", false, 0)?.ip(), vip(&lab, false, 80)?);
    serve(&lab, &rvs, "-t", vip, "-m", 80)?;
    let filter = format!("tcp port 80 and host {client} and service tcp:{vip}");
    let traced = trace(&rvs, "trace", &["--count", "20", "--filter", &filter])?;
    let text = until_ended(&lab, &traced, vip)?;
    let lines: Vec<&str> = text.lines().collect();
    check(lines.len() == 20, || text.clone())?;
    let to = format!("> {vip} tcp");
    for (what, kind) in [(to.as_str(), "forwarded, nat, real server"), ("> ", "forwarded, nat_reply, real server")] {
        let found = lines.iter().any(|l| l.contains(what) && l.contains(kind) && l.contains(&client.to_string()));
        check(found, || format!("no {kind} in\n{text}"))?;
    }
    check(lines.iter().all(|l| l.contains("forwarded, nat")), || text.clone())?;

    let file = rvs.node().dir().join("traced.pcapng");
    let path = file.to_string_lossy().into_owned();
    let traced = trace(&rvs, "pcap", &["--count", "10", "--filter", "reason nat", "--pcap", &path])?;
    until_ended(&lab, &traced, vip)?;
    let read = rvs.node().run(&["tcpdump", "-n", "-r", &path])?;
    let towards = format!("> {}.80: Flags", vip.ip());
    check(read.lines().filter(|l| l.contains(&towards)).count() == 10, || read.clone())?;
    let bytes = std::fs::read(&file)?;
    check(bytes.windows(14).any(|w| w == b"forwarded, nat"), || "no verdict in the file".to_owned())?;

    let traced = trace(&rvs, "none", &["--duration", "2", "--filter", "udp port 80"])?;
    let text = until_ended(&lab, &traced, vip)?;
    equal("what a filter for other packets shows", &text, "")?;
    let wrong = rvs.rvs("trace --filter tcp_port_80");
    check(wrong.as_ref().is_err_and(|e| e.to_string().contains("tcp_port_80")), || format!("{wrong:?}"))
}

/// Interfaces with the bit `abi::TRACED` (`abi::Iface`: of the number at bytes 8..12 of 24), and whether the programs have a filter.
fn told(rvs: &Director<'_>) -> TestResult<(usize, bool)> {
    let bytes = |name: &str| -> TestResult<Vec<u8>> {
        let path = rvs.pins().join(name).to_string_lossy().into_owned();
        let text = rvs.node().run(&["bpftool", "-j", "map", "dump", "pinned", &path])?;
        let value: Value = serde_json::from_str(&text)?;
        let byte = |v: &Value| u8::from_str_radix(v.as_str()?.trim_start_matches("0x"), 16).ok();
        let bytes: Option<Vec<u8>> = value[0]["value"].as_array().and_then(|all| all.iter().map(byte).collect());
        Ok(bytes.ok_or_else(|| format!("no bytes of {name} in {}", &text[..text.len().min(200)]))?)
    };
    let ifaces = bytes("IFACES")?;
    Ok((ifaces.chunks(24).filter(|iface| iface[11] & 0x80 != 0).count(), bytes("TRACE")?.iter().any(|b| *b != 0)))
}

fn no_tracing_is_left(hook: Hook) -> TestResult {
    if !Path::new("/usr/sbin/bpftool").exists() {
        return Err(Stop::Skipped("bpftool is not installed".to_owned()));
    }
    let lab = lab_of(hook)?;
    let mut rvs = start(&lab, hook)?;
    let on = |rvs: &Director<'_>, should_be: (usize, bool)| {
        eventually(&format!("tracing to be {should_be:?}"), LONG, || match told(rvs) {
            Ok(is) if is == should_be => Ok(()),
            other => Err(format!("{other:?}")),
        })
    };
    on(&rvs, (0, false))?;
    let client = trace(&rvs, "client", &[])?;
    on(&rvs, (2, true))?;
    let second = rvs.rvs("trace --count 1");
    check(second.as_ref().is_err_and(|e| e.to_string().contains("one at a time")), || format!("{second:?}"))?;
    // The client goes.
    drop(client);
    on(&rvs, (0, false))?;
    // rvsd goes.
    let client = trace(&rvs, "other-client", &[])?;
    on(&rvs, (2, true))?;
    rvs.kill();
    eventually("rvs trace to end", LONG, || if client.has_ended() { Ok(()) } else { Err("it goes on".to_owned()) })?;
    check(told(&rvs)? == (2, true), || "what a killed rvsd leaves".to_owned())?;
    rvs.start_again()?;
    check(told(&rvs)? == (0, false), || "a new rvsd leaves tracing on".to_owned())?;
    Ok(())
}
