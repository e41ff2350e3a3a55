//! The stages of the pipeline as functions of their own, verified once each, with a stack frame each. They take the context, and
//! begin with the packet anew.

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::XdpContext;
use rvs_datapath::abi::iface::REDIRECT_BACK;
use rvs_datapath::core;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::packet::Packet;
use rvs_datapath::verdict::{Action, Stage, Verdict};

use crate::ctx::Xdp;
use crate::maps::{self, Maps};

/// The whole of an XDP program.
#[inline(always)]
pub fn run(ctx: &XdpContext) -> u32 {
    let mut packet = Xdp::new(ctx);
    let ifindex = packet.ifindex();
    let iface = maps::iface(ifindex);
    let verdict = process(ctx, ifindex, core::arrive(&mut packet, iface));
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

/// All of it, for a packet of this family.
#[inline(always)]
fn process(ctx: &XdpContext, ifindex: u32, family: Result<u8, Verdict>) -> Verdict {
    match family {
        Ok(4) => core::stages(|stage, number| {
            Verdict::from_word(match stage {
                Stage::Whole => whole4(ctx.ctx, ifindex),
                Stage::Retire => retire4(ctx.ctx),
                Stage::First => first4(ctx.ctx),
                Stage::Enter => enter4(ctx.ctx, number),
                Stage::Link => link4(ctx.ctx, number),
                Stage::MakeWay => make_way4(ctx.ctx, number),
                Stage::GiveUp => give_up4(ctx.ctx, number),
                Stage::TimeExceeded => time_exceeded4(ctx.ctx),
                Stage::PortUnreachable => port_unreachable4(ctx.ctx),
                Stage::Forward => forward4(ctx.ctx, number),
                Stage::Linked => linked4(ctx.ctx, number),
            })
        }),
        Ok(_) => core::stages(|stage, number| {
            Verdict::from_word(match stage {
                Stage::Whole => whole6(ctx.ctx, ifindex),
                Stage::Retire => retire6(ctx.ctx),
                Stage::First => first6(ctx.ctx),
                Stage::Enter => enter6(ctx.ctx, number),
                Stage::Link => link6(ctx.ctx, number),
                Stage::MakeWay => make_way6(ctx.ctx, number),
                Stage::GiveUp => give_up6(ctx.ctx, number),
                Stage::TimeExceeded => time_exceeded6(ctx.ctx),
                Stage::PortUnreachable => port_unreachable6(ctx.ctx),
                Stage::Forward => forward6(ctx.ctx, number),
                Stage::Linked => linked6(ctx.ctx, number),
            })
        }),
        Err(verdict) => verdict,
    }
}

// Only parameters that are used: LLVM drops others, and the verifier then misses them at the call.
macro_rules! stages {
    ($($name:ident($($number:ident)?) $family:ty, $stage:ident;)*) => { $(
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
    )* };
}
stages! {
    whole4(ifindex) V4, Whole;
    whole6(ifindex) V6, Whole;
    retire4() V4, Retire;
    retire6() V6, Retire;
    first4() V4, First;
    first6() V6, First;
    enter4(dest) V4, Enter;
    enter6(dest) V6, Enter;
    link4(place) V4, Link;
    link6(place) V6, Link;
    make_way4(place) V4, MakeWay;
    make_way6(place) V6, MakeWay;
    give_up4(place) V4, GiveUp;
    give_up6(place) V6, GiveUp;
    time_exceeded4() V4, TimeExceeded;
    time_exceeded6() V6, TimeExceeded;
    port_unreachable4() V4, PortUnreachable;
    forward4(dest) V4, Forward;
    linked4(place) V4, Linked;
    port_unreachable6() V6, PortUnreachable;
    forward6(dest) V6, Forward;
    linked6(place) V6, Linked;
}
