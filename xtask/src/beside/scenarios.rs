//! What both directors are given: every scheduler with every method, protocol and family; changes and listings; commands that are refused; packets
//! out of the ordinary.

use std::path::Path;

use anyhow::{Context, Result};
use rvs_fixtures::frame::{Frame, IcmpError, SCTP, TCP, UDP, chunk, flag};
use rvs_fixtures::world::{BACK_MAC, BOTH, CLIENT_MAC, LAN_MAC, Net, server_mac};

use super::pair::{Known, NOT_YET, Pair};

/// All that may be otherwise. The rows of docs/compatibility.md, "What differs", have more words.
pub const KNOWN: &[Known] =
    &[NOT_YET, CUT_ELSEWHERE, HEADER_CHECKSUM, UNCHECKED, PADDING, COUNTED, QUOTED, UNSORTED, OTHER_BUILD];

const CUT_ELSEWHERE: Known = Known {
    name: "fragments go by themselves",
    why: "IPVS puts a datagram together and sends it on when its last fragment has come; here each goes when it comes, as it came",
};
const HEADER_CHECKSUM: Known = Known {
    name: "a wrong IPv4 header checksum",
    why: "the kernel drops the packet; here it is forwarded, as wrong as it came, and whoever gets it drops it",
};

const UNCHECKED: Known = Known {
    name: "UDP without a checksum",
    why: "by NAT with another port the kernel makes one (IPv4); here there is none, as there was none",
};

const PADDING: Known = Known {
    name: "Ethernet padding",
    why: "the kernel cuts bytes behind the IP packet off, here they go on; nobody reads them",
};
const QUOTED: Known = Known {
    name: "quoted as it came",
    why: "\"too big\" for a tunnel over IPv6 quotes the client's packet as it came; the kernel's has counted its hop limit down already",
};
const UNSORTED: Known =
    Known { name: "order with --nosort", why: "that of a hash in the kernel, that of creation here" };
const OTHER_BUILD: Known = Known {
    name: "another build of ipvsadm",
    why: "Debian 12's says of a -6 without -f in other words what the recorded one (testdata/cli) says, as ours does",
};
const COUNTED: Known = Known {
    name: "counted otherwise",
    why: "packets that went otherwise by design are counted as they went; and an error of the director's own about a DR or TUN packet (TTL used \
          up) counts as a packet out in the kernel",
};

/// Schedulers, with flags that bear on their choice.
pub const SCHEDULERS: &[&str] =
    &["rr", "wrr", "lc", "wlc", "dh", "sh", "sh -b sh-port", "sed", "nq", "fo", "ovf", "mh", "mh -b mh-port", "twos"];

/// Of `ipvsadm`, with its name here.
const METHODS: &[(&str, &str)] = &[("-m", "NAT"), ("-g", "DR"), ("-i", "TUN")];

const PROTOCOLS: &[(u8, &str)] = &[(TCP, "-t"), (UDP, "-u"), (SCTP, "--sctp-service")];

/// SCTP's chunks.
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;

pub fn run(root: &Path, pair: &mut Pair<'_>, schedulers: &[&str], wanted: &[String]) -> Result<()> {
    let mut ports = 1000..;
    let mut next = || ports.next().unwrap_or(u16::MAX);
    let wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|start| name.starts_with(start));
    let begins = |pair: &mut Pair<'_>, name: String| {
        let wanted = wanted(&name);
        if wanted {
            pair.begin(&name);
        }
        wanted
    };
    for scheduler in schedulers {
        for (method, name) in METHODS {
            let each =
                BOTH.into_iter().flat_map(|net| PROTOCOLS.iter().map(move |(protocol, kind)| (net, *protocol, *kind)));
            let service = |(net, protocol, kind)| Service { net, protocol, kind, method, port: next() };
            let services: Vec<Service<'_>> = each.map(service).collect();
            if begins(pair, format!("{scheduler}, {name}")) {
                scheduled(pair, scheduler, &services)?;
            }
        }
    }
    for (net, version) in BOTH.into_iter().zip(["IPv4", "IPv6"]) {
        let port = next();
        if begins(pair, format!("changes, {version}")) {
            changes(pair, net, port)?;
        }
        for (method, name) in METHODS {
            let port = next();
            if begins(pair, format!("odd packets, {name}, {version}")) {
                odd(pair, Service { net, protocol: TCP, kind: "-t", method, port })?;
            }
        }
    }
    for (net, version) in BOTH.into_iter().zip(["IPv4", "IPv6"]) {
        for (method, name) in METHODS {
            let port = next();
            if begins(pair, format!("settings, {name}, {version}")) {
                settings(pair, Service { net, protocol: TCP, kind: "-t", method, port })?;
            }
        }
    }
    for name in ["01-empty", "02-modes-ipv4", "03-modes-ipv6", "04-displays", "06-errors"] {
        if begins(pair, format!("commands of {name}")) {
            recorded(root, pair, name)?;
        }
    }
    Ok(())
}

