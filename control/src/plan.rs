//! From a change of the model to writes of the data plane's maps, in order: a dest before the list that names it, a list before the
//! key that leads to it, removals last. The only maker of [`MapOp`]s.
//!
//! The planner knows where everything lies (indexes, runs of `LISTS` and `TABLES`), and nothing else: what is configured is the
//! model's business, what the words in the maps are meanwhile the data plane's. A [`Step`] is carried out whole by
//! `rvs_sys`, which undoes it if one write fails; then [`Planner::undo`] takes it back here.
//!
//! **What is taken out of use is used again only later**: list runs, tables, hops and service indexes after [`GRACE_MS`]
//! (packets under way may still read them); a dest's index when no connection names it any more ([`Planner::idle`]). Until
//! then a dest that is added again, by the same name to the same service, gets its index back, and its connections
//! flow again (the kernel's trash, `ip_vs_trash_get_dest`).

mod host;
mod op;
mod place;
mod record;
mod restore;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use rvs_datapath::abi::{self, ListEntry, dest as flag, service as service_flag};
use rvs_datapath::conn;
use rvs_datapath::sched;

use crate::lists;
use crate::model::{Change, Dest, DestKey, Model, Service, ServiceKey};
pub use op::MapOp;
use place::{Indexes, Run, Runs};
use record::{abi_key, describe, method_bits, tunnel_record};
pub use record::{address, bytes};
pub use restore::{Dump, DumpedDest, DumpedService, RestoreError};

/// Longer than any packet is under way in the data plane.
pub const GRACE_MS: u64 = 50;

/// What can be in the way of a change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("no room for another {what}: rvsd was started for {max}")]
    Full { what: &'static str, max: u32 },
    #[error(transparent)]
    List(#[from] lists::ListError),
}

/// Writes to be carried out all or none.
#[derive(Debug, Default)]
pub struct Step {
    pub ops: Vec<MapOp>,
    before: Vec<(ServiceKey, Option<Placed>)>,
    mirrors: Vec<(u32, Option<Mirror>)>,
    was: Option<Box<Rest>>,
    watched: Option<BTreeMap<abi::ServiceKey, u64>>,
}

/// How much there may be of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub services: u32,
    pub dests: u32,
    /// Entries of all lists.
    pub lists: u32,
    /// Places of all tables.
    pub tables: u32,
    pub hops: u32,
}

/// The way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Ready. `source`: this host's own address on that way.
    Hop { macs: [u32; 3], ifindex: u32, mtu: u16, source: Option<IpAddr> },
    /// This host.
    Local,
}

/// A service where it lies.
#[derive(Clone, Debug)]
struct Placed {
    index: u32,
    record: abi::Service,
    /// As published: the kernel's order.
    list: Vec<ListEntry>,
    run: Run,
    table: Option<Run>,
    locals: Option<Run>,
    dests: BTreeMap<DestKey, PlacedDest>,
}

impl Placed {
    /// How the data plane forwards to a dest of it.
    fn method_bits(&self, dest: &Dest) -> u32 {
        method_bits(dest.method, self.record.cookies != 0, self.record.flags & service_flag::PROXY != 0)
    }
}

#[derive(Clone, Debug)]
struct PlacedDest {
    index: u32,
    last_weight: u32,
    /// Indexes that the dest had with another forwarding method: their connections go on.
    former: Vec<u32>,
}

/// A dest's record as it is in the map, and what it is for.
#[derive(Clone, Copy, Debug)]
struct Mirror {
    record: abi::Dest,
    tunnel: abi::Tunnel,
    address: IpAddr,
}

