//! `ipvsadm`, for rvsd.
#![forbid(unsafe_code)]

use std::io::BufWriter;
use std::process::ExitCode;

use rvs_cli::backend::SocketBackend;
use rvs_cli::ipvsadm::{Io, run};
use rvs_cli::names::SystemResolver;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let io = Io {
        stdin: &mut std::io::stdin().lock(),
        stdout: &mut BufWriter::new(std::io::stdout().lock()),
        stderr: &mut std::io::stderr(),
    };
    let mut backend = SocketBackend::new(&SocketBackend::default_path());
    let is_root = nix::unistd::geteuid().is_root();
    ExitCode::from(run(&args, io, &mut backend, &mut SystemResolver::new(), is_root))
}
