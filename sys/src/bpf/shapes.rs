//! The maps of one value that the programs reach without a lookup: which, how large, made or adopted; and the object loaded over them.

use super::{BpfError, ConnTable, PerCpu, Plain, Result, Sizes, Table, failed, flat, generation, raw};
use aya::maps::MapData;
use aya::{Ebpf, EbpfLoader};
use rvs_control::settings::Settings;
use rvs_datapath::abi::{self, Clock, Config, CpuStats, Hop, Iface, map};
use rvs_datapath::conn::{Policy, Timeouts};
use rvs_datapath::ct::{Family, Seed, V4, V6};
use rvs_datapath::verdict::COUNTERS;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The maps that the programs reach without a lookup (`flat`), and how many entries each has: a power of two, or one.
pub(super) struct Flat {
    pub(super) maps: Vec<(Shape, OwnedFd)>,
    /// The tables that flows come from, if any do, as `OLD4`, `OLD6` and `OLD_STATE`. (Else these stand for our own, which nobody touches by them.)
    pub(super) old: Option<Vec<(Shape, OwnedFd)>>,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub name: &'static str,
    /// 8-byte words of an entry.
    pub words: usize,
    /// Entries: a power of two.
    pub len: u32,
    /// Such an array for each CPU.
    pub per_cpu: bool,
}

impl Shape {
    const fn new<T>(name: &'static str, len: u32) -> Shape {
        Shape { name, words: size_of::<T>().div_ceil(8), len, per_cpu: false }
    }
    const fn per_cpu<T>(name: &'static str, len: u32) -> Shape {
        Shape { per_cpu: true, ..Shape::new::<T>(name, len) }
    }
    /// Bytes of the whole map.
    pub(super) fn bytes(&self) -> Result<u64> {
        let parts = if self.per_cpu { cpu_parts()? } else { 1 };
        Ok(self.words as u64 * 8 * u64::from(self.len) * u64::from(parts))
    }
}

/// The maps of one value, for these sizes.
pub fn shapes(s: &Sizes) -> Result<Vec<Shape>> {
    let (services, dests) = (s.services.next_power_of_two(), s.dests.next_power_of_two());
    Ok(vec![
        Shape::new::<[u64; V4::WORDS]>(map::CONN4, Sizes::buckets::<V4>(s.flows4)?),
        Shape::new::<[u64; V6::WORDS]>(map::CONN6, Sizes::buckets::<V6>(s.flows6)?),
        Shape::new::<Clock>(map::CLOCK, 1),
        Shape::new::<Iface>(map::IFACES, abi::IFACES_MAX),
        Shape::new::<abi::Vlan>(map::VLANS, abi::VLANS_MAX),
        Shape::new::<abi::Service>(map::SERVICES, services),
        Shape::new::<abi::ServiceState>(map::SERVICE_STATE, services),
        Shape::new::<abi::Dest>(map::DESTS, dests),
        Shape::new::<abi::Tunnel>(map::TUNNELS, dests),
        Shape::new::<abi::DestInfo>(map::DEST_INFO, dests),
        Shape::new::<abi::DestState>(map::DEST_STATE, dests),
        Shape::per_cpu::<CpuStats>(map::DEST_STATS, dests),
        Shape::new::<abi::ListEntry>(map::LISTS, s.lists.next_power_of_two()),
        Shape::new::<u32>(map::TABLES, s.tables.next_power_of_two()),
        Shape::new::<abi::Local>(map::LOCALS, abi::LOCALS_MAX),
        side::<V4>(s.fullnat, s.flows4)?,
        side::<V6>(s.fullnat, s.flows6)?,
        Shape::new::<Hop>(map::HOPS, s.hops.next_power_of_two()),
        Shape::new::<Hop>(map::REPLY_HOPS, abi::REPLY_HOPS_MAX),
        Shape::new::<[u64; abi::fragment::WORDS]>(map::FRAGMENTS, abi::FRAGMENTS_MAX),
        Shape::new::<u64>(map::RATES, abi::RATES_MAX),
        Shape::per_cpu::<u64>(map::VERDICTS, COUNTERS as u32),
        Shape::per_cpu::<[u64; abi::SCRATCH_WORDS]>(map::SCRATCH4, 1),
        Shape::per_cpu::<[u64; abi::SCRATCH_WORDS]>(map::SCRATCH6, 1),
        Shape::new::<abi::Move>(map::MOVES, abi::MOVES_MAX),
        Shape::new::<abi::Leave>(map::LEAVES, abi::MOVES_MAX),
        Shape::new::<abi::Trace>(map::TRACE, 1),
        Shape::per_cpu::<abi::TraceRoom>(map::TRACE_ROOM, 1),
        Shape::new::<abi::Taker>(map::TAKER, 1),
        Shape::per_cpu::<abi::HandRoom>(map::HAND_ROOM, 1),
        Shape::new::<Config>(map::CONFIG, 1),
    ])
}

