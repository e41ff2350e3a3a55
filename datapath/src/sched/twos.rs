//! twos: the less loaded of two dests drawn by weight (`ip_vs_twos_schedule`).

use super::{List, eligible, overhead};
use crate::tables::{Tables, Walker};

/// The sum of the weights of all dests that are eligible, and the last of them.
struct Sum {
    list: List,
    total: u32,
    last: u32,
}

impl<T: Tables> Walker<T> for Sum {
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        match self.list.at(t, i + 1) {
            Some(e) if eligible(t, &e) => (self.total, self.last) = (self.total.wrapping_add(e.weight), e.dest),
            _ => {}
        }
        false
    }
}

/// A drawn dest: what is left of the number drawn, and, when that is used up, which it is.
#[derive(Clone, Copy)]
struct Choice {
    left: i64,
    dest: u32,
    weight: u32,
}

struct Draw {
    list: List,
    one: Choice,
    other: Choice,
}

impl<T: Tables> Walker<T> for Draw {
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        let w = self;
        let Some(e) = w.list.at(t, i + 1) else { return true };
        if eligible(t, &e) {
            for choice in [&mut w.one, &mut w.other] {
                choice.left -= i64::from(e.weight);
                if choice.left <= 0 && choice.dest == 0 {
                    (choice.dest, choice.weight) = (e.dest, e.weight);
                }
            }
        }
        w.one.dest != 0 && w.other.dest != 0
    }
}

#[inline(always)]
pub fn pick<T: Tables>(t: &T, list: List) -> Option<u32> {
    let mut sum = Sum { list, total: t.blur(0, list.count), last: 0 };
    t.walk(list.count, &mut sum);
    if sum.last == 0 {
        return None;
    }
    // From 0 to the total, inclusive, as the kernel draws: the first dest has a chance more than its weight.
    let end = u64::from(sum.total) + 1;
    let nobody = t.blur(0, list.count);
    let draw = || Choice { left: ((u64::from(t.random()) * end) >> 32) as i64, dest: nobody, weight: 0 };
    let mut two = Draw { list, one: draw(), other: draw() };
    t.walk(list.count, &mut two);
    let (one, other) = (two.one, two.other);
    // (Weights became less between the two walks.)
    if one.dest == 0 {
        return Some(sum.last);
    }
    // Products of 32 bits there.
    let product = |weight: u32, dest: u32| (weight as i32).wrapping_mul(overhead(t, dest) as i32);
    let other_is_better = other.dest != 0 && product(other.weight, one.dest) > product(one.weight, other.dest);
    Some(if other_is_better { other.dest } else { one.dest })
}
