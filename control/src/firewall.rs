//! Firewall rules that an XDP data plane passes by: which of them could drop packets for a virtual service.
//!
//! XDP and tc ingress run before every netfilter hook, so a packet they forward never meets the chains at ingress,
//! prerouting and input. [`Rules::warnings`] names the rules an administrator may be counting on. It errs on the loud
//! side: a rule counts as matching unless an address, a port, a protocol or the incoming interface rules it out. NAT
//! tables are not looked at.
//!
//! The same reading answers for real servers whether ARP rules hide a VIP ([`Rules::arp_hides`],
//! [`Rules::arp_rewrites`]), there erring on the strict side.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

mod iptables;
mod nft;

/// Chain jumps followed from a base chain; nftables allows no more (`NFT_JUMP_STACK_SIZE`).
const DEPTH_MAX: usize = 16;
/// Rules looked at for one service and base chain: jumps can multiply, and the text is not ours.
const STEPS_MAX: u32 = 100_000;

/// A program that prints rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tool {
    /// `nft -j list ruleset`.
    Nft,
    /// `iptables-save`, either variant.
    Iptables,
    /// `ip6tables-save`, either variant.
    Ip6tables,
    /// `arptables-save`, either variant.
    Arptables,
}

/// What a program printed.
#[derive(Clone, Debug)]
pub struct Reading {
    pub tool: Tool,
    pub text: String,
}

/// A text that could not be understood; none of its rules are known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot read the firewall rules of {}: {why}", .tool.name())]
pub struct Unreadable {
    pub tool: Tool,
    pub why: String,
}

/// A virtual service as a firewall sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vip {
    pub addr: IpAddr,
    /// IP protocol number: 6, 17, 132.
    pub proto: u8,
    /// 0 is every port.
    pub port: u16,
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let proto = match self.proto {
            6 => "tcp",
            17 => "udp",
            132 => "sctp",
            _ => "ip",
        };
        match self.addr {
            IpAddr::V4(addr) => write!(f, "{addr}:{}/{proto}", self.port),
            IpAddr::V6(addr) => write!(f, "[{addr}]:{}/{proto}", self.port),
        }
    }
}

/// What would happen to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    Drop,
    Reject,
    /// There are too many jumps to follow.
    Unknown,
}

/// One rule (or a chain's policy) that the data plane passes by and that may be meant for these services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    pub tool: Tool,
    /// With its family where the tool has several: "filter", "inet filter".
    pub table: String,
    pub chain: String,
    /// As the tool writes it (nft: as its own language would), "policy drop", or "its jumps".
    pub rule: String,
    pub effect: Effect,
    /// Never empty, in order.
    pub services: Vec<Vip>,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, chain, rule, .. } = self;
        write!(f, "{} table {table} chain {chain}: `{rule}` ", self.tool.name())?;
        f.write_str(match self.effect {
            Effect::Drop => "could drop",
            Effect::Reject => "could reject",
            Effect::Unknown => "leads to too many rules to check, which may drop",
        })?;
        match self.services.as_slice() {
            [] => f.write_str(" packets"),
            [one] => write!(f, " packets for {one}"),
            [first, rest @ ..] => write!(f, " packets for {first} and {} more", rest.len()),
        }?;
        f.write_str(", but packets of a virtual service do not pass this chain")
    }
}

impl Tool {
    /// The program's name as users know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
            Self::Ip6tables => "ip6tables",
            Self::Arptables => "arptables",
        }
    }
}

/// Everything that was read, ready to be asked.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    chains: Vec<Chain>,
    index: BTreeMap<ChainId, usize>,
}

/// Where a chain lives: (reading, table with family, chain).
type ChainId = (usize, String, String);

#[derive(Clone, Debug)]
struct Chain {
    reading: usize,
    tool: Tool,
    family: Family,
    table: String,
    name: String,
    /// `None`: only reached by jumps.
    base: Option<Base>,
    rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Ip,
    Ip6,
    /// Both.
    Inet,
    Arp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Base {
    hook: Hook,
    drop_by_policy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hook {
    /// Ingress, prerouting or input: what a packet for this host passes.
    In,
    /// Output.
    Out,
}

#[derive(Clone, Debug)]
struct Rule {
    text: String,
    /// In order; a verdict counts when all tests before it hold.
    tests: Vec<Test>,
    /// Several for a verdict map: each with a test of its own.
    verdicts: Vec<(Vec<Test>, Verdict)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Accept,
    Drop,
    Reject,
    Return,
    Jump(String),
    Goto(String),
    /// An ARP sender address is replaced; the walk goes on.
    Rewrite,
}

/// One condition. Ranges are inclusive.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Dst(Vec<(IpAddr, IpAddr)>),
    Dport(Vec<(u16, u16)>),
    Proto(Vec<u8>),
    /// Incoming interface; a trailing `*` is any ending.
    Iif(Vec<String>),
    Oif(Vec<String>),
    V4,
    V6,
    ArpSender(Vec<(IpAddr, IpAddr)>),
    ArpTarget(Vec<(IpAddr, IpAddr)>),
    /// ARP operation: 1 request, 2 reply.
    ArpOp(Vec<u16>),
    Not(Box<Test>),
    /// Holds for every packet looked at.
    Always,
    /// Anything not understood.
    Unknown,
}

/// Whether a test holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holds {
    No,
    Maybe,
    Surely,
}

