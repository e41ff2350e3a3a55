//! A program that runs in a node, its output in a log file.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, Result};
use crate::eventually::eventually;
use crate::netns::{Netns, shown};

/// Killed and waited for when dropped, unless [`Process::detach`]ed.
#[derive(Debug)]
pub struct Process {
    command: String,
    pid: u32,
    log: PathBuf,
    child: Option<Mutex<Child>>,
}

impl Process {
    /// Starts the command in the namespace; standard output and error go to `dir/name.log`, which starts empty.
    pub fn spawn(name: &str, ns: &Netns, command: &mut Command, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).map_err(Error::file("write", &log))?;
        let err = out.try_clone().map_err(Error::file("write", &log))?;
        // A group of its own: Ctrl-C in the terminal ends the harness, and the harness ends this.
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let child = ns.spawn(command)?;
        Ok(Self { command: shown(command), pid: child.id(), log, child: Some(Mutex::new(child)) })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last lines of its output, for messages.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(10)..].join(" | ")
    }

    pub fn has_ended(&self) -> bool {
        self.exit_status().is_some()
    }

    /// Waits for a line of its output that starts so, and returns it; fails at once when the program ends before.
    pub fn wait_line(&self, start: &str, deadline: Duration) -> Result<String> {
        let what = format!("'{start}' from '{}'", self.command);
        eventually(&what, deadline, || {
            let ended = self.has_ended();
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            match text.lines().find(|l| l.starts_with(start)) {
                Some(line) => Ok(Ok(line.to_owned())),
                None if ended => Ok(Err(Error::unexpected(&what, format!("it ended; its log: {}", self.log_tail())))),
                None => Err(format!("its log: {}", self.log_tail())),
            }
        })?
    }

    /// Sends a signal. Fails when the program has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.has_ended() {
            return Err(Error::Missing(format!("'{}' has ended; its log: {}", self.command, self.log_tail())));
        }
        let sent = kill(Pid::from_raw(self.pid.cast_signed()), signal);
        sent.map_err(|e| Error::io(format!("cannot signal '{}'", self.command))(e.into()))
    }

    /// Waits until it has ended.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("the end of '{}'", self.command);
        eventually(&what, deadline, || {
            self.exit_status().ok_or_else(|| format!("it runs; its log: {}", self.log_tail()))
        })
    }

    /// Lets it run on without us; the end of its namespace is its end.
    pub fn detach(mut self) {
        self.child = None;
    }

    fn exit_status(&self) -> Option<ExitStatus> {
        lock(self.child.as_ref()?).try_wait().ok().flatten()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &self.child {
            let mut child = lock(child);
            // It may have ended already; `wait` then only reaps it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A panic of another thread leaves a child as good as it was.
fn lock(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}
