//! The connection tables as the daemon sees them: the same memory and the same code as the programs', read without a system call.

use rvs_datapath::abi::{Clock, Config, Dest};
use rvs_datapath::conn::{self, Addressing, Conns, Policy};
use rvs_datapath::ct::{self, Bucket, Buckets, Family, Found, Key, Rank, Seed};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Table;
use super::layouts::{Layout, OURS};
use super::raw::Mapping;

/// One family's table.
pub struct ConnTable<F: Family> {
    mapping: Mapping,
    mask: u32,
    config: Config,
    now_s: u32,
    beside: Option<Beside>,
    /// How the words are to be read.
    layout: &'static Layout,
    family: std::marker::PhantomData<F>,
}

/// What there is to know of flows beside their entries: FULLNAT's rows, and the dests.
pub(super) struct Beside {
    pub sides: Mapping,
    pub dests: Table<Dest>,
}

/// One bucket, or a row beside an entry, in our own words whatever its layout.
#[derive(Clone, Copy)]
pub struct Line<'a> {
    words: &'a [AtomicU64],
    read: Read,
}

#[derive(Clone, Copy)]
enum Read {
    AsIs,
    /// The last of each so many words is a control word.
    Entries(usize, fn(u64) -> u64),
    /// Which word is our first, second, ...
    Row(&'static [usize]),
}

/// Only reading is done of other layouts: nothing is written there.
impl Bucket for Line<'_> {
    fn load(&self, word: usize) -> u64 {
        let at = if let Read::Row(at) = self.read { at[word] } else { word };
        let there = self.words[at].load(Ordering::Acquire);
        match self.read {
            Read::Entries(each, ours) if word % each == each - 1 => ours(there),
            _ => there,
        }
    }
    fn store(&self, word: usize, value: u64) {
        if let Read::AsIs = self.read {
            self.words[word].store(value, Ordering::Release);
        }
    }
    fn cas(&self, word: usize, old: u64, new: u64) -> bool {
        let done = || self.words[word].compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        matches!(self.read, Read::AsIs) && done()
    }
}

/// A flow as lists show it. Ports in host order, addresses as they lie in the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// 4 or 6.
    pub family: u8,
    /// 1 TCP, 2 UDP, 3 SCTP.
    pub proto: u64,
    pub state: u64,
    pub client: [u8; 16],
    pub client_port: u16,
    pub virtual_address: [u8; 16],
    pub virtual_port: u16,
    pub dest: u32,
    pub seconds_left: u32,
    /// It came from the other director.
    pub synced: bool,
}

/// What is in a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    pub entries: u32,
    pub flows: u32,
    pub states: BTreeMap<(u64, u64), u32>,
    pub classes: [u32; 8],
}

/// Whose a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Belongs {
    pub dest: u32,
    /// From the real server to the client.
    pub reply: bool,
}

