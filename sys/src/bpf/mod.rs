//! The data plane in the kernel: its maps (made, sized, pinned, or adopted from pins), its programs, the timer.

mod apply;
pub mod attach;
mod conns;
mod decap;
mod elder;
mod flat;
mod gates;
mod generation;
mod layouts;
pub mod parts;
mod peers;
pub mod programs;
mod raw;
mod rehearsal;
mod ring;
mod shapes;
mod upgrade;
pub mod verify;

pub use apply::combine;
pub use conns::{Belongs, Census, ConnTable, Flow};
pub use elder::{Batch, Progress, grace};
pub use gates::GATES;
pub use layouts::Layout;
pub use rehearsal::{Outcome, Rehearsal, Stage};
pub use ring::Ring;
pub use shapes::{Shape, shapes};
pub use upgrade::{Plan, Upgrade, discard};

use aya::maps::{HashMap, MapData};
use aya::programs::{ProgramFd, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, Pod};
use elder::Elder;
use layouts::Foreign;
use raw::Mapping;
use rvs_datapath::abi::{self, Clock, Config, CpuStats, Hop, Iface, ServiceKey, map};
use rvs_datapath::conn::SLOTS_MAX;
use rvs_datapath::ct::{Family, MIN_BUCKETS, V4, V6};
use rvs_datapath::verdict::COUNTERS;
use shapes::{ALL, Flat, load, make};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The programs, as built.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("RVS_EBPF_OBJECT"));

/// The real server's programs, as built.
static REALSERVER_OBJECT: &[u8] = aya::include_bytes_aligned!(env!("RVS_REALSERVER_OBJECT"));

/// An address as `abi` has it.
fn address(bytes: [u8; 16]) -> std::net::IpAddr {
    let v4 = bytes[4..].iter().all(|b| *b == 0);
    if v4 { [bytes[0], bytes[1], bytes[2], bytes[3]].into() } else { bytes.into() }
}

/// A value of `abi`: integers and byte arrays without padding.
///
/// # Safety
/// Any bytes of its size are a value of the type, and it has no padding.
pub unsafe trait Plain: Copy + 'static {}
macro_rules! plain {
    ($($t:ty),*) => { $(
        // SAFETY: `abi` asserts the sizes of these, which are the sums of their fields, all integers.
        unsafe impl Plain for $t {}
    )* };
}
plain!(
    u32,
    u64,
    [u64; 32],
    [u64; abi::fragment::WORDS],
    [u64; abi::SCRATCH_WORDS],
    Config,
    Clock,
    CpuStats,
    Iface,
    ServiceKey,
    Hop
);
plain!(
    abi::Service,
    abi::ServiceState,
    abi::ListEntry,
    abi::Dest,
    abi::Local,
    abi::Tunnel,
    abi::Vlan,
    abi::DestInfo,
    abi::DestState,
    abi::Stats,
    abi::Trace,
    abi::Traced,
    abi::TraceRoom,
    abi::Taker,
    abi::Handed,
    abi::HandRoom,
    abi::Move,
    abi::Leave
);

#[repr(transparent)]
#[derive(Clone, Copy)]
struct P<T>(T);
// SAFETY: Plain promises it.
unsafe impl<T: Plain> Pod for P<T> {}

/// A value as it lies in a map, in whole words.
pub fn bytes_of<T: Plain>(value: T) -> Vec<u8> {
    let mut bytes = vec![0u8; size_of::<T>().next_multiple_of(8)];
    // SAFETY: `bytes` is at least as long as T, which has no padding (Plain).
    unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
    bytes
}

/// A value of these words.
fn value_of<T: Plain>(words: &[u64]) -> T {
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    bytes.resize(bytes.len().max(size_of::<T>()), 0);
    // SAFETY: `bytes` is at least as long as T, and any bytes are a T (Plain).
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The kernel, or the library on the way to it, said no.
    #[error("{what}: {source}")]
    Failed {
        what: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{0}")]
    Refused(String),
}
type Result<T> = std::result::Result<T, BpfError>;

fn failed<E: std::error::Error + Send + Sync + 'static>(what: impl Into<String>) -> impl FnOnce(E) -> BpfError {
    let what = what.into();
    move |source| BpfError::Failed { what, source: Box::new(source) }
}

