//! Programs, loaded with their gates open. The stages of the pipeline after the first ones are programs of their own, each with the verifier's whole
//! allowance; the hooks' programs go there by tail calls through an array of programs (`ebpf/src/stages.rs`: gates).
//!
//! The kernel empties such an array when nobody in user space has it any more. So that of a program on an interface is pinned:
//! `gates/<number of the program>`.

use super::{BpfError, Result, attach, elder::Elder, failed, generation, raw};
use aya::Ebpf;
use aya::maps::{Map, MapData, ProgramArray};
use aya::programs::{Program, ProgramFd};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::Path;

/// A map of programs, and which. The one after them is the elder's.
type Gates = (&'static str, &'static [&'static str]);

/// All of them.
pub const GATES: [Gates; 2] = [XDP, TC];

const XDP: Gates = ("XDP_GATES", &["rvs_further4", "rvs_further6", "rvs_aside4", "rvs_aside6"]);
const TC: Gates = ("TC_GATES", &["rvs_tc_further4", "rvs_tc_further6", "rvs_tc_aside4", "rvs_tc_aside6"]);
const TC_OUT: Gates = ("TC_OUT_GATES", &[]);

/// The gates of a program.
fn gates(program: &str) -> Option<Gates> {
    match program {
        "rvs_xdp" | "bench_run4" | "bench_run6" | "bench_fill4" | "bench_fill6" => Some(XDP),
        "rvs_tc_in" => Some(TC),
        "rvs_tc_out" => Some(TC_OUT),
        _ => None,
    }
}

/// The program, loaded if it was not, its gates open: as long as `ebpf` is there, or by a pin in the folder `dir`.
///
/// # Errors
/// There is none of that name; the kernel refuses it, or what is behind its gates.
pub(super) fn load(ebpf: &mut Ebpf, name: &str, dir: Option<&Path>, elder: Option<&Elder>) -> Result<ProgramFd> {
    let at = || format!("program {name}");
    let program = ebpf.program(name).ok_or_else(|| BpfError::Refused(format!("the object has no program {name}")))?;
    if let Ok(fd) = program.fd() {
        return fd.try_clone().map_err(failed(at()));
    }
    let gates = gates(name);
    let behind = gates.map_or(&[][..], |(_, programs)| programs);
    load_all(ebpf, |other| other == name || behind.contains(&other))?;
    if let Some((map, behind)) = gates {
        open(ebpf, map, behind)?;
        if let Some(program) = elder.and_then(|elder| elder.program(name)) {
            array(ebpf, map)?.set(behind.len() as u32, program, 0).map_err(failed(format!("map {map}")))?;
        }
    }
    let program = ebpf.program(name).ok_or_else(|| BpfError::Refused(format!("{} is gone", at())))?;
    if let (Some((map, _)), Some(dir)) = (gates, dir) {
        let id = program.info().map_err(failed(at()))?.id();
        pin(ebpf, map, &dir.join("gates").join(id.to_string()))?;
    }
    program.fd().map_err(failed(at()))?.try_clone().map_err(failed(at()))
}

/// All of these that are not loaded, side by side: most of the time is the verifier's.
fn load_all(ebpf: &mut Ebpf, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let load_one = |name: &str, program: &mut Program| match program {
        Program::Xdp(p) => p.load().map_err(failed(format!("program {name}"))),
        Program::SchedClassifier(p) => p.load().map_err(failed(format!("program {name}"))),
        _ => Err(BpfError::Refused(format!("the object's {name} is of an unknown type"))),
    };
    std::thread::scope(|threads| {
        let missing = ebpf.programs_mut().filter(|(name, program)| wanted(name) && program.fd().is_err());
        let running: Vec<_> = missing.map(|(name, program)| threads.spawn(move || load_one(name, program))).collect();
        let died = |_| Err(BpfError::Refused("a thread that loads a program ended early".to_owned()));
        running.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(died))
    })
}

fn open(ebpf: &mut Ebpf, map: &str, programs: &[&str]) -> Result<()> {
    let at = || format!("map {map}");
    let mut fds = Vec::new();
    for name in programs {
        let program =
            ebpf.program(name).ok_or_else(|| BpfError::Refused(format!("the object has no program {name}")))?;
        fds.push(program.fd().and_then(|fd| Ok(fd.try_clone()?)).map_err(failed(format!("program {name}")))?);
    }
    let mut array = array(ebpf, map)?;
    (0..).zip(&fds).try_for_each(|(number, fd)| array.set(number, fd, 0)).map_err(failed(at()))
}

fn array<'a>(ebpf: &'a mut Ebpf, map: &str) -> Result<ProgramArray<&'a mut MapData>> {
    let array = ebpf.map_mut(map).ok_or_else(|| BpfError::Refused(format!("the object has no map {map}")))?;
    ProgramArray::try_from(array).map_err(failed(format!("map {map}")))
}

/// The elder is asked no more.
///
/// # Errors
/// The kernel refuses.
pub(super) fn part(ebpf: &mut Ebpf) -> Result<()> {
    for (map, behind) in [XDP, TC, TC_OUT] {
        let mut array = array(ebpf, map)?;
        // (There may be none for that hook.)
        let _ = array.clear_index(&(behind.len() as u32));
    }
    Ok(())
}

fn pin(ebpf: &Ebpf, map: &str, path: &Path) -> Result<()> {
    let Some(Map::ProgramArray(array)) = ebpf.map(map) else {
        return Err(BpfError::Refused(format!("the object has no array of programs {map}")));
    };
    attach::make_folder(path)?;
    let _ = std::fs::remove_file(path);
    raw::pin(array.fd().as_fd(), path).map_err(failed(format!("pin {}", path.display())))
}

/// Close the gates of programs that are nowhere any more: neither on an interface nor in `ebpf`. False: there was nothing to do.
///
/// # Errors
/// The folder, or a pin in it, can't be read or removed.
pub(super) fn close(ebpf: &Ebpf, dir: &Path) -> Result<bool> {
    let folder = dir.join("gates");
    let at = || format!("folder {}", folder.display());
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        entries => entries.map_err(failed(at()))?,
    };
    let mut used: BTreeSet<u32> = attach::list(dir)?.iter().map(|a| a.program).collect();
    used.extend(ebpf.programs().filter_map(|(_, p)| Some(p.info().ok()?.id())));
    used.extend(generation::elders(dir)?);
    let mut closed = false;
    for entry in entries {
        let entry = entry.map_err(failed(at()))?;
        let program = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if program.is_some_and(|id: u32| !used.contains(&id)) {
            std::fs::remove_file(entry.path()).map_err(failed(format!("remove {}", entry.path().display())))?;
            closed = true;
        }
    }
    Ok(closed)
}

/// All of them: the data plane is taken down.
///
/// # Errors
/// A pin can't be removed.
pub(super) fn close_all(dir: &Path) -> Result<()> {
    let folder = dir.join("gates");
    match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        entries => entries
            .and_then(|mut all| all.try_for_each(|entry| std::fs::remove_file(entry?.path())))
            .and_then(|()| std::fs::remove_dir(&folder))
            .map_err(failed(format!("folder {}", folder.display()))),
    }
}
