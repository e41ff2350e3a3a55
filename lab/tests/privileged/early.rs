//! Fragments that come before the first one of their datagram, floods of those that never get one, and packets too large for their tunnel.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, bind, sendto, socket,
};
use rvs_fixtures::frame::{Frame, UDP};
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, Verdicts, eventually, patient};

use crate::support::{
    SOON, Test, TestResult, at, check, director, http, icmp_counter, lab_for, on_hooks, serve, test, vip,
};

pub fn tests() -> Vec<Test> {
    let all = [Hook::Xdp, Hook::Skb, Hook::Tc];
    let mut tests = on_hooks("early_fragments", &all, early_fragments);
    tests.extend(on_hooks("too_large_for_a_tunnel", &all, too_large));
    tests.extend(on_hooks("a_flood_of_lone_fragments", &[Hook::Xdp, Hook::Tc], flooded));
    tests.push(test("without_rvsd_early_fragments_are_the_kernels", without_rvsd));
    tests
}

const LAYOUT: Layout = Layout::TwoArmed;
const LEN: usize = 4000;
/// All orders of four fragments.
const DATAGRAMS: u32 = 24;
/// Sent once more, of those, before it is a fault: a busy machine loses a packet now and then.
const RETRIES: u32 = 2;
const METHODS: [&str; 4] = ["-m", "-g", "-i", "--fullnat"];

/// Sends packets with all their headers.
struct Raw(OwnedFd);

/// Of datagrams that are cut here: no two have the same, in whatever test (or they would be two of one id).
static ID: AtomicU32 = AtomicU32::new(1);

impl Raw {
    /// In the namespace of this thread. Routed as packets of this address are.
    fn open(own: IpAddr) -> TestResult<Raw> {
        let family = if own.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let socket = socket(family, SockType::Raw, SockFlag::empty(), SockProtocol::Raw)?;
        match own {
            IpAddr::V4(own) => bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(own, 0))),
            IpAddr::V6(own) => bind(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(own, 0, 0, 0))),
        }?;
        Ok(Raw(socket))
    }

    /// The packet of a frame.
    fn send(&self, to: IpAddr, frame: &[u8]) -> TestResult {
        let (fd, packet) = (self.0.as_raw_fd(), &frame[14..]);
        match to {
            IpAddr::V4(to) => sendto(fd, packet, &SockaddrIn::from(SocketAddrV4::new(to, 0)), MsgFlags::empty()),
            IpAddr::V6(to) => sendto(fd, packet, &SockaddrIn6::from(SocketAddrV6::new(to, 0, 0, 0)), MsgFlags::empty()),
        }?;
        Ok(())
    }

    /// A datagram in fragments, in the order of this number.
    fn send_cut(&self, from: SocketAddr, to: SocketAddr, datagram: &[u8], order: u32) -> TestResult {
        let frame = Frame::new(UDP, from, to).payload(datagram);
        let parts = frame.fragments(ID.fetch_add(1, Relaxed), cuts(to.is_ipv6()));
        for at in permutation(order, parts.len()) {
            self.send(to.ip(), &parts[at])?;
        }
        Ok(())
    }
}

/// Of IPv4 they are as long as the link takes, so that they have to be cut once more for a tunnel. (Of IPv6 that would be the sender's business.)
fn cuts(ipv6: bool) -> &'static [usize] {
    if ipv6 { &[1200, 2400, 3600] } else { &[1480, 2960, 3600] }
}

/// The first of 24 is the straight one, the last the reversed.
fn permutation(mut number: u32, len: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..len).collect();
    let mut order = Vec::new();
    while !left.is_empty() {
        let at = number as usize % left.len();
        number /= left.len() as u32;
        order.push(left.remove(at));
    }
    order
}

/// How many come before the first one.
fn early(number: u32) -> u64 {
    permutation(number, 4).iter().position(|at| *at == 0).unwrap_or_default() as u64
}

fn datagram(number: u32, len: usize) -> Vec<u8> {
    let body = (0..len - 4).map(|i| number as u8 ^ (i % 251) as u8);
    number.to_be_bytes().into_iter().chain(body).collect()
}

/// A client with a socket of its own, and a way to send packets in its name.
struct Client<'a> {
    socket: UdpSocket,
    raw: &'a Raw,
    own: SocketAddr,
    service: SocketAddr,
}

