//! What the entries of the connection table mean: states, ages, classes, counters, and the two entries of a NAT flow.
//!
//! # The payload of a control word (`ct` has the rest)
//! ```text
//! forward  dest:20 | SYNCED:1 | packets:2 | epoch:1 | age:11            | state:4
//! reverse  link:24                 | class:3 | hop:8                    | generation:4
//! ```
//! | field | meaning |
//! |---|---|
//! | dest | index of the dest; an index is used again only when a full sweep found no entry that names it, so it needs no generation |
//! | SYNCED | came from the other director |
//! | packets | packets from the client so far - 1, at most 3 (or [`PROVEN`]): who has sent fewer than four is the first to go of the established |
//! | age | when the last packet came, in units of 2^shift s, modulo 2048; the shift depends on the state's timeout (`Row`) |
//! | epoch | which of the two tables of rows the age was written by |
//! | state | IPVS's own numbers: 11 of TCP, 1 of UDP, 14 of SCTP |
//! | link | slot of the forward entry |
//! | class | a hint: class of the forward entry when a reply last went by |
//! | generation | one more than that of a stale entry that it replaced (modulo 14), so that whoever still means to free that one does not free this one |
//! | hop | next hop of the replies, an index that the data plane fills; 0: ask the routing table |
//!
//! No-client-port entries (FTP, persistence) have source port 0 in their key, which no packet has. One-packet flows are never entered.
//!
//! # One state a flow
//! A NAT flow has two entries. The forward one (LINKED) owns state and age and stays where it is; the reverse one names its
//! slot. `VIP:vport` of a reply are the forward entry's own destination. Whoever frees one of them frees the other. ([`fullnat`] has what
//! more there is to a flow by that method.)
//!
//! # Counters are exact
//! Whoever wins the compare-and-swap that frees, evicts or changes an entry moves its dest's ActiveConn and InActConn. A new entry is counted before it can be seen, so no counter is ever taken below zero.

use crate::ct::{self, Buckets, Cost, Entry, Family, Found, Hit, Key, LINKED, Look, Outcome, REVERSE, Rank, Slot};

mod addressing;
pub mod carry;
pub mod fullnat;
mod orphans;
pub mod thin;

pub use addressing::Addressing;
pub use orphans::{free_orphans, orphan, orphans_due};

pub const DEST_SHIFT: u32 = if cfg!(feature = "other-layout") { 18 } else { 19 };
/// Largest dest index; 0 is not one.
pub const DEST_MAX: u32 = (1 << 20) - 1;
pub const SYNCED: u64 = if cfg!(feature = "other-layout") { 1 << 38 } else { 1 << 18 };
const PACKETS_SHIFT: u32 = 16;
const PACKETS: u64 = 3 << PACKETS_SHIFT;
/// A new flow whose client has proved its address (`cookie`): once established it is worth as much as one of many packets.
pub const PROVEN: u64 = PACKETS;
const EPOCH_SHIFT: u32 = 15;
const EPOCH: u64 = 1 << EPOCH_SHIFT;
const AGE_SHIFT: u32 = 4;
const AGE_MASK: u64 = 0x7ff;
const AGE: u64 = AGE_MASK << AGE_SHIFT;

const LINK_SHIFT: u32 = 15;
const LINK: u64 = (SLOTS_MAX as u64 - 1) << LINK_SHIFT;
/// States from 14 on are not live.
const GENERATION_MAX: u64 = 13;
const CLASS_SHIFT: u32 = 12;
const CLASS: u64 = 7 << CLASS_SHIFT;
const HOP_SHIFT: u32 = 4;
const HOP: u64 = 0xff << HOP_SHIFT;

/// Slots that a link can name.
pub const SLOTS_MAX: u32 = 1 << 24;

pub const TCP: u64 = 1;
pub const UDP: u64 = 2;
pub const SCTP: u64 = 3;

