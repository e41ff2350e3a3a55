//! The configuration as one validated value: services in a keyed, ordered map, each with its dests in the kernel's own
//! list order. [`Model::apply`] is the only way in; it changes all of what a command says or nothing.

mod command;
mod types;

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

pub use command::{Change, Command, CommandError, DaemonSpec, Env, RemovedDest, ServiceSpec};
pub use types::{
    DaemonRole, Defence, Dest, DestKey, Engine, Family, FwdMethod, Granularity, Proto, SchedFlags, Scheduler,
    ServiceConfig, ServiceKey, SyncDaemon, Timeouts, Tunnel, TunnelChecksum, TunnelKind,
};

use crate::limits;
use crate::settings::Settings;

/// A virtual service with its dests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub config: ServiceConfig,
    /// Sources for FULLNAT.
    pub local_addresses: BTreeSet<IpAddr>,
    pub defence: Defence,
    /// Its real servers are told of their clients by PROXY headers, version 2.
    pub proxy: bool,
    /// When it was added, in commands: the order of [`Model::services_by_age`].
    age: u64,
    dests: DestList,
}

impl Service {
    /// The dests in the kernel's list order: the one added last comes first.
    pub fn dests(&self) -> impl Iterator<Item = &Dest> {
        self.dests.by_position.values()
    }

    pub fn dest(&self, key: &DestKey) -> Option<&Dest> {
        self.dests.by_position.get(&Reverse(*self.dests.position.get(key)?))
    }

    pub fn dest_count(&self) -> usize {
        self.dests.position.len()
    }
}

/// Dests by name and by place in the list. A dest's place is the number it got when it was added, largest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct DestList {
    position: BTreeMap<DestKey, u64>,
    by_position: BTreeMap<Reverse<u64>, Dest>,
}

impl DestList {
    fn insert(&mut self, dest: Dest, position: u64) {
        self.position.insert(dest.key, position);
        self.by_position.insert(Reverse(position), dest);
    }

    fn remove(&mut self, key: &DestKey) -> Option<RemovedDest> {
        let position = self.position.remove(key)?;
        self.by_position.remove(&Reverse(position)).map(|dest| RemovedDest { dest, position })
    }

    /// Puts `dest` in the place of the one with its name, and returns that one.
    fn replace(&mut self, dest: Dest) -> Option<Dest> {
        let place = self.by_position.get_mut(&Reverse(*self.position.get(&dest.key)?))?;
        Some(std::mem::replace(place, dest))
    }
}

/// Do replies of a real server by this method come by the director? Without them neither SYN cookies nor PROXY headers can be.
pub fn takes_cookies(method: FwdMethod) -> bool {
    matches!(method, FwdMethod::Masq | FwdMethod::Fullnat)
}

/// All configuration that `ipvsadm` can see and change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    services: BTreeMap<ServiceKey, Service>,
    /// Services by age, oldest first.
    by_age: BTreeMap<u64, ServiceKey>,
    timeouts: Timeouts,
    settings: Settings,
    master: Option<SyncDaemon>,
    backup: Option<SyncDaemon>,
    dest_count: usize,
    /// Dests whose address family is not their service's (kernel `mixed_address_family_dests`).
    mixed_count: usize,
    /// The next number for an age or a place. Never goes back, so that taking a change back restores every order.
    next: u64,
}

