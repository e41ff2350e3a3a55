//! What a frame's headers say, for people; and the frames that `rvs why` asks about.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::api::{Probe, ProbeProto};
use crate::net::Mac;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const ICMP6: u8 = 58;

/// Names of TCP flags, from the lowest bit on.
pub const TCP_FLAGS: [&str; 8] = ["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"];

/// Names of SCTP's chunks by type (RFC 9260 3.2).
const SCTP_CHUNKS: [&str; 15] = [
    "data",
    "init",
    "init_ack",
    "sack",
    "heartbeat",
    "heartbeat_ack",
    "abort",
    "shutdown",
    "shutdown_ack",
    "error",
    "cookie_echo",
    "cookie_ack",
    "ecne",
    "cwr",
    "shutdown_complete",
];

/// A frame, as far as it was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    pub to: Mac,
    pub from: Mac,
    pub ethertype: u16,
    pub packet: Option<Ends>,
}

/// An IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub ttl: u8,
    /// Bytes of the IP packet, as it says.
    pub len: u32,
    /// Of TCP, UDP and SCTP, where they are there (a fragment may have none).
    pub ports: Option<[u16; 2]>,
    /// Of TCP.
    pub flags: Option<u8>,
    /// Type of the first chunk of SCTP.
    pub chunk: Option<u8>,
    /// Type and code of ICMP.
    pub icmp: Option<[u8; 2]>,
    /// Where its payload begins, in bytes from its first.
    payload: usize,
}

impl Headers {
    /// `None`: no Ethernet header.
    pub fn read(frame: &[u8]) -> Option<Headers> {
        let (macs, rest) = frame.split_at_checked(12)?;
        let mac = |at: usize| Some(Mac(macs.get(at..at + 6)?.try_into().ok()?));
        let ethertype = u16::from_be_bytes([*rest.first()?, *rest.get(1)?]);
        // As the data plane has it: a packet of another version than the Ethernet header says is none.
        let version = rest.get(2).map(|first| first >> 4);
        let is = matches!((ethertype, version), (IPV4, Some(4)) | (IPV6, Some(6)));
        let packet = if is { Ends::read(&rest[2..]) } else { None };
        Some(Headers { to: mac(0)?, from: mac(6)?, ethertype, packet })
    }
}

impl Ends {
    /// `None`: no IP header.
    pub fn read(packet: &[u8]) -> Option<Ends> {
        let byte = |at: usize| packet.get(at).copied();
        let word = |at: usize| Some(u16::from_be_bytes([byte(at)?, byte(at + 1)?]));
        let (source, destination, protocol, ttl, len, payload, whole): (IpAddr, IpAddr, _, _, _, _, _) =
            match byte(0)? >> 4 {
                4 => {
                    let at = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
                    let first = word(6)? & 0x1fff == 0;
                    let payload = usize::from(byte(0)? & 0xf) * 4;
                    (at(12)?.into(), at(16)?.into(), byte(9)?, byte(8)?, u32::from(word(2)?), payload, first)
                }
                6 => {
                    let at = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
                    let len = 40 + u32::from(word(4)?);
                    (at(8)?.into(), at(24)?.into(), byte(6)?, byte(7)?, len, 40, true)
                }
                _ => return None,
            };
        let there = |known: bool| (known && whole).then_some(payload);
        let ports = there(matches!(protocol, TCP | UDP | SCTP)).and_then(|at| Some([word(at)?, word(at + 2)?]));
        let flags = there(protocol == TCP).and_then(|at| byte(at + 13));
        let chunk = there(protocol == SCTP && len as usize > payload + 12).and_then(|at| byte(at + 12));
        let icmp = there(matches!(protocol, ICMP | ICMP6)).and_then(|at| Some([byte(at)?, byte(at + 1)?]));
        Some(Ends { source, destination, protocol, ttl, len, ports, flags, chunk, icmp, payload })
    }

    /// The packet that an ICMP error quotes.
    pub fn quoted(&self, packet: &[u8]) -> Option<Ends> {
        let error = match (self.protocol, self.icmp?[0]) {
            (ICMP, kind) => matches!(kind, 3 | 4 | 5 | 11 | 12),
            (_, kind) => kind < 128,
        };
        if error { Ends::read(packet.get(self.payload + 8..)?) } else { None }
    }

    /// "tcp", "udp", ...
    pub fn protocol_name(&self) -> String {
        match self.protocol {
            ICMP => "icmp".to_owned(),
            TCP => "tcp".to_owned(),
            UDP => "udp".to_owned(),
            SCTP => "sctp".to_owned(),
            ICMP6 => "icmp6".to_owned(),
            other => format!("protocol {other}"),
        }
    }
}

