//! rtnetlink messages into `rvs_control::net` values. Total: an odd message is `None`, never a panic.

use std::net::IpAddr;

use netlink_packet_core::{NetlinkBuffer, NetlinkDeserializable, NetlinkHeader};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, VlanProtocol,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
    NeighbourState as RawState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rvs_control::net::{Addr, FdbEntry, Link, Mac, Neighbour, NeighbourState, Route, RouteKind, Scope, VlanTag};

use super::NetEvent;

/// Devices whose `IFLA_LINK` is the interface below (a veth's is its peer, a tunnel's its carrier).
const STACKED: [&str; 5] = ["vlan", "macvlan", "macvtap", "ipvlan", "macsec"];

pub(super) fn link(message: &LinkMessage) -> Option<Link> {
    let flags = message.header.flags;
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        kind: String::new(),
        master: None,
        port_kind: String::new(),
        lower: None,
        vlan: None,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::Running),
        loopback: flags.contains(LinkFlags::Loopback),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        noarp: flags.contains(LinkFlags::Noarp),
    };
    let mut elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = Mac::from_bytes(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) if *index != 0 => link.master = Some(*index),
            LinkAttribute::Link(index) if *index != 0 => link.lower = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| link_info(&mut link, info)),
            _ => {}
        }
    }
    if elsewhere || !STACKED.contains(&link.kind.as_str()) {
        link.lower = None;
    }
    (link.ifindex != 0 && !link.name.is_empty()).then_some(link)
}

fn link_info(link: &mut Link, info: &LinkInfo) {
    match info {
        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
        LinkInfo::PortKind(kind) => link.port_kind = kind.to_string(),
        LinkInfo::Data(InfoData::Vlan(parts)) => {
            let id = parts.iter().find_map(|p| if let InfoVlan::Id(id) = p { Some(*id) } else { None });
            let tpid = parts.iter().find_map(|p| if let InfoVlan::Protocol(p) = p { Some(*p) } else { None });
            link.vlan = id.map(|id| VlanTag { id, tpid: u16::from(tpid.unwrap_or(VlanProtocol::Ieee8021Q)) });
        }
        _ => {}
    }
}

pub(super) fn addr(message: &AddressMessage) -> Option<Addr> {
    let mut address = None;
    let mut local = None;
    let mut addr = Addr {
        ifindex: message.header.index,
        ip: IpAddr::from([0, 0, 0, 0]),
        prefix_len: message.header.prefix_len,
        scope: scope(message.header.scope),
        flags: u32::from(message.header.flags.bits()),
        label: None,
        broadcast: None,
        peer: None,
        preferred_s: u32::MAX,
        valid_s: u32::MAX,
    };
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Label(label) => addr.label = Some(label.clone()),
            AddressAttribute::Broadcast(ip) => addr.broadcast = Some(*ip),
            AddressAttribute::Flags(flags) => addr.flags = flags.bits(),
            AddressAttribute::CacheInfo(info) => {
                addr.preferred_s = info.ifa_preferred;
                addr.valid_s = info.ifa_valid;
            }
            _ => {}
        }
    }
    addr.ip = local.or(address)?;
    addr.peer = address.filter(|peer| *peer != addr.ip);
    Some(addr)
}

fn scope(raw: AddressScope) -> Scope {
    match raw {
        AddressScope::Universe => Scope::Global,
        AddressScope::Site => Scope::Site,
        AddressScope::Link => Scope::Link,
        AddressScope::Host => Scope::Host,
        other => Scope::Other(other.into()),
    }
}

pub(super) fn raw_scope(scope: Scope) -> AddressScope {
    match scope {
        Scope::Global => AddressScope::Universe,
        Scope::Site => AddressScope::Site,
        Scope::Link => AddressScope::Link,
        Scope::Host => AddressScope::Host,
        Scope::Other(number) => AddressScope::from(number),
    }
}

