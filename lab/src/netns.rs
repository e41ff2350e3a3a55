//! Network namespaces by name: making and ending them, entering one with a thread, and running commands in one.
//!
//! Entering is `setns(CLONE_NEWNET)` in a thread of its own, so a child started there has the namespace's network and
//! the host's mounts: a BPF file system mounted by it stays, as it would not under `ip netns exec`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, Result};
use crate::eventually::eventually;

const FOLDER: &str = "/run/netns";

/// How long processes of a namespace may take to die of SIGKILL, and `ip` to do its work.
const KILL_TIME: Duration = Duration::from_secs(10);
const IP_TIME: Duration = Duration::from_secs(30);

/// What a command left behind.
#[derive(Debug, Clone)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A namespace by its name; `None` is the one that this process is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netns(Option<String>);

impl Netns {
    pub fn named(name: impl Into<String>) -> Self {
        Self(Some(name.into()))
    }

    pub fn here() -> Self {
        Self(None)
    }

    /// For messages.
    pub fn name(&self) -> &str {
        self.0.as_deref().unwrap_or("host")
    }

    pub fn path(&self) -> PathBuf {
        self.0.as_ref().map_or_else(|| PathBuf::from("/proc/thread-self/ns/net"), |name| Path::new(FOLDER).join(name))
    }

    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Names of all namespaces that start with the prefix, sorted.
    pub fn with_prefix(prefix: &str) -> Vec<Self> {
        let Ok(entries) = fs::read_dir(FOLDER) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| n.starts_with(prefix))
            .collect();
        names.sort();
        names.into_iter().map(Self::named).collect()
    }

    /// Runs `work` in a thread that is in this namespace; a panic in it goes on here.
    ///
    /// Fails when the namespace is not there or this process may not enter it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let Some(name) = &self.0 else { return Ok(work()) };
        let file = File::open(self.path()).map_err(Error::io(format!("cannot open the network namespace {name}")))?;
        let inside = || {
            setns(&file, CloneFlags::CLONE_NEWNET)
                .map_err(|e| Error::io(format!("cannot enter the network namespace {name}"))(e.into()))?;
            Ok(work())
        };
        thread::scope(|scope| match scope.spawn(inside).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// Starts the command in this namespace.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let text = shown(command);
        let started = self.enter(|| command.spawn())?;
        started.map_err(|source| Error::Start { place: self.name().to_owned(), command: text, source })
    }

    /// Runs the command to its end, whatever its exit code; kills it at the deadline.
    pub fn output(&self, command: &mut Command, stdin: &str, deadline: Duration) -> Result<Output> {
        let text = shown(command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.spawn(command)?;
        let (input, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        thread::scope(|scope| {
            // A command that reads nothing closes its end early: no failure of ours.
            scope.spawn(move || input.map(|mut pipe| pipe.write_all(stdin.as_bytes())));
            let out = scope.spawn(move || read_all(out));
            let err = scope.spawn(move || read_all(err));
            let ended = eventually(&format!("the end of '{text}'"), deadline, || match child.try_wait() {
                Ok(Some(status)) => Ok(status),
                Ok(None) => Err("still running".to_owned()),
                Err(error) => Err(error.to_string()),
            });
            if ended.is_err() {
                // Best effort: it may have ended in this moment.
                let _ = child.kill();
                let _ = child.wait();
            }
            let (stdout, stderr) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
            Ok(Output { status: ended?, stdout, stderr })
        })
    }

    /// Runs the command and fails unless its exit code is 0; returns its standard output.
    pub fn run(&self, command: &mut Command, stdin: &str, deadline: Duration) -> Result<String> {
        let text = shown(command);
        let output = self.output(command, stdin, deadline)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = if output.stderr.trim().is_empty() { &output.stdout } else { &output.stderr };
        Err(Error::Command {
            place: self.name().to_owned(),
            command: text,
            status: output.status.to_string(),
            said: said.trim().to_owned(),
        })
    }

    /// Gives `ip -batch` one command a line; the error names the line that failed.
    ///
    /// A line may start with `-6 `. `ip` takes that only for a batch as a whole, so such lines run after the others.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        let (v6, any): (Vec<&str>, Vec<&str>) = lines.iter().map(String::as_str).partition(|l| l.starts_with("-6 "));
        let v6: Vec<&str> = v6.into_iter().map(|l| l.trim_start_matches("-6 ")).collect();
        self.ip_batch(&["-batch", "-"], &any)?;
        self.ip_batch(&["-6", "-batch", "-"], &v6)
    }

    fn ip_batch(&self, options: &[&str], lines: &[&str]) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let failed = match self.run(Command::new("ip").args(options), &lines.join("\n"), IP_TIME) {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        let Error::Command { place, command, status, said } = failed else { return Err(failed) };
        let line = said
            .lines()
            .find_map(|l| l.strip_prefix("Command failed -:")?.trim().parse::<usize>().ok())
            .and_then(|n| lines.get(n.checked_sub(1)?));
        let command = line.map_or(command, |line| format!("ip {line}"));
        Err(Error::Command { place, command, status, said })
    }

    /// Writes a sysctl by its dotted name or path below /proc/sys, as seen in this namespace.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        let written = self.enter(|| fs::write(&path, value))?;
        written.map_err(Error::io(format!("{}: cannot set {} to {value}", self.name(), path.display())))
    }

    /// A file of /proc/net as this namespace has it, for example `snmp`.
    pub fn proc_net(&self, file: &str) -> Result<String> {
        // Not /proc/net: that is the namespace of the process's first thread.
        let path = Path::new("/proc/thread-self/net").join(file);
        let read = self.enter(|| fs::read_to_string(&path))?;
        read.map_err(Error::io(format!("{}: cannot read {}", self.name(), path.display())))
    }

    /// Kills whatever runs in this namespace and removes it. A namespace that is not there is removed already.
    pub fn remove(&self) -> Result<()> {
        let Some(name) = &self.0 else { return Err(Error::Missing("the host's own namespace is no lab's".to_owned())) };
        if !self.exists() {
            return Ok(());
        }
        eventually(&format!("the processes of {name} to end"), KILL_TIME, || {
            let left = self.processes().map_err(|e| e.to_string())?;
            for &pid in &left {
                // It may have ended in this moment.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?} still run")) }
        })?;
        Self::here().run(Command::new("ip").args(["netns", "del", name]), "", IP_TIME).map(drop)
    }

    /// Processes in this namespace, ours excepted.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let listed = Self::here().run(Command::new("ip").args(["netns", "pids", self.name()]), "", IP_TIME)?;
        let own = std::process::id().cast_signed();
        Ok(listed.lines().filter_map(|l| l.trim().parse().ok()).filter(|&pid| pid != own).collect())
    }
}

/// The command as typed, for messages.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn read_all(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // What was read until an error is still worth showing.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
