//! Datagrams larger than a packet: UDP of 4,000 bytes, there and back.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Hook, Lab, NodeHandle, eventually};

use crate::support::{SOON, Test, TestResult, at, check, director, lab_for, on_hooks, serve, vip};

pub fn tests() -> Vec<Test> {
    on_hooks("large_datagrams", &[Hook::Xdp, Hook::Skb, Hook::Tc], large_datagrams)
}

const LEN: usize = 4000;
const DATAGRAMS: u8 = 20;
/// Of each datagram.
const FRAGMENTS: u64 = 3;

fn large_datagrams(hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 1, ..Options::default() })?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    for ipv6 in [false, true] {
        for (method, verdict, reply) in
            [("-m", "nat", "nat_reply"), ("-g", "dr", "dr"), ("--fullnat", "fullnat", "fullnat_reply")]
        {
            let service = vip(&lab, ipv6, 5300)?;
            // By direct routing the server has the virtual address.
            let listens = if method == "-g" { service } else { at(&lab, "rs1", ipv6, 5301)? };
            serve(&lab, &rvs, "-u", service, method, listens.port())?;
            let before = rvs.verdicts()?;
            echoes(&lab, listens, service)?;
            let since = rvs.verdicts()?.since(&before);
            // While a next hop is not ready yet the kernel forwards what is translated (NAT).
            let by_kernel = since.of("nat_by_kernel");
            let least = (u64::from(DATAGRAMS) * FRAGMENTS).saturating_sub(by_kernel);
            check(by_kernel <= 2 * FRAGMENTS && since.of(verdict) >= least && since.of(reply) >= least, || {
                format!("{method} {service}: {DATAGRAMS} datagrams, and {since}")
            })?;
            rvs.ipvsadm(&format!("-D -u {service}"))?;
        }
        // The kernel puts together, and answers.
        let address = vip(&lab, ipv6, 0)?.ip().to_string();
        lab.node("client")?.run(&["ping", "-c", "1", "-W", "5", "-s", "4000", &address])?;
    }
    Ok(())
}

/// A server that sends back what it gets, and a client that gets back what it has sent.
fn echoes(lab: &Lab, listens: SocketAddr, service: SocketAddr) -> TestResult {
    let over = AtomicBool::new(false);
    let (server, client) = (lab.node("rs1")?, lab.node("client")?);
    thread::scope(|scope| {
        let echo = scope.spawn(|| server.enter(|| echo(listens, &over)));
        let sent = ask(client, service);
        over.store(true, Ordering::Relaxed);
        echo.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))??;
        sent
    })
}

fn echo(listens: SocketAddr, over: &AtomicBool) -> std::io::Result<()> {
    let socket = UdpSocket::bind(listens)?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut buffer = [0; 2 * LEN];
    while !over.load(Ordering::Relaxed) {
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..len], from)?;
        }
    }
    Ok(())
}

fn ask(client: NodeHandle<'_>, service: SocketAddr) -> TestResult {
    let any = if service.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let socket = client.enter(|| UdpSocket::bind(any))??;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    for number in 0..DATAGRAMS {
        let datagram: Vec<u8> = (0..LEN).map(|i| number ^ (i % 251) as u8).collect();
        // What is lost is sent again: the first ones, before the server listens.
        eventually(&format!("datagram {number} to come back from {service}"), SOON, || {
            socket.send_to(&datagram, service).map_err(|e| e.to_string())?;
            let mut buffer = [0; 2 * LEN];
            let (len, _) = socket.recv_from(&mut buffer).map_err(|e| e.to_string())?;
            if buffer[..len] == datagram { Ok(()) } else { Err(format!("another one of {len} bytes")) }
        })?;
    }
    Ok(())
}
