//! Every map of the data plane, its key and its value, once. Plain integers and byte arrays, no padding, sizes asserted.
//!
//! Addresses are 16 bytes as they lie in the packet (an IPv4 address in the first four, the rest 0), ports are in host order.
//! *Configuration* maps are written by the control plane alone, *state* maps by the data plane (the control plane sets a
//! word when a list changes); they never share a value. A change is published by one aligned 8-byte store.
//! [`VERSION`] changes with this file: pins of another version are not adopted.

use crate::conn::{Policy, Stamps};
use crate::ct::Seed;

/// Which layout the maps have.
pub const VERSION: u64 = if cfg!(feature = "other-layout") { OTHER } else { OWN };
/// The layout of builds with the feature `other-layout`, by which tests of upgrades begin.
pub const OTHER: u64 = !OWN;

/// Hash of this file's text (FNV-1a), so that no layout change goes unnoticed.
const OWN: u64 = {
    let text = include_bytes!("abi.rs");
    let (mut hash, mut i) = (0xcbf2_9ce4_8422_2325_u64, 0);
    while i < text.len() {
        hash = (hash ^ text[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
};

/// Names of the maps, as in the programs and in the pin folder. All but [`map::SERVICE_KEYS`], [`map::WATCHED`], [`map::TIMER`] and the
/// rings are arrays of one value, which holds all entries one after the other, each of whole 8-byte words: programs and user space reach
/// them in memory. The number of entries is a power of two.
pub mod map {
    /// [`crate::ct`] words of IPv4 flows, by bucket.
    pub const CONN4: &str = "CONN4";
    /// ... of IPv6 flows.
    pub const CONN6: &str = "CONN6";
    /// [`super::Config`], one entry.
    pub const CONFIG: &str = "CONFIG";
    /// [`super::Clock`], one entry.
    pub const CLOCK: &str = "CLOCK";
    /// The BPF timer that ticks, one entry.
    pub const TIMER: &str = "TIMER";
    /// [`super::Iface`] by ifindex modulo the size, see there.
    pub const IFACES: &str = "IFACES";
    /// [`super::Vlan`] at one of the places that [`super::vlan_place`] begins.
    pub const VLANS: &str = "VLANS";
    /// [`super::ServiceKey`] -> index in [`SERVICES`] (low half), its generation (high half).
    pub const SERVICE_KEYS: &str = "SERVICE_KEYS";
    /// [`super::Service`] by index.
    pub const SERVICES: &str = "SERVICES";
    /// [`super::ServiceState`] by service index.
    pub const SERVICE_STATE: &str = "SERVICE_STATE";
    /// [`super::Dest`] by index; 0 is none.
    pub const DESTS: &str = "DESTS";
    /// [`super::Tunnel`] by dest index.
    pub const TUNNELS: &str = "TUNNELS";
    /// [`super::DestInfo`] by dest index.
    pub const DEST_INFO: &str = "DEST_INFO";
    /// [`super::DestState`] by dest index.
    pub const DEST_STATE: &str = "DEST_STATE";
    /// [`super::Local`]: FULLNAT's local addresses, each service's a run of entries.
    pub const LOCALS: &str = "LOCALS";
    /// Words of [`crate::conn::fullnat`] by slot of the forward entry. They have one entry until there is a dest by that method.
    pub const SIDE4: &str = "SIDE4";
    pub const SIDE6: &str = "SIDE6";
    /// [`super::CpuStats`] by dest index, such an array for each CPU.
    pub const DEST_STATS: &str = "DEST_STATS";
    /// [`super::ListEntry`]: the services' lists of dests, each a run of entries.
    pub const LISTS: &str = "LISTS";
    /// u32 dest indexes: lookup tables of hash schedulers, each a run of entries.
    pub const TABLES: &str = "TABLES";
    /// [`super::Hop`] by index; 0 is none.
    pub const HOPS: &str = "HOPS";
    /// [`super::Hop`]s that the data plane found for replies; 0 is none.
    pub const REPLY_HOPS: &str = "REPLY_HOPS";
    /// [`super::fragment`]: words of notes about datagrams that come in fragments.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// [`super::SCRATCH_WORDS`] for each CPU: what programs hand from function to function.
    pub const SCRATCH4: &str = "SCRATCH4";
    pub const SCRATCH6: &str = "SCRATCH6";
    /// u64 by [`crate::verdict::Reason`], such an array for each CPU.
    pub const VERDICTS: &str = "VERDICTS";
    /// Words by a client's hash (see `limits`).
    pub const RATES: &str = "RATES";
    /// [`super::Trace`], one entry.
    pub const TRACE: &str = "TRACE";
    /// [`super::TraceRoom`], one for each CPU.
    pub const TRACE_ROOM: &str = "TRACE_ROOM";
    /// [`super::Move`], [`super::MOVES_MAX`]: flows to be entered that came from other tables.
    pub const MOVES: &str = "MOVES";
    /// [`super::Leave`], as many: their entries there, to be freed.
    pub const LEAVES: &str = "LEAVES";
    /// Ring buffer of [`super::Traced`], each followed by the first bytes of its packet. It is not pinned: each load of the programs
    /// has one of its own.
    pub const TRACE_RING: &str = "TRACE_RING";
    /// HASH [`super::ServiceKey`] -> u64: bits [`super::watched`]. Of addresses as such, port and protocol are 0.
    pub const WATCHED: &str = "WATCHED";
    /// [`super::Taker`], one entry.
    pub const TAKER: &str = "TAKER";
    /// [`super::HandRoom`], one for each CPU.
    pub const HAND_ROOM: &str = "HAND_ROOM";
    /// Ring buffers of [`super::Handed`], each followed by its packet: fragments that came before their first one, and packets to be cut. Two,
    /// so that a flood of the one leaves the other alone. Not pinned, as [`TRACE_RING`].
    pub const EARLY_RING: &str = "EARLY_RING";
    pub const LARGE_RING: &str = "LARGE_RING";
}

/// One entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// [`VERSION`] of who made the maps. This word and the next keep their places in all versions: see [`crate::elder`].
    pub version: u64,
    /// Bits [`config`].
    pub flags: u32,
    /// `Clock::ticks` when the policy's epoch was turned last.
    pub turned_at: u32,
    #[cfg(feature = "other-layout")]
    pub timeouts_s: [u32; 4],
    pub seed: Seed,
    pub policy: Policy,
    /// `--set` in seconds, as typed: tcp, tcpfin, udp, and one spare.
    #[cfg(not(feature = "other-layout"))]
    pub timeouts_s: [u32; 4],
    /// Of so many packets that may begin a connection one is dropped (`drop_packet`); 0: none.
    pub drop_rate: u32,
    pub spare: u32,
    /// `rvs set`, by the number of the setting; the data plane reads none of them.
    pub settings: [u32; SETTINGS_MAX],
}
pub const SETTINGS_MAX: usize = 16;

/// Bits of [`Config::flags`]: what settings come to.
pub mod config {
    /// Connections are thinned out (`drop_entry`).
    pub const DROP_ENTRY: u32 = 1;
    /// The other table of TCP's states (`secure_tcp`).
    pub const SECURE_TCP: u32 = 2;
    /// TCP and SCTP connections begin with any packet.
    pub const SLOPPY_TCP: u32 = 4;
    pub const SLOPPY_SCTP: u32 = 8;
    /// ICMP errors about no connection begin one.
    pub const SCHEDULE_ICMP: u32 = 16;
    /// A real server (NAT) is told that what it has sent is of no connection.
    pub const NAT_ICMP_SEND: u32 = 32;
    /// These tables are being left for others: their programs see to the flows that they know, and begin none.
    pub const ELDER: u32 = crate::elder::ELDER;
}

/// Written by the timer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// Seconds of the monotonic clock. Ages in the connection tables are in this time.
    pub now_s: u32,
    /// Ticks so far; a full sweep of both tables every [`SWEEP_TICKS`].
    pub ticks: u32,
    /// Second (high half) and messages sent in it (low half): the limit of generated ICMP errors.
    pub icmp: u64,
    /// Monotonic nanoseconds of the last tick.
    pub tick_ns: u64,
    /// Connections that `drop_entry` has taken.
    pub thinned: u64,
    /// Entries that went for others, since both buckets were full, of IPv4 and of IPv6.
    pub evicted: [u64; 2],
    /// Packets that `drop_packet` was asked about.
    pub begun: u64,
    pub stamps: Stamps,
}
impl Clock {
    /// A number that grows by one in about four microseconds (by whole ticks), for first sequence numbers (RFC 6528).
    #[inline(always)]
    pub fn sequence(tick_ns: u64) -> u32 {
        (tick_ns >> 12) as u32
    }
    /// A clock that stands at this second.
    pub fn at(now_s: u32, policy: &Policy) -> Clock {
        let tick_ns = u64::from(now_s) * 1_000_000_000;
        Clock { now_s, tick_ns, stamps: Stamps::new(policy, now_s), ..Clock::default() }
    }
}

/// The timer ticks this often; a full sweep takes [`SWEEP_TICKS`].
pub const TICK_NS: u64 = 25_000_000;
/// A full sweep in two seconds.
pub const SWEEP_TICKS: u32 = 80;

/// An interface with a program. Placed at `ifindex % IFACES_MAX`; two that fall together can't both have one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Iface {
    /// The first eight bytes of a frame for it, the last two 0: the MAC address.
    pub mac: u64,
    /// 0: no interface here. With the bit [`TRACED`] it is nobody's either, and the programs look again: so who is not traced pays
    /// nothing for it.
    pub ifindex: u32,
    /// Bits [`iface`].
    pub flags: u16,
    pub mtu: u16,
    /// A VLAN device: the interface below (0: it is none), and the tag that it puts on, as in [`Vlan`].
    pub lower: u32,
    pub tag: u32,
}
impl Iface {
    pub fn new(ifindex: u32, [a, b, c, d, e, f]: [u8; 6], flags: u16, mtu: u32) -> Iface {
        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
        Iface { mac: u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]), ifindex, flags, mtu, lower: 0, tag: 0 }
    }
    /// The interface's number, traced or not.
    pub fn number(&self) -> u32 {
        self.ifindex & !TRACED
    }
    /// Are packets that come in by it to be told of?
    #[must_use]
    pub fn traced(self, on: bool) -> Iface {
        Iface { ifindex: self.number() | if on { TRACED } else { 0 }, ..self }
    }
}
/// In [`Iface::ifindex`] (the kernel's numbers are below): packets that come in are told of, as [`Trace`] says.
pub const TRACED: u32 = 1 << 31;
pub const IFACES_MAX: u32 = 1024;

