//! Between the socket's types and the model's. Every bound of a command is checked here, on its way in.

use std::net::IpAddr;

use super::{
    Code, Command, DaemonRole, DaemonRow, DaemonSpec, Defence, DestId, DestSpec, Family, Forward, Granularity, Proto,
    Refusal, ServiceId, ServiceSpec, Timeouts, TunnelChecksum, TunnelKind,
};
use crate::model::{self, CommandError};
use crate::{capability, limits};

/// A command whose values no client of ours would send.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCommand {
    #[error("{what} is {bytes} bytes long, the limit is {max}")]
    TooLong { what: &'static str, bytes: usize, max: usize },
    #[error("{what} is empty or has a control character")]
    BadText { what: &'static str },
    #[error("scheduler flags {0:#x} have a bit above the third")]
    SchedFlags(u8),
}

impl TryFrom<Command> for model::Command {
    type Error = BadCommand;

    fn try_from(command: Command) -> Result<Self, BadCommand> {
        Ok(match command {
            Command::AddService { service, spec } => Self::AddService(service.into(), spec.try_into()?),
            Command::EditService { service, spec } => Self::EditService(service.into(), spec.try_into()?),
            Command::DelService { service } => Self::DelService(service.into()),
            Command::AddDest { service, dest } => Self::AddDest(service.into(), dest.into()),
            Command::EditDest { service, dest } => Self::EditDest(service.into(), dest.into()),
            Command::DelDest { service, dest } => Self::DelDest(service.into(), dest.into()),
            Command::Flush => Self::Flush,
            Command::Zero { service } => Self::Zero(service.map(Into::into)),
            Command::SetTimeouts(t) => {
                Self::SetTimeouts(model::Timeouts { tcp_s: t.tcp_s, tcp_fin_s: t.tcp_fin_s, udp_s: t.udp_s })
            }
            Command::StartDaemon(spec) => Self::StartDaemon(spec.try_into()?),
            Command::StopDaemon { role } => Self::StopDaemon(role.into()),
            Command::AddLocalAddress { service, addr } => Self::AddLocalAddress(service.into(), addr),
            Command::DelLocalAddress { service, addr } => Self::DelLocalAddress(service.into(), addr),
            Command::Set { name, value } => {
                checked_text(&name, "setting", 32)?;
                Self::Set(name, value)
            }
            Command::Defend { service, defence } => Self::Defend(service.into(), defence.into()),
            Command::Proxy { service, on } => Self::Proxy(service.into(), on),
        })
    }
}

/// Text that will be shown to people and compared with names: short, and without control characters.
fn checked_text(text: &str, what: &'static str, max: usize) -> Result<(), BadCommand> {
    if text.len() > max {
        return Err(BadCommand::TooLong { what, bytes: text.len(), max });
    }
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(BadCommand::BadText { what });
    }
    Ok(())
}

impl From<Defence> for model::Defence {
    fn from(d: Defence) -> Self {
        model::Defence { cookies_above: d.cookies_above, rate: d.rate, source_rate: d.source_rate }
    }
}
impl From<model::Defence> for Defence {
    fn from(d: model::Defence) -> Self {
        Defence { cookies_above: d.cookies_above, rate: d.rate, source_rate: d.source_rate }
    }
}

impl TryFrom<ServiceSpec> for model::ServiceSpec {
    type Error = BadCommand;

    fn try_from(spec: ServiceSpec) -> Result<Self, BadCommand> {
        checked_text(&spec.scheduler, "scheduler", limits::SCHED_NAME_BYTES_MAX)?;
        if let Some(engine) = &spec.engine {
            checked_text(engine, "persistence engine", limits::ENGINE_NAME_BYTES_MAX)?;
        }
        let sched_flags =
            model::SchedFlags::from_bits(spec.sched_flags).ok_or(BadCommand::SchedFlags(spec.sched_flags))?;
        Ok(model::ServiceSpec {
            scheduler: spec.scheduler,
            sched_flags,
            persistence_s: spec.persistence_s,
            granularity: spec.granularity.into(),
            engine: spec.engine,
            one_packet: spec.one_packet,
        })
    }
}