/// `None` for proxy entries, other families and states this does not know.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    let managed = message
        .attributes
        .iter()
        .any(|a| matches!(a, NeighbourAttribute::ExtFlags(flags) if flags.contains(NeighbourExtFlags::Managed)));
    let state = match message.header.state {
        RawState::None => NeighbourState::None,
        RawState::Incomplete => NeighbourState::Incomplete,
        RawState::Reachable => NeighbourState::Reachable,
        RawState::Stale => NeighbourState::Stale,
        RawState::Delay => NeighbourState::Delay,
        RawState::Probe => NeighbourState::Probe,
        RawState::Failed => NeighbourState::Failed,
        RawState::Noarp => NeighbourState::NoArp,
        RawState::Permanent => NeighbourState::Permanent,
        _ => return None,
    };
    Some(Neighbour { ifindex: message.header.ifindex, ip, mac: link_address(message), state, managed })
}

fn link_address(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => Mac::from_bytes(bytes),
        _ => None,
    })
}

/// `None` for entries of no bridge, and for a bridge's own addresses (permanent ones).
pub(super) fn fdb_entry(message: &NeighbourMessage) -> Option<FdbEntry> {
    if message.header.family != AddressFamily::Bridge || message.header.state == RawState::Permanent {
        return None;
    }
    let mut bridge = None;
    let mut vlan = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Controller(index) => bridge = Some(*index),
            NeighbourAttribute::Vlan(id) => vlan = Some(*id),
            _ => {}
        }
    }
    let (bridge, port) = (bridge?, message.header.ifindex);
    (port != bridge).then_some(FdbEntry { bridge, port, mac: link_address(message)?, vlan })
}

pub(super) fn route(message: &RouteMessage) -> Route {
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Local => RouteKind::Local,
        RouteType::Broadcast => RouteKind::Broadcast,
        RouteType::Anycast => RouteKind::Anycast,
        RouteType::Multicast => RouteKind::Multicast,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::Prohibit => RouteKind::Prohibit,
        other => RouteKind::Other(other.into()),
    };
    let mut route = Route::none(kind);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.ifindex = Some(*index),
            RouteAttribute::PrefSource(address) => route.pref_src = ip(address),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None });
            }
            other => route.gateway = route.gateway.or(gateway(other)),
        }
    }
    route
}

/// The default routes in one message of a dump: one, or each leg of a multipath route; none unless it is a unicast
/// default route of the main table.
pub(super) fn default_routes(message: &RouteMessage) -> Vec<Route> {
    let main = message.header.table == RouteHeader::RT_TABLE_MAIN;
    if !main || message.header.destination_prefix_length != 0 || message.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let whole = route(message);
    let legs = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(legs) => Some(legs),
        _ => None,
    });
    let Some(legs) = legs else { return vec![whole] };
    legs.iter()
        .map(|leg| Route {
            ifindex: Some(leg.interface_index),
            gateway: leg.attributes.iter().find_map(gateway),
            ..whole.clone()
        })
        .collect()
}

