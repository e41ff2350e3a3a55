//! The way of a packet. Read this first.
//!
//! ```text
//! for our MAC? -> parse -> connection? -- forward --> state, age, count -> rewrite for the dest -> out
//!                             |     \--- reverse --> its flow -> state, count -> source = VIP -> out
//!                             no
//!                             v
//!     virtual service of this host? -> first packet of a flow? -> scheduler -> enter -> forward -> out
//! ```
//! The connection comes first: an established flow never pays for a service lookup, and what a known flow's packets seldom need
//! (other than a rewrite for a next hop that is ready) is left to a stage of its own; what tunnels and full NAT need of every packet is near
//! ([`near`]). Packets with options or extension headers are left to a stage, too, and then take the same way. Each packet leaves through one
//! [`Verdict`].

mod errors;
mod fragments;
mod wrapped;

use wrapped::into_tunnel;
pub use wrapped::tunnelled;

use ::core::hint::cold_path;

use crate::abi::{Dest, Hop, Iface, ServiceKey, config, dest, hop, service};
use crate::conn::{self, Conns, HitOf};
use crate::cookie;
use crate::ct::{self, Found, V4, V6};
use crate::far::{Extras, Far};
use crate::fullnat;
use crate::icmp::{Answer, Error};
use crate::limits;
use crate::near;
use crate::packet::{ETHERTYPE, Flow, Frame, Ip, L3, Packet, Window, parse, parse_far};
use crate::proto::{Way, sctp, tcp};
use crate::proxy;
use crate::sched;
use crate::tables::{Of, Route, Tables};
use crate::verdict::{Action, Reason, Stage, Verdict, drop, pass};
use crate::vlan::{self, Tags};
use crate::xmit::{self, End};

/// All of it, for callers that need no functions of their own for its stages.
#[inline(always)]
pub fn process<P: Frame, T: Tables>(p: &mut P, t: &T) -> Verdict {
    let (lower, mut tags) = (p.ifindex(), None);
    let mut family = arrive(p, &t.iface(lower));
    if is_tagged(family) {
        tags = vlan::untag(p, t);
        family = if tags.is_some() { untagged(arrive(p, &t.iface(p.ifindex()))) } else { Err(pass(Reason::NotIp)) };
    }
    let verdict = match family {
        Ok(4) => stages::<V4, P, T>(p, t),
        Ok(_) => stages::<V6, P, T>(p, t),
        Err(verdict) => verdict,
    };
    p.came_by(lower);
    if vlan::concerns(verdict, tags) { retag(p, t, verdict, tags) } else { verdict }
}

/// Of a frame whose tags, if there are more, are nobody's.
#[inline(always)]
pub fn untagged(family: Result<u8, Verdict>) -> Result<u8, Verdict> {
    if is_tagged(family) { Err(pass(Reason::NotIp)) } else { family }
}

/// Does the frame have a VLAN tag? (Then that is all that [`arrive`] said of it.)
#[inline(always)]
pub fn is_tagged(family: Result<u8, Verdict>) -> bool {
    family == Err(Verdict::TAGGED)
}

/// A packet whose verdict [`vlan::concerns`], as it leaves.
#[inline(always)]
pub fn retag<P: Frame, T: Tables>(p: &mut P, t: &T, verdict: Verdict, tags: Option<Tags>) -> Verdict {
    let reason = verdict.reason();
    match (verdict.action(), tags) {
        (Action::Up, Some(tags)) if vlan::tag_again(p, tags).is_some() => verdict,
        (Action::Out(ifindex), _) => match vlan::tag(p, t, ifindex & !hop::VLAN) {
            Some(lower) if lower == p.ifindex() => Verdict::new(Action::Back, reason),
            Some(lower) => Verdict::new(Action::Out(lower), reason),
            None => drop(Reason::NoRoute),
        },
        _ => drop(Reason::Internal),
    }
}

