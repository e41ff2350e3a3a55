//! [`Net`] by the kernel.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, CacheInfo};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState as RawState,
};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use rvs_control::net::{Addr, FdbEntry, Link, Neighbour, NeighbourState, Route, RouteKind, RouteQuery};

use super::{AddrAdded, Kept, KernelWatch, Net, NetError, decode};

/// How long the kernel may take to answer one request. It answers at once; what this catches is an answer that could
/// not be decoded, which the connection drops.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// `NLM_F_DUMP_INTR`: a table changed while it was dumped, so the dump may lack or repeat entries.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often a dump is tried again when that happens.
const DUMP_TRIES: usize = 8;

/// A handle on the rtnetlink of one network namespace. Clones share one socket.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: rtnetlink::Handle,
}

impl Netlink {
    /// Open in the calling thread's network namespace, for good: a later `setns` changes nothing. Must be called
    /// inside a tokio runtime with I/O and time; the connection lives as a task there until the last clone is gone.
    ///
    /// # Errors
    /// [`NetError::Open`].
    pub fn open() -> Result<Self, NetError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::Open)?;
        drop(tokio::spawn(connection));
        Ok(Self { handle })
    }

    async fn dump(&self, op: &str, message: Rtnl) -> Result<Vec<Rtnl>, NetError> {
        for _ in 0..DUMP_TRIES {
            let (answers, interrupted) = self.ask(op, message.clone(), NLM_F_DUMP).await?;
            if !interrupted {
                return Ok(answers);
            }
        }
        Err(NetError::Interrupted { op: op.into() })
    }

    async fn change(&self, op: &str, message: Rtnl, flags: u16) -> Result<(), NetError> {
        self.ask(op, message, NLM_F_ACK | flags).await.map(|_| ())
    }

    /// One request and all its answers; whether the kernel marked any as inconsistent.
    async fn ask(&self, op: &str, message: Rtnl, flags: u16) -> Result<(Vec<Rtnl>, bool), NetError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let closed = || NetError::Closed { op: op.into() };
        let mut replies = self.handle.clone().request(request).map_err(|_| closed())?;
        let collect = async {
            let mut answers = Vec::new();
            let mut interrupted = false;
            while let Some(reply) = replies.next().await {
                interrupted |= reply.header.flags & NLM_F_DUMP_INTR != 0;
                match reply.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(NetError::Refused { op: op.into(), source: error.to_io() });
                    }
                    _ => {}
                }
            }
            Ok((answers, interrupted))
        };
        tokio::time::timeout(REPLY_TIMEOUT, collect)
            .await
            .unwrap_or_else(|_| Err(NetError::NoReply { op: op.into(), seconds: REPLY_TIMEOUT.as_secs() }))
    }

    async fn neighbour_dump(&self, op: &str, family: AddressFamily) -> Result<Vec<NeighbourMessage>, NetError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        let answers = self.dump(op, Rtnl::GetNeighbour(message)).await?;
        Ok(answers.into_iter().filter_map(|a| if let Rtnl::NewNeighbour(m) = a { Some(m) } else { None }).collect())
    }

    async fn addr_messages(&self) -> Result<Vec<AddressMessage>, NetError> {
        let answers = self.dump("read addresses", Rtnl::GetAddress(AddressMessage::default())).await?;
        Ok(answers.into_iter().filter_map(|a| if let Rtnl::NewAddress(m) = a { Some(m) } else { None }).collect())
    }
}

impl Net for Netlink {
    type Watch = KernelWatch;

    async fn links(&self) -> Result<Vec<Link>, NetError> {
        let answers = self.dump("read links", Rtnl::GetLink(LinkMessage::default())).await?;
        Ok(answers.iter().filter_map(|a| if let Rtnl::NewLink(m) = a { decode::link(m) } else { None }).collect())
    }

