//! The data plane inside programs that measure it, for `BPF_PROG_TEST_RUN` with repetition (which gives every round the packet as the
//! last one left it): each gives the packet a flow, runs, puts the bytes back and counts the outcome. What a `base` program takes is
//! what all of that costs, to be subtracted. `lru` programs are the measure of comparison: the kernel's own LRU hash.
#![no_std]
#![no_main]
#![feature(core_intrinsics, asm_experimental_arch, adt_const_params)]
#![allow(internal_features, reason = "atomic compare-and-swap has no other way on this target")]

mod calls;
mod ctx;
mod flat;
mod hand;
mod maps;
mod object;
mod stages;
mod timer;
mod trace;
mod words;
mod xdp;

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_PASS, XDP_TX};
use aya_ebpf::btf_maps::{Array, LruHashMap};
use aya_ebpf::helpers::{bpf_loop, bpf_xdp_adjust_head};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::XdpContext;
use core::ffi::c_void;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::packet::Ip;

/// What the loader sets, and what it reads, in memory that it maps; words by number.
#[btf_map]
static BENCH: Array<[u64; 32], 1, 1024> = Array::new();
/// Rounds are numbered by a generator `x = x * MUL + ADD`, `x >> SHIFT & MASK` being the flow: one after the other, or at random.
const X: usize = 0;
const MUL: usize = 1;
const ADD: usize = 2;
const SHIFT: usize = 3;
const MASK: usize = 4;
/// Not 0: replies, from one of the eight servers that follow this address (its last 32 bits), and ...
const SERVERS: usize = 5;
/// ... this port.
const SERVER_PORT: usize = 6;
/// Filling: bits of the number within a block of flows.
const BLOCK: usize = 7;
/// Rounds by XDP code, from here on.
const COUNTS: usize = 8;
/// The packet as it was, from here on. (On the stack there is no room for it: the data plane takes nearly all.)
const SAVED: usize = 16;
/// 1: what a server sees of a flow is kept when its SYN goes by, and replies are to that. 2: the place where that would be kept is looked at for each
/// reply: what that takes is part of the way, and must be the same where it is compared.
const LENDS: usize = 30;
const KEPT: u64 = 1;
/// Not 0: flows come by Zipf's law, of so many bits.
const ZIPF: usize = 31;

/// Last 32 bits of the first client's address: 10.0.0.0. Each has 64 ports.
const CLIENTS: u32 = 0x0a00_0000;
const PORTS: u64 = 64;
const FIRST_PORT: u16 = 0x8000;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Full maps of the sizes that the loader gives. Source and destination address, ports, protocol.
#[btf_map]
static LRU4: LruHashMap<[u64; 2], [u64; 2], 1024> = LruHashMap::new();
#[btf_map]
static LRU6: LruHashMap<[u64; 5], [u64; 2], 1024> = LruHashMap::new();
/// By flow: the last 32 bits of the server's address and (high half) of the address that it sees, as they lie in the packet; the port that it
/// sees, likewise.
#[btf_map]
static LENT: Array<[u64; 2], 1> = Array::new();

/// Words of the packet that a rewrite may change: Ethernet, IP and TCP header.
const fn words_of<I: Ip>() -> usize {
    (I::L4 + 20).div_ceil(8)
}

/// The packet, if it has all the words.
#[inline(always)]
fn packet<I: Ip>(ctx: &XdpContext) -> Option<*mut u8> {
    (ctx.data() + 8 * words_of::<I>() <= ctx.data_end()).then_some(ctx.data() as *mut u8)
}

/// Which packet comes next.
struct Next {
    flow: u64,
    /// The flags byte, if it is to change.
    flags: Option<u8>,
    /// From a server.
    reply: bool,
}

