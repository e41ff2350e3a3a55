//! All tables in plain memory: the pipeline as it runs over the kernel's maps, for native tests and the simulation.

use super::{MemConns, MemPacket};
use crate::abi::{
    self, Config, Dest, DestState, Hop, Iface, ListEntry, Local, REPLY_HOPS_MAX, Service, ServiceKey, ServiceState,
    Stats, Tunnel, Vlan,
};
use crate::conn::{self, Policy, Timeouts};
use crate::ct::{self, MIN_BUCKETS, Seed, V4, V6};
use crate::packet::{Flow, Ip};
use crate::tables::{Machine, Route, Tables, Walker};
use crate::verdict::{COUNTERS, Verdict};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub struct MemSizes {
    pub buckets4: u32,
    pub buckets6: u32,
    pub services: u32,
    pub dests: u32,
    pub lists: u32,
    pub tables: u32,
    pub hops: u32,
}

impl Default for MemSizes {
    fn default() -> Self {
        MemSizes {
            buckets4: MIN_BUCKETS,
            buckets6: MIN_BUCKETS,
            services: 64,
            dests: 256,
            lists: 1024,
            tables: 16384,
            hops: 256,
        }
    }
}

/// What the kernel's routing knows of one destination. No route of it: the kernel's business.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    pub route: Route,
    pub hop: Hop,
    /// Longer IP packets are the kernel's business.
    pub mtu: u32,
}

#[derive(Default)]
struct StatCells([AtomicU64; 5]);

impl StatCells {
    fn add(&self, at: usize, n: u64) {
        self.0[at].fetch_add(n, Relaxed);
    }
}

/// The configuration is changed through `&mut self`, as the control plane would; the pipeline runs on `&self`, in any number of threads.
pub struct MemTables {
    conns4: MemConns<V4>,
    conns6: MemConns<V6>,
    config: Config,
    pub ifaces: BTreeMap<u32, Iface>,
    /// By place.
    pub vlans: BTreeMap<u32, Vlan>,
    pub service_keys: BTreeMap<ServiceKey, u32>,
    pub services: Vec<Service>,
    pub lists: Vec<ListEntry>,
    pub tables: Vec<u32>,
    pub locals: Vec<Local>,
    pub hops: Vec<Hop>,
    /// By address as it lies in the packet.
    pub routes: BTreeMap<(u8, [u8; 16]), Way>,
    machines: Vec<[AtomicU64; 4]>,
    dests: Vec<Dest>,
    /// By dest index.
    pub tunnels: Vec<Tunnel>,
    dest_flags: Vec<AtomicU64>,
    lendings: Vec<AtomicU64>,
    drawn: AtomicU64,
    begun: AtomicU64,
    sweeps: AtomicU32,
    stats: Vec<StatCells>,
    reply_hops: Vec<OnceLock<Hop>>,
    rates: Vec<[AtomicU64; 1]>,
    /// Of the packet that was kept last.
    cookie: AtomicU32,
    fragments: Vec<[AtomicU64; abi::fragment::WORDS]>,
    /// By family and address as it lies in the packet: bits `abi::watched`.
    pub watched: BTreeMap<(u8, [u8; 16]), u64>,
    /// Dests of real servers by NAT: with port and protocol.
    pub servers: BTreeMap<(u8, [u8; 16], u16, u8), u32>,
    /// Is there somebody who takes what is handed over?
    pub takes: bool,
    verdicts: [AtomicU64; COUNTERS],
    /// ICMP errors that may still be sent in this second.
    icmp_left: AtomicU64,
}

/// Generated ICMP errors a second, as the programs have it.
const ICMP_PER_S: u64 = 1000;

