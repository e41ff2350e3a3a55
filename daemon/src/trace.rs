//! `rvs trace`: packets that the programs tell of, handed to a client for as long as it listens.

use std::cell::RefCell;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use rvs_control::api::{Code, Frame, Refusal, Response, ResponseBody, TracedRow};
use rvs_control::filter::{Filter, Seen};
use rvs_control::headers::{Ends, Headers, SCTP, TCP, UDP};
use rvs_control::limits;
use rvs_datapath::abi::{Trace, Traced};
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::packet::{Ip, L3};
use rvs_datapath::verdict::{Action, Verdict};
use rvs_datapath::{conn, verdict::Reason};
use rvs_sys::bpf::{Belongs, BpfError};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::director::{Director, shown};
use crate::socket::{put, send};
use crate::why;

/// The client hears of us this often; the programs are told to go on that much longer.
const TICK: Duration = Duration::from_secs(1);
const LEASE_S: u32 = 3;

/// While it lives the programs tell of packets.
struct Tracing<'a> {
    director: &'a RefCell<Director>,
    look: Trace,
    /// Lost before.
    lost: u64,
}

impl<'a> Tracing<'a> {
    fn begin(director: &'a RefCell<Director>, look: Trace) -> Result<(Tracing<'a>, AsyncFd<OwnedFd>), BpfError> {
        let mut d = director.borrow_mut();
        // What nobody took before.
        while d.dataplane.ring.take().is_some() {}
        let (lost, ring) = (d.dataplane.maps.untold()?, d.dataplane.ring.readable()?);
        drop(d);
        let tracing = Tracing { director, look, lost };
        tracing.go_on()?;
        Ok((tracing, ring))
    }

    fn go_on(&self) -> Result<(), BpfError> {
        let mut d = self.director.borrow_mut();
        let until_s = d.dataplane.maps.clock.get(0)?.now_s.saturating_add(LEASE_S);
        d.trace(Some(Trace { until_s, ..self.look }))
    }

    fn lost(&self) -> Result<u64, BpfError> {
        Ok(self.director.borrow().dataplane.maps.untold()?.wrapping_sub(self.lost))
    }

    /// Up to a line's worth of packets for which the filter holds; whether there may be more.
    fn take(&self, filter: &Filter) -> (Vec<TracedRow>, bool) {
        let mut d = self.director.borrow_mut();
        let since = monotonic_to_unix();
        let mut rows = Vec::new();
        // As many that are not wanted are enough, too: others have their turn.
        for _ in 0..16 * limits::TRACED_PER_LINE {
            let Some((told, bytes)) = d.dataplane.ring.take() else { return (rows, false) };
            rows.extend(row(&d, filter, told, bytes, since));
            if rows.len() == limits::TRACED_PER_LINE {
                break;
            }
        }
        (rows, true)
    }
}

impl Drop for Tracing<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.director.borrow_mut().trace(None) {
            tracing::warn!(error = %shown(&error), "the programs go on telling of packets for some seconds");
        }
    }
}

/// Until the client is gone.
pub async fn stream(stream: &mut UnixStream, director: &RefCell<Director>, id: u64, filter: &Filter) -> io::Result<()> {
    let mut out = Vec::new();
    let begun = Tracing::begin(director, filter.first_look());
    let (tracing, ring) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            let refusal = Refusal::new(Code::Failed, shown(&error));
            put(&Response::whole(id, ResponseBody::Refused(refusal)), &mut out)?;
            return send(stream, &mut out).await;
        }
    };
    let mut tick = tokio::time::interval(TICK);
    let mut ignored = [0; 256];
    loop {
        let packets = tokio::select! {
            read = stream.read(&mut ignored) => {
                if read? == 0 {
                    return Ok(());
                }
                continue;
            }
            _ = tick.tick() => {
                tracing.go_on().map_err(io::Error::other)?;
                Vec::new()
            }
            ready = ring.readable() => {
                let mut ready = ready?;
                let (packets, more) = tracing.take(filter);
                if !more {
                    ready.clear_ready();
                }
                if packets.is_empty() {
                    tokio::task::yield_now().await;
                    continue;
                }
                packets
            }
        };
        let lost = tracing.lost().map_err(io::Error::other)?;
        put(&Response { id, last: false, body: ResponseBody::Traced { packets, lost } }, &mut out)?;
        send(stream, &mut out).await?;
    }
}