/// How much there may be of everything. Fixed when the maps are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Flows of each family that the tables hold at half load.
    pub flows4: u32,
    pub flows6: u32,
    pub services: u32,
    pub dests: u32,
    /// Entries of all services' lists (twice the dests and heads, so that a new list can be made beside the old).
    pub lists: u32,
    /// Places of all hash schedulers' tables.
    pub tables: u32,
    pub hops: u32,
    /// Room for what FULLNAT keeps of its flows, one row for each place of the tables. (Else it is made when it is first needed:
    /// [`Dataplane::make_sides`].)
    pub fullnat: bool,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes {
            flows4: 1 << 20,
            flows6: 1 << 18,
            services: 16384,
            dests: 65536,
            lists: 262_144,
            tables: 1 << 20,
            hops: 65536,
            fullnat: false,
        }
    }
}

impl Sizes {
    fn buckets<F: Family>(flows: u32) -> Result<u32> {
        let ways = F::WAYS as u64;
        let buckets = (u64::from(flows) * 2).div_ceil(ways).next_power_of_two();
        if buckets * ways > u64::from(SLOTS_MAX) {
            // The largest power of two of buckets whose slots a link can name, half full.
            let most = (u64::from(SLOTS_MAX) / ways + 1).next_power_of_two() / 2 * ways / 2;
            return Err(BpfError::Refused(format!("a connection table of {flows} flows is too large: at most {most}")));
        }
        Ok((buckets as u32).max(MIN_BUCKETS))
    }
}

/// Typed access to an array map, through memory shared with the programs: values are read and written in whole, aligned 8-byte
/// words, low to high, without a system call.
pub struct Table<T: Plain> {
    mapping: raw::Mapping,
    len: u32,
    name: &'static str,
    value: std::marker::PhantomData<T>,
}

impl<T: Plain> Table<T> {
    /// Words of a value; the kernel rounds values up to them.
    const WORDS: usize = size_of::<T>().div_ceil(8);