fn gateway(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Via(RouteVia::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

const NLMSG_OVERRUN: u16 = 4;
/// `RTM_{NEW,DEL}{LINK,ADDR,ROUTE,NEIGH,RULE,NEXTHOP}` (include/uapi/linux/rtnetlink.h).
const RTM_LINK: [u16; 2] = [16, 17];
const RTM_ADDR: [u16; 2] = [20, 21];
const RTM_ROUTE: [u16; 2] = [24, 25];
const RTM_NEIGH: [u16; 2] = [28, 29];
const RTM_RULE: [u16; 2] = [32, 33];
const RTM_NEXTHOP: [u16; 2] = [104, 105];

/// The events in one datagram of a multicast socket. Whatever can't be read is a `Resync`: the caller then learns by
/// asking what it could not learn by listening.
pub fn events(datagram: &[u8]) -> Vec<NetEvent> {
    let mut events = Vec::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let Ok(message) = NetlinkBuffer::new_checked(rest) else {
            events.push(NetEvent::Resync);
            break;
        };
        let length = message.length() as usize;
        events.extend(event(message.message_type(), message.payload()));
        // Messages are padded to four bytes, the last one need not be.
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    events
}

fn event(kind: u16, payload: &[u8]) -> Option<NetEvent> {
    if RTM_ROUTE.contains(&kind) || RTM_NEXTHOP.contains(&kind) {
        return Some(NetEvent::Route);
    }
    if RTM_RULE.contains(&kind) {
        return Some(NetEvent::Rule);
    }
    if kind == NLMSG_OVERRUN {
        return Some(NetEvent::Resync);
    }
    if !RTM_LINK.contains(&kind) && !RTM_ADDR.contains(&kind) && !RTM_NEIGH.contains(&kind) {
        return None;
    }
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    match RouteNetlinkMessage::deserialize(&header, payload) {
        Ok(message) => known_event(&message),
        Err(_) => Some(NetEvent::Resync),
    }
}

fn known_event(message: &RouteNetlinkMessage) -> Option<NetEvent> {
    match message {
        // A bridge port's own notices come as links of family AF_BRIDGE; "gone" there is "left the bridge".
        RouteNetlinkMessage::NewLink(m) => Some(NetEvent::Link { ifindex: m.header.index, gone: false }),
        RouteNetlinkMessage::DelLink(m) => {
            Some(NetEvent::Link { ifindex: m.header.index, gone: m.header.interface_family != AddressFamily::Bridge })
        }
        RouteNetlinkMessage::NewAddress(m) => addr_event(m, false),
        RouteNetlinkMessage::DelAddress(m) => addr_event(m, true),
        RouteNetlinkMessage::NewNeighbour(m) => neighbour_event(m, false),
        RouteNetlinkMessage::DelNeighbour(m) => neighbour_event(m, true),
        _ => None,
    }
}

fn addr_event(message: &AddressMessage, gone: bool) -> Option<NetEvent> {
    addr(message).map(|addr| NetEvent::Addr { ifindex: addr.ifindex, ip: addr.ip, gone })
}

fn neighbour_event(message: &NeighbourMessage, gone: bool) -> Option<NetEvent> {
    if message.header.family == AddressFamily::Bridge {
        return Some(NetEvent::Fdb);
    }
    neighbour(message).map(|entry| NetEvent::Neighbour { entry, gone })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, NetlinkMessage};
    use proptest::prelude::*;

    use super::*;

    fn datagram(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message = NetlinkMessage::from(message);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn new_addr() -> Vec<u8> {
        let mut m = AddressMessage::default();
        m.header.family = AddressFamily::Inet;
        m.header.prefix_len = 32;
        m.header.index = 7;
        m.attributes.push(AddressAttribute::Local(IpAddr::from([10, 0, 0, 1])));
        assert!(m.buffer_len() > 8);
        datagram(RouteNetlinkMessage::NewAddress(m))
    }

    #[test]
    fn a_vlan_is_known_by_tag_and_lower_link() {
        let mut m = LinkMessage::default();
        m.header.index = 5;
        m.header.link_layer_type = LinkLayerType::Ether;
        m.attributes = vec![
            LinkAttribute::IfName("eth0.10".into()),
            LinkAttribute::Link(2),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(netlink_packet_route::link::InfoKind::Vlan),
                LinkInfo::Data(InfoData::Vlan(vec![InfoVlan::Id(10), InfoVlan::Protocol(VlanProtocol::Ieee8021Ad)])),
            ]),
        ];
        let got = link(&m).expect("a link");
        assert_eq!((got.vlan, got.lower), (Some(VlanTag { id: 10, tpid: 0x88a8 }), Some(2)));
        m.attributes.push(LinkAttribute::LinkNetNsId(1));
        assert_eq!(link(&m).expect("a link").lower, None, "the lower link is in another namespace");
    }

    #[test]
    fn several_messages_of_one_datagram_are_all_seen() {
        let mut bytes = new_addr();
        bytes.extend(datagram(RouteNetlinkMessage::DelRoute(RouteMessage::default())));
        let want = [NetEvent::Addr { ifindex: 7, ip: IpAddr::from([10, 0, 0, 1]), gone: false }, NetEvent::Route];
        assert_eq!(events(&bytes), want);
    }

    #[test]
    fn what_cannot_be_read_is_a_resync() {
        let bytes = new_addr();
        assert_eq!(events(&bytes[..bytes.len() - 1]), [NetEvent::Resync]);
        let mut short = new_addr();
        short[16 + 8] = 200; // an attribute longer than its message
        assert_eq!(events(&short), [NetEvent::Resync]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_without_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 16u16..40) {
            let _ = events(&bytes);
            // The same with an honest header, so that the payload is looked at.
            if bytes.len() >= 16 {
                let length = bytes.len() as u32;
                bytes[..4].copy_from_slice(&length.to_ne_bytes());
                bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
                let _ = events(&bytes);
            }
        }
    }
}
