//! The data plane under test: its maps filled with one service, its programs run by `BPF_PROG_TEST_RUN` on this CPU. The timer is not
//! started, so time stands still; the connection tables are reached through their mapping.

use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result, bail};
use rvs_datapath::abi::{Clock, Dest, Hop, Iface, ListEntry, Local, Service, ServiceKey, Tunnel, dest, map, service};
use rvs_datapath::ct;
use rvs_datapath::sched::Kind;
use rvs_sys::bpf::{Dataplane, GATES, Sizes, Table};

pub const DROP: u32 = 1;
pub const PASS: u32 = 2;
pub const TX: u32 = 3;
pub const REDIRECT: u32 = 4;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Dr,
    /// DR of a UDP service.
    Udp,
    Nat,
    /// By IPIP.
    Tunnel,
    Fullnat,
}

impl Method {
    /// Entries of the table for each flow.
    pub fn entries(self) -> u32 {
        if self.answers() { 2 } else { 1 }
    }
    /// Do replies go by the director?
    pub fn answers(self) -> bool {
        matches!(self, Method::Nat | Method::Fullnat)
    }
    pub fn name(self) -> &'static str {
        match self {
            Method::Dr => "DR",
            Method::Udp => "DR, UDP",
            Method::Nat => "NAT",
            Method::Tunnel => "TUN",
            Method::Fullnat => "FULLNAT",
        }
    }
    fn protocol(self) -> u8 {
        if self == Method::Udp { 17 } else { 6 }
    }
}

/// IP version.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V4,
    V6,
}

impl Version {
    /// `v4` if this is IPv4.
    pub fn of<T>(self, v4: T, v6: T) -> T {
        if self == Version::V4 { v4 } else { v6 }
    }
}

/// How it is measured.
pub struct Settings {
    /// The object file with the programs.
    pub object: Vec<u8>,
    /// A folder on a BPF file system for the pins.
    pub pins: PathBuf,
    /// Packets of one run.
    pub packets: u32,
    /// Runs of each measurement.
    pub runs: usize,
    /// The device by which replies leave.
    pub out: u32,
}

/// Which packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    Syn,
    Ack,
    /// An ACK of the server (NAT, FULLNAT).
    Reply,
    /// A datagram to the service.
    Udp,
    /// An ACK to a port that is no service's.
    NoService,
    OtherMac,
    Icmp,
    /// A RST of no known connection.
    Rst,
    /// A SYN of another client's port.
    OtherSyn,
    /// ARP.
    NotIp,
    /// IPv4: with an option. IPv6: with an extension header.
    Extras,
    /// The header's length, or what it says of the packet's, can't be.
    Malformed,
    /// Of a datagram in several: the first, with the whole TCP header, and one after it.
    FirstFragment,
    LaterFragment,
}

/// In which order the flows come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// At random (each as likely as any other), from flows 0 to `n` - 1; `n` is a power of two.
    Random(u64),
    /// One after the other, from this one on.
    From(u64),
    /// By Zipf's law (s = 1), from 2^n flows.
    Zipf(u32),
    /// In blocks of 2^n (only to fill).
    Blocks(u64),
}

/// One run.
#[derive(Clone, Copy)]
pub struct Case {
    pub program: Program,
    pub frame: Frame,
    pub order: Order,
    pub packets: u32,
    /// XDP code of what should become of the packets.
    pub expect: u32,
    /// The share of packets that may go another way.
    pub tolerance: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Nothing but the flow generator.
    Base,
    /// The whole data plane.
    Run,
    /// The same, each flow from its SYN on.
    Fill,
    /// A lookup in the LRU hash.
    LruGet,
    LruPut,
    /// As [`Program::Base`], with room in front for an outer header made and taken away.
    Grow,
}

const PROGRAMS: [[&str; 7]; 2] = [
    ["bench_base4", "bench_run4", "bench_fill4", "bench_get4", "bench_put4", "bench_grow4", "bench_sweep4"],
    ["bench_base6", "bench_run6", "bench_fill6", "bench_get6", "bench_put6", "bench_grow6", "bench_sweep6"],
];
const SWEEP: usize = 6;