/// Everything of the planner that is not a service: cheap to copy parts of are copied when a step begins.
#[derive(Clone, Debug)]
struct Rest {
    service_indexes: Indexes,
    dest_indexes: Indexes,
    hop_indexes: Indexes,
    lists: Runs,
    tables: Runs,
    locals: Runs,
    trash: BTreeMap<(ServiceKey, DestKey), Trashed>,
    /// Trashed without a name: found in the maps at start, or of a former method.
    nameless: BTreeSet<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Trashed {
    index: u32,
    /// `abi::Service::serial` of the service it belonged to.
    serial: u64,
    last_weight: u32,
}

#[derive(Debug)]
pub struct Planner {
    services: BTreeMap<ServiceKey, Placed>,
    dests: BTreeMap<u32, Mirror>,
    by_address: BTreeMap<IpAddr, BTreeSet<u32>>,
    hops: BTreeMap<([u32; 3], u32), u32>,
    ways: BTreeMap<IpAddr, Way>,
    locals: BTreeSet<IpAddr>,
    /// As in the map.
    watched: BTreeMap<abi::ServiceKey, u64>,
    serial: u64,
    rest: Rest,
}

impl Planner {
    pub fn new(c: &Capacity) -> Planner {
        Planner {
            services: BTreeMap::new(),
            dests: BTreeMap::new(),
            by_address: BTreeMap::new(),
            hops: BTreeMap::new(),
            ways: BTreeMap::new(),
            locals: BTreeSet::new(),
            watched: BTreeMap::new(),
            serial: 0,
            rest: Rest {
                service_indexes: Indexes::new("service", 0, c.services),
                // 0 is no dest, and no hop.
                dest_indexes: Indexes::new("real server", 1, c.dests.min(conn::DEST_MAX + 1)),
                hop_indexes: Indexes::new("next hop", 1, c.hops),
                lists: Runs::new("list of real servers", c.lists),
                tables: Runs::new("table of a hash scheduler", c.tables),
                locals: Runs::new("list of local addresses", abi::LOCALS_MAX),
                trash: BTreeMap::new(),
                nameless: BTreeSet::new(),
            },
        }
    }

    /// The writes for a change that `model` has just seen.
    ///
    /// # Errors
    /// No room; nothing is changed then.
    pub fn change(&mut self, model: &Model, change: &Change, now_ms: u64) -> Result<Step, PlanError> {
        let mut step = self.begin();
        let done = match change {
            Change::ServiceAdded(key) => self.add_service(model, *key, &mut step),
            Change::ServiceEdited { key, .. } => self.edit_service(model, *key, now_ms, &mut step),
            Change::ServiceRemoved { key, .. } => {
                self.remove_service(*key, now_ms, &mut step);
                Ok(())
            }
            Change::DestAdded { service, dest } => self.add_dest(model, *service, *dest, now_ms, &mut step),
            Change::DestEdited { service, before } => self.edit_dest(model, *service, before, now_ms, &mut step),
            Change::DestRemoved { service, was } => self.remove_dest(model, *service, was.dest.key, now_ms, &mut step),
            Change::Flushed(services) => {
                services.iter().for_each(|(key, _)| self.remove_service(*key, now_ms, &mut step));
                Ok(())
            }
            Change::Zeroed(one) => {
                self.zero(*one, &mut step);
                Ok(())
            }
            Change::TimeoutsSet { .. } => {
                let t = model.timeouts();
                step.ops.push(MapOp::Timeouts(conn::Timeouts { tcp: t.tcp_s, tcp_fin: t.tcp_fin_s, udp: t.udp_s }));
                Ok(())
            }
            Change::SettingChanged { .. } => {
                step.ops.extend(self.settings(model).ops);
                Ok(())
            }
            // Places for what the data plane can't do yet; the capability table refuses the commands.
            Change::DaemonStarted(_) | Change::DaemonStopped { .. } => Ok(()),
            Change::LocalAddressAdded { service, .. } | Change::LocalAddressRemoved { service, .. } => {
                self.relocate(model, *service, now_ms, &mut step)
            }
            Change::Defended { service, .. } | Change::ProxySet { service, .. } => {
                self.defend(model, *service, now_ms, &mut step)
            }
        };
        match done {
            Ok(()) => Ok(step),
            Err(error) => {
                self.undo(step);
                Err(error)
            }
        }
    }