/// A VLAN device with a program, for frames that have its tag still.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vlan {
    /// 0: none here.
    pub ifindex: u32,
    /// The interface below, itself a VLAN device perhaps.
    pub lower: u32,
    /// Ethertype of the tag (high half) and VLAN identifier (low half), host order.
    pub tag: u32,
    pub spare: u32,
}
/// Four times [`IFACES_MAX`]: places are found by hash.
pub const VLANS_MAX: u32 = 4096;
/// Places that a VLAN device may have, from the first one on.
pub const VLAN_PROBES: u32 = 8;

/// The first place where it is looked for.
#[inline(always)]
pub fn vlan_place(lower: u32, tag: u32) -> u32 {
    (lower.rotate_left(16) ^ tag).wrapping_mul(0x9e37_79b1) >> 20
}

/// Bits of [`Iface::flags`].
pub mod iface {
    /// XDP sends back by a redirect to the same interface, not by XDP_TX: a veth leaves what XDP_TX gives it lying in the
    /// ring of its other end, unless that has an XDP program too (veth_xdp_flush in drivers/net/veth.c).
    pub const REDIRECT_BACK: u16 = 1;
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    pub address: [u8; 16],
    pub port: u16,
    /// IP protocol number; 0: a firewall mark, in the first four bytes of `address` (host order).
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
}

