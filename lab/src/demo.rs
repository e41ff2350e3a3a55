//! The demonstration: all forwarding methods, IPv4 and IPv6, HTTP and DNS over UDP, set up by `ipvsadm` and carried by the data plane.
//!
//! It fails unless every request was answered, the shares are as the weights say, the servers saw the client's own
//! address, and the counters show that the data plane forwarded whatever the servers got, the kernel nothing.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::counters::Kernel;
use crate::director::{Director, Hook, Verdicts};
use crate::error::{Error, Result};
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::layouts::{Layout, Options};
use crate::load::{self, Load, Report};

/// Frames still on their way when the last answer is in arrive within milliseconds.
const SETTLE_TIME: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// HTTP requests for each method and address family; a tenth of it DNS questions
    #[arg(long, default_value_t = 1200, value_parser = clap::value_parser!(u32).range(10..))]
    pub requests: u32,
    /// Real servers; their weights are N, N-1, ... 1
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
    pub servers: u8,
    /// Where the data plane takes packets from; without it rvsd chooses
    #[arg(long, value_enum)]
    pub hook: Option<Hook>,
    /// Which network to build
    #[arg(long, value_enum, default_value_t)]
    pub layout: Layout,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Nat,
    Dr,
    Tun,
    Fullnat,
}

impl Method {
    const ALL: [Method; 4] = [Method::Nat, Method::Dr, Method::Tun, Method::Fullnat];

