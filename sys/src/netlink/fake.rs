//! A network in memory: the twin of [`Netlink`](super::Netlink) for tests of whoever uses [`Net`].
//!
//! It holds what it was given, does what it is told, keeps a journal, and fails the operation it was asked to fail
//! with [`NetError::Injected`]. An operation that fails has changed nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rvs_control::net::{Addr, FdbEntry, Link, Neighbour, NeighbourState, Route, RouteKind, RouteQuery};
use tokio::sync::broadcast;

use super::{AddrAdded, Kept, Net, NetError, NetEvent, Watch};

/// Events a watch may be behind before it gets a `Resync`.
const EVENTS_MAX: usize = 64;

/// Everything the fake network knows; change it at will through [`FakeNet::edit`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    pub links: Vec<Link>,
    pub addrs: Vec<Addr>,
    pub neighbours: Vec<Neighbour>,
    pub fdb: Vec<FdbEntry>,
    pub ipv4_default_routes: Vec<Route>,
    /// Routes by destination. One that is not here is `Local` when it is an address, else goes by the first default
    /// route if it is IPv4, else there is no route.
    pub routes: BTreeMap<IpAddr, Route>,
}

#[derive(Debug)]
struct State {
    world: World,
    journal: Vec<String>,
    fail: Option<u64>,
    events: broadcast::Sender<NetEvent>,
}

/// See the module. Clones share one network.
#[derive(Clone, Debug)]
pub struct FakeNet {
    state: Arc<Mutex<State>>,
}

impl FakeNet {
    pub fn new(world: World) -> Self {
        let (events, _) = broadcast::channel(EVENTS_MAX);
        Self { state: Arc::new(Mutex::new(State { world, journal: Vec::new(), fail: None, events })) }
    }

    /// Fail the `nth` operation from now on, counted from 1 (the journal is started anew).
    pub fn fail_nth(&self, nth: u64) {
        let mut state = self.lock();
        state.journal.clear();
        state.fail = Some(nth);
    }

    /// The operations so far, failed ones included.
    pub fn journal(&self) -> Vec<String> {
        self.lock().journal.clone()
    }

    pub fn world(&self) -> World {
        self.lock().world.clone()
    }

    /// Change the world behind everybody's back, and tell the watches.
    pub fn edit(&self, change: impl FnOnce(&mut World), events: impl IntoIterator<Item = NetEvent>) {
        let mut state = self.lock();
        change(&mut state.world);
        for event in events {
            state.tell(event);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, op: String) -> Result<MutexGuard<'_, State>, NetError> {
        let mut state = self.lock();
        state.journal.push(op.clone());
        let nth = state.journal.len() as u64;
        if state.fail == Some(nth) { Err(NetError::Injected { op, nth }) } else { Ok(state) }
    }
}

impl State {
    fn tell(&self, event: NetEvent) {
        // No receiver is no error: nobody watches.
        let _ = self.events.send(event);
    }
}

/// The fake's events.
#[derive(Debug)]
pub struct FakeWatch {
    events: broadcast::Receiver<NetEvent>,
}

impl Watch for FakeWatch {
    async fn next(&mut self) -> Result<NetEvent, NetError> {
        match self.events.recv().await {
            Ok(event) => Ok(event),
            Err(broadcast::error::RecvError::Lagged(_)) => Ok(NetEvent::Resync),
            Err(broadcast::error::RecvError::Closed) => Err(NetError::Closed { op: "wait for network changes".into() }),
        }
    }
}

impl Net for FakeNet {
    type Watch = FakeWatch;

    async fn links(&self) -> Result<Vec<Link>, NetError> {
        Ok(self.begin("links".into())?.world.links.clone())
    }

