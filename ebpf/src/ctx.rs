//! Access to packet bytes.

use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_loop, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_load_bytes};
use aya_ebpf::programs::XdpContext;
use core::ffi::c_void;
use rvs_datapath::crc;
use rvs_datapath::csum::{self, Delta};
use rvs_datapath::far::{self, Walk, Walked};
use rvs_datapath::icmp::QUOTE_MAX;
use rvs_datapath::options::{Edit, Editing, MOST, Offer};
use rvs_datapath::packet::{Frame, Ip, Packet, Window};
use rvs_datapath::proto::sctp;

/// An XDP frame. The bounds are read once: checks that repeat cost nothing, and nothing that is written to the packet makes LLVM
/// read them again. Whatever moves the packet reads them anew.
pub struct Xdp<'a> {
    ctx: &'a XdpContext,
    at: usize,
    end: usize,
    ifindex: u32,
}

impl<'a> Xdp<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        // SAFETY: a field of the context.
        Xdp::by(ctx, unsafe { (*ctx.ctx).ingress_ifindex })
    }
    /// The same by who knows the interface: the kernel goes from pointer to pointer for it.
    #[inline(always)]
    pub fn by(ctx: &'a XdpContext, ifindex: u32) -> Self {
        Xdp { ctx, at: ctx.data(), end: ctx.data_end(), ifindex }
    }
    #[inline(always)]
    fn reread(&mut self) {
        (self.at, self.end) = (self.ctx.data(), self.ctx.data_end());
    }
}

/// Bytes whose bounds were checked. `len` is a constant wherever it is used, so the asserts are gone after inlining;
/// one that is not would leave a loop behind (the panic handler), and the verifier would refuse the program.
pub struct Bytes {
    pub at: *mut u8,
    pub len: usize,
}

macro_rules! access {
    ($read:ident, $write:ident, $t:ty) => {
        #[inline(always)]
        fn $read(&self, at: usize) -> $t {
            assert!(at + size_of::<$t>() <= self.len);
            // SAFETY: inside the window. Packets are 2-byte aligned only; BPF on the hosts we run on reads them all the same, and
            // a byte-wise read would be four loads.
            unsafe { *(self.at.add(at) as *const $t) }
        }
        #[inline(always)]
        fn $write(&mut self, at: usize, v: $t) {
            assert!(at + size_of::<$t>() <= self.len);
            // SAFETY: as above.
            unsafe { *(self.at.add(at) as *mut $t) = v }
        }
    };
}

impl Window for Bytes {
    #[inline(always)]
    fn r8(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: inside the window.
        unsafe { *self.at.add(at) }
    }
    #[inline(always)]
    fn w8(&mut self, at: usize, v: u8) {
        assert!(at < self.len);
        // SAFETY: inside the window.
        unsafe { *self.at.add(at) = v }
    }
    access!(r16, w16, u16);
    access!(r32, w32, u32);
    access!(r64, w64, u64);
}

/// The bytes from `by` (below 2048) after `at` on. In assembler: the verifier has to see the bound, and one pointer that is checked against
/// the end and then used, where LLVM would add constants before the variable.
#[inline(always)]
pub fn beyond(mut at: usize, mut by: usize, len: usize, end: usize) -> Option<Bytes> {
    // SAFETY: arithmetic on registers.
    unsafe {
        core::arch::asm!("{1} &= 0x7ff", "{0} += {1}", inout(reg) at, inout(reg) by, options(pure, nomem, nostack))
    };
    let _ = by;
    (at + len <= end).then_some(Bytes { at: at as *mut u8, len })
}

struct Round {
    ctx: *mut xdp_md,
    editing: Editing,
}

unsafe extern "C" fn step(i: u32, round: *mut Round) -> i64 {
    // SAFETY: what `edit_options` passed.
    let round = unsafe { &mut *round };
    let ctx = XdpContext::new(round.ctx);
    round.editing.step(&mut Xdp::by(&ctx, 0), i as usize) as i64
}

