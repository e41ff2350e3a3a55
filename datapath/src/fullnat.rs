//! FULLNAT: the real server sees one of the director's own addresses, so that its replies come back here whatever its routes are.
//!
//! ```text
//! client:port -> VIP:vport        becomes   local:port -> real server:rport
//! real server:rport -> local:port becomes   VIP:vport  -> client:port
//! ```
//! One local address stands for many clients, so what a server knows about an earlier one must not be taken for this one's. The client's
//! sequence numbers begin where RFC 6528 has a host of this address begin (a server in TIME_WAIT then takes the SYN), and its timestamps
//! are blanked in the SYN.
//!
//! Who the client is, is told in a TCP option (254, "TOA": port, address) of the packets until the server has acknowledged something that
//! came after its own SYN: the option may be lost with a packet, and a server looks at the segment that completes the handshake, or at
//! the first with data, or both. Never in the SYN, where SYN cookies forget it. An option 254 of the client's own is blanked meanwhile.

use crate::abi::{Dest, Hop};
use crate::conn::{self, Conns, fullnat as lent, fullnat::Tells};
use crate::cookie;
use crate::core::{replied, server};
use crate::csum::Delta;
use crate::ct::{self, Buckets, Found, Key};
use crate::options::{Edit, TOA};
use crate::packet::{Flow, Ip, Packet, Window};
use crate::proto::tcp;
use crate::proxy;
use crate::tables::{Of, Route, Tables, Walker};
use crate::verdict::{Action, Reason, Stage, Verdict, drop, pass};
use crate::xmit::{self, Ends};

/// Ports lent: those of the kernel's own range are among them, since the addresses are the director's for this alone.
const PORTS: u32 = 65536 - FIRST_PORT;
const FIRST_PORT: u32 = 1024;
/// Local addresses and ports tried for a connection.
const TRIES: u32 = 64;

/// Looks for a free reply tuple.
struct Search<I: Ip> {
    server: I::Addr,
    server_port: u16,
    proto: u64,
    /// First of the service's local addresses, how many, and where to begin.
    first: u32,
    count: u32,
    start: u32,
    found: Option<(I::Addr, u16)>,
}

impl<I: Of<T>, T: Tables> Walker<T> for Search<I> {
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        // Neighbours in time are far apart in ports: who comes next does not try the same ones.
        let n = self.start.wrapping_add(i.wrapping_mul(0x3d4d_51cb));
        let count = self.count.max(1);
        let (which, port) = (n % count, FIRST_PORT + n / count % PORTS);
        let Some(local) = t.local(self.first + which) else { return true };
        let local = I::from_address(&local.address);
        let reply = Key::new(I::words(self.server, local), self.server_port, port as u16, self.proto);
        if let Found::None = ct::lookup::<I, _>(I::conns(t).table(), &reply) {
            self.found = Some((local, port as u16));
        }
        self.found.is_some()
    }
}

/// A local address and port for a connection whose forward entry has just been made.
#[inline(always)]
pub fn lend<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, place: conn::Place) -> Verdict {
    let c = I::conns(t);
    let Some(index) = conn::dest_at::<I, _>(c, &flow.key, place) else { return Verdict::go(Stage::Whole, 0) };
    let Some(d) = t.dest(index) else { return drop(Reason::Internal) };
    if d.lends_own() {
        let tells = if d.proxied() { Tells::Header } else { Tells::Nothing };
        lent::lend::<I, _>(c, &flow.key, place, (flow.source(), flow.key.sport()), flow.cookie, tells);
        return Verdict::go(Stage::Link, place);
    }
    let locals = t.service(d.service).map_or(0, |s| s.locals);
    let count = (locals >> 32) as u32;
    if count == 0 {
        conn::give_up::<I, _>(c, &flow.key, place);
        return drop(Reason::NoLocalAddress);
    }
    let (address, port) = server(flow, d);
    let mut search = Search::<I> {
        server: address,
        server_port: port,
        proto: flow.proto(),
        first: locals as u32,
        count,
        start: (t.lending(index) as u32).wrapping_add(t.config().seed.0[0] as u32),
        found: None,
    };
    t.walk(TRIES, &mut search);
    let Some(local) = search.found else {
        conn::give_up::<I, _>(c, &flow.key, place);
        return drop(Reason::NoLocalPort);
    };
    let tells = if d.proxied() { Tells::Header } else { Tells::Option };
    lent::lend::<I, _>(c, &flow.key, place, local, flow.cookie, tells);
    // (If another CPU enters one for that port meanwhile, the flow begins anew.)
    Verdict::go(Stage::Link, place)
}

