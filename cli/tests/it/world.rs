//! A director in one value: the real model, and a small data plane that only knows what one HTTP request does. Answers
//! requests as rvsd does.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rvs_cli::backend::{Backend, BackendError};
use rvs_cli::ipvsadm::{Io, run};
use rvs_cli::names::Resolver;
use rvs_control::api::{
    self, ConnOrigin, ConnRow, Counters, CpuStats, DestCounters, Rates, Refusal, Request, RequestBody, Response,
    ResponseBody, Stats, StatsReport, Status,
};
use rvs_control::capability::Capabilities;
use rvs_control::limits;
use rvs_control::model::{Change, Command, Dest, DestKey, Env, FwdMethod, Granularity, Model, Proto, ServiceKey};

/// The recordings' director: its addresses and its only interface.
pub struct Host;

impl Env for Host {
    fn is_local(&self, addr: IpAddr) -> bool {
        addr.is_loopback() || ["172.16.0.1", "172.16.0.80", "10.0.0.1"].iter().any(|own| own.parse() == Ok(addr))
    }

    fn is_broadcast(&self, addr: Ipv4Addr) -> bool {
        ["172.16.0.255", "10.0.0.255"].iter().any(|own| own.parse() == Ok(addr))
    }

    fn interface_mtu(&self, name: &str) -> Option<u32> {
        (name == "eth0").then_some(1500)
    }
}

/// The names that the recordings show.
pub struct Names;

const SERVICES: [(&str, u16, u8); 6] = [
    ("http", 80, 6),
    ("https", 443, 6),
    ("http-alt", 8080, 6),
    ("domain", 53, 17),
    ("domain", 53, 6),
    ("sip", 5060, 17),
];

impl Resolver for Names {
    fn host_to_v4(&mut self, name: &str) -> Option<Ipv4Addr> {
        (name == "localhost").then_some(Ipv4Addr::LOCALHOST)
    }

    fn addr_to_host(&mut self, addr: IpAddr) -> Option<String> {
        addr.is_loopback().then(|| "localhost".to_owned())
    }

    fn service_to_port(&mut self, name: &str, proto: u8) -> Option<u16> {
        SERVICES.iter().find(|s| s.0 == name && s.2 == proto).map(|s| s.1)
    }

    fn port_to_service(&mut self, port: u16, proto: u8) -> Option<String> {
        SERVICES.iter().find(|s| s.1 == port && s.2 == proto).map(|s| s.0.to_owned())
    }
}

/// A connection or template of the small data plane.
struct Conn {
    service: ServiceKey,
    dest: DestKey,
    row: ConnRow,
}

pub struct World {
    pub model: Model,
    pub capabilities: Capabilities,
    conns: Vec<Conn>,
    counted: BTreeMap<(ServiceKey, DestKey), Stats>,
    counted_services: BTreeMap<ServiceKey, Stats>,
    total: Stats,
    /// Whether the kernel's estimator has summed the counters when they are shown. It does so every two seconds.
    pub estimator_ran: bool,
    next_port: u16,
    answers: VecDeque<Response>,
    next_id: u64,
}

/// What a run of a command left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub exit: u8,
}

impl World {
    pub fn new(capabilities: Capabilities) -> Self {
        World {
            model: Model::new(),
            capabilities,
            conns: Vec::new(),
            counted: BTreeMap::new(),
            counted_services: BTreeMap::new(),
            total: Stats::default(),
            estimator_ran: true,
            next_port: 40_000,
            answers: VecDeque::new(),
            next_id: 0,
        }
    }

    /// Runs `ipvsadm` with these arguments after its name.
    pub fn ipvsadm(&mut self, args: &[&str], stdin: &str, is_root: bool) -> Outcome {
        let args: Vec<String> = std::iter::once("ipvsadm").chain(args.iter().copied()).map(str::to_owned).collect();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let io = Io { stdin: &mut stdin.as_bytes(), stdout: &mut stdout, stderr: &mut stderr };
        let exit = run(&args, io, self, &mut Names, is_root);
        Outcome { stdout: String::from_utf8(stdout).unwrap(), stderr: String::from_utf8(stderr).unwrap(), exit }
    }

