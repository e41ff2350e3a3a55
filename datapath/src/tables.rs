//! What the pipeline reads and writes beside the packet: the maps of `abi`, as a trait. BPF maps in the kernel, plain memory in tests.

use crate::abi::{Config, Dest, Hop, Iface, ListEntry, Local, Service, ServiceKey, Tunnel, Vlan};
use crate::conn::Conns;
use crate::ct::{V4, V6};
use crate::frag;
use crate::packet::{Flow, Ip};

/// A word in `abi::ServiceState`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    Rr,
    Wrr,
    Asked,
    Begun,
}

/// What the kernel's routing knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// The next hop is known.
    Hop,
    /// A route, but no MAC address yet.
    NoNeighbour,
    /// The kernel must forward it itself (another kind of route, fragmentation, ...).
    Kernel,
    None,
}

pub trait Tables {
    type C4: Conns<V4>;
    type C6: Conns<V6>;
    fn conns4(&self) -> &Self::C4;
    fn conns6(&self) -> &Self::C6;
    fn config(&self) -> &Config;
    /// What lies in the place of this interface: its own, if the number says so.
    fn iface(&self, ifindex: u32) -> Iface;
    /// What lies at this place.
    fn vlan(&self, place: u32) -> Vlan;
    fn service_index(&self, key: &ServiceKey) -> Option<u32>;
    fn service(&self, index: u32) -> Option<&Service>;
    fn dest(&self, index: u32) -> Option<&Dest>;
    fn tunnel(&self, dest: u32) -> Option<&Tunnel>;
    fn list(&self, at: u32) -> Option<ListEntry>;
    /// Place of a hash scheduler's table; 0 (no dest) is `None`.
    fn table(&self, at: u32) -> Option<u32>;
    fn hop(&self, index: u32) -> Option<&Hop>;
    fn reply_hop(&self, index: u8) -> Option<&Hop>;
    /// A number for a next hop of replies; 0 if there is no place for it.
    fn keep_reply_hop(&self, hop: &Hop) -> u8;

    /// [`frag::leave`] and [`frag::find`]; functions of their own where there is a limit to how large they may be.
    #[inline(always)]
    fn leave_note(&self, key: &frag::Key, note: &frag::Note) -> bool
    where
        Self: Sized,
    {
        frag::leave(self, key, note, self.conns4().now_s())
    }
    #[inline(always)]
    fn find_note(&self, key: &frag::Key) -> frag::Found
    where
        Self: Sized,
    {
        frag::find(self, key, self.conns4().now_s())
    }
    /// A word of the notes about fragments.
    fn fragment(&self, place: u32, word: u32) -> u64;
    fn set_fragment(&self, place: u32, word: u32, value: u64);
    /// Compare-and-swap of the control word.
    fn swap_fragment(&self, place: u32, old: u64, new: u64) -> bool;

    /// Bits [`crate::abi::watched`] of an address: may fragments to it, or from it, be ours?
    fn watched<I: Ip>(&self, address: I::Addr) -> u64;
    /// The dest of a real server by NAT that is there.
    fn server<I: Ip>(&self, address: I::Addr, port: u16, protocol: u8) -> Option<u32>;
    /// Is there a daemon that takes what it is handed?
    fn takes(&self) -> bool;
    /// Hand the packet over, as it is: a fragment of this datagram that came too early, or (`None`) one to be cut into parts of up to `room` bytes.
    /// False: there is no room for it, or it is too long.
    fn hand(&self, early: Option<&frag::Key>, room: u32) -> bool;

    /// A client's word (see `limits`).
    fn rate(&self, place: u32) -> u64;
    /// Compare-and-swap.
    fn swap_rate(&self, place: u32, old: u64, new: u64) -> bool;

