//! The control socket: what clients and rvsd say to each other. The only serde types of the project, apart from
//! configuration files; the model's own types stay free of text formats.
//!
//! A unix stream socket carries lines of JSON, one [`Request`] or [`Response`] each. A client may send up to
//! [`PIPELINE_MAX`](crate::limits::PIPELINE_MAX) requests before it reads an answer. Answers come in the order of the
//! requests; an answer is one or more lines with the request's `id`, the last of them with `last` set. Listings are
//! streamed in chunks of at most [`ROWS_PER_CHUNK`](crate::limits::ROWS_PER_CHUNK) rows, so that neither side ever holds
//! a whole table. A line that is not a request is answered with a refusal ([`Code::BadRequest`], id 0), and the server
//! then closes the connection.

mod convert;
mod frame;
mod listing;
mod rows;
mod seen;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use convert::BadCommand;
pub use frame::{DecodeError, FrameError, LineDecoder, decode_request, decode_response, encode};
pub use listing::{Chunks, Counters, DestCounters, daemons, defences, in_chunks, list, local_addresses, settings};
pub use rows::{
    ConnOrigin, ConnRow, CpuStats, DaemonRow, DefenceRow, DestRow, DropRow, EngineData, ListRow, LocalAddressRow,
    Rates, ServiceRow, SettingRow, StateRow, Stats, StatsReport, Status, TableRow, TablesMove, TablesReport,
    UpgradeReport, conn_state_name,
};
pub use seen::{Connection, Frame, Outcome, Probe, ProbeProto, TracedRow, WhyDest, WhyRow};

/// Version of this protocol. A server refuses any other ([`Code::BadVersion`]): both ends are installed together.
pub const VERSION: u32 = 1;

/// Where rvsd listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/rvs/rvsd.sock";

/// The environment variable that names another socket.
pub const SOCKET_VARIABLE: &str = "RVS_SOCKET";
/// Environment variable with the seconds that `ipvsadm` and `rvs` wait for each answer, where a machine needs more than usual.
pub const TIMEOUT_VARIABLE: &str = "RVS_TIMEOUT";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub version: u32,
    /// Chosen by the client; comes back with every line of the answer.
    pub id: u64,
    pub body: RequestBody,
}

impl Request {
    pub fn new(id: u64, body: RequestBody) -> Self {
        Request { version: VERSION, id, body }
    }

    /// For the server: whether it speaks the client's version.
    pub fn check_version(&self) -> Result<(), Refusal> {
        if self.version == VERSION {
            return Ok(());
        }
        let reason = format!(
            "the command speaks version {} of the control protocol, rvsd version {VERSION}: install both from one release",
            self.version
        );
        Err(Refusal::new(Code::BadVersion, reason))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestBody {
    /// One change; answered by [`ResponseBody::Done`] once it is in force, or refused and nothing changed.
    Command(Command),
    /// Services and dests; answered by [`ResponseBody::List`] chunks.
    List(Filter),
    /// All connections; answered by [`ResponseBody::Connections`] chunks.
    Connections,
    Timeouts,
    /// The settings of the whole director.
    Settings,
    Daemons,
    /// Drop reasons with their counters.
    Drops,
    /// Counters of the whole data plane.
    Stats,
    /// FULLNAT's local addresses, of one service or of all; answered by [`ResponseBody::LocalAddresses`] chunks.
    LocalAddresses(Option<ServiceId>),
    /// How services defend themselves, of one or of all; answered by [`ResponseBody::Defences`] chunks.
    Defences(Option<ServiceId>),
    /// Whether rvsd is ready, and what it is.
    Status,
    /// The connection tables; answered by [`ResponseBody::Tables`].
    Tables,
    /// Tables of another size; [`ResponseBody::Done`] says that connections are being moved to them.
    Resize(Resize),
    /// Another rvsd is to go on in the place of this one: answered by [`ResponseBody::Upgrade`], before it does.
    Upgrade(Upgrade),
    /// What would become of these packets, at most [`PROBES_MAX`](crate::limits::PROBES_MAX); answered by [`ResponseBody::Why`], a row
    /// each. Nothing changes by it.
    Why(Vec<Probe>),
    /// Packets as they come, for which a filter holds ([`crate::filter`]); answered by [`ResponseBody::Traced`], at least once a second,
    /// until the client is gone.
    Trace(String),
}

/// Which services a listing shows, and in which order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Every service, the one added first comes first.
    All,
    /// One service; refused with [`Code::NoSuchService`] if there is none.
    One(ServiceId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proto {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const fn of(addr: &IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

/// What names a virtual service. Ports are numbers, 0 takes every port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ServiceId {
    Virtual { proto: Proto, addr: IpAddr, port: u16 },
    Fwmark { mark: u32, family: Family },
}

impl ServiceId {
    pub const fn family(&self) -> Family {
        match self {
            ServiceId::Virtual { addr, .. } => Family::of(addr),
            ServiceId::Fwmark { family, .. } => *family,
        }
    }
}

/// Which part of the client's address persistence goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    Netmask(Ipv4Addr),
    /// 1..=128
    PrefixLen(u8),
}

/// A service's settings, in commands and in listings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// At most 16 bytes; "none" is no scheduler.
    pub scheduler: String,
    /// Bits 0..=2 are flag-1..flag-3.
    pub sched_flags: u8,
    /// `None`: not persistent.
    pub persistence_s: Option<u32>,
    pub granularity: Granularity,
    /// Persistence engine, at most 16 bytes.
    pub engine: Option<String>,
    pub one_packet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DestId {
    pub addr: IpAddr,
    pub port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TunnelKind {
    Ipip,
    Gue,
    Gre,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TunnelChecksum {
    None,
    Csum,
    Remcsum,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Forward {
    Masq,
    Local,
    /// `port` is GUE's UDP port, 0 for the others.
    Tunnel {
        kind: TunnelKind,
        port: u16,
        checksum: TunnelChecksum,
    },
    Route,
    Fullnat,
}

/// A dest's settings, in commands and in listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DestSpec {
    pub id: DestId,
    pub forward: Forward,
    pub weight: u32,
    pub upper: u32,
    pub lower: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DaemonRole {
    Master,
    Backup,
}

/// A sync daemon to start; what is `None` takes the default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DaemonSpec {
    pub role: DaemonRole,
    pub interface: String,
    pub syncid: u8,
    pub maxlen: Option<u16>,
    pub group: Option<IpAddr>,
    pub port: Option<u16>,
    pub ttl: Option<u8>,
}

/// `--set` and its answer, seconds. In a command 0 leaves a timeout as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    pub tcp_s: u32,
    pub tcp_fin_s: u32,
    pub udp_s: u32,
}

/// What a service takes in a second before it defends itself: [`crate::model::Defence`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defence {
    pub cookies_above: Option<u32>,
    pub rate: u32,
    pub source_rate: u32,
}

/// One change of configuration. Becomes a [`crate::model::Command`] by `TryFrom`, which checks every bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    AddService {
        service: ServiceId,
        spec: ServiceSpec,
    },
    EditService {
        service: ServiceId,
        spec: ServiceSpec,
    },
    DelService {
        service: ServiceId,
    },
    AddDest {
        service: ServiceId,
        dest: DestSpec,
    },
    EditDest {
        service: ServiceId,
        dest: DestSpec,
    },
    DelDest {
        service: ServiceId,
        dest: DestId,
    },
    Flush,
    Zero {
        service: Option<ServiceId>,
    },
    SetTimeouts(Timeouts),
    /// A setting of the whole director: [`crate::settings`].
    Set {
        name: String,
        value: u32,
    },
    StartDaemon(DaemonSpec),
    StopDaemon {
        role: DaemonRole,
    },
    AddLocalAddress {
        service: ServiceId,
        addr: IpAddr,
    },
    DelLocalAddress {
        service: ServiceId,
        addr: IpAddr,
    },
    Defend {
        service: ServiceId,
        defence: Defence,
    },
    /// Whether its real servers are told of their clients by PROXY headers, version 2.
    Proxy {
        service: ServiceId,
        on: bool,
    },
}

/// Connections that the tables are to hold at half load; `None`: as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    pub ipv4: Option<u32>,
    pub ipv6: Option<u32>,
}

