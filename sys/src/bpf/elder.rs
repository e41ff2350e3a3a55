//! Flows move from the tables of the data plane that was at work, the *elder*, to those of this one, while packets come, and none is lost.
//! `rvs_datapath::elder` has what the two promise each other, `generation` where the pins are meanwhile.
//!
//! 1. New programs over new, empty tables are put into all links. A packet of no flow in them goes to the elder, which does all as before.
//! 2. The elder is told that it is one. From then on flows begin in the new tables.
//! 3. Flow by flow: it is read in the old table, in words of no layout ([`carry`]), and entered in the new one, from where packets find it there. After a grace
//!    period no packet that has missed it there can be under way in the elder. What such packets have changed meanwhile is made up for, and the old entry is freed.
//!    Entering and freeing are done by programs (`ebpf/src/mover.rs`), with the counters: wherever user space is killed, each live entry is counted once.
//! 4. With no flow left, the elder is asked no more, and the new maps take its pins' names.
//!
//! A flow that can't be entered (no room, or its reply tuple is another's by now) stays with the elder until it ends, and is tried again.

use super::attach::Hook;
use super::conns::Beside;
use super::layouts::{Foreign, Layout};
use super::shapes::Flat;
use super::{
    ALWAYS, BpfError, ConnTable, Dataplane, Result, Shape, Sizes, attach, failed, gates, generation, make, raw,
};
use crate::memory;
use aya::programs::{ProgramFd, ProgramInfo};
use rvs_datapath::abi::{self, Clock, Config, Leave, MOVES_MAX, Move, map, moves};
use rvs_datapath::conn::carry::{self, Carried};
use rvs_datapath::conn::{self, Addressing, Conns};
use rvs_datapath::ct::{self, Entry, Family, V4, V6};
use rvs_datapath::elder::{ELDER, FLAGS_WORD};
use rvs_datapath::packet::Ip;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Maps that each data plane has of its own, where only the sizes of tables differ. The rest is shared.
pub(super) const OWN: [&str; 8] =
    [map::CONFIG, map::CLOCK, map::CONN4, map::CONN6, map::SIDE4, map::SIDE6, map::SCRATCH4, map::SCRATCH6];

/// Buckets that are looked at at a time.
const BUCKETS: u32 = 1 << 14;

