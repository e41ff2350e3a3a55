//! A table full of connections that somebody made up, and a thousand that are in use: none of those breaks or stalls, and new ones are made.

use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
use rvs_fixtures::frame::{Frame, TCP, flag};
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::load::{self, Load};
use rvs_lab::{Director, Hook, Lab, eventually};

use crate::support::{Test, TestResult, check, http, lab_for, serve, test, vip};
use crate::talk::{Talked, echo, talk};

pub fn tests() -> Vec<Test> {
    [("a_flood_breaks_no_flow_dr", "-g"), ("a_flood_breaks_no_flow_nat", "-m")]
        .map(|(name, method)| test(name, move || flooded(method)))
        .into()
}

const LAYOUT: Layout = Layout::TwoArmed;
const FLOWS: usize = 1000;
/// `rvsd --conns`.
const TABLE: u64 = 64 << 10;
/// So many times as many SYNs.
const TIMES: u64 = 8;
/// A flow that waits so long has stalled. What is promised is one second: how long the longest waited is printed, as is the flood's rate, and a busy machine
/// may be slower without a fault of ours.
const STALL: Duration = Duration::from_secs(5);
const PORT: u16 = 9000;
/// New connections at a time.
const HONEST: usize = 100;
const LONG: Duration = Duration::from_secs(120);

