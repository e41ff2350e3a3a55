//! rtnetlink against the kernel.

use std::net::IpAddr;
use std::time::Duration;

use rvs_control::net::{Addr, Link, Mac, NeighbourState, RouteKind, RouteQuery, Scope, VlanTag};
use rvs_control::nexthop::{self, NextHop, Path, Picture};
use rvs_sys::netlink::{AddrAdded, Kept, Net, NetEvent, Netlink, Watch};

use crate::world::{Ns, run};

pub const CASES: &[crate::Case] = &[
    ("links_are_read_with_their_kinds", links_are_read_with_their_kinds),
    ("routes_are_the_kernels_own_choice", routes_are_the_kernels_own_choice),
    ("refusing_routes_are_answers", refusing_routes_are_answers),
    ("default_routes_with_every_leg", default_routes_with_every_leg),
    ("a_kept_neighbour_resolves_by_itself", a_kept_neighbour_resolves_by_itself),
    ("a_static_neighbour_is_left_alone", a_static_neighbour_is_left_alone),
    ("an_address_comes_back_as_it_was", an_address_comes_back_as_it_was),
    ("changes_are_told", changes_are_told),
    ("an_overflow_is_a_resync", an_overflow_is_a_resync),
    ("a_hop_by_a_bridge_names_its_port", a_hop_by_a_bridge_names_its_port),
    ("an_error_says_what_was_asked", an_error_says_what_was_asked),
];

/// These need a kernel with VLAN devices.
pub const VLAN_CASES: &[crate::Case] = &[("vlans_are_read_with_their_tags", vlans_are_read_with_their_tags)];

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn find<'a>(links: &'a [Link], name: &str) -> &'a Link {
    links.iter().find(|l| l.name == name).unwrap_or_else(|| panic!("no link {name} in {links:?}"))
}

/// The next event that `wanted` accepts, within ten seconds.
async fn await_event(watch: &mut impl Watch, what: &str, wanted: impl Fn(&NetEvent) -> bool) -> NetEvent {
    let search = async {
        loop {
            let event = watch.next().await.expect("an event");
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), search).await.unwrap_or_else(|_| panic!("no event: {what}"))
}

fn links_are_read_with_their_kinds() {
    let (a, b) = Ns::pair();
    a.ip("link set va address 02:00:00:00:00:aa mtu 1400");
    a.ip("link add br0 type bridge");
    a.ip("link add d0 arp off type veth peer name d1");
    a.ip("link set d0 master br0");
    a.ip("tuntap add t0 mode tun");
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let mut watch = net.watch().expect("watch");
        // The kernel's link watch tells of a carrier a little later.
        let links = loop {
            let links = net.links().await.expect("links");
            if find(&links, "va").running {
                break links;
            }
            await_event(&mut watch, "carrier", |e| matches!(e, NetEvent::Link { .. })).await;
        };
        let va = find(&links, "va");
        assert_eq!((va.mac, va.mtu, va.kind.as_str()), (Some(Mac([2, 0, 0, 0, 0, 0xaa])), 1400, "veth"));
        assert!(va.up && va.running && va.ethernet && !va.loopback && !va.noarp && va.lower.is_none());
        let bridge = find(&links, "br0");
        let port = find(&links, "d0");
        assert_eq!(bridge.kind, "bridge");
        assert_eq!((port.master, port.port_kind.as_str(), port.noarp), (Some(bridge.ifindex), "bridge", true));
        let tun = find(&links, "t0");
        assert!(!tun.ethernet && tun.mac.is_none(), "{tun:?}");
        assert!(find(&links, "lo").loopback);

        b.ip("link set vb down");
        // ... and of a lost one.
        loop {
            await_event(&mut watch, "carrier lost", |e| matches!(e, NetEvent::Link { .. })).await;
            let va = find(&net.links().await.expect("links"), "va").clone();
            assert!(va.up);
            if !va.running {
                break;
            }
        }
    });
}

