//! What people try first when something seems wrong: traceroute through the director, dig for an answer of many packets, and a large transfer
//! to a real server behind a narrow link. The tools are Debian's.

use std::net::{IpAddr, Ipv6Addr, TcpListener};
use std::time::Duration;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{End, Hook, Lab, Link, Node, Route, load};
use socket2::SockRef;

use crate::paths::{PATIENCE, transfer};
use crate::support::{Test, TestResult, at, check, director, lab, lab_for, on_hooks, serve, vip};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Skb, Hook::Tc];
    [
        on_hooks("traceroute", &hooks, traceroute),
        on_hooks("large_answers_of_dns", &hooks, large_answers),
        on_hooks("narrow_link_behind_a_tunnel", &hooks, narrow_link),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const LAYOUT: Layout = Layout::TwoArmed;
const LONG: Duration = Duration::from_secs(60);

// ---- traceroute

/// Hops as `traceroute -n -q 1` tells them: the address, or `*`.
fn hops(text: &str) -> Vec<String> {
    let hop = |line: &str| {
        let mut words = line.split_whitespace();
        words.next()?.parse::<u8>().ok()?;
        words.next().map(str::to_owned)
    };
    text.lines().skip(1).filter_map(hop).collect()
}

/// To the virtual address (by UDP and echo requests: the director's own; by TCP and UDP to a service: through it), and to a real server that
/// the director is the way to.
fn traceroute(hook: Hook) -> TestResult {
    let lab = lab_for(hook, LAYOUT, Options { servers: 1, ..Options::default() })?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    // Hosts tell one client of so many errors a second and no more: 30 traces at once would see stars.
    for node in ["router", "director", "rs1"] {
        for name in ["net/ipv4/icmp_ratelimit", "net/ipv6/icmp/ratelimit"] {
            lab.node(node)?.ns().sysctl(name, "0")?;
        }
    }
    for ipv6 in [false, true] {
        let (web, dns) = (vip(&lab, ipv6, 80)?, vip(&lab, ipv6, 53)?);
        let server = at(&lab, "rs1", ipv6, 80)?.ip();
        let hosts = |ip: IpAddr| format!("{ip}/{}", if ipv6 { 128 } else { 32 });
        let (vip, director) = (web.ip().to_string(), at(&lab, "director", ipv6, 0)?.ip().to_string());
        let router = at(&lab, "router", ipv6, 0)?.ip().to_string();
        lab.node("router")?.run(&["ip", "route", "replace", &hosts(server), "via", &director])?;
        for method in ["-m", "-g", "--fullnat"] {
            serve(&lab, &rvs, "-t", web, method, 80)?;
            serve(&lab, &rvs, "-u", dns, method, 53)?;
            let server = server.to_string();
            let through = [&*router, &vip, &vip];
            let cases: [(&[&str], &str, &[&str]); 6] = [
                // The probe's ports are nobody's, or it has none: the kernel answers for the virtual address.
                (&[], &vip, &[&router, &vip]),
                (&["-I"], &vip, &[&router, &vip]),
                // The second hop says that time is up, from the virtual address; then the service answers.
                (&["-T", "-p", "80"], &vip, &through),
                (&["-U", "-p", "53", "-m", "3"], &vip, &through[..2]),
                (&[], &server, &[&router, &director, &server]),
                (&["-I"], &server, &[&router, &director, &server]),
            ];
            for (options, to, due) in cases {
                let family = if ipv6 { "-6" } else { "-4" };
                let words = [&["traceroute", family, "-n", "-q", "1", "-w", "3"], options, &[to]].concat();
                let output = lab.node("client")?.output(&words, "", LONG)?;
                let is = hops(&output.stdout);
                let shown =
                    || format!("{method}: {}: {due:?} are due: {output:?}; {:?}", words.join(" "), rvs.verdicts());
                // (A host with two addresses in a network speaks from either.)
                let same = |(is, due): (&String, &&str)| is == due || *due == director && *is == vip;
                let all = is.len() >= due.len() && is.iter().zip(due).all(same);
                check(output.status.success() && all, shown)?;
            }
            rvs.ipvsadm("-C")?;
        }
    }
    Ok(())
}

// ---- dig

/// An answer of 4 KB in three fragments, by NAT, FULLNAT and DR.
fn large_answers(hook: Hook) -> TestResult {
    let lab = lab_for(hook, LAYOUT, Options { servers: 1, ..Options::default() })?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    for ipv6 in [false, true] {
        let service = vip(&lab, ipv6, 53)?;
        for (method, reply) in [("-m", "nat_reply"), ("--fullnat", "fullnat_reply"), ("-g", "dr")] {
            serve(&lab, &rvs, "-u", service, method, 53)?;
            let before = rvs.verdicts()?;
            let to = format!("@{}", service.ip());
            let asked =
                ["dig", "+notcp", "+ignore", "+bufsize=4096", "+tries=3", "+timeout=5", &to, "TXT", load::DNS_LARGE];
            let answer = lab.node("client")?.run(&asked)?;
            let size = answer.lines().find_map(|l| l.strip_prefix(";; MSG SIZE  rcvd: ")?.trim().parse::<u32>().ok());
            check(size.is_some_and(|n| n > 4000) && answer.contains("status: NOERROR"), || {
                format!("{method}: {answer}")
            })?;
            let since = rvs.verdicts()?.since(&before);
            // (While a next hop is not ready yet, the kernel forwards what is translated.)
            let least = if method == "-g" { 1 } else { 3 };
            check(since.of(reply) + since.of("nat_by_kernel") >= least, || format!("{method} {service}: {since}"))?;
            rvs.ipvsadm("-C")?;
        }
    }
    Ok(())
}

// ---- a narrow link

/// Bytes that a packet may have on the link to the real server.
const NARROW: u32 = 1400;
const PORT: u16 = 9000;

/// A real server on the router's other side, behind a link that takes 1,400 bytes: in the middle, where neither end sees it.
fn with_far_server() -> TestResult<Lab> {
    let mut topology = LAYOUT.topology(&Options { servers: 1, ..Options::default() });
    let net = |host: &str| -> TestResult<_> {
        Ok(vec![format!("192.168.7.{host}/24").parse()?, format!("fd00:7::{host}/64").parse()?])
    };
    let gateway = |via: &str| -> TestResult<_> { Ok(Route { to: None, via: via.parse()?, from: None }) };
    let routes = vec![gateway("192.168.7.1")?, gateway("fd00:7::1")?];
    topology.nodes.push(Node { name: "far".into(), routes, ..Node::default() });
    let end = |node: &str, interface: &str, host: &str| -> TestResult<_> {
        Ok(End { node: node.into(), interface: interface.into(), addresses: net(host)?, ..End::default() })
    };
    let mut own = end("far", "eth0", "2")?;
    own.offload = [("tx", false), ("gso", false)].map(|(name, on)| (name.to_owned(), on)).into();
    topology.links.push(Link { ends: [own, end("router", "far", "1")?] });
    let lab = lab(&topology)?;
    let router = lab.node("router")?;
    let mtu = NARROW.to_string();
    router.run(&["ip", "route", "replace", "192.168.7.0/24", "dev", "far", "proto", "kernel", "mtu", &mtu])?;
    router.run(&[
        "ip",
        "-6",
        "route",
        "replace",
        "fd00:7::/64",
        "dev",
        "far",
        "proto",
        "kernel",
        "mtu",
        &mtu,
        "metric",
        "256",
    ])?;
    Ok(lab)
}

/// The client learns what fits into the tunnel over that link, and all of a transfer arrives: each kind of tunnel, each family in its own.
fn narrow_link(hook: Hook) -> TestResult {
    let lab = with_far_server()?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let vips = [vip(&lab, false, PORT)?, vip(&lab, true, PORT)?];
    let up = format!("up --mode tun --mss off --interface eth0 --vip {} --vip {}", vips[0].ip(), vips[1].ip());
    let said = lab.node("far")?.realserver(&up)?;
    check(said.contains("ready for tunnels"), || said)?;
    let listener = lab.node("far")?.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)))??;
    SockRef::from(&listener).set_read_timeout(Some(PATIENCE))?;
    for (kind, overhead) in [("ipip", 0), ("gre", 4), ("gue --tun-port 6080", 12)] {
        for vip in vips {
            let to = if vip.is_ipv6() { "[fd00:7::2]" } else { "192.168.7.2" };
            let outer = if vip.is_ipv6() { 40 } else { 20 };
            let name = format!("{kind}, {vip}");
            lab.node("client")?.run(&["ip", if vip.is_ipv6() { "-6" } else { "-4" }, "route", "flush", "cache"])?;
            rvs.ipvsadm(&format!("-A -t {vip} -s rr"))?;
            rvs.ipvsadm(&format!("-a -t {vip} -r {to}:{PORT} -i --tun-type {kind}"))?;
            let before = rvs.verdicts()?;
            for upload in [true, false] {
                let moved = transfer(&lab, vip, &listener, upload);
                let since = rvs.verdicts()?.since(&before);
                moved.map_err(|why| format!("{name}, {}: {why:?}, {since}", if upload { "up" } else { "down" }))?;
            }
            let learnt = lab.node("client")?.run(&["ip", "route", "get", &vip.ip().to_string()])?;
            let due = format!(" mtu {} ", NARROW - outer - overhead);
            check(learnt.contains(&due), || format!("{name}:{due}is due: {learnt}"))?;
            rvs.ipvsadm(&format!("-D -t {vip}"))?;
        }
    }
    Ok(())
}
