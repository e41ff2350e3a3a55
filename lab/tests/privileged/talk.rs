//! Flows that last: blocks of bytes that go to a server and have to come back as they were, until the test says that it is over.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvs_lab::eventually;

use crate::support::TestResult;

/// What the two ends say to each other in turn: a block, and the same back; each flow so often.
const BLOCK: usize = 1024;
const PAUSE: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(120);

/// What the flows went through.
#[derive(Debug, Default)]
pub struct Talked {
    pub broken: usize,
    /// The longest that a block took to come back.
    pub longest: Duration,
    /// Blocks of all flows, and of the flow with the fewest.
    pub blocks: u64,
    pub least: u64,
    /// The first failure.
    pub why: Option<String>,
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

/// So many flows to each target, a block each in turn. `started` counts the servers that listen, and then the flows that have had four back.
pub fn talk(
    targets: &[SocketAddr],
    flows_each: usize,
    servers: usize,
    over: &AtomicBool,
    started: &AtomicUsize,
) -> TestResult<Talked> {
    eventually("the servers to listen", LONG, || {
        if started.load(Relaxed) >= servers { Ok(()) } else { Err(String::new()) }
    })?;
    let mut flows = Vec::new();
    for (n, target) in targets.iter().flat_map(|t| std::iter::repeat_n(t, flows_each)).enumerate() {
        let stream = TcpStream::connect_timeout(target, LONG).map_err(|e| format!("flow {n} to {target}: {e}"))?;
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
                talked.why.get_or_insert(format!(
                    "flow {n} to {} after {} blocks: {why}",
                    targets[n / flows_each],
                    flow.blocks
                ));
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

/// A server that sends back what it gets, on these ports.
pub fn echo(ports: &[u16], over: &AtomicBool, started: &AtomicUsize) -> TestResult {
    let mut listeners = Vec::new();
    for port in ports {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port))?;
        listener.set_nonblocking(true)?;
        listeners.push(listener);
    }
    started.fetch_add(1, Relaxed);
    let mut streams: Vec<TcpStream> = Vec::new();
    while !over.load(Relaxed) {
        let ready = {
            let mut fds: Vec<_> = listeners.iter().map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN)).collect();
            fds.extend(streams.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)));
            poll(&mut fds, PollTimeout::from(50u8))?;
            fds.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>()
        };
        let mut bytes = [0; 4 * BLOCK];
        for (stream, _) in streams.iter_mut().zip(&ready[ports.len()..]).filter(|(_, ready)| **ready) {
            // (What goes wrong here shows at the other end.)
            if let Ok(n) = stream.read(&mut bytes) {
                let _ = stream.write_all(&bytes[..n]);
            }
        }
        for listener in &listeners {
            while let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                streams.push(stream);
            }
        }
    }
    Ok(())
}
