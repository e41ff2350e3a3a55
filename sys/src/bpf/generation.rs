//! Where pins are while flows move from one data plane's tables to another's, so that whoever starts then, after a `kill -9` anywhere, finds out from the
//! pins alone how far it had come.
//!
//! | pins | what it means | who finds it |
//! |---|---|---|
//! | `NAME` | the maps | |
//! | `next/`, no `next/CONFIG` | new maps are being made; the links have the old programs | takes `next/` and `elder/` away |
//! | `next/CONFIG` | the new maps are whole, `elder/` has the programs that were at work; some links or all have new ones | goes on: new programs into all links, the elder is told, flows are moved |
//! | `last/` (was `next/`) | no flow is left in the old maps | puts what is in it in the place of the old pins |
//!
//! What is not in `next/` is shared by both. These names are part of what versions promise each other (`rvs_datapath::elder`): a `next/` of another
//! version's is refused, and that version has to finish it.

use super::{BpfError, Result, failed};
use aya::programs::ProgramInfo;
use rvs_datapath::abi::map;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub(super) const NEXT: &str = "next";
const LAST: &str = "last";
const ELDER: &str = "elder";

/// Where a map is pinned, or is to be.
pub(super) fn pin(dir: &Path, name: &str) -> PathBuf {
    let next = dir.join(NEXT).join(name);
    if next.exists() { next } else { dir.join(name) }
}

/// Where the elder's program for a hook is pinned, by that of ours.
pub(super) fn elder_pin(dir: &Path, program: &str) -> PathBuf {
    dir.join(ELDER).join(program)
}

/// Numbers of the elder's programs.
///
/// # Errors
/// A pin can't be read.
pub(super) fn elders(dir: &Path) -> Result<Vec<u32>> {
    let id = |path: PathBuf| {
        let info = ProgramInfo::from_pin(&path).map_err(failed(format!("program {}", path.display())))?;
        Ok(info.id())
    };
    entries(&dir.join(ELDER))?.into_iter().map(id).collect()
}

/// What a start before this one has left half done is finished, or taken back. Are flows being moved?
///
/// # Errors
/// A pin can't be moved or removed.
pub(super) fn recover(dir: &Path) -> Result<bool> {
    if dir.join(LAST).exists() {
        settle(dir)?;
    }
    if dir.join(NEXT).join(map::CONFIG).exists() {
        return Ok(true);
    }
    if dir.join(NEXT).exists() || dir.join(ELDER).exists() {
        discard(dir)?;
    }
    Ok(false)
}

/// New maps that nobody uses go.
///
/// # Errors
/// A pin can't be removed.
pub(super) fn discard(dir: &Path) -> Result<()> {
    // The first: without it the others are nothing.
    let config = dir.join(NEXT).join(map::CONFIG);
    if config.exists() {
        fs::remove_file(&config).map_err(failed(format!("remove {}", config.display())))?;
    }
    empty(&dir.join(NEXT))?;
    empty(&dir.join(ELDER))
}

/// No flow is in the old maps any more, and nobody asks the elder.
///
/// # Errors
/// A pin can't be moved or removed. The next start goes on where it was.
pub(super) fn commit(dir: &Path) -> Result<()> {
    fs::rename(dir.join(NEXT), dir.join(LAST)).map_err(failed(format!("rename {}", dir.join(NEXT).display())))?;
    settle(dir)
}

fn settle(dir: &Path) -> Result<()> {
    empty(&dir.join(ELDER))?;
    for from in entries(&dir.join(LAST))? {
        if let Some(name) = from.file_name() {
            fs::rename(&from, dir.join(name)).map_err(failed(format!("rename {}", from.display())))?;
        }
    }
    empty(&dir.join(LAST))
}

/// All of it, when the data plane is taken down.
///
/// # Errors
/// A pin can't be removed.
pub(super) fn forget(dir: &Path) -> Result<()> {
    discard(dir)?;
    empty(&dir.join(LAST))
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let at = || format!("folder {}", folder.display());
    match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries
            .and_then(|all| all.map(|entry| Ok(entry?.path())).collect())
            .map_err(|e: std::io::Error| failed(at())(e)),
    }
}

/// A folder and the pins in it.
fn empty(folder: &Path) -> Result<()> {
    for path in entries(folder)? {
        fs::remove_file(&path).map_err(failed(format!("remove {}", path.display())))?;
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err::<(), BpfError>(failed(format!("remove {}", folder.display()))(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever has to change these breaks `rvs upgrade` from every version before.
    #[test]
    fn names_that_versions_promise_each_other() {
        let dir = Path::new("/sys/fs/bpf/x");
        assert_eq!(elder_pin(dir, "rvs_xdp"), Path::new("/sys/fs/bpf/x/elder/rvs_xdp"));
        assert_eq!((NEXT, LAST, map::CONFIG), ("next", "last", "CONFIG"));
        assert_eq!((map::CONN4, map::CONN6, map::DEST_STATE), ("CONN4", "CONN6", "DEST_STATE"));
    }
}
