//! Flows that come from other tables: entered here, and then freed there. User space reads and chooses, and runs these programs
//! (BPF_PROG_TEST_RUN): it may be killed at any moment, a program is not. See `rvs_sys::bpf::elder`.

use aya_ebpf::helpers::bpf_loop;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use core::ffi::c_void;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use rvs_datapath::abi::{Leave, MOVES_MAX, Move, moves};
use rvs_datapath::conn::{self, carry};
use rvs_datapath::ct::{V4, V6};

use crate::flat::{constant, flat};
use crate::words::Table;

flat! {
    Moves("MOVES"): Move;
    Leaves("LEAVES"): Leave;
    Old4("OLD4"): u64;
    Old6("OLD6"): u64;
    OldState("OLD_STATE"): u64;
}

/// What the programs return when they are through.
const DONE: u32 = 2;

macro_rules! enter {
    ($program:ident, $step:ident, $update:ident, $forward:ident, $restore:ident, $link:ident, $make_way:ident, $give_up:ident, $family:ty) => {
        /// Enter all flows of [`Moves`] that are of this family.
        #[xdp]
        pub fn $program(_: XdpContext) -> u32 {
            // SAFETY: a callback without memory of ours.
            unsafe { bpf_loop(MOVES_MAX, $step as *mut c_void, core::ptr::null_mut(), 0) };
            DONE
        }
        unsafe extern "C" fn $step(i: u32, _: *mut c_void) -> i64 {
            let m = Moves::at(i);
            // SAFETY: a valid value; only this program and who runs it write it, one after the other.
            let flags = unsafe { (*m).flags };
            if flags & moves::USED == 0 {
                return 0;
            }
            if flags & moves::UPDATE != 0 {
                $update(i);
                // SAFETY: as above.
                unsafe { (*m).flags = 0 };
                return 0;
            }
            let done = $forward(i);
            let mut outcome = if done & 3 == 0 { moves::FULL } else { moves::DONE };
            if done & 3 == 1 && flags & moves::LINKED != 0 {
                let mut place = (done >> 4) as u32;
                $restore(i, place);
                let mut tries = 0;
                outcome = moves::IN_USE;
                while tries < 2 {
                    tries += 1;
                    let linked = $link(i, place) & 3;
                    if linked == 1 {
                        outcome = moves::DONE;
                        break;
                    }
                    if linked != 2 {
                        $give_up(i, place);
                        outcome = moves::FULL;
                        break;
                    }
                    let again = $make_way(i, place, (tries < 2) as u32);
                    if again == 0 {
                        break;
                    }
                    place = (again >> 1) as u32;
                }
            }
            // SAFETY: as above.
            unsafe {
                (*m).flags = 0;
                (*m).outcome = outcome;
            }
            0
        }
        /// Steps of it, by functions of their own for the stack's sake. Word of an [`rvs_datapath::ct::Outcome`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $forward(i: u32) -> u64 {
            // SAFETY: a valid value, here and below.
            carry::forward_of_move::<$family, _>(&Table::<$family>::NEW, unsafe { &*Moves::at(i) }).word()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $update(i: u32) -> u32 {
            // SAFETY: as above.
            carry::update::<$family, _>(&Table::<$family>::NEW, unsafe { &*Moves::at(i) });
            0
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $restore(i: u32, place: u32) -> u32 {
            // SAFETY: as above.
            carry::restore_move::<$family, _>(&Table::<$family>::NEW, unsafe { &*Moves::at(i) }, place);
            0
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $link(i: u32, place: u32) -> u64 {
            // SAFETY: as above.
            carry::link_of_move::<$family, _>(&Table::<$family>::NEW, unsafe { &*Moves::at(i) }, place).word()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $make_way(i: u32, place: u32, again: u32) -> u64 {
            // SAFETY: as above.
            let key = carry::key_of_move::<$family>(unsafe { &*Moves::at(i) });
            match conn::make_way::<$family, _>(&Table::<$family>::NEW, &key, place, again != 0) {
                Some(place) => u64::from(place) << 1 | 1,
                None => 0,
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $give_up(i: u32, place: u32) -> u32 {
            // SAFETY: as above.
            let key = carry::key_of_move::<$family>(unsafe { &*Moves::at(i) });
            conn::give_up::<$family, _>(&Table::<$family>::NEW, &key, place);
            0
        }
    };
}
enter!(
    rvs_enter4,
    enter_step4,
    move_update4,
    move_forward4,
    move_restore4,
    move_link4,
    move_make_way4,
    move_give_up4,
    V4
);
enter!(
    rvs_enter6,
    enter_step6,
    move_update6,
    move_forward6,
    move_restore6,
    move_link6,
    move_make_way6,
    move_give_up6,
    V6
);

/// Free all entries of [`Leaves`] that are as they were read.
#[xdp]
pub fn rvs_leave(_: XdpContext) -> u32 {
    // SAFETY: a callback without memory of ours.
    unsafe { bpf_loop(MOVES_MAX, leave as *mut c_void, core::ptr::null_mut(), 0) };
    DONE
}

unsafe extern "C" fn leave(i: u32, _: *mut c_void) -> i64 {
    let at = Leaves::at(i);
    // SAFETY: a valid value; only this program and who runs it write it, one after the other.
    let Leave { expected, word, family, dest, counter, .. } = unsafe { *at };
    if expected == 0 {
        return 0;
    }
    let entry = if family == 4 { Old4::at(word) } else { Old6::at(word) };
    // SAFETY: a word inside the map's value, shared only through atomic instructions and whole-word loads.
    let freed =
        unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(entry, expected, 0).1 };
    if freed {
        let row = (dest as u64 & constant!("OLD_STATE_MASK")) * constant!("OLD_STATE_WORDS");
        // SAFETY: as above: the first two words of a value.
        unsafe {
            let counted = OldState::first().add((row + (counter as u64 & 1)) as usize);
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(counted, u64::MAX);
        }
    }
    // SAFETY: as for the first.
    unsafe { ((*at).expected, (*at).freed) = (0, freed as u64) };
    0
}
