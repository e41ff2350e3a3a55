//! The pipeline for XDP, native and generic.

use ::core::hint::cold_path;

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::XdpContext;
use rvs_datapath::abi::iface::REDIRECT_BACK;
use rvs_datapath::abi::{Iface, TRACED};
use rvs_datapath::core;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::packet::Packet;
use rvs_datapath::verdict::{Action, Reason, Stage, Verdict, pass};

use crate::ctx::Xdp;
use crate::maps::{self, Maps};
use crate::stages::call;
use crate::trace;

/// The whole of an XDP program.
#[inline(always)]
pub fn run(ctx: &XdpContext) -> u32 {
    let mut packet = Xdp::new(ctx);
    let ifindex = packet.ifindex();
    let iface = maps::iface(ifindex);
    let verdict = if iface.ifindex == ifindex {
        process(ctx, ifindex, core::arrive(&mut packet, iface))
    } else {
        cold_path();
        if iface.ifindex == ifindex | TRACED {
            Verdict::from_word(traced(ctx.ctx))
        } else {
            pass(Reason::OtherInterface)
        }
    };
    maps::count_verdict(verdict);
    match verdict.action() {
        // SAFETY: a helper without memory arguments.
        Action::Out(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        Action::Back if iface.flags & REDIRECT_BACK != 0 => {
            // SAFETY: as above.
            unsafe { bpf_redirect(ifindex, 0) as u32 }
        }
        Action::Back => xdp_action::XDP_TX,
        Action::Up => xdp_action::XDP_PASS,
        Action::Drop => xdp_action::XDP_DROP,
    }
}

/// The same, and `rvs trace` is told.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn traced(ctx: *mut xdp_md) -> u64 {
    let ctx = XdpContext::new(ctx);
    let mut packet = Xdp::new(&ctx);
    let ifindex = packet.ifindex();
    trace::keep(trace::From::Xdp(ctx.ctx), ifindex, packet.frame_len());
    let iface = Iface { ifindex, ..*maps::iface(ifindex) };
    let verdict = process(&ctx, ifindex, core::arrive(&mut packet, &iface));
    trace::tell(verdict.word());
    verdict.word()
}

/// All of it, for a packet of this family.
#[inline(always)]
fn process(ctx: &XdpContext, ifindex: u32, family: Result<u8, Verdict>) -> Verdict {
    let ctx = ctx.ctx;
    match family {
        Ok(4) => core::stages(|stage, number| {
            call!(stage, number, ctx, whole4(ctx, ifindex), [first4 enter4 link4 make_way4 give_up4],
                [retire4 forward4 linked4 anew4 tunnel4 time_exceeded4 port_unreachable4 too_big4 related4 error_tunnel4])
        }),
        Ok(_) => core::stages(|stage, number| {
            call!(stage, number, ctx, whole6(ctx, ifindex), [first6 enter6 link6 make_way6 give_up6],
                [retire6 forward6 linked6 anew6 tunnel6 time_exceeded6 port_unreachable6 too_big6 related6 error_tunnel6])
        }),
        Err(verdict) => verdict,
    }
}

macro_rules! stages {
    ($($four:ident $six:ident($($number:ident)?) $stage:ident;)*) => { $(
        stages!(@ $four($($number)?) V4, $stage);
        stages!(@ $six($($number)?) V6, $stage);
    )* };
    (@ $name:ident($($number:ident)?) $family:ty, $stage:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(ctx: *mut xdp_md $(, $number: u32)?) -> u64 {
            let ctx = XdpContext::new(ctx);
            let number = 0 $(+ $number)?;
            // The first stage, which needs no number, is told the interface.
            let mut packet = if matches!(Stage::$stage, Stage::Whole) { Xdp::by(&ctx, number) } else { Xdp::new(&ctx) };
            let maps = Maps::of(&ctx, packet.ifindex());
            core::run::<$family, _, _>(&mut packet, &maps, Stage::$stage, number).word()
        }
    };
}
stages! {
    whole4 whole6(ifindex) Whole;
    retire4 retire6() Retire;
    forward4 forward6(dest) Forward;
    linked4 linked6(place) Linked;
    anew4 anew6(dest) Anew;
    tunnel4 tunnel6(dest) Tunnel;
    too_big4 too_big6(mtu) TooBig;
    related4 related6() Related;
    error_tunnel4 error_tunnel6(dest) ErrorTunnel;
    time_exceeded4 time_exceeded6() TimeExceeded;
    port_unreachable4 port_unreachable6() PortUnreachable;
}
