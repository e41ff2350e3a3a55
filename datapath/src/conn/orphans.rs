//! Reverse entries whose flow is gone: a race can leave one. They are looked for now and then.

use super::{Addressing, Conns, REVERSE, forward_of};
use crate::ct::{self, Buckets, Entry};

/// Is this reverse entry's flow gone? (A reverse entry outlives its forward one only through a race.)
#[inline(always)]
pub fn orphan<F: Addressing, C: Conns<F> + ?Sized>(c: &C, entry: &Entry<F::Words>) -> bool {
    entry.control & REVERSE != 0
        && ct::is_live(entry.control)
        && forward_of(c, &entry.key::<F>(c.table().seed()), entry.control).is_none()
}

/// Full sweeps between two looks for orphans in a bucket: each reverse entry costs a look at its forward one, in memory far away.
const ORPHAN_SWEEPS: u32 = 256;

/// Is it this bucket's turn to be looked through for orphans?
#[inline(always)]
pub fn orphans_due(bucket: u32, sweep: u32) -> bool {
    (bucket ^ sweep) & (ORPHAN_SWEEPS - 1) == 0
}

/// Free the orphans of a bucket.
#[inline(always)]
pub fn free_orphans<F: Addressing, C: Conns<F> + ?Sized>(c: &C, bucket: u32) {
    let mut way = 0;
    while way < F::WAYS {
        let entry = ct::entry::<F, _>(c.table(), bucket, way);
        if orphan(c, &entry) {
            let _ = ct::free::<F, _>(c.table(), &entry);
        }
        way += 1;
    }
}