/// The data plane that was at work.
pub(super) struct Elder {
    programs: Vec<(&'static str, ProgramFd)>,
    config: Foreign,
    clock: Foreign,
    /// The dests' counters, where they are other maps than ours.
    state: Option<Foreign>,
    conns4: ConnTable<V4>,
    conns6: ConnTable<V6>,
    /// The next bucket to be looked at: of the IPv4 table, then of the other.
    at: u32,
    pass: Pass,
    moved: u64,
    /// Flows that the last whole pass met and could not move.
    stuck: u64,
}

/// From the first bucket to the last.
#[derive(Default)]
struct Pass {
    met: u64,
    moved: u64,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Flows moved by this process.
    pub moved: u64,
    /// ... that are in the old tables still.
    pub left: u64,
    /// ... of which could not be moved when last tried.
    pub stuck: u64,
}

/// Flows that are in both tables.
#[derive(Default)]
pub struct Batch {
    v4: Vec<Found<V4>>,
    v6: Vec<Found<V6>>,
    /// A pass has ended that met flows and moved none: there is no hurry.
    pub idle: bool,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// Until every packet that was under way in a program has left it.
pub fn grace() {
    /// `MEMBARRIER_CMD_GLOBAL`: waits for an RCU grace period.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: a system call without memory.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        // A kernel with CPUs set apart (nohz_full) has none: longer than any packet takes.
        std::thread::park_timeout(std::time::Duration::from_millis(50));
    }
}

impl Elder {
    /// By its pins; `flat` of ours, while `next/` is there.
    pub(super) fn open(dir: &Path, flat: &mut Flat) -> Result<Elder> {
        let mut programs = Vec::new();
        for name in Hook::ALL.map(Hook::program) {
            let path = generation::elder_pin(dir, name);
            if path.exists() && !programs.iter().any(|(n, _)| *n == name) {
                let at = || failed(format!("program {}", path.display()));
                let info = ProgramInfo::from_pin(&path).map_err(at())?;
                programs.push((name, info.fd().map_err(at())?));
            }
        }
        let layout = Layout::of_pins(dir)?;
        let layout = layout.ok_or_else(|| BpfError::Refused(format!("there is no map CONFIG in {}", dir.display())))?;
        let shapes = super::shapes(&Sizes::default())?;
        let find = |name: &str| -> Result<(Shape, OwnedFd)> {
            let shape = shapes.iter().find(|s| s.name == name);
            let shape = shape.ok_or_else(|| BpfError::Refused(format!("there is no map {name}")))?;
            Flat::adopt_one(layout.shape(*shape), &dir.join(name))
        };
        let open = |name: &str| -> Result<Foreign> {
            let (shape, fd) = find(name)?;
            layout.open(shape.name, fd.as_fd(), shape.len, shape.words)
        };
        let mut old = Flat { maps: Vec::new(), old: None };
        for name in OWN.into_iter().chain([map::DEST_STATE, map::DESTS]) {
            old.maps.push(find(name)?);
        }
        let config = open(map::CONFIG)?;
        let c = config.get(0);
        let beside = |name: &str| -> Result<Beside> {
            let (shape, fd) = find(name)?;
            let sides = raw::Mapping::new(fd.as_fd(), shape.bytes()? as usize);
            Ok(Beside {
                sides: sides.map_err(failed(format!("map {name} into memory")))?,
                dests: old.table(map::DESTS)?,
            })
        };
        let elder = Elder {
            programs,
            clock: open(map::CLOCK)?,
            conns4: old.conns::<V4>(map::CONN4, c)?.beside(beside(map::SIDE4)?).laid_out(layout),
            conns6: old.conns::<V6>(map::CONN6, c)?.beside(beside(map::SIDE6)?).laid_out(layout),
            state: if layout.differs(map::DEST_STATE) { Some(open(map::DEST_STATE)?) } else { None },
            config,
            at: 0,
            pass: Pass::default(),
            moved: 0,
            stuck: 0,
        };
        old.maps.retain(|(shape, _)| [map::CONN4, map::CONN6, map::DEST_STATE].contains(&shape.name));
        flat.old = Some(old.maps);
        Ok(elder)
    }

    /// Its program for the hook of this one of ours.
    pub(super) fn program(&self, name: &str) -> Option<&ProgramFd> {
        self.programs.iter().find(|(n, _)| *n == name).map(|(_, fd)| fd)
    }

    /// Begin no flows from now on.
    fn tell(&self) {
        self.config.raw()[FLAGS_WORD].fetch_or(u64::from(ELDER), Ordering::SeqCst);
    }

