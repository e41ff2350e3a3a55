//! What was measured, as a document.

use std::fmt::Write as _;
use std::process::Command;

use super::count::{Count, RATIOS, ratios};
use super::rig::{Method, Settings, Version};

/// A line of the tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Row {
    Dr,
    DrRedirect,
    DrWritten,
    DrZipf,
    Udp,
    Tunnel,
    /// The same flows, by DR.
    DrBeside,
    Nat,
    NatRedirect,
    NatReply,
    Fullnat,
    FullnatReply,
    /// As many, by NAT.
    NatBeside,
    NatReplyBeside,
    Miss,
    Rst,
    NewDr,
    NewDrFull,
    NewNat,
    NewNatFull,
    NewTunnel,
    NewTunnelFull,
    NewFullnat,
    NewFullnatFull,
    FirstFragment,
    LaterFragment,
    Icmp,
    OtherMac,
    NotIp,
    Malformed,
    Lru,
    LruInsert,
    Memory,
    MemoryNat,
    MemoryLru,
    Sweep,
    SweepExpired,
    SweepIdle,
    SweepNat,
    SweepNatExpired,
    SweepNatIdle,
}

/// ns a packet.
const PACKETS: [(Row, &str); 32] = [
    (Row::Dr, "hit, DR"),
    (Row::DrRedirect, "hit, DR, out of another interface"),
    (Row::DrWritten, "hit, DR, first of its flow in a second (flows in order)"),
    (Row::DrZipf, "hit, DR, flows by Zipf's law"),
    (Row::Udp, "hit, DR, UDP"),
    (Row::Tunnel, "hit, TUN (IPIP)"),
    (Row::DrBeside, "hit, DR (beside it, the same flows)"),
    (Row::Nat, "hit, NAT, request"),
    (Row::NatRedirect, "hit, NAT, request, out of another interface"),
    (Row::NatReply, "hit, NAT, reply, out of another interface"),
    (Row::Fullnat, "hit, FULLNAT, request"),
    (Row::NatBeside, "hit, NAT, request (beside it)"),
    (Row::FullnatReply, "hit, FULLNAT, reply, out of another interface"),
    (Row::NatReplyBeside, "hit, NAT, reply, out of another interface (beside it)"),
    (Row::Miss, "miss: no connection, no service (passed)"),
    (Row::Rst, "miss: RST to a service, of no connection (passed)"),
    (Row::NewDr, "SYN, DR, rr: new, table half full"),
    (Row::NewDrFull, "SYN, DR, rr: new, in a flood that has filled the table"),
    (Row::NewNat, "SYN, NAT, rr: new, table half full"),
    (Row::NewNatFull, "SYN, NAT, rr: new, in a flood that has filled the table"),
    (Row::NewTunnel, "SYN, TUN, rr: new, table half full"),
    (Row::NewTunnelFull, "SYN, TUN, rr: new, in a flood that has filled the table"),
    (Row::NewFullnat, "SYN, FULLNAT, rr: new, table half full"),
    (Row::NewFullnatFull, "SYN, FULLNAT, rr: new, in a flood that has filled the table"),
    (Row::FirstFragment, "first fragment, DR (of one datagram)"),
    (Row::LaterFragment, "later fragment, DR (of one datagram)"),
    (Row::Icmp, "pass: ICMP"),
    (Row::OtherMac, "pass: not our MAC address"),
    (Row::NotIp, "pass: not IP"),
    (Row::Malformed, "drop: malformed"),
    (Row::Lru, "for comparison: lookup in a full BPF LRU hash"),
    (Row::LruInsert, "for comparison: insert with eviction there"),
];
const MEMORY: [(Row, &str); 3] = [
    (Row::Memory, "a DR flow, at half load"),
    (Row::MemoryNat, "a NAT flow (two entries), at half load"),
    (Row::MemoryLru, "for comparison: an entry of a full BPF LRU hash, same key, 16 bytes of value"),
];
const SWEEPS: [(Row, &str); 6] = [
    (Row::Sweep, "DR, all flows live"),
    (Row::SweepExpired, "DR, all flows time out at once"),
    (Row::SweepIdle, "DR, table empty"),
    (Row::SweepNat, "NAT, all flows live"),
    (Row::SweepNatExpired, "NAT, all flows time out at once"),
    (Row::SweepNatIdle, "NAT, table empty"),
];
/// What is aimed at, for IPv4: row, flows, and the most it may be of the LRU hash's operation.
const LIMITS: [(Row, u32, f64); 16] = [
    (Row::Dr, 4 << 10, 0.9),
    (Row::DrRedirect, 4 << 10, 0.9),
    (Row::Nat, 4 << 10, 1.0),
    (Row::NatRedirect, 4 << 10, 1.0),
    (Row::NatReply, 4 << 10, 1.0),
    (Row::Dr, 1 << 20, 0.30),
    (Row::DrRedirect, 1 << 20, 0.30),
    (Row::Nat, 1 << 20, 0.40),
    (Row::NatRedirect, 1 << 20, 0.40),
    (Row::NatReply, 1 << 20, 0.40),
    (Row::NewDr, 1 << 20, 0.5),
    (Row::NewDrFull, 1 << 20, 0.5),
    (Row::NewNat, 1 << 20, 0.8),
    (Row::NewNatFull, 1 << 20, 0.8),
    // No limits are set for other sizes; these show where new connections stand.
    (Row::NewDr, 4 << 10, 0.5),
    (Row::NewNat, 4 << 10, 0.8),
];
/// What may take so many times as long as what, at most, in one run.
const TIMES: [(Row, Row, f64); 5] = [
    (Row::Tunnel, Row::DrBeside, 1.4),
    (Row::Fullnat, Row::NatBeside, 1.5),
    (Row::FullnatReply, Row::NatReplyBeside, 1.5),
    (Row::NewDrFull, Row::NewDr, 1.5),
    (Row::NewNatFull, Row::NewNat, 1.5),
];
const MEMORY_LIMIT: f64 = 64.0;
const MEMORY_LIMIT_NAT: f64 = 128.0;
const SWEEP_LIMIT: f64 = 1.0;

