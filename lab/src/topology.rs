//! What a lab is made of, as data: nodes (network namespaces), links (veth pairs), and what runs on them.
//!
//! A topology says nothing about how it is built; [`crate::Lab`] is the one engine that builds any of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// IFNAMSIZ of linux/if.h, less the final zero.
const MAX_INTERFACE: usize = 15;

/// Longest node name: it becomes part of a file name beside the lab's own name.
const MAX_NODE: usize = 32;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// For messages.
    pub name: String,
    /// The addresses that clients use, IPv4 first.
    pub vips: Vec<IpAddr>,
    /// The director's addresses for full NAT.
    #[serde(default)]
    pub locals: Vec<IpAddr>,
    pub nodes: Vec<Node>,
    pub links: Vec<Link>,
}

/// One network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    /// Addresses on lo beside 127.0.0.1 and ::1.
    pub loopback: Vec<IpNet>,
    pub bridges: Vec<Bridge>,
    /// Path below /proc/sys and value, set before any interface is made.
    pub sysctls: Vec<(String, String)>,
    pub routes: Vec<Route>,
    pub services: Vec<Service>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    pub name: String,
    pub addresses: Vec<IpNet>,
    /// Learns nothing: every frame goes out of every port, as from a hub.
    pub floods: bool,
}

/// A veth pair.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub ends: [End; 2],
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub node: String,
    pub interface: String,
    pub addresses: Vec<IpNet>,
    /// The bridge of the node that this end is a port of.
    pub bridge: Option<String>,
    /// `ethtool -K` settings that differ from the default: feature and whether it is on.
    pub offload: BTreeMap<String, bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// `None`: the default route of the gateway's family.
    pub to: Option<IpNet>,
    pub via: IpAddr,
    /// Only for packets with this source address, by a routing rule.
    pub from: Option<IpAddr>,
}

/// A real server's program. It tells the node's name, so that the client knows who answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Service {
    /// nginx: `/` answers `NAME CLIENT SERVER:PORT\n`, `/payload` a big file, `PUT /upload/NAME` keeps what was sent.
    Http { ports: Vec<u16> },
    /// dnsmasq: a TXT question for [`crate::load::DNS_NAME`] is answered with the node's name, over UDP.
    Dns,
}

impl Topology {
    /// The nodes that run a service, in order.
    pub fn servers(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|n| !n.services.is_empty())
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|n| n.name == name)
    }

    /// All link ends of a node.
    pub fn ends<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a End> {
        self.links.iter().flat_map(|l| &l.ends).filter(move |e| e.node == node)
    }

    /// The first address of a family on the node's interfaces (lo and bridges excepted), or on its bridges.
    pub fn address(&self, node: &str, ipv6: bool) -> Option<IpAddr> {
        let on_bridges = self.node(node).into_iter().flat_map(|n| n.bridges.iter().flat_map(|b| &b.addresses));
        let on_links = self.ends(node).flat_map(|e| &e.addresses);
        on_links.chain(on_bridges).map(IpNet::addr).find(|a| a.is_ipv6() == ipv6)
    }

    /// The VIP of a family.
    pub fn vip(&self, ipv6: bool) -> Option<IpAddr> {
        self.vips.iter().copied().find(|a| a.is_ipv6() == ipv6)
    }

    /// The director's addresses of a family for full NAT.
    pub fn locals(&self, ipv6: bool) -> impl Iterator<Item = IpAddr> + '_ {
        self.locals.iter().copied().filter(move |a| a.is_ipv6() == ipv6)
    }

    /// Names that fit, are unique, and mean something.
    pub fn check(&self) -> Result<()> {
        self.contradiction().map_or(Ok(()), |why| Err(Error::Topology { topology: self.name.clone(), why }))
    }

    fn contradiction(&self) -> Option<String> {
        let mut nodes = BTreeSet::new();
        for node in &self.nodes {
            if !is_name(&node.name, MAX_NODE) {
                return Some(format!("'{}' is no node name: up to {MAX_NODE} letters, digits and '-'", node.name));
            }
            if !nodes.insert(&node.name) {
                return Some(format!("there are two nodes {}", node.name));
            }
            if let Some(bridge) = node.bridges.iter().find(|b| !is_name(&b.name, MAX_INTERFACE)) {
                return Some(format!("'{}' of {} is no bridge name", bridge.name, node.name));
            }
        }
        let mut interfaces = BTreeSet::new();
        for end in self.links.iter().flat_map(|l| &l.ends) {
            let Some(node) = self.node(&end.node) else {
                return Some(format!("a link ends at {}, which is no node", end.node));
            };
            if !is_name(&end.interface, MAX_INTERFACE) {
                return Some(format!("'{}' of {} is no interface name", end.interface, end.node));
            }
            if !interfaces.insert((&end.node, &end.interface)) {
                return Some(format!("{} has two interfaces {}", end.node, end.interface));
            }
            if let Some(bridge) = &end.bridge
                && !node.bridges.iter().any(|b| b.name == *bridge)
            {
                return Some(format!("{} has no bridge {bridge}", end.node));
            }
        }
        None
    }
}

/// A name that is safe as part of a file name, a command's word and an interface's name.
pub(crate) fn is_name(name: &str, longest: usize) -> bool {
    !name.is_empty()
        && name.len() <= longest
        && !name.starts_with('-')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(a: (&str, &str), b: (&str, &str)) -> Link {
        let end =
            |(node, interface): (&str, &str)| End { node: node.into(), interface: interface.into(), ..End::default() };
        Link { ends: [end(a), end(b)] }
    }

    fn pair() -> Topology {
        let node = |name: &str| Node { name: name.into(), ..Node::default() };
        Topology {
            nodes: vec![node("a"), node("b")],
            links: vec![link(("a", "eth0"), ("b", "eth0"))],
            ..Topology::default()
        }
    }

    #[test]
    fn a_sound_topology_passes_and_each_contradiction_is_named() {
        assert!(pair().check().is_ok());
        type Spoil = fn(&mut Topology);
        let broken: [(&str, Spoil); 6] = [
            ("two nodes a", |t| t.nodes[1].name = "a".into()),
            ("no node name", |t| t.nodes[1].name = "../b".into()),
            ("which is no node", |t| t.links[0].ends[1].node = "c".into()),
            ("two interfaces eth0", |t| t.links.push(link(("a", "eth0"), ("b", "eth1")))),
            ("no interface name", |t| t.links[0].ends[0].interface = "an-interface-too-long".into()),
            ("no bridge br0", |t| t.links[0].ends[0].bridge = Some("br0".into())),
        ];
        for (why, spoil) in broken {
            let mut topology = pair();
            spoil(&mut topology);
            let error = topology.check().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