    fn title(self) -> &'static str {
        match self {
            Method::Nat => "NAT",
            Method::Dr => "DR",
            Method::Tun => "TUN",
            Method::Fullnat => "FULLNAT",
        }
    }

    /// `ipvsadm`'s word.
    fn flag(self) -> &'static str {
        match self {
            Method::Nat => "-m",
            Method::Dr => "-g",
            Method::Tun => "-i",
            Method::Fullnat => "--fullnat",
        }
    }

    /// May the real servers listen on another port than the virtual service?
    fn maps_ports(self) -> bool {
        matches!(self, Method::Nat | Method::Fullnat)
    }

    /// What the data plane counts for it: requests, and replies that go by the director.
    fn verdicts(self) -> (&'static str, Option<&'static str>) {
        match self {
            Method::Nat => ("nat", Some("nat_reply")),
            Method::Dr => ("dr", None),
            Method::Tun => ("tun", None),
            Method::Fullnat => ("fullnat", Some("fullnat_reply")),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Traffic {
    Http,
    Dns,
}

/// One virtual service and its load.
struct Case<'a> {
    lab: &'a Lab,
    director: &'a Director<'a>,
    method: Method,
    traffic: Traffic,
    vip: SocketAddr,
    /// Server, its address and port, and its weight.
    dests: Vec<(String, SocketAddr, u32)>,
    requests: usize,
}

/// What a case is judged by; counters are what was added while it ran.
#[derive(Debug, Default)]
struct Measured {
    report: Report,
    /// Packets of the service that arrived at the servers' sockets, by the servers' own kernels.
    servers_got: u64,
    /// The same for the client.
    client_got: u64,
    verdicts: Verdicts,
    /// Forwarded by the kernel in the director's namespace: IPv4, IPv6.
    kernel_forwarded: [u64; 2],
}

/// Builds the lab, runs all cases, prints what was seen. Returns what was wrong, a line each: empty when all is well.
/// Fails when the lab, the director or a command fails.
pub fn run(args: &Args) -> Result<Vec<String>> {
    let options = Options { servers: args.servers, offload: args.hook == Some(Hook::Tc), ..Options::default() };
    println!("building the lab: client, router, director and {} real servers", args.servers);
    let lab = Lab::up(&args.layout.topology(&options))?;
    let interfaces: Vec<_> = args.layout.director_interfaces().iter().map(|&i| (i, args.hook)).collect();
    let director = Director::start(lab.node("director")?, &interfaces)?;
    println!("{}", director.process().map(|p| p.log_tail()).unwrap_or_default());
    prepare(&lab)?;
    // A client's port may come again in the next case: as in the kernel, the connection of a server that was removed is dropped for as long
    // as it is remembered.
    println!("$ ipvsadm --set 900 1 1");
    director.ipvsadm("--set 900 1 1")?;
    let mut wrong = Vec::new();
    for traffic in [Traffic::Http, Traffic::Dns] {
        for method in Method::ALL {
            for ipv6 in [false, true] {
                let case = Case::new(&lab, &director, method, traffic, ipv6, args)?;
                let title = case.title();
                wrong.extend(case.run()?.into_iter().map(|what| format!("{title}: {what}")));
            }
        }
    }
    println!("\n$ rvs drops\n{}", director.rvs("drops")?);
    Ok(wrong)
}

/// What the real servers need for tunnels and full NAT. (For direct routing they have it.)
fn prepare(lab: &Lab) -> Result<()> {
    let words = |flag: &str, all: &[IpAddr]| all.iter().map(|a| format!(" {flag} {a}")).collect::<String>();
    for server in lab.topology().servers() {
        let node = lab.node(&server.name)?;
        for line in [
            format!("up --mode tun{}", words("--vip", &lab.topology().vips)),
            format!("up --mode fullnat{}", words("--director", &lab.topology().locals)),
        ] {
            println!("{}$ rvs realserver {line}", server.name);
            let said = node.realserver(&line)?;
            println!("{}", said.lines().last().unwrap_or_default());
        }
    }
    Ok(())
}

impl<'a> Case<'a> {
    fn new(
        lab: &'a Lab,
        director: &'a Director<'a>,
        method: Method,
        traffic: Traffic,
        ipv6: bool,
        args: &Args,
    ) -> Result<Self> {
        let address =
            |what: &str, found: Option<IpAddr>| found.ok_or_else(|| Error::Missing(format!("{what} has no address")));
        let port = if traffic == Traffic::Http { 80 } else { 53 };
        // Show that the port may be translated too, where the servers listen on another.
        let to = if method.maps_ports() && traffic == Traffic::Http { 8080 } else { port };
        let vip = SocketAddr::new(address("the service", lab.topology().vip(ipv6))?, port);
        let mut dests = Vec::new();
        for (server, weight) in lab.topology().servers().zip((1..=u32::from(args.servers)).rev()) {
            let target = SocketAddr::new(address(&server.name, lab.topology().address(&server.name, ipv6))?, to);
            dests.push((server.name.clone(), target, weight));
        }
        let requests = if traffic == Traffic::Http { args.requests } else { args.requests / 10 };
        Ok(Self { lab, director, method, traffic, vip, dests, requests: requests as usize })
    }

    fn title(&self) -> String {
        let traffic = if self.traffic == Traffic::Http { "HTTP" } else { "DNS over UDP" };
        format!("{}, IPv{}, {traffic}", self.method.title(), if self.vip.is_ipv6() { 6 } else { 4 })
    }

    /// Sets the service up, sends the load, takes the service away; returns what was wrong.
    fn run(&self) -> Result<Vec<String>> {
        println!("\n== {}: {} requests", self.title(), self.requests);
        let (kind, flag) = (if self.traffic == Traffic::Http { "-t" } else { "-u" }, self.method.flag());
        self.ipvsadm(&format!("-A {kind} {} -s wrr", self.vip))?;
        if self.method == Method::Fullnat {
            for local in self.lab.topology().locals(self.vip.is_ipv6()) {
                self.ipvsadm(&format!("-P {kind} {} -z {local}", self.vip))?;
            }
        }
        for (_, target, weight) in &self.dests {
            self.ipvsadm(&format!("-a {kind} {} -r {target} {flag} -w {weight}", self.vip))?;
        }
        self.warm_up()?;
        let measured = self.measure()?;
        print!("{}", measured.report);
        println!("  data plane {}", measured.verdicts);
        println!(
            "  arrived   {} packets at the servers; the kernel forwarded {:?}",
            measured.servers_got, measured.kernel_forwarded
        );
        println!("\n$ ipvsadm -Ln --stats\n{}", self.director.ipvsadm("-Ln --stats")?);
        self.director.ipvsadm(&format!("-D {kind} {}", self.vip))?;
        self.forgotten()?;
        let wrong = self.judge(&measured);
        println!("{}", if wrong.is_empty() { "ok".to_owned() } else { format!("WRONG: {}", wrong.join("; ")) });
        Ok(wrong)
    }

    /// Waits until the data plane has forgotten all connections, but those whose ports may be used again at once.
    fn forgotten(&self) -> Result<()> {
        eventually("connections to time out", SETTLE_TIME, || {
            let listed = self.director.ipvsadm("-Lnc").map_err(|e| e.to_string())?;
            let over = |line: &&str| line.contains(" TIME_WAIT ") || line.contains(" CLOSE ");
            // Below the two lines of the head.
            let left = listed.lines().skip(2).filter(|line| !over(line)).count();
            if left == 0 { Ok(()) } else { Err(format!("{left} connections")) }
        })
    }

    fn ipvsadm(&self, line: &str) -> Result<()> {
        println!("$ ipvsadm {line}");
        self.director.ipvsadm(line).map(|said| print!("{said}"))
    }

    /// One round of the scheduler, before anything is counted: the neighbours' MAC addresses are learned by it, which the
    /// kernel does for the first packet to each. Not one of these may fail either.
    fn warm_up(&self) -> Result<()> {
        let report = self.load(self.round(), &|_| {})?;
        if report.failed == 0 {
            Ok(())
        } else {
            Err(Error::unexpected(format!("{}: first requests", self.title()), report))
        }
    }

    fn load(&self, requests: usize, progress: &dyn Fn(usize)) -> Result<Report> {
        let load = Load::new(self.vip, requests);
        let client = self.lab.node("client")?;
        match self.traffic {
            Traffic::Http => load::http(client, &load, progress),
            Traffic::Dns => load::dns(client, &load, progress),
        }
    }

    /// Counters are read so that the data plane's span covers the servers' on both sides: what the servers got in their
    /// span, the data plane must have forwarded in its own.
    fn measure(&self) -> Result<Measured> {
        let director = self.director.node().ns();
        let verdicts = self.director.verdicts()?;
        let kernel = Kernel::read(&director)?;
        let (servers, client) = (self.servers_got()?, self.got("client")?);
        let bar = progress_bar(self.requests);
        let report = self.load(self.requests, &|done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        let (servers, client) = (self.settled()?.saturating_sub(servers), self.got("client")?.saturating_sub(client));
        let after = Kernel::read(&director)?;
        let kernel_forwarded = [0, 1].map(|n: usize| after.forwarded[n].saturating_sub(kernel.forwarded[n]));
        let verdicts = self.director.verdicts()?.since(&verdicts);
        Ok(Measured { report, servers_got: servers, client_got: client, verdicts, kernel_forwarded })
    }

    fn got(&self, node: &str) -> Result<u64> {
        let kernel = Kernel::read(&self.lab.node(node)?.ns())?;
        Ok(match self.traffic {
            Traffic::Http => kernel.tcp_in,
            Traffic::Dns => kernel.udp_in.iter().sum(),
        })
    }

    fn servers_got(&self) -> Result<u64> {
        self.dests.iter().map(|(server, ..)| self.got(server)).sum()
    }

    /// What the servers got when two looks in a row see the same: the last acknowledgements have arrived.
    fn settled(&self) -> Result<u64> {
        let mut last = None;
        eventually("the servers to have got everything", SETTLE_TIME, || {
            let now = self.servers_got().map_err(|e| e.to_string())?;
            if last.replace(now) == Some(now) { Ok(now) } else { Err(format!("{now} packets so far")) }
        })
    }

    /// Requests in one round of weighted round robin.
    fn round(&self) -> usize {
        self.dests.iter().map(|&(.., weight)| weight as usize).sum()
    }

    fn judge(&self, measured: &Measured) -> Vec<String> {
        let weights: BTreeMap<String, usize> =
            self.dests.iter().map(|(name, _, weight)| (name.clone(), *weight as usize)).collect();
        let mut wrong = judge_answers(&measured.report, self.requests, &weights);
        if self.traffic == Traffic::Http {
            let own = self.lab.topology().address("client", self.vip.is_ipv6());
            if !measured.report.clients.keys().copied().map(Some).eq([own]) {
                wrong.push(format!("the servers saw {:?} as the client, not {own:?}", measured.report.clients));
            }
        }
        wrong.extend(judge_counters(measured, self.method));
        wrong
    }
}

/// Weighted round robin is exact over whole rounds; a part of a round may lie anywhere.
fn judge_answers(report: &Report, requests: usize, weights: &BTreeMap<String, usize>) -> Vec<String> {
    let mut wrong = Vec::new();
    if report.failed > 0 || report.answered() != requests {
        wrong.push(format!("{} of {requests} requests failed", requests - report.answered().min(requests)));
    }
    let round: usize = weights.values().sum();
    for (server, weight) in weights {
        let got = report.servers.get(server).copied().unwrap_or_default();
        let due = requests * weight / round.max(1);
        if got.abs_diff(due) > *weight {
            wrong.push(format!("{server} answered {got} requests where its weight is due {due}"));
        }
    }
    if let Some(stranger) = report.servers.keys().find(|name| !weights.contains_key(*name)) {
        wrong.push(format!("{stranger} answered and is no server of this service"));
    }
    wrong
}

fn judge_counters(measured: &Measured, method: Method) -> Vec<String> {
    let mut wrong = Vec::new();
    let Measured { verdicts, servers_got, client_got, kernel_forwarded, report } = measured;
    let (name, reply) = method.verdicts();
    if (*servers_got as usize) < report.answered() {
        wrong.push(format!("the servers' kernels count {servers_got} packets for {} answers", report.answered()));
    }
    if verdicts.of(name) < *servers_got {
        wrong.push(format!(
            "the servers got {servers_got} packets, the data plane forwarded {} as {name}",
            verdicts.of(name)
        ));
    }
    if verdicts.to_servers() != verdicts.of(name) {
        wrong.push(format!("packets went by another method: {verdicts}"));
    }
    if let Some(reply) = reply.filter(|reply| verdicts.of(reply) < *client_got) {
        wrong.push(format!("the client got {client_got} packets, the data plane sent {} replies", verdicts.of(reply)));
    }
    if *kernel_forwarded != [0, 0] {
        wrong.push(format!("the kernel forwarded packets in the director itself (IPv4, IPv6: {kernel_forwarded:?})"));
    }
    wrong
}

fn progress_bar(requests: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("  [{bar:40}] {pos}/{len} requests, {per_sec}");
    ProgressBar::new(requests as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights() -> BTreeMap<String, usize> {
        BTreeMap::from([("rs1".to_owned(), 2), ("rs2".to_owned(), 1)])
    }

    fn report(rs1: usize, rs2: usize) -> Report {
        let servers = BTreeMap::from([("rs1".to_owned(), rs1), ("rs2".to_owned(), rs2)]);
        Report { servers, latencies: vec![Duration::from_millis(1); rs1 + rs2], ..Report::default() }
    }

    fn nat() -> Measured {
        let verdicts = Verdicts(BTreeMap::from([("nat".to_owned(), 150), ("nat_reply".to_owned(), 120)]));
        Measured { report: report(20, 10), servers_got: 150, client_got: 120, verdicts, kernel_forwarded: [0, 0] }
    }

    #[test]
    fn answers_are_judged_by_number_and_share() {
        assert!(judge_answers(&report(20, 10), 30, &weights()).is_empty());
        assert!(judge_answers(&report(21, 10), 31, &weights()).is_empty(), "part of a round");
        assert_eq!(judge_answers(&report(15, 15), 30, &weights()).len(), 2);
        assert_eq!(judge_answers(&report(20, 9), 30, &weights()), ["1 of 30 requests failed"]);
        let mut other = report(20, 10);
        other.servers.insert("rs9".to_owned(), 1);
        assert_eq!(judge_answers(&other, 30, &weights()), ["rs9 answered and is no server of this service"]);
    }

    #[test]
    fn what_the_data_plane_did_not_forward_is_found() {
        assert!(judge_counters(&nat(), Method::Nat).is_empty());
        let spoilt = |spoil: fn(&mut Measured)| {
            let mut measured = nat();
            spoil(&mut measured);
            judge_counters(&measured, Method::Nat).len()
        };
        assert_eq!(spoilt(|m| m.servers_got = 151), 1);
        assert_eq!(spoilt(|m| m.servers_got = 29), 1, "counters that say nothing prove nothing");
        assert_eq!(spoilt(|m| m.client_got = 121), 1);
        assert_eq!(spoilt(|m| m.kernel_forwarded = [0, 1]), 1);
        assert_eq!(spoilt(|m| m.verdicts = Verdicts::default()), 2);
        assert!(!judge_counters(&nat(), Method::Dr).is_empty(), "NAT's verdicts are no DR");
    }
}
