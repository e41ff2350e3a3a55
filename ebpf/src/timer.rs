//! The tick: time for the data plane, and the sweep of the connection tables, a slice each tick. It goes on whatever becomes of the
//! daemon: the timer lives in a pinned map.

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_loop, bpf_timer_init, bpf_timer_set_callback, bpf_timer_start};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use core::ffi::c_void;
use rvs_datapath::abi::{SWEEP_TICKS, TICK_NS, config};
use rvs_datapath::conn;
use rvs_datapath::ct::{V4, V6};

use crate::calls;
use crate::maps::{self, TIMER, Timer};
use crate::words::Table;

const EBUSY: i64 = -16;

/// Run once by the loader (BPF_PROG_TEST_RUN): start the timer, or have a running one go on with this program's code. Returns 2 if done.
#[xdp]
pub fn rvs_start(_: XdpContext) -> u32 {
    tick();
    let Some(t) = TIMER.get_ptr_mut(0) else { return 0 };
    // SAFETY: the timer of this map's value.
    unsafe {
        let timer = &raw mut (*t).timer;
        let r = bpf_timer_init(timer, &raw const TIMER as *mut c_void, 1);
        if r != 0 && r != EBUSY {
            return 100;
        }
        if bpf_timer_set_callback(timer, on_timer as *mut c_void) != 0 {
            return 101;
        }
        if bpf_timer_start(timer, TICK_NS, 0) != 0 {
            return 102;
        }
    }
    2
}

unsafe extern "C" fn on_timer(_map: *mut c_void, _key: *mut u32, value: *mut Timer) -> i32 {
    let (from4, count4, from6, count6) = tick();
    let mut from = from4;
    // SAFETY: the callbacks get back the pointer given here.
    unsafe { bpf_loop(count4.div_ceil(STEP), sweep4 as *mut c_void, &raw mut from as *mut c_void, 0) };
    from = from6;
    // SAFETY: as above.
    unsafe { bpf_loop(count6.div_ceil(STEP), sweep6 as *mut c_void, &raw mut from as *mut c_void, 0) };
    // SAFETY: the timer whose callback this is.
    unsafe { bpf_timer_start(&raw mut (*value).timer, TICK_NS, 0) };
    0
}

/// Move the clock on. The slices of buckets that are due.
#[inline(always)]
fn tick() -> (u32, u32, u32, u32) {
    let c = maps::clock();
    let (b4, b6) = (maps::Conn4::mask() as u64 + 1, maps::Conn6::mask() as u64 + 1);
    // SAFETY: a valid value; only the timer writes these fields.
    unsafe {
        let now = bpf_ktime_get_ns();
        (&raw mut (*c).tick_ns).write_volatile(now);
        let now_s = (now / 1_000_000_000) as u32;
        (&raw mut (*c).now_s).write_volatile(now_s);
        let stamps = &raw mut (*c).stamps.0 as *mut u32;
        let mut of = 0;
        while of < 64 {
            stamps.add(of).write_volatile(conn::stamp_of(&maps::config().policy, now_s, of));
            of += 1;
        }
        let n = (*c).ticks;
        (&raw mut (*c).ticks).write_volatile(n.wrapping_add(1));
        let at = (n % SWEEP_TICKS) as u64;
        let slice = |buckets: u64| {
            let (from, to) = (at * buckets / SWEEP_TICKS as u64, (at + 1) * buckets / SWEEP_TICKS as u64);
            (from as u32, (to - from) as u32)
        };
        let (s4, s6) = (slice(b4), slice(b6));
        (s4.0, s4.1, s6.0, s6.1)
    }
}

/// Full sweeps so far.
#[inline(always)]
fn sweep_number() -> u32 {
    // SAFETY: a valid value; volatile because the timer writes it.
    unsafe { (&raw const (*maps::clock()).ticks).read_volatile() / SWEEP_TICKS }
}

/// Buckets of a round of bpf_loop: its own cost is that of a bucket with nothing in it.
pub const STEP: u32 = 8;

macro_rules! sweep {
    ($name:ident, $family:ty, $release:path, $orphans:path, $thin:path) => {
        /// A round, from the bucket on that it is given.
        pub unsafe extern "C" fn $name(i: u32, from: *mut u32) -> i64 {
            // SAFETY: what the caller passed.
            let first = unsafe { *from }.wrapping_add(i * STEP);
            let sweep = sweep_number();
            let thins = maps::config().flags & config::DROP_ENTRY != 0;
            let mut at = 0;
            while at < STEP {
                let bucket = first.wrapping_add(at);
                conn::sweep(&Table::<$family>::NEW, bucket, |entry| $release(&entry));
                if conn::orphans_due(bucket, sweep) {
                    $orphans(bucket);
                }
                if thins && conn::thin::is_due(bucket, sweep) {
                    $thin(bucket, sweep);
                }
                at += 1;
            }
            0
        }
    };
}
sweep!(sweep4, V4, calls::release4, calls::conn4_orphans, calls::thin4);
sweep!(sweep6, V6, calls::release6, calls::conn6_orphans, calls::thin6);
