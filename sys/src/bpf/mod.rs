//! The data plane in the kernel: its maps (made, sized, pinned, or adopted from pins), its programs, the timer.

mod apply;
pub mod attach;
mod conns;
mod raw;

pub use apply::combine;
pub use conns::{ConnTable, Flow};

use aya::maps::{HashMap, MapData, PerCpuArray};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use rvs_datapath::abi::{self, Clock, Config, Hop, Iface, ServiceKey, map};
use rvs_datapath::conn::{Policy, SLOTS_MAX, Timeouts};
use rvs_datapath::ct::{Family, MIN_BUCKETS, Seed, V4, V6};
use rvs_datapath::verdict::COUNTERS;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The programs, as built.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("RVS_EBPF_OBJECT"));

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
plain!(u32, u64, [u64; 32], Config, Clock, Iface, ServiceKey, Hop);
plain!(abi::Service, abi::ServiceState, abi::ListEntry, abi::Dest, abi::DestInfo, abi::DestState, abi::Stats);

#[repr(transparent)]
#[derive(Clone, Copy)]
struct P<T>(T);
// SAFETY: Plain promises it.
unsafe impl<T: Plain> Pod for P<T> {}

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

    fn words(&self, index: u32) -> Result<&[AtomicU64]> {
        let at = index as usize * Self::WORDS;
        let words = self.mapping.words().get(at..at + Self::WORDS);
        words.filter(|_| index < self.len).ok_or_else(|| {
            BpfError::Refused(format!("map {} has no entry {index}: its size is {}", self.name, self.len))
        })
    }
    pub fn get(&self, index: u32) -> Result<T> {
        let mut bytes = Vec::with_capacity(Self::WORDS * 8);
        for word in self.words(index)? {
            bytes.extend(word.load(Ordering::Acquire).to_ne_bytes());
        }
        // SAFETY: `bytes` is at least as long as T, and any bytes are a T (Plain).
        Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }
    pub fn set(&self, index: u32, value: T) -> Result<()> {
        let mut bytes = vec![0u8; Self::WORDS * 8];
        // SAFETY: `bytes` is at least as long as T, which has no padding (Plain).
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
        for (word, new) in self.words(index)?.iter().zip(bytes.chunks_exact(8)) {
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

/// Typed access to a per-CPU array map.
pub struct PerCpu<T: Plain>(PerCpuArray<MapData, P<T>>, &'static str);
impl<T: Plain> PerCpu<T> {
    /// A value for each CPU.
    pub fn get(&self, index: u32) -> Result<Vec<T>> {
        let values = self.0.get(&index, 0).map_err(failed(format!("map {}, read entry {index}", self.1)))?;
        Ok(values.iter().map(|v| v.0).collect())
    }
}

/// The index of services.
pub struct Keys(HashMap<MapData, P<ServiceKey>, u64>);
impl Keys {
    pub fn get(&self, key: ServiceKey) -> Result<Option<u64>> {
        match self.0.get(&P(key), 0) {
            Ok(value) => Ok(Some(value)),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed(format!("map {}, look up", map::SERVICE_KEYS))(error)),
        }
    }
    pub fn insert(&mut self, key: ServiceKey, value: u64) -> Result<()> {
        self.0.insert(P(key), value, 0).map_err(failed(format!("map {}, insert", map::SERVICE_KEYS)))
    }
    pub fn remove(&mut self, key: ServiceKey) -> Result<()> {
        self.0.remove(&P(key)).map_err(failed(format!("map {}, remove", map::SERVICE_KEYS)))
    }
    pub fn iter(&self) -> impl Iterator<Item = Result<(ServiceKey, u64)>> + '_ {
        self.0.iter().map(|r| r.map(|(k, v)| (k.0, v)).map_err(failed(format!("map {}, list", map::SERVICE_KEYS))))
    }
}

/// All maps, typed.
pub struct Maps {
    pub config: Table<Config>,
    pub clock: Table<Clock>,
    pub ifaces: Table<Iface>,
    pub keys: Keys,
    pub services: Table<abi::Service>,
    pub service_state: Table<abi::ServiceState>,
    pub dests: Table<abi::Dest>,
    pub dest_info: Table<abi::DestInfo>,
    pub dest_state: Table<abi::DestState>,
    pub dest_stats: PerCpu<abi::Stats>,
    pub lists: Table<abi::ListEntry>,
    pub tables: Table<u32>,
    pub hops: Table<Hop>,
    pub reply_hops: Table<Hop>,
    pub verdicts: PerCpu<u64>,
    pub conns4: ConnTable<V4>,
    pub conns6: ConnTable<V6>,
}

/// The programs, loaded over pinned maps.
pub struct Dataplane {
    ebpf: Ebpf,
    pub maps: Maps,
    dir: PathBuf,
    /// Made by this call, and not adopted from pins.
    pub fresh: bool,
}

impl Dataplane {
    /// Adopt the maps pinned in `dir` (on a bpffs), or make them; load `object` over them; start the timer.
    /// Pins of another layout are refused: nothing is changed then.
    pub fn open(object: &[u8], dir: &Path, sizes: &Sizes) -> Result<Dataplane> {
        let mut dataplane = Dataplane::load(object, dir, sizes, &["rvs_start", "rvs_xdp", "rvs_pass"], &[])?;
        dataplane.start()?;
        Ok(dataplane)
    }
    /// The same without the timer, so that time stands still, and with the given programs of the object. `own`: maps that only this
    /// object has, and their sizes; they are pinned too.
    pub fn load(object: &[u8], dir: &Path, sizes: &Sizes, programs: &[&str], own: &[(&str, u32)]) -> Result<Dataplane> {
        std::fs::create_dir_all(dir).map_err(failed(format!("pin folder {}", dir.display())))?;
        let fresh = !dir.join(map::CONFIG).exists();
        let (mask4, mask6) = if fresh {
            (make_conns::<V4>(map::CONN4, dir, sizes.flows4)?, make_conns::<V6>(map::CONN6, dir, sizes.flows6)?)
        } else {
            adopt(dir)?
        };
        let ebpf = load(object, dir, sizes, own, mask4, mask6)?;
        let mut dataplane = Dataplane { maps: Maps::open(dir, fresh, mask4, mask6)?, ebpf, dir: dir.to_owned(), fresh };
        for name in programs {
            dataplane.xdp(name)?.load().map_err(failed(format!("program {name}")))?;
        }
        Ok(dataplane)
    }
    pub fn dir(&self) -> &Path {
        &self.dir
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
        array(&self.dir, name)
    }
    /// Take all programs off their interfaces and all pins away: the data plane ends with the last open file. The folder stays.
    pub fn teardown(&mut self) -> Result<()> {
        for a in attach::list(&self.dir)? {
            attach::detach(&self.dir, &a.name, a.hook)?;
        }
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
    /// Memory that the kernel charges for a map, in bytes.
    pub fn charged(&self, name: &str) -> Result<u64> {
        let data = MapData::from_pin(self.dir.join(name)).map_err(failed(format!("map {name}")))?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&data.fd().as_fd());
        let what = format!("fdinfo of map {name}");
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(failed(what.clone()))?;
        let line = text.lines().find_map(|l| l.strip_prefix("memlock:")).map(str::trim).map(str::parse);
        match line {
            Some(Ok(bytes)) => Ok(bytes),
            _ => Err(BpfError::Refused(format!("{what} has no memlock line"))),
        }
    }
}

/// Make and pin a connection table. Its number of buckets - 1.
fn make_conns<F: Family>(name: &str, dir: &Path, flows: u32) -> Result<u32> {
    let buckets = Sizes::buckets::<F>(flows)?;
    let path = dir.join(name);
    // Left behind by a start that was cut short (CONFIG, the last to come, is missing).
    let _ = std::fs::remove_file(&path);
    let bytes = buckets * F::WORDS as u32 * 8;
    let fd: OwnedFd = raw::create_mappable(name, bytes).map_err(failed(format!("map {name} of {bytes} bytes")))?;
    raw::pin(fd.as_fd(), &path).map_err(failed(format!("pin {}", path.display())))?;
    Ok(buckets - 1)
}

/// The masks of pinned tables, if the pins are of our layout.
fn adopt(dir: &Path) -> Result<(u32, u32)> {
    let data = MapData::from_pin(dir.join(map::CONFIG)).map_err(failed("map CONFIG"))?;
    let size = data.info().map_err(failed("map CONFIG"))?.value_size();
    let other = |what: String| {
        BpfError::Refused(format!(
            "the pins in {} were made by another version of rvsd ({what}): stop with that version's `rvsd --teardown`, or use another folder (--pin)",
            dir.display()
        ))
    };
    if size as usize != size_of::<Config>() {
        return Err(other(format!("a configuration of {size} bytes")));
    }
    let config = array::<Config>(dir, map::CONFIG)?.get(0)?;
    if config.version != abi::VERSION {
        return Err(other(format!("layout {:016x}, ours is {:016x}", config.version, abi::VERSION)));
    }
    Ok((config.mask4, config.mask6))
}

fn load(object: &[u8], dir: &Path, s: &Sizes, own: &[(&str, u32)], mask4: u32, mask6: u32) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader.override_global("MASK4", &mask4, true).override_global("MASK6", &mask6, true);
    for (name, size) in [
        (map::SERVICE_KEYS, s.services),
        (map::SERVICES, s.services),
        (map::SERVICE_STATE, s.services),
        (map::DESTS, s.dests),
        (map::DEST_INFO, s.dests),
        (map::DEST_STATE, s.dests),
        (map::DEST_STATS, s.dests),
        (map::LISTS, s.lists),
        (map::TABLES, s.tables),
        (map::HOPS, s.hops),
    ] {
        loader.map_max_entries(name, size);
    }
    for (name, size) in own {
        loader.map_max_entries(name, *size);
    }
    for name in ALL.iter().chain(own.iter().map(|(name, _)| name)) {
        loader.map_pin_path(name, dir.join(name));
    }
    loader.load(object).map_err(failed("load the data plane"))
}