/// Each service with three servers of the weights 1, 2, 3, its clients, and what the listings then say.
fn scheduled(pair: &mut Pair<'_>, scheduler: &str, services: &[Service<'_>]) -> Result<()> {
    // What is drawn is another each time.
    let servers: &[(u8, u32)] = if scheduler == "twos" { &[(11, 2)] } else { &[(11, 1), (12, 2), (13, 3)] };
    let mut rules = String::new();
    for s in services {
        rules += &format!("-A {} -s {scheduler}\n", s.name());
        servers.iter().for_each(|(number, weight)| rules += &format!("{}\n", s.adding(*number, *weight)));
    }
    pair.command("-R", &rules, str::to_owned)?;
    for s in services {
        (0..CLIENTS).try_for_each(|client| s.connection(pair, 20_000 + client))?;
    }
    listed(pair, services)?;
    pair.ipvsadm("-C")
}

/// Of each service: enough to go round by any of the schedulers.
const CLIENTS: u16 = 7;

fn listed(pair: &mut Pair<'_>, services: &[Service<'_>]) -> Result<()> {
    pair.ipvsadm("-Ln")?;
    pair.listing("-Ln --stats --exact")?;
    let ends: Vec<String> = services.iter().map(|s| s.net.vip(s.port).to_string()).collect();
    pair.command("-Lnc", "", |text| connections(text, &ends))
}

/// A virtual service under test, on a port of its own: connections of one that is gone do not meet another's.
#[derive(Clone, Copy)]
struct Service<'a> {
    net: Net,
    protocol: u8,
    /// `ipvsadm`'s options for protocol and method.
    kind: &'a str,
    method: &'a str,
    port: u16,
}