    /// Take back a step that was not carried out.
    pub fn undo(&mut self, step: Step) {
        for (key, placed) in step.before.into_iter().rev() {
            match placed {
                Some(placed) => drop(self.services.insert(key, placed)),
                None => drop(self.services.remove(&key)),
            }
        }
        for (index, mirror) in step.mirrors.into_iter().rev() {
            self.forget(index);
            if let Some(mirror) = mirror {
                self.dests.insert(index, mirror);
                self.by_address.entry(mirror.address).or_default().insert(index);
            }
        }
        if let Some(rest) = step.was {
            self.rest = *rest;
        }
        if let Some(watched) = step.watched {
            self.watched = watched;
        }
    }

    fn begin(&self) -> Step {
        Step { was: Some(Box::new(self.rest.clone())), ..Step::default() }
    }

    fn remember(&self, key: ServiceKey, step: &mut Step) {
        if !step.before.iter().any(|(k, _)| *k == key) {
            step.before.push((key, self.services.get(&key).cloned()));
        }
    }

    fn forget(&mut self, index: u32) {
        if let Some(mirror) = self.dests.remove(&index)
            && let Some(set) = self.by_address.get_mut(&mirror.address)
        {
            set.remove(&index);
            if set.is_empty() {
                self.by_address.remove(&mirror.address);
            }
        }
    }

    // ---- services

    fn add_service(&mut self, model: &Model, key: ServiceKey, step: &mut Step) -> Result<(), PlanError> {
        let Some(service) = model.service(&key) else { return Ok(()) };
        self.remember(key, step);
        let index = self.rest.service_indexes.take()?;
        let run = self.rest.lists.take(1)?;
        self.serial += 1;
        let mut record = abi::Service { serial: self.serial, key: abi_key(&key), ..abi::Service::default() };
        describe(&mut record, service, &key, self.is_local(&key));
        record.list = u64::from(run.first);
        step.ops.push(MapOp::Service { index, value: record, fresh: true });
        step.ops.push(MapOp::List {
            service: index,
            old: Vec::new(),
            change: lists::Change::Scheduler,
            first: run.first,
        });
        step.ops.push(MapOp::Key { key: record.key, value: Some(u64::from(index) | record.serial << 32) });
        let mut placed =
            Placed { index, record, list: Vec::new(), run, table: None, locals: None, dests: BTreeMap::new() };
        self.retable(&mut placed, service, 0, step)?;
        self.services.insert(key, placed);
        Ok(())
    }

    fn edit_service(&mut self, model: &Model, key: ServiceKey, now_ms: u64, step: &mut Step) -> Result<(), PlanError> {
        let (Some(service), Some(mut placed)) = (model.service(&key), self.services.get(&key).cloned()) else {
            return Ok(());
        };
        self.remember(key, step);
        let before = placed.record.scheduler;
        describe(&mut placed.record, service, &key, self.is_local(&key));
        // A hash scheduler's table comes before it and goes after it: new connections find a dest all the while.
        let hashes = service.config.scheduler.is_some_and(|scheduler| lists::table(scheduler, &[]).is_some());
        if hashes {
            self.retable(&mut placed, service, now_ms, step)?;
        }
        step.ops.push(MapOp::Service { index: placed.index, value: placed.record, fresh: false });
        if placed.record.scheduler != before {
            // Bound anew: its machine starts from the beginning (ip_vs_bind_scheduler).
            self.relist(&mut placed, lists::Change::Scheduler, now_ms, step)?;
        }
        if !hashes {
            self.retable(&mut placed, service, now_ms, step)?;
        }
        self.services.insert(key, placed);
        Ok(())
    }

    fn remove_service(&mut self, key: ServiceKey, now_ms: u64, step: &mut Step) {
        self.remember(key, step);
        let Some(placed) = self.services.remove(&key) else { return };
        step.ops.push(MapOp::Key { key: placed.record.key, value: None });
        for (name, dest) in &placed.dests {
            self.trash(key, *name, dest, placed.record.serial, step);
        }
        self.rest.lists.retire(placed.run, now_ms);
        if let Some(table) = placed.table {
            self.rest.tables.retire(table, now_ms);
        }
        if let Some(locals) = placed.locals {
            self.rest.locals.retire(locals, now_ms);
        }
        self.rest.service_indexes.retire(placed.index, now_ms);
    }

