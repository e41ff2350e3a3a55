//! Every command of every recording of the stock tools, run through the same entry points as the binaries, and compared
//! byte for byte. What the kernel's hash decides is sorted, ports of clients and times are masked.

use std::collections::BTreeSet;

use clap::Parser;
use rvs_cli::rvs::{Query, run as run_rvs};
use rvs_control::capability::Capabilities;
use rvs_control::model::{Proto, ServiceKey};

use crate::transcript::{Event, parse};
use crate::world::{Outcome, Server, World};

const RECORDINGS: [(&str, &str); 6] = [
    ("01-empty", include_str!("../../../testdata/cli/01-empty.txt")),
    ("02-modes-ipv4", include_str!("../../../testdata/cli/02-modes-ipv4.txt")),
    ("03-modes-ipv6", include_str!("../../../testdata/cli/03-modes-ipv6.txt")),
    ("04-displays", include_str!("../../../testdata/cli/04-displays.txt")),
    ("06-errors", include_str!("../../../testdata/cli/06-errors.txt")),
    ("08-daemon", include_str!("../../../testdata/cli/08-daemon.txt")),
];

const RATES: &str = "a rate depends on when in the last seconds each connection came, which the recording does not say";

/// Lines that can't be the recorded ones yet: recording, command, the lines' beginnings, why.
const PENDING: &[(&str, &str, &[&str], &str)] = &[
    ("04-displays", "ipvsadm -Ln --rate", RATED, RATES),
    ("04-displays", "ipvsadm -Ln --rate --exact", RATED, RATES),
    ("04-displays", "ipvsadm -Ln --rate -t 172.16.0.80:80", RATED_80, RATES),
    ("04-displays", "cat /proc/net/ip_vs_stats", &["       1        7        5"], RATES),
    ("04-displays", "cat /proc/net/ip_vs_stats_percpu", &["           1        7        5"], RATES),
];

const RATED: &[&str] = &[
    "TCP  172.16.0.80:80 ",
    "  -> 10.0.0.11:8080 ",
    "  -> 10.0.0.12:8080 ",
    "  -> 10.0.0.13:8080 ",
    "TCP  172.16.0.80:443 ",
    "  -> 10.0.0.11:443 ",
    "TCP  172.16.0.80:8443 ",
    "TCP  [fd00:c::80]:80 ",
    "  -> [fd00:5::11]:80 ",
    "  -> [fd00:5::12]:80 ",
];
const RATED_80: &[&str] =
    &["TCP  172.16.0.80:80 ", "  -> 10.0.0.11:8080 ", "  -> 10.0.0.12:8080 ", "  -> 10.0.0.13:8080 "];

#[test]
fn every_command_of_every_recording() {
    let mut report = Report::default();
    for (name, text) in RECORDINGS {
        Replay::new(name).run(&parse(text), &mut report);
    }
    println!(
        "{} commands, {} lines compared, {} lines pending ({} named)",
        report.commands,
        report.lines,
        report.pending.len(),
        PENDING.len()
    );
    assert!(report.mismatches.is_empty(), "{}", report.mismatches.join("\n"));
    for (name, command, prefixes, _) in PENDING {
        for prefix in *prefixes {
            let used = report.pending.iter().any(|(n, c, line)| n == name && c == command && line.starts_with(prefix));
            assert!(used, "pending line passes now, or is not there: {name}: {command}: {prefix:?}");
        }
    }
    // The files are whole, and the parser found what is in them.
    assert!(report.commands >= 400, "only {} commands", report.commands);
    assert!(report.lines >= 1300, "only {} lines", report.lines);
}

/// A line of `rvs`, as far as these recordings need it.
#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    query: Query,
}

#[derive(Default)]
struct Report {
    commands: usize,
    lines: usize,
    mismatches: Vec<String>,
    pending: BTreeSet<(String, String, String)>,
}

/// One recording being played back.
struct Replay {
    name: &'static str,
    world: World,
    /// What `ipvsadm-save` printed.
    saved: Option<String>,
}

impl Replay {
    fn new(name: &'static str) -> Self {
        Replay { name, world: World::new(Capabilities::all()), saved: None }
    }

    fn run(&mut self, events: &[Event], report: &mut Report) {
        let mut heading = "";
        let mut loose: Vec<String> = Vec::new();
        for event in events {
            if !matches!(event, Event::Loose(_)) {
                self.loose_lines(heading, &std::mem::take(&mut loose), report);
            }
            match event {
                Event::Heading(text) => {
                    heading = text;
                    self.heading(text);
                }
                Event::Loose(line) => loose.push(line.clone()),
                Event::Typed { at, command, output, exit } => {
                    report.commands += 1;
                    if at == "client#" {
                        self.traffic(command, output);
                    } else {
                        self.typed(at, command, output, *exit, report);
                    }
                }
            }
        }
        self.loose_lines(heading, &loose, report);
    }

    /// Each mode was recorded on an empty table, right away: the estimator had not summed the counters yet.
    fn heading(&mut self, text: &str) {
        if text.starts_with("mode ") {
            self.world = World::new(Capabilities::all());
            self.world.estimator_ran = false;
        }
    }

