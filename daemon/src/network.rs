//! The network around the director: which addresses are its own, how the real servers are reached, which interfaces have the
//! program. Read from netlink at start and after every change.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use rvs_control::net::{Addr, FdbEntry, Link, Neighbour, Route, RouteQuery};
use rvs_control::nexthop::{self, NextHop, Picture};
use rvs_control::plan::Way;
use rvs_datapath::abi::{Iface, iface};
use rvs_sys::bpf::attach::{self, Hook, Port};
use rvs_sys::netlink::{Net, NetError, NetEvent, Netlink, Watch};
use tokio::sync::Notify;

use crate::director::{Director, shown};
use crate::options::{Interface, Mode};

/// Changes that come together are looked at together.
const SETTLE: Duration = Duration::from_millis(20);
/// ... when a command waits for them.
const SETTLE_AWAITED: Duration = Duration::from_millis(1);
/// Everything is read anew this often even if netlink says nothing (neighbours that only probing keeps).
const REFRESH: Duration = Duration::from_secs(30);

/// Neighbours that the kernel is asked to keep known: half of what its table holds by default (`gc_thresh3`), since it refuses all others
/// when that is full.
const KEEP_MAX: usize = 512;

pub struct Network {
    net: Netlink,
    director: Rc<RefCell<Director>>,
    wanted: Vec<Interface>,
    routes: BTreeMap<IpAddr, Route>,
    kept: BTreeSet<(u32, IpAddr)>,
    /// Interfaces with the program, and how.
    attached: BTreeMap<u32, (String, Hook)>,
    /// ... and those with the egress program too.
    outgoing: BTreeSet<u32>,
    /// Interfaces that refused the program: said once.
    refused: BTreeSet<u32>,
}

/// What has to be read again.
#[derive(Clone, Copy, Default, Debug)]
struct Stale {
    routes: bool,
}

impl Network {
    pub fn new(net: Netlink, director: Rc<RefCell<Director>>, wanted: Vec<Interface>) -> Self {
        Network {
            net,
            director,
            wanted,
            routes: BTreeMap::new(),
            kept: BTreeSet::new(),
            attached: BTreeMap::new(),
            outgoing: BTreeSet::new(),
            refused: BTreeSet::new(),
        }
    }

    /// The first look, before the director is ready. Interfaces that were asked for by name must be there.
    ///
    /// # Errors
    /// One line each: what could not be read, or attached.
    pub async fn start(&mut self) -> Result<(), String> {
        let links = self.net.links().await.map_err(|e| shown(&e))?;
        let missing: Vec<&str> =
            self.wanted.iter().map(|w| w.name.as_str()).filter(|name| !links.iter().any(|l| l.name == *name)).collect();
        if !missing.is_empty() {
            let there: Vec<&str> = links.iter().filter(|l| !l.loopback).map(|l| l.name.as_str()).collect();
            return Err(format!("no interface {}; there are: {}", missing.join(", "), there.join(", ")));
        }
        let wanted = |l: &&Link| self.wanted.iter().any(|w| w.name == l.name);
        if let Some(link) = links.iter().filter(wanted).find(|l| l.loopback || !l.ethernet) {
            return Err(format!("interface {} carries no Ethernet frames: nothing can be taken from it", link.name));
        }
        self.refresh(Stale { routes: true }, true).await?;
        self.leave_others()
    }

    /// A start before this one may have had other interfaces: what is named now is all.
    fn leave_others(&self) -> Result<(), String> {
        if self.wanted.is_empty() {
            return Ok(());
        }
        let d = self.director.borrow();
        let dir = d.dataplane.dir();
        for there in attach::list(dir).map_err(|e| shown(&e))? {
            if !self.wanted.iter().any(|w| w.name == there.name) {
                attach::detach(dir, &there.name, there.hook).map_err(|e| shown(&e))?;
                tracing::info!(interface = there.name, hook = there.hook.name(), "no longer named: the program is off");
            }
        }
        Ok(())
    }