struct Cell {
    version: Version,
    row: Row,
    column: usize,
    value: f64,
}

fn find(cells: &[Cell], version: Version, row: Row, column: usize) -> Option<f64> {
    cells.iter().find(|c| c.version == version && c.row == row && c.column == column).map(|c| c.value)
}

/// All figures of a run.
pub struct Report {
    sizes: Vec<u32>,
    cells: Vec<Cell>,
    ratios: Vec<Cell>,
    /// Flows, and nanoseconds of a miss with one and with many services.
    pub services: Option<(u32, f64, f64)>,
    /// Verified instructions, instructions, bytes of machine code of the whole program.
    pub programs: Vec<(Version, (u32, u32, u32))>,
    /// Established flows before and after a flood of SYNs.
    pub floods: Vec<(Version, Method, u32, u32)>,
    /// Executed instructions, all of IPv4, then the same of IPv6.
    pub counts: Vec<Count>,
}

impl Report {
    pub fn new(sizes: &[u32]) -> Report {
        let sizes = sizes.to_vec();
        Report {
            sizes,
            cells: vec![],
            ratios: vec![],
            services: None,
            programs: vec![],
            floods: vec![],
            counts: vec![],
        }
    }
    /// A figure; of one measured twice, the smaller.
    pub fn put(&mut self, version: Version, row: Row, column: usize, value: f64) {
        match self.cells.iter_mut().find(|c| c.version == version && c.row == row && c.column == column) {
            Some(cell) => cell.value = cell.value.min(value),
            None => self.cells.push(Cell { version, row, column, value }),
        }
    }
    /// To the LRU hash's operation, as measured beside it.
    pub fn put_ratio(&mut self, version: Version, row: Row, column: usize, value: f64) {
        self.ratios.push(Cell { version, row, column, value });
    }
    pub fn get(&self, version: Version, row: Row, column: usize) -> Option<f64> {
        find(&self.cells, version, row, column)
    }
    /// The size at which single comparisons are made: 1M flows, or the largest there is.
    pub fn main_size(&self) -> u32 {
        let most = self.sizes.iter().copied().max().unwrap_or(0);
        if self.sizes.contains(&(1 << 20)) { 1 << 20 } else { most }
    }

