//! `rvs`: what RVS shows and does beyond `ipvsadm`. One module a subcommand.
//!
//! Exit codes: 0 done, 1 refused (the reason on stderr, one line, then detail), 2 usage.

mod conntable;
mod proc;
mod service;
mod set;
mod show;
mod trace;
mod upgrade;
mod why;

use std::io::{ErrorKind, Write};

use clap::Subcommand;

pub use proc::File;

use crate::backend::{Backend, BackendError, Client};

const EXIT_REFUSED: u8 = 1;
const EXIT_USAGE: u8 = 2;

/// The subcommands that ask rvsd something. What needs no rvsd has its own module beside this one; the binary joins
/// them.
#[derive(Debug, Subcommand)]
pub enum Query {
    /// Print a file of IPVS's in /proc/net, as the kernel would
    Proc {
        #[arg(value_enum, default_value = "ip_vs")]
        file: File,
    },
    /// Show what became of packets, by reason: forwarded, answered, passed or dropped
    Drops {
        /// Print a JSON array of {"reason", "packets"}
        #[arg(long)]
        json: bool,
    },
    /// Say whether rvsd is ready, and how its data plane sits on the interfaces
    Status {
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// The connection tables: how full they are, and another size for them while packets come
    #[command(subcommand)]
    Conntable(conntable::Args),
    /// Another version of rvsd in the place of the running one: connections and packets go on
    Upgrade(upgrade::Args),
    /// Rate limits, SYN cookies and PROXY headers of services
    #[command(subcommand)]
    Service(service::Args),
    /// Show or change a setting of the whole director: the kernel's net.ipv4.vs.* by their names
    Set(set::Args),
    /// Say what would become of a packet now, and why, without sending it
    Why(why::Args),
    /// Show packets as they come, with what becomes of them
    Trace(trace::Args),
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("can't write the output: {0}")]
    Output(std::io::Error),
    #[error("can't write JSON: {0}")]
    Json(serde_json::Error),
    #[error("{0}")]
    Usage(String),
    #[error("the new rvsd does not answer: {0}; its log says why, and packets are forwarded as before")]
    NotBack(BackendError),
    #[error("the layout is {0} still: the log of rvsd says why; packets are forwarded as before")]
    NotUpgraded(String),
    #[error("can't write {path}: {error}")]
    Pcap { path: String, error: pcap_file::PcapError },
}

/// Asks `backend` and returns the exit code.
pub fn run(query: &Query, stdout: &mut dyn Write, stderr: &mut dyn Write, backend: &mut dyn Backend) -> u8 {
    let done = ask(query, stdout, stderr, backend).and_then(|()| stdout.flush().map_err(Error::Output));
    match done {
        Ok(()) => 0,
        // Whoever reads has seen enough.
        Err(Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => EXIT_REFUSED,
        Err(error) => {
            complain(stderr, &error);
            if matches!(error, Error::Usage(_)) { EXIT_USAGE } else { EXIT_REFUSED }
        }
    }
}

fn ask(query: &Query, stdout: &mut dyn Write, stderr: &mut dyn Write, backend: &mut dyn Backend) -> Result<(), Error> {
    if let Query::Upgrade(args) = query {
        return upgrade::run(args, backend, stdout);
    }
    let mut client = Client::open(backend)?;
    match query {
        Query::Proc { file } => proc::print(*file, &mut client, stdout),
        Query::Drops { json } => show::drops(*json, &mut client, stdout),
        Query::Status { json } => show::status(*json, &mut client, stdout),
        Query::Conntable(args) => conntable::run(args, &mut client, stdout),
        Query::Service(args) => service::run(args, &mut client, stdout),
        Query::Set(args) => set::run(args, &mut client, stdout),
        Query::Why(args) => why::print(args, &mut client, stdout),
        Query::Trace(args) => trace::print(args, &mut client, stdout, stderr),
        // Done above: it makes more than one connection.
        Query::Upgrade(_) => Ok(()),
    }
}

/// The reason in one line, then detail; if nobody takes it there is nobody to tell.
fn complain(stderr: &mut dyn Write, error: &Error) {
    let _ = writeln!(stderr, "rvs: {error}");
    let detail: Vec<String> = match error {
        Error::Backend(BackendError::Unreachable { .. }) => {
            vec!["Start it with `systemctl start rvsd`, or name its socket with --socket or $RVS_SOCKET.".into()]
        }
        Error::Backend(BackendError::Permission { .. }) => vec!["Only root may talk to rvsd.".into()],
        Error::Backend(BackendError::Refused(refusal)) => refusal.detail.clone(),
        _ => Vec::new(),
    };
    for line in detail {
        let _ = writeln!(stderr, "  {line}");
    }
}