impl Client<'_> {
    /// Is it answered, whole?
    fn ask(&self, number: u32, send: impl Fn(&Self, &[u8]) -> TestResult) -> TestResult<bool> {
        let datagram = datagram(number, LEN);
        send(self, &datagram)?;
        let mut buffer = [0; 2 * LEN];
        // What comes late is of one that was asked again.
        while let Ok((len, _)) = self.socket.recv_from(&mut buffer) {
            if buffer[..len] == datagram {
                return Ok(true);
            }
            check(len == LEN && buffer[..4] != datagram[..4], || format!("another datagram of {len} bytes"))?;
        }
        Ok(false)
    }

    fn cut(&self, number: u32) -> TestResult<bool> {
        self.ask(number, |c, datagram| c.raw.send_cut(c.own, c.service, datagram, number))
    }

    /// By the kernel, which cuts it and sends its parts in order.
    fn whole(&self, number: u32) -> TestResult<bool> {
        self.ask(number, |c, datagram| Ok(c.socket.send_to(datagram, c.service).map(drop)?))
    }

    /// Until the first one is answered: a server has to be listening, and its MAC address known.
    fn warm_up(&self) -> TestResult {
        let what = format!("an answer from {}", self.service);
        eventually(&what, SOON, || match self.whole(u32::MAX) {
            Ok(true) => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        Ok(())
    }

    /// Each of them, in this way.
    fn all(&self, what: &str, ask: impl Fn(&Self, u32) -> TestResult<bool>) -> TestResult {
        let mut again = 0;
        for number in 0..DATAGRAMS {
            while !ask(self, number)? {
                again += 1;
                check(again <= RETRIES, || format!("{what}: datagram {number}: no answer, {again} times by now"))?;
            }
        }
        Ok(())
    }
}

/// A server that sends back what it gets, cut and in the order that its number says (`cut`), or as the kernel does; and this, meanwhile.
fn with_server<T>(
    lab: &Lab,
    service: SocketAddr,
    method: &str,
    cut: bool,
    work: impl FnOnce(&Client<'_>) -> TestResult<T>,
) -> TestResult<T> {
    let listens = listens(lab, service, method)?;
    let own = at(lab, "client", service.is_ipv6(), 0)?;
    let over = AtomicBool::new(false);
    let (server, client) = (lab.node("rs1")?, lab.node("client")?);
    thread::scope(|scope| {
        let echo = scope.spawn(|| -> TestResult { server.enter(|| echo(listens, cut, &over))? });
        let done = (|| {
            let (socket, raw) =
                client.enter(|| -> TestResult<_> { Ok((UdpSocket::bind(own)?, Raw::open(own.ip())?)) })??;
            socket.set_read_timeout(Some(patient(Duration::from_secs(1))))?;
            let own = socket.local_addr()?;
            let client = Client { socket, raw: &raw, own, service };
            client.warm_up()?;
            work(&client)
        })();
        over.store(true, Relaxed);
        echo.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        done
    })
}

/// By direct routing and tunnels the server has the virtual address.
fn listens(lab: &Lab, service: SocketAddr, method: &str) -> TestResult<SocketAddr> {
    if matches!(method, "-g" | "-i") { Ok(service) } else { at(lab, "rs1", service.is_ipv6(), 5301) }
}

fn echo(listens: SocketAddr, cut: bool, over: &AtomicBool) -> TestResult {
    let socket = UdpSocket::bind(listens)?;
    let raw = Raw::open(listens.ip())?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut buffer = [0; 2 * LEN];
    while !over.load(Relaxed) {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        let number = u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]);
        if cut && number < DATAGRAMS {
            raw.send_cut(listens, from, &buffer[..len], number)?;
        } else {
            socket.send_to(&buffer[..len], from)?;
        }
    }
    Ok(())
}

fn started(hook: Hook) -> TestResult<Lab> {
    let lab = lab_for(hook, LAYOUT, Options { servers: 1, ..Options::default() })?;
    let vips = [vip(&lab, false, 0)?.ip(), vip(&lab, true, 0)?.ip()];
    let up = format!("up --mode tun --interface eth0 --vip {} --vip {}", vips[0], vips[1]);
    let said = lab.node("rs1")?.realserver(&up)?;
    check(said.contains("ready for tunnels"), || said)?;
    Ok(lab)
}

