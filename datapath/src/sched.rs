//! Schedulers: which dest takes a new connection. Rules and tie-breaking are the kernel's (`ip_vs_rr.c`, `ip_vs_wrr.c`, `ip_vs_wlc.c`,
//! `ip_vs_mh.c`); the lists are in the kernel's order, last added first.

pub mod mh;
mod rr;
mod wlc;
mod wrr;

use crate::abi::{ListEntry, Service};
use crate::packet::{Flow, Ip};
use crate::tables::Tables;

/// Numbers as in `abi::Service::scheduler`.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
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
        s if s == Kind::Wlc as u32 => wlc::pick(t, list),
        s if s == Kind::Mh as u32 => mh::pick(t, service, flow),
        _ => None,
    }
}