    /// The local addresses of a service. (Those that connections have go on being theirs.)
    fn relocate(&mut self, model: &Model, key: ServiceKey, now_ms: u64, step: &mut Step) -> Result<(), PlanError> {
        let (Some(service), Some(mut placed)) = (model.service(&key), self.services.get(&key).cloned()) else {
            return Ok(());
        };
        self.remember(key, step);
        let addresses: Vec<_> =
            service.local_addresses.iter().map(|a| abi::Local { address: bytes(*a).into() }).collect();
        let run = match addresses.len() as u32 {
            0 => None,
            count => Some(self.rest.locals.take(count)?),
        };
        if let Some(old) = std::mem::replace(&mut placed.locals, run) {
            self.rest.locals.retire(old, now_ms);
        }
        placed.record.locals = run.map_or(0, |r| u64::from(r.first) | u64::from(r.len) << 32);
        step.ops.push(MapOp::Locals { service: placed.index, first: run.map_or(0, |r| r.first), addresses });
        self.services.insert(key, placed);
        Ok(())
    }

    /// Rate limits, SYN cookies, PROXY headers. With the last two, connections by NAT have sequence numbers of their own: another method, to the
    /// data plane.
    fn defend(&mut self, model: &Model, key: ServiceKey, now_ms: u64, step: &mut Step) -> Result<(), PlanError> {
        let (Some(service), Some(mut placed)) = (model.service(&key), self.services.get(&key).cloned()) else {
            return Ok(());
        };
        self.remember(key, step);
        describe(&mut placed.record, service, &key, self.is_local(&key));
        step.ops.push(MapOp::Service { index: placed.index, value: placed.record, fresh: false });
        for dest in service.dests() {
            let Some(mut at) = placed.dests.get(&dest.key).cloned() else { continue };
            if !self.has_method(at.index, placed.method_bits(dest)) {
                self.remake(&mut placed, dest, &mut at, now_ms, step)?;
                placed.dests.insert(dest.key, at);
            }
        }
        self.retable(&mut placed, service, now_ms, step)?;
        self.ask(&mut placed, step);
        self.services.insert(key, placed);
        Ok(())
    }

    /// Do the cookies of this service work, as things are?
    pub fn asks(&self, key: &ServiceKey) -> bool {
        self.services.get(key).is_some_and(|placed| placed.record.asks())
    }

    /// Cookies work while the replies of all dests come by here.
    fn ask(&self, placed: &mut Placed, step: &mut Step) {
        let lends = |d: &PlacedDest| self.dests.get(&d.index).is_some_and(|m| m.record.lends());
        let asks = if placed.record.cookies != 0 && placed.dests.values().all(lends) { service_flag::ASKS } else { 0 };
        let flags = placed.record.flags & !service_flag::ASKS | asks;
        if flags != placed.record.flags {
            placed.record.flags = flags;
            step.ops.push(MapOp::Service { index: placed.index, value: placed.record, fresh: false });
        }
    }

    fn zero(&mut self, one: Option<ServiceKey>, step: &mut Step) {
        for (_, placed) in self.services.iter().filter(|(key, _)| one.is_none_or(|k| k == **key)) {
            let dests = placed.dests.values().flat_map(|d| std::iter::once(d.index).chain(d.former.iter().copied()));
            step.ops.push(MapOp::Zero { service: placed.index, dests: dests.collect() });
        }
    }

    // ---- dests