impl Service<'_> {
    fn nat(&self) -> bool {
        self.method == "-m"
    }

    fn name(&self) -> String {
        format!("{} {}", self.kind, self.net.vip(self.port))
    }

    /// The real servers' port: by NAT another for each service, as two connections of one client port to one server port would be one there.
    fn inner(&self) -> u16 {
        if self.nat() { self.port + 7000 } else { self.port }
    }

    /// The command that adds a server.
    fn adding(&self, number: u8, weight: u32) -> String {
        let (name, server, method) = (self.name(), self.net.server(number, self.inner()), self.method);
        format!("-a {name} -r {server} {method} -w {weight}")
    }

    fn add(&self, pair: &mut Pair<'_>, number: u8, weight: u32) -> Result<()> {
        pair.ipvsadm(&self.adding(number, weight))
    }

    /// A packet of a client.
    fn request(&self, client: u16) -> Frame {
        self.net.request(self.protocol, client, self.port)
    }

    /// ... of the server that it was sent to.
    fn reply(&self, client: u16, number: u8) -> Frame {
        self.net.reply(self.protocol, self.net.server(number, self.inner()), client, number)
    }

    /// From its first packet on. (None that ends in a state which is soon over: it would be gone from one listing and not yet from the other.)
    fn connection(&self, pair: &mut Pair<'_>, client: u16) -> Result<()> {
        match self.protocol {
            TCP => self.tcp(pair, client),
            UDP => self.udp(pair, client),
            _ => self.sctp(pair, client),
        }
    }

    fn tcp(&self, pair: &mut Pair<'_>, client: u16) -> Result<()> {
        let request = |flags| self.request(client).flags(flags);
        let syn = request(flag::SYN).options(&[2, 4, 5, 0xb4, 1, 3, 3, 7]);
        let Some(number) = pair.client(&syn.bytes())? else { return Ok(()) };
        let reply = |flags| self.reply(client, number).flags(flags).bytes();
        let answer = |pair: &mut Pair<'_>, flags| if self.nat() { pair.server(&reply(flags)) } else { Ok(()) };
        answer(pair, flag::SYN | flag::ACK)?;
        pair.client(&request(flag::ACK).payload(&[]).bytes())?;
        pair.client(&request(flag::ACK | flag::PSH).bytes())?;
        answer(pair, flag::ACK | flag::PSH)?;
        if client % 3 == 1 {
            pair.client(&request(flag::FIN | flag::ACK).bytes())?;
            answer(pair, flag::FIN | flag::ACK)?;
            pair.client(&request(flag::ACK).payload(&[]).bytes())?;
        }
        Ok(())
    }

    fn udp(&self, pair: &mut Pair<'_>, client: u16) -> Result<()> {
        let Some(number) = pair.client(&self.request(client).bytes())? else { return Ok(()) };
        if self.nat() {
            pair.server(&self.reply(client, number).bytes())?;
        }
        let bare = Frame { unchecked: self.net == Net::V4, ..self.request(client) };
        pair.known((self.nat() && self.net == Net::V4).then_some(UNCHECKED));
        pair.client(&bare.bytes())?;
        pair.known(None);
        Ok(())
    }

    fn sctp(&self, pair: &mut Pair<'_>, client: u16) -> Result<()> {
        let chunks = |kind| chunk(kind, &[7; 16]);
        let request = |kind| self.request(client).payload(&chunks(kind)).bytes();
        let Some(number) = pair.client(&request(INIT))? else { return Ok(()) };
        let reply = |kind| self.reply(client, number).payload(&chunks(kind)).bytes();
        let answer = |pair: &mut Pair<'_>, kind| if self.nat() { pair.server(&reply(kind)) } else { Ok(()) };
        answer(pair, INIT_ACK)?;
        pair.client(&request(COOKIE_ECHO))?;
        answer(pair, COOKIE_ACK)
    }
}

/// Rows of `-Lnc` for these virtual ends, sorted (the kernel lists by a hash), without the time that is left.
fn connections(text: &str, ends: &[String]) -> String {
    let row = |line: &str| {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if !words.get(4).is_some_and(|word| ends.iter().any(|end| end == word)) {
            return None;
        }
        words[1] = "--:--";
        Some(words.join(" "))
    };
    let mut rows: Vec<String> = text.lines().filter_map(row).collect();
    rows.sort();
    text.lines().take(2).map(str::to_owned).chain(rows).collect::<Vec<_>>().join("\n")
}

/// Edits, removals, thresholds, timeouts, counters set back, whole tables.
fn changes(pair: &mut Pair<'_>, net: Net, port: u16) -> Result<()> {
    let s = Service { net, protocol: TCP, kind: "-t", method: "-m", port };
    let (name, [a, b, c]) = (s.name(), [11, 12, 13].map(|number| net.server(number, s.inner())));
    let mut clients = 30_000..;
    let mut more = |pair: &mut Pair<'_>, n: usize| clients.by_ref().take(n).try_for_each(|c| s.connection(pair, c));
    pair.ipvsadm(&format!("-A {name} -s wrr"))?;
    s.add(pair, 11, 1)?;
    s.add(pair, 12, 2)?;
    more(pair, 4)?;
    for line in [
        format!("-e {name} -r {b} -m -w 5"),
        format!("-e {name} -r {a} -m -w 0"),
        format!("-a {name} -r {c} -m -w 1"),
        format!("-E {name} -s wlc"),
    ] {
        pair.ipvsadm(&line)?;
        more(pair, 4)?;
        listed(pair, &[s])?;
    }
    for line in [
        format!("-Ln {name} --thresholds"),
        "-Ln --thresholds".to_owned(),
        "-Ln --persistent-conn".to_owned(),
        "-Ln --timeout".to_owned(),
        "--set 800 100 200".to_owned(),
        "-Ln --timeout".to_owned(),
        "--set 900 120 300".to_owned(),
        "-Sn".to_owned(),
        format!("-Z {name}"),
        "-Ln --stats".to_owned(),
        format!("-d {name} -r {b}"),
        format!("-d {name} -r {b}"),
        "-Ln".to_owned(),
    ] {
        pair.ipvsadm(&line)?;
    }
    more(pair, 4)?;
    s.add(pair, 12, 1)?;
    listed(pair, &[s])?;
    pair.ipvsadm("-C")?;
    pair.ipvsadm("-Ln")
}

