//! `cargo xtask verify`: every program of every object through this kernel's verifier, with what each takes of its patience.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rvs_sys::bpf::verify::{Verified, realserver};
use rvs_sys::bpf::{Dataplane, OBJECT, Sizes};

use crate::bench::{self, Place};

/// Sizes that leave a machine of a gigabyte some room.
const SIZES: Sizes = Sizes {
    flows4: 1 << 16,
    flows6: 1 << 14,
    services: 1024,
    dests: 4096,
    lists: 16384,
    tables: 65536,
    hops: 4096,
    fullnat: false,
};

/// Prints a line for each program; a failure is one that this kernel does not take.
///
/// # Errors
/// Not root, or maps can't be made.
pub fn run(root: &Path, args: &[String]) -> Result<ExitCode> {
    if !args.is_empty() {
        bail!("verify has no options");
    }
    let place = Place::new()?;
    let release = nix::sys::utsname::uname().context("uname")?;
    println!("Linux {}", release.release().to_string_lossy());
    println!("{:<42} {:>9} {:>13}", "program", "steps", "instructions");
    let mut counts = Counts::default();
    let fullnat = Sizes { fullnat: true, ..SIZES };
    for (what, sizes) in [("director", &SIZES), ("director with FULLNAT", &fullnat)] {
        let pins = place.pins.join(what.replace(' ', "_"));
        let mut dataplane = Dataplane::load(OBJECT, &pins, sizes, &[], &[])?;
        counts.add(what, dataplane.verify());
        // Another size of what each CPU has a part of: rvs why and rvs trace rehearse so.
        if !sizes.fullnat {
            counts.add("rehearsal", dataplane.stage()?.open(OBJECT)?.verify());
        }
    }
    counts.add("real server", realserver()?);
    let object = root.join(bench::OBJECT);
    let object = std::fs::read(&object).with_context(|| format!("{}: run `./x build` first", object.display()))?;
    let pins = place.pins.join("bench");
    counts.add(
        "benchmark",
        Dataplane::load(&object, &pins, &SIZES, &[], &[("BENCH", 1), ("LRU4", 1024), ("LRU6", 1024)])?.verify(),
    );
    println!("test result: {} passed; {} failed", counts.passed, counts.failed);
    Ok(if counts.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Default)]
struct Counts {
    passed: u32,
    failed: u32,
}

impl Counts {
    fn add(&mut self, what: &str, all: Vec<Verified>) {
        for Verified { name, outcome } in all {
            let title = format!("{what}: {name}");
            match outcome {
                Ok(costs) => {
                    self.passed += 1;
                    println!("{title:<42} {:>9} {:>13}", costs.steps, costs.instructions);
                }
                Err(why) => {
                    self.failed += 1;
                    println!("{title:<42} FAILED: {why}");
                }
            }
        }
    }
}
