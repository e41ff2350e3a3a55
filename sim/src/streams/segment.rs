//! TCP segments, read and made; and what both ends do with those of the other.

use rvs_fixtures::frame::{Frame, TCP, flag};
use rvs_fixtures::world::{BACK_MAC, CLIENT_MAC, LAN_MAC, server_mac};
use std::net::{IpAddr, SocketAddr};

#[derive(Clone, Debug)]
pub struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
    pub window: u16,
    pub options: Vec<u8>,
    pub text: Vec<u8>,
}

impl Segment {
    pub fn of(frame: &[u8]) -> Option<Segment> {
        let ip = frame.get(14..)?;
        let (from, to, tcp): (IpAddr, IpAddr, &[u8]) = if frame[12..14] == [8, 0] {
            let four = |at: usize| <[u8; 4]>::try_from(&ip[at..at + 4]).ok();
            let len = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            (four(12)?.into(), four(16)?.into(), ip.get(20..len)?)
        } else {
            let sixteen = |at: usize| <[u8; 16]>::try_from(&ip[at..at + 16]).ok();
            let len = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
            (sixteen(8)?.into(), sixteen(24)?.into(), ip.get(40..40 + len)?)
        };
        let word = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let header = usize::from(tcp[12] >> 4) * 4;
        Some(Segment {
            from: SocketAddr::new(from, word(0)),
            to: SocketAddr::new(to, word(2)),
            flags: tcp[13],
            seq: long(4),
            ack: long(8),
            window: word(14),
            options: tcp.get(20..header)?.to_vec(),
            text: tcp.get(header..)?.to_vec(),
        })
    }

    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The body of the first option of this kind.
    pub fn option(&self, kind: u8) -> Option<&[u8]> {
        let mut rest = &self.options[..];
        while let [first, ..] = rest {
            match *first {
                0 => return None,
                1 => rest = &rest[1..],
                other => {
                    let len = usize::from(*rest.get(1)?).max(2);
                    let body = rest.get(2..len)?;
                    if other == kind {
                        return Some(body);
                    }
                    rest = &rest[len..];
                }
            }
        }
        None
    }

    fn frame(&self) -> Frame {
        let f = Frame::new(TCP, self.from, self.to).flags(self.flags).numbers(self.seq, self.ack);
        f.window(self.window).options(&self.options).payload(&self.text)
    }
    pub fn client_frame(&self) -> Vec<u8> {
        self.frame().macs(LAN_MAC, CLIENT_MAC).bytes()
    }
    pub fn server_frame(&self, number: u8) -> Vec<u8> {
        self.frame().macs(BACK_MAC, server_mac(number)).bytes()
    }
}

/// `a` before `b`, as sequence numbers go.
pub fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// What an end has received: bytes that may have gaps, and where the other's FIN is.
#[derive(Default)]
pub struct Received {
    bytes: Vec<Option<u8>>,
    /// Of these, without a gap.
    whole: usize,
    fin: Option<usize>,
}

impl Received {
    /// Take a segment that begins so many bytes after the first one, as far as there is room. What is there already is not looked at again.
    ///
    /// # Errors
    /// It says something else than an earlier one that is behind a gap still.
    pub fn take(&mut self, offset: i32, segment: &Segment, room: usize) -> Result<(), String> {
        for (i, byte) in (offset..).zip(&segment.text) {
            let Some(i) = usize::try_from(i).ok().filter(|i| (self.whole..room).contains(i)) else { continue };
            self.bytes.resize(self.bytes.len().max(i + 1), None);
            match self.bytes[i].replace(*byte) {
                Some(old) if old != *byte => return Err(format!("byte {i} was {old}, and is {byte} now")),
                _ => {}
            }
        }
        if segment.has(flag::FIN)
            && let Some(end) = usize::try_from(offset + segment.text.len() as i32).ok().filter(|end| *end <= room)
        {
            match self.fin.replace(end) {
                Some(old) if old != end => return Err(format!("the end was {old}, and is {end} now")),
                _ => {}
            }
        }
        self.whole += self.bytes[self.whole..].iter().take_while(|b| b.is_some()).count();
        Ok(())
    }
    /// Bytes without a gap.
    pub fn read(&self) -> Vec<u8> {
        self.bytes[..self.whole].iter().flatten().copied().collect()
    }
    pub fn len(&self) -> usize {
        self.whole
    }
    /// Bytes to acknowledge, the FIN one of them.
    pub fn next(&self) -> u32 {
        self.whole as u32 + u32::from(self.ended())
    }
    pub fn ended(&self) -> bool {
        self.fin == Some(self.whole)
    }
    /// The first island behind a gap.
    pub fn island(&self) -> Option<(u32, u32)> {
        let start = (self.whole..self.bytes.len()).find(|i| self.bytes[*i].is_some())?;
        let end = (start..self.bytes.len()).find(|i| self.bytes[*i].is_none()).unwrap_or(self.bytes.len());
        Some((start as u32, end as u32))
    }
}
