//! The layouts that LVS users have, as topologies. All carry IPv4 and IPv6, and NAT and DR side by side:
//!
//! ```text
//! two-armed          client -- router -- front -- director -- back --+-- switch --+-- rs1
//!                                \_____________ back (a leg) ________/            +-- rs2 ...
//! one-armed          client -- router -- LAN switch --+-- director
//!                                                     +-- rs1, rs2 ...
//! bridged-servers    client -- router -- front -- director [br0] --+-- rs1, rs2 ...
//!                                \________ back (a leg) ____________/
//! ```
//!
//! Real servers reach the client by the director, as NAT needs it; what they send from the VIP (DR) goes to the router's
//! leg instead, by a routing rule. [`Gateway`] makes it one of the two for both.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::topology::{Bridge, End, Link, Node, Route, Service, Topology};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Layout {
    /// The director has a client side and a server side; the VIP is on the client side.
    #[default]
    TwoArmed,
    /// Director, real servers and the router's leg share one network, which the VIP is of.
    OneArmed,
    /// Two-armed, with the VIP on the director's lo, of a network of its own that the router routes there.
    LoopbackVip,
    /// One-armed with a second director that holds no VIP, on a switch that floods.
    TwoDirectors,
    /// Two-armed without a switch: the real servers are ports of a bridge on the director.
    BridgedServers,
}

/// How a real server's packets get back to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gateway {
    /// By the director; from the VIP by the router. NAT and DR work at once.
    #[default]
    Both,
    /// By the director: NAT as in the tutorials.
    Director,
    /// By the router: DR as in the tutorials.
    Router,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// 1 to 100; more are cut.
    pub servers: u8,
    pub gateway: Gateway,
    /// Real servers hold the VIP on lo with the four ARP settings, as DR needs it.
    pub vip_on_servers: bool,
    /// Client and real servers leave checksums and segmentation to the device. Only for tc: after XDP nobody finishes them.
    pub offload: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { servers: 3, gateway: Gateway::Both, vip_on_servers: true, offload: false }
    }
}

/// Where the networks are: RFC 5737, RFC 2544 and RFC 3849 documentation and test ranges, host part left out.
#[derive(Clone, Copy)]
enum Net {
    Client,
    Front,
    Back,
    /// A VIP's own network, for a VIP on lo.
    Vip,
}

/// Host numbers, the same in every network.
const ROUTER: u8 = 1;
const CLIENT: u8 = 10;
const DIRECTOR: u8 = 20;
const DIRECTOR2: u8 = 21;
const VIP: u8 = 100;
/// rs1 is the next one.
const SERVERS: u8 = 100;
/// The director's for full NAT, in the real servers' network.
const LOCALS: [u8; 2] = [210, 211];

/// nginx on the service's own port, and on another for NAT with port mapping.
pub const HTTP_PORTS: [u16; 2] = [80, 8080];

impl Net {
    fn v4(self, host: u8) -> Ipv4Addr {
        match self {
            Self::Client => Ipv4Addr::new(192, 0, 2, host),
            Self::Front => Ipv4Addr::new(198, 51, 100, host),
            Self::Back => Ipv4Addr::new(203, 0, 113, host),
            Self::Vip => Ipv4Addr::new(198, 18, 0, host),
        }
    }

    fn v6(self, host: u8) -> Ipv6Addr {
        let net = match self {
            Self::Client => 0xc,
            Self::Front => 0xf,
            Self::Back => 0xb,
            Self::Vip => 0xa,
        };
        // The decimal host number spelled as hex digits: 203.0.113.101 goes with 2001:db8:b::101.
        let spelled = u16::from(host / 100) << 8 | u16::from(host / 10 % 10) << 4 | u16::from(host % 10);
        Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, spelled)
    }

    fn hosts(self, host: u8) -> [IpAddr; 2] {
        [self.v4(host).into(), self.v6(host).into()]
    }

    /// Both addresses with the network's prefix.
    fn nets(self, host: u8) -> Vec<IpNet> {
        vec![Ipv4Net::new_assert(self.v4(host), 24).into(), Ipv6Net::new_assert(self.v6(host), 64).into()]
    }
}

impl Layout {
    pub fn topology(self, options: &Options) -> Topology {
        Builder { layout: self, options: *options, topology: Topology::default() }.build()
    }

    /// The director's interfaces that packets of a service come in by.
    pub fn director_interfaces(self) -> &'static [&'static str] {
        match self {
            Self::OneArmed | Self::TwoDirectors => &["lan"],
            Self::TwoArmed | Self::LoopbackVip => &["front", "back"],
            Self::BridgedServers => &["front", "br0"],
        }
    }

    fn one_armed(self) -> bool {
        matches!(self, Self::OneArmed | Self::TwoDirectors)
    }

    fn vip_net(self) -> Net {
        match self {
            Self::LoopbackVip => Net::Vip,
            Self::OneArmed | Self::TwoDirectors => Net::Back,
            Self::TwoArmed | Self::BridgedServers => Net::Front,
        }
    }
}

