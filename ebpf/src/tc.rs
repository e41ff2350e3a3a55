//! The tc programs: the same pipeline as in XDP, over skbs. Its stages are functions of their own here too (see `stages`).

use ::core::hint::cold_path;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh};
use aya_ebpf::btf_maps::ProgramArray;
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use rvs_datapath::abi::{Iface, TRACED, hop};
use rvs_datapath::core;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::elder::NOT_MINE;
use rvs_datapath::packet::{ETHERTYPE, L3, Packet, Window};
use rvs_datapath::verdict::{Action, Reason, Stage, Verdict, pass};

use crate::calls;
use crate::maps::{self, Maps, NEXT_HOP};
use crate::skb::Skb;
use crate::stages::{aside, call, elder, gate, on};
use crate::trace;

const IPV4: u32 = 0x0800u16.to_be() as u32;
const IPV6: u32 = 0x86ddu16.to_be() as u32;

/// To whoever comes after us: other programs and filters, the kernel.
const NEXT: i32 = TC_ACT_UNSPEC;

/// The whole of the program for packets that come in.
#[inline(always)]
pub fn arrive(skb: *mut __sk_buff) -> i32 {
    let mut packet = Skb::new(skb);
    let ifindex = packet.ifindex();
    let iface = maps::iface(ifindex);
    let verdict = if iface.ifindex == ifindex {
        decide(&mut packet, skb, iface)
    } else {
        cold_path();
        if iface.ifindex == ifindex | TRACED {
            let verdict = Verdict::from_word(tc_traced(skb));
            packet.reread();
            verdict
        } else {
            pass(Reason::OtherInterface)
        }
    };
    maps::count_verdict(verdict);
    match verdict.action() {
        // A VLAN device takes it as it is.
        Action::Out(ifindex) => out(&mut packet, skb, verdict, ifindex & !hop::VLAN),
        // SAFETY: a field of the context.
        Action::Back => out(&mut packet, skb, verdict, unsafe { (*skb).ifindex }),
        Action::Up => {
            if maps::anothers(verdict.word()) != 0 {
                NOT_MINE as i32
            } else {
                NEXT
            }
        }
        Action::Drop => verdict.code().map_or(TC_ACT_SHOT as i32, |code| i32::from(code as i8)),
    }
}

/// What becomes of a frame that came in by this interface, traced or not.
#[inline(always)]
fn decide(packet: &mut Skb, skb: *mut __sk_buff, iface: &Iface) -> Verdict {
    // SAFETY: a field of the context. The kernel has taken the VLAN tag out of the frame; it comes by again as one of the VLAN device.
    if unsafe { (*skb).vlan_present } != 0 {
        return pass(Reason::NotIp);
    }
    packet.pull();
    process(packet, skb, iface)
}

/// The same, and `rvs trace` is told (see `xdp::traced`).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tc_traced(skb: *mut __sk_buff) -> u64 {
    let mut packet = Skb::new(skb);
    let ifindex = packet.ifindex();
    trace::keep(trace::From::Skb(skb), ifindex, packet.frame_len());
    let verdict = decide(&mut packet, skb, maps::iface(ifindex));
    if verdict.code().is_none() {
        trace::tell(verdict.word());
    }
    verdict.word()
}