/// The loader's words. Volatile: it writes them too.
#[derive(Clone, Copy)]
struct Words(*mut u64);
impl Words {
    #[inline(always)]
    fn get(self, word: usize) -> u64 {
        // SAFETY: a word of the map's value: callers give constants, or numbers they have bounded.
        unsafe { self.0.add(word).read_volatile() }
    }
    #[inline(always)]
    fn set(self, word: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.0.add(word).write_volatile(value) }
    }
    /// The order that the loader wants.
    #[inline(always)]
    fn next(self) -> Next {
        let x = self.get(X).wrapping_mul(self.get(MUL)).wrapping_add(self.get(ADD));
        self.set(X, x);
        let mut flow = x >> (self.get(SHIFT) & 63);
        let bits = self.get(ZIPF) & 63;
        if bits != 0 {
            // Of rank 2^n to 2^(n+1) as often for each n; ranks are strewn over the flows.
            let n = ((x >> 48) * bits >> 16) & 63;
            flow = (1 << n | flow & ((1 << n) - 1)).wrapping_mul(0x9e37_79b1);
        }
        Next { flow: flow & self.get(MASK), flags: None, reply: self.get(SERVERS) != 0 }
    }
    /// Block after block: a SYN of each flow, then four times an ACK of each, then a reply, two more ACKs.
    #[inline(always)]
    fn fill(self) -> Next {
        let (x, block) = (self.get(X), self.get(BLOCK) & 31);
        self.set(X, x + 1);
        let (phase, within) = (x >> block & 7, x & ((1 << block) - 1));
        let flags = Some(if phase == 0 { SYN } else { ACK });
        Next { flow: x >> (block + 3) << block | within, flags, reply: phase == 5 && self.get(SERVERS) != 0 }
    }
}

#[inline(always)]
fn with_flow<I: Ip>(ctx: &XdpContext, next: impl FnOnce(Words) -> Next, f: impl FnOnce() -> u32) -> u32 {
    let (Some(b), Some(p)) = (BENCH.get_ptr_mut(0), packet::<I>(ctx)) else { return XDP_ABORTED };
    let b = Words(b as *mut u64);
    let Next { flow, flags, reply } = next(b);
    let (lends, len) = (b.get(LENDS), ctx.data_end() - ctx.data());
    // SAFETY: bytes of the packet, checked above. Volatile: LLVM must not see that bytes put back are the same.
    unsafe {
        let mut i = 0;
        while i < words_of::<I>() {
            b.set(SAVED + i, (p as *const u64).add(i).read_volatile());
            i += 1;
        }
        let (client, port) = ((CLIENTS + (flow / PORTS) as u32).to_be(), FIRST_PORT | (flow % PORTS) as u16);
        let last = I::DESTINATION - I::SOURCE - 4;
        if reply && lends == KEPT {
            let Some(lent) = LENT.get(flow as u32) else { return XDP_ABORTED };
            (p.add(I::SOURCE + last) as *mut u32).write_volatile(lent[0] as u32);
            (p.add(I::DESTINATION + last) as *mut u32).write_volatile((lent[0] >> 32) as u32);
            (p.add(I::L4) as *mut u16).write_volatile((b.get(SERVER_PORT) as u16).to_be());
            (p.add(I::L4 + 2) as *mut u16).write_volatile(lent[1] as u16);
        } else if reply {
            let empty = if lends != 0 { LENT.get(flow as u32).map_or(0, |lent| lent[0] as u32) } else { 0 };
            let server = (b.get(SERVERS) as u32 + (flow & 7) as u32).to_be();
            (p.add(I::SOURCE + last) as *mut u32).write_volatile(server ^ empty);
            (p.add(I::DESTINATION + last) as *mut u32).write_volatile(client ^ empty);
            (p.add(I::L4) as *mut u16).write_volatile((b.get(SERVER_PORT) as u16).to_be());
            (p.add(I::L4 + 2) as *mut u16).write_volatile(port.to_be());
        } else {
            (p.add(I::SOURCE + last) as *mut u32).write_volatile(client);
            (p.add(I::L4) as *mut u16).write_volatile(port.to_be());
        }
        if let Some(flags) = flags {
            p.add(I::L4 + 13).write_volatile(flags);
        }
        let code = f();
        // A tunnel's headers come off.
        let grown = ctx.data_end() - ctx.data() - len;
        if grown != 0 {
            bpf_xdp_adjust_head(ctx.ctx, grown as i32);
        }
        // The program may have moved the packet, for all the verifier knows.
        let Some(p) = packet::<I>(ctx) else { return XDP_ABORTED };
        if lends == KEPT
            && flags == Some(SYN)
            && let Some(lent) = LENT.get_ptr_mut(flow as u32)
        {
            let local = (p.add(I::SOURCE + last) as *const u32).read_volatile();
            let server = (p.add(I::DESTINATION + last) as *const u32).read_volatile();
            let port = (p.add(I::L4) as *const u16).read_volatile();
            *lent = [u64::from(local) << 32 | u64::from(server), u64::from(port)];
        }
        let mut i = 0;
        while i < words_of::<I>() {
            (p as *mut u64).add(i).write_volatile(b.get(SAVED + i));
            i += 1;
        }
        let count = COUNTS + (code & 7) as usize;
        b.set(count, b.get(count) + 1);
        code
    }
}

