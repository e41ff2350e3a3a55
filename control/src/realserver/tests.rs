use super::*;
use crate::firewall::{Reading, Tool};
use crate::net::{Mac, RouteKind};

const VIP: &str = "192.0.2.1";
const VIP6: &str = "2001:db8::1";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn link(ifindex: u32, name: &str) -> Link {
    let loopback = name == "lo";
    Link {
        ifindex,
        name: name.into(),
        mac: (!loopback).then_some(Mac([2, 0, 0, 0, 0, ifindex as u8])),
        mtu: 1500,
        kind: String::new(),
        master: None,
        port_kind: String::new(),
        lower: None,
        vlan: None,
        up: true,
        running: true,
        loopback,
        ethernet: !loopback,
        noarp: false,
    }
}

/// A host with lo and eth0 and the kernel's defaults.
fn host() -> Observed {
    let links = vec![link(1, "lo"), link(2, "eth0")];
    let settings = super::settings(&links).into_iter().map(|key| (key, 0)).collect();
    Observed { links, settings, ..Observed::default() }
}

fn wanted(vips: &[&str]) -> Wanted {
    Wanted {
        mode: Mode::Dr,
        vips: vips.iter().map(|v| ip(v)).collect(),
        directors: Vec::new(),
        interfaces: Vec::new(),
        static_arp: false,
        gue_port: GUE_PORT,
        mss: Mss::Off,
    }
}

/// The host after the operations.
fn after(mut host: Observed, ops: &[Op]) -> Observed {
    for op in ops {
        match op {
            Op::AddAddr { addr, .. } => host.addrs.push(addr.clone()),
            Op::DelAddr { addr, .. } => host.addrs.retain(|a| a != addr),
            Op::Decap { link, old, new } => {
                assert_eq!(host.decap.get(link), old.as_ref());
                match new {
                    Some(new) => drop(host.decap.insert(link.clone(), new.clone())),
                    None => drop(host.decap.remove(link)),
                }
            }
            Op::Directors { new, .. } => host.directors.clone_from(new),
            Op::Set { key, old, new } => {
                assert_eq!(host.settings.insert(key.clone(), *new), Some(*old), "{key}");
            }
        }
    }
    host
}

fn set(host: &mut Observed, link: &str, name: &str, value: i64) {
    host.settings.insert(key(link, name), value);
}

fn problems(wanted: &Wanted, host: &Observed) -> Vec<Problem> {
    desired(wanted, host).unwrap().into_iter().map(|f| f.problem).collect()
}

#[test]
fn a_bare_host_gets_settings_before_addresses() {
    let wanted = wanted(&[VIP, VIP6]);
    let ops = plan_up(&wanted, &host()).unwrap();
    let commands: Vec<_> = ops.iter().map(ToString::to_string).collect();
    assert_eq!(
        commands,
        [
            "sysctl -w net.ipv4.conf.all.arp_ignore=1",
            "sysctl -w net.ipv4.conf.eth0.arp_ignore=1",
            "sysctl -w net.ipv4.conf.all.arp_announce=2",
            "sysctl -w net.ipv4.conf.eth0.arp_announce=2",
            "ip addr add 192.0.2.1/32 dev lo scope host",
            "ip -6 addr add 2001:db8::1/128 dev lo nodad",
        ]
    );
    let ready = after(host(), &ops);
    assert_eq!(problems(&wanted, &ready), []);
    assert_eq!(plan_up(&wanted, &ready).unwrap(), [], "up again does nothing");
    let undo: Vec<Op> = ops.iter().rev().map(Op::inverse).collect();
    let back = after(ready, &undo);
    assert_eq!((back.settings, back.addrs), (host().settings, host().addrs));
}

