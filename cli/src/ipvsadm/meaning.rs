//! What the arguments mean. Values are read in the order they were typed, each complaint comes where stock ipvsadm
//! 1.31 has it (`parse_options`, `generic_opt_check`, `process_options`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rvs_control::api::{
    Command, DaemonRole, DaemonSpec, DestId, DestSpec, Family, Forward, Granularity, Proto, ServiceId, ServiceSpec,
    Timeouts, TunnelChecksum, TunnelKind,
};
use rvs_control::limits;

use super::EXIT_KERNEL;
use super::flags::{Flag, LowArgs, Opt, Rule, Typed};
use super::numbers::{atoi, inet_aton, number_in};
use crate::names::Resolver;

/// Exit code of a usage error.
const EXIT_USAGE: u8 = 2;

/// `IPVS_SVC_PERSISTENT_TIMEOUT`: what `-p` without a value means, seconds.
const PERSISTENT_TIMEOUT_S: u32 = 360;

const DEFAULT_SCHEDULER: &str = "wlc";
const DEFAULT_INTERFACE: &str = "eth0";

/// A complaint, and the exit code that goes with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fail {
    pub message: String,
    pub exit: u8,
    /// Whether `-R` goes on with the next line: stock gives up on what it can't make sense of, except where popt did.
    pub goes_on: bool,
}

impl Fail {
    fn usage(message: impl Into<String>) -> Self {
        Fail { message: message.into(), exit: EXIT_USAGE, goes_on: false }
    }

    pub(super) fn try_help(program: &str) -> Self {
        let message = format!("Try `{program} -h' or '{program} --help' for more information.");
        Fail { message, exit: EXIT_KERNEL, goes_on: false }
    }
}

/// Which columns a listing has. Where several are asked for, the first of this order wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Columns {
    Rule,
    Stats,
    Rate,
    Thresholds,
    PersistentConn,
    TunInfo,
    #[default]
    Plain,
}

/// How a listing looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Format {
    pub columns: Columns,
    pub numeric: bool,
    pub nosort: bool,
    pub exact: bool,
    /// For connections: show what the persistence engine knows.
    pub engine: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Help or version.
    Text(Flag),
    ListAll(Format),
    ListOne(ServiceId, Format),
    ListConnections(Format),
    ListTimeouts,
    ListDaemons,
    Restore,
    ListLocalAddresses(Option<ServiceId>, Format),
    Command(Command),
}

/// The meaning of `low`; `program` is how the command was called, for messages.
pub fn meaning(low: &LowArgs, program: &str, resolver: &mut dyn Resolver) -> Result<Action, Fail> {
    let Some((first, options)) = low.typed.split_first() else {
        return Err(Fail::try_help(program));
    };
    let command = first.flag;
    match command {
        Flag::Help | Flag::Version => return Ok(Action::Text(command)),
        _ if command.command_name().is_none() => return Err(Fail::try_help(program)),
        _ => {}
    }
    let mut reading = Reading::new(command, resolver);
    if command == Flag::StartDaemon || command == Flag::StopDaemon {
        reading.role = Some(daemon_role(first)?);
    }
    for typed in options {
        reading.read(typed)?;
    }
    if let Some(bad) = &low.error {
        let message = format!("{}: {}", bad.argument, bad.reason);
        return Err(Fail { message, exit: EXIT_KERNEL, goes_on: true });
    }
    let mut rest = low.rest.iter();
    if command == Flag::Set {
        reading.timeouts = set_timeouts(&mut rest)?;
    }
    if let Some(word) = rest.next() {
        return Err(Fail::usage(format!("unexpected argument {word}")));
    }
    reading.check_options()?;
    reading.action()
}

fn daemon_role(typed: &Typed) -> Result<DaemonRole, Fail> {
    match (typed.value.as_deref(), typed.flag) {
        (Some("master"), _) => Ok(DaemonRole::Master),
        (Some("backup"), _) => Ok(DaemonRole::Backup),
        (_, Flag::StartDaemon) => Err(Fail::usage("illegal start-daemon parameter specified")),
        _ => Err(Fail::usage("illegal start_daemon specified")),
    }
}