pub mod service {
    /// The virtual address is one of this host's (kept fresh from netlink).
    pub const LOCAL: u32 = 1;
    /// `mh-port` and `sh-port`: the client's port is hashed too.
    pub const HASH_PORT: u32 = 2;
    /// `mh-fallback` and `sh-fallback`: look further when the first choice is not available.
    pub const HASH_FALLBACK: u32 = 4;
    /// `flag-3`.
    pub const FLAG_3: u32 = 8;
    pub const ONE_PACKET: u32 = 16;
    /// Served although the address is not one of this host's (ECMP).
    pub const NONLOCAL: u32 = 32;
    /// Its cookies work: replies of all its dests come by here.
    pub const ASKS: u32 = 64;
    /// Its real servers are told of their clients by PROXY headers (`proxy`).
    pub const PROXY: u32 = 128;
}

/// A virtual service. The first 32 bytes are what a new connection reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// First entry of the list in LISTS (low half) and number of dests (high half). One store publishes a new list.
    pub list: u64,
    /// First entry of the table in TABLES (low half) and its size (high half), for hash schedulers.
    pub table: u64,
    /// Bits [`service`].
    pub flags: u32,
    /// Number of [`crate::sched::Kind`].
    pub scheduler: u32,
    pub generation: u32,
    /// Persistence timeout, s; 0: none.
    pub persistence_s: u32,
    pub key: ServiceKey,
    /// IPv4 mask as it lies in the packet, or IPv6 prefix length.
    pub netmask: u32,
    /// Persistence engine, zero-padded.
    pub engine: [u8; 16],
    /// Order in which services were made, for listings.
    pub serial: u64,
    /// What `-Z`, and dests that left, took from or gave to the sum of the dests' counters (wrapping).
    pub offset: Stats,
    /// First entry in LOCALS (low half) and number of local addresses (high half). One store publishes them.
    pub locals: u64,
    /// SYNs in a second that are taken as they come, + 1; those after them are answered with cookies. 0: no cookies.
    pub cookies: u32,
    /// New connections in a second; 0: any number.
    pub rate: u32,
    /// The same from one client (an IPv4 address, a /64 of IPv6).
    pub source_rate: u32,
    pub spare: u32,
}
impl Service {
    /// Does it have limits at all?
    #[inline(always)]
    pub fn is_limited(&self) -> bool {
        self.cookies | self.rate | self.source_rate != 0
    }
    /// Are SYNs answered with cookies, from some number on?
    #[inline(always)]
    pub fn asks(&self) -> bool {
        self.cookies != 0 && self.flags & service::ASKS != 0
    }
}