impl MemTables {
    pub fn new(sizes: &MemSizes, seed: Seed) -> MemTables {
        fn filled<T: Default>(n: u32) -> Vec<T> {
            (0..n).map(|_| T::default()).collect()
        }
        let t = Timeouts::default();
        let config = Config {
            version: abi::VERSION,
            seed,
            policy: Policy::new(&t),
            flags: 0,
            turned_at: 0,
            timeouts_s: [t.tcp, t.tcp_fin, t.udp, 0],
            drop_rate: 0,
            spare: 0,
            settings: [0; abi::SETTINGS_MAX],
        };
        MemTables {
            conns4: MemConns::new(sizes.buckets4, seed, sizes.dests),
            conns6: MemConns::new(sizes.buckets6, seed, sizes.dests),
            config,
            ifaces: BTreeMap::new(),
            vlans: BTreeMap::new(),
            service_keys: BTreeMap::new(),
            services: filled(sizes.services),
            lists: filled(sizes.lists),
            tables: filled(sizes.tables),
            locals: filled(sizes.dests),
            hops: filled(sizes.hops),
            routes: BTreeMap::new(),
            machines: filled(sizes.services),
            dests: filled(sizes.dests),
            tunnels: filled(sizes.dests),
            dest_flags: filled(sizes.dests),
            lendings: filled(sizes.dests),
            drawn: AtomicU64::new(1),
            begun: AtomicU64::new(0),
            sweeps: AtomicU32::new(0),
            stats: filled(sizes.dests),
            reply_hops: filled(REPLY_HOPS_MAX),
            rates: filled(abi::RATES_MAX),
            cookie: AtomicU32::new(0),
            fragments: filled(abi::FRAGMENTS_MAX),
            watched: BTreeMap::new(),
            servers: BTreeMap::new(),
            takes: false,
            verdicts: std::array::from_fn(|_| AtomicU64::new(0)),
            icmp_left: AtomicU64::new(ICMP_PER_S),
        }
    }

    /// One packet through the pipeline, and its verdict counted.
    pub fn run(&self, p: &mut MemPacket) -> Verdict {
        let verdict = crate::core::process(p, self);
        self.verdicts[verdict.counter() as usize].fetch_add(1, Relaxed);
        verdict
    }

    /// Seconds of the clock that ages are in.
    pub fn now_s(&self) -> u32 {
        self.conns4.now_s.load(Relaxed) as u32
    }
    /// Another second: the limit of ICMP errors begins anew.
    pub fn set_now(&self, now_s: u32) {
        self.conns4.set_now(now_s);
        self.conns6.set_now(now_s);
        self.icmp_left.store(ICMP_PER_S, Relaxed);
    }
    /// A full sweep of both tables.
    /// Flags and drop rate of the configuration.
    pub fn set_config(&mut self, [flags, drop_rate]: [u32; 2]) {
        self.config = Config { flags, drop_rate, ..self.config };
    }
    pub fn sweep(&self) {
        let sweep = self.sweeps.fetch_add(1, Relaxed);
        let thins = self.config.flags & abi::config::DROP_ENTRY != 0;
        self.conns4.sweep();
        self.conns6.sweep();
        if thins {
            self.conns4.thin(sweep);
            self.conns6.thin(sweep);
        }
    }

    /// What the timer does in one of [`abi::SWEEP_TICKS`] ticks.
    pub fn sweep_slice(&self, tick: u32) {
        let slice = |mask: u32| {
            let (at, of, buckets) =
                (u64::from(tick % abi::SWEEP_TICKS), u64::from(abi::SWEEP_TICKS), u64::from(mask) + 1);
            (at * buckets / of) as u32..((at + 1) * buckets / of) as u32
        };
        self.conns4.sweep_buckets(slice(self.conns4.words.mask()));
        self.conns6.sweep_buckets(slice(self.conns6.words.mask()));
    }

