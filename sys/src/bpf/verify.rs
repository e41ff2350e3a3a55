//! What the kernel's verifier makes of each program of an object: to know that a kernel takes them all, and how much of its patience is used.

use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};

use super::{Dataplane, REALSERVER_OBJECT, Rehearsal, Result, failed};

/// A program that was given to the verifier.
#[derive(Debug)]
pub struct Verified {
    pub name: String,
    /// Or why the kernel refuses it, with the end of the verifier's log.
    pub outcome: std::result::Result<Costs, String>,
}

/// The kernel's numbers (`struct bpf_prog_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Instructions that the verifier went through, each as often as it did; it gives up at 1,000,000.
    pub steps: u32,
    /// Instructions of the program as the verifier left it.
    pub instructions: u32,
}

impl Dataplane {
    /// Loads whatever the object has that is not loaded yet; tells of all, by name.
    pub fn verify(&mut self) -> Vec<Verified> {
        verify(&mut self.ebpf)
    }
}

impl Rehearsal {
    /// As [`Dataplane::verify`].
    pub fn verify(&mut self) -> Vec<Verified> {
        verify(&mut self.ebpf)
    }
}

/// The real server's programs, as [`Dataplane::verify`].
///
/// # Errors
/// Their maps can't be made.
pub fn realserver() -> Result<Vec<Verified>> {
    let ebpf = EbpfLoader::new().load(REALSERVER_OBJECT);
    Ok(verify(&mut ebpf.map_err(failed("load the real server's programs"))?))
}

fn verify(ebpf: &mut Ebpf) -> Vec<Verified> {
    let one = |(name, program): (&str, &mut Program)| Verified { name: name.to_owned(), outcome: costs(program) };
    let mut all: Vec<Verified> = ebpf.programs_mut().map(one).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn costs(program: &mut Program) -> std::result::Result<Costs, String> {
    if program.fd().is_err() {
        load(program).map_err(|e| shown(&e))?;
    }
    let info = program.info().map_err(|e| shown(&e))?;
    let bytes = info.size_translated().unwrap_or_default();
    Ok(Costs { steps: info.verified_instruction_count().unwrap_or_default(), instructions: bytes / 8 })
}

fn load(program: &mut Program) -> std::result::Result<(), ProgramError> {
    match program {
        Program::Xdp(p) => p.load(),
        Program::SchedClassifier(p) => p.load(),
        Program::SockOps(p) => p.load(),
        Program::CgroupSockAddr(p) => p.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Lines of the verifier's log that say why.
const LOG_LINES: usize = 40;

fn shown(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return error.to_string() };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().collect();
    format!("{io_error}\n{}", lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"))
}