#[inline(always)]
pub fn dest(control: u64) -> u32 {
    (control >> DEST_SHIFT) as u32 & DEST_MAX
}
#[inline(always)]
pub fn link_of(reverse: u64) -> Slot {
    (reverse >> LINK_SHIFT) as u32 & (SLOTS_MAX - 1)
}
#[inline(always)]
pub fn hop(reverse: u64) -> u8 {
    (reverse >> HOP_SHIFT) as u8
}
/// When the table is full, a lower class goes first; within a class the longest idle.
pub mod class {
    /// Timed out already.
    pub const EXPIRED: u32 = 0;
    pub const HALF_OPEN: u32 = 1;
    /// Established by fewer than four packets of the client.
    pub const FEW_PACKETS: u32 = 2;
    pub const UDP: u32 = 3;
    pub const CLOSING: u32 = 4;
    /// Established, no packet for [`super::IDLE_S`].
    pub const IDLE: u32 = 5;
    /// Never evicted.
    pub const ESTABLISHED: u32 = 6;
    /// Being entered.
    pub const NOT_LIVE: u32 = 7;
}
/// Established flows idle for less than this are never evicted.
pub const IDLE_S: u32 = 120;

/// What the data plane must know of one state of one protocol, in one word: `limit:16 | class:8 | shift:7 | active:1`.
/// Active: counts as ActiveConn. Shift and limit: the timeout is `limit << shift` seconds.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row(pub u32);

/// Largest timeout in units: the age wraps at 2048, and a full sweep must come by between the two.
const LIMIT_MAX: u32 = 1800;

impl Row {
    pub const fn new(timeout_s: u32, class: u32, active: bool) -> Row {
        let mut shift = 0;
        while timeout_s.div_ceil(1 << shift) > LIMIT_MAX {
            shift += 1;
        }
        Row::scaled(timeout_s, shift, class, active)
    }
    /// With a given unit, the timeout cut to what it allows.
    const fn scaled(timeout_s: u32, shift: u32, class: u32, active: bool) -> Row {
        let limit = timeout_s.div_ceil(1 << shift);
        let limit = if limit > LIMIT_MAX { LIMIT_MAX } else { limit };
        Row(limit << 16 | class << 8 | shift << 1 | active as u32)
    }
    #[inline(always)]
    pub fn limit(self) -> u32 {
        self.0 >> 16
    }
    #[inline(always)]
    pub fn class(self) -> u32 {
        self.0 >> 8 & 0xff
    }
    #[inline(always)]
    pub fn shift(self) -> u32 {
        self.0 >> 1 & 31
    }
    #[inline(always)]
    pub fn active(self) -> bool {
        self.0 & 1 != 0
    }
}

/// Timeouts in seconds, as `ipvsadm --set` and the kernel's tables give them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub tcp: u32,
    pub tcp_fin: u32,
    pub udp: u32,
}
impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { tcp: 900, tcp_fin: 120, udp: 300 }
    }
}

/// Rows of all states, `rows[epoch][proto << 4 | state]`. An entry's age is in the unit of the epoch that it carries. A change of a unit
/// is made in the other epoch's rows, then `epoch` is turned; the sweep brings the entries over.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub rows: [[Row; 64]; 2],
    /// 0 or 1: the rows that new ages are written by.
    pub epoch: u32,
    pub pad: u32,
}

