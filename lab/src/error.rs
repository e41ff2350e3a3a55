//! What can go wrong in a lab, with the operands a reader needs to mend it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Each variant says what was tried, where, and what came of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A topology that contradicts itself, found before anything was made.
    #[error("the topology '{topology}' can't be: {why}")]
    Topology { topology: String, why: String },
    /// A command that could not be started: not installed, or no permission.
    #[error("{place}: cannot run '{command}': {source} (is it installed? './x setup lab' installs what the lab runs)")]
    Start { place: String, command: String, source: io::Error },
    /// A command that ran and said no.
    #[error("{place}: '{command}' failed ({status}): {said}")]
    Command { place: String, command: String, status: String, said: String },
    /// A condition that did not come true in time; `last` is what was seen instead.
    #[error("waited {waited:?} for {what}: {last}")]
    Timeout { what: String, waited: Duration, last: String },
    /// A file, folder or system call of the lab itself.
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    /// A lab, node or program that is not there.
    #[error("{0}")]
    Missing(String),
    /// An answer from a server, a director or a file that is not what it should be.
    #[error("{what}: {why}")]
    Unexpected { what: String, why: String },
}

impl Error {
    /// For `map_err`: an I/O error with what was being done.
    pub(crate) fn io(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        let what = what.to_string();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn file(verb: &str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        Self::io(format!("cannot {verb} {}", path.into().display()))
    }

    pub(crate) fn unexpected(what: impl fmt::Display, why: impl fmt::Display) -> Self {
        Self::Unexpected { what: what.to_string(), why: why.to_string() }
    }
}