/// There and back, in every order.
fn early_fragments(hook: Hook) -> TestResult {
    let lab = started(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    for ipv6 in [false, true] {
        for method in METHODS {
            let service = vip(&lab, ipv6, 5300)?;
            serve(&lab, &rvs, "-u", service, method, listens(&lab, service, method)?.port())?;
            let what = format!("{method} {service}");
            with_server(&lab, service, method, true, |client| {
                let before = rvs.verdicts()?;
                let answered = client.all(&what, Client::cut);
                let since = rvs.verdicts()?.since(&before);
                answered.map_err(|why| format!("{why:?}, {since}"))?;
                let early: u64 = (0..DATAGRAMS).map(early).sum();
                // By the other methods replies don't go by the data plane.
                let least = if matches!(method, "-m" | "--fullnat") { 2 * early } else { early };
                check(since.of("fragment_held") >= least, || format!("{what}: {least} early fragments, and {since}"))
            })?;
            rvs.ipvsadm(&format!("-D -u {service}"))?;
        }
    }
    Ok(())
}

/// Datagrams of clients in fragments that fill the link and may be cut (IPv4), or whose client is told how large they may be (IPv6). Then once more, the way to
/// the real server being narrower than the link, which the director's route says: the server gets nothing that is larger.
fn too_large(hook: Hook) -> TestResult {
    let lab = started(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    for (narrow, ipv6) in [(false, false), (false, true), (true, false), (true, true)] {
        if narrow {
            let (server, family) = (at(&lab, "rs1", ipv6, 0)?.ip().to_string(), if ipv6 { "-6" } else { "-4" });
            lab.node("director")?.run(&["ip", family, "route", "replace", &server, "dev", "back", "mtu", "1400"])?;
            lab.node("rs1")?.run(&["ip", "link", "set", "eth0", "mtu", "1400"])?;
        }
        for kind in ["", " --tun-type gre --tun-csum", " --tun-type gue --tun-port 6080"] {
            let service = vip(&lab, ipv6, 5300)?;
            rvs.ipvsadm(&format!("-A -u {service} -s rr"))?;
            rvs.ipvsadm(&format!("-a -u {service} -r {} -i{kind}", at(&lab, "rs1", ipv6, 5300)?))?;
            let what = format!("-i{kind} {service}{}", if narrow { ", 1400" } else { "" });
            let before = rvs.verdicts()?;
            with_server(&lab, service, "-i", false, |client| client.all(&what, Client::whole))?;
            let since = rvs.verdicts()?.since(&before);
            // Of the four fragments all but the last one are too large.
            // (A fragment's GRE is without checksum: with what the client knows by then it fits.)
            let told = since.of("too_big") > 0 || !kind.is_empty();
            let enough = if ipv6 { told } else { since.of("cut") >= u64::from(DATAGRAMS) * 2 };
            check(enough && since.of("held_lost") == 0, || format!("{what}: {DATAGRAMS} datagrams, and {since}"))?;
            rvs.ipvsadm(&format!("-D -u {service}"))?;
        }
    }
    Ok(())
}

/// Fragments of very many datagrams, none of which has a first one, from very many addresses.
fn flooded(hook: Hook) -> TestResult {
    const FRAGMENTS: u64 = 300_000;
    /// For what rvsd holds, its copies, and what its allocator keeps.
    const GROWN_KIB: u64 = 32 << 10;
    let lab = started(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let (service, web) = (vip(&lab, false, 5300)?, vip(&lab, false, 80)?);
    serve(&lab, &rvs, "-u", service, "-m", 5301)?;
    serve(&lab, &rvs, "-t", web, "-m", 8080)?;
    http(&lab, web, 4)?;
    with_server(&lab, service, "-m", true, |client| {
        let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let (before, begin, used, resident) = (rvs.verdicts()?, Instant::now(), cpu_ms(&rvs)?, resident_kib(&rvs)?);
        let mut asked = 0;
        thread::scope(|scope| {
            let flood =
                scope.spawn(|| -> TestResult { lab.node("router")?.enter(|| flood(service.ip(), &over, &sent))? });
            let mut honest = || -> TestResult {
                while sent.load(Relaxed) < FRAGMENTS || asked < DATAGRAMS {
                    // In order. (A flood fills queues: then it is asked again.)
                    let what = format!("an answer from {service} to datagram {asked}");
                    eventually(&what, SOON, || match client.whole(DATAGRAMS + asked) {
                        Ok(true) => Ok(()),
                        other => Err(format!("{other:?}")),
                    })?;
                    asked += 1;
                    http(&lab, web, 20)?;
                    rvs.ipvsadm("-Ln")?;
                }
                Ok(())
            };
            let result = honest();
            over.store(true, Relaxed);
            flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(result)
        })?;
        let (took, used) = (begin.elapsed(), cpu_ms(&rvs)? - used);
        let (since, resident) = (rvs.verdicts()?.since(&before), resident_kib(&rvs)?.saturating_sub(resident));
        let share = used as f64 / took.as_millis() as f64;
        println!(
            "{hook}: {} fragments in {took:.1?}, {asked} datagrams and {} requests answered; rvsd: {resident} KiB more, {:.0}% of a CPU; {since}",
            sent.load(Relaxed),
            asked * 20,
            100.0 * share
        );
        check(resident <= GROWN_KIB, || format!("rvsd has {resident} KiB more; {since}"))?;
        let gone = |s: &Verdicts| s.of("fragment_lost") + s.of("fragment_flood");
        check(gone(&since) > FRAGMENTS / 2, || format!("{FRAGMENTS} lone fragments, and {since}"))?;
        // What waits is given up after three seconds: all that was held is gone then, but for what was honest.
        eventually("what was held to be given up", SOON, || {
            let since = rvs.verdicts().map_err(|e| e.to_string())?.since(&before);
            let left = since.of("fragment_held").saturating_sub(since.of("fragment_lost"));
            if left <= 4 * u64::from(asked) { Ok(()) } else { Err(since.to_string()) }
        })?;
        client.all("after the flood", Client::cut)
    })
}

/// From random addresses of 10.0.0.0/8, with random ids.
fn flood(to: IpAddr, over: &AtomicBool, sent: &AtomicU64) -> TestResult {
    let nobody: SocketAddr = "10.0.0.0:0".parse()?;
    let mut frame = Frame::new(UDP, nobody, SocketAddr::new(to, 0)).fragment(0, 1480, true, &[7; 200]);
    let raw = Raw::open(Ipv4Addr::UNSPECIFIED.into())?;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    while !over.load(Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let [a, b, c, i, d, ..] = random.to_be_bytes();
        frame[27..30].copy_from_slice(&[a, b, c]);
        // (An id of 0 the kernel would put in. The header's sum it makes.)
        frame[18..20].copy_from_slice(&[i | 1, d]);
        // A full queue is no failure.
        sent.fetch_add(u64::from(raw.send(to, &frame).is_ok()), Relaxed);
    }
    Ok(())
}

fn pid(rvs: &Director<'_>) -> TestResult<u32> {
    Ok(rvs.process().ok_or("rvsd is not running")?.pid())
}

/// Time of a CPU that rvsd has used.
fn cpu_ms(rvs: &Director<'_>) -> TestResult<u64> {
    /// USER_HZ.
    const TICKS_S: u64 = 100;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid(rvs)?))?;
    // Behind the name in brackets the twelfth and thirteenth.
    let (_, rest) = stat.rsplit_once(')').ok_or("no name in its stat")?;
    let ticks: Vec<u64> = rest.split_whitespace().skip(11).take(2).filter_map(|w| w.parse().ok()).collect();
    Ok(ticks.iter().sum::<u64>() * 1000 / TICKS_S)
}

fn resident_kib(rvs: &Director<'_>) -> TestResult<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid(rvs)?))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// rvsd is stopped, or killed: fragments that come in order go on, early ones go the kernel's way, and are held again when rvsd is back.
fn without_rvsd() -> TestResult {
    let lab = started(Hook::Xdp)?;
    let mut rvs = director(&lab, LAYOUT.director_interfaces(), Hook::Xdp)?;
    let service = vip(&lab, false, 5300)?;
    serve(&lab, &rvs, "-u", service, "-m", 5301)?;
    with_server(&lab, service, "-m", false, |client| {
        for kill in [false, true] {
            let what = if kill { "killed" } else { "stopped" };
            client.all("with rvsd", Client::cut)?;
            if kill {
                rvs.kill()
            } else {
                rvs.stop()?
            }
            client.all(what, Client::whole)?;
            given_to_kernel(&lab, client, what, kill)?;
            client.all(what, Client::whole)?;
            rvs.start_again()?;
        }
        client.all("with rvsd again", Client::cut)
    })
}

/// A stopped rvsd has told the programs so; to one that was killed fragments are handed for three more seconds.
fn given_to_kernel(lab: &Lab, client: &Client<'_>, what: &str, again: bool) -> TestResult {
    let reversed = DATAGRAMS - 1;
    let put_together = || icmp_counter(lab.node("director")?, "Ip.ReasmReqds");
    let send = || client.raw.send_cut(client.own, client.service, &datagram(reversed, LEN), reversed);
    let before = put_together()?;
    send()?;
    eventually(&format!("the kernel to get early fragments, rvsd being {what}"), SOON, || {
        let now = put_together().map_err(|e| format!("{e:?}"))?;
        if now >= before + early(reversed) {
            return Ok(());
        }
        if again {
            send().map_err(|e| format!("{e:?}"))?;
        }
        Err(format!("{now} fragments, {before} before"))
    })?;
    Ok(())
}
