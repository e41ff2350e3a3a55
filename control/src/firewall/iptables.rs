//! The text of iptables-save, ip6tables-save and arptables-save.
//!
//! Never fails: an option that is not known makes its rule a `Maybe`, a line that is no rule is passed over.

use std::net::IpAddr;

use super::{Base, Chain, Family, Hook, Reading, Rule, Test, Tool, Verdict, prefix_range, protocol_number};

/// Whether the text comes from the variant that is a front end of nf_tables.
pub(super) fn is_nf_tables(text: &str) -> bool {
    text.lines().find(|line| line.starts_with('#')).is_some_and(|line| line.contains("(nf_tables)"))
}

/// The chains of the raw, mangle and filter tables.
pub(super) fn parse(number: usize, reading: &Reading) -> Vec<Chain> {
    let family = match reading.tool {
        Tool::Ip6tables => Family::Ip6,
        Tool::Arptables => Family::Arp,
        Tool::Iptables | Tool::Nft => Family::Ip,
    };
    let mut chains: Vec<Chain> = Vec::new();
    let mut table = "";
    for line in reading.text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if !matches!(table, "raw" | "mangle" | "filter") {
            continue;
        } else if let Some(declaration) = line.strip_prefix(':') {
            let mut words = declaration.split(' ');
            let (name, policy) = (words.next().unwrap_or_default(), words.next().unwrap_or("-"));
            let base = hook(name).filter(|_| policy != "-").map(|hook| Base { hook, drop_by_policy: policy == "DROP" });
            let (table, name) = (table.to_owned(), name.to_owned());
            chains.push(Chain { reading: number, tool: reading.tool, family, table, name, base, rules: Vec::new() });
        } else if let Some((name, rule)) = rule(line, family) {
            // A table's chains are declared before its rules; the last table is the current one.
            if let Some(chain) = chains.iter_mut().rev().find(|c| c.table == table && c.name == name) {
                chain.rules.push(rule);
            }
        }
    }
    chains
}

fn hook(chain: &str) -> Option<Hook> {
    match chain {
        // arptables of old calls its chains IN and OUT.
        "PREROUTING" | "INPUT" | "IN" => Some(Hook::In),
        "OUTPUT" | "OUT" => Some(Hook::Out),
        _ => None,
    }
}

/// Words of a line, with double quotes and backslashes as iptables-save writes them.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => word.get_or_insert_default().extend(chars.next()),
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The chain and rule of an `-A` line.
fn rule(line: &str, family: Family) -> Option<(String, Rule)> {
    let words = words(line);
    let mut rest = words.iter().map(String::as_str).peekable();
    // With -c there are counters first: [12:345] -A INPUT ...
    rest.next_if(|word| word.starts_with('['));
    if rest.next()? != "-A" {
        return None;
    }
    let chain = rest.next()?.to_owned();
    let mut rule = Rule { text: line.to_owned(), tests: Vec::new(), verdicts: Vec::new() };
    while let Some(word) = rest.next() {
        let not = word == "!";
        let option = if not { rest.next()? } else { word };
        let mut values = Vec::new();
        if matches!(option, "--comment" | "--log-prefix" | "--nflog-prefix") {
            // Free text, which may look like an option.
            values.extend(rest.next());
        }
        while let Some(value) = rest.next_if(|next| *next != "!" && !next.starts_with('-')) {
            values.push(value);
        }
        // The old place of the sign: `-s ! 10.0.0.1`.
        let late = values.is_empty() && rest.peek() == Some(&"!");
        if late {
            rest.next();
            values.extend(rest.next());
        }
        let value = values.first().copied().unwrap_or_default();
        match verdict(option, value) {
            Some(verdict) => rule.verdicts.extend(verdict.map(|v| (Vec::new(), v))),
            None => rule.tests.push(test(option, value, family).not(not || late)),
        }
    }
    Some((chain, rule))
}

/// `Some` for the options that say what happens; a target that lets the packet go on is `Some(None)`.
fn verdict(option: &str, value: &str) -> Option<Option<Verdict>> {
    match option {
        "-g" | "--goto" => Some(Some(Verdict::Goto(value.into()))),
        "-j" | "--jump" => Some(match value {
            "ACCEPT" => Some(Verdict::Accept),
            "DROP" | "TARPIT" | "DELUDE" => Some(Verdict::Drop),
            "REJECT" => Some(Verdict::Reject),
            "RETURN" => Some(Verdict::Return),
            // The address to mangle follows as an option of its own.
            "mangle" => None,
            // Targets of modules (LOG, MARK, CT, ...) are jumps to no chain: the packet goes on.
            name => Some(Verdict::Jump(name.into())),
        }),
        "--mangle-ip-s" => Some(Some(Verdict::Rewrite)),
        // Options of targets, which say nothing about which packets match.
        "--reject-with" | "--log-prefix" | "--log-level" | "--set-mark" | "--set-xmark" | "--mangle-target"
        | "--mangle-ip-d" | "--mangle-mac-s" | "--mangle-mac-d" => Some(None),
        _ => None,
    }
}

fn test(option: &str, value: &str, family: Family) -> Test {
    let known = match option {
        "-d" | "--dst" | "--dst-ip" | "--destination" if family == Family::Arp => ranges(value).map(Test::ArpTarget),
        "-s" | "--src" | "--src-ip" | "--source" if family == Family::Arp => ranges(value).map(Test::ArpSender),
        "-d" | "--dst" | "--destination" => ranges(value).map(Test::Dst),
        "-p" | "--protocol" if matches!(value, "all" | "0") => Some(Test::Always),
        "-p" | "--protocol" => protocol_number(value).map(|number| Test::Proto(vec![number])),
        "--dport" | "--dports" | "--destination-port" | "--destination-ports" => ports(value).map(Test::Dport),
        "-i" | "--in-interface" => Some(Test::Iif(vec![wildcard(value)])),
        "-o" | "--out-interface" => Some(Test::Oif(vec![wildcard(value)])),
        "--opcode" => match value {
            "1" | "Request" => Some(Test::ArpOp(vec![1])),
            "2" | "Reply" => Some(Test::ArpOp(vec![2])),
            _ => None,
        },
        // Ethernet and IPv4: what every ARP packet here is.
        "--h-length" | "--h-type" | "--proto-type" => Some(Test::Always),
        // What these modules add, they add by options of their own.
        "-m" | "--match" if matches!(value, "tcp" | "udp" | "sctp" | "multiport" | "comment") => Some(Test::Always),
        "--comment" => Some(Test::Always),
        _ => None,
    };
    known.unwrap_or(Test::Unknown)
}

fn ranges(value: &str) -> Option<Vec<(IpAddr, IpAddr)>> {
    value.split(',').map(prefix_range).collect()
}

/// "80", "80:90", "1024:", ":1023", and lists of them.
fn ports(value: &str) -> Option<Vec<(u16, u16)>> {
    let number = |text: &str, open: u16| if text.is_empty() { Some(open) } else { text.parse().ok() };
    let range = |text: &str| match text.split_once(':') {
        Some((low, high)) => Some((number(low, 0)?, number(high, u16::MAX)?)),
        None => text.parse().ok().map(|port| (port, port)),
    };
    value.split(',').map(range).collect()
}

fn wildcard(name: &str) -> String {
    name.strip_suffix('+').map_or_else(|| name.to_owned(), |start| format!("{start}*"))
}
