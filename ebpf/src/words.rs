//! The connection tables' words in map memory.

use aya_ebpf::Global;
use core::intrinsics::{AtomicOrdering, atomic_cxchg};
use rvs_datapath::abi::{Clock, Config};
use rvs_datapath::conn::{self, Addressing, Conns, Policy};
use rvs_datapath::ct::{self, Bucket, Buckets, Entry, Family, Key, Outcome, Rank, Seed, Slot, V4, V6};

use crate::calls;
use crate::maps;

/// Number of buckets - 1. Read-only data: the verifier sees constants, and from `n & MASK` the bounds of the access.
#[unsafe(no_mangle)]
static MASK4: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static MASK6: Global<u32> = Global::new(0);

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
pub struct Table<'a, F> {
    words: *mut u64,
    config: &'a Config,
    clock: &'a Clock,
    family: core::marker::PhantomData<F>,
}

impl<'a, F> Table<'a, F> {
    #[inline(always)]
    pub fn new(words: *mut u64, config: &'a Config, clock: &'a Clock) -> Self {
        Table { words, config, clock, family: core::marker::PhantomData }
    }
    #[inline(always)]
    fn clock_s(&self) -> u32 {
        // SAFETY: a valid reference; volatile because the timer writes it meanwhile.
        unsafe { (&raw const self.clock.now_s).read_volatile() }
    }
}

macro_rules! buckets {
    ($family:ty, $words:literal, $mask:ident) => {
        impl Buckets<$family> for Table<'_, $family> {
            type B<'b>
                = Line<$words>
            where
                Self: 'b;
            #[inline(always)]
            fn bucket(&self, n: u32) -> Line<$words> {
                // SAFETY: the map's value has MASK + 1 buckets.
                Line(unsafe { self.words.add((n & $mask.load()) as usize * $words) })
            }
            #[inline(always)]
            fn mask(&self) -> u32 {
                $mask.load()
            }
            #[inline(always)]
            fn seed(&self) -> &Seed {
                &self.config.seed
            }
            #[inline(always)]
            fn rank(&self, control: u64) -> Rank {
                conn::rank(&self.config.policy, control, self.clock_s(), |x| Buckets::<$family>::sign(self, x))
            }
            #[inline(always)]
            fn movable(&self, control: u64) -> bool {
                control & ct::LINKED == 0
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
buckets!(V4, 8, MASK4);
buckets!(V6, 16, MASK6);

macro_rules! conns {
    ($family:ty, $enter:path, $release:path) => {
        impl Conns<$family> for Table<'_, $family> {
            type Table = Self;
            #[inline(always)]
            fn table(&self) -> &Self {
                self
            }
            #[inline(always)]
            fn policy(&self) -> &Policy {
                &self.config.policy
            }
            #[inline(always)]
            fn now_s(&self) -> u32 {
                self.clock_s()
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
conns!(V4, calls::enter4, calls::release4);
conns!(V6, calls::enter6, calls::release6);