/// Words of the map BENCH, see the programs.
const SERVERS_AT: usize = 5;
const SERVER_PORT_AT: usize = 6;
const BLOCK_AT: usize = 7;
const COUNTS_AT: usize = 8;
const LENDS_AT: usize = 30;
/// Looks up, as full NAT's replies do, where they are to go, and finds nothing there.
pub const LOOKS: u64 = 2;
const ZIPF_AT: usize = 31;
/// Flows that new connections come from: all that addresses and ports allow.
pub const ANY_FLOW: u64 = 1 << 30;

pub const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENTS: [u8; 4] = [10, 0, 0, 0];
const VIP: [u8; 4] = [192, 0, 2, 1];
/// Servers are the eight addresses from here on.
const SERVERS: [u8; 4] = [172, 16, 0, 1];
const VIP_PORT: u16 = 80;
const SERVER_PORT: u16 = 8080;
const CLIENT_PORT: u16 = 0x8000;
pub const DESTS: u32 = 8;
/// The director's own addresses towards the servers: the first, and how many, one after the other.
pub const LOCAL: [u8; 4] = [172, 16, 1, 1];
const LOCALS: u32 = 64;
pub const NOW_S: u32 = 10_000;

/// 2001:db8:: with these last bytes for IPv6.
pub fn address(version: Version, last: [u8; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    match version {
        Version::V4 => bytes[..4].copy_from_slice(&last),
        Version::V6 => {
            bytes[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
            bytes[12..].copy_from_slice(&last);
        }
    }
    bytes
}

pub struct Rig<'a> {
    settings: &'a Settings,
    pub plane: Dataplane,
    bench: Table<[u64; 32]>,
    pins: PathBuf,
    pub version: Version,
    pub method: Method,
    pub flows: u32,
    seed: u64,
    /// Of replies: see the programs.
    pub lends: u64,
}

impl<'a> Rig<'a> {
    /// Tables for `flows` flows at half load, and an LRU hash of `flows` entries.
    pub fn new(settings: &'a Settings, version: Version, method: Method, flows: u32) -> Result<Rig<'a>> {
        let entries = method.entries() * flows;
        let fullnat = method == Method::Fullnat;
        let sizes =
            Sizes { flows4: version.of(entries, 1), flows6: version.of(1, entries), fullnat, ..Sizes::default() };
        let pins = settings.pins.join(format!("{}-{}-{flows}", version.of("v4", "v6"), method as u8));
        // An LRU hash of fewer can't insert.
        let lru = flows.max(1024);
        let lent = if method.answers() { flows } else { 1 };
        let own = [("BENCH", 1), ("LENT", lent), ("LRU4", version.of(lru, 1024)), ("LRU6", version.of(1024, lru))];
        let plane = Dataplane::load(&settings.object, &pins, &sizes, &PROGRAMS[version.of(0, 1)], &own)?;
        let bench = plane.own_table("BENCH")?;
        let mut rig = Rig { settings, plane, bench, pins, version, method, flows, seed: 1, lends: u64::from(fullnat) };
        rig.configure()?;
        Ok(rig)
    }

    /// One service, eight dests by rr.
    fn configure(&mut self) -> Result<()> {
        let maps = &mut self.plane.maps;
        maps.clock.set(0, Clock::at(NOW_S, &maps.config.get(0)?.policy))?;
        maps.ifaces.set(1, Iface::new(1, OURS, 0, 1500))?;
        maps.lists.set(0, ListEntry { dest: 1, weight: 1 })?;
        for i in 1..=DESTS {
            maps.lists.set(i, ListEntry { dest: i, weight: 1 })?;
        }
        let (key, s) = service(self.version, self.method);
        maps.services.set(1, s)?;
        maps.keys.insert(key, 1)?;
        for i in 0..LOCALS {
            let mut last = LOCAL;
            last[3] += i as u8;
            let address = address(self.version, last).into();
            maps.locals.set(i, Local { address })?;
        }
        for i in 1..=DESTS {
            let source = address(self.version, LOCAL).into();
            maps.tunnels.set(i, Tunnel { source, ..Tunnel::default() })?;
        }
        self.leave_by(1)
    }

    /// Have requests leave by this interface. 1 is where they came in.
    pub fn leave_by(&mut self, ifindex: u32) -> Result<()> {
        self.forward(self.method, ifindex)
    }

    /// ... by another method, which keeps its flows in the same way.
    pub fn forward(&mut self, method: Method, ifindex: u32) -> Result<()> {
        let maps = &mut self.plane.maps;
        maps.hops.set(1, hop(ifindex))?;
        for i in 0..DESTS {
            maps.dests.set(1 + i, dest(self.version, method, i))?;
        }
        Ok(())
    }

    /// Further services, that no packet is for.
    pub fn add_services(&mut self, count: u32) -> Result<()> {
        for i in 0..count {
            let last = (0xc612_0000 + i).to_be_bytes();
            let key = ServiceKey {
                address: address(self.version, last),
                port: VIP_PORT,
                protocol: 6,
                family: self.version.of(4, 6),
            };
            self.plane.maps.keys.insert(key, u64::from(2 + i))?;
        }
        Ok(())
    }

    pub fn tick(&mut self, seconds: u32) -> Result<()> {
        let maps = &self.plane.maps;
        let now_s = maps.clock.get(0)?.now_s + seconds;
        Ok(maps.clock.set(0, Clock::at(now_s, &maps.config.get(0)?.policy))?)
    }

    fn name(&self, program: usize) -> &'static str {
        PROGRAMS[self.version.of(0, 1)][program]
    }

    /// Verified instructions, and size in instructions and in bytes of machine code, of the whole data plane: what the hook calls, and what is behind its
    /// gates.
    pub fn program_size(&mut self) -> Result<(u32, u32, u32)> {
        let (_, behind) = GATES[0];
        let mut sum = (0, 0, 0);
        for name in [self.name(Program::Run as usize)].iter().chain(behind) {
            let info = self.plane.xdp(name)?.info()?;
            sum.0 += info.verified_instruction_count().unwrap_or(0);
            sum.1 += info.size_translated().unwrap_or(0) / 8;
            sum.2 += info.size_jitted();
        }
        Ok(sum)
    }

    /// Nanoseconds a packet, the harness included. (The kernel says whole ones. The time of the call is no finer: it has waits for
    /// RCU in it.)
    pub fn run(&mut self, case: &Case) -> Result<f64> {
        let mut words = [0; 32];
        match case.order {
            Order::Random(n) => {
                self.seed += 1;
                words[..5].copy_from_slice(&[self.seed, 0x5851_f42d_4c95_7f2d, 0x1405_7b7e_f767_814f, 24, n - 1]);
            }
            Order::From(first) => words[..5].copy_from_slice(&[first.wrapping_sub(1), 1, 1, 0, u64::MAX >> 34]),
            Order::Zipf(bits) => {
                self.seed += 1;
                let mask = (1 << bits) - 1;
                words[..5].copy_from_slice(&[self.seed, 0x5851_f42d_4c95_7f2d, 0x1405_7b7e_f767_814f, 17, mask]);
                words[ZIPF_AT] = u64::from(bits);
            }
            Order::Blocks(bits) => words[BLOCK_AT] = bits,
        }
        words[LENDS_AT] = self.lends;
        let filling = case.program == Program::Fill && self.method.answers();
        if case.frame == Frame::Reply || filling {
            words[SERVERS_AT] = u64::from(u32::from_be_bytes(SERVERS));
            words[SERVER_PORT_AT] = u64::from(SERVER_PORT);
        }
        self.bench.set(0, words)?;
        let (frame, name) = (frame(self.version, case.frame), self.name(case.program as usize));
        let ns = self.plane.test_run(name, &frame, case.packets)?.duration.as_nanos() as f64;
        let counts = &self.bench.get(0)?[COUNTS_AT..];
        let right = counts[case.expect as usize] + if filling { counts[REDIRECT as usize] } else { 0 };
        let wrong = u64::from(case.packets).saturating_sub(right);
        if wrong as f64 > case.tolerance * f64::from(case.packets) {
            let codes = ["aborted", "drop", "pass", "tx", "redirect"];
            let got: Vec<_> = codes.iter().zip(counts).map(|(name, n)| format!("{name} {n}")).collect();
            bail!("{name}, {} flows: not what was to be measured: {}", self.flows, got.join(", "));
        }
        Ok(ns)
    }

    /// A packet of random flows among those that are known.
    pub fn case(&self, program: Program, frame: Frame, expect: u32) -> Case {
        let order = Order::Random(u64::from(self.flows));
        Case { program, frame, order, packets: self.settings.packets, expect, tolerance: 0.01 }
    }

    /// Enter all flows: SYN, ACKs, and with NAT a reply of each, in blocks, so that few are half-open at a time. All flows are
    /// established by enough packets then, and their words no longer change. (Of a datagram nothing but its age is kept. A reply tells the entry for replies what its flow has
    /// become, and finds the way that they leave by. A half-open flow may go for a later one of its block.)
    pub fn fill(&mut self) -> Result<()> {
        if self.method == Method::Udp {
            for _ in 0..4 {
                let all =
                    Case { order: Order::From(0), packets: self.flows, ..self.case(Program::Run, Frame::Udp, TX) };
                self.run(&all)?;
            }
        } else {
            let order = Order::Blocks(u64::from((self.flows / 256).max(1).ilog2()));
            let packets = self.flows * 8;
            self.run(&Case { order, packets, ..self.case(Program::Fill, Frame::Syn, TX) })?;
        }
        let order = Order::From(0);
        self.run(&Case { order, packets: self.flows, ..self.case(Program::LruPut, Frame::Ack, TX) })?;
        Ok(())
    }

    fn words(&self) -> &[std::sync::atomic::AtomicU64] {
        let maps = &self.plane.maps;
        self.version.of(maps.conns4.words(), maps.conns6.words())
    }
    pub fn slots(&self) -> u32 {
        let buckets = self.words().len() / self.version.of(8, 16);
        (buckets * self.version.of(4, 3)) as u32
    }
    /// Established flows in the table (of UDP: all), and all entries.
    pub fn established(&self) -> (u32, u32) {
        let (step, ways) = self.version.of((2, 4), (5, 3));
        let (mut established, mut all) = (0, 0);
        for bucket in self.words().chunks(self.version.of(8, 16)) {
            for way in 0..ways {
                let control = bucket[way * step + step - 1].load(Relaxed);
                all += u32::from(control != 0);
                let state = if self.method == Method::Udp { 0 } else { 1 };
                let one = control != 0 && control & ct::REVERSE == 0 && ct::state(control) == state;
                established += u32::from(one);
            }
        }
        (established, all)
    }
    /// The connection table as it is, to be put back after a measurement that changes it.
    pub fn snapshot(&self) -> Vec<u64> {
        self.words().iter().map(|w| w.load(Relaxed)).collect()
    }
    pub fn restore(&self, snapshot: &[u64]) {
        for (word, old) in self.words().iter().zip(snapshot) {
            word.store(*old, Relaxed);
        }
    }

    /// Nanoseconds of a whole sweep.
    pub fn sweep(&mut self) -> Result<f64> {
        let frame = frame(self.version, Frame::Ack);
        let done = self.plane.test_run(self.name(SWEEP), &frame, 1)?;
        if done.return_value != TX {
            bail!("the sweep of {} flows did not come to its end (code {})", self.flows, done.return_value);
        }
        Ok(done.duration.as_nanos() as f64)
    }

    /// Bytes charged for the connection table and the LRU hash.
    pub fn charged(&self) -> Result<(u64, u64)> {
        let (conns, lru) = self.version.of((map::CONN4, "LRU4"), (map::CONN6, "LRU6"));
        Ok((self.plane.charged(conns)?, self.plane.charged(lru)?))
    }
}

/// The service under test, under its index 1, with a list of its dests from the first entry on.
pub fn service(version: Version, method: Method) -> (ServiceKey, Service) {
    let (address, protocol) = (address(version, VIP), method.protocol());
    let key = ServiceKey { address, port: VIP_PORT, protocol, family: version.of(4, 6) };
    let (list, scheduler) = (u64::from(DESTS) << 32, Kind::Rr as u32);
    let locals = if method == Method::Fullnat { u64::from(LOCALS) << 32 } else { 0 };
    (key, Service { list, flags: service::LOCAL, scheduler, key, locals, ..Service::default() })
}

/// Its dest number `i`, of the index 1 + i, reached by hop 1.
pub fn dest(version: Version, method: Method, i: u32) -> Dest {
    let mut last = SERVERS;
    last[3] += i as u8;
    let (method, port) = match method {
        Method::Dr | Method::Udp => (dest::ROUTE, 0),
        Method::Nat => (dest::MASQ, SERVER_PORT),
        Method::Tunnel => (dest::TUNNEL, 0),
        Method::Fullnat => (dest::FULLNAT, SERVER_PORT),
    };
    let flags = method | dest::AVAILABLE | version.of(0, dest::V6);
    Dest { out: u64::from(flags) | 1 << 32, address: address(version, last).into(), port, mtu: 1500, service: 1 }
}

pub fn hop(ifindex: u32) -> Hop {
    Hop { macs: [0x0100_0002, 0x0002_0300, 0x0400_0000], ifindex }
}

/// The frame, of the first client.
pub fn frame(version: Version, frame: Frame) -> Vec<u8> {
    let protocol = match frame {
        Frame::Icmp => version.of(1, 58),
        Frame::Udp => 17,
        _ => 6,
    };
    let len = version.of(40u8, 20);
    let mac = if frame == Frame::OtherMac { [2, 0, 0, 0, 0, 9] } else { OURS };
    let (client, vip) = (address(version, CLIENTS), address(version, VIP));
    let (from, to, ports) = match frame {
        Frame::Reply => (address(version, SERVERS), client, [SERVER_PORT, CLIENT_PORT]),
        Frame::NoService => (client, vip, [CLIENT_PORT, 81]),
        Frame::Rst | Frame::OtherSyn => (client, vip, [CLIENT_PORT + 1, VIP_PORT]),
        _ => (client, vip, [CLIENT_PORT, VIP_PORT]),
    };
    let mut f = Vec::from(mac);
    f.extend([2, 0, 0, 0, 0, 2]);
    match version {
        Version::V4 => {
            f.extend([8, 0, 0x45, 0, 0, len, 0, 1, 0x40, 0, 64, protocol, 0x12, 0x34]);
            f.extend([&from[..4], &to[..4]].concat());
        }
        Version::V6 => {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, len, protocol, 64]);
            f.extend([from, to].concat());
        }
    }
    f.extend(ports.iter().flat_map(|p| p.to_be_bytes()));
    let flags = match frame {
        Frame::Syn | Frame::OtherSyn => 0x02,
        Frame::Rst => 0x04,
        _ => 0x10,
    };
    // (A datagram's length and no checksum are the first words.)
    let first = if frame == Frame::Udp { [0, 20, 0, 0] } else { [0, 0, 0, 1] };
    f.extend(first);
    f.extend([0, 0, 0, 1, 0x50, flags, 1, 0, 0x56, 0x78, 0, 0]);
    unusual(&mut f, version, frame);
    f.resize(f.len().next_multiple_of(8).max(60), 0);
    f
}