fn set_timeouts(rest: &mut std::slice::Iter<'_, String>) -> Result<Timeouts, Fail> {
    let (Some(tcp), Some(tcp_fin), Some(udp)) = (rest.next(), rest.next(), rest.next()) else {
        return Err(Fail::usage("--set option requires 3 timeout values"));
    };
    Ok(Timeouts { tcp_s: timeout(tcp, 0)?, tcp_fin_s: timeout(tcp_fin, 0)?, udp_s: timeout(udp, 0)? })
}

fn timeout(text: &str, min: u32) -> Result<u32, Fail> {
    number_in(text, min, limits::TIMEOUT_S_MAX)
        .ok_or_else(|| Fail::usage(format!("invalid timeout value `{text}' specified")))
}

/// An address with a port, as far as it was given.
struct Address {
    addr: IpAddr,
    port: Option<u16>,
}

/// Everything the options say, while they are read. Defaults are those of `process_options`.
struct Reading<'r> {
    command: Flag,
    resolver: &'r mut dyn Resolver,
    seen: Vec<Opt>,
    format: Format,
    role: Option<DaemonRole>,
    timeouts: Timeouts,
    // The service.
    proto: Option<Proto>,
    addr: IpAddr,
    port: u16,
    mark: u32,
    family: Family,
    granularity: Granularity,
    scheduler: String,
    sched_flags: u8,
    persistence_s: Option<u32>,
    engine: Option<String>,
    one_packet: bool,
    // The real server.
    dest: DestId,
    method: Flag,
    weight: u32,
    upper: u32,
    lower: u32,
    tunnel: TunnelKind,
    tunnel_port: u16,
    checksum: TunnelChecksum,
    // The sync daemon, and the FULLNAT pool.
    daemon: DaemonSpec,
    local_address: IpAddr,
}

const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

impl<'r> Reading<'r> {
    fn new(command: Flag, resolver: &'r mut dyn Resolver) -> Self {
        Reading {
            command,
            resolver,
            seen: Vec::new(),
            format: Format::default(),
            role: None,
            timeouts: Timeouts { tcp_s: 0, tcp_fin_s: 0, udp_s: 0 },
            proto: None,
            addr: NOWHERE,
            port: 0,
            mark: 0,
            family: Family::V4,
            granularity: Granularity::Netmask(Ipv4Addr::BROADCAST),
            scheduler: String::new(),
            sched_flags: 0,
            persistence_s: None,
            engine: None,
            one_packet: false,
            dest: DestId { addr: NOWHERE, port: 0 },
            method: Flag::Gatewaying,
            weight: 1,
            upper: 0,
            lower: 0,
            tunnel: TunnelKind::Ipip,
            tunnel_port: 0,
            checksum: TunnelChecksum::None,
            daemon: DaemonSpec {
                role: DaemonRole::Master,
                interface: String::new(),
                syncid: 0,
                maxlen: None,
                group: None,
                port: None,
                ttl: None,
            },
            local_address: NOWHERE,
        }
    }

    fn has(&self, opt: Opt) -> bool {
        self.seen.contains(&opt)
    }

    fn read(&mut self, typed: &Typed) -> Result<(), Fail> {
        if let Some(opt) = typed.flag.opt() {
            if self.has(opt) {
                return Err(Fail::usage(format!("multiple '{}' options specified", opt.name())));
            }
            self.seen.push(opt);
        }
        let value = typed.value.as_deref().unwrap_or_default();
        match typed.flag {
            Flag::TcpService => self.read_service(Proto::Tcp, value),
            Flag::UdpService => self.read_service(Proto::Udp, value),
            Flag::SctpService => self.read_service(Proto::Sctp, value),
            Flag::FwmarkService => self.read_mark(value),
            Flag::Ipv6 => self.read_ipv6(),
            Flag::Scheduler => {
                self.scheduler = shortened(value, limits::SCHED_NAME_BYTES_MAX);
                Ok(())
            }
            Flag::SchedFlags => self.read_sched_flags(value),
            Flag::Persistent => self.read_persistence(typed.value.as_deref()),
            Flag::Netmask => self.read_netmask(value),
            Flag::Pe => {
                self.engine = Some(shortened(value, limits::ENGINE_NAME_BYTES_MAX)).filter(|e| !e.is_empty());
                Ok(())
            }
            Flag::Ops => {
                self.one_packet = true;
                Ok(())
            }
            Flag::RealServer => self.read_server(value),
            Flag::Masquerading | Flag::Ipip | Flag::Gatewaying | Flag::Fullnat => {
                self.method = typed.flag;
                Ok(())
            }
            Flag::LocalAddress => self.read_local_address(value),
            _ => self.read_number(typed.flag, value).unwrap_or_else(|| self.read_other(typed, value)),
        }
    }