impl Policy {
    pub fn new(t: &Timeouts) -> Policy {
        let rows = Self::rows(t);
        Policy { rows: [rows; 2], epoch: 0, pad: 0 }
    }
    /// The policy after a change of timeouts. The turn of the epoch is needed only if a unit changes, and must wait until a full
    /// sweep has passed since the last turn.
    #[must_use]
    pub fn changed(&self, t: &Timeouts) -> Policy {
        let (now, new) = (self.epoch as usize & 1, Self::rows(t));
        let mut next = *self;
        let mut turn = false;
        for (i, row) in new.iter().enumerate() {
            turn |= row.shift() != self.rows[now][i].shift();
        }
        let (current, old) = if turn { (1 - now, now) } else { (now, 1 - now) };
        next.epoch = current as u32;
        next.rows[current] = new;
        // For entries that the sweep has not brought over yet: the new timeout in their own unit.
        for (i, row) in new.iter().enumerate() {
            let seconds = row.limit() << row.shift();
            next.rows[old][i] = Row::scaled(seconds, self.rows[old][i].shift(), row.class(), row.active());
        }
        next
    }
    fn rows(t: &Timeouts) -> [Row; 64] {
        let mut rows = [Row::new(2, class::HALF_OPEN, false); 64];
        for (proto, states) in [
            (TCP, crate::proto::tcp::rows(t).as_slice()),
            (UDP, &[Row::new(t.udp, class::UDP, false)]),
            (SCTP, &crate::proto::sctp::rows()),
        ] {
            for (state, row) in states.iter().enumerate() {
                rows[(proto << 4) as usize | state] = *row;
            }
        }
        rows
    }
    /// The row of an entry, by its own epoch.
    #[inline(always)]
    pub fn row(&self, control: u64) -> Row {
        self.at((control >> EPOCH_SHIFT) as usize, ct::proto(control), ct::state(control))
    }
    /// The row that `state` of the same protocol gets now.
    #[inline(always)]
    pub fn current(&self, control: u64, state: u64) -> Row {
        self.at(self.epoch as usize, ct::proto(control), state)
    }
    /// By steps: of two unknown numbers put together with OR, the verifier of Linux 6.1 knows nothing.
    #[inline(always)]
    fn at(&self, epoch: usize, proto: u64, state: u64) -> Row {
        let (protos, _) = self.rows[epoch & 1].as_chunks::<16>();
        protos[proto as usize & 3][state as usize & 15]
    }
}

/// Units since the last packet. Another CPU may have seen the clock tick before us: an age up to 7 ahead counts as 0, else a tick
/// in the middle of a sweep would make the busiest flows look the oldest.
#[inline(always)]
fn idle(row: Row, control: u64, now_s: u32) -> u32 {
    let units = (now_s >> row.shift()) as u64;
    (units.wrapping_sub(control >> AGE_SHIFT).wrapping_add(7) & AGE_MASK).saturating_sub(7) as u32
}

/// The least number of seconds since the last packet that this many units can mean (ages are in whole units: a packet of a
/// second ago may lie in the unit before).
#[inline(always)]
fn idle_s(row: Row, idle: u32) -> u32 {
    if idle == 0 { 0 } else { ((idle - 1) << row.shift()) + 1 }
}

/// Seconds until a forward entry times out.
pub fn seconds_left(policy: &Policy, control: u64, now_s: u32) -> u32 {
    let row = policy.row(control);
    row.limit().saturating_sub(idle(row, control, now_s)) << row.shift()
}

#[inline(always)]
pub fn expired(policy: &Policy, control: u64, now_s: u32) -> bool {
    let row = policy.row(control);
    // The age is in whole units: rather late than early.
    idle(row, control, now_s) > row.limit()
}

#[inline(always)]
pub fn class(policy: &Policy, control: u64, now_s: u32) -> u32 {
    let row = policy.row(control);
    let idle = idle(row, control, now_s);
    let mut class = row.class();
    if class == class::ESTABLISHED {
        if control & PACKETS != PACKETS {
            class = class::FEW_PACKETS;
        } else if idle_s(row, idle) >= IDLE_S {
            class = class::IDLE;
        }
    }
    if idle > row.limit() { class::EXPIRED } else { class }
}

/// See [`Rank`]: never 0 for a used way. The same as [`class`] without a branch, since a verifier would walk every combination of
/// all ways' branches; `sign` as in [`Buckets::sign`].
#[inline(always)]
pub fn rank(policy: &Policy, control: u64, now_s: u32, sign: impl Fn(u64) -> u64) -> Rank {
    // All ones if a < b.
    let below = |a: u64, b: u64| sign(a.wrapping_sub(b));
    let choose = |yes: u64, a: u64, b: u64| b ^ (a ^ b) & yes;
    let row = policy.row(control);
    let units = (now_s >> row.shift()) as u64;
    let ahead = units.wrapping_sub(control >> AGE_SHIFT).wrapping_add(7) & AGE_MASK;
    let idle = ahead.wrapping_sub(7) & !below(ahead, 7);
    let expired = below(row.limit() as u64, idle);

    let base = row.class() as u64;
    let established = below(base ^ class::ESTABLISHED as u64, 1);
    let few = below(control >> PACKETS_SHIFT & 3, 3);
    let in_use = below((idle.wrapping_sub(1) << row.shift()).wrapping_add(1), IDLE_S as u64);
    let if_established =
        choose(few, class::FEW_PACKETS as u64, choose(in_use, class::ESTABLISHED as u64, class::IDLE as u64));
    let forward = choose(established, if_established, base) & !expired;

    let reverse = sign(control << (63 - REVERSE.trailing_zeros()));
    let live = below(control & ct::STATE, ct::NOT_LIVE);
    let class = choose(live, choose(reverse, (control & CLASS) >> CLASS_SHIFT, forward), class::NOT_LIVE as u64);
    let youth = choose(reverse, 1, AGE_MASK + 1 - idle);
    class << ct::RANK_CLASS | youth << 3
}

