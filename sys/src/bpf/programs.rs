//! A real server's programs: where tunnels end (`decap`), and whose word about clients' addresses is taken (`peers`). The seam of
//! `rvs_sys::realserver`: the kernel, or memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rvs_control::realserver::Decap;

use super::{BpfError, Result, decap, peers};

/// What a real server needs of the kernel beside addresses and settings. Errors: the kernel can't be asked, or refuses.
pub trait Programs {
    /// What an interface takes out of tunnels.
    fn tunnel(&self, interface: &str) -> Result<Option<Decap>>;
    /// Does a test packet for this address come out of its tunnel there?
    fn prove(&self, interface: &str, vip: IpAddr) -> Result<bool>;
    /// Put the program there, in the place of an older one, or (`None`) take it away.
    fn set_tunnel(&self, interface: &str, decap: Option<&Decap>) -> Result<()>;
    /// Whose word is taken.
    fn directors(&self) -> Result<BTreeSet<IpAddr>>;
    /// Take the word of these alone; of nobody: take the programs away.
    fn set_directors(&self, directors: &BTreeSet<IpAddr>) -> Result<()>;
}

/// The kernel's, in the network namespace of the calling thread.
#[derive(Clone, Debug, Default)]
pub struct KernelPrograms {
    /// The cgroup whose processes are shown clients' addresses, and those below it; `None`: all of the host.
    pub cgroup: Option<PathBuf>,
}

impl Programs for KernelPrograms {
    fn tunnel(&self, interface: &str) -> Result<Option<Decap>> {
        decap::get(interface)
    }
    fn prove(&self, interface: &str, vip: IpAddr) -> Result<bool> {
        decap::prove(interface, vip)
    }
    fn set_tunnel(&self, interface: &str, decap: Option<&Decap>) -> Result<()> {
        decap::set(interface, decap)
    }
    fn directors(&self) -> Result<BTreeSet<IpAddr>> {
        peers::get(self.cgroup.as_deref())
    }
    fn set_directors(&self, directors: &BTreeSet<IpAddr>) -> Result<()> {
        peers::set(self.cgroup.as_deref(), directors)
    }
}

/// Programs in memory.
#[derive(Debug, Default)]
pub struct FakePrograms {
    state: Mutex<State>,
    /// What every change comes to.
    pub refuses: bool,
}

#[derive(Debug, Default)]
struct State {
    tunnels: BTreeMap<String, Decap>,
    directors: BTreeSet<IpAddr>,
}

impl FakePrograms {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn change(&self, what: &str) -> Result<MutexGuard<'_, State>> {
        if self.refuses {
            return Err(BpfError::Refused(format!("{what}: refused on purpose")));
        }
        Ok(self.state())
    }
}

impl Programs for FakePrograms {
    fn tunnel(&self, interface: &str) -> Result<Option<Decap>> {
        Ok(self.state().tunnels.get(interface).cloned())
    }
    fn prove(&self, interface: &str, vip: IpAddr) -> Result<bool> {
        Ok(self.tunnel(interface)?.is_some_and(|d| d.vips.contains(&vip)))
    }
    fn set_tunnel(&self, interface: &str, decap: Option<&Decap>) -> Result<()> {
        let mut state = self.change(&format!("the program for tunnels on {interface}"))?;
        match decap {
            Some(decap) => drop(state.tunnels.insert(interface.to_owned(), decap.clone())),
            None => drop(state.tunnels.remove(interface)),
        }
        Ok(())
    }
    fn directors(&self) -> Result<BTreeSet<IpAddr>> {
        Ok(self.state().directors.clone())
    }
    fn set_directors(&self, directors: &BTreeSet<IpAddr>) -> Result<()> {
        self.change("the programs for clients' addresses")?.directors.clone_from(directors);
        Ok(())
    }
}
