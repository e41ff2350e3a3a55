//! Instructions a packet.
use anyhow::{Result, bail};
use std::path::Path;
use std::process::ExitCode;
pub fn run(_root: &Path, _options: &[String]) -> Result<ExitCode> {
    bail!("not yet")
}
