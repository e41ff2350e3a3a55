//! The filter of `rvs trace`, in the manner of pcap-filter(7): `host`, `net`, `port`, `portrange` with `src` or `dst`, `tcp`, `udp`, `sctp`, `icmp`,
//! `icmp6`, `ip`, `ip6`, `proto NUMBER`, joined by `and`, `or`, `not` and parentheses; and what tcpdump can't know: `reason NAME`, `forwarded`,
//! `answered`, `passed`, `dropped`, `service tcp:ADDRESS:PORT`, `dest ADDRESS[:PORT]`.
//!
//! A part of it is for the data plane ([`Filter::first_look`]), which may let too many packets pass; rvsd looks at those in full.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use rvs_datapath::abi::Trace;
use rvs_datapath::verdict::{Kind, Reason};

use crate::api::{DestId, Proto, ServiceId};
use crate::headers::{Ends, ICMP, ICMP6, SCTP, TCP, UDP};
use crate::{limits, plan};

/// Which packets to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Expr);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Expr {
    All,
    Is(Term),
    Not(Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Term {
    Net {
        side: Side,
        address: IpAddr,
        bits: u8,
    },
    Port {
        side: Side,
        range: RangeInclusive<u16>,
    },
    Protocol(u8),
    Family(u8),
    /// A bit for each.
    Reason(u128),
    Service(ServiceId),
    /// Port 0: any.
    Dest(IpAddr, u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Either,
    Source,
    Destination,
}

/// What a filter is asked about.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub packet: Option<&'a Ends>,
    pub reason: Reason,
    pub service: Option<ServiceId>,
    pub dest: Option<DestId>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("a filter of {0} bytes: at most {max}", max = limits::FILTER_BYTES_MAX)]
    TooLong(usize),
    #[error("more than {max} parentheses or `not` in one another", max = limits::FILTER_DEPTH_MAX)]
    TooDeep,
    #[error("the filter ends where {0} should follow")]
    Ends(&'static str),
    #[error("{found:?} where {wanted} should be")]
    Unexpected { found: String, wanted: &'static str },
    #[error("{0:?} is no reason: see rvs drops --json for all of them")]
    NoSuchReason(String),
}

impl Filter {
    /// An empty text is all packets.
    ///
    /// # Errors
    /// Which word is none of the language.
    pub fn parse(text: &str) -> Result<Filter, FilterError> {
        if text.len() > limits::FILTER_BYTES_MAX {
            return Err(FilterError::TooLong(text.len()));
        }
        let spaced = text.replace('(', " ( ").replace(')', " ) ").replace('!', " ! ");
        let mut words = Words { words: spaced.split_whitespace().collect(), depth: 0 };
        words.words.reverse();
        if words.words.is_empty() {
            return Ok(Filter(Expr::All));
        }
        let all = words.or()?;
        match words.words.pop() {
            None => Ok(Filter(all)),
            Some(found) => Err(FilterError::Unexpected { found: found.to_owned(), wanted: "and, or, or the end" }),
        }
    }

    pub fn matches(&self, seen: Seen<'_>) -> bool {
        self.0.matches(seen)
    }

    /// What the data plane looks at: where it says no, the filter does. Without its time.
    pub fn first_look(&self) -> Trace {
        let mut look = Trace { reasons: halves(self.0.reasons()), ..Trace::default() };
        self.0.narrow(&mut look);
        look
    }
}

/// As the map has them.
fn halves(bits: u128) -> [u64; 2] {
    [bits as u64, (bits >> 64) as u64]
}

impl Expr {
    fn matches(&self, seen: Seen<'_>) -> bool {
        match self {
            Expr::All => true,
            Expr::Is(term) => term.matches(seen),
            Expr::Not(a) => !a.matches(seen),
            Expr::And(a, b) => a.matches(seen) && b.matches(seen),
            Expr::Or(a, b) => a.matches(seen) || b.matches(seen),
        }
    }

    /// Those for which it may hold.
    fn reasons(&self) -> u128 {
        match self {
            Expr::Is(Term::Reason(bits)) => *bits,
            Expr::Not(a) => match **a {
                Expr::Is(Term::Reason(bits)) => !bits,
                _ => u128::MAX,
            },
            Expr::And(a, b) => a.reasons() & b.reasons(),
            Expr::Or(a, b) => a.reasons() | b.reasons(),
            Expr::All | Expr::Is(_) => u128::MAX,
        }
    }

    /// What must hold in any case; of two conditions of one kind the first.
    fn narrow(&self, look: &mut Trace) {
        match self {
            Expr::And(a, b) => {
                a.narrow(look);
                b.narrow(look);
            }
            Expr::Is(term) => term.narrow(look),
            Expr::All | Expr::Not(_) | Expr::Or(..) => {}
        }
    }
}

impl Term {
    fn matches(&self, seen: Seen<'_>) -> bool {
        let ends = seen.packet;
        match self {
            Term::Net { side, address, bits } => ends.is_some_and(|e| {
                let is = |a: IpAddr| a.is_ipv4() == address.is_ipv4() && under(a, *bits) == under(*address, *bits);
                side.either(is(e.source), is(e.destination))
            }),
            Term::Port { side, range } => ends
                .and_then(|e| e.ports)
                .is_some_and(|[from, to]| side.either(range.contains(&from), range.contains(&to))),
            Term::Protocol(number) => ends.is_some_and(|e| e.protocol == *number),
            Term::Family(family) => ends.is_some_and(|e| e.source.is_ipv4() == (*family == 4)),
            Term::Reason(bits) => bits >> seen.reason as u32 & 1 != 0,
            Term::Service(id) => seen.service == Some(*id),
            Term::Dest(address, port) => {
                seen.dest.is_some_and(|d| d.addr == *address && (*port == 0 || d.port == *port))
            }
        }
    }

    fn narrow(&self, look: &mut Trace) {
        let family = |a: &IpAddr| if a.is_ipv4() { 4 } else { 6 };
        match self {
            Term::Net { address, bits, .. } if look.mask == [0; 16] && [0, family(address)].contains(&look.family) => {
                (look.family, look.address) = (family(address), plan::bytes(*address));
                look.mask =
                    plan::bytes(under(if address.is_ipv4() { [255; 4].into() } else { [255; 16].into() }, *bits));
            }
            Term::Port { range, .. } if look.port == 0 && range.start() == range.end() => look.port = *range.start(),
            Term::Protocol(number) if look.protocol == 0 => look.protocol = *number,
            Term::Family(family) if look.family == 0 => look.family = *family,
            Term::Service(ServiceId::Virtual { proto, addr, .. }) => {
                Term::Protocol(number(*proto)).narrow(look);
                Term::Family(family(addr)).narrow(look);
            }
            _ => {}
        }
    }
}

impl Side {
    fn either(self, source: bool, destination: bool) -> bool {
        match self {
            Side::Either => source || destination,
            Side::Source => source,
            Side::Destination => destination,
        }
    }
}

fn number(proto: Proto) -> u8 {
    crate::model::Proto::from(proto).number()
}

/// An address without what is behind its first bits.
fn under(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(a) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0);
            IpAddr::V4((a.to_bits() & mask).into())
        }
        IpAddr::V6(a) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0);
            IpAddr::V6((a.to_bits() & mask).into())
        }
    }
}

