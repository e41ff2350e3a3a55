//! What can be asked of the model, what comes of it, and why it may be refused.

use std::net::{IpAddr, Ipv4Addr};

use super::Service;
use super::types::{
    DaemonRole, Defence, Dest, DestKey, Granularity, SchedFlags, ServiceConfig, ServiceKey, SyncDaemon, Timeouts,
};
use crate::settings::{SettingError, Settings};

/// A service as a command describes it. Names are still text: whether a scheduler exists is found out after whether
/// the service does (`ip_vs_genl_set_cmd`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSpec {
    pub scheduler: String,
    pub sched_flags: SchedFlags,
    pub persistence_s: Option<u32>,
    pub granularity: Granularity,
    pub engine: Option<String>,
    pub one_packet: bool,
}

/// A sync daemon as a command describes it; `None` takes the kernel's default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonSpec {
    pub role: DaemonRole,
    pub interface: String,
    pub syncid: u8,
    pub maxlen: Option<u16>,
    pub group: Option<IpAddr>,
    pub port: Option<u16>,
    pub ttl: Option<u8>,
}

/// One change of configuration, as `ipvsadm` knows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    AddService(ServiceKey, ServiceSpec),
    EditService(ServiceKey, ServiceSpec),
    DelService(ServiceKey),
    AddDest(ServiceKey, Dest),
    EditDest(ServiceKey, Dest),
    DelDest(ServiceKey, DestKey),
    /// Removes every service.
    Flush,
    /// Sets the counters of one service and its dests, or of all, to zero.
    Zero(Option<ServiceKey>),
    /// 0 leaves a timeout as it is.
    SetTimeouts(Timeouts),
    /// A setting of the whole director, by its name.
    Set(String, u32),
    StartDaemon(DaemonSpec),
    StopDaemon(DaemonRole),
    /// Puts an address into the pool that FULLNAT takes its sources from.
    AddLocalAddress(ServiceKey, IpAddr),
    DelLocalAddress(ServiceKey, IpAddr),
    /// Rate limits and SYN cookies.
    Defend(ServiceKey, Defence),
    /// Whether its real servers are told of their clients by PROXY headers.
    Proxy(ServiceKey, bool),
}

/// What a command changed, with what was there before: enough to write maps without looking at other services, and to
/// take it back ([`super::Model::revert`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    ServiceAdded(ServiceKey),
    ServiceEdited { key: ServiceKey, before: ServiceConfig },
    ServiceRemoved { key: ServiceKey, was: Box<Service> },
    DestAdded { service: ServiceKey, dest: DestKey },
    DestEdited { service: ServiceKey, before: Dest },
    DestRemoved { service: ServiceKey, was: RemovedDest },
    Flushed(Vec<(ServiceKey, Service)>),
    Zeroed(Option<ServiceKey>),
    TimeoutsSet { before: Timeouts },
    SettingChanged { before: Settings },
    DaemonStarted(DaemonRole),
    DaemonStopped { role: DaemonRole, was: SyncDaemon },
    LocalAddressAdded { service: ServiceKey, addr: IpAddr },
    LocalAddressRemoved { service: ServiceKey, addr: IpAddr },
    Defended { service: ServiceKey, before: Defence },
    ProxySet { service: ServiceKey, before: bool },
}

/// A dest that was taken out, with its place in the kernel's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemovedDest {
    pub dest: Dest,
    pub(super) position: u64,
}

/// Why a command was refused. The comments give the kernel's error number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// EEXIST
    #[error("service exists already")]
    ServiceExists,
    /// ESRCH
    #[error("no such service")]
    NoSuchService,
    /// ENOENT
    #[error("no scheduler is called `{0}`")]
    NoSuchScheduler(String),
    /// ENOENT
    #[error("no persistence engine is called `{0}`")]
    NoSuchEngine(String),
    /// EEXIST
    #[error("the service has this destination already")]
    DestExists,
    /// ENOENT
    #[error("the service has no such destination")]
    NoSuchDest,
    /// EINVAL
    #[error("{0} is not a unicast address of a server")]
    NotUnicast(IpAddr),
    /// EINVAL
    #[error("a destination of the other address family must be reached by a tunnel")]
    MixedFamily,
    /// EINVAL
    #[error("a destination of the other address family and a sync daemon exclude each other")]
    MixedFamilyWithDaemon,
    /// ERANGE
    #[error("lower threshold {lower} is above upper threshold {upper}")]
    ThresholdsCross { lower: u32, upper: u32 },
    /// ERANGE
    #[error("weight {0} is above 2147483647")]
    WeightOutOfRange(u32),
    /// EINVAL
    #[error("a GUE tunnel needs a port")]
    TunnelWithoutPort,
    /// EINVAL
    #[error("firewall mark 0 means no mark")]
    ZeroMark,
    /// EINVAL
    #[error("the persistence granularity does not fit the service's address family (or is not 1..=128)")]
    BadGranularity,
    /// EINVAL
    #[error("timeout of {0} seconds is out of range")]
    BadTimeout(u32),
    /// ENOENT or EINVAL
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// ENODEV
    #[error("there is no interface called `{0}`")]
    NoSuchInterface(String),
    /// EINVAL
    #[error("{0} is not a multicast group")]
    NotMulticast(IpAddr),
    /// EEXIST
    #[error("the daemon runs already")]
    DaemonRuns,
    /// ESRCH
    #[error("the daemon does not run")]
    NoDaemon,
    /// EEXIST
    #[error("the pool has this local address already")]
    LocalAddressExists,
    /// ENOENT
    #[error("the pool has no such local address")]
    NoSuchLocalAddress,
    #[error("SYN cookies are for TCP services with an address")]
    CookiesNotTcp,
    #[error("SYN cookies are for real servers by NAT and full NAT, whose replies come by here: {0} is not one")]
    CookiesOneWay(IpAddr),
    #[error("PROXY headers are for TCP services with an address")]
    ProxyNotTcp,
    #[error("PROXY headers are for real servers by NAT and full NAT, whose replies come by here: {0} is not one")]
    ProxyOneWay(IpAddr),
    /// ENOMEM
    #[error("no room for another {what}: the limit is {max}")]
    Full { what: &'static str, max: usize },
}

/// What the model has to know about the host it runs on; asked for, so that the model stays a function of its inputs.
pub trait Env {
    /// Whether the address is one of this host's (kernel: `RTN_LOCAL`, `__ip_vs_addr_is_local_v6`).
    fn is_local(&self, addr: IpAddr) -> bool;
    /// Whether a connected network has this as its broadcast address (kernel: `RTN_BROADCAST`).
    fn is_broadcast(&self, addr: Ipv4Addr) -> bool;
    /// The interface's MTU in bytes; `None` if there is no such interface.
    fn interface_mtu(&self, name: &str) -> Option<u32>;
}
