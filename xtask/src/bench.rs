//! `cargo xtask bench`: what a packet costs the data plane, in nanoseconds and as a share of what the kernel's own LRU hash costs on
//! the same machine in the same minute; what a flow costs in memory, and what the sweep costs.

pub mod count;
mod machine;
mod report;
mod rig;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::{Pid, geteuid};

use crate::beside::cost;
use report::{Report, Row};
use rig::{ANY_FLOW, Case, DROP, Frame, Method, Order, PASS, Program, REDIRECT, Rig, Settings, TX, Version};

pub const OBJECT: &str = "ebpf/target/bpfel-unknown-none/release/rvs-bench";
const DOCUMENT: &str = "docs/benchmarks.md";
const SIZES: [u32; 5] = [1, 4 << 10, 64 << 10, 1 << 20, 4 << 20];
const QUICK_SIZES: [u32; 1] = [4 << 10];
/// Seconds between two sweeps of a table.
const SWEEP_S: f64 = 2.0;
const SERVICES: u32 = 10_000;

type Measure = fn(&Settings, &mut Report, Version, usize, u32) -> Result<()>;
const METHODS: [(&str, Measure); 5] = [
    ("dr", measure_dr),
    ("udp", measure_udp),
    ("tun", measure_tunnel),
    ("nat", measure_nat),
    ("fullnat", measure_fullnat),
];

pub fn run(root: &Path, args: &[String]) -> Result<ExitCode> {
    let (mut quick, mut write, mut object, mut sizes, mut only) = (false, false, root.join(OBJECT), None, None);
    let mut versions = vec![Version::V4, Version::V6];
    let command = [&["./x bench".to_owned()], args].concat().join(" ");
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => quick = true,
            "--write" => write = true,
            "--ipv4" => versions = vec![Version::V4],
            "--ipv6" => versions = vec![Version::V6],
            "--method" => only = Some(args.next().context("--method needs one: dr udp tun nat fullnat")?.clone()),
            "--object" => object = PathBuf::from(args.next().context("--object needs a file")?),
            "--flows" => sizes = Some(numbers(args.next().context("--flows needs numbers, as in 4096,65536")?)?),
            other => {
                bail!(
                    "bench has no option {other}: --quick, --write, --ipv4, --ipv6, --flows N,N..., --method METHOD, --object FILE"
                )
            }
        }
    }
    let sizes = sizes.unwrap_or_else(|| if quick { QUICK_SIZES.to_vec() } else { SIZES.to_vec() });
    let program = std::fs::read(&object).with_context(|| format!("{}: run `./x build` first", object.display()))?;
    let place = Place::new()?;
    let (packets, runs) = if quick { (50_000, 3) } else { (500_000, 7) };
    let settings = Settings { object: program, pins: place.pins.clone(), packets, runs, out: place.out };
    let mut report = Report::new(&sizes);
    for version in versions {
        for (column, flows) in sizes.iter().enumerate() {
            for (name, measure) in METHODS {
                if only.as_ref().is_none_or(|only| only == name) {
                    measure(&settings, &mut report, version, column, *flows)?;
                }
            }
        }
    }
    report.counts = count::counts(&std::fs::read(root.join(count::OBJECT))?)?;
    let text = report.text(&settings, &command);
    print!("{text}");
    if write {
        let path = root.join(DOCUMENT);
        // One section of it is another command's.
        let against = std::fs::read_to_string(&path).map(|old| cost::section(&old)).unwrap_or_default();
        let text = if against.is_empty() { text } else { cost::with_section(&text, &against) };
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        println!("\nwritten: {DOCUMENT}");
    }
    Ok(ExitCode::SUCCESS)
}

fn numbers(list: &str) -> Result<Vec<u32>> {
    let number = |n: &str| match n.parse::<u32>() {
        Ok(n) if n.is_power_of_two() && n <= 4 << 20 => Ok(n),
        _ => bail!("--flows: '{n}' is not a power of two up to 4194304"),
    };
    list.split(',').map(number).collect()
}

// ---- where it runs

/// One CPU, and mount and network namespaces of our own: pins, a way out for replies, and no trace afterwards.
pub struct Place {
    /// A folder on a BPF file system.
    pub pins: PathBuf,
    out: u32,
}

