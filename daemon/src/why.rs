//! `rvs why`: what would become of a packet, found out on a copy of the data plane.

use std::cell::RefCell;

use rvs_control::api::{
    Code, Connection, DestId, Forward, Frame, Outcome, Probe, ProbeProto, Proto, Refusal, ServiceId, TunnelChecksum,
    TunnelKind, WhyDest, WhyRow,
};
use rvs_control::model::{DestKey, ServiceKey};
use rvs_control::net::{Link, RouteQuery};
use rvs_control::plan::address;
use rvs_control::{advice, headers, limits};
use rvs_datapath::abi::{self, dest, tunnel};
use rvs_datapath::verdict::{Action, Kind, Reason};
use rvs_sys::bpf::attach::Hook;
use rvs_sys::bpf::{self, BpfError, OBJECT};
use rvs_sys::netlink::{Net, Netlink};

use crate::director::{Director, shown};

/// A packet, and where it comes in.
struct Arrival {
    frame: Vec<u8>,
    link: Link,
    hook: Hook,
}

/// A row for each packet, or why there is none.
pub async fn rows(director: &RefCell<Director>, probes: &[Probe]) -> Result<Vec<WhyRow>, Refusal> {
    if probes.len() > limits::PROBES_MAX {
        let reason = format!("{} packets in one request: at most {}", probes.len(), limits::PROBES_MAX);
        return Err(Refusal::new(Code::OutOfRange, reason));
    }
    let mut arrivals = Vec::new();
    for probe in probes {
        arrivals.push(arrival(director, probe).await?);
    }
    let rehearsals = director.borrow().rehearsals.clone();
    let failed = |reason: String| Refusal::new(Code::Failed, reason);
    let _one = rehearsals.acquire_owned().await.map_err(|e| failed(e.to_string()))?;
    let stage = director.borrow().dataplane.stage().map_err(|e| failed(shown(&e)))?;
    // Loading takes seconds: beside the event loop.
    let done = tokio::task::spawn_blocking(move || {
        let mut copy = stage.open(OBJECT)?;
        let run = |a: Arrival| copy.run(a.hook, a.link.ifindex, &a.frame).map(|outcome| (a, outcome));
        arrivals.into_iter().map(run).collect::<Result<Vec<_>, BpfError>>()
    });
    let done = done.await.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(shown(&e)))?;
    let d = director.borrow();
    let rows = done.into_iter().zip(probes).map(|((arrival, outcome), probe)| row(&d, arrival, outcome, probe));
    rows.collect::<Result<_, BpfError>>().map_err(|e| failed(shown(&e)))
}

/// By the interface that is named, or by which the kernel would send to the packet's source.
async fn arrival(director: &RefCell<Director>, probe: &Probe) -> Result<Arrival, Refusal> {
    let invalid = |reason: String| Refusal::new(Code::Invalid, reason);
    let (links, interfaces) = {
        let d = director.borrow();
        (d.host.links.clone(), d.interfaces.clone())
    };
    let link = match &probe.interface {
        Some(name) => {
            links.into_iter().find(|l| l.name == *name).ok_or_else(|| invalid(format!("no interface {name}")))
        }
        None => {
            let source = probe.from.0;
            let say = |e| Refusal::new(Code::Failed, shown(&e));
            let route = Netlink::open().map_err(say)?.route_to(RouteQuery::to(source)).await.map_err(say)?;
            let link = links.into_iter().find(|l| Some(l.ifindex) == route.ifindex);
            link.ok_or_else(|| invalid(format!("no route to {source}: name the interface it comes by (--interface)")))
        }
    }?;
    let Some(hook) = interfaces.get(&link.name).and_then(|name| name.parse().ok()) else {
        let there: Vec<&str> = interfaces.keys().map(String::as_str).collect();
        let reason = format!("{} has no program of rvsd's: its packets are the kernel's alone", link.name);
        let detail = vec![format!("There is one on: {}. Name another interface with --interface.", there.join(", "))];
        return Err(Refusal { detail, ..Refusal::new(Code::NoSuchInterface, reason) });
    };
    let mac = link.mac.ok_or_else(|| invalid(format!("{} has no MAC address", link.name)))?;
    let frame = headers::frame(probe, mac);
    let frame = frame.ok_or_else(|| invalid("one address is IPv4, the other IPv6".to_owned()))?;
    Ok(Arrival { frame, link, hook })
}