    /// Options whose value is a number within bounds; `None` if this is not one.
    fn read_number(&mut self, flag: Flag, value: &str) -> Option<Result<(), Fail>> {
        let (min, max, name) = match flag {
            Flag::Weight => (0, limits::WEIGHT_MAX, "weight"),
            Flag::UThreshold => (0, limits::WEIGHT_MAX, "u_threshold"),
            Flag::LThreshold => (0, limits::WEIGHT_MAX, "l_threshold"),
            Flag::Syncid => (0, 255, "syncid"),
            Flag::McastPort => (1, 65535, "mcast-port"),
            Flag::McastTtl => (1, 255, "mcast-ttl"),
            Flag::SyncMaxlen => (1, 65535 - 20 - 8, "sync-maxlen"),
            Flag::TunPort => (1, 65535, "tunnel port"),
            _ => return None,
        };
        let Some(number) = number_in(value, min, max) else {
            return Some(Err(Fail::usage(format!("illegal {name} specified"))));
        };
        let port = u16::try_from(number).unwrap_or(u16::MAX);
        let byte = u8::try_from(number).unwrap_or(u8::MAX);
        match flag {
            Flag::Weight => self.weight = number,
            Flag::UThreshold => self.upper = number,
            Flag::LThreshold => self.lower = number,
            Flag::Syncid => self.daemon.syncid = byte,
            Flag::McastPort => self.daemon.port = Some(port),
            Flag::McastTtl => self.daemon.ttl = Some(byte),
            Flag::SyncMaxlen => self.daemon.maxlen = Some(port),
            _ => self.tunnel_port = port,
        }
        Some(Ok(()))
    }

    fn read_other(&mut self, typed: &Typed, value: &str) -> Result<(), Fail> {
        match typed.flag {
            Flag::McastInterface => self.daemon.interface = shortened(value, limits::INTERFACE_NAME_BYTES_MAX),
            Flag::McastGroup => self.daemon.group = Some(multicast_group(value)?),
            Flag::TunType => {
                self.tunnel = match value {
                    "ipip" => TunnelKind::Ipip,
                    "gue" => TunnelKind::Gue,
                    "gre" => TunnelKind::Gre,
                    _ => return Err(Fail::usage("illegal tunnel type specified")),
                };
            }
            Flag::TunNocsum => self.checksum = TunnelChecksum::None,
            Flag::TunCsum => self.checksum = TunnelChecksum::Csum,
            Flag::TunRemcsum => self.checksum = TunnelChecksum::Remcsum,
            Flag::Numeric => self.format.numeric = true,
            Flag::Nosort => self.format.nosort = true,
            Flag::Exact => self.format.exact = true,
            Flag::Connection
            | Flag::Timeout
            | Flag::Daemon
            | Flag::Stats
            | Flag::Rate
            | Flag::Thresholds
            | Flag::PersistentConn
            | Flag::TunInfo
            | Flag::Sort => {}
            _ => return Err(Fail::usage(format!("invalid option `{}'", typed.argument))),
        }
        Ok(())
    }

    fn read_service(&mut self, proto: Proto, value: &str) -> Result<(), Fail> {
        self.proto = Some(proto);
        let Some(address) = self.address(value) else {
            return Err(Fail::usage("illegal virtual server address[:port] specified"));
        };
        self.addr = address.addr;
        self.port = address.port.unwrap_or(0);
        self.family = Family::of(&address.addr);
        if self.family == Family::V6 {
            self.granularity = Granularity::PrefixLen(128);
        }
        Ok(())
    }

    fn read_mark(&mut self, value: &str) -> Result<(), Fail> {
        let mark = number_in(value, 1, u32::MAX);
        self.mark = mark.ok_or_else(|| Fail::usage(format!("invalid fwmark value `{value}' specified")))?;
        self.family = Family::V4;
        // Service names are then those of TCP.
        self.proto = Some(Proto::Tcp);
        Ok(())
    }

