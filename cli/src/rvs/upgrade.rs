//! `rvs upgrade`: another rvsd in the place of the running one, while packets come; and what that would come to.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rvs_control::api::{RequestBody, ResponseBody, TablesReport, Upgrade, UpgradeReport};

use super::Error;
use super::conntable;
use super::show::{put, put_json};
use crate::backend::{Backend, BackendError, Client, unexpected};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only say what it would come to
    #[arg(long)]
    check: bool,
    /// The new rvsd [default: what is now where the running one was started from]
    #[arg(long, value_name = "PROGRAM")]
    rvsd: Option<PathBuf>,
    /// Print a JSON object (with --check)
    #[arg(long, requires = "check")]
    json: bool,
}

/// The new rvsd loads its programs: a verifier on a slow machine takes its time.
const START: Duration = Duration::from_secs(120);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(50);

pub fn run(args: &Args, backend: &mut dyn Backend, stdout: &mut dyn Write) -> Result<(), Error> {
    let report = ask(args, args.check, &mut Client::open(backend)?)?;
    if args.json {
        return put_json(stdout, &report);
    }
    put(stdout, &plan(&report))?;
    if args.check {
        return Ok(());
    }
    stdout.flush().map_err(Error::Output)?;
    // The old one goes without a word.
    while backend.receive().is_ok() {}
    let begun = Instant::now();
    loop {
        match look(backend) {
            Ok(TablesReport { moving: None, .. }) => break,
            Ok(_) => {}
            // (Not there yet.)
            Err(BackendError::Unreachable { .. } | BackendError::Lost(_) | BackendError::Closed)
                if begun.elapsed() < START => {}
            Err(error) => return Err(Error::NotBack(error)),
        }
        std::thread::park_timeout(LOOK);
    }
    let now = ask(args, true, &mut Client::open(backend)?)?;
    if now.from != report.to {
        return Err(Error::NotUpgraded(now.from));
    }
    put(stdout, &format!("{} is at work; all connections are in its tables\n", report.program.display()))
}

fn ask(args: &Args, check: bool, client: &mut Client<'_>) -> Result<UpgradeReport, Error> {
    let mut report = None;
    // (rvsd has another folder of its own.)
    let program = args.rvsd.as_ref().map(|p| std::path::absolute(p).unwrap_or_else(|_| p.clone()));
    let upgrade = Upgrade { program, check };
    client.query(RequestBody::Upgrade(upgrade), |body| match body {
        ResponseBody::Upgrade(found) => {
            report = Some(*found);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    report.ok_or_else(|| unexpected(&ResponseBody::Done).into())
}

fn look(backend: &mut dyn Backend) -> Result<TablesReport, BackendError> {
    conntable::report(&mut Client::open(backend)?)
}

fn plan(r: &UpgradeReport) -> String {
    let mut text = format!("{}, version {}\n", r.program.display(), r.version);
    if r.from == r.to {
        text.push_str(&format!("layout {}: as it is, nothing is moved\n", r.to));
        return text;
    }
    text.push_str(&format!(
        "layout {} -> {}: {} IPv4 and {} IPv6 connections to be moved\n",
        r.from, r.to, r.flows[0], r.flows[1]
    ));
    text.push_str(&format!(
        "{} MiB, beside the old ones for a while: {}\n",
        r.memory.div_ceil(1 << 20),
        r.maps.join(", ")
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_as_text() {
        let report = UpgradeReport {
            program: "/usr/sbin/rvsd".into(),
            version: "0.2.0".into(),
            from: "0123456789abcdef".into(),
            to: "fedcba9876543210".into(),
            flows: [1000, 20],
            memory: (48 << 20) + 1,
            maps: vec!["CONFIG".into(), "CONN4".into()],
        };
        let should_be = "/usr/sbin/rvsd, version 0.2.0
layout 0123456789abcdef -> fedcba9876543210: 1000 IPv4 and 20 IPv6 connections to be moved
49 MiB, beside the old ones for a while: CONFIG, CONN4
";
        assert_eq!(plan(&report), should_be);
        let same = UpgradeReport { to: report.from.clone(), ..report };
        assert_eq!(plan(&same), "/usr/sbin/rvsd, version 0.2.0\nlayout 0123456789abcdef: as it is, nothing is moved\n");
    }
}