impl Model {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// All services, ordered by their keys.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceKey, &Service)> {
        self.services.iter()
    }

    /// All services, the one added first comes first: the order that `--nosort` shows.
    pub fn services_by_age(&self) -> impl Iterator<Item = (&ServiceKey, &Service)> {
        self.by_age.values().filter_map(|key| self.services.get_key_value(key))
    }

    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    pub fn dest_count(&self) -> usize {
        self.dest_count
    }

    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// So much memory is free now: settings that wait for it to be short act, or no longer.
    pub fn see_memory(&mut self, free_pages: u64) {
        self.settings = self.settings.seen(free_pages);
    }

    pub fn daemon(&self, role: DaemonRole) -> Option<&SyncDaemon> {
        match role {
            DaemonRole::Master => self.master.as_ref(),
            DaemonRole::Backup => self.backup.as_ref(),
        }
    }

    /// Carries out one command, in the kernel's order of checks (`ip_vs_genl_set_cmd` and what it calls). On an error
    /// nothing has changed.
    pub fn apply(&mut self, command: &Command, env: &dyn Env) -> Result<Change, CommandError> {
        match command {
            Command::AddService(key, spec) => self.add_service(*key, spec),
            Command::EditService(key, spec) => self.edit_service(*key, spec),
            Command::DelService(key) => self.del_service(*key),
            Command::AddDest(key, dest) => self.add_dest(*key, *dest, env),
            Command::EditDest(key, dest) => self.edit_dest(*key, *dest),
            Command::DelDest(key, dest) => self.del_dest(*key, *dest),
            Command::Flush => Ok(self.flush()),
            Command::Zero(None) => Ok(Change::Zeroed(None)),
            Command::Zero(Some(key)) => {
                self.existing(key)?;
                Ok(Change::Zeroed(Some(*key)))
            }
            Command::SetTimeouts(timeouts) => self.set_timeouts(*timeouts),
            Command::Set(name, value) => {
                let before = self.settings;
                self.settings = before.with(name, *value)?;
                Ok(Change::SettingChanged { before })
            }
            Command::StartDaemon(spec) => self.start_daemon(spec, env),
            Command::StopDaemon(role) => {
                let was = self.daemon_slot(*role).take().ok_or(CommandError::NoDaemon)?;
                Ok(Change::DaemonStopped { role: *role, was })
            }
            Command::AddLocalAddress(key, addr) => self.add_local_address(*key, *addr, env),
            Command::DelLocalAddress(key, addr) => {
                let removed = self.existing(key)?.local_addresses.remove(addr);
                if !removed {
                    return Err(CommandError::NoSuchLocalAddress);
                }
                Ok(Change::LocalAddressRemoved { service: *key, addr: *addr })
            }
            Command::Defend(key, defence) => self.defend(*key, *defence),
            Command::Proxy(key, on) => self.proxy(*key, *on),
        }
    }

    /// Takes back the change that [`Model::apply`] returned last: the model is then what it was before, every order
    /// included. For the daemon, when the data plane could not follow.
    pub fn revert(&mut self, change: Change) {
        match change {
            Change::ServiceAdded(key) => drop(self.take_service(&key)),
            Change::ServiceEdited { key, before } => {
                if let Some(service) = self.services.get_mut(&key) {
                    service.config = before;
                }
            }
            Change::ServiceRemoved { key, was } => self.put_service(key, *was),
            Change::DestAdded { service, dest } => drop(self.take_dest(&service, &dest)),
            Change::DestEdited { service, before } => {
                if let Some(service) = self.services.get_mut(&service) {
                    service.dests.replace(before);
                }
            }
            Change::DestRemoved { service, was } => self.put_dest(&service, was.dest, was.position),
            Change::Flushed(services) => services.into_iter().for_each(|(key, service)| self.put_service(key, service)),
            Change::Zeroed(_) => {}
            Change::TimeoutsSet { before } => self.timeouts = before,
            Change::SettingChanged { before } => self.settings = before,
            Change::DaemonStarted(role) => *self.daemon_slot(role) = None,
            Change::DaemonStopped { role, was } => *self.daemon_slot(role) = Some(was),
            Change::Defended { service, before } => {
                if let Some(service) = self.services.get_mut(&service) {
                    service.defence = before;
                }
            }
            Change::ProxySet { service, before } => {
                if let Some(service) = self.services.get_mut(&service) {
                    service.proxy = before;
                }
            }
            Change::LocalAddressAdded { service, addr } => {
                if let Some(service) = self.services.get_mut(&service) {
                    service.local_addresses.remove(&addr);
                }
            }
            Change::LocalAddressRemoved { service, addr } => {
                if let Some(service) = self.services.get_mut(&service) {
                    service.local_addresses.insert(addr);
                }
            }
        }
    }

    fn add_service(&mut self, key: ServiceKey, spec: &ServiceSpec) -> Result<Change, CommandError> {
        if self.services.contains_key(&key) {
            return Err(CommandError::ServiceExists);
        }
        let config = resolve(&key, spec)?;
        if self.services.len() >= limits::SERVICES_MAX {
            return Err(CommandError::Full { what: "service", max: limits::SERVICES_MAX });
        }
        let age = self.take_number();
        let service = Service {
            config,
            local_addresses: BTreeSet::new(),
            defence: Defence::default(),
            proxy: false,
            age,
            dests: DestList::default(),
        };
        self.put_service(key, service);
        Ok(Change::ServiceAdded(key))
    }

    fn edit_service(&mut self, key: ServiceKey, spec: &ServiceSpec) -> Result<Change, CommandError> {
        let service = self.existing(&key)?;
        let before = std::mem::replace(&mut service.config, resolve(&key, spec)?);
        Ok(Change::ServiceEdited { key, before })
    }

    fn del_service(&mut self, key: ServiceKey) -> Result<Change, CommandError> {
        let was = self.take_service(&key).ok_or(CommandError::NoSuchService)?;
        Ok(Change::ServiceRemoved { key, was: Box::new(was) })
    }

    fn add_dest(&mut self, key: ServiceKey, dest: Dest, env: &dyn Env) -> Result<Change, CommandError> {
        self.existing(&key)?;
        self.check_family(&key, &dest)?;
        check_dest(&dest)?;
        check_proxied(self.existing(&key)?.proxy, &dest)?;
        let dest = with_forced_port(&key, dest);
        if self.existing(&key)?.dest(&dest.key).is_some() {
            return Err(CommandError::DestExists);
        }
        if !is_server_address(dest.key.addr, env) {
            return Err(CommandError::NotUnicast(dest.key.addr));
        }
        if self.dest_count >= limits::DESTS_MAX {
            return Err(CommandError::Full { what: "destination", max: limits::DESTS_MAX });
        }
        let position = self.take_number();
        self.put_dest(&key, dest, position);
        Ok(Change::DestAdded { service: key, dest: dest.key })
    }

    fn edit_dest(&mut self, key: ServiceKey, dest: Dest) -> Result<Change, CommandError> {
        self.existing(&key)?;
        self.check_family(&key, &dest)?;
        check_dest(&dest)?;
        check_proxied(self.existing(&key)?.proxy, &dest)?;
        let dest = with_forced_port(&key, dest);
        let before = self.existing(&key)?.dests.replace(dest).ok_or(CommandError::NoSuchDest)?;
        Ok(Change::DestEdited { service: key, before })
    }

    fn del_dest(&mut self, key: ServiceKey, dest: DestKey) -> Result<Change, CommandError> {
        self.existing(&key)?;
        let was = self.take_dest(&key, &dest).ok_or(CommandError::NoSuchDest)?;
        Ok(Change::DestRemoved { service: key, was })
    }

    fn flush(&mut self) -> Change {
        self.by_age.clear();
        self.dest_count = 0;
        self.mixed_count = 0;
        Change::Flushed(std::mem::take(&mut self.services).into_iter().collect())
    }

    fn set_timeouts(&mut self, new: Timeouts) -> Result<Change, CommandError> {
        let before = self.timeouts;
        let mut after = before;
        let pairs =
            [(new.tcp_s, &mut after.tcp_s), (new.tcp_fin_s, &mut after.tcp_fin_s), (new.udp_s, &mut after.udp_s)];
        for (value, place) in pairs {
            match value {
                0 => {}
                1..=limits::TIMEOUT_S_MAX => *place = value,
                _ => return Err(CommandError::BadTimeout(value)),
            }
        }
        self.timeouts = after;
        Ok(Change::TimeoutsSet { before })
    }

    /// `ip_vs_genl_new_daemon`, then `start_sync_thread`.
    fn start_daemon(&mut self, spec: &DaemonSpec, env: &dyn Env) -> Result<Change, CommandError> {
        let group = spec.group.unwrap_or(IpAddr::V4(Ipv4Addr::new(224, 0, 0, 81)));
        if !group.is_multicast() {
            return Err(CommandError::NotMulticast(group));
        }
        if self.mixed_count > 0 {
            return Err(CommandError::MixedFamilyWithDaemon);
        }
        let device_mtu =
            env.interface_mtu(&spec.interface).ok_or_else(|| CommandError::NoSuchInterface(spec.interface.clone()))?;
        let headers: u32 = if group.is_ipv4() { 20 + 8 } else { 40 + 8 };
        let (mtu, least) = match spec.role {
            DaemonRole::Master => (1500, 1),
            DaemonRole::Backup => (device_mtu.clamp(1500, 65535), 1024),
        };
        let maxlen = match spec.maxlen {
            None | Some(0) => mtu - headers,
            Some(asked) => u32::from(asked).clamp(least, 65535 - headers),
        };
        let daemon = SyncDaemon {
            interface: spec.interface.clone(),
            syncid: spec.syncid,
            maxlen: u16::try_from(maxlen).unwrap_or(u16::MAX),
            group,
            port: spec.port.filter(|p| *p != 0).unwrap_or(8848),
            ttl: spec.ttl.filter(|t| *t != 0).unwrap_or(1),
        };
        let slot = self.daemon_slot(spec.role);
        if slot.is_some() {
            return Err(CommandError::DaemonRuns);
        }
        *slot = Some(daemon);
        Ok(Change::DaemonStarted(spec.role))
    }

    fn add_local_address(&mut self, key: ServiceKey, addr: IpAddr, env: &dyn Env) -> Result<Change, CommandError> {
        let service = self.existing(&key)?;
        if !is_server_address(addr, env) {
            return Err(CommandError::NotUnicast(addr));
        }
        if service.local_addresses.contains(&addr) {
            return Err(CommandError::LocalAddressExists);
        }
        if service.local_addresses.len() >= limits::LOCAL_ADDRESSES_MAX {
            return Err(CommandError::Full { what: "local address", max: limits::LOCAL_ADDRESSES_MAX });
        }
        service.local_addresses.insert(addr);
        Ok(Change::LocalAddressAdded { service: key, addr })
    }

    fn defend(&mut self, key: ServiceKey, defence: Defence) -> Result<Change, CommandError> {
        let service = self.existing(&key)?;
        if defence.cookies_above.is_some() {
            if !matches!(key, ServiceKey::Virtual { proto: Proto::Tcp, .. }) {
                return Err(CommandError::CookiesNotTcp);
            }
            if let Some(dest) = service.dests().find(|d| !takes_cookies(d.method)) {
                return Err(CommandError::CookiesOneWay(dest.key.addr));
            }
        }
        let before = std::mem::replace(&mut service.defence, defence);
        Ok(Change::Defended { service: key, before })
    }

    fn proxy(&mut self, key: ServiceKey, on: bool) -> Result<Change, CommandError> {
        let service = self.existing(&key)?;
        if on {
            if !matches!(key, ServiceKey::Virtual { proto: Proto::Tcp, .. }) {
                return Err(CommandError::ProxyNotTcp);
            }
            service.dests().try_for_each(|dest| check_proxied(true, dest))?;
        }
        let before = std::mem::replace(&mut service.proxy, on);
        Ok(Change::ProxySet { service: key, before })
    }

    fn existing(&mut self, key: &ServiceKey) -> Result<&mut Service, CommandError> {
        self.services.get_mut(key).ok_or(CommandError::NoSuchService)
    }

    fn daemon_slot(&mut self, role: DaemonRole) -> &mut Option<SyncDaemon> {
        match role {
            DaemonRole::Master => &mut self.master,
            DaemonRole::Backup => &mut self.backup,
        }
    }

    /// The sync protocol has no place for two families in one connection, and only tunnels can join them.
    fn check_family(&self, key: &ServiceKey, dest: &Dest) -> Result<(), CommandError> {
        if !is_mixed(key, dest) {
            return Ok(());
        }
        if self.master.is_some() || self.backup.is_some() {
            return Err(CommandError::MixedFamilyWithDaemon);
        }
        match dest.method {
            FwdMethod::Tunnel(_) => Ok(()),
            _ => Err(CommandError::MixedFamily),
        }
    }

    fn take_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn put_service(&mut self, key: ServiceKey, service: Service) {
        self.dest_count += service.dest_count();
        self.mixed_count += service.dests().filter(|d| is_mixed(&key, d)).count();
        self.by_age.insert(service.age, key);
        self.services.insert(key, service);
    }

    fn take_service(&mut self, key: &ServiceKey) -> Option<Service> {
        let service = self.services.remove(key)?;
        self.by_age.remove(&service.age);
        self.dest_count -= service.dest_count();
        self.mixed_count -= service.dests().filter(|d| is_mixed(key, d)).count();
        Some(service)
    }

    fn put_dest(&mut self, key: &ServiceKey, dest: Dest, position: u64) {
        if let Some(service) = self.services.get_mut(key) {
            service.dests.insert(dest, position);
            self.dest_count += 1;
            self.mixed_count += usize::from(is_mixed(key, &dest));
        }
    }

    fn take_dest(&mut self, key: &ServiceKey, dest: &DestKey) -> Option<RemovedDest> {
        let removed = self.services.get_mut(key)?.dests.remove(dest)?;
        self.dest_count -= 1;
        self.mixed_count -= usize::from(is_mixed(key, &removed.dest));
        Some(removed)
    }
}

