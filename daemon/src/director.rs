//! The state of a running director, and what a command does to it: capability, model, plan, maps, or back again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rvs_control::api::{self, Code, Refusal};
use rvs_control::capability::Capabilities;
use rvs_control::model::{Change, Command, Env, FwdMethod, Model};
use rvs_control::net::Link;
use rvs_control::parts::Part;
use rvs_control::plan::{Capacity, GRACE_MS, PlanError, Planner, RestoreError, Step, Way};
use rvs_datapath::abi::Trace;
use rvs_sys::bpf::attach::Hook;
use rvs_sys::bpf::{BpfError, Dataplane, OBJECT};
use tokio::sync::{Notify, Semaphore, watch};

use crate::rates::Estimator;

/// What the model asks about the host.
#[derive(Debug, Default)]
pub struct Host {
    pub locals: BTreeSet<IpAddr>,
    pub broadcasts: BTreeSet<Ipv4Addr>,
    pub links: Vec<Link>,
}

impl Env for Host {
    fn is_local(&self, addr: IpAddr) -> bool {
        addr.is_loopback() || self.locals.contains(&addr)
    }
    fn is_broadcast(&self, addr: Ipv4Addr) -> bool {
        self.broadcasts.contains(&addr)
    }
    fn interface_mtu(&self, name: &str) -> Option<u32> {
        self.links.iter().find(|l| l.name == name).map(|l| l.mtu)
    }
}

pub struct Director {
    pub dataplane: Dataplane,
    pub model: Model,
    pub planner: Planner,
    pub host: Host,
    pub estimator: Estimator,
    capabilities: Capabilities,
    /// Since when no connection names a dest that is out of use, ms.
    idle_since: BTreeMap<u32, u64>,
    started: Instant,
    pub warnings: BTreeSet<String>,
    pub interfaces: BTreeMap<String, String>,
    /// How each interface has the program, by its number.
    pub hooks: BTreeMap<u32, Hook>,
    /// The programs have been loaded anew.
    pub reloaded: Rc<Notify>,
    /// Real servers that commands have added, and that the data plane can't reach before their way is known.
    unready: BTreeSet<IpAddr>,
    /// Sent to after each look at the network.
    pub looked: watch::Sender<()>,
    /// A client is being told of packets: interfaces are marked.
    pub tracing: bool,
    /// Connections are to be moved to other tables.
    pub moves: Rc<Notify>,
    /// Copies of the data plane, for `rvs why`: one at a time.
    pub rehearsals: Arc<Semaphore>,
}

/// No connection names it during two full sweeps, and some.
const IDLE_MS: u64 = 5_000;

impl Director {
    /// Over a data plane that may be at work already: what it is doing becomes the model.
    pub fn new(dataplane: Dataplane) -> Result<Director, StartError> {
        let maps = &dataplane.maps;
        let capacity = Capacity {
            services: maps.services.len(),
            dests: maps.dests.len(),
            lists: maps.lists.len(),
            tables: maps.tables.len(),
            hops: maps.hops.len(),
        };
        let (model, planner) = Planner::restore(&maps.dump()?, &capacity)?;
        let mut director = Director {
            dataplane,
            model,
            planner,
            host: Host::default(),
            estimator: Estimator::default(),
            capabilities: Capabilities::current(),
            idle_since: BTreeMap::new(),
            started: Instant::now(),
            warnings: BTreeSet::new(),
            interfaces: BTreeMap::new(),
            hooks: BTreeMap::new(),
            reloaded: Rc::new(Notify::new()),
            unready: BTreeSet::new(),
            looked: watch::Sender::new(()),
            tracing: false,
            moves: Rc::default(),
            rehearsals: Arc::new(Semaphore::new(1)),
        };
        // One before us may have been killed in the middle of it.
        director.trace(None)?;
        Ok(director)
    }

    /// Have the programs tell of these packets; `None`: of none.
    pub fn trace(&mut self, what: Option<Trace>) -> Result<(), BpfError> {
        let maps = &self.dataplane.maps;
        maps.trace.set(0, what.unwrap_or_default())?;
        self.tracing = what.is_some();
        for at in 0..maps.ifaces.len() {
            let there = maps.ifaces.get(at)?;
            let marked = there.traced(self.tracing);
            if there.number() != 0 && marked != there {
                maps.ifaces.set(at, marked)?;
            }
        }
        Ok(())
    }

    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn check_local_addresses(&self) -> Result<(), Refusal> {
        self.capabilities.check_local_addresses().map_err(|e| Refusal::from(&e))
    }

    /// Carry out one command, whole or not at all.
    pub fn command(&mut self, command: api::Command) -> Result<(), Refusal> {
        let command = Command::try_from(command).map_err(|e| Refusal::from(&e))?;
        self.capabilities.check(&command).map_err(|e| Refusal::from(&e))?;
        let change = self.model.apply(&command, &self.host).map_err(|e| Refusal::from(&e))?;
        if let Err(error) = self.make_sides(&change) {
            self.model.revert(change);
            return Err(Refusal::new(Code::Failed, shown(&error)));
        }
        let step = match self.plan(&change) {
            Ok(step) => step,
            Err(error) => {
                self.model.revert(change);
                return Err(Refusal::new(Code::Full, error.to_string()));
            }
        };
        if let Err(error) = self.carry_out(step) {
            self.model.revert(change);
            return Err(Refusal::new(Code::Failed, shown(&error)));
        }
        tracing::debug!(?command, "done");
        self.note_unready(&change);
        Ok(())
    }