    fn read_ipv6(&mut self) -> Result<(), Fail> {
        if self.mark == 0 {
            return Err(Fail::usage("-6 must follow -f\n"));
        }
        self.family = Family::V6;
        self.granularity = Granularity::PrefixLen(128);
        Ok(())
    }

    fn read_persistence(&mut self, value: Option<&str>) -> Result<(), Fail> {
        self.persistence_s = Some(match value {
            None => PERSISTENT_TIMEOUT_S,
            Some(text) => timeout(text, 1)?,
        });
        Ok(())
    }

    /// A netmask for IPv4, a prefix length for IPv6: whichever the service before it calls for.
    fn read_netmask(&mut self, value: &str) -> Result<(), Fail> {
        self.granularity = match self.family {
            Family::V4 => inet_aton(value)
                .or_else(|| self.resolver.host_to_v4(value))
                .map(Granularity::Netmask)
                .ok_or_else(|| Fail::usage("illegal virtual server persistent mask specified"))?,
            Family::V6 => u8::try_from(atoi(value))
                .ok()
                .filter(|len| (1..=128).contains(len))
                .map(Granularity::PrefixLen)
                .ok_or_else(|| Fail::usage("illegal ipv6 netmask specified"))?,
        };
        Ok(())
    }

    /// sh's and mh's own names need that scheduler to have been named before.
    fn read_sched_flags(&mut self, value: &str) -> Result<(), Fail> {
        for name in value.split(',').filter(|name| !name.is_empty()) {
            let (bit, scheduler) = match name {
                "flag-1" => (1, None),
                "flag-2" => (2, None),
                "flag-3" => (4, None),
                "sh-fallback" => (1, Some("sh")),
                "sh-port" => (2, Some("sh")),
                "mh-fallback" => (1, Some("mh")),
                "mh-port" => (2, Some("mh")),
                _ => return Err(Fail::usage(format!("invalid scheduler flag `{name}'"))),
            };
            if scheduler.is_some_and(|s| s != self.scheduler) {
                return Err(Fail::usage(format!("incompatible scheduler flag `{name}'")));
            }
            self.sched_flags |= bit;
        }
        Ok(())
    }

    fn read_server(&mut self, value: &str) -> Result<(), Fail> {
        let Some(address) = self.address(value) else {
            return Err(Fail::usage("illegal real server address[:port] specified"));
        };
        self.dest = DestId { addr: address.addr, port: address.port.unwrap_or(self.port) };
        Ok(())
    }

    fn read_local_address(&mut self, value: &str) -> Result<(), Fail> {
        let Some(Address { addr, port: None }) = self.address(value) else {
            return Err(Fail::usage("illegal local address specified"));
        };
        self.local_address = addr;
        Ok(())
    }

