//! What an operator does and sees: adding, changing and taking away under traffic, counters, listings, timeouts.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, recvfrom, socket};
use rvs_lab::counters::Kernel;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, NodeHandle, Result, eventually};

use crate::support::{
    SOON, Test, TestResult, at, check, connections, director, equal, http, icmp_counter, lab_for, on_hooks, serve,
    shares, stats_of, vip,
};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("stats_are_what_was_sent", &hooks, stats_are_what_was_sent),
        on_hooks("connections_are_listed", &hooks, connections_are_listed),
        on_hooks("udp_connections_expire", &hooks, udp_connections_expire),
        on_hooks("weight_zero_quiesces", &hooks, weight_zero_quiesces),
        on_hooks("a_deleted_dest_drops_and_comes_back", &hooks, a_deleted_dest_drops_and_comes_back),
        on_hooks("a_new_dest_is_reached_at_once", &[Hook::Xdp, Hook::Skb, Hook::Tc], a_new_dest_is_reached_at_once),
        on_hooks("no_dest_is_port_unreachable", &hooks, no_dest_is_port_unreachable),
        on_hooks("a_used_up_ttl_is_told_by_the_vip", &hooks, a_used_up_ttl_is_told_by_the_vip),
        on_hooks("the_vip_answers_echo", &hooks, the_vip_answers_echo),
        on_hooks("the_director_is_a_real_server", &hooks, the_director_is_a_real_server),
        on_hooks("the_director_is_a_real_server_by_nat", &hooks, the_director_is_a_real_server_by_nat),
        on_hooks("save_clear_restore", &[Hook::Xdp], save_clear_restore),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const ECHO: u16 = 7000;
const TWO_ARMED: Layout = Layout::TwoArmed;

fn lab_of(hook: Hook, servers: u8) -> TestResult<Lab> {
    lab_for(hook, TWO_ARMED, Options { servers, ..Options::default() })
}

fn start<'a>(lab: &'a Lab, hook: Hook) -> TestResult<Director<'a>> {
    director(lab, TWO_ARMED.director_interfaces(), hook)
}

/// While `work` runs, datagrams to this address of the node come back as they are.
fn with_echo<T: Send>(
    node: NodeHandle<'_>,
    on: SocketAddr,
    work: impl FnOnce() -> TestResult<T> + Send,
) -> TestResult<T> {
    let socket = node.enter(|| UdpSocket::bind(on))??;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 2048];
            while !over.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    // One that is lost is asked for again, or found missing.
                    let _ = socket.send_to(&buffer[..length], from);
                }
            }
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        done
    })
}

/// A socket of the client, connected.
fn udp_to(client: NodeHandle<'_>, target: SocketAddr) -> TestResult<UdpSocket> {
    let any = if target.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let socket = client.enter(|| UdpSocket::bind(any).and_then(|s| s.connect(target).map(|()| s)))??;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(socket)
}

/// Sends once and waits for the same to come back.
fn ask(socket: &UdpSocket, payload: &[u8]) -> TestResult {
    socket.send(payload)?;
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer)?;
    check(buffer[..length] == *payload, || format!("{length} bytes came back for {}", payload.len()))
}

fn connect(client: NodeHandle<'_>, target: SocketAddr) -> Result<std::io::Result<TcpStream>> {
    client.enter(|| TcpStream::connect_timeout(&target, Duration::from_secs(5)))
}

/// One request on a connection that stays open; the answering server's name.
fn keep_alive(stream: &mut TcpStream, deadline: Duration) -> std::io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    stream.set_read_timeout(Some(deadline))?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let length = stream.read(&mut chunk)?;
        answer.extend_from_slice(&chunk[..length]);
        let text = String::from_utf8_lossy(&answer);
        if let Some((_, body)) = text.split_once("\r\n\r\n")
            && body.ends_with('\n')
        {
            return Ok(body.split(' ').next().unwrap_or_default().to_owned());
        }
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
}

fn stats_are_what_was_sent(hook: Hook) -> TestResult {
    for ipv6 in [false, true] {
        for method in ["-m", "-g"] {
            let lab = lab_of(hook, 1)?;
            let rvs = start(&lab, hook)?;
            udp_stats(&lab, &rvs, method, ipv6).map_err(|e| format!("UDP {method} IPv6 {ipv6}: {e:?}"))?;
            tcp_stats(&lab, &rvs, method, ipv6).map_err(|e| format!("TCP {method} IPv6 {ipv6}: {e:?}"))?;
        }
    }
    Ok(())
}