/// Stages of one packet at most: a new flow's first packet takes six (NAT) to ten (FULLNAT), and four or five more for each dest that can't take
/// it.
const STAGES: u32 = 14;

/// From stage to stage, until one has the verdict.
#[inline(always)]
fn stages<I: Of<T> + Answer + Extras, P: Frame, T: Tables>(p: &mut P, t: &T) -> Verdict {
    // Nearly always that is all.
    let first = run::<I, P, T>(p, t, Stage::Whole, 0);
    let near = near::go::<I, P, T>(p, t, first);
    further(near, |stage, number| run::<I, P, T>(p, t, stage, number))
}

/// ... after the first one.
#[inline(always)]
pub fn further(mut verdict: Verdict, mut run: impl FnMut(Stage, u32) -> Verdict) -> Verdict {
    let mut i = 1;
    while let Some((stage, number)) = verdict.next() {
        if i == STAGES {
            return drop(Reason::ReverseInUse);
        }
        verdict = run(stage, number);
        i += 1;
    }
    verdict
}

/// Is the frame, which came in by the interface in whose place `iface` is, for us to look at? The address family, 4 or 6.
#[inline(always)]
pub fn arrive<P: Packet>(p: &mut P, iface: &Iface) -> Result<u8, Verdict> {
    if iface.ifindex != p.ifindex() {
        return Err(pass(Reason::OtherInterface));
    }
    addressed(p, iface)
}

/// The same, when it is known to have come in by that interface.
#[inline(always)]
pub fn addressed<P: Packet>(p: &mut P, iface: &Iface) -> Result<u8, Verdict> {
    let Some(w) = p.window(L3) else { return Err(pass(Reason::NotIp)) };
    // The six bytes of a word of eight.
    const MAC: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    if (w.r64(0) ^ iface.mac) & MAC != 0 {
        return Err(pass(Reason::OtherMac));
    }
    const IPV4: u16 = 0x0800u16.to_be();
    const IPV6: u16 = 0x86ddu16.to_be();
    match w.r16(ETHERTYPE) {
        IPV4 => Ok(4),
        IPV6 => Ok(6),
        tag if vlan::is_tag(tag) => Err(Verdict::TAGGED),
        _ => Err(pass(Reason::NotIp)),
    }
}

/// A stage.
#[inline(always)]
pub fn run<I: Of<T> + Answer + Extras, P: Frame, T: Tables>(p: &mut P, t: &T, stage: Stage, number: u32) -> Verdict {
    match stage {
        // The hot path: plain packets only.
        Stage::Whole => {
            return match parse::<I, P>(p) {
                Ok(flow) => whole(p, t, &flow, stage),
                Err(verdict) => verdict,
            };
        }
        Stage::Stranger => return Verdict::passed(number),
        Stage::Related | Stage::ErrorTunnel | Stage::ErrorLent | Stage::ErrorOuter => {
            return match I::find(p) {
                Ok(place) => errors::related::<I, _, T>(&mut Far::<I, P>::new(p, place.by), t, place.by, stage, number),
                Err(verdict) => verdict,
            };
        }
        Stage::Large => return fragments::large(t, number),
        _ => {}
    }
    // What the packet says is kept when it may begin a flow.
    let (kept, cookie) = match stage {
        Stage::Far
        | Stage::FarReply
        | Stage::Fragment
        | Stage::Retire
        | Stage::Anew
        | Stage::TimeExceeded
        | Stage::Tunnel
        | Stage::TooBig => (None, 0),
        _ => (t.kept::<I>(), t.kept_cookie()),
    };
    if let Some(flow) = kept {
        return follow::<I, _, T>(&mut Far::<I, P>::new(p, usize::from(flow.by)), t, &flow, stage, number);
    }
    match parse_far::<I, P>(p) {
        Ok((mut far, flow)) => follow(&mut far, t, &Flow { cookie, ..flow }, stage, number),
        Err(verdict) => match errors::kept::<I, P, T>(p, t, stage) {
            Some(flow) => follow(&mut Far::<I, P>::new(p, 0), t, &flow, stage, number),
            None => verdict,
        },
    }
}

