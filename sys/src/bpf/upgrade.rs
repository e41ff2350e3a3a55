//! The pinned maps of another version's layout are taken over into maps of ours, while packets come: the data plane at work becomes the elder (`elder`), flows
//! move, and all that lies in both layouts alike is shared, so it stays. `layouts` says what does not, and how to read it.

use super::attach;
use super::elder::{Before, OWN, check_memory};
use super::layouts::{Layout, version};
use super::shapes::Flat;
use super::{BpfError, Dataplane, Mapping, Result, Shape, Sizes, failed, gates, generation};
use aya::programs::{ProgramFd, loaded_programs};
use rvs_datapath::abi::{self, Clock, Config, map};
use rvs_datapath::ct::{Family, V4, V6};
use rvs_datapath::elder::ELDER;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Pins of another layout than ours, which we can take over.
pub struct Upgrade {
    dir: PathBuf,
    pub layout: &'static Layout,
    /// Its maps that we have too.
    maps: Vec<(Shape, OwnedFd)>,
    sizes: Sizes,
    /// What has to be made.
    wanted: Vec<Shape>,
}

/// What an upgrade would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub from: u64,
    pub from_name: &'static str,
    pub to: u64,
    /// Connections of IPv4 and of IPv6 to be moved.
    pub flows: [u32; 2],
    /// Bytes of the new maps, beside the old ones for a while.
    pub memory: u64,
    /// The maps that are made anew; all others stay.
    pub maps: Vec<&'static str>,
}

impl Upgrade {
    /// `None`: there is nothing to be upgraded: no pins, pins of our layout, or a move to our layout is under way.
    ///
    /// # Errors
    /// Pins of a layout that we can't read, or on their way to one that is not ours.
    pub fn find(dir: &Path) -> Result<Option<Upgrade>> {
        generation::recover(dir)?;
        Upgrade::look(dir)
    }

    /// The same without what [`Self::find`] may have to clear away: another rvsd may be at work.
    ///
    /// # Errors
    /// As for [`Self::find`].
    pub fn look(dir: &Path) -> Result<Option<Upgrade>> {
        let next = dir.join(generation::NEXT).join(map::CONFIG);
        if next.exists() {
            let to = version(&next)?;
            if to != abi::VERSION {
                return Err(BpfError::Refused(format!(
                    "another version of rvsd (layout {to:016x}, ours is {:016x}) is moving the connections in {}: start that version, and let it finish (`rvs conntable show`)",
                    abi::VERSION,
                    dir.display()
                )));
            }
            return Ok(None);
        }
        match Layout::of_pins(dir)? {
            Some(layout) if !layout.is_ours() => Upgrade::from(dir, layout).map(Some),
            _ => Ok(None),
        }
    }

    fn from(dir: &Path, layout: &'static Layout) -> Result<Upgrade> {
        let mut maps = Vec::new();
        for shape in super::shapes(&Sizes::default())? {
            let path = dir.join(shape.name);
            if path.exists() {
                maps.push(Flat::adopt_one(layout.shape(shape), &path)?);
            }
        }
        let len = |name: &str| maps.iter().find(|(s, _)| s.name == name).map(|(s, _)| s.len);
        let need = |name: &str| len(name).ok_or_else(|| BpfError::Refused(format!("there is no map {name}")));
        let flows = [need(map::CONN4)? * V4::WAYS as u32, need(map::CONN6)? * V6::WAYS as u32];
        let sizes = Sizes {
            flows4: flows[0] / 2,
            flows6: flows[1] / 2,
            services: need(map::SERVICES)?,
            dests: need(map::DESTS)?,
            lists: need(map::LISTS)?,
            tables: need(map::TABLES)?,
            hops: need(map::HOPS)?,
            fullnat: need(map::SIDE4)? >= flows[0] && need(map::SIDE6)? >= flows[1],
        };
        let is_new = |s: &Shape| OWN.contains(&s.name) || layout.differs(s.name) || len(s.name).is_none();
        let wanted = super::shapes(&sizes)?.into_iter().filter(is_new).collect();
        Ok(Upgrade { dir: dir.to_owned(), layout, maps, sizes, wanted })
    }