const DATAGRAMS: u64 = 50;

fn udp_stats(lab: &Lab, rvs: &Director<'_>, method: &str, ipv6: bool) -> TestResult {
    let vip = vip(lab, ipv6, ECHO)?;
    serve(lab, rvs, "-u", vip, method, ECHO)?;
    let own = at(lab, "rs1", ipv6, ECHO)?;
    // What a client asked of the VIP must be answered from it: with DR the server itself has it.
    let on = if method == "-g" { vip } else { own };
    with_echo(lab.node("rs1")?, on, || {
        warm(lab, vip)?;
        rvs.ipvsadm(&format!("-Z -u {vip}"))?;
        let zero = stats_of(&rvs.ipvsadm("-Ln --stats --exact")?, &vip.to_string())?;
        check(zero == [0; 5], || format!("after -Z: {zero:?}"))?;
        let socket = udp_to(lab.node("client")?, vip)?;
        // Lengths 0, 7, 14 ...
        let payloads: Vec<Vec<u8>> = (0..DATAGRAMS).map(|n| vec![0x5a; 7 * n as usize]).collect();
        payloads.iter().try_for_each(|p| ask(&socket, p))?;
        let header = if ipv6 { 40 + 8 } else { 20 + 8 };
        let bytes: u64 = payloads.iter().map(|p| header + p.len() as u64).sum();
        let back = if method == "-m" { [DATAGRAMS, bytes] } else { [0, 0] };
        let due = [1, DATAGRAMS, back[0], bytes, back[1]];
        let text = rvs.ipvsadm("-Ln --stats --exact")?;
        for name in [vip, own] {
            let is = stats_of(&text, &name.to_string())?;
            check(is == due, || format!("{name} should have {due:?}:\n{text}"))?;
        }
        Ok(())
    })
}

/// Until an answer comes: the first packet to a real server whose MAC address is not known yet may be lost.
fn warm(lab: &Lab, vip: SocketAddr) -> TestResult {
    let socket = udp_to(lab.node("client")?, vip)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    eventually(&format!("an answer of {vip}"), SOON, || ask(&socket, b"warm").map_err(|e| format!("{e:?}")))?;
    Ok(())
}

/// The director's counters against the server's and the client's own.
fn tcp_stats(lab: &Lab, rvs: &Director<'_>, method: &str, ipv6: bool) -> TestResult {
    let vip = vip(lab, ipv6, 80)?;
    serve(lab, rvs, "-t", vip, method, 80)?;
    http(lab, vip, 1)?;
    let got = || -> TestResult<[u64; 2]> {
        Ok([Kernel::read(&lab.node("rs1")?.ns())?.tcp_in, Kernel::read(&lab.node("client")?.ns())?.tcp_in])
    };
    let counted = || stats_of(&rvs.ipvsadm("-Ln --stats --exact")?, &vip.to_string());
    settled(&got)?;
    rvs.ipvsadm(&format!("-Z -t {vip}"))?;
    let before = got()?;
    http(lab, vip, 20)?;
    let after = settled(&got)?;
    let [connections, packets_in, packets_out, bytes_in, bytes_out] = counted()?;
    let due_out = if method == "-m" { after[1] - before[1] } else { 0 };
    check((connections, packets_in, packets_out) == (20, after[0] - before[0], due_out), || {
        format!("the ends got {before:?} then {after:?}, counted {connections} {packets_in} {packets_out}")
    })?;
    let header = if ipv6 { 40 + 20 } else { 20 + 20 };
    check(bytes_in >= packets_in * header && bytes_out >= packets_out * header, || {
        format!("{bytes_in} bytes in {packets_in} packets, {bytes_out} in {packets_out}")
    })
}

/// The counters when two looks in a row see the same.
fn settled(look: &dyn Fn() -> TestResult<[u64; 2]>) -> TestResult<[u64; 2]> {
    let mut last = None;
    let found = eventually("the last packets to arrive", SOON, || {
        let now = look().map_err(|e| format!("{e:?}"))?;
        if last.replace(now) == Some(now) { Ok(now) } else { Err(format!("{now:?}")) }
    })?;
    Ok(found)
}

