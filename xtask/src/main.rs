//! Tasks of the source tree, run as `cargo xtask TASK`; `./x` calls them as its steps.
#![forbid(unsafe_code)]

mod bench;
mod beside;
mod tidy;
mod verify;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
usage: cargo xtask tidy     the rules of CONTRIBUTING.md that no compiler checks
       cargo xtask count [--write]
                            executed instructions a packet, compared with those on record; --write: put these on record
       cargo xtask bench [--quick] [--write]
                            the data plane's figures (as root; `./x bench` builds first). --quick: a few sizes, to see that it
                            works; --write: into docs/benchmarks.md too
       cargo xtask verify   every program through this kernel's verifier, with the steps that each takes (as root)
       cargo xtask beside compare|cost
                            kernel IPVS and RVS side by side (as root, where the kernel has ip_vs)
       cargo xtask vm [OPTION]... -- COMMAND [ARG]...
                            a command as root in a virtual machine with Debian 12's kernel (`./x setup vm` fetches it)";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match run(args.next().as_deref(), &args.collect::<Vec<_>>()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Option<&str>, args: &[String]) -> Result<ExitCode> {
    match task {
        Some("tidy") => tidy::run(&root()?),
        Some("bench") => bench::run(&root()?, args),
        Some("count") => bench::count::run(&root()?, args),
        Some("verify") => verify::run(&root()?, args),
        Some("beside") => beside::run(&root()?, args),
        Some("vm") => vm::run(&root()?, args),
        Some(other) => bail!("there is no task '{other}'\n{USAGE}"),
        None => bail!("{USAGE}"),
    }
}

/// The folder of the workspace: this crate's parent.
fn root() -> Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    Ok(here.parent().context("xtask lies in no workspace")?.to_owned())
}