/// A stage of a packet whose flow is known.
#[inline(always)]
fn follow<I: Of<T> + Answer, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    flow: &Flow<I>,
    stage: Stage,
    number: u32,
) -> Verdict {
    match stage {
        Stage::Far if flow.part.is_later() => Verdict::go(Stage::Fragment, 0),
        Stage::Far if flow.part.is_first() && number == 0 => {
            t.keep(flow);
            Verdict::go(Stage::Note, 0)
        }
        Stage::Far => whole(p, t, flow, stage),
        Stage::FarReply => reply_apart(p, t, flow),
        Stage::Fragment => fragments::later(p, t, flow),
        Stage::Reject => errors::reject(p, t, flow),
        Stage::Early => fragments::early(t, flow),
        Stage::Elsewhere => fragments::elsewhere(t, flow, number),
        Stage::Retire => retire(t, flow),
        Stage::Linked => linked(p, t, flow, number),
        Stage::Forward | Stage::Anew => forward(p, t, flow, number),
        Stage::Tunnel => into_tunnel(p, t, flow, number, Reason::Tunnel),
        Stage::TimeExceeded => errors::answer(p, t, flow, Error::TimeExceeded, 0),
        Stage::PortUnreachable => errors::answer(p, t, flow, Error::PortUnreachable, 0),
        Stage::TooBig => errors::answer(p, t, flow, Error::TooBig, number),
        Stage::Challenge => cookie::challenge(p, t, flow, number),
        Stage::Knock => cookie::knock(p, t, flow, number),
        Stage::Fullnat => fullnat::request(p, t, flow, number),
        Stage::Introduce => fullnat::introduce(p, t, flow, number),
        Stage::FullnatReply => fullnat::reply(p, t, flow, number),
        Stage::Announce => proxy::announce(p, t, flow, number),
        Stage::ReplyOptions => fullnat::reply_options(p, t, flow, number),
        Stage::FullnatSend => fullnat::send(p, t, flow, number),
        _ => open(t, flow, stage, number),
    }
}

/// Those stages of a flow's beginning that do not need the packet.
#[inline(always)]
pub fn open<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, stage: Stage, number: u32) -> Verdict {
    match stage {
        Stage::First => fragments::after_first(t, flow, first(t, flow)),
        Stage::Note => fragments::first_fragment(t, flow),
        Stage::Enter => enter(t, flow, number),
        Stage::Link => link(I::conns(t), flow, number),
        Stage::Lend => fullnat::lend(t, flow, number),
        Stage::MakeWay => make_way(I::conns(t), flow, number),
        Stage::GiveUp => {
            conn::give_up::<I, _>(I::conns(t), &flow.key, number);
            drop(Reason::TableFull)
        }
        _ => drop(Reason::Internal),
    }
}

#[inline(always)]
fn whole<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, stage: Stage) -> Verdict {
    let c = I::conns(t);
    match ct::lookup::<I, _>(c.table(), &flow.key) {
        Found::Live(hit) if hit.control & ct::REVERSE != 0 => {
            if hit.control & ct::LINKED != 0 {
                t.keep(flow);
                return Verdict::go(Stage::FullnatReply, hit.slot::<I>());
            }
            if stage == Stage::Far {
                return Verdict::go(Stage::FarReply, 0);
            }
            match conn::follow::<I, _>(c, &flow.key, &hit) {
                Some(reply) => answer_client(p, t, c, flow, &hit, &reply),
                None => pass(Reason::NoService),
            }
        }
        Found::Live(hit) => established(p, t, c, flow, &hit),
        // Being entered or moved this instant: good for the dest.
        Found::Weak(control) => {
            cold_path();
            Verdict::go(Stage::Anew, conn::dest(control))
        }
        Found::None => begin(t, flow),
    }
}

