//! Packets that the programs hand over: fragments that came before the first one of their datagram wait here for it, what is too large for a tunnel is cut
//! into parts. Both then come in again, and take their way like any other packet.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use rvs_control::limits::HELD_OF_SOURCE_MAX;
use rvs_control::parts::{Part, Waiting, cut};
use rvs_datapath::verdict::Reason;
use rvs_sys::bpf::{BpfError, parts::datagram};
use tokio::task::yield_now;
use tokio::time::{MissedTickBehavior, interval};

use crate::director::{Director, shown};

/// The programs hand packets over for so long after they have heard of us last, and hear of us once a second: with a daemon that is gone nothing is
/// lost for longer than that.
const LEASE_S: u32 = 3;
const BEAT: Duration = Duration::from_secs(1);
/// How often those that wait are looked after.
const LOOK: Duration = Duration::from_millis(2);
/// Fragments that are taken in one go. Of a flood no more than that between two looks: what else there is to do has its turn, and the ring is the limit.
const EARLY_AT_ONCE: usize = 256;
/// With more datagrams than that waiting, which is a flood, fragments are taken after each look only: to look for all of them at each one would leave a
/// CPU with nothing else to do.
const CROWD: usize = HELD_OF_SOURCE_MAX;
/// Frames that are sent in again in one go, before others have their turn: each takes some hundred microseconds.
const AGAIN_AT_ONCE: usize = 8;
/// With so many on their way in, no more are released or cut: who has fragments by the thousand and their first one, too, keeps his own waiting.
const ON_THEIR_WAY: usize = 64;

/// Until the process ends.
pub async fn run(director: Rc<RefCell<Director>>) {
    let (mut waiting, mut coming) = (Waiting::default(), VecDeque::new());
    loop {
        if let Err(error) = serve(&director, &mut waiting, &mut coming).await {
            tracing::warn!(error = %shown(&error), "fragments that come too early, and packets too large for a tunnel, are lost for a second");
            tokio::time::sleep(BEAT).await;
        }
    }
}

/// Until the programs are loaded anew, with rings of their own.
async fn serve(
    director: &RefCell<Director>,
    waiting: &mut Waiting,
    coming: &mut VecDeque<Part>,
) -> Result<(), BpfError> {
    let (early, large, reloaded) = {
        let d = director.borrow();
        (d.dataplane.early.readable()?, d.dataplane.large.readable()?, d.reloaded.clone())
    };
    let (mut beat, mut look) = (interval(BEAT), interval(LOOK));
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut enough = false;
    loop {
        tokio::select! {
            () = reloaded.notified() => return Ok(()),
            _ = beat.tick() => {
                let d = director.borrow();
                d.dataplane.maps.take_for(LEASE_S)?;
                lost(&d, Reason::FragmentLost, waiting.expire(d.now_ms()))?;
            }
            () = yield_now(), if !coming.is_empty() => again(&mut director.borrow_mut(), coming)?,
            _ = look.tick(), if enough || !waiting.is_empty() => {
                enough = false;
                release(&director.borrow(), waiting, coming)?;
            }
            ready = early.readable(), if !enough => {
                let Ok(mut ready) = ready else { return Ok(()) };
                let mut d = director.borrow_mut();
                let more = hold(&mut d, waiting)?;
                if !more {
                    ready.clear_ready();
                }
                enough = more || waiting.held().0 > CROWD;
                // The first one may have come meanwhile.
                release(&d, waiting, coming)?;
            }
            ready = large.readable(), if coming.len() < ON_THEIR_WAY => {
                let Ok(mut ready) = ready else { return Ok(()) };
                if !cut_some(&mut director.borrow_mut(), coming)? {
                    ready.clear_ready();
                }
            }
        }
    }
}

/// Take what came too early. True: there may be more.
fn hold(d: &mut Director, waiting: &mut Waiting) -> Result<bool, BpfError> {
    let now_ms = d.now_ms();
    let (mut taken, mut dropped) = (0, 0);
    while taken < EARLY_AT_ONCE {
        let Some((handed, frame)) = d.dataplane.early.take() else { break };
        dropped += waiting.hold(datagram(&handed), Part { ifindex: handed.ifindex, frame }, now_ms);
        taken += 1;
    }
    lost(d, Reason::FragmentLost, dropped)?;
    Ok(taken == EARLY_AT_ONCE)
}

/// Those whose first one has come.
fn release(d: &Director, waiting: &mut Waiting, coming: &mut VecDeque<Part>) -> Result<(), BpfError> {
    if waiting.is_empty() {
        return Ok(());
    }
    for key in d.dataplane.maps.noted(waiting.keys())? {
        if coming.len() >= ON_THEIR_WAY {
            break;
        }
        coming.extend(waiting.release(&key));
    }
    Ok(())
}

/// Cut what is too large. True: there may be more.
fn cut_some(d: &mut Director, coming: &mut VecDeque<Part>) -> Result<bool, BpfError> {
    while coming.len() < ON_THEIR_WAY {
        let Some((handed, frame)) = d.dataplane.large.take() else { return Ok(false) };
        let ifindex = handed.ifindex;
        match cut(&frame, handed.room as usize) {
            Some(parts) => coming.extend(parts.into_iter().map(|frame| Part { ifindex, frame })),
            None => {
                tracing::debug!(ifindex, room = handed.room, "a packet can't be cut, and is dropped");
                lost(d, Reason::HeldLost, 1)?;
            }
        }
    }
    Ok(true)
}

/// Some of these come in once more.
fn again(d: &mut Director, coming: &mut VecDeque<Part>) -> Result<(), BpfError> {
    let some = coming.drain(..coming.len().min(AGAIN_AT_ONCE));
    let failed = some.filter(|part| !d.come_again(part)).count();
    lost(d, Reason::HeldLost, failed)
}

fn lost(d: &Director, reason: Reason, packets: usize) -> Result<(), BpfError> {
    d.dataplane.maps.count(reason, packets as u64)
}
