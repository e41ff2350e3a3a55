//! `rvs`: what RVS shows and does beyond `ipvsadm`.
#![forbid(unsafe_code)]

use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rvs_cli::backend::SocketBackend;
use rvs_cli::realserver::{self, Realserver};
use rvs_cli::rvs::{self, Query};

#[derive(Debug, Parser)]
#[command(name = "rvs", version, about = "Shows and controls a Rust Virtual Server", disable_help_subcommand = true)]
struct Cli {
    /// The control socket of rvsd [default: $RVS_SOCKET, or /run/rvs/rvsd.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Query(Query),
    /// Make this host a real server of a director, check that it is one, or put back what was there
    #[command(subcommand)]
    Realserver(Realserver),
    /// Networks of namespaces on this host, with clients, a director and real servers, to try things in
    #[command(subcommand)]
    Lab(rvs_lab::cli::Command),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Lab(command) = &cli.command {
        return rvs_lab::cli::main(command);
    }
    let mut stdout = BufWriter::new(std::io::stdout().lock());
    let mut stderr = std::io::stderr();
    ExitCode::from(match &cli.command {
        Command::Query(query) => {
            let mut backend = SocketBackend::new(&cli.socket.unwrap_or_else(SocketBackend::default_path));
            rvs::run(query, &mut stdout, &mut stderr, &mut backend)
        }
        Command::Realserver(command) => realserver::main(command, &mut stdout, &mut stderr),
        // Done above: it prints by itself.
        Command::Lab(_) => 0,
    })
}
