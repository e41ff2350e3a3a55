//! Large tables: ten thousand services, half a million connections.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rvs_lab::director::program;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, eventually};

use crate::support::{Test, TestResult, at, check, director, http, lab_for, serve, test, vip};

pub fn tests() -> Vec<Test> {
    vec![
        test("ten_thousand_services_are_restored", ten_thousand_services),
        test("listing_half_a_million_connections_takes_no_memory", half_a_million_connections),
    ]
}

const SERVICES: usize = 10_000;
const DESTS: usize = 4;
/// The goal is 5 s of an optimised build; this is for one that is not, on a busy machine.
const RESTORE_TIME: Duration = Duration::from_secs(30);

fn lab() -> TestResult<Lab> {
    lab_for(Hook::Xdp, Layout::TwoArmed, Options { servers: 1, ..Options::default() })
}

fn start(lab: &Lab) -> TestResult<Director<'_>> {
    director(lab, Layout::TwoArmed.director_interfaces(), Hook::Xdp)
}

fn ten_thousand_services() -> TestResult {
    let lab = lab()?;
    let rvs = start(&lab)?;
    let mut rules = String::new();
    for n in 0..SERVICES {
        let service = SocketAddr::new(Ipv4Addr::new(198, 18, (n >> 8) as u8, n as u8).into(), 80);
        writeln!(rules, "-A -t {service} -s wrr")?;
        for dest in 0..DESTS {
            let number = n * DESTS + dest;
            let address = Ipv4Addr::new(203, 0, 113, 110 + (number % 100) as u8);
            writeln!(rules, "-a -t {service} -r {address}:{} -m -w 1", 1000 + number / 100)?;
        }
    }
    let begin = Instant::now();
    let output = rvs.ipvsadm_output("-R", &rules)?;
    let took = begin.elapsed();
    println!("{SERVICES} services with {DESTS} dests each restored in {took:.1?}");
    check(output.status.success() && output.stderr.is_empty() && took < RESTORE_TIME, || {
        format!("after {took:?}: {} {}", output.status, &output.stderr[..output.stderr.len().min(2000)])
    })?;
    let begin = Instant::now();
    let listing = rvs.ipvsadm("-Ln")?;
    println!("listed in {:.1?}", begin.elapsed());
    let count = |start: &str| listing.lines().filter(|l| l.starts_with(start)).count();
    check((count("TCP "), count("  -> 203.")) == (SERVICES, SERVICES * DESTS), || {
        format!("{} services and {} dests are listed", count("TCP "), count("  -> 203."))
    })?;
    let mut saved: Vec<String> = rvs.ipvsadm("-Sn")?.lines().map(str::to_owned).collect();
    let mut due: Vec<String> = rules.lines().map(str::to_owned).collect();
    saved.sort();
    due.sort();
    check(saved == due, || "what is saved differs from what was restored".to_owned())?;
    // Among so many, the one that clients use.
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, "-m", 8080)?;
    http(&lab, vip, 100)?;
    rvs.ipvsadm("-C")?;
    let left = rvs.ipvsadm("-Sn")?;
    check(left.is_empty(), || format!("{} lines are left after -C", left.lines().count()))
}

/// Client addresses, and source ports of each.
const ADDRESSES: u8 = 20;
const PORTS: std::ops::Range<u16> = 1024..31_024;
const WANTED: usize = 500_000;
/// rvsd may grow by so much while it lists; all rows at once would take fifty times that.
const GROWTH_KIB: u64 = 2 * 1024;

fn half_a_million_connections() -> TestResult {
    let lab = lab()?;
    let rvs = start(&lab)?;
    let vip = vip(&lab, false, 9)?;
    serve(&lab, &rvs, "-u", vip, "-g", 9)?;
    let client = lab.node("client")?;
    // The real server answers nothing, and says nothing about that.
    lab.node("rs1")?.ns().sysctl("net/ipv4/icmp_ratelimit", "1000")?;
    let own = at(&lab, "client", false, 0)?.ip();
    let IpAddr::V4(own) = own else { return Err("the client has no IPv4 address".into()) };
    let addresses: Vec<Ipv4Addr> = (1..=ADDRESSES).map(|n| Ipv4Addr::from(u32::from(own) + u32::from(n))).collect();
    client.ns().ip(&addresses.iter().map(|a| format!("addr add {a}/24 dev eth0")).collect::<Vec<_>>())?;
    let begin = Instant::now();
    client.enter(|| flood(&addresses, vip))??;
    println!("{} datagrams in {:.1?}", addresses.len() * PORTS.len(), begin.elapsed());
    eventually("the connections to be counted", Duration::from_secs(10), || {
        let count = list(&rvs).map_err(|e| format!("{e:?}"))?;
        if count >= WANTED { Ok(()) } else { Err(format!("{count} connections")) }
    })?;
    let pid = rvs.process().ok_or("rvsd has ended")?.pid();
    let before = resident(pid)?;
    let mut most = before;
    for _ in 0..2 {
        let mut listing = rvs.node().ns().spawn(listing(&rvs)?.stdout(Stdio::piped()))?;
        let mut pipe = listing.stdout.take().ok_or("no pipe")?;
        // Read as fast as it comes, and look at rvsd in between.
        let mut lines = 0;
        let mut chunk = vec![0; 1 << 20];
        loop {
            let length = std::io::Read::read(&mut pipe, &mut chunk)?;
            if length == 0 {
                break;
            }
            lines += chunk[..length].iter().filter(|&&b| b == b'\n').count();
            let now = resident(pid)?;
            most = [most[0].max(now[0]), most[1].max(now[1])];
        }
        check(listing.wait()?.success() && lines > WANTED, || format!("{lines} lines were listed"))?;
    }
    println!("rvsd has {before:?} KiB (all, of its own), at most {most:?} while listing");
    check(most[0] <= before[0] + GROWTH_KIB && most[1] <= before[1] + GROWTH_KIB, || {
        format!("rvsd grew from {before:?} to {most:?} KiB while listing")
    })
}

/// One datagram from every address and port.
fn flood(addresses: &[Ipv4Addr], target: SocketAddr) -> std::io::Result<()> {
    for &address in addresses {
        for port in PORTS {
            let socket = UdpSocket::bind((address, port))?;
            socket.send_to(b"flood", target)?;
        }
    }
    Ok(())
}

fn listing(rvs: &Director<'_>) -> TestResult<Command> {
    let mut command = Command::new(program("ipvsadm")?);
    command.arg("-Lnc").env("RVS_SOCKET", rvs.socket());
    Ok(command)
}

/// Connections listed.
fn list(rvs: &Director<'_>) -> TestResult<usize> {
    let text = rvs.node().ns().run(&mut listing(rvs)?, "", Duration::from_secs(60))?;
    Ok(text.lines().count().saturating_sub(2))
}

/// KiB in memory: all (VmRSS, which has the mapped tables in it), and of its own (RssAnon).
fn resident(pid: u32) -> TestResult<[u64; 2]> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let of = |name: &str| -> TestResult<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).ok_or("no such line")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    Ok([of("VmRSS:")?, of("RssAnon:")?])
}