    /// Follow changes for ever. `commands` is notified when a command may have added a real server.
    pub async fn follow(mut self, commands: Rc<Notify>) {
        loop {
            let mut watch = match self.net.watch() {
                Ok(watch) => watch,
                Err(error) => {
                    tracing::error!(error = %shown(&error), "netlink can't be watched; changes are seen every 30 s only");
                    tokio::time::sleep(REFRESH).await;
                    self.look(Stale { routes: true }).await;
                    continue;
                }
            };
            self.look(Stale { routes: true }).await;
            loop {
                let mut stale = Stale::default();
                tokio::select! {
                    event = watch.next() => match event {
                        Ok(event) => stale.note(&event),
                        Err(error) => {
                            tracing::warn!(error = %shown(&error), "netlink watch ended; starting it anew");
                            break;
                        }
                    },
                    () = commands.notified() => {}
                    () = tokio::time::sleep(REFRESH) => stale.routes = true,
                }
                // More of the same is likely on its way.
                let awaited = self.director.borrow().looked.receiver_count() > 0;
                let settle = tokio::time::sleep(if awaited { SETTLE_AWAITED } else { SETTLE });
                tokio::pin!(settle);
                loop {
                    tokio::select! {
                        () = &mut settle => break,
                        event = watch.next() => match event {
                            Ok(event) => stale.note(&event),
                            Err(_) => break,
                        },
                    }
                }
                self.look(stale).await;
            }
        }
    }

    async fn look(&mut self, stale: Stale) {
        if let Err(error) = self.refresh(stale, false).await {
            tracing::warn!(%error, "the network could not be read");
        }
    }

    async fn refresh(&mut self, stale: Stale, first: bool) -> Result<(), String> {
        let say = |e: NetError| shown(&e);
        let links = self.net.links().await.map_err(say)?;
        let addrs = self.net.addrs().await.map_err(say)?;
        self.hosts_own(&links, &addrs)?;
        self.interfaces(&links, first)?;
        let addresses: BTreeSet<IpAddr> = self.director.borrow().planner.addresses().collect();
        if stale.routes {
            self.routes.clear();
        }
        self.routes.retain(|a, _| addresses.contains(a));
        for address in &addresses {
            if !self.routes.contains_key(address) {
                let route = self.net.route_to(RouteQuery::to(*address)).await.map_err(say)?;
                self.routes.insert(*address, route);
            }
        }
        self.keep(&links).await;
        let neighbours = self.net.neighbours().await.map_err(say)?;
        let fdb =
            if links.iter().any(|l| l.kind == "bridge") { self.net.fdb().await.map_err(say)? } else { Vec::new() };
        let ways = self.ways(&links, &neighbours, &fdb);
        self.director.borrow_mut().ways(ways).map_err(|e| shown(&e))?;
        self.director.borrow_mut().watch().map_err(|e| shown(&e))?;
        self.replies_of_local_servers();
        self.director.borrow().looked.send_replace(());
        Ok(())
    }

    /// Replies of real servers that are this host (NAT) leave by the host's own sockets: they are translated at tc egress.
    fn replies_of_local_servers(&mut self) {
        if !self.director.borrow().planner.has_local_masq() {
            return;
        }
        for (ifindex, (name, _)) in &self.attached {
            if self.outgoing.contains(ifindex) {
                continue;
            }
            let port = Port { name, ifindex: *ifindex };
            match self.director.borrow_mut().dataplane.attach(port, Hook::TcOut) {
                Ok(_) => drop(self.outgoing.insert(*ifindex)),
                Err(error) => {
                    tracing::warn!(interface = name, error = %shown(&error), "replies of local real servers stay untranslated");
                }
            }
        }
    }

    /// Neighbours on the way are kept known by the kernel.
    async fn keep(&mut self, links: &[Link]) {
        let mut keep = nexthop::all_to_keep(self.routes.iter().map(|(a, r)| (*a, r)), links);
        if keep.len() > KEEP_MAX {
            tracing::warn!(
                wanted = keep.len(),
                kept = KEEP_MAX,
                "too many neighbours to keep known; the rest is found as packets come"
            );
            keep = keep.into_iter().take(KEEP_MAX).collect();
        }
        for (ifindex, ip) in keep.difference(&self.kept) {
            if let Err(error) = self.net.keep_neighbour(*ifindex, *ip).await {
                tracing::warn!(%ip, ifindex, error = %shown(&error), "a neighbour can't be kept known");
            }
        }
        for (ifindex, ip) in self.kept.difference(&keep) {
            // Gone with its interface, most likely.
            let _ = self.net.forget_neighbour(*ifindex, *ip).await;
        }
        self.kept = keep;
    }

