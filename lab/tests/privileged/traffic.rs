//! A thousand commands while new connections never stop: no client notices.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::load::{self, Load, Report};
use rvs_lab::{Director, Hook, Lab, eventually};

use crate::support::{SOON, Test, TestResult, at, check, director, http, lab_for, on_hooks, serve, vip};

pub fn tests() -> Vec<Test> {
    on_hooks("a_thousand_commands_under_traffic", &[Hook::Xdp, Hook::Tc], a_thousand_commands_under_traffic)
}

const COMMANDS: usize = 1000;

fn a_thousand_commands_under_traffic(hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 2, ..Options::default() })?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    let web = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", web, "-m", 80)?;
    http(&lab, web, 4)?;
    let over = AtomicBool::new(false);
    let (changed, requests) = thread::scope(|scope| {
        let clients = scope.spawn(|| requests_until(&lab, web, &over));
        let changed = changes(&lab, &rvs, web);
        over.store(true, Ordering::Relaxed);
        (changed, clients.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let (commands, (answers, servers)) =
        (changed?, requests.map_err(|e| format!("{e:?}, verdicts {:?}", rvs.verdicts()))?);
    println!("{commands} commands, {answers} requests answered: {servers:?}");
    check(commands >= COMMANDS && answers > 500 && servers.len() == 2, || {
        format!("{commands} commands, {answers} answers by {servers:?}")
    })
}

/// Requests, a connection each, until it is over; every one must be answered. How many were, and by whom.
fn requests_until(lab: &Lab, vip: SocketAddr, over: &AtomicBool) -> TestResult<(usize, BTreeMap<String, usize>)> {
    let (mut answers, mut servers) = (0, BTreeMap::<String, usize>::new());
    while !over.load(Ordering::Relaxed) {
        let report: Report = load::http(lab.node("client")?, &Load::new(vip, 100), &|_| {})?;
        check(report.failed == 0, || format!("after {answers} answers: {report}"))?;
        answers += report.answered();
        for (name, count) in report.servers {
            *servers.entry(name).or_default() += count;
        }
    }
    Ok((answers, servers))
}

/// Every kind of change, again and again; rs1 stays throughout. How many commands there were.
fn changes(lab: &Lab, rvs: &Director<'_>, web: SocketAddr) -> TestResult<usize> {
    let [rs1, rs2] = [at(lab, "rs1", false, 80)?, at(lab, "rs2", false, 80)?];
    let other = vip(lab, false, 81)?;
    let mut done = 0;
    while done < COMMANDS {
        let lines = [
            format!("-e -t {web} -r {rs2} -m -w 3"),
            format!("-E -t {web} -s wlc"),
            format!("-A -t {other} -s wrr"),
            format!("-a -t {other} -r {rs1} -m -w 1"),
            format!("-e -t {web} -r {rs1} -g -w 2"),
            format!("-E -t {web} -s mh"),
            format!("-a -t {other} -r {rs2} -m -w 5"),
            format!("-e -t {web} -r {rs1} -m -w 1"),
            format!("-E -t {web} -s wrr"),
            format!("-d -t {other} -r {rs1}"),
            format!("-Z -t {web}"),
            "--set 800 100 200".to_owned(),
            format!("-D -t {other}"),
            format!("-e -t {web} -r {rs2} -m -w 0"),
        ];
        for line in &lines {
            rvs.ipvsadm(line)?;
        }
        done += lines.len();
        // Taken away while nobody is being served by it, as operators do it.
        if done % (5 * lines.len()) == 0 {
            eventually("the last requests to rs2 to be answered", SOON, || idle(rvs, rs2))?;
            rvs.ipvsadm(&format!("-d -t {web} -r {rs2}"))?;
            rvs.ipvsadm(&format!("-a -t {web} -r {rs2} -m -w 0"))?;
            done += 2;
        }
        rvs.ipvsadm(&format!("-e -t {web} -r {rs2} -m -w 1"))?;
        done += 1;
    }
    Ok(done)
}

/// No connection of this dest is before its end.
fn idle(rvs: &Director<'_>, dest: SocketAddr) -> Result<(), String> {
    let text = rvs.ipvsadm("-Lnc").map_err(|e| e.to_string())?;
    let open = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.last() == Some(&dest.to_string().as_str())
            && words.get(2).is_some_and(|state| ["NONE", "SYN_RECV", "SYN_SENT", "ESTABLISHED"].contains(state))
    };
    match text.lines().find(open) {
        None => Ok(()),
        Some(line) => Err(line.to_owned()),
    }
}
