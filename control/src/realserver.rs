//! What a real server needs for direct routing and tunnelling, what is wrong with it, and what mends that.
//!
//! The request reaches the real server as a frame whose IP destination is still the VIP, so the VIP has to be an
//! address of the host. It must not answer for the VIP on the wire, or clients find the real server instead of the
//! director.
//!
//! * IPv4: the kernel answers ARP on any interface for any of its addresses (`arp_rcv`, `arp_ignore`), and puts the
//!   source address of what it sends into its own ARP requests (`arp_solicit`): `arp_ignore` and `arp_announce` stop
//!   that. The larger of `all` and the interface's value counts (`IN_DEV_MAXCONF`).
//! * IPv6: a neighbour solicitation is answered only for addresses of the interface it comes in by (`ndisc_recv_ns`
//!   asks `ipv6_get_ifaddr` strictly), so a VIP on lo is silent by itself and needs no setting.
//! * Replies leave by the route to the client, which need not be the interface of the request: with strict
//!   `rp_filter` (`__fib_validate_source`) the request is dropped then.
//!
//! By full NAT it comes from an address of the director, to an address of this host: it needs nothing but programs that show the client's
//! own address, which the director tells in a TCP option. Believed is only a director.
//!
//! In a tunnel the request comes inside a packet for the real server's own address: a program at the interface takes it out, and from
//! there on it is as above.
//!
//! Pure: `rvs_sys::realserver` observes and acts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use crate::firewall::Rules;
use crate::net::{Addr, Link, Route, Scope};

/// How the director sends to this real server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Direct routing: ipvsadm `-g`.
    Dr,
    /// Tunnelling: ipvsadm `-i`.
    Tun,
    /// Full NAT: ipvsadm `--fullnat`.
    Fullnat,
}

/// What the real server shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub mode: Mode,
    /// Not for [`Mode::Fullnat`].
    pub vips: Vec<IpAddr>,
    /// The director's local addresses ([`Mode::Fullnat`]).
    pub directors: Vec<IpAddr>,
    /// Interfaces by which requests may come; empty is every Ethernet interface that is up and speaks ARP.
    pub interfaces: Vec<String>,
    /// The administrator says that the routers and clients on the link hold static ARP entries for the VIPs: then it
    /// does no harm to answer, or to announce. It can't be seen from here.
    pub static_arp: bool,
    /// UDP port that GUE comes to ([`Mode::Tun`]).
    pub gue_port: u16,
    /// What clients are told at most ([`Mode::Tun`]).
    pub mss: Mss,
}

/// The largest TCP segments that a real server asks its clients for: what they send comes in a tunnel, and has to leave room for its headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mss {
    /// As the server says. Clients learn of the path's MTU by ICMP.
    #[default]
    Off,
    /// What any kind of tunnel leaves of the interface's MTU.
    Auto,
    /// Bytes, of IPv4; of IPv6 less by 20.
    Most(u16),
}

/// Outer headers at most: IPv6, UDP, GUE.
const TUNNEL_MOST: u32 = 40 + 8 + 4;
/// Headers of IPv4 and TCP.
const HEADERS: u32 = 20 + 20;
/// Every host takes an MSS of so much (RFC 9293 3.7.1).
const MSS_LEAST: u16 = 536;

impl Mss {
    /// In bytes, on a link.
    fn on(self, link: &Link) -> Option<u16> {
        match self {
            Self::Off => None,
            Self::Auto => {
                let most = link.mtu.saturating_sub(TUNNEL_MOST + HEADERS).min(u32::from(u16::MAX));
                Some((most as u16).max(MSS_LEAST))
            }
            Self::Most(most) => Some(most),
        }
    }
}

impl std::str::FromStr for Mss {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            number => match number.parse() {
                Ok(most) if most >= MSS_LEAST => Ok(Self::Most(most)),
                _ => Err(format!("{text:?} is no MSS: off, auto, or bytes from {MSS_LEAST} to 65535")),
            },
        }
    }
}

impl fmt::Display for Mss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Auto => f.write_str("auto"),
            Self::Most(most) => write!(f, "{most}"),
        }
    }
}

/// Where GUE comes to unless told otherwise (IANA: gue).
pub const GUE_PORT: u16 = 6080;