/// A reply (NAT), in a stage that is about nothing else.
#[inline(always)]
fn reply_apart<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>) -> Verdict {
    let c = I::conns(t);
    let Found::Live(hit) = ct::lookup::<I, _>(c.table(), &flow.key) else { return pass(Reason::NoService) };
    if hit.control & (ct::REVERSE | ct::LINKED) != ct::REVERSE {
        return pass(Reason::NoService);
    }
    match conn::follow::<I, _>(c, &flow.key, &hit) {
        Some(reply) => answer_client(p, t, c, flow, &hit, &reply),
        None => pass(Reason::NoService),
    }
}

/// It may be the first packet of a flow.
#[inline(always)]
fn begin<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>) -> Verdict {
    t.keep(flow);
    Verdict::go(Stage::First, 0)
}

/// Is this entry's flow over, so that the packet begins another one?
#[inline(always)]
fn starts_anew<I: Ip, C: Conns<I>>(c: &C, flow: &Flow<I>, control: u64) -> bool {
    let state = ct::state(control);
    let reused = if flow.sctp {
        flow.flags == sctp::INIT && state == sctp::CLOSED
    } else {
        flow.flags & tcp::SYN != 0 && tcp::reusable(state)
    };
    reused || conn::expired(c.policy(), control, c.now_s())
}

/// Timed out, or closed and its ports used again: it makes room at once.
#[inline(always)]
fn retire<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>) -> Verdict {
    let c = I::conns(t);
    if let Found::Live(hit) = ct::lookup::<I, _>(c.table(), &flow.key)
        && hit.control & ct::REVERSE == 0
        && starts_anew(c, flow, hit.control)
        && hit.free::<I>()
    {
        c.release(&ct::Entry { words: flow.key.words, control: hit.control, slot: hit.slot::<I>() });
    }
    begin(t, flow)
}

/// A client's packet of a known flow.
#[inline(always)]
fn established<I: Of<T>, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    c: &I::Conns,
    flow: &Flow<I>,
    hit: &HitOf<'_, I, I::Conns>,
) -> Verdict {
    let way = way(hit.control & ct::LINKED != 0);
    let next = unchanged::<I, P>(flow, ct::state(hit.control), way);
    let current = conn::is_current::<I, _>(c, hit.control, flow.proto_by::<P>(), next, true);
    if !current && starts_anew(c, flow, hit.control) {
        cold_path();
        return Verdict::go(Stage::Retire, 0);
    }
    let index = conn::dest(hit.control);
    // A removed dest's flows are dropped and left to time out, as in the kernel.
    let Some(d) = t.dest(index) else { return drop(Reason::DestGone) };
    let (flags, hop) = (d.out as u32, (d.out >> 32) as u32);
    if flags & dest::AVAILABLE == 0 {
        cold_path();
        return drop(Reason::DestGone);
    }
    if !current {
        cold_path();
        let secure = has(t, config::SECURE_TCP);
        let _ = conn::touch::<I, _, _>(c, hit, &flow.key.words, true, |state| step::<I, P>(flow, state, way, secure));
    }
    match t.hop(hop) {
        // (A real server that is this host has none.)
        Some(hop) if hop.ifindex != 0 && flow.ttl > 1 => {
            t.count_in(index, flow.len);
            // The cheapest first: what they cost is what most packets cost.
            match flags & dest::METHOD {
                dest::ROUTE | dest::LOCAL_NODE => rewrite(p, flow, d, false, hop),
                dest::MASQ => rewrite(p, flow, d, true, hop),
                dest::TUNNEL => Verdict::go(Stage::Tunnel, index),
                dest::FULLNAT => {
                    t.keep(&Flow { dest: index, ..*flow });
                    Verdict::go(Stage::Fullnat, hit.slot::<I>())
                }
                _ => drop(Reason::Internal),
            }
        }
        _ => {
            cold_path();
            Verdict::go(Stage::Anew, index)
        }
    }
}