fn flooded(method: &str) -> TestResult {
    let lab = lab_for(Hook::Xdp, LAYOUT, Options { servers: 2, ..Options::default() })?;
    let interfaces: Vec<_> = LAYOUT.director_interfaces().iter().map(|&name| (name, Some(Hook::Xdp))).collect();
    let size = TABLE.to_string();
    let rvs = Director::start_with(lab.node("director")?, &interfaces, &["--conns", &size])?;
    let target = vip(&lab, false, PORT)?;
    serve(&lab, &rvs, "-t", target, method, PORT)?;
    // The first packets to each real server make its MAC address known.
    let web = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", web, "-m", 8080)?;
    http(&lab, web, 4)?;
    for server in ["rs1", "rs2"] {
        let rule = "add rule ip raw prerouting ip saddr 10.0.0.0/8 drop";
        let chain = "add chain ip raw prerouting { type filter hook prerouting priority -300; }";
        lab.node(server)?.output(&["nft", "-f", "-"], &format!("add table ip raw\n{chain}\n{rule}\n"), LONG)?;
    }
    let (over, started) = (AtomicBool::new(false), AtomicUsize::new(0));
    let talked = thread::scope(|scope| {
        let servers = ["rs1", "rs2"].map(|name| {
            let (lab, over, started) = (&lab, &over, &started);
            scope.spawn(move || -> TestResult { lab.node(name)?.enter(|| echo(&[PORT], over, started))? })
        });
        let client = scope.spawn(|| -> TestResult<Talked> {
            lab.node("client")?.enter(|| talk(&[target], FLOWS, 2, &over, &started))?
        });
        let result = under_way(&started, &client).and_then(|()| attack(&lab, &rvs, target, web));
        over.store(true, Relaxed);
        let talked = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        for server in servers {
            server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        println!("{method}: {talked:?}");
        result.and(talked)
    })?;
    let Talked { broken, longest, least, .. } = talked;
    check(broken == 0 && longest < STALL && least > 0, || format!("{method}: {FLOWS} flows: {talked:?}"))
}

/// Waits until all flows have been entered, by more packets than make an entry worth little.
fn under_way(started: &AtomicUsize, client: &thread::ScopedJoinHandle<'_, TestResult<Talked>>) -> TestResult {
    eventually("the flows to be under way", LONG, || match started.load(Relaxed) {
        n if n >= FLOWS + 2 => Ok(()),
        _ if client.is_finished() => Ok(()),
        n => Err(format!("{n} of {FLOWS}")),
    })?;
    Ok(())
}

/// SYNs of nobody; and handshakes of nobody. Then, the table being full of those, the same while honest connections are made to a service
/// whose SYNs are answered with cookies, and a flood of such SYNs.
fn attack(lab: &Lab, rvs: &Director<'_>, target: SocketAddr, web: SocketAddr) -> TestResult {
    for (what, acks) in [("SYNs", false), ("faked handshakes", true)] {
        let sent = AtomicU64::new(0);
        let wanted = TIMES * TABLE * if acks { 2 } else { 1 };
        flood_while(lab, rvs, target, acks, what, &sent, || {
            eventually("the flood to have passed", LONG, || match sent.load(Relaxed) {
                n if n >= wanted => Ok(()),
                n => Err(format!("{n} of {wanted}")),
            })?;
            Ok(())
        })?;
    }
    rvs.rvs(&format!("service set tcp {web} --syn-cookies always"))?;
    for (to, what, acks) in [(target, "faked handshakes", true), (web, "SYNs answered with cookies", false)] {
        let sent = AtomicU64::new(0);
        flood_while(lab, rvs, to, acks, what, &sent, || {
            let mut answered = 0;
            while sent.load(Relaxed) < 2 * TABLE || answered < 5 * HONEST {
                // (How long they take is the machine's business: packets are lost where the flood has filled a queue.)
                let load = Load { timeout: LONG, ..Load::new(web, HONEST) };
                let report = load::http(lab.node("client")?, &load, &|_| {})?;
                check(report.failed == 0, || format!("{web}: {report}; {:?}", rvs.verdicts()))?;
                answered += report.answered();
            }
            println!("new connections meanwhile: {answered} answered, none failed");
            Ok(())
        })?;
    }
    Ok(())
}

/// The work beside a flood, whose rate is printed.
fn flood_while(
    lab: &Lab,
    rvs: &Director<'_>,
    target: SocketAddr,
    acks: bool,
    what: &str,
    sent: &AtomicU64,
    work: impl FnOnce() -> TestResult,
) -> TestResult {
    let over = AtomicBool::new(false);
    let (begin, before) = (Instant::now(), rvs.verdicts()?);
    thread::scope(|scope| {
        let floods = [1, 2].map(|seed| {
            let over = &over;
            scope.spawn(move || -> TestResult { lab.node("router")?.enter(|| flood(target, acks, seed, over, sent))? })
        });
        let mut result = work();
        over.store(true, Relaxed);
        for flood in floods {
            result = result.and(flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        result
    })?;
    let (took, sent) = (begin.elapsed().as_secs_f64(), sent.load(Relaxed));
    let (rate, since) = (sent as f64 / took, rvs.verdicts()?.since(&before));
    println!("{sent} {what} to {target} in {took:.1} s, {rate:.0} packets/s; {since}");
    Ok(())
}

/// SYNs, or SYN and ACK in turn, from random addresses of 10.0.0.0/8, as fast as they can be sent.
fn flood(target: SocketAddr, acks: bool, seed: u64, over: &AtomicBool, sent: &AtomicU64) -> TestResult {
    let SocketAddr::V4(to) = target else { return Err("the flood is of IPv4".into()) };
    let nobody: SocketAddr = "10.0.0.0:0".parse()?;
    let packet = |flags| Frame::new(TCP, nobody, target).flags(flags).options(&[2, 4, 5, 180]).ip();
    let mut syn = packet(flag::SYN);
    let mut ack = Frame::new(TCP, nobody, target).flags(flag::ACK);
    ack.payload.clear();
    let mut ack = ack.ip();
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw)?;
    let to = SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0));
    let sums = [&syn, &ack].map(|p| u16::from_be_bytes([p[36], p[37]]));
    let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
    while !over.load(Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let [a, b, c, p, q, ..] = random.to_be_bytes();
        for (packet, sum) in [&mut syn, &mut ack].into_iter().zip(sums).take(if acks { 2 } else { 1 }) {
            packet[13..16].copy_from_slice(&[a, b, c]);
            packet[20..22].copy_from_slice(&[p, q]);
            // (The kernel makes the header's sum. That of the segment lacks what has changed.)
            let words = [u16::from(a), u16::from_be_bytes([b, c]), u16::from_be_bytes([p, q])];
            let mut all = words.iter().map(|w| u32::from(*w)).sum::<u32>() + u32::from(!sum);
            all = (all & 0xffff) + (all >> 16);
            all = (all & 0xffff) + (all >> 16);
            packet[36..38].copy_from_slice(&(!(all as u16)).to_be_bytes());
            // A full queue is no failure.
            let done = sendto(raw.as_raw_fd(), packet, &to, MsgFlags::empty());
            sent.fetch_add(u64::from(done.is_ok()), Relaxed);
        }
    }
    Ok(())
}