/// What the meaning of an entry needs beside its words.
pub trait Conns<F: Addressing> {
    type Table: Buckets<F>;
    fn table(&self) -> &Self::Table;
    fn policy(&self) -> &Policy;
    fn now_s(&self) -> u32;
    /// See [`Stamps`].
    #[inline(always)]
    fn stamp(&self, proto: u64, state: u64) -> u64 {
        u64::from(stamp_of(self.policy(), self.now_s(), (proto << 4 | state) as usize))
    }
    /// Move a dest's ActiveConn and InActConn.
    fn account(&self, dest: u32, active: i64, inactive: i64);
    /// Address and port (host order; 0: the flow's own) of a dest.
    fn dest_address(&self, dest: u32) -> Option<(F::Addr, u16)>;
    /// Do flows to this dest have a local address of the director as their source?
    #[inline(always)]
    fn fullnat(&self, _dest: u32) -> bool {
        false
    }
    /// What is kept of such a flow beside its forward entry, in that slot ([`fullnat`]); `None`: there is no place for it.
    #[inline(always)]
    fn side(&self, _slot: Slot) -> Option<<Self::Table as Buckets<F>>::B<'_>> {
        None
    }

    // Methods, so that a BPF program can make functions of their own of them.
    /// Insert, and release whom it cost. `FULL` if it cost what is in slot `own`, the forward entry of a reverse one.
    #[inline(always)]
    fn enter(&self, key: &Key<F::Words>, rest: u64, own: Slot) -> Outcome {
        let mut cost = Cost::default();
        let outcome = ct::insert::<F, _>(self.table(), key, rest, &mut cost);
        if cost.lost.control != 0 {
            self.release(&cost.lost);
        }
        if cost.evicted.control != 0 {
            self.release(&cost.evicted);
        }
        cost.settle(outcome, own)
    }
    #[inline(always)]
    fn release(&self, entry: &Entry<F::Words>) {
        release(self, entry);
    }
}

#[inline(always)]
fn count<F: Addressing, C: Conns<F> + ?Sized>(c: &C, control: u64, sign: i64) {
    let active = c.policy().row(control).active();
    c.account(dest(control), if active { sign } else { 0 }, if active { 0 } else { sign });
}

/// Account for an entry that was freed, and free the other one of a NAT flow.
#[inline(always)]
pub fn release<F: Addressing, C: Conns<F> + ?Sized>(c: &C, entry: &Entry<F::Words>) {
    if entry.control & REVERSE == 0 { forward_gone(c, entry) } else { reverse_gone(c, entry) }
}

/// [`release`], of a forward entry.
#[inline(always)]
pub fn forward_gone<F: Addressing, C: Conns<F> + ?Sized>(c: &C, entry: &Entry<F::Words>) {
    count(c, entry.control, -1);
    if entry.control & LINKED != 0
        && let Some(key) = reverse_key(c, &entry.key::<F>(c.table().seed()), entry.control, entry.slot)
        && let Found::Live(hit) = ct::lookup::<F, _>(c.table(), &key)
        && hit.control & REVERSE != 0
        && link_of(hit.control) == entry.slot
        // The flow may be back by now, in the same slot, and the reverse entry be the new one.
        && forward_of(c, &key, hit.control).is_none()
    {
        // Whatever the next hop; but that one.
        const SAME: u64 = LINK | ct::STATE;
        let _ = hit.update::<F>(&key.words, |old| if (old ^ hit.control) & SAME == 0 { 0 } else { old });
    }
}

