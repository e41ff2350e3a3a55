//! The way of fragments: see [`crate::frag`].

use super::{forward, is_nat, server, starts_anew};
use crate::abi::Hop;
use crate::conn::{self, Conns};
use crate::ct::{self, Found};
use crate::frag::{self, Note};
use crate::packet::{Flow, Ip, Packet};
use crate::tables::{Of, Route, Tables};
use crate::verdict::{Reason, Stage, Verdict, drop, pass};
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
        // By full NAT: what follows is not translated yet, and is told apart by its note.
        Found::Live(hit) if conn::fullnat::is_lent::<I, _>(c, hit.control) && hit.control & ct::REVERSE != 0 => {
            match conn::fullnat::follow::<I, _>(c, &flow.key, &hit) {
                Some((reply, _)) => note(t, flow, conn::dest(reply.forward.control), None),
                None => None,
            }
        }
        Found::Live(hit) if hit.control & ct::REVERSE != 0 => match conn::follow::<I, _>(c, &flow.key, &hit) {
            Some(reply) => {
                let from = (reply.virtual_address, reply.virtual_port);
                note(t, flow, conn::dest(reply.forward.control), Some(from))
            }
            None => None,
        },
        // What is over begins anew, perhaps with another dest.
        Found::Live(hit) if starts_anew(c, flow, hit.control) => None,
        Found::Live(hit) => note(t, flow, conn::dest(hit.control), None),
        _ => None,
    };
    match refused {
        None => Verdict::go(Stage::Far, 1),
        Some(reason) => drop(reason),
    }
}

/// A first fragment leaves word for those after it; of a reply (NAT) by the virtual address and port that it is from. `Some`: why the datagram goes
/// nowhere.
#[inline(always)]
pub(super) fn note<I: Of<T>, T: Tables>(
    t: &T,
    flow: &Flow<I>,
    dest: u32,
    reply_from: Option<(I::Addr, u16)>,
) -> Option<Reason> {
    if flow.sctp && changes_port(t, flow, dest, reply_from) {
        // How long the whole is, which its checksum is about, is not known yet.
        return Some(Reason::FragmentSctp);
    }
    let address = reply_from.map(|(address, _)| address);
    let end = flow.transport_len() / 8;
    let note = Note { dest, reply: address.is_some(), virtual_address: I::pair(address), end: end as u16 };
    // Or they could not be told from another datagram's.
    (!t.leave_note(&datagram(flow), &note)).then_some(Reason::FragmentConflict)
}

/// Does the flow's packet leave with another port?
#[inline(always)]
fn changes_port<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, dest: u32, reply_from: Option<(I::Addr, u16)>) -> bool {
    match (reply_from, t.dest(dest)) {
        (Some((_, port)), _) => port != flow.key.sport(),
        (None, Some(d)) => d.lends() || is_nat(d) && server(flow, d).1 != flow.key.dport(),
        (None, None) => false,
    }
}

/// A fragment that is not the first one: after that.
#[inline(always)]
pub(super) fn later<I: Of<T>, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>) -> Verdict {
    match t.find_note(&datagram(flow)) {
        frag::Found::None => pass(Reason::Fragment),
        frag::Found::Conflict => drop(Reason::FragmentConflict),
        frag::Found::Note(note) if flow.part.at() < note.end => drop(Reason::FragmentOverlap),
        frag::Found::Note(note) if note.reply => later_reply(p, t, flow, &note),
        frag::Found::Note(note) => forward(p, t, flow, note.dest),
    }
}

/// ... of a real server's reply (NAT).
#[inline(always)]
fn later_reply<I: Ip, P: Packet, T: Tables>(p: &mut P, t: &T, flow: &Flow<I>, note: &Note) -> Verdict {
    if flow.ttl <= 1 {
        return pass(Reason::ReplyTtl);
    }
    t.count_out(note.dest, flow.len);
    let (from, mut hop) = (I::from_pair(note.virtual_address), Hop::default());
    let route = t.route::<I>([from, flow.destination()], flow.protocol(), flow.len, &mut hop);
    let resolve = route == Route::NoNeighbour && t.resolves();
    if !xmit::translate_any::<I, P>(p, flow, End::Source, from, 0, route == Route::Hop || resolve) {
        return drop(Reason::Internal);
    }
    xmit::leave(p, route, resolve, &hop, Reason::MasqReply)
}
