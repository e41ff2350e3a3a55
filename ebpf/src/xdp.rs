//! The pipeline for XDP, native and generic.

use ::core::hint::cold_path;

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::btf_maps::ProgramArray;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::XdpContext;
use rvs_datapath::abi::iface::REDIRECT_BACK;
use rvs_datapath::abi::{Iface, TRACED};
use rvs_datapath::core;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::elder::NOT_MINE;
use rvs_datapath::near;
use rvs_datapath::packet::Packet;
use rvs_datapath::verdict::{Action, Reason, Stage, Verdict, pass};
use rvs_datapath::vlan::{self, Tags};

use crate::calls;
use crate::ctx::Xdp;
use crate::maps::{self, Maps};
use crate::stages::{aside, call, elder, gate, on};
use crate::trace;

/// The whole of an XDP program.
#[inline(always)]
pub fn run(ctx: &XdpContext) -> u32 {
    let mut packet = Xdp::new(ctx);
    let ifindex = packet.ifindex();
    let iface = maps::iface(ifindex);
    let verdict = if iface.ifindex == ifindex {
        decide(ctx, &mut packet, iface, ifindex)
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
        Action::Up => {
            if maps::anothers(verdict.word()) != 0 {
                NOT_MINE
            } else {
                xdp_action::XDP_PASS
            }
        }
        Action::Drop => verdict.code().map_or(xdp_action::XDP_DROP, u32::from),
    }
}

/// What becomes of a frame that came in by this interface, traced or not.
#[inline(always)]
fn decide(ctx: &XdpContext, packet: &mut Xdp<'_>, iface: &Iface, ifindex: u32) -> Verdict {
    let family = core::addressed(packet, iface);
    if core::is_tagged(family) {
        cold_path();
        return Verdict::from_word(tagged(ctx.ctx));
    }
    let verdict = process(ctx, ifindex, family);
    if verdict.is_by_vlan() {
        cold_path();
        return Verdict::from_word(retag(ctx.ctx, verdict.word(), 0));
    }
    verdict
}

/// The same, and `rvs trace` is told.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn traced(ctx: *mut xdp_md) -> u64 {
    let ctx = XdpContext::new(ctx);
    let mut packet = Xdp::new(&ctx);
    let ifindex = packet.ifindex();
    trace::keep(trace::From::Xdp(ctx.ctx), ifindex, packet.frame_len());
    let verdict = decide(&ctx, &mut packet, maps::iface(ifindex), ifindex);
    // (What the elder has done it has told of.)
    if verdict.code().is_none() {
        trace::tell(verdict.word());
    }
    verdict.word()
}

/// All of it, for a packet of this family.
#[inline(always)]
fn process(ctx: &XdpContext, ifindex: u32, family: Result<u8, Verdict>) -> Verdict {
    let ctx = ctx.ctx;
    /// See [`near::go`], which has the same stages in one function.
    macro_rules! near {
        ($tunnel:ident, $request:ident, $reply:ident, $send:ident) => {
            |stage, number| match stage {
                Stage::Tunnel => Some($tunnel(ctx, number, ifindex)),
                Stage::Fullnat => Some($request(ctx, number, ifindex)),
                Stage::FullnatReply => {
                    let word = $reply(ctx, number);
                    match Verdict::from_word(word).next() {
                        Some((Stage::FullnatSend, number)) => Some($send(ctx, number, ifindex)),
                        _ => Some(word),
                    }
                }
                _ => None,
            }
        };
    }
    match family {
        Ok(4) => {
            on(whole4(ctx, ifindex), near!(near_tunnel4, near_request4, near_reply4, near_send4), || further4(ctx))
        }
        Ok(_) => {
            on(whole6(ctx, ifindex), near!(near_tunnel6, near_request6, near_reply6, near_send6), || further6(ctx))
        }
        Err(verdict) => verdict,
    }
}

// See `rvs_datapath::near`. (Only parameters that are used, as in `stages`.)
macro_rules! near {
    ($($four:ident $six:ident($($ifindex:ident)?) $what:ident;)*) => { $(
        near!(@ $four($($ifindex)?) V4, $what);
        near!(@ $six($($ifindex)?) V6, $what);
    )* };
    (@ $name:ident($($ifindex:ident)?) $family:ty, $what:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(ctx: *mut xdp_md, number: u32 $(, $ifindex: u32)?) -> u64 {
            let ctx = XdpContext::new(ctx);
            let ifindex = 0 $(+ $ifindex)?;
            let mut packet = Xdp::by(&ctx, ifindex);
            let maps = Maps::of(&ctx, ifindex);
            near::$what::<$family, _, _>(&mut packet, &maps, number).word()
        }
    };
}
near! {
    near_tunnel4 near_tunnel6(ifindex) into_tunnel;
    near_request4 near_request6(ifindex) request;
    near_reply4 near_reply6() reply;
    near_send4 near_send6(ifindex) send;
}

/// Where the programs of further stages are, by their gates' numbers: the loader fills it.
#[btf_map]
static XDP_GATES: ProgramArray<5> = ProgramArray::new();
elder!(xdp_elder(xdp_md: XdpContext), XDP_GATES, 4, NOT_MINE);