    /// A dest as each packet reads it. `index` is not 0.
    pub fn set_dest(&mut self, index: u32, dest: Dest) {
        self.dests[index as usize] = dest;
        let lent = dest.lends();
        for set in [&mut self.conns4.lent, &mut self.conns6.lent] {
            if lent {
                set.insert(index)
            } else {
                set.remove(&index)
            };
        }
        self.conns4.dests.insert(index, (V4::from_address(&dest.address), dest.port));
        self.conns6.dests.insert(index, (V6::from_address(&dest.address), dest.port));
    }
    /// `DestState::flags`.
    pub fn set_dest_flags(&self, index: u32, flags: u64) {
        self.dest_flags[index as usize].store(flags, SeqCst);
    }
    /// `DestState::lent`.
    pub fn set_lent(&self, index: u32, lent: u64) {
        self.lendings[index as usize].store(lent, SeqCst);
    }
    pub fn dest_state(&self, index: u32) -> DestState {
        let (four, six) = (self.conns4.counted(index), self.conns6.counted(index));
        DestState {
            active: (four.0 + six.0) as u64,
            inactive: (four.1 + six.1) as u64,
            flags: self.dest_flags[index as usize].load(SeqCst),
            lent: self.lendings[index as usize].load(SeqCst),
            ..DestState::default()
        }
    }
    /// Entries of both connection tables, forward and reverse, swept or not.
    pub fn entries(&self) -> usize {
        self.conns4.entries().count() + self.conns6.entries().count()
    }
    /// ActiveConn and InActConn of the dests as the entries say; those that have neither are left out.
    pub fn recounts(&self) -> BTreeMap<u32, (i64, i64)> {
        let mut sums = BTreeMap::new();
        recount(&self.conns4, &mut sums);
        recount(&self.conns6, &mut sums);
        sums
    }
    /// Do the counters say what the entries say? The first dest where they don't.
    pub fn miscounted(&self) -> Option<u32> {
        let sums = self.recounts();
        (1..self.dests.len() as u32).find(|dest| {
            let s = self.dest_state(*dest);
            (s.active as i64, s.inactive as i64) != sums.get(dest).copied().unwrap_or_default()
        })
    }
    pub fn stats(&self, dest: u32) -> Stats {
        let of = |i: usize| self.stats[dest as usize].0[i].load(Relaxed);
        Stats { connections: of(0), packets_in: of(1), packets_out: of(2), bytes_in: of(3), bytes_out: of(4) }
    }
    pub fn service_state(&self, service: u32) -> ServiceState {
        let [rr, wrr, asked, begun] = self.machines[service as usize].each_ref().map(|word| word.load(SeqCst));
        ServiceState { rr, wrr, asked, begun }
    }
    pub fn set_service_state(&self, service: u32, state: ServiceState) {
        let words = [state.rr, state.wrr, state.asked, state.begun];
        for (word, value) in self.machines[service as usize].iter().zip(words) {
            word.store(value, SeqCst);
        }
    }
    /// Packets of each reason so far, by `Reason as usize`.
    pub fn verdicts(&self) -> [u64; COUNTERS] {
        std::array::from_fn(|i| self.verdicts[i].load(Relaxed))
    }
}

fn recount<F: Ip>(conns: &MemConns<F>, sums: &mut BTreeMap<u32, (i64, i64)>) {
    for e in conns.entries().filter(|e| e.control & ct::REVERSE == 0) {
        let sum = sums.entry(conn::dest(e.control)).or_default();
        if conns.policy.row(e.control).active() { sum.0 += 1 } else { sum.1 += 1 }
    }
}

