//! What listings are made of.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{DaemonRole, Defence, DestSpec, ServiceId, ServiceSpec};

/// Counters since the service or dest was added, or zeroed. Bytes are those of the IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub conns: u64,
    pub in_pkts: u64,
    pub out_pkts: u64,
    pub in_bytes: u64,
    pub out_bytes: u64,
}

/// What a second brings, as the kernel's estimator sees it (`ip_vs_est.c`): an average over some eight seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    pub conns: u64,
    pub in_pkts: u64,
    pub out_pkts: u64,
    pub in_bytes: u64,
    pub out_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ListRow {
    Service(ServiceRow),
    /// Belongs to the service row before it.
    Dest(DestRow),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRow {
    pub id: ServiceId,
    pub spec: ServiceSpec,
    pub stats: Stats,
    pub rates: Rates,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestRow {
    pub dest: DestSpec,
    pub active: u32,
    pub inactive: u32,
    pub persistent: u32,
    pub stats: Stats,
    pub rates: Rates,
}

/// Who made a connection: this director, or another one that sent it here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConnOrigin {
    Local,
    Sync,
}

/// A persistence engine's mark on a connection: its name (at most 16 bytes) and its data as text (at most 255).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineData {
    pub name: String,
    pub data: String,
}

/// A connection, or a persistence template (client port 0, and protocol 0 if it belongs to a firewall mark).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnRow {
    /// IP protocol number.
    pub proto: u8,
    pub template: bool,
    /// The kernel's number of the state, see [`conn_state_name`].
    pub state: u8,
    pub expires_s: u32,
    pub client: (IpAddr, u16),
    pub virt: (IpAddr, u16),
    pub dest: (IpAddr, u16),
    pub origin: ConnOrigin,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineData>,
}

/// The name of a connection's state (kernel `ip_vs_state_name` and the tables of `ip_vs_proto_{tcp,udp,sctp}.c`).
pub fn conn_state_name(proto: u8, template: bool, state: u8) -> &'static str {
    const TEMPLATE: &[&str] = &["NONE", "ASSURED"];
    const TCP: &[&str] = &[
        "NONE",
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "SYNACK",
    ];
    const UDP: &[&str] = &["UDP"];
    const SCTP: &[&str] = &[
        "NONE",
        "INIT1",
        "INIT",
        "C-SENT",
        "C-REPLIED",
        "C-WAIT",
        "COOKIE",
        "C-ECHOED",
        "ESTABLISHED",
        "S-SENT",
        "S-RECEIVED",
        "S-ACK-SENT",
        "REJECTED",
        "CLOSED",
    ];
    let names = match (template, proto) {
        (true, _) => TEMPLATE,
        (false, 6) => TCP,
        (false, 17) => UDP,
        (false, 132) => SCTP,
        (false, 0) => return "NONE",
        (false, _) => return "ERR!",
    };
    names.get(usize::from(state)).copied().unwrap_or("ERR!")
}

/// A sync daemon that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonRow {
    pub role: DaemonRole,
    pub interface: String,
    pub syncid: u8,
    pub maxlen: u16,
    pub group: IpAddr,
    pub port: u16,
    pub ttl: u8,
}

/// One reason for which packets were dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropRow {
    pub reason: String,
    pub packets: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuStats {
    pub cpu: u32,
    pub stats: Stats,
}

/// All traffic of all services.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsReport {
    pub total: Stats,
    pub rates: Rates,
    pub cpus: Vec<CpuStats>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefenceRow {
    pub service: ServiceId,
    pub defence: Defence,
    /// Can cookies be used with all its real servers? (Not with one by direct routing or a tunnel, and not with the director itself.)
    pub cookies_work: bool,
    /// Are its real servers told of their clients by PROXY headers, version 2?
    pub proxy: bool,
}

/// A setting of the whole director, as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingRow {
    pub name: String,
    pub value: u32,
    pub default: u32,
    pub most: u32,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalAddressRow {
    pub service: ServiceId,
    pub addr: IpAddr,
}

/// The connection tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablesReport {
    pub tables: Vec<TableRow>,
    /// Connections are being moved to tables of another size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<TablesMove>,
}

/// That of a family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRow {
    /// 4 or 6.
    pub family: u8,
    /// Places for entries. A connection by NAT has two, by direct routing or a tunnel one.
    pub places: u32,
    /// Connections that fill half of them with an entry each, as `rvs conntable resize` has it.
    pub flows_at_half_load: u32,
    pub entries: u32,
    pub flows: u32,
    /// Bytes.
    pub memory: u64,
    /// Connections that went for others, since there was no room.
    pub evicted: u64,
    pub states: Vec<StateRow>,
    /// By what would happen to them if there were no room: who goes first comes first.
    pub classes: Vec<StateRow>,
}

/// Connections of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateRow {
    pub name: String,
    pub flows: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablesMove {
    /// Connections moved, by the rvsd that runs now.
    pub moved: u64,
    /// ... that are in the old tables.
    pub left: u64,
    /// ... that could not be moved when last tried: they stay there until they end.
    pub stuck: u64,
}

/// What an upgrade comes to: said by the new rvsd, and handed on by the old one, so nothing but fields is ever added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeReport {
    /// The new rvsd.
    pub program: PathBuf,
    pub version: String,
    /// The layouts of the pinned maps, by their numbers: today's ...
    pub from: String,
    /// ... and the new rvsd's.
    pub to: String,
    /// Connections of IPv4 and of IPv6 to be moved; none if the layout is the same.
    pub flows: [u32; 2],
    /// Bytes of new maps, beside the old ones for a while.
    pub memory: u64,
    /// The maps that are made anew. All others stay.
    pub maps: Vec<String>,
}

/// What answers, and how it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether commands are taken.
    pub ready: bool,
    /// rvsd's version, as in its Cargo.toml.
    pub rvsd: String,
    /// The version of IPVS that listings show, 1.2.1 in every kernel of today.
    pub ipvs_version: [u8; 3],
    /// Size of the connection table that listings show, entries.
    pub conn_table_size: u32,
    /// Process number of rvsd.
    pub pid: u32,
    pub uptime_s: u64,
    pub services: u32,
    pub dests: u32,
    pub connections: u64,
    /// Connections that the setting drop_entry has taken so far.
    #[serde(default)]
    pub thinned: u64,
    /// One line an interface: name and how the data plane sits on it.
    pub interfaces: Vec<String>,
    /// What the operator should know, one line each.
    pub warnings: Vec<String>,
}