struct Builder {
    layout: Layout,
    options: Options,
    topology: Topology,
}

impl Builder {
    fn build(mut self) -> Topology {
        self.topology.name = format!("{:?}", self.layout);
        self.topology.vips = self.vips().to_vec();
        self.topology.locals = LOCALS.into_iter().flat_map(|host| Net::Back.hosts(host)).collect();
        self.client_and_router();
        self.switch_or_bridge();
        self.director("director", DIRECTOR, true);
        if self.layout == Layout::TwoDirectors {
            self.director("director2", DIRECTOR2, false);
        }
        for n in 1..=self.options.servers.clamp(1, 100) {
            self.server(n);
        }
        self.topology
    }

    fn vips(&self) -> [IpAddr; 2] {
        self.layout.vip_net().hosts(VIP)
    }

    fn client_and_router(&mut self) {
        let mut router = Node { name: "router".into(), sysctls: forwarding(), ..Node::default() };
        if self.layout == Layout::LoopbackVip {
            let by = Net::Front.hosts(DIRECTOR);
            router.routes = self
                .vips()
                .into_iter()
                .zip(by)
                .map(|(vip, via)| Route { to: Some(vip.into()), via, from: None })
                .collect();
        }
        let client = Node { name: "client".into(), routes: defaults(Net::Client.hosts(ROUTER)), ..Node::default() };
        self.topology.nodes.extend([client, router]);
        let a = self.endpoint("client", "eth0", Net::Client.nets(CLIENT));
        self.link(a, end("router", "client", Net::Client.nets(ROUTER)));
    }

    /// The layer-2 middle that the real servers hang on, with the router's leg.
    fn switch_or_bridge(&mut self) {
        if self.layout != Layout::BridgedServers {
            let floods = self.layout == Layout::TwoDirectors;
            let bridges = vec![Bridge { name: "br0".into(), addresses: Vec::new(), floods }];
            self.topology.nodes.push(Node { name: "switch".into(), bridges, ..Node::default() });
        }
        let port = self.port("router");
        self.link(port, end("router", "back", Net::Back.nets(ROUTER)));
    }

    fn director(&mut self, name: &str, host: u8, holds_vip: bool) {
        let vips: Vec<IpNet> = if holds_vip { self.vips().map(IpNet::from).to_vec() } else { Vec::new() };
        let mut node = Node { name: name.into(), sysctls: forwarding(), ..Node::default() };
        let out = if self.layout.one_armed() { Net::Back } else { Net::Front };
        node.routes = defaults(out.hosts(ROUTER));
        let locals: Vec<IpNet> =
            if holds_vip { self.topology.locals.iter().copied().map(IpNet::from).collect() } else { Vec::new() };
        let mut inner = Net::Back.nets(host);
        inner.extend(&locals);
        let mut outer = end(name, if self.layout.one_armed() { "lan" } else { "front" }, out.nets(host));
        if self.layout.one_armed() {
            outer.addresses.extend(&locals);
        }
        if self.layout == Layout::LoopbackVip {
            node.loopback = vips;
        } else {
            outer.addresses.extend(vips);
        }
        if self.layout == Layout::BridgedServers {
            node.bridges = vec![Bridge { name: "br0".into(), addresses: inner.clone(), floods: false }];
        }
        self.topology.nodes.push(node);
        if self.layout.one_armed() {
            let port = receives_xdp(self.port(name));
            self.link(outer, port);
            return;
        }
        self.link(outer, receives_xdp(end("router", "front", Net::Front.nets(ROUTER))));
        if self.layout != Layout::BridgedServers {
            let port = receives_xdp(self.port(name));
            self.link(end(name, "back", inner), port);
        }
    }

    fn server(&mut self, number: u8) {
        let name = format!("rs{number}");
        let host = SERVERS.saturating_add(number);
        let vips = self.vips();
        let mut node = Node {
            name: name.clone(),
            services: vec![Service::Http { ports: HTTP_PORTS.to_vec() }, Service::Dns],
            ..Node::default()
        };
        if self.options.vip_on_servers {
            node.loopback = vips.map(IpNet::from).to_vec();
            node.sysctls = arp_settings();
        }
        let (director, router) = (Net::Back.hosts(DIRECTOR), Net::Back.hosts(ROUTER));
        node.routes = match self.options.gateway {
            Gateway::Director | Gateway::Both => defaults(director),
            Gateway::Router => defaults(router),
        };
        if self.options.gateway == Gateway::Both {
            let from_vip = |(vip, via)| Route { to: None, via, from: Some(vip) };
            node.routes.extend(vips.into_iter().zip(router).map(from_vip));
        }
        self.topology.nodes.push(node);
        let mut own = self.endpoint(&name, "eth0", Net::Back.nets(host));
        let port = self.port(&name);
        if self.layout == Layout::BridgedServers {
            own = receives_xdp(own);
        }
        self.link(own, port);
    }

