//! What a service may be asked for in a second, by all its clients and by one of them; and from when on it asks back (`cookie`).

use crate::abi::{RATES_MAX, Service, service};
use crate::conn::Conns;
use crate::cookie::siphash;
use crate::fullnat::told_length;
use crate::packet::Flow;
use crate::proxy;
use crate::tables::{Machine, Of, Tables};
use crate::verdict::{Reason, Stage, Verdict, drop};

/// A packet that may begin a connection: what becomes of it, if not that. Services without limits do not come here.
#[inline(always)]
pub fn refuse<I: Of<T>, T: Tables>(t: &T, index: u32, s: &Service, flow: &Flow<I>) -> Option<Verdict> {
    let now_s = I::conns(t).now_s();
    // Who has brought a cookie back is whom it says.
    if s.asks() && flow.tcp && flow.cookie == 0 && !another(t, index, Machine::Asked, now_s, s.cookies - 1) {
        let room = if s.flags & service::PROXY != 0 { proxy::length::<I>() } else { told_length::<I>() };
        return Some(Verdict::go(Stage::Challenge, room as u32));
    }
    if s.source_rate != 0 && !another_of(t, flow, now_s, s.source_rate) {
        return Some(drop(Reason::SourceRate));
    }
    (s.rate != 0 && !another(t, index, Machine::Begun, now_s, s.rate)).then_some(drop(Reason::ServiceRate))
}

/// One more this second, if it is not more than `most`. Races that are lost are not counted.
#[inline(always)]
fn another<T: Tables>(t: &T, service: u32, which: Machine, now_s: u32, most: u32) -> bool {
    let old = t.machine(service, which);
    let so_far = if (old >> 32) as u32 == now_s { old as u32 } else { 0 };
    if so_far >= most {
        return false;
    }
    let _ = t.advance(service, which, old, u64::from(now_s) << 32 | u64::from(so_far + 1));
    true
}

/// The same for one client: an IPv4 address, or the /64 of an IPv6 one.
///
/// ```text
/// second:32 | tag:16 | count:16
/// ```
/// One word stands for many clients, and belongs to the one that is met there most: whoever else comes by takes one from the count. So a
/// client is never refused for what others did, and one that does much is found among many that do little.
#[inline(always)]
fn another_of<I: Of<T>, T: Tables>(t: &T, flow: &Flow<I>, now_s: u32, most: u32) -> bool {
    let [source, _] = I::pair(Some(flow.source()));
    let hash = siphash(&t.config().seed, &[], [source, u64::from(I::FAMILY)]);
    let place = hash as u32 & (RATES_MAX - 1);
    let tag = hash >> 48;
    let old = t.rate(place);
    let (second, owner, count) = ((old >> 32) as u32, old >> 16 & 0xffff, old & 0xffff);
    let (owner, count) = if second != now_s || count == 0 {
        (tag, 1)
    } else if owner != tag {
        (owner, count - 1)
    } else if count >= u64::from(most) {
        return false;
    } else {
        (owner, (count + 1).min(0xffff))
    };
    let _ = t.swap_rate(place, old, u64::from(now_s) << 32 | owner << 16 | count);
    true
}