/// In the number of [`Stage::Fullnat`], beside the slot: [`introduce`] has seen to the packet; and it found no room for the option.
pub const INTRODUCED: u32 = 1 << 31;
pub const BARE: u32 = 1 << 30;
const _: () = assert!(conn::SLOTS_MAX <= BARE);

/// A client's packet, counted and its state seen to, of the connection whose forward entry is in the slot that the number says.
#[inline(always)]
pub fn request<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, number: u32) -> Verdict {
    let slot = number & (BARE - 1);
    let Some((d, side)) = flow_at(t, flow, slot) else { return drop(Reason::Entering) };
    if flow.tcp && number & INTRODUCED == 0 {
        let control = tcp::SYN | tcp::RST;
        if side.is_to_knock() && flow.flags & control == 0 {
            t.keep(flow);
            return Verdict::go(Stage::Knock, slot);
        }
        if flow.flags & tcp::SYN != 0 || !side.is_told() || side.back() != 0 && has_options::<I, P>(p) {
            t.keep(flow);
            return Verdict::go(Stage::Introduce, slot);
        }
    }
    let destination = server(flow, d);
    let reason = match number & BARE {
        _ if d.lends_own() => Reason::Masq,
        0 => Reason::Fullnat,
        _ => Reason::FullnatBare,
    };
    let acknowledged = if flow.flags & tcp::ACK != 0 { side.back().wrapping_neg() } else { 0 };
    let ends = Ends { source: (side.address, side.port()), destination, sequence: side.delta, acknowledged };
    let mut found = Hop::default();
    let (hop, resolve) = match t.hop((d.out >> 32) as u32) {
        Some(hop) if hop.ifindex != 0 => (hop, false),
        _ => match t.route::<I>([side.address, destination.0], flow.protocol(), flow.len, &mut found) {
            Route::Hop => (&found, false),
            Route::NoNeighbour if t.resolves() => (&found, true),
            // (The kernel would not forward what seems to come from itself.)
            Route::NoNeighbour => return drop(Reason::NoNeighbour),
            _ => return drop(Reason::NoRoute),
        },
    };
    if !xmit::readdress::<I, P>(p, flow, &ends, true) {
        return drop(Reason::Internal);
    }
    if resolve { Verdict::resolve(hop.ifindex, reason) } else { xmit::send(p, hop, reason) }
}

#[inline(always)]
fn has_options<I: Ip, P: Packet>(p: &mut P) -> bool {
    p.window(I::L4 + 20).is_some_and(|w| w.r8(I::L4 + 12) >> 4 > 5)
}

type Side<I> = lent::Side<<I as conn::Addressing>::Addr>;

#[inline(always)]
fn flow_at<'t, I: Of<T>, T: Tables>(t: &'t T, flow: &Flow<I>, slot: ct::Slot) -> Option<(&'t Dest, Side<I>)> {
    let c = I::conns(t);
    // (The row is this flow's or not at all, whatever becomes of the entry meanwhile.)
    let index = if flow.dest != 0 { flow.dest } else { conn::dest_at::<I, _>(c, &flow.key, slot)? };
    Some((t.dest(index)?, lent::side::<I, _>(c, slot, &flow.key)?))
}