/// `n`, of which the verifier then knows nothing. `noise` is any number that it does not know.
#[inline(always)]
pub fn forget(mut n: u32, noise: u32) -> u32 {
    // SAFETY: arithmetic on a register.
    unsafe { core::arch::asm!("{0} ^= {1}", "{0} ^= {1}", inout(reg) n, in(reg) noise, options(pure, nomem, nostack)) };
    n
}

/// See [`Frame::blur`].
#[inline(always)]
pub fn blur(mut n: usize, noise: usize) -> usize {
    // SAFETY: arithmetic on a register.
    unsafe {
        core::arch::asm!("{0} ^= {1}", "{0} ^= {1}", "{0} &= 0x1fc", inout(reg) n, in(reg) noise,
            options(pure, nomem, nostack))
    };
    n
}

#[inline(always)]
fn fix(w: &mut Bytes, at: usize, udp: bool, delta: Delta) {
    let old = w.r16(at);
    w.w16(at, if udp { csum::adjust_udp(old, delta) } else { csum::adjust(old, delta) });
}

/// Ones-complement sum of a packet's bytes from `from` on, at most `most` of them.
#[inline(always)]
pub fn sum(from: usize, end: usize, most: usize) -> u64 {
    let mut sum = 0u64;
    let mut i = 0;
    while i < QUOTE_MAX / 2 {
        let at = from + 2 * i;
        if 2 * i + 2 > most || at + 2 > end {
            break;
        }
        // SAFETY: checked against the end.
        sum += unsafe { *(at as *const u16) } as u64;
        i += 1;
    }
    const _: () = assert!(QUOTE_MAX <= 0xfff);
    let mut done = 2 * i;
    // What the verifier has learnt of `at + 2` when the loop ended early it would take for true of `at + 1`, which LLVM makes of it by
    // a subtraction, and drop what follows as dead. So: an address made anew.
    // SAFETY: an AND with more than the largest value.
    unsafe { core::arch::asm!("{0} &= 0xfff", inout(reg) done, options(pure, nomem, nostack)) };
    let at = from + done;
    if done < most && at + 1 <= end {
        // SAFETY: checked against the end. An odd last byte is the first of its word.
        sum += unsafe { *(at as *const u8) } as u64;
    }
    sum
}

impl Frame for Xdp<'_> {
    #[inline(always)]
    fn windows(&mut self, near: usize, by: usize, len: usize) -> Option<(Bytes, Bytes)> {
        Some((self.window(near)?, self.beyond(by, len)?))
    }
    #[inline(always)]
    fn shrink_head(&mut self, n: usize) -> bool {
        // SAFETY: the context of this program.
        let done = unsafe { bpf_xdp_adjust_head(self.ctx.ctx, n as i32) } == 0;
        self.reread();
        done
    }
    #[inline(always)]
    fn came_by(&mut self, ifindex: u32) {
        self.ifindex = ifindex;
    }
    #[inline(always)]
    fn fix_far(&mut self, at: usize, by: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        let Some(mut w) = self.beyond(by, at + 2) else { return false };
        fix(&mut w, at, udp, addresses.and(ports));
        true
    }
    #[inline(always)]
    fn blur(n: usize, noise: usize) -> usize {
        blur(n, noise)
    }
}