/// To a next hop that is known.
#[inline(always)]
fn rewrite<I: Ip, P: Packet>(p: &mut P, flow: &Flow<I>, d: &Dest, masq: bool, hop: &Hop) -> Verdict {
    let (done, reason) = if masq {
        let (address, port) = server(flow, d);
        (xmit::translate::<I, P>(p, flow, End::Destination, address, port, true), Reason::Masq)
    } else {
        (xmit::count_down::<I, P>(p), Reason::Route)
    };
    if done { xmit::send(p, hop, reason) } else { drop(Reason::Internal) }
}

/// Address and port of the server, for the methods that translate.
#[inline(always)]
pub fn server<I: Ip>(flow: &Flow<I>, d: &Dest) -> (I::Addr, u16) {
    (I::from_address(&d.address), if d.port == 0 { flow.key.dport() } else { d.port })
}

/// Of a client's packet: do replies go by us?
#[inline(always)]
fn way(linked: bool) -> Way {
    if linked { Way::Input } else { Way::InputOnly }
}

/// The state after this packet, which shows as a `P`.
#[inline(always)]
fn step<I: Ip, P: Packet>(flow: &Flow<I>, state: u64, way: Way, secure: bool) -> u64 {
    if P::SCTP && flow.sctp {
        sctp::next(state, flow.flags, way)
    } else if flow.tcp {
        tcp::next(state, flow.flags, way, secure)
    } else {
        0
    }
}

/// The same if it is the one before it, else any other number: most packets change nothing, and then need not know more.
#[inline(always)]
fn unchanged<I: Ip, P: Packet>(flow: &Flow<I>, state: u64, way: Way) -> u64 {
    if P::SCTP && flow.sctp {
        sctp::next(state, flow.flags, way)
    } else if flow.tcp {
        tcp::unchanged(state, flow.flags, way)
    } else {
        0
    }
}

/// Is this bit of [`config`] set?
#[inline(always)]
fn has<T: Tables>(t: &T, flag: u32) -> bool {
    t.config().flags & flag != 0
}

/// A packet of no known flow: enter it, if it is for a virtual service and may open one. It then is the first packet of that flow.
#[inline(always)]
fn first<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>) -> Verdict {
    if has(t, config::ELDER) {
        return pass(Reason::NoConnection);
    }
    let key = ServiceKey {
        address: I::bytes(flow.destination()),
        port: flow.key.dport(),
        protocol: flow.protocol(),
        family: I::FAMILY,
    };
    let Some(index) = t.service_index(&key) else { return errors::no_service(t, flow) };
    let Some(s) = t.service(index) else { return drop(Reason::Internal) };
    if s.flags & (service::LOCAL | service::NONLOCAL) == 0 {
        return pass(Reason::NotLocal);
    }
    // tcp_conn_schedule: a RST never, anything else only with SYN; sctp_conn_schedule: INIT. Of an error that is not asked.
    if flow.error {
        if flow.tcp && s.cookies != 0 {
            // Nobody has proved anything by it.
            return pass(Reason::Icmp);
        }
    } else if flow.tcp && flow.flags & (tcp::SYN | tcp::RST) != tcp::SYN || flow.sctp && flow.flags != sctp::INIT {
        let sloppy = if flow.tcp { config::SLOPPY_TCP } else { config::SLOPPY_SCTP };
        let proves = flow.tcp && s.asks() && flow.flags & (tcp::SYN | tcp::RST | tcp::ACK) == tcp::ACK;
        if proves {
            return Verdict::go(Stage::Knock, cookie::PROVE);
        }
        if !has(t, sloppy) || flow.tcp && flow.flags & tcp::RST != 0 {
            return pass(Reason::NoConnection);
        }
    }
    let rate = t.config().drop_rate;
    // ip_vs_todrop: the first one, and then every so many.
    if rate != 0 && t.begun().is_multiple_of(u64::from(rate)) {
        return drop(Reason::DropPacket);
    }
    if I::martian(flow.source()) || flow.source() == flow.destination() {
        return drop(Reason::Martian);
    }
    if s.is_limited()
        && let Some(verdict) = limits::refuse::<I, T>(t, index, s, flow)
    {
        return verdict;
    }
    match sched::pick(t, index, s, flow) {
        Some(dest) => Verdict::go(Stage::Enter, dest),
        None if flow.error => drop(Reason::NoDestLimited),
        None => Verdict::go(Stage::PortUnreachable, 0),
    }
}

