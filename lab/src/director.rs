//! The director's side: rvsd in a node, and the commands that drive it.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::lab::NodeHandle;
use crate::netns::Output;
use crate::process::Process;

/// Loading and attaching takes about a second; a verifier on a slow machine takes longer.
const READY_TIME: Duration = Duration::from_secs(60);
/// The first real server by full NAT has the programs loaded anew: as above.
const COMMAND_TIME: Duration = Duration::from_secs(90);

/// Where rvsd takes packets from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Hook {
    Xdp,
    Skb,
    Tc,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Xdp => "xdp",
            Self::Skb => "skb",
            Self::Tc => "tc",
        })
    }
}

/// A running rvsd; killed with -9 when dropped, which leaves what it pinned until the lab ends.
#[derive(Debug)]
pub struct Director<'a> {
    node: NodeHandle<'a>,
    /// Its program.
    program: &'static str,
    args: Vec<String>,
    process: Option<Process>,
}

impl<'a> Director<'a> {
    /// Starts rvsd in the node and waits until it is ready. Without a hook, rvsd chooses; without interfaces too.
    pub fn start(node: NodeHandle<'a>, interfaces: &[(&str, Option<Hook>)]) -> Result<Self> {
        Self::start_with(node, interfaces, &[])
    }

    /// The same with more options.
    pub fn start_with(node: NodeHandle<'a>, interfaces: &[(&str, Option<Hook>)], options: &[&str]) -> Result<Self> {
        Self::start_as("rvsd", node, interfaces, options)
    }

    /// The same by another program.
    pub fn start_as(
        program: &'static str,
        node: NodeHandle<'a>,
        interfaces: &[(&str, Option<Hook>)],
        options: &[&str],
    ) -> Result<Self> {
        let mut director = Self { node, program, args: Vec::new(), process: None };
        director.args =
            ["--socket".to_owned(), shown(director.socket()), "--pin".to_owned(), shown(director.pins())].into();
        for (interface, hook) in interfaces {
            let hook = hook.map(|h| format!("={h}")).unwrap_or_default();
            director.args.extend(["--interface".to_owned(), format!("{interface}{hook}")]);
        }
        director.args.extend(options.iter().map(|&option| option.to_owned()));
        director.start_again()?;
        Ok(director)
    }

    /// Starts rvsd with the same arguments, after its end.
    pub fn start_again(&mut self) -> Result<()> {
        let process = self.node.spawn("rvsd", Command::new(program(self.program)?).args(&self.args))?;
        process.wait_line("rvsd: ready", READY_TIME)?;
        self.process = Some(process);
        Ok(())
    }

    /// From its next start on it is this program.
    pub fn becomes(&mut self, program: &'static str) {
        self.program = program;
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and waits for its orderly end.
    pub fn stop(&mut self) -> Result<()> {
        let Some(process) = self.process.take() else { return Ok(()) };
        process.signal(Signal::SIGTERM)?;
        process.wait(COMMAND_TIME).map(drop)
    }

    /// Lets rvsd run on when this value is gone.
    pub fn keep(mut self) {
        if let Some(process) = self.process.take() {
            process.detach();
        }
    }

    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    pub fn node(&self) -> NodeHandle<'a> {
        self.node
    }

    /// The folder of its pins.
    pub fn pins(&self) -> PathBuf {
        self.node.dir().join("bpf")
    }

    /// The control socket, for `$RVS_SOCKET`.
    pub fn socket(&self) -> PathBuf {
        self.node.dir().join("rvsd.sock")
    }

    /// Runs `ipvsadm` with the words of this line; fails unless it exits with 0. Returns what it printed.
    pub fn ipvsadm(&self, line: &str) -> Result<String> {
        self.node.ns().run(&mut self.command("ipvsadm", line.split_whitespace())?, "", COMMAND_TIME)
    }

    /// The same whatever the exit code, with this standard input.
    pub fn ipvsadm_output(&self, line: &str, stdin: &str) -> Result<Output> {
        self.node.ns().output(&mut self.command("ipvsadm", line.split_whitespace())?, stdin, COMMAND_TIME)
    }