/// What is not as in other packets.
fn unusual(f: &mut Vec<u8>, version: Version, frame: Frame) {
    let v4 = version == Version::V4;
    let mut insert = |header: [u8; 8], number: u8| {
        // IPv6: before the transport header, in whose place its number is.
        f.splice(54..54, header);
        (f[20], f[19]) = (number, f[19] + 8);
    };
    match frame {
        Frame::NotIp => f[12..14].copy_from_slice(&[8, 6]),
        Frame::Malformed => f[14] = if v4 { 0x44 } else { 0x40 },
        // No operations, and the end.
        Frame::Extras if v4 => {
            f.splice(34..34, [1, 1, 1, 0]);
            (f[14], f[17]) = (0x46, f[17] + 4);
        }
        // Destination options: padding.
        Frame::Extras => insert([6, 0, 1, 4, 0, 0, 0, 0], 60),
        // More to come, from 0 on; the last, from 1024 on.
        // (All but the last carry whole words of eight bytes.)
        Frame::FirstFragment if v4 => (f[17], f[20]) = (f[17] + 4, 0x20),
        Frame::LaterFragment if v4 => (f[20], f[21]) = (0, 128),
        Frame::FirstFragment => {
            insert([6, 0, 0, 1, 0, 0, 0, 1], 44);
            f[19] += 4;
        }
        Frame::LaterFragment => insert([6, 0, 4, 0, 0, 0, 0, 1], 44),
        _ => {}
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        // The pins hold the memory of the maps.
        if let Err(error) = std::fs::remove_dir_all(&self.pins).context("remove the pins") {
            eprintln!("bench: {}: {error:#}", self.pins.display());
        }
    }
}