/// Enter the flow for the dest that the scheduler chose.
#[inline(always)]
fn enter<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, dest: u32) -> Verdict {
    let Some(d) = t.dest(dest) else { return drop(Reason::Internal) };
    let lent = d.lends();
    let linked = is_nat(d) || lent;
    // In the state that this packet, its first, puts it in. An error puts it in none.
    let state = if flow.error {
        tcp::NONE
    } else if flow.sctp {
        sctp::next(sctp::NONE, flow.flags, way(linked))
    } else if flow.tcp {
        tcp::next(tcp::NONE, flow.flags, way(linked), has(t, config::SECURE_TCP))
    } else {
        0
    };
    let marks = if linked { ct::LINKED } else { 0 } | if lent && flow.cookie != 0 { conn::PROVEN } else { 0 };
    let done = conn::open_forward::<I, _>(I::conns(t), &flow.key, dest, state, marks);
    if done.is_new() {
        if linked {
            return Verdict::go(if lent { Stage::Lend } else { Stage::Link }, done.slot());
        }
        t.count_connection(dest);
        if flow.error {
            return Verdict::go(Stage::Related, 0);
        }
        // A first fragment goes as one of a known flow now, and leaves a note.
        return if flow.part.is_first() { Verdict::go(Stage::Far, 0) } else { Verdict::go(Stage::Forward, dest) };
    }
    // Another CPU was faster, or all is full.
    if done.is_there() { Verdict::go(Stage::Whole, 0) } else { drop(Reason::TableFull) }
}

#[inline(always)]
fn link<I: Ip, C: Conns<I>>(c: &C, flow: &Flow<I>, place: conn::Place) -> Verdict {
    let done = conn::link::<I, _>(c, &flow.key, place);
    if done.is_new() {
        Verdict::go(Stage::Linked, place)
    } else if done.is_there() {
        Verdict::go(Stage::MakeWay, place)
    } else {
        Verdict::go(Stage::GiveUp, place)
    }
}

/// A NAT flow's first packet, its entries being made. (Not counted before: a flow given up for its reply tuple was no connection.)
#[inline(always)]
fn linked<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, place: conn::Place) -> Verdict {
    let Some(dest) = conn::dest_at::<I, _>(I::conns(t), &flow.key, place) else { return Verdict::go(Stage::Whole, 0) };
    t.count_connection(dest);
    if flow.error {
        return Verdict::go(Stage::Related, 0);
    }
    if flow.part.is_first() { Verdict::go(Stage::Far, 0) } else { forward(p, t, flow, dest) }
}

/// Packets are addressed to the real server, and its replies go by us to the client.
#[inline(always)]
fn is_nat(d: &Dest) -> bool {
    let flags = d.out as u32;
    flags & dest::METHOD == dest::MASQ || flags & (dest::METHOD | dest::LOCAL) == dest::FULLNAT | dest::LOCAL
}

#[inline(always)]
fn make_way<I: Ip, C: Conns<I>>(c: &C, flow: &Flow<I>, place: conn::Place) -> Verdict {
    match conn::make_way::<I, _>(c, &flow.key, place, true) {
        Some(place) => Verdict::go(Stage::Link, place),
        // The reply tuple is another flow's: another dest, for as long as there are stages.
        None => Verdict::go(Stage::First, 0),
    }
}