    /// Answers one request, as rvsd does.
    pub fn answer(&mut self, request: &Request) -> Vec<Response> {
        let id = request.id;
        let body = match &request.body {
            RequestBody::List(filter) => match api::list(&self.model, filter, self) {
                Ok(rows) => return api::in_chunks(id, rows, ResponseBody::List).collect(),
                Err(refusal) => ResponseBody::Refused(refusal),
            },
            RequestBody::Connections => {
                let rows = self.conns.iter().map(|c| c.row.clone());
                return api::in_chunks(id, rows, ResponseBody::Connections).collect();
            }
            RequestBody::LocalAddresses(service) => match self.capabilities.check_local_addresses() {
                Ok(()) => {
                    let rows = api::local_addresses(&self.model, service.map(Into::into));
                    return api::in_chunks(id, rows, ResponseBody::LocalAddresses).collect();
                }
                Err(unsupported) => ResponseBody::Refused(Refusal::from(&unsupported)),
            },
            RequestBody::Settings => ResponseBody::Settings(api::settings(&self.model)),
            RequestBody::Defences(service) => {
                let rows = api::defences(&self.model, service.map(Into::into), |_| true);
                return api::in_chunks(id, rows, ResponseBody::Defences).collect();
            }
            RequestBody::Command(command) => match self.command(command) {
                Ok(()) => ResponseBody::Done,
                Err(refusal) => ResponseBody::Refused(refusal),
            },
            RequestBody::Timeouts => ResponseBody::Timeouts(self.model.timeouts().into()),
            RequestBody::Daemons => ResponseBody::Daemons(api::daemons(&self.model)),
            RequestBody::Tables | RequestBody::Resize(_) | RequestBody::Upgrade(_) => ResponseBody::Done,
            RequestBody::Drops => ResponseBody::Drops(vec![
                api::DropRow { reason: "no destination".into(), packets: 3 },
                api::DropRow { reason: "malformed".into(), packets: 0 },
            ]),
            RequestBody::Stats => ResponseBody::Stats(Box::new(self.stats())),
            RequestBody::Status => ResponseBody::Status(Box::new(self.status())),
            RequestBody::Why(_) | RequestBody::Trace(_) => {
                ResponseBody::Refused(Refusal::new(api::Code::Failed, "this data plane has no packets"))
            }
        };
        vec![Response::whole(id, body)]
    }

    fn command(&mut self, command: &api::Command) -> Result<(), Refusal> {
        let command = Command::try_from(command.clone()).map_err(|bad| Refusal::from(&bad))?;
        self.capabilities.check(&command).map_err(|unsupported| Refusal::from(&unsupported))?;
        let change = self.model.apply(&command, &Host).map_err(|error| Refusal::from(&error))?;
        match change {
            Change::ServiceRemoved { key, .. } => self.forget(|k| *k == key),
            Change::Flushed(_) | Change::Zeroed(None) => self.forget(|_| true),
            Change::Zeroed(Some(key)) => self.forget(|k| *k == key),
            _ => {}
        }
        Ok(())
    }

    fn forget(&mut self, which: impl Fn(&ServiceKey) -> bool) {
        self.counted.retain(|(key, _), _| !which(key));
        self.counted_services.retain(|key, _| !which(key));
    }

    fn shown(&self, stats: Option<&Stats>) -> Stats {
        stats.copied().filter(|_| self.estimator_ran).unwrap_or_default()
    }

    /// The director has two CPUs; one of them did all the work.
    fn stats(&self) -> StatsReport {
        let total = self.shown(Some(&self.total));
        let cpus = [Stats::default(), total];
        let cpus = cpus.into_iter().zip(0..).map(|(stats, cpu)| CpuStats { cpu, stats }).collect();
        StatsReport { total, rates: Rates::default(), cpus }
    }

    fn status(&self) -> Status {
        Status {
            ready: true,
            rvsd: "0.1.0".into(),
            ipvs_version: [1, 2, 1],
            conn_table_size: 4096,
            pid: 1,
            uptime_s: 0,
            services: u32::try_from(self.model.service_count()).unwrap(),
            dests: u32::try_from(self.model.dest_count()).unwrap(),
            thinned: 0,
            connections: self.conns.len() as u64,
            interfaces: vec!["eth0 xdp".into()],
            warnings: Vec::new(),
        }
    }

    /// One `curl` from the client to a virtual service, answered by the server whose number the reply shows. `host` is
    /// the URL's, as the client sends it.
    pub fn http_request(&mut self, host: &str, key: ServiceKey, server: &Server, reply: &str) {
        let service = self.model.service(&key).expect("the recording asks a service that is there");
        let dest = *service.dests().find(|d| server.is(d.key.addr)).expect("a dest of that number");
        let persistence = service.config.persistence_s.map(|timeout_s| (timeout_s, service.config.granularity));
        let ServiceKey::Virtual { proto: Proto::Tcp, addr, port } = key else { panic!("HTTP is TCP") };
        let client: IpAddr = if addr.is_ipv4() { "172.16.0.100" } else { "fd00:c::100" }.parse().unwrap();
        if let Some((timeout_s, granularity)) = persistence {
            self.template(key, &dest, masked(client, granularity), timeout_s);
        }
        let masq = dest.method == FwdMethod::Masq;
        self.next_port += 1;
        let (time_wait, fin_wait) = (5, 4);
        let row = ConnRow {
            proto: 6,
            template: false,
            state: if masq { time_wait } else { fin_wait },
            expires_s: 119,
            client: (client, self.next_port),
            virt: (addr, port),
            dest: (dest.key.addr, dest.key.port),
            origin: ConnOrigin::Local,
            engine: None,
        };
        self.conns.push(Conn { service: key, dest: dest.key, row });
        let stats = http_stats(host, reply, addr.is_ipv6(), masq);
        for counter in [
            self.counted.entry((key, dest.key)).or_default(),
            self.counted_services.entry(key).or_default(),
            &mut self.total,
        ] {
            add(counter, &stats);
        }
    }