#[test]
fn ipv6_alone_needs_no_arp_settings() {
    let ops = plan_up(&wanted(&[VIP6]), &host()).unwrap();
    assert_eq!(ops, [Op::AddAddr { link: "lo".into(), addr: Addr::host(1, ip(VIP6)) }]);
    let mut off = host();
    off.settings.insert(LO_DISABLE_IPV6.into(), 1);
    assert_eq!(problems(&wanted(&[VIP6]), &off)[0], Problem::NoIpv6OnLo { vip: ip(VIP6) });
    off.settings.remove(LO_DISABLE_IPV6);
    assert_eq!(desired(&wanted(&[VIP6]), &off), Err(Refused::NoIpv6 { vip: ip(VIP6) }));
}

#[test]
fn the_larger_of_all_and_the_interface_counts() {
    let wanted = wanted(&[VIP]);
    let eth0 = |value| Problem::AnswersArp { link: "eth0".into(), value };
    // (all, eth0) of arp_ignore -> what is wrong.
    for (all, own, want) in [
        (0, 0, Some(eth0(0))),
        (1, 0, None),
        (0, 1, None),
        (0, 2, None),
        (8, 0, None),
        (1, 3, None),
        (1, 4, Some(eth0(4))),
        (7, 1, Some(eth0(7))),
        (8, 9, Some(eth0(9))),
    ] {
        let mut host = host();
        set(&mut host, "all", "arp_ignore", all);
        set(&mut host, "eth0", "arp_ignore", own);
        set(&mut host, "all", "arp_announce", 2);
        host.addrs.push(Addr::host(1, ip(VIP)));
        let got = problems(&wanted, &host);
        assert_eq!(got.first(), want.as_ref(), "all {all}, eth0 {own}");
        let mended = after(host.clone(), &plan_up(&wanted, &host).unwrap());
        assert_eq!(problems(&wanted, &mended), [], "all {all}, eth0 {own}");
    }
    for (all, own, good) in [(0, 0, false), (1, 1, false), (2, 0, true), (0, 2, true), (1, 2, true), (2, 3, false)] {
        let mut host = host();
        set(&mut host, "all", "arp_ignore", 1);
        set(&mut host, "all", "arp_announce", all);
        set(&mut host, "eth0", "arp_announce", own);
        let wrong = problems(&wanted, &host).iter().any(|p| matches!(p, Problem::AnnouncesVip { .. }));
        assert_eq!(wrong, !good, "all {all}, eth0 {own}");
        let mended = after(host.clone(), &plan_up(&wanted, &host).unwrap());
        assert_eq!(problems(&wanted, &mended), []);
    }
}

#[test]
fn arp_ignore_3_depends_on_the_scope_of_the_vip() {
    let mut host = host();
    set(&mut host, "all", "arp_ignore", 3);
    set(&mut host, "all", "arp_announce", 2);
    host.addrs.push(Addr { scope: Scope::Global, ..Addr::host(1, ip(VIP)) });
    assert_eq!(problems(&wanted(&[VIP]), &host), [Problem::AnswersArp { link: "eth0".into(), value: 3 }]);
    assert_eq!(problems(&wanted(&[VIP]), &after(host.clone(), &plan_up(&wanted(&[VIP]), &host).unwrap())), []);
    host.addrs[0].scope = Scope::Host;
    assert_eq!(problems(&wanted(&[VIP]), &host), []);
}

#[test]
fn strict_source_checks_hurt_only_where_replies_leave_elsewhere() {
    let mut host = host();
    host.links.push(link(3, "eth1"));
    host.addrs.push(Addr::host(1, ip(VIP)));
    for name in ["arp_ignore", "arp_announce"] {
        set(&mut host, "all", name, if name == "arp_ignore" { 1 } else { 2 });
    }
    for (name, value) in [("arp_ignore", 0), ("arp_announce", 0), ("rp_filter", 0)] {
        set(&mut host, "eth1", name, value);
    }
    let wanted = wanted(&[VIP]);
    set(&mut host, "all", "rp_filter", 1);
    assert_eq!(problems(&wanted, &host), [], "no default route: all clients are on the links");
    let out = |ifindex| Route { ifindex: Some(ifindex), ..Route::none(RouteKind::Unicast) };
    host.ipv4_default_routes = vec![out(3)];
    assert_eq!(problems(&wanted, &host), [Problem::StrictSource { link: "eth0".into() }]);
    let ops = plan_up(&wanted, &host).unwrap();
    assert_eq!(ops[0].to_string(), "sysctl -w net.ipv4.conf.eth0.rp_filter=2", "loose beats strict on all");
    assert_eq!(problems(&wanted, &after(host.clone(), &ops)), []);
    host.ipv4_default_routes = vec![out(2), out(3)];
    assert_eq!(problems(&wanted, &host), []);
    host.ipv4_default_routes = vec![out(2)];
    set(&mut host, "eth1", "rp_filter", 2);
    assert_eq!(problems(&wanted, &host), []);
}

