//! Packets that the programs tell of (`rvs_datapath::abi::Trace`).

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use rvs_datapath::abi::{Traced, map};
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::unix::AsyncFd;

use super::{BpfError, Result, failed};

/// Where one load of the programs tells of them.
pub struct Ring(RingBuf<MapData>);

impl Ring {
    pub(super) fn of(ebpf: &mut Ebpf) -> Result<Ring> {
        let name = map::TRACE_RING;
        let ring = ebpf.take_map(name).ok_or_else(|| BpfError::Refused(format!("the object has no map {name}")))?;
        Ok(Ring(RingBuf::try_from(ring).map_err(failed(format!("map {name}")))?))
    }
    /// The packet that has waited longest, with what was kept of its bytes.
    pub fn take(&mut self) -> Option<(Traced, Vec<u8>)> {
        let item = self.0.next()?;
        let (head, bytes) = item.split_at_checked(size_of::<Traced>())?;
        // SAFETY: as many bytes as a Traced has, and any bytes are one (Plain).
        Some((unsafe { head.as_ptr().cast::<Traced>().read_unaligned() }, bytes.to_vec()))
    }
    /// Readable when there is a packet. To be called within the event loop.
    pub fn readable(&self) -> Result<AsyncFd<OwnedFd>> {
        let what = || failed(format!("map {}", map::TRACE_RING));
        let fd = self.0.as_fd().try_clone_to_owned().map_err(what())?;
        // SAFETY: the file descriptor is its own, and is closed with it.
        unsafe { AsyncFd::register(fd) }.map_err(|e| what()(e.into()))
    }
}