    fn new(fd: BorrowedFd<'_>, name: &'static str, len: u32) -> Result<Table<T>> {
        let bytes = len as usize * Self::WORDS * 8;
        let mapping = raw::Mapping::new(fd, bytes).map_err(failed(format!("map {name} into memory")))?;
        Ok(Table { mapping, len, name, value: std::marker::PhantomData })
    }
    fn words(&self, index: u32) -> Result<&[AtomicU64]> {
        let at = index as usize * Self::WORDS;
        let words = self.mapping.words().get(at..at + Self::WORDS);
        words.filter(|_| index < self.len).ok_or_else(|| {
            BpfError::Refused(format!("map {} has no entry {index}: its size is {}", self.name, self.len))
        })
    }
    pub fn get(&self, index: u32) -> Result<T> {
        let words: Vec<u64> = self.words(index)?.iter().map(|w| w.load(Ordering::Acquire)).collect();
        Ok(value_of(&words))
    }
    pub fn set(&self, index: u32, value: T) -> Result<()> {
        for (word, new) in self.words(index)?.iter().zip(bytes_of(value).chunks_exact(8)) {
            let new = u64::from_ne_bytes([new[0], new[1], new[2], new[3], new[4], new[5], new[6], new[7]]);
            word.store(new, Ordering::Release);
        }
        Ok(())
    }
    /// One word of a value, atomically shared with the programs.
    pub fn word(&self, index: u32, word: usize) -> Result<&AtomicU64> {
        let words = self.words(index)?;
        words.get(word).ok_or_else(|| BpfError::Refused(format!("a value of map {} has no word {word}", self.name)))
    }
    pub fn len(&self) -> u32 {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// An array for each CPU, one after the other.
pub struct PerCpu<T: Plain> {
    all: Table<T>,
    len: u32,
    cpus: u32,
}
impl<T: Plain> PerCpu<T> {
    /// A value for each CPU.
    pub fn get(&self, index: u32) -> Result<Vec<T>> {
        // Past the end it is to be an error, not another CPU's.
        let first = if index < self.len { index } else { self.all.len() };
        (0..self.cpus).map(|cpu| self.all.get(first + cpu * self.len)).collect()
    }
}

/// The index of services, or of watched addresses.
pub struct Keys {
    name: &'static str,
    map: HashMap<MapData, P<ServiceKey>, u64>,
}
impl Keys {
    fn open(dir: &Path, name: &'static str) -> Result<Keys> {
        let map = MapData::from_pin(generation::pin(dir, name)).map_err(failed(format!("pinned map {name}")))?;
        let map = HashMap::try_from(aya::maps::Map::HashMap(map)).map_err(failed(format!("map {name}")))?;
        Ok(Keys { name, map })
    }
    pub fn get(&self, key: ServiceKey) -> Result<Option<u64>> {
        match self.map.get(&P(key), 0) {
            Ok(value) => Ok(Some(value)),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed(format!("map {}, look up", self.name))(error)),
        }
    }
    pub fn insert(&mut self, key: ServiceKey, value: u64) -> Result<()> {
        self.map.insert(P(key), value, 0).map_err(failed(format!("map {}, insert", self.name)))
    }
    pub fn remove(&mut self, key: ServiceKey) -> Result<()> {
        self.map.remove(&P(key)).map_err(failed(format!("map {}, remove", self.name)))
    }
    pub fn iter(&self) -> impl Iterator<Item = Result<(ServiceKey, u64)>> + '_ {
        self.map.iter().map(|r| r.map(|(k, v)| (k.0, v)).map_err(failed(format!("map {}, list", self.name))))
    }
}

/// All maps, typed.
pub struct Maps {
    pub config: Table<Config>,
    pub clock: Table<Clock>,
    pub ifaces: Table<Iface>,
    pub vlans: Table<abi::Vlan>,
    pub keys: Keys,
    pub watched: Keys,
    pub taker: Table<abi::Taker>,
    pub services: Table<abi::Service>,
    pub service_state: Table<abi::ServiceState>,
    pub dests: Table<abi::Dest>,
    pub tunnels: Table<abi::Tunnel>,
    pub dest_info: Table<abi::DestInfo>,
    pub dest_state: Table<abi::DestState>,
    /// That of the elder, where it has one of its own.
    elder_state: Option<Foreign>,
    pub dest_stats: PerCpu<CpuStats>,
    pub lists: Table<abi::ListEntry>,
    pub tables: Table<u32>,
    pub locals: Table<abi::Local>,
    pub hops: Table<Hop>,
    pub reply_hops: Table<Hop>,
    fragments: Table<[u64; abi::fragment::WORDS]>,
    rates: Table<u64>,
    pub verdicts: PerCpu<u64>,
    scratch: [PerCpu<[u64; abi::SCRATCH_WORDS]>; 2],
    pub trace: Table<abi::Trace>,
    trace_room: PerCpu<abi::TraceRoom>,
    moves: Table<abi::Move>,
    leaves: Table<abi::Leave>,
    pub conns4: ConnTable<V4>,
    pub conns6: ConnTable<V6>,
}

/// The programs, loaded over pinned maps.
pub struct Dataplane {
    ebpf: Ebpf,
    pub maps: Maps,
    /// Where the programs tell of packets.
    pub ring: Ring<abi::Traced>,
    /// Where they hand packets over: fragments that came too early, packets to be cut.
    pub early: Ring<abi::Handed>,
    pub large: Ring<abi::Handed>,
    /// Programs that are loaded later name the maps by these open files.
    flat: Flat,
    dir: PathBuf,
    /// Made by this call, and not adopted from pins.
    pub fresh: bool,
    /// Who was at work before, while flows are moved here from its tables.
    elder: Option<Elder>,
    /// The layout that this call has taken over.
    pub upgraded: Option<&'static Layout>,
}

