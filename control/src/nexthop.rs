//! From a route, the links and the neighbours to the frame header that reaches a destination.
//!
//! Pure: the caller asks the kernel (`rvs_sys::netlink`) and asks again whenever netlink reports a change. The
//! kernel keeps the neighbours named by [`to_keep`] resolved, so that [`resolve`] comes to `Ready` by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use rvs_datapath::abi;

use crate::net::{FdbEntry, Link, Mac, Neighbour, NeighbourState, Route, RouteKind, VlanTag};

/// How to reach one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    Ready(Hop),
    /// There is a way, but a frame can't be built for it now.
    NotReady(NotReady),
    /// The destination is this host.
    Local,
    /// The routing tables refuse it.
    Unreachable(RouteKind),
}

/// A frame header that reaches the destination, and where to send the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Interface the route names.
    pub ifindex: u32,
    pub dst_mac: Mac,
    pub src_mac: Mac,
    /// Largest layer-3 packet, bytes: the smaller of the route's and the interface's.
    pub mtu: u32,
    pub path: Path,
}

/// What stands between the interface of the route and the wire.
///
/// A virtual device has no `ndo_xdp_xmit`: an XDP redirect to a bridge or VLAN device is dropped by the kernel, while
/// tc's `bpf_redirect` works on every device. XDP has to name the device below and do the virtual device's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Send to [`Hop::ifindex`] as it is.
    Direct,
    /// [`Hop::ifindex`] is a bridge. `port` is the port its forwarding database names for the destination's MAC:
    /// XDP may redirect there, with the bridge's own MAC as source. `None` while the bridge has not learnt it: then
    /// only tc can send (the bridge floods).
    Bridge { port: Option<u32> },
    /// [`Hop::ifindex`] is a VLAN sub-interface: tc may redirect to it untagged; XDP pushes the tag and redirects
    /// to `lower`, see [`Hop::out`].
    Vlan { lower: u32, tag: VlanTag },
}

impl Hop {
    /// The interface as the data plane has it ([`abi::Hop::ifindex`]); `None`: the kernel must send it, packet by packet. `served`: has this
    /// interface the program?
    pub fn out(&self, links: &[Link], served: impl Fn(u32) -> bool) -> Option<u32> {
        let Path::Vlan { lower, .. } = self.path else {
            return match self.path {
                // The bridge's own forwarding decision, made here: XDP can't send through a bridge device.
                Path::Bridge { port } => port,
                _ => Some(self.ifindex),
            };
        };
        // The data plane knows the tags of what it serves, two at most.
        let below = |ifindex| links.iter().find(|l| l.ifindex == ifindex && l.vlan.is_some());
        let known = match below(lower) {
            None => true,
            Some(outer) => served(lower) && outer.lower.is_some_and(|l| below(l).is_none()),
        };
        (known && served(self.ifindex)).then_some(self.ifindex | abi::hop::VLAN)
    }
}

/// The interface below a VLAN device, and its tag as [`abi::Vlan`] has it.
pub fn vlan_of(link: &Link) -> Option<(u32, u32)> {
    let tag = link.vlan?;
    Some((link.lower?, u32::from(tag.tpid) << 16 | u32::from(tag.id)))
}

/// Where the data plane looks for the VLAN devices among these interfaces, by place; and those that find none, by name.
pub fn vlan_table<'a>(links: impl Iterator<Item = &'a Link>) -> (BTreeMap<u32, abi::Vlan>, Vec<&'a str>) {
    let (mut table, mut left) = (BTreeMap::new(), Vec::new());
    for link in links {
        let Some((lower, tag)) = vlan_of(link) else { continue };
        let first = abi::vlan_place(lower, tag);
        let mut places = (0..abi::VLAN_PROBES).map(|i| (first + i) % abi::VLANS_MAX);
        match places.find(|place| !table.contains_key(place)) {
            Some(place) => drop(table.insert(place, abi::Vlan { ifindex: link.ifindex, lower, tag, spare: 0 })),
            None => left.push(link.name.as_str()),
        }
    }
    (table, left)
}