impl<F: Addressing + rvs_datapath::packet::Ip> ConnTable<F> {
    pub(super) fn new(mapping: Mapping, mask: u32, config: Config) -> Self {
        ConnTable { mapping, mask, config, now_s: 0, beside: None, layout: &OURS, family: std::marker::PhantomData }
    }
    pub(super) fn beside(self, beside: Beside) -> Self {
        ConnTable { beside: Some(beside), ..self }
    }
    pub(super) fn laid_out(self, layout: &'static Layout) -> Self {
        ConnTable { layout, ..self }
    }
    /// Where in the table the control word of a slot lies, and the word itself, as it is there.
    pub(super) fn control_there(&self, slot: ct::Slot) -> (u32, u64) {
        let (bucket, way) = self.place(slot);
        let at = bucket as usize * F::WORDS + way * (F::KEYS + 1) + F::KEYS;
        (at as u32, self.mapping.words()[at].load(Ordering::Acquire))
    }
    /// Such a word, as we would have it.
    pub(super) fn ours(&self, control: u64) -> u64 {
        (self.layout.control)(control)
    }
    /// Live entries that are flows (and not for their replies), and all entries.
    pub fn counted(&self) -> [u32; 2] {
        let mut counts = [0; 2];
        for entry in (0..self.buckets()).flat_map(|n| ct::entries::<F, _>(self, n)) {
            counts[0] += u32::from(ct::is_live(entry.control) && entry.control & ct::REVERSE == 0);
            counts[1] += 1;
        }
        counts
    }
    /// Flows by protocol (as in [`Flow`]) and state, and by class ([`conn::class`]).
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for entry in (0..self.buckets()).flat_map(|n| ct::entries::<F, _>(self, n)) {
            census.entries += 1;
            if ct::is_live(entry.control) && entry.control & ct::REVERSE == 0 {
                census.flows += 1;
                let state = (ct::proto(entry.control), ct::state(entry.control));
                *census.states.entry(state).or_default() += 1;
                let class = conn::class(&self.config.policy, entry.control, self.now_s);
                census.classes[class as usize & 7] += 1;
            }
        }
        census
    }
    pub fn buckets(&self) -> u32 {
        self.mask + 1
    }
    /// Places for entries.
    pub fn slots(&self) -> u32 {
        self.buckets() * F::WAYS as u32
    }
    /// For the reads that follow.
    pub fn at(&mut self, config: &Config, clock: &Clock) {
        self.config = *config;
        self.now_s = clock.now_s;
    }
    /// The flows of some buckets, those that have timed out left out.
    pub fn flows(&self, buckets: std::ops::Range<u32>) -> impl Iterator<Item = Flow> + '_ {
        buckets.flat_map(|n| ct::entries::<F, _>(self, n)).filter_map(|e| {
            let forward = ct::is_live(e.control) && e.control & ct::REVERSE == 0;
            if !forward || conn::expired(&self.config.policy, e.control, self.now_s) {
                return None;
            }
            let key = e.key::<F>(&self.config.seed);
            Some(Flow {
                family: F::FAMILY,
                proto: ct::proto(e.control),
                state: ct::state(e.control),
                client: F::bytes(F::source(&e.words)),
                client_port: key.sport(),
                virtual_address: F::bytes(F::destination(&e.words)),
                virtual_port: key.dport(),
                dest: conn::dest(e.control),
                seconds_left: conn::seconds_left(&self.config.policy, e.control, self.now_s),
                synced: e.control & conn::SYNCED != 0,
            })
        })
    }
    /// The connection that a packet with these ends is of, from whichever side; ports in host order, `proto` as in [`Flow`].
    pub fn of_packet(&self, ends: [F::Addr; 2], ports: [u16; 2], proto: u64) -> Option<Belongs> {
        let key = Key::new(F::words(ends[0], ends[1]), ports[0], ports[1], proto);
        match ct::lookup::<F, _>(self, &key) {
            Found::Live(hit) if hit.control & ct::REVERSE != 0 => {
                // (What the link names is not proved to be the flow's, which would be a write if it is not; it nearly always is.)
                let forward = ct::peek::<F, _>(self, conn::link_of(hit.control));
                let linked = forward.control & (ct::LINKED | ct::REVERSE) == ct::LINKED;
                linked.then(|| Belongs { dest: conn::dest(forward.control), reply: true })
            }
            Found::Live(hit) => Some(Belongs { dest: conn::dest(hit.control), reply: false }),
            Found::Weak(control) => Some(Belongs { dest: conn::dest(control), reply: false }),
            Found::None => None,
        }
    }
    /// Is this flow, of another table, in this one?
    fn has(&self, f: &Flow) -> bool {
        let address = |bytes: &[u8; 16]| F::from_address(&(*bytes).into());
        let words = F::words(address(&f.client), address(&f.virtual_address));
        let key = Key::new(words, f.client_port, f.virtual_port, f.proto);
        matches!(ct::lookup::<F, _>(self, &key), Found::Live(_))
    }
    /// The words themselves, for checks and measurements.
    pub fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }
}

impl<F: Addressing> Buckets<F> for ConnTable<F> {
    type B<'a> = Line<'a>;
    fn bucket(&self, n: u32) -> Line<'_> {
        let at = (n & self.mask) as usize * F::WORDS;
        let read = if self.layout.is_ours() { Read::AsIs } else { Read::Entries(F::KEYS + 1, self.layout.control) };
        Line { words: &self.mapping.words()[at..at + F::WORDS], read }
    }
    fn mask(&self) -> u32 {
        self.mask
    }
    fn seed(&self) -> &Seed {
        &self.config.seed
    }
    fn rank(&self, control: u64) -> Rank {
        conn::rank(&self.config.policy, control, self.now_s, |x| Buckets::<F>::sign(self, x))
    }
}

/// Reading only: nothing here moves counters.
impl<F: Addressing> Conns<F> for ConnTable<F> {
    type Table = Self;
    fn table(&self) -> &Self {
        self
    }
    fn policy(&self) -> &Policy {
        &self.config.policy
    }
    fn now_s(&self) -> u32 {
        self.now_s
    }
    fn account(&self, _: u32, _: i64, _: i64) {}
    fn dest_address(&self, _: u32) -> Option<(F::Addr, u16)> {
        None
    }
    fn fullnat(&self, dest: u32) -> bool {
        self.beside.as_ref().is_some_and(|b| b.dests.get(dest).is_ok_and(|d| d.lends()))
    }
    fn side(&self, slot: ct::Slot) -> Option<Line<'_>> {
        let words = self.beside.as_ref()?.sides.words();
        // As long as no flow needs it there is one row, of nobody.
        let row = self.layout.side(if F::KEYS == 1 { 4 } else { 6 });
        let at = slot as usize * row.words;
        let read = if self.layout.is_ours() { Read::AsIs } else { Read::Row(row.at) };
        words.get(at..at + row.words).map(|words| Line { words, read })
    }
}

impl super::Maps {
    /// Is this flow, of other tables, in these?
    pub fn knows(&self, flow: &Flow) -> bool {
        if flow.family == 4 { self.conns4.has(flow) } else { self.conns6.has(flow) }
    }
}