impl Tables for MemTables {
    type C4 = MemConns<V4>;
    type C6 = MemConns<V6>;
    fn conns4(&self) -> &Self::C4 {
        &self.conns4
    }
    fn conns6(&self) -> &Self::C6 {
        &self.conns6
    }
    fn config(&self) -> &Config {
        &self.config
    }
    fn iface(&self, ifindex: u32) -> Iface {
        self.ifaces.get(&ifindex).copied().unwrap_or_default()
    }
    fn vlan(&self, place: u32) -> Vlan {
        self.vlans.get(&place).copied().unwrap_or_default()
    }
    fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        self.service_keys.get(key).copied()
    }
    fn service(&self, index: u32) -> Option<&Service> {
        self.services.get(index as usize)
    }
    fn dest(&self, index: u32) -> Option<&Dest> {
        self.dests.get(index as usize)
    }
    fn tunnel(&self, dest: u32) -> Option<&Tunnel> {
        self.tunnels.get(dest as usize)
    }
    fn list(&self, at: u32) -> Option<ListEntry> {
        self.lists.get(at as usize).copied()
    }
    fn table(&self, at: u32) -> Option<u32> {
        self.tables.get(at as usize).copied().filter(|d| *d != 0)
    }
    fn hop(&self, index: u32) -> Option<&Hop> {
        self.hops.get(index as usize)
    }
    fn reply_hop(&self, index: u8) -> Option<&Hop> {
        self.reply_hops[usize::from(index)].get()
    }
    fn keep_reply_hop(&self, hop: &Hop) -> u8 {
        let place = (1..=u8::MAX).find(|n| self.reply_hops[usize::from(*n)].get_or_init(|| *hop) == hop);
        place.unwrap_or(0)
    }
    fn fragment(&self, place: u32, word: u32) -> u64 {
        self.fragments[place as usize][word as usize].load(SeqCst)
    }
    fn set_fragment(&self, place: u32, word: u32, value: u64) {
        self.fragments[place as usize][word as usize].store(value, SeqCst);
    }
    fn swap_fragment(&self, place: u32, old: u64, new: u64) -> bool {
        let word = &self.fragments[place as usize][abi::fragment::CONTROL as usize];
        word.compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }
    fn server<I: Ip>(&self, address: I::Addr, port: u16, protocol: u8) -> Option<u32> {
        self.servers.get(&(I::FAMILY, I::bytes(address), port, protocol)).copied()
    }
    fn watched<I: Ip>(&self, address: I::Addr) -> u64 {
        self.watched.get(&(I::FAMILY, I::bytes(address))).copied().unwrap_or_default()
    }
    fn takes(&self) -> bool {
        self.takes
    }
    /// The verdict says it: whoever runs this has the packet.
    fn hand(&self, _early: Option<&crate::frag::Key>, _room: u32) -> bool {
        self.takes
    }
    fn keep<I: Ip>(&self, flow: &Flow<I>) {
        self.cookie.store(flow.cookie, SeqCst);
    }
    fn kept_cookie(&self) -> u32 {
        self.cookie.load(SeqCst)
    }
    fn rate(&self, place: u32) -> u64 {
        self.rates[place as usize][0].load(SeqCst)
    }
    fn swap_rate(&self, place: u32, old: u64, new: u64) -> bool {
        self.rates[place as usize][0].compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }
    fn machine(&self, service: u32, which: Machine) -> u64 {
        self.machines[service as usize][which as usize].load(SeqCst)
    }
    fn advance(&self, service: u32, which: Machine, old: u64, new: u64) -> bool {
        self.machines[service as usize][which as usize].compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }
    fn connections(&self, dest: u32) -> [u64; 2] {
        let s = self.dest_state(dest);
        [s.active, s.inactive].map(|n| if (n as i64) < 0 { 0 } else { n })
    }
    /// Always the same numbers.
    fn random(&self) -> u32 {
        let drawn = self.drawn.fetch_add(1, Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((drawn ^ drawn >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
    }
    fn begun(&self) -> u64 {
        self.begun.fetch_add(1, Relaxed)
    }
    fn overloaded(&self, dest: u32) -> bool {
        self.dest_flags.get(dest as usize).is_none_or(|f| f.load(SeqCst) & 1 != 0)
    }
    fn available(&self, dest: u32) -> bool {
        self.dest_flags.get(dest as usize).is_some_and(|f| f.load(SeqCst) & 3 == 0)
    }
    fn local(&self, at: u32) -> Option<&Local> {
        self.locals.get(at as usize)
    }
    fn lending(&self, dest: u32) -> u64 {
        self.lendings[dest as usize].fetch_add(1, Relaxed)
    }
    fn sequence_clock(&self) -> u32 {
        abi::Clock::sequence(u64::from(self.now_s()) * 1_000_000_000)
    }
    fn count_connection(&self, dest: u32) {
        self.stats[dest as usize].add(0, 1);
    }
    fn count_in(&self, dest: u32, bytes: u32) {
        self.stats[dest as usize].add(1, 1);
        self.stats[dest as usize].add(3, u64::from(bytes));
    }
    fn uncount_in(&self, dest: u32, bytes: u32) {
        self.stats[dest as usize].add(1, u64::MAX);
        self.stats[dest as usize].add(3, u64::from(bytes).wrapping_neg());
    }
    fn count_out(&self, dest: u32, bytes: u32) {
        self.stats[dest as usize].add(2, 1);
        self.stats[dest as usize].add(4, u64::from(bytes));
    }
    fn may_send_icmp(&self) -> bool {
        self.icmp_left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok()
    }
    fn route<I: Ip>(&self, ends: [I::Addr; 2], _protocol: u8, len: u32, hop: &mut Hop) -> Route {
        let Some(way) = self.routes.get(&(I::FAMILY, I::bytes(ends[1]))) else { return Route::Kernel };
        *hop = way.hop;
        match way.route {
            Route::Hop if len > way.mtu => Route::Kernel,
            route => route,
        }
    }
    fn walk<W: Walker<Self>>(&self, count: u32, walker: &mut W) {
        for i in 0..count {
            if walker.step(self, i) {
                break;
            }
        }
    }
}