impl Holds {
    fn not(self) -> Self {
        match self {
            Self::No => Self::Surely,
            Self::Maybe => Self::Maybe,
            Self::Surely => Self::No,
        }
    }

    fn of(surely: bool) -> Self {
        if surely { Self::Surely } else { Self::No }
    }
}

/// The packet that is followed through the chains.
#[derive(Clone, Copy, Debug)]
enum Packet<'a> {
    /// From the network to a virtual service.
    Ip(Vip),
    /// An ARP request for `target` that comes in by an interface.
    ArpAsks { target: Ipv4Addr, iif: &'a str },
    /// An ARP request with this sender that goes out by an interface.
    ArpSends { sender: Ipv4Addr, oif: &'a str },
}

/// What became of the packet in one chain, beyond doubt; `Open` is all else, and where the chain just ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Accepted,
    Dropped,
}

/// What was met on the way.
#[derive(Default)]
struct Trail {
    /// In the order of reading: chain, rule (the chain's length: after all rules), effect.
    drops: Vec<(usize, usize, Effect)>,
    may_be_accepted: bool,
    rewritten: bool,
    steps: u32,
    lost: bool,
}

impl Rules {
    /// Understand what the tools printed. A second text of the same tool and variant is ignored (one program under
    /// two names), and so is nft's view of tables that an iptables-save has shown.
    pub fn read(readings: &[Reading]) -> (Self, Vec<Unreadable>) {
        let mut rules = Self::default();
        let mut problems = Vec::new();
        let mut variants = BTreeSet::new();
        let mut shown = BTreeSet::new();
        let (nft, saved): (Vec<_>, Vec<_>) = readings.iter().enumerate().partition(|(_, r)| r.tool == Tool::Nft);
        for (number, reading) in saved {
            let by_nft = iptables::is_nf_tables(&reading.text);
            if !variants.insert((reading.tool, by_nft)) {
                continue;
            }
            for chain in iptables::parse(number, reading) {
                if by_nft && reading.tool != Tool::Arptables {
                    shown.insert(format!("{} {}", chain.family.name(), chain.table));
                }
                rules.add(chain);
            }
        }
        for (number, reading) in nft {
            match nft::parse(number, &reading.text) {
                Ok(chains) => chains.into_iter().filter(|c| !shown.contains(&c.table)).for_each(|c| rules.add(c)),
                Err(why) => problems.push(Unreadable { tool: Tool::Nft, why }),
            }
        }
        (rules, problems)
    }

    fn add(&mut self, chain: Chain) {
        self.index.insert((chain.reading, chain.table.clone(), chain.name.clone()), self.chains.len());
        self.chains.push(chain);
    }

    /// The rules and policies that could drop packets for these services, each once, in the order they were read.
    pub fn warnings(&self, vips: &[Vip]) -> Vec<Warning> {
        let mut found: BTreeMap<(usize, usize, Effect), BTreeSet<Vip>> = BTreeMap::new();
        for vip in vips {
            for base in self.bases(Hook::In, Packet::Ip(*vip)) {
                let mut trail = Trail::default();
                self.follow_base(base, Packet::Ip(*vip), &mut trail);
                for drop in trail.drops {
                    found.entry(drop).or_default().insert(*vip);
                }
            }
        }
        let warning = |((chain, rule, effect), services): ((usize, usize, Effect), BTreeSet<Vip>)| {
            let chain = &self.chains[chain];
            Warning {
                tool: chain.tool,
                table: chain.table.clone(),
                chain: chain.name.clone(),
                rule: match (chain.rules.get(rule), effect) {
                    (Some(rule), _) => rule.text.clone(),
                    (None, Effect::Unknown) => "its jumps".into(),
                    (None, Effect::Drop | Effect::Reject) => "policy drop".into(),
                },
                effect,
                services: services.into_iter().collect(),
            }
        };
        found.into_iter().map(warning).collect()
    }

    /// Whether ARP rules surely drop every request for `vip` that comes in by `iif`.
    pub fn arp_hides(&self, vip: Ipv4Addr, iif: &str) -> bool {
        let packet = Packet::ArpAsks { target: vip, iif };
        self.bases(Hook::In, packet).any(|base| {
            let mut trail = Trail::default();
            self.follow_base(base, packet, &mut trail) == Fate::Dropped && !trail.may_be_accepted
        })
    }

