//! Carrying out the planner's writes, all or none; and reading back what there is.

use rvs_control::lists;
use rvs_control::plan::{Dump, DumpedDest, DumpedService, MapOp};
use rvs_datapath::abi::{self, Config, ServiceState, Stats};
use rvs_datapath::conn::Timeouts;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::{BpfError, Maps, Result};

/// How to take back one write.
enum Undo {
    Key(abi::ServiceKey, Option<u64>),
    Watch(abi::ServiceKey, u64),
    Service(u32, abi::Service),
    State(u32, ServiceState),
    Dest(u32, abi::Dest),
    Info(u32, abi::DestInfo),
    Tunnel(u32, abi::Tunnel),
    Quiesced(u32, bool),
    Hop(u32, abi::Hop),
    Config(Box<Config>),
}

/// Word of `abi::Service` that publishes its list, and the one of its table.
const LIST: usize = 0;
const TABLE: usize = 1;
/// ... and its local addresses.
const LOCALS: usize = std::mem::offset_of!(abi::Service, locals) / 8;
/// Word of `abi::DestState` with its flags; bit 1: weight 0.
const FLAGS: usize = 2;
const QUIESCED: u64 = 2;

impl Maps {
    /// Carry out all writes, or none.
    ///
    /// # Errors
    /// The write that failed; those before it have been taken back.
    pub fn apply(&mut self, ops: &[MapOp]) -> Result<()> {
        let mut undo = Vec::new();
        for op in ops {
            if let Err(error) = self.write(op, &mut undo) {
                for u in undo.into_iter().rev() {
                    // What was written a moment ago can be written again.
                    let _ = self.take_back(u);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn write(&mut self, op: &MapOp, undo: &mut Vec<Undo>) -> Result<()> {
        match op {
            MapOp::Key { key, value } => {
                let before = self.keys.get(*key)?;
                match value {
                    Some(value) => self.keys.insert(*key, *value)?,
                    None if before.is_some() => self.keys.remove(*key)?,
                    None => {}
                }
                undo.push(Undo::Key(*key, before));
            }
            MapOp::Watch { key, bits } => {
                let before = self.watched.get(*key)?.unwrap_or(0);
                self.watch(*key, *bits)?;
                undo.push(Undo::Watch(*key, before));
            }
            MapOp::Service { index, value, fresh } => {
                let before = self.services.get(*index)?;
                let offset = if *fresh { Stats::default() } else { before.offset };
                self.services.set(*index, abi::Service { offset, ..*value })?;
                undo.push(Undo::Service(*index, before));
            }
            MapOp::List { service, old, change, first } => self.list(*service, old, *change, *first, undo)?,
            MapOp::Table { service, first, places } => {
                for (i, place) in places.iter().enumerate() {
                    self.tables.set(first + i as u32, *place)?;
                }
                undo.push(Undo::Service(*service, self.services.get(*service)?));
                let word = u64::from(*first) | (places.len() as u64) << 32;
                self.services.word(*service, TABLE)?.store(word, Ordering::Release);
            }
            MapOp::Locals { service, first, addresses } => {
                for (i, address) in addresses.iter().enumerate() {
                    self.locals.set(first + i as u32, *address)?;
                }
                undo.push(Undo::Service(*service, self.services.get(*service)?));
                let word = u64::from(*first) | (addresses.len() as u64) << 32;
                self.services.word(*service, LOCALS)?.store(word, Ordering::Release);
            }
            MapOp::Dest { index, value } => {
                undo.push(Undo::Dest(*index, self.dests.get(*index)?));
                self.dests.set(*index, *value)?;
            }
            MapOp::DestInfo { index, value } => {
                let before = self.dest_info.get(*index)?;
                self.dest_info.set(*index, abi::DestInfo { offset: before.offset, ..*value })?;
                undo.push(Undo::Info(*index, before));
            }
            MapOp::Tunnel { index, value } => {
                undo.push(Undo::Tunnel(*index, self.tunnels.get(*index)?));
                self.tunnels.set(*index, *value)?;
            }
            MapOp::Quiesced { index, quiesced } => {
                let before = self.quiesce(*index, *quiesced)?;
                undo.push(Undo::Quiesced(*index, before));
            }
            MapOp::StatsIn { service, dest, fresh } => {
                let (raw, info) = (self.raw_stats(*dest)?, self.dest_info.get(*dest)?);
                self.offset(*service, undo, |offset| combine(offset, raw, u64::wrapping_sub))?;
                if *fresh {
                    undo.push(Undo::Info(*dest, info));
                    self.dest_info.set(*dest, abi::DestInfo { offset: raw, ..info })?;
                }
            }
            MapOp::StatsOut { service, dest } => {
                let raw = self.raw_stats(*dest)?;
                self.offset(*service, undo, |offset| combine(offset, raw, u64::wrapping_add))?;
            }
            MapOp::Zero { service, dests } => self.zero(*service, dests, undo)?,
            MapOp::Hop { index, value } => {
                undo.push(Undo::Hop(*index, self.hops.get(*index)?));
                self.hops.set(*index, *value)?;
            }
            MapOp::Timeouts(t) => self.timeouts(t, undo)?,
            MapOp::Settings(s) => {
                let before = self.config.get(0)?;
                undo.push(Undo::Config(Box::new(before)));
                let (level, settings) = (s.level(), s.values());
                self.config.set(0, Config { flags: level.flags, drop_rate: level.drop_rate, settings, ..before })?;
            }
        }
        Ok(())
    }

    fn watch(&mut self, key: abi::ServiceKey, bits: u64) -> Result<()> {
        match bits {
            0 if self.watched.get(key)?.is_some() => self.watched.remove(key),
            0 => Ok(()),
            bits => self.watched.insert(key, bits),
        }
    }

    /// A timeout above half an hour changes the unit of ages, which takes a sweep; another such change has to wait for that.
    fn timeouts(&mut self, t: &Timeouts, undo: &mut Vec<Undo>) -> Result<()> {
        let (before, ticks) = (self.config.get(0)?, self.clock.get(0)?.ticks);
        let policy = before.policy.changed(t);
        let mut turned_at = before.turned_at;
        if policy.epoch != before.policy.epoch {
            let since = ticks.wrapping_sub(before.turned_at);
            if before.turned_at != 0 && since <= 2 * abi::SWEEP_TICKS {
                return Err(BpfError::Refused(
                    "connections are still being brought over to the last change of timeouts: try again in 4 seconds"
                        .into(),
                ));
            }
            turned_at = ticks.max(1);
        }
        let timeouts_s = [t.tcp, t.tcp_fin, t.udp, 0];
        undo.push(Undo::Config(Box::new(before)));
        self.config.set(0, Config { policy, turned_at, timeouts_s, ..before })
    }

    /// The run first, then the list word, then the machines.
    fn list(
        &mut self,
        service: u32,
        old: &[abi::ListEntry],
        change: lists::Change,
        first: u32,
        undo: &mut Vec<Undo>,
    ) -> Result<()> {
        let machines = self.service_state.get(service)?;
        let after = lists::List { entries: old.to_vec(), machines }
            .after(change)
            .map_err(|e| BpfError::Refused(format!("list of service {service}: {e}")))?;
        for (i, entry) in after.run().iter().enumerate() {
            self.lists.set(first + i as u32, *entry)?;
        }
        undo.push(Undo::Service(service, self.services.get(service)?));
        undo.push(Undo::State(service, machines));
        let word = u64::from(first) | (after.entries.len() as u64) << 32;
        self.services.word(service, LIST)?.store(word, Ordering::Release);
        self.service_state.set(service, after.machines)
    }

    fn offset(&mut self, service: u32, undo: &mut Vec<Undo>, f: impl Fn(Stats) -> Stats) -> Result<()> {
        let before = self.services.get(service)?;
        self.services.set(service, abi::Service { offset: f(before.offset), ..before })?;
        undo.push(Undo::Service(service, before));
        Ok(())
    }

    fn zero(&mut self, service: u32, dests: &[u32], undo: &mut Vec<Undo>) -> Result<()> {
        let mut sum = Stats::default();
        for dest in dests {
            let (raw, info) = (self.raw_stats(*dest)?, self.dest_info.get(*dest)?);
            sum = combine(sum, raw, u64::wrapping_add);
            undo.push(Undo::Info(*dest, info));
            self.dest_info.set(*dest, abi::DestInfo { offset: raw, ..info })?;
        }
        self.offset(service, undo, |_| combine(Stats::default(), sum, u64::wrapping_sub))
    }

    fn quiesce(&mut self, index: u32, quiesced: bool) -> Result<bool> {
        let word = self.dest_state.word(index, FLAGS)?;
        let before = if quiesced {
            word.fetch_or(QUIESCED, Ordering::AcqRel)
        } else {
            word.fetch_and(!QUIESCED, Ordering::AcqRel)
        };
        Ok(before & QUIESCED != 0)
    }

    fn take_back(&mut self, undo: Undo) -> Result<()> {
        match undo {
            Undo::Key(key, Some(value)) => self.keys.insert(key, value),
            Undo::Key(key, None) => self.keys.remove(key),
            Undo::Watch(key, bits) => self.watch(key, bits),
            Undo::Service(index, value) => self.services.set(index, value),
            Undo::State(index, value) => self.service_state.set(index, value),
            Undo::Dest(index, value) => self.dests.set(index, value),
            Undo::Info(index, value) => self.dest_info.set(index, value),
            Undo::Tunnel(index, value) => self.tunnels.set(index, value),
            Undo::Quiesced(index, before) => self.quiesce(index, before).map(|_| ()),
            Undo::Hop(index, value) => self.hops.set(index, value),
            Undo::Config(value) => self.config.set(0, *value),
        }
    }

    /// A dest's counters of all CPUs together, without its offset.
    fn raw_stats(&self, dest: u32) -> Result<Stats> {
        let cpus = self.dest_stats.get(dest)?;
        Ok(cpus.into_iter().fold(Stats::default(), |sum, cpu| combine(sum, cpu.stats, u64::wrapping_add)))
    }

    /// A dest's counters as shown, and what it adds to its service's.
    pub fn stats_of_dest(&self, dest: u32) -> Result<(Stats, Stats)> {
        let (raw, info) = (self.raw_stats(dest)?, self.dest_info.get(dest)?);
        Ok((combine(raw, info.offset, u64::wrapping_sub), raw))
    }

    /// A service's counters: the sum of what its dests add, with its offset.
    pub fn stats_of_service(&self, service: u32, sum: Stats) -> Result<Stats> {
        Ok(combine(sum, self.services.get(service)?.offset, u64::wrapping_add))
    }

    /// ActiveConn, InActConn and persistent connections of a dest.
    pub fn connections_of(&self, dest: u32) -> Result<[u32; 3]> {
        let s = self.dest_state.get(dest)?;
        let elder = self.elder_state.as_ref().map_or_else(Default::default, |e| e.get::<abi::DestState>(dest));
        let all = [
            s.active.wrapping_add(elder.active),
            s.inactive.wrapping_add(elder.inactive),
            s.persistent.wrapping_add(elder.persistent),
        ];
        Ok(all.map(|n| u32::try_from((n as i64).max(0)).unwrap_or(u32::MAX)))
    }

    /// What the maps hold, for the control plane to take over.
    pub fn dump(&self) -> Result<Dump> {
        let mut dump = Dump::default();
        for entry in self.keys.iter() {
            let index = entry?.1 as u32;
            let record = self.services.get(index)?;
            let (first, count) = (record.list as u32, (record.list >> 32) as u32);
            let list = (1..=count).map(|i| self.lists.get(first.wrapping_add(i))).collect::<Result<_>>()?;
            let (first, count) = (record.locals as u32, (record.locals >> 32) as u32);
            let locals = (0..count).map(|i| self.locals.get(first.wrapping_add(i))).collect::<Result<_>>()?;
            dump.services.push(DumpedService { index, record, list, locals });
        }
        let mut hops = BTreeSet::new();
        for index in 1..self.dests.len() {
            let record = self.dests.get(index)?;
            if record != abi::Dest::default() {
                dump.dests.push(DumpedDest {
                    index,
                    record,
                    info: self.dest_info.get(index)?,
                    tunnel: self.tunnels.get(index)?,
                });
                hops.insert((record.out >> 32) as u32);
            }
        }
        hops.remove(&0);
        for index in hops {
            dump.hops.push((index, self.hops.get(index)?));
        }
        dump.watched = self.watched.iter().collect::<Result<_>>()?;
        let config = self.config.get(0)?;
        dump.timeouts_s = [config.timeouts_s[0], config.timeouts_s[1], config.timeouts_s[2]];
        dump.settings = config.settings;
        Ok(dump)
    }
}

/// Field by field.
pub fn combine(a: Stats, b: Stats, f: fn(u64, u64) -> u64) -> Stats {
    Stats {
        connections: f(a.connections, b.connections),
        packets_in: f(a.packets_in, b.packets_in),
        packets_out: f(a.packets_out, b.packets_out),
        bytes_in: f(a.bytes_in, b.bytes_in),
        bytes_out: f(a.bytes_out, b.bytes_out),
    }
}
