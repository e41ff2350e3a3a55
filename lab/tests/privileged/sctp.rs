//! SCTP associations through the director. Not every kernel has SCTP, so both ends are raw sockets that send what an association's ends would.

use std::io::Read;
use std::net::SocketAddr;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, NodeHandle};
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{SOON, Test, TestResult, at, check, director, lab_for, on_hooks, vip};

pub fn tests() -> Vec<Test> {
    on_hooks("sctp_associations", &[Hook::Xdp, Hook::Skb, Hook::Tc], associations)
}

/// Chunk types.
const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const SACK: u8 = 3;
const ABORT: u8 = 6;
const SHUTDOWN: u8 = 7;
const SHUTDOWN_ACK: u8 = 8;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;
const SHUTDOWN_COMPLETE: u8 = 14;

/// Chunks of a packet; of the client, and the state that it brings by NAT and by DR, or of the server.
enum Step {
    Client(&'static [u8], &'static str, &'static str),
    Server(&'static [u8], &'static str),
}

const STEPS: &[Step] = &[
    Step::Client(&[INIT], "INIT1", "INIT1"),
    Step::Server(&[INIT_ACK], "C-SENT"),
    Step::Client(&[COOKIE_ECHO, DATA], "C-REPLIED", "ESTABLISHED"),
    Step::Server(&[COOKIE_ACK, SACK], "ESTABLISHED"),
    Step::Client(&[DATA, DATA, DATA], "ESTABLISHED", "ESTABLISHED"),
    Step::Server(&[SACK, DATA], "ESTABLISHED"),
    Step::Client(&[SHUTDOWN], "S-RECEIVED", "S-RECEIVED"),
    Step::Server(&[SHUTDOWN_ACK], "S-ACK-SENT"),
    Step::Client(&[SHUTDOWN_COMPLETE], "CLOSED", "CLOSED"),
    // And another one from the same port.
    Step::Client(&[INIT], "INIT1", "INIT1"),
    Step::Server(&[ABORT], "REJECTED"),
];

fn associations(hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 1, ..Options::default() })?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    for ipv6 in [false, true] {
        // Each has a port of its own: connections of a service that is gone wait for it.
        for (method, port) in [("-m", 40_000), ("-g", 40_001)] {
            let service = vip(&lab, ipv6, 3868)?;
            let nat = method == "-m";
            // By direct routing the server has the virtual address.
            let listens = if nat { at(&lab, "rs1", ipv6, 3869)? } else { service };
            let dest = at(&lab, "rs1", ipv6, listens.port())?;
            rvs.ipvsadm(&format!("-A --sctp-service {service} -s rr"))?;
            rvs.ipvsadm(&format!("-a --sctp-service {service} -r {dest} {method}"))?;
            let from = at(&lab, "client", ipv6, port)?;
            let client = End::new(lab.node("client")?, from, service)?;
            let server = End::new(lab.node("rs1")?, listens, from)?;
            converse(&rvs, &client, &server, nat)?;
            let rows = rvs.ipvsadm("-Ln")?;
            check(rows.contains(&format!("SCTP {service} rr")), || rows.clone())?;
            rvs.ipvsadm(&format!("-D --sctp-service {service}"))?;
        }
    }
    Ok(())
}

fn converse(rvs: &Director<'_>, client: &End, server: &End, nat: bool) -> TestResult {
    for step in STEPS {
        let state = match step {
            Step::Client(chunks, by_nat, by_dr) => {
                client.say(chunks)?;
                server.hears(chunks)?;
                Some(if nat { by_nat } else { by_dr })
            }
            Step::Server(chunks, state) => {
                server.say(chunks)?;
                client.hears(chunks)?;
                nat.then_some(state)
            }
        };
        let rows = rvs.ipvsadm("-Lnc")?;
        let row = rows.lines().find(|l| l.starts_with("SCTP ") && l.contains(&client.own.to_string()));
        let is = row.and_then(|l| l.split_whitespace().nth(2));
        check(state.is_none_or(|state| is == Some(state)), || format!("{state:?} should be the state in\n{rows}"))?;
    }
    Ok(())
}

/// One end of an association.
struct End {
    socket: Socket,
    own: SocketAddr,
    other: SocketAddr,
}

impl End {
    fn new(node: NodeHandle<'_>, own: SocketAddr, other: SocketAddr) -> TestResult<End> {
        let open = || -> std::io::Result<Socket> {
            let socket = Socket::new(Domain::for_address(own), Type::RAW, Some(Protocol::from(132)))?;
            socket.bind(&SocketAddr::new(own.ip(), 0).into())?;
            socket.connect(&SocketAddr::new(other.ip(), 0).into())?;
            socket.set_read_timeout(Some(SOON))?;
            Ok(socket)
        };
        Ok(End { socket: node.enter(open)??, own, other })
    }

    fn say(&self, chunks: &[u8]) -> TestResult {
        self.socket.send(&packet(self.own.port(), self.other.port(), chunks))?;
        Ok(())
    }

    /// These chunks, from and to the right ports, under a right checksum.
    fn hears(&self, chunks: &[u8]) -> TestResult {
        let mut buffer = [0; 2048];
        let len = (&self.socket).read(&mut buffer)?;
        // An IPv4 raw socket gets the IP header too.
        let header = if self.own.is_ipv4() { 20 } else { 0 };
        let is = buffer[..len].get(header..).unwrap_or_default();
        let should_be = packet(self.other.port(), self.own.port(), chunks);
        check(is == should_be, || format!("{} got\n{is:02x?}, which should be\n{should_be:02x?}", self.own))
    }
}

/// Ports, a tag, the checksum, and a chunk of each type, which are of various lengths.
fn packet(from: u16, to: u16, chunks: &[u8]) -> Vec<u8> {
    let mut bytes = [&from.to_be_bytes()[..], &to.to_be_bytes(), &[1, 2, 3, 4], &[0; 4]].concat();
    for kind in chunks {
        let len = 4 + 37 * u16::from(*kind % 7);
        bytes.extend([&[*kind, 0], &len.to_be_bytes()[..], &vec![0x5a; usize::from(len) - 4]].concat());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    let crc = crc32c(&bytes);
    bytes[8..12].copy_from_slice(&crc);
    bytes
}

/// RFC 9260 appendix A.
fn crc32c(bytes: &[u8]) -> [u8; 4] {
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 })
    });
    (!crc).to_le_bytes()
}