    /// For the reads that follow.
    fn look(&mut self) {
        let (config, clock): (Config, Clock) = (self.config.get(0), self.clock.get(0));
        self.conns4.at(&config, &clock);
        self.conns6.at(&config, &clock);
    }
}

/// A flow and its entry.
type Found<F> = (Entry<<F as Family>::Words>, Carried<<F as Addressing>::Addr>);

/// Flows of the table from bucket `at` on, as many as are moved at a time; and live entries met that are no flows to move (they have timed out).
fn collect<I: Ip>(table: &ConnTable<I>, at: &mut u32, found: &mut Vec<Found<I>>) -> u64 {
    let (mut waiting, end) = (0, at.saturating_add(BUCKETS).min(table.buckets()));
    while *at < end && found.len() + I::WAYS <= MOVES_MAX as usize {
        for entry in ct::entries::<I, _>(table, *at) {
            match carry::read(table, &entry) {
                Some(flow) => found.push((entry, flow)),
                None => waiting += u64::from(entry.control & ct::REVERSE == 0),
            }
        }
        *at += 1;
    }
    waiting
}

/// Memory that these maps take.
///
/// # Errors
/// There is too little.
pub(super) fn check_memory(wanted: &[Shape]) -> Result<u64> {
    let cost = wanted.iter().map(Shape::bytes).sum::<Result<u64>>()?;
    let free = memory::available().map_err(failed("memory for the tables"))?;
    if cost <= free / 4 * 3 {
        return Ok(cost);
    }
    Err(BpfError::Refused(format!(
        "the tables take {} MiB, beside the old ones for a while, and {} MiB are free: a quarter of that is to be left",
        cost >> 20,
        free >> 20
    )))
}

/// The data plane at work that another one is to come after: by its pins, or an open one.
pub(super) struct Before {
    pub dir: PathBuf,
    /// The maps that are shared, and perhaps more.
    pub flat: Flat,
    pub config: Config,
    pub clock: Clock,
    /// Its programs at the hooks.
    pub programs: Vec<(&'static str, ProgramFd)>,
    /// What is in those of the new maps that do not begin empty.
    pub values: Vec<(&'static str, Foreign)>,
}

impl Before {
    /// The data plane after this one: new maps of these shapes, and the programs over them. It is in no link yet, and its clock stands still.
    ///
    /// # Errors
    /// No memory, or the kernel refuses: all is as before then.
    pub fn heir(self, object: &[u8], sizes: &Sizes, wanted: &[Shape]) -> Result<Dataplane> {
        let dir = self.dir.clone();
        let made = self.make(object, sizes, wanted);
        if made.is_err() {
            generation::discard(&dir)?;
        }
        made
    }

    fn make(self, object: &[u8], sizes: &Sizes, wanted: &[Shape]) -> Result<Dataplane> {
        let Before { dir, mut flat, config, clock, programs, values } = self;
        let next = dir.join(generation::NEXT);
        std::fs::create_dir_all(&next).map_err(failed(format!("folder {}", next.display())))?;
        let pin = |name: &str, fd: BorrowedFd<'_>| {
            let path = next.join(name);
            raw::pin(fd, &path).map_err(failed(format!("pin {}", path.display())))
        };
        for shape in wanted {
            let fd = make(shape)?;
            if shape.name != map::CONFIG {
                pin(shape.name, fd.as_fd())?;
            }
            flat.maps.retain(|(s, _)| s.name != shape.name);
            flat.maps.push((*shape, fd));
        }
        for (name, old) in &values {
            if let Some((shape, fd)) = flat.maps.iter().find(|(s, _)| s.name == *name) {
                let mapping = raw::Mapping::new(fd.as_fd(), shape.bytes()? as usize);
                old.copy_to(&mapping.map_err(failed(format!("map {name} into memory")))?);
            }
        }
        if wanted.iter().any(|s| s.name == map::DEST_STATE) {
            // Flows are counted as they are entered.
            let states = flat.table::<abi::DestState>(map::DEST_STATE)?;
            for dest in 0..states.len() {
                states.set(dest, abi::DestState { active: 0, inactive: 0, ..states.get(dest)? })?;
            }
        }
        flat.table::<Config>(map::CONFIG)?.set(0, config)?;
        flat.table::<Clock>(map::CLOCK)?.set(0, clock)?;
        for (name, program) in programs {
            let path = generation::elder_pin(&dir, name);
            if !path.exists() {
                attach::make_folder(&path)?;
                raw::pin(program.as_fd(), &path).map_err(failed(format!("pin {}", path.display())))?;
            }
        }
        let elder = Elder::open(&dir, &mut flat)?;
        let ebpf = super::shapes::load_next(object, &dir, sizes, &flat)?;
        let mut made = Dataplane::over(ebpf, flat, &dir, false)?.after(Some(elder))?;
        for name in ALWAYS {
            made.program(name)?;
        }
        pin(map::CONFIG, made.flat.get(map::CONFIG)?.1)?;
        Ok(made)
    }
}

impl Dataplane {
    /// # Errors
    /// Flows are being moved.
    pub fn refuse_if_moving(&self) -> Result<()> {
        if self.elder.is_none() {
            return Ok(());
        }
        Err(BpfError::Refused(
            "connections are being moved to another table: try again when `rvs conntable show` says that it is done"
                .into(),
        ))
    }

    /// Tables of other sizes (flows of IPv4 and IPv6 at half load) in the place of these; then [`Self::take_over`] has flows to move.
    ///
    /// # Errors
    /// Too small for what is in the tables, too large for the memory, or the kernel refuses: nothing has changed then.
    pub fn resize(&mut self, object: &[u8], flows: [u32; 2]) -> Result<()> {
        let hooks: Vec<Hook> = attach::list(&self.dir)?.iter().map(|a| a.hook).collect();
        let mut next = self.heir(object, flows, &hooks)?;
        if let Err(error) = next.start().and_then(|()| next.succeed()) {
            // All flows are in our tables still.
            self.attach_all()?;
            generation::discard(&self.dir)?;
            return Err(error);
        }
        *self = next;
        Ok(())
    }

