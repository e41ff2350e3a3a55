//! The way of fragments: see [`crate::frag`].

use super::{forward, is_nat, server, starts_anew};
use crate::abi::{Dest, HANDED_MAX, Hop, dest, watched};
use crate::conn::{self, Conns, HitOf};
use crate::ct::{self, Found};
use crate::frag::{self, Kind, Note};
use crate::packet::{Flow, Ip, L3, Packet};
use crate::tables::{Of, Route, Tables};
use crate::verdict::{Action, Reason, Stage, Verdict, drop, pass, stranger};
use crate::xmit::{self, End};

/// Of which datagram this fragment is.
#[inline(always)]
pub(super) fn datagram<I: Ip>(flow: &Flow<I>) -> frag::Key {
    frag::Key::new(I::slice(&flow.key.words), flow.part.id(), I::FAMILY, flow.protocol())
}

/// A first fragment: where it goes, those after it will. (Of no connection yet it comes here once more when that is made.)
#[inline(always)]
pub(super) fn first_fragment<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>) -> Verdict {
    let c = I::conns(t);
    let refused = match ct::lookup::<I, _>(c.table(), &flow.key) {
        Found::Live(hit) if conn::fullnat::is_lent::<I, _>(c, hit.control) => lent(t, c, flow, &hit),
        Found::Live(hit) if hit.control & ct::REVERSE != 0 => match conn::follow::<I, _>(c, &flow.key, &hit) {
            Some(reply) => {
                let dest = conn::dest(reply.forward.control);
                note(t, flow, reply_note::<I>(dest, reply.virtual_address, None), reply.virtual_port)
            }
            None => None,
        },
        // What is over begins anew, perhaps with another dest.
        Found::Live(hit) if starts_anew(c, flow, hit.control) => None,
        Found::Live(hit) => note_request(t, flow, conn::dest(hit.control), None),
        // If it begins a connection it comes here once more.
        _ => None,
    };
    match refused {
        None => Verdict::go(Stage::Far, 1),
        Some(reason) => drop(reason),
    }
}

/// ... by FULLNAT, there and back.
#[inline(always)]
fn lent<'a, I: Of<T>, T: Tables>(
    t: &T,
    c: &'a I::Conns,
    flow: &Flow<I>,
    hit: &HitOf<'a, I, I::Conns>,
) -> Option<Reason> {
    if hit.control & ct::REVERSE != 0 {
        let (reply, _) = conn::fullnat::follow::<I, _>(c, &flow.key, hit)?;
        let dest = conn::dest(reply.forward.control);
        return note(t, flow, reply_note::<I>(dest, reply.virtual_address, Some(reply.client)), reply.virtual_port);
    }
    if starts_anew(c, flow, hit.control) {
        return None;
    }
    let side = conn::fullnat::side::<I, _>(c, hit.slot::<I>(), &flow.key)?;
    note_request(t, flow, conn::dest(hit.control), Some(side.address))
}

/// The note of a reply, from the virtual address; by FULLNAT to the client.
#[inline(always)]
pub(super) fn reply_note<I: Ip>(dest: u32, from: I::Addr, to: Option<I::Addr>) -> Note {
    let (source, destination) = (I::pair(Some(from)), I::pair(to));
    Note { source, destination, dest, end: 0, kind: Kind::Reply }
}

/// Leave the note of a client's datagram; `source`: the local address, by FULLNAT.
#[inline(always)]
fn note_request<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, dest: u32, source: Option<I::Addr>) -> Option<Reason> {
    let port = match t.dest(dest) {
        Some(d) if d.lends() || is_nat(d) => server(flow, d).1,
        _ => flow.key.dport(),
    };
    note(t, flow, Note { source: I::pair(source), destination: [0; 2], dest, end: 0, kind: Kind::Request }, port)
}

/// A first fragment leaves word for those after it. `port`: the one that it leaves with, in the place of the virtual server's. `Some`: why the
/// datagram goes nowhere.
#[inline(always)]
pub(super) fn note<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, note: Note, port: u16) -> Option<Reason> {
    let reply = note.kind == Kind::Reply;
    let own = if reply { flow.key.sport() } else { flow.key.dport() };
    let lent = if reply { note.destination } else { note.source };
    if flow.sctp && (port != own || lent != [0; 2]) {
        // How long the whole is, which its checksum is about, is not known yet.
        return Some(Reason::FragmentSctp);
    }
    let note = Note { end: (flow.transport_len() / 8) as u16, ..note };
    // Or they could not be told from another datagram's.
    (!t.leave_note(&datagram(flow), &note)).then_some(Reason::FragmentConflict)
}

/// A fragment that is not the first one: after that.
#[inline(always)]
pub(super) fn later<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>) -> Verdict {
    match t.find_note(&datagram(flow)) {
        frag::Found::None if t.takes() => {
            t.keep(flow);
            Verdict::go(Stage::Early, 0)
        }
        frag::Found::None => stranger(Reason::Fragment),
        frag::Found::Elsewhere => pass(Reason::Fragment),
        frag::Found::Conflict => drop(Reason::FragmentConflict),
        frag::Found::Note(note) if flow.part.at() < note.end => drop(Reason::FragmentOverlap),
        frag::Found::Note(note) if note.kind == Kind::Reply => later_reply(p, t, flow, &note),
        frag::Found::Note(note) if note.source != [0; 2] => later_lent(p, t, flow, &note),
        frag::Found::Note(note) => forward(p, t, flow, note.dest),
    }
}