#[inline(always)]
fn out(packet: &mut Skb, skb: *mut __sk_buff, verdict: Verdict, ifindex: u32) -> i32 {
    const FORWARDED: u32 = Reason::FullnatBare as u32;
    const _: () = assert!(Reason::Route as u32 == 0 && Reason::Fullnat as u32 <= FORWARDED && FORWARDED == 5);
    // SAFETY: a field of the context.
    if unsafe { (*skb).protocol } == IPV6 && verdict.counter() <= FORWARDED {
        // The hop limit, one less: the second byte of its word.
        packet.tell_sum(!u32::from(u16::from_ne_bytes([0, 1])));
    }
    if !verdict.is_to_resolve() {
        // SAFETY: a helper without memory arguments.
        return unsafe { bpf_redirect(ifindex, 0) as i32 };
    }
    let Some(next) = NEXT_HOP.get_ptr_mut(0) else { return TC_ACT_SHOT as i32 };
    const _: () = assert!(size_of::<[u32; 5]>() == size_of::<bpf_redir_neigh>());
    // SAFETY: a parameter block of the size given.
    unsafe { bpf_redirect_neigh(ifindex, next as *mut bpf_redir_neigh, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

/// The whole of the program for packets that go out. Those that were forwarded have been seen when they came in.
#[inline(always)]
pub fn leave(skb: *mut __sk_buff) -> i32 {
    // SAFETY: fields of the context.
    let (from, protocol) = unsafe { ((*skb).ingress_ifindex, (*skb).protocol) };
    if from != 0 || protocol != IPV4 && protocol != IPV6 {
        return NEXT;
    }
    let mut packet = Skb::new(skb);
    packet.pull();
    // Without an Ethernet header it is none of ours.
    if !packet.window(L3).is_some_and(|w| w.r16(ETHERTYPE) as u32 == protocol) {
        return NEXT;
    }
    let verdict = if protocol == IPV4 { tc_leave4(skb) } else { tc_leave6(skb) };
    if verdict == UNTOUCHED {
        return match tc_out_elder(skb) as u32 {
            NOT_MINE => NEXT,
            code => code as i32,
        };
    }
    let verdict = Verdict::from_word(verdict);
    maps::count_verdict(verdict);
    if verdict.action() == Action::Drop { TC_ACT_SHOT as i32 } else { NEXT }
}

/// No verdict: the packet is not ours.
const UNTOUCHED: u64 = 0;

#[inline(always)]
fn tables(skb: *mut __sk_buff) -> Maps<true> {
    // SAFETY: fields of the context.
    let (ifindex, segment) = unsafe { ((*skb).ifindex, (*skb).gso_size) };
    Maps::new(skb as *mut _, ifindex, segment == 0)
}

#[inline(always)]
fn process(packet: &mut Skb, skb: *mut __sk_buff, iface: &Iface) -> Verdict {
    match core::untagged(core::addressed(packet, iface)) {
        Ok(4) => on(tc_whole4(skb), |_, _| None, || tc_further4(skb)),
        Ok(_) => on(tc_whole6(skb), |_, _| None, || tc_further6(skb)),
        Err(verdict) => verdict,
    }
}

/// Where the programs of further stages are, by their gates' numbers: the loader fills it.
#[btf_map]
static TC_GATES: ProgramArray<5> = ProgramArray::new();
elder!(tc_elder(__sk_buff: TcContext), TC_GATES, 4, NOT_MINE);

/// The same for egress, where only an elder may be.
#[btf_map]
static TC_OUT_GATES: ProgramArray<1> = ProgramArray::new();
elder!(tc_out_elder(__sk_buff: TcContext), TC_OUT_GATES, 0, NOT_MINE);

macro_rules! further {
    ($gate:ident, $number:literal, $name:ident, $whole:ident, [$($open:ident)*], [$($stage:ident)*]) => {
        gate!($gate(__sk_buff: TcContext), TC_GATES, $number);
        #[unsafe(no_mangle)]
        #[unsafe(link_section = "classifier")]
        pub extern "C" fn $name(skb: *mut __sk_buff) -> u64 {
            core::further(calls::gone_on(), |stage, number| call!(stage, number, skb, $whole(skb), tc_elder, [$($open)*], [$($stage)*])).word()
        }
    };
}
further!(tc_further4, 0, rvs_tc_further4, tc_whole4, [first4 enter4 link4 lend4 make_way4 give_up4 note4],
    [tc_retire4 tc_forward4 tc_linked4 tc_anew4 tc_tunnel4 tc_time_exceeded4 tc_port_unreachable4 tc_too_big4 tc_related4 tc_error_tunnel4
     tc_fullnat4 tc_introduce4 tc_fullnat_reply4 tc_reply_options4 tc_fullnat_send4 tc_far4 tc_fragment4 tc_error_lent4 tc_far_reply4
     tc_challenge4 tc_knock4 tc_announce4 tc_error_outer4 tc_aside4]);
further!(tc_further6, 1, rvs_tc_further6, tc_whole6, [first6 enter6 link6 lend6 make_way6 give_up6 note6],
    [tc_retire6 tc_forward6 tc_linked6 tc_anew6 tc_tunnel6 tc_time_exceeded6 tc_port_unreachable6 tc_too_big6 tc_related6 tc_error_tunnel6
     tc_fullnat6 tc_introduce6 tc_fullnat_reply6 tc_reply_options6 tc_fullnat_send6 tc_far6 tc_fragment6 tc_error_lent6 tc_far_reply6
     tc_challenge6 tc_knock6 tc_announce6 tc_error_outer6 tc_aside6]);

macro_rules! run {
    ($family:ty) => {
        |skb, stage, number| core::run::<$family, _, _>(&mut Skb::new(skb), &tables(skb), stage, number).word()
    };
}
aside!(tc_aside4(__sk_buff: TcContext), TC_GATES, 2, rvs_tc_aside4, "classifier", run!(V4));
aside!(tc_aside6(__sk_buff: TcContext), TC_GATES, 3, rvs_tc_aside6, "classifier", run!(V6));

macro_rules! stages {
    ($($four:ident $six:ident($($number:ident)?) $stage:ident;)*) => { $(
        stages!(@ $four($($number)?) V4, $stage);
        stages!(@ $six($($number)?) V6, $stage);
    )* };
    (@ $name:ident($($number:ident)?) $family:ty, $stage:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(skb: *mut __sk_buff $(, $number: u32)?) -> u64 {
            let mut packet = Skb::new(skb);
            if matches!(Stage::$stage, Stage::TimeExceeded | Stage::PortUnreachable | Stage::TooBig | Stage::ErrorOuter) {
                packet.look_at_checksum::<$family>();
            }
            if matches!(Stage::$stage, Stage::Far | Stage::FarReply | Stage::Related | Stage::ErrorTunnel | Stage::ErrorLent | Stage::ErrorOuter) {
                packet.pull_far();
            }
            let number = 0 $(+ $number)?;
            core::run::<$family, _, _>(&mut packet, &tables(skb), Stage::$stage, number).word()
        }
    };
}
stages! {
    tc_whole4 tc_whole6() Whole;
    tc_retire4 tc_retire6() Retire;
    tc_forward4 tc_forward6(dest) Forward;
    tc_linked4 tc_linked6(place) Linked;
    tc_anew4 tc_anew6(dest) Anew;
    tc_tunnel4 tc_tunnel6(dest) Tunnel;
    tc_too_big4 tc_too_big6(mtu) TooBig;
    tc_related4 tc_related6() Related;
    tc_error_tunnel4 tc_error_tunnel6(dest) ErrorTunnel;
    tc_fullnat4 tc_fullnat6(slot) Fullnat;
    tc_introduce4 tc_introduce6(slot) Introduce;
    tc_fullnat_reply4 tc_fullnat_reply6(slot) FullnatReply;
    tc_reply_options4 tc_reply_options6(slot) ReplyOptions;
    tc_fullnat_send4 tc_fullnat_send6(place) FullnatSend;
    tc_far4 tc_far6(noted) Far;
    tc_fragment4 tc_fragment6() Fragment;
    tc_error_lent4 tc_error_lent6() ErrorLent;
    tc_error_outer4 tc_error_outer6() ErrorOuter;
    tc_far_reply4 tc_far_reply6() FarReply;
    tc_challenge4 tc_challenge6(room) Challenge;
    tc_knock4 tc_knock6(number) Knock;
    tc_announce4 tc_announce6(number) Announce;
    tc_time_exceeded4 tc_time_exceeded6() TimeExceeded;
    tc_port_unreachable4 tc_port_unreachable6() PortUnreachable;
}

macro_rules! leave {
    ($name:ident, $family:ty) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(skb: *mut __sk_buff) -> u64 {
            core::leave::<$family, _, _>(&mut Skb::new(skb), &tables(skb)).map_or(UNTOUCHED, Verdict::word)
        }
    };
}
leave!(tc_leave4, V4);
leave!(tc_leave6, V6);