fn vlans_are_read_with_their_tags() {
    let (a, _b) = Ns::pair();
    a.ip("link add link va name va.10 type vlan id 10");
    a.ip("link add link va name va.20 type vlan protocol 802.1ad id 20");
    a.block_on(async {
        let links = Netlink::open().expect("open").links().await.expect("links");
        let va = find(&links, "va").ifindex;
        let tagged = find(&links, "va.10");
        assert_eq!((tagged.vlan, tagged.lower), (Some(VlanTag { id: 10, tpid: 0x8100 }), Some(va)));
        assert!(!tagged.up);
        assert_eq!(find(&links, "va.20").vlan, Some(VlanTag { id: 20, tpid: 0x88a8 }));
    });
}

fn routes_are_the_kernels_own_choice() {
    let (a, _b) = Ns::pair();
    a.ip("addr add 10.1.0.1/24 dev va");
    a.ip("-6 addr add fd00:1::1/64 dev va nodad");
    a.ip("link add d0 type veth peer name d1");
    a.ip("link set d0 up");
    a.ip("link set d1 up");
    a.ip("addr add 10.2.0.1/24 dev d0");
    a.ip("route add 192.0.2.0/24 via 10.1.0.9 mtu 1300");
    a.ip("route add 198.51.100.0/24 via inet6 fe80::9 dev va");
    a.ip("-6 route add 2001:db8::/32 via fd00:1::9");
    a.ip("route add default via 10.2.0.9 table 100");
    a.ip("rule add fwmark 7 table 100");
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let links = net.links().await.expect("links");
        let (va, d0) = (find(&links, "va").ifindex, find(&links, "d0").ifindex);
        let to = async |dst| net.route_to(RouteQuery::to(ip(dst))).await.expect("a route");

        let on_link = to("10.1.0.2").await;
        assert_eq!((on_link.kind, on_link.ifindex, on_link.gateway), (RouteKind::Unicast, Some(va), None));
        assert_eq!(on_link.pref_src, Some(ip("10.1.0.1")));
        let routed = to("192.0.2.5").await;
        assert_eq!((routed.ifindex, routed.gateway, routed.mtu), (Some(va), Some(ip("10.1.0.9")), Some(1300)));
        assert_eq!(to("198.51.100.1").await.gateway, Some(ip("fe80::9")), "an IPv6 router for IPv4");
        assert_eq!(to("2001:db8::1").await.gateway, Some(ip("fd00:1::9")));
        assert_eq!(to("fd00:1::2").await.gateway, None);
        assert_eq!(to("10.1.0.1").await.kind, RouteKind::Local);
        assert_eq!(to("fd00:1::1").await.kind, RouteKind::Local);
        assert_eq!(to("10.1.0.255").await.kind, RouteKind::Broadcast);

        let marked = RouteQuery { mark: Some(7), ..RouteQuery::to(ip("192.0.2.5")) };
        let marked = net.route_to(marked).await.expect("a route");
        assert_eq!((marked.ifindex, marked.gateway), (Some(d0), Some(ip("10.2.0.9"))), "the policy rule counts");
    });
}

fn refusing_routes_are_answers() {
    let ns = Ns::new();
    for family in ["", "-6 "] {
        let net = if family.is_empty() { "192.0.2." } else { "2001:db8::" };
        let bits = if family.is_empty() { 32 } else { 128 };
        for (number, kind) in [(1, "blackhole"), (2, "unreachable"), (3, "prohibit")] {
            ns.ip(&format!("{family}route add {kind} {net}{number}/{bits}"));
        }
    }
    ns.block_on(async {
        let net = Netlink::open().expect("open");
        for prefix in ["192.0.2.", "2001:db8::"] {
            for (number, kind) in [
                (1, RouteKind::Blackhole),
                (2, RouteKind::Unreachable),
                (3, RouteKind::Prohibit),
                (4, RouteKind::NoRoute),
            ] {
                let dst = ip(&format!("{prefix}{number}"));
                assert_eq!(net.route_to(RouteQuery::to(dst)).await.expect("an answer").kind, kind, "{dst}");
            }
        }
    });
}

