//! What the host brings about: its addresses, the ways to the real servers, its memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use rvs_datapath::abi::{self, config, dest as flag, service as service_flag, watched};

use super::{MapOp, Mirror, Planner, Step, Way, bytes};
use crate::model::{Model, ServiceKey};

impl Planner {
    /// The addresses of this host, as they are now.
    pub fn locals(&mut self, locals: BTreeSet<IpAddr>) -> Step {
        self.locals = locals;
        let mut step = Step::default();
        for (key, placed) in &mut self.services {
            let ServiceKey::Virtual { addr, .. } = key else { continue };
            let flags = placed.record.flags & !service_flag::LOCAL
                | if self.locals.contains(addr) { service_flag::LOCAL } else { 0 };
            if flags != placed.record.flags {
                placed.record.flags = flags;
                step.ops.push(MapOp::Service { index: placed.index, value: placed.record, fresh: false });
            }
        }
        step
    }

    /// What the settings come to now.
    pub fn settings(&self, model: &Model) -> Step {
        Step { ops: vec![MapOp::Settings(model.settings())], ..Step::default() }
    }

    pub(super) fn is_local(&self, key: &ServiceKey) -> bool {
        matches!(key, ServiceKey::Virtual { addr, .. } if self.locals.contains(addr))
    }