/// To the dest, by its method, whatever it takes.
#[inline(always)]
fn forward<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, index: u32) -> Verdict {
    let Some(d) = t.dest(index) else { return drop(Reason::Internal) };
    let flags = d.out as u32;
    if flags & dest::AVAILABLE == 0 {
        return drop(Reason::DestGone);
    }
    t.count_in(index, flow.len);
    let masq = is_nat(d);
    if flags & dest::LOCAL != 0 {
        return deliver(p, flow, d, masq);
    }
    if flow.ttl <= 1 {
        return if flow.part.is_later() { drop(Reason::TtlLimited) } else { Verdict::go(Stage::TimeExceeded, 0) };
    }
    if d.lends() {
        if flow.part.is_later() {
            // (The first one went another way: the method was changed.)
            return drop(Reason::Entering);
        }
        t.keep(flow);
        return match ct::lookup::<I, _>(I::conns(t).table(), &flow.key) {
            Found::Live(hit) => Verdict::go(Stage::Fullnat, hit.slot::<I>()),
            _ => drop(Reason::Entering),
        };
    }
    if flags & dest::METHOD == dest::TUNNEL {
        return Verdict::go(Stage::Tunnel, index);
    }
    let address = I::from_address(&d.address);
    let mut hop = t.hop((d.out >> 32) as u32).copied().unwrap_or_default();
    let route = match hop.ifindex {
        0 => t.route::<I>([flow.source(), address], flow.protocol(), flow.len, &mut hop),
        _ => Route::Hop,
    };
    let resolve = route == Route::NoNeighbour && t.resolves();
    if masq {
        let (address, port) = server(flow, d);
        let ready = route == Route::Hop || resolve;
        if !xmit::translate_any::<I, P>(p, flow, End::Destination, address, port, ready) {
            return drop(Reason::Internal);
        }
    }
    match route {
        Route::Hop if masq => xmit::send(p, &hop, Reason::Masq),
        Route::Hop => {
            if !xmit::count_down::<I, P>(p) {
                return drop(Reason::Internal);
            }
            xmit::send(p, &hop, Reason::Route)
        }
        Route::NoNeighbour if resolve => {
            if !masq && !xmit::count_down::<I, P>(p) {
                return drop(Reason::Internal);
            }
            Verdict::resolve(hop.ifindex, if masq { Reason::Masq } else { Reason::Route })
        }
        // The kernel resolves the neighbour and forwards: the packet is addressed to the real server already.
        _ if masq => Verdict::new(Action::Up, Reason::ByKernel),
        Route::NoNeighbour => drop(Reason::NoNeighbour),
        _ => drop(Reason::NoRoute),
    }
}

/// The real server is this host: up, translated if it listens elsewhere.
#[inline(always)]
fn deliver<I: Ip, P: Packet>(p: &mut P, flow: &Flow<I>, d: &Dest, masq: bool) -> Verdict {
    if d.proxied() {
        // It would wait for a header that does not come.
        return drop(Reason::ProxyLocal);
    }
    if masq {
        let (address, port) = server(flow, d);
        if I::martian(address) {
            return drop(Reason::LoopbackDest);
        }
        if !xmit::translate_any::<I, P>(p, flow, End::Destination, address, port, false) {
            return drop(Reason::Internal);
        }
    }
    Verdict::new(Action::Up, Reason::Local)
}