/// A client's TCP packet while the server may not know yet whose the connection is: what goes with it, and then on its way.
#[inline(always)]
pub fn introduce<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, slot: ct::Slot) -> Verdict {
    let Some((d, side)) = flow_at(t, flow, slot) else { return drop(Reason::Entering) };
    let Some((sequence, acknowledged, header)) = tcp::numbers::<I, P>(p) else { return drop(Reason::Internal) };
    let syn = flow.flags & tcp::SYN != 0;
    let own = d.lends_own();
    let lead = if side.is_proxied() { proxy::length::<I>() as u32 } else { 0 };
    if syn && lead != 0 && (flow.by != 0 || flow.transport_len() != header) {
        // Data would come before the header, and a header can't be put behind extra ones. (A client of Fast Open tries again without data.)
        return drop(Reason::ProxyRefused);
    }
    let blank = syn && (!own || lead != 0);
    let edit = Edit {
        timestamps: syn && !own,
        fast_open: blank,
        toa: !own || blank,
        sack: side.back().wrapping_neg(),
        ..Edit::NONE
    };
    let Some((mut changed, _)) = p.edit_options::<I>(header, edit) else { return drop(Reason::Internal) };
    let mut length = Delta::default();
    let mut number = slot | INTRODUCED;
    if syn {
        let first = sequence.wrapping_add(1);
        if side.first != first || side.delta == 0 {
            let delta = if own { 0 } else { initial(t, flow, d, &side).wrapping_sub(sequence) };
            lent::begin::<I, _>(I::conns(t), slot, &side, first, delta.wrapping_add(lead));
        }
        if lead != 0 {
            match tcp::renumber::<I, P>(p, lead.wrapping_neg()) {
                Some(more) => changed = changed.and(more),
                None => return drop(Reason::Internal),
            }
        }
    } else if side.owes_header() {
        number = slot;
    } else if side.server != 0
        && !side.is_told()
        && acknowledged == side.server.wrapping_add(side.back())
        && flow.flags & (tcp::ACK | tcp::RST) == tcp::ACK
    {
        match tell::<I, P, T>(p, t, flow, d, header) {
            Some((more, longer)) => (changed, length) = (changed.and(more), longer),
            None => number |= BARE,
        }
    }
    if !p.fix_transport(I::L4 + 16, false, length, changed) {
        return drop(Reason::Internal);
    }
    t.keep(flow);
    Verdict::go(if number == slot { Stage::Announce } else { Stage::Fullnat }, number)
}

/// The sequence number that a host of the local address would begin with (RFC 6528).
#[inline(always)]
fn initial<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, d: &Dest, side: &Side<I>) -> u32 {
    let (address, port) = server(flow, d);
    let key = Key::new(I::words(side.address, address), side.port(), port, conn::TCP);
    let ports = u64::from(side.port()).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let hash = I::hash(&key.words, key.control ^ ports, &t.config().seed);
    ((hash >> 32) as u32 ^ hash as u32).wrapping_add(t.sequence_clock())
}

/// Length of the option.
#[inline(always)]
pub const fn told_length<I: Ip>() -> usize {
    if I::FAMILY == 4 { 8 } else { 20 }
}

/// Put the option right behind the fixed part of the TCP header. The change of the segment's sum and of the pseudo-header's; `None`: there is
/// no room.
#[inline(always)]
fn tell<I: Of<T>, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    flow: &Flow<I>,
    d: &Dest,
    header: u32,
) -> Option<(Delta, Delta)> {
    let n = told_length::<I>();
    let room = if d.mtu == 0 { 1500 } else { u32::from(d.mtu) };
    // (Behind a first fragment come others that say where in the datagram they belong.)
    if !flow.part.is_whole()
        || header + n as u32 > 60
        || flow.len + n as u32 > room
        || !t.sized()
        || !p.open_gap(I::L4 + 20, 0, n)
    {
        return None;
    }
    let mut w = p.window(I::L4 + 20 + n)?;
    I::grow(&mut w, n as u16);
    let mut delta = Delta::default();
    let old = w.r16(I::L4 + 12);
    // The data offset is the high half of the first byte, in words of four bytes.
    let new = u16::from_be(old).wrapping_add((n as u16 / 4) << 12).to_be();
    w.w16(I::L4 + 12, new);
    delta = delta.replace16(old, new);
    let at = I::L4 + 20;
    let mut put = |w: &mut P::W<'_>, at: usize, v: u16| {
        w.w16(at, v);
        delta = delta.replace16(0, v);
    };
    put(&mut w, at, (u16::from(TOA) << 8 | n as u16).to_be());
    put(&mut w, at + 2, flow.key.sport().to_be());
    let client = I::bytes(flow.source());
    let mut i = 0;
    while i < n - 4 {
        put(&mut w, at + 4 + i, u16::from_ne_bytes([client[i], client[i + 1]]));
        i += 2;
    }
    let length = (flow.len as u16).wrapping_sub(I::HEADER as u16);
    Some((delta, Delta::default().replace16(length.to_be(), length.wrapping_add(n as u16).to_be())))
}

/// In the number of [`Stage::FullnatReply`], beside the slot: the segment's options have been seen to.
const EDITED: u32 = 1 << 31;
/// In that of [`Stage::FullnatSend`], above the slot: the next hop's number.
const HOP_SHIFT: u32 = 24;
const _: () = assert!(conn::SLOTS_MAX == 1 << HOP_SHIFT);

