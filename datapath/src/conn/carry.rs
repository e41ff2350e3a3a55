//! A flow in words that no layout has: read out of one table, entered in another. Who moves it is `rvs_sys::bpf::elder`; the entering is done by a
//! program, which never dies half way.
//!
//! Each of the two entries that a flow has for a moment is counted, so that whoever ends there leaves the counters right.

use super::{
    Addressing, Conns, DEST_MAX, DEST_SHIFT, LINKED, Opened, PACKETS_SHIFT, Place, REVERSE, SYNCED, class, dest,
    enter_forward, expired, fullnat, idle, link_as, link_up, slot_of, stamp_of, touch,
};
use crate::abi::{Address, Move, moves};
use crate::ct::{self, Buckets, Entry, Found, Key, Outcome};
use crate::packet::Ip;

/// What of a payload [`stamp_of`] says.
const STAMP: u64 = ct::STATE | super::AGE | super::EPOCH;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Carried<A> {
    pub source: A,
    pub destination: A,
    /// Source and destination, host order.
    pub ports: [u16; 2],
    /// As in [`ct::proto`].
    pub proto: u64,
    /// IPVS's number.
    pub state: u64,
    pub dest: u32,
    /// The last second in which its last packet may have come.
    pub seen_s: u32,
    /// As the payload has them: packets from the client - 1, at most 3.
    pub packets: u8,
    pub synced: bool,
    /// It has an entry for its replies.
    pub linked: bool,
    pub lent: Option<fullnat::Lent<A>>,
}

/// What the entry says, if it is a flow's forward one, and that has not timed out.
pub fn read<F: Addressing, C: Conns<F> + ?Sized>(c: &C, entry: &Entry<F::Words>) -> Option<Carried<F::Addr>> {
    let control = entry.control;
    if !ct::is_live(control) || control & REVERSE != 0 || expired(c.policy(), control, c.now_s()) {
        return None;
    }
    let key = entry.key::<F>(c.table().seed());
    let row = c.policy().row(control);
    let unit = (c.now_s() >> row.shift()).wrapping_sub(idle(row, control, c.now_s()));
    let last = (unit << row.shift()) | ((1 << row.shift()) - 1);
    let linked = control & LINKED != 0;
    let lends = linked && c.fullnat(dest(control));
    Some(Carried {
        source: F::source(&key.words),
        destination: F::destination(&key.words),
        ports: [key.sport(), key.dport()],
        proto: ct::proto(control),
        state: ct::state(control),
        dest: dest(control),
        seen_s: last.min(c.now_s()),
        packets: (control >> PACKETS_SHIFT) as u8 & 3,
        synced: control & SYNCED != 0,
        linked,
        lent: if lends { fullnat::side(c, entry.slot, &key).map(|side| side.lent()) } else { None },
    })
}

/// Enter a flow.
pub fn enter<F: Addressing, C: Conns<F> + ?Sized>(c: &C, flow: &Carried<F::Addr>) -> Opened {
    let key = key_of::<F>(flow);
    let done = forward(c, &key, flow);
    if !done.is_new() {
        let there = done.control();
        return match done.is_there() {
            true if there & REVERSE == 0 => Opened::Exists(dest(there)),
            true => Opened::ReverseInUse,
            false => Opened::Full,
        };
    }
    if let Some(lent) = &flow.lent {
        fullnat::restore(c, &key, done.slot(), lent);
    }
    if flow.linked { link_up(c, &key, done.slot(), class_at(c, done.slot())) } else { Opened::New }
}

#[inline(always)]
fn key_of<F: Addressing>(flow: &Carried<F::Addr>) -> Key<F::Words> {
    Key::new(F::words(flow.source, flow.destination), flow.ports[0], flow.ports[1], flow.proto)
}

/// The first step of [`enter`]: the forward entry.
#[inline(always)]
fn forward<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, flow: &Carried<F::Addr>) -> Outcome {
    let stamp = stamp_of(c.policy(), flow.seen_s, (flow.proto << 4 | flow.state) as usize & 63);
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    // (Masked, or the verifier of Linux 6.1 would have an OR of two unknown numbers where the protocol is.)
    let rest = u64::from(flow.dest & DEST_MAX) << DEST_SHIFT
        | u64::from(stamp) & STAMP
        | u64::from(flow.packets & 3) << PACKETS_SHIFT
        | flag(flow.synced, SYNCED)
        | flag(flow.linked, LINKED);
    enter_forward(c, key, rest)
}

/// The class of the forward entry there.
#[inline(always)]
fn class_at<F: Addressing, C: Conns<F> + ?Sized>(c: &C, place: Place) -> u32 {
    let forward = ct::peek::<F, _>(c.table(), slot_of(place)).control;
    class(c.policy(), forward, c.now_s())
}