    fn loose_lines(&mut self, heading: &str, lines: &[String], report: &mut Report) {
        let of_kernel = |line: &String| line.starts_with('[') && line.contains("] IPVS: ");
        if lines.is_empty() || lines.iter().all(of_kernel) {
            return;
        }
        if lines == ["diff exit 0"] {
            // What was saved is what the restored table saves.
            let again = self.world.ipvsadm(&["-S", "-n"], "", true);
            assert_eq!(Some(again.stdout), self.saved);
            return;
        }
        assert!(heading.starts_with("ipvsadm-save -n"), "{}: {lines:?}", self.name);
        let outcome = self.world.ipvsadm(&["-S", "-n"], "", true);
        self.saved = Some(outcome.stdout.clone());
        self.compare("ipvsadm-save -n", lines, None, &outcome, report);
    }

    fn typed(&mut self, at: &str, command: &str, output: &[String], exit: Option<u8>, report: &mut Report) {
        if let Some(file) = command.strip_prefix("cat /proc/net/") {
            let outcome = self.proc_file(file);
            if file == "ip_vs_status" {
                // No kernel of these recordings has it; `cat` said so in its own words.
                assert_eq!((exit, outcome.exit), (Some(1), 2));
                return;
            }
            return self.compare(command, output, exit, &outcome, report);
        }
        let outcome = if let Some((text, rest)) = command.strip_prefix("printf ").and_then(|c| c.rsplit_once(" | ")) {
            let text = text.trim_matches('"').replace("\\n", "\n");
            self.ipvsadm(rest, &text, true)
        } else if command == "ipvsadm-restore < saved" {
            let saved = self.saved.clone().expect("saved before");
            self.ipvsadm("ipvsadm -R", &saved, true)
        } else if at == "lb$" {
            self.ipvsadm(command.strip_prefix("(uid nobody) ").unwrap_or(command), "", false)
        } else {
            self.ipvsadm(command, "", true)
        };
        self.compare(command, output, exit, &outcome, report);
    }

    fn ipvsadm(&mut self, line: &str, stdin: &str, is_root: bool) -> Outcome {
        // Split at every blank: a blank at the end is an empty argument.
        let mut words = line.split(' ');
        assert_eq!(words.next(), Some("ipvsadm"), "{line}");
        self.world.ipvsadm(&words.collect::<Vec<_>>(), stdin, is_root)
    }

    fn proc_file(&mut self, file: &str) -> Outcome {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = match Line::try_parse_from(["rvs", "proc", file]) {
            Ok(line) => run_rvs(&line.query, &mut stdout, &mut stderr, &mut self.world),
            Err(error) => u8::try_from(error.exit_code()).unwrap(),
        };
        Outcome { stdout: String::from_utf8(stdout).unwrap(), stderr: String::from_utf8(stderr).unwrap(), exit }
    }

    /// `curl ... http://host[:port]/`; the reply names the server: `rs3 client-address server-address:port`.
    fn traffic(&mut self, command: &str, output: &[String]) {
        let url = command.rsplit(' ').next().unwrap();
        let host = url.strip_prefix("http://").and_then(|u| u.strip_suffix('/')).expect(url);
        let (addr, port) = match host.rsplit_once(':') {
            Some((addr, port)) if !addr.starts_with('[') || addr.ends_with(']') => (addr, port.parse().unwrap()),
            _ => (host, 80),
        };
        let addr = addr.trim_matches(['[', ']']).parse().expect(url);
        let [reply] = output else { panic!("{command}: {output:?}") };
        let number = reply.strip_prefix("rs").and_then(|r| r[..1].parse().ok()).expect(reply);
        let key = ServiceKey::Virtual { proto: Proto::Tcp, addr, port };
        self.world.http_request(host, key, &Server(number), &format!("{reply}\n"));
    }

    fn compare(&self, command: &str, expected: &[String], exit: Option<u8>, actual: &Outcome, report: &mut Report) {
        let text = format!("{}{}", actual.stdout, actual.stderr);
        let actual_lines: Vec<String> =
            text.strip_suffix('\n').map(|t| t.split('\n').map(str::to_owned).collect()).unwrap_or_default();
        let shape = Shape::of(command);
        let (expected, actual_lines) = (shape.normal(expected), shape.normal(&actual_lines));
        let mut complain = |what: String| report.mismatches.push(format!("{}: {command}\n{what}", self.name));
        if exit.is_some_and(|exit| exit != actual.exit) {
            complain(format!("  exit {} instead of {exit:?}", actual.exit));
        }
        if expected.len() != actual_lines.len() {
            let (e, a) = (expected.join("\n"), actual_lines.join("\n"));
            return complain(format!("--- recorded\n{e}\n--- now\n{a}"));
        }
        for (want, have) in expected.iter().zip(&actual_lines) {
            report.lines += 1;
            if want != have {
                match pending(self.name, command, want) {
                    true => {
                        report.pending.insert((self.name.into(), command.into(), want.clone()));
                    }
                    false => report
                        .mismatches
                        .push(format!("{}: {command}\n  recorded {want:?}\n  now      {have:?}", self.name)),
                }
            }
        }
    }
}