/// [`release`], of a reverse entry.
#[inline(always)]
pub fn reverse_gone<F: Addressing, C: Conns<F> + ?Sized>(c: &C, entry: &Entry<F::Words>) {
    if let Some((hit, key)) = forward_of(c, &entry.key::<F>(c.table().seed()), entry.control) {
        discard(c, &hit, &key.words);
    }
}

/// Free a forward entry, whatever packets make of it meanwhile, and account for it as it went.
#[inline(always)]
fn discard<F: Addressing, C: Conns<F> + ?Sized>(c: &C, hit: &HitOf<'_, F, C>, words: &F::Words) {
    if let Some((old, _)) = hit.update::<F>(words, |_| 0) {
        count(c, old, -1);
    }
}

/// Key of the replies to a forward entry: from the dest to the client, or to the local address that it was lent.
#[inline(always)]
pub fn reverse_key<F: Addressing, C: Conns<F> + ?Sized>(
    c: &C,
    forward: &Key<F::Words>,
    control: u64,
    slot: Slot,
) -> Option<Key<F::Words>> {
    let (address, port) = c.dest_address(dest(control))?;
    let port = if port == 0 { forward.dport() } else { port };
    let (to, to_port) = if c.fullnat(dest(control)) {
        let lent = fullnat::side(c, slot, forward)?;
        (lent.address, lent.port())
    } else {
        (F::source(&forward.words), forward.sport())
    };
    Some(Key::new(F::words(address, to), port, to_port, ct::proto(control)))
}

/// A forward entry and its key.
type Forward<'a, F, C> = (HitOf<'a, F, C>, Key<<F as Family>::Words>);

/// The forward entry that a reverse one (its control word) names, and its key, if it (still) is that of `reply`'s flow.
#[inline(always)]
fn forward_of<'a, F: Addressing, C: Conns<F> + ?Sized>(
    c: &'a C,
    reply: &Key<F::Words>,
    reverse: u64,
) -> Option<Forward<'a, F, C>> {
    if reverse & LINKED != 0 {
        return fullnat::forward_of(c, reply, link_of(reverse));
    }
    forward_at(c, reply, link_of(reverse))
}

/// The same for NAT.
#[inline(always)]
fn forward_at<'a, F: Addressing, C: Conns<F> + ?Sized>(
    c: &'a C,
    reply: &Key<F::Words>,
    slot: Slot,
) -> Option<Forward<'a, F, C>> {
    let there = ct::peek::<F, _>(c.table(), slot);
    // Of the forward entry we know the client from the reply; the virtual address is its own.
    let words = F::words(F::destination(&reply.words), F::destination(&there.words));
    let key = Key::new(words, reply.dport(), ct::dport(there.control), ct::proto(reply.control));
    let hit = ct::at_slot::<F, _>(c.table(), slot, &key)?;
    if hit.control & (LINKED | REVERSE) != LINKED {
        return None;
    }
    // And the dest is the one that answers.
    let (address, port) = c.dest_address(dest(hit.control))?;
    let port = if port == 0 { key.dport() } else { port };
    (address == F::source(&reply.words) && port == reply.sport()).then_some((hit, key))
}

/// The payload of a new forward entry.
#[inline(always)]
fn forward<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, dest: u32, state: u64) -> u64 {
    let stamp = c.stamp(ct::proto(key.control), state);
    (dest as u64) << DEST_SHIFT | stamp & (ct::STATE | AGE | EPOCH)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opened {
    New,
    /// Another CPU was faster: this is the flow's dest.
    Exists(u32),
    Full,
    /// Another flow has the reply tuple (dest, client): this dest can't take the flow.
    ReverseInUse,
}

/// Enter a flow that a lookup did not find. `linked`: with an entry for the replies (NAT).
/// Its steps, [`open_forward`], [`link`] and [`make_way`], are there for BPF programs, which take them one by one.
#[inline(always)]
pub fn open<F: Addressing, C: Conns<F> + ?Sized>(
    c: &C,
    key: &Key<F::Words>,
    dest: u32,
    state: u64,
    linked: bool,
) -> Opened {
    let done = open_forward(c, key, dest, state, if linked { LINKED } else { 0 });
    if !done.is_new() {
        if !done.is_there() {
            return Opened::Full;
        }
        let there = done.control();
        return if there & REVERSE == 0 { Opened::Exists(self::dest(there)) } else { Opened::ReverseInUse };
    }
    if linked { link_up(c, key, done.slot(), class::HALF_OPEN) } else { Opened::New }
}

/// The entry for the replies of the forward one that has been made, or nothing of the two.
#[inline(always)]
fn link_up<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, mut place: Place, class: u32) -> Opened {
    let mut tries = 0;
    loop {
        let done = link_as(c, key, place, class);
        if done.is_new() {
            return Opened::New;
        }
        if !done.is_there() {
            give_up(c, key, place);
            return Opened::Full;
        }
        tries += 1;
        match make_way(c, key, place, tries < 2) {
            Some(again) => place = again,
            None => return Opened::ReverseInUse,
        }
    }
}

