//! The network of one namespace over rtnetlink: links, addresses, neighbours, routes, and what changes in them.
//!
//! [`Net`] is the seam: [`Netlink`] is the kernel, [`fake::FakeNet`] a network in memory that fails where told.
//! Nothing here decides; the values are `rvs_control::net`, the decisions `rvs_control::{nexthop, realserver}`.

use std::future::Future;
use std::io;
use std::net::IpAddr;

use rvs_control::net::{Addr, FdbEntry, Link, Neighbour, Route, RouteQuery};

mod decode;
pub mod fake;
mod kernel;
mod watch;

pub use decode::events;
pub use kernel::Netlink;
pub use watch::KernelWatch;

/// What went wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] io::Error),
    /// The kernel refused; `op` says what was asked, with its operands.
    #[error("{op}: {}{}", .source, hint(.source))]
    Refused { op: String, source: io::Error },
    #[error("{op}: the netlink connection is closed")]
    Closed { op: String },
    #[error("{op}: no answer from the kernel in {seconds} s")]
    NoReply { op: String, seconds: u64 },
    #[error("{op}: the tables kept changing while they were read")]
    Interrupted { op: String },
    /// Only from [`fake::FakeNet`].
    #[error("{op}: failed on purpose (operation {nth})")]
    Injected { op: String, nth: u64 },
}

impl NetError {
    /// The kernel's errno, where it refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Open(source) => source.raw_os_error(),
            Self::Closed { .. } | Self::NoReply { .. } | Self::Interrupted { .. } | Self::Injected { .. } => None,
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => " (run as root, or with CAP_NET_ADMIN)",
        _ => "",
    }
}

/// How a neighbour is kept resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// By the kernel (`NTF_EXT_MANAGED`).
    Managed,
    /// It is a permanent entry set by the administrator; nothing was changed.
    Static,
    /// The kernel knows no managed entries: it was probed once, and the caller has to ask again in time.
    Probed,
}

/// What adding an address did, and so what undoes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddrAdded {
    /// Undo: delete it.
    Added,
    /// The same address and prefix was on the interface before; nothing was changed. Undo: nothing.
    AlreadyThere,
}

/// Something changed. Names only what to look at again; `Resync` means everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetEvent {
    Link {
        ifindex: u32,
        gone: bool,
    },
    Addr {
        ifindex: u32,
        ip: IpAddr,
        gone: bool,
    },
    Neighbour {
        entry: Neighbour,
        gone: bool,
    },
    /// A route or next-hop object.
    Route,
    Rule,
    /// A bridge's forwarding database.
    Fdb,
    /// Events were lost (the socket's buffer overflowed, or one could not be read): read everything again.
    Resync,
}

/// A source of [`NetEvent`]s.
pub trait Watch: Send {
    /// The next event. Cancel-safe: dropping the future loses nothing.
    ///
    /// # Errors
    /// [`NetError::Refused`] when the socket broke; there are no further events then.
    fn next(&mut self) -> impl Future<Output = Result<NetEvent, NetError>> + Send;
}

/// The network of one namespace. Every method is one question or one change; errors name both.
pub trait Net: Send + Sync {
    type Watch: Watch;

    fn links(&self) -> impl Future<Output = Result<Vec<Link>, NetError>> + Send;

    /// All addresses of all interfaces, lo included.
    fn addrs(&self) -> impl Future<Output = Result<Vec<Addr>, NetError>> + Send;

    /// ARP and neighbour-discovery entries of all interfaces.
    fn neighbours(&self) -> impl Future<Output = Result<Vec<Neighbour>, NetError>> + Send;

    /// One neighbour entry, if there is one.
    fn neighbour(&self, ifindex: u32, ip: IpAddr) -> impl Future<Output = Result<Option<Neighbour>, NetError>> + Send;

    /// What the bridges have learnt; their own addresses are left out.
    fn fdb(&self) -> impl Future<Output = Result<Vec<FdbEntry>, NetError>> + Send;

    /// How the kernel would route a packet now, by all rules and tables. No route is an answer
    /// ([`rvs_control::net::RouteKind`]), not an error.
    fn route_to(&self, query: RouteQuery) -> impl Future<Output = Result<Route, NetError>> + Send;

    /// The IPv4 default routes of the main table; of a multipath route each leg.
    fn ipv4_default_routes(&self) -> impl Future<Output = Result<Vec<Route>, NetError>> + Send;

    /// Have the kernel find out `ip`'s MAC address on `ifindex`, and keep it known.
    fn keep_neighbour(&self, ifindex: u32, ip: IpAddr) -> impl Future<Output = Result<Kept, NetError>> + Send;

    /// Leave the entry to the kernel's ageing again. No error when there is none.
    fn forget_neighbour(&self, ifindex: u32, ip: IpAddr) -> impl Future<Output = Result<(), NetError>> + Send;

    /// Add exactly this address.
    fn add_addr(&self, addr: &Addr) -> impl Future<Output = Result<AddrAdded, NetError>> + Send;

    /// Delete an address by interface, address and prefix length; gives it back as it was, for [`Net::add_addr`].
    /// `None` when it was not there.
    fn del_addr(
        &self,
        ifindex: u32,
        ip: IpAddr,
        prefix_len: u8,
    ) -> impl Future<Output = Result<Option<Addr>, NetError>> + Send;

    /// Subscribe to changes. What happened before the call is not repeated: subscribe first, then read.
    fn watch(&self) -> Result<Self::Watch, NetError>;
}