/// What an interface takes out of tunnels: packets for these addresses, by IPIP, GRE, and GUE to this UDP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decap {
    pub vips: BTreeSet<IpAddr>,
    pub gue_port: u16,
    /// The largest MSS that clients are told there, of IPv4 (of IPv6 less by 20).
    pub mss: Option<u16>,
}

/// The host as it is.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    pub links: Vec<Link>,
    pub addrs: Vec<Addr>,
    pub ipv4_default_routes: Vec<Route>,
    /// The values of [`settings`]; one that is missing does not exist on this kernel.
    pub settings: BTreeMap<String, i64>,
    /// By interface.
    pub decap: BTreeMap<String, Decap>,
    /// Whose word about clients' addresses is taken.
    pub directors: BTreeSet<IpAddr>,
    /// For ARP rules that do the job of the settings.
    pub rules: Rules,
}

/// One change of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    AddAddr {
        link: String,
        addr: Addr,
    },
    DelAddr {
        link: String,
        addr: Addr,
    },
    /// Where tunnels end; `None`: not here.
    Decap {
        link: String,
        old: Option<Decap>,
        new: Option<Decap>,
    },
    /// Whose word about clients' addresses is taken; nobody's: without the programs.
    Directors {
        old: BTreeSet<IpAddr>,
        new: BTreeSet<IpAddr>,
    },
    /// `key` is a path below /proc/sys.
    Set {
        key: String,
        old: i64,
        new: i64,
    },
}

impl Op {
    /// The change that takes this one back.
    pub fn inverse(&self) -> Self {
        match self.clone() {
            Self::AddAddr { link, addr } => Self::DelAddr { link, addr },
            Self::DelAddr { link, addr } => Self::AddAddr { link, addr },
            Self::Decap { link, old, new } => Self::Decap { link, old: new, new: old },
            Self::Directors { old, new } => Self::Directors { old: new, new: old },
            Self::Set { key, old, new } => Self::Set { key, old: new, new: old },
        }
    }
}

/// The shell command that does the same.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddAddr { link, addr } => {
                let (ip, bits) = (addr.ip, addr.prefix_len);
                match ip {
                    IpAddr::V4(_) => write!(f, "ip addr add {ip}/{bits} dev {link}")?,
                    IpAddr::V6(_) => write!(f, "ip -6 addr add {ip}/{bits} dev {link}")?,
                }
                if addr.ip.is_ipv4() && addr.scope == Scope::Host {
                    f.write_str(" scope host")?;
                }
                if addr.flags & Addr::NODAD != 0 { f.write_str(" nodad") } else { Ok(()) }
            }
            Self::DelAddr { link, addr } => write!(f, "ip addr del {}/{} dev {link}", addr.ip, addr.prefix_len),
            Self::Decap { link, new: None, .. } => write!(f, "tc filter del dev {link} ingress pref 21078"),
            Self::Decap { link, new: Some(decap), .. } => {
                write!(f, "rvs realserver up --mode tun --interface {link} --gue-port {}", decap.gue_port)?;
                if let Some(mss) = decap.mss {
                    write!(f, " --mss {mss}")?;
                }
                decap.vips.iter().try_for_each(|vip| write!(f, " --vip {vip}"))
            }
            Self::Directors { new, .. } if new.is_empty() => f.write_str("rvs realserver down"),
            Self::Directors { new, .. } => {
                f.write_str("rvs realserver up --mode fullnat")?;
                new.iter().try_for_each(|director| write!(f, " --director {director}"))
            }
            Self::Set { key, new, .. } => write!(f, "sysctl -w {}={new}", setting_name(key)),
        }
    }
}

