//! FULLNAT's part of a flow: its replies come to one of the director's own addresses, and nothing in them says whose they are. That is
//! kept in a row beside the forward entry, found by its slot ([`Conns::side`]).
//!
//! ```text
//! word 0   fingerprint:32 | port:16 | 0:2 | has:6 | lacks:1 | sent:1 | proxied:1 | scale:4 | told:1
//!                                    of which flow it is, written last; the local port; the server's window scale (only with a cookie or a
//!                                    PROXY header); see HAS, LACKS, SENT, PROXIED, TOLD
//! word 1   delta:32 | first:32       what is added to the client's sequence numbers (after its SYN, and what is put in front of its first
//!                                    byte); its first one + 1
//! word 2   cookie:32 | server:32     the first sequence number that the client was told (`cookie`; 0: the server's own); the server's
//!                                    + 1, 0: not known yet
//! word 3.. the local address
//! ```
//! The reverse entry (real server -> local address) has both REVERSE and LINKED: it is not followed by the client's address, as
//! that of NAT is, but by this row.

use super::{Addressing, Conns, HitOf, Place, Reply, ReplyOf, dest, link_of, slot_of};
use crate::ct::{self, Bucket, Buckets, Entry, Key, LINKED, REVERSE, Slot};

/// Words of a row, and where the address lies in it.
pub const ADDRESS: usize = if cfg!(feature = "other-layout") { 4 } else { 3 };
const WHO: usize = if cfg!(feature = "other-layout") { 1 } else { 0 };
const CLIENT: usize = if cfg!(feature = "other-layout") { 0 } else { 1 };
const SERVER: usize = 2;

/// The server has heard from the client what it needs to know: nothing more is put into its packets.
const TOLD: u64 = 1;
/// It hears it by a PROXY header in front of the client's first byte.
const PROXIED: u64 = 1 << 5;
/// The header has been sent once at least, since the client's SYN.
const SENT: u64 = 1 << 6;
/// The server has shown since that it has only so many bytes of it.
const LACKS: u64 = 1 << 7;
const HAS_SHIFT: u32 = 8;
const HAS: u64 = 0x3f << HAS_SHIFT;
const PORT_SHIFT: u32 = 16;
const SCALE_SHIFT: u32 = 1;

/// How a server hears who its client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tells {
    /// It sees its address.
    Nothing,
    /// By a TCP option.
    Option,
    /// By a PROXY header.
    Header,
}

/// What a row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side<A> {
    pub address: A,
    /// Word 0.
    who: u64,
    /// Added to the client's sequence numbers.
    pub delta: u32,
    /// The client's first sequence number + 1, as it counts; meaningless before its SYN went by.
    pub first: u32,
    /// The server's; 0: not seen yet.
    pub server: u32,
    /// What the client believes to be the server's first sequence number; 0: that it is.
    pub cookie: u32,
}

impl<A: PartialEq> Side<A> {
    #[inline(always)]
    pub fn port(&self) -> u16 {
        (self.who >> PORT_SHIFT) as u16
    }
    /// Does the server know all that it needs to?
    #[inline(always)]
    pub fn is_told(&self) -> bool {
        self.who & TOLD != 0
    }
    /// Does (or did) a PROXY header come before the client's first byte?
    #[inline(always)]
    pub fn is_proxied(&self) -> bool {
        self.who & PROXIED != 0
    }
    /// ... which the server has not acknowledged yet?
    #[inline(always)]
    pub fn owes_header(&self) -> bool {
        self.who & (PROXIED | TOLD) == PROXIED
    }
    /// How many bytes of the header, of `n`, the server has, as far as is known.
    #[inline(always)]
    pub fn has_of_header(&self, n: u32) -> u32 {
        if self.who & (SENT | LACKS) == SENT { n } else { (self.who >> HAS_SHIFT) as u32 & 0x3f }
    }
    /// Has it been sent at all?
    #[inline(always)]
    pub fn has_sent_header(&self) -> bool {
        self.who & SENT != 0
    }
    /// Added to the server's sequence numbers.
    #[inline(always)]
    pub fn back(&self) -> u32 {
        if self.cookie == 0 || self.server == 0 { 0 } else { self.cookie.wrapping_add(1).wrapping_sub(self.server) }
    }
    /// The client has been answered, but the server has not: whatever the client sends is to be its SYN.
    #[inline(always)]
    pub fn is_to_knock(&self) -> bool {
        self.cookie != 0 && self.server == 0
    }
    /// The server's window scale.
    #[inline(always)]
    pub fn scale(&self) -> u32 {
        (self.who >> SCALE_SHIFT) as u32 & 0xf
    }
    /// Is this what a packet to that address and port means?
    #[inline(always)]
    pub fn is_lent(&self, address: &A, port: u16) -> bool {
        self.address == *address && self.port() == port
    }
    /// Of the flow with this key, and not of one that had its place before?
    #[inline(always)]
    pub fn is_of<W: AsRef<[u64]> + Copy>(&self, key: &Key<W>) -> bool {
        (self.who ^ fingerprint(key)) >> 32 == 0
    }
}