/// Those still to come, the next one last.
struct Words<'a> {
    words: Vec<&'a str>,
    depth: usize,
}

impl Words<'_> {
    fn take(&mut self, any_of: &[&str]) -> bool {
        let there = self.words.last().is_some_and(|word| any_of.contains(word));
        if there {
            self.words.pop();
        }
        there
    }

    fn next(&mut self, wanted: &'static str) -> Result<&str, FilterError> {
        self.words.pop().ok_or(FilterError::Ends(wanted))
    }

    fn parsed<T: std::str::FromStr>(&mut self, wanted: &'static str) -> Result<T, FilterError> {
        let word = self.next(wanted)?;
        word.parse().map_err(|_| FilterError::Unexpected { found: word.to_owned(), wanted })
    }

    fn or(&mut self) -> Result<Expr, FilterError> {
        let mut all = self.and()?;
        while self.take(&["or", "||"]) {
            all = Expr::Or(Box::new(all), Box::new(self.and()?));
        }
        Ok(all)
    }

    fn and(&mut self) -> Result<Expr, FilterError> {
        let mut all = self.not()?;
        while self.take(&["and", "&&"]) {
            all = Expr::And(Box::new(all), Box::new(self.not()?));
        }
        Ok(all)
    }

    fn not(&mut self) -> Result<Expr, FilterError> {
        self.depth += 1;
        if self.depth > limits::FILTER_DEPTH_MAX {
            return Err(FilterError::TooDeep);
        }
        let done = if self.take(&["not", "!"]) {
            Expr::Not(Box::new(self.not()?))
        } else if self.take(&["("]) {
            let inner = self.or()?;
            let closing = self.next("a closing parenthesis")?;
            if closing != ")" {
                let found = closing.to_owned();
                return Err(FilterError::Unexpected { found, wanted: "and, or, or a closing parenthesis" });
            }
            inner
        } else {
            self.primitive()?
        };
        self.depth -= 1;
        Ok(done)
    }

    /// A protocol, which may stand before an address or port (`tcp port 80`), or one of the others.
    fn primitive(&mut self) -> Result<Expr, FilterError> {
        let wanted = "a condition (host, net, port, tcp, reason, ...)";
        let word = self.words.last().copied().ok_or(FilterError::Ends(wanted))?;
        let protocol = match word {
            "tcp" => Term::Protocol(TCP),
            "udp" => Term::Protocol(UDP),
            "sctp" => Term::Protocol(SCTP),
            "icmp" => Term::Protocol(ICMP),
            "icmp6" => Term::Protocol(ICMP6),
            "ip" => Term::Family(4),
            "ip6" => Term::Family(6),
            _ => return Ok(Expr::Is(self.term(wanted)?)),
        };
        self.words.pop();
        const MORE: [&str; 6] = ["src", "dst", "host", "net", "port", "portrange"];
        if self.words.last().is_some_and(|word| MORE.contains(word)) {
            let term = self.term(wanted)?;
            return Ok(Expr::And(Box::new(Expr::Is(protocol)), Box::new(Expr::Is(term))));
        }
        Ok(Expr::Is(protocol))
    }

    fn term(&mut self, wanted: &'static str) -> Result<Term, FilterError> {
        let side = if self.take(&["src"]) {
            Side::Source
        } else if self.take(&["dst"]) {
            Side::Destination
        } else {
            Side::Either
        };
        let kind = |kind: Kind| {
            let of = Reason::ALL.iter().filter(|r| r.kind() == kind);
            Term::Reason(of.fold(0, |bits, r| bits | 1 << *r as u64))
        };
        let word = self.next(wanted)?;
        Ok(match word {
            "host" => self.net(side, false)?,
            "net" => self.net(side, true)?,
            "port" => {
                let port = self.parsed("a port")?;
                Term::Port { side, range: port..=port }
            }
            "portrange" => self.ports(side)?,
            "proto" if side == Side::Either => Term::Protocol(self.parsed("the number of a protocol")?),
            "reason" if side == Side::Either => self.reason()?,
            "forwarded" if side == Side::Either => kind(Kind::Forward),
            "answered" if side == Side::Either => kind(Kind::Answer),
            "passed" if side == Side::Either => kind(Kind::Pass),
            "held" if side == Side::Either => kind(Kind::Held),
            "dropped" if side == Side::Either => kind(Kind::Drop),
            "service" if side == Side::Either => self.service()?,
            "dest" if side == Side::Either => self.dest()?,
            // `src 192.0.2.1` is `src host 192.0.2.1`.
            other => match other.parse::<IpAddr>() {
                Ok(address) => Term::Net { side, address, bits: 128 },
                Err(_) => return Err(FilterError::Unexpected { found: other.to_owned(), wanted }),
            },
        })
    }

    fn net(&mut self, side: Side, mask: bool) -> Result<Term, FilterError> {
        let wanted = if mask { "a network (ADDRESS/BITS)" } else { "an address" };
        let word = self.next(wanted)?;
        let unexpected = || FilterError::Unexpected { found: word.to_owned(), wanted };
        let (address, bits) = match word.split_once('/') {
            Some((address, bits)) if mask => (address, bits.parse().map_err(|_| unexpected())?),
            Some(_) => return Err(unexpected()),
            None => (word, 128),
        };
        let address: IpAddr = address.parse().map_err(|_| unexpected())?;
        if word.contains('/') && bits > if address.is_ipv4() { 32 } else { 128 } {
            return Err(unexpected());
        }
        Ok(Term::Net { side, address, bits })
    }

    fn ports(&mut self, side: Side) -> Result<Term, FilterError> {
        let wanted = "two ports (PORT-PORT)";
        let word = self.next(wanted)?;
        let range = word.split_once('-').and_then(|(a, b)| Some(a.parse().ok()?..=b.parse().ok()?));
        let range = range.filter(|r: &RangeInclusive<u16>| !r.is_empty());
        let range = range.ok_or_else(|| FilterError::Unexpected { found: word.to_owned(), wanted })?;
        Ok(Term::Port { side, range })
    }

    /// One, or several with commas between.
    fn reason(&mut self) -> Result<Term, FilterError> {
        let mut bits = 0;
        for name in self.next("the name of a reason")?.split(',') {
            let found = Reason::ALL.iter().find(|r| r.name() == name);
            bits |= 1 << *found.ok_or_else(|| FilterError::NoSuchReason(name.to_owned()))? as u64;
        }
        Ok(Term::Reason(bits))
    }

    fn service(&mut self) -> Result<Term, FilterError> {
        let wanted = "a service (tcp:ADDRESS:PORT)";
        let word = self.next(wanted)?;
        let unexpected = || FilterError::Unexpected { found: word.to_owned(), wanted };
        let (proto, at) = word.split_once(':').ok_or_else(unexpected)?;
        let proto = match proto {
            "tcp" => Proto::Tcp,
            "udp" => Proto::Udp,
            "sctp" => Proto::Sctp,
            _ => return Err(unexpected()),
        };
        let at: SocketAddr = at.parse().map_err(|_| unexpected())?;
        Ok(Term::Service(ServiceId::Virtual { proto, addr: at.ip(), port: at.port() }))
    }

    fn dest(&mut self) -> Result<Term, FilterError> {
        let wanted = "a real server (ADDRESS or ADDRESS:PORT)";
        let word = self.next(wanted)?;
        let both = word.parse::<SocketAddr>().map(|at| (at.ip(), at.port()));
        let dest = both.or_else(|_| word.parse::<IpAddr>().map(|address| (address, 0)));
        let (address, port) = dest.map_err(|_| FilterError::Unexpected { found: word.to_owned(), wanted })?;
        Ok(Term::Dest(address, port))
    }
}

#[cfg(test)]
mod tests;
