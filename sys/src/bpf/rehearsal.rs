//! What the data plane would do with a packet, without doing it: the same object loaded once more, over the live configuration and
//! copies of the state, in which the packet is run and which is then thrown away. Programs write no configuration
//! (`rvs_datapath::abi`), so that the live maps of it serve both.

use aya::programs::{SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use rvs_datapath::abi::{CpuStats, Iface, Trace, Traced, map};
use rvs_datapath::verdict::Verdict;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;

use super::attach::Hook;
use super::raw::{self, Mapping};
use super::shapes::{Flat, LOOKED_UP};
use super::{BpfError, Dataplane, Result, Shape, Table, failed, flat, gates, generation};
use crate::memory;

/// State that says what becomes of a packet.
const COPIED: [&str; 13] = [
    map::CONN4,
    map::CONN6,
    map::CLOCK,
    map::IFACES,
    map::SERVICE_STATE,
    map::DEST_STATE,
    map::REPLY_HOPS,
    map::SCRATCH4,
    map::SCRATCH6,
    map::FRAGMENTS,
    map::RATES,
    map::SIDE4,
    map::SIDE6,
];
/// ... and what only counts: empty before each packet, so that what is in it afterwards is the packet's.
const EMPTY: [&str; 5] = [map::DEST_STATS, map::VERDICTS, map::TRACE, map::TRACE_ROOM, map::HAND_ROOM];

/// The live maps, for a [`Rehearsal`] on another thread.
pub struct Stage {
    flat: Vec<(Shape, OwnedFd)>,
    dir: PathBuf,
}

impl Dataplane {
    /// The maps of today, to rehearse over.
    pub fn stage(&self) -> Result<Stage> {
        self.refuse_if_moving()?;
        let maps = self.flat.maps.iter();
        let flat = maps.map(|(shape, fd)| Ok((*shape, fd.try_clone()?))).collect::<std::io::Result<_>>();
        Ok(Stage { flat: flat.map_err(failed("open files for a rehearsal"))?, dir: self.dir.clone() })
    }
}

/// What would become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    /// The frame as it would leave.
    pub bytes: Vec<u8>,
    /// Index of the dest for which it would count.
    pub dest: Option<u32>,
    /// It would open a connection.
    pub opens: bool,
}

/// A second instance of the data plane.
pub struct Rehearsal {
    pub(super) ebpf: Ebpf,
    ring: super::Ring<Traced>,
    /// Live and own, one after the other.
    copies: Vec<(Mapping, Mapping)>,
    ifaces: Table<Iface>,
    stats: Table<CpuStats>,
    /// What the programs name the maps by.
    _maps: Vec<OwnedFd>,
}

impl Stage {
    /// Memory that a rehearsal takes, bytes.
    pub fn cost(&self) -> u64 {
        let own = |name: &&Shape| COPIED.contains(&name.name) || EMPTY.contains(&name.name);
        self.flat.iter().map(|(shape, _)| shape).filter(own).map(Stage::bytes).sum()
    }
    /// One CPU runs it: of what each CPU has a part of there is one.
    fn bytes(shape: &Shape) -> u64 {
        shape.words as u64 * 8 * u64::from(shape.len)
    }

    /// Load the programs, which takes most of a rehearsal's time.
    ///
    /// # Errors
    /// No memory for the copies, or the kernel refuses.
    pub fn open(self, object: &[u8]) -> Result<Rehearsal> {
        let (cost, free) = (self.cost(), memory::available().map_err(failed("memory for a copy"))?);
        // Tables of many millions of flows are to stay usable beside their own copy.
        if cost > free / 2 {
            return Err(BpfError::Refused(format!(
                "a copy of the tables takes {} MiB, more than half of the {} MiB that are free",
                cost >> 20,
                free >> 20
            )));
        }
        let (mut maps, mut copies, mut symbols) = (Vec::new(), Vec::new(), Vec::new());
        symbols.push(("CPUS_MASK".to_owned(), flat::Value::Number(0)));
        for (shape, live) in &self.flat {
            let (name, bytes) = (shape.name, Stage::bytes(shape));
            let own = match u32::try_from(bytes) {
                Ok(bytes) if COPIED.contains(&name) || EMPTY.contains(&name) => {
                    raw::create_mappable(name, bytes).map_err(failed(format!("copy of map {name}, {bytes} bytes")))?
                }
                _ => live.try_clone().map_err(failed(format!("map {name}")))?,
            };
            if COPIED.contains(&name) {
                let at = |fd: BorrowedFd<'_>| {
                    Mapping::new(fd, bytes as usize).map_err(failed(format!("map {name} into memory")))
                };
                copies.push((at(live.as_fd())?, at(own.as_fd())?));
            }
            Flat::symbols_of(shape, own.as_raw_fd(), &mut symbols);
            maps.push((*shape, own));
        }
        Flat::old_symbols(maps.iter().map(|(shape, fd)| (shape, fd.as_raw_fd())), &mut symbols);
        let table = |wanted: &str| {
            let found = maps.iter().find(|(shape, _): &&(Shape, OwnedFd)| shape.name == wanted);
            let found = found.ok_or_else(|| BpfError::Refused(format!("there is no map {wanted}")))?;
            Ok::<_, BpfError>((found.0.name, found.0.len, &found.1))
        };
        let object = flat::bind(object, &symbols).map_err(BpfError::Refused)?;
        let mut loader = EbpfLoader::new();
        // Its timer, never started, is its own.
        for name in LOOKED_UP.iter().filter(|name| **name != map::TIMER) {
            loader.map_pin_path(name, generation::pin(&self.dir, name));
        }
        let mut ebpf = loader.load(&object).map_err(failed("load the data plane once more"))?;
        let ring = super::Ring::of(&mut ebpf, map::TRACE_RING)?;
        let (name, len, fd) = table(map::IFACES)?;
        let ifaces = Table::new(fd.as_fd(), name, len)?;
        let (name, len, fd) = table(map::DEST_STATS)?;
        let stats = Table::new(fd.as_fd(), name, len)?;
        let (name, len, fd) = table(map::TRACE)?;
        // It tells of its packets as `rvs trace` is told: the verdict is in there.
        let all = Trace { reasons: [u64::MAX; 2], until_s: u32::MAX, ..Trace::default() };
        Table::new(fd.as_fd(), name, len)?.set(0, all)?;
        let _maps = maps.into_iter().map(|(_, fd)| fd).collect();
        Ok(Rehearsal { ebpf, ring, copies, ifaces, stats, _maps })
    }
}

