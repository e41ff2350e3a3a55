//! Two directors, given the same commands and the same packets; what they answer and send is compared.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use anyhow::Result;
use rvs_fixtures::frame::GUE_PORT;
use rvs_fixtures::replay::masked;
use rvs_fixtures::world::{BOTH, SERVERS, server_mac};
use rvs_lab::eventually;
use rvs_lab::netns::Output;

use super::side::{Sent, Side};

/// Something that is otherwise by design, with the row of `docs/compatibility.md` that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub name: &'static str,
    pub why: &'static str,
}

/// What one scenario came to.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub name: String,
    /// Commands given, packets sent to both, and packets that the kernel sent.
    pub commands: u32,
    pub packets: u32,
    pub sent: u32,
    /// Outputs, exit codes and packets that were otherwise, in words.
    pub differences: Vec<String>,
    /// The same, of which a [`Known`] says that it is so by design.
    pub known: BTreeMap<&'static str, u32>,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.known.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let Row { name, commands, packets, sent, differences, .. } = self;
        let (number, known) = (differences.len(), names.join(", "));
        write!(f, "{name:<40} {commands:>8} {packets:>7} {sent:>6} {number:>11}  {known}")
    }
}

pub struct Pair<'a> {
    pub theirs: Side<'a>,
    pub ours: Side<'a>,
    pub rows: Vec<Row>,
    /// What explains a difference now.
    excuse: Option<Known>,
}

impl<'a> Pair<'a> {
    pub fn new(theirs: Side<'a>, ours: Side<'a>) -> Pair<'a> {
        Pair { theirs, ours, rows: Vec::new(), excuse: None }
    }

    /// From here on it is this scenario; the one before is shown.
    pub fn begin(&mut self, name: &str) {
        self.end();
        self.rows.push(Row { name: name.to_owned(), ..Row::default() });
        self.excuse = None;
    }

    /// Differences from here on, in this scenario, are so by design.
    pub fn known(&mut self, known: Option<Known>) {
        self.excuse = known;
    }

    /// Shows the last scenario.
    pub fn end(&self) {
        if let Some(row) = self.rows.last() {
            println!("{row}");
            row.differences.iter().take(TOLD).for_each(|what| println!("  {what}"));
        }
    }

    fn row(&mut self) -> &mut Row {
        if self.rows.is_empty() {
            self.rows.push(Row::default());
        }
        let last = self.rows.len() - 1;
        &mut self.rows[last]
    }

    fn differs(&mut self, what: String) {
        match self.excuse {
            Some(known) => *self.row().known.entry(known.name).or_default() += 1,
            None => self.row().differences.push(what),
        }
    }

    /// The same command on both, with this standard input; exit codes and outputs are compared, after what `plain` makes of the outputs.
    pub fn command(&mut self, line: &str, stdin: &str, plain: impl Fn(&str) -> String) -> Result<()> {
        let ours = self.ours.ipvsadm(line, stdin)?;
        self.row().commands += 1 + stdin.lines().count() as u32;
        if ours.stderr.starts_with("not supported yet: ") {
            // Not for the kernel either, so that both have the same still.
            *self.row().known.entry(NOT_YET.name).or_default() += 1;
            return Ok(());
        }
        let theirs = self.theirs.ipvsadm(line, stdin)?;
        let of = |o: &Output| format!("exit {:?}\n{}{}", o.status.code(), plain(&o.stdout), plain(&o.stderr));
        let (kernel, rvs) = (of(&theirs), of(&ours));
        if kernel != rvs {
            self.differs(format!("ipvsadm {line}\n    kernel: {}\n    RVS:    {}", shown(&kernel), shown(&rvs)));
        }
        Ok(())
    }

    /// A listing that the kernel brings up to date every two seconds only: compared when it is the same, or has had its time.
    pub fn listing(&mut self, line: &str) -> Result<()> {
        // Told by the command below, if they never are.
        let _ = eventually(line, UP_TO_DATE, || {
            let outputs = [&self.theirs, &self.ours].map(|side| side.ipvsadm(line, "").map(|o| o.stdout));
            match outputs {
                [Ok(theirs), Ok(ours)] if theirs == ours => Ok(()),
                _ => Err("otherwise".to_owned()),
            }
        });
        self.ipvsadm(line)
    }

    /// A command whose output is compared as it is.
    pub fn ipvsadm(&mut self, line: &str) -> Result<()> {
        self.command(line, "", str::to_owned)
    }

    /// A setting of `net.ipv4.vs`.
    pub fn set(&mut self, name: &str, value: u32) -> Result<()> {
        self.row().commands += 1;
        self.theirs.set(name, value)?;
        self.ours.set(name, value)
    }

    /// A client's packet to both. The number of the server that the kernel sent it to.
    pub fn client(&mut self, frame: &[u8]) -> Result<Option<u8>> {
        let sent = self.carry(frame, true)?;
        let to = |frame: &Vec<u8>| SERVERS.into_iter().find(|n| frame.starts_with(&server_mac(*n)));
        Ok(sent.back.iter().find_map(to))
    }

    /// A server's packet to both.
    pub fn server(&mut self, frame: &[u8]) -> Result<()> {
        self.carry(frame, false).map(drop)
    }

    fn carry(&mut self, frame: &[u8], from_client: bool) -> Result<Sent> {
        let (theirs, ours) = (self.theirs.carry(frame, from_client)?, self.ours.carry(frame, from_client)?);
        let sent = theirs.count() as u32;
        let row = self.row();
        row.packets += 1;
        row.sent += sent;
        if plain(&theirs) != plain(&ours) {
            let from = if from_client { "client" } else { "server" };
            let verdicts = self.ours.verdicts();
            self.differs(format!(
                "packet of a {from} {}\n    kernel sent {}\n    RVS sent    {}\n    ({verdicts})",
                hex(frame),
                listed(&theirs),
                listed(&ours)
            ));
        }
        Ok(theirs)
    }
}

