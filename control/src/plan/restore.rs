//! From the maps back to the model: what a data plane that outlived its daemon is doing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use rvs_datapath::abi::{self, ListEntry, dest as flag, service as service_flag, tunnel};

use super::{Capacity, Mirror, Placed, PlacedDest, Planner, Run, address};
use crate::model::{
    Command, CommandError, Defence, Dest, DestKey, Env, Family, FwdMethod, Granularity, Model, Proto, SchedFlags,
    Scheduler, ServiceKey, ServiceSpec, Timeouts, Tunnel, TunnelChecksum, TunnelKind,
};
use crate::settings;

/// What the maps hold.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    pub services: Vec<DumpedService>,
    /// All whose record is not empty.
    pub dests: Vec<DumpedDest>,
    /// Those that dests name.
    pub hops: Vec<(u32, abi::Hop)>,
    /// tcp, tcpfin, udp.
    pub timeouts_s: [u32; 3],
    pub settings: [u32; abi::SETTINGS_MAX],
    pub watched: Vec<(abi::ServiceKey, u64)>,
}

/// A service that a key leads to.
#[derive(Clone, Debug)]
pub struct DumpedService {
    pub index: u32,
    pub record: abi::Service,
    /// Without the head.
    pub list: Vec<ListEntry>,
    pub locals: Vec<abi::Local>,
}

#[derive(Clone, Copy, Debug)]
pub struct DumpedDest {
    pub index: u32,
    pub record: abi::Dest,
    pub info: abi::DestInfo,
    pub tunnel: abi::Tunnel,
}

/// Why the maps can't be taken over. They are of our layout, so this is a bug, or somebody else wrote to them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    #[error("service {index} in the maps: {what}")]
    Service { index: u32, what: String },
    #[error("real server {index} in the maps: {what}")]
    Dest { index: u32, what: String },
    #[error("timeouts in the maps: {0}")]
    Timeouts(CommandError),
    #[error("settings in the maps: {0}")]
    Settings(CommandError),
}

/// Everything was accepted once.
struct Accepted;
impl Env for Accepted {
    fn is_local(&self, _: IpAddr) -> bool {
        true
    }
    fn is_broadcast(&self, _: Ipv4Addr) -> bool {
        false
    }
    fn interface_mtu(&self, _: &str) -> Option<u32> {
        Some(1500)
    }
}

impl Planner {
    /// The model and the planner of what is in the maps.
    pub fn restore(dump: &Dump, capacity: &Capacity) -> Result<(Model, Planner), RestoreError> {
        let (mut model, mut planner) = (Model::new(), Planner::new(capacity));
        let [tcp_s, tcp_fin_s, udp_s] = dump.timeouts_s;
        let timeouts = Command::SetTimeouts(Timeouts { tcp_s, tcp_fin_s, udp_s });
        model.apply(&timeouts, &Accepted).map_err(RestoreError::Timeouts)?;
        for (value, setting) in dump.settings.iter().zip(settings::ALL) {
            let set = Command::Set(setting.name.to_owned(), *value);
            model.apply(&set, &Accepted).map_err(RestoreError::Settings)?;
        }
        planner.watched = dump.watched.iter().copied().collect();
        for (index, hop) in &dump.hops {
            if planner.rest.hop_indexes.claim(*index) {
                // Two of one content: the second is not used by anything new.
                planner.hops.entry((hop.macs, hop.ifindex)).or_insert(*index);
            }
        }
        let dests: BTreeMap<u32, &DumpedDest> = dump.dests.iter().map(|d| (d.index, d)).collect();
        let mut services: Vec<&DumpedService> = dump.services.iter().collect();
        services.sort_by_key(|s| s.record.serial);
        for service in services {
            planner.restore_service(&mut model, service, &dests)?;
        }
        for dest in &dump.dests {
            if planner.dests.contains_key(&dest.index) {
                continue;
            }
            // Removed, but connections may name it still.
            if !planner.rest.dest_indexes.claim(dest.index) {
                return Err(RestoreError::Dest { index: dest.index, what: "its index is out of range".into() });
            }
            planner.mirror(dest);
            planner.rest.nameless.insert(dest.index);
        }
        Ok((model, planner))
    }

