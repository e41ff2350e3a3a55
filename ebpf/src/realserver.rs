//! The real server's side, without a tunnel device or kernel module: packets come out of their tunnels here, clients are told of an MSS that
//! goes through them, and connections by FULLNAT show their clients' own addresses ([`peers`]).
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

#[allow(dead_code, reason = "the director's programs use all of it")]
mod ctx;
#[allow(dead_code, reason = "the director's programs use all of it")]
mod gap;
mod object;
mod peers;
#[allow(dead_code, reason = "the director's programs use all of it")]
mod skb;

use aya_ebpf::Global;
use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_DECAP_L3_IPV4, BPF_F_ADJ_ROOM_DECAP_L3_IPV6, TC_ACT_SHOT, TC_ACT_UNSPEC,
};
use aya_ebpf::btf_maps::HashMap;
use aya_ebpf::helpers::{bpf_skb_adjust_room, bpf_skb_change_proto};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use rvs_datapath::csum::Delta;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::options::Edit;
use rvs_datapath::packet::{ETHERTYPE, Ip, Packet, Window, parse};
use rvs_datapath::proto::tcp;
use rvs_datapath::tunnel::{self, Opened};

use skb::Skb;

/// Destination port of GUE.
#[unsafe(no_mangle)]
static GUE_PORT: Global<u16> = Global::new(6080);

/// The largest MSS that clients are told, of IPv4 (of IPv6 it is less by 20); 0: the server's own.
#[unsafe(no_mangle)]
static MSS: Global<u16> = Global::new(0);

/// The virtual addresses, as they lie in a packet; an IPv4 address in the first four bytes. The values are [`GUE_PORT`] and [`MSS`].
#[btf_map]
static VIPS: HashMap<[u8; 16], [u16; 2], 1024> = HashMap::new();

/// For tc ingress, before everything else: what is not in a tunnel for a virtual address goes on untouched.
#[classifier]
pub fn rvs_decap(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let mut packet = Skb::new(skb);
    packet.pull();
    // SAFETY: nobody writes the value meanwhile.
    let vip = |address: &[u8; 16]| unsafe { VIPS.get(address) }.is_some();
    match tunnel::open(&mut packet, GUE_PORT.load(), vip) {
        Some(opened) => unwrap(&mut packet, skb, opened),
        None => TC_ACT_UNSPEC as i32,
    }
}

/// For tc egress: of a SYN,ACK from a virtual address, the MSS.
#[classifier]
pub fn rvs_clamp(ctx: TcContext) -> i32 {
    let mut packet = Skb::new(ctx.skb.skb);
    packet.pull();
    let ethertype = packet.window(ETHERTYPE + 2).map(|w| u16::from_be(w.r16(ETHERTYPE)));
    match ethertype {
        Some(V4::ETHERTYPE) => clamp::<V4>(&mut packet, MSS.load()),
        Some(V6::ETHERTYPE) => clamp::<V6>(&mut packet, MSS.load().saturating_sub(20)),
        _ => {}
    }
    TC_ACT_UNSPEC as i32
}

#[inline(always)]
fn clamp<I: Ip>(packet: &mut Skb, most: u16) {
    // (Nobody answers with extra headers.)
    let Ok(flow) = parse::<I, _>(packet) else { return };
    const ANSWER: u8 = tcp::SYN | tcp::ACK;
    // SAFETY: nobody writes the value meanwhile.
    let ours = flow.tcp && flow.flags & ANSWER == ANSWER && unsafe { VIPS.get(&I::bytes(flow.source())) }.is_some();
    if ours && let Some((_, _, header)) = tcp::numbers::<I, _>(packet) {
        let edit = Edit { mss_most: most, ..Edit::NONE };
        if let Some((changed, _)) = packet.edit_options::<I>(header, edit) {
            packet.fix_transport(I::L4 + 16, false, Delta::default(), changed);
        }
    }
}

#[inline(always)]
fn unwrap(packet: &mut Skb, skb: *mut __sk_buff, opened: Opened) -> i32 {
    let inner = if opened.ethertype == 0x0800 { BPF_F_ADJ_ROOM_DECAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_DECAP_L3_IPV6 };
    // SAFETY: the context of this program.
    if unsafe { bpf_skb_adjust_room(skb, -(opened.outer as i32), BPF_ADJ_ROOM_MAC, inner as u64) } != 0
        && !unwrap_by_hand(skb, opened)
    {
        return TC_ACT_SHOT as i32;
    }
    packet.reread();
    let Some(mut w) = packet.window(ETHERTYPE + 2) else { return TC_ACT_SHOT as i32 };
    w.w16(ETHERTYPE, opened.ethertype.to_be());
    TC_ACT_UNSPEC as i32
}

/// What a change of the family adds to the packet, or takes from it: its headers are 20 and 40 bytes long.
const CHANGE: i32 = 20;

/// Linux before 6.3 does not know the flag that says of which family the inner packet is. There a packet is made one of that family first, which
/// makes its outer header longer or shorter.
#[inline(always)]
fn unwrap_by_hand(skb: *mut __sk_buff, opened: Opened) -> bool {
    let ethertype = opened.ethertype.to_be();
    // SAFETY: the context of this program, and a field of it.
    unsafe {
        let mut outer = opened.outer as i32;
        if (*skb).protocol != u32::from(ethertype) {
            if bpf_skb_change_proto(skb, ethertype, 0) != 0 {
                return false;
            }
            outer += if opened.ethertype == 0x0800 { -CHANGE } else { CHANGE };
        }
        bpf_skb_adjust_room(skb, -outer, BPF_ADJ_ROOM_MAC, 0) == 0
    }
}
