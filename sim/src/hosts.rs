//! Clients and real servers: small state machines that talk something like TCP, and datagrams.

use crate::packet::Seen;
use crate::rng::Rng;
use rvs_fixtures::frame::{Frame, Mac, TCP, flag};
use rvs_fixtures::world::{BACK_MAC, CLIENT_MAC, LAN_MAC, Net, server_mac};
use std::collections::BTreeSet;
use std::net::SocketAddr;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    Opening,
    Open,
    Closing,
}

/// One client port, which is used again and again for conversations with the same virtual end.
pub struct Client {
    pub at: SocketAddr,
    pub vip: SocketAddr,
    protocol: u8,
    phase: Phase,
    /// Tries of this phase so far.
    tries: u32,
    conversation: u32,
    pub finished: u64,
}

impl Client {
    pub fn new(at: SocketAddr, vip: SocketAddr, protocol: u8) -> Client {
        Client { at, vip, protocol, phase: Phase::Idle, tries: 0, conversation: 0, finished: 0 }
    }

    fn frame(&self, flags: u8) -> Frame {
        let mut f = Frame::new(self.protocol, self.at, self.vip).macs(LAN_MAC, CLIENT_MAC).flags(flags);
        f.seq = self.conversation;
        f
    }
    fn enter(&mut self, phase: Phase) {
        (self.phase, self.tries) = (phase, 0);
    }

    /// What it sends now, and when its next turn is, in milliseconds.
    pub fn act(&mut self, rng: &mut Rng) -> (Vec<Frame>, u64) {
        let pause = 200 + rng.below(1500);
        // Now and then from a host that is too far away.
        let ttl = if rng.chance(1, 30) { 1 } else { 64 };
        if self.protocol != TCP {
            return (vec![self.frame(0).ttl(ttl)], pause);
        }
        self.tries += 1;
        let flags = match self.phase {
            Phase::Idle => {
                self.conversation += 1;
                self.enter(Phase::Opening);
                flag::SYN
            }
            Phase::Opening if self.tries < 5 => flag::SYN,
            Phase::Open if self.tries < 6 => flag::ACK,
            // Some just go away; some go away with a RST.
            Phase::Open if rng.chance(1, 6) => {
                self.enter(Phase::Idle);
                flag::RST
            }
            Phase::Open => {
                self.enter(Phase::Closing);
                flag::FIN | flag::ACK
            }
            Phase::Closing if self.tries < 4 => flag::FIN | flag::ACK,
            Phase::Opening | Phase::Closing => {
                self.enter(Phase::Idle);
                return (Vec::new(), pause);
            }
        };
        (vec![self.frame(flags).ttl(ttl)], pause)
    }

    /// Its answer to a reply.
    pub fn receive(&mut self, seen: &Seen) -> Vec<Frame> {
        if seen.protocol != TCP || seen.seq != self.conversation {
            // Of a conversation before, late.
            return Vec::new();
        }
        let has = |flags: u8| seen.flags & flags == flags;
        match self.phase {
            _ if has(flag::RST) => {
                self.enter(Phase::Idle);
                Vec::new()
            }
            Phase::Opening if has(flag::SYN | flag::ACK) => {
                self.enter(Phase::Open);
                vec![self.frame(flag::ACK)]
            }
            Phase::Closing if has(flag::FIN) => {
                self.finished += 1;
                self.enter(Phase::Idle);
                vec![self.frame(flag::ACK)]
            }
            _ => Vec::new(),
        }
    }
}

/// A real server. Its replies go to its gateway, the director, if it was addressed by its own address (NAT), else straight to the client.
pub struct Server {
    net: Net,
    number: u8,
    pub mac: Mac,
    /// Client and own end of connections that it knows.
    known: BTreeSet<(SocketAddr, SocketAddr)>,
}

impl Server {
    pub fn new(net: Net, number: u8) -> Server {
        Server { net, number, mac: server_mac(number), known: BTreeSet::new() }
    }

    /// Its reply, and whether that goes straight to the client.
    pub fn receive(&mut self, frame: &[u8]) -> Result<Option<(Frame, bool)>, String> {
        let seen = Seen::of(frame).ok_or_else(|| format!("server {} got no packet: {frame:02x?}", self.number))?;
        let own = self.net.server(self.number, 0).ip();
        let nat = seen.to.ip() == own;
        if !nat && seen.to.ip() != self.net.vip(0).ip() {
            return Err(format!("server {} got a packet for {}", self.number, seen.to));
        }
        let pair = (seen.from, seen.to);
        let has = |flags: u8| seen.flags & flags != 0;
        let flags = match seen.protocol {
            TCP if has(flag::RST) => {
                self.known.remove(&pair);
                return Ok(None);
            }
            TCP if has(flag::SYN) => {
                self.known.insert(pair);
                flag::SYN | flag::ACK
            }
            TCP if !self.known.contains(&pair) => flag::RST | flag::ACK,
            TCP if has(flag::FIN) => flag::FIN | flag::ACK,
            _ => flag::ACK,
        };
        let macs = if nat { (BACK_MAC, self.mac) } else { (CLIENT_MAC, self.mac) };
        let mut reply = Frame::new(seen.protocol, seen.to, seen.from).macs(macs.0, macs.1).flags(flags);
        reply.seq = seen.seq;
        Ok(Some((reply, !nat)))
    }
}