/// The first step: the forward entry. `marks`: [`LINKED`], [`PROVEN`].
#[inline(always)]
pub fn open_forward<F: Addressing, C: Conns<F> + ?Sized>(
    c: &C,
    key: &Key<F::Words>,
    dest: u32,
    state: u64,
    marks: u64,
) -> Outcome {
    enter_forward(c, key, forward(c, key, dest, state) | marks)
}

/// Enter a forward entry, counted.
#[inline(always)]
fn enter_forward<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, rest: u64) -> Outcome {
    count(c, key.control | rest, 1);
    let done = c.enter(key, rest, Slot::MAX);
    if !done.is_new() {
        count(c, key.control | rest, -1);
    }
    done
}

/// Where a reverse entry is to point: the slot of its forward entry (24 bits), and above it a number that tells it from one that was
/// there before.
pub type Place = u32;

#[inline(always)]
fn slot_of(place: Place) -> Slot {
    place & (SLOTS_MAX - 1)
}

/// The dest of the forward entry there; `None`: it is another service's or client's by now. (Ports of that client are not told
/// apart.)
#[inline(always)]
pub fn dest_at<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, place: Place) -> Option<u32> {
    let control = ct::glance::<F, _>(c.table(), slot_of(place), key)?.control;
    (control & REVERSE == 0).then(|| dest(control))
}

/// The second step for NAT: the reverse entry of the forward one at `place`. If something is in the way, that is [`make_way`]'s
/// business; if there is no room for it, [`give_up`]'s.
#[inline(always)]
pub fn link<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, place: Place) -> Outcome {
    link_as(c, key, place, class::HALF_OPEN)
}

/// ... which is to go as one of this class does when there is no room.
#[inline(always)]
pub fn link_as<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, place: Place, class: u32) -> Outcome {
    let slot = slot_of(place);
    // If it has become another flow's meanwhile, the reverse entry leads nowhere, and goes when it is first met.
    let forward = ct::peek::<F, _>(c.table(), slot).control;
    // The dest was taken away this instant: no place.
    let Some(reverse) = reverse_key(c, key, forward, slot) else { return Outcome::FULL };
    let lent = if c.fullnat(dest(forward)) { LINKED } else { 0 };
    let rest = lent | REVERSE | (slot as u64) << LINK_SHIFT | u64::from(class) << CLASS_SHIFT;
    c.enter(&reverse, rest | (place >> 24) as u64 & ct::STATE, slot)
}

/// Not without its replies: take a forward entry back. (Whoever touched it meanwhile does not matter: it goes as it is now.)
#[inline(always)]
pub fn give_up<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, place: Place) {
    if let Some(hit) = ct::at_slot::<F, _>(c.table(), slot_of(place), key) {
        discard(c, &hit, &key.words);
    }
}

