//! `rvs realserver up|check|down`: this host as a real server of an LVS director.
//!
//! Works in the network namespace it is started in and needs no rvsd. What is right and what mends it is decided by
//! `rvs_control::realserver`; `rvs_sys::realserver` observes and acts.

use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use rvs_control::firewall::Rules;
use rvs_control::realserver::{Finding, GUE_PORT, Mode, Mss, Op, Refused, Wanted, desired};
use rvs_sys::bpf::programs::KernelPrograms;
use rvs_sys::firewall::arp_readings;
use rvs_sys::netlink::{NetError, Netlink};
use rvs_sys::netns::{self, NetnsError};
use rvs_sys::realserver::{self, Down, RealserverError, RecordFile};
use rvs_sys::sysctl::ProcSys;

const EXIT_DONE: u8 = 0;
const EXIT_REFUSED: u8 = 1;

#[derive(Debug, Subcommand)]
pub enum Realserver {
    /// Make this host a real server for the VIPs: the addresses on lo, silent for ARP
    Up(UpArgs),
    /// Say what is wrong with this host as a real server, and the command that mends it
    ///
    /// Exits with 1 when something is wrong. Without --vip: for what the last `up` was told.
    Check(CheckArgs),
    /// Put back what was there before `up`
    Down(DownArgs),
}

#[derive(Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    state: State,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    state: State,
}

#[derive(Debug, Args)]
pub struct DownArgs {
    #[command(flatten)]
    processes: Processes,
    #[command(flatten)]
    state: State,
}

#[derive(Debug, Args)]
struct How {
    /// A virtual address; may be given several times
    #[arg(long = "vip", value_name = "ADDRESS")]
    vips: Vec<IpAddr>,
    /// An address by which a director sends, with --mode fullnat: one of its pool; may be given several times
    #[arg(long = "director", value_name = "ADDRESS")]
    directors: Vec<IpAddr>,
    /// How the director sends to this host
    #[arg(long, value_enum, default_value = "dr")]
    mode: ModeName,
    /// An interface by which requests come; may be given several times [default: all Ethernet interfaces]
    #[arg(long = "interface", value_name = "NAME")]
    interfaces: Vec<String>,
    /// The routers and clients on the link have static ARP entries for the VIPs, so ARP needs no silencing here
    #[arg(long)]
    static_arp: bool,
    /// The UDP port that GUE comes to, with --mode tun
    #[arg(long, value_name = "PORT", default_value_t = GUE_PORT)]
    gue_port: u16,
    /// The largest MSS that clients are told, with --mode tun: off, auto (what a tunnel leaves of the interface's MTU), or bytes
    #[arg(long, value_name = "MSS", default_value_t = Mss::Off)]
    mss: Mss,
    #[command(flatten)]
    processes: Processes,
}

#[derive(Debug, Args)]
struct Processes {
    /// The cgroup whose processes, and those below it, are shown clients' own addresses [default: all of the host]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
}

impl Processes {
    fn programs(&self) -> KernelPrograms {
        KernelPrograms { cgroup: self.cgroup.clone() }
    }
}