    /// In Markdown.
    pub fn text(&self, s: &Settings, command: &str) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "# What a packet costs\n");
        let _ = writeln!(out, "Written by `{command}`. {}\n", machine());
        let _ = writeln!(
            out,
            "Nanoseconds of the whole XDP program on one packet: `BPF_PROG_TEST_RUN` with {} packets a run, the least of {} \
             runs, less what a program costs that only makes the packets. Flows come at random, each as likely as any other \
             (the worst case for caches). One CPU; time stands still (in service a timer ticks 40 times a second and sweeps a slice \
             of the tables, see below); the drivers' and the kernel's own work for a packet is not included.\n",
            s.packets, s.runs
        );
        for version in [Version::V4, Version::V6] {
            let _ = writeln!(out, "## {}, ns a packet by number of flows\n", version.of("IPv4", "IPv6"));
            self.table(&mut out, version, &PACKETS, 1);
        }
        self.times(&mut out);
        self.ratio_table(&mut out);
        self.memory(&mut out);
        self.sweeps(&mut out);
        self.instructions(&mut out);
        self.rest(&mut out);
        out
    }

    fn table(&self, out: &mut String, version: Version, rows: &[(Row, &str)], decimals: usize) {
        let heads: Vec<String> = self.sizes.iter().map(|n| size(*n)).collect();
        let _ = writeln!(out, "| | {} |\n|---|{}", heads.join(" | "), "--:|".repeat(heads.len()));
        for (row, name) in rows {
            let cell = |column| self.get(version, *row, column).map_or("-".into(), |v| format!("{v:.decimals$}"));
            let cells: Vec<String> = (0..self.sizes.len()).map(cell).collect();
            if cells.iter().any(|c| c != "-") {
                let _ = writeln!(out, "| {name} | {} |", cells.join(" | "));
            }
        }
        let _ = writeln!(out);
    }

    /// One row by another.
    fn times(&self, out: &mut String) {
        let _ = writeln!(out, "## Compared with each other, in time\n");
        let heads: Vec<String> = self.sizes.iter().map(|n| size(*n)).collect();
        let _ = writeln!(out, "| | | at most | {} |\n|---|---|--:|{}", heads.join(" | "), "--:|".repeat(heads.len()));
        let name = |row| PACKETS.iter().find(|(r, _)| *r == row).map_or("", |(_, name)| *name);
        for version in [Version::V4, Version::V6] {
            for (what, than, limit) in TIMES {
                let cell = |column| {
                    let (a, b) = (self.get(version, what, column)?, self.get(version, than, column)?);
                    Some(format!("{:.2} {}", a / b, mark(a / b, limit)))
                };
                let cells: Vec<String> = (0..self.sizes.len()).map(|c| cell(c).unwrap_or_else(|| "-".into())).collect();
                let (family, names) = (version.of("IPv4", "IPv6"), [name(what), name(than)].join(" / "));
                let _ = writeln!(out, "| {family} | {names} | {limit:.1} | {} |", cells.join(" | "));
            }
        }
        let _ = writeln!(out);
    }

    fn ratio_table(&self, out: &mut String) {
        let _ = writeln!(out, "## Compared with the kernel's LRU hash, IPv4\n");
        let _ = writeln!(
            out,
            "A hit is compared with one lookup in a BPF LRU hash of as many entries, full, hit as often; a new connection with one \
             insert there that evicts (median of the runs' ratios).\n"
        );
        let _ = writeln!(out, "| | flows | ratio | at most | |\n|---|--:|--:|--:|---|");
        for (row, flows, limit) in LIMITS {
            let Some(column) = self.sizes.iter().position(|n| *n == flows) else { continue };
            let Some(ratio) = find(&self.ratios, Version::V4, row, column) else { continue };
            let name = PACKETS.iter().find(|(r, _)| *r == row).map_or("", |(_, name)| *name);
            let _ = writeln!(out, "| {name} | {} | {ratio:.2} | {limit:.2} | {} |", size(flows), mark(ratio, limit));
        }
        let _ = writeln!(out);
    }

    fn memory(&self, out: &mut String) {
        let _ = writeln!(out, "## Memory\n\nBytes that the kernel charges for the map.\n");
        for version in [Version::V4, Version::V6] {
            let _ = writeln!(out, "{}:\n", version.of("IPv4", "IPv6"));
            self.table(out, version, &MEMORY, 1);
        }
        let column = self.sizes.iter().position(|n| *n == self.main_size()).unwrap_or(0);
        for (row, limit) in [(Row::Memory, MEMORY_LIMIT), (Row::MemoryNat, MEMORY_LIMIT_NAT)] {
            if let Some(bytes) = self.get(Version::V4, row, column) {
                let name = MEMORY.iter().find(|(r, _)| *r == row).map_or("", |(_, name)| *name);
                let _ = writeln!(out, "* {name}, IPv4: {bytes:.1} bytes, at most {limit:.0}: {}", mark(bytes, limit));
            }
        }
        let _ = writeln!(out);
    }

    fn sweeps(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "## The sweep\n\nMilliseconds of a whole sweep, which is done every {:.0} s in slices.\n",
            super::SWEEP_S
        );
        for version in [Version::V4, Version::V6] {
            let _ = writeln!(out, "{}:\n", version.of("IPv4", "IPv6"));
            self.table(out, version, &SWEEPS, 3);
        }
        let flows = self.main_size();
        let column = self.sizes.iter().position(|n| *n == flows).unwrap_or(0);
        for (row, name) in [(Row::Sweep, "DR"), (Row::SweepNat, "NAT")] {
            if let Some(ms) = self.get(Version::V4, row, column) {
                let percent = ms / 10.0 / super::SWEEP_S;
                let judged = mark(percent, SWEEP_LIMIT);
                let _ = writeln!(
                    out,
                    "* {} {name} flows: {percent:.2} % of a core, at most {SWEEP_LIMIT:.0} %: {judged}",
                    size(flows)
                );
            }
        }
        let _ = writeln!(out);
    }

    fn instructions(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "## Instructions\n\nBPF instructions that a packet executes, as counted by running the program on a machine of our own (a \
             helper is one); locked ones among them in brackets. The goal for a known flow of IPv4: 320 DR, 420 NAT.\n"
        );
        let _ = writeln!(out, "| | IPv4 | IPv6 |\n|---|--:|--:|");
        let (v4, v6) = self.counts.split_at(self.counts.len() / 2);
        for (a, b) in v4.iter().zip(v6) {
            let shown = |c: &Count| match c.atomics {
                0 => c.instructions.to_string(),
                n => format!("{} ({n})", c.instructions),
            };
            let _ = writeln!(out, "| {} | {} | {} |", a.name, shown(a), shown(b));
        }
        let _ = writeln!(out, "\nCompared, in instructions:\n\n| | | ratio | at most | |\n|---|---|--:|--:|---|");
        for (version, n, ratio) in ratios(&self.counts) {
            let (what, than, limit) = RATIOS[n];
            let family = version.of("IPv4", "IPv6");
            let _ = writeln!(out, "| {family} | {what} / {than} | {ratio:.2} | {limit:.1} | {} |", mark(ratio, limit));
        }
        let _ = writeln!(out);
    }

    fn rest(&self, out: &mut String) {
        let _ = writeln!(out, "## Other\n");
        if let Some((flows, one, many)) = self.services {
            let (of, n) = (size(flows), super::SERVICES);
            let _ =
                writeln!(out, "* A miss among {of} flows: {one:.1} ns with 1 service, {many:.1} ns with {n} services.");
        }
        for (version, method, before, after) in &self.floods {
            let _ = writeln!(
                out,
                "* {}, {}: of {before} established flows {after} were there after a flood of as many SYNs as the table has \
                 places.",
                version.of("IPv4", "IPv6"),
                method.name()
            );
        }
        for (version, (verified, instructions, bytes)) in &self.programs {
            let _ = writeln!(
                out,
                "* The whole program as called for {}: {instructions} BPF instructions ({bytes} bytes of machine code), {verified} \
                 steps of the verifier.",
                version.of("IPv4", "IPv6")
            );
        }
    }
}

fn mark(value: f64, limit: f64) -> &'static str {
    if value <= limit { "ok" } else { "over" }
}

fn size(n: u32) -> String {
    match n {
        n if n >= 1 << 20 => format!("{}M", n >> 20),
        n if n >= 1 << 10 => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}

/// What this was measured on.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("an unknown processor");
    let cpus = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    let date = Command::new("date").args(["-u", "+%F"]).output().map(|o| o.stdout).unwrap_or_default();
    format!(
        "{} ({cpus} CPUs), Linux {}, {}.",
        cpu.trim_start_matches([' ', '\t', ':']),
        kernel.trim(),
        String::from_utf8_lossy(&date).trim()
    )
}