impl TryFrom<DaemonSpec> for model::DaemonSpec {
    type Error = BadCommand;

    fn try_from(spec: DaemonSpec) -> Result<Self, BadCommand> {
        checked_text(&spec.interface, "interface", limits::INTERFACE_NAME_BYTES_MAX)?;
        Ok(model::DaemonSpec {
            role: spec.role.into(),
            interface: spec.interface,
            syncid: spec.syncid,
            maxlen: spec.maxlen,
            group: spec.group,
            port: spec.port,
            ttl: spec.ttl,
        })
    }
}

impl From<&BadCommand> for Refusal {
    fn from(bad: &BadCommand) -> Self {
        Refusal::new(Code::BadRequest, bad.to_string())
    }
}

impl From<&capability::Unsupported> for Refusal {
    fn from(unsupported: &capability::Unsupported) -> Self {
        Refusal::new(Code::Unsupported, unsupported.to_string())
    }
}

impl From<&CommandError> for Refusal {
    fn from(error: &CommandError) -> Self {
        let code = match error {
            CommandError::ServiceExists => Code::ServiceExists,
            CommandError::NoSuchService => Code::NoSuchService,
            CommandError::NoSuchScheduler(_) | CommandError::NoSuchEngine(_) => Code::NoSuchModule,
            CommandError::DestExists => Code::DestExists,
            CommandError::NoSuchDest => Code::NoSuchDest,
            CommandError::ThresholdsCross { .. } | CommandError::WeightOutOfRange(_) => Code::OutOfRange,
            CommandError::NoSuchInterface(_) => Code::NoSuchInterface,
            CommandError::DaemonRuns => Code::DaemonRuns,
            CommandError::NoDaemon => Code::NoDaemon,
            CommandError::LocalAddressExists => Code::LocalAddressExists,
            CommandError::NoSuchLocalAddress => Code::NoSuchLocalAddress,
            CommandError::Full { .. } => Code::Full,
            CommandError::NotUnicast(_)
            | CommandError::MixedFamily
            | CommandError::MixedFamilyWithDaemon
            | CommandError::TunnelWithoutPort
            | CommandError::ZeroMark
            | CommandError::BadGranularity
            | CommandError::BadTimeout(_)
            | CommandError::Setting(_)
            | CommandError::NotMulticast(_)
            | CommandError::CookiesNotTcp
            | CommandError::CookiesOneWay(_)
            | CommandError::ProxyNotTcp
            | CommandError::ProxyOneWay(_) => Code::Invalid,
        };
        Refusal::new(code, error.to_string())
    }
}

/// Two enums with the same variants, converted both ways.
macro_rules! same_variants {
    ($api:ty, $model:ty, [$($variant:ident),+]) => {
        impl From<$api> for $model {
            fn from(value: $api) -> Self {
                match value { $(<$api>::$variant => <$model>::$variant),+ }
            }
        }
        impl From<$model> for $api {
            fn from(value: $model) -> Self {
                match value { $(<$model>::$variant => <$api>::$variant),+ }
            }
        }
    };
}

same_variants!(Proto, model::Proto, [Tcp, Udp, Sctp]);
same_variants!(Family, model::Family, [V4, V6]);
same_variants!(TunnelKind, model::TunnelKind, [Ipip, Gue, Gre]);
same_variants!(TunnelChecksum, model::TunnelChecksum, [None, Csum, Remcsum]);
same_variants!(DaemonRole, model::DaemonRole, [Master, Backup]);

impl From<ServiceId> for model::ServiceKey {
    fn from(id: ServiceId) -> Self {
        match id {
            ServiceId::Virtual { proto, addr, port } => Self::Virtual { proto: proto.into(), addr, port },
            ServiceId::Fwmark { mark, family } => Self::Fwmark { mark, family: family.into() },
        }
    }
}

