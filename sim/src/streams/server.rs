//! The server: reads the header, then what its client writes, and answers when it has the header (or when it has read all).

use super::client::Client;
use super::segment::{Received, Segment};
use crate::rng::Rng;
use rvs_fixtures::frame::flag;
use std::net::SocketAddr;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Listening,
    Opening,
    Open,
    Reset,
}

pub struct Server {
    at: SocketAddr,
    header: Vec<u8>,
    pub text: Vec<u8>,
    first: u32,
    phase: Phase,
    client: SocketAddr,
    client_first: u32,
    got: Received,
    /// Bytes that it takes beyond those it has read without a gap.
    window: u32,
    scale: u8,
    /// Up to where the client may write, by what it was told.
    allowed: u32,
    /// ... or a little more: windows go by another scale.
    slack: u32,
    acknowledged: u32,
    /// It speaks when it has the header alone.
    speaks_first: bool,
    chunk: usize,
}

impl Server {
    pub fn new(at: SocketAddr, header: Vec<u8>, slack: u32, client: &mut Client, rng: &mut Rng) -> Server {
        let len = [1, 10, 2000, 9000][rng.below(4) as usize];
        let window = [20, 60, 700, 30_000][rng.below(4) as usize];
        client.text.truncate(20 * window as usize);
        Server {
            at,
            header,
            text: (0..len).map(|_| rng.below(256) as u8).collect(),
            first: rng.below(1 << 32) as u32,
            phase: Phase::Listening,
            client: at,
            client_first: 0,
            got: Received::default(),
            window,
            scale: rng.below(4) as u8,
            allowed: 0,
            slack,
            acknowledged: 0,
            speaks_first: client.is_patient() || rng.chance(1, 3),
            chunk: 1 + len / 40 + rng.below(1200) as usize,
        }
    }
    /// For people.
    pub fn brief(&self) -> String {
        let all = self.text.len() + 1;
        let read = self.got.next();
        format!(
            "the server {:?}, {} of {all} acknowledged, {} allowed, {read} received",
            self.phase, self.acknowledged, self.allowed
        )
    }
    pub fn is_reset(&self) -> bool {
        self.phase == Phase::Reset || self.phase == Phase::Listening
    }
    pub fn is_done(&self) -> bool {
        self.acknowledged == self.text.len() as u32 + 1 && self.got.ended()
    }
    /// What the application reads behind the header.
    pub fn read(&self) -> Vec<u8> {
        self.got.read().split_off(self.header.len().min(self.got.len()))
    }

    fn next(&self) -> u32 {
        self.client_first.wrapping_add(1 + self.got.next())
    }
    fn segment(&mut self, flags: u8, seq: u32) -> Segment {
        let syn = flags & flag::SYN != 0;
        let scale = if syn { 0 } else { self.scale };
        let window = (self.window >> scale) as u16;
        self.allowed = self.allowed.max(self.got.next() + (u32::from(window) << scale));
        let mut options = Vec::new();
        if syn {
            let [high, low] = if self.at.is_ipv6() { 1440u16 } else { 1460 }.to_be_bytes();
            options = vec![2, 4, high, low, 1, 1, 4, 2, 1, 3, 3, self.scale];
        } else if let Some((start, end)) = self.got.island() {
            let edge = |n: u32| self.client_first.wrapping_add(1 + n).to_be_bytes();
            options = [vec![1, 1, 5, 10], edge(start).to_vec(), edge(end).to_vec()].concat();
        }
        Segment { from: self.at, to: self.client, flags, seq, ack: self.next(), window, options, text: Vec::new() }
    }
    fn number(&self, offset: u32) -> u32 {
        self.first.wrapping_add(1).wrapping_add(offset)
    }