/// Words of [`map::RATES`].
pub const RATES_MAX: u32 = 1 << 16;

/// An IP address as in a packet, an IPv4 one in the first four bytes. In words, since of bytes a program makes a load each.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address(pub [u64; 2]);
impl Address {
    pub fn bytes(self) -> [u8; 16] {
        let [a, b] = self.0.map(u64::to_ne_bytes);
        core::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] })
    }
}
impl From<[u8; 16]> for Address {
    fn from(bytes: [u8; 16]) -> Address {
        let word = |at| u64::from_ne_bytes(core::array::from_fn(|i| bytes[at + i]));
        Address([word(0), word(8)])
    }
}

/// A local address of FULLNAT.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Local {
    pub address: Address,
}

/// Local addresses of all services.
pub const LOCALS_MAX: u32 = 16384;

/// The schedulers' machines, a word each.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceState {
    /// rr: place of the dest taken last, 1 = first of the list, 0 = before it.
    pub rr: u64,
    /// wrr: place as in rr (low half), current weight (high half).
    pub wrr: u64,
    /// Second (high half), and SYNs in it that were taken as they came; and connections begun in it (see `limits`).
    pub asked: u64,
    pub begun: u64,
}

/// One dest in a service's list, in the kernel's order (last added first).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListEntry {
    pub dest: u32,
    /// Effective weight, 0..2^31-1.
    pub weight: u32,
}
/// The entry before the first of a list, for wrr: greatest common divisor of the weights in `dest`, and in `weight` the largest
/// weight - (divisor - 1); 0: no weight at all.
pub type ListHead = ListEntry;