    /// `host`, `host:port`, an IPv6 address, or `[IPv6 address]:port` (`parse_service`). Digits alone are no host. A
    /// pair of brackets must be followed by a port.
    fn address(&mut self, text: &str) -> Option<Address> {
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let (host, mut port_text) = match text.strip_prefix('[') {
            Some(inside) => {
                let (host, after) = inside.split_once(']')?;
                (host, Some(after.strip_prefix(':')?))
            }
            None => (text, None),
        };
        let addr = if let Ok(v6) = host.parse::<Ipv6Addr>() {
            IpAddr::V6(v6)
        } else {
            let (host, port) = match host.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (host, None),
            };
            port_text = port;
            IpAddr::V4(inet_aton(host).or_else(|| self.resolver.host_to_v4(host))?)
        };
        let port = match port_text {
            None => None,
            Some(text) => Some(self.port_number(text)?),
        };
        Some(Address { addr, port })
    }

    fn port_number(&mut self, text: &str) -> Option<u16> {
        let number = number_in(text, 0, 65535).and_then(|n| u16::try_from(n).ok());
        number.or_else(|| {
            let proto = match self.proto? {
                Proto::Tcp => 6,
                Proto::Udp => 17,
                Proto::Sctp => 132,
            };
            self.resolver.service_to_port(text, proto)
        })
    }

    /// Which options the command needs, takes and refuses.
    fn check_options(&self) -> Result<(), Fail> {
        let name = self.command.command_name().unwrap_or_default();
        check_rules(Opt::ALL.into_iter(), &self.seen, |opt| self.command.rule(opt), &format!("'{name}' command"))
    }

    fn action(self) -> Result<Action, Fail> {
        match self.command {
            Flag::List => self.list_action(),
            Flag::Save => Ok(Action::ListAll(Format {
                columns: Columns::Rule,
                numeric: self.format.numeric,
                ..Format::default()
            })),
            Flag::Restore => Ok(Action::Restore),
            Flag::GetLocalAddresses => {
                let service = self.has(Opt::Service).then(|| self.service());
                Ok(Action::ListLocalAddresses(service, self.format))
            }
            _ => self.command_action().map(Action::Command),
        }
    }

    fn list_action(mut self) -> Result<Action, Fail> {
        let other_table = self.has(Opt::Timeout) || self.has(Opt::Daemon);
        let counters = self.has(Opt::Stats) || self.has(Opt::Rate) || self.has(Opt::Thresholds);
        if (counters && (other_table || self.has(Opt::Connection))) || (other_table && self.has(Opt::PersistentConn)) {
            return Err(Fail::usage("options conflicts in the list command"));
        }
        self.format.engine = self.has(Opt::PersistentConn);
        self.format.columns = [
            (Opt::Stats, Columns::Stats),
            (Opt::Rate, Columns::Rate),
            (Opt::Thresholds, Columns::Thresholds),
            (Opt::PersistentConn, Columns::PersistentConn),
            (Opt::TunInfo, Columns::TunInfo),
        ]
        .into_iter()
        .find_map(|(opt, columns)| self.has(opt).then_some(columns))
        .unwrap_or_default();
        Ok(if self.has(Opt::Connection) {
            Action::ListConnections(self.format)
        } else if self.has(Opt::Service) {
            Action::ListOne(self.service(), self.format)
        } else if self.has(Opt::Timeout) {
            Action::ListTimeouts
        } else if self.has(Opt::Daemon) {
            Action::ListDaemons
        } else {
            Action::ListAll(self.format)
        })
    }

    fn command_action(self) -> Result<Command, Fail> {
        let service = self.service();
        Ok(match self.command {
            Flag::AddService => Command::AddService { service, spec: self.service_spec()? },
            Flag::EditService => Command::EditService { service, spec: self.service_spec()? },
            Flag::DelService => Command::DelService { service },
            Flag::AddServer => Command::AddDest { service, dest: self.dest_spec()? },
            Flag::EditServer => Command::EditDest { service, dest: self.dest_spec()? },
            Flag::DelServer => Command::DelDest { service, dest: self.dest },
            Flag::Zero => Command::Zero { service: self.has(Opt::Service).then_some(service) },
            Flag::Set => Command::SetTimeouts(self.timeouts),
            Flag::StartDaemon => Command::StartDaemon(self.daemon_spec()),
            Flag::StopDaemon => Command::StopDaemon { role: self.role.unwrap_or(DaemonRole::Master) },
            Flag::AddLocalAddress => Command::AddLocalAddress { service, addr: self.local_address },
            Flag::DelLocalAddress => Command::DelLocalAddress { service, addr: self.local_address },
            _ => Command::Flush,
        })
    }

    fn service(&self) -> ServiceId {
        match (self.mark, self.proto) {
            (0, proto) => ServiceId::Virtual { proto: proto.unwrap_or(Proto::Tcp), addr: self.addr, port: self.port },
            (mark, _) => ServiceId::Fwmark { mark, family: self.family },
        }
    }

    fn service_spec(self) -> Result<ServiceSpec, Fail> {
        if self.mark == 0 && self.port == 0 && self.persistence_s.is_none() {
            return Err(Fail::usage("Zero port specified for non-persistent service"));
        }
        if self.one_packet && self.mark == 0 && self.proto != Some(Proto::Udp) {
            return Err(Fail::usage("One-Packet Scheduling is only for UDP virtual services"));
        }
        let scheduler = if self.scheduler.is_empty() { DEFAULT_SCHEDULER.to_owned() } else { self.scheduler };
        Ok(ServiceSpec {
            scheduler,
            sched_flags: self.sched_flags,
            persistence_s: self.persistence_s,
            granularity: self.granularity,
            engine: self.engine,
            one_packet: self.one_packet,
        })
    }

    fn dest_spec(mut self) -> Result<DestSpec, Fail> {
        let tunneled = self.method == Flag::Ipip;
        // Tunnels and direct routing deliver to the service's own port. A mark has none.
        if self.mark == 0 && (tunneled || self.method == Flag::Gatewaying) {
            self.dest.port = self.port;
        }
        if Family::of(&self.dest.addr) != self.family && !tunneled {
            return Err(Fail::usage("Different address family is allowed only for tunneling servers"));
        }
        let tunnel_options = [Opt::TunType, Opt::TunPort, Opt::TunNocsum, Opt::TunCsum, Opt::TunRemcsum];
        if !tunneled && tunnel_options.into_iter().any(|opt| self.has(opt)) {
            return Err(Fail::usage("Tunnel options conflict with forward method"));
        }
        self.check_tunnel()?;
        let forward = match self.method {
            Flag::Masquerading => Forward::Masq,
            Flag::Ipip => Forward::Tunnel { kind: self.tunnel, port: self.tunnel_port, checksum: self.checksum },
            Flag::Fullnat => Forward::Fullnat,
            _ => Forward::Route,
        };
        Ok(DestSpec { id: self.dest, forward, weight: self.weight, upper: self.upper, lower: self.lower })
    }

    /// Which options the tunnel type needs, takes and refuses (`tunnel_types_v_options`).
    fn check_tunnel(&self) -> Result<(), Fail> {
        let kind = self.tunnel;
        let rule = |opt| match (kind, opt) {
            (TunnelKind::Gue, Opt::TunPort) => Rule::Needed,
            (TunnelKind::Gue, _) | (TunnelKind::Gre, Opt::TunNocsum | Opt::TunCsum) => Rule::OneOf,
            _ => Rule::Illegal,
        };
        let name = match kind {
            TunnelKind::Ipip => "ipip",
            TunnelKind::Gue => "gue",
            TunnelKind::Gre => "gre",
        };
        let options = [Opt::TunPort, Opt::TunNocsum, Opt::TunCsum, Opt::TunRemcsum];
        check_rules(options.into_iter(), &self.seen, rule, &format!("'{name}' tunnel type"))
    }

    fn daemon_spec(self) -> DaemonSpec {
        let mut spec = self.daemon;
        spec.role = self.role.unwrap_or(DaemonRole::Master);
        if spec.interface.is_empty() {
            DEFAULT_INTERFACE.clone_into(&mut spec.interface);
        }
        spec
    }
}