    /// Whether ARP rules surely replace `vip` as the sender of what goes out by `oif`.
    pub fn arp_rewrites(&self, vip: Ipv4Addr, oif: &str) -> bool {
        let packet = Packet::ArpSends { sender: vip, oif };
        self.bases(Hook::Out, packet).any(|base| {
            let mut trail = Trail::default();
            self.follow_base(base, packet, &mut trail);
            trail.rewritten
        })
    }

    fn bases(&self, hook: Hook, packet: Packet<'_>) -> impl Iterator<Item = usize> {
        let fits = move |chain: &Chain| match (chain.family, packet) {
            (Family::Ip, Packet::Ip(vip)) => vip.addr.is_ipv4(),
            (Family::Ip6, Packet::Ip(vip)) => vip.addr.is_ipv6(),
            (Family::Inet, Packet::Ip(_)) => true,
            (Family::Arp, Packet::ArpAsks { .. } | Packet::ArpSends { .. }) => true,
            _ => false,
        };
        let chains = self.chains.iter().enumerate();
        chains.filter(move |(_, c)| c.base.is_some_and(|b| b.hook == hook) && fits(c)).map(|(at, _)| at)
    }

    fn follow_base(&self, at: usize, packet: Packet<'_>, trail: &mut Trail) -> Fate {
        let fate = self.follow(at, packet, 0, trail);
        if trail.lost {
            trail.drops.push((at, self.chains[at].rules.len(), Effect::Unknown));
            return Fate::Open;
        }
        let policy = self.chains[at].base.is_some_and(|b| b.drop_by_policy);
        if fate == Fate::Open && policy {
            trail.drops.push((at, self.chains[at].rules.len(), Effect::Drop));
            return Fate::Dropped;
        }
        fate
    }

    fn follow(&self, at: usize, packet: Packet<'_>, depth: usize, trail: &mut Trail) -> Fate {
        for (number, rule) in self.chains[at].rules.iter().enumerate() {
            trail.steps += 1;
            if trail.steps > STEPS_MAX || depth > DEPTH_MAX {
                trail.lost = true;
                return Fate::Open;
            }
            let common = rule.tests.iter().map(|t| t.holds(packet)).min().unwrap_or(Holds::Surely);
            for (tests, verdict) in &rule.verdicts {
                let own = tests.iter().map(|t| t.holds(packet)).min().unwrap_or(Holds::Surely);
                let holds = common.min(own);
                if holds == Holds::No {
                    continue;
                }
                match self.apply((at, number), verdict, holds, packet, depth, trail) {
                    Step::On => {}
                    Step::End(fate) => return fate,
                }
            }
        }
        Fate::Open
    }

    fn apply(
        &self,
        (at, number): (usize, usize),
        verdict: &Verdict,
        holds: Holds,
        packet: Packet<'_>,
        depth: usize,
        trail: &mut Trail,
    ) -> Step {
        let surely = holds == Holds::Surely;
        let end = |fate| if surely { Step::End(fate) } else { Step::On };
        match verdict {
            Verdict::Accept => {
                trail.may_be_accepted |= !surely;
                end(Fate::Accepted)
            }
            Verdict::Drop | Verdict::Reject => {
                let effect = if *verdict == Verdict::Drop { Effect::Drop } else { Effect::Reject };
                trail.drops.push((at, number, effect));
                end(Fate::Dropped)
            }
            Verdict::Return => {
                // It may leave out the rest of this chain, which then is no sure thing.
                trail.may_be_accepted |= !surely;
                end(Fate::Open)
            }
            Verdict::Rewrite => {
                trail.rewritten |= surely && !trail.may_be_accepted;
                Step::On
            }
            Verdict::Jump(name) | Verdict::Goto(name) => {
                let chain = &self.chains[at];
                let Some(&target) = self.index.get(&(chain.reading, chain.table.clone(), name.clone())) else {
                    return Step::On;
                };
                let rewritten = trail.rewritten;
                let fate = self.follow(target, packet, depth + 1, trail);
                if !surely {
                    trail.rewritten = rewritten;
                    trail.may_be_accepted |= fate == Fate::Accepted;
                }
                match fate {
                    // A goto does not come back here.
                    Fate::Open if matches!(verdict, Verdict::Goto(_)) => end(Fate::Open),
                    Fate::Open => Step::On,
                    fate => end(fate),
                }
            }
        }
    }
}

enum Step {
    On,
    End(Fate),
}

impl Family {
    fn name(self) -> &'static str {
        match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
            Self::Arp => "arp",
        }
    }
}

impl Test {
    fn not(self, yes: bool) -> Self {
        if yes { Self::Not(Box::new(self)) } else { self }
    }