/// `192.0.2.7:40000 > 198.51.100.100:80 tcp syn`.
impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ports {
            Some([from, to]) => write!(f, "{} > {}", at(self.source, from), at(self.destination, to))?,
            None => write!(f, "{} > {}", self.source, self.destination)?,
        }
        write!(f, " {}", self.protocol_name())?;
        if let Some(flags) = self.flags {
            let names: Vec<&str> =
                (0..).zip(TCP_FLAGS).filter(|(bit, _)| flags >> bit & 1 != 0).map(|(_, name)| name).collect();
            write!(f, " {}", if names.is_empty() { "no flags".to_owned() } else { names.join(",") })?;
        }
        if let Some(kind) = self.chunk {
            match SCTP_CHUNKS.get(usize::from(kind)) {
                Some(name) => write!(f, " {name}")?,
                None => write!(f, " chunk {kind}")?,
            }
        }
        match self.icmp {
            Some([kind, code]) => write!(f, " type {kind} code {code}"),
            None => Ok(()),
        }
    }
}

/// An address with its port; IPv6 in brackets.
pub fn at(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

/// The frame that a probe asks about, as it would come to an interface with this MAC address. `None`: addresses of different families.
pub fn frame(probe: &Probe, to: Mac) -> Option<Vec<u8>> {
    /// A host's own (locally administered).
    const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const TTL: u8 = 64;
    let (from_port, to_port) = (probe.from.1.to_be_bytes(), probe.to.1.to_be_bytes());
    let ports = [from_port[0], from_port[1], to_port[0], to_port[1]];
    let v6 = probe.to.0.is_ipv6();
    let (protocol, mut transport, sum_at) = match probe.proto {
        // Sequence numbers, a header of five words, a window.
        ProbeProto::Tcp => (TCP, [&ports[..], &[0; 8], &[5 << 4, probe.flags, 0xff, 0xff, 0, 0, 0, 0]].concat(), 16),
        ProbeProto::Udp => (UDP, [&ports[..], &[0, 8, 0, 0]].concat(), 6),
        // An INIT: a tag, a window, one stream each way, a first number.
        ProbeProto::Sctp => {
            let init = [1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1];
            (SCTP, [&ports[..], &[0; 8], &init].concat(), 8)
        }
        ProbeProto::Icmp if v6 => (ICMP6, vec![128, 0, 0, 0, 0, 1, 0, 1], 2),
        ProbeProto::Icmp => (ICMP, vec![8, 0, 0, 0, 0, 1, 0, 1], 2),
    };
    let len = transport.len() as u16;
    let (ethertype, ip, addresses) = match (probe.from.0, probe.to.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let [high, low] = (20 + len).to_be_bytes();
            let mut ip = vec![0x45, 0, high, low, 0, 0, 0x40, 0, TTL, protocol, 0, 0];
            ip.extend(&addresses);
            let sum = checksum(&[&ip]);
            ip[10..12].copy_from_slice(&sum);
            (IPV4, ip, addresses)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let [high, low] = len.to_be_bytes();
            (IPV6, [&[0x60, 0, 0, 0, high, low, protocol, TTL], &addresses[..]].concat(), addresses)
        }
        _ => return None,
    };
    let pseudo = [&addresses[..], &[0, protocol], &len.to_be_bytes()].concat();
    let sum = if protocol == ICMP { checksum(&[&transport]) } else { checksum(&[&pseudo, &transport]) };
    // In UDP 0 says that there is none.
    let sum = if protocol == UDP && sum == [0, 0] { [0xff, 0xff] } else { sum };
    if protocol == SCTP {
        let crc = crc32c(&transport);
        transport[sum_at..sum_at + 4].copy_from_slice(&crc);
    } else {
        transport[sum_at..sum_at + 2].copy_from_slice(&sum);
    }
    Some([&to.0[..], &FROM, &ethertype.to_be_bytes(), &ip, &transport].concat())
}

/// SCTP's checksum (RFC 9260 appendix A), as it lies in the packet.
fn crc32c(bytes: &[u8]) -> [u8; 4] {
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 })
    });
    (!crc).to_le_bytes()
}

