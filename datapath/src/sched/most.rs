//! fo and ovf: the dest with the largest weight, the first of the list of those (`ip_vs_fo_schedule`, `ip_vs_ovf_schedule`).

use super::{List, eligible};
use crate::tables::{Tables, Walker};

struct Walk<const FULL: bool> {
    list: List,
    dest: u32,
    weight: u32,
}

/// `FULL`: one with more active connections than its weight is passed over (ovf).
#[inline(always)]
pub fn pick<const FULL: bool, T: Tables>(t: &T, list: List) -> Option<u32> {
    let mut walk = Walk::<FULL> { list, dest: 0, weight: t.blur(0, list.count) };
    t.walk(list.count, &mut walk);
    (walk.dest != 0).then_some(walk.dest)
}

impl<const FULL: bool, T: Tables> Walker<T> for Walk<FULL> {
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        let w = self;
        let Some(e) = w.list.at(t, i + 1) else { return true };
        let full = FULL && t.connections(e.dest)[0] > u64::from(e.weight);
        if e.weight > w.weight && eligible(t, &e) && !full {
            (w.dest, w.weight) = (e.dest, e.weight);
        }
        false
    }
}
