//! A table full of connections that somebody made up, and a thousand that are in use: none of those breaks or stalls, and new ones are made.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
use rvs_fixtures::frame::{Frame, TCP, flag};
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::load::{self, Load};
use rvs_lab::{Director, Hook, Lab, eventually};

use crate::support::{Test, TestResult, check, http, lab_for, serve, test, vip};

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
/// New connections at a time, and how long one may take.
const HONEST: usize = 100;
const PATIENT: Duration = Duration::from_secs(30);
/// What the two ends say to each other in turn: a block, and the same back; each flow so often.
const BLOCK: usize = 1024;
const PAUSE: Duration = Duration::from_millis(50);
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
            scope.spawn(move || -> TestResult { lab.node(name)?.enter(|| echo(over, started))? })
        });
        let client =
            scope.spawn(|| -> TestResult<Talked> { lab.node("client")?.enter(|| talk(target, &over, &started))? });
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
            let (mut answered, mut failed, mut failures) = (0, 0, Vec::new());
            while sent.load(Relaxed) < 2 * TABLE || answered < 5 * HONEST {
                // (How long they take is the machine's business: packets are lost where the flood has filled a queue.)
                let load = Load { timeout: PATIENT, ..Load::new(web, HONEST) };
                let report = load::http(lab.node("client")?, &load, &|_| {})?;
                (answered, failed) = (answered + report.answered(), failed + report.failed);
                failures.extend(report.failures);
            }
            println!("new connections meanwhile: {answered} answered, {failed} failed {failures:?}");
            check(failed == 0, || format!("{web}: {failed} failed, {answered} answered: {failures:?}"))
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

/// What a thousand flows went through.
#[derive(Debug, Default)]
struct Talked {
    broken: usize,
    /// The longest that a block took to come back.
    longest: Duration,
    /// Blocks of all flows, and of the flow with the fewest.
    blocks: u64,
    least: u64,
    /// The first failure.
    why: Option<String>,
}

struct Flow {
    stream: TcpStream,
    blocks: u64,
    /// When the next block is due; while one is under way, when it was sent, and how much of it is back.
    at: Instant,
    under_way: Option<usize>,
    broken: bool,
}

fn block(flow: usize, number: u64) -> [u8; BLOCK] {
    std::array::from_fn(|i| (i as u64 ^ number ^ (flow as u64).wrapping_mul(7)) as u8)
}

/// Many flows, a block each in turn. `started` counts those that have had four back.
fn talk(target: SocketAddr, over: &AtomicBool, started: &AtomicUsize) -> TestResult<Talked> {
    eventually("the servers to listen", LONG, || if started.load(Relaxed) >= 2 { Ok(()) } else { Err(String::new()) })?;
    let mut flows = Vec::new();
    for n in 0..FLOWS {
        let stream = TcpStream::connect_timeout(&target, LONG).map_err(|e| format!("flow {n}: {e}"))?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        flows.push(Flow { stream, blocks: 0, at: Instant::now(), under_way: None, broken: false });
    }
    let mut talked = Talked::default();
    while !over.load(Relaxed) {
        let ready = {
            let watched = |flow: &Flow| if flow.broken { PollFlags::empty() } else { PollFlags::POLLIN };
            let mut fds: Vec<_> = flows.iter().map(|f| PollFd::new(f.stream.as_fd(), watched(f))).collect();
            poll(&mut fds, PollTimeout::from(5u8))?;
            fds.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>()
        };
        for (n, (flow, ready)) in flows.iter_mut().zip(ready).enumerate().filter(|(_, (flow, _))| !flow.broken) {
            if let Err(why) = go_on(n, flow, ready, &mut talked, started) {
                flow.broken = true;
                talked.broken += 1;
                talked.why.get_or_insert(format!("flow {n} after {} blocks: {why}", flow.blocks));
            }
        }
    }
    talked.blocks = flows.iter().map(|f| f.blocks).sum();
    talked.least = flows.iter().map(|f| f.blocks).min().unwrap_or(0);
    Ok(talked)
}

fn go_on(n: usize, flow: &mut Flow, ready: bool, talked: &mut Talked, started: &AtomicUsize) -> Result<(), String> {
    match flow.under_way {
        None if flow.at <= Instant::now() => {
            flow.stream.write_all(&block(n, flow.blocks)).map_err(|e| format!("send: {e}"))?;
            (flow.at, flow.under_way) = (Instant::now(), Some(0));
        }
        Some(mut back) => {
            let mut bytes = [0; BLOCK];
            if ready {
                let got = flow.stream.read(&mut bytes[back..]);
                match got {
                    Ok(0) => return Err("the other end has closed".into()),
                    Ok(got) if bytes[back..back + got] != block(n, flow.blocks)[back..back + got] => {
                        return Err("other bytes came back".into());
                    }
                    Ok(got) => back += got,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                    Err(e) => return Err(format!("receive: {e}")),
                }
            }
            talked.longest = talked.longest.max(flow.at.elapsed());
            flow.under_way = Some(back);
            if back == BLOCK {
                flow.blocks += 1;
                (flow.at, flow.under_way) = (Instant::now() + PAUSE, None);
                started.fetch_add(usize::from(flow.blocks == 4), Relaxed);
            }
        }
        None => {}
    }
    Ok(())
}

/// A server that sends back what it gets.
fn echo(over: &AtomicBool, started: &AtomicUsize) -> TestResult {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    listener.set_nonblocking(true)?;
    started.fetch_add(1, Relaxed);
    let mut streams: Vec<TcpStream> = Vec::new();
    while !over.load(Relaxed) {
        let ready = {
            let mut fds = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            fds.extend(streams.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)));
            poll(&mut fds, PollTimeout::from(50u8))?;
            fds.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>()
        };
        let mut bytes = [0; 4 * BLOCK];
        for (stream, _) in streams.iter_mut().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            // (What goes wrong here shows at the other end.)
            if let Ok(n) = stream.read(&mut bytes) {
                let _ = stream.write_all(&bytes[..n]);
            }
        }
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            streams.push(stream);
        }
    }
    Ok(())
}