#[test]
fn arp_rules_and_static_entries_do_the_same_job() {
    let rules = |text: &str| Rules::read(&[Reading { tool: Tool::Arptables, text: text.into() }]).0;
    let mut host = host();
    host.addrs = vec![Addr::host(1, ip(VIP)), Addr::host(1, ip("192.0.2.2"))];
    let both = wanted(&[VIP, "192.0.2.2"]);
    assert_eq!(problems(&both, &host).len(), 2);
    let table = "*filter\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n\
        -A INPUT -d 192.0.2.0/30 -j DROP\n-A OUTPUT -s 192.0.2.1 -j mangle --mangle-ip-s 10.0.0.2\n";
    host.rules = rules(table);
    assert_eq!(problems(&both, &host), [Problem::AnnouncesVip { link: "eth0".into(), value: 0 }], "of 192.0.2.2");
    assert_eq!(problems(&wanted(&[VIP]), &host), []);
    host.rules = Rules::default();
    assert_eq!(problems(&Wanted { static_arp: true, ..both }, &host), []);
}

#[test]
fn an_interface_without_arp_answers_nobody() {
    let mut host = host();
    host.addrs.push(Addr::host(1, ip(VIP)));
    host.links[1].noarp = true;
    let named = Wanted { interfaces: vec!["eth0".into()], ..wanted(&[VIP]) };
    assert_eq!(problems(&named, &host), []);
    assert_eq!(desired(&wanted(&[VIP]), &host), Err(Refused::NoInterface));
}

#[test]
fn only_the_named_interfaces_are_looked_at() {
    let mut host = host();
    host.links.push(Link { master: Some(2), port_kind: "bridge".into(), ..link(3, "eth1") });
    host.links.push(link(4, "eth2"));
    let on = |name: &str| Wanted { interfaces: vec![name.into()], ..wanted(&[VIP]) };
    let names: Vec<_> = problems(&wanted(&[VIP]), &host)
        .into_iter()
        .filter_map(|p| if let Problem::AnswersArp { link, .. } = p { Some(link) } else { None })
        .collect();
    assert_eq!(names, ["eth0", "eth2"], "not the bridge port");
    assert!(problems(&on("eth2"), &host).contains(&Problem::AnswersArp { link: "eth2".into(), value: 0 }));
    assert!(!problems(&on("eth2"), &host).contains(&Problem::AnswersArp { link: "eth0".into(), value: 0 }));
    let refused = |name| desired(&on(name), &host).unwrap_err().to_string();
    assert_eq!(refused("eth9"), "there is no interface eth9 in this network namespace");
    assert_eq!(refused("lo"), "requests cannot come by lo: it is the loopback");
    assert_eq!(refused("eth1"), "requests cannot come by eth1: it is a port of another interface (name that one)");
}

#[test]
fn a_vip_on_the_wire_is_left_to_the_administrator() {
    let mut host = host();
    host.addrs.push(Addr { prefix_len: 24, ..Addr::host(2, ip(VIP)) });
    let findings = desired(&wanted(&[VIP]), &host).unwrap();
    let wire = findings.iter().find(|f| matches!(f.problem, Problem::VipOnWire { .. })).unwrap();
    assert_eq!(wire.mend, Mend::ByHand("ip addr del 192.0.2.1/24 dev eth0".into()));
    assert_eq!(
        plan_up(&wanted(&[VIP]), &host).unwrap_err().to_string(),
        "the VIP 192.0.2.1 is an address of eth0 itself: it is answered for there, so clients may find this host \
         instead of the director; mend it first: ip addr del 192.0.2.1/24 dev eth0"
    );
}

