//! lc, wlc, sed and nq: the dest with the least load, for its weight; the first of the list wins a tie (`ip_vs_lc_schedule`,
//! `ip_vs_wlc_schedule`, `ip_vs_sed_schedule`, `ip_vs_nq_schedule`).

use super::{List, eligible, overhead};
use crate::abi::ListEntry;
use crate::tables::{Tables, Walker};

/// What a load is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Connections, the active ones weighing more; all dests alike.
    Lc,
    /// ... for each of the dest's weight.
    Wlc,
    /// Active connections, this one among them, for each of the weight: the expected delay.
    Sed,
    /// The same, but the first dest without an active connection is taken at once.
    Nq,
}

struct Walk<const RULE: u8> {
    list: List,
    dest: u32,
    weight: u64,
    load: u64,
}

#[inline(always)]
pub fn pick<const RULE: u8, T: Tables>(t: &T, list: List) -> Option<u32> {
    let (dest, zero) = (t.blur(0, list.count), t.blur_word(0, list.count));
    let mut walk = Walk::<RULE> { list, dest, weight: zero, load: zero };
    t.walk(list.count, &mut walk);
    (walk.dest != 0).then_some(walk.dest)
}

/// Load and weight of a dest, and whether it is taken at once.
#[inline(always)]
fn of<const RULE: u8, T: Tables>(t: &T, e: &ListEntry) -> (u64, u64, bool) {
    let weight = u64::from(e.weight);
    if RULE == Rule::Lc as u8 || RULE == Rule::Wlc as u8 {
        return (overhead(t, e.dest), if RULE == Rule::Lc as u8 { 1 } else { weight }, false);
    }
    let [active, _] = t.connections(e.dest);
    (active + 1, weight, RULE == Rule::Nq as u8 && active == 0)
}

impl<const RULE: u8, T: Tables> Walker<T> for Walk<RULE> {
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        let w = self;
        let Some(e) = w.list.at(t, i + 1) else { return true };
        if !eligible(t, &e) {
            return false;
        }
        let (load, weight, idle) = of::<RULE, T>(t, &e);
        // The kernel compares least's load * this weight with this load * least's weight, strictly.
        if idle || w.dest == 0 || w.load.wrapping_mul(weight) > load.wrapping_mul(w.weight) {
            (w.dest, w.weight, w.load) = (e.dest, weight, load);
        }
        idle
    }
}