    async fn addrs(&self) -> Result<Vec<Addr>, NetError> {
        Ok(self.addr_messages().await?.iter().filter_map(decode::addr).collect())
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, NetError> {
        let dump = self.neighbour_dump("read neighbours", AddressFamily::Unspec).await?;
        Ok(dump.iter().filter_map(decode::neighbour).collect())
    }

    async fn neighbour(&self, ifindex: u32, ip: IpAddr) -> Result<Option<Neighbour>, NetError> {
        let op = format!("read neighbour {ip} of interface {ifindex}");
        match self.ask(&op, Rtnl::GetNeighbour(neighbour_message(ifindex, ip)), 0).await {
            Ok((answers, _)) => {
                Ok(answers.iter().find_map(|a| if let Rtnl::NewNeighbour(m) = a { decode::neighbour(m) } else { None }))
            }
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn fdb(&self) -> Result<Vec<FdbEntry>, NetError> {
        let dump = self.neighbour_dump("read bridge forwarding tables", AddressFamily::Bridge).await?;
        Ok(dump.iter().filter_map(decode::fdb_entry).collect())
    }

    async fn route_to(&self, query: RouteQuery) -> Result<Route, NetError> {
        let op = format!("look up the route to {}", query.dst);
        match self.ask(&op, Rtnl::GetRoute(route_message(query)), 0).await {
            Ok((answers, _)) => Ok(answers
                .iter()
                .find_map(|a| if let Rtnl::NewRoute(m) = a { Some(decode::route(m)) } else { None })
                .unwrap_or_else(|| Route::none(RouteKind::NoRoute))),
            Err(error) => error.errno().and_then(refusing_route).map(Route::none).ok_or(error),
        }
    }

    async fn ipv4_default_routes(&self) -> Result<Vec<Route>, NetError> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        let answers = self.dump("read routes", Rtnl::GetRoute(message)).await?;
        let messages = answers.iter().filter_map(|a| if let Rtnl::NewRoute(m) = a { Some(m) } else { None });
        Ok(messages.flat_map(decode::default_routes).collect())
    }

    async fn keep_neighbour(&self, ifindex: u32, ip: IpAddr) -> Result<Kept, NetError> {
        // Marking a permanent entry as managed would take its permanence away (__neigh_update).
        if self.neighbour(ifindex, ip).await?.is_some_and(|n| n.state == NeighbourState::Permanent) {
            return Ok(Kept::Static);
        }
        let op = format!("keep neighbour {ip} of interface {ifindex} resolved");
        let mut managed = neighbour_message(ifindex, ip);
        managed.attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        match self.change(&op, Rtnl::NewNeighbour(managed), NLM_F_CREATE | NLM_F_REPLACE).await {
            Ok(()) => Ok(Kept::Managed),
            Err(error) if matches!(error.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                self.change(&op, Rtnl::NewNeighbour(probe(ifindex, ip)), NLM_F_CREATE | NLM_F_REPLACE).await?;
                Ok(Kept::Probed)
            }
            Err(error) => Err(error),
        }
    }

    async fn forget_neighbour(&self, ifindex: u32, ip: IpAddr) -> Result<(), NetError> {
        if !self.neighbour(ifindex, ip).await?.is_some_and(|n| n.managed) {
            return Ok(());
        }
        // A replacement without the flag clears it and, because of NTF_USE, leaves state and MAC as they are.
        let op = format!("stop keeping neighbour {ip} of interface {ifindex}");
        match self.change(&op, Rtnl::NewNeighbour(probe(ifindex, ip)), NLM_F_REPLACE).await {
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    async fn add_addr(&self, addr: &Addr) -> Result<AddrAdded, NetError> {
        let op = format!("add address {}/{} to interface {}", addr.ip, addr.prefix_len, addr.ifindex);
        match self.change(&op, Rtnl::NewAddress(addr_message(addr)), NLM_F_CREATE | NLM_F_EXCL).await {
            Ok(()) => Ok(AddrAdded::Added),
            // IPv6 says EEXIST whatever the prefix length: then it is not the address that was asked for.
            Err(error) if error.errno() == Some(libc::EEXIST) => {
                let there = self.addrs().await?.into_iter().any(|a| same(&a, addr.ifindex, addr.ip, addr.prefix_len));
                if there { Ok(AddrAdded::AlreadyThere) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }

    async fn del_addr(&self, ifindex: u32, ip: IpAddr, prefix_len: u8) -> Result<Option<Addr>, NetError> {
        let messages = self.addr_messages().await?;
        let found = messages.into_iter().find_map(|m| {
            let addr = decode::addr(&m)?;
            same(&addr, ifindex, ip, prefix_len).then_some((addr, m))
        });
        let Some((addr, message)) = found else { return Ok(None) };
        let op = format!("delete address {ip}/{prefix_len} from interface {ifindex}");
        match self.change(&op, Rtnl::DelAddress(message), 0).await {
            Ok(()) => Ok(Some(addr)),
            Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn watch(&self) -> Result<KernelWatch, NetError> {
        KernelWatch::open()
    }
}

fn same(addr: &Addr, ifindex: u32, ip: IpAddr, prefix_len: u8) -> bool {
    addr.ifindex == ifindex && addr.ip == ip && addr.prefix_len == prefix_len
}

/// The kernel answers a query for a route that refuses by that route's error (`fib_props`, `ip6_route_info_create`).
fn refusing_route(errno: i32) -> Option<RouteKind> {
    match errno {
        libc::ENETUNREACH => Some(RouteKind::NoRoute),
        libc::EHOSTUNREACH => Some(RouteKind::Unreachable),
        libc::EACCES => Some(RouteKind::Prohibit),
        libc::EINVAL => Some(RouteKind::Blackhole),
        _ => None,
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn neighbour_message(ifindex: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = ifindex;
    message.header.state = RawState::None;
    message.attributes.push(NeighbourAttribute::Destination(ip.into()));
    message
}

/// `NTF_USE`: as if a packet had been sent there.
fn probe(ifindex: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = neighbour_message(ifindex, ip);
    message.header.flags = NeighbourFlags::Use;
    message
}

fn route_message(query: RouteQuery) -> RouteMessage {
    let mut message = RouteMessage::default();
    let host = if query.dst.is_ipv4() { 32 } else { 128 };
    message.header.address_family = family(query.dst);
    message.header.destination_prefix_length = host;
    message.attributes.push(RouteAttribute::Destination(query.dst.into()));
    if let Some(src) = query.src {
        message.header.source_prefix_length = host;
        message.attributes.push(RouteAttribute::Source(src.into()));
    }
    message.attributes.extend(query.oif.map(RouteAttribute::Oif));
    message.attributes.extend(query.mark.map(RouteAttribute::Mark));
    message
}

fn addr_message(addr: &Addr) -> AddressMessage {
    // The others (tentative, permanent, secondary, ...) are the kernel's to set.
    let settable =
        AddressFlags::Nodad | AddressFlags::Homeaddress | AddressFlags::Managetempaddr | AddressFlags::Noprefixroute;
    let mut message = AddressMessage::default();
    message.header.family = family(addr.ip);
    message.header.prefix_len = addr.prefix_len;
    message.header.flags = AddressHeaderFlags::empty();
    message.header.scope = decode::raw_scope(addr.scope);
    message.header.index = addr.ifindex;
    message.attributes.push(AddressAttribute::Local(addr.ip));
    message.attributes.push(AddressAttribute::Address(addr.peer.unwrap_or(addr.ip)));
    message.attributes.extend(addr.broadcast.map(AddressAttribute::Broadcast));
    message.attributes.extend(addr.label.clone().map(AddressAttribute::Label));
    message.attributes.push(AddressAttribute::Flags(AddressFlags::from_bits_retain(addr.flags) & settable));
    if (addr.preferred_s, addr.valid_s) != (u32::MAX, u32::MAX) {
        let mut info = CacheInfo::default();
        info.ifa_preferred = addr.preferred_s;
        info.ifa_valid = addr.valid_s;
        message.attributes.push(AddressAttribute::CacheInfo(info));
    }
    message
}