fn pending(name: &str, command: &str, line: &str) -> bool {
    PENDING
        .iter()
        .any(|(n, c, prefixes, _)| *n == name && *c == command && prefixes.iter().any(|p| line.starts_with(p)))
}

/// What of an output is not the command's own doing.
#[derive(Clone, Copy)]
enum Shape {
    Exact,
    /// Services in an order of the kernel's hash, each with its dests in order.
    Blocks {
        title: usize,
    },
    /// Connections in any order, with the client's port and the time masked.
    Connections {
        title: usize,
    },
    /// Which CPU counted what is masked.
    PerCpu,
}

impl Shape {
    fn of(command: &str) -> Shape {
        match command {
            "cat /proc/net/ip_vs" | "ipvsadm -Ln --nosort" => Shape::Blocks { title: 3 },
            "cat /proc/net/ip_vs_conn" | "cat /proc/net/ip_vs_conn_sync" => Shape::Connections { title: 1 },
            "cat /proc/net/ip_vs_stats_percpu" => Shape::PerCpu,
            c if c.starts_with("ipvsadm -Lnc") || c.starts_with("ipvsadm -Lc") => Shape::Connections { title: 2 },
            _ => Shape::Exact,
        }
    }

    fn normal(self, lines: &[String]) -> Vec<String> {
        match self {
            Shape::Exact => lines.to_vec(),
            Shape::Blocks { title } => {
                let (head, body) = lines.split_at(title.min(lines.len()));
                let mut blocks: Vec<Vec<String>> = Vec::new();
                for line in body {
                    match blocks.last_mut() {
                        Some(block) if line.starts_with("  -> ") => block.push(line.clone()),
                        _ => blocks.push(vec![line.clone()]),
                    }
                }
                blocks.sort();
                head.iter().cloned().chain(blocks.into_iter().flatten()).collect()
            }
            Shape::Connections { title } => {
                let (head, body) = lines.split_at(title.min(lines.len()));
                let mut rows: Vec<String> = body.iter().map(|line| masked_connection(line)).collect();
                rows.sort();
                head.iter().cloned().chain(rows).collect()
            }
            Shape::PerCpu => lines.iter().map(|line| masked_cpu(line)).collect(),
        }
    }
}

/// Replaces digits of the word at `index` from `start` on, and keeps everything's width.
fn mask_word(line: &str, index: usize, from: impl Fn(&str) -> usize) -> String {
    let word = line.split_ascii_whitespace().nth(index).unwrap_or_default();
    let at = word.as_ptr() as usize - line.as_ptr() as usize;
    let (kept, masked) = word.split_at(from(word));
    let hashes: String = masked.chars().map(|c| if c.is_ascii_alphanumeric() { '#' } else { c }).collect();
    format!("{}{kept}{hashes}{}", &line[..at], &line[at + word.len()..])
}

fn masked_connection(line: &str) -> String {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let is_proc = !words[1].contains(':') || words.len() > 8;
    if is_proc {
        let line = mask_word(line, words.len() - 1, |_| 0);
        // A template has no client port.
        return if words[2] == "0000" { line } else { mask_word(&line, 2, |_| 0) };
    }
    let line = mask_word(line, 1, |_| 0);
    if words[3].ends_with(":0") { line } else { mask_word(&line, 3, |word| word.rfind(':').unwrap()) }
}

/// A CPU's line has five columns of fixed width behind its number.
fn masked_cpu(line: &str) -> String {
    let is_cpu = line.get(..3).is_some_and(|number| number.trim().parse::<u32>().is_ok());
    if is_cpu && line.len() == 3 + 3 * 9 + 2 * 17 { format!("{} #", &line[..3]) } else { line.to_owned() }
}

#[test]
fn masks_keep_widths() {
    let line = "TCP 01:57  TIME_WAIT   [fd00:c::100]:38648 [fd00:c::80]:80    [fd00:5::12]:80";
    let want = "TCP ##:##  TIME_WAIT   [fd00:c::100]:##### [fd00:c::80]:80    [fd00:5::12]:80";
    assert_eq!(masked_connection(line), want);
    let line = "TCP AC100000 0000 AC100050 01BB 0A00000B 01BB ASSURED          46";
    assert_eq!(masked_connection(line), "TCP AC100000 0000 AC100050 01BB 0A00000B 01BB ASSURED          ##");
    let line = "TCP fd00:000c:0000:0000:0000:0000:0000:0100 96F8 fd00:000c:0000:0000:0000:0000:0000:0080 0050 \
                fd00:0005:0000:0000:0000:0000:0000:0012 0050 TIME_WAIT       116";
    assert!(masked_connection(line).contains(":0100 #### fd00"));
    assert!(masked_connection(line).ends_with("TIME_WAIT       ###"));
    assert_eq!(masked_cpu("  1        E       48       2D             1449             1084"), "  1 #");
}