pub mod dest {
    /// Forwarding method, with the kernel's numbers.
    pub const METHOD: u32 = 7;
    pub const MASQ: u32 = 0;
    pub const LOCAL_NODE: u32 = 1;
    pub const TUNNEL: u32 = 2;
    pub const ROUTE: u32 = 3;
    pub const BYPASS: u32 = 4;
    pub const FULLNAT: u32 = 5;
    /// In its service's list (not in the trash).
    pub const AVAILABLE: u32 = 8;
    /// An address of this host.
    pub const LOCAL: u32 = 16;
    pub const V6: u32 = 32;
    /// With [`FULLNAT`]: what flows are lent is their client's own address and port. That is NAT, with sequence numbers of its own.
    pub const OWN: u32 = 64;
    /// With [`FULLNAT`]: its clients are told of by PROXY headers (`proxy`).
    pub const PROXY: u32 = 128;
}

/// A dest (real server of one service), what each packet reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dest {
    /// Bits [`dest`] (low half) and index in HOPS (high half; 0: not ready, ask the routing table). One store publishes both.
    pub out: u64,
    pub address: Address,
    /// 0: the connection's own port.
    pub port: u16,
    pub mtu: u16,
    /// Index of its service.
    pub service: u32,
}
impl Dest {
    /// Do its flows have one of our own addresses as their source? (FULLNAT; of no use to a real server that is this host.)
    #[inline(always)]
    pub fn lends(&self) -> bool {
        self.out as u32 & (dest::METHOD | dest::LOCAL) == dest::FULLNAT
    }
    /// ... or rather their client's?
    #[inline(always)]
    pub fn lends_own(&self) -> bool {
        self.out as u32 & dest::OWN != 0
    }
    /// Is it told of its clients by PROXY headers?
    #[inline(always)]
    pub fn proxied(&self) -> bool {
        self.out as u32 & dest::PROXY != 0
    }
}

/// How packets for a dest are wrapped (method TUNNEL).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// This host's address for the dest's, of its family; 0: not known yet.
    pub source: Address,
    /// Destination port of GUE (host order).
    pub port: u16,
    /// [`tunnel`].
    pub kind: u8,
    /// Bits [`tunnel`].
    pub flags: u8,
    pub spare: u32,
}

/// Kinds and flags of [`Tunnel`], with the kernel's numbers (`IP_VS_CONN_F_TUNNEL_TYPE_*`, `IP_VS_TUNNEL_ENCAP_FLAG_*`).
pub mod tunnel {
    pub const IPIP: u8 = 0;
    pub const GUE: u8 = 1;
    pub const GRE: u8 = 2;
    /// With a checksum of the outer transport header.
    pub const CSUM: u8 = 1;
    /// Remote checksum offload: the same for packets whose checksum is finished, which all are that come from a network.
    pub const REMCSUM: u8 = 2;
}

/// A dest, what only the control plane reads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DestInfo {
    pub generation: u32,
    /// Configured weight; the effective one is in the list.
    pub weight: u32,
    /// Last weight that was not 0 (mh).
    pub last_weight: u32,
    pub upper_threshold: u32,
    pub lower_threshold: u32,
    pub spare: u32,
    /// What `-Z` took from its counters (wrapping).
    pub offset: Stats,
}

/// Shared by all CPUs, moved atomically.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DestState {
    /// ActiveConn, as i64: may be below 0 for an instant.
    pub active: u64,
    /// InActConn, the same.
    pub inactive: u64,
    /// Bit 0: overloaded (thresholds).
    pub flags: u64,
    pub persistent: u64,
    /// Local addresses and ports lent so far (FULLNAT): where to look for the next.
    pub lent: u64,
    #[cfg(feature = "other-layout")]
    pub spare: [u64; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub connections: u64,
    pub packets_in: u64,
    pub packets_out: u64,
    /// Lengths of the IP packets.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

/// One CPU's counters of a dest: a cache line of their own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    pub stats: Stats,
    pub spare: [u64; 3],
}

