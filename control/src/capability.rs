//! What the data plane can do so far. Parser, model and renderers know every feature; a command for one that the data
//! plane lacks is refused here, in one line, before anything changes.

use std::collections::BTreeSet;

use crate::model::{
    Command, Dest, Family, FwdMethod, Proto, SchedFlags, Scheduler, ServiceKey, ServiceSpec, Tunnel, TunnelKind,
};

/// What is not possible yet, in one line without a newline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not supported yet: {0}")]
pub struct Unsupported(String);

impl Unsupported {
    pub fn new(what: impl Into<String>) -> Self {
        Unsupported(what.into())
    }
}

/// A switch for each thing that a command can ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub protocols: BTreeSet<Proto>,
    pub families: BTreeSet<Family>,
    pub schedulers: BTreeSet<Scheduler>,
    /// The scheduler "none".
    pub no_scheduler: bool,
    /// Schedulers whose flags have an effect.
    pub sched_flags: BTreeSet<Scheduler>,
    /// flag-3, which the kernel keeps for any scheduler and none of its schedulers reads.
    pub third_flag: bool,
    pub masq: bool,
    pub route: bool,
    pub tunnels: BTreeSet<TunnelKind>,
    pub fullnat: bool,
    pub mixed_families: bool,
    pub persistence: bool,
    pub engines: bool,
    pub fwmark: bool,
    pub port_zero: bool,
    pub one_packet: bool,
    pub thresholds: bool,
    pub sync_daemon: bool,
}

impl Capabilities {
    /// Everything the grammar knows.
    pub fn all() -> Self {
        Capabilities {
            protocols: [Proto::Tcp, Proto::Udp, Proto::Sctp].into(),
            families: [Family::V4, Family::V6].into(),
            schedulers: Scheduler::ALL.into(),
            no_scheduler: true,
            sched_flags: Scheduler::ALL.into(),
            third_flag: true,
            masq: true,
            route: true,
            tunnels: [TunnelKind::Ipip, TunnelKind::Gue, TunnelKind::Gre].into(),
            fullnat: true,
            mixed_families: true,
            persistence: true,
            engines: true,
            fwmark: true,
            port_zero: true,
            one_packet: true,
            thresholds: true,
            sync_daemon: true,
        }
    }

    /// What the data plane of this version does.
    pub fn current() -> Self {
        Capabilities {
            protocols: [Proto::Tcp, Proto::Udp, Proto::Sctp].into(),
            families: [Family::V4, Family::V6].into(),
            schedulers: Scheduler::ALL
                .into_iter()
                .filter(|s| !matches!(s, Scheduler::Lblc | Scheduler::Lblcr))
                .collect(),
            no_scheduler: false,
            sched_flags: [Scheduler::Mh, Scheduler::Sh].into(),
            third_flag: false,
            masq: true,
            route: true,
            tunnels: [TunnelKind::Ipip, TunnelKind::Gue, TunnelKind::Gre].into(),
            fullnat: true,
            mixed_families: true,
            persistence: false,
            engines: false,
            fwmark: false,
            port_zero: false,
            one_packet: false,
            thresholds: false,
            sync_daemon: false,
        }
    }

    /// Whether the data plane can carry the command out. Names that exist nowhere pass: the model refuses them with
    /// the stock error.
    pub fn check(&self, command: &Command) -> Result<(), Unsupported> {
        match command {
            Command::AddService(key, spec) | Command::EditService(key, spec) => self.check_service(key, spec),
            Command::AddDest(key, dest) | Command::EditDest(key, dest) => self.check_dest(key, dest),
            Command::StartDaemon(_) => need(self.sync_daemon, || "connection sync daemons".into()),
            Command::AddLocalAddress(..) | Command::DelLocalAddress(..) => self.check_local_addresses(),
            Command::DelService(_)
            | Command::DelDest(..)
            | Command::Flush
            | Command::Zero(_)
            | Command::SetTimeouts(_)
            | Command::Set(..)
            | Command::Defend(..)
            | Command::Proxy(..)
            | Command::StopDaemon(_) => Ok(()),
        }
    }

    /// For commands about FULLNAT's local addresses, and for listing them.
    pub fn check_local_addresses(&self) -> Result<(), Unsupported> {
        need(self.fullnat, || "local address pools (FULLNAT)".into())
    }

