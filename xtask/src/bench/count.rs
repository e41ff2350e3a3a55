//! How many instructions a packet takes, of the programs as they are built: counted by [`Machine`], and so the same everywhere.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rvs_datapath::abi::{self, Clock, Config, Iface, ListEntry, Local, SETTINGS_MAX, Service, Tunnel, map};
use rvs_datapath::conn::{Policy, Timeouts};
use rvs_datapath::ct::{STATE, Seed};
use rvs_datapath::proto::tcp;
use rvs_datapath::verdict::Reason;
use rvs_sys::bpf::{Sizes, bytes_of, shapes};

use super::machine::Machine;
use super::rig::{
    DESTS, DROP, Frame, LOCAL, Method, NOW_S, OURS, PASS, REDIRECT, TX, Version, address, dest, frame, hop, service,
};

/// Instructions of one packet.
pub struct Count {
    pub name: &'static str,
    pub version: Version,
    pub instructions: u64,
    pub atomics: u64,
}

/// The interface that replies leave by; requests go back where they came from.
const OUT: u32 = 2;

/// All of both families, in the order of a table.
pub fn counts(object: &[u8]) -> Result<Vec<Count>> {
    let mut all = Vec::new();
    for version in [Version::V4, Version::V6] {
        for method in [Method::Dr, Method::Nat, Method::Tunnel, Method::Fullnat] {
            let [new, hit, reply, first, later] = names(method);
            let mut rig = Rig::new(object, version, method)?;
            all.push(rig.count(new, Frame::Syn, TX)?);
            // Until nothing is left to count of the client's packets, nor to tell the server of it.
            for _ in 0..4 {
                rig.count("", Frame::Ack, TX)?;
                if !reply.is_empty() {
                    // The first one looks up its way.
                    rig.count("", Frame::Reply, REDIRECT)?;
                }
            }
            all.push(rig.count(hit, Frame::Ack, TX)?);
            if !reply.is_empty() {
                all.push(rig.count(reply, Frame::Reply, REDIRECT)?);
            }
            all.push(rig.count(first, Frame::FirstFragment, TX)?);
            all.push(rig.count(later, Frame::LaterFragment, TX)?);
            if method == Method::Dr {
                for (name, what, due) in OTHERS {
                    all.push(rig.count(name, what, due)?);
                }
                rig.fill()?;
                all.push(rig.flood("SYN, DR, rr: new, in a flood that has filled the table", Reason::Route)?);
                rig.ask()?;
                all.push(rig.flood("SYN, answered with a cookie", Reason::Cookie)?);
            }
        }
    }
    Ok(all)
}

/// New connection, hit, reply, first fragment, later one.
fn names(method: Method) -> [&'static str; 5] {
    match method {
        Method::Dr | Method::Udp => ["SYN, DR, rr: new", "hit, DR", "", "first fragment, DR", "later fragment, DR"],
        Method::Nat => [
            "SYN, NAT, rr: new",
            "hit, NAT, request",
            "hit, NAT, reply",
            "first fragment, NAT, request",
            "later fragment, NAT, request",
        ],
        Method::Tunnel => ["SYN, TUN, rr: new", "hit, TUN (IPIP)", "", "first fragment, TUN", "later fragment, TUN"],
        Method::Fullnat => [
            "SYN, FULLNAT, rr: new",
            "hit, FULLNAT, request",
            "hit, FULLNAT, reply",
            "first fragment, FULLNAT, request",
            "later fragment, FULLNAT, request",
        ],
    }
}

/// Packets to which it is the same by which method anything goes.
const OTHERS: [(&str, Frame, u32); 7] = [
    ("miss: no connection, no service (passed)", Frame::NoService, PASS),
    ("miss: RST to a service, of no connection (passed)", Frame::Rst, PASS),
    ("hit, DR, with an IPv4 option or IPv6 extension header", Frame::Extras, TX),
    ("pass: ICMP", Frame::Icmp, PASS),
    ("pass: not IP", Frame::NotIp, PASS),
    ("pass: not our MAC address", Frame::OtherMac, PASS),
    ("drop: malformed", Frame::Malformed, DROP),
];

/// What was counted when it was last looked at, in the source tree.
const RECORD: &str = "testdata/instructions.txt";
pub const OBJECT: &str = "ebpf/target/bpfel-unknown-none/release/rvs-ebpf";
/// Another compiler makes a little more or less of the same source.
const TOLERANCE_PERCENT: u64 = 4;

