//! Packets that the programs hand over: fragments that came before the first one of their datagram wait here for it, what is too large for a tunnel is cut
//! into parts. Both then come in again, and take their way like any other packet.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rvs_control::parts::{Part, Waiting, cut};
use rvs_sys::bpf::{BpfError, parts::datagram};
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
/// Packets that are cut in one go, before others have their turn.
const LARGE_AT_ONCE: usize = 16;

/// Until the process ends.
pub async fn run(director: Rc<RefCell<Director>>) {
    let mut waiting = Waiting::default();
    loop {
        if let Err(error) = serve(&director, &mut waiting).await {
            tracing::warn!(error = %shown(&error), "fragments that come too early, and packets too large for a tunnel, are lost for a second");
            tokio::time::sleep(BEAT).await;
        }
    }
}

/// Until the programs are loaded anew, with rings of their own.
async fn serve(director: &RefCell<Director>, waiting: &mut Waiting) -> Result<(), BpfError> {
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
                waiting.expire(d.now_ms());
            }
            _ = look.tick(), if enough || !waiting.is_empty() => {
                enough = false;
                release(&mut director.borrow_mut(), waiting)?;
            }
            ready = early.readable(), if !enough => {
                let Ok(mut ready) = ready else { return Ok(()) };
                let mut d = director.borrow_mut();
                enough = hold(&mut d, waiting);
                if !enough {
                    ready.clear_ready();
                }
                // The first one may have come meanwhile.
                release(&mut d, waiting)?;
            }
            ready = large.readable() => {
                let Ok(mut ready) = ready else { return Ok(()) };
                if !cut_some(&mut director.borrow_mut()) {
                    ready.clear_ready();
                }
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Take what came too early. True: there may be more.
fn hold(d: &mut Director, waiting: &mut Waiting) -> bool {
    let now_ms = d.now_ms();
    for _ in 0..EARLY_AT_ONCE {
        let Some((handed, frame)) = d.dataplane.early.take() else { return false };
        if !waiting.hold(datagram(&handed), Part { ifindex: handed.ifindex, frame }, now_ms) {
            tracing::trace!(ifindex = handed.ifindex, "a fragment of somebody who has many waiting is dropped");
        }
    }
    true
}

/// Those whose first one has come.
fn release(d: &mut Director, waiting: &mut Waiting) -> Result<(), BpfError> {
    if waiting.is_empty() {
        return Ok(());
    }
    for key in d.dataplane.maps.noted(waiting.keys())? {
        for part in waiting.release(&key) {
            d.come_again(&part);
        }
    }
    Ok(())
}

/// Cut what is too large. True: there may be more.
fn cut_some(d: &mut Director) -> bool {
    for _ in 0..LARGE_AT_ONCE {
        let Some((handed, frame)) = d.dataplane.large.take() else { return false };
        let Some(parts) = cut(&frame, handed.room as usize) else {
            tracing::debug!(ifindex = handed.ifindex, room = handed.room, "a packet can't be cut, and is dropped");
            continue;
        };
        for frame in parts {
            d.come_again(&Part { ifindex: handed.ifindex, frame });
        }
    }
    true
}