    fn ways(&self, links: &[Link], neighbours: &[Neighbour], fdb: &[FdbEntry]) -> BTreeMap<IpAddr, Way> {
        let picture = Picture { links, neighbours, fdb };
        let mut ways = BTreeMap::new();
        for (address, route) in &self.routes {
            let way = match nexthop::resolve(*address, route, picture) {
                NextHop::Local => Way::Local,
                NextHop::Ready(hop) => {
                    // Until there is one the kernel forwards, or tc.
                    let Some(ifindex) = hop.out(links, |i| self.attached.contains_key(&i)) else { continue };
                    let (d, s) = (hop.dst_mac.0, hop.src_mac.0);
                    let macs = [
                        u32::from_ne_bytes([d[0], d[1], d[2], d[3]]),
                        u32::from_ne_bytes([d[4], d[5], s[0], s[1]]),
                        u32::from_ne_bytes([s[2], s[3], s[4], s[5]]),
                    ];
                    let mtu = u16::try_from(hop.mtu).unwrap_or(u16::MAX);
                    Way::Hop { macs, ifindex, mtu, source: route.pref_src }
                }
                NextHop::NotReady(why) => {
                    tracing::debug!(%address, %why, "no ready next hop; packet by packet by the kernel's tables");
                    continue;
                }
                NextHop::Unreachable(kind) => {
                    tracing::debug!(%address, ?kind, "no route to a real server");
                    continue;
                }
            };
            ways.insert(*address, way);
        }
        ways
    }

    fn hosts_own(&self, links: &[Link], addrs: &[Addr]) -> Result<(), String> {
        let mut d = self.director.borrow_mut();
        d.host.links = links.to_vec();
        d.host.broadcasts = addrs.iter().filter_map(|a| a.broadcast).collect();
        let locals: BTreeSet<IpAddr> = addrs.iter().map(|a| a.ip).collect();
        if locals != d.host.locals {
            d.locals(locals).map_err(|e| shown(&e))?;
        }
        Ok(())
    }

    /// Put the program on interfaces that should have it, take note of MAC addresses.
    fn interfaces(&mut self, links: &[Link], first: bool) -> Result<(), String> {
        self.attached.retain(|ifindex, _| links.iter().any(|l| l.ifindex == *ifindex));
        self.outgoing.retain(|ifindex| links.iter().any(|l| l.ifindex == *ifindex));
        self.refused.retain(|ifindex| links.iter().any(|l| l.ifindex == *ifindex));
        for link in links.iter().filter(|l| l.ethernet && !l.loopback) {
            let Some(mode) = self.mode_for(link) else { continue };
            if !self.attached.contains_key(&link.ifindex) {
                match self.attach(link, mode) {
                    Ok(hook) => {
                        tracing::info!(interface = link.name, hook = hook.name(), "the program is on");
                        self.attached.insert(link.ifindex, (link.name.clone(), hook));
                    }
                    Err(error) if first && !self.wanted.is_empty() => return Err(error),
                    Err(error) if self.refused.insert(link.ifindex) => {
                        tracing::warn!(interface = link.name, %error, "the program could not be attached; tried again at each change");
                    }
                    Err(error) => tracing::debug!(interface = link.name, %error, "the program could not be attached"),
                }
            }
            if self.attached.contains_key(&link.ifindex) {
                self.note(link.ifindex, link)?;
                // XDP on a bond runs on its ports, and is told their numbers.
                let ports = links.iter().filter(|l| l.master == Some(link.ifindex) && l.port_kind == "bond");
                for port in ports {
                    self.note(port.ifindex, link)?;
                }
            }
        }
        self.vlans(links)?;
        self.without_tcx()?;
        let names = self.attached.values().map(|(name, hook)| (name.clone(), hook.name().to_owned())).collect();
        let hooks = self.attached.iter().map(|(ifindex, (_, hook))| (*ifindex, *hook)).collect();
        let mut d = self.director.borrow_mut();
        (d.interfaces, d.hooks) = (names, hooks);
        Ok(())
    }