impl Place {
    /// # Errors
    /// Not root, or the kernel refuses.
    pub fn new() -> Result<Place> {
        if !geteuid().is_root() {
            bail!("programs are loaded into the kernel: run it as root");
        }
        let mut cpus = CpuSet::new();
        let last = std::thread::available_parallelism()?.get() - 1;
        cpus.set(last)?;
        sched_setaffinity(Pid::from_raw(0), &cpus).with_context(|| format!("run on CPU {last} only"))?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).context("namespaces of our own")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
        let pins = std::env::temp_dir().join(format!("rvs-bench-{}", std::process::id()));
        std::fs::create_dir(&pins).with_context(|| format!("make {}", pins.display()))?;
        let place = Place { pins, out: way_out()? };
        mount(Some("bpf"), &place.pins, Some("bpf"), MsFlags::empty(), none).context("mount a BPF file system")?;
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = umount2(&self.pins, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.pins);
    }
}

/// A device by which the kernel's routing finds all clients, so that the data plane can ask it for the way of replies.
fn way_out() -> Result<u32> {
    for command in [
        "link set lo up",
        "link add out0 type veth peer name out1",
        "link set out0 up",
        "link set out1 up",
        "addr add 198.51.100.1/24 dev out0",
        "route add 10.0.0.0/8 via 198.51.100.2",
        "neigh add 198.51.100.2 lladdr 02:00:00:00:01:02 dev out0 nud permanent",
        "addr add 2001:db8:1::1/64 dev out0 nodad",
        "route add 2001:db8::a00:0/104 via 2001:db8:1::2",
        "neigh add 2001:db8:1::2 lladdr 02:00:00:00:01:02 dev out0 nud permanent",
    ] {
        let done = Command::new("ip").args(command.split(' ')).output().context("cannot run ip (package iproute2)")?;
        if !done.status.success() {
            bail!("ip {command}: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
    }
    for family in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{family}"), "1").with_context(|| format!("set {family}"))?;
    }
    let index = std::fs::read_to_string("/proc/net/dev_snmp6/out0").context("the device out0")?;
    let index = index.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    index.context("the device out0 has no number")
}

// ---- what is measured

fn measure_dr(s: &Settings, report: &mut Report, version: Version, column: usize, flows: u32) -> Result<()> {
    let Some(mut rig) = begin(s, report, version, Method::Dr, column, flows)? else { return Ok(()) };
    let base = rig.case(Program::Base, Frame::Ack, TX);
    let hit = rig.case(Program::Run, Frame::Ack, TX);
    let cases = [
        (Row::Lru, 1, rig.case(Program::LruGet, Frame::Ack, TX)),
        (Row::Dr, 1, hit),
        (Row::DrRedirect, s.out, Case { expect: REDIRECT, ..hit }),
        (Row::Miss, 1, rig.case(Program::Run, Frame::NoService, PASS)),
        (Row::Icmp, 1, rig.case(Program::Run, Frame::Icmp, PASS)),
        (Row::OtherMac, 1, rig.case(Program::Run, Frame::OtherMac, PASS)),
        (Row::NotIp, 1, rig.case(Program::Run, Frame::NotIp, PASS)),
        (Row::Malformed, 1, rig.case(Program::Run, Frame::Malformed, DROP)),
        (Row::Rst, 1, Case { order: Order::Random(ANY_FLOW), ..rig.case(Program::Run, Frame::Rst, PASS) }),
    ];
    let base_ns = measure(s, &mut rig, report, column, base, &cases)?;
    if flows >= 1024 {
        zipf(s, &mut rig, report, column, Row::DrZipf)?;
        let ns = written(s, &mut rig)?;
        report.put(version, Row::DrWritten, column, ns - base_ns);
    }
    if version == Version::V4 && column == 0 {
        fragments(s, &mut rig, report, base_ns)?;
    }
    if version == Version::V4 && flows == report.main_size() {
        rig.add_services(SERVICES - 1)?;
        let miss = rig.case(Program::Run, Frame::NoService, PASS);
        let mut best = f64::MAX;
        for _ in 0..s.runs {
            best = best.min(rig.run(&miss)?);
        }
        report.services = Some((flows, report.get(version, Row::Miss, column).unwrap_or(0.0), best - base_ns));
    }
    new_connections(s, &mut rig, report, column, base_ns)?;
    sweeps(s, &mut rig, report, column)
}

fn measure_nat(s: &Settings, report: &mut Report, version: Version, column: usize, flows: u32) -> Result<()> {
    let Some(mut rig) = begin(s, report, version, Method::Nat, column, flows)? else { return Ok(()) };
    let base = rig.case(Program::Base, Frame::Ack, TX);
    let hit = rig.case(Program::Run, Frame::Ack, TX);
    let lru = (Row::Lru, 1, rig.case(Program::LruGet, Frame::Ack, TX));
    let cases = [lru, (Row::Nat, 1, hit), (Row::NatRedirect, s.out, Case { expect: REDIRECT, ..hit })];
    let base_ns = measure(s, &mut rig, report, column, base, &cases)?;
    let reply = rig.case(Program::Run, Frame::Reply, REDIRECT);
    let base = rig.case(Program::Base, Frame::Reply, TX);
    measure(s, &mut rig, report, column, base, &[lru, (Row::NatReply, 1, reply)])?;
    new_connections(s, &mut rig, report, column, base_ns)?;
    sweeps(s, &mut rig, report, column)
}

fn measure_udp(s: &Settings, report: &mut Report, version: Version, column: usize, flows: u32) -> Result<()> {
    let Some(mut rig) = begin(s, report, version, Method::Udp, column, flows)? else { return Ok(()) };
    let base = rig.case(Program::Base, Frame::Udp, TX);
    let lru = (Row::Lru, 1, rig.case(Program::LruGet, Frame::Udp, TX));
    let hit = rig.case(Program::Run, Frame::Udp, TX);
    measure(s, &mut rig, report, column, base, &[lru, (Row::Udp, 1, hit)])?;
    Ok(())
}

/// Beside the same flows by DR. The outer headers come off again between two packets: what that costs is half of what it costs to make room
/// and take it away.
fn measure_tunnel(s: &Settings, report: &mut Report, version: Version, column: usize, flows: u32) -> Result<()> {
    let Some(mut rig) = begin(s, report, version, Method::Tunnel, column, flows)? else { return Ok(()) };
    let hit = rig.case(Program::Run, Frame::Ack, TX);
    let (base, grow) = (rig.case(Program::Base, Frame::Ack, TX), rig.case(Program::Grow, Frame::Ack, TX));
    let mut best = [f64::MAX; 4];
    for _ in 0..2 * s.runs {
        let [base_ns, grow_ns, tunnel, dr] = &mut best;
        *base_ns = base_ns.min(rig.run(&base)?);
        *grow_ns = grow_ns.min(rig.run(&grow)?);
        *tunnel = tunnel.min(rig.run(&hit)?);
        rig.forward(Method::Dr, 1)?;
        *dr = dr.min(rig.run(&hit)?);
        rig.leave_by(1)?;
    }
    let [base_ns, grow_ns, tunnel, dr] = best;
    let off = base_ns + (grow_ns - base_ns) / 2.0;
    report.put(version, Row::Tunnel, column, tunnel - off);
    report.put(version, Row::DrBeside, column, dr - base_ns);
    new_connections(s, &mut rig, report, column, off)
}

/// Beside as many flows by NAT, by turns.
fn measure_fullnat(s: &Settings, report: &mut Report, version: Version, column: usize, flows: u32) -> Result<()> {
    let Some(mut nat) = begin(s, report, version, Method::Nat, column, flows)? else { return Ok(()) };
    let Some(mut rig) = begin(s, report, version, Method::Fullnat, column, flows)? else { return Ok(()) };
    nat.lends = rig::LOOKS;
    let mut base_ns = 0.0;
    for (frame, expect, row, beside) in [
        (Frame::Reply, REDIRECT, Row::FullnatReply, Row::NatReplyBeside),
        (Frame::Ack, TX, Row::Fullnat, Row::NatBeside),
    ] {
        let mut best = [f64::MAX; 4];
        for _ in 0..2 * s.runs {
            for (rig, best) in [&mut rig, &mut nat].into_iter().zip(best.chunks_mut(2)) {
                best[0] = best[0].min(rig.run(&rig.case(Program::Base, frame, TX))?);
                best[1] = best[1].min(rig.run(&rig.case(Program::Run, frame, expect))?);
            }
        }
        report.put(version, row, column, best[1] - best[0]);
        report.put(version, beside, column, best[3] - best[2]);
        base_ns = best[0];
    }
    drop(nat);
    new_connections(s, &mut rig, report, column, base_ns)
}

/// A hit when few flows have most of the packets.
fn zipf(s: &Settings, rig: &mut Rig<'_>, report: &mut Report, column: usize, row: Row) -> Result<()> {
    let order = Order::Zipf(rig.flows.ilog2());
    let (mut base, mut best) = (f64::MAX, f64::MAX);
    for _ in 0..s.runs {
        base = base.min(rig.run(&Case { order, ..rig.case(Program::Base, Frame::Ack, TX) })?);
        best = best.min(rig.run(&Case { order, ..rig.case(Program::Run, Frame::Ack, TX) })?);
    }
    report.put(rig.version, row, column, best - base);
    Ok(())
}

/// Of one datagram: its first fragment again and again, then a later one.
fn fragments(s: &Settings, rig: &mut Rig<'_>, report: &mut Report, base_ns: f64) -> Result<()> {
    for (row, frame) in [(Row::FirstFragment, Frame::FirstFragment), (Row::LaterFragment, Frame::LaterFragment)] {
        let mut best = f64::MAX;
        for _ in 0..s.runs {
            best = best.min(rig.run(&Case { order: Order::Random(1), ..rig.case(Program::Run, frame, TX) })?);
        }
        report.put(rig.version, row, 0, best - base_ns);
    }
    Ok(())
}

/// A rig whose flows are all entered, and its memory. `None` if the table can't be that large.
fn begin<'a>(
    s: &'a Settings,
    report: &mut Report,
    version: Version,
    method: Method,
    column: usize,
    flows: u32,
) -> Result<Option<Rig<'a>>> {
    let what = format!("{flows} flows, {}, {}", method.name(), version.of("IPv4", "IPv6"));
    if version == Version::V6 && method.answers() && flows > 2 << 20 {
        eprintln!("bench: {what}: larger than a table can be");
        return Ok(None);
    }
    eprintln!("bench: {what}");
    let mut rig = Rig::new(s, version, method, flows)?;
    rig.fill()?;
    let (established, _) = rig.established();
    // (How many find their places taken depends on the seed: in a small table, now and then, a little more than one in two hundred.)
    if u64::from(established) * 100 < u64::from(flows) * 99 {
        bail!("only {established} of {flows} flows were entered");
    }
    let (conns, lru) = rig.charged()?;
    let entries = f64::from(method.entries());
    let row = if method == Method::Nat { Row::MemoryNat } else { Row::Memory };
    if flows >= 4096 && matches!(method, Method::Dr | Method::Nat) {
        report.put(version, row, column, conns as f64 / (f64::from(rig.slots()) / 2.0) * entries);
        report.put(version, Row::MemoryLru, column, lru as f64 / f64::from(flows));
    }
    if column == 0 && method == Method::Dr {
        report.programs.push((version, rig.program_size()?));
    }
    Ok(Some(rig))
}

