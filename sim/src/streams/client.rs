//! The client: opens, writes, probes, closes, or goes away with a reset.

use super::segment::{Received, Segment, before};
use crate::rng::Rng;
use rvs_fixtures::frame::flag;
use std::net::SocketAddr;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Opening,
    Open,
    Reset,
}

pub struct Client {
    at: SocketAddr,
    vip: SocketAddr,
    pub text: Vec<u8>,
    first: u32,
    phase: Phase,
    /// Bytes acknowledged, sent at most once, and up to where the server's window goes; the FIN counts as one.
    acknowledged: u32,
    sent: u32,
    allowed: u32,
    server_first: u32,
    server_scale: u8,
    mss: usize,
    got: Received,
    /// It waits for the server's first word before it writes, though it has something.
    patient: bool,
    resets_after: Option<u64>,
    turns: u64,
    cookies: bool,
    options: Vec<u8>,
}

impl Client {
    pub fn new(at: SocketAddr, vip: SocketAddr, cookies: bool, rng: &mut Rng) -> Client {
        let len = [0, 1, 3, 100, 3000, 20_000][rng.below(6) as usize];
        let patient = rng.chance(1, 4);
        Client {
            at,
            vip,
            text: (0..len).map(|_| rng.below(256) as u8).collect(),
            first: if rng.chance(1, 3) { u32::MAX - rng.below(60) as u32 } else { rng.below(1 << 32) as u32 },
            phase: Phase::Opening,
            acknowledged: 0,
            sent: 0,
            allowed: 0,
            server_first: 0,
            server_scale: 0,
            mss: 536,
            got: Received::default(),
            patient,
            // (With cookies, an acknowledgement that is late may prove again whose connection has been reset.)
            resets_after: (rng.chance(1, 5) && !cookies).then(|| rng.below(6)),
            turns: 0,
            cookies,
            // Who is told of none by a cookie sends none.
            options: if rng.chance(1, 2) && !cookies { vec![1, 1, 1, 1] } else { Vec::new() },
        }
    }
    /// For people.
    pub fn brief(&self) -> String {
        format!(
            "the client {:?}, {} of {} acknowledged, {} sent, {} allowed, {} received",
            self.phase,
            self.acknowledged,
            self.end(),
            self.sent,
            self.allowed,
            self.got.next()
        )
    }
    pub fn is_patient(&self) -> bool {
        self.patient
    }
    pub fn has_reset(&self) -> bool {
        self.phase == Phase::Reset
    }
    /// All is acknowledged, and the server has said all.
    pub fn is_done(&self) -> bool {
        self.acknowledged == self.end() && self.got.ended()
    }
    pub fn read(&self) -> Vec<u8> {
        self.got.read()
    }
    /// The number of bytes and the FIN.
    fn end(&self) -> u32 {
        self.text.len() as u32 + 1
    }

    fn segment(&self, flags: u8, seq: u32) -> Segment {
        let ack = if flags & flag::ACK != 0 { self.server_first.wrapping_add(1 + self.got.next()) } else { 0 };
        Segment { from: self.at, to: self.vip, flags, seq, ack, window: 8000, options: Vec::new(), text: Vec::new() }
    }
    fn number(&self, offset: u32) -> u32 {
        self.first.wrapping_add(1).wrapping_add(offset)
    }
    /// From this byte on, as much as a segment takes.
    fn data(&mut self, from: u32, most: usize) -> Segment {
        let text = self.text.get(from as usize..).unwrap_or_default();
        let room = self.allowed.saturating_sub(from) as usize;
        let take = text.len().min(most).min(room);
        let last = take == text.len() && !self.patient;
        let mut s = self.segment(flag::ACK | if last { flag::FIN } else { 0 }, self.number(from));
        s.text = text[..take].to_vec();
        s.options.clone_from(&self.options);
        self.sent = self.sent.max(from + take as u32 + u32::from(last));
        s
    }