    fn check_service(&self, key: &ServiceKey, spec: &ServiceSpec) -> Result<(), Unsupported> {
        match key {
            ServiceKey::Virtual { proto, port, .. } => {
                need(self.protocols.contains(proto), || format!("{} services", proto_name(*proto)))?;
                need(*port != 0 || self.port_zero, || "services for all ports (port 0)".into())?;
            }
            ServiceKey::Fwmark { .. } => need(self.fwmark, || "firewall mark services (-f)".into())?,
        }
        need(self.families.contains(&key.family()), || format!("{} services", family_name(key.family())))?;
        need(spec.persistence_s.is_none() || self.persistence, || "persistent services (-p)".into())?;
        need(spec.engine.is_none() || self.engines, || "persistence engines (--pe)".into())?;
        need(!spec.one_packet || self.one_packet, || "one-packet scheduling (-o)".into())?;
        self.check_scheduler(&spec.scheduler, spec.sched_flags)
    }

    fn check_scheduler(&self, name: &str, flags: SchedFlags) -> Result<(), Unsupported> {
        if name == "none" {
            return need(self.no_scheduler, || "services without a scheduler (-s none)".into());
        }
        let Some(scheduler) = Scheduler::from_name(name) else { return Ok(()) };
        need(self.schedulers.contains(&scheduler), || format!("scheduler {name}"))?;
        let flags_work = self.sched_flags.contains(&scheduler);
        need(flags.is_empty() || flags_work, || format!("scheduler flags (-b) of {name}"))?;
        let third = flags.contains(SchedFlags::THIRD);
        need(!third || self.third_flag, || format!("scheduler flag flag-3 of {name}"))
    }

    fn check_dest(&self, key: &ServiceKey, dest: &Dest) -> Result<(), Unsupported> {
        match dest.method {
            FwdMethod::Masq => need(self.masq, || "masquerading (-m)".into())?,
            FwdMethod::Route | FwdMethod::Local => need(self.route, || "direct routing (-g)".into())?,
            FwdMethod::Tunnel(Tunnel { kind, .. }) => {
                need(self.tunnels.contains(&kind), || format!("tunneling (-i) by {}", tunnel_name(kind)))?;
            }
            FwdMethod::Fullnat => need(self.fullnat, || "full NAT (--fullnat)".into())?,
        }
        let mixed = key.family() != Family::of(&dest.key.addr);
        need(!mixed || self.mixed_families, || "a real server of the other address family".into())?;
        let thresholds = dest.upper != 0 || dest.lower != 0;
        need(!thresholds || self.thresholds, || "connection thresholds (-x, -y)".into())
    }
}

fn need(can: bool, what: impl FnOnce() -> String) -> Result<(), Unsupported> {
    if can { Ok(()) } else { Err(Unsupported(what())) }
}

const fn proto_name(proto: Proto) -> &'static str {
    match proto {
        Proto::Tcp => "TCP",
        Proto::Udp => "UDP",
        Proto::Sctp => "SCTP",
    }
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