/// Why a frame can't be built now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// The route names an interface that is gone: the caller's picture is older than the route, read it again.
    LinkGone {
        ifindex: u32,
    },
    LinkDown {
        name: String,
    },
    /// The device sends no Ethernet frames (tun, ipip, gre, wireguard, ...).
    NoEthernet {
        name: String,
        kind: String,
    },
    /// Nobody has answered yet who has `ip`.
    Resolving {
        name: String,
        ip: IpAddr,
    },
    /// Nobody answers for `ip`.
    Silent {
        name: String,
        ip: IpAddr,
    },
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LinkGone { ifindex } => write!(f, "interface {ifindex} of the route is gone"),
            Self::LinkDown { name } => write!(f, "{name} is down or has no carrier"),
            Self::NoEthernet { name, kind } if kind.is_empty() => write!(f, "{name} carries no Ethernet frames"),
            Self::NoEthernet { name, kind } => write!(f, "{name} ({kind}) carries no Ethernet frames"),
            Self::Resolving { name, ip } => write!(f, "waiting for the MAC address of {ip} on {name}"),
            Self::Silent { name, ip } => write!(f, "{ip} does not answer on {name}"),
        }
    }
}

/// The network as last read: what [`resolve`] looks things up in.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'a> {
    pub links: &'a [Link],
    pub neighbours: &'a [Neighbour],
    /// May be empty: then every bridge path is without a port.
    pub fdb: &'a [FdbEntry],
}

impl Picture<'_> {
    fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }
}

/// The neighbour whose MAC a frame for `dst` needs: the router, or `dst` itself where it is on-link.
///
/// `None` where no neighbour is asked: the route is not unicast, or its interface speaks no Ethernet.
pub fn to_keep(dst: IpAddr, route: &Route, links: &[Link]) -> Option<(u32, IpAddr)> {
    let ifindex = route.ifindex.filter(|_| route.kind == RouteKind::Unicast)?;
    let link = links.iter().find(|link| link.ifindex == ifindex)?;
    (link.ethernet && !link.loopback && !link.noarp).then(|| (ifindex, route.gateway.unwrap_or(dst)))
}

/// [`to_keep`] of many destinations, each neighbour once.
pub fn all_to_keep<'a>(
    dests: impl IntoIterator<Item = (IpAddr, &'a Route)>,
    links: &[Link],
) -> BTreeSet<(u32, IpAddr)> {
    dests.into_iter().filter_map(|(dst, route)| to_keep(dst, route, links)).collect()
}

/// How to reach `dst`, given the kernel's `route` to it.
///
/// With several problems at once the one nearest to the hardware is named: link, then device type, then neighbour.
pub fn resolve(dst: IpAddr, route: &Route, picture: Picture<'_>) -> NextHop {
    let ifindex = match (route.kind, route.ifindex) {
        (RouteKind::Local, _) => return NextHop::Local,
        (RouteKind::Unicast, Some(ifindex)) => ifindex,
        (RouteKind::Unicast, None) => return NextHop::Unreachable(RouteKind::NoRoute),
        (kind, _) => return NextHop::Unreachable(kind),
    };
    match hop(dst, route, ifindex, picture) {
        Ok(hop) => NextHop::Ready(hop),
        Err(why) => NextHop::NotReady(why),
    }
}

fn hop(dst: IpAddr, route: &Route, ifindex: u32, picture: Picture<'_>) -> Result<Hop, NotReady> {
    let link = picture.link(ifindex).ok_or(NotReady::LinkGone { ifindex })?;
    let name = link.name.clone();
    if !link.up || !link.running {
        return Err(NotReady::LinkDown { name });
    }
    let src_mac = match link.mac {
        Some(mac) if link.ethernet && !link.loopback => mac,
        _ => return Err(NotReady::NoEthernet { name, kind: link.kind.clone() }),
    };
    let dst_mac = neighbour_mac(route.gateway.unwrap_or(dst), link, picture.neighbours)?;
    Ok(Hop {
        ifindex,
        dst_mac,
        src_mac,
        mtu: route.mtu.unwrap_or(link.mtu).min(link.mtu),
        path: path(link, dst_mac, picture)?,
    })
}

fn neighbour_mac(ip: IpAddr, link: &Link, neighbours: &[Neighbour]) -> Result<Mac, NotReady> {
    let entry = neighbours.iter().find(|n| n.ifindex == link.ifindex && n.ip == ip);
    let name = link.name.clone();
    match entry.map(|n| (n.state, n.mac)) {
        Some((state, Some(mac))) if state.usable() => Ok(mac),
        Some((NeighbourState::Failed, _)) => Err(NotReady::Silent { name, ip }),
        _ => Err(NotReady::Resolving { name, ip }),
    }
}