    /// A data plane with tables of these sizes, whose elder this one is, for these hooks. No link has its programs yet, and its clock stands still.
    ///
    /// # Errors
    /// As for [`Self::resize`].
    pub fn heir(&mut self, object: &[u8], flows: [u32; 2], hooks: &[Hook]) -> Result<Dataplane> {
        self.refuse_if_moving()?;
        let sizes = Sizes {
            flows4: flows[0],
            flows6: flows[1],
            services: self.maps.services.len(),
            fullnat: self.has_room_for_sides(),
            ..Sizes::default()
        };
        let wanted: Vec<Shape> = super::shapes(&sizes)?.into_iter().filter(|s| OWN.contains(&s.name)).collect();
        self.check_room(&wanted)?;
        let mut programs = Vec::new();
        for name in hooks.iter().map(|hook| hook.program()) {
            programs.push((name, self.program(name)?));
        }
        let (config, clock) = (self.maps.config.get(0)?, self.maps.clock.get(0)?);
        let flat = self.flat.try_clone()?;
        Before { dir: self.dir.clone(), flat, config, clock, programs, values: Vec::new() }
            .heir(object, &sizes, &wanted)
    }

    fn check_room(&self, wanted: &[Shape]) -> Result<()> {
        let len = |name: &str| wanted.iter().find(|s| s.name == name).map_or(0, |s| u64::from(s.len));
        let tables = [
            ("IPv4", self.maps.conns4.counted()[1], len(map::CONN4) * V4::WAYS as u64),
            ("IPv6", self.maps.conns6.counted()[1], len(map::CONN6) * V6::WAYS as u64),
        ];
        for (family, entries, places) in tables {
            let entries = u64::from(entries);
            if entries * 4 > places * 3 {
                return Err(BpfError::Refused(format!(
                    "too small: the {entries} entries that {family} connections have today would fill more than three quarters of {places} places; at least {} is needed",
                    (entries * 2).div_ceil(3)
                )));
            }
        }
        check_memory(wanted).map(drop)
    }

    /// With this elder, if there is one.
    pub(super) fn after(mut self, elder: Option<Elder>) -> Result<Dataplane> {
        self.elder = elder;
        self.maps.elder_state = self.elder.as_mut().and_then(|elder| elder.state.take());
        Ok(self)
    }

    /// New programs into all links; then the elder begins no flows.
    pub(super) fn succeed(&mut self) -> Result<()> {
        self.attach_all()?;
        if let Some(elder) = &self.elder {
            elder.tell();
        }
        Ok(())
    }

    /// Are flows being moved, and how far is it?
    pub fn progress(&mut self) -> Result<Option<Progress>> {
        let Some(elder) = &mut self.elder else { return Ok(None) };
        elder.look();
        let left = elder.conns4.counted()[0] + elder.conns6.counted()[0];
        Ok(Some(Progress { moved: elder.moved, left: u64::from(left), stuck: elder.stuck }))
    }

    /// Flows in the old tables, for lists.
    pub fn elder_tables(&mut self) -> Result<Option<(&ConnTable<V4>, &ConnTable<V6>)>> {
        let Some(elder) = &mut self.elder else { return Ok(None) };
        elder.look();
        Ok(Some((&elder.conns4, &elder.conns6)))
    }

    /// Enter the next flows of the elder's tables in ours. They are to be let go by [`Self::leave`] after a grace period ([`grace`]), and there is to be one before
    /// the first call, too. `None`: there is no elder any more.
    ///
    /// # Errors
    /// A program does not run.
    pub fn take_over(&mut self) -> Result<Option<Batch>> {
        let Some(elder) = &mut self.elder else { return Ok(None) };
        elder.look();
        let mut batch = Batch::default();
        let (first, second) = (elder.conns4.buckets(), elder.conns6.buckets());
        if elder.at < first {
            elder.pass.met += collect(&elder.conns4, &mut elder.at, &mut batch.v4);
        } else {
            let mut at = elder.at - first;
            elder.pass.met += collect(&elder.conns6, &mut at, &mut batch.v6);
            elder.at = first + at;
        }
        elder.pass.met += (batch.v4.len() + batch.v6.len()) as u64;
        self.enter::<V4>(&mut batch.v4, "rvs_enter4")?;
        self.enter::<V6>(&mut batch.v6, "rvs_enter6")?;
        let done = (batch.v4.len() + batch.v6.len()) as u64;
        let Some(elder) = &mut self.elder else { return Ok(None) };
        elder.pass.moved += done;
        if elder.at >= first + second {
            let pass = std::mem::take(&mut elder.pass);
            (elder.at, elder.stuck) = (0, pass.met - pass.moved);
            batch.idle = pass.moved == 0;
            if pass.met == 0 {
                self.part()?;
                return Ok(None);
            }
        }
        Ok(Some(batch))
    }

