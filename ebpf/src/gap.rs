//! Room inside an skb.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::helpers::{bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::macros::btf_map;

/// Most bytes that are moved, a power of two - 1.
const MOST: u32 = 4095;
/// Bytes of the word before them.
const WORD: u32 = 4;

#[btf_map]
static MOVED: PerCpuArray<[u8; (MOST + WORD) as usize + 1], 1> = PerCpuArray::new();

/// Move what lies from `at` on back by `n` bytes. The word before it is moved too, and put back: the length is never 0 for the verifier.
#[inline(always)]
pub fn move_tail(skb: *mut __sk_buff, at: u32, n: u32) -> bool {
    // SAFETY: a field of the context.
    let len = unsafe { (*skb).len };
    let Some(room) = MOVED.get_ptr_mut(0) else { return false };
    let (from, mut tail) = (at - WORD, len.wrapping_sub(at));
    if tail > MOST {
        return false;
    }
    // SAFETY: one real instruction that changes nothing, by which the verifier knows the length's bounds.
    unsafe { core::arch::asm!("{0} &= 0xfff", inout(reg) tail, options(pure, nomem, nostack)) };
    // Never 0 by what it is made of: what a comparison says of it, the verifier of Linux 6.1 forgets on the stack.
    let moved = tail + WORD;
    let room = room.cast::<core::ffi::c_void>();
    // SAFETY: the context of this program, and memory of this CPU's own as large as any `moved`.
    unsafe {
        bpf_skb_load_bytes(skb.cast(), from, room, moved) == 0
            && bpf_skb_change_tail(skb, len + n, 0) == 0
            && bpf_skb_store_bytes(skb, from + n, room, moved, 0) == 0
            && bpf_skb_store_bytes(skb, from, room, WORD, 0) == 0
    }
}