fn path(link: &Link, dst_mac: Mac, picture: Picture<'_>) -> Result<Path, NotReady> {
    if link.kind == "bridge" {
        let mut entries = picture.fdb.iter().filter(|e| e.bridge == link.ifindex && e.mac == dst_mac);
        // The same MAC behind two ports (in two VLANs) is not ours to choose: leave it to the bridge.
        let port = match (entries.next(), entries.next()) {
            (Some(entry), None) => Some(entry.port),
            _ => None,
        };
        let usable = port.and_then(|p| picture.link(p)).is_some_and(|p| p.up && p.running);
        return Ok(Path::Bridge { port: port.filter(|_| usable) });
    }
    match (link.vlan, link.lower) {
        (Some(tag), Some(lower)) => {
            let below = picture.link(lower).ok_or(NotReady::LinkGone { ifindex: lower })?;
            if below.up && below.running {
                Ok(Path::Vlan { lower, tag })
            } else {
                Err(NotReady::LinkDown { name: below.name.clone() })
            }
        }
        _ => Ok(Path::Direct),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY_MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn link(ifindex: u32, name: &str, kind: &str) -> Link {
        Link {
            ifindex,
            name: name.into(),
            mac: Some(Mac([2, 0, 0, 0, 0, ifindex as u8])),
            mtu: 1500,
            kind: kind.into(),
            master: None,
            port_kind: String::new(),
            lower: None,
            vlan: None,
            up: true,
            running: true,
            loopback: false,
            ethernet: true,
            noarp: false,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn via(ifindex: u32, gateway: Option<&str>) -> Route {
        Route { kind: RouteKind::Unicast, ifindex: Some(ifindex), gateway: gateway.map(ip), pref_src: None, mtu: None }
    }

    fn neighbour(ifindex: u32, addr: &str, state: NeighbourState) -> Neighbour {
        Neighbour { ifindex, ip: ip(addr), mac: Some(GATEWAY_MAC), state, managed: true }
    }

    fn resolve_in(dst: &str, route: &Route, links: &[Link], neighbours: &[Neighbour]) -> NextHop {
        resolve(ip(dst), route, Picture { links, neighbours, fdb: &[] })
    }

    #[test]
    fn on_link_and_by_gateway_differ_in_whose_mac_is_asked() {
        let links = [link(2, "eth0", "")];
        let table = [neighbour(2, "10.0.0.1", NeighbourState::Stale)];
        let hop =
            Hop { ifindex: 2, dst_mac: GATEWAY_MAC, src_mac: Mac([2, 0, 0, 0, 0, 2]), mtu: 1500, path: Path::Direct };
        assert_eq!(resolve_in("10.0.0.1", &via(2, None), &links, &table), NextHop::Ready(hop));
        assert_eq!(resolve_in("192.0.2.1", &via(2, Some("10.0.0.1")), &links, &table), NextHop::Ready(hop));
        assert_eq!(
            resolve_in("192.0.2.1", &via(2, None), &links, &table),
            NextHop::NotReady(NotReady::Resolving { name: "eth0".into(), ip: ip("192.0.2.1") })
        );
        assert_eq!(to_keep(ip("192.0.2.1"), &via(2, Some("10.0.0.1")), &links), Some((2, ip("10.0.0.1"))));
        assert_eq!(to_keep(ip("192.0.2.1"), &via(2, None), &links), Some((2, ip("192.0.2.1"))));
    }

    #[test]
    fn an_ipv6_router_serves_an_ipv4_destination() {
        let links = [link(2, "eth0", "")];
        let table = [neighbour(2, "fe80::1", NeighbourState::Reachable)];
        assert!(matches!(resolve_in("192.0.2.1", &via(2, Some("fe80::1")), &links, &table), NextHop::Ready(_)));
    }

    #[test]
    fn every_neighbour_state_is_usable_or_not_as_in_the_kernel() {
        use NeighbourState::*;
        let links = [link(2, "eth0", "")];
        for (state, ready) in [
            (None, false),
            (Incomplete, false),
            (Reachable, true),
            (Stale, true),
            (Delay, true),
            (Probe, true),
            (Failed, false),
            (NoArp, true),
            (Permanent, true),
        ] {
            let got = resolve_in("10.0.0.1", &via(2, Option::None), &links, &[neighbour(2, "10.0.0.1", state)]);
            assert_eq!(matches!(got, NextHop::Ready(_)), ready, "{state:?}: {got:?}");
        }
        let silent =
            resolve_in("10.0.0.1", &via(2, Option::None), &links, &[neighbour(2, "10.0.0.1", NeighbourState::Failed)]);
        assert_eq!(silent, NextHop::NotReady(NotReady::Silent { name: "eth0".into(), ip: ip("10.0.0.1") }));
    }

    #[test]
    fn links_that_cannot_send_say_why() {
        let table = [neighbour(2, "10.0.0.1", NeighbourState::Reachable)];
        let route = via(2, None);
        let why = |links: &[Link]| match resolve_in("10.0.0.1", &route, links, &table) {
            NextHop::NotReady(why) => why.to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(why(&[]), "interface 2 of the route is gone");
        assert_eq!(why(&[Link { up: false, ..link(2, "eth0", "") }]), "eth0 is down or has no carrier");
        assert_eq!(why(&[Link { running: false, ..link(2, "eth0", "") }]), "eth0 is down or has no carrier");
        let tun = Link { mac: None, ethernet: false, ..link(2, "tun0", "tun") };
        assert_eq!(why(std::slice::from_ref(&tun)), "tun0 (tun) carries no Ethernet frames");
        assert_eq!(to_keep(ip("10.0.0.1"), &route, &[tun]), None);
    }

    #[test]
    fn routes_that_lead_nowhere_keep_no_neighbour() {
        let links = [link(2, "eth0", "")];
        for kind in [
            RouteKind::Blackhole,
            RouteKind::Unreachable,
            RouteKind::Prohibit,
            RouteKind::NoRoute,
            RouteKind::Broadcast,
            RouteKind::Multicast,
            RouteKind::Anycast,
        ] {
            let route = Route { kind, ..via(2, None) };
            assert_eq!(resolve_in("10.0.0.1", &route, &links, &[]), NextHop::Unreachable(kind));
            assert_eq!(to_keep(ip("10.0.0.1"), &route, &links), None);
        }
        let local = Route { kind: RouteKind::Local, ..via(2, None) };
        assert_eq!(resolve_in("10.0.0.1", &local, &links, &[]), NextHop::Local);
        assert_eq!(to_keep(ip("10.0.0.1"), &local, &links), None);
    }

    #[test]
    fn the_smaller_mtu_counts() {
        let links = [link(2, "eth0", "")];
        let table = [neighbour(2, "10.0.0.1", NeighbourState::Reachable)];
        for (of_route, want) in [(None, 1500), (Some(1400), 1400), (Some(9000), 1500)] {
            let route = Route { mtu: of_route, ..via(2, None) };
            match resolve_in("10.0.0.1", &route, &links, &table) {
                NextHop::Ready(hop) => assert_eq!(hop.mtu, want),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_bridge_names_the_port_it_has_learnt() {
        let links = [link(2, "br0", "bridge"), link(3, "veth3", "veth"), link(4, "veth4", "veth")];
        let table = [neighbour(2, "10.0.0.1", NeighbourState::Reachable)];
        let learnt = |port| FdbEntry { bridge: 2, port, mac: GATEWAY_MAC, vlan: None };
        let path = |links: &[Link], fdb: &[FdbEntry]| match resolve(
            ip("10.0.0.1"),
            &via(2, None),
            Picture { links, neighbours: &table, fdb },
        ) {
            NextHop::Ready(hop) => {
                assert_eq!(hop.src_mac, Mac([2, 0, 0, 0, 0, 2]), "the bridge's own MAC");
                hop.path
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(path(&links, &[]), Path::Bridge { port: None });
        assert_eq!(path(&links, &[learnt(3)]), Path::Bridge { port: Some(3) });
        assert_eq!(path(&links, &[learnt(3), learnt(4)]), Path::Bridge { port: None });
        assert_eq!(path(&links[..1], &[learnt(3)]), Path::Bridge { port: None }, "the port is gone");
        assert_eq!(path(&links, &[FdbEntry { bridge: 7, ..learnt(3) }]), Path::Bridge { port: None });
    }

    /// Served or not, with one tag, two, and three.
    #[test]
    fn the_data_plane_sends_by_vlan_devices_that_it_serves() {
        let vlan = |ifindex, lower, id, tpid| Link {
            lower: Some(lower),
            vlan: Some(VlanTag { id, tpid }),
            ..link(ifindex, &format!("vlan{ifindex}"), "vlan")
        };
        let links = [link(2, "eth0", ""), vlan(5, 2, 10, 0x8100), vlan(6, 5, 20, 0x8100), vlan(7, 6, 30, 0x8100)];
        let out = |ifindex: u32, served: &[u32]| {
            let table = [neighbour(ifindex, "10.0.0.1", NeighbourState::Reachable)];
            let NextHop::Ready(hop) = resolve_in("10.0.0.1", &via(ifindex, None), &links, &table) else {
                panic!("{ifindex} is not ready");
            };
            hop.out(&links, |i| served.contains(&i))
        };
        assert_eq!(out(2, &[]), Some(2));
        assert_eq!((out(5, &[2, 5]), out(5, &[2])), (Some(5 | abi::hop::VLAN), None));
        assert_eq!((out(6, &[5, 6]), out(6, &[2, 6]), out(6, &[2, 5])), (Some(6 | abi::hop::VLAN), None, None));
        assert_eq!(out(7, &[2, 5, 6, 7]), None);
    }

    /// As the data plane looks, of as many as there can be programs.
    #[test]
    fn every_vlan_device_is_found_where_the_data_plane_looks() {
        let vlans: Vec<Link> = (0..abi::IFACES_MAX)
            .map(|i| Link {
                lower: Some(2 + i % 3),
                vlan: Some(VlanTag { id: (1 + i / 3) as u16, tpid: 0x8100 }),
                ..link(100 + i, &format!("vlan{i}"), "vlan")
            })
            .collect();
        let plain = link(2, "eth0", "");
        let (table, left) = vlan_table(vlans.iter().chain([&plain]));
        assert_eq!(table.len() + left.len(), vlans.len());
        assert!(left.is_empty(), "{left:?}");
        for vlan in &vlans {
            let (lower, tag) = vlan_of(vlan).unwrap();
            let first = abi::vlan_place(lower, tag);
            let found = (0..abi::VLAN_PROBES)
                .find_map(|i| table.get(&((first + i) % abi::VLANS_MAX)).filter(|v| (v.lower, v.tag) == (lower, tag)));
            assert_eq!(found.map(|v| v.ifindex), Some(vlan.ifindex));
        }
        // Ids of one link that all begin at the same place: the last ones find none.
        let first = abi::vlan_place(2, 0x8100 << 16 | 1);
        let same: Vec<Link> = (1..=u16::MAX)
            .flat_map(|id| [0x8100, 0x88a8].map(|tpid| VlanTag { id, tpid }))
            .filter(|t| abi::vlan_place(2, u32::from(t.tpid) << 16 | u32::from(t.id)) == first)
            .take(9)
            .map(|tag| Link { lower: Some(2), vlan: Some(tag), ..link(9, &format!("vlan{}", tag.id), "vlan") })
            .collect();
        let (table, left) = vlan_table(same.iter());
        assert_eq!((table.len(), left.len()), (8, same.len() - 8));
    }

    #[test]
    fn a_vlan_names_the_link_below_and_the_tag() {
        let tag = VlanTag { id: 10, tpid: 0x8100 };
        let vlan = Link { lower: Some(2), vlan: Some(tag), ..link(5, "eth0.10", "vlan") };
        let table = [neighbour(5, "10.0.0.1", NeighbourState::Reachable)];
        let got = resolve_in("10.0.0.1", &via(5, None), &[link(2, "eth0", ""), vlan.clone()], &table);
        assert!(
            matches!(got, NextHop::Ready(Hop { path: Path::Vlan { lower: 2, tag: t }, .. }) if t == tag),
            "{got:?}"
        );
        let down = Link { running: false, ..link(2, "eth0", "") };
        assert_eq!(
            resolve_in("10.0.0.1", &via(5, None), &[down, vlan], &table),
            NextHop::NotReady(NotReady::LinkDown { name: "eth0".into() })
        );
    }

    #[test]
    fn each_neighbour_is_kept_once() {
        let links = [link(2, "eth0", "")];
        let route = via(2, Some("10.0.0.1"));
        let kept = all_to_keep([(ip("192.0.2.1"), &route), (ip("192.0.2.2"), &route)], &links);
        assert_eq!(kept.into_iter().collect::<Vec<_>>(), [(2, ip("10.0.0.1"))]);
    }
}
