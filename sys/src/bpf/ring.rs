//! Packets that the programs tell of (`rvs_datapath::abi::Traced`), or hand over (`Handed`).

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::unix::AsyncFd;

use super::{BpfError, Plain, Result, failed};

/// Where one load of the programs puts them, each behind a head.
pub struct Ring<H> {
    ring: RingBuf<MapData>,
    name: &'static str,
    head: PhantomData<H>,
}

impl<H: Plain> Ring<H> {
    pub(super) fn of(ebpf: &mut Ebpf, name: &'static str) -> Result<Ring<H>> {
        let ring = ebpf.take_map(name).ok_or_else(|| BpfError::Refused(format!("the object has no map {name}")))?;
        let ring = RingBuf::try_from(ring).map_err(failed(format!("map {name}")))?;
        Ok(Ring { ring, name, head: PhantomData })
    }
    /// The packet that has waited longest, with what was kept of its bytes.
    pub fn take(&mut self) -> Option<(H, Vec<u8>)> {
        let item = self.ring.next()?;
        let (head, bytes) = item.split_at_checked(size_of::<H>())?;
        // SAFETY: as many bytes as an H has, and any bytes are one (Plain).
        Some((unsafe { head.as_ptr().cast::<H>().read_unaligned() }, bytes.to_vec()))
    }
    /// Readable when there is a packet. To be called within the event loop.
    pub fn readable(&self) -> Result<AsyncFd<OwnedFd>> {
        let what = || failed(format!("map {}", self.name));
        let fd = self.ring.as_fd().try_clone_to_owned().map_err(what())?;
        // SAFETY: the file descriptor is its own, and is closed with it.
        unsafe { AsyncFd::register(fd) }.map_err(|e| what()(e.into()))
    }
}