    fn machine(&self, service: u32, which: Machine) -> u64;
    /// Compare-and-swap; false: somebody else was faster.
    fn advance(&self, service: u32, which: Machine, old: u64, new: u64) -> bool;
    /// ActiveConn and InActConn; one that is below 0 for an instant is 0.
    fn connections(&self, dest: u32) -> [u64; 2];
    /// Any number (twos).
    fn random(&self) -> u32;
    fn overloaded(&self, dest: u32) -> bool;
    /// In its service's list, with a weight, and not overloaded (for hash schedulers, whose tables know no weights).
    fn available(&self, dest: u32) -> bool;

    /// Keep what was parsed of a packet for its further stages. Callers that have no place for it parse it again.
    #[inline(always)]
    fn keep<I: Ip>(&self, _flow: &Flow<I>) {}
    #[inline(always)]
    fn kept<I: Ip>(&self) -> Option<Flow<I>> {
        None
    }

    /// ... but that its packet does not say.
    #[inline(always)]
    fn kept_cookie(&self) -> u32 {
        0
    }

    /// A local address (FULLNAT).
    fn local(&self, at: u32) -> Option<&Local>;
    /// Number of this lending for a dest, from 0.
    fn lending(&self, dest: u32) -> u64;
    /// [`crate::abi::Clock::sequence`]
    fn sequence_clock(&self) -> u32;

    fn count_connection(&self, dest: u32);
    fn count_in(&self, dest: u32, bytes: u32);
    /// ... and take that back.
    fn uncount_in(&self, dest: u32, bytes: u32);
    fn count_out(&self, dest: u32, bytes: u32);
    /// Number of this packet that may begin a connection, from 0 (`drop_packet`).
    fn begun(&self) -> u64;
    /// May another ICMP error be sent this second?
    fn may_send_icmp(&self) -> bool;
    /// Ask the kernel for the way from `ends[0]` to `ends[1]`; `hop` is filled if it is known.
    fn route<I: Ip>(&self, ends: [I::Addr; 2], protocol: u8, len: u32, hop: &mut Hop) -> Route;
    /// Is the packet's length that of what is sent, and not that of segments to be cut?
    #[inline(always)]
    fn sized(&self) -> bool {
        true
    }
    /// Can the kernel be given a packet to send when it has resolved the next hop that `route` found without a MAC address?
    #[inline(always)]
    fn resolves(&self) -> bool {
        false
    }

    /// `n`, so that BPF's verifier no longer knows its value, and a loop in which it counts from there on is gone through once, not
    /// once for each value. `noise` is any number that it does not know.
    #[inline(always)]
    fn blur(&self, n: u32, _noise: u32) -> u32 {
        n
    }
    /// The same for a whole word.
    #[inline(always)]
    fn blur_word(&self, n: u64, noise: u32) -> u64 {
        u64::from(self.blur((n >> 32) as u32, noise)) << 32 | u64::from(self.blur(n as u32, noise))
    }

    /// Step with 0, 1, ... until it says true or `count` is reached.
    fn walk<W: Walker<Self>>(&self, count: u32, walker: &mut W)
    where
        Self: Sized;
}

/// A loop of many rounds: BPF runs it outside the program, by a helper.
///
/// Before Linux 6.8 the verifier goes through such a round once, with the values before the first one, and a branch that those never take is
/// gone from the program. So what a round both reads and changes has to begin with a value that the verifier does not know
/// ([`Tables::blur`]).
pub trait Walker<T> {
    /// True: done.
    fn step(&mut self, t: &T, i: u32) -> bool;
}

/// The connections of a packet's family.
pub trait Of<T: Tables>: Ip + Sized {
    type Conns: Conns<Self>;
    fn conns(t: &T) -> &Self::Conns;
}
impl<T: Tables> Of<T> for V4 {
    type Conns = T::C4;
    #[inline(always)]
    fn conns(t: &T) -> &T::C4 {
        t.conns4()
    }
}
impl<T: Tables> Of<T> for V6 {
    type Conns = T::C6;
    #[inline(always)]
    fn conns(t: &T) -> &T::C6 {
        t.conns6()
    }
}