    async fn addrs(&self) -> Result<Vec<Addr>, NetError> {
        Ok(self.begin("addrs".into())?.world.addrs.clone())
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, NetError> {
        Ok(self.begin("neighbours".into())?.world.neighbours.clone())
    }

    async fn neighbour(&self, ifindex: u32, ip: IpAddr) -> Result<Option<Neighbour>, NetError> {
        let state = self.begin(format!("neighbour {ifindex} {ip}"))?;
        Ok(state.world.neighbours.iter().find(|n| n.ifindex == ifindex && n.ip == ip).cloned())
    }

    async fn fdb(&self) -> Result<Vec<FdbEntry>, NetError> {
        Ok(self.begin("fdb".into())?.world.fdb.clone())
    }

    async fn route_to(&self, query: RouteQuery) -> Result<Route, NetError> {
        let state = self.begin(format!("route_to {}", query.dst))?;
        let world = &state.world;
        if let Some(route) = world.routes.get(&query.dst) {
            return Ok(route.clone());
        }
        if world.addrs.iter().any(|a| a.ip == query.dst) {
            return Ok(Route::none(RouteKind::Local));
        }
        let default = world.ipv4_default_routes.first().filter(|_| query.dst.is_ipv4());
        Ok(default.cloned().unwrap_or_else(|| Route::none(RouteKind::NoRoute)))
    }

    async fn ipv4_default_routes(&self) -> Result<Vec<Route>, NetError> {
        Ok(self.begin("ipv4_default_routes".into())?.world.ipv4_default_routes.clone())
    }

    async fn keep_neighbour(&self, ifindex: u32, ip: IpAddr) -> Result<Kept, NetError> {
        let mut state = self.begin(format!("keep {ifindex} {ip}"))?;
        let entry = match state.world.neighbours.iter().position(|n| n.ifindex == ifindex && n.ip == ip) {
            Some(at) if state.world.neighbours[at].state == NeighbourState::Permanent => return Ok(Kept::Static),
            Some(at) => {
                state.world.neighbours[at].managed = true;
                state.world.neighbours[at].clone()
            }
            None => {
                let entry = Neighbour { ifindex, ip, mac: None, state: NeighbourState::Incomplete, managed: true };
                state.world.neighbours.push(entry.clone());
                entry
            }
        };
        state.tell(NetEvent::Neighbour { entry, gone: false });
        Ok(Kept::Managed)
    }

    async fn forget_neighbour(&self, ifindex: u32, ip: IpAddr) -> Result<(), NetError> {
        let mut state = self.begin(format!("forget {ifindex} {ip}"))?;
        for entry in state.world.neighbours.iter_mut().filter(|n| n.ifindex == ifindex && n.ip == ip) {
            entry.managed = false;
        }
        Ok(())
    }

    async fn add_addr(&self, addr: &Addr) -> Result<AddrAdded, NetError> {
        let mut state = self.begin(format!("add_addr {} {}/{}", addr.ifindex, addr.ip, addr.prefix_len))?;
        let same = |a: &Addr| (a.ifindex, a.ip, a.prefix_len) == (addr.ifindex, addr.ip, addr.prefix_len);
        if state.world.addrs.iter().any(same) {
            return Ok(AddrAdded::AlreadyThere);
        }
        state.world.addrs.push(addr.clone());
        state.tell(NetEvent::Addr { ifindex: addr.ifindex, ip: addr.ip, gone: false });
        Ok(AddrAdded::Added)
    }

    async fn del_addr(&self, ifindex: u32, ip: IpAddr, prefix_len: u8) -> Result<Option<Addr>, NetError> {
        let mut state = self.begin(format!("del_addr {ifindex} {ip}/{prefix_len}"))?;
        let same = |a: &Addr| (a.ifindex, a.ip, a.prefix_len) == (ifindex, ip, prefix_len);
        let Some(at) = state.world.addrs.iter().position(same) else { return Ok(None) };
        let addr = state.world.addrs.remove(at);
        state.tell(NetEvent::Addr { ifindex, ip, gone: true });
        Ok(Some(addr))
    }

    fn watch(&self) -> Result<FakeWatch, NetError> {
        Ok(FakeWatch { events: self.begin("watch".into())?.events.subscribe() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn the_operation_that_fails_changes_nothing_and_says_which_it_was() {
        let net = FakeNet::new(World::default());
        net.fail_nth(2);
        let addr = Addr::host(1, ip("192.0.2.1"));
        assert_eq!(net.add_addr(&addr).await.unwrap(), AddrAdded::Added);
        let error = net.del_addr(1, addr.ip, 32).await.unwrap_err();
        assert!(matches!(error, NetError::Injected { nth: 2, .. }), "{error}");
        assert_eq!(net.world().addrs, std::slice::from_ref(&addr));
        assert_eq!(net.del_addr(1, addr.ip, 32).await.unwrap(), Some(addr));
    }

    #[tokio::test]
    async fn a_watch_that_falls_behind_is_told_to_read_again() {
        let net = FakeNet::new(World::default());
        let mut watch = net.watch().unwrap();
        net.edit(|_| (), std::iter::repeat_n(NetEvent::Rule, EVENTS_MAX + 1));
        assert_eq!(watch.next().await.unwrap(), NetEvent::Resync);
        assert_eq!(watch.next().await.unwrap(), NetEvent::Rule);
    }
}