#[test]
fn a_vip_is_found_where_it_is_and_narrowed_where_it_is_too_wide() {
    let mut host = host();
    set(&mut host, "all", "arp_ignore", 1);
    set(&mut host, "all", "arp_announce", 2);
    host.links.push(Link { noarp: true, kind: "dummy".into(), ..link(5, "dummy0") });
    host.addrs = vec![Addr::host(5, ip(VIP)), Addr { prefix_len: 64, ..Addr::host(1, ip(VIP6)) }];
    assert_eq!(problems(&wanted(&[VIP]), &host), [], "a dummy device is as good as lo");
    let wide = Problem::VipTooWide { vip: ip(VIP6), link: "lo".into(), prefix_len: 64 };
    assert_eq!(problems(&wanted(&[VIP6]), &host), [wide]);
    let ops = plan_up(&wanted(&[VIP6]), &host).unwrap();
    assert_eq!(
        Mend::Ops(ops.clone()).to_string(),
        "ip addr del 2001:db8::1/64 dev lo && ip -6 addr add 2001:db8::1/128 dev lo nodad"
    );
    assert_eq!(problems(&wanted(&[VIP6]), &after(host.clone(), &ops)), []);
    host.addrs[0].flags = Addr::DADFAILED;
    assert_eq!(problems(&wanted(&[VIP]), &host), [Problem::VipUnusable { vip: ip(VIP), link: "dummy0".into() }]);
    host.links[2].up = false;
    assert_eq!(problems(&wanted(&[VIP]), &host), [Problem::VipMissing { vip: ip(VIP) }], "a link that is down");
    host.links[0].up = false;
    assert_eq!(problems(&wanted(&[VIP]), &host)[0], Problem::LoDown);
    assert!(matches!(plan_up(&wanted(&[VIP]), &host), Err(Refused::ByHand { .. })));
}

#[test]
fn what_can_never_work_is_refused_first() {
    let refused = |vips: &[&str]| wanted(vips).check().unwrap_err().to_string();
    assert_eq!(refused(&[]), "no VIP was given: name at least one with --vip");
    for (vip, why) in [
        ("0.0.0.0", "the unspecified address"),
        ("127.0.0.2", "a loopback address"),
        ("224.0.0.1", "a multicast address"),
        ("255.255.255.255", "the broadcast address"),
        ("::", "the unspecified address"),
        ("::1", "a loopback address"),
        ("fe80::1", "a link-local address"),
        ("ff02::1", "a multicast address"),
        ("::ffff:10.0.0.1", "an IPv4-mapped address"),
    ] {
        assert_eq!(refused(&[VIP, vip]), format!("{} cannot be a VIP: it is {why}", ip(vip)));
    }
}

#[test]
fn full_nat_wants_directors_and_nothing_else() {
    let fullnat = |vips: &[&str], directors: &[&str]| Wanted {
        mode: Mode::Fullnat,
        directors: directors.iter().map(|d| ip(d)).collect(),
        ..wanted(vips)
    };
    let refused = |w: Wanted| w.check().unwrap_err().to_string();
    assert_eq!(
        refused(fullnat(&[], &[])),
        "no director was given: name each local address of its pool (ipvsadm -G) with --director"
    );
    assert_eq!(
        refused(fullnat(&[VIP], &["10.0.0.200"])),
        format!("a real server for full NAT has no VIP: leave {VIP} out")
    );
    let dr = Wanted { mode: Mode::Dr, ..fullnat(&[VIP], &["10.0.0.200"]) };
    assert_eq!(refused(dr), "only full NAT asks for the director's address: leave 10.0.0.200 out");

    // Directors add up, whatever the host is like otherwise.
    let mut host = Observed { directors: [ip("10.0.0.200")].into(), ..Observed::default() };
    let two = fullnat(&[], &["10.0.0.200", "10.0.0.201"]);
    let findings = desired(&two, &host).unwrap();
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].problem, Problem::ClientHidden { director: ip("10.0.0.201") });
    let ops = plan_up(&two, &host).unwrap();
    assert_eq!(ops[0].to_string(), "rvs realserver up --mode fullnat --director 10.0.0.200 --director 10.0.0.201");
    let Op::Directors { new, .. } = ops[0].clone() else { panic!("{ops:?}") };
    host.directors = new;
    assert_eq!(plan_up(&two, &host).unwrap(), []);
}