#[derive(Debug, Args)]
struct State {
    /// The file that remembers what to put back [default: /run/rvs/realserver.json, or realserver-NAME.json there in
    /// the network namespace NAME]
    #[arg(long = "state", value_name = "FILE")]
    path: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeName {
    Dr,
    Tun,
    Fullnat,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Realserver(#[from] RealserverError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("{0} changes addresses and settings of this host: run it as root")]
    NotRoot(&'static str),
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
}

/// Runs one subcommand; its exit code: 0 done (or nothing wrong), 1 refused (or something wrong).
pub fn main(args: &Realserver, stdout: &mut dyn Write, stderr: &mut dyn Write) -> u8 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.map_err(Error::Output).and_then(|runtime| runtime.block_on(run(args, stdout, stderr)));
    done.unwrap_or_else(|error| {
        // If nobody takes it there is nobody to tell.
        let _ = writeln!(stderr, "rvs: {error}");
        EXIT_REFUSED
    })
}

async fn run(args: &Realserver, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<u8, Error> {
    let code = match args {
        Realserver::Up(args) => up(args, stdout, stderr).await,
        Realserver::Check(args) => check(args, stdout, stderr).await,
        Realserver::Down(args) => down(args, stdout).await,
    }?;
    stdout.flush()?;
    Ok(code)
}

async fn up(args: &UpArgs, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<u8, Error> {
    let wanted = args.how.wanted();
    wanted.check().map_err(RealserverError::from)?;
    must_be_root("realserver up")?;
    let (net, sysctl, programs) = (Netlink::open()?, ProcSys::default(), args.how.processes.programs());
    let ops = realserver::up(&net, &sysctl, &programs, &wanted, arp_rules(stderr), &args.state.record()?).await?;
    for op in &ops {
        match op {
            Op::Set { old, .. } => writeln!(stdout, "{op} (was {old})")?,
            Op::AddAddr { .. } | Op::DelAddr { .. } | Op::Decap { .. } | Op::Directors { .. } => {
                writeln!(stdout, "{op}")?;
            }
        }
    }
    if ops.is_empty() {
        writeln!(stdout, "nothing to do")?;
    }
    // The plan says it is right now; the host has the last word.
    let host = realserver::observe(&net, &sysctl, &programs, arp_rules(stderr)).await?;
    let findings = desired(&wanted, &host).map_err(RealserverError::from)?;
    report(&wanted, &findings, stdout)
}

async fn check(args: &CheckArgs, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<u8, Error> {
    let all = if args.how.vips.is_empty() && args.how.directors.is_empty() {
        args.state.record()?.told()?
    } else {
        vec![args.how.wanted()]
    };
    if all.is_empty() {
        return Err(RealserverError::Refused(Refused::NoVip).into());
    }
    let programs = args.how.processes.programs();
    let host = realserver::observe(&Netlink::open()?, &ProcSys::default(), &programs, arp_rules(stderr)).await?;
    let mut code = EXIT_DONE;
    for wanted in all {
        let findings = desired(&wanted, &host).map_err(RealserverError::from)?;
        code = code.max(report(&wanted, &findings, stdout)?);
    }
    Ok(code)
}

async fn down(args: &DownArgs, stdout: &mut dyn Write) -> Result<u8, Error> {
    must_be_root("realserver down")?;
    match realserver::down(&Netlink::open()?, &ProcSys::default(), &args.processes.programs(), &args.state.record()?)
        .await?
    {
        Down::Nothing => writeln!(stdout, "nothing to put back: there is no record of an `rvs realserver up`")?,
        Down::Restored { notes } => {
            for note in notes {
                writeln!(stdout, "note: {note}")?;
            }
            writeln!(stdout, "everything is as it was before `rvs realserver up`")?;
        }
    }
    Ok(EXIT_DONE)
}

fn report(wanted: &Wanted, findings: &[Finding], stdout: &mut dyn Write) -> Result<u8, Error> {
    for Finding { problem, mend } in findings {
        writeln!(stdout, "wrong: {problem}")?;
        writeln!(stdout, "  why: {}", problem.why())?;
        writeln!(stdout, "  mend: {mend}")?;
    }
    if findings.is_empty() {
        let vips: Vec<String> = wanted.vips.iter().chain(&wanted.directors).map(ToString::to_string).collect();
        let how = match wanted.mode {
            Mode::Dr => "direct routing",
            Mode::Tun => "tunnels",
            Mode::Fullnat => "full NAT, and shows its clients' addresses, from",
        };
        writeln!(stdout, "ready for {how}: {}", vips.join(", "))?;
        return Ok(EXIT_DONE);
    }
    Ok(EXIT_REFUSED)
}

/// ARP rules that may do the job of the settings. A tool that can't be asked only costs that.
fn arp_rules(stderr: &mut dyn Write) -> Rules {
    let (readings, errors) = arp_readings();
    let (rules, unreadable) = Rules::read(&readings);
    let problems = errors.iter().map(ToString::to_string).chain(unreadable.iter().map(ToString::to_string));
    for problem in problems {
        let _ = writeln!(stderr, "rvs: ARP rules are not considered: {problem}");
    }
    rules
}

fn must_be_root(command: &'static str) -> Result<(), Error> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(Error::NotRoot(command)) }
}

impl How {
    fn wanted(&self) -> Wanted {
        let mode = match self.mode {
            ModeName::Dr => Mode::Dr,
            ModeName::Tun => Mode::Tun,
            ModeName::Fullnat => Mode::Fullnat,
        };
        Wanted {
            mode,
            vips: self.vips.clone(),
            directors: self.directors.clone(),
            interfaces: self.interfaces.clone(),
            static_arp: self.static_arp,
            gue_port: self.gue_port,
            mss: self.mss,
        }
    }
}

impl State {
    fn record(&self) -> Result<RecordFile, NetnsError> {
        let namespace = netns::current()?;
        let path = self.path.clone().unwrap_or_else(|| RecordFile::default_path(&namespace));
        Ok(RecordFile::new(path, namespace))
    }
}
