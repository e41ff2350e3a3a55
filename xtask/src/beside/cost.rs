//! What a packet takes of the processor, by kernel IPVS and by RVS, on the same kernel in the same machine: one in which every instruction takes a
//! nanosecond of its clock (`cargo xtask vm --icount`).

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rvs_fixtures::frame::{TCP, flag};
use rvs_fixtures::world::{BOTH, Net};
use rvs_lab::Hook;

use super::side::{self, Side, Who};

/// The section of `docs/benchmarks.md` that is this module's.
pub const HEADING: &str = "## Against kernel IPVS on Linux 6.1";
const DOCUMENT: &str = "docs/benchmarks.md";

/// Packets of a run, and runs: the least counts, since what an interrupt of the clock takes is nobody's.
const PACKETS: u32 = 400;
const RUNS: u16 = 5;

/// Ports of services, one after the other: connections of one that is gone would be met by another of that port. Real servers listen so much above,
/// by NAT.
const FIRST_PORT: u16 = 80;
const ABOVE: u16 = 8000;
const METHODS: [(&str, &str, u16); 2] = [("NAT", "-m", ABOVE), ("DR", "-g", 0)];

/// Prints the section; with `--write` has it made in a machine of its own, and puts it into the document.
pub fn run(root: &Path, options: &[String]) -> Result<ExitCode> {
    match options {
        [] => measure(root),
        [option] if option == "--write" => write(root),
        _ => bail!("cost has one option: --write"),
    }
}