    fn add_dest(
        &mut self,
        model: &Model,
        key: ServiceKey,
        name: DestKey,
        now_ms: u64,
        step: &mut Step,
    ) -> Result<(), PlanError> {
        let (Some(service), Some(mut placed)) = (model.service(&key), self.services.get(&key).cloned()) else {
            return Ok(());
        };
        let Some(dest) = service.dest(&name) else { return Ok(()) };
        self.remember(key, step);
        let trashed = self.rest.trash.remove(&(key, name));
        let serial = placed.record.serial;
        let last_weight = lists::last_weight(trashed.map(|t| t.last_weight), dest.weight);
        let mut former = Vec::new();
        let (index, fresh) = match trashed {
            Some(t) if self.has_method(t.index, placed.method_bits(dest)) => (t.index, t.serial != serial),
            other => {
                if let Some(t) = other {
                    // Its connections go on by the method that they began with.
                    self.revive(t.index, placed.index, step);
                    let fresh = t.serial != serial;
                    step.ops.push(MapOp::StatsIn { service: placed.index, dest: t.index, fresh });
                    former.push(t.index);
                }
                (self.rest.dest_indexes.take()?, true)
            }
        };
        self.write_dest(index, dest, &placed, last_weight, step);
        step.ops.push(MapOp::StatsIn { service: placed.index, dest: index, fresh });
        placed.dests.insert(name, PlacedDest { index, last_weight, former });
        self.relist(&mut placed, lists::Change::Add { dest: index, weight: dest.weight }, now_ms, step)?;
        self.retable(&mut placed, service, now_ms, step)?;
        self.ask(&mut placed, step);
        self.services.insert(key, placed);
        Ok(())
    }

    fn edit_dest(
        &mut self,
        model: &Model,
        key: ServiceKey,
        before: &Dest,
        now_ms: u64,
        step: &mut Step,
    ) -> Result<(), PlanError> {
        let (Some(service), Some(mut placed)) = (model.service(&key), self.services.get(&key).cloned()) else {
            return Ok(());
        };
        let (Some(dest), Some(mut at)) = (service.dest(&before.key), placed.dests.get(&before.key).cloned()) else {
            return Ok(());
        };
        self.remember(key, step);
        at.last_weight = lists::last_weight(Some(at.last_weight), dest.weight);
        if self.has_method(at.index, placed.method_bits(dest)) {
            self.write_dest(at.index, dest, &placed, at.last_weight, step);
            let change = lists::Change::Weight { dest: at.index, weight: dest.weight };
            self.relist(&mut placed, change, now_ms, step)?;
        } else {
            self.remake(&mut placed, dest, &mut at, now_ms, step)?;
        }
        placed.dests.insert(before.key, at);
        self.retable(&mut placed, service, now_ms, step)?;
        self.ask(&mut placed, step);
        self.services.insert(key, placed);
        Ok(())
    }

    /// Another method is for new connections only: they get an index of their own, in the same place.
    fn remake(
        &mut self,
        placed: &mut Placed,
        dest: &Dest,
        at: &mut PlacedDest,
        now_ms: u64,
        step: &mut Step,
    ) -> Result<(), PlanError> {
        let index = self.rest.dest_indexes.take()?;
        self.write_dest(index, dest, placed, at.last_weight, step);
        step.ops.push(MapOp::StatsIn { service: placed.index, dest: index, fresh: true });
        let change = lists::Change::Replace { dest: at.index, with: index, weight: dest.weight };
        self.relist(placed, change, now_ms, step)?;
        at.former.push(std::mem::replace(&mut at.index, index));
        Ok(())
    }

    fn remove_dest(
        &mut self,
        model: &Model,
        key: ServiceKey,
        name: DestKey,
        now_ms: u64,
        step: &mut Step,
    ) -> Result<(), PlanError> {
        let (Some(service), Some(mut placed)) = (model.service(&key), self.services.get(&key).cloned()) else {
            return Ok(());
        };
        self.remember(key, step);
        let Some(dest) = placed.dests.remove(&name) else { return Ok(()) };
        self.relist(&mut placed, lists::Change::Remove { dest: dest.index }, now_ms, step)?;
        self.retable(&mut placed, service, now_ms, step)?;
        for index in std::iter::once(dest.index).chain(dest.former.iter().copied()) {
            step.ops.push(MapOp::StatsOut { service: placed.index, dest: index });
        }
        self.trash(key, name, &dest, placed.record.serial, step);
        self.ask(&mut placed, step);
        self.services.insert(key, placed);
        Ok(())
    }

