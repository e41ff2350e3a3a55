//! Room inside an skb.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::helpers::{bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::macros::btf_map;

/// Most bytes that are moved, a power of two - 1.
const MOST: u32 = 4095;

#[btf_map]
static MOVED: PerCpuArray<[u8; MOST as usize + 1], 1> = PerCpuArray::new();

/// Move what lies from `at` on back by `n` bytes. The word before it is moved too, and put back: the length is never 0 for the verifier.
#[inline(always)]
pub fn move_tail(skb: *mut __sk_buff, at: u32, n: u32) -> bool {
    // SAFETY: a field of the context.
    let len = unsafe { (*skb).len };
    let Some(room) = MOVED.get_ptr_mut(0) else { return false };
    let (from, mut moved) = (at - 4, len.wrapping_sub(at - 4));
    if moved > MOST {
        return false;
    }
    // SAFETY: one real instruction that changes nothing, by which the verifier knows the length's bounds.
    unsafe { core::arch::asm!("{0} &= 0xfff", inout(reg) moved, options(pure, nomem, nostack)) };
    if moved < 4 {
        return false;
    }
    let room = room.cast::<core::ffi::c_void>();
    // SAFETY: the context of this program, and memory of this CPU's own as large as any `moved`.
    unsafe {
        bpf_skb_load_bytes(skb.cast(), from, room, moved) == 0
            && bpf_skb_change_tail(skb, len + n, 0) == 0
            && bpf_skb_store_bytes(skb, from + n, room, moved, 0) == 0
            && bpf_skb_store_bytes(skb, from, room, 4, 0) == 0
    }
}
