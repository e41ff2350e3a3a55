//! How many instructions a packet takes, of the programs as they are built: counted by [`Machine`], and so the same everywhere.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rvs_datapath::abi::{Clock, Config, Iface, ListEntry, SETTINGS_MAX, map};
use rvs_datapath::conn::{Policy, Timeouts};
use rvs_datapath::ct::Seed;
use rvs_sys::bpf::{Sizes, bytes_of, shapes};

use super::machine::Machine;
use super::rig::{DESTS, Frame, Method, NOW_S, OURS, PASS, REDIRECT, TX, Version, dest, frame, hop, service};

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
        for method in [Method::Dr, Method::Nat] {
            let mut rig = Rig::new(object, version, method)?;
            let of = |dr, nat| if method == Method::Dr { dr } else { nat };
            all.push(rig.count(of("SYN, DR, rr: new", "SYN, NAT, rr: new"), Frame::Syn, TX)?);
            // Until nothing is left to count of the client's packets.
            for _ in 0..4 {
                rig.count("", Frame::Ack, TX)?;
            }
            all.push(rig.count(of("hit, DR", "hit, NAT, request"), Frame::Ack, TX)?);
            if method == Method::Nat {
                // The first one looks up its way.
                rig.count("", Frame::Reply, REDIRECT)?;
                all.push(rig.count("hit, NAT, reply", Frame::Reply, REDIRECT)?);
            } else {
                all.push(rig.count("miss: no connection, no service (passed)", Frame::NoService, PASS)?);
                all.push(rig.count("pass: ICMP", Frame::Icmp, PASS)?);
                all.push(rig.count("pass: not our MAC address", Frame::OtherMac, PASS)?);
            }
        }
    }
    Ok(all)
}

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
    for count in counts(&object)? {
        let name = count.full_name();
        let before = old.lines().find_map(|l| l.strip_prefix(&name)?.strip_prefix(": ")?.parse::<u64>().ok());
        let change = before.map_or_else(String::new, |n| format!(" (on record {n})"));
        println!("{name}: {}{change}", count.instructions);
        dearer |= before.is_none_or(|n| count.instructions * 100 > n * (100 + TOLERANCE_PERCENT));
        text += &format!("{name}: {}\n", count.instructions);
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

struct Rig {
    machine: Machine,
    version: Version,
}

impl Rig {
    fn new(object: &[u8], version: Version, method: Method) -> Result<Rig> {
        let sizes =
            Sizes { flows4: 1, flows6: 1, services: 16, dests: 16, lists: 32, tables: 32, hops: 16, fullnat: true };
        let mut m = Machine::new(object, &shapes(&sizes)?)?;
        let policy = Policy::new(&Timeouts::default());
        let seed = Seed([3, 5, 7, 11, 13, 17].map(|n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let timeouts_s = [0; 4];
        let (flags, turned_at, drop_rate, spare, settings) = (0, 0, 0, 0, [0; SETTINGS_MAX]);
        let config = Config { version: 0, seed, policy, flags, turned_at, timeouts_s, drop_rate, spare, settings };
        m.set(map::CONFIG, 0, &bytes_of(config))?;
        m.set(map::CLOCK, 0, &bytes_of(Clock::at(NOW_S, &policy)))?;
        m.set(map::IFACES, 1, &bytes_of(Iface::new(1, OURS, 0, 1500)))?;
        let (key, s) = service(version);
        m.set(map::SERVICES, 1, &bytes_of(s))?;
        m.insert(&bytes_of(key)[..size_of_val(&key)], 1)?;
        for i in 1..=DESTS {
            m.set(map::LISTS, i, &bytes_of(ListEntry { dest: i, weight: 1 }))?;
            m.set(map::DESTS, i, &bytes_of(dest(version, method, i - 1)))?;
        }
        m.set(map::HOPS, 1, &bytes_of(hop(1)))?;
        // struct bpf_fib_lookup: ifindex, smac, dmac.
        m.route = vec![(8, OUT.to_le_bytes().to_vec()), (52, OURS.to_vec()), (58, vec![2, 0, 0, 0, 0, 7])];
        Ok(Rig { machine: m, version })
    }

    fn count(&mut self, name: &'static str, what: Frame, expect: u32) -> Result<Count> {
        let bytes = frame(self.version, what);
        let at = self.machine.allocate(bytes.len());
        self.machine.write(at, &bytes)?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, ...
        let context = self.machine.allocate(24);
        let words = [at as u32, at as u32 + bytes.len() as u32, 0, 1, 0, 0];
        self.machine.write(context, &words.map(u32::to_le_bytes).concat())?;
        let run = self.machine.run("rvs_xdp", context)?;
        if run.returned != u64::from(expect) {
            bail!("counting instructions: {name}: code {} instead of {expect}", run.returned);
        }
        Ok(Count { name, version: self.version, instructions: run.instructions, atomics: run.atomics })
    }
}