/// What is to be added to the monotonic clock's nanoseconds.
fn monotonic_to_unix() -> u64 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(unix.saturating_sub(now).as_nanos()).unwrap_or_default()
}

/// `None`: not one that the filter is for.
fn row(d: &Director, filter: &Filter, told: Traced, bytes: Vec<u8>, since: u64) -> Option<TracedRow> {
    let verdict = Verdict::from_word(told.verdict);
    let reason = verdict.reason();
    let packet = Headers::read(&bytes).and_then(|h| h.packet);
    let of = packet.and_then(|ends| whose(d, &ends, reason, &bytes));
    let (dest, service) = match of {
        // A map that can't be read has no names: the packet is still worth showing.
        Some((belongs, port)) => why::named(d, belongs.dest, port).map_or((None, None), |(dest, s)| (Some(dest), s)),
        None => (None, packet.and_then(|ends| addressed(d, &ends))),
    };
    if !filter.matches(Seen { packet: packet.as_ref(), reason, service, dest }) {
        return None;
    }
    let interface = why::interface(d, told.ifindex);
    let out = match verdict.action() {
        Action::Out(ifindex) => Some(why::interface(d, ifindex)),
        Action::Back => Some(interface.clone()),
        Action::Up | Action::Drop => None,
    };
    Some(TracedRow {
        at_ns: told.ns.wrapping_add(since),
        interface,
        outcome: why::kind(reason),
        reason: reason.name().to_owned(),
        out,
        service,
        dest,
        len: told.len,
        bytes: Frame(bytes),
    })
}

/// The connection that a packet is of, as the table says now, and its virtual port: a moment later than the program looked. What an
/// ICMP error is about went the other way.
fn whose(d: &Director, ends: &Ends, reason: Reason, bytes: &[u8]) -> Option<(Belongs, u16)> {
    let (from, to, [from_port, to_port], protocol) = if matches!(reason, Reason::ErrorIn | Reason::ErrorOut) {
        let quoted = ends.quoted(bytes.get(L3..)?)?;
        let [from_port, to_port] = quoted.ports?;
        (quoted.destination, quoted.source, [to_port, from_port], quoted.protocol)
    } else {
        (ends.source, ends.destination, ends.ports?, ends.protocol)
    };
    let proto = match protocol {
        TCP => conn::TCP,
        UDP => conn::UDP,
        SCTP => conn::SCTP,
        _ => return None,
    };
    let maps = &d.dataplane.maps;
    let address = |address| rvs_datapath::abi::Address::from(rvs_control::plan::bytes(address));
    let (from, to) = (address(from), address(to));
    let of = if ends.source.is_ipv4() {
        maps.conns4.of_packet([V4::from_address(&from), V4::from_address(&to)], [from_port, to_port], proto)
    } else {
        maps.conns6.of_packet([V6::from_address(&from), V6::from_address(&to)], [from_port, to_port], proto)
    }?;
    Some((of, if of.reply { from_port } else { to_port }))
}

/// The service that has the packet's destination.
fn addressed(d: &Director, ends: &Ends) -> Option<rvs_control::api::ServiceId> {
    use rvs_control::api::{Proto, ServiceId};
    let proto = match ends.protocol {
        TCP => Proto::Tcp,
        UDP => Proto::Udp,
        _ => return None,
    };
    let (addr, port): (IpAddr, u16) = (ends.destination, ends.ports?[1]);
    let id = ServiceId::Virtual { proto, addr, port };
    d.model.service(&id.into()).map(|_| id)
}