    /// Its connections stay, and are dropped; the index is kept for it.
    fn trash(&mut self, key: ServiceKey, name: DestKey, dest: &PlacedDest, serial: u64, step: &mut Step) {
        for index in std::iter::once(dest.index).chain(dest.former.iter().copied()) {
            if let Some(mirror) = self.dests.get_mut(&index) {
                step.mirrors.push((index, Some(*mirror)));
                mirror.record.out &= !u64::from(flag::AVAILABLE);
                step.ops.push(MapOp::Dest { index, value: mirror.record });
            }
        }
        self.rest.nameless.extend(&dest.former);
        let trashed = Trashed { index: dest.index, serial, last_weight: dest.last_weight };
        if let Some(other) = self.rest.trash.insert((key, name), trashed) {
            self.rest.nameless.insert(other.index);
        }
    }

    /// A dest out of the trash: packets of its connections are forwarded again.
    fn revive(&mut self, index: u32, service: u32, step: &mut Step) {
        let Some(mirror) = self.dests.get(&index).copied() else { return };
        let record = abi::Dest { out: mirror.record.out | u64::from(flag::AVAILABLE), service, ..mirror.record };
        let revived = self.pointed(Mirror { record, ..mirror });
        step.mirrors.push((index, self.dests.insert(index, revived)));
        step.ops.push(MapOp::Tunnel { index, value: revived.tunnel });
        step.ops.push(MapOp::Dest { index, value: revived.record });
    }

    fn has_method(&self, index: u32, bits: u32) -> bool {
        let method = |out: u64| out as u32 & (flag::METHOD | flag::OWN | flag::PROXY);
        self.dests.get(&index).is_some_and(|m| method(m.record.out) == bits)
    }

    fn write_dest(&mut self, index: u32, dest: &Dest, placed: &Placed, last_weight: u32, step: &mut Step) {
        let (address, service) = (dest.key.addr, placed.index);
        let mut record = abi::Dest {
            out: u64::from(placed.method_bits(dest) | flag::AVAILABLE),
            address: bytes(address).into(),
            port: dest.key.port,
            mtu: 0,
            service,
        };
        if address.is_ipv6() {
            record.out |= u64::from(flag::V6);
        }
        let mirror = self.pointed(Mirror { record, tunnel: tunnel_record(dest.method), address });
        let info = abi::DestInfo {
            weight: dest.weight,
            last_weight,
            upper_threshold: dest.upper,
            lower_threshold: dest.lower,
            ..abi::DestInfo::default()
        };
        step.ops.push(MapOp::DestInfo { index, value: info });
        step.ops.push(MapOp::Quiesced { index, quiesced: dest.weight == 0 });
        step.ops.push(MapOp::Tunnel { index, value: mirror.tunnel });
        step.ops.push(MapOp::Dest { index, value: mirror.record });
        step.mirrors.push((index, self.dests.insert(index, mirror)));
        self.by_address.entry(address).or_default().insert(index);
    }

    // ---- lists and tables

    fn relist(
        &mut self,
        placed: &mut Placed,
        change: lists::Change,
        now_ms: u64,
        step: &mut Step,
    ) -> Result<(), PlanError> {
        let old = std::mem::take(&mut placed.list);
        let new = lists::List { entries: old.clone(), machines: abi::ServiceState::default() }.after(change)?;
        let run = self.rest.lists.take(new.entries.len() as u32 + 1)?;
        self.rest.lists.retire(std::mem::replace(&mut placed.run, run), now_ms);
        placed.record.list = u64::from(run.first) | (new.entries.len() as u64) << 32;
        placed.list = new.entries;
        step.ops.push(MapOp::List { service: placed.index, old, change, first: run.first });
        Ok(())
    }