    /// Before Linux 6.6 tc has no links: named once, and in `rvs status`, with what it means.
    fn without_tcx(&self) -> Result<(), String> {
        let mut d = self.director.borrow_mut();
        let dir = d.dataplane.dir().to_owned();
        let filter = |a: &attach::Attached| a.link == 0 && a.ifindex != 0;
        let is = attach::list(&dir).map_err(|e| shown(&e))?.iter().any(filter);
        if is && d.warnings.insert(WITHOUT_TCX.to_owned()) {
            tracing::warn!("{WITHOUT_TCX}");
        } else if !is {
            d.warnings.remove(WITHOUT_TCX);
        }
        Ok(())
    }

    /// VLAN devices with the program: XDP on the interface below takes their frames too.
    fn vlans(&self, links: &[Link]) -> Result<(), String> {
        let served = links.iter().filter(|l| self.attached.contains_key(&l.ifindex));
        let (wanted, left) = nexthop::vlan_table(served);
        if !left.is_empty() {
            tracing::warn!(
                vlans = left.join(", "),
                "no place in the table of VLANs: XDP leaves their frames to the kernel"
            );
        }
        let d = self.director.borrow();
        let table = &d.dataplane.maps.vlans;
        for place in 0..table.len() {
            let vlan = wanted.get(&place).copied().unwrap_or_default();
            if table.get(place).map_err(|e| shown(&e))? != vlan {
                table.set(place, vlan).map_err(|e| shown(&e))?;
            }
        }
        Ok(())
    }

    /// How the program should be on this interface; `None`: not at all.
    fn mode_for(&self, link: &Link) -> Option<Option<Mode>> {
        if self.wanted.is_empty() {
            return (link.up && link.master.is_none()).then_some(None);
        }
        self.wanted.iter().find(|w| w.name == link.name).map(|w| w.mode)
    }

    fn attach(&self, link: &Link, mode: Option<Mode>) -> Result<Hook, String> {
        let hooks: &[Hook] = match mode {
            Some(Mode::Xdp) => &[Hook::XdpNative],
            Some(Mode::Skb) => &[Hook::XdpGeneric],
            Some(Mode::Tc) => &[Hook::Tc],
            // A veth takes redirected frames only if its far end, in a namespace that we can't see, is ready for them, and its local
            // senders leave checksums unfinished; a bridge or VLAN device takes no native XDP at all.
            None if !link.kind.is_empty() => &[Hook::Tc, Hook::XdpNative],
            None => &[Hook::XdpNative, Hook::Tc],
        };
        let mut errors = Vec::new();
        for hook in hooks {
            match self.director.borrow_mut().dataplane.attach(Port { name: &link.name, ifindex: link.ifindex }, *hook) {
                Ok(_) => return Ok(*hook),
                Err(error) => errors.push(shown(&error)),
            }
        }
        Err(errors.join("; "))
    }

    /// Frames that come in by the interface of this number come to `link`.
    fn note(&self, number: u32, link: &Link) -> Result<(), String> {
        let d = self.director.borrow();
        let ifaces = &d.dataplane.maps.ifaces;
        let at = number % ifaces.len();
        let there = ifaces.get(at).map_err(|e| shown(&e))?;
        if ![0, number].contains(&there.number()) && self.attached.contains_key(&there.number()) {
            return Err(format!(
                "interface {} (number {}) falls together with number {} in the table of interfaces",
                link.name,
                number,
                there.number()
            ));
        }
        let mac = link.mac.map(|m| m.0).unwrap_or_default();
        let flags = if link.kind == "veth" { iface::REDIRECT_BACK } else { 0 };
        let (lower, tag) = nexthop::vlan_of(link).unwrap_or_default();
        let iface = Iface { lower, tag, ..Iface::new(number, mac, flags, link.mtu) }.traced(d.tracing);
        if there != iface {
            ifaces.set(at, iface).map_err(|e| shown(&e))?;
        }
        Ok(())
    }
}

const WITHOUT_TCX: &str = "this kernel has no tcx (Linux 6.6 has): programs by tc are filters of the clsact qdisc, and go with it if somebody removes that";

impl Stale {
    fn note(&mut self, event: &NetEvent) {
        match event {
            NetEvent::Neighbour { .. } | NetEvent::Fdb => {}
            NetEvent::Link { .. } | NetEvent::Addr { .. } | NetEvent::Route | NetEvent::Rule | NetEvent::Resync => {
                self.routes = true;
            }
        }
    }
}
