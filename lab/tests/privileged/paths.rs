//! Twenty megabytes each way by every forwarding method, along paths that take smaller packets in the middle: the right bytes, and no stall.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Hook, Lab};
use socket2::SockRef;

use crate::support::{Stop, Test, TestResult, check, director, http, lab, test, vip};

pub fn tests() -> Vec<Test> {
    // After XDP nobody finishes a checksum that an endpoint left to its device: there, none is left.
    let cases =
        [("paths_xdp", Hook::Xdp, false), ("paths_tc", Hook::Tc, false), ("paths_tc_with_offloads", Hook::Tc, true)];
    cases.map(|(name, hook, offload)| test(name, move || paths(hook, offload))).into()
}

const LAYOUT: Layout = Layout::TwoArmed;
const LEN: usize = 20_000_000;
const CHUNK: usize = 64 * 1024;
/// Longest time without a byte that has come or gone. What is promised is one second, and what was measured is printed: a busy machine may be slower without
/// a fault of ours.
const STALL: Duration = Duration::from_secs(5);
/// Sockets give up only long after a stall, so that how long it was is told.
pub const PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 9000;

fn paths(hook: Hook, offload: bool) -> TestResult {
    let lab = lab(&LAYOUT.topology(&Options { servers: 1, offload, ..Options::default() }))?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let vips = [vip(&lab, false, PORT)?, vip(&lab, true, PORT)?];
    let up = format!("up --mode tun --interface eth0 --vip {} --vip {}", vips[0].ip(), vips[1].ip());
    let said = lab.node("rs1")?.realserver(&up)?;
    check(said.contains("ready for tunnels"), || said)?;
    let methods = [("-m", "nat"), ("-g", "dr"), ("-i", "tun"), ("--fullnat", "fullnat")];
    for (method, _) in methods {
        // The first packets to the real server make its MAC address known.
        for vip in vips {
            let web = SocketAddr::new(vip.ip(), 80);
            crate::support::serve(&lab, &rvs, "-t", web, method, 80)?;
            http(&lab, web, 2).map_err(|why| format!("{method}, {web}: {why:?}"))?;
            rvs.ipvsadm(&format!("-D -t {web}"))?;
        }
    }
    let listener = lab.node("rs1")?.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)))??;
    SockRef::from(&listener).set_read_timeout(Some(PATIENCE))?;
    for mtu in [1500, 1400, 1280] {
        narrow(&lab, mtu)?;
        for (method, verdict) in methods {
            for vip in vips {
                let name = format!("{method}, {vip}, path MTU {mtu}");
                forget(&lab)?;
                crate::support::serve(&lab, &rvs, "-t", vip, method, PORT)?;
                let before = rvs.verdicts()?;
                for upload in [false, true] {
                    let moved = transfer(&lab, vip, &listener, upload);
                    let since = rvs.verdicts()?.since(&before);
                    let way = if upload { "up" } else { "down" };
                    let took = moved.map_err(|why| format!("{name}, {way}: {why:?}, {since}"))?;
                    println!(
                        "{name}, {way}: {:.0} MB/s, longest pause {:.3} s",
                        LEN as f64 / 1e6 / took.all.as_secs_f64(),
                        took.pause.as_secs_f64()
                    );
                    check(took.pause <= STALL, || format!("{name}, {way}: a stall of {:?}, {since}", took.pause))?;
                }
                let since = rvs.verdicts()?.since(&before);
                // One frame may carry 64 KiB where segmentation is left to the device.
                let least = LEN / if offload { 65536 } else { 1500 };
                check(since.of(verdict) > least as u64, || format!("{name}: the data plane forwarded {since}"))?;
                rvs.ipvsadm(&format!("-D -t {vip}"))?;
            }
        }
    }
    Ok(())
}