impl Packet for Xdp<'_> {
    type W<'b>
        = Bytes
    where
        Self: 'b;
    #[inline(always)]
    fn window(&mut self, len: usize) -> Option<Bytes> {
        (self.at + len <= self.end).then_some(Bytes { at: self.at as *mut u8, len })
    }
    #[inline(always)]
    fn beyond(&mut self, by: usize, len: usize) -> Option<Bytes> {
        beyond(self.at, by, len, self.end)
    }
    #[inline(always)]
    fn walk(&mut self, walk: Walk) -> Walked {
        Walked::from_word(xdp_walk(self.ctx.ctx, walk.at as u32, walk.first as u32, walk.len as u32))
    }
    #[inline(always)]
    fn edit_options<I: Ip>(&mut self, header: u32, edit: Edit) -> Option<(Delta, Offer)> {
        let noise = self.window(I::L4 + 8)?.r32(I::L4 + 4);
        let editing = Editing::new(edit, I::L4, header, forget(0, noise));
        let mut round = Round { ctx: self.ctx.ctx, editing };
        // SAFETY: the callback gets back the pointer given here, while it is valid.
        unsafe { bpf_loop(MOST as u32, step as *mut c_void, &raw mut round as *mut c_void, 0) };
        round.editing.end()
    }
    /// What is in front moves: in XDP a checksum is always finished, and nobody remembers where it begins.
    #[inline(always)]
    fn open_gap(&mut self, at: usize, by: usize, n: usize) -> bool {
        if !self.grow_head(n) {
            return false;
        }
        let Some(mut w) = self.window(at + n) else { return false };
        let mut i = 0;
        while i < at {
            let word = w.r16(n + i);
            w.w16(i, word);
            i += 2;
        }
        i = 0;
        while i < MOST && i < by {
            let Some(mut w) = self.window(at + n + i + 4) else { return false };
            let word = w.r32(at + n + i);
            w.w32(at + i, word);
            i += 4;
        }
        true
    }
    #[inline(always)]
    fn frame_len(&self) -> u32 {
        (self.end - self.at) as u32
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ifindex
    }
    #[inline(always)]
    fn fix_transport(&mut self, at: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        let Some(mut w) = self.window(at + 2) else { return false };
        fix(&mut w, at, udp, addresses.and(ports));
        true
    }
    #[inline(always)]
    fn fix_crc<I: Ip>(&mut self, by: usize, len: u32, [old, new]: [u32; 2], _: Delta) -> bool {
        let change = if old == new { 0 } else { crc_change(old ^ new, len) };
        let Some(mut w) = self.beyond(by, I::L4 + sctp::HEADER) else { return false };
        let crc = w.r32(I::L4 + sctp::CHECKSUM);
        w.w32(I::L4 + sctp::CHECKSUM, crc ^ change);
        true
    }
    #[inline(always)]
    fn sctp_event(&mut self, at: usize, len: usize) -> u8 {
        xdp_sctp_event(self.ctx.ctx, at as u32, len as u32) as u8
    }
    #[inline(always)]
    fn word_at(&mut self, at: usize) -> Option<[u8; 4]> {
        let mut word = [0; 4];
        // SAFETY: the context of this program, and as many bytes as there is room for.
        let failed = unsafe { bpf_xdp_load_bytes(self.ctx.ctx, at as u32, word.as_mut_ptr().cast(), 4) };
        (failed == 0).then_some(word)
    }
    #[inline(always)]
    fn sum_from(&self, from: usize, most: usize) -> u64 {
        sum(self.at + from, self.end, most)
    }
    #[inline(always)]
    fn grow_head(&mut self, n: usize) -> bool {
        // SAFETY: the context of this program.
        let done = unsafe { bpf_xdp_adjust_head(self.ctx.ctx, -(n as i32)) } == 0;
        self.reread();
        done
    }
    #[inline(always)]
    fn strip(&mut self, n: usize) -> bool {
        self.shrink_head(n)
    }
    #[inline(always)]
    fn cut(&mut self, len: usize) -> bool {
        let delta = len as i64 - (self.end - self.at) as i64;
        if delta >= 0 {
            return delta == 0;
        }
        // SAFETY: the context of this program.
        let done = unsafe { bpf_xdp_adjust_tail(self.ctx.ctx, delta as i32) } == 0;
        self.reread();
        done
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn xdp_walk(ctx: *mut xdp_md, at: u32, first: u32, len: u32) -> u64 {
    let ctx = XdpContext::new(ctx);
    far::walk(&mut Xdp::by(&ctx, 0), Walk { at: at as usize, first: first as u8, len: len as usize }).word()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn xdp_sctp_event(ctx: *mut xdp_md, at: u32, len: u32) -> u32 {
    let ctx = XdpContext::new(ctx);
    sctp::event(&mut Xdp::by(&ctx, 0), at as usize, len as usize) as u32
}

/// [`crc::change`], verified once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn crc_change(changed: u32, len: u32) -> u32 {
    crc::change(changed, len, |mut x| {
        // SAFETY: a shift.
        unsafe { core::arch::asm!("{0} s>>= 63", inout(reg) x, options(pure, nomem, nostack)) };
        x
    })
}
