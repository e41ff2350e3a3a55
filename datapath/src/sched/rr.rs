//! rr: the next eligible dest of the list after the one taken last (`ip_vs_rr_schedule`).

use super::{List, Tries, eligible};
use crate::tables::{Machine, Tables, Walker};

struct Walk {
    list: List,
    last: u32,
    found: u64,
}

#[inline(always)]
pub fn pick<T: Tables>(t: &T, index: u32, list: List) -> Option<u32> {
    let mut tries = Tries::default();
    loop {
        let last_try = tries.next();
        let old = t.machine(index, Machine::Rr);
        // Nearly always the very next one.
        let last = (old as u32).min(list.count);
        let next = if last >= list.count { 1 } else { last + 1 };
        let first = list.at(t, next)?;
        let (place, dest) = if list.count > 0 && eligible(t, &first) {
            (next, first.dest)
        } else {
            let mut walk = Walk { list, last: next, found: 0 };
            t.walk(list.count, &mut walk);
            if walk.found == 0 {
                return None;
            }
            ((walk.found >> 32) as u32, walk.found as u32)
        };
        // If another CPU took this turn, take the next; after some tries this one all the same.
        if t.advance(index, Machine::Rr, old, u64::from(place)) || last_try {
            return Some(dest);
        }
    }
}

impl<T: Tables> Walker<T> for Walk {
    /// True: found.
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        let w = self;
        let place = (w.last + i) % w.list.count.max(1) + 1;
        match w.list.at(t, place) {
            Some(e) if eligible(t, &e) => {
                w.found = u64::from(place) << 32 | u64::from(e.dest);
                true
            }
            _ => false,
        }
    }
}
