//! Clients: HTTP and DNS over UDP, run inside a node's network, and what they saw.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::eventually::patient;
use crate::lab::NodeHandle;

/// The name that a lab's DNS servers answer a TXT question for.
pub const DNS_NAME: &str = "whoami.lab";
/// ... and one whose answer, over 4,000 bytes, goes in several packets.
pub const DNS_LARGE: &str = "large.lab";

/// Failures are counted all; their texts are kept up to this number.
const KEPT_FAILURES: usize = 5;

/// What one load is.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub target: SocketAddr,
    pub requests: usize,
    /// Threads, each with one request at a time; 0 counts as 1.
    pub concurrency: usize,
    /// For one request, from its first packet to its last.
    pub timeout: Duration,
}

impl Load {
    pub fn new(target: SocketAddr, requests: usize) -> Self {
        Self { target, requests, concurrency: 8, timeout: patient(Duration::from_secs(5)) }
    }
}

/// What the clients saw.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Answers by the name of the server.
    pub servers: BTreeMap<String, usize>,
    /// The client's address as the servers saw it; empty for DNS.
    pub clients: BTreeMap<IpAddr, usize>,
    pub failed: usize,
    /// The first few failures in words.
    pub failures: Vec<String>,
    /// Time of each answered request, ascending.
    pub latencies: Vec<Duration>,
}

impl Report {
    pub fn answered(&self) -> usize {
        self.latencies.len()
    }

    /// The latency that this share (0 to 100) of the answers did not exceed; zero without answers.
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.latencies.len() * percent).div_ceil(100).saturating_sub(1);
        self.latencies.get(rank).copied().unwrap_or_default()
    }

    fn add(&mut self, result: Result<Answer, String>) {
        match result {
            Ok(answer) => {
                *self.servers.entry(answer.server).or_default() += 1;
                if let Some(client) = answer.client {
                    *self.clients.entry(client).or_default() += 1;
                }
                self.latencies.push(answer.took);
            }
            Err(why) => {
                self.failed += 1;
                if self.failures.len() < KEPT_FAILURES {
                    self.failures.push(why);
                }
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = |(name, &count): (&String, &usize)| {
            let percent = count as f64 * 100.0 / self.answered().max(1) as f64;
            format!("{name} {count} ({percent:.1}%)")
        };
        writeln!(f, "  answers   {}  failed {}", self.answered(), self.failed)?;
        writeln!(f, "  servers   {}", self.servers.iter().map(share).collect::<Vec<_>>().join("  "))?;
        if !self.clients.is_empty() {
            let seen: Vec<String> =
                self.clients.iter().map(|(address, count)| format!("{address} ({count})")).collect();
            writeln!(f, "  client    seen by the servers as {}", seen.join("  "))?;
        }
        let [p50, p90, p99, max] = [50, 90, 99, 100].map(|p| self.percentile(p));
        writeln!(f, "  latency   p50 {p50:.1?}  p90 {p90:.1?}  p99 {p99:.1?}  max {max:.1?}")?;
        self.failures.iter().try_for_each(|why| writeln!(f, "  failure   {why}"))
    }
}

struct Answer {
    server: String,
    client: Option<IpAddr>,
    took: Duration,
}

/// Sends `GET /` that many times, a connection each, from the node. `progress` hears the number done.
///
/// A request fails when it is refused, broken, late, or answered by anything but a lab's server; that is in the report.
/// The call fails when the node can't be entered.
pub fn http(from: NodeHandle<'_>, load: &Load, progress: &dyn Fn(usize)) -> Result<Report> {
    run(from, load, progress, |load| {
        let response = request(load.target, "GET", "/", &[], load.timeout)?;
        let text = String::from_utf8_lossy(&response);
        let mut words = text.split_whitespace();
        let (Some(server), Some(Ok(client))) = (words.next(), words.next().map(str::parse)) else {
            return Err(format!("no answer of a lab's server: {text:?}"));
        };
        Ok((server.to_owned(), Some(client)))
    })
}

/// Asks for the TXT record of [`DNS_NAME`] that many times, a socket each, from the node; else as [`http`]. Asks once: a
/// datagram that is lost is a failure.
pub fn dns(from: NodeHandle<'_>, load: &Load, progress: &dyn Fn(usize)) -> Result<Report> {
    run(from, load, progress, |load| Ok((ask_dns(load.target, load.timeout)?, None)))
}

/// One HTTP GET from the node; the body of an answer with status 200, 201 or 204.
pub fn http_get(from: NodeHandle<'_>, target: SocketAddr, path: &str, timeout: Duration) -> Result<Vec<u8>> {
    let answer = from.enter(|| request(target, "GET", path, &[], timeout))?;
    answer.map_err(|why| Error::unexpected(format!("GET {path} of {target} from {}", from.name()), why))
}

/// One HTTP PUT from the node.
pub fn http_put(from: NodeHandle<'_>, target: SocketAddr, path: &str, body: &[u8], timeout: Duration) -> Result<()> {
    let answer = from.enter(|| request(target, "PUT", path, body, timeout))?;
    answer.map(drop).map_err(|why| Error::unexpected(format!("PUT {path} to {target} from {}", from.name()), why))
}

type Ask<'a> = &'a (dyn Fn(&Load) -> Result<(String, Option<IpAddr>), String> + Sync);

fn run(
    from: NodeHandle<'_>,
    load: &Load,
    progress: &dyn Fn(usize),
    ask: impl Fn(&Load) -> Result<(String, Option<IpAddr>), String> + Sync,
) -> Result<Report> {
    let ask: Ask<'_> = &ask;
    let next = AtomicUsize::new(0);
    let (send, receive) = mpsc::channel();
    let worker = || {
        let send = send.clone();
        let work = || {
            while next.fetch_add(1, Ordering::Relaxed) < load.requests {
                let start = Instant::now();
                let result = ask(load).map(|(server, client)| Answer { server, client, took: start.elapsed() });
                // The other end lives as long as this scope.
                let _ = send.send(result);
            }
        };
        from.enter(work)
    };
    let mut report = Report::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..load.concurrency.max(1)).map(|_| scope.spawn(worker)).collect();
        for done in 1..=load.requests {
            // A worker that could not enter the node sends nothing: look for that while waiting.
            let result = loop {
                match receive.recv_timeout(load.timeout) {
                    Ok(result) => break Some(result),
                    Err(_) if workers.iter().all(thread::ScopedJoinHandle::is_finished) => {
                        break receive.try_recv().ok();
                    }
                    Err(_) => {}
                }
            };
            let Some(result) = result else { break };
            report.add(result);
            progress(done);
        }
        for worker in workers {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok::<(), Error>(())
    })?;
    report.latencies.sort_unstable();
    Ok(report)
}