    /// The first real server by FULLNAT, or service with SYN cookies or PROXY headers: what is kept of their flows needs room.
    fn make_sides(&mut self, change: &Change) -> Result<(), BpfError> {
        let service = match change {
            Change::DestAdded { service, .. }
            | Change::DestEdited { service, .. }
            | Change::ProxySet { service, .. }
            | Change::Defended { service, .. } => self.model.service(service),
            _ => None,
        };
        let Some(service) = service else { return Ok(()) };
        let dest = match change {
            Change::DestAdded { dest, .. } => service.dest(dest),
            Change::DestEdited { before, .. } => service.dest(&before.key),
            _ => None,
        };
        let lends = dest.is_some_and(|d| d.method == FwdMethod::Fullnat);
        if (lends || service.proxy || service.defence.cookies_above.is_some()) && self.dataplane.make_sides(OBJECT)? {
            self.reloaded.notify_one();
            tracing::info!("room made for connections by full NAT, with SYN cookies and PROXY headers");
        }
        Ok(())
    }

    /// XDP has nowhere to leave a packet until its next hop is resolved: it would drop what comes for a new server meanwhile. (With NAT
    /// the kernel can do it, under tc it does.)
    fn note_unready(&mut self, change: &Change) {
        let Change::DestAdded { service, dest } = change else { return };
        let direct = self.model.service(service).is_some_and(|s| {
            s.proxy || s.defence.cookies_above.is_some() || s.dest(dest).is_some_and(|d| d.method != FwdMethod::Masq)
        });
        let xdp = self.interfaces.values().any(|hook| hook != Hook::Tc.name());
        if direct && xdp && self.planner.lacks_way(dest.addr) {
            self.unready.insert(dest.addr);
        }
    }

    /// Those that commands have added since this was asked last.
    pub fn take_unready(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.unready)
    }

    /// What was retired a moment ago is free again after the grace period: when there is no room, wait for it once.
    fn plan(&mut self, change: &Change) -> Result<Step, PlanError> {
        self.planner.tick(self.now_ms());
        match self.planner.change(&self.model, change, self.now_ms()) {
            Err(PlanError::Full { .. }) => {
                wait(Duration::from_millis(GRACE_MS + 1));
                self.planner.tick(self.now_ms());
                self.planner.change(&self.model, change, self.now_ms())
            }
            other => other,
        }
    }

    fn carry_out(&mut self, step: Step) -> Result<(), BpfError> {
        match self.dataplane.maps.apply(&step.ops) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.planner.undo(step);
                Err(error)
            }
        }
    }

    /// The addresses of this host have changed.
    pub fn locals(&mut self, locals: BTreeSet<IpAddr>) -> Result<(), BpfError> {
        self.host.locals.clone_from(&locals);
        let step = self.planner.locals(locals);
        self.dataplane.maps.apply(&step.ops)
    }

    /// The ways to the real servers have changed.
    pub fn ways(&mut self, ways: BTreeMap<IpAddr, Way>) -> Result<(), BpfError> {
        let now_ms = self.now_ms();
        let step = self.planner.ways(ways, now_ms);
        self.dataplane.maps.apply(&step.ops)
    }

    /// The addresses of services and real servers may have changed: fragments of which may be ours?
    pub fn watch(&mut self) -> Result<(), BpfError> {
        let step = self.planner.watch(&self.model);
        self.carry_out(step)
    }

    /// A frame comes in once more, by its interface, if that has the program still. True: it did.
    #[must_use]
    pub fn come_again(&mut self, part: &Part) -> bool {
        let Some(hook) = self.hooks.get(&part.ifindex) else { return false };
        let sent = self.dataplane.inject(*hook, part.ifindex, &part.frame);
        if let Err(error) = &sent {
            tracing::debug!(error = %shown(error), "a packet is dropped");
        }
        sent.is_ok()
    }

    /// Settings that wait for memory to be short act, or no longer.
    fn see_memory(&mut self) -> Result<(), BpfError> {
        // Without it, what was known last goes on holding.
        let Ok(free_pages) = rvs_sys::memory::free_pages() else { return Ok(()) };
        let before = self.model.settings();
        self.model.see_memory(free_pages);
        let after = self.model.settings();
        if (after.level(), after.values()) == (before.level(), before.values()) {
            return Ok(());
        }
        let step = self.planner.settings(&self.model);
        self.dataplane.maps.apply(&step.ops)
    }

    /// Once a second: what is out of use long enough becomes free.
    pub fn tick(&mut self) -> Result<(), BpfError> {
        let now_ms = self.now_ms();
        self.dataplane.tidy()?;
        self.see_memory()?;
        self.planner.tick(now_ms);
        let trashed: BTreeSet<u32> = self.planner.trashed().collect();
        self.idle_since.retain(|index, _| trashed.contains(index));
        let mut idle = BTreeSet::new();
        for index in trashed {
            let [active, inactive, persistent] = self.dataplane.maps.connections_of(index)?;
            if active + inactive + persistent > 0 {
                self.idle_since.remove(&index);
            } else if now_ms.saturating_sub(*self.idle_since.entry(index).or_insert(now_ms)) >= IDLE_MS {
                idle.insert(index);
            }
        }
        if idle.is_empty() {
            return Ok(());
        }
        let step = self.planner.idle(&idle);
        self.dataplane.maps.apply(&step.ops)
    }
}

/// Until packets that are under way in the data plane are out of it. The event loop stands still meanwhile: nothing else may change
/// between two halves of a command.
fn wait(time: Duration) {
    let until = Instant::now() + time;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        std::thread::park_timeout(left);
    }
}

/// An error with its causes, on one line.
pub fn shown(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(
        "the pinned maps can't be taken over: {0}; stop forwarding by removing the pin folder, or use another (--pin)"
    )]
    Restore(#[from] RestoreError),
}