#[inline(always)]
fn key4(ctx: &XdpContext) -> Option<[u64; 2]> {
    let p = packet::<V4>(ctx)?;
    // SAFETY: checked.
    unsafe {
        Some([(p.add(V4::SOURCE) as *const u64).read_volatile(), (p.add(V4::L4) as *const u32).read_volatile() as u64])
    }
}
#[inline(always)]
fn key6(ctx: &XdpContext) -> Option<[u64; 5]> {
    let p = packet::<V6>(ctx)?;
    // SAFETY: checked.
    unsafe {
        let a = p.add(V6::SOURCE) as *const u64;
        let ports = (p.add(V6::L4) as *const u32).read_volatile() as u64;
        Some([a.read_volatile(), a.add(1).read_volatile(), a.add(2).read_volatile(), a.add(3).read_volatile(), ports])
    }
}

/// Does nothing: what the kernel's harness costs.
#[aya_ebpf::macros::xdp]
pub fn bench_nop(_: XdpContext) -> u32 {
    XDP_PASS
}

macro_rules! programs {
    ($ip:ty, $key:ident, $lru:ident, $map:ty, $sweep:path,
     $base:ident, $run:ident, $fill:ident, $get:ident, $put:ident, $sweep_all:ident, $grow:ident) => {
        #[aya_ebpf::macros::xdp]
        pub fn $base(ctx: XdpContext) -> u32 {
            with_flow::<$ip>(&ctx, Words::next, || XDP_TX)
        }
        #[aya_ebpf::macros::xdp]
        pub fn $run(ctx: XdpContext) -> u32 {
            with_flow::<$ip>(&ctx, Words::next, || xdp::run(&ctx))
        }
        #[aya_ebpf::macros::xdp]
        pub fn $fill(ctx: XdpContext) -> u32 {
            with_flow::<$ip>(&ctx, Words::fill, || xdp::run(&ctx))
        }
        /// XDP_TX if it is there.
        #[aya_ebpf::macros::xdp]
        pub fn $get(ctx: XdpContext) -> u32 {
            with_flow::<$ip>(&ctx, Words::next, || {
                let Some(key) = $key(&ctx) else { return XDP_ABORTED };
                // SAFETY: nobody else writes it meanwhile.
                let value = unsafe { $lru.get(&key) };
                value.map_or(XDP_PASS, |v| if v[0] == u64::MAX { XDP_ABORTED } else { XDP_TX })
            })
        }
        /// XDP_TX if it is in.
        #[aya_ebpf::macros::xdp]
        pub fn $put(ctx: XdpContext) -> u32 {
            with_flow::<$ip>(&ctx, Words::next, || {
                let Some(key) = $key(&ctx) else { return XDP_ABORTED };
                if $lru.insert(&key, &[1, 0], 0).is_ok() { XDP_TX } else { XDP_PASS }
            })
        }
        /// Does nothing but to make room in front, which is taken away again.
        #[aya_ebpf::macros::xdp]
        pub fn $grow(ctx: XdpContext) -> u32 {
            with_flow::<$ip>(&ctx, Words::next, || {
                // SAFETY: the context of this program.
                unsafe { bpf_xdp_adjust_head(ctx.ctx, -(<$ip as Ip>::HEADER as i32)) };
                XDP_TX
            })
        }
        /// A whole sweep. XDP_TX if it came to its end.
        #[aya_ebpf::macros::xdp]
        pub fn $sweep_all(_: XdpContext) -> u32 {
            let (rounds, mut from) = ((<$map>::mask() + 1) / timer::STEP, 0u32);
            // SAFETY: the callback gets back the pointer given here.
            let done = unsafe { bpf_loop(rounds, $sweep as *mut c_void, &raw mut from as *mut c_void, 0) };
            if done == rounds as i64 { XDP_TX } else { XDP_PASS }
        }
    };
}
programs!(
    V4,
    key4,
    LRU4,
    maps::Conn4,
    timer::sweep4,
    bench_base4,
    bench_run4,
    bench_fill4,
    bench_get4,
    bench_put4,
    bench_sweep4,
    bench_grow4
);
programs!(
    V6,
    key6,
    LRU6,
    maps::Conn6,
    timer::sweep6,
    bench_base6,
    bench_run6,
    bench_fill6,
    bench_get6,
    bench_put6,
    bench_sweep6,
    bench_grow6
);
