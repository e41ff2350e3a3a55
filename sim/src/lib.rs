//! Seeded simulation: clients, a director (the real packet path over tables in plain memory) and its real servers, and a network that loses,
//! doubles, delays and so reorders packets, in one process and by one seed.
#![forbid(unsafe_code)]

mod hosts;
mod packet;
mod rng;
pub mod streams;

use hosts::{Client, Server};
use packet::Seen;
use rng::Rng;
use rvs_datapath::abi::service;
use rvs_datapath::conn::{self, Addressing, Conns};
use rvs_datapath::ct::{self, Found, Key, V4, V6};
use rvs_datapath::mem::{MemConns, MemPacket};
use rvs_datapath::packet::Ip;
use rvs_datapath::proto::tcp;
use rvs_datapath::sched::Kind;
use rvs_datapath::tables::Tables;
use rvs_datapath::verdict::{Action, Reason};
use rvs_fixtures::case::Engine;
use rvs_fixtures::frame::{Frame, TCP, UDP, check_sums, flag};
use rvs_fixtures::native::Native;
use rvs_fixtures::world::{BACK, LAN, Net, Server as RealServer, Virtual, World, dest_index, octets};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// What a run came to.
#[derive(Clone, Copy, Default, Debug)]
pub struct Report {
    /// Packets that the director got.
    pub packets: u64,
    /// Replies that clients got.
    pub replies: u64,
    /// Conversations that clients brought to their end.
    pub finished: u64,
    /// Packets that began a connection anew where an old one was.
    pub renewed: u64,
    pub lost: u64,
    pub answers: u64,
}

/// A broken invariant: the same seed breaks it again at the same step.
#[derive(Debug)]
pub struct Failure {
    pub seed: u64,
    pub step: u64,
    pub what: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "seed {}, step {}: {} (RVS_SIM_SEED={} replays it)", self.seed, self.step, self.what, self.seed)
    }
}

/// Events of one run.
const STEPS: u64 = 2500;
const CLIENTS: u16 = 24;
/// The director sweeps a slice of its tables this often. (A real one does forty times as often, which finds no more here.)
const TICK_MS: u64 = 1000;

enum Event {
    /// A client's turn to do something.
    Client(usize),
    /// A frame reaches the director.
    Director {
        frame: Vec<u8>,
        ifindex: u32,
    },
    /// ... a real server.
    Server {
        number: usize,
        frame: Vec<u8>,
    },
    /// ... a client's network.
    Lan(Vec<u8>),
    Tick(u32),
    /// Someone changes a weight, or nothing happens for long.
    Operator,
}

/// The network and everybody in it.
pub struct Sim {
    step: u64,
    rng: Rng,
    now_ms: u64,
    /// By time, and in the order of sending.
    events: BTreeMap<(u64, u64), Event>,
    sent: u64,
    director: Native,
    world: World,
    clients: Vec<Client>,
    servers: Vec<Server>,
    /// By the ends of a reply as the real server sends it: whom the flow's client talked to.
    translated: BTreeMap<(u8, SocketAddr, SocketAddr), SocketAddr>,
    report: Report,
}

/// Run one seed.
pub fn run(seed: u64) -> Result<Report, Failure> {
    let mut sim = Sim::new(seed);
    while sim.step < STEPS {
        sim.step += 1;
        sim.one().map_err(|what| Failure { seed, step: sim.step, what })?;
    }
    sim.audit().map_err(|what| Failure { seed, step: sim.step, what })?;
    Ok(sim.report)
}

impl Sim {
    fn new(seed: u64) -> Sim {
        let mut rng = Rng::new(seed);
        let net = if rng.chance(1, 2) { Net::V4 } else { Net::V6 };
        let world = world(net, &mut rng);
        let vips: Vec<_> = world.services.iter().map(|v| (v.at, v.protocol)).collect();
        let clients = (0..CLIENTS).map(|i| {
            let (vip, protocol) = vips[usize::from(i) % vips.len()];
            Client::new(net.client(40_000 + i), vip, protocol)
        });
        let mut sim = Sim {
            step: 0,
            now_ms: 0,
            events: BTreeMap::new(),
            sent: 0,
            director: Native::default(),
            world,
            clients: clients.collect(),
            servers: (11..=13).map(|n| Server::new(net, n)).collect(),
            translated: BTreeMap::new(),
            report: Report::default(),
            rng,
        };
        sim.director.load(&sim.world.layout());
        sim.director.set_now(sim.now_s());
        for i in 0..sim.clients.len() {
            let at = sim.rng.below(2000);
            sim.after(at, Event::Client(i));
        }
        sim.after(TICK_MS, Event::Tick(0));
        sim.after(5000, Event::Operator);
        sim
    }

