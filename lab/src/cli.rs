//! `rvs lab`: the lab from the command line.

use std::io::Write;
use std::process::ExitCode;

use crate::demo;
use crate::director::{Director, Hook};
use crate::error::{Error, Result};
use crate::lab::{Lab, State};
use crate::layouts::{Layout, Options};

#[derive(Debug, Clone, clap::Subcommand)]
pub enum Command {
    /// Build a lab that stays, with rvsd running in it
    Up {
        /// Letters and digits
        #[arg(default_value = "demo")]
        name: String,
        #[arg(long, value_enum, default_value_t)]
        layout: Layout,
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
        servers: u8,
        /// Where the data plane takes packets from; without it rvsd chooses
        #[arg(long, value_enum)]
        hook: Option<Hook>,
        /// Start no rvsd
        #[arg(long)]
        no_director: bool,
    },
    /// Show the labs there are
    Status,
    /// Build a lab, show all forwarding methods at work in it, and take it down
    Run(demo::Args),
    /// End a lab; without a name all but those that another process uses
    Down { name: Option<String> },
}

/// Exit code after SIGINT, as shells count it.
const INTERRUPTED: i32 = 130;

/// Runs the command; 0 done, 1 refused or found wrong, with the reason on standard error.
pub fn main(command: &Command) -> ExitCode {
    match run(command) {
        Ok(wrong) if wrong.is_empty() => ExitCode::SUCCESS,
        Ok(wrong) => {
            wrong.iter().for_each(|line| eprintln!("rvs lab: {line}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("rvs lab: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Ctrl-C and SIGTERM end the labs of this process before the process.
fn end_labs_when_interrupted() -> Result<()> {
    let handler = || {
        let own = |state: &State| *state == State::InUse(std::process::id());
        for (name, _) in Lab::all().into_iter().filter(|(_, state)| own(state)) {
            if let Err(error) = Lab::down(&name) {
                eprintln!("rvs lab: {error}");
            }
        }
        std::process::exit(INTERRUPTED);
    };
    ctrlc::set_handler(handler).map_err(|e| Error::unexpected("cannot listen for signals", e))
}

/// Returns what was found wrong, a line each.
fn run(command: &Command) -> Result<Vec<String>> {
    end_labs_when_interrupted()?;
    match command {
        Command::Up { name, layout, servers, hook, no_director } => {
            up(name, *layout, &Options { servers: *servers, ..Options::default() }, *hook, !no_director)?;
        }
        Command::Status => status()?,
        Command::Run(args) => {
            let wrong = demo::run(args)?;
            println!(
                "{}",
                if wrong.is_empty() {
                    "all cases are as they should be"
                } else {
                    "not all cases are as they should be"
                }
            );
            return Ok(wrong);
        }
        Command::Down { name } => down(name.as_deref())?,
    }
    Ok(Vec::new())
}

fn up(name: &str, layout: Layout, options: &Options, hook: Option<Hook>, with_rvsd: bool) -> Result<()> {
    let options = Options { offload: hook == Some(Hook::Tc), ..*options };
    let lab = Lab::up_as(name, &layout.topology(&options))?;
    if with_rvsd {
        let interfaces: Vec<_> = layout.director_interfaces().iter().map(|&i| (i, hook)).collect();
        let director = Director::start(lab.node("director")?, &interfaces)?;
        say(&format!("export RVS_SOCKET={}\n", director.socket().display()));
        director.keep();
    }
    say(&described(&lab));
    lab.keep()
}

fn status() -> Result<()> {
    for (name, state) in Lab::all() {
        match state {
            State::Kept => say(&described(&Lab::attach(&name)?)),
            State::InUse(pid) => say(&format!("lab {name}: used by process {pid}\n")),
            State::Leftover => say(&format!("lab {name}: left over; 'rvs lab down {name}' removes it\n")),
        }
    }
    Ok(())
}

fn down(name: Option<&str>) -> Result<()> {
    if let Some(name) = name {
        return Lab::down(name);
    }
    let ended =
        Lab::all().into_iter().filter(|(_, state)| !matches!(state, State::InUse(_))).map(|(name, _)| Lab::down(&name));
    // All are tried; the first failure is told.
    ended.collect::<Vec<_>>().into_iter().collect()
}

/// On standard output; if nobody reads it, the lab is up all the same.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn described(lab: &Lab) -> String {
    let topology = lab.topology();
    let vips: Vec<String> = topology.vips.iter().map(ToString::to_string).collect();
    let mut text = format!("lab {} ({}), VIP {}\n", lab.name(), topology.name, vips.join(" and "));
    for node in lab.nodes() {
        let running = node.ns().processes().map(|pids| pids.len()).unwrap_or_default();
        let path = node.ns().path();
        text += &format!("  {:<10} nsenter --net={} COMMAND    ({running} processes)\n", node.name(), path.display());
        for end in topology.ends(node.name()).filter(|e| !e.addresses.is_empty()) {
            let addresses: Vec<String> = end.addresses.iter().map(ToString::to_string).collect();
            text += &format!("             {} {}\n", end.interface, addresses.join(" "));
        }
    }
    text
}