/// The programs that each data plane has, whatever its hooks.
const ALWAYS: [&str; 3] = ["rvs_start", "rvs_xdp", "rvs_pass"];

impl Dataplane {
    /// Adopt the maps pinned in `dir` (on a bpffs), or make them; load `object` over them; start the timer.
    /// Pins of another layout are upgraded, if it is one that we know; else they are refused, and nothing is changed.
    pub fn open(object: &[u8], dir: &Path, sizes: &Sizes) -> Result<Dataplane> {
        if let Some(upgrade) = Upgrade::find(dir)? {
            return upgrade.carry_out(object);
        }
        let mut dataplane = Dataplane::load(object, dir, sizes, &ALWAYS, &[])?;
        dataplane.start()?;
        if dataplane.elder.is_some() {
            dataplane.succeed()?;
        }
        Ok(dataplane)
    }
    /// The same without the timer, so that time stands still, and with the given programs of the object. `own`: maps that only this
    /// object has, and their sizes; they are pinned too.
    pub fn load(object: &[u8], dir: &Path, sizes: &Sizes, programs: &[&str], own: &[(&str, u32)]) -> Result<Dataplane> {
        std::fs::create_dir_all(dir).map_err(failed(format!("pin folder {}", dir.display())))?;
        let moving = generation::recover(dir)?;
        let fresh = !dir.join(map::CONFIG).exists();
        let mut flat = if fresh { Flat::make(dir, sizes)? } else { Flat::adopt(dir)? };
        let elder = if moving { Some(Elder::open(dir, &mut flat)?) } else { None };
        let ebpf = load(object, dir, sizes, own, &flat)?;
        if fresh {
            flat.configure(dir)?;
        }
        let mut dataplane = Dataplane::over(ebpf, flat, dir, fresh)?.after(elder)?;
        for name in programs {
            dataplane.program(name)?;
        }
        Ok(dataplane)
    }
    fn over(mut ebpf: Ebpf, flat: Flat, dir: &Path, fresh: bool) -> Result<Dataplane> {
        let ring = Ring::of(&mut ebpf, map::TRACE_RING)?;
        let (early, large) = (Ring::of(&mut ebpf, map::EARLY_RING)?, Ring::of(&mut ebpf, map::LARGE_RING)?);
        let maps = Maps::open(dir, &flat)?;
        Ok(Dataplane { maps, ring, early, large, ebpf, flat, dir: dir.to_owned(), fresh, elder: None, upgraded: None })
    }
    /// Room for what FULLNAT keeps of its flows, if there is none yet: as long as no dest is by that method nobody looks at the single
    /// row that is there. The programs are loaded anew, over the new maps, and put in the place of those that run.
    ///
    /// # Errors
    /// No memory, or the kernel refuses; all is as before then, or some interfaces have the new programs already, and for all other flows
    /// it is the same.
    pub fn make_sides(&mut self, object: &[u8]) -> Result<bool> {
        if self.has_room_for_sides() {
            return Ok(false);
        }
        self.refuse_if_moving()?;
        let sizes = Sizes { services: self.maps.services.len(), ..Sizes::default() };
        let mut flat = self.flat.try_clone()?;
        let mut made = Vec::new();
        for (name, rows) in [(map::SIDE4, self.maps.conns4.slots()), (map::SIDE6, self.maps.conns6.slots())] {
            let rows = rows.next_power_of_two();
            if let Some((shape, fd)) = flat.maps.iter_mut().find(|(s, _)| s.name == name && s.len < rows) {
                shape.len = rows;
                *fd = make(shape)?;
                made.push(name);
            }
        }
        let ebpf = load(object, &self.dir, &sizes, &[], &flat)?;
        let mut next = Dataplane::over(ebpf, flat, &self.dir, false)?;
        for name in ALWAYS {
            next.program(name)?;
        }
        for name in made {
            let (path, side) = (self.dir.join(name), self.dir.join(format!("{name}_new")));
            let _ = std::fs::remove_file(&side);
            raw::pin(next.flat.get(name)?.1, &side).map_err(failed(format!("pin {}", side.display())))?;
            std::fs::rename(&side, &path).map_err(failed(format!("pin {}", path.display())))?;
        }
        next.start()?;
        next.attach_all()?;
        *self = next;
        Ok(true)
    }
    fn has_room_for_sides(&self) -> bool {
        let rows = |name| self.flat.get(name).map_or(0, |(_, _, len)| len);
        rows(map::SIDE4) >= self.maps.conns4.slots() && rows(map::SIDE6) >= self.maps.conns6.slots()
    }
    /// These programs into all links.
    fn attach_all(&mut self) -> Result<()> {
        for a in attach::list(&self.dir)?.iter().filter(|a| a.ifindex != 0) {
            self.attach(attach::Port { name: &a.name, ifindex: a.ifindex }, a.hook)?;
        }
        Ok(())
    }
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// A program, loaded if it was not.
    fn program(&mut self, name: &str) -> Result<ProgramFd> {
        gates::load(&mut self.ebpf, name, Some(&self.dir), self.elder.as_ref())
    }
    /// Once in a while: what programs that have been replaced held is let go. (Not at once: a packet may be under way in one.)
    ///
    /// # Errors
    /// A pin can't be read or removed.
    pub fn tidy(&self) -> Result<()> {
        gates::close(&self.ebpf, &self.dir).map(drop)
    }
    /// A program by name.
    pub fn xdp(&mut self, name: &str) -> Result<&mut Xdp> {
        let program = self.ebpf.program_mut(name);
        let program = program.ok_or_else(|| BpfError::Refused(format!("the object has no program {name}")))?;
        program.try_into().map_err(failed(format!("program {name}")))
    }
    /// Run a loaded program on `frame` (which came in by lo), each time on what the last one left of it.
    /// The duration is the mean, in whole nanoseconds.
    pub fn test_run(&mut self, program: &str, frame: &[u8], repeat: u32) -> Result<aya::TestRunResult> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.repeat = repeat;
        self.xdp(program)?.test_run(options).map_err(failed(format!("program {program}")))
    }
    /// An array map that only this object has.
    pub fn own_table<T: Plain>(&self, name: &'static str) -> Result<Table<T>> {
        let data = MapData::from_pin(generation::pin(&self.dir, name)).map_err(failed(format!("pinned map {name}")))?;
        let len = data.info().map_err(failed(format!("map {name}")))?.max_entries();
        Table::new(data.fd().as_fd(), name, len)
    }
    /// Take all programs off their interfaces and all pins away: the data plane ends with the last open file. The folder stays.
    pub fn teardown(&mut self) -> Result<()> {
        for a in attach::list(&self.dir)? {
            attach::detach(&self.dir, &a.name, a.hook)?;
        }
        gates::close_all(&self.dir)?;
        generation::forget(&self.dir)?;
        for name in ALL {
            let path = self.dir.join(name);
            std::fs::remove_file(&path).map_err(failed(format!("remove {}", path.display())))?;
        }
        Ok(())
    }
    /// Let the timer tick with this object's code. It goes on after us.
    fn start(&mut self) -> Result<()> {
        let done = self.test_run("rvs_start", &[0; 64], 1)?;
        if done.return_value == 2 {
            return Ok(());
        }
        Err(BpfError::Refused(format!("the timer did not start (code {})", done.return_value)))
    }
    /// All that the maps without lookups hold, for checks.
    pub fn contents(&self) -> Result<Vec<(&'static str, Vec<u64>)>> {
        let words = |(shape, fd): &(Shape, OwnedFd)| {
            let what = || failed(format!("map {} into memory", shape.name));
            let mapping = raw::Mapping::new(fd.as_fd(), shape.bytes()? as usize).map_err(what())?;
            Ok((shape.name, mapping.words().iter().map(|w| w.load(Ordering::Relaxed)).collect()))
        };
        self.flat.maps.iter().map(words).collect()
    }
    /// Memory that the kernel charges for a map, in bytes.
    pub fn charged(&self, name: &str) -> Result<u64> {
        let data = MapData::from_pin(generation::pin(&self.dir, name)).map_err(failed(format!("map {name}")))?;
        let fd = data.fd().as_fd().as_raw_fd();
        let what = format!("fdinfo of map {name}");
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(failed(what.clone()))?;
        let line = text.lines().find_map(|l| l.strip_prefix("memlock:")).map(str::trim).map(str::parse);
        match line {
            Some(Ok(bytes)) => Ok(bytes),
            _ => Err(BpfError::Refused(format!("{what} has no memlock line"))),
        }
    }
}