/// A next hop: the first twelve bytes of a frame, and where it leaves.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// Destination and source MAC, as they lie in the frame.
    pub macs: [u32; 3],
    /// 0: no hop. With [`hop::VLAN`]: by that VLAN device, which XDP has to leave out.
    pub ifindex: u32,
}
/// Bits of [`Hop::ifindex`].
pub mod hop {
    /// The interface is a VLAN device. (The kernel counts interfaces from 1 up, and gives nobody so high a number.)
    pub const VLAN: u32 = 1 << 30;
}
pub const REPLY_HOPS_MAX: u32 = 256;
/// Words of a row of SIDE4 and of SIDE6.
pub const SIDE4_WORDS: usize = if cfg!(feature = "other-layout") { 8 } else { 4 };
pub const SIDE6_WORDS: usize = if cfg!(feature = "other-layout") { 16 } else { 8 };
/// Datagrams in fragments at a time: 320 KiB of notes.
pub const FRAGMENTS_MAX: u32 = 4096;
/// Words of a note: see [`crate::frag`].
pub mod fragment {
    pub const WORDS: usize = 10;
    pub const CONTROL: u32 = 0;
    /// Four words.
    pub const ADDRESSES: u32 = 1;
    pub const REST: u32 = 5;
    /// Addresses that later fragments get, two words each; 0: it stays, or the dest says.
    pub const SOURCE: u32 = 6;
    pub const DESTINATION: u32 = 8;
}
/// Bits of a value of WATCHED.
pub mod watched {
    /// What comes for the address may be ours: it is a virtual address, or one of FULLNAT's local ones.
    pub const DESTINATION: u64 = 1;
    /// What comes from it may be: it is a real server whose replies go by us.
    pub const SOURCE: u64 = 2;
    /// With a port and a protocol: there is a real server by NAT, whose dest the high half is.
    pub const SERVER: u64 = 4;
}
/// Addresses that can be watched.
pub const WATCHED_MAX: u32 = 1 << 17;

/// Whether the daemon takes what it is handed ([`Handed`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taker {
    /// Up to this second of [`Clock::now_s`]: nothing is handed to a daemon that is gone.
    pub until_s: u64,
}

/// A packet that is handed to the daemon, which sends it through the programs again when it is time: its bytes follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handed {
    /// Of which datagram, as in [`crate::frag::Key`].
    pub addresses: [u64; 4],
    pub rest: u64,
    /// Interface that it counts as come in by.
    pub ifindex: u32,
    /// How long its parts may be (the IP packets), of what is to be cut; else 0.
    pub room: u32,
    /// Length of the frame.
    pub len: u32,
    pub spare: u32,
}

/// Longest frame that is handed over: BPF_PROG_TEST_RUN, by which it comes back, takes no longer one (a page, without what Linux 6.1 puts beside it).
pub const HANDED_MAX: u32 = 3072;
/// Room for one (a power of two).
pub const HANDED_BYTES: usize = 4096;

/// Where a CPU puts such a packet together.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HandRoom {
    pub head: Handed,
    pub bytes: [u8; HANDED_BYTES],
}

/// Room for the programs' own structures.
pub const SCRATCH_WORDS: usize = 64;

/// Which packets are told of: those for which each of these holds (`crate::trace`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// A bit for each [`crate::verdict::Reason`], the low ones first.
    pub reasons: [u64; 2],
    /// Source or destination, of `family`, under the mask; a mask of 0: any.
    pub address: [u8; 16],
    pub mask: [u8; 16],
    /// Source or destination port; 0: any.
    pub port: u16,
    /// IP protocol number; 0: any.
    pub protocol: u8,
    /// 4 or 6; 0: any.
    pub family: u8,
    /// Up to this second of [`Clock::now_s`]: nobody is told when the daemon that listened is gone.
    pub until_s: u32,
}

/// A packet that is told of.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// Monotonic clock.
    pub ns: u64,
    /// Word of its verdict.
    pub verdict: u64,
    /// Interface it came in by.
    pub ifindex: u32,
    /// Length of the frame as it came ...
    pub len: u32,
    /// ... and how much of it follows.
    pub kept: u32,
    pub spare: u32,
}

/// Flows that are moved at a time (a power of two).
pub const MOVES_MAX: u32 = 256;