/// The router's ways to the client and to the director take packets of this size: what is larger it answers with an error. (The devices on
/// either side stay as they are; a veth loses what is too large for its other end without a word.)
fn narrow(lab: &Lab, mtu: u32) -> TestResult {
    let router = lab.node("router")?;
    for (family, device, net) in [
        ("-4", "client", "192.0.2.0/24"),
        ("-4", "front", "198.51.100.0/24"),
        ("-6", "client", "2001:db8:c::/64"),
        ("-6", "front", "2001:db8:f::/64"),
    ] {
        let metric: &[&str] = if family == "-6" { &["metric", "256"] } else { &[] };
        let mtu = mtu.to_string();
        let words = ["ip", family, "route", "replace", net, "dev", device, "proto", "kernel"];
        router.run(&[&words[..], &["mtu", &mtu], metric].concat())?;
    }
    Ok(())
}

/// What the ends have learnt of the path by the method before.
fn forget(lab: &Lab) -> TestResult {
    for node in ["client", "rs1"] {
        for family in ["-4", "-6"] {
            lab.node(node)?.run(&["ip", family, "route", "flush", "cache"])?;
        }
    }
    Ok(())
}

pub struct Took {
    all: Duration,
    pause: Duration,
}

/// Bytes of which no two stretches are alike, so that one lost, doubled or moved shows.
fn payload() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        (0..LEN / 8).flat_map(|_| next()).collect()
    })
}

/// All of it from one end to the other. Both look at how long nothing came or went.
pub fn transfer(lab: &Lab, vip: SocketAddr, listener: &TcpListener, upload: bool) -> TestResult<Took> {
    // Made before anything is timed.
    payload();
    let begin = Instant::now();
    let end = |stream: TcpStream, sends: bool| -> TestResult<Duration> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        if sends { send(stream) } else { receive(stream) }
    };
    let (server, client) = thread::scope(|scope| {
        let server = scope.spawn(|| -> TestResult<Duration> { end(listener.accept()?.0, !upload) });
        let client = (|| -> TestResult<Duration> {
            lab.node("client")?.enter(|| end(TcpStream::connect_timeout(&vip, PATIENCE)?, upload))?
        })();
        (server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), client)
    });
    let [client, server] = match (client, server) {
        (Ok(client), Ok(server)) => [client, server],
        (client, server) => return Err(Stop::Failed(format!("client {client:?}, server {server:?}"))),
    };
    Ok(Took { all: begin.elapsed(), pause: client.max(server) })
}

/// The longest pause.
fn send(mut stream: TcpStream) -> TestResult<Duration> {
    let (mut pause, mut last) = (Duration::ZERO, Instant::now());
    let mut mark = || (pause, last) = (pause.max(last.elapsed()), Instant::now());
    let mut left = payload();
    while !left.is_empty() {
        match stream.write(&left[..left.len().min(CHUNK)]) {
            Ok(n) => left = &left[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(format!("send, {} bytes left: {e}", left.len()).into()),
        }
        mark();
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // That the other end has it all and found it right.
    let mut word = [0; 2];
    stream.read_exact(&mut word).map_err(|e| format!("all sent, and no answer: {e}"))?;
    mark();
    check(&word == b"ok", || format!("the other end says {word:?}"))?;
    Ok(pause)
}

fn receive(mut stream: TcpStream) -> TestResult<Duration> {
    let (mut pause, mut last) = (Duration::ZERO, Instant::now());
    let mut chunk = vec![0; CHUNK];
    let mut left = payload();
    loop {
        let n = match stream.read(&mut chunk) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(format!("receive, {} bytes left: {e}", left.len()).into()),
        };
        (pause, last) = (pause.max(last.elapsed()), Instant::now());
        if n == 0 {
            check(left.is_empty(), || format!("the end came with {} bytes left", left.len()))?;
            stream.write_all(b"ok")?;
            return Ok(pause);
        }
        check(left.len() >= n && chunk[..n] == left[..n], || {
            format!("other bytes than were sent, at {} of {LEN}", LEN - left.len())
        })?;
        left = &left[n..];
    }
}
