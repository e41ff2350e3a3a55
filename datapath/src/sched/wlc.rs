//! wlc: least overhead for its weight; the first of the list wins a tie (`ip_vs_wlc_schedule`).

use super::{List, eligible};
use crate::tables::{Tables, Walker};

struct Walk {
    list: List,
    dest: u32,
    weight: u64,
    overhead: u64,
}

#[inline(always)]
pub fn pick<T: Tables>(t: &T, list: List) -> Option<u32> {
    let mut walk = Walk { list, dest: 0, weight: 0, overhead: 0 };
    t.walk(list.count, &mut walk);
    (walk.dest != 0).then_some(walk.dest)
}

impl<T: Tables> Walker<T> for Walk {
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        let w = self;
        let Some(e) = w.list.at(t, i + 1) else { return true };
        if !eligible(t, &e) {
            return false;
        }
        let (overhead, weight) = (t.overhead(e.dest), u64::from(e.weight));
        // loh * doh.weight > doh * loh.weight, strictly.
        if w.dest == 0 || w.overhead.wrapping_mul(weight) > overhead.wrapping_mul(w.weight) {
            (w.dest, w.weight, w.overhead) = (e.dest, weight, overhead);
        }
        false
    }
}