fn default_routes_with_every_leg() {
    let (a, _b) = Ns::pair();
    a.ip("addr add 10.1.0.1/24 dev va");
    a.ip("-6 addr add fd00:1::1/64 dev va nodad");
    a.ip("route add default nexthop via 10.1.0.8 dev va nexthop via 10.1.0.9 dev va");
    a.ip("-6 route add default via fd00:1::9");
    a.ip("route add default via 10.1.0.7 table 100");
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let mut gateways: Vec<_> =
            net.ipv4_default_routes().await.expect("routes").into_iter().filter_map(|r| r.gateway).collect();
        gateways.sort();
        assert_eq!(gateways, [ip("10.1.0.8"), ip("10.1.0.9")]);
    });
}

fn a_kept_neighbour_resolves_by_itself() {
    let (a, b) = Ns::pair();
    b.ip("link set vb address 02:00:00:00:00:bb");
    a.ip("addr add 10.1.0.1/24 dev va");
    a.ip("-6 addr add fd00:1::1/64 dev va nodad");
    // The kernel tries managed entries again at this pace (default 5 s).
    for family in ["ipv4", "ipv6"] {
        assert!(a.sh(&format!("echo 200 > /proc/sys/net/{family}/neigh/va/interval_probe_time_ms")).status.success());
    }
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let mut watch = net.watch().expect("watch");
        let va = find(&net.links().await.expect("links"), "va").ifindex;
        for (addr, bits) in [("10.1.0.2", 24), ("fd00:1::2", 64)] {
            let peer = ip(addr);
            assert_eq!(net.keep_neighbour(va, peer).await.expect("keep"), Kept::Managed);
            let entry = net.neighbour(va, peer).await.expect("read").expect("an entry");
            assert!(entry.managed && !entry.state.usable(), "nobody is there yet: {entry:?}");
            // The peer comes later; nobody asks again, only the kernel.
            b.ip(&format!("addr add {addr}/{bits} dev vb{}", if bits == 64 { " nodad" } else { "" }));
            let usable = |event: &NetEvent| matches!(event, NetEvent::Neighbour { entry, gone: false } if entry.ip == peer && entry.state.usable());
            await_event(&mut watch, "the neighbour answers", usable).await;
            let entry = net.neighbour(va, peer).await.expect("read").expect("an entry");
            assert_eq!(entry.mac, Some(Mac([2, 0, 0, 0, 0, 0xbb])));
            assert!(net.neighbours().await.expect("read").contains(&entry));

            assert_eq!(net.keep_neighbour(va, peer).await.expect("again"), Kept::Managed);
            let again = net.neighbour(va, peer).await.expect("read").expect("an entry");
            assert!(again.state.usable() && again.mac == entry.mac, "asking again loses nothing: {again:?}");

            net.forget_neighbour(va, peer).await.expect("forget");
            let left = net.neighbour(va, peer).await.expect("read").expect("an entry");
            assert!(!left.managed && left.mac == entry.mac && left.state.usable(), "{left:?}");
            net.forget_neighbour(va, ip("10.1.0.77")).await.expect("forgetting nothing is no error");
        }
    });
}

fn a_static_neighbour_is_left_alone() {
    let (a, _b) = Ns::pair();
    a.ip("addr add 10.1.0.1/24 dev va");
    a.ip("neigh add 10.1.0.2 lladdr 02:00:00:00:00:cc dev va nud permanent");
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let va = find(&net.links().await.expect("links"), "va").ifindex;
        let before = net.neighbour(va, ip("10.1.0.2")).await.expect("read").expect("an entry");
        assert_eq!(before.state, NeighbourState::Permanent);
        assert_eq!(net.keep_neighbour(va, before.ip).await.expect("keep"), Kept::Static);
        net.forget_neighbour(va, before.ip).await.expect("forget");
        assert_eq!(net.neighbour(va, before.ip).await.expect("read"), Some(before));
    });
}

