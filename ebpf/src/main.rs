//! The programs. They decide nothing: `rvs_datapath::core::process` does; here is one match from its verdict to the kernel's codes.
#![no_std]
#![no_main]
#![feature(core_intrinsics, asm_experimental_arch, adt_const_params)]
#![allow(internal_features, reason = "atomic compare-and-swap has no other way on this target")]

mod calls;
mod ctx;
mod flat;
mod gap;
mod hand;
mod maps;
mod mover;
mod object;
mod skb;
mod stages;
mod tc;
mod timer;
mod trace;
mod words;
mod xdp;

use aya_ebpf::bindings::xdp_action;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::{TcContext, XdpContext};

/// For native and generic XDP.
#[aya_ebpf::macros::xdp]
pub fn rvs_xdp(ctx: XdpContext) -> u32 {
    xdp::run(&ctx)
}

/// For tc ingress.
#[classifier]
pub fn rvs_tc_in(ctx: TcContext) -> i32 {
    tc::arrive(ctx.skb.skb)
}

/// For tc egress: replies of real servers that are this host.
#[classifier]
pub fn rvs_tc_out(ctx: TcContext) -> i32 {
    tc::leave(ctx.skb.skb)
}

/// For the far end of a veth, which takes redirected frames only if it has a program.
#[aya_ebpf::macros::xdp]
pub fn rvs_pass(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}
