//! wrr: the kernel's machine of list position and current weight (`ip_vs_wrr_schedule`), in one word.
//!
//! ```text
//! loop: the next dest after the position with weight >= current weight, not overloaded: take it
//!       at the end of the list: current weight -= gcd; if <= 0: back to the largest
//! ```
//! The control plane puts the machine back to the head of the list, and fits the current weight, when a list or weight changes
//! (`ip_vs_wrr_dest_changed`).

use super::{List, Tries, eligible};
use crate::tables::{Machine, Tables, Walker};

struct Walk {
    list: List,
    place: u32,
    current: u32,
    divisor: u32,
    largest: u32,
    /// Not 0: a pass for the smallest weight is over, or under way: nobody after it.
    last_pass: u32,
    dest: u32,
}

/// Steps of the machine at most: each pass of the list takes one weight level, and the levels of one turn are few in practice.
const STEPS: u32 = 1 << 16;

#[inline(always)]
pub fn pick<T: Tables>(t: &T, index: u32, list: List) -> Option<u32> {
    let head = list.at(t, 0)?;
    if head.weight == 0 || list.count == 0 {
        return None;
    }
    let mut tries = Tries::default();
    loop {
        let last_try = tries.next();
        let old = t.machine(index, Machine::Wrr);
        let mut walk = Walk {
            list,
            place: (old as u32).min(list.count),
            current: (old >> 32) as u32,
            divisor: head.dest,
            largest: head.weight,
            last_pass: t.blur(0, list.count),
            dest: 0,
        };
        if walk.current == 0 || walk.current > walk.largest {
            walk.current = walk.largest;
        }
        t.walk(STEPS, &mut walk);
        if walk.dest == 0 {
            return None;
        }
        let new = u64::from(walk.place) | u64::from(walk.current) << 32;
        // If another CPU took this turn, take the next; after some tries this one all the same.
        if t.advance(index, Machine::Wrr, old, new) || last_try {
            return Some(walk.dest);
        }
    }
}

impl<T: Tables> Walker<T> for Walk {
    #[inline(always)]
    fn step(&mut self, t: &T, _: u32) -> bool {
        let w = self;
        if w.place >= w.list.count {
            // The end of the list: the next weight level.
            w.place = t.blur(0, w.current);
            if w.current <= w.divisor {
                if w.last_pass != 0 {
                    return true;
                }
                w.last_pass = 1;
                w.current = w.largest;
            } else {
                w.current -= w.divisor;
            }
            return false;
        }
        w.place += 1;
        match w.list.at(t, w.place) {
            Some(e) if e.weight >= w.current && eligible(t, &e) => {
                w.dest = e.dest;
                true
            }
            _ => false,
        }
    }
}