fn an_address_comes_back_as_it_was() {
    let (a, _b) = Ns::pair();
    a.ip("addr add 10.1.0.1/24 brd 10.1.0.255 label va:x dev va");
    a.ip("addr add 10.1.0.2 peer 10.9.0.1/32 scope link dev va");
    a.ip("-6 addr add fd00:1::1/64 dev va nodad noprefixroute");
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let before = a.ip("-j addr show dev va");
        let va = find(&net.links().await.expect("links"), "va").ifindex;
        for (addr, bits) in [("10.1.0.1", 24), ("10.1.0.2", 32), ("fd00:1::1", 64)] {
            let removed = net.del_addr(va, ip(addr), bits).await.expect("delete").expect("it was there");
            assert!(!a.ip("-j addr show dev va").contains(&format!("\"{addr}\"")));
            assert_eq!(net.del_addr(va, ip(addr), bits).await.expect("delete"), None);
            assert_eq!(net.add_addr(&removed).await.expect("add"), AddrAdded::Added);
            assert_eq!(net.add_addr(&removed).await.expect("add"), AddrAdded::AlreadyThere);
        }
        // The order of addresses is the order of adding, so all three were removed and added in turn.
        assert_eq!(a.ip("-j addr show dev va"), before);

        let lo = 1;
        for vip in ["192.0.2.1", "2001:db8::1"] {
            let addr = Addr::host(lo, ip(vip));
            assert_eq!(net.add_addr(&addr).await.expect("add"), AddrAdded::Added);
            let there = net.addrs().await.expect("read").into_iter().find(|x| x.ip == addr.ip).expect("it is there");
            assert_eq!((there.ifindex, there.prefix_len), (lo, addr.prefix_len));
            assert_eq!(there.flags & (Addr::TENTATIVE | Addr::DADFAILED), 0);
            assert!(there.scope == Scope::Host || there.ip.is_ipv6());
        }
        let wider = Addr { prefix_len: 64, ..Addr::host(lo, ip("2001:db8::1")) };
        assert_eq!(net.add_addr(&wider).await.expect_err("another prefix").errno(), Some(libc::EEXIST));
    });
}

fn changes_are_told() {
    let (a, b) = Ns::pair();
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let mut watch = net.watch().expect("watch");
        let va = find(&net.links().await.expect("links"), "va").ifindex;

        a.ip("addr add 10.1.0.1/24 dev va");
        let added = |e: &NetEvent| *e == NetEvent::Addr { ifindex: va, ip: ip("10.1.0.1"), gone: false };
        await_event(&mut watch, "address added", added).await;
        await_event(&mut watch, "its route", |e| *e == NetEvent::Route).await;
        a.ip("-6 rule add fwmark 9 table 100");
        await_event(&mut watch, "rule", |e| *e == NetEvent::Rule).await;
        a.ip("neigh add 10.1.0.2 lladdr 02:00:00:00:00:cc dev va nud permanent");
        let neighbour =
            |e: &NetEvent| matches!(e, NetEvent::Neighbour { entry, gone: false } if entry.ip == ip("10.1.0.2"));
        await_event(&mut watch, "neighbour", neighbour).await;
        a.ip("neigh del 10.1.0.2 dev va");
        let left = |e: &NetEvent| matches!(e, NetEvent::Neighbour { gone: true, .. });
        await_event(&mut watch, "neighbour gone", left).await;
        b.ip("link set vb down");
        let link = |e: &NetEvent| *e == NetEvent::Link { ifindex: va, gone: false };
        await_event(&mut watch, "carrier lost", link).await;
        a.ip("link del va");
        let gone = |e: &NetEvent| *e == NetEvent::Link { ifindex: va, gone: true };
        await_event(&mut watch, "link gone", gone).await;
    });
}