/// HTTP/1.0, one request a connection; the body of a good answer, whole as its length says.
fn request(target: SocketAddr, method: &str, path: &str, body: &[u8], timeout: Duration) -> Result<Vec<u8>, String> {
    let start = Instant::now();
    let mut stream = TcpStream::connect_timeout(&target, timeout).map_err(|e| format!("connect: {e}"))?;
    let left =
        || timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero()).ok_or_else(|| "too late".to_owned());
    stream.set_write_timeout(Some(left()?)).map_err(|e| e.to_string())?;
    let length = if method == "PUT" { format!("Content-Length: {}\r\n", body.len()) } else { String::new() };
    let head = format!("{method} {path} HTTP/1.0\r\nHost: lab\r\n{length}\r\n");
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).map_err(|e| format!("send: {e}"))?;
    let mut answer = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        stream.set_read_timeout(Some(left()?)).map_err(|e| e.to_string())?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(format!("receive after {} bytes: {e}", answer.len())),
        }
    }
    body_of(&answer)
}

fn body_of(answer: &[u8]) -> Result<Vec<u8>, String> {
    let end = answer
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .ok_or_else(|| format!("no HTTP answer, {} bytes", answer.len()))?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let status = head.lines().next().unwrap_or_default();
    if !status.split(' ').nth(1).is_some_and(|code| matches!(code, "200" | "201" | "204")) {
        return Err(format!("status '{status}'"));
    }
    let body = answer[end + 4..].to_vec();
    let length = head
        .lines()
        .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length:").map(|v| v.trim().parse::<usize>()));
    match length {
        Some(Ok(length)) if length != body.len() => Err(format!("{} bytes of {length}", body.len())),
        Some(Err(_)) => Err("a Content-Length that is no number".to_owned()),
        _ => Ok(body),
    }
}