/// A line of `ipvsadm -Lnc`: seconds left, state, dest.
fn connection(rvs: &Director<'_>, proto: &str, client: SocketAddr) -> TestResult<Option<(u64, String, String)>> {
    let text = rvs.ipvsadm("-Lnc")?;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [p, left, state, from, _, dest] = words[..]
            && p == proto
            && from == client.to_string()
        {
            let (minutes, seconds) = left.split_once(':').ok_or_else(|| format!("no time in '{line}'"))?;
            let left = minutes.parse::<u64>()? * 60 + seconds.parse::<u64>()?;
            return Ok(Some((left, state.to_owned(), dest.to_owned())));
        }
    }
    Ok(None)
}

/// Waits for a state of the connection and checks what is left of its time.
fn in_state(
    rvs: &Director<'_>,
    proto: &str,
    client: SocketAddr,
    state: &str,
    time: u64,
    dest: SocketAddr,
) -> TestResult {
    let found = eventually(&format!("{client} to be {state}"), SOON, || {
        match connection(rvs, proto, client).map_err(|e| format!("{e:?}"))? {
            Some(row) if row.1 == state => Ok(row),
            other => Err(format!("{other:?}")),
        }
    })?;
    check((time.saturating_sub(11)..=time).contains(&found.0) && found.2 == dest.to_string(), || {
        format!("{client} should be {state} with about {time} s left, to {dest}: {found:?}")
    })
}

fn connections_are_listed(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let (web, echo) = (vip(&lab, ipv6, 80)?, vip(&lab, ipv6, ECHO)?);
        let (to_web, to_echo) = (at(&lab, "rs1", ipv6, 8080)?, at(&lab, "rs1", ipv6, ECHO)?);
        serve(&lab, &rvs, "-t", web, "-m", 8080)?;
        serve(&lab, &rvs, "-u", echo, "-m", ECHO)?;
        let mut stream = connect(lab.node("client")?, web)??;
        let from = stream.local_addr()?;
        keep_alive(&mut stream, SOON)?;
        in_state(&rvs, "TCP", from, "ESTABLISHED", 900, to_web)?;
        check(connections(&rvs)?.get(&to_web) == Some(&[1, 0]), || format!("{:?}", connections(&rvs)))?;
        rvs.ipvsadm("--set 100 20 30")?;
        equal("ipvsadm -L --timeout", &rvs.ipvsadm("-L --timeout")?, "Timeout (tcp tcpfin udp): 100 20 30\n")?;
        // As in the kernel: a timeout begins anew with the next packet.
        keep_alive(&mut stream, SOON)?;
        in_state(&rvs, "TCP", from, "ESTABLISHED", 100, to_web)?;
        drop(stream);
        in_state(&rvs, "TCP", from, "TIME_WAIT", 120, to_web)?;
        check(connections(&rvs)?.get(&to_web) == Some(&[0, 1]), || format!("{:?}", connections(&rvs)))?;
        with_echo(lab.node("rs1")?, to_echo, || {
            warm(&lab, echo)?;
            let socket = udp_to(lab.node("client")?, echo)?;
            ask(&socket, b"?")?;
            in_state(&rvs, "UDP", socket.local_addr()?, "UDP", 30, to_echo)
        })?;
        rvs.ipvsadm("--set 900 120 300")?;
        let socket = udp_to(lab.node("client")?, echo)?;
        socket.send(b"nobody listens any more")?;
        in_state(&rvs, "UDP", socket.local_addr()?, "UDP", 300, to_echo)?;
    }
    Ok(())
}