    fn holds(&self, packet: Packet<'_>) -> Holds {
        match (self, packet) {
            (Self::Always, _) => Holds::Surely,
            (Self::Unknown, _) => Holds::Maybe,
            (Self::Not(test), _) => test.holds(packet).not(),
            (Self::Dst(ranges), Packet::Ip(vip)) => Holds::of(within(ranges, vip.addr)),
            (Self::Proto(protos), Packet::Ip(vip)) => Holds::of(protos.contains(&vip.proto)),
            (Self::Dport(ranges), Packet::Ip(vip)) => port_holds(ranges, vip.port),
            (Self::V4, Packet::Ip(vip)) => Holds::of(vip.addr.is_ipv4()),
            (Self::V6, Packet::Ip(vip)) => Holds::of(vip.addr.is_ipv6()),
            // Packets for a virtual service come from the network, by an interface we need not know.
            (Self::Iif(names), Packet::Ip(_)) => {
                if names.iter().all(|name| name == "lo") {
                    Holds::No
                } else if names.iter().any(|name| name == "*") {
                    Holds::Surely
                } else {
                    Holds::Maybe
                }
            }
            (Self::Iif(names), Packet::ArpAsks { iif, .. }) => Holds::of(names.iter().any(|n| name_fits(n, iif))),
            (Self::Oif(names), Packet::ArpSends { oif, .. }) => Holds::of(names.iter().any(|n| name_fits(n, oif))),
            (Self::ArpTarget(ranges), Packet::ArpAsks { target, .. }) => Holds::of(within(ranges, target.into())),
            (Self::ArpSender(ranges), Packet::ArpSends { sender, .. }) => Holds::of(within(ranges, sender.into())),
            // Replies can't hide a VIP that requests don't: a reply is answered by no one.
            (Self::ArpOp(ops), Packet::ArpAsks { .. }) => Holds::of(ops.contains(&1)),
            // Requests and replies both name their sender.
            (Self::ArpOp(ops), Packet::ArpSends { .. }) if ops.contains(&1) && ops.contains(&2) => Holds::Surely,
            _ => Holds::Maybe,
        }
    }
}

fn within(ranges: &[(IpAddr, IpAddr)], addr: IpAddr) -> bool {
    // All IPv4 addresses sort before all IPv6 addresses, and a range is of one family.
    ranges.iter().any(|(low, high)| (low..=high).contains(&&addr))
}

fn port_holds(ranges: &[(u16, u16)], port: u16) -> Holds {
    match port {
        0 if ranges.iter().any(|&(low, high)| low <= 1 && high == u16::MAX) => Holds::Surely,
        0 => Holds::Maybe,
        port => Holds::of(ranges.iter().any(|&(low, high)| (low..=high).contains(&port))),
    }
}

fn name_fits(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

/// "10.0.0.0/8", "10.0.0.0/255.0.0.0" or one address, as its first and last address.
fn prefix_range(text: &str) -> Option<(IpAddr, IpAddr)> {
    let (addr, length) = text.split_once('/').map_or((text, None), |(addr, length)| (addr, Some(length)));
    let addr: IpAddr = addr.parse().ok()?;
    let length = match length {
        None => u32::MAX,
        Some(text) => text.parse().ok().or_else(|| mask_length(text))?,
    };
    Some(range_of(addr, length))
}

/// The prefix length of a netmask of leading ones.
fn mask_length(text: &str) -> Option<u32> {
    let bits = u32::from(text.parse::<Ipv4Addr>().ok()?);
    (bits.leading_ones() + bits.trailing_zeros() >= 32).then(|| bits.leading_ones())
}

fn range_of(addr: IpAddr, length: u32) -> (IpAddr, IpAddr) {
    match addr {
        IpAddr::V4(addr) => {
            let host = u32::MAX.checked_shr(length).unwrap_or(0);
            let bits = u32::from(addr);
            (Ipv4Addr::from(bits & !host).into(), Ipv4Addr::from(bits | host).into())
        }
        IpAddr::V6(addr) => {
            let host = u128::MAX.checked_shr(length).unwrap_or(0);
            let bits = u128::from(addr);
            (std::net::Ipv6Addr::from(bits & !host).into(), std::net::Ipv6Addr::from(bits | host).into())
        }
    }
}

fn protocol_number(name: &str) -> Option<u8> {
    Some(match name {
        "icmp" => 1,
        "igmp" => 2,
        "tcp" => 6,
        "udp" => 17,
        "dccp" => 33,
        "gre" => 47,
        "esp" => 50,
        "ah" => 51,
        "icmpv6" | "ipv6-icmp" => 58,
        "sctp" => 132,
        "udplite" => 136,
        number => number.parse().ok()?,
    })
}

#[cfg(test)]
mod tests;