impl Rehearsal {
    /// A frame that comes in by the interface of this number, of this thread's network namespace, where the hook's program takes it,
    /// with everything as it is at this moment.
    ///
    /// # Errors
    /// The kernel does not run it.
    pub fn run(&mut self, hook: Hook, ifindex: u32, frame: &[u8]) -> Result<Outcome> {
        self.load(hook)?;
        for (live, own) in &self.copies {
            // Word by word, since the data plane goes on writing them: a connection that is being entered may be missed.
            for (to, from) in own.words().iter().zip(live.words()) {
                to.store(from.load(Relaxed), Relaxed);
            }
        }
        let at = ifindex % self.ifaces.len();
        let iface = self.ifaces.get(at)?;
        if iface.number() != ifindex {
            return Err(BpfError::Refused(format!("interface {ifindex} is not in the table of interfaces")));
        }
        self.ifaces.set(at, iface.traced(true))?;
        let mut bytes = vec![0; frame.len() + ROOM];
        let context = context(hook, ifindex, frame.len());
        let mut options = TestRunOptions::new();
        (options.data_in, options.data_out, options.ctx_in) = (Some(frame), Some(&mut bytes[..]), Some(&context[..]));
        let what = || failed(format!("run {} on a copy of the data plane", hook.program()));
        let done = match hook {
            Hook::Tc | Hook::TcOut => self.tc(hook)?.test_run(options).map_err(what())?,
            Hook::XdpNative | Hook::XdpGeneric => self.xdp(hook)?.test_run(options).map_err(what())?,
        };
        bytes.truncate(done.data_size_out as usize);
        let verdict = self.ring.take().map(|(told, _)| Verdict::from_word(told.verdict));
        let verdict = verdict.ok_or_else(|| BpfError::Refused(format!("{} told of no verdict", hook.program())))?;
        let (dest, opens) = self.counted()?;
        Ok(Outcome { verdict, bytes, dest, opens })
    }

    /// The dest for which the packet counted, and whether as the first of a connection. Its counters are empty again then.
    fn counted(&self) -> Result<(Option<u32>, bool)> {
        let all = self.stats.mapping.words().chunks(Table::<CpuStats>::WORDS);
        let counted = (0..).zip(all).find(|(_, words)| words.iter().any(|w| w.load(Relaxed) != 0));
        let Some((index, _)) = counted else { return Ok((None, false)) };
        let opens = self.stats.get(index)?.stats.connections > 0;
        self.stats.set(index, CpuStats::default())?;
        Ok((Some(index), opens))
    }

    fn load(&mut self, hook: Hook) -> Result<()> {
        gates::load(&mut self.ebpf, hook.program(), None, None).map(drop)
    }
    fn xdp(&mut self, hook: Hook) -> Result<&mut Xdp> {
        let name = hook.program();
        let program = self.ebpf.program_mut(name);
        let program = program.ok_or_else(|| BpfError::Refused(format!("the object has no program {name}")))?;
        program.try_into().map_err(failed(format!("program {name}")))
    }
    fn tc(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        let name = hook.program();
        let program = self.ebpf.program_mut(name);
        let program = program.ok_or_else(|| BpfError::Refused(format!("the object has no program {name}")))?;
        program.try_into().map_err(failed(format!("program {name}")))
    }
}

/// What a packet may grow by: more than the headers of any tunnel, or an ICMP error's.
const ROOM: usize = 256;

/// Words of struct xdp_md (its data_end and ingress_ifindex) or of struct __sk_buff (its ifindex), as BPF_PROG_TEST_RUN takes them.
fn context(hook: Hook, ifindex: u32, len: usize) -> Vec<u8> {
    let mut words = [0u32; 11];
    let count = if matches!(hook, Hook::Tc | Hook::TcOut) {
        words[10] = ifindex;
        11
    } else {
        (words[1], words[3]) = (len as u32, ifindex);
        6
    };
    words[..count].iter().flat_map(|word| word.to_ne_bytes()).collect()
}
