//! Entering an entry and releasing what was freed, as functions of their own, verified once each and called by all programs. Arguments
//! and results too big for registers go through per-CPU scratch memory (programs of one CPU never overlap: they run with
//! bottom halves off).

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use rvs_datapath::conn;
use rvs_datapath::ct::{self, Cost, Entry, Family, Key, Outcome, Slot, V4, V6};

use crate::words::Table;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scratch<F: Family> {
    insert: Key<F::Words>,
    cost: Cost<F::Words>,
    release: Entry<F::Words>,
}

#[btf_map]
static SCRATCH4: PerCpuArray<Scratch<V4>, 1> = PerCpuArray::new();
#[btf_map]
static SCRATCH6: PerCpuArray<Scratch<V6>, 1> = PerCpuArray::new();

/// Which entry is to be released.
const GIVEN: u32 = 0;
const LOST: u32 = 1;
const EVICTED: u32 = 2;

macro_rules! calls {
    ($family:ty, $scratch:ident, $enter:ident, $release:ident,
     $insert_fn:ident, $room_fn:ident, $release_fn:ident, $orphans_fn:ident) => {
        #[inline(always)]
        pub fn $enter(key: &Key<<$family as Family>::Words>, rest: u64, own: Slot) -> Outcome {
            let Some(s) = $scratch.get_ptr_mut(0) else { return Outcome::FULL };
            // SAFETY: this CPU's own memory, see above.
            unsafe {
                (*s).insert = *key;
                (*s).cost = Cost::default();
                let mut outcome = Outcome::from_word($insert_fn(rest, 1));
                if outcome == Outcome::CROWDED {
                    $room_fn();
                    outcome = Outcome::from_word($insert_fn(rest, 0));
                }
                if (*s).cost.lost.control != 0 {
                    $release_fn(LOST);
                }
                if (*s).cost.evicted.control != 0 {
                    $release_fn(EVICTED);
                }
                (*s).cost.settle(outcome, own)
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $insert_fn(rest: u64, picky: u32) -> u64 {
            let Some(s) = $scratch.get_ptr_mut(0) else { return 0 };
            let t = Table::<$family>::NEW;
            // SAFETY: as above; nobody else borrows these fields meanwhile.
            unsafe { ct::try_insert::<$family, _>(&t, &(*s).insert, rest, picky != 0, &mut (*s).cost).word() }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $room_fn() -> u32 {
            let Some(s) = $scratch.get_ptr_mut(0) else { return 1 };
            let t = Table::<$family>::NEW;
            // SAFETY: as above.
            unsafe { ct::make_room::<$family, _>(&t, &(*s).insert, &mut (*s).cost) };
            0
        }

        #[inline(always)]
        pub fn $release(entry: &Entry<<$family as Family>::Words>) {
            let Some(s) = $scratch.get_ptr_mut(0) else { return };
            // SAFETY: as above.
            unsafe { (*s).release = *entry };
            $release_fn(GIVEN);
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $release_fn(which: u32) -> u32 {
            let Some(s) = $scratch.get_ptr_mut(0) else { return 1 };
            let t = Table::<$family>::NEW;
            // SAFETY: as above.
            let entry = unsafe {
                match which {
                    LOST => (*s).cost.lost,
                    EVICTED => (*s).cost.evicted,
                    _ => (*s).release,
                }
            };
            conn::release::<$family, _>(&t, &entry);
            0
        }

        /// Free the orphans of a bucket.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $orphans_fn(bucket: u32) -> u32 {
            let t = Table::<$family>::NEW;
            conn::free_orphans::<$family, _>(&t, bucket);
            0
        }
    };
}

calls!(V4, SCRATCH4, enter4, release4, conn4_insert, conn4_room, conn4_release, conn4_orphans);
calls!(V6, SCRATCH6, enter6, release6, conn6_insert, conn6_room, conn6_release, conn6_orphans);