    fn find_map(&self, name: &str) -> Result<&(Shape, OwnedFd)> {
        let found = self.maps.iter().find(|(s, _)| s.name == name);
        found.ok_or_else(|| BpfError::Refused(format!("there is no map {name}")))
    }
    fn read(&self, name: &str) -> Result<super::Foreign> {
        let (shape, fd) = self.find_map(name)?;
        self.layout.open(shape.name, fd.as_fd(), shape.len, shape.words)
    }
    fn flows<F: rvs_datapath::packet::Ip>(&self, name: &str, config: Config) -> Result<u32> {
        let (shape, fd) = self.find_map(name)?;
        let mapping = Mapping::new(fd.as_fd(), shape.len as usize * F::WORDS * 8);
        let mapping = mapping.map_err(failed(format!("map {name} into memory")))?;
        Ok(super::ConnTable::<F>::new(mapping, shape.len - 1, config).laid_out(self.layout).counted()[0])
    }

    /// # Errors
    /// It can't be done: there is too little memory.
    pub fn plan(&self) -> Result<Plan> {
        let config: Config = self.read(map::CONFIG)?.get(0);
        Ok(Plan {
            from: self.layout.version,
            from_name: self.layout.name,
            to: abi::VERSION,
            flows: [self.flows::<V4>(map::CONN4, config)?, self.flows::<V6>(map::CONN6, config)?],
            memory: check_memory(&self.wanted)?,
            maps: self.wanted.iter().map(|s| s.name).collect(),
        })
    }

    /// The new data plane at work, with flows to move ([`Dataplane::take_over`]).
    ///
    /// # Errors
    /// No memory, or the kernel refuses: the old one goes on as before.
    pub fn carry_out(self, object: &[u8]) -> Result<Dataplane> {
        check_memory(&self.wanted)?;
        let mut config: Config = self.read(map::CONFIG)?.get(0);
        let clock: Clock = self.read(map::CLOCK)?.get(0);
        (config.version, config.flags) = (abi::VERSION, config.flags & !ELDER);
        let begin_empty = |name: &str| OWN.contains(&name);
        let mut values = Vec::new();
        for shape in self.wanted.iter().filter(|s| self.layout.differs(s.name) && !begin_empty(s.name)) {
            values.push((shape.name, self.read(shape.name)?));
        }
        let programs = at_work(&self.dir)?;
        let Upgrade { dir, layout, maps, sizes, wanted } = self;
        let before = Before { dir: dir.clone(), flat: Flat { maps, old: None }, config, clock, programs, values };
        let mut next = before.heir(object, &sizes, &wanted)?;
        match next.start().and_then(|()| next.succeed()) {
            Ok(()) => Ok(Dataplane { upgraded: Some(layout), ..next }),
            Err(error) => {
                put_back(&dir)?;
                generation::discard(&dir)?;
                Err(error)
            }
        }
    }
}

/// The programs in the links, by hook.
fn at_work(dir: &Path) -> Result<Vec<(&'static str, ProgramFd)>> {
    let mut programs: Vec<(&'static str, ProgramFd)> = Vec::new();
    for a in attach::list(dir)? {
        let name = a.hook.program();
        if a.ifindex != 0 && !programs.iter().any(|(n, _)| *n == name) {
            let found = loaded_programs().filter_map(std::result::Result::ok).find(|p| p.id() == a.program);
            let gone = || BpfError::Refused(format!("program {} of {} is gone", a.program, a.name));
            let fd = found.ok_or_else(gone)?.fd().map_err(failed(format!("program {name}")))?;
            programs.push((name, fd));
        }
    }
    Ok(programs)
}

/// The elder's programs into the links again.
fn put_back(dir: &Path) -> Result<()> {
    for a in attach::list(dir)?.iter().filter(|a| a.ifindex != 0) {
        attach::put_back(dir, a, &generation::elder_pin(dir, a.hook.program()))?;
    }
    Ok(())
}

/// Take a data plane down whatever its layout: by the names of its pins, which all versions have. False: there is none.
///
/// # Errors
/// A program can't be taken off, or a pin removed.
pub fn discard(dir: &Path) -> Result<bool> {
    if !dir.join(map::CONFIG).exists() {
        return Ok(false);
    }
    for a in attach::list(dir)? {
        attach::detach(dir, &a.name, a.hook)?;
    }
    gates::close_all(dir)?;
    generation::forget(dir)?;
    // The first: without it nobody takes the others for whole.
    let mut paths = vec![dir.join(map::CONFIG)];
    let at = || format!("folder {}", dir.display());
    for entry in std::fs::read_dir(dir).map_err(failed(at()))? {
        let path = entry.map_err(failed(at()))?.path();
        // (In the root of a bpffs the kernel has files of its own, with a dot, which no pin can have.)
        let is_pin = path.is_file() && path.extension().is_none();
        if is_pin && path != paths[0] {
            paths.push(path);
        }
    }
    for path in paths {
        std::fs::remove_file(&path).map_err(failed(format!("remove {}", path.display())))?;
    }
    Ok(true)
}
