//! What the firewall tools of this host print, for `rvs_control::firewall`. Nothing is changed: the save and list
//! commands only read.

use std::io::{self, Read};
use std::process::{Child, Command, Stdio};

use rvs_control::firewall::{Reading, Tool};

/// Where the tools are, beside PATH: daemons and users often lack the sbin folders.
const SBIN: &str = "/usr/sbin:/sbin";
/// Bytes of rules that are read from one tool; some hundred thousand rules.
const TEXT_MAX: u64 = 64 << 20;

/// Each tool by its own name and, where both variants may be installed, by the name of the variant that the own name
/// may not stand for.
const COMMANDS: [(Tool, &[&str]); 8] = [
    (Tool::Nft, &["nft", "-j", "list", "ruleset"]),
    (Tool::Iptables, &["iptables-save"]),
    (Tool::Iptables, &["iptables-legacy-save"]),
    (Tool::Iptables, &["iptables-nft-save"]),
    (Tool::Ip6tables, &["ip6tables-save"]),
    (Tool::Ip6tables, &["ip6tables-legacy-save"]),
    (Tool::Ip6tables, &["ip6tables-nft-save"]),
    (Tool::Arptables, &["arptables-save"]),
];

/// A tool that is there but did not answer; its rules are not known.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the firewall rules with {command}: {why}")]
pub struct FirewallError {
    pub command: String,
    pub why: String,
}

/// Ask every tool that is installed, in the calling thread's network namespace. Blocks while they run (milliseconds to
/// seconds with very many rules).
pub fn readings() -> (Vec<Reading>, Vec<FirewallError>) {
    ask(&COMMANDS)
}

/// Ask only what knows of ARP rules.
pub fn arp_readings() -> (Vec<Reading>, Vec<FirewallError>) {
    let knows: Vec<_> = COMMANDS.into_iter().filter(|(tool, _)| matches!(tool, Tool::Nft | Tool::Arptables)).collect();
    ask(&knows)
}

fn ask(commands: &[(Tool, &[&str])]) -> (Vec<Reading>, Vec<FirewallError>) {
    let mut readings = Vec::new();
    let mut errors = Vec::new();
    for (tool, command) in commands {
        match run(command) {
            Ok(Some(text)) => readings.push(Reading { tool: *tool, text }),
            Ok(None) => {}
            Err(why) => errors.push(FirewallError { command: command.join(" "), why }),
        }
    }
    (readings, errors)
}

/// The command's output; `None` when there is no such program.
fn run(command: &[&str]) -> Result<Option<String>, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let [program, args @ ..] = command else { return Ok(None) };
    let spawned = Command::new(program)
        .args(args)
        .env("PATH", format!("{path}:{SBIN}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    match spawned {
        Ok(child) => output(child).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

fn output(mut child: Child) -> Result<String, String> {
    let read = |stream: Option<&mut dyn Read>, limit: u64| {
        let mut bytes = Vec::new();
        stream.map_or(Ok(0), |stream| stream.take(limit + 1).read_to_end(&mut bytes)).map(|_| bytes)
    };
    // The tools say little on stderr, less than a pipe holds, so it may wait until stdout is at its end.
    let text = read(child.stdout.as_mut().map(|s| s as &mut dyn Read), TEXT_MAX);
    if text.as_ref().is_ok_and(|bytes| bytes.len() as u64 > TEXT_MAX) {
        let _ = child.kill();
        let _ = child.wait();
        return Err(format!("more than {TEXT_MAX} bytes of rules"));
    }
    let complaint = read(child.stderr.as_mut().map(|s| s as &mut dyn Read), 4096).unwrap_or_default();
    let status = child.wait().map_err(|error| error.to_string())?;
    if !status.success() {
        let complaint = String::from_utf8_lossy(&complaint);
        return Err(format!("{status}: {}", complaint.lines().next().unwrap_or_default()));
    }
    String::from_utf8(text.map_err(|error| error.to_string())?).map_err(|_| "its output is not UTF-8".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_no_error_and_a_failing_one_is() {
        assert_eq!(run(&["rvs-no-such-tool"]), Ok(None));
        assert_eq!(run(&["echo", "rules"]), Ok(Some("rules\n".into())));
        assert_eq!(run(&["sh", "-c", "echo no rights >&2; exit 3"]), Err("exit status: 3: no rights".into()));
    }
}