fn udp_connections_expire(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let (vip, own) = (vip(&lab, ipv6, 53)?, at(&lab, "rs1", ipv6, 53)?);
        serve(&lab, &rvs, "-u", vip, "-m", 53)?;
        rvs.ipvsadm("--set 0 0 300")?;
        let report = rvs_lab::load::dns(lab.node("client")?, &rvs_lab::load::Load::new(vip, 20), &|_| {})?;
        check(report.failed == 0, || report.to_string())?;
        check(connections(&rvs)?.get(&own) == Some(&[0, 20]), || format!("{:?}", connections(&rvs)))?;
        rvs.ipvsadm("--set 0 0 2")?;
        equal("timeouts", &rvs.ipvsadm("-L --timeout")?, "Timeout (tcp tcpfin udp): 900 120 2\n")?;
        // The timeout is one for all entries, old and new: what the next packets begin is over soon.
        let report = rvs_lab::load::dns(lab.node("client")?, &rvs_lab::load::Load::new(vip, 20), &|_| {})?;
        check(report.failed == 0, || report.to_string())?;
        eventually("the connections to expire", Duration::from_secs(20), || {
            let rows = rvs.ipvsadm("-Lnc").map_err(|e| e.to_string())?;
            match connections(&rvs).map_err(|e| format!("{e:?}"))?.get(&own) {
                Some([0, 0]) if rows.lines().count() == 2 => Ok(()),
                counted => Err(format!("{counted:?}\n{rows}")),
            }
        })?;
        rvs.ipvsadm(&format!("-D -u {vip}"))?;
    }
    Ok(())
}

fn weight_zero_quiesces(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 2)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let vip = vip(&lab, ipv6, 80)?;
        serve(&lab, &rvs, "-t", vip, "-m", 80)?;
        shares(&lab, vip, &[("rs1", 5), ("rs2", 5)])?;
        let mut stream = connect(lab.node("client")?, vip)??;
        let server = keep_alive(&mut stream, SOON)?;
        let other = if server == "rs1" { "rs2" } else { "rs1" };
        let target = at(&lab, &server, ipv6, 80)?;
        rvs.ipvsadm(&format!("-e -t {vip} -r {target} -m -w 0"))?;
        shares(&lab, vip, &[(other, 10)])?;
        // Who is connected already stays where he is.
        for _ in 0..3 {
            let again = keep_alive(&mut stream, SOON)?;
            check(again == server, || format!("{again} answered on a connection to {server}"))?;
        }
        check(connections(&rvs)?.get(&target).is_some_and(|c| c[0] == 1), || format!("{:?}", connections(&rvs)))?;
        rvs.ipvsadm(&format!("-e -t {vip} -r {target} -m -w 1"))?;
        shares(&lab, vip, &[("rs1", 5), ("rs2", 5)])?;
    }
    Ok(())
}

fn a_deleted_dest_drops_and_comes_back(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    for (method, ipv6) in [("-m", false), ("-g", false), ("-m", true), ("-g", true)] {
        let (vip, own) = (vip(&lab, ipv6, 80)?, at(&lab, "rs1", ipv6, 80)?);
        serve(&lab, &rvs, "-t", vip, method, 80)?;
        http(&lab, vip, 1)?;
        let mut stream = connect(lab.node("client")?, vip)??;
        keep_alive(&mut stream, SOON)?;
        let before = rvs.verdicts()?.of("dest_gone");
        rvs.ipvsadm(&format!("-d -t {vip} -r {own}"))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n")?;
        eventually("the packets to a deleted dest to be dropped", SOON, || {
            let dropped = rvs.verdicts().map_err(|e| e.to_string())?.of("dest_gone") - before;
            if dropped >= 2 { Ok(()) } else { Err(format!("{dropped} dropped")) }
        })?;
        rvs.ipvsadm(&format!("-a -t {vip} -r {own} {method} -w 1"))?;
        stream.write_all(b"\r\n")?;
        stream.set_read_timeout(Some(SOON))?;
        let mut answer = [0; 4096];
        let length = stream.read(&mut answer)?;
        check(answer[..length].starts_with(b"HTTP/1.1 200"), || {
            String::from_utf8_lossy(&answer[..length]).into_owned()
        })?;
        // (The last round's connection, cut off by -D, may still be at its FIN.)
        eventually("the connection to be counted", SOON, || {
            let counted = connections(&rvs).map_err(|e| format!("{e:?}"))?;
            if counted.get(&own).is_some_and(|c| c[0] == 1) { Ok(()) } else { Err(format!("{counted:?}")) }
        })?;
        drop(stream);
        rvs.ipvsadm(&format!("-D -t {vip}"))?;
    }
    Ok(())
}

/// The first packet for a new real server is not the one that finds out where it is.
fn a_new_dest_is_reached_at_once(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let vip = vip(&lab, ipv6, 80)?;
        serve(&lab, &rvs, "-t", vip, "-g", 80)?;
        http(&lab, vip, 1)?;
        let lost = rvs.verdicts()?.of("no_neighbour");
        check(lost == 0, || format!("{lost} packets to a new real server were dropped"))?;
    }
    Ok(())
}