/// Another rvsd, and what it is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// Its program; `None`: what is now where the running one's was.
    pub program: Option<PathBuf>,
    /// Only say what it would come to.
    pub check: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    pub id: u64,
    /// No more lines answer this request.
    pub last: bool,
    pub body: ResponseBody,
}

impl Response {
    /// The only line of an answer.
    pub fn whole(id: u64, body: ResponseBody) -> Self {
        Response { id, last: true, body }
    }

    /// What answers a line that is no request; the connection is closed after it.
    pub fn to_garbage(error: &dyn std::error::Error) -> Self {
        Self::whole(0, ResponseBody::Refused(Refusal::new(Code::BadRequest, error.to_string())))
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseBody {
    Done,
    Refused(Refusal),
    /// A service is followed by its dests, newest first; a chunk may end anywhere between rows.
    List(Vec<ListRow>),
    Connections(Vec<ConnRow>),
    Timeouts(Timeouts),
    Settings(Vec<SettingRow>),
    Daemons(Vec<DaemonRow>),
    Drops(Vec<DropRow>),
    Stats(Box<StatsReport>),
    LocalAddresses(Vec<LocalAddressRow>),
    Defences(Vec<DefenceRow>),
    Status(Box<Status>),
    Tables(Box<TablesReport>),
    Upgrade(Box<UpgradeReport>),
    Why(Vec<WhyRow>),
    Traced {
        packets: Vec<TracedRow>,
        /// How many were lost since the trace began, because nobody took them in time.
        lost: u64,
    },
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub code: Code,
    /// One line, without the newline.
    pub reason: String,
    /// Further lines for whoever wants to know more; often empty.
    #[serde(default)]
    pub detail: Vec<String>,
}

impl Refusal {
    pub fn new(code: Code, reason: impl Into<String>) -> Self {
        Refusal { code, reason: reason.into(), detail: Vec::new() }
    }
}

/// The kind of a refusal: what a client may act on. The comments give the kernel's error number where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// EEXIST
    ServiceExists,
    /// ESRCH
    NoSuchService,
    /// ENOENT: no such scheduler or persistence engine.
    NoSuchModule,
    /// EEXIST
    DestExists,
    /// ENOENT
    NoSuchDest,
    /// EINVAL
    Invalid,
    /// ERANGE
    OutOfRange,
    /// ENODEV
    NoSuchInterface,
    /// EEXIST
    DaemonRuns,
    /// ESRCH
    NoDaemon,
    /// EEXIST
    LocalAddressExists,
    /// ENOENT
    NoSuchLocalAddress,
    /// ENOMEM
    Full,
    /// The data plane can't do this; the reason is the whole message.
    Unsupported,
    /// The data plane failed; nothing has changed.
    Failed,
    /// Not a request of this protocol.
    BadRequest,
    /// A request of another version of it.
    BadVersion,
    /// rvsd has not finished starting, or is about to stop.
    NotReady,
}
