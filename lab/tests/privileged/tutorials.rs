//! The sequences of the LVS tutorials, typed as they stand there.

use std::net::IpAddr;

use rvs_lab::counters::Kernel;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Hook, Lab, Node, Route, Service};

use crate::support::{
    Test, TestResult, Wiring, check, curl, director, equal, eventually_lists, lab, lab_for, on_hooks, refused, shares,
    vip,
};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("tutorial_nat", &hooks, nat),
        on_hooks("tutorial_dr", &hooks, dr),
        on_hooks("vip_on_lo_behind_a_router", &hooks, vip_on_lo),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const VIP: &str = "172.17.254.99";
const NO_PORT: &str = "Zero port specified for non-persistent service\n";

fn server(name: &str, gateway: Option<&str>) -> TestResult<Node> {
    let routes = match gateway {
        Some(via) => vec![Route { to: None, via: via.parse()?, from: None }],
        None => Vec::new(),
    };
    let services = vec![Service::Http { ports: vec![80] }];
    Ok(Node { name: name.to_owned(), routes, services, ..Node::default() })
}

fn plain(name: &str) -> Node {
    Node { name: name.to_owned(), ..Node::default() }
}

/// Client and VIP in one network, real servers in another whose gateway is the director.
fn nat_lab(hook: Hook) -> TestResult<Lab> {
    let mut net = Wiring::named("tutorial-nat");
    let by_hand = hook != Hook::Tc;
    net.switch("lan");
    net.switch("rack");
    net.host(plain("client"));
    net.host(plain("director"));
    net.plug("client", "eth0", "172.17.254.50/24", "lan", by_hand)?;
    net.plug("director", "eth0", "172.17.254.99/24", "lan", false)?;
    net.plug("director", "eth1", "192.168.100.1/24", "rack", false)?;
    for (name, address) in [("rs1", "192.168.100.2/24"), ("rs2", "192.168.100.3/24")] {
        net.host(server(name, Some("192.168.100.1"))?);
        net.plug(name, "eth0", address, "rack", by_hand)?;
    }
    lab(&net.0)
}

fn nat(hook: Hook) -> TestResult {
    let lab = nat_lab(hook)?;
    let node = lab.node("director")?;
    node.run(&["sysctl", "-w", "net.ipv4.ip_forward=1"])?;
    let rvs = director(&lab, &["eth0", "eth1"], hook)?;
    refused(&rvs, "-A -t 172.17.254.99 -s wrr", 2, NO_PORT)?;
    for line in [
        "-A -t 172.17.254.99:80 -s wrr",
        "-a -t 172.17.254.99:80 -r 192.168.100.2:80 -m -w 1",
        "-a -t 172.17.254.99:80 -r 192.168.100.3:80 -m -w 1",
    ] {
        equal(line, &rvs.ipvsadm(line)?, "")?;
    }
    let listing = |inactive: u32| {
        format!(
            "IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
TCP  172.17.254.99:80 wrr
  -> 192.168.100.2:80             Masq    1      0          {inactive}         \n  \
  -> 192.168.100.3:80             Masq    1      0          {inactive}         \n"
        )
    };
    equal("ipvsadm -Ln", &rvs.ipvsadm("-Ln")?, &listing(0))?;
    both_answer(&lab, "nat", || Ok(rvs.verdicts()?.of("nat")))?;
    eventually_lists(&rvs, "-Ln", &listing(2))?;
    // A client's address stays what it is, and the kernel had nothing to do once the neighbours were known.
    let before = Kernel::read(&node.ns())?;
    shares(&lab, std::net::SocketAddr::new(VIP.parse::<IpAddr>()?, 80), &[("rs1", 20), ("rs2", 20)])?;
    let after = Kernel::read(&node.ns())?;
    check(after.forwarded == before.forwarded, || format!("the kernel forwarded: {before:?} {after:?}"))?;
    equal(
        "ipvsadm -Sn",
        &rvs.ipvsadm("-Sn")?,
        "-A -t 172.17.254.99:80 -s wrr\n-a -t 172.17.254.99:80 -r 192.168.100.2:80 -m -w 1\n-a -t 172.17.254.99:80 -r 192.168.100.3:80 -m -w 1\n",
    )
}

/// `curl` four times: each of two servers twice, and not past the data plane.
fn both_answer(lab: &Lab, method: &str, forwarded: impl Fn() -> TestResult<u64>) -> TestResult {
    let mut names = curl(lab.node("client")?, VIP.parse()?, 4)?;
    names.sort();
    check(names == ["rs1", "rs1", "rs2", "rs2"], || format!("curl was answered by {names:?}"))?;
    let packets = forwarded()?;
    check(packets >= 4 * 4, || format!("the data plane forwarded {packets} packets by {method}"))
}

