//! Telling `rvs trace` of packets, as they came and with the verdict that they met. Only those of interfaces that are marked (`Iface::traced`).

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::btf_maps::RingBuf;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_ringbuf_output, bpf_skb_load_bytes, bpf_xdp_load_bytes};
use aya_ebpf::macros::btf_map;
use core::ffi::c_void;
use rvs_datapath::abi::{TRACE_BYTES, Trace, TraceRoom, Traced};
use rvs_datapath::trace::{HEAD, Head, matches};
use rvs_datapath::verdict::Verdict;

use crate::flat::{constant, flat};
use crate::maps;

flat! {
    Filter("TRACE"): Trace;
    Room("TRACE_ROOM"): TraceRoom;
}

/// 2 MiB.
#[btf_map]
static TRACE_RING: RingBuf<[u8; 8], { 1 << 21 }> = RingBuf::new();

/// A context whose packet can be read.
#[allow(dead_code, reason = "the programs that measure are XDP programs only")]
#[derive(Clone, Copy)]
pub enum From {
    Xdp(*mut xdp_md),
    Skb(*mut __sk_buff),
}

/// The packet as it is now, kept until [`tell`]: the pipeline will change it.
#[inline(always)]
pub fn keep(from: From, ifindex: u32, len: u32) {
    let room = Room::mine(0);
    let kept = kept(len);
    // SAFETY: this CPU's own memory (programs of one CPU never overlap), and at most as many bytes as there is room for.
    unsafe {
        (*room).head = Traced { ns: bpf_ktime_get_ns(), verdict: 0, ifindex, len, kept: kept as u32, spare: 0 };
        *(&raw mut (*room).bytes as *mut Head) = [0; HEAD];
        let to = &raw mut (*room).bytes as *mut c_void;
        match from {
            From::Xdp(ctx) => bpf_xdp_load_bytes(ctx, 0, to, kept as u32),
            From::Skb(skb) => bpf_skb_load_bytes(skb as *const c_void, 0, to, kept as u32),
        };
    }
}

/// How much of a packet of this length is kept, in a way in which the verifier sees that it is at least 1, and no more than there is
/// room for. (No packet is empty.)
#[inline(always)]
fn kept(len: u32) -> u64 {
    let mut n = (len.min(TRACE_BYTES as u32) as u64).wrapping_sub(1);
    const _: () = assert!(TRACE_BYTES == 0x800);
    // SAFETY: an AND with the largest value.
    unsafe { core::arch::asm!("{0} &= 0x7ff", inout(reg) n, options(pure, nomem, nostack)) };
    n + 1
}

/// What became of the packet that was kept: the word of its verdict. A function of its own, so that its stack is not in the way of the
/// pipeline's.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tell(verdict: u64) -> u32 {
    let verdict = Verdict::from_word(verdict);
    let room = Room::mine(0);
    // SAFETY: valid values; this CPU's own memory, as above.
    unsafe {
        let now_s = (&raw const (*maps::clock()).now_s).read_volatile();
        let head = &*(&raw const (*room).bytes as *const Head);
        if !matches(&*Filter::first(), now_s, head, verdict) {
            return 0;
        }
        (*room).head.verdict = verdict.word();
        let size = size_of::<Traced>() as u64 + kept((&raw const (*room).head.kept).read_volatile());
        let record = &raw mut (*room).head as *mut c_void;
        if bpf_ringbuf_output(&raw const TRACE_RING as *mut c_void, record, size, 0) != 0 {
            (*room).lost += 1;
        }
    }
    0
}