fn an_overflow_is_a_resync() {
    let ns = Ns::new();
    ns.ip("link add d0 type veth peer name d1");
    ns.ip("link set d0 up");
    ns.ip("link set d1 up");
    ns.block_on(async {
        let net = Netlink::open().expect("open");
        let mut watch = net.watch().expect("watch");
        let batch = std::env::temp_dir().join(format!("{}-routes", ns.name));
        let routes: String =
            (0..20_000u32).map(|n| format!("route add 10.{}.{}.0/24 dev d0\n", n >> 8, n & 255)).collect();
        std::fs::write(&batch, routes).expect("write the batch");
        run("ip", &["-n", &ns.name, "-batch", batch.to_str().expect("a path")]);
        std::fs::remove_file(batch).expect("remove the batch");
        await_event(&mut watch, "the overflow", |e| *e == NetEvent::Resync).await;
        // And it goes on after that.
        ns.ip("link del d0");
        await_event(&mut watch, "a later change", |e| matches!(e, NetEvent::Link { gone: true, .. })).await;
    });
}

fn a_hop_by_a_bridge_names_its_port() {
    let (a, b) = Ns::pair();
    b.ip("link set vb address 02:00:00:00:00:bb");
    b.ip("addr add 10.1.0.2/24 dev vb");
    a.ip("link add br0 address 02:00:00:00:00:aa type bridge");
    a.ip("link set br0 up");
    a.ip("link set va master br0");
    a.ip("addr add 10.1.0.1/24 dev br0");
    a.block_on(async {
        let net = Netlink::open().expect("open");
        let mut watch = net.watch().expect("watch");
        let dst = ip("10.1.0.2");
        let route = net.route_to(RouteQuery::to(dst)).await.expect("a route");
        let links = net.links().await.expect("links");
        let (bridge, port) = (find(&links, "br0").ifindex, find(&links, "va").ifindex);
        assert_eq!(nexthop::to_keep(dst, &route, &links), Some((bridge, dst)));
        assert!(matches!(hop(&net, dst).await, NextHop::NotReady(_)));
        net.keep_neighbour(bridge, dst).await.expect("keep");
        let usable =
            |e: &NetEvent| matches!(e, NetEvent::Neighbour { entry, .. } if entry.ip == dst && entry.state.usable());
        await_event(&mut watch, "the neighbour answers", usable).await;
        match hop(&net, dst).await {
            NextHop::Ready(hop) => {
                assert_eq!((hop.ifindex, hop.path), (bridge, Path::Bridge { port: Some(port) }));
                assert_eq!((hop.src_mac, hop.dst_mac), (Mac([2, 0, 0, 0, 0, 0xaa]), Mac([2, 0, 0, 0, 0, 0xbb])));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(hop(&net, ip("10.1.0.1")).await, NextHop::Local);
    });
}

async fn hop(net: &Netlink, dst: IpAddr) -> NextHop {
    let route = net.route_to(RouteQuery::to(dst)).await.expect("a route");
    let links = net.links().await.expect("links");
    let neighbours = net.neighbours().await.expect("neighbours");
    let fdb = net.fdb().await.expect("fdb");
    nexthop::resolve(dst, &route, Picture { links: &links, neighbours: &neighbours, fdb: &fdb })
}

fn an_error_says_what_was_asked() {
    let ns = Ns::new();
    ns.block_on(async {
        let net = Netlink::open().expect("open");
        let error = net.add_addr(&Addr::host(77, ip("192.0.2.1"))).await.expect_err("no such interface");
        assert_eq!(error.errno(), Some(libc::ENODEV));
        assert_eq!(error.to_string(), "add address 192.0.2.1/32 to interface 77: No such device (os error 19)");
    });
}
