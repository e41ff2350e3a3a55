//! Another version of rvsd goes on in the place of this one. What it would make of the data plane it is asked itself, by `--check-upgrade`: it knows its layout and which
//! others it can read. Then this process becomes it, by exec: same number, same arguments, so whoever watches this process watches that.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rvs_control::api::{self, Code, Refusal, UpgradeReport};
use rvs_datapath::abi;
use rvs_sys::bpf::{BpfError, Upgrade};

use crate::director::{Director, shown};

/// What this version would make of the data plane pinned in `pin`.
pub fn plan(pin: &Path) -> Result<UpgradeReport, BpfError> {
    let layout = |version: u64| format!("{version:016x}");
    let ours = UpgradeReport {
        program: std::env::current_exe().unwrap_or_default(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        from: layout(abi::VERSION),
        to: layout(abi::VERSION),
        flows: [0; 2],
        memory: 0,
        maps: Vec::new(),
    };
    let Some(upgrade) = Upgrade::look(pin)? else { return Ok(ours) };
    let plan = upgrade.plan()?;
    let maps = plan.maps.into_iter().map(str::to_owned).collect();
    Ok(UpgradeReport { from: layout(plan.from), flows: plan.flows, memory: plan.memory, maps, ..ours })
}

/// The new rvsd's word about it.
pub async fn check(director: &RefCell<Director>, what: &api::Upgrade) -> Result<UpgradeReport, Refusal> {
    let failed = |reason: String| Refusal::new(Code::Failed, reason);
    let pin = director.borrow().dataplane.dir().to_owned();
    if !what.check {
        director.borrow().dataplane.refuse_if_moving().map_err(|e| Refusal::new(Code::Full, shown(&e)))?;
    }
    let program = match &what.program {
        Some(program) => program.clone(),
        None => own().map_err(|e| {
            failed(format!("which program rvsd was started from is not known: {e}; name it with --rvsd"))
        })?,
    };
    let run = {
        let program = program.clone();
        move || Command::new(program).arg("--check-upgrade").arg("--pin").arg(pin).output()
    };
    let done = tokio::task::spawn_blocking(run).await.unwrap_or_else(|e| Err(io::Error::other(e)));
    let done = done.map_err(|e| failed(format!("{} can't be run: {e}", program.display())))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        let said = said.trim().trim_start_matches("rvsd: ").replace('\n', " ");
        let silent = format!("{} --check-upgrade ended with {}, and no word", program.display(), done.status);
        return Err(failed(if said.is_empty() { silent } else { said }));
    }
    serde_json::from_slice(&done.stdout)
        .map(|report| UpgradeReport { program: program.clone(), ..report })
        .map_err(|e| failed(format!("{} is no rvsd that can be upgraded to: {e}", program.display())))
}

/// What is now where the running program was.
fn own() -> io::Result<PathBuf> {
    let mut path = std::fs::read_link("/proc/self/exe")?.into_os_string().into_vec();
    // What the kernel says of a file that has been replaced.
    const GONE: &[u8] = b" (deleted)";
    if path.ends_with(GONE) {
        path.truncate(path.len() - GONE.len());
    }
    Ok(PathBuf::from(OsStr::from_bytes(&path)))
}

/// Become it. It comes back only with an error: nothing has changed then.
pub fn go_on_as(program: &Path) -> io::Error {
    tracing::info!(program = %program.display(), "going on as another rvsd");
    let error = Command::new(program).args(std::env::args_os().skip(1)).exec();
    tracing::error!(%error, program = %program.display(), "it can't be started; this one stays");
    error
}