fn no_dest_is_port_unreachable(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    let client = lab.node("client")?;
    for ipv6 in [false, true] {
        let (web, echo) = (vip(&lab, ipv6, 80)?, vip(&lab, ipv6, ECHO)?);
        rvs.ipvsadm(&format!("-A -t {web} -s rr"))?;
        rvs.ipvsadm(&format!("-A -u {echo} -s rr"))?;
        refused(client, web, echo)?;
        // A dest that takes nothing new is none either.
        rvs.ipvsadm(&format!("-a -t {web} -r {} -m -w 0", at(&lab, "rs1", ipv6, 80)?))?;
        rvs.ipvsadm(&format!("-a -u {echo} -r {} -m -w 0", at(&lab, "rs1", ipv6, ECHO)?))?;
        refused(client, web, echo)?;
        check(rvs.verdicts()?.of("no_dest") >= 4, || "no_dest was not counted".to_owned())?;
    }
    Ok(())
}

fn refused(client: NodeHandle<'_>, web: SocketAddr, echo: SocketAddr) -> TestResult {
    let tcp = connect(client, web)?.err().map(|e| e.kind());
    check(tcp == Some(ErrorKind::ConnectionRefused), || format!("TCP to {web}: {tcp:?}"))?;
    let socket = udp_to(client, echo)?;
    socket.send(b"?")?;
    let udp = socket.recv(&mut [0; 16]).err().map(|e| e.kind());
    check(udp == Some(ErrorKind::ConnectionRefused), || format!("UDP to {echo}: {udp:?}"))
}

/// The router leaves it 1: the director is the second hop of a traceroute.
const TTL: u32 = 2;

fn a_used_up_ttl_is_told_by_the_vip(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    let client = lab.node("client")?;
    for ipv6 in [false, true] {
        let (web, echo) = (vip(&lab, ipv6, 80)?, vip(&lab, ipv6, ECHO)?);
        serve(&lab, &rvs, "-t", web, "-m", 80)?;
        serve(&lab, &rvs, "-u", echo, "-g", ECHO)?;
        let name = if ipv6 { "Icmp6InTimeExcds" } else { "Icmp.InTimeExcds" };
        let before = (icmp_counter(client, name)?, rvs.verdicts()?.of("ttl_exceeded"));
        let heard = client.enter(|| {
            socket(
                if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet },
                SockType::Raw,
                SockFlag::SOCK_NONBLOCK,
                if ipv6 { SockProtocol::IcmpV6 } else { SockProtocol::Icmp },
            )
        })??;
        let udp = udp_to(client, echo)?;
        set_ttl(&udp, ipv6)?;
        udp.send(b"how far is it?")?;
        eventually("time exceeded", SOON, || {
            let now = icmp_counter(client, name).map_err(|e| format!("{e:?}"))?;
            if now > before.0 { Ok(()) } else { Err(format!("{name} is {now}")) }
        })?;
        check(rvs.verdicts()?.of("ttl_exceeded") == before.1 + 1, || format!("{:?}", rvs.verdicts()))?;
        if !ipv6 {
            from_the_vip(std::os::fd::AsRawFd::as_raw_fd(&heard), echo)?;
        }
    }
    Ok(())
}

fn set_ttl(socket: &UdpSocket, ipv6: bool) -> TestResult {
    if ipv6 {
        nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::Ipv6Ttl, &TTL.cast_signed())?;
    } else {
        socket.set_ttl(TTL)?;
    }
    Ok(())
}

/// Among what a raw ICMP socket got: time exceeded (type 11) from the service's own address.
fn from_the_vip(raw: std::os::fd::RawFd, service: SocketAddr) -> TestResult {
    let mut packet = [0; 1500];
    while let Ok((length, from)) = recvfrom::<SockaddrIn>(raw, &mut packet) {
        // The IPv4 header without options is 20 bytes long.
        if length > 20 && packet[20] == 11 {
            let from = from.map(|a| std::net::IpAddr::V4(a.ip()));
            return check(from == Some(service.ip()), || format!("time exceeded for {service} came from {from:?}"));
        }
    }
    Err("no time exceeded was heard".into())
}

