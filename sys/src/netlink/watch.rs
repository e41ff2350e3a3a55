//! rtnetlink's multicast groups as a stream of [`NetEvent`]s.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, TokioSocket};
use rtnetlink::MulticastGroup;

use super::{NetError, NetEvent, Watch, decode};

const GROUPS: [MulticastGroup; 9] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Nexthop,
];
/// Bytes the kernel may queue for us: some thousand events. More is an overflow, hence a `Resync`.
const RECEIVE_BUFFER: libc::c_int = 1 << 20;
/// No rtnetlink datagram is larger (NLMSG_GOODSIZE is a page, dumps at most 32 KiB).
const DATAGRAM_MAX: usize = 1 << 16;

/// The kernel's changes. Nothing is queued here beyond one datagram: the socket's buffer is the only queue, and its
/// overflow is told as [`NetEvent::Resync`].
pub struct KernelWatch {
    socket: TokioSocket,
    pending: VecDeque<NetEvent>,
}

impl KernelWatch {
    /// Subscribe in the calling thread's network namespace; inside a tokio runtime.
    pub(super) fn open() -> Result<Self, NetError> {
        let subscribe = || -> io::Result<TokioSocket> {
            let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
            let raw = socket.socket_mut();
            raw.set_rx_buf_sz(RECEIVE_BUFFER)?;
            raw.bind_auto()?;
            for group in GROUPS {
                raw.add_membership(group as u32)?;
            }
            Ok(socket)
        };
        Ok(Self { socket: subscribe().map_err(NetError::Open)?, pending: VecDeque::new() })
    }
}

impl KernelWatch {
    /// Empty the socket after an overflow. Until it has been empty once the kernel goes on dropping events, and
    /// without saying so again (`netlink_overrun`, `netlink_rcv_wake`), so a `Resync` is only honest after this.
    fn drain(&mut self) {
        self.pending.clear();
        let mut bytes = Vec::with_capacity(DATAGRAM_MAX);
        loop {
            bytes.clear();
            match self.socket.socket_ref().recv(&mut bytes, 0) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                // Empty, or broken: then the next wait says so.
                Err(_) => return,
            }
        }
    }
}

impl Watch for KernelWatch {
    async fn next(&mut self) -> Result<NetEvent, NetError> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(event);
            }
            let mut bytes = Vec::with_capacity(DATAGRAM_MAX);
            match poll_fn(|context| self.socket.poll_recv_from(context, &mut bytes)).await {
                // Only the kernel (port 0) is believed.
                Ok(from) if from.port_number() == 0 => self.pending.extend(decode::events(&bytes)),
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.drain();
                    return Ok(NetEvent::Resync);
                }
                Err(source) => return Err(NetError::Refused { op: "wait for network changes".into(), source }),
            }
        }
    }
}