/// Checks the options that were given against their rules, in the order of the options.
fn check_rules(
    options: impl Iterator<Item = Opt>,
    seen: &[Opt],
    rule: impl Fn(Opt) -> Rule,
    place: &str,
) -> Result<(), Fail> {
    let mut exclusive: Option<Opt> = None;
    for opt in options {
        let name = opt.name();
        match (rule(opt), seen.contains(&opt)) {
            (Rule::Needed, false) => {
                return Err(Fail::usage(format!("You need to supply the '{name}' option for the {place}")));
            }
            (Rule::Illegal, true) => return Err(Fail::usage(format!("Illegal '{name}' option with the {place}"))),
            (Rule::OneOf, true) => {
                if let Some(first) = exclusive {
                    let first = first.name();
                    return Err(Fail::usage(format!(
                        "The option '{name}' conflicts with the '{first}' option in the {place}"
                    )));
                }
                exclusive = Some(opt);
            }
            _ => {}
        }
    }
    Ok(())
}

fn multicast_group(text: &str) -> Result<IpAddr, Fail> {
    let (family, group) = if text.contains(':') {
        ("IPv6", text.parse::<Ipv6Addr>().ok().map(IpAddr::V6))
    } else {
        ("IPv4", text.parse::<Ipv4Addr>().ok().map(IpAddr::V4))
    };
    group.filter(IpAddr::is_multicast).ok_or_else(|| Fail::usage(format!("invalid {family} mcast-group `{text}'")))
}

/// At most `max` bytes of a name, as the kernel's structures have room for.
fn shortened(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
