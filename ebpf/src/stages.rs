//! The stages of the pipeline as functions of their own, verified once each, with a stack frame each. Those that need the packet take
//! its context, and XDP and tc have their own; those that open a connection begin with what was kept of the packet, and are shared.

use ::core::arch::asm;
use ::core::hint::cold_path;
use rvs_datapath::core;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::elder::NOT_MINE;
use rvs_datapath::verdict::{Reason, Stage, Verdict, drop};

use crate::calls;
use crate::maps::Maps;

/// The function of a stage, called: those of one family and hook, by name.
macro_rules! call {
    ($stage:ident, $number:ident, $ctx:expr, $whole:expr, $elder:ident, [$first:ident $enter:ident $link:ident $lend:ident $make_way:ident $give_up:ident $note:ident],
     [$retire:ident $forward:ident $linked:ident $anew:ident $tunnel:ident $time_exceeded:ident $port_unreachable:ident
      $too_big:ident $related:ident $error_tunnel:ident $fullnat:ident $introduce:ident $fullnat_reply:ident
      $reply_options:ident $fullnat_send:ident $far:ident $fragment:ident $error_lent:ident $far_reply:ident
      $challenge:ident $knock:ident $announce:ident $error_outer:ident $aside:ident]) => {
        rvs_datapath::verdict::Verdict::from_word(match $stage {
            Stage::Whole => $whole,
            Stage::First => $crate::stages::or_elder($elder($ctx), || $crate::stages::$first()),
            Stage::Stranger => {
                $crate::stages::or_elder($elder($ctx), || rvs_datapath::verdict::Verdict::passed($number).word())
            }
            Stage::Enter => $crate::stages::$enter($number),
            Stage::Link => $crate::stages::$link($number),
            Stage::Lend => $crate::stages::$lend($number),
            Stage::MakeWay => $crate::stages::$make_way($number),
            Stage::GiveUp => $crate::stages::$give_up($number),
            Stage::Retire => $retire($ctx),
            Stage::Forward => $forward($ctx, $number),
            Stage::Linked => $linked($ctx, $number),
            Stage::Anew => $anew($ctx, $number),
            Stage::Tunnel => $tunnel($ctx, $number),
            Stage::TooBig => $too_big($ctx, $number),
            Stage::Related => $related($ctx),
            Stage::ErrorTunnel => $error_tunnel($ctx, $number),
            Stage::Fullnat => $fullnat($ctx, $number),
            Stage::Introduce => $introduce($ctx, $number),
            Stage::FullnatReply => $fullnat_reply($ctx, $number),
            Stage::ReplyOptions => $reply_options($ctx, $number),
            Stage::FullnatSend => $fullnat_send($ctx, $number),
            Stage::Far => $far($ctx, $number),
            Stage::Note => $crate::stages::$note(),
            Stage::ErrorLent => $error_lent($ctx),
            Stage::ErrorOuter => $error_outer($ctx),
            Stage::FarReply => $far_reply($ctx),
            Stage::Challenge => $challenge($ctx, $number),
            Stage::Knock => $knock($ctx, $number),
            Stage::Announce => $announce($ctx, $number),
            Stage::Fragment => $fragment($ctx),
            Stage::TimeExceeded => $time_exceeded($ctx),
            Stage::PortUnreachable => $port_unreachable($ctx),
            Stage::Early => $crate::stages::or_elder($elder($ctx), || {
                $crate::calls::go_on(rvs_datapath::verdict::Verdict::go($stage, $number));
                $aside($ctx)
            }),
            Stage::Elsewhere | Stage::Large | Stage::Reject => {
                $crate::calls::go_on(rvs_datapath::verdict::Verdict::go($stage, $number));
                $aside($ctx)
            }
        })
    };
}
pub(crate) use call;

/// Nearly always the first stage has the verdict, or another one that is near. What comes after those is behind a gate, so that it costs them
/// nothing.
#[inline(always)]
pub fn on(word: u64, near: impl FnOnce(Stage, u32) -> Option<u64>, gate: impl FnOnce() -> u64) -> Verdict {
    let mut verdict = Verdict::from_word(word);
    let Some((stage, number)) = verdict.next() else { return verdict };
    cold_path();
    if let Some(word) = near(stage, number) {
        verdict = Verdict::from_word(word);
        if verdict.next().is_none() {
            return verdict;
        }
    }
    calls::go_on(verdict);
    Verdict::from_word(gate())
}