    /// Runs `rvs` as [`Self::ipvsadm`].
    pub fn rvs(&self, line: &str) -> Result<String> {
        self.node.ns().run(&mut self.command("rvs", line.split_whitespace())?, "", COMMAND_TIME)
    }

    /// How often each verdict was given since the data plane was loaded, drops and others, by its name in `rvs drops`.
    pub fn verdicts(&self) -> Result<Verdicts> {
        let text = self.rvs("drops --json")?;
        Verdicts::parse(&text)
            .ok_or_else(|| Error::unexpected("rvs drops --json", format!("no verdicts in: {}", text.trim())))
    }

    fn command<'w>(&self, name: &str, words: impl Iterator<Item = &'w str>) -> Result<Command> {
        let mut command = Command::new(program(name)?);
        command.args(words).env("RVS_SOCKET", self.socket());
        Ok(command)
    }
}

/// Counters of the data plane's verdicts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdicts(pub BTreeMap<String, u64>);

impl Verdicts {
    /// `[{"reason": NAME, "packets": COUNT}, ...]`
    fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let row = |row: &Value| Some((row.get("reason")?.as_str()?.to_owned(), row.get("packets")?.as_u64()?));
        value.as_array()?.iter().map(row).collect::<Option<_>>().map(Self)
    }

    /// Zero for a name that is not there.
    pub fn of(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// What was added since an earlier reading; names that did not move are left out.
    pub fn since(&self, earlier: &Self) -> Self {
        let grown = self.0.iter().map(|(name, &count)| (name.clone(), count.saturating_sub(earlier.of(name))));
        Self(grown.filter(|&(_, count)| count > 0).collect())
    }

    /// Packets of clients that the data plane itself sent to real servers.
    pub fn to_servers(&self) -> u64 {
        ["dr", "nat", "tun", "fullnat", "fullnat_bare"].iter().map(|name| self.of(name)).sum()
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(|(name, count)| format!("{name} {count}")).collect();
        f.write_str(&all.join("  "))
    }
}

/// A program of RVS: in `$RVS_BIN_DIR`, else beside the running one, else among the release builds of the same target
/// folder (a test runs two folders deeper).
pub fn program(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().ok();
    let up = |levels: usize| own.as_deref().and_then(|p| p.ancestors().nth(levels)).map(Path::to_owned);
    let folders = [
        env::var_os("RVS_BIN_DIR").map(PathBuf::from),
        up(1),
        up(2).map(|d| d.join("release")),
        up(3).map(|d| d.join("release")),
    ];
    let found = folders.into_iter().flatten().map(|f| f.join(name)).find(|p| p.is_file());
    found.ok_or_else(|| {
        Error::Missing(format!("there is no {name}: build it with './x build', or set RVS_BIN_DIR to its folder"))
    })
}

fn shown(path: impl AsRef<OsStr>) -> String {
    path.as_ref().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read_and_subtracted() {
        let rows = |counts: &[(&str, u64)]| {
            let row = |(name, count): &(&str, u64)| format!(r#"{{"reason": "{name}", "packets": {count}}}"#);
            format!("[{}]", counts.iter().map(row).collect::<Vec<_>>().join(","))
        };
        let before = Verdicts::parse(&rows(&[("nat", 5), ("nat_reply", 4), ("not_ip", 3)])).unwrap();
        let after = Verdicts::parse(&rows(&[("nat", 15), ("nat_reply", 4), ("not_ip", 4), ("dr", 2)])).unwrap();
        let grown = after.since(&before);
        assert_eq!(grown.to_string(), "dr 2  nat 10  not_ip 1");
        assert_eq!((grown.to_servers(), grown.of("nat_reply")), (12, 0));
        for text in ["", "{}", "[1]", r#"[{"reason": "nat", "packets": -1}]"#] {
            assert_eq!(Verdicts::parse(text), None, "{text}");
        }
    }
}