    /// Those that could not be entered are taken out of `found`.
    fn enter<I: Ip>(&mut self, found: &mut Vec<Found<I>>, program: &str) -> Result<()> {
        if found.is_empty() {
            return Ok(());
        }
        for (i, (_, flow)) in (0..).zip(found.iter()) {
            self.maps.moves.set(i, Move::new::<I>(flow))?;
        }
        self.run_mover(program)?;
        let mut outcomes = Vec::new();
        for i in 0..found.len() as u32 {
            outcomes.push(self.maps.moves.get(i)?.outcome);
        }
        let mut outcomes = outcomes.into_iter();
        found.retain(|_| outcomes.next() == Some(moves::DONE));
        Ok(())
    }

    /// The old entries of flows that have been entered go. Was there a packet under way in the elder, what it has changed is made up for.
    ///
    /// # Errors
    /// A program does not run.
    pub fn leave(&mut self, batch: &Batch) -> Result<()> {
        let Some(elder) = &mut self.elder else { return Ok(()) };
        elder.look();
        let (changed4, leaves4) = since(&elder.conns4, &batch.v4);
        let (changed6, leaves6) = since(&elder.conns6, &batch.v6);
        for (changed, program) in [(changed4, "rvs_enter4"), (changed6, "rvs_enter6")] {
            if !changed.is_empty() {
                (0..).zip(changed).try_for_each(|(i, m)| self.maps.moves.set(i, m))?;
                self.run_mover(program)?;
            }
        }
        for leaves in [leaves4, leaves6].iter().filter(|leaves| !leaves.is_empty()) {
            (0..).zip(leaves).try_for_each(|(i, l)| self.maps.leaves.set(i, *l))?;
            self.run_mover("rvs_leave")?;
            let mut freed = 0;
            for i in 0..leaves.len() as u32 {
                freed += self.maps.leaves.get(i)?.freed;
            }
            if let Some(elder) = &mut self.elder {
                elder.moved += freed;
            }
        }
        Ok(())
    }

    fn run_mover(&mut self, program: &str) -> Result<()> {
        self.program(program)?;
        let done = self.test_run(program, &[0; 64], 1)?;
        if done.return_value == 2 {
            return Ok(());
        }
        Err(BpfError::Refused(format!("program {program} said {}", done.return_value)))
    }

    /// No flow is left with the elder: it is asked no more.
    fn part(&mut self) -> Result<()> {
        gates::part(&mut self.ebpf)?;
        grace();
        generation::commit(&self.dir)?;
        self.elder = None;
        self.maps.elder_state = None;
        self.flat.old = None;
        self.tidy()
    }
}

/// What has become of flows in the old table since they were read: what the new one is to be told, and what is to be freed.
fn since<I: Ip>(table: &ConnTable<I>, flows: &[Found<I>]) -> (Vec<Move>, Vec<Leave>) {
    let (mut changed, mut leaves) = (Vec::new(), Vec::new());
    for (entry, before) in flows {
        let (word, there) = table.control_there(entry.slot);
        let now = Entry { control: table.ours(there), ..*entry };
        if !ct::is_live(now.control) {
            // It has timed out there, and is not counted any more.
            continue;
        }
        if let Some(flow) = carry::read(table, &now)
            && (flow.state, flow.lent) != (before.state, before.lent)
        {
            changed.push(Move::new::<I>(&flow).since(before.state));
        }
        leaves.push(Leave {
            expected: there,
            word,
            family: u32::from(I::FAMILY),
            dest: conn::dest(now.control),
            counter: u32::from(!table.policy().row(now.control).active()),
            freed: 0,
        });
    }
    (changed, leaves)
}

const _: () = assert!(abi::MOVES_MAX.is_power_of_two());