/// A setting as sysctl(8) takes it: with dots, but with slashes where a component has a dot ("eth0.10").
fn setting_name(key: &str) -> String {
    if key.contains('.') { key.to_owned() } else { key.replace('/', ".") }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    LoDown,
    /// `disable_ipv6` is set on lo.
    NoIpv6OnLo {
        vip: IpAddr,
    },
    VipMissing {
        vip: IpAddr,
    },
    /// On lo a prefix shorter than the whole address makes all its addresses this host's.
    VipTooWide {
        vip: IpAddr,
        link: String,
        prefix_len: u8,
    },
    /// Duplicate address detection failed or has not ended.
    VipUnusable {
        vip: IpAddr,
        link: String,
    },
    /// An address of an interface with ARP or neighbour discovery is answered for whatever the settings are.
    VipOnWire {
        vip: IpAddr,
        link: String,
    },
    AnswersArp {
        link: String,
        value: i64,
    },
    AnnouncesVip {
        link: String,
        value: i64,
    },
    StrictSource {
        link: String,
    },
    /// Connections from there don't show whose they are.
    ClientHidden {
        director: IpAddr,
    },
    /// Packets for the VIPs stay in their tunnels.
    NotTakenOut {
        link: String,
    },
    /// They are taken out, but clients are told of another MSS.
    OtherMss {
        link: String,
        there: Option<u16>,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoDown => f.write_str("lo is down"),
            Self::NoIpv6OnLo { vip } => write!(f, "lo cannot hold {vip}: its disable_ipv6 is 1"),
            Self::VipMissing { vip } => write!(f, "the VIP {vip} is no address of this host"),
            Self::VipTooWide { vip, link, prefix_len } => write!(f, "the VIP {vip} is on {link} as a /{prefix_len}"),
            Self::VipUnusable { vip, link } => {
                write!(f, "the VIP {vip} on {link} failed, or is still in, duplicate address detection")
            }
            Self::VipOnWire { vip, link } => write!(f, "the VIP {vip} is an address of {link} itself"),
            Self::AnswersArp { link, value } => {
                write!(f, "{link} answers ARP requests for the VIPs: its arp_ignore is {value}")
            }
            Self::AnnouncesVip { link, value } => {
                write!(f, "{link} may announce a VIP in ARP requests: its arp_announce is {value}")
            }
            Self::StrictSource { link } => {
                write!(f, "{link} drops requests of clients that are routed by another interface: its rp_filter is 1")
            }
            Self::ClientHidden { director } => {
                write!(f, "connections from the director's address {director} don't show their clients' addresses")
            }
            Self::NotTakenOut { link } => write!(f, "{link} leaves packets for the VIPs in their tunnels"),
            Self::OtherMss { link, there: Some(mss) } => write!(f, "{link} tells clients of an MSS of {mss}"),
            Self::OtherMss { link, there: None } => write!(f, "{link} leaves the MSS that clients are told as it is"),
        }
    }
}

impl Problem {
    /// What comes of it.
    pub fn why(&self) -> &'static str {
        match self {
            Self::LoDown => "an address on a link that is down is not used",
            Self::NoIpv6OnLo { .. } | Self::VipMissing { .. } => "requests for the VIP would be forwarded or dropped",
            Self::VipTooWide { .. } => "every address of that network would be this host's own",
            Self::VipUnusable { .. } => "the kernel does not use such an address",
            Self::VipOnWire { .. } => "it is answered for there, so clients may find this host instead of the director",
            Self::AnswersArp { .. } => "clients and routers may find this host instead of the director",
            Self::AnnouncesVip { .. } => {
                "replies carry the VIP as source, and asking for the next hop's address would show it"
            }
            Self::ClientHidden { .. } => "servers would log the director, and keep everybody out or nobody",
            Self::OtherMss { .. } => "what clients send then is of another size than was asked for",
            Self::NotTakenOut { .. } => "without a tunnel device of the kernel they reach nobody",
            Self::StrictSource { .. } => "strict reverse path filtering wants the way back to be the way in",
        }
    }
}

/// One thing that is wrong, and its mend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub problem: Problem,
    pub mend: Mend,
}

/// How a [`Finding`] is put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mend {
    /// [`plan_up`] does it.
    Ops(Vec<Op>),
    /// Left to the administrator, who may have meant it: the shell command.
    ByHand(String),
}

/// The shell command.
impl fmt::Display for Mend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByHand(command) => f.write_str(command),
            Self::Ops(ops) => {
                let commands: Vec<String> = ops.iter().map(ToString::to_string).collect();
                f.write_str(&commands.join(" && "))
            }
        }
    }
}