    pub fn act(&mut self) -> Vec<Segment> {
        match self.phase {
            Phase::Listening | Phase::Reset => return Vec::new(),
            Phase::Opening => {
                let first = self.first;
                return vec![self.segment(flag::SYN | flag::ACK, first)];
            }
            Phase::Open => {}
        }
        let introduced = self.got.len() >= self.header.len();
        let all = self.acknowledged as usize > self.text.len();
        if !introduced || !(self.speaks_first || self.got.ended()) || all {
            // Is anybody there?
            let number = self.number(self.acknowledged.wrapping_sub(1));
            return vec![self.segment(flag::ACK, number)];
        }
        let mut segments = Vec::new();
        let mut at = self.acknowledged as usize;
        for _ in 0..3 {
            let take = self.text.len().saturating_sub(at).min(self.chunk);
            let last = at + take == self.text.len();
            let mut s = self.segment(flag::ACK | if last { flag::FIN } else { 0 }, self.number(at as u32));
            if at > self.text.len() {
                break;
            }
            s.text = self.text[at..at + take].to_vec();
            segments.push(s);
            at += take;
            if last {
                break;
            }
        }
        segments
    }

    pub fn receive(&mut self, s: &Segment) -> Result<Vec<Segment>, String> {
        if s.to != self.at {
            return Err(format!("a segment to {}", s.to));
        }
        if s.has(flag::SYN) {
            if self.phase == Phase::Listening {
                if !s.text.is_empty() {
                    return Err("data in a SYN".to_owned());
                }
                self.phase = Phase::Opening;
                (self.client, self.client_first) = (s.from, s.seq);
            }
            if self.phase == Phase::Reset {
                return Ok(Vec::new());
            }
            if (self.client, self.client_first) != (s.from, s.seq) {
                return Err(format!("another SYN: {s:?}"));
            }
            let (flags, seq) = if self.phase == Phase::Opening {
                (flag::SYN | flag::ACK, self.first)
            } else {
                (flag::ACK, self.number(0))
            };
            return Ok(vec![self.segment(flags, seq)]);
        }
        if matches!(self.phase, Phase::Listening | Phase::Reset) {
            // A RST would end a client whose SYN is only late; a real server's would, too.
            return Ok(Vec::new());
        }
        if s.from != self.client {
            return Err(format!("a segment from {}, not {}", s.from, self.client));
        }
        let offset = s.seq.wrapping_sub(self.client_first.wrapping_add(1)) as i32;
        if s.has(flag::RST) {
            // RFC 5961 3.2.
            let number = self.number(self.acknowledged);
            if offset == self.got.next() as i32 {
                self.phase = Phase::Reset;
                return Ok(Vec::new());
            }
            return Ok(vec![self.segment(flag::ACK, number)]);
        }
        if !s.has(flag::ACK) {
            return Err(format!("neither SYN, RST nor ACK: {s:?}"));
        }
        let end = offset + s.text.len() as i32;
        // (Of the header nobody asks whether there is room for it.)
        if end > (self.allowed + self.slack).max(self.header.len() as u32) as i32 + 2 {
            return Err(format!("{end} bytes where {} may be: {s:?}", self.allowed));
        }
        if self.phase == Phase::Opening {
            if s.ack != self.number(0) {
                return Ok(Vec::new());
            }
            self.phase = Phase::Open;
        }
        let acknowledged = s.ack.wrapping_sub(self.number(0));
        if acknowledged > self.text.len() as u32 + 1 {
            return Err(format!("{acknowledged} acknowledged of {}", self.text.len() + 1));
        }
        self.acknowledged = self.acknowledged.max(acknowledged);
        self.got.take(offset, s, self.allowed as usize)?;
        let there = self.got.len().min(self.header.len());
        if self.got.read()[..there] != self.header[..there] {
            return Err(format!("{:02x?} does not begin with the header", self.got.read()));
        }
        let speaks = !s.text.is_empty() || s.has(flag::FIN) || offset < self.got.next() as i32;
        let number = self.number(self.acknowledged);
        Ok(if speaks { vec![self.segment(flag::ACK, number)] } else { Vec::new() })
    }
}