/// A flow that comes from other tables, in words that no layout has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Move {
    pub source: Address,
    pub destination: Address,
    /// The address that it was lent (FULLNAT), if [`moves::LENT`].
    pub lent: Address,
    /// Source port (high half) and destination port.
    pub ports: u32,
    pub dest: u32,
    /// When its last packet came, of [`Clock::now_s`].
    pub seen_s: u32,
    /// Bits [`moves`]; 0: no flow.
    pub flags: u32,
    /// `before:8 | proto:8 | state:8 | packets:8`, the lowest last; before: see [`moves::UPDATE`].
    pub kind: u32,
    /// `port:16 | 0:2 | lacks, sent, proxied, told | scale:4 | has:6`, and what else [`crate::conn::fullnat::Lent`] has.
    pub lent_kind: u32,
    pub delta: u32,
    pub first: u32,
    pub server: u32,
    pub cookie: u32,
    /// What came of it: [`moves`]; written by the program.
    pub outcome: u64,
}
/// Bits of [`Move::flags`], and outcomes.
pub mod moves {
    pub const USED: u32 = 1;
    /// It has an entry for its replies.
    pub const LINKED: u32 = 2;
    pub const LENT: u32 = 4;
    pub const SYNCED: u32 = 8;
    /// It is there already: what has changed since, it is to be told. The state that it had is in the high byte of `Move::kind`.
    pub const UPDATE: u32 = 16;
    /// Entered, or there already.
    pub const DONE: u64 = 1;
    /// There is no room for it.
    pub const FULL: u64 = 2;
    /// Its reply tuple is another flow's.
    pub const IN_USE: u64 = 3;
}

/// An entry of other tables, to be freed. What is said of them is all that programs need to know of their layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leave {
    /// The control word that it is to have still: 0 is no entry.
    pub expected: u64,
    /// Number of the word in its table ...
    pub word: u32,
    /// ... that of IPv4 (4), or IPv6.
    pub family: u32,
    /// The dest that it counts for there, and in which word of its state: 0 ActiveConn, 1 InActConn.
    pub dest: u32,
    pub counter: u32,
    /// 1: freed, and counted no more. Written by the program.
    pub freed: u64,
}

/// Bytes of a packet that are kept (a power of two): a whole frame of an Ethernet without jumbo frames.
pub const TRACE_BYTES: usize = 2048;

/// Where a CPU puts such a packet together.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TraceRoom {
    /// Those for which the ring had no room, since the programs were loaded first.
    pub lost: u64,
    pub head: Traced,
    pub bytes: [u8; TRACE_BYTES],
}

/// Sizes, and no padding: the sum of the fields.
const _: () = {
    assert!(size_of::<Config>() == 8 + 48 + (2 * 64 * 4 + 8) + 8 + 16 + 8 + 4 * SETTINGS_MAX);
    assert!(size_of::<Clock>() == 56 + 256);
    assert!(size_of::<Iface>() == 24);
    assert!(size_of::<Vlan>() == 16);
    assert!(size_of::<ServiceKey>() == 20);
    assert!(size_of::<Service>() == 32 + 20 + 4 + 16 + 8 + 40 + 8 + 16);
    assert!(size_of::<ServiceState>() == 32);
    assert!(size_of::<ListEntry>() == 8);
    assert!(size_of::<Dest>() == 32);
    assert!(size_of::<Tunnel>() == 24);
    assert!(size_of::<DestInfo>() == 24 + 40);
    assert!(size_of::<DestState>() == if cfg!(feature = "other-layout") { 64 } else { 40 });
    assert!(size_of::<Local>() == 16);
    assert!(size_of::<Stats>() == 40);
    assert!(size_of::<CpuStats>() == 64);
    assert!(size_of::<Hop>() == 16);
    assert!(size_of::<Move>() == 48 + 40 + 8);
    assert!(size_of::<Leave>() == 32);
    assert!(size_of::<Trace>() == 16 + 32 + 4 + 4);
    assert!(size_of::<Traced>() == 32);
    assert!(size_of::<Handed>() == 40 + 16);
    assert!(size_of::<HandRoom>() == 56 + HANDED_BYTES);
    assert!(size_of::<TraceRoom>() == 8 + 32 + TRACE_BYTES);
};
