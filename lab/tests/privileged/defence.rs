//! A service that is asked for more than it should take: SYN cookies and rate limits, with real clients and servers.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};
use rvs_fixtures::frame::{Frame, TCP, flag};
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, NodeHandle, eventually};

use crate::support::{Test, TestResult, at, check, director, equal, http, lab_for, on_hooks, serve, vip};
use crate::transfers::there_and_back;

pub fn tests() -> Vec<Test> {
    let both = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("syn_cookies", &both, syn_cookies),
        on_hooks("syn_cookies_and_servers_that_speak_first", &both, speaks_first),
        on_hooks("syn_cookies_are_turned_on_and_off_under_traffic", &[Hook::Xdp], on_and_off),
        on_hooks("rate_limits", &[Hook::Xdp], rate_limits),
        on_hooks("drop_entry_takes_half_open_connections", &[Hook::Xdp], drop_entry),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const LAYOUT: Layout = Layout::TwoArmed;

fn lab_of(hook: Hook) -> TestResult<Lab> {
    lab_for(hook, LAYOUT, Options { servers: 2, ..Options::default() })
}

fn syn_cookies(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    for (method, ipv6) in [("-m", false), ("-m", true), ("--fullnat", false), ("--fullnat", true)] {
        let web = vip(&lab, ipv6, 80)?;
        serve(&lab, &rvs, "-t", web, method, 8080)?;
        http(&lab, web, 4).map_err(|why| format!("{method}: {why:?}, verdicts {:?}", rvs.verdicts()))?;
        rvs.rvs(&format!("service set tcp {web} --syn-cookies always"))?;
        let shown = rvs.rvs(&format!("service show tcp {web}"))?;
        equal(
            "the service",
            &shown,
            &format!("tcp {web}  syn-cookies always  rate off  source-rate off  proxy off\n"),
        )?;
        let before = rvs.verdicts()?;
        let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        // A flood of SYNs, and honest clients all the while.
        thread::scope(|scope| {
            let flood = scope.spawn(|| flood(lab.node("client")?, web, &over, &sent));
            let clients = honest(&lab, web, &format!("cookies-{method}-{ipv6}"));
            over.store(true, Ordering::Relaxed);
            clients.and(flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
        .map_err(|why| format!("{method}, {web}: {why:?}, verdicts {:?}", rvs.verdicts().map(|v| v.since(&before))))?;
        let (since, sent) = (rvs.verdicts()?.since(&before), sent.load(Ordering::Relaxed));
        println!("{method}, {web}: {sent} SYNs of nobody, {since}");
        check(sent > 1000 && since.of("syn_cookie") > sent, || format!("{sent} SYNs, {since}"))?;
        let connections = rvs.ipvsadm("-Lnc")?;
        let of_nobody = connections.lines().filter(|l| l.contains(" 10.9.") || l.contains("[2001:db8:9:")).count();
        check(of_nobody == 0, || format!("{of_nobody} connections of nobody"))?;
        rvs.ipvsadm(&format!("-D -t {web}"))?;
    }
    Ok(())
}

fn honest(lab: &Lab, web: SocketAddr, name: &str) -> TestResult {
    for turn in 0..3 {
        http(lab, web, 100)?;
        there_and_back(lab, web, &format!("{name}-{turn}"))?;
    }
    Ok(())
}

/// SYNs from addresses that are nobody's, as fast as they can be sent.
fn flood(client: NodeHandle<'_>, target: SocketAddr, over: &AtomicBool, sent: &AtomicU64) -> TestResult {
    client.enter(|| {
        let family = if target.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let raw = socket(family, SockType::Raw, SockFlag::empty(), SockProtocol::Raw)?;
        let mut n = 0u32;
        while !over.load(Ordering::Relaxed) {
            n = n.wrapping_add(1);
            let from: IpAddr = match target {
                SocketAddr::V4(_) => Ipv4Addr::from(0x0a09_0000 | n & 0xffff).into(),
                SocketAddr::V6(_) => Ipv6Addr::from(0x2001_0db8_0009 << 80 | u128::from(n)).into(),
            };
            let syn = Frame::new(TCP, SocketAddr::new(from, 1024 + (n % 60000) as u16), target).flags(flag::SYN);
            let packet = syn.options(&[2, 4, 5, 180]).ip();
            let fd = raw.as_raw_fd();
            let done = match target {
                SocketAddr::V4(to) => {
                    sendto(fd, &packet, &SockaddrIn::from(std::net::SocketAddrV4::new(*to.ip(), 0)), MsgFlags::empty())
                }
                SocketAddr::V6(to) => {
                    let to = std::net::SocketAddrV6::new(*to.ip(), 0, 0, 0);
                    sendto(fd, &packet, &SockaddrIn6::from(to), MsgFlags::empty())
                }
            };
            // A full queue is no failure.
            sent.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
            if n.is_multiple_of(64) {
                thread::yield_now();
            }
        }
        Ok::<(), nix::Error>(())
    })??;
    Ok(())
}

/// The client says nothing before the server does.
fn speaks_first(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    for ipv6 in [false, true] {
        let mail = vip(&lab, ipv6, 25)?;
        let server = at(&lab, "rs1", ipv6, 25)?;
        rvs.ipvsadm(&format!("-A -t {mail} -s rr"))?;
        rvs.ipvsadm(&format!("-a -t {mail} -r {server} -m"))?;
        rvs.rvs(&format!("service set tcp {mail} --syn-cookies always"))?;
        // By XDP, a SYN that finds no MAC address is lost; and this client has nothing to say that would be another.
        lab.node("director")?.run(&["ping", "-c", "1", &server.ip().to_string()])?;
        let listener = lab.node("rs1")?.enter(|| TcpListener::bind(server))??;
        let answered = thread::scope(|scope| {
            scope.spawn(|| -> std::io::Result<()> {
                let (mut client, _) = listener.accept()?;
                client.set_read_timeout(Some(Duration::from_secs(10)))?;
                client.write_all(b"220 ready\r\n")?;
                let mut line = [0; 6];
                client.read_exact(&mut line)?;
                client.write_all(b"221 bye\r\n")
            });
            lab.node("client")?.enter(|| -> std::io::Result<String> {
                let mut server = TcpStream::connect_timeout(&mail, Duration::from_secs(5))?;
                server.set_read_timeout(Some(Duration::from_secs(10)))?;
                let mut greeting = [0; 11];
                server.read_exact(&mut greeting)?;
                server.write_all(b"QUIT\r\n")?;
                let mut rest = String::new();
                server.read_to_string(&mut rest)?;
                Ok(String::from_utf8_lossy(&greeting).into_owned() + &rest)
            })
        })?
        .map_err(|e| format!("{mail}: {e}, {:?}", rvs.verdicts()))?;
        equal("the conversation", &answered, "220 ready\r\n221 bye\r\n")?;
        check(rvs.verdicts()?.of("syn_cookie_server") > 0, || "the server was not answered for its client".into())?;
    }
    Ok(())
}

/// Connections that began the other way go on.
fn on_and_off(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let web = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", web, "-m", 8080)?;
    http(&lab, web, 4)?;
    let over = AtomicBool::new(false);
    let turns = thread::scope(|scope| {
        let clients = scope.spawn(|| -> TestResult<usize> {
            let mut turns = 0;
            while !over.load(Ordering::Relaxed) {
                http(&lab, web, 50)?;
                there_and_back(&lab, web, &format!("on-off-{turns}"))?;
                turns += 1;
            }
            Ok(turns)
        });
        let set = |cookies: &str| rvs.rvs(&format!("service set tcp {web} --syn-cookies {cookies}")).map(drop);
        let changed = (0..40).try_for_each(|n| set(["always", "off", "5"][n % 3]));
        over.store(true, Ordering::Relaxed);
        let turns = clients.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        changed?;
        turns
    })
    .map_err(|why| format!("{why:?}, verdicts {:?}", rvs.verdicts()))?;
    println!("{turns} turns of 50 requests and 2 MB each way while cookies went on and off");
    check(turns > 0, || "no turn was done".to_owned())
}

fn rate_limits(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let mut rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let web = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", web, "-g", 80)?;
    http(&lab, web, 4)?;
    let refused = rvs.rvs(&format!("service set tcp {web} --syn-cookies always"));
    check(refused.as_ref().is_err_and(|e| e.to_string().contains("replies come by here")), || format!("{refused:?}"))?;
    for (option, reason) in [("--rate", "service_rate"), ("--source-rate", "source_rate")] {
        rvs.rvs(&format!("service set tcp {web} {option} 20"))?;
        let before = rvs.verdicts()?;
        // Clients try again after a second, and get through in the end.
        http(&lab, web, 60)?;
        let dropped = rvs.verdicts()?.since(&before).of(reason);
        check(dropped > 0, || format!("nothing was dropped by {option}"))?;
        rvs.rvs(&format!("service set tcp {web} {option} 0"))?;
        let before = rvs.verdicts()?;
        http(&lab, web, 60)?;
        check(rvs.verdicts()?.since(&before).of(reason) == 0, || format!("{option} 0 is a limit still"))?;
    }
    rvs.rvs(&format!("service set tcp {web} --rate 1000 --source-rate 50"))?;
    let due = format!("tcp {web}  syn-cookies off  rate 1000  source-rate 50  proxy off\n");
    equal("the service", &rvs.rvs("service show")?, &due)?;
    // What was set is in the maps, and so with whoever takes them over.
    rvs.kill();
    rvs.start_again()?;
    equal("the service", &rvs.rvs("service show")?, &due)
}

/// They would stay for 60 seconds; with drop_entry a 32nd of them goes each second, however many.
fn drop_entry(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let mut rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let (web, web6) = (vip(&lab, false, 80)?, vip(&lab, true, 80)?);
    serve(&lab, &rvs, "-t", web, "-g", 80)?;
    serve(&lab, &rvs, "-t", web6, "-g", 80)?;
    http(&lab, web, 20)?;
    for target in [web, web6] {
        let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| -> TestResult {
            let flood = scope.spawn(|| flood(lab.node("client")?, target, &over, &sent));
            let enough = eventually("SYNs of nobody", Duration::from_secs(10), || match sent.load(Ordering::Relaxed) {
                n if n > 200 => Ok(()),
                n => Err(format!("{n} sent")),
            });
            over.store(true, Ordering::Relaxed);
            flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok(enough?)
        })?;
    }
    let half_open = |rvs: &Director<'_>| -> TestResult<usize> {
        Ok(rvs.ipvsadm("-Lnc")?.lines().filter(|l| l.contains("SYN_RECV")).count())
    };
    let before = half_open(&rvs)?;
    check(before > 200, || format!("{before} half-open connections"))?;
    rvs.rvs("set drop_entry 3")?;
    // What was set is with whoever takes over.
    rvs.kill();
    rvs.start_again()?;
    equal("the setting", rvs.rvs("set drop_entry")?.split_whitespace().nth(1).unwrap_or_default(), "3")?;
    let begun = std::time::Instant::now();
    eventually("half-open connections to go", Duration::from_secs(45), || match half_open(&rvs) {
        Ok(0) => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    println!("{before} half-open connections were gone in {:.0?}", begun.elapsed());
    let status = rvs.rvs("status")?;
    check(status.contains("connections taken by drop_entry"), || status.clone())?;
    let refused = rvs.rvs("set drop_entry 4");
    check(refused.as_ref().is_err_and(|e| e.to_string().contains("drop_entry is 0..3")), || format!("{refused:?}"))?;
    // Honest ones get through meanwhile.
    http(&lab, web, 50).map(drop)
}