/// Of parts of even length (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let mut sum: u32 = words.map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn probe(proto: ProbeProto, from: &str, to: &str, flags: u8) -> Probe {
        let end = |text: &str| text.parse::<std::net::SocketAddr>().map(|a| (a.ip(), a.port())).unwrap();
        Probe { proto, from: end(from), to: end(to), flags, interface: None }
    }

    const OURS: Mac = Mac([2, 0, 0, 0, 0, 9]);

    #[test]
    fn a_probe_is_the_packet_asked_about() {
        let tcp = frame(&probe(ProbeProto::Tcp, "192.0.2.7:40000", "198.51.100.100:80", 2), OURS).unwrap();
        let h = Headers::read(&tcp).unwrap();
        assert_eq!((h.to, h.packet.unwrap().len), (OURS, 40));
        assert_eq!(h.packet.unwrap().to_string(), "192.0.2.7:40000 > 198.51.100.100:80 tcp syn");
        let udp = frame(&probe(ProbeProto::Udp, "[2001:db8::7]:40000", "[2001:db8::8]:53", 0), OURS).unwrap();
        let shown = Headers::read(&udp).unwrap().packet.unwrap().to_string();
        assert_eq!(shown, "[2001:db8::7]:40000 > [2001:db8::8]:53 udp");
        let sctp = frame(&probe(ProbeProto::Sctp, "192.0.2.7:40000", "198.51.100.100:9", 0), OURS).unwrap();
        let shown = Headers::read(&sctp).unwrap().packet.unwrap().to_string();
        assert_eq!(shown, "192.0.2.7:40000 > 198.51.100.100:9 sctp init");
        assert_eq!(crc32c(b"123456789"), 0xe306_9283u32.to_le_bytes());
        let icmp = frame(&probe(ProbeProto::Icmp, "192.0.2.7:0", "198.51.100.100:0", 0), OURS).unwrap();
        let shown = Headers::read(&icmp).unwrap().packet.unwrap().to_string();
        assert_eq!(shown, "192.0.2.7 > 198.51.100.100 icmp type 8 code 0");
        assert_eq!(frame(&probe(ProbeProto::Udp, "192.0.2.7:1", "[2001:db8::8]:53", 0), OURS), None);
    }

    #[test]
    fn an_error_quotes_a_packet() {
        let quoted = frame(&probe(ProbeProto::Udp, "198.51.100.100:53", "192.0.2.7:4000", 0), OURS).unwrap();
        let mut error = frame(&probe(ProbeProto::Icmp, "192.0.2.9:0", "198.51.100.100:0", 0), OURS).unwrap();
        let about = |error: &[u8]| Headers::read(error).unwrap().packet.unwrap().quoted(&error[14..]);
        error.extend(&quoted[14..]);
        assert_eq!(about(&error), None, "an echo request quotes nothing");
        error[34] = 3;
        assert_eq!(about(&error).unwrap().to_string(), "198.51.100.100:53 > 192.0.2.7:4000 udp");
    }

    proptest! {
        /// The receiver's view: a header or packet with its checksum sums up to nothing.
        #[test]
        fn checksums_are_right(v6: bool, kind in 0..4, a: [u8; 16], b: [u8; 16], ports: [u16; 2], flags: u8) {
            let ip = |x: [u8; 16]| {
                if v6 { IpAddr::from(x) } else { IpAddr::from([x[0], x[1], x[2], x[3]]) }
            };
            let proto = [ProbeProto::Tcp, ProbeProto::Udp, ProbeProto::Icmp, ProbeProto::Sctp][kind as usize];
            let probe = Probe { proto, from: (ip(a), ports[0]), to: (ip(b), ports[1]), flags, interface: None };
            let bytes = frame(&probe, OURS).unwrap();
            let (l3, header) = (&bytes[14..], if v6 { 40 } else { 20 });
            let (addresses, transport) = (if v6 { &l3[8..40] } else { &l3[12..20] }, &l3[header..]);
            let ends = Headers::read(&bytes).unwrap().packet.unwrap();
            let pseudo = [addresses, &[0, ends.protocol], &(transport.len() as u16).to_be_bytes()].concat();
            let pseudo = if ends.protocol == ICMP { Vec::new() } else { pseudo };
            if kind == 3 {
                let zeroed = [&transport[..8], &[0; 4], &transport[12..]].concat();
                prop_assert_eq!(&crc32c(&zeroed)[..], &transport[8..12]);
            } else {
                prop_assert_eq!(checksum(&[&pseudo, transport]), [0, 0]);
            }
            prop_assert!(v6 || checksum(&[&l3[..20]]) == [0, 0]);
            prop_assert_eq!(ends.len as usize, l3.len());
            prop_assert_eq!(ends.ports, (kind != 2).then_some(ports));
            prop_assert_eq!(ends.flags, (kind == 0).then_some(flags));
        }

        #[test]
        fn any_bytes_are_read(bytes: Vec<u8>) {
            if let Some(h) = Headers::read(&bytes) && let Some(ends) = h.packet {
                let _ = (ends.to_string(), ends.quoted(&bytes[14..]));
            }
        }
    }
}