#[test]
fn settings_of_interfaces_with_dots_are_written_with_slashes() {
    let op = Op::Set { key: key("eth0.10", "arp_ignore"), old: 0, new: 1 };
    assert_eq!(op.to_string(), "sysctl -w net/ipv4/conf/eth0.10/arp_ignore=1");
}

/// Tunnels end where requests may come in, for all VIPs that were ever asked for; `down` begins where `up` did.
#[test]
fn tunnels_are_taken_out_of_on_every_interface() {
    let tun = Wanted { mode: Mode::Tun, ..wanted(&[VIP]) };
    let bare = host();
    let ops = plan_up(&tun, &bare).unwrap();
    let links: Vec<&String> =
        ops.iter().filter_map(|op| if let Op::Decap { link, .. } = op { Some(link) } else { None }).collect();
    let ethernet = bare.links.iter().filter(|l| l.ethernet && !l.loopback && l.up).count();
    assert_eq!(links.len(), ethernet);
    let ready = after(bare.clone(), &ops);
    assert_eq!(problems(&tun, &ready), []);
    // By direct routing nothing of it is asked for.
    assert!(plan_up(&wanted(&[VIP]), &bare).unwrap().iter().all(|op| !matches!(op, Op::Decap { .. })));
    let more = Wanted { vips: vec![ip(VIP6)], ..tun.clone() };
    let again = after(ready.clone(), &plan_up(&more, &ready).unwrap());
    assert_eq!(again.decap[links[0]].vips, [ip(VIP), ip(VIP6)].into());
    let other_port = Wanted { gue_port: 7000, ..tun };
    assert!(problems(&other_port, &again).iter().all(|p| matches!(p, Problem::NotTakenOut { .. })));
    let back: Vec<Op> = ops.iter().rev().map(Op::inverse).collect();
    assert!(after(ready, &back).decap.is_empty());
}

/// The MSS can be changed by itself, and has room for any tunnel.
#[test]
fn clients_are_told_of_an_mss_that_goes_through_tunnels() {
    let tun = Wanted { mode: Mode::Tun, ..wanted(&[VIP]) };
    let bare = host();
    let ready = after(bare.clone(), &plan_up(&tun, &bare).unwrap());
    let auto = Wanted { mss: Mss::Auto, ..tun.clone() };
    assert!(!problems(&auto, &ready).is_empty());
    assert!(problems(&auto, &ready).iter().all(|p| matches!(p, Problem::OtherMss { there: None, .. })));
    let told = after(ready.clone(), &plan_up(&auto, &ready).unwrap());
    for (name, decap) in &told.decap {
        let link = bare.links.iter().find(|l| l.name == *name).unwrap();
        // 40 + 8 + 4 outside, 20 + 20 inside.
        assert_eq!(decap.mss, Some((link.mtu - 92) as u16));
    }
    assert_eq!(problems(&auto, &told), []);
    assert!(problems(&tun, &told).iter().all(|p| matches!(p, Problem::OtherMss { there: Some(_), .. })));
    for text in ["off", "auto", "536", "1400", "65535"] {
        assert_eq!(text.parse::<Mss>().unwrap().to_string(), text);
    }
    for text in ["", "535", "65536", "-1", "Auto", "1400.0"] {
        assert!(text.parse::<Mss>().is_err(), "{text}");
    }
}