/// A real server's reply to a local address: the flow's state, and the way to its client.
#[inline(always)]
pub fn reply<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, number: u32) -> Verdict {
    let c = I::conns(t);
    let slot = number & (conn::SLOTS_MAX - 1);
    let Some(reverse) = ct::glance::<I, _>(c.table(), slot, &flow.key) else { return pass(Reason::NoService) };
    let Some((forward, entry, side)) = lent::glance::<I, _>(c, &flow.key, conn::link_of(reverse.control)) else {
        let _ = reverse.free::<I>();
        return pass(Reason::NoService);
    };
    // As ip_forward would have done before IPVS sees the reply.
    if flow.ttl <= 1 {
        return pass(Reason::ReplyTtl);
    }
    if flow.tcp {
        let (answer, header) = {
            let Some(w) = p.window(I::L4 + 20) else { return drop(Reason::Internal) };
            (u32::from_be(w.r32(I::L4 + 8)), w.r8(I::L4 + 12) >> 4)
        };
        let syn = flow.flags & tcp::SYN != 0;
        if (header > 5 || syn || side.is_to_knock()) && number & EDITED == 0 {
            t.keep(flow);
            return Verdict::go(Stage::ReplyOptions, slot);
        }
        let ack = flow.flags & tcp::ACK != 0;
        if ack && !syn && !side.is_told() {
            if side.is_proxied() {
                if number & EDITED == 0 {
                    t.keep(flow);
                    return Verdict::go(Stage::ReplyOptions, slot);
                }
            } else if answer != side.first.wrapping_add(side.delta) {
                lent::told::<I, _>(c, entry.slot, &side);
            }
        }
    }
    let reply = conn::Reply {
        client: I::source(&entry.words),
        virtual_address: I::destination(&entry.words),
        virtual_port: ct::dport(entry.control),
        forward,
    };
    let control = replied::<I, P, T>(t, c, flow, &reply);
    // The way to the client is looked up once a second for a busy flow, and then remembered by the reverse entry.
    let same_second = (control ^ reply.forward.control) & !ct::STATE == 0;
    let hop = if same_second { conn::hop(reverse.control) } else { 0 };
    if hop != 0 {
        conn::remember::<I, _, _>(c, &flow.key, &reverse, control, hop);
        if side.cookie == 0
            && let Some(hop) = t.reply_hop(hop)
            && hop.ifindex != 0
        {
            // Nearly always all is known.
            let key = entry.key::<I>(c.table().seed());
            if !side.is_of(&key) {
                return drop(Reason::Entering);
            }
            let done = answer::<I, P>(p, flow, &key, &side, 0, true);
            return if done { xmit::send(p, hop, reply_reason(t, control)) } else { drop(Reason::Internal) };
        }
    }
    t.keep(flow);
    Verdict::go(Stage::FullnatSend, entry.slot | u32::from(hop) << HOP_SHIFT)
}

/// A reply to its client, from the virtual address.
#[inline(always)]
pub fn send<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, number: u32) -> Verdict {
    let c = I::conns(t);
    let slot = number & (conn::SLOTS_MAX - 1);
    let Some((_, entry, side)) = lent::glance::<I, _>(c, &flow.key, slot) else { return drop(Reason::Entering) };
    let key = entry.key::<I>(c.table().seed());
    if !side.is_of(&key) {
        return drop(Reason::Entering);
    }
    let (client, virtual_address) = (I::source(&key.words), I::destination(&key.words));
    let mut hop = t.reply_hop((number >> HOP_SHIFT) as u8).copied().unwrap_or_default();
    let mut route = Route::Hop;
    if hop.ifindex == 0 {
        route = t.route::<I>([virtual_address, client], flow.protocol(), flow.len, &mut hop);
        let keep = if route == Route::Hop { t.keep_reply_hop(&hop) } else { 0 };
        if let Found::Live(reverse) = ct::lookup::<I, _>(c.table(), &flow.key) {
            conn::remember::<I, _, _>(c, &flow.key, &reverse, entry.control, keep);
        }
    }
    let resolve = route == Route::NoNeighbour && t.resolves();
    let mut sequence = side.back();
    if flow.tcp && side.cookie != 0 {
        match cookie::answer::<I, P>(p, &side) {
            Some(by) => sequence = by,
            None => return drop(Reason::Internal),
        }
    }
    if !answer::<I, P>(p, flow, &key, &side, sequence, route == Route::Hop || resolve) {
        return drop(Reason::Internal);
    }
    xmit::leave(p, route, resolve, &hop, reply_reason(t, entry.control))
}

