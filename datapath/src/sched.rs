//! Schedulers: which dest takes a new connection. Rules and tie-breaking are the kernel's (`net/netfilter/ipvs/ip_vs_rr.c` and so on); the lists are in
//! the kernel's order, last added first.

pub mod dh;
mod least;
pub mod mh;
mod most;
mod rr;
pub mod sh;
mod twos;
mod wrr;

use crate::abi::{ListEntry, Service};
use crate::packet::{Flow, Ip};
use crate::tables::Tables;
use least::Rule;

/// The kernel's schedulers (`net/netfilter/ipvs/ip_vs_{rr,wrr,...}.c`), with their numbers in `abi::Service::scheduler`.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    Rr = 1,
    Wrr = 2,
    Lc = 3,
    Wlc = 4,
    Lblc = 5,
    Lblcr = 6,
    Dh = 7,
    Sh = 8,
    Sed = 9,
    Nq = 10,
    Fo = 11,
    Ovf = 12,
    Mh = 13,
    Twos = 14,
}

impl Kind {
    /// By number, from 1.
    pub const ALL: [Kind; 14] = [
        Kind::Rr,
        Kind::Wrr,
        Kind::Lc,
        Kind::Wlc,
        Kind::Lblc,
        Kind::Lblcr,
        Kind::Dh,
        Kind::Sh,
        Kind::Sed,
        Kind::Nq,
        Kind::Fo,
        Kind::Ovf,
        Kind::Mh,
        Kind::Twos,
    ];
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Rr => "rr",
            Kind::Wrr => "wrr",
            Kind::Lc => "lc",
            Kind::Wlc => "wlc",
            Kind::Lblc => "lblc",
            Kind::Lblcr => "lblcr",
            Kind::Dh => "dh",
            Kind::Sh => "sh",
            Kind::Sed => "sed",
            Kind::Nq => "nq",
            Kind::Fo => "fo",
            Kind::Ovf => "ovf",
            Kind::Mh => "mh",
            Kind::Twos => "twos",
        }
    }
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Most dests that a service can have.
pub const DESTS_MAX: u32 = 4096;

/// A service's list as published.
#[derive(Clone, Copy)]
pub struct List {
    pub first: u32,
    pub count: u32,
}

impl List {
    #[inline(always)]
    pub fn of(service: &Service) -> List {
        List { first: service.list as u32, count: ((service.list >> 32) as u32).min(DESTS_MAX) }
    }
    /// Place 1 is the first dest, place 0 the head.
    #[inline(always)]
    pub fn at<T: Tables>(self, t: &T, place: u32) -> Option<ListEntry> {
        t.list(self.first.wrapping_add(place))
    }
}

/// Has this dest room, by weight and thresholds?
#[inline(always)]
pub fn eligible<T: Tables>(t: &T, e: &ListEntry) -> bool {
    e.weight > 0 && !t.overloaded(e.dest)
}

/// Counts tries to take a turn. By shifts: of a count in steps LLVM moves the step to the loop's end, and that before its beginning, so
/// that the loop goes on without a jump, which the verifier of Linux 6.1 refuses.
struct Tries(u8);

impl Default for Tries {
    #[inline(always)]
    fn default() -> Self {
        Tries(0b1111)
    }
}

impl Tries {
    /// Is the one that begins now the last?
    #[inline(always)]
    fn next(&mut self) -> bool {
        self.0 >>= 1;
        self.0 == 0
    }
}

/// The dest for a new connection; `None`: no dest is available.
#[inline(always)]
pub fn pick<I: Ip, T: Tables>(t: &T, index: u32, service: &Service, flow: &Flow<I>) -> Option<u32> {
    let list = List::of(service);
    match service.scheduler {
        s if s == Kind::Rr as u32 => rr::pick(t, index, list),
        s if s == Kind::Wrr as u32 => wrr::pick(t, index, list),
        s if s == Kind::Lc as u32 => least::pick::<{ Rule::Lc as u8 }, T>(t, list),
        s if s == Kind::Wlc as u32 => least::pick::<{ Rule::Wlc as u8 }, T>(t, list),
        s if s == Kind::Sed as u32 => least::pick::<{ Rule::Sed as u8 }, T>(t, list),
        s if s == Kind::Nq as u32 => least::pick::<{ Rule::Nq as u8 }, T>(t, list),
        s if s == Kind::Fo as u32 => most::pick::<false, T>(t, list),
        s if s == Kind::Ovf as u32 => most::pick::<true, T>(t, list),
        s if s == Kind::Twos as u32 => twos::pick(t, list),
        s if s == Kind::Dh as u32 => dh::pick(t, service, flow),
        s if s == Kind::Sh as u32 => sh::pick(t, service, flow),
        s if s == Kind::Mh as u32 => mh::pick(t, service, flow),
        _ => None,
    }
}

/// `ip_vs_dest_conn_overhead`, as all kernels but the newest have it: an active connection weighs as much as 256 others.
#[inline(always)]
fn overhead<T: Tables>(t: &T, dest: u32) -> u64 {
    let [active, inactive] = t.connections(dest);
    (active << 8).wrapping_add(inactive)
}

/// XOR of the words of an address, then to host order (`ip_vs_mh_hashkey`, `ip_vs_sh_hashkey`, `ip_vs_dh_hashkey`).
#[inline(always)]
fn folded(address: &[u8; 16]) -> u32 {
    let word = |i: usize| u32::from_be_bytes([address[i], address[i + 1], address[i + 2], address[i + 3]]);
    word(0) ^ word(4) ^ word(8) ^ word(12)
}

/// `hash_32` of include/linux/hash.h.
#[inline(always)]
fn hash_32(v: u32, bits: u32) -> u32 {
    v.wrapping_mul(0x61c8_8647) >> (32 - bits)
}

/// A dest as the tables of hash schedulers are built of.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub dest: u32,
    pub address: [u8; 16],
    pub port: u16,
    /// Effective weight (sh).
    pub weight: u32,
    /// Last weight that was not 0 (mh): weight 0 keeps its places, so that nobody else's clients move.
    pub last_weight: u32,
}