    fn template(&mut self, service: ServiceKey, dest: &Dest, client: IpAddr, timeout_s: u32) {
        let ServiceKey::Virtual { addr, port, .. } = service else { return };
        let row = ConnRow {
            proto: 6,
            template: true,
            state: 1,
            expires_s: timeout_s - 1,
            client: (client, 0),
            virt: (addr, port),
            dest: (dest.key.addr, dest.key.port),
            origin: ConnOrigin::Local,
            engine: None,
        };
        if !self.conns.iter().any(|c| c.row == row) {
            self.conns.push(Conn { service, dest: dest.key, row });
        }
    }
}

impl Counters for World {
    fn service(&self, service: &ServiceKey) -> (Stats, Rates) {
        (self.shown(self.counted_services.get(service)), Rates::default())
    }

    fn dest(&self, service: &ServiceKey, dest: &DestKey) -> DestCounters {
        let mine = || self.conns.iter().filter(|c| c.service == *service && c.dest == *dest);
        let count = |template| u32::try_from(mine().filter(|c| c.row.template == template).count()).unwrap();
        DestCounters {
            active: 0,
            inactive: count(false),
            persistent: count(true),
            stats: self.shown(self.counted.get(&(*service, *dest))),
            rates: Rates::default(),
        }
    }
}

impl Backend for World {
    fn connect(&mut self) -> Result<(), BackendError> {
        self.answers.clear();
        Ok(())
    }

    fn send(&mut self, body: RequestBody) -> Result<(), BackendError> {
        self.next_id += 1;
        // Over the wire and back: what tests see is what a socket carries.
        let mut line = Vec::new();
        api::encode(&Request::new(self.next_id, body), &mut line).unwrap();
        assert!(line.len() <= limits::REQUEST_BYTES_MAX);
        let request = api::decode_request(line.strip_suffix(b"\n").unwrap()).unwrap();
        let answers = self.answer(&request);
        self.answers.extend(answers);
        Ok(())
    }

    fn receive(&mut self) -> Result<Response, BackendError> {
        let response = self.answers.pop_front().ok_or(BackendError::Closed)?;
        let mut line = Vec::new();
        api::encode(&response, &mut line).unwrap();
        assert!(line.len() <= limits::RESPONSE_BYTES_MAX);
        Ok(api::decode_response(line.strip_suffix(b"\n").unwrap()).unwrap())
    }
}

/// A real server, by the number in its replies: rs3 is 10.0.0.13 and fd00:5::13.
pub struct Server(pub u8);

impl Server {
    fn is(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(v4) => v4.octets() == [10, 0, 0, 10 + self.0],
            IpAddr::V6(v6) => v6.segments()[..2] == [0xfd00, 5] && v6.segments()[7] == 0x10 + u16::from(self.0),
        }
    }
}

fn masked(addr: IpAddr, granularity: Granularity) -> IpAddr {
    match (addr, granularity) {
        (IpAddr::V4(v4), Granularity::V4(mask)) => IpAddr::V4(v4 & mask),
        (IpAddr::V6(v6), Granularity::V6(len)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask))
        }
        _ => addr,
    }
}

fn add(counter: &mut Stats, more: &Stats) {
    counter.conns += more.conns;
    counter.in_pkts += more.in_pkts;
    counter.out_pkts += more.out_pkts;
    counter.in_bytes += more.in_bytes;
    counter.out_bytes += more.out_bytes;
}

/// What one request over one connection is worth: from the client SYN, ACK, request, ACK, FIN, ACK; from the server
/// SYN-ACK, ACK, reply, FIN. Every packet has the timestamp option (12 bytes), SYNs have 20 bytes of options. Replies
/// that don't come back through the director are not counted.
fn http_stats(host: &str, reply: &str, v6: bool, masq: bool) -> Stats {
    let ip = if v6 { 40 } else { 20 };
    let (syn, plain) = (ip + 20 + 20, ip + 20 + 12);
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: curl/8.14.1\r\nAccept: */*\r\n\r\n");
    // Headers of the recordings' server; its Content-Length has two digits.
    let answer = 148 + reply.len() as u64;
    let out = u64::from(masq);
    Stats {
        conns: 1,
        in_pkts: 6,
        out_pkts: out * 4,
        in_bytes: syn + 5 * plain + request.len() as u64,
        out_bytes: out * (syn + 3 * plain + answer),
    }
}
