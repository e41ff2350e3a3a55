//! Whole frames on an interface's wire, as they are: for tests and measurements beside the stack.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A packet socket of one interface (packet(7)).
#[derive(Debug)]
pub struct Wire(OwnedFd);

impl Wire {
    /// Of an interface of this thread's network namespace, by its number.
    ///
    /// # Errors
    /// There is no such interface, or not root.
    pub fn open(ifindex: u32) -> io::Result<Wire> {
        let all = u16::to_be(libc::ETH_P_ALL as u16);
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new file descriptor that nobody else has.
        let wire = Wire(unsafe { OwnedFd::from_raw_fd(fd) });
        let on = 1i32;
        // Not what we sent ourselves, and past the queue of the device, which would hold frames back.
        for option in [libc::PACKET_IGNORE_OUTGOING, libc::PACKET_QDISC_BYPASS] {
            // SAFETY: a word of ours and its size.
            check(unsafe { libc::setsockopt(fd, libc::SOL_PACKET, option, (&raw const on).cast(), 4) })?;
        }
        // SAFETY: all zeros is an address.
        let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        (at.sll_family, at.sll_protocol, at.sll_ifindex) = (libc::AF_PACKET as u16, all, ifindex as i32);
        // SAFETY: an address of ours and its size.
        check(unsafe { libc::bind(fd, (&raw const at).cast(), size_of::<libc::sockaddr_ll>() as u32) })?;
        Ok(wire)
    }

    /// # Errors
    /// The interface is down, or the frame larger than it takes.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: a buffer of ours and its size.
        let n = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The next frame that came in, without a VLAN's tag; `None`: there is none now.
    ///
    /// # Errors
    /// The interface went down.
    pub fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer: Vec<u8> = Vec::with_capacity(65_536);
        // SAFETY: a buffer of ours and its size; as many bytes of it are written as the result says.
        unsafe {
            let n = libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.capacity(), 0);
            if n >= 0 {
                buffer.set_len(n as usize);
                return Ok(Some(buffer));
            }
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            error => Err(error),
        }
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
