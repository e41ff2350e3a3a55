//! The connection tables' words in map memory.

use core::intrinsics::{AtomicOrdering, atomic_cxchg};
use rvs_datapath::abi::{SIDE4_WORDS, SIDE6_WORDS};
use rvs_datapath::conn::{self, Addressing, Conns, Policy};
use rvs_datapath::ct::{Bucket, Buckets, Entry, Family, Key, Outcome, Rank, Seed, Slot, V4, V6};

use crate::calls;
use crate::maps;

/// One bucket.
#[derive(Clone, Copy)]
pub struct Line<const WORDS: usize>(*mut u64);

impl<const WORDS: usize> Bucket for Line<WORDS> {
    #[inline(always)]
    fn load(&self, word: usize) -> u64 {
        // SAFETY: a bucket is WORDS words inside the map's value, and WORDS is a power of two.
        unsafe { self.0.add(word & (WORDS - 1)).read_volatile() }
    }
    #[inline(always)]
    fn store(&self, word: usize, value: u64) {
        // SAFETY: as in load.
        unsafe { self.0.add(word & (WORDS - 1)).write_volatile(value) }
    }
    #[inline(always)]
    fn cas(&self, word: usize, old: u64, new: u64) -> bool {
        // SAFETY: as in load.
        let at = unsafe { self.0.add(word & (WORDS - 1)) };
        // SAFETY: aligned, and shared only through atomic instructions and whole-word loads.
        unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1 }
    }
}

/// One family's table and what belongs to it.
#[derive(Clone, Copy)]
pub struct Table<F>(core::marker::PhantomData<F>);

impl<F> Table<F> {
    pub const NEW: Table<F> = Table(core::marker::PhantomData);
}

#[inline(always)]
fn clock_s() -> u32 {
    // SAFETY: a valid value; volatile because the timer writes it meanwhile.
    unsafe { (&raw const (*maps::clock()).now_s).read_volatile() }
}

macro_rules! buckets {
    ($family:ty, $words:literal, $map:ty, $side:ty, $fetch:path) => {
        impl Buckets<$family> for Table<$family> {
            type B<'b>
                = Line<$words>
            where
                Self: 'b;
            #[inline(always)]
            fn bucket(&self, n: u32) -> Line<$words> {
                Line(<$map>::at(n) as *mut u64)
            }
            #[inline(always)]
            fn beside(&self, n: u32) {
                // (Where nothing is kept the verifier takes this out.)
                if <$side>::mask() == 0 {
                    return;
                }
                $fetch(n);
            }
            #[inline(always)]
            fn mask(&self) -> u32 {
                <$map>::mask()
            }
            #[inline(always)]
            fn seed(&self) -> &Seed {
                &maps::config().seed
            }
            #[inline(always)]
            fn rank(&self, control: u64) -> Rank {
                conn::rank(&maps::config().policy, control, clock_s(), |x| Buckets::<$family>::sign(self, x))
            }
            #[inline(always)]
            fn blur(&self, mut way: usize, noise: u64) -> usize {
                // SAFETY: arithmetic on a register.
                unsafe {
                    core::arch::asm!("{0} ^= {1}", "{0} ^= {1}", "{0} &= 3", inout(reg) way, in(reg) noise,
                        options(pure, nomem, nostack))
                };
                way
            }
            #[inline(always)]
            fn place(&self, slot: u32) -> (u32, usize) {
                let mut way = slot as u64 % <$family>::WAYS as u64;
                // The verifier does not follow a modulo, and LLVM would drop the mask that `Line` puts on.
                // SAFETY: an AND.
                unsafe { core::arch::asm!("{0} &= 3", inout(reg) way, options(pure, nomem, nostack)) };
                (slot / <$family>::WAYS as u32, way as usize)
            }
            #[inline(always)]
            fn sign(&self, mut x: u64) -> u64 {
                // One real instruction: an empty asm makes two line_info records of one offset, which the kernel refuses.
                // SAFETY: a shift.
                unsafe { core::arch::asm!("{0} s>>= 63", inout(reg) x, options(pure, nomem, nostack)) };
                x
            }
        }
        const _: () = assert!(<$family>::WORDS == $words);
    };
}
buckets!(V4, 8, maps::Conn4, maps::Side4, fetch4);
buckets!(V6, 16, maps::Conn6, maps::Side6, fetch6);

/// Words of a cache line.
const LINE: usize = 8;

/// The lines of a bucket's rows. (Their number is a multiple of four, as the verifier sees, so that all of them lie inside.)
#[inline(always)]
fn fetch4(bucket: u32) {
    let rows = maps::Side4::at(bucket << 2) as *const u64;
    let mut i = 0;
    while i < V4::WAYS * SIDE4_WORDS {
        // SAFETY: words of valid values. What they say is not used.
        unsafe { rows.add(i).read_volatile() };
        i += LINE;
    }
}
const _: () = assert!(V4::WAYS == 4);

#[inline(always)]
fn fetch6(bucket: u32) {
    let mut i = 0;
    while i < V6::WAYS * SIDE6_WORDS {
        let row = maps::Side6::at(bucket.wrapping_mul(V6::WAYS as u32) + (i / SIDE6_WORDS) as u32) as *const u64;
        // SAFETY: as above.
        unsafe { row.add(i % SIDE6_WORDS).read_volatile() };
        i += LINE;
    }
}

macro_rules! conns {
    ($family:ty, $side:ty, $enter:path, $release:path) => {
        impl Conns<$family> for Table<$family> {
            type Table = Self;
            #[inline(always)]
            fn table(&self) -> &Self {
                self
            }
            #[inline(always)]
            fn policy(&self) -> &Policy {
                &maps::config().policy
            }
            #[inline(always)]
            fn now_s(&self) -> u32 {
                clock_s()
            }
            #[inline(always)]
            fn stamp(&self, proto: u64, state: u64) -> u64 {
                // SAFETY: a valid value; volatile because the timer writes it meanwhile.
                unsafe {
                    let stamps = &raw const (*maps::clock()).stamps.0;
                    (stamps as *const u32).add((proto << 4 | state) as usize & 63).read_volatile() as u64
                }
            }
            #[inline(always)]
            fn account(&self, dest: u32, active: i64, inactive: i64) {
                maps::account(dest, active, inactive);
            }
            #[inline(always)]
            fn dest_address(&self, dest: u32) -> Option<(<$family as Addressing>::Addr, u16)> {
                maps::dest_address::<$family>(dest)
            }
            #[inline(always)]
            fn fullnat(&self, dest: u32) -> bool {
                maps::fullnat(dest)
            }
            #[inline(always)]
            fn side(&self, slot: Slot) -> Option<<Self as Buckets<$family>>::B<'_>> {
                Some(Line(<$side>::at(slot) as *mut u64))
            }
            #[inline(always)]
            fn enter(&self, key: &Key<<$family as Family>::Words>, rest: u64, own: Slot) -> Outcome {
                $enter(key, rest, own)
            }
            #[inline(always)]
            fn release(&self, entry: &Entry<<$family as Family>::Words>) {
                $release(entry);
            }
        }
    };
}
conns!(V4, maps::Side4, calls::enter4, calls::release4);
conns!(V6, maps::Side6, calls::enter6, calls::release6);
