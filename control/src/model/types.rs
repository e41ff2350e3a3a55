//! The words of the trade as types: protocols, schedulers, forwarding methods, services, dests. Everything here is a
//! plain value; nothing knows about sockets, maps or text formats (`crate::api` does).

use std::net::{IpAddr, Ipv4Addr};

/// Transport protocols that can be scheduled (kernel `ip_vs_proto_{tcp,udp,sctp}.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proto {
    Tcp,
    Udp,
    Sctp,
}

impl Proto {
    /// IP protocol number (IANA).
    pub const fn number(self) -> u8 {
        match self {
            Proto::Tcp => 6,
            Proto::Udp => 17,
            Proto::Sctp => 132,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// The kernel's schedulers. A service without one ("none") has `None`.
pub use rvs_datapath::sched::Kind as Scheduler;

/// The three flags a scheduler may give a meaning to (kernel `IP_VS_SVC_F_SCHED1..3`). sh and mh call the first
/// `fallback` and the second `port`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SchedFlags(u8);

impl SchedFlags {
    pub const NONE: SchedFlags = SchedFlags(0);
    pub const FALLBACK: SchedFlags = SchedFlags(1);
    pub const PORT: SchedFlags = SchedFlags(2);
    pub const THIRD: SchedFlags = SchedFlags(4);

    /// Bit 0 is flag-1. `None` if a bit above the third is set.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits <= 7 { Some(SchedFlags(bits)) } else { None }
    }

    pub const fn bits(self) -> u8 {
        self.0
    }

    pub const fn contains(self, other: SchedFlags) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Alternative persistence engines (`ip_vs_pe_sip.c` is the only one there is).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Engine {
    Sip,
}

impl Engine {
    pub const fn name(self) -> &'static str {
        match self {
            Engine::Sip => "sip",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        (name == Engine::Sip.name()).then_some(Engine::Sip)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TunnelKind {
    Ipip,
    Gue,
    Gre,
}

/// Checksum of the outer header (kernel `IP_VS_TUNNEL_ENCAP_FLAG_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TunnelChecksum {
    #[default]
    None,
    Csum,
    Remcsum,
}

/// How packets travel to a dest by `-i`. `port` is GUE's UDP port, 0 for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tunnel {
    pub kind: TunnelKind,
    pub port: u16,
    pub checksum: TunnelChecksum,
}

impl Tunnel {
    pub const IPIP: Tunnel = Tunnel { kind: TunnelKind::Ipip, port: 0, checksum: TunnelChecksum::None };
}

/// Forwarding methods (kernel `IP_VS_CONN_F_*`, and FULLNAT beyond them).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FwdMethod {
    Masq,
    Local,
    Tunnel(Tunnel),
    Route,
    Fullnat,
}

impl FwdMethod {
    /// Whether the dest sees the packet with the service's own port: such a dest can't have another.
    pub const fn keeps_port(self) -> bool {
        matches!(self, FwdMethod::Tunnel(_) | FwdMethod::Route)
    }
}

/// What names a virtual service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceKey {
    /// `port` 0 takes every port that no other service of this address has.
    Virtual { proto: Proto, addr: IpAddr, port: u16 },
    /// A firewall mark, never 0.
    Fwmark { mark: u32, family: Family },
}

impl ServiceKey {
    pub const fn family(&self) -> Family {
        match self {
            ServiceKey::Virtual { addr, .. } => Family::of(addr),
            ServiceKey::Fwmark { family, .. } => *family,
        }
    }
}

/// Which part of the client's address persistence goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Granularity {
    /// A netmask, not necessarily contiguous.
    V4(Ipv4Addr),
    /// A prefix length, 1..=128.
    V6(u8),
}

impl Granularity {
    /// One client address: /32 or /128.
    pub const fn host(family: Family) -> Self {
        match family {
            Family::V4 => Granularity::V4(Ipv4Addr::BROADCAST),
            Family::V6 => Granularity::V6(128),
        }
    }
}

/// Everything of a service that `ipvsadm -E` can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceConfig {
    /// `None` is the scheduler called "none": nothing is scheduled.
    pub scheduler: Option<Scheduler>,
    pub sched_flags: SchedFlags,
    /// Template timeout in seconds; `None` if the service is not persistent.
    pub persistence_s: Option<u32>,
    /// Kept also while the service is not persistent, as the kernel does.
    pub granularity: Granularity,
    pub engine: Option<Engine>,
    pub one_packet: bool,
}

/// What names a dest within its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DestKey {
    pub addr: IpAddr,
    pub port: u16,
}

/// A real server of one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dest {
    pub key: DestKey,
    pub method: FwdMethod,
    /// 0..=[`crate::limits::WEIGHT_MAX`]; 0 takes no new connections.
    pub weight: u32,
    /// Connections at which the dest takes no more; 0 is no limit.
    pub upper: u32,
    /// Connections below which it takes some again; 0 is three quarters of `upper`.
    pub lower: u32,
}

/// `--set`, seconds; each at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub tcp_s: u32,
    pub tcp_fin_s: u32,
    pub udp_s: u32,
}

impl Default for Timeouts {
    /// `tcp_timeouts[]` and `udp_timeouts[]` of the kernel.
    fn default() -> Self {
        Timeouts { tcp_s: 900, tcp_fin_s: 120, udp_s: 300 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DaemonRole {
    Master,
    Backup,
}

/// A sync daemon as it runs, all defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncDaemon {
    pub interface: String,
    pub syncid: u8,
    /// Largest sync message, bytes of UDP payload.
    pub maxlen: u16,
    pub group: IpAddr,
    pub port: u16,
    pub ttl: u8,
}

/// What a service takes in a second before it defends itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Defence {
    /// SYNs that are taken as they come; those after them are answered with SYN cookies. `None`: no cookies.
    pub cookies_above: Option<u32>,
    /// New connections; 0: any number.
    pub rate: u32,
    /// ... of one client (an IPv4 address, a /64 of IPv6); 0: any number.
    pub source_rate: u32,
}
