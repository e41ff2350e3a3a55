//! Networks beyond the tutorials', and what rvsd says about a host that is set up against it.

use std::process::Command;
use std::time::Duration;

use rvs_lab::counters::Kernel;
use rvs_lab::director::program;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::netns::Netns;
use rvs_lab::{Director, Hook, Process, eventually};

use crate::support::{
    SOON, Stop, Test, TestResult, check, director, http, lab_for, on_hooks, said, serve, shares, test, vip,
};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    let mut tests: Vec<Test> = [
        on_hooks("one_armed_nat_and_dr", &hooks, one_armed),
        on_hooks("a_backup_director_forwards_nothing", &hooks, two_directors),
        on_hooks("real_servers_behind_a_bridge_of_the_director", &hooks, bridged_servers),
    ]
    .into_iter()
    .flatten()
    .collect();
    tests.push(test("a_firewall_rule_is_warned_about_iptables", || firewall(&IPTABLES, "INPUT", "iptables -F INPUT")));
    tests.push(test("a_firewall_rule_is_warned_about_nft", || {
        firewall(&NFT, "incoming", "nft delete table inet guard")
    }));
    tests.push(test("a_private_mount_namespace_is_warned_about", private_mounts));
    tests
}

fn one_armed(hook: Hook) -> TestResult {
    let layout = Layout::OneArmed;
    let lab = lab_for(hook, layout, Options { servers: 2, ..Options::default() })?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    for (method, verdict, port) in [("-m", "nat", 8080), ("-g", "dr", 80)] {
        for ipv6 in [false, true] {
            let vip = vip(&lab, ipv6, 80)?;
            serve(&lab, &rvs, "-t", vip, method, port)?;
            http(&lab, vip, 2)?;
            let (kernel, before) = (Kernel::read(&rvs.node().ns())?, rvs.verdicts()?);
            shares(&lab, vip, &[("rs1", 50), ("rs2", 50)])?;
            let (after, since) = (Kernel::read(&rvs.node().ns())?, rvs.verdicts()?.since(&before));
            check(after.forwarded == kernel.forwarded && since.of(verdict) >= 400, || {
                format!("{method} {vip}: {since}, the kernel forwarded {kernel:?} {after:?}")
            })?;
            rvs.ipvsadm(&format!("-D -t {vip}"))?;
        }
    }
    Ok(())
}

/// Both have the rules, the switch floods, one has the VIP: the other hears everything and touches nothing.
fn two_directors(hook: Hook) -> TestResult {
    let layout = Layout::TwoDirectors;
    let lab = lab_for(hook, layout, Options { servers: 2, ..Options::default() })?;
    let active = director(&lab, layout.director_interfaces(), hook)?;
    let wanted: Vec<_> = layout.director_interfaces().iter().map(|&name| (name, Some(hook))).collect();
    let backup = Director::start(lab.node("director2")?, &wanted)?;
    for ipv6 in [false, true] {
        for (method, port) in [("-m", 8080), ("-g", 80)] {
            let vip = vip(&lab, ipv6, 80)?;
            for rvs in [&active, &backup] {
                serve(&lab, rvs, "-t", vip, method, port)?;
            }
            http(&lab, vip, 2)?;
            let before = backup.verdicts()?;
            shares(&lab, vip, &[("rs1", 50), ("rs2", 50)])?;
            let since = backup.verdicts()?.since(&before);
            let heard = since.of("other_mac") + since.of("not_local");
            let idle = ["other_mac", "not_local", "not_ip", "icmp", "other_protocol"];
            check(heard >= 400 && since.0.keys().all(|name| idle.contains(&name.as_str())), || {
                format!("{method} {vip}: the backup's verdicts were {since}")
            })?;
            for rvs in [&active, &backup] {
                rvs.ipvsadm(&format!("-D -t {vip}"))?;
            }
        }
    }
    Ok(())
}