/// An entry is in the way of the reverse one. If its own flow is gone, it goes (and [`link`] is to be tried again at the place
/// returned); the reply tuple of a flow that lives stays, and this one is given up.
#[inline(always)]
pub fn make_way<F: Addressing, C: Conns<F> + ?Sized>(
    c: &C,
    key: &Key<F::Words>,
    place: Place,
    may_try_again: bool,
) -> Option<Place> {
    let slot = slot_of(place);
    let forward = ct::at_slot::<F, _>(c.table(), slot, key)?;
    let reverse = reverse_key(c, key, forward.control, slot)?;
    let mut generation = 0;
    let mut stale = may_try_again;
    if let Found::Live(hit) = ct::lookup::<F, _>(c.table(), &reverse)
        && may_try_again
    {
        stale = hit.control & REVERSE != 0
            && (link_of(hit.control) == slot || forward_of(c, &reverse, hit.control).is_none());
        if stale {
            generation = if ct::state(hit.control) < GENERATION_MAX { ct::state(hit.control) + 1 } else { 0 };
            // (Somebody else may be about to do just that.)
            let _ = hit.free::<F>();
        }
    }
    if !stale {
        discard(c, &forward, &key.words);
        return None;
    }
    Some(slot | (generation as u32) << 24)
}

/// What decides whether a packet leaves its flow's forward entry as it is, for each state of each protocol (`proto << 4 | state`): the
/// low bits of the control word of an entry in that state whose age is now's, with nothing left to count. Above them the row's limit, for
/// the sweep. Made by each tick, which is cheaper than to work it out for each packet.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamps(pub [u32; 64]);

impl Default for Stamps {
    fn default() -> Self {
        Stamps([0; 64])
    }
}

impl Stamps {
    pub fn new(policy: &Policy, now_s: u32) -> Stamps {
        let mut stamps = Stamps::default();
        for (of, stamp) in stamps.0.iter_mut().enumerate() {
            *stamp = stamp_of(policy, now_s, of);
        }
        stamps
    }
}

/// One of [`Stamps`].
#[inline(always)]
pub fn stamp_of(policy: &Policy, now_s: u32, of: usize) -> u32 {
    // Protocol 0 is that of a free way.
    if of < 16 {
        return (AGE_MASK as u32) << STAMP_LIMIT_SHIFT;
    }
    let epoch = policy.epoch & 1;
    let row = policy.rows[epoch as usize][of & 63];
    let age = now_s >> row.shift() & AGE_MASK as u32;
    let state = of as u32 & ct::STATE as u32;
    // In state 0, which is UDP's, packets are not counted.
    let packets = if state == 0 { 0 } else { PACKETS as u32 };
    row.limit() << STAMP_LIMIT_SHIFT | packets | epoch << EPOCH_SHIFT | age << AGE_SHIFT | state
}

const STAMP_LIMIT_SHIFT: u32 = 18;

/// Not 0 if the sweep has to look at this word: a forward entry that is expired (as [`expired`] says) or has its age of the other epoch.
/// Or one that is being entered, perhaps. No branch, not even one that LLVM makes of a comparison ([`Buckets::sign`]): reverse entries have
/// anything in the place of an age.
#[inline(always)]
fn due<F: Addressing, C: Conns<F> + ?Sized>(c: &C, control: u64) -> u64 {
    let stamp = c.stamp(ct::proto(control), ct::state(control));
    let ahead = (stamp >> AGE_SHIFT).wrapping_sub(control >> AGE_SHIFT).wrapping_add(7) & AGE_MASK;
    let expired = c.table().sign(((stamp >> STAMP_LIMIT_SHIFT) + 7).wrapping_sub(ahead));
    (expired | (stamp ^ control) >> EPOCH_SHIFT) & !(control >> REVERSE.trailing_zeros()) & 1
}

/// Would [`touch`] leave a forward entry as it is, and is it not expired? True of nearly every packet of a busy flow.
/// `state`: the next one.
#[inline(always)]
pub fn is_current<F: Addressing, C: Conns<F> + ?Sized>(
    c: &C,
    control: u64,
    proto: u64,
    state: u64,
    client: bool,
) -> bool {
    const STAMP: u64 = EPOCH | AGE | ct::STATE;
    let mask = if client { STAMP | PACKETS } else { STAMP };
    (control ^ c.stamp(proto, state)) & mask == 0
}