fn the_vip_answers_echo(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let vip = vip(&lab, ipv6, 80)?;
        serve(&lab, &rvs, "-t", vip, "-g", 80)?;
        lab.node("client")?.run(&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "2", &vip.ip().to_string()])?;
    }
    check(rvs.verdicts()?.of("icmp") >= 6, || format!("{:?}", rvs.verdicts()))
}

/// A dest with `-g` that is the director's own address: handed up to its own sockets.
fn the_director_is_a_real_server(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let (vip, echo_on) = (vip(&lab, ipv6, ECHO)?, at(&lab, "director", ipv6, ECHO)?);
        rvs.ipvsadm(&format!("-A -u {vip} -s rr"))?;
        rvs.ipvsadm(&format!("-a -u {vip} -r {echo_on} -g -w 1"))?;
        // As the kernel since 2.6.37: listed by its method, handed up all the same.
        let listing = rvs.ipvsadm("-Ln")?;
        check(listing.contains(" Route "), || listing.clone())?;
        let before = rvs.verdicts()?.of("local");
        with_echo(lab.node("director")?, vip, || {
            let socket = udp_to(lab.node("client")?, vip)?;
            (0..10).try_for_each(|n| ask(&socket, &[n; 100]))
        })?;
        let local = rvs.verdicts()?.of("local") - before;
        check(local == 10, || format!("{local} packets were handed up"))?;
        let is = stats_of(&rvs.ipvsadm("-Ln --stats --exact")?, &vip.to_string())?;
        check((is[0], is[1]) == (1, 10), || format!("{vip}: {is:?}"))?;
    }
    Ok(())
}

/// The same with `-m` and another port: replies of the director's own sockets are translated on their way out.
fn the_director_is_a_real_server_by_nat(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 1)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        let (vip, own) = (vip(&lab, ipv6, ECHO)?, at(&lab, "director", ipv6, ECHO + 1)?);
        rvs.ipvsadm(&format!("-A -u {vip} -s rr"))?;
        rvs.ipvsadm(&format!("-a -u {vip} -r {own} -m -w 1"))?;
        with_echo(lab.node("director")?, own, || {
            warm(&lab, vip)?;
            rvs.ipvsadm(&format!("-Z -u {vip}"))?;
            let socket = udp_to(lab.node("client")?, vip)?;
            (0..10).try_for_each(|n| ask(&socket, &[n; 100]))
        })?;
        let is = stats_of(&rvs.ipvsadm("-Ln --stats --exact")?, &vip.to_string())?;
        let bytes = 10 * (100 + if ipv6 { 48 } else { 28 });
        check(is == [1, 10, 10, bytes, bytes], || format!("{vip}: {is:?}"))?;
    }
    Ok(())
}

fn save_clear_restore(hook: Hook) -> TestResult {
    let lab = lab_of(hook, 2)?;
    let rvs = start(&lab, hook)?;
    for ipv6 in [false, true] {
        serve(&lab, &rvs, "-t", vip(&lab, ipv6, 80)?, "-m", 8080)?;
        serve(&lab, &rvs, "-u", vip(&lab, ipv6, 53)?, "-g", 53)?;
        let mh = vip(&lab, ipv6, 81)?;
        rvs.ipvsadm(&format!("-A -t {mh} -s mh -b mh-fallback,mh-port"))?;
        rvs.ipvsadm(&format!("-a -t {mh} -r {} -m -w 7", at(&lab, "rs1", ipv6, 80)?))?;
    }
    let saved = rvs.ipvsadm("-Sn")?;
    check(saved.lines().count() == 2 * (3 + 3 + 2), || saved.clone())?;
    rvs.ipvsadm("-C")?;
    equal("what is left after -C", &rvs.ipvsadm("-Sn")?, "")?;
    let restored = rvs.ipvsadm_output("-R", &saved)?;
    check(restored.status.success(), || format!("{restored:?}"))?;
    equal("what was restored", &rvs.ipvsadm("-Sn")?, &saved)?;
    shares(&lab, vip(&lab, false, 80)?, &[("rs1", 5), ("rs2", 5)])?;
    shares(&lab, vip(&lab, true, 80)?, &[("rs1", 5), ("rs2", 5)])
}