fn is_mixed(key: &ServiceKey, dest: &Dest) -> bool {
    key.family() != Family::of(&dest.key.addr)
}

/// Names become schedulers and engines (`ip_vs_add_service`, `ip_vs_edit_service`).
fn resolve(key: &ServiceKey, spec: &ServiceSpec) -> Result<ServiceConfig, CommandError> {
    let scheduler = match spec.scheduler.as_str() {
        "none" => None,
        name => Some(Scheduler::from_name(name).ok_or_else(|| CommandError::NoSuchScheduler(spec.scheduler.clone()))?),
    };
    let engine = match spec.engine.as_deref() {
        None | Some("") => None,
        Some(name) => Some(Engine::from_name(name).ok_or_else(|| CommandError::NoSuchEngine(name.to_owned()))?),
    };
    match (key.family(), spec.granularity) {
        (Family::V4, Granularity::V4(_)) | (Family::V6, Granularity::V6(1..=128)) => {}
        _ => return Err(CommandError::BadGranularity),
    }
    if let ServiceKey::Fwmark { mark: 0, .. } = key {
        return Err(CommandError::ZeroMark);
    }
    Ok(ServiceConfig {
        scheduler,
        sched_flags: spec.sched_flags,
        persistence_s: spec.persistence_s,
        granularity: spec.granularity,
        engine,
        one_packet: spec.one_packet,
    })
}