/// ... before that: the daemon holds it if it may be for us, and sends it through the programs once more when there is a note. All else is the
/// kernel's.
#[inline(always)]
pub(super) fn early<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>) -> Verdict {
    if !may_be_ours(t, flow) {
        return pass(Reason::Fragment);
    }
    let fits = flow.len + L3 as u32 <= HANDED_MAX;
    drop(if fits && t.hand(Some(&datagram(flow)), 0) { Reason::FragmentHeld } else { Reason::FragmentFlood })
}

/// What may be the first packet of a connection, with its verdict. If it is a first fragment that is none of ours, those after it may have come before it,
/// and wait: it goes on in a stage that tells them.
#[inline(always)]
pub(super) fn after_first<I: Ip, T: Tables>(t: &T, flow: &Flow<I>, verdict: Verdict) -> Verdict {
    let tells = flow.part.is_first() && verdict.is_up() && t.takes();
    if tells { Verdict::go(Stage::Elsewhere, verdict.word() as u32) } else { verdict }
}

/// A first fragment that is none of ours, as the verdict says whose low half this is: those that are held for it are, too.
#[inline(always)]
pub(super) fn elsewhere<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, verdict: u32) -> Verdict {
    if may_be_ours(t, flow) {
        t.leave_note(&datagram(flow), &Note::ELSEWHERE);
    }
    Verdict::from_word(u64::from(verdict))
}

/// A reply of a real server that is this host, as it leaves: after the first fragment.
#[inline(always)]
pub(super) fn leave<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>) -> Option<Verdict> {
    let frag::Found::Note(note) = t.find_note(&datagram(flow)) else { return None };
    if note.kind != Kind::Reply || flow.part.at() < note.end {
        return None;
    }
    t.count_out(note.dest, flow.len);
    let from = I::from_pair(note.source);
    let done = xmit::translate_any::<I, _>(p, flow, End::Source, from, 0, false);
    Some(if done { Verdict::new(Action::Up, Reason::MasqReply) } else { drop(Reason::Internal) })
}

/// As far as a fragment without ports says.
#[inline(always)]
fn may_be_ours<I: Ip, T: Tables>(t: &T, flow: &Flow<I>) -> bool {
    t.watched::<I>(flow.destination()) & watched::DESTINATION != 0
        || t.watched::<I>(flow.source()) & watched::SOURCE != 0
}

/// Too large for a tunnel, and allowed to be cut. That is done before it goes in, as by a router whose way on is the tunnel: each part is a packet of
/// its own then, and the real server need not put outer packets together.
#[inline(always)]
pub(super) fn large<T: Tables>(t: &T, room: u32) -> Verdict {
    drop(if t.hand(None, room) { Reason::Cut } else { Reason::TooBig })
}

/// ... of a client's datagram by FULLNAT.
#[inline(always)]
fn later_lent<I: Ip, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, note: &Note) -> Verdict {
    let Some(d) = t.dest(note.dest) else { return drop(Reason::Internal) };
    if d.out as u32 & dest::AVAILABLE == 0 {
        return drop(Reason::DestGone);
    }
    t.count_in(note.dest, flow.len);
    if flow.ttl <= 1 {
        return drop(Reason::TtlLimited);
    }
    let (source, to) = (I::from_pair(note.source), I::from_address(&d.address));
    let mut hop = t.hop((d.out >> 32) as u32).copied().unwrap_or_default();
    let route = match hop.ifindex {
        0 => t.route::<I>([source, to], flow.protocol(), flow.len, &mut hop),
        _ => Route::Hop,
    };
    let resolve = route == Route::NoNeighbour && t.resolves();
    if route != Route::Hop && !resolve {
        return drop(if route == Route::NoNeighbour { Reason::NoNeighbour } else { Reason::NoRoute });
    }
    if !xmit::readdress_later::<I, P>(p, Some(source), Some(to), true) {
        return drop(Reason::Internal);
    }
    xmit::leave(p, route, resolve, &hop, if d.lends_own() { Reason::Masq } else { Reason::Fullnat })
}

/// ... of a real server's reply (NAT, FULLNAT).
#[inline(always)]
fn later_reply<I: Ip, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, note: &Note) -> Verdict {
    if flow.ttl <= 1 {
        return pass(Reason::ReplyTtl);
    }
    t.count_out(note.dest, flow.len);
    let lent = note.destination != [0; 2];
    let from = I::from_pair(note.source);
    let to = if lent { I::from_pair(note.destination) } else { flow.destination() };
    let mut hop = Hop::default();
    let route = t.route::<I>([from, to], flow.protocol(), flow.len, &mut hop);
    let resolve = route == Route::NoNeighbour && t.resolves();
    if !xmit::readdress_later::<I, P>(p, Some(from), Some(to), route == Route::Hop || resolve) {
        return drop(Reason::Internal);
    }
    let own = !lent || t.dest(note.dest).is_some_and(Dest::lends_own);
    xmit::leave(p, route, resolve, &hop, if own { Reason::MasqReply } else { Reason::FullnatReply })
}