impl From<model::ServiceKey> for ServiceId {
    fn from(key: model::ServiceKey) -> Self {
        match key {
            model::ServiceKey::Virtual { proto, addr, port } => Self::Virtual { proto: proto.into(), addr, port },
            model::ServiceKey::Fwmark { mark, family } => Self::Fwmark { mark, family: family.into() },
        }
    }
}

impl From<Granularity> for model::Granularity {
    fn from(granularity: Granularity) -> Self {
        match granularity {
            Granularity::Netmask(mask) => Self::V4(mask),
            Granularity::PrefixLen(len) => Self::V6(len),
        }
    }
}

impl From<model::Granularity> for Granularity {
    fn from(granularity: model::Granularity) -> Self {
        match granularity {
            model::Granularity::V4(mask) => Self::Netmask(mask),
            model::Granularity::V6(len) => Self::PrefixLen(len),
        }
    }
}

impl From<&model::ServiceConfig> for ServiceSpec {
    fn from(config: &model::ServiceConfig) -> Self {
        ServiceSpec {
            scheduler: config.scheduler.map_or("none", model::Scheduler::name).to_owned(),
            sched_flags: config.sched_flags.bits(),
            persistence_s: config.persistence_s,
            granularity: config.granularity.into(),
            engine: config.engine.map(|engine| engine.name().to_owned()),
            one_packet: config.one_packet,
        }
    }
}

impl From<DestId> for model::DestKey {
    fn from(id: DestId) -> Self {
        model::DestKey { addr: id.addr, port: id.port }
    }
}

impl From<model::DestKey> for DestId {
    fn from(key: model::DestKey) -> Self {
        DestId { addr: key.addr, port: key.port }
    }
}

impl From<Forward> for model::FwdMethod {
    fn from(forward: Forward) -> Self {
        match forward {
            Forward::Masq => Self::Masq,
            Forward::Local => Self::Local,
            Forward::Tunnel { kind, port, checksum } => {
                Self::Tunnel(model::Tunnel { kind: kind.into(), port, checksum: checksum.into() })
            }
            Forward::Route => Self::Route,
            Forward::Fullnat => Self::Fullnat,
        }
    }
}

impl From<model::FwdMethod> for Forward {
    fn from(method: model::FwdMethod) -> Self {
        match method {
            model::FwdMethod::Masq => Self::Masq,
            model::FwdMethod::Local => Self::Local,
            model::FwdMethod::Tunnel(model::Tunnel { kind, port, checksum }) => {
                Self::Tunnel { kind: kind.into(), port, checksum: checksum.into() }
            }
            model::FwdMethod::Route => Self::Route,
            model::FwdMethod::Fullnat => Self::Fullnat,
        }
    }
}

impl From<DestSpec> for model::Dest {
    fn from(spec: DestSpec) -> Self {
        model::Dest {
            key: spec.id.into(),
            method: spec.forward.into(),
            weight: spec.weight,
            upper: spec.upper,
            lower: spec.lower,
        }
    }
}

impl From<&model::Dest> for DestSpec {
    fn from(dest: &model::Dest) -> Self {
        DestSpec {
            id: dest.key.into(),
            forward: dest.method.into(),
            weight: dest.weight,
            upper: dest.upper,
            lower: dest.lower,
        }
    }
}

impl From<model::Timeouts> for Timeouts {
    fn from(t: model::Timeouts) -> Self {
        Timeouts { tcp_s: t.tcp_s, tcp_fin_s: t.tcp_fin_s, udp_s: t.udp_s }
    }
}

impl DaemonRow {
    pub fn new(role: model::DaemonRole, daemon: &model::SyncDaemon) -> Self {
        let group: IpAddr = daemon.group;
        DaemonRow {
            role: role.into(),
            interface: daemon.interface.clone(),
            syncid: daemon.syncid,
            maxlen: daemon.maxlen,
            group,
            port: daemon.port,
            ttl: daemon.ttl,
        }
    }
}