/// Why it can't be done at all; nothing was looked at further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no VIP was given: name at least one with --vip")]
    NoVip,
    #[error("no director was given: name each local address of its pool (ipvsadm -G) with --director")]
    NoDirector,
    #[error("a real server for full NAT has no VIP: leave {0} out")]
    NeedsNoVip(IpAddr),
    #[error("only full NAT asks for the director's address: leave {0} out")]
    NeedsNoDirector(IpAddr),
    #[error("{vip} cannot be a VIP: it is {why}")]
    BadVip { vip: IpAddr, why: &'static str },
    #[error("there is no interface {0} in this network namespace")]
    NoSuchInterface(String),
    #[error("requests cannot come by {name}: it is {why}")]
    BadInterface { name: String, why: &'static str },
    #[error("no Ethernet interface is up, so no request can come: bring one up, or name it with --interface")]
    NoInterface,
    #[error("{vip}: this kernel has no IPv6")]
    NoIpv6 { vip: IpAddr },
    #[error("{problem}: {}; mend it first: {command}", .problem.why())]
    ByHand { problem: Problem, command: String },
}

impl Wanted {
    /// # Errors
    /// [`Refused`] for what can never work, whatever the host is like.
    pub fn check(&self) -> Result<(), Refused> {
        match (self.mode, self.vips.first(), self.directors.first()) {
            (Mode::Fullnat, Some(vip), _) => return Err(Refused::NeedsNoVip(*vip)),
            (Mode::Fullnat, None, None) => return Err(Refused::NoDirector),
            (Mode::Dr | Mode::Tun, _, Some(director)) => return Err(Refused::NeedsNoDirector(*director)),
            (Mode::Dr | Mode::Tun, None, None) => return Err(Refused::NoVip),
            (Mode::Fullnat, None, Some(_)) | (Mode::Dr | Mode::Tun, Some(_), None) => {}
        }
        let bad = |vip: &IpAddr| {
            let why = match vip {
                vip if vip.is_unspecified() => "the unspecified address",
                vip if vip.is_loopback() => "a loopback address",
                vip if vip.is_multicast() => "a multicast address",
                IpAddr::V4(vip) if vip.is_broadcast() => "the broadcast address",
                IpAddr::V6(vip) if vip.is_unicast_link_local() => "a link-local address",
                IpAddr::V6(vip) if vip.to_ipv4_mapped().is_some() => "an IPv4-mapped address",
                _ => return None,
            };
            Some(Refused::BadVip { vip: *vip, why })
        };
        self.vips.iter().find_map(bad).map_or(Ok(()), Err)
    }

    fn ipv4(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.vips.iter().filter_map(|vip| if let IpAddr::V4(vip) = vip { Some(*vip) } else { None })
    }
}

fn key(link: &str, name: &str) -> String {
    format!("net/ipv4/conf/{link}/{name}")
}

const LO_DISABLE_IPV6: &str = "net/ipv6/conf/lo/disable_ipv6";

/// The settings that [`desired`] looks at, as paths below /proc/sys.
pub fn settings(links: &[Link]) -> Vec<String> {
    let names = links.iter().filter(|link| speaks_arp(link)).map(|link| link.name.as_str());
    let mut keys: Vec<String> = names
        .chain(["all"])
        .flat_map(|name| ["arp_ignore", "arp_announce", "rp_filter"].map(|setting| key(name, setting)))
        .collect();
    keys.push(LO_DISABLE_IPV6.into());
    keys
}

fn speaks_arp(link: &Link) -> bool {
    link.ethernet && !link.loopback && !link.noarp
}

/// Ports of a bridge or bond have no addresses of their own.
fn is_port(link: &Link) -> bool {
    link.master.is_some() && link.port_kind != "vrf"
}

fn interfaces<'a>(wanted: &Wanted, links: &'a [Link]) -> Result<Vec<&'a Link>, Refused> {
    if wanted.interfaces.is_empty() {
        let all: Vec<_> = links.iter().filter(|l| speaks_arp(l) && l.up && !is_port(l)).collect();
        return if all.is_empty() { Err(Refused::NoInterface) } else { Ok(all) };
    }
    let named = |name: &String| {
        let link = links.iter().find(|l| l.name == *name).ok_or_else(|| Refused::NoSuchInterface(name.clone()))?;
        let why = match link {
            link if link.loopback => "the loopback",
            link if is_port(link) => "a port of another interface (name that one)",
            link if !link.ethernet => "no Ethernet interface",
            _ => return Ok(link),
        };
        Err(Refused::BadInterface { name: name.clone(), why })
    };
    wanted.interfaces.iter().map(named).collect()
}