/// The rows beside a connection table: one, or as many as that has places.
fn side<I: rvs_datapath::packet::Ip>(whole: bool, flows: u32) -> Result<Shape> {
    let rows = if whole { Sizes::buckets::<I>(flows)? * I::WAYS as u32 } else { 1 }.next_power_of_two();
    Ok(match I::FAMILY {
        4 => Shape::new::<[u64; abi::SIDE4_WORDS]>(map::SIDE4, rows),
        _ => Shape::new::<[u64; abi::SIDE6_WORDS]>(map::SIDE6, rows),
    })
}

/// CPUs that there can be.
pub(super) fn cpus() -> Result<u32> {
    let cpus = aya::util::nr_cpus().map_err(|(path, source)| failed(format!("read {path}"))(source))?;
    Ok(cpus as u32)
}
/// Parts of a map that has one for each: a power of two.
fn cpu_parts() -> Result<u32> {
    Ok(cpus()?.next_power_of_two())
}

/// A new map, not pinned.
pub(super) fn make(shape: &Shape) -> Result<OwnedFd> {
    let (name, bytes) = (shape.name, shape.bytes()?);
    let too_large = || BpfError::Refused(format!("map {name} would have {bytes} bytes: at most {}", u32::MAX / 2));
    let bytes = u32::try_from(bytes).ok().filter(|b| *b <= u32::MAX / 2).ok_or_else(too_large)?;
    raw::create_mappable(name, bytes).map_err(failed(format!("map {name} of {bytes} bytes")))
}

impl Flat {
    pub(super) fn try_clone(&self) -> Result<Flat> {
        let clone =
            |(shape, fd): &(Shape, OwnedFd)| Ok((*shape, fd.try_clone().map_err(failed("open file of a map"))?));
        let all = |maps: &[(Shape, OwnedFd)]| maps.iter().map(clone).collect::<Result<Vec<_>>>();
        Ok(Flat { maps: all(&self.maps)?, old: self.old.as_deref().map(all).transpose()? })
    }

    /// New ones. All but CONFIG, which comes last, are pinned: its pin says that all are there.
    pub(super) fn make(dir: &Path, sizes: &Sizes) -> Result<Flat> {
        let mut made = Vec::new();
        for shape in shapes(sizes)? {
            made.push((shape, make(&shape)?));
            // Left behind by a start that was cut short.
            let _ = std::fs::remove_file(dir.join(shape.name));
        }
        for name in LOOKED_UP {
            let _ = std::fs::remove_file(dir.join(name));
        }
        for (shape, fd) in made.iter().filter(|(shape, _)| shape.name != map::CONFIG) {
            let path = dir.join(shape.name);
            raw::pin(fd.as_fd(), &path).map_err(failed(format!("pin {}", path.display())))?;
        }
        Ok(Flat { maps: made, old: None })
    }