fn bridged_servers(hook: Hook) -> TestResult {
    let layout = Layout::BridgedServers;
    let lab = lab_for(hook, layout, Options { servers: 2, ..Options::default() })?;
    // A bridge device takes no native XDP.
    let on_bridge = if hook == Hook::Tc { Hook::Tc } else { Hook::Skb };
    let rvs = match Director::start(lab.node("director")?, &[("front", Some(hook)), ("br0", Some(on_bridge))]) {
        Err(error) if hook == Hook::Tc && error.to_string().contains("has no program rvs_tc_in") => {
            return Err(Stop::Skipped("this build of rvsd has no tc programs".to_owned()));
        }
        started => started?,
    };
    for (method, port) in [("-m", 8080), ("-g", 80)] {
        for ipv6 in [false, true] {
            let vip = vip(&lab, ipv6, 80)?;
            serve(&lab, &rvs, "-t", vip, method, port)?;
            http(&lab, vip, 2)?;
            let before = rvs.verdicts()?;
            shares(&lab, vip, &[("rs1", 50), ("rs2", 50)]).map_err(|e| format!("{method} {vip}: {e:?}"))?;
            let since = rvs.verdicts()?.since(&before);
            let verdict = if method == "-m" { "nat" } else { "dr" };
            check(since.of(verdict) >= 400, || format!("{method} {vip}: {since}"))?;
            rvs.ipvsadm(&format!("-D -t {vip}"))?;
        }
    }
    Ok(())
}

const IPTABLES: [&str; 1] = ["iptables -A INPUT -p tcp --dport 80 -j DROP"];
const NFT: [&str; 3] = [
    "nft add table inet guard",
    "nft add chain inet guard incoming { type filter hook input priority 0 ; }",
    "nft add rule inet guard incoming tcp dport 80 drop",
];

/// rvsd reads the rules within a second of a change of its services, and once a minute.
const RULES_TIME: Duration = Duration::from_secs(30);

/// XDP takes the packets before INPUT: IPVS, which comes after it, would never have got them.
fn firewall(rules: &[&str], chain: &str, mended: &str) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(Hook::Xdp, layout, Options { servers: 1, ..Options::default() })?;
    let rvs = director(&lab, layout.director_interfaces(), Hook::Xdp)?;
    for rule in rules {
        rvs.node().run(&rule.split(' ').collect::<Vec<_>>())?;
    }
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, "-g", 80)?;
    eventually("a warning of the rule", RULES_TIME, || {
        let status = rvs.rvs("status").map_err(|e| e.to_string())?;
        let warning =
            |line: &&str| line.contains(chain) && line.contains("could drop") && line.contains(&vip.to_string());
        if status.lines().any(|line| warning(&line)) { Ok(()) } else { Err(status) }
    })?;
    let log = std::fs::read_to_string(rvs.process().ok_or("rvsd has ended")?.log())?;
    check(log.lines().any(|l| l.contains("WARN") && l.contains("could drop")), || log.clone())?;
    http(&lab, vip, 2)?;
    rvs.node().run(&mended.split(' ').collect::<Vec<_>>())?;
    rvs.ipvsadm(&format!("-A -t {}:81 -s rr", vip.ip()))?;
    eventually("the warning to go with the rule", RULES_TIME, || {
        let status = rvs.rvs("status").map_err(|e| e.to_string())?;
        if status.contains("could drop") { Err(status) } else { Ok(()) }
    })?;
    Ok(())
}

/// `ip netns exec` gives a private mount namespace: what is pinned there ends with the process.
fn private_mounts() -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(Hook::Xdp, layout, Options { servers: 1, ..Options::default() })?;
    let node = lab.node("director")?;
    let (socket, pins) = (node.dir().join("rvsd.sock"), node.dir().join("bpf"));
    let mut command = Command::new("ip");
    command.args(["netns", "exec", node.ns().name()]).arg(program("rvsd")?);
    command.arg("--socket").arg(&socket).arg("--pin").arg(&pins).args(["--interface", "front=xdp"]);
    let process = Process::spawn("rvsd", &Netns::here(), &mut command, &node.dir())?;
    process.wait_line("rvsd: ready", Duration::from_secs(60))?;
    let mut rvs = Command::new(program("rvs")?);
    let status = node.ns().output(rvs.arg("status").env("RVS_SOCKET", &socket), "", SOON)?;
    let told = |text: &str| text.contains("private mount namespace") && text.contains("nsenter --net");
    check(status.status.success() && told(&said(&status)), || said(&status))?;
    let log = std::fs::read_to_string(process.log())?;
    check(told(&log), || log.clone())
}