/// A server that waits for a header must get it from every director's packet.
fn check_proxied(proxy: bool, dest: &Dest) -> Result<(), CommandError> {
    if proxy && !takes_cookies(dest.method) { Err(CommandError::ProxyOneWay(dest.key.addr)) } else { Ok(()) }
}

/// Checks that adding and editing share (`ip_vs_add_dest`, `ip_vs_edit_dest`).
fn check_dest(dest: &Dest) -> Result<(), CommandError> {
    if dest.weight > limits::WEIGHT_MAX {
        return Err(CommandError::WeightOutOfRange(dest.weight));
    }
    if dest.lower > dest.upper {
        return Err(CommandError::ThresholdsCross { lower: dest.lower, upper: dest.upper });
    }
    match dest.method {
        FwdMethod::Tunnel(Tunnel { kind: TunnelKind::Gue, port: 0, .. }) => Err(CommandError::TunnelWithoutPort),
        _ => Ok(()),
    }
}

/// DR and TUN hand the packet over as it came, so their dest has the service's port whatever was asked for. A mark has
/// no port to force.
fn with_forced_port(key: &ServiceKey, mut dest: Dest) -> Dest {
    if let ServiceKey::Virtual { port, .. } = key
        && dest.method.keeps_port()
    {
        dest.key.port = *port;
    }
    dest
}

/// `ip_vs_new_dest`: unicast or local for IPv4 (`inet_addr_type`), unicast and not link-local, or local, for IPv6.
fn is_server_address(addr: IpAddr, env: &dyn Env) -> bool {
    match addr {
        IpAddr::V4(v4) => {
            let never = v4.octets()[0] == 0 || v4.is_broadcast() || v4.is_multicast();
            env.is_local(addr) || !(never || env.is_broadcast(v4))
        }
        IpAddr::V6(v6) => {
            let unicast = !(v6.is_unspecified() || v6.is_multicast() || v6.to_ipv4_mapped().is_some());
            env.is_local(addr) || (unicast && !v6.is_unicast_link_local())
        }
    }
}