    /// Those pinned, if they are of our layout.
    pub(super) fn adopt(dir: &Path) -> Result<Flat> {
        let other = |what: String| {
            BpfError::Refused(format!(
                "the pins in {} were made by another version of rvsd ({what}): stop with that version's `rvsd --teardown`, or use another folder (--pin)",
                dir.display()
            ))
        };
        let mut found = Vec::new();
        // CONFIG first: without its version nothing else is worth a look.
        for shape in shapes(&Sizes::default())?.into_iter().rev() {
            let name = shape.name;
            let (shape, fd) = Flat::adopt_one(shape, &generation::pin(dir, name)).map_err(|e| match e {
                BpfError::Refused(what) => other(what),
                failed => failed,
            })?;
            if name == map::CONFIG {
                let version = Table::<Config>::new(fd.as_fd(), name, shape.len)?.get(0)?.version;
                if version != abi::VERSION {
                    return Err(other(format!("layout {version:016x}, ours is {:016x}", abi::VERSION)));
                }
            }
            found.push((shape, fd));
        }
        Ok(Flat { maps: found, old: None })
    }

    /// A pinned map of this shape, and how many entries it has. `Refused`: it is of another.
    pub(super) fn adopt_one(shape: Shape, path: &Path) -> Result<(Shape, OwnedFd)> {
        let name = shape.name;
        let data = MapData::from_pin(path).map_err(failed(format!("pinned map {name}")))?;
        let size = data.info().map_err(failed(format!("map {name}")))?.value_size();
        let one = Shape { len: 1, ..shape }.bytes()?;
        let len = (u64::from(size) / one) as u32;
        if !u64::from(size).is_multiple_of(one) || !len.is_power_of_two() {
            return Err(BpfError::Refused(format!("map {name} of {size} bytes")));
        }
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(failed(format!("map {name}")))?;
        Ok((Shape { len, ..shape }, fd))
    }

    /// The first configuration; then all is there.
    pub(super) fn configure(&self, dir: &Path) -> Result<()> {
        let mut seed = Seed::default();
        for word in &mut seed.0 {
            *word = random()?;
        }
        let t = Timeouts::default();
        let policy = Policy::new(&t);
        let timeouts_s = [t.tcp, t.tcp_fin, t.udp, 0];
        let (flags, turned_at, drop_rate, spare) = (0, 0, 0, 0);
        let settings = Settings::default().values();
        let config =
            Config { version: abi::VERSION, flags, turned_at, seed, policy, timeouts_s, drop_rate, spare, settings };
        self.table::<Config>(map::CONFIG)?.set(0, config)?;
        let path = dir.join(map::CONFIG);
        raw::pin(self.get(map::CONFIG)?.1, &path).map_err(failed(format!("pin {}", path.display())))
    }

    /// What the programs know of them.
    pub(super) fn symbols(&self) -> Result<Vec<(String, flat::Value)>> {
        let mut symbols = vec![("CPUS_MASK".to_owned(), flat::Value::Number(u64::from(cpu_parts()? - 1)))];
        for (shape, fd) in &self.maps {
            Flat::symbols_of(shape, fd.as_raw_fd(), &mut symbols);
        }
        let own = self.maps.iter().map(|(shape, fd)| (shape, fd.as_raw_fd()));
        match &self.old {
            Some(old) => Flat::old_symbols(old.iter().map(|(shape, fd)| (shape, fd.as_raw_fd())), &mut symbols),
            None => Flat::old_symbols(own, &mut symbols),
        }
        Ok(symbols)
    }
    /// ... of one.
    pub(super) fn symbols_of(
        Shape { name, words, len, .. }: &Shape,
        fd: i32,
        symbols: &mut Vec<(String, flat::Value)>,
    ) {
        symbols.push(((*name).to_owned(), flat::Value::Map(fd)));
        symbols.push((format!("{name}_MASK"), flat::Value::Number(u64::from(len - 1))));
        symbols.push((format!("{name}_BYTES"), flat::Value::Number(u64::from(*len) * *words as u64 * 8)));
    }

    /// ... of those that flows come from.
    pub(super) fn old_symbols<'a>(
        maps: impl Iterator<Item = (&'a Shape, i32)>,
        symbols: &mut Vec<(String, flat::Value)>,
    ) {
        for (shape, fd) in maps {
            match shape.name {
                map::CONN4 | map::CONN6 => {
                    let name = if shape.name == map::CONN4 { "OLD4" } else { "OLD6" };
                    let len = shape.len * shape.words as u32;
                    Flat::symbols_of(&Shape { name, words: 1, len, ..*shape }, fd, symbols);
                }
                map::DEST_STATE => {
                    Flat::symbols_of(&Shape { name: "OLD_STATE", ..*shape }, fd, symbols);
                    symbols.push(("OLD_STATE_WORDS".to_owned(), flat::Value::Number(shape.words as u64)));
                }
                _ => {}
            }
        }
    }

