//! What the kernel says about the network of one namespace: links, addresses, neighbours, routes.
//!
//! Plain values without I/O. `rvs-sys` fills them from rtnetlink; [`crate::nexthop`] and
//! [`crate::realserver`] decide from them. Interface indices are the kernel's, never 0.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

/// A 48-bit Ethernet address in transmission order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of `bytes`; `None` unless there are exactly six and they aren't all zero (which is how the
    /// kernel shows "no address yet").
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mac = <[u8; 6]>::try_from(bytes).ok()?;
        (mac != [0; 6]).then_some(Self(mac))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An 802.1Q or 802.1ad tag that a VLAN sub-interface puts on what leaves by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanTag {
    /// VLAN identifier, 0..=4094.
    pub id: u16,
    /// Ethertype of the tag: 0x8100 or 0x88a8 (host byte order).
    pub tpid: u16,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub ifindex: u32,
    pub name: String,
    /// `None` on devices that have no Ethernet address (tun, ipip, gre, ...).
    pub mac: Option<Mac>,
    /// Largest layer-3 packet, bytes.
    pub mtu: u32,
    /// `IFLA_INFO_KIND`: "veth", "bridge", "vlan", "bond", ...; empty for a plain device.
    pub kind: String,
    /// The bridge, bond or VRF this interface is enslaved to.
    pub master: Option<u32>,
    /// Kind of enslavement (`IFLA_INFO_SLAVE_KIND`): "bridge", "bond", "vrf", ...; empty without a master.
    pub port_kind: String,
    /// For stacked devices (vlan, macvlan) in this namespace: the interface below.
    pub lower: Option<u32>,
    /// For VLAN sub-interfaces.
    pub vlan: Option<VlanTag>,
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Up and with carrier (`IFF_RUNNING`).
    pub running: bool,
    pub loopback: bool,
    /// `ARPHRD_ETHER`: frames have an Ethernet header.
    pub ethernet: bool,
    /// `IFF_NOARP`: the kernel neither asks nor answers ARP or neighbour discovery on it.
    pub noarp: bool,
}

/// Scope of an address (`RT_SCOPE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Global,
    Site,
    Link,
    Host,
    /// Any other number.
    Other(u8),
}

/// One address of one interface, with all that is needed to add it again as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addr {
    pub ifindex: u32,
    pub ip: IpAddr,
    /// 0..=32 or 0..=128.
    pub prefix_len: u8,
    pub scope: Scope,
    /// `IFA_F_*`.
    pub flags: u32,
    /// IPv4 alias label ("lo:0"); `None` when it is the interface's name or there is none.
    pub label: Option<String>,
    pub broadcast: Option<Ipv4Addr>,
    /// The far end of a point-to-point address, when it differs from `ip`.
    pub peer: Option<IpAddr>,
    /// Seconds left; `u32::MAX` is for ever.
    pub preferred_s: u32,
    /// Seconds left; `u32::MAX` is for ever.
    pub valid_s: u32,
}

impl Addr {
    /// `IFA_F_NODAD`: no duplicate address detection.
    pub const NODAD: u32 = 0x02;
    /// `IFA_F_DADFAILED`: another host has this address; the kernel does not use it.
    pub const DADFAILED: u32 = 0x08;
    /// `IFA_F_TENTATIVE`: duplicate address detection is running; the kernel does not use it yet.
    pub const TENTATIVE: u32 = 0x40;

    /// `ip` as a /32 or /128 on an interface: host scope for IPv4, no duplicate address detection for IPv6.
    pub fn host(ifindex: u32, ip: IpAddr) -> Self {
        let (prefix_len, scope, flags) = match ip {
            IpAddr::V4(_) => (32, Scope::Host, 0),
            IpAddr::V6(_) => (128, Scope::Global, Self::NODAD),
        };
        Self {
            ifindex,
            ip,
            prefix_len,
            scope,
            flags,
            label: None,
            broadcast: None,
            peer: None,
            preferred_s: u32::MAX,
            valid_s: u32::MAX,
        }
    }
}

/// State of a neighbour entry (`NUD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourState {
    None,
    Incomplete,
    Reachable,
    Stale,
    Delay,
    Probe,
    Failed,
    NoArp,
    Permanent,
}

impl NeighbourState {
    /// Whether the entry's MAC may be used now (`NUD_VALID`).
    pub fn usable(self) -> bool {
        match self {
            Self::Reachable | Self::Stale | Self::Delay | Self::Probe | Self::NoArp | Self::Permanent => true,
            Self::None | Self::Incomplete | Self::Failed => false,
        }
    }
}

/// One entry of the ARP or neighbour-discovery table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub ifindex: u32,
    pub ip: IpAddr,
    /// Kept by the kernel even where `state` says that it is not usable now.
    pub mac: Option<Mac>,
    pub state: NeighbourState,
    /// `NTF_EXT_MANAGED`: the kernel keeps it resolved.
    pub managed: bool,
}

/// One entry of a bridge's forwarding database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdbEntry {
    /// The bridge.
    pub bridge: u32,
    /// The port behind which `mac` is.
    pub port: u32,
    pub mac: Mac,
    pub vlan: Option<u16>,
}

/// What to ask the routing tables; policy rules count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteQuery {
    pub dst: IpAddr,
    pub src: Option<IpAddr>,
    /// Only routes by this interface.
    pub oif: Option<u32>,
    /// Firewall mark, for `ip rule ... fwmark`.
    pub mark: Option<u32>,
}

impl RouteQuery {
    pub fn to(dst: IpAddr) -> Self {
        Self { dst, src: None, oif: None, mark: None }
    }
}

/// Kind of a route (`RTN_*`), with the kernel's "no route at all" beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    Unicast,
    /// The destination is an address of this host.
    Local,
    Broadcast,
    Anycast,
    Multicast,
    Blackhole,
    Unreachable,
    Prohibit,
    /// No rule led to a route.
    NoRoute,
    /// Any other `RTN_*` number.
    Other(u8),
}

/// The kernel's answer to a [`RouteQuery`], or one default route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub kind: RouteKind,
    /// The way out; `None` where the kind has none.
    pub ifindex: Option<u32>,
    /// The router; `None` is on-link. May be IPv6 for an IPv4 destination (RFC 5549).
    pub gateway: Option<IpAddr>,
    pub pref_src: Option<IpAddr>,
    /// MTU of the route (locked or learnt), bytes, where it differs from the interface's.
    pub mtu: Option<u32>,
}

impl Route {
    /// A route that leads nowhere.
    pub fn none(kind: RouteKind) -> Self {
        Self { kind, ifindex: None, gateway: None, pref_src: None, mtu: None }
    }
}
