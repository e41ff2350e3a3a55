//! The connection tables: how full they are, and connections on their way to tables of another size.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rvs_control::api::{
    Code, Refusal, Resize, ResponseBody, StateRow, TableRow, TablesMove, TablesReport, conn_state_name,
};
use rvs_sys::bpf::{BpfError, Census, OBJECT, grace};
use tokio::sync::Notify;

use crate::director::{Director, shown};

/// Connections that can't be moved are tried again after this time.
const IDLE: Duration = Duration::from_secs(1);

/// What of a table is of interest.
pub fn report(d: &mut Director) -> Result<TablesReport, BpfError> {
    let moving = d.dataplane.progress()?;
    let maps = &mut d.dataplane.maps;
    let (config, clock) = (maps.config.get(0)?, maps.clock.get(0)?);
    maps.conns4.at(&config, &clock);
    maps.conns6.at(&config, &clock);
    let maps = &d.dataplane.maps;
    let tables = [
        (4, maps.conns4.slots(), maps.conns4.census(), ["CONN4", "SIDE4"], clock.evicted[0]),
        (6, maps.conns6.slots(), maps.conns6.census(), ["CONN6", "SIDE6"], clock.evicted[1]),
    ];
    let mut rows = Vec::new();
    for (family, places, census, names, evicted) in tables {
        let memory = names.into_iter().map(|name| d.dataplane.charged(name)).sum::<Result<u64, _>>()?;
        rows.push(TableRow {
            family,
            places,
            flows_at_half_load: places / 2,
            entries: census.entries,
            flows: census.flows,
            memory,
            evicted,
            states: states(&census),
            classes: classes(&census),
        });
    }
    let moving = moving.map(|p| TablesMove { moved: p.moved, left: p.left, stuck: p.stuck });
    Ok(TablesReport { tables: rows, moving })
}

fn states(census: &Census) -> Vec<StateRow> {
    let row = |(&(proto, state), &flows): (&(u64, u64), &u32)| {
        let (proto, name) = ([0, 6, 17, 132][proto as usize & 3], ["", "TCP", "UDP", "SCTP"][proto as usize & 3]);
        let state = conn_state_name(proto, false, state as u8);
        StateRow { name: if state == name { state.to_owned() } else { format!("{name} {state}") }, flows }
    };
    census.states.iter().map(row).collect()
}

fn classes(census: &Census) -> Vec<StateRow> {
    /// By the numbers of `conn::class`.
    const NAMES: [&str; 7] = ["expired", "half-open", "few packets", "udp", "closing", "idle", "in use"];
    let row = |(name, flows): (&str, u32)| StateRow { name: name.to_owned(), flows };
    NAMES.into_iter().zip(census.classes).filter(|(_, flows)| *flows > 0).map(row).collect()
}

pub fn resize(d: &mut Director, resize: Resize) -> ResponseBody {
    let now = [d.dataplane.maps.conns4.slots() / 2, d.dataplane.maps.conns6.slots() / 2];
    let flows = [resize.ipv4.unwrap_or(now[0]), resize.ipv6.unwrap_or(now[1])];
    match d.dataplane.resize(OBJECT, flows) {
        Ok(()) => {
            tracing::info!(ipv4 = flows[0], ipv6 = flows[1], "connections are moved to tables of another size");
            d.moves.notify_one();
            ResponseBody::Done
        }
        Err(error @ BpfError::Refused(_)) => ResponseBody::Refused(Refusal::new(Code::OutOfRange, shown(&error))),
        Err(error) => ResponseBody::Refused(Refusal::new(Code::Failed, shown(&error))),
    }
}

/// Move connections whenever there are any to move.
pub async fn moves(director: Rc<RefCell<Director>>, asked: Rc<Notify>) {
    loop {
        if let Err(error) = all(&director).await {
            tracing::warn!(error = %shown(&error), "connections can't be moved to the new table; tried again");
            tokio::time::sleep(IDLE).await;
            continue;
        }
        asked.notified().await;
    }
}

async fn all(director: &RefCell<Director>) -> Result<(), BpfError> {
    if director.borrow_mut().dataplane.progress()?.is_none() {
        return Ok(());
    }
    wait().await;
    loop {
        let Some(batch) = director.borrow_mut().dataplane.take_over()? else { break };
        if !batch.is_empty() {
            wait().await;
            director.borrow_mut().dataplane.leave(&batch)?;
        }
        if batch.idle {
            tokio::time::sleep(IDLE).await;
        }
        // Commands come in between.
        tokio::task::yield_now().await;
    }
    tracing::info!("all connections are in the new tables");
    Ok(())
}

/// A grace period, beside the event loop.
async fn wait() {
    // It ends early only if the runtime is going down.
    let _ = tokio::task::spawn_blocking(grace).await;
}