    fn restore_service(
        &mut self,
        model: &mut Model,
        s: &DumpedService,
        dests: &BTreeMap<u32, &DumpedDest>,
    ) -> Result<(), RestoreError> {
        let wrong = |what: String| RestoreError::Service { index: s.index, what };
        let (key, spec) = described(&s.record).map_err(wrong)?;
        model.apply(&Command::AddService(key, spec), &Accepted).map_err(|e| wrong(e.to_string()))?;
        let run = Run { first: s.record.list as u32, len: s.list.len() as u32 + 1 };
        let table =
            (s.record.table != 0).then_some(Run { first: s.record.table as u32, len: (s.record.table >> 32) as u32 });
        let locals = (s.record.locals != 0)
            .then_some(Run { first: s.record.locals as u32, len: (s.record.locals >> 32) as u32 });
        let free = self.rest.service_indexes.claim(s.index)
            && self.rest.lists.claim(run)
            && table.is_none_or(|t| self.rest.tables.claim(t))
            && locals.is_none_or(|l| self.rest.locals.claim(l));
        if !free {
            return Err(wrong("its index, list, table or local addresses are another's too, or out of range".into()));
        }
        for local in &s.locals {
            let addr = address(&local.address.bytes(), key.family() == Family::V6);
            model.apply(&Command::AddLocalAddress(key, addr), &Accepted).map_err(|e| wrong(e.to_string()))?;
        }
        let defence = Defence {
            cookies_above: s.record.cookies.checked_sub(1),
            rate: s.record.rate,
            source_rate: s.record.source_rate,
        };
        model.apply(&Command::Defend(key, defence), &Accepted).map_err(|e| wrong(e.to_string()))?;
        let proxy = s.record.flags & service_flag::PROXY != 0;
        model.apply(&Command::Proxy(key, proxy), &Accepted).map_err(|e| wrong(e.to_string()))?;
        let dests_there = BTreeMap::new();
        let list = s.list.clone();
        let mut placed = Placed { index: s.index, record: s.record, list, run, table, locals, dests: dests_there };
        // Last added first in the list: add the last one first.
        for entry in s.list.iter().rev() {
            let Some(dest) = dests.get(&entry.dest) else {
                return Err(wrong(format!("its list names real server {}, which is not there", entry.dest)));
            };
            let of_dest = |what: String| RestoreError::Dest { index: dest.index, what };
            let described = described_dest(dest).map_err(of_dest)?;
            model.apply(&Command::AddDest(key, described), &Accepted).map_err(|e| of_dest(e.to_string()))?;
            if !self.rest.dest_indexes.claim(dest.index) {
                return Err(of_dest("its index is another's too, or out of range".into()));
            }
            self.mirror(dest);
            let at = PlacedDest { index: dest.index, last_weight: dest.info.last_weight, former: Vec::new() };
            placed.dests.insert(described.key, at);
        }
        self.serial = self.serial.max(s.record.serial);
        self.services.insert(key, placed);
        Ok(())
    }

    fn mirror(&mut self, dest: &DumpedDest) {
        let address = address(&dest.record.address.bytes(), dest.record.out as u32 & flag::V6 != 0);
        self.dests.insert(dest.index, Mirror { record: dest.record, tunnel: dest.tunnel, address });
        self.by_address.entry(address).or_default().insert(dest.index);
    }
}

fn described(r: &abi::Service) -> Result<(ServiceKey, ServiceSpec), String> {
    let family = match r.key.family {
        4 => Family::V4,
        6 => Family::V6,
        other => return Err(format!("its family is {other}")),
    };
    let a = r.key.address;
    let key = match r.key.protocol {
        0 => ServiceKey::Fwmark { mark: u32::from_ne_bytes([a[0], a[1], a[2], a[3]]), family },
        number => {
            let proto = [Proto::Tcp, Proto::Udp, Proto::Sctp].into_iter().find(|p| p.number() == number);
            let proto = proto.ok_or_else(|| format!("its protocol is {number}"))?;
            ServiceKey::Virtual { proto, addr: address(&a, family == Family::V6), port: r.key.port }
        }
    };
    let scheduler = match r.scheduler {
        0 => "none",
        n => Scheduler::ALL.get(n as usize - 1).ok_or_else(|| format!("its scheduler is number {n}"))?.name(),
    };
    let bit = |set: u32, value: u8| if r.flags & set != 0 { value } else { 0 };
    let bits = bit(service_flag::HASH_FALLBACK, 1) | bit(service_flag::HASH_PORT, 2) | bit(service_flag::FLAG_3, 4);
    let length = r.engine.iter().position(|b| *b == 0).unwrap_or(r.engine.len());
    let engine = std::str::from_utf8(&r.engine[..length]).map_err(|e| format!("its persistence engine: {e}"))?;
    let spec = ServiceSpec {
        scheduler: scheduler.to_owned(),
        sched_flags: SchedFlags::from_bits(bits).unwrap_or_default(),
        persistence_s: (r.persistence_s != 0).then_some(r.persistence_s),
        granularity: match family {
            Family::V4 => Granularity::V4(Ipv4Addr::from(r.netmask.to_ne_bytes())),
            Family::V6 => Granularity::V6(u8::try_from(r.netmask).map_err(|e| format!("its prefix length: {e}"))?),
        },
        engine: (!engine.is_empty()).then(|| engine.to_owned()),
        one_packet: r.flags & service_flag::ONE_PACKET != 0,
    };
    Ok((key, spec))
}

fn described_dest(d: &DumpedDest) -> Result<Dest, String> {
    let out = d.record.out as u32;
    let method = match out & flag::METHOD {
        flag::MASQ => FwdMethod::Masq,
        flag::LOCAL_NODE => FwdMethod::Local,
        flag::ROUTE => FwdMethod::Route,
        flag::FULLNAT if out & flag::OWN != 0 => FwdMethod::Masq,
        flag::FULLNAT => FwdMethod::Fullnat,
        flag::TUNNEL => FwdMethod::Tunnel(Tunnel {
            port: d.tunnel.port,
            kind: match d.tunnel.kind {
                tunnel::IPIP => TunnelKind::Ipip,
                tunnel::GUE => TunnelKind::Gue,
                tunnel::GRE => TunnelKind::Gre,
                other => return Err(format!("its kind of tunnel is number {other}")),
            },
            checksum: match d.tunnel.flags {
                0 => TunnelChecksum::None,
                tunnel::CSUM => TunnelChecksum::Csum,
                tunnel::REMCSUM => TunnelChecksum::Remcsum,
                other => return Err(format!("the flags of its tunnel are {other}")),
            },
        }),
        other => return Err(format!("its forwarding method is number {other}")),
    };
    Ok(Dest {
        key: DestKey { addr: address(&d.record.address.bytes(), out & flag::V6 != 0), port: d.record.port },
        method,
        weight: d.info.weight,
        upper: d.info.upper_threshold,
        lower: d.info.lower_threshold,
    })
}