/// Ask the elder about a packet. It gets one of a VLAN device as that came, with its tags on.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn elder(ctx: *mut xdp_md) -> u64 {
    let vlan = calls::vlan();
    if vlan == 0 {
        return xdp_elder(ctx);
    }
    if Verdict::from_word(retag(ctx, pass(Reason::Icmp).word(), calls::tags())).action() == Action::Drop {
        return xdp_action::XDP_DROP.into();
    }
    let answer = xdp_elder(ctx);
    if answer as u32 == NOT_MINE && untag(ctx) == 0 {
        return xdp_action::XDP_DROP.into();
    }
    answer
}

macro_rules! further {
    ($gate:ident, $number:literal, $name:ident, $whole:ident, [$($open:ident)*], [$($stage:ident)*]) => {
        gate!($gate(xdp_md: XdpContext), XDP_GATES, $number);
        #[unsafe(no_mangle)]
        #[unsafe(link_section = "xdp")]
        pub extern "C" fn $name(ctx: *mut xdp_md) -> u64 {
            let again = || $whole(ctx, arrived_by(&XdpContext::new(ctx)));
            core::further(calls::gone_on(), |stage, number| call!(stage, number, ctx, again(), elder, [$($open)*], [$($stage)*])).word()
        }
    };
}
further!(further4, 0, rvs_further4, whole4, [first4 enter4 link4 lend4 make_way4 give_up4 note4],
    [retire4 forward4 linked4 anew4 tunnel4 time_exceeded4 port_unreachable4 too_big4 related4 error_tunnel4 fullnat4 introduce4 fullnat_reply4
     reply_options4 fullnat_send4 far4 fragment4 error_lent4 far_reply4 challenge4 knock4 announce4 error_outer4 aside4]);
further!(further6, 1, rvs_further6, whole6, [first6 enter6 link6 lend6 make_way6 give_up6 note6],
    [retire6 forward6 linked6 anew6 tunnel6 time_exceeded6 port_unreachable6 too_big6 related6 error_tunnel6 fullnat6 introduce6 fullnat_reply6
     reply_options6 fullnat_send6 far6 fragment6 error_lent6 far_reply6 challenge6 knock6 announce6 error_outer6 aside6]);

macro_rules! run {
    ($family:ty) => {
        |ctx, stage, number| {
            let ctx = XdpContext::new(ctx);
            let mut packet = Xdp::by(&ctx, arrived_by(&ctx));
            let maps = Maps::of(&ctx, packet.ifindex());
            core::run::<$family, _, _>(&mut packet, &maps, stage, number).word()
        }
    };
}
aside!(aside4(xdp_md: XdpContext), XDP_GATES, 2, rvs_aside4, "xdp", run!(V4));
aside!(aside6(xdp_md: XdpContext), XDP_GATES, 3, rvs_aside6, "xdp", run!(V6));

/// The interface that a frame counts as come in by.
#[inline(always)]
fn arrived_by(ctx: &XdpContext) -> u32 {
    match calls::vlan() {
        // SAFETY: a field of the context.
        0 => unsafe { (*ctx.ctx).ingress_ifindex },
        vlan => vlan,
    }
}

/// All of it, for a frame with VLAN tags.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tagged(ctx: *mut xdp_md) -> u64 {
    let ctx = XdpContext::new(ctx);
    let tags = untag(ctx.ctx);
    if tags == 0 {
        return pass(Reason::NotIp).word();
    }
    let by = arrived_by(&ctx);
    let family = core::untagged(core::arrive(&mut Xdp::by(&ctx, by), &maps::whosever(by)));
    let mut verdict = process(&ctx, by, family);
    if vlan::concerns(verdict, Some(Tags::from_word(tags))) {
        verdict = Verdict::from_word(retag(ctx.ctx, verdict.word(), tags));
    }
    calls::set_vlan(0);
    verdict.word()
}

/// Take off the tags of a frame of a VLAN device of ours; 0: it is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn untag(ctx: *mut xdp_md) -> u64 {
    let ctx = XdpContext::new(ctx);
    let mut packet = Xdp::new(&ctx);
    let Some(tags) = vlan::untag(&mut packet, &Maps::of(&ctx, 0)) else { return 0 };
    calls::set_vlan(packet.ifindex());
    calls::set_tags(tags.word());
    tags.word()
}

/// See [`core::retag`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn retag(ctx: *mut xdp_md, verdict: u64, tags: u64) -> u64 {
    let ctx = XdpContext::new(ctx);
    let tags = (tags != 0).then_some(Tags::from_word(tags));
    core::retag(&mut Xdp::new(&ctx), &Maps::of(&ctx, 0), Verdict::from_word(verdict), tags).word()
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
            let by = if matches!(Stage::$stage, Stage::Whole) { number } else { arrived_by(&ctx) };
            let mut packet = Xdp::by(&ctx, by);
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
    fullnat4 fullnat6(slot) Fullnat;
    introduce4 introduce6(slot) Introduce;
    fullnat_reply4 fullnat_reply6(slot) FullnatReply;
    reply_options4 reply_options6(slot) ReplyOptions;
    fullnat_send4 fullnat_send6(place) FullnatSend;
    far4 far6(noted) Far;
    fragment4 fragment6() Fragment;
    error_lent4 error_lent6() ErrorLent;
    error_outer4 error_outer6() ErrorOuter;
    far_reply4 far_reply6() FarReply;
    challenge4 challenge6(room) Challenge;
    knock4 knock6(number) Knock;
    announce4 announce6(number) Announce;
    time_exceeded4 time_exceeded6() TimeExceeded;
    port_unreachable4 port_unreachable6() PortUnreachable;
}