    /// The addresses to which ways are wanted.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.by_address.keys().copied()
    }

    /// Is no way to this address known yet?
    pub fn lacks_way(&self, address: IpAddr) -> bool {
        !self.ways.contains_key(&address) && !self.locals.contains(&address)
    }

    /// The ways there are now, to all addresses; an address without one is reached through the kernel's tables, packet by packet.
    /// If there is no room for all hops, some stay without.
    pub fn ways(&mut self, ways: BTreeMap<IpAddr, Way>, now_ms: u64) -> Step {
        self.ways = ways;
        let mut step = Step::default();
        let hops_wanted: BTreeSet<_> = self.ways.values().filter_map(hop_key).collect();
        for key in &hops_wanted {
            if !self.hops.contains_key(key)
                && let Ok(index) = self.rest.hop_indexes.take()
            {
                self.hops.insert(*key, index);
                step.ops.push(MapOp::Hop { index, value: abi::Hop { macs: key.0, ifindex: key.1 } });
            }
        }
        let mut dests = std::mem::take(&mut self.dests);
        for (index, mirror) in &mut dests {
            let pointed = self.pointed(*mirror);
            if pointed.tunnel != mirror.tunnel {
                step.ops.push(MapOp::Tunnel { index: *index, value: pointed.tunnel });
            }
            if pointed.record != mirror.record {
                step.ops.push(MapOp::Dest { index: *index, value: pointed.record });
            }
            *mirror = pointed;
        }
        self.dests = dests;
        let mut services = std::mem::take(&mut self.services);
        services.values_mut().filter(|placed| placed.record.cookies != 0).for_each(|p| self.ask(p, &mut step));
        self.services = services;
        let unused: Vec<_> =
            self.hops.iter().filter(|(k, _)| !hops_wanted.contains(*k)).map(|(k, i)| (*k, *i)).collect();
        for (key, index) in unused {
            self.hops.remove(&key);
            self.rest.hop_indexes.retire(index, now_ms);
        }
        step
    }

    /// The addresses whose fragments may be ours, as things are: virtual ones, local ones (FULLNAT), and those of real servers whose replies come by
    /// here with their own; and, if `nat_icmp_send` says so, where those are. Beyond [`abi::WATCHED_MAX`] of them some are left out: a fragment that comes too early is the kernel's there.
    pub fn watch(&mut self, model: &Model) -> Step {
        let mut wanted = BTreeMap::new();
        let mut add_at = |address: IpAddr, port: u16, protocol: u8, bits: u64| {
            let family = if address.is_ipv6() { 6 } else { 4 };
            let key = abi::ServiceKey { address: bytes(address), port, protocol, family };
            if wanted.len() < abi::WATCHED_MAX as usize || wanted.contains_key(&key) {
                *wanted.entry(key).or_default() |= bits;
            }
        };
        let mut add = |address: IpAddr, bit: u64| add_at(address, 0, 0, bit);
        for (key, service) in model.services() {
            if let ServiceKey::Virtual { addr, .. } = key {
                add(*addr, watched::DESTINATION);
            }
            service.local_addresses.iter().for_each(|a| add(*a, watched::DESTINATION));
        }
        let by_nat = |m: &Mirror| m.record.out as u32 & flag::METHOD == flag::MASQ || m.record.lends_own();
        self.dests.values().filter(|m| by_nat(m)).for_each(|m| add(m.address, watched::SOURCE));
        if model.settings().level().flags & config::NAT_ICMP_SEND != 0 {
            let protocols: BTreeMap<u32, u8> =
                self.services.values().map(|placed| (placed.index, placed.record.key.protocol)).collect();
            let there = |m: &Mirror| by_nat(m) && m.record.out as u32 & flag::AVAILABLE != 0;
            let mut seen = BTreeSet::new();
            for (index, m) in self.dests.iter().filter(|(_, m)| there(m)) {
                let Some(protocol) = protocols.get(&m.record.service) else { continue };
                // Of several services it has one dest in each: any of them.
                if seen.insert((m.address, m.record.port, *protocol)) {
                    add_at(m.address, m.record.port, *protocol, watched::SERVER | u64::from(*index) << 32);
                }
            }
        }
        let op = |key: &abi::ServiceKey, bits| MapOp::Watch { key: *key, bits };
        let gone = self.watched.keys().filter(|key| !wanted.contains_key(key)).map(|key| op(key, 0));
        let new =
            wanted.iter().filter(|(key, bits)| self.watched.get(key) != Some(bits)).map(|(key, bits)| op(key, *bits));
        let ops = gone.chain(new).collect();
        let before = std::mem::replace(&mut self.watched, wanted);
        Step { ops, watched: Some(before), ..Step::default() }
    }

    /// Is a real server that is this host served by NAT?
    pub fn has_local_masq(&self) -> bool {
        self.dests.values().any(|m| {
            let flags = m.record.out as u32;
            let by_nat = matches!(flags & flag::METHOD, flag::MASQ | flag::FULLNAT);
            flags & flag::LOCAL != 0 && by_nat && flags & flag::AVAILABLE != 0
        })
    }

    /// A dest with the way to its address.
    pub(super) fn pointed(&self, mut mirror: Mirror) -> Mirror {
        let (record, address) = (&mut mirror.record, mirror.address);
        // Of this host it is known at once; a reply of NAT must first find its egress program.
        let by_nat = matches!(record.out as u32 & flag::METHOD, flag::MASQ | flag::FULLNAT);
        let at_once = self.locals.contains(&address) && !by_nat;
        let way = if at_once { Some(&Way::Local) } else { self.ways.get(&address) };
        let hop = way.and_then(hop_key).and_then(|k| self.hops.get(&k)).copied().unwrap_or(0);
        let local = if way == Some(&Way::Local) { flag::LOCAL } else { 0 };
        let flags = record.out as u32 & !flag::LOCAL | local;
        record.out = u64::from(flags) | u64::from(hop) << 32;
        record.mtu = match way {
            Some(Way::Hop { mtu, .. }) => *mtu,
            _ => 0,
        };
        // Without a way for a while, the address of before is as good as any.
        if let Some(Way::Hop { source: Some(source), .. }) = way
            && (record.out as u32 & flag::METHOD == flag::TUNNEL || by_nat)
        {
            mirror.tunnel.source = bytes(*source).into();
        }
        mirror
    }
}

fn hop_key(way: &Way) -> Option<([u32; 3], u32)> {
    match way {
        Way::Hop { macs, ifindex, .. } => Some((*macs, *ifindex)),
        Way::Local => None,
    }
}