/// Addresses, ports and sequence numbers as its client knows them. `sequence` is added to the server's; `forward` as in [`xmit::readdress`].
#[inline(always)]
fn answer<I: Ip, P: Packet>(
    p: &mut P,
    flow: &Flow<I>,
    client: &Key<I::Words>,
    side: &Side<I>,
    sequence: u32,
    forward: bool,
) -> bool {
    let ends = Ends {
        source: (I::destination(&client.words), client.dport()),
        destination: (I::source(&client.words), client.sport()),
        sequence,
        acknowledged: if flow.flags & tcp::ACK != 0 { side.delta.wrapping_neg() } else { 0 },
    };
    xmit::readdress::<I, P>(p, flow, &ends, forward)
}

#[inline(always)]
fn reply_reason<T: Tables>(t: &T, forward: u64) -> Reason {
    let own = t.dest(conn::dest(forward)).is_some_and(Dest::lends_own);
    if own { Reason::MasqReply } else { Reason::FullnatReply }
}

/// The options of a reply: room for the client's address in what the client is told to send at most, and selective acknowledgements as it
/// counts.
#[inline(always)]
pub fn reply_options<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, slot: ct::Slot) -> Verdict {
    let c = I::conns(t);
    let Some(reverse) = ct::glance::<I, _>(c.table(), slot, &flow.key) else { return pass(Reason::NoService) };
    let forward = conn::link_of(reverse.control);
    let Some((_, entry, side)) = lent::glance::<I, _>(c, &flow.key, forward) else { return pass(Reason::NoService) };
    let Some((sequence, answer, header)) = tcp::numbers::<I, P>(p) else { return drop(Reason::Internal) };
    let syn = flow.flags & tcp::SYN != 0;
    let answers = flow.flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK;
    // The client has had its answer.
    let all = answers && side.cookie != 0;
    let own = t.dest(conn::dest(entry.control)).is_some_and(Dest::lends_own);
    let mss_less = match syn {
        true if side.is_proxied() => proxy::length::<I>() as u16,
        true if !own => told_length::<I>() as u16,
        _ => 0,
    };
    let edit = Edit { mss_less, sack: side.delta.wrapping_neg(), all, ..Edit::NONE };
    let Some((mut changed, offer)) = p.edit_options::<I>(header, edit) else { return drop(Reason::Internal) };
    let opens = side.cookie != 0 && flow.flags & tcp::RST == 0 && (answers || side.server == 0);
    let turned = opens && (!answers || side.server != 0);
    if flow.flags & tcp::ACK != 0 && side.owes_header() && !turned {
        let scale = if syn { 0 } else { side.scale() };
        match proxy::acknowledged::<I, P, _>(p, c, forward, &side, answer, scale) {
            Some(more) => changed = changed.and(more),
            None => return drop(Reason::Internal),
        }
    }
    if answers && side.server == 0 {
        lent::answered::<I, _>(c, forward, &side, sequence.wrapping_add(1), offer.scale.unwrap_or(0));
    }
    if !p.fix_transport(I::L4 + 16, false, Delta::default(), changed) {
        return drop(Reason::Internal);
    }
    if opens {
        let flags = if answers { tcp::ACK } else { tcp::RST };
        return match cookie::opened::<I, P>(p, header, flags, offer.scale.unwrap_or(0), turned) {
            None => drop(Reason::Internal),
            // What completes the server's handshake brings it the header.
            Some(()) if turned && answers && side.owes_header() => {
                t.keep(flow);
                Verdict::go(Stage::Announce, forward | proxy::TURNED)
            }
            Some(()) if turned && !xmit::turn::<I, P>(p) => drop(Reason::Internal),
            Some(()) if turned => Verdict::new(Action::Back, Reason::CookieServer),
            Some(()) => {
                t.keep(&Flow { flags, ..*flow });
                Verdict::go(Stage::FullnatReply, slot | EDITED)
            }
        };
    }
    t.keep(flow);
    Verdict::go(Stage::FullnatReply, slot | EDITED)
}