    /// What it sends by its own: the timer has run out.
    pub fn act(&mut self, rng: &mut Rng) -> Vec<Segment> {
        self.turns += 1;
        match self.phase {
            Phase::Reset => return Vec::new(),
            Phase::Opening => {
                let mut syn = self.segment(flag::SYN, self.first);
                syn.options = vec![2, 4, 5, 180, 1, 1, 4, 2, 1, 3, 3, 3];
                return vec![syn];
            }
            Phase::Open => {}
        }
        if self.resets_after.is_some_and(|n| self.turns > n) && self.acknowledged < self.end() {
            self.phase = Phase::Reset;
            return vec![self.segment(flag::RST | flag::ACK, self.number(self.sent))];
        }
        let waits = self.patient && self.got.next() == 0;
        let mut segments = Vec::new();
        if waits || self.acknowledged == self.end() {
            if self.cookies && rng.chance(1, 2) {
                // (What proves its address is lost for good else, when it says nothing more.)
                return vec![self.segment(flag::ACK, self.number(self.acknowledged))];
            }
            // A probe of whether the server is there still (RFC 1122 4.2.3.6), with an old byte or without.
            let mut probe = self.segment(flag::ACK, self.number(self.acknowledged.wrapping_sub(1)));
            if rng.chance(1, 3) && self.acknowledged < self.end() {
                let old = self.acknowledged.checked_sub(1).and_then(|i| self.text.get(i as usize));
                probe.text = vec![old.copied().unwrap_or(b'?')];
            }
            segments.push(probe);
            return segments;
        }
        self.patient = false;
        if self.allowed <= self.acknowledged {
            // A probe of a closed window: one byte.
            self.allowed = self.acknowledged + 1;
        }
        let from = self.acknowledged;
        segments.push(self.data(from, self.mss));
        // ... and some more.
        for _ in 0..rng.below(4) {
            let from = self.sent;
            let room = self.allowed.saturating_sub(from);
            if from < self.end() && (room > 0 || from as usize == self.text.len()) {
                let most = 1 + rng.below(self.mss as u64) as usize;
                segments.push(self.data(from, most));
            }
        }
        segments
    }

    pub fn receive(&mut self, s: &Segment, rng: &mut Rng) -> Result<Vec<Segment>, String> {
        if (s.from, s.to) != (self.vip, self.at) {
            return Err(format!("a segment from {} to {}", s.from, s.to));
        }
        if self.phase == Phase::Reset {
            // It knows of no connection (RFC 9293 3.10.7.1).
            let resets = s.has(flag::ACK) && !s.has(flag::RST);
            return Ok(if resets { vec![self.segment(flag::RST, s.ack)] } else { Vec::new() });
        }
        if s.has(flag::RST) {
            return Err(format!("reset: {s:?}"));
        }
        if self.phase == Phase::Opening {
            if !s.has(flag::SYN | flag::ACK) {
                return Ok(Vec::new());
            }
            if s.ack != self.number(0) {
                return Err(format!("a SYN,ACK of {} instead of {}", s.ack, self.number(0)));
            }
            self.phase = Phase::Open;
            self.server_first = s.seq;
            self.server_scale = s.option(3).and_then(|o| o.first().copied()).unwrap_or(0);
            if let Some([high, low]) = s.option(2) {
                self.mss = usize::from(u16::from_be_bytes([*high, *low])) - self.options.len();
            }
            self.allowed = u32::from(s.window);
            return Ok(vec![self.segment(flag::ACK, self.number(0))]);
        }
        if s.has(flag::SYN) {
            return Ok(vec![self.segment(flag::ACK, self.number(self.sent))]);
        }
        let acknowledged = s.ack.wrapping_sub(self.number(0));
        if acknowledged > self.sent {
            return if before(s.ack, self.number(0)) && acknowledged > u32::MAX - 100 {
                // Late, and of the header alone: it is old news.
                Ok(Vec::new())
            } else {
                Err(format!("{acknowledged} acknowledged of {} sent", self.sent))
            };
        }
        if let Some(edges) = s.option(5) {
            self.look_at_blocks(edges, acknowledged)?;
        }
        self.acknowledged = self.acknowledged.max(acknowledged);
        self.allowed = self.allowed.max(acknowledged + (u32::from(s.window) << self.server_scale));
        let offset = s.seq.wrapping_sub(self.server_first.wrapping_add(1)) as i32;
        self.got.take(offset, s, usize::MAX)?;
        let speaks = !s.text.is_empty() || s.has(flag::FIN);
        if !speaks {
            return Ok(Vec::new());
        }
        if rng.chance(1, 2) && self.patient && self.got.next() > 0 {
            return Ok(self.act(rng));
        }
        Ok(vec![self.segment(flag::ACK, self.number(self.sent))])
    }

    /// Of bytes that have been sent, behind those that are acknowledged.
    fn look_at_blocks(&self, edges: &[u8], acknowledged: u32) -> Result<(), String> {
        for block in edges.chunks_exact(8) {
            let edge = |at: usize| {
                let number = u32::from_be_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
                number.wrapping_sub(self.number(0))
            };
            let (start, end) = (edge(0), edge(4));
            if start > end || start < acknowledged || end > self.sent {
                return Err(format!("a block {start}..{end}, {acknowledged} acknowledged, {} sent", self.sent));
            }
        }
        Ok(())
    }
}