    /// A port, named for who is plugged in, of the switch or of the director's bridge.
    fn port(&self, to: &str) -> End {
        let holder = if self.layout == Layout::BridgedServers { "director" } else { "switch" };
        End { bridge: Some("br0".into()), ..end(holder, &format!("to-{to}"), Vec::new()) }
    }

    /// An end whose sockets make the packets that are balanced.
    fn endpoint(&self, node: &str, interface: &str, addresses: Vec<IpNet>) -> End {
        let mut end = end(node, interface, addresses);
        if !self.options.offload {
            // Without `tx` veth takes no TSO either: the kernel finishes checksums and cuts segments before the device.
            end.offload = BTreeMap::from([("tx".to_owned(), false), ("gso".to_owned(), false)]);
        }
        end
    }

    fn link(&mut self, a: End, b: End) {
        self.topology.links.push(Link { ends: [a, b] });
    }
}

fn end(node: &str, interface: &str, addresses: Vec<IpNet>) -> End {
    End { node: node.into(), interface: interface.into(), addresses, ..End::default() }
}

/// The far end of an interface that XDP programs send into: veth drops what they send unless that end has a NAPI
/// instance, which GRO gives it.
fn receives_xdp(mut end: End) -> End {
    end.offload.insert("gro".to_owned(), true);
    end
}

fn defaults(via: [IpAddr; 2]) -> Vec<Route> {
    via.map(|via| Route { to: None, via, from: None }).to_vec()
}

fn settings(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// A router, as IPVS's NAT wants the director to be; no redirects, which would lead replies past a one-armed director.
fn forwarding() -> Vec<(String, String)> {
    settings(&[
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
        ("net/ipv6/conf/all/forwarding", "1"),
    ])
}

/// A real server of DR holds the VIP but answers and announces nothing for it (the effective value is the larger of
/// `all` and the interface's; `default` is what new interfaces start with).
fn arp_settings() -> Vec<(String, String)> {
    settings(&[
        ("net/ipv4/conf/all/arp_ignore", "1"),
        ("net/ipv4/conf/all/arp_announce", "2"),
        ("net/ipv4/conf/default/arp_ignore", "1"),
        ("net/ipv4/conf/default/arp_announce", "2"),
    ])
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_layout_is_sound_and_has_what_it_names() {
        for &layout in Layout::value_variants() {
            let topology = layout.topology(&Options { servers: 4, ..Options::default() });
            topology.check().unwrap();
            assert_eq!(topology.servers().count(), 4, "{layout:?}");
            for interface in layout.director_interfaces() {
                let on_link = topology.ends("director").any(|e| e.interface == *interface);
                let bridge = topology.node("director").is_some_and(|n| n.bridges.iter().any(|b| b.name == *interface));
                assert!(on_link || bridge, "{layout:?} {interface}");
            }
            for ipv6 in [false, true] {
                let vip = topology.vip(ipv6).unwrap();
                let holds = |node: &str| {
                    let lo = topology.node(node).into_iter().flat_map(|n| &n.loopback);
                    lo.chain(topology.ends(node).flat_map(|e| &e.addresses)).any(|a| a.addr() == vip)
                };
                assert!(holds("director") && holds("rs4"), "{layout:?} {vip}");
                assert!(!holds("director2"), "the second director is the backup");
            }
        }
    }

    #[test]
    fn what_xdp_sends_into_is_able_to_receive_it() {
        for &layout in Layout::value_variants() {
            let topology = layout.topology(&Options::default());
            for link in &topology.links {
                let far = |n: usize| &link.ends[1 - n];
                for (n, end) in link.ends.iter().enumerate() {
                    if end.node.starts_with("director") && far(n).node != "router"
                        || end.interface == "front" && end.node == "director"
                    {
                        assert_eq!(far(n).offload.get("gro"), Some(&true), "{layout:?} {end:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn both_families_spell_a_host_alike() {
        assert_eq!(Net::Back.v4(101).to_string(), "203.0.113.101");
        assert_eq!(Net::Back.v6(101).to_string(), "2001:db8:b::101");
    }
}
