//! Kernel IPVS and RVS on one machine, side by side: `compare` gives both the same commands and packets, `cost` counts what a packet takes.
//! Made for the virtual machine (`./x test --vm`): the kernel must have ip_vs, and the stock `ipvsadm` lies where `./x setup vm` puts it.

pub mod cost;
mod pair;
mod scenarios;
mod side;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use rvs_fixtures::replay::MASKS;
use rvs_lab::{Hook, Lab};

use pair::{Known, Pair, Row};
use side::{Side, Who};

const USAGE: &str = "\
usage: cargo xtask beside compare [xdp|skb|tc]... [SCENARIO]...
                                                    the same commands and packets for kernel IPVS and RVS: what is otherwise (by default
                                                    by xdp and by tc, and all scenarios; else those that begin so)
       cargo xtask beside cost [--write]            instructions a packet; in a machine with --icount. --write: into docs/benchmarks.md";

/// # Errors
/// No root, no ip_vs, no stock ipvsadm, or a lab fails.
pub fn run(root: &Path, args: &[String]) -> Result<ExitCode> {
    match args.split_first() {
        Some((what, hooks)) if what == "compare" => compare(root, hooks),
        Some((what, options)) if what == "cost" => cost::run(root, options),
        _ => bail!("{USAGE}"),
    }
}

/// Loads `ip_vs`, with these schedulers; those that this kernel has.
///
/// # Errors
/// It has no `ip_vs`.
fn load_ipvs<'a>(schedulers: &[&'a str]) -> Result<Vec<&'a str>> {
    let load = |module: &str| -> Result<Option<String>> {
        let done = Command::new("modprobe").arg(module).output().context("run modprobe (package kmod)")?;
        let why = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        Ok(if done.status.success() { None } else { Some(why) })
    };
    if let Some(why) = load("ip_vs")? {
        bail!("this kernel has no IPVS: {why}");
    }
    let mut there = Vec::new();
    for scheduler in schedulers {
        // With flags behind it.
        let name = scheduler.split(' ').next().unwrap_or(scheduler);
        match load(&format!("ip_vs_{name}"))? {
            None => there.push(*scheduler),
            Some(_) => println!("SKIPPED: scheduler {scheduler}: this kernel has no ip_vs_{name}"),
        }
    }
    Ok(there)
}

fn lab(name: &str) -> Result<Lab> {
    Ok(Lab::up_as(&format!("beside{}{name}", std::process::id()), &side::topology())?)
}

fn compare(root: &Path, words: &[String]) -> Result<ExitCode> {
    let (hooks, wanted): (Vec<String>, Vec<String>) = words.iter().cloned().partition(|word| hook(word).is_some());
    let mut hooks: Vec<Hook> = hooks.iter().filter_map(|word| hook(word)).collect();
    if hooks.is_empty() {
        hooks = vec![Hook::Xdp, Hook::Tc];
    }
    let schedulers = load_ipvs(scenarios::SCHEDULERS)?;
    let stock = side::stock(root)?;
    let mut failed = 0;
    for hook in hooks {
        let (theirs, ours) = (lab("kernel")?, lab("rvs")?);
        let theirs = Side::start(&theirs, Who::Kernel(stock.clone()))?;
        let ours = Side::start(&ours, Who::Rvs(hook))?;
        let mut pair = Pair::new(theirs, ours);
        println!("\nkernel IPVS and RVS ({hook})\n");
        println!(
            "{:<40} {:>8} {:>7} {:>6} {:>11}  by design",
            "scenario", "commands", "packets", "sent", "differences"
        );
        scenarios::run(root, &mut pair, &schedulers, &wanted)?;
        pair.end();
        failed += report(&pair.rows);
    }
    println!("not compared:");
    for mask in MASKS.iter().skip(1) {
        println!("  {}: {}", mask.what, mask.why);
    }
    println!("otherwise by design:");
    for Known { name, why } in scenarios::KNOWN {
        println!("  {name}: {why}");
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn hook(name: &str) -> Option<Hook> {
    match name {
        "xdp" => Some(Hook::Xdp),
        "skb" => Some(Hook::Skb),
        "tc" => Some(Hook::Tc),
        _ => None,
    }
}

/// The table's last line. How many scenarios have a difference that nothing explains.
fn report(rows: &[Row]) -> usize {
    let mut all = Row { name: "all".to_owned(), ..Row::default() };
    for row in rows {
        all.commands += row.commands;
        all.packets += row.packets;
        all.sent += row.sent;
        all.differences.extend(row.differences.iter().cloned());
        row.known.iter().for_each(|(name, n)| *all.known.entry(name).or_default() += n);
    }
    println!("{all}\n");
    let failed = rows.iter().filter(|r| !r.differences.is_empty()).count();
    println!("test result: {} passed; {failed} failed", rows.len() - failed);
    failed
}
