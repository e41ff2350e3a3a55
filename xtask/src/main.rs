//! Tasks of the source tree, run as `cargo xtask TASK`; `./x` calls them as its steps.
#![forbid(unsafe_code)]

mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: cargo xtask tidy     the rules of CONTRIBUTING.md that no compiler checks";

fn main() -> ExitCode {
    match run(std::env::args().nth(1).as_deref()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Option<&str>) -> Result<ExitCode> {
    match task {
        Some("tidy") => tidy::run(&root()?),
        Some(other) => bail!("there is no task '{other}'\n{USAGE}"),
        None => bail!("{USAGE}"),
    }
}

/// The folder of the workspace: this crate's parent.
fn root() -> Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    Ok(here.parent().context("xtask lies in no workspace")?.to_owned())
}
