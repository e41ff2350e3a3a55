//! Packets that come back from the daemon, and what the notes about their datagrams say.

use rvs_datapath::abi::{self, Handed};
use rvs_datapath::ct::Seed;
use rvs_datapath::frag::{self, Found};
use rvs_datapath::verdict::Reason;
use std::os::fd::AsFd;

use super::attach::Hook;
use super::{Dataplane, Maps, Result, Table, failed, raw};

/// The notes as user space sees them.
struct Noted<'a> {
    table: &'a Table<[u64; abi::fragment::WORDS]>,
    seed: Seed,
}

impl frag::Notes for Noted<'_> {
    fn note_word(&self, place: u32, word: u32) -> u64 {
        // All places and words that there are, are in the map.
        self.table.word(place, word as usize).map_or(0, |w| w.load(std::sync::atomic::Ordering::Acquire))
    }
    fn note_seed(&self) -> &Seed {
        &self.seed
    }
}

impl Maps {
    /// Which of these datagrams have a note by now, whatever it says.
    ///
    /// # Errors
    /// A map that can't be read.
    pub fn noted<'k>(&self, keys: impl Iterator<Item = &'k frag::Key>) -> Result<Vec<frag::Key>> {
        let (config, clock) = (self.config.get(0)?, self.clock.get(0)?);
        let notes = Noted { table: &self.fragments, seed: config.seed };
        Ok(keys.filter(|key| frag::find(&notes, key, clock.now_s) != Found::None).copied().collect())
    }
    /// So many more packets that were handed over, and then dropped for this reason. (It is one that no program counts by: nobody else writes here.)
    ///
    /// # Errors
    /// A map that can't be written.
    pub fn count(&self, reason: Reason, packets: u64) -> Result<()> {
        if packets == 0 {
            return Ok(());
        }
        let (counters, of_first_cpu) = (&self.verdicts.all, reason as u32);
        counters.set(of_first_cpu, counters.get(of_first_cpu)?.wrapping_add(packets))
    }
    /// Have the programs hand packets over for so many seconds more; 0: no longer.
    ///
    /// # Errors
    /// A map that can't be written.
    pub fn take_for(&self, seconds: u32) -> Result<()> {
        let until_s = if seconds == 0 { 0 } else { u64::from(self.clock.get(0)?.now_s) + u64::from(seconds) };
        self.taker.set(0, abi::Taker { until_s })
    }
}

impl Dataplane {
    /// Have a frame come in by this interface once more, of this thread's network namespace, where the hook's program takes it.
    ///
    /// # Errors
    /// The interface is gone, or the frame is longer than [`abi::HANDED_MAX`].
    pub fn inject(&mut self, hook: Hook, ifindex: u32, frame: &[u8]) -> Result<()> {
        // What is attached behind the device's own driver looks at whatever is passed to the kernel there.
        let program = if hook == Hook::XdpNative { "rvs_xdp" } else { "rvs_pass" };
        let fd = self.program(program)?;
        let what = || failed(format!("send {} bytes in by interface {ifindex} again", frame.len()));
        raw::inject(fd.as_fd(), ifindex, frame).map_err(what())
    }
}

/// Of which datagram a packet is that was handed over.
pub fn datagram(handed: &Handed) -> frag::Key {
    frag::Key { addresses: handed.addresses, rest: handed.rest }
}