const fn tunnel_name(kind: TunnelKind) -> &'static str {
    match kind {
        TunnelKind::Ipip => "ipip",
        TunnelKind::Gue => "gue",
        TunnelKind::Gre => "gre",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DaemonRole, DaemonSpec, DestKey, Granularity, TunnelChecksum};

    fn service(port: u16) -> ServiceKey {
        ServiceKey::Virtual { proto: Proto::Tcp, addr: "192.0.2.1".parse().unwrap(), port }
    }

    fn spec(scheduler: &str) -> ServiceSpec {
        ServiceSpec {
            scheduler: scheduler.into(),
            sched_flags: SchedFlags::NONE,
            persistence_s: None,
            granularity: Granularity::host(Family::V4),
            engine: None,
            one_packet: false,
        }
    }

    fn dest(method: FwdMethod) -> Dest {
        Dest { key: DestKey { addr: "10.0.0.1".parse().unwrap(), port: 80 }, method, weight: 1, upper: 0, lower: 0 }
    }

    /// Commands that the current data plane takes.
    fn taken() -> Vec<Command> {
        let flags = |bits| SchedFlags::from_bits(bits).unwrap();
        let v6 = ServiceKey::Virtual { proto: Proto::Udp, addr: "2001:db8::1".parse().unwrap(), port: 53 };
        let sctp = ServiceKey::Virtual { proto: Proto::Sctp, addr: "192.0.2.1".parse().unwrap(), port: 80 };
        let gue = Tunnel { kind: TunnelKind::Gue, port: 6080, checksum: TunnelChecksum::None };
        let other = DestKey { addr: "2001:db8::2".parse().unwrap(), port: 80 };
        let mixed = Dest { key: other, ..dest(FwdMethod::Tunnel(gue)) };
        let mut commands: Vec<Command> =
            ["rr", "wrr", "lc", "wlc", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos", "nosuch"]
                .map(|name| Command::AddService(service(80), spec(name)))
                .into();
        commands.extend([
            Command::AddService(service(80), ServiceSpec { sched_flags: flags(3), ..spec("mh") }),
            Command::AddService(service(80), ServiceSpec { sched_flags: flags(3), ..spec("sh") }),
            Command::AddService(v6, ServiceSpec { granularity: Granularity::V6(128), ..spec("rr") }),
            Command::AddService(sctp, spec("rr")),
            Command::AddDest(sctp, dest(FwdMethod::Fullnat)),
            Command::AddDest(service(80), dest(FwdMethod::Masq)),
            Command::EditDest(service(80), dest(FwdMethod::Route)),
            Command::AddDest(service(80), dest(FwdMethod::Tunnel(Tunnel::IPIP))),
            Command::AddDest(service(80), mixed),
            Command::AddDest(service(80), dest(FwdMethod::Fullnat)),
            Command::AddLocalAddress(service(80), "10.0.0.9".parse().unwrap()),
            Command::Flush,
            Command::Zero(None),
            Command::StopDaemon(DaemonRole::Master),
        ]);
        commands
    }

    /// Commands that it does not, with a word of the line that says so.
    fn refused() -> Vec<(Command, &'static str)> {
        let flags = |bits| SchedFlags::from_bits(bits).unwrap();
        let mark = ServiceKey::Fwmark { mark: 1, family: Family::V4 };
        let daemon = DaemonSpec {
            role: DaemonRole::Master,
            interface: "eth0".into(),
            syncid: 0,
            maxlen: None,
            group: None,
            port: None,
            ttl: None,
        };
        vec![
            (Command::AddService(mark, spec("rr")), "firewall mark"),
            (Command::AddService(service(0), spec("rr")), "port 0"),
            (Command::AddService(service(80), spec("lblc")), "scheduler lblc"),
            (Command::AddService(service(80), spec("none")), "-s none"),
            (Command::EditService(service(80), spec("lblcr")), "scheduler lblcr"),
            (Command::AddService(service(80), ServiceSpec { sched_flags: flags(1), ..spec("rr") }), "-b"),
            (Command::AddService(service(80), ServiceSpec { sched_flags: flags(4), ..spec("mh") }), "flag-3"),
            (Command::AddService(service(80), ServiceSpec { persistence_s: Some(300), ..spec("rr") }), "-p"),
            (Command::AddService(service(80), ServiceSpec { engine: Some("sip".into()), ..spec("rr") }), "--pe"),
            (Command::AddService(service(80), ServiceSpec { one_packet: true, ..spec("rr") }), "-o"),
            (Command::AddDest(service(80), Dest { upper: 10, ..dest(FwdMethod::Masq) }), "-x"),
            (Command::StartDaemon(daemon), "sync"),
        ]
    }

    #[test]
    fn current_takes_and_refuses_as_the_table_says() {
        let current = Capabilities::current();
        for command in taken() {
            assert_eq!(current.check(&command), Ok(()), "{command:?}");
        }
        for (command, word) in refused() {
            let line = current.check(&command).expect_err(&format!("{command:?}")).to_string();
            assert!(line.contains(word), "{line:?} should name {word:?}");
            assert!(!line.contains('\n'));
        }
    }

    #[test]
    fn all_refuses_nothing() {
        let all = Capabilities::all();
        for command in taken().into_iter().chain(refused().into_iter().map(|(command, _)| command)) {
            assert_eq!(all.check(&command), Ok(()), "{command:?}");
        }
    }
}