/// Packets that are not the plain ones of a connection.
fn odd(pair: &mut Pair<'_>, s: Service<'_>) -> Result<()> {
    let name = s.name();
    pair.ipvsadm(&format!("-A {name} -s rr"))?;
    // Nobody to send it to.
    pair.client(&s.request(1).flags(flag::SYN).bytes())?;
    s.add(pair, 11, 1)?;
    // Of no connection; and one that is there.
    pair.client(&s.request(2).flags(flag::ACK).bytes())?;
    pair.client(&s.request(2).flags(flag::RST).bytes())?;
    s.tcp(pair, 30_000)?;
    let ack = || s.request(30_000).flags(flag::ACK);
    for ttl in [2, 1] {
        pair.client(&ack().ttl(ttl).bytes())?;
    }
    let mark = |tos| Frame { tos, ..ack() };
    pair.client(&mark(0x2e << 2).bytes())?;
    pair.client(&mark(1).bytes())?;
    pair.known(Some(PADDING));
    pair.client(&Frame { padding: 9, ..ack() }.bytes())?;
    pair.known(None);
    pair.known((s.method == "-i" && s.net == Net::V6).then_some(QUOTED));
    for len in [1, 1399, 1400, 1440] {
        pair.client(&Frame { df: true, ..ack().payload(&vec![7; len]) }.bytes())?;
    }
    pair.known(None);
    if s.net == Net::V4 {
        pair.known(Some(HEADER_CHECKSUM));
        let mut wrong = ack().bytes();
        wrong[24] ^= 1;
        pair.client(&wrong)?;
        pair.known(None);
        // Router alert; timestamps would be filled in by a router.
        pair.client(&ack().extras(&[(0, vec![0x94, 4, 0, 0])]).bytes())?;
    } else {
        pair.client(&ack().extras(&[(60, vec![0, 0, 1, 4, 0, 0, 0, 0])]).bytes())?;
    }
    errors(pair, &s)?;
    s.tcp(pair, 30_003)?;
    pair.client(&s.request(30_003).flags(flag::RST).bytes())?;
    pair.client(&s.request(30_003).flags(flag::SYN).bytes())?;
    // Quiesced: what is there goes on, nothing new comes. Then removed, then back.
    let server = s.net.server(11, s.inner());
    pair.ipvsadm(&format!("-e {name} -r {server} {} -w 0", s.method))?;
    pair.client(&ack().bytes())?;
    pair.client(&s.request(3).flags(flag::SYN).bytes())?;
    pair.ipvsadm(&format!("-d {name} -r {server}"))?;
    pair.client(&ack().bytes())?;
    s.add(pair, 11, 1)?;
    pair.client(&ack().bytes())?;
    pair.known(Some(CUT_ELSEWHERE));
    let long = ack().payload(&[9; 64]);
    for part in long.fragments(77, &[40]) {
        pair.client(&part)?;
    }
    pair.known(None);
    pair.known(Some(COUNTED));
    pair.listing("-Ln --stats --exact")?;
    pair.known(None);
    pair.ipvsadm("-Ln")?;
    let ends = [s.net.vip(s.port).to_string()];
    pair.command("-Lnc", "", |text| connections(text, &ends))?;
    pair.ipvsadm(&format!("-D {name}"))
}