/// A real server's reply (NAT): from the virtual address, to the client.
#[inline(always)]
fn answer_client<I: Of<T>, P: Packet, T: Tables>(
    p: &mut P,
    t: &T,
    c: &I::Conns,
    flow: &Flow<I>,
    reverse: &HitOf<'_, I, I::Conns>,
    reply: &conn::ReplyOf<'_, I, I::Conns>,
) -> Verdict {
    // As ip_forward would have done before IPVS sees the reply.
    if flow.ttl <= 1 {
        return pass(Reason::ReplyTtl);
    }
    let control = replied::<I, P, T>(t, c, flow, reply);
    // The way to the client is looked up once a second for a busy flow, and then remembered by the reverse entry.
    let number = conn::hop(reverse.control);
    let known = t.reply_hop(number).copied().unwrap_or_default();
    let same_second = (control ^ reply.forward.control) & !ct::STATE == 0;
    let (mut hop, mut route, mut keep) = (known, Route::Hop, number);
    if known.ifindex == 0 || !same_second {
        route = t.route::<I>([reply.virtual_address, reply.client], flow.protocol(), flow.len, &mut hop);
        keep = match route {
            Route::Hop if hop == known => number,
            Route::Hop => t.keep_reply_hop(&hop),
            _ => 0,
        };
    }
    conn::remember::<I, _, _>(c, &flow.key, reverse, control, keep);
    let resolve = route == Route::NoNeighbour && t.resolves();
    let ready = route == Route::Hop || resolve;
    if !xmit::translate::<I, P>(p, flow, End::Source, reply.virtual_address, reply.virtual_port, ready) {
        return drop(Reason::Internal);
    }
    xmit::leave(p, route, resolve, &hop, Reason::MasqReply)
}

/// State, age and counters for a reply. The forward entry's control word as it is now.
#[inline(always)]
pub fn replied<I: Of<T>, P: Packet, T: Tables>(
    t: &T,
    c: &I::Conns,
    flow: &Flow<I>,
    reply: &conn::ReplyOf<'_, I, I::Conns>,
) -> u64 {
    let mut control = reply.forward.control;
    let next = unchanged::<I, P>(flow, ct::state(control), Way::Output);
    if !conn::is_current::<I, _>(c, control, flow.proto_by::<P>(), next, false) {
        let (words, secure) = (I::words(reply.client, reply.virtual_address), has(t, config::SECURE_TCP));
        let done = conn::touch::<I, _, _>(c, &reply.forward, &words, false, |state| {
            step::<I, P>(flow, state, Way::Output, secure)
        });
        control = done.unwrap_or(control);
    }
    t.count_out(conn::dest(control), flow.len);
    control
}

/// A packet that this host itself sends, on its way out (LOCAL_OUT): the reply of a real server that is this host gets its virtual
/// address. It is routed already, so that only the source changes. `None`: not ours, and untouched.
#[inline(always)]
pub fn leave<I: Of<T> + Extras, P: Frame, T: Tables>(p: &mut P, t: &T) -> Option<Verdict> {
    let (mut far, flow) = parse_far::<I, P>(p).ok()?;
    let p = &mut far;
    let c = I::conns(t);
    if flow.part.is_later() {
        return fragments::leave(p, t, &flow);
    }
    let Found::Live(reverse) = ct::lookup::<I, _>(c.table(), &flow.key) else { return None };
    if reverse.control & ct::REVERSE == 0 {
        return None;
    }
    let reply = conn::follow::<I, _>(c, &flow.key, &reverse)?;
    if flow.part.is_first()
        && let note = fragments::reply_note::<I>(conn::dest(reply.forward.control), reply.virtual_address, None)
        && let Some(reason) = fragments::note(t, &flow, note, reply.virtual_port)
    {
        return Some(drop(reason));
    }
    let control = replied::<I, Far<I, P>, T>(t, c, &flow, &reply);
    conn::remember::<I, _, _>(c, &flow.key, &reverse, control, conn::hop(reverse.control));
    if !xmit::translate::<I, _>(p, &flow, End::Source, reply.virtual_address, reply.virtual_port, false) {
        return Some(drop(Reason::Internal));
    }
    Some(Verdict::new(Action::Up, Reason::MasqReply))
}