fn write(root: &Path) -> Result<ExitCode> {
    let own = std::env::current_exe().context("where this program is")?;
    let mut machine = Command::new(&own);
    machine.args(["vm", "--icount", "--seconds", "3600", "--"]).arg(&own).args(["beside", "cost"]);
    let output = machine.output().context("run the machine")?;
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    let section = section(&said);
    if !output.status.success() || section.is_empty() {
        bail!("the machine counted nothing: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let path = root.join(DOCUMENT);
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    std::fs::write(&path, with_section(&text, &section)).with_context(|| format!("write {}", path.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The section in a document, up to the next one; empty if there is none.
pub fn section(text: &str) -> String {
    let lines = text.lines().skip_while(|l| *l != HEADING).enumerate();
    let own = lines.take_while(|(n, l)| *n == 0 || !l.starts_with("## ") && !l.starts_with("test result: "));
    let section: String = own.map(|(_, l)| format!("{l}\n")).collect();
    section.trim_end().to_owned()
}

/// The document with this section in the place of the old one, or at its end.
pub fn with_section(text: &str, section: &str) -> String {
    let old = self::section(text);
    if old.is_empty() { format!("{}\n\n{section}\n", text.trim_end()) } else { text.replace(&old, section) }
}

/// What is measured, with a number for IPv4 and for IPv6.
type Row = (String, [u64; 2]);

fn measure(root: &Path) -> Result<ExitCode> {
    super::load_ipvs(&["rr"])?;
    let (forwarded, moved) = unbalanced(root)?;
    let mut rows: Vec<Row> = vec![("routed by the kernel, not balanced".to_owned(), forwarded)];
    for (who, hook) in [("IPVS", None), ("RVS, tc", Some(Hook::Tc)), ("RVS, xdp", Some(Hook::Xdp))] {
        let lab = super::lab("one")?;
        let who_is = hook.map_or_else(|| side::stock(root).map(Who::Kernel), |hook| Ok(Who::Rvs(hook)))?;
        let side = Side::start(&lab, who_is)?;
        let mut port = FIRST_PORT;
        for (title, method, above) in METHODS {
            for (what, frames) in [("known connection", known as Frames), ("new connection (SYN)", syns)] {
                port += 1;
                let count = |net| {
                    new_service(&side, net, method, [port, port + above])?;
                    runs(&side, &|run| frames(net, port, run))
                };
                let name = format!("{who}, {title}, {what}");
                let counted = each(count).with_context(|| name.clone())?;
                eprintln!("{name}: {counted:?}");
                rows.push((name, counted));
            }
        }
    }
    print!("{}", document(&rows, moved)?);
    println!("test result: {} passed; 0 failed", rows.len());
    Ok(ExitCode::SUCCESS)
}

/// A packet that is routed, and one that tc moves from the one interface to the other as it came.
fn unbalanced(root: &Path) -> Result<([u64; 2], [u64; 2])> {
    let lab = super::lab("base")?;
    let side = Side::start(&lab, Who::Kernel(side::stock(root)?))?;
    let forwarded = each(|net| runs(&side, &|_| vec![to_server(net)]))?;
    let ns = side.node();
    ns.run(&["tc", "qdisc", "add", "dev", "front", "clsact"])?;
    ns.run(&[
        "tc", "filter", "add", "dev", "front", "ingress", "matchall", "action", "mirred", "egress", "redirect", "dev",
        "back",
    ])?;
    let moved = each(|net| runs(&side, &|_| vec![to_server(net)]))?;
    Ok((forwarded, moved))
}

fn each(count: impl Fn(Net) -> Result<u64>) -> Result<[u64; 2]> {
    Ok([count(BOTH[0])?, count(BOTH[1])?])
}

/// A service with one server, the connection of [`known`] in it.
fn new_service(side: &Side<'_>, net: Net, method: &str, [port, inner]: [u16; 2]) -> Result<()> {
    let (service, server) = (net.vip(port), net.server(11, inner));
    for line in ["-C".to_owned(), format!("-A -t {service} -s rr"), format!("-a -t {service} -r {server} {method}")] {
        let output = side.ipvsadm(&line, "")?;
        if !output.status.success() {
            bail!("ipvsadm {line}: {}", output.stderr.trim());
        }
    }
    side.through(&[net.request(TCP, 999, port).flags(flag::SYN).bytes()], 1)?;
    side.through(&known(net, port, 0), 10)
}

/// A family's packets for this port, in a run.
type Frames = fn(Net, u16, u16) -> Vec<Vec<u8>>;

fn known(net: Net, port: u16, _: u16) -> Vec<Vec<u8>> {
    vec![net.request(TCP, 999, port).flags(flag::ACK).bytes()]
}

/// Of as many clients as there are packets, others in each run.
fn syns(net: Net, port: u16, run: u16) -> Vec<Vec<u8>> {
    let first = 1024 + run * PACKETS as u16;
    (first..first + PACKETS as u16).map(|client| net.request(TCP, client, port).flags(flag::SYN).bytes()).collect()
}

/// A packet that nobody balances.
fn to_server(net: Net) -> Vec<u8> {
    net.request(TCP, 999, FIRST_PORT).to(net.server(12, FIRST_PORT)).flags(flag::ACK).bytes()
}

fn runs(side: &Side<'_>, frames: &dyn Fn(u16) -> Vec<Vec<u8>>) -> Result<u64> {
    let mut least = u64::MAX;
    for run in 0..RUNS {
        least = least.min(count(side, &frames(run))?);
    }
    Ok(least)
}

/// Nanoseconds of the machine for each packet: instructions.
fn count(side: &Side<'_>, frames: &[Vec<u8>]) -> Result<u64> {
    let start = Instant::now();
    side.through(frames, PACKETS)?;
    Ok(start.elapsed().as_nanos() as u64 / u64::from(PACKETS))
}

fn document(rows: &[Row], moved: [u64; 2]) -> Result<String> {
    let release = nix::sys::utsname::uname().context("uname")?;
    let mut out = format!("{HEADING}\n\n");
    let _ = write!(
        out,
        "Written by `cargo xtask beside cost --write`: Linux {}, in QEMU with `-icount`, where each instruction of the machine, the kernel's and the \
         compiled programs', takes one nanosecond of its clock. A frame of a TCP packet with 16 bytes (a SYN: none) is put on the clients' wire (a \
         packet socket at a veth's far end), crosses the director, and is taken from the servers' wire; then the next. Counted is all that the machine \
         does from one to the next, less the same for frames that tc moves from the one interface to the other as they came (`mirred`: {} for IPv4, {} \
         for IPv6). So it is the director's own work. The least of {RUNS} runs of {PACKETS} packets.\n\n\
         XDP on a veth first copies a packet that has no room in front, as these have not: a network card's driver has no such cost.\n\n",
        release.release().to_string_lossy(),
        moved[0],
        moved[1],
    );
    let _ = writeln!(out, "| instructions a packet | IPv4 | IPv6 |\n|---|--:|--:|");
    for (name, counted) in rows {
        let [v4, v6] = [0, 1].map(|n: usize| counted[n].saturating_sub(moved[n]));
        let _ = writeln!(out, "| {name} | {v4} | {v6} |");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_takes_the_place_of_the_old_one() {
        let new = format!("{HEADING}\n\nnew\n\n| a |");
        let text = format!("# t\n\n{HEADING}\n\nold\n\n## next\n\nx\n");
        assert_eq!(section(&text), format!("{HEADING}\n\nold"));
        assert_eq!(with_section(&text, &new), format!("# t\n\n{new}\n\n## next\n\nx\n"));
        assert_eq!(with_section("# t\n", &new), format!("# t\n\n{new}\n"));
        assert_eq!(section(&format!("x\n{new}\ntest result: 1 passed\n")), new);
    }
}