    fn now_s(&self) -> u32 {
        1000 + (self.now_ms / 1000) as u32
    }
    fn after(&mut self, ms: u64, event: Event) {
        self.sent += 1;
        self.events.insert((self.now_ms + ms, self.sent), event);
    }
    /// Over a link that is not good.
    fn transmit(&mut self, event: impl Fn() -> Event) {
        if self.rng.chance(1, 20) {
            self.report.lost += 1;
            return;
        }
        let copies = if self.rng.chance(1, 15) { 2 } else { 1 };
        for _ in 0..copies {
            // One packet in four is late, and overtaken.
            let most = if self.rng.chance(1, 4) { 400 } else { 5 };
            let delay = 1 + self.rng.below(most);
            self.after(delay, event());
        }
    }

    fn one(&mut self) -> Result<(), String> {
        let Some(((at, _), event)) = self.events.pop_first() else { return Err("nothing left to happen".to_owned()) };
        self.now_ms = self.now_ms.max(at);
        self.director.set_now(self.now_s());
        match event {
            Event::Client(i) => self.client(i),
            Event::Director { frame, ifindex } => return self.direct(&frame, ifindex),
            Event::Server { number, frame } => {
                let reply = self.servers[number].receive(&frame)?;
                if let Some((reply, straight)) = reply {
                    let frame = reply.bytes();
                    if straight {
                        self.transmit(|| Event::Lan(frame.clone()));
                    } else {
                        self.transmit(|| Event::Director { frame: frame.clone(), ifindex: BACK });
                    }
                }
            }
            Event::Lan(frame) => return self.arrive(&frame),
            Event::Tick(n) => {
                self.director.tables.sweep_slice(n);
                self.after(TICK_MS, Event::Tick(n + 1));
                if n.is_multiple_of(16) {
                    return self.audit();
                }
            }
            Event::Operator => self.operate(),
        }
        Ok(())
    }

    fn client(&mut self, i: usize) {
        let (frames, pause) = self.clients[i].act(&mut self.rng);
        self.send_all(&frames);
        self.after(pause, Event::Client(i));
    }
    fn send_all(&mut self, frames: &[Frame]) {
        for frame in frames.iter().map(Frame::bytes) {
            self.transmit(|| Event::Director { frame: frame.clone(), ifindex: LAN });
        }
    }

    /// A frame on the clients' side: nobody ever hears from anybody but the virtual address.
    fn arrive(&mut self, frame: &[u8]) -> Result<(), String> {
        let seen = Seen::of(frame).ok_or_else(|| format!("a frame to a client that is none: {frame:02x?}"))?;
        if seen.is_icmp {
            self.report.answers += 1;
            let known = self.world.services.iter().any(|v| v.at.ip() == seen.from.ip());
            return if known { Ok(()) } else { Err(format!("an ICMP error from {}", seen.from)) };
        }
        let Some(i) = self.clients.iter().position(|c| c.at == seen.to) else {
            return Err(format!("a packet to nobody: {seen:?}"));
        };
        if seen.from != self.clients[i].vip {
            return Err(format!("{} talks to {}, and hears from {}", seen.to, self.clients[i].vip, seen.from));
        }
        self.report.replies += 1;
        let before = self.clients[i].finished;
        let frames = self.clients[i].receive(&seen);
        self.report.finished += self.clients[i].finished - before;
        self.send_all(&frames);
        Ok(())
    }

    /// A frame through the director, and what must hold of what it does.
    fn direct(&mut self, frame: &[u8], ifindex: u32) -> Result<(), String> {
        self.report.packets += 1;
        let seen = Seen::of(frame).ok_or("a frame to the director that is none")?;
        let before = self.entry(&seen);
        let mut p = MemPacket { bytes: frame.to_vec(), ifindex };
        let verdict = self.director.tables.run(&mut p);
        let reason = verdict.reason();
        if let Err(wrong) = check_sums(&p.bytes) {
            return Err(format!("wrong {wrong} after {reason:?}"));
        }
        if !matches!(verdict.action(), Action::Out(_) | Action::Back) {
            return if p.bytes == frame { Ok(()) } else { Err(format!("{reason:?} altered the packet")) };
        }
        let out = Seen::of(&p.bytes).ok_or_else(|| format!("{reason:?} left no packet"))?;
        match reason {
            Reason::Route | Reason::Masq => {
                let number = self.server_of(&out)?;
                self.same_server(&seen, before, number)?;
                if reason == Reason::Masq {
                    self.translated.insert((seen.protocol, out.to, out.from), seen.to);
                }
                let bytes = p.bytes;
                self.transmit(|| Event::Server { number, frame: bytes.clone() });
            }
            Reason::MasqReply => {
                let vip = self.translated.get(&(seen.protocol, seen.from, seen.to));
                if vip != Some(&out.from) || out.to != seen.to {
                    return Err(format!(
                        "a reply {} -> {} became {} -> {}, not from {vip:?}",
                        seen.from, seen.to, out.from, out.to
                    ));
                }
                let bytes = p.bytes;
                self.transmit(|| Event::Lan(bytes.clone()));
            }
            Reason::TtlExceeded | Reason::NoDest => {
                let bytes = p.bytes;
                self.transmit(|| Event::Lan(bytes.clone()));
            }
            other => return Err(format!("{other:?} sent a packet")),
        }
        Ok(())
    }