/// A packet of the flow was seen: next state, age, packet count. Written only if that changes the word (once a second for a busy
/// flow). `client`: sent by the client, not a reply. Returns the control word as it is now.
#[inline(always)]
pub fn touch<F: Addressing, C: Conns<F> + ?Sized, B: ct::Bucket>(
    c: &C,
    hit: &Hit<B>,
    words: &F::Words,
    client: bool,
    next: impl Fn(u64) -> u64,
) -> Option<u64> {
    const STAMP: u64 = ct::STATE | AGE | EPOCH;
    let p = c.policy();
    let (old, new) = hit.update::<F>(words, |old| {
        let stamp = c.stamp(ct::proto(old), next(ct::state(old)));
        // The packet that opened the flow is counted by its having been opened. Not in state 0, which is UDP's: nobody asks there.
        let more = if client && old & PACKETS != PACKETS && ct::state(old) != 0 { 1 << PACKETS_SHIFT } else { 0 };
        (old & !STAMP | stamp & STAMP) + more
    })?;
    if (old ^ new) & ct::STATE != 0 {
        let (was, is) = (p.row(old).active(), p.row(new).active());
        if was != is {
            let up = if is { 1 } else { -1 };
            c.account(dest(new), up, -up);
        }
    }
    Some(new)
}

/// A hit in the table of `C`.
pub type HitOf<'a, F, C> = Hit<<<C as Conns<F>>::Table as Buckets<F>>::B<'a>>;
/// A reply's flow in the table of `C`.
pub type ReplyOf<'a, F, C> = Reply<<<C as Conns<F>>::Table as Buckets<F>>::B<'a>, <F as Addressing>::Addr>;

/// A reply's flow: the forward entry, its virtual address and port.
pub struct Reply<B, A> {
    pub forward: Hit<B>,
    pub client: A,
    pub virtual_address: A,
    pub virtual_port: u16,
}

/// From the reverse entry that a reply hit to its flow (by NAT). `None`: it is gone, and so is now the reverse entry.
#[inline(always)]
pub fn follow<'a, F: Addressing, C: Conns<F> + ?Sized>(
    c: &'a C,
    key: &Key<F::Words>,
    reverse: &HitOf<'a, F, C>,
) -> Option<ReplyOf<'a, F, C>> {
    match forward_at(c, key, link_of(reverse.control)) {
        Some((forward, of)) => Some(Reply {
            client: F::destination(&key.words),
            virtual_address: F::destination(&of.words),
            virtual_port: of.dport(),
            forward,
        }),
        None => {
            let _ = reverse.free::<F>();
            None
        }
    }
}

/// Tell the reverse entry what its flow has become (and the next hop found), if that is news.
#[inline(always)]
pub fn remember<F: Addressing, C: Conns<F> + ?Sized, B: ct::Bucket>(
    c: &C,
    key: &Key<F::Words>,
    reverse: &Hit<B>,
    forward: u64,
    hop: u8,
) {
    let class = class(c.policy(), forward, c.now_s()) as u64;
    let _ =
        reverse.update::<F>(&key.words, |old| old & !(CLASS | HOP) | class << CLASS_SHIFT | (hop as u64) << HOP_SHIFT);
}

/// Sweep one bucket: free what has timed out, bring ages over to the current epoch. `freed` gets what went, to be released
/// (a method of the caller, since it reaches into other buckets).
#[inline(always)]
pub fn sweep<F: Addressing, C: Conns<F> + ?Sized>(c: &C, bucket: u32, freed: impl FnMut(Entry<F::Words>)) {
    let (p, now_s) = (c.policy(), c.now_s());
    ct::sweep::<F, _>(
        c.table(),
        bucket,
        |control| due(c, control),
        |control| {
            if control & REVERSE != 0 {
                return Look::Keep;
            }
            let row = p.row(control);
            let idle = idle(row, control, now_s);
            if idle > row.limit() {
                return Look::Free;
            }
            if (control & EPOCH) >> EPOCH_SHIFT == (p.epoch & 1) as u64 {
                return Look::Keep;
            }
            let new = p.current(control, ct::state(control));
            let age = (now_s.saturating_sub(idle_s(row, idle)) >> new.shift()) as u64 & AGE_MASK;
            Look::Change(control & !(AGE | EPOCH) | ((p.epoch & 1) as u64) << EPOCH_SHIFT | age << AGE_SHIFT)
        },
        freed,
    );
}