/// Tells flows apart that have the same slot one after the other.
#[inline(always)]
fn fingerprint<W: AsRef<[u64]> + Copy>(key: &Key<W>) -> u64 {
    let ports = (key.sport() as u64) << 16 | key.dport() as u64;
    let mut mixed = ports | ct::proto(key.control) << 32;
    let mut i = 0;
    while i < key.words.as_ref().len() {
        mixed = (mixed ^ key.words.as_ref()[i]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^= mixed >> 32;
        i += 1;
    }
    mixed >> 32 << 32
}

/// Is this the control word, forward or reverse, of such a flow?
#[inline(always)]
pub fn is_lent<F: Addressing, C: Conns<F> + ?Sized>(c: &C, control: u64) -> bool {
    if control & REVERSE != 0 { control & LINKED != 0 } else { c.fullnat(dest(control)) }
}

/// What the row of this slot says, whosever it is.
#[inline(always)]
fn row<F: Addressing, C: Conns<F> + ?Sized>(c: &C, slot: Slot) -> Option<Side<F::Addr>> {
    let row = c.side(slot)?;
    let (who, client, server) = (row.load(WHO), row.load(CLIENT), row.load(SERVER));
    let mut address = F::NOWHERE;
    let mut i = 0;
    while i < address.as_ref().len() {
        address.as_mut()[i] = row.load(ADDRESS + i);
        i += 1;
    }
    let address = F::from_words(address);
    Some(Side {
        address,
        who,
        delta: (client >> 32) as u32,
        first: client as u32,
        server: server as u32,
        cookie: (server >> 32) as u32,
    })
}

/// The row of a flow, given the forward entry's slot and key; `None`: it is another's (the entry has been made this instant).
#[inline(always)]
pub fn side<F: Addressing, C: Conns<F> + ?Sized>(c: &C, slot: Slot, key: &Key<F::Words>) -> Option<Side<F::Addr>> {
    row(c, slot).filter(|side| side.is_of(key))
}

/// The flow whose forward entry is at `place` is lent this address and port: what [`super::link`] makes the entry for its replies of.
#[inline(always)]
pub fn lend<F: Addressing, C: Conns<F> + ?Sized>(
    c: &C,
    key: &Key<F::Words>,
    place: Place,
    (address, port): (F::Addr, u16),
    cookie: u32,
    tells: Tells,
) {
    let Some(row) = c.side(slot_of(place)) else { return };
    row.store(WHO, 0);
    row.store(CLIENT, 0);
    row.store(SERVER, u64::from(cookie) << 32);
    let words = F::to_words(address);
    let mut i = 0;
    while i < words.as_ref().len() {
        row.store(ADDRESS + i, words.as_ref()[i]);
        i += 1;
    }
    let flags = match tells {
        Tells::Nothing => TOLD,
        Tells::Option => 0,
        Tells::Header => PROXIED,
    };
    row.store(WHO, fingerprint(key) | u64::from(port) << PORT_SHIFT | flags);
}

/// A row in words that no layout has: how it goes with its flow from one table to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lent<A> {
    pub address: A,
    pub port: u16,
    pub told: bool,
    pub proxied: bool,
    pub sent: bool,
    pub lacks: bool,
    pub has: u8,
    pub scale: u8,
    pub delta: u32,
    pub first: u32,
    pub server: u32,
    pub cookie: u32,
}

impl<A: Copy> Side<A> {
    pub fn lent(&self) -> Lent<A> {
        Lent {
            address: self.address,
            port: (self.who >> PORT_SHIFT) as u16,
            told: self.who & TOLD != 0,
            proxied: self.who & PROXIED != 0,
            sent: self.who & SENT != 0,
            lacks: self.who & LACKS != 0,
            has: (self.who >> HAS_SHIFT & 0x3f) as u8,
            scale: (self.who >> SCALE_SHIFT & 0xf) as u8,
            delta: self.delta,
            first: self.first,
            server: self.server,
            cookie: self.cookie,
        }
    }
}

/// As [`lend`], of a flow that has had all this before.
#[inline(always)]
pub fn restore<F: Addressing, C: Conns<F> + ?Sized>(c: &C, key: &Key<F::Words>, place: Place, lent: &Lent<F::Addr>) {
    let Some(row) = c.side(slot_of(place)) else { return };
    row.store(WHO, 0);
    row.store(CLIENT, u64::from(lent.delta) << 32 | u64::from(lent.first));
    row.store(SERVER, u64::from(lent.cookie) << 32 | u64::from(lent.server));
    let words = F::to_words(lent.address);
    let mut i = 0;
    while i < words.as_ref().len() {
        row.store(ADDRESS + i, words.as_ref()[i]);
        i += 1;
    }
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let flags = flag(lent.told, TOLD) | flag(lent.proxied, PROXIED) | flag(lent.sent, SENT) | flag(lent.lacks, LACKS);
    let numbers = u64::from(lent.has & 0x3f) << HAS_SHIFT | u64::from(lent.scale & 0xf) << SCALE_SHIFT;
    row.store(WHO, fingerprint(key) | u64::from(lent.port) << PORT_SHIFT | flags | numbers);
}