/// The least of several runs of each case, by turns, since a neighbour's noise comes in bursts. Returns that of `base`, which is
/// subtracted. Each case has the interface that packets leave by; the first is the lookup that the others are compared with.
fn measure(
    s: &Settings,
    rig: &mut Rig<'_>,
    report: &mut Report,
    column: usize,
    base: Case,
    cases: &[(Row, u32, Case)],
) -> Result<f64> {
    let mut base_ns = f64::MAX;
    let mut best = vec![f64::MAX; cases.len()];
    for _ in 0..s.runs {
        base_ns = base_ns.min(rig.run(&base)?);
        for ((_, out, case), best) in cases.iter().zip(&mut best) {
            rig.leave_by(*out)?;
            *best = best.min(rig.run(case)?);
        }
    }
    rig.leave_by(1)?;
    let best_of_lru = best[0];
    for ((row, _, _), best) in cases.iter().zip(&best) {
        report.put(rig.version, *row, column, best - base_ns);
        // The lookup to compare with comes first.
        report.put_ratio(rig.version, *row, column, (best - base_ns) / (best_of_lru - base_ns));
    }
    Ok(base_ns)
}

/// The first packet of each flow in a new second, which writes the age.
fn written(s: &Settings, rig: &mut Rig<'_>) -> Result<f64> {
    let mut best = f64::MAX;
    for _ in 0..s.runs {
        rig.tick(1)?;
        let hit = rig.case(Program::Run, Frame::Ack, TX);
        best = best.min(rig.run(&Case { order: Order::From(0), packets: rig.flows, ..hit })?);
    }
    Ok(best)
}