    pub(super) fn get(&self, name: &str) -> Result<(&'static str, BorrowedFd<'_>, u32)> {
        let found = self.maps.iter().find(|(shape, _)| shape.name == name);
        let (shape, fd) = found.ok_or_else(|| BpfError::Refused(format!("there is no map {name}")))?;
        Ok((shape.name, fd.as_fd(), shape.len))
    }
    pub(super) fn table<T: Plain>(&self, name: &str) -> Result<Table<T>> {
        let (name, fd, len) = self.get(name)?;
        Table::new(fd, name, len)
    }
    pub(super) fn per_cpu<T: Plain>(&self, name: &str) -> Result<PerCpu<T>> {
        let (name, fd, len) = self.get(name)?;
        Ok(PerCpu { all: Table::new(fd, name, len * cpu_parts()?)?, len, cpus: cpus()? })
    }
    pub(super) fn conns<F: rvs_datapath::packet::Ip>(&self, name: &str, config: Config) -> Result<ConnTable<F>> {
        let (name, fd, len) = self.get(name)?;
        let mapping = raw::Mapping::new(fd, len as usize * F::WORDS * 8);
        Ok(ConnTable::new(mapping.map_err(failed(format!("map {name} into memory")))?, len - 1, config))
    }
}

pub(super) fn load(object: &[u8], dir: &Path, sizes: &Sizes, own: &[(&str, u32)], flat: &Flat) -> Result<Ebpf> {
    load_with(object, sizes, own, flat, |name| generation::pin(dir, name))
}

/// The same for the maps in `next/`, where the timer is to be too.
pub(super) fn load_next(object: &[u8], dir: &Path, sizes: &Sizes, flat: &Flat) -> Result<Ebpf> {
    load_with(object, sizes, &[], flat, |name| match name {
        map::TIMER => dir.join(generation::NEXT).join(name),
        _ => generation::pin(dir, name),
    })
}

fn load_with(
    object: &[u8],
    sizes: &Sizes,
    own: &[(&str, u32)],
    flat: &Flat,
    pin: impl Fn(&str) -> PathBuf,
) -> Result<Ebpf> {
    let object = flat::bind(object, &flat.symbols()?).map_err(BpfError::Refused)?;
    let mut loader = EbpfLoader::new();
    loader.map_max_entries(map::SERVICE_KEYS, sizes.services);
    for (name, size) in own {
        loader.map_max_entries(name, *size);
    }
    for name in LOOKED_UP.iter().chain(own.iter().map(|(name, _)| name)) {
        loader.map_pin_path(name, pin(name));
    }
    loader.load(&object).map_err(failed("load the data plane"))
}

/// The maps that are not flat.
pub(super) const LOOKED_UP: [&str; 3] = [map::TIMER, map::SERVICE_KEYS, map::WATCHED];

pub(super) const ALL: [&str; 34] = [
    // The first: without its pin nobody takes the others for whole.
    map::CONFIG,
    map::CONN4,
    map::CONN6,
    map::CLOCK,
    map::TIMER,
    map::IFACES,
    map::VLANS,
    map::SERVICE_KEYS,
    map::SERVICES,
    map::SERVICE_STATE,
    map::DESTS,
    map::TUNNELS,
    map::DEST_INFO,
    map::DEST_STATE,
    map::DEST_STATS,
    map::LISTS,
    map::TABLES,
    map::HOPS,
    map::REPLY_HOPS,
    map::FRAGMENTS,
    map::RATES,
    map::VERDICTS,
    map::SCRATCH4,
    map::SCRATCH6,
    map::LOCALS,
    map::SIDE4,
    map::SIDE6,
    map::MOVES,
    map::LEAVES,
    map::TRACE,
    map::TRACE_ROOM,
    map::WATCHED,
    map::TAKER,
    map::HAND_ROOM,
];

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