    /// By the MAC address that the packet goes to.
    fn server_of(&self, out: &Seen) -> Result<usize, String> {
        let found = self.servers.iter().position(|s| s.mac == out.to_mac);
        found.ok_or_else(|| format!("sent to {:02x?}, which is no real server", out.to_mac))
    }

    /// A flow stays with its server while its entry lives.
    fn same_server(&mut self, seen: &Seen, before: Option<Entry>, number: usize) -> Result<(), String> {
        let Some(entry) = before else { return Ok(()) };
        let renews = entry.expired || seen.flags & flag::SYN != 0 && tcp::reusable(entry.state);
        if renews {
            self.report.renewed += 1;
            return Ok(());
        }
        let first = (0..self.world.services.len()).find(|i| {
            let v = &self.world.services[*i];
            (v.at, v.protocol) == (seen.to, seen.protocol)
        });
        let service = first.ok_or("a packet to no service was forwarded")?;
        let owner = dest_index(service, number);
        if entry.dest == owner {
            Ok(())
        } else {
            Err(format!("{} moved from dest {} to {owner}", seen.from, entry.dest))
        }
    }

    /// The forward entry of a client's packet, as it is before it.
    fn entry(&self, seen: &Seen) -> Option<Entry> {
        let t = &self.director.tables;
        if seen.from.is_ipv6() { entry_of::<V6>(t.conns6(), seen) } else { entry_of::<V4>(t.conns4(), seen) }
    }

    /// The tables at rest.
    fn audit(&mut self) -> Result<(), String> {
        if let Some(dest) = self.director.tables.miscounted() {
            return Err(format!("the counters of dest {dest} are not what its entries say"));
        }
        let (counted, packets) = (self.director.verdicts().iter().sum::<u64>(), self.report.packets);
        if counted != packets {
            return Err(format!("{counted} verdicts of {packets} packets"));
        }
        if self.director.verdicts()[Reason::Internal as usize] != 0 {
            return Err("an internal error".to_owned());
        }
        Ok(())
    }

    fn operate(&mut self) {
        if self.rng.chance(1, 3) {
            // Nothing moves for a while; or until the last flow is forgotten.
            let pause = [20_000, 130_000, 1_000_000][self.rng.below(3) as usize];
            self.now_ms += pause;
            self.director.set_now(self.now_s());
            self.director.tables.sweep();
        } else {
            let service = self.rng.below(self.world.services.len() as u64) as usize;
            let server = self.rng.below(3) as usize;
            self.world.services[service].servers[server].weight = self.rng.below(4) as u32;
            self.director.load(&self.world.layout());
        }
        self.after(4000, Event::Operator);
    }
}

/// What a connection table has of a flow.
struct Entry {
    dest: u32,
    state: u64,
    expired: bool,
}

fn entry_of<F: Ip>(conns: &MemConns<F>, seen: &Seen) -> Option<Entry> {
    let address = |end: SocketAddr| F::from_address(&octets(end.ip()).into());
    let words = <F as Addressing>::words(address(seen.from), address(seen.to));
    let proto = if seen.protocol == TCP { conn::TCP } else { conn::UDP };
    let key = Key::new(words, seen.from.port(), seen.to.port(), proto);
    match ct::lookup::<F, _>(conns, &key) {
        Found::Live(hit) if hit.control & ct::REVERSE == 0 => Some(Entry {
            dest: conn::dest(hit.control),
            state: ct::state(hit.control),
            expired: conn::expired(&conns.policy, hit.control, Conns::<F>::now_s(conns)),
        }),
        _ => None,
    }
}

/// NAT and DR, TCP and UDP, three servers each.
fn world(net: Net, rng: &mut Rng) -> World {
    let mut services = Vec::new();
    for (port, protocol) in [(80, TCP), (81, TCP), (53, UDP), (54, UDP)] {
        let server = |n| match port {
            80 | 53 => RealServer::nat(net, n, 8000 + port),
            _ => RealServer::dr(net, n, port),
        };
        let kind = [Kind::Rr, Kind::Wrr, Kind::Wlc, Kind::Mh][rng.below(4) as usize];
        let mut v = Virtual::new(net.vip(port), protocol, &[11, 12, 13].map(server)).by(kind);
        v.flags |= service::HASH_FALLBACK | service::HASH_PORT;
        services.push(v);
    }
    World::of(&services)
}