/// SYNs of random clients: into a table at half load; then, when they have filled it, each in the place of an earlier one.
fn new_connections(s: &Settings, rig: &mut Rig<'_>, report: &mut Report, column: usize, base_ns: f64) -> Result<()> {
    let (free, evicting) = match rig.method {
        Method::Dr | Method::Udp => (Row::NewDr, Row::NewDrFull),
        Method::Nat => (Row::NewNat, Row::NewNatFull),
        Method::Tunnel => (Row::NewTunnel, Row::NewTunnelFull),
        Method::Fullnat => (Row::NewFullnat, Row::NewFullnatFull),
    };
    let order = Order::Random(ANY_FLOW);
    // (A place may be found only among flows that must not be evicted.)
    let syn = Case { order, tolerance: 0.08, ..rig.case(Program::Run, Frame::Syn, TX) };
    let put = Case { order, ..rig.case(Program::LruPut, Frame::Syn, TX) };
    let slots = rig.slots();
    let per_flow = rig.method.entries();
    let half_full = rig.snapshot();
    let before = rig.established().0;
    let mut ns = [vec![], vec![], vec![]];
    for _ in 0..s.runs {
        rig.restore(&half_full);
        ns[0].push(rig.run(&Case { packets: slots / 8 / per_flow, ..syn })? - base_ns);
    }
    rig.run(&Case { packets: slots, ..syn })?;
    for _ in 0..s.runs {
        ns[1].push(rig.run(&syn)? - base_ns);
        ns[2].push(rig.run(&put)? - base_ns);
    }
    let after = rig.established().0;
    if rig.flows == report.main_size() {
        report.floods.push((rig.version, rig.method, before, after));
    }
    for (row, ns) in [free, evicting, Row::LruInsert].iter().zip(&ns) {
        report.put(rig.version, *row, column, ns.iter().copied().fold(f64::MAX, f64::min));
    }
    for (row, ours) in [(free, &ns[0]), (evicting, &ns[1])] {
        let mut ratios: Vec<f64> = ours.iter().zip(&ns[2]).map(|(ours, lru)| ours / lru).collect();
        ratios.sort_by(f64::total_cmp);
        report.put_ratio(rig.version, row, column, ratios[ratios.len() / 2]);
    }
    rig.restore(&half_full);
    Ok(())
}

fn sweeps(s: &Settings, rig: &mut Rig<'_>, report: &mut Report, column: usize) -> Result<()> {
    let rows = if rig.method == Method::Dr {
        [Row::Sweep, Row::SweepExpired, Row::SweepIdle]
    } else {
        [Row::SweepNat, Row::SweepNatExpired, Row::SweepNatIdle]
    };
    let mut best = [f64::MAX; 3];
    for _ in 0..s.runs {
        best[0] = best[0].min(rig.sweep()?);
    }
    let (_, before) = rig.established();
    rig.tick(1000)?;
    best[1] = rig.sweep()?;
    let (_, left) = rig.established();
    if before < rig.flows / 2 || left > 0 {
        bail!("a sweep after 1000 s left {left} entries of {before}");
    }
    for _ in 0..s.runs {
        best[2] = best[2].min(rig.sweep()?);
    }
    for (row, ns) in rows.iter().zip(best) {
        report.put(rig.version, *row, column, ns / 1e6);
    }
    Ok(())
}
