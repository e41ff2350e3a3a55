//! What the simulated hosts read of a packet.

use rvs_fixtures::frame::{Mac, TCP, UDP};
use std::net::{IpAddr, SocketAddr};

/// A TCP, UDP or ICMP packet. ICMP has ports 0.
#[derive(Clone, Debug)]
pub struct Seen {
    pub to_mac: Mac,
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub protocol: u8,
    pub flags: u8,
    /// Of TCP: the number of the client's conversation here.
    pub seq: u32,
    pub is_icmp: bool,
}

impl Seen {
    pub fn of(frame: &[u8]) -> Option<Seen> {
        let to_mac: Mac = frame.get(..6)?.try_into().ok()?;
        let ip = frame.get(14..)?;
        let (from, to, protocol, content): (IpAddr, IpAddr, u8, &[u8]) = match frame.get(12..14)? {
            [0x08, 0x00] => {
                let four = |at: usize| ip.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok());
                (four(12)?.into(), four(16)?.into(), *ip.get(9)?, ip.get(20..)?)
            }
            [0x86, 0xdd] => {
                let sixteen = |at: usize| ip.get(at..at + 16).and_then(|b| <[u8; 16]>::try_from(b).ok());
                (sixteen(8)?.into(), sixteen(24)?.into(), *ip.get(6)?, ip.get(40..)?)
            }
            _ => return None,
        };
        let is_icmp = protocol == 1 || protocol == 58;
        if !is_icmp && protocol != TCP && protocol != UDP {
            return None;
        }
        let word = |at: usize| content.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
        let (sport, dport) = if is_icmp { (0, 0) } else { (word(0)?, word(2)?) };
        let (flags, seq) =
            if protocol == TCP { (*content.get(13)?, u32::from(word(4)?) << 16 | u32::from(word(6)?)) } else { (0, 0) };
        let (from, to) = (SocketAddr::new(from, sport), SocketAddr::new(to, dport));
        Some(Seen { to_mac, from, to, protocol, flags, seq, is_icmp })
    }
}