/// Everything that is wrong, in the order to mend it; empty is a real server that works.
///
/// # Errors
/// [`Refused`] when the question makes no sense on this host.
pub fn desired(wanted: &Wanted, host: &Observed) -> Result<Vec<Finding>, Refused> {
    wanted.check()?;
    if wanted.mode == Mode::Fullnat {
        return Ok(believed(wanted, host));
    }
    let interfaces = interfaces(wanted, &host.links)?;
    let mut findings = Vec::new();
    if wanted.mode == Mode::Tun {
        findings.extend(interfaces.iter().filter_map(|link| taken_out(wanted, host, link)));
    }
    // Settings before addresses: nobody shall see the VIP in between.
    if wanted.ipv4().next().is_some() {
        for link in interfaces {
            findings.extend(arp_ignore(wanted, host, link));
            findings.extend(arp_announce(wanted, host, link));
            findings.extend(rp_filter(host, link));
        }
    }
    for vip in &wanted.vips {
        findings.extend(ipv6_on_lo(*vip, host)?);
        findings.extend(address(*vip, host));
    }
    // Several findings may share a mend; each thing is told once.
    let mut once: Vec<Finding> = Vec::new();
    for finding in findings {
        if !once.contains(&finding) {
            once.push(finding);
        }
    }
    Ok(once)
}

/// The changes that put everything right, in order. None when everything is.
///
/// # Errors
/// [`Refused`] as [`desired`], and when something has to be mended by hand first.
pub fn plan_up(wanted: &Wanted, host: &Observed) -> Result<Vec<Op>, Refused> {
    let mut ops: Vec<Op> = Vec::new();
    for finding in desired(wanted, host)? {
        match finding.mend {
            Mend::ByHand(command) => return Err(Refused::ByHand { problem: finding.problem, command }),
            Mend::Ops(more) => more.into_iter().for_each(|op| {
                if !ops.contains(&op) {
                    ops.push(op);
                }
            }),
        }
    }
    Ok(ops)
}

impl Observed {
    fn setting(&self, link: &str, name: &str) -> i64 {
        self.settings.get(&key(link, name)).copied().unwrap_or(0)
    }

    /// What counts for an interface: the larger of `all` and its own value.
    fn effective(&self, link: &Link, name: &str) -> i64 {
        self.setting("all", name).max(self.setting(&link.name, name))
    }

    /// Set both to `value`, whichever differ. The larger one counts, so neither may be left above.
    fn set_both(&self, link: &Link, name: &str, value: i64) -> Mend {
        let set = |of: &str| {
            let old = self.setting(of, name);
            (old != value).then(|| Op::Set { key: key(of, name), old, new: value })
        };
        Mend::Ops(["all", &link.name].into_iter().filter_map(set).collect())
    }

    fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }
}

fn arp_ignore(wanted: &Wanted, host: &Observed, link: &Link) -> Option<Finding> {
    let value = host.effective(link, "arp_ignore");
    let silent = match value {
        // Only for addresses of the interface itself (1, and of the asker's network: 2); for none (8).
        1 | 2 | 8 => true,
        // Not for addresses of host scope, which a VIP that is still to be added will have.
        3 => host.addrs.iter().all(|a| !wanted.vips.contains(&a.ip) || a.scope == Scope::Host),
        // 0 is for all; 4 to 7 and what is above 8 mean nothing, which is 0 (arp_ignore).
        _ => false,
    };
    let excused = silent || wanted.static_arp || link.noarp;
    if excused || wanted.ipv4().all(|vip| host.rules.arp_hides(vip, &link.name)) {
        return None;
    }
    let problem = Problem::AnswersArp { link: link.name.clone(), value };
    Some(Finding { problem, mend: host.set_both(link, "arp_ignore", 1) })
}

fn arp_announce(wanted: &Wanted, host: &Observed, link: &Link) -> Option<Finding> {
    let value = host.effective(link, "arp_announce");
    let excused = value == 2 || wanted.static_arp || link.noarp;
    if excused || wanted.ipv4().all(|vip| host.rules.arp_rewrites(vip, &link.name)) {
        return None;
    }
    let problem = Problem::AnnouncesVip { link: link.name.clone(), value };
    Some(Finding { problem, mend: host.set_both(link, "arp_announce", 2) })
}

/// What is there already stays: directors add up.
fn believed(wanted: &Wanted, host: &Observed) -> Vec<Finding> {
    let new: BTreeSet<IpAddr> = host.directors.iter().chain(&wanted.directors).copied().collect();
    let op = Op::Directors { old: host.directors.clone(), new };
    let missing = wanted.directors.iter().filter(|d| !host.directors.contains(d));
    let finding =
        |d: &IpAddr| Finding { problem: Problem::ClientHidden { director: *d }, mend: Mend::Ops(vec![op.clone()]) };
    missing.map(finding).collect()
}

