//! Packets: those that `rvs why` asks about, and those that `rvs trace` shows.

use std::fmt::Write;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{DestId, Forward, ServiceId};

/// The bytes of an Ethernet frame; hexadecimal digits on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame(pub Vec<u8>);

impl Serialize for Frame {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * self.0.len());
        for byte in &self.0 {
            // A String takes all.
            let _ = write!(text, "{byte:02x}");
        }
        to.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Frame {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let digit = |b: u8| char::from(b).to_digit(16);
        let byte = |pair: &[u8]| match pair {
            [high, low] => Some((digit(*high)? << 4 | digit(*low)?) as u8),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes.map(Frame).ok_or_else(|| de::Error::custom("a frame is not in hexadecimal digits"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeProto {
    Tcp,
    Udp,
    /// An INIT.
    Sctp,
    /// An echo request; ports do not count.
    Icmp,
}

/// A packet to ask about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    pub proto: ProbeProto,
    pub from: (IpAddr, u16),
    pub to: (IpAddr, u16),
    /// TCP flags, as in the header.
    pub flags: u8,
    /// The interface it comes in by; `None`: that by which its source is reached.
    pub interface: Option<String>,
}

/// What becomes of a packet; the kinds of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Forwarded,
    Answered,
    Passed,
    /// With rvsd: it comes again.
    Held,
    Dropped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Connection {
    /// It is of none, and opens none.
    None,
    Known,
    New,
}

/// The real server that a packet is for, or from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyDest {
    pub id: DestId,
    pub forward: Forward,
    /// `None`: it has been removed.
    pub weight: Option<u32>,
    /// It is told of its clients by PROXY headers.
    pub proxy: bool,
}

/// What would become of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyRow {
    /// The interface it comes in by, and how the program sits there.
    pub interface: String,
    pub hook: String,
    pub outcome: Outcome,
    /// As in `rvs drops`, ...
    pub reason: String,
    /// ... explained, ...
    pub text: String,
    /// ... and what to do about it, if there is something.
    pub advice: Option<String>,
    /// The interface it leaves by.
    pub out: Option<String>,
    /// Its next hop's MAC address is not known: the kernel finds it out, and sends it then.
    pub resolve: bool,
    pub service: Option<ServiceId>,
    pub scheduler: Option<String>,
    pub connection: Connection,
    pub dest: Option<WhyDest>,
    pub came: Frame,
    pub left: Frame,
}

/// A packet that came, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedRow {
    /// When it came, nanoseconds of Unix time.
    pub at_ns: u64,
    pub interface: String,
    pub outcome: Outcome,
    pub reason: String,
    pub out: Option<String>,
    pub service: Option<ServiceId>,
    pub dest: Option<DestId>,
    /// Length of the frame.
    pub len: u32,
    /// Its first bytes, as it came.
    pub bytes: Frame,
}