fn row(d: &Director, arrival: Arrival, outcome: bpf::Outcome, probe: &Probe) -> Result<WhyRow, BpfError> {
    let reason = outcome.verdict.reason();
    let dest = outcome.dest.map(|index| dest_of(d, index, probe.to.1)).transpose()?;
    let (dest, service) = dest.map_or((None, service_of(d, probe)), |(dest, service)| (Some(dest), service));
    let out = match outcome.verdict.action() {
        Action::Out(ifindex) => Some(interface(d, ifindex)),
        Action::Back => Some(arrival.link.name.clone()),
        Action::Up | Action::Drop => None,
    };
    let connection = match (outcome.opens, &dest, reason) {
        (true, ..) => Connection::New,
        (false, Some(_), _) | (_, _, Reason::DestGone) => Connection::Known,
        (false, None, _) => Connection::None,
    };
    let scheduler = service.and_then(|s| d.model.service(&s.into())?.config.scheduler);
    Ok(WhyRow {
        interface: arrival.link.name,
        hook: arrival.hook.name().to_owned(),
        outcome: kind(reason),
        reason: reason.name().to_owned(),
        text: reason.text().to_owned(),
        advice: advice::about(reason).map(str::to_owned),
        out,
        resolve: outcome.verdict.is_to_resolve(),
        service,
        scheduler: scheduler.map(|s| s.name().to_owned()),
        connection,
        dest,
        came: Frame(arrival.frame),
        left: Frame(outcome.bytes),
    })
}

pub fn kind(reason: Reason) -> Outcome {
    match reason.kind() {
        Kind::Forward => Outcome::Forwarded,
        Kind::Answer => Outcome::Answered,
        Kind::Pass => Outcome::Passed,
        Kind::Held => Outcome::Held,
        Kind::Drop => Outcome::Dropped,
    }
}

pub fn interface(d: &Director, ifindex: u32) -> String {
    let link = d.host.links.iter().find(|l| l.ifindex == ifindex);
    link.map_or_else(|| format!("interface {ifindex}"), |l| l.name.clone())
}

/// The service that has the packet's destination.
fn service_of(d: &Director, probe: &Probe) -> Option<ServiceId> {
    let proto = match probe.proto {
        ProbeProto::Tcp => Proto::Tcp,
        ProbeProto::Udp => Proto::Udp,
        ProbeProto::Sctp => Proto::Sctp,
        ProbeProto::Icmp => return None,
    };
    let id = ServiceId::Virtual { proto, addr: probe.to.0, port: probe.to.1 };
    d.model.service(&id.into()).map(|_| id)
}

/// The dest of this index and its service, by what the maps say: it may be one that was removed, or had another method.
fn dest_of(d: &Director, index: u32, port: u16) -> Result<(WhyDest, Option<ServiceId>), BpfError> {
    let maps = &d.dataplane.maps;
    let (record, by) = (maps.dests.get(index)?, maps.tunnels.get(index)?);
    let (id, service) = named(d, index, port)?;
    let flags = record.out as u32;
    let forward = match flags & dest::METHOD {
        dest::MASQ => Forward::Masq,
        dest::LOCAL_NODE => Forward::Local,
        dest::TUNNEL => Forward::Tunnel {
            kind: match by.kind {
                tunnel::GUE => TunnelKind::Gue,
                tunnel::GRE => TunnelKind::Gre,
                _ => TunnelKind::Ipip,
            },
            port: by.port,
            checksum: match by.flags {
                tunnel::CSUM => TunnelChecksum::Csum,
                tunnel::REMCSUM => TunnelChecksum::Remcsum,
                _ => TunnelChecksum::None,
            },
        },
        dest::FULLNAT if flags & dest::OWN != 0 => Forward::Masq,
        dest::FULLNAT => Forward::Fullnat,
        _ => Forward::Route,
    };
    let model = service.and_then(|s| d.model.service(&ServiceKey::from(s)));
    let key = DestKey { addr: id.addr, port: record.port };
    let weight = model.and_then(|s| s.dest(&key)).map(|dest| dest.weight);
    let weight = weight.filter(|_| flags & dest::AVAILABLE != 0);
    Ok((WhyDest { id, forward, weight, proxy: record.proxied() }, service))
}

/// Address and port of the dest of this index (`port`: the packet's own, for one that has none), and its service.
pub fn named(d: &Director, index: u32, port: u16) -> Result<(DestId, Option<ServiceId>), BpfError> {
    let record = d.dataplane.maps.dests.get(index)?;
    let addr = address(&record.address.bytes(), record.out as u32 & dest::V6 != 0);
    let port = if record.port == 0 { port } else { record.port };
    let service = d.dataplane.maps.services.get(record.service)?;
    Ok((DestId { addr, port }, service_id(&service.key)))
}

/// `None`: of a firewall mark.
fn service_id(key: &abi::ServiceKey) -> Option<ServiceId> {
    let proto = match key.protocol {
        6 => Proto::Tcp,
        17 => Proto::Udp,
        132 => Proto::Sctp,
        _ => return None,
    };
    Some(ServiceId::Virtual { proto, addr: address(&key.address, key.family == 6), port: key.port })
}