// The steps of [`enter`] for BPF programs, which take them one by one, from what is in a `Move`.

#[inline(always)]
pub fn key_of_move<I: Ip>(m: &Move) -> Key<I::Words> {
    let words = I::words(I::from_address(&m.source), I::from_address(&m.destination));
    Key::of(words, m.ports, u64::from(m.kind >> 16 & 3))
}

#[inline(always)]
pub fn forward_of_move<I: Ip, C: Conns<I> + ?Sized>(c: &C, m: &Move) -> Outcome {
    let flow = Carried {
        source: I::from_address(&m.source),
        destination: I::from_address(&m.destination),
        ports: [(m.ports >> 16) as u16, m.ports as u16],
        proto: u64::from(m.kind >> 16 & 3),
        state: u64::from(m.kind >> 8) & 0xf,
        dest: m.dest,
        seen_s: m.seen_s,
        packets: m.kind as u8 & 3,
        synced: m.flags & moves::SYNCED != 0,
        linked: m.flags & moves::LINKED != 0,
        lent: None,
    };
    forward(c, &key_of_move::<I>(m), &flow)
}

#[inline(always)]
pub fn restore_move<I: Ip, C: Conns<I> + ?Sized>(c: &C, m: &Move, place: Place) {
    if m.flags & moves::LENT == 0 {
        return;
    }
    let k = m.lent_kind;
    let lent = fullnat::Lent {
        address: I::from_address(&m.lent),
        port: (k >> 16) as u16,
        lacks: k & 1 << 13 != 0,
        sent: k & 1 << 12 != 0,
        proxied: k & 1 << 11 != 0,
        told: k & 1 << 10 != 0,
        scale: (k >> 6 & 0xf) as u8,
        has: k as u8 & 0x3f,
        delta: m.delta,
        first: m.first,
        server: m.server,
        cookie: m.cookie,
    };
    fullnat::restore(c, &key_of_move::<I>(m), place, &lent);
}

#[inline(always)]
pub fn link_of_move<I: Ip, C: Conns<I> + ?Sized>(c: &C, m: &Move, place: Place) -> Outcome {
    link_as(c, &key_of_move::<I>(m), place, class_at(c, place))
}

/// A flow that is in this table too had another packet where it came from: its next state is that of this one, unless it has gone on from there itself.
#[inline(always)]
pub fn update<I: Ip, C: Conns<I> + ?Sized>(c: &C, m: &Move) {
    let (key, before, state) = (key_of_move::<I>(m), u64::from(m.kind >> 24), u64::from(m.kind >> 8) & 0xf);
    let Found::Live(hit) = ct::lookup::<I, _>(c.table(), &key) else { return };
    if hit.control & REVERSE != 0 {
        return;
    }
    restore_move(c, m, hit.slot::<I>());
    let next = |now| if now == before { state } else { now };
    let _ = touch::<I, _, _>(c, &hit, &key.words, false, next);
}

impl Move {
    /// See [`moves::UPDATE`].
    #[must_use]
    pub fn since(self, before: u64) -> Move {
        Move { flags: self.flags | moves::UPDATE, kind: self.kind | (before as u32) << 24, ..self }
    }
    /// What the program that enters it is to be told.
    pub fn new<I: Ip>(flow: &Carried<I::Addr>) -> Move {
        let address = |a: I::Addr| Address::from(I::bytes(a));
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let lent = flow.lent.unwrap_or_default();
        Move {
            source: address(flow.source),
            destination: address(flow.destination),
            lent: address(lent.address),
            ports: u32::from(flow.ports[0]) << 16 | u32::from(flow.ports[1]),
            dest: flow.dest,
            seen_s: flow.seen_s,
            flags: moves::USED
                | flag(flow.linked, moves::LINKED)
                | flag(flow.lent.is_some(), moves::LENT)
                | flag(flow.synced, moves::SYNCED),
            kind: (flow.proto as u32) << 16 | (flow.state as u32) << 8 | u32::from(flow.packets),
            lent_kind: u32::from(lent.port) << 16
                | flag(lent.lacks, 1 << 13)
                | flag(lent.sent, 1 << 12)
                | flag(lent.proxied, 1 << 11)
                | flag(lent.told, 1 << 10)
                | u32::from(lent.scale & 0xf) << 6
                | u32::from(lent.has & 0x3f),
            delta: lent.delta,
            first: lent.first,
            server: lent.server,
            cookie: lent.cookie,
            outcome: 0,
        }
    }
}
