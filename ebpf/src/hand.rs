//! Handing packets to the daemon: fragments that came before their first one, and packets that have to be cut.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::btf_maps::{HashMap, RingBuf};
use aya_ebpf::helpers::{bpf_ringbuf_output, bpf_skb_load_bytes, bpf_xdp_load_bytes};
use aya_ebpf::macros::btf_map;
use core::ffi::c_void;
use rvs_datapath::abi::{HANDED_BYTES, HANDED_MAX, HandRoom, Handed, ServiceKey, Taker, WATCHED_MAX};
use rvs_datapath::frag;

use crate::flat::{constant, flat};
use crate::maps;

flat! {
    Takers("TAKER"): Taker;
    Room("HAND_ROOM"): HandRoom;
}

/// 1 MiB each: some 600 frames of 1500 bytes.
#[btf_map]
static EARLY_RING: RingBuf<[u8; 8], { 1 << 20 }> = RingBuf::new();
#[btf_map]
static LARGE_RING: RingBuf<[u8; 8], { 1 << 20 }> = RingBuf::new();

/// `BPF_F_NO_PREALLOC`
const ON_DEMAND: usize = 1;
#[btf_map]
static WATCHED: HashMap<ServiceKey, u64, { WATCHED_MAX as usize }, ON_DEMAND> = HashMap::new();

/// `port` and `protocol`: 0, or those of a real server.
#[inline(always)]
pub fn watched(address: [u8; 16], port: u16, protocol: u8, family: u8) -> u64 {
    let key = ServiceKey { address, port, protocol, family };
    // SAFETY: the control plane replaces whole values; a value is one word.
    unsafe { WATCHED.get(key) }.map_or(0, |v| *v)
}

/// Is there somebody to take it?
#[inline(always)]
pub fn taken() -> bool {
    // SAFETY: valid values, read as whole words.
    unsafe {
        let now_s = (&raw const (*maps::clock()).now_s).read_volatile() as u64;
        now_s <= (&raw const (*Takers::first()).until_s).read_volatile()
    }
}

/// A context whose packet can be read.
#[allow(dead_code, reason = "the programs that measure are XDP programs only")]
#[derive(Clone, Copy)]
pub enum From {
    Xdp(*mut xdp_md),
    Skb(*mut __sk_buff),
}

/// The packet, as it is now, to the daemon. False: it is too long, or the ring is full.
#[inline(always)]
pub fn hand(from: From, datagram: Option<&frag::Key>, ifindex: u32, room: u32) -> bool {
    let len = match from {
        // SAFETY: fields of the context, here and below.
        From::Xdp(ctx) => unsafe { (*ctx).data_end.wrapping_sub((*ctx).data) },
        From::Skb(skb) => unsafe { (*skb).len },
    };
    if len == 0 || len > HANDED_MAX {
        return false;
    }
    // In a way in which the verifier sees that it is at least 1, and no more than there is room for.
    let mut n = (len as u64).wrapping_sub(1);
    const _: () = assert!(HANDED_BYTES == 0x1000 && HANDED_MAX <= HANDED_BYTES as u32);
    // SAFETY: an AND with the largest value.
    unsafe { core::arch::asm!("{0} &= 0xfff", inout(reg) n, options(pure, nomem, nostack)) };
    let n = n + 1;
    let (addresses, rest) = datagram.map_or(([0; 4], 0), |key| (key.addresses, key.rest));
    let at = Room::mine(0);
    // SAFETY: this CPU's own memory (programs of one CPU never overlap), and at most as many bytes as there is room for.
    unsafe {
        (*at).head = Handed { addresses, rest, ifindex, room, len, spare: 0 };
        let to = &raw mut (*at).bytes as *mut c_void;
        let failed = match from {
            From::Xdp(ctx) => bpf_xdp_load_bytes(ctx, 0, to, n as u32) as i64,
            From::Skb(skb) => bpf_skb_load_bytes(skb as *const c_void, 0, to, n as u32) as i64,
        };
        if failed != 0 {
            return false;
        }
        let (record, size) = (&raw mut (*at).head as *mut c_void, size_of::<Handed>() as u64 + n);
        let ring = if datagram.is_some() {
            &raw const EARLY_RING as *mut c_void
        } else {
            &raw const LARGE_RING as *mut c_void
        };
        bpf_ringbuf_output(ring, record, size, 0) == 0
    }
}