/// RFC 1035 4.1.1: a query's identifier; different for each question, so that a late answer is not taken for another's.
static QUERY: AtomicU16 = AtomicU16::new(1);
/// Source ports of questions, one after the other.
static PORT: AtomicU16 = AtomicU16::new(0);

/// Asks a DNS server, from where this thread is, for the TXT record of [`DNS_NAME`]; its first string.
pub(crate) fn ask_dns(target: SocketAddr, timeout: Duration) -> Result<String, String> {
    let any: IpAddr = if target.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    // A port that no question before had: a director keeps UDP flows for minutes, and one whose server was removed meanwhile is
    // dropped. Below the ports that the kernel gives to TCP.
    let port = 10_000 + PORT.fetch_add(1, Ordering::Relaxed) % 20_000;
    let socket = UdpSocket::bind((any, port)).map_err(|e| format!("bind: {e}"))?;
    // Connected, so that only an answer from the very address asked is heard.
    socket.connect(target).map_err(|e| format!("connect: {e}"))?;
    socket.set_read_timeout(Some(timeout)).map_err(|e| e.to_string())?;
    let id = QUERY.fetch_add(1, Ordering::Relaxed);
    socket.send(&dns_query(id)).map_err(|e| format!("send: {e}"))?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).map_err(|e| format!("receive: {e}"))?;
    let answer = &buffer[..length];
    dns_txt(answer, id).ok_or_else(|| format!("no TXT answer to question {id}: {answer:02x?}"))
}

/// RFC 1035 4.1: header (id, RD, one question), name as labels, QTYPE 16 (TXT), QCLASS 1 (IN).
fn dns_query(id: u16) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    let mut query = vec![high, low, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in DNS_NAME.split('.') {
        query.push(label.len().min(63) as u8);
        query.extend(label.bytes().take(63));
    }
    query.extend([0, 0, 16, 0, 1]);
    query
}

/// The first string of the first answer, which must be TXT, with the id asked and no error. Names in questions are as we
/// sent them; an answer's name is labels or a pointer (RFC 1035 4.1.4).
fn dns_txt(message: &[u8], id: u16) -> Option<String> {
    let word = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
    let is_answer = word(2)? & 0x8000 != 0;
    let error = word(2)? & 0x000f;
    if word(0)? != id || !is_answer || error != 0 || word(4)? != 1 || word(6)? == 0 {
        return None;
    }
    let skip_name = |mut at: usize| {
        loop {
            match *message.get(at)? {
                0 => return Some(at + 1),
                n if n >= 0xc0 => return Some(at + 2),
                n => at += 1 + usize::from(n),
            }
        }
    };
    let record = skip_name(skip_name(12)? + 4)?;
    if word(record)? != 16 {
        return None;
    }
    let text = record + 10;
    let length = usize::from(*message.get(text)?);
    let bytes = message.get(text + 1..text + 1 + length)?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns_answer(id: u16, text: &str) -> Vec<u8> {
        let mut message = dns_query(id);
        message[2] |= 0x80;
        message[7] = 1;
        message.extend([0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 0, 0, text.len() as u8 + 1, text.len() as u8]);
        message.extend(text.bytes());
        message
    }

    #[test]
    fn a_dns_answer_is_read_and_every_truncation_refused() {
        let message = dns_answer(7, "rs1");
        assert_eq!(dns_txt(&message, 7).as_deref(), Some("rs1"));
        assert_eq!(dns_txt(&message, 8), None, "another question's answer");
        for length in 0..message.len() {
            assert_eq!(dns_txt(&message[..length], 7), None, "{length} bytes");
        }
        let mut refused = message;
        refused[3] |= 5;
        assert_eq!(dns_txt(&refused, 7), None);
    }

    #[test]
    fn a_body_is_whole_or_refused() {
        let answer = |text: &str| body_of(text.as_bytes());
        assert_eq!(answer("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").unwrap(), b"hi");
        assert_eq!(answer("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi").unwrap_err(), "2 bytes of 3");
        assert!(answer("HTTP/1.1 500 Oops\r\n\r\n").unwrap_err().contains("500"));
        assert!(answer("").is_err());
    }

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let mut report = Report::default();
        assert_eq!(report.percentile(50), Duration::ZERO);
        report.latencies = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(report.percentile(50), Duration::from_millis(100));
        assert_eq!(report.percentile(99), Duration::from_millis(198));
        assert_eq!(report.percentile(100), Duration::from_millis(200));
    }
}