/// `cargo xtask count`: the counts beside those on record. More than those is an error: a packet has become dearer.
pub fn run(root: &Path, args: &[String]) -> Result<ExitCode> {
    let write = match args {
        [] => false,
        [arg] if arg == "--write" => true,
        _ => bail!("count has one option: --write"),
    };
    let object = root.join(OBJECT);
    let object = std::fs::read(&object).with_context(|| format!("{}: run `./x build` first", object.display()))?;
    let record = root.join(RECORD);
    let old = std::fs::read_to_string(&record).unwrap_or_default();
    let (mut text, mut dearer) = (String::new(), false);
    let counts = counts(&object)?;
    for count in &counts {
        let name = count.full_name();
        let before = old.lines().find_map(|l| l.strip_prefix(&name)?.strip_prefix(": ")?.parse::<u64>().ok());
        let change = before.map_or_else(String::new, |n| format!(" (on record {n})"));
        println!("{name}: {}{change}", count.instructions);
        dearer |= before.is_none_or(|n| count.instructions * 100 > n * (100 + TOLERANCE_PERCENT));
        text += &format!("{name}: {}\n", count.instructions);
    }
    for (version, n, ratio) in ratios(&counts) {
        let (what, than, limit) = RATIOS[n];
        let judged = if ratio <= limit { "ok" } else { "over" };
        println!("{}, {what} / {than}: {ratio:.2}, at most {limit:.1}: {judged}", version.of("IPv4", "IPv6"));
    }
    if write {
        std::fs::write(&record, text).with_context(|| format!("write {}", record.display()))?;
    } else if dearer {
        println!("more than on record in {RECORD}: make it cheaper, or say why and run `cargo xtask count --write`");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

impl Count {
    fn full_name(&self) -> String {
        format!("{}, {}", self.version.of("IPv4", "IPv6"), self.name)
    }
}

/// What may cost so many times as much as what, at most. (It is time that the promise is about; this is what is the same everywhere.)
pub const RATIOS: [(&str, &str, f64); 5] = [
    ("hit, TUN (IPIP)", "hit, DR", 1.4),
    ("hit, FULLNAT, request", "hit, NAT, request", 1.5),
    ("hit, FULLNAT, reply", "hit, NAT, reply", 1.5),
    ("SYN, DR, rr: new, in a flood that has filled the table", "SYN, DR, rr: new", 1.5),
    ("SYN, answered with a cookie", "SYN, DR, rr: new", 2.0),
];

/// Each of them by its number in [`RATIOS`], as it was counted.
pub fn ratios(counts: &[Count]) -> Vec<(Version, usize, f64)> {
    let mut all = Vec::new();
    for version in [Version::V4, Version::V6] {
        let of = |name| counts.iter().find(|c| c.version == version && c.name == name).map(|c| c.instructions as f64);
        for (n, (what, than, _)) in RATIOS.iter().enumerate() {
            if let (Some(a), Some(b)) = (of(*what), of(*than)) {
                all.push((version, n, a / b));
            }
        }
    }
    all
}

struct Rig {
    machine: Machine,
    version: Version,
    method: Method,
    /// Full NAT: source address and port of what went to the server last, as they lie in the packet.
    lent: Vec<u8>,
    /// Clients' ports that have been others'.
    others: u16,
}

/// Of the smallest table.
const BUCKETS: usize = 4096;
/// What may be put in front of a packet.
const HEADROOM: usize = 256;

impl Rig {
    fn new(object: &[u8], version: Version, method: Method) -> Result<Rig> {
        let sizes = Sizes {
            flows4: 1,
            flows6: 1,
            services: 16,
            dests: 16,
            lists: 32,
            tables: 32,
            hops: 16,
            fullnat: method == Method::Fullnat,
        };
        let mut m = Machine::new(object, &shapes(&sizes)?)?;
        let policy = Policy::new(&Timeouts::default());
        let seed = Seed([3, 5, 7, 11, 13, 17].map(|n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let timeouts_s = [0; 4];
        let (flags, turned_at, drop_rate, spare, settings) = (0, 0, 0, 0, [0; SETTINGS_MAX]);
        let config = Config { version: 0, seed, policy, flags, turned_at, timeouts_s, drop_rate, spare, settings };
        m.set(map::CONFIG, 0, &bytes_of(config))?;
        m.set(map::CLOCK, 0, &bytes_of(Clock::at(NOW_S, &policy)))?;
        m.set(map::IFACES, 1, &bytes_of(Iface::new(1, OURS, 0, 1500)))?;
        let (key, s) = service(version, method);
        // One local address.
        m.set(map::SERVICES, 1, &bytes_of(Service { locals: s.locals.min(1 << 32), ..s }))?;
        m.set(map::LOCALS, 0, &bytes_of(Local { address: address(version, LOCAL).into() }))?;
        m.insert(&bytes_of(key)[..size_of_val(&key)], 1)?;
        for i in 1..=DESTS {
            m.set(map::LISTS, i, &bytes_of(ListEntry { dest: i, weight: 1 }))?;
            m.set(map::DESTS, i, &bytes_of(dest(version, method, i - 1)))?;
            let source = address(version, LOCAL).into();
            m.set(map::TUNNELS, i, &bytes_of(Tunnel { source, ..Tunnel::default() }))?;
        }
        m.set(map::HOPS, 1, &bytes_of(hop(1)))?;
        // struct bpf_fib_lookup: ifindex, smac, dmac.
        m.route = vec![(8, OUT.to_le_bytes().to_vec()), (52, OURS.to_vec()), (58, vec![2, 0, 0, 0, 0, 7])];
        Ok(Rig { machine: m, version, method, lent: Vec::new(), others: 0 })
    }

    /// Half-open connections of others in all places of the table, as the one that is there.
    fn fill(&mut self) -> Result<()> {
        let (name, way, ways, bucket) = self.version.of((map::CONN4, 2, 4, 8), (map::CONN6, 5, 3, 16));
        let bytes = self.machine.get(name, bucket * 8 * BUCKETS)?;
        let mut words: Vec<u64> =
            bytes.chunks_exact(8).map(|w| w.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))).collect();
        let mut controls = words.chunks(bucket).flat_map(|b| (1..=ways).map(move |w| b[w * way - 1]));
        let one = controls.rfind(|c| *c != 0).context("no connection is in the table")?;
        let one = one & !STATE | tcp::SYN_RECV;
        for (n, bucket) in words.chunks_mut(bucket).enumerate() {
            for (m, entry) in bucket.chunks_exact_mut(way).take(ways).enumerate() {
                entry.fill(((n * ways + m) as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                entry[way - 1] = one;
            }
        }
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.machine.set(name, 0, &bytes)
    }

    /// The mean of many new clients' SYNs, for each of which this verdict is given.
    fn flood(&mut self, name: &'static str, reason: Reason) -> Result<Count> {
        const SYNS: u64 = 256;
        let (before, mut all) =
            (self.given(reason)?, Count { name, version: self.version, instructions: 0, atomics: 0 });
        for _ in 0..SYNS {
            self.others += 1;
            let one = self.count(name, Frame::OtherSyn, TX)?;
            all.instructions += one.instructions;
            all.atomics += one.atomics;
        }
        let given = self.given(reason)? - before;
        if given != SYNS {
            bail!("counting instructions: {name}: {given} of {SYNS} SYNs were '{}'", reason.name());
        }
        Ok(Count { instructions: all.instructions.div_ceil(SYNS), atomics: all.atomics / SYNS, ..all })
    }

    /// How often a verdict was given.
    fn given(&self, reason: Reason) -> Result<u64> {
        let counted = self.machine.get(map::VERDICTS, 8 * Reason::ALL.len())?;
        let word = counted.chunks_exact(8).nth(reason as usize).context("no such counter")?;
        Ok(word.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    /// From now on SYNs are answered with cookies.
    fn ask(&mut self) -> Result<()> {
        let (_, s) = service(self.version, self.method);
        let asking = Service { cookies: 1, flags: s.flags | abi::service::ASKS, ..s };
        self.machine.set(map::SERVICES, 1, &bytes_of(asking))
    }

    fn count(&mut self, name: &'static str, what: Frame, expect: u32) -> Result<Count> {
        let mut bytes = frame(self.version, what);
        let (source, destination, ports) = self.version.of((26, 30, 34), (22, 38, 54));
        if what == Frame::Reply && !self.lent.is_empty() {
            let (local, port) = self.lent.split_at(destination - source);
            bytes[destination..ports].copy_from_slice(local);
            bytes[ports + 2..ports + 4].copy_from_slice(port);
        }
        if what == Frame::OtherSyn {
            let port = u16::from_be_bytes([bytes[ports], bytes[ports + 1]]).wrapping_add(self.others);
            bytes[ports..ports + 2].copy_from_slice(&port.to_be_bytes());
        }
        let at = self.machine.allocate(HEADROOM + bytes.len()) + HEADROOM as u64;
        self.machine.write(at, &bytes)?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, ...
        let context = self.machine.allocate(24);
        let words = [at as u32, at as u32 + bytes.len() as u32, 0, 1, 0, 0];
        self.machine.write(context, &words.map(u32::to_le_bytes).concat())?;
        let run = self.machine.run("rvs_xdp", context)?;
        if run.returned != u64::from(expect) {
            let mut given = Vec::new();
            for reason in Reason::ALL {
                if self.given(*reason)? > 0 {
                    given.push(reason.name());
                }
            }
            bail!(
                "counting instructions: {name}: code {} instead of {expect}, verdicts so far: {given:?}",
                run.returned
            );
        }
        if self.method == Method::Fullnat && what == Frame::Ack {
            let there = self.machine.read(at, bytes.len())?;
            self.lent = [&there[source..destination], &there[ports..ports + 2]].concat();
        }
        Ok(Count { name, version: self.version, instructions: run.instructions, atomics: run.atomics })
    }
}