/// Said for whatever `ipvsadm` refuses so.
pub const NOT_YET: Known = Known {
    name: "not supported yet",
    why: "refused in one line, exit code 1, nothing changed (README, What it can do)",
};

/// Without what its sender is free to choose.
fn plain(sent: &Sent) -> [Vec<Vec<u8>>; 2] {
    let own = BOTH.map(|net| [net.vip(0).ip(), net.own(0).ip()]);
    let all = |frames: &[Vec<u8>]| -> Vec<Vec<u8>> {
        let one = |frame: &Vec<u8>| {
            // The tables' first mask is of MAC addresses, which are the same here.
            let mut bytes = masked(frame, &|address| own.iter().flatten().any(|a| *a == address), &[GUE_PORT]);
            bytes[..12].copy_from_slice(&frame[..12]);
            bytes
        };
        let mut all: Vec<Vec<u8>> = frames.iter().map(one).collect();
        all.sort();
        all
    };
    [all(&sent.front), all(&sent.back)]
}

fn listed(sent: &Sent) -> String {
    let mut text = String::new();
    for (name, frames) in [("client", &sent.front), ("server", &sent.back)] {
        for frame in frames {
            let _ = write!(text, "\n      to a {name} {}", hex(frame));
        }
    }
    if text.is_empty() { "nothing".to_owned() } else { text }
}

/// For the kernel's estimator (2 s) to have come round, in a machine whose deadlines are ten times as long.
const UP_TO_DATE: Duration = Duration::from_secs(1);

/// Differences of a scenario that are told in full.
const TOLD: usize = 3;

/// So many bytes of a packet are shown.
const SHOWN: usize = 110;

fn hex(frame: &[u8]) -> String {
    let more = if frame.len() > SHOWN { format!("... {} bytes", frame.len()) } else { String::new() };
    frame.iter().take(SHOWN).map(|b| format!("{b:02x}")).collect::<String>() + &more
}

fn shown(text: &str) -> String {
    text.trim_end().replace('\n', "\n      ")
}