impl Maps {
    fn open(dir: &Path, flat: &Flat) -> Result<Maps> {
        let config = flat.table::<Config>(map::CONFIG)?;
        let c = config.get(0)?;
        Ok(Maps {
            clock: flat.table(map::CLOCK)?,
            ifaces: flat.table(map::IFACES)?,
            vlans: flat.table(map::VLANS)?,
            keys: Keys::open(dir, map::SERVICE_KEYS)?,
            watched: Keys::open(dir, map::WATCHED)?,
            taker: flat.table(map::TAKER)?,
            services: flat.table(map::SERVICES)?,
            service_state: flat.table(map::SERVICE_STATE)?,
            dests: flat.table(map::DESTS)?,
            tunnels: flat.table(map::TUNNELS)?,
            dest_info: flat.table(map::DEST_INFO)?,
            dest_state: flat.table(map::DEST_STATE)?,
            elder_state: None,
            dest_stats: flat.per_cpu(map::DEST_STATS)?,
            lists: flat.table(map::LISTS)?,
            tables: flat.table(map::TABLES)?,
            locals: flat.table(map::LOCALS)?,
            hops: flat.table(map::HOPS)?,
            reply_hops: flat.table(map::REPLY_HOPS)?,
            fragments: flat.table(map::FRAGMENTS)?,
            rates: flat.table(map::RATES)?,
            verdicts: flat.per_cpu(map::VERDICTS)?,
            scratch: [flat.per_cpu(map::SCRATCH4)?, flat.per_cpu(map::SCRATCH6)?],
            trace: flat.table(map::TRACE)?,
            trace_room: flat.per_cpu(map::TRACE_ROOM)?,
            moves: flat.table(map::MOVES)?,
            leaves: flat.table(map::LEAVES)?,
            conns4: flat.conns(map::CONN4, c)?,
            conns6: flat.conns(map::CONN6, c)?,
            config,
        })
    }
    /// Nothing of what programs keep from one packet to the next: for tests that begin anew.
    pub fn forget(&self) -> Result<()> {
        for place in 0..self.fragments.len() {
            self.fragments.set(place, [0; abi::fragment::WORDS])?;
        }
        for place in 0..self.rates.len() {
            self.rates.set(place, 0)?;
        }
        for part in &self.scratch {
            for cpu in 0..part.cpus {
                part.all.set(cpu, [0; abi::SCRATCH_WORDS])?;
            }
        }
        Ok(())
    }
    /// Packets that `rvs trace` could not be told of, so far.
    pub fn untold(&self) -> Result<u64> {
        Ok(self.trace_room.get(0)?.iter().map(|room| room.lost).sum())
    }
    /// Packets of each reason so far, all CPUs together, by `Reason as usize`.
    pub fn verdicts(&self) -> Result<[u64; COUNTERS]> {
        let mut all = [0; COUNTERS];
        for (i, sum) in all.iter_mut().enumerate() {
            *sum = self.verdicts.get(i as u32)?.iter().sum();
        }
        Ok(all)
    }
}