/// ICMP errors about packets of a connection: from the servers' side about a client's packet, from the clients' side about a server's.
fn errors(pair: &mut Pair<'_>, s: &Service<'_>) -> Result<()> {
    let kinds = [IcmpError::TimeExceeded, IcmpError::PortUnreachable, IcmpError::TooBig(1300)];
    if s.nat() {
        let (client, server) = (s.net.client(30_000), s.net.server(11, s.inner()));
        for error in kinds {
            // The packet as the server got it: the error's way is back.
            let got = Frame::new(TCP, client, server).macs(server_mac(11), BACK_MAC).ttl(63);
            pair.server(&got.answered(error))?;
        }
    }
    for error in kinds {
        // The server's packet as the client got it.
        let got = Frame::new(TCP, s.net.vip(s.port), s.net.client(30_000)).macs(CLIENT_MAC, LAN_MAC).ttl(63);
        pair.client(&got.answered(error))?;
    }
    Ok(())
}

/// `schedule_icmp` and `nat_icmp_send`.
fn settings(pair: &mut Pair<'_>, s: Service<'_>) -> Result<()> {
    let name = s.name();
    pair.ipvsadm(&format!("-A {name} -s rr"))?;
    // About a server's packet of no connection.
    let error = |client, port| {
        let quoted = Frame::new(TCP, s.net.vip(port), s.net.client(client)).macs(CLIENT_MAC, LAN_MAC).ttl(63);
        quoted.answered(IcmpError::TooBig(1300))
    };
    pair.client(&error(1, s.port))?;
    pair.set("schedule_icmp", 1)?;
    // Without a server, with one, and to a port of no service.
    pair.client(&error(2, s.port))?;
    s.add(pair, 11, 1)?;
    for client in [3, 3, 4] {
        pair.client(&error(client, s.port))?;
    }
    pair.client(&error(5, 999))?;
    s.tcp(pair, 3)?;
    pair.set("schedule_icmp", 0)?;
    pair.client(&error(6, s.port))?;
    // Of no connection, from where the server is and from elsewhere.
    let server = s.net.server(11, s.inner());
    let from = |port| s.net.reply(TCP, std::net::SocketAddr::new(server.ip(), port), 7, 11);
    for value in [0, 1] {
        pair.set("nat_icmp_send", value)?;
        for flags in [flag::ACK, flag::SYN | flag::ACK, flag::RST] {
            pair.server(&from(s.inner()).flags(flags).bytes())?;
        }
        pair.server(&from(s.inner()).flags(flag::ACK).payload(&[7; 1200]).bytes())?;
        pair.server(&from(s.inner()).flags(flag::ACK).ttl(1).bytes())?;
        pair.server(&from(998).flags(flag::ACK).bytes())?;
    }
    pair.set("nat_icmp_send", 0)?;
    pair.ipvsadm(&format!("-D {name}"))
}

/// Commands that were typed when stock was recorded, in order, with all that it printed then left out: both are asked now.
fn recorded(root: &Path, pair: &mut Pair<'_>, name: &str) -> Result<()> {
    let path = root.join(format!("testdata/cli/{name}.txt"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    pair.ipvsadm("-C")?;
    for line in text.lines().filter_map(|l| l.strip_prefix("lb# ipvsadm")) {
        // No shell here; and no daemons, which this machine would keep.
        let plain = (line.is_empty() || line.starts_with(' '))
            && !line.contains(['|', '>', '<', '"', '\'', '$', ';', '&', '(']);
        if !plain || line.contains("daemon") || line.contains("--rate") {
            continue;
        }
        let otherwise = [("--nosort", UNSORTED), (" -6", OTHER_BUILD)];
        pair.known(otherwise.into_iter().find(|(word, _)| line.contains(word)).map(|(_, known)| known));
        pair.command(line, "", unlisted)?;
        pair.known(None);
    }
    pair.ipvsadm("-C")
}

/// Without connections of earlier scenarios, which end when they end, and without the folders of the two programs.
fn unlisted(text: &str) -> String {
    let is_connection = |l: &&str| l.split_whitespace().nth(1).is_some_and(|w| w.len() == 5 && w.as_bytes()[2] == b':');
    // A word that is the path of a program by that name.
    let named = |word: &str| match word.rsplit_once("/ipvsadm") {
        Some((_, "")) => if word.starts_with('`') { "`ipvsadm" } else { "'ipvsadm" }.to_owned(),
        _ => word.to_owned(),
    };
    let plain = |l: &str| l.split(' ').map(named).collect::<Vec<_>>().join(" ") + "\n";
    text.lines().filter(|l| !is_connection(l)).map(plain).collect()
}