/// A program behind a gate of the further stages: what few packets need.
macro_rules! aside {
    ($gate:ident($context:ty: $kind:ty), $programs:ident, $number:literal, $name:ident, $section:literal, $run:expr) => {
        $crate::stages::gate!($gate($context: $kind), $programs, $number);
        #[unsafe(no_mangle)]
        #[unsafe(link_section = $section)]
        pub extern "C" fn $name(ctx: *mut $context) -> u64 {
            let Some((stage, number)) = $crate::calls::gone_on().next() else { return $crate::stages::closed() };
            let run = $run;
            // By constants: of each run only that stage is left.
            match stage {
                Stage::Early => run(ctx, Stage::Early, number),
                Stage::Elsewhere => run(ctx, Stage::Elsewhere, number),
                Stage::Large => run(ctx, Stage::Large, number),
                Stage::Reject => run(ctx, Stage::Reject, number),
                _ => $crate::stages::closed(),
            }
        }
    };
}
pub(crate) use aside;

/// A gate: behind it are the further stages of a family, a program of their own, which the verifier sees by itself (its limit of steps is one for each
/// program). It goes there by a tail call, which takes the place of the function that it is in: what the program returns, all 64 bits of R0, is
/// what this function does.
macro_rules! gate {
    ($name:ident($context:ty: $kind:ty), $programs:ident, $number:literal) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(ctx: *mut $context) -> u64 {
            // SAFETY: the array has programs of this kind only, and nothing here is to be dropped.
            unsafe { $programs.tail_call(&<$kind>::new(ctx), $number) };
            $crate::stages::closed()
        }
    };
}
pub(crate) use gate;

/// A gate to the elder's program for the same hook, if there is one: its answer, or `closed` (see [`rvs_datapath::elder`]).
macro_rules! elder {
    ($name:ident($context:ty: $kind:ty), $programs:ident, $number:literal, $closed:expr) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(ctx: *mut $context) -> u64 {
            // SAFETY: as for a gate.
            unsafe { $programs.tail_call(&<$kind>::new(ctx), $number) };
            $crate::stages::unknown($closed as u32 as u64)
        }
    };
}
pub(crate) use elder;

/// The elder's answer as a verdict, unless the packet is none of its.
#[inline(always)]
pub fn or_elder(answer: u64, own: impl FnOnce() -> u64) -> u64 {
    if answer as u32 == NOT_MINE {
        return own();
    }
    Verdict::done(answer as u32).word()
}

/// No program is there yet: it is before any packet comes. (By an instruction of our own: LLVM, which knows nothing of tail calls, must not take it for
/// what a gate always returns.)
#[inline(always)]
pub fn closed() -> u64 {
    unknown(drop(Reason::Internal).word())
}

/// This number, of which LLVM is not to know what it is. (It has 31 bits at most.)
#[inline(always)]
pub fn unknown(mut number: u64) -> u64 {
    // SAFETY: arithmetic on a register.
    unsafe { asm!("{0} &= 0x7fffffff", inout(reg) number, options(pure, nomem, nostack)) };
    number
}

// Only parameters that are used: LLVM drops others, and the verifier then misses them at the call.
macro_rules! open {
    ($($four:ident $six:ident($($number:ident)?) $stage:ident;)*) => { $(
        open!(@ $four($($number)?) V4, $stage);
        open!(@ $six($($number)?) V6, $stage);
    )* };
    (@ $name:ident($($number:ident)?) $family:ty, $stage:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name($($number: u32)?) -> u64 {
            let number = 0 $(+ $number)?;
            core::open::<$family, _>(&Maps::NOWHERE, &calls::kept(), Stage::$stage, number).word()
        }
    };
}
open! {
    first4 first6() First;
    enter4 enter6(dest) Enter;
    link4 link6(place) Link;
    lend4 lend6(place) Lend;
    make_way4 make_way6(place) MakeWay;
    give_up4 give_up6(place) GiveUp;
    note4 note6() Note;
}