    /// The lookup table, if the scheduler has one.
    fn retable(
        &mut self,
        placed: &mut Placed,
        service: &Service,
        now_ms: u64,
        step: &mut Step,
    ) -> Result<(), PlanError> {
        let old = placed.table.take();
        let places = service.config.scheduler.and_then(|scheduler| lists::table(scheduler, &members(service, placed)));
        let size = places.as_ref().map_or(0, |p| p.len() as u32);
        if size > 0 {
            placed.table = Some(self.rest.tables.take(size)?);
        }
        if size > 0 || old.is_some() {
            let first = placed.table.map_or(0, |run| run.first);
            placed.record.table = u64::from(first) | u64::from(size) << 32;
            step.ops.push(MapOp::Table { service: placed.index, first, places: places.unwrap_or_default() });
        }
        if let Some(old) = old {
            self.rest.tables.retire(old, now_ms);
        }
        Ok(())
    }

    // ---- time

    /// Dest indexes that are out of use: the caller looks which of them no connection names, and says so to [`Self::idle`].
    pub fn trashed(&self) -> impl Iterator<Item = u32> + '_ {
        let former = self.services.values().flat_map(|p| p.dests.values()).flat_map(|d| d.former.iter().copied());
        self.rest.trash.values().map(|t| t.index).chain(self.rest.nameless.iter().copied()).chain(former)
    }

    /// No connection has named these for two full sweeps: their indexes are free. The writes fold the counters of former methods
    /// into their services.
    pub fn idle(&mut self, indexes: &BTreeSet<u32>) -> Step {
        let mut step = Step::default();
        let mut free: Vec<u32> = self.rest.nameless.intersection(indexes).copied().collect();
        self.rest.nameless.retain(|i| !indexes.contains(i));
        self.rest.trash.retain(|_, t| {
            let keep = !indexes.contains(&t.index);
            if !keep {
                free.push(t.index);
            }
            keep
        });
        for placed in self.services.values_mut() {
            for dest in placed.dests.values_mut() {
                dest.former.retain(|i| {
                    let keep = !indexes.contains(i);
                    if !keep {
                        free.push(*i);
                        step.ops.push(MapOp::StatsOut { service: placed.index, dest: *i });
                    }
                    keep
                });
            }
        }
        for index in free {
            self.forget(index);
            step.ops.push(MapOp::Dest { index, value: abi::Dest::default() });
            self.rest.dest_indexes.give(index);
        }
        step
    }

    /// What was retired more than [`GRACE_MS`] ago may be used again.
    pub fn tick(&mut self, now_ms: u64) {
        let until = now_ms.saturating_sub(GRACE_MS);
        self.rest.service_indexes.reclaim(until);
        self.rest.dest_indexes.reclaim(until);
        self.rest.hop_indexes.reclaim(until);
        self.rest.lists.reclaim(until);
        self.rest.tables.reclaim(until);
        self.rest.locals.reclaim(until);
    }

    // ---- for listings

    /// Index of a service.
    pub fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        self.services.get(key).map(|p| p.index)
    }

    /// Indexes of a dest: the one in the list, and those of former methods.
    pub fn dest_indexes(&self, key: &ServiceKey, dest: &DestKey) -> Option<(u32, &[u32])> {
        self.services.get(key)?.dests.get(dest).map(|d| (d.index, d.former.as_slice()))
    }

    /// The address and port that a dest's index stands for.
    pub fn dest_address(&self, index: u32) -> Option<(IpAddr, u16)> {
        self.dests.get(&index).map(|m| (m.address, m.record.port))
    }
}

/// The dests of a service in list order, for the tables of hash schedulers.
fn members(service: &Service, placed: &Placed) -> Vec<sched::Member> {
    let member = |d: &Dest| {
        let PlacedDest { index, last_weight, .. } = *placed.dests.get(&d.key)?;
        let DestKey { addr, port } = d.key;
        Some(sched::Member { dest: index, address: bytes(addr), port, weight: d.weight, last_weight })
    };
    service.dests().filter_map(member).collect()
}