/// The client's SYN went by: its first sequence number + 1, and what is added to all of its sequence numbers from now on. A PROXY header is
/// to be sent from the beginning.
#[inline(always)]
pub fn begin<F: Addressing, C: Conns<F> + ?Sized>(c: &C, slot: Slot, side: &Side<F::Addr>, first: u32, delta: u32) {
    if let Some(row) = c.side(slot) {
        row.store(CLIENT, u64::from(delta) << 32 | u64::from(first));
        if side.is_proxied() {
            let _ = row.cas(WHO, side.who, side.who & !(TOLD | SENT | LACKS | HAS));
        }
    }
}

/// The server's SYN went by: its first sequence number + 1, and its window scale.
#[inline(always)]
pub fn answered<F: Addressing, C: Conns<F> + ?Sized>(c: &C, slot: Slot, side: &Side<F::Addr>, server: u32, scale: u8) {
    if let Some(row) = c.side(slot) {
        if side.cookie != 0 || side.is_proxied() {
            let scale = u64::from(scale.min(14)) << SCALE_SHIFT;
            let _ = row.cas(WHO, side.who, side.who & !(0xf << SCALE_SHIFT) | scale);
        }
        // 0 would say that it is not known. (With any other number this one server, of four billion, is not told who its client is.)
        row.store(SERVER, u64::from(side.cookie) << 32 | u64::from(if server == 0 { u32::MAX } else { server }));
    }
}

/// The server knows it all (unless the row has become another flow's).
#[inline(always)]
pub fn told<F: Addressing, C: Conns<F> + ?Sized>(c: &C, slot: Slot, side: &Side<F::Addr>) {
    if let Some(row) = c.side(slot) {
        let _ = row.cas(WHO, side.who, side.who | TOLD);
    }
}

/// The PROXY header was sent. (Whatever this misses is made up for by the next packet.)
#[inline(always)]
pub fn sent<F: Addressing, C: Conns<F> + ?Sized>(c: &C, slot: Slot, side: &Side<F::Addr>) {
    let who = side.who & !LACKS | SENT;
    if who != side.who
        && let Some(row) = c.side(slot)
    {
        let _ = row.cas(WHO, side.who, who);
    }
}

/// ... and no more than these bytes (fewer than 64) of it have arrived.
#[inline(always)]
pub fn lacks<F: Addressing, C: Conns<F> + ?Sized>(c: &C, slot: Slot, side: &Side<F::Addr>, has: u32) {
    let who = side.who & !HAS | u64::from(has & 0x3f) << HAS_SHIFT | LACKS;
    if who != side.who
        && side.has_sent_header()
        && let Some(row) = c.side(slot)
    {
        let _ = row.cas(WHO, side.who, who);
    }
}

/// A forward entry and its row.
type Forward<'a, F, C> = (HitOf<'a, F, C>, Entry<<F as ct::Family>::Words>, Side<<F as Addressing>::Addr>);

/// The forward entry in `slot`, if it seems to be that of `reply`'s flow: it may be a newer one, whose row is not written yet (see
/// [`Side::is_of`]).
#[inline(always)]
pub fn glance<'a, F: Addressing, C: Conns<F> + ?Sized>(
    c: &'a C,
    reply: &Key<F::Words>,
    slot: Slot,
) -> Option<Forward<'a, F, C>> {
    let (hit, entry) = ct::live_at::<F, _>(c.table(), slot)?;
    if hit.control & (LINKED | REVERSE) != LINKED || !c.fullnat(dest(hit.control)) {
        return None;
    }
    let (server, port) = c.dest_address(dest(hit.control))?;
    let port = if port == 0 { ct::dport(hit.control) } else { port };
    let side = row(c, slot)?;
    let same = server == F::source(&reply.words)
        && port == reply.sport()
        && side.is_lent(&F::destination(&reply.words), reply.dport());
    same.then_some((hit, entry, side))
}

/// The forward entry in `slot` and its key, if it (still) is that of `reply`'s flow.
#[inline(always)]
pub fn forward_of<'a, F: Addressing, C: Conns<F> + ?Sized>(
    c: &'a C,
    reply: &Key<F::Words>,
    slot: Slot,
) -> Option<super::Forward<'a, F, C>> {
    let (hit, entry, side) = glance(c, reply, slot)?;
    let key = entry.key::<F>(c.table().seed());
    side.is_of(&key).then_some((hit, key))
}

/// From the reverse entry that a reply hit to its flow, and its client's port. `None`: it is gone, and so is now the reverse entry.
#[inline(always)]
pub fn follow<'a, F: Addressing, C: Conns<F> + ?Sized>(
    c: &'a C,
    reply: &Key<F::Words>,
    reverse: &HitOf<'a, F, C>,
) -> Option<(ReplyOf<'a, F, C>, u16)> {
    let Some((forward, key)) = forward_of(c, reply, link_of(reverse.control)) else {
        let _ = reverse.free::<F>();
        return None;
    };
    let reply = Reply {
        client: F::source(&key.words),
        virtual_address: F::destination(&key.words),
        virtual_port: key.dport(),
        forward,
    };
    Some((reply, key.sport()))
}