/// What is there already stays: VIPs add up.
fn taken_out(wanted: &Wanted, host: &Observed, link: &Link) -> Option<Finding> {
    let old = host.decap.get(&link.name);
    let vips: BTreeSet<IpAddr> = wanted.vips.iter().copied().collect();
    let mss = wanted.mss.on(link);
    let (name, ends) = (link.name.clone(), |d: &&Decap| d.gue_port == wanted.gue_port && vips.is_subset(&d.vips));
    let problem = match old.filter(ends) {
        None => Problem::NotTakenOut { link: name.clone() },
        Some(d) if d.mss != mss => Problem::OtherMss { link: name.clone(), there: d.mss },
        Some(_) => return None,
    };
    let all = old.iter().flat_map(|d| d.vips.iter().copied()).chain(vips).collect();
    let new = Some(Decap { vips: all, gue_port: wanted.gue_port, mss });
    let op = Op::Decap { link: name, old: old.cloned(), new };
    Some(Finding { problem, mend: Mend::Ops(vec![op]) })
}

/// Strict filtering is no problem where clients are answered by the interface they come in by.
fn rp_filter(host: &Observed, link: &Link) -> Option<Finding> {
    let ways_out = &host.ipv4_default_routes;
    let strict = host.effective(link, "rp_filter") == 1;
    if !strict || ways_out.is_empty() || ways_out.iter().any(|route| route.ifindex == Some(link.ifindex)) {
        return None;
    }
    let (key, old) = (key(&link.name, "rp_filter"), host.setting(&link.name, "rp_filter"));
    let mend = Mend::Ops(vec![Op::Set { key, old, new: 2 }]);
    Some(Finding { problem: Problem::StrictSource { link: link.name.clone() }, mend })
}

fn ipv6_on_lo(vip: IpAddr, host: &Observed) -> Result<Option<Finding>, Refused> {
    if vip.is_ipv4() {
        return Ok(None);
    }
    match host.settings.get(LO_DISABLE_IPV6) {
        None => Err(Refused::NoIpv6 { vip }),
        Some(0) => Ok(None),
        Some(&old) => {
            let mend = Mend::Ops(vec![Op::Set { key: LO_DISABLE_IPV6.into(), old, new: 0 }]);
            Ok(Some(Finding { problem: Problem::NoIpv6OnLo { vip }, mend }))
        }
    }
}

fn address(vip: IpAddr, host: &Observed) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut there = false;
    for addr in host.addrs.iter().filter(|a| a.ip == vip) {
        let Some(link) = host.link(addr.ifindex).filter(|link| link.up || link.loopback) else { continue };
        let name = link.name.clone();
        let whole = Addr::host(link.ifindex, vip).prefix_len;
        let delete = Op::DelAddr { link: name.clone(), addr: addr.clone() };
        let again = Op::AddAddr { link: name.clone(), addr: Addr::host(link.ifindex, vip) };
        if speaks_arp(link) {
            let mend = Mend::ByHand(delete.to_string());
            findings.push(Finding { problem: Problem::VipOnWire { vip, link: name }, mend });
            continue;
        }
        if link.loopback && addr.prefix_len != whole {
            let problem = Problem::VipTooWide { vip, link: name, prefix_len: addr.prefix_len };
            findings.push(Finding { problem, mend: Mend::Ops(vec![delete, again]) });
        } else if addr.flags & (Addr::TENTATIVE | Addr::DADFAILED) != 0 {
            let problem = Problem::VipUnusable { vip, link: name };
            findings.push(Finding { problem, mend: Mend::Ops(vec![delete, again]) });
        }
        there = true;
    }
    let lo = host.links.iter().find(|link| link.loopback);
    let (lo_index, lo_name) = lo.map_or((1, "lo"), |lo| (lo.ifindex, lo.name.as_str()));
    if !there {
        let op = Op::AddAddr { link: lo_name.to_owned(), addr: Addr::host(lo_index, vip) };
        findings.push(Finding { problem: Problem::VipMissing { vip }, mend: Mend::Ops(vec![op]) });
    }
    if lo.is_some_and(|lo| !lo.up) {
        let mend = Mend::ByHand(format!("ip link set {lo_name} up"));
        findings.insert(0, Finding { problem: Problem::LoDown, mend });
    }
    findings
}

#[cfg(test)]
mod tests;