const ALL: [&str; 18] = [
    map::CONN4,
    map::CONN6,
    map::CLOCK,
    map::TIMER,
    map::IFACES,
    map::SERVICE_KEYS,
    map::SERVICES,
    map::SERVICE_STATE,
    map::DESTS,
    map::DEST_INFO,
    map::DEST_STATE,
    map::DEST_STATS,
    map::LISTS,
    map::TABLES,
    map::HOPS,
    map::REPLY_HOPS,
    map::VERDICTS,
    // The last: its pin says that all are there.
    map::CONFIG,
];

impl Maps {
    fn open(dir: &Path, fresh: bool, mask4: u32, mask6: u32) -> Result<Maps> {
        let config = array::<Config>(dir, map::CONFIG)?;
        if fresh {
            let mut seed = Seed::default();
            for word in &mut seed.0 {
                *word = random()?;
            }
            let t = Timeouts::default();
            let policy = Policy::new(&t);
            let timeouts_s = [t.tcp, t.tcp_fin, t.udp, 0];
            let c = Config { version: abi::VERSION, seed, policy, mask4, mask6, flags: 0, turned_at: 0, timeouts_s };
            config.set(0, c)?;
        }
        let c = config.get(0)?;
        let keys = HashMap::try_from(open(dir, map::SERVICE_KEYS, aya::maps::Map::HashMap)?);
        Ok(Maps {
            clock: array(dir, map::CLOCK)?,
            ifaces: array(dir, map::IFACES)?,
            keys: Keys(keys.map_err(failed("map SERVICE_KEYS"))?),
            services: array(dir, map::SERVICES)?,
            service_state: array(dir, map::SERVICE_STATE)?,
            dests: array(dir, map::DESTS)?,
            dest_info: array(dir, map::DEST_INFO)?,
            dest_state: array(dir, map::DEST_STATE)?,
            dest_stats: per_cpu(dir, map::DEST_STATS)?,
            lists: array(dir, map::LISTS)?,
            tables: array(dir, map::TABLES)?,
            hops: array(dir, map::HOPS)?,
            reply_hops: array(dir, map::REPLY_HOPS)?,
            verdicts: per_cpu(dir, map::VERDICTS)?,
            conns4: conns(dir, map::CONN4, mask4, c)?,
            conns6: conns(dir, map::CONN6, mask6, c)?,
            config,
        })
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

fn open(dir: &Path, name: &str, kind: fn(MapData) -> aya::maps::Map) -> Result<aya::maps::Map> {
    MapData::from_pin(dir.join(name)).map(kind).map_err(failed(format!("pinned map {name}")))
}
fn array<T: Plain>(dir: &Path, name: &'static str) -> Result<Table<T>> {
    let data = MapData::from_pin(dir.join(name)).map_err(failed(format!("pinned map {name}")))?;
    let len = data.info().map_err(failed(format!("map {name}")))?.max_entries();
    let bytes = len as usize * Table::<T>::WORDS * 8;
    let mapping = raw::Mapping::new(data.fd().as_fd(), bytes).map_err(failed(format!("map {name} into memory")))?;
    Ok(Table { mapping, len, name, value: std::marker::PhantomData })
}
fn per_cpu<T: Plain>(dir: &Path, name: &'static str) -> Result<PerCpu<T>> {
    let map = PerCpuArray::try_from(open(dir, name, aya::maps::Map::PerCpuArray)?);
    Ok(PerCpu(map.map_err(failed(format!("map {name}")))?, name))
}
fn conns<F: rvs_datapath::packet::Ip>(dir: &Path, name: &str, mask: u32, c: Config) -> Result<ConnTable<F>> {
    let data = MapData::from_pin(dir.join(name)).map_err(failed(format!("pinned map {name}")))?;
    let bytes = (mask as usize + 1) * F::WORDS * 8;
    let mapping = raw::Mapping::new(data.fd().as_fd(), bytes).map_err(failed(format!("map {name} into memory")))?;
    Ok(ConnTable::new(mapping, mask, c))
}

/// A random word from the kernel.
fn random() -> Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: a buffer of eight bytes of ours.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n != 8 {
        return Err(failed("random numbers")(std::io::Error::last_os_error()));
    }
    Ok(u64::from_ne_bytes(bytes))
}