/// Client, director and real servers in one network; the VIP is an alias of the director's interface.
fn dr_lab(hook: Hook) -> TestResult<Lab> {
    let mut net = Wiring::named("tutorial-dr");
    let by_hand = hook != Hook::Tc;
    net.switch("lan");
    net.host(plain("client"));
    net.host(plain("director"));
    net.plug("client", "eth0", "172.17.254.50/24", "lan", by_hand)?;
    net.plug("director", "eth0", "172.17.254.20/24", "lan", false)?;
    for (name, address) in [("rs1", "172.17.254.31/24"), ("rs2", "172.17.254.32/24")] {
        net.host(server(name, None)?);
        net.plug(name, "eth0", address, "lan", by_hand)?;
    }
    lab(&net.0)
}

fn dr(hook: Hook) -> TestResult {
    let lab = dr_lab(hook)?;
    let node = lab.node("director")?;
    let rvs = director(&lab, &["eth0"], hook)?;
    // The alias comes when rvsd runs already: it sees that.
    node.run(&["ip", "addr", "add", "172.17.254.99/32", "dev", "eth0", "label", "eth0:1"])?;
    for server in ["rs1", "rs2"] {
        for setting in ["all.arp_ignore=1", "all.arp_announce=2", "lo.arp_ignore=1", "lo.arp_announce=2"] {
            lab.node(server)?.run(&["sysctl", "-w", &format!("net.ipv4.conf.{setting}")])?;
        }
        lab.node(server)?.run(&["ip", "addr", "add", "172.17.254.99/32", "dev", "lo", "label", "lo:0"])?;
    }
    refused(&rvs, "-A -t 172.17.254.99 -s wlc", 2, NO_PORT)?;
    for line in [
        "-A -t 172.17.254.99:80 -s rr",
        "-a -t 172.17.254.99:80 -r 172.17.254.31 -g -w 1",
        "-a -t 172.17.254.99:80 -r 172.17.254.32 -g -w 1",
    ] {
        equal(line, &rvs.ipvsadm(line)?, "")?;
    }
    both_answer(&lab, "dr", || Ok(rvs.verdicts()?.of("dr")))?;
    eventually_lists(
        &rvs,
        "-Ln",
        "IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn
TCP  172.17.254.99:80 rr
  -> 172.17.254.31:80             Route   1      0          2         \n  \
  -> 172.17.254.32:80             Route   1      0          2         \n",
    )?;
    let before = Kernel::read(&node.ns())?;
    shares(&lab, std::net::SocketAddr::new(VIP.parse::<IpAddr>()?, 80), &[("rs1", 20), ("rs2", 20)])?;
    let after = Kernel::read(&node.ns())?;
    check(after.forwarded == before.forwarded, || format!("the kernel forwarded: {before:?} {after:?}"))
}

/// DR with the VIP on the director's lo, a router before it, dests without a port, weights 1 and 2.
fn vip_on_lo(hook: Hook) -> TestResult {
    let layout = Layout::LoopbackVip;
    let lab = lab_for(hook, layout, Options { servers: 2, ..Options::default() })?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    for ipv6 in [false, true] {
        let vip = vip(&lab, ipv6, 80)?;
        rvs.ipvsadm(&format!("-A -t {vip} -s wrr"))?;
        for (name, weight) in [("rs1", 1), ("rs2", 2)] {
            let address = lab.topology().address(name, ipv6).ok_or("no address")?;
            // Stock knows no IPv6 address without a port.
            let address = if ipv6 { format!("[{address}]:80") } else { address.to_string() };
            rvs.ipvsadm(&format!("-a -t {vip} -r {address} -g -w {weight}"))?;
        }
        shares(&lab, vip, &[("rs1", 10), ("rs2", 20)])?;
    }
    equal(
        "ipvsadm -Sn",
        &rvs.ipvsadm("-Sn")?,
        "-A -t 198.18.0.100:80 -s wrr
-a -t 198.18.0.100:80 -r 203.0.113.101:80 -g -w 1
-a -t 198.18.0.100:80 -r 203.0.113.102:80 -g -w 2
-A -t [2001:db8:a::100]:80 -s wrr
-a -t [2001:db8:a::100]:80 -r [2001:db8:b::101]:80 -g -w 1
-a -t [2001:db8:a::100]:80 -r [2001:db8:b::102]:80 -g -w 2
",
    )
}
