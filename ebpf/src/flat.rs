//! Maps that are reached without a lookup: each has one value, an array of any size. Where it lies, and how many entries it has, the
//! loader puts into the programs (`flat` in rvs-sys): in the object these are undefined symbols. A lookup costs some fifteen
//! instructions and the registers that a call takes; with eight of them a packet, a quarter of its time.
//!
//! An index is cut to the array's size, a power of two: the verifier knows the bounds from that.

use aya_ebpf::helpers::bpf_get_smp_processor_id;

/// A number that the loader knows, by its symbol.
macro_rules! constant {
    ($symbol:expr) => {{
        let value: u64;
        // SAFETY: a constant.
        unsafe { core::arch::asm!(concat!("{0} = ", $symbol, " ll"), out(reg) value, options(pure, nomem, nostack)) };
        value
    }};
}
pub(crate) use constant;

/// Number of a CPU's part in arrays that have one for each.
#[inline(always)]
pub fn cpu() -> u64 {
    // SAFETY: a helper without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    cpu as u64 & constant!("CPUS_MASK")
}

/// An array `NAME` of `type`s. Elements are whole 8-byte words.
macro_rules! flat {
    ($($name:ident($symbol:literal): $type:ty;)*) => { $(
        pub struct $name;
        impl $name {
            const WORDS: usize = size_of::<$type>().div_ceil(8);
            /// Its only element, or its first.
            #[inline(always)]
            pub fn first() -> *mut $type {
                let first = constant!($symbol) as *mut $type;
                // SAFETY: no map lies there.
                unsafe { core::hint::assert_unchecked(!first.is_null()) };
                first
            }
            /// Its size - 1.
            #[allow(dead_code, reason = "one of a family")]
            #[inline(always)]
            pub fn mask() -> u32 {
                constant!(concat!($symbol, "_MASK")) as u32
            }
            #[allow(dead_code, reason = "one of a family")]
            #[inline(always)]
            pub fn at(index: u32) -> *mut $type {
                let number = index as u64 & constant!(concat!($symbol, "_MASK"));
                // SAFETY: inside the map's value.
                unsafe { (Self::first() as *mut u64).add(number as usize * Self::WORDS) as *mut $type }
            }
            /// This CPU's.
            #[allow(dead_code, reason = "one of a family")]
            #[inline(always)]
            pub fn mine(index: u32) -> *mut $type {
                let number = index as u64 & constant!(concat!($symbol, "_MASK"));
                let first = $crate::flat::cpu() * constant!(concat!($symbol, "_BYTES"));
                // SAFETY: inside the map's value, which has such an array for each CPU.
                unsafe {
                    let mine = (Self::first() as *mut u8).add(first as usize) as *mut u64;
                    mine.add(number as usize * Self::WORDS) as *mut $type
                }
            }
        }
    )* };
}
pub(crate) use flat;
