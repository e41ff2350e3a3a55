//! The maps, and the pipeline's tables over them.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{bpf_fib_lookup as FibLookup, bpf_timer};
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_get_prandom_u32, bpf_loop};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::XdpContext;
use core::ffi::c_void;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};
use core::mem::offset_of;
use rvs_datapath::abi::{
    Clock, Config, CpuStats, Dest, DestState, Hop, Iface, ListEntry, Local, REPLY_HOPS_MAX, SIDE4_WORDS, SIDE6_WORDS,
    Service, ServiceKey, ServiceState, Tunnel, Vlan, fragment, hop, watched,
};
use rvs_datapath::ct::{Family, V4, V6};
use rvs_datapath::elder::ELDER;
use rvs_datapath::frag;
use rvs_datapath::packet::{Flow, Ip};
use rvs_datapath::tables::{Machine, Route, Tables, Walker};
use rvs_datapath::verdict::{COUNTERS, Verdict};

use crate::calls;
use crate::ctx::forget;
use crate::flat::{constant, cpu, flat};
use crate::hand::{self, From};
use crate::words::Table;

// By the sizes that the loader gives.
flat! {
    Conn4("CONN4"): [u64; V4::WORDS];
    Conn6("CONN6"): [u64; V6::WORDS];
    ConfigMap("CONFIG"): Config;
    ClockMap("CLOCK"): Clock;
    Ifaces("IFACES"): Iface;
    Vlans("VLANS"): Vlan;
    Services("SERVICES"): Service;
    ServiceStates("SERVICE_STATE"): ServiceState;
    Dests("DESTS"): Dest;
    Tunnels("TUNNELS"): Tunnel;
    DestStates("DEST_STATE"): DestState;
    DestStats("DEST_STATS"): CpuStats;
    Lists("LISTS"): ListEntry;
    HashTables("TABLES"): u32;
    Locals("LOCALS"): Local;
    Side4("SIDE4"): [u64; SIDE4_WORDS];
    Side6("SIDE6"): [u64; SIDE6_WORDS];
    Hops("HOPS"): Hop;
    ReplyHops("REPLY_HOPS"): Hop;
    Fragments("FRAGMENTS"): [u64; fragment::WORDS];
    Rates("RATES"): u64;
    Verdicts("VERDICTS"): u64;
}

#[btf_map]
pub static TIMER: Array<Timer, 1> = Array::new();
#[btf_map]
static SERVICE_KEYS: HashMap<ServiceKey, u64, 16384> = HashMap::new();

#[repr(C)]
pub struct Timer {
    pub timer: bpf_timer,
}

#[inline(always)]
pub fn clock() -> *mut Clock {
    ClockMap::first()
}
#[inline(always)]
pub fn config() -> &'static Config {
    // SAFETY: a valid value.
    unsafe { &*ConfigMap::first() }
}

#[inline(always)]
pub fn iface(ifindex: u32) -> &'static Iface {
    // SAFETY: a valid value.
    unsafe { &*Ifaces::at(ifindex) }
}

/// The same, traced or not.
#[inline(always)]
pub fn whosever(ifindex: u32) -> Iface {
    let iface = *iface(ifindex);
    Iface { ifindex: iface.number(), ..iface }
}

#[inline(always)]
pub fn count_verdict(verdict: Verdict) {
    const _: () = assert!(COUNTERS.is_power_of_two());
    let number = cpu() as usize * COUNTERS + verdict.counter() as usize;
    // SAFETY: this CPU's own value; the map has so many for each.
    unsafe { *Verdicts::first().add(number) += 1 };
}

/// Passed, by an elder (1, else 0): whoever asked it goes on with the packet, and counts it. A function of its own, so that what is not passed, and has
/// registers in better use, does not pay for it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn anothers(verdict: u64) -> u64 {
    let verdict = Verdict::from_word(verdict);
    let anothers = config().flags & ELDER != 0 && verdict.is_passed();
    if anothers {
        let number = cpu() as usize * COUNTERS + verdict.counter() as usize;
        // SAFETY: as in `count_verdict`, which has counted it.
        unsafe { *Verdicts::first().add(number) -= 1 };
    }
    anothers as u64
}

#[inline(always)]
pub fn account(dest: u32, active: i64, inactive: i64) {
    let s = DestStates::at(dest);
    // SAFETY: a valid value; shared only through atomic instructions.
    unsafe {
        if active != 0 {
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*s).active, active as u64);
        }
        if inactive != 0 {
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*s).inactive, inactive as u64);
        }
    }
}

#[inline(always)]
pub fn dest_address<I: Ip>(dest: u32) -> Option<(I::Addr, u16)> {
    // SAFETY: a valid value.
    let d = unsafe { &*Dests::at(dest) };
    Some((I::from_address(&d.address), d.port))
}

#[inline(always)]
pub fn fullnat(dest: u32) -> bool {
    // SAFETY: a valid value.
    (unsafe { &*Dests::at(dest) }).lends()
}

/// The tables of one packet. `ctx`, `ifindex` and `sized` are for the routing helper; SKB: of a tc program.
pub struct Maps<const SKB: bool> {
    ctx: *mut c_void,
    ifindex: u32,
    /// The packet's length is that of what will be sent (not that of segments to be cut): it must fit the route's MTU.
    sized: bool,
}

impl Maps<false> {
    #[inline(always)]
    pub fn of(ctx: &XdpContext, ifindex: u32) -> Maps<false> {
        Maps::new(ctx.as_ptr(), ifindex, true)
    }
}

impl Maps<false> {
    /// For stages that look at no packet.
    pub const NOWHERE: Maps<false> = Maps { ctx: core::ptr::null_mut(), ifindex: 0, sized: false };
}

impl<const SKB: bool> Maps<SKB> {
    #[inline(always)]
    pub fn new(ctx: *mut c_void, ifindex: u32, sized: bool) -> Maps<SKB> {
        Maps { ctx, ifindex, sized }
    }
}

impl<const SKB: bool> Tables for Maps<SKB> {
    type C4 = Table<V4>;
    type C6 = Table<V6>;
    #[inline(always)]
    fn conns4(&self) -> &Self::C4 {
        &Table::NEW
    }
    #[inline(always)]
    fn conns6(&self) -> &Self::C6 {
        &Table::NEW
    }
    #[inline(always)]
    fn config(&self) -> &Config {
        config()
    }
    #[inline(always)]
    fn iface(&self, ifindex: u32) -> Iface {
        whosever(ifindex)
    }
    #[inline(always)]
    fn vlan(&self, place: u32) -> Vlan {
        // SAFETY: a valid value.
        unsafe { *Vlans::at(place) }
    }
    #[inline(always)]
    fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        // SAFETY: the control plane replaces whole values; a value is one word.
        unsafe { SERVICE_KEYS.get(key) }.map(|v| *v as u32)
    }
    #[inline(always)]
    fn service(&self, index: u32) -> Option<&Service> {
        // SAFETY: a valid value, here and below.
        unsafe { Some(&*Services::at(index)) }
    }
    #[inline(always)]
    fn dest(&self, index: u32) -> Option<&Dest> {
        // SAFETY: see above.
        unsafe { Some(&*Dests::at(index)) }
    }
    #[inline(always)]
    fn tunnel(&self, dest: u32) -> Option<&Tunnel> {
        // SAFETY: see above.
        unsafe { Some(&*Tunnels::at(dest)) }
    }
    #[inline(always)]
    fn list(&self, at: u32) -> Option<ListEntry> {
        // SAFETY: see above.
        unsafe { Some(*Lists::at(at)) }
    }
    #[inline(always)]
    fn table(&self, at: u32) -> Option<u32> {
        // SAFETY: see above.
        unsafe { Some(*HashTables::at(at)) }.filter(|d| *d != 0)
    }
    #[inline(always)]
    fn hop(&self, index: u32) -> Option<&Hop> {
        // SAFETY: see above.
        unsafe { Some(&*Hops::at(index)) }
    }
    #[inline(always)]
    fn reply_hop(&self, index: u8) -> Option<&Hop> {
        // SAFETY: see above.
        unsafe { Some(&*ReplyHops::at(index as u32)) }
    }
    #[inline(always)]
    fn keep_reply_hop(&self, hop: &Hop) -> u8 {
        keep_reply_hop(hop)
    }
    #[inline(always)]
    fn leave_note(&self, key: &frag::Key, note: &frag::Note) -> bool {
        calls::leave_note(key, note)
    }
    #[inline(always)]
    fn find_note(&self, key: &frag::Key) -> frag::Found {
        calls::find_note(key)
    }
    #[inline(always)]
    fn fragment(&self, place: u32, word: u32) -> u64 {
        // SAFETY: a word of a valid value (callers give constants), read as a whole.
        unsafe { (Fragments::at(place) as *mut u64).add(word as usize).read_volatile() }
    }
    #[inline(always)]
    fn set_fragment(&self, place: u32, word: u32, value: u64) {
        // SAFETY: as above.
        unsafe { (Fragments::at(place) as *mut u64).add(word as usize).write_volatile(value) };
    }
    #[inline(always)]
    fn swap_fragment(&self, place: u32, old: u64, new: u64) -> bool {
        // SAFETY: as above; the control word is the first, and shared only through atomic instructions and whole-word loads.
        unsafe {
            let at = Fragments::at(place) as *mut u64;
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1
        }
    }
    #[inline(always)]
    fn watched<I: Ip>(&self, address: I::Addr) -> u64 {
        hand::watched(I::bytes(address), 0, 0, I::FAMILY)
    }
    #[inline(always)]
    fn server<I: Ip>(&self, address: I::Addr, port: u16, protocol: u8) -> Option<u32> {
        let value = hand::watched(I::bytes(address), port, protocol, I::FAMILY);
        (value & watched::SERVER != 0).then_some((value >> 32) as u32)
    }
    #[inline(always)]
    fn takes(&self) -> bool {
        // (An elder's rings nobody reads.)
        hand::taken() && config().flags & ELDER == 0
    }
    #[inline(always)]
    fn hand(&self, early: Option<&frag::Key>, room: u32) -> bool {
        let from = if SKB { From::Skb(self.ctx as *mut _) } else { From::Xdp(self.ctx as *mut _) };
        hand::hand(from, early, self.ifindex, room)
    }
    #[inline(always)]
    fn rate(&self, place: u32) -> u64 {
        // SAFETY: a valid value, read as a whole word.
        unsafe { Rates::at(place).read_volatile() }
    }
    #[inline(always)]
    fn swap_rate(&self, place: u32, old: u64, new: u64) -> bool {
        // SAFETY: as above; shared only through atomic instructions and whole-word loads.
        unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(Rates::at(place), old, new).1
        }
    }
    #[inline(always)]
    fn machine(&self, service: u32, which: Machine) -> u64 {
        // SAFETY: a valid value, read as a whole word.
        unsafe { word(ServiceStates::at(service), which).read_volatile() }
    }
    #[inline(always)]
    fn advance(&self, service: u32, which: Machine, old: u64, new: u64) -> bool {
        let at = word(ServiceStates::at(service), which);
        // SAFETY: a valid value; shared only through atomic instructions and whole-word loads.
        unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1 }
    }
    #[inline(always)]
    fn connections(&self, dest: u32) -> [u64; 2] {
        // SAFETY: a valid value, read in whole words.
        let (active, inactive) = unsafe {
            let s = DestStates::at(dest);
            ((&raw const (*s).active).read_volatile(), (&raw const (*s).inactive).read_volatile())
        };
        let of = |n: u64| if (n as i64) < 0 { 0 } else { n };
        [of(active), of(inactive)]
    }
    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }
    #[inline(always)]
    fn begun(&self) -> u64 {
        // SAFETY: a valid value; the word is changed atomically.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*clock()).begun, 1) }
    }
    #[inline(always)]
    fn overloaded(&self, dest: u32) -> bool {
        flags(dest) & 1 != 0
    }
    #[inline(always)]
    fn available(&self, dest: u32) -> bool {
        // The effective weight's being 0 is the control plane's to show here (bit 1), since tables know no weights.
        flags(dest) & 3 == 0
    }
    #[inline(always)]
    fn keep<I: Ip>(&self, flow: &Flow<I>) {
        calls::keep(flow);
    }
    #[inline(always)]
    fn kept<I: Ip>(&self) -> Option<Flow<I>> {
        Some(calls::kept())
    }
    #[inline(always)]
    fn local(&self, at: u32) -> Option<&Local> {
        // SAFETY: see above.
        unsafe { Some(&*Locals::at(at)) }
    }
    #[inline(always)]
    fn lending(&self, dest: u32) -> u64 {
        // SAFETY: a valid value; shared only through atomic instructions.
        unsafe {
            let at = &raw mut (*DestStates::at(dest)).lent;
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(at, 1)
        }
    }
    #[inline(always)]
    fn sequence_clock(&self) -> u32 {
        // SAFETY: a valid value; volatile because the timer writes it.
        Clock::sequence(unsafe { (&raw const (*clock()).tick_ns).read_volatile() })
    }
    #[inline(always)]
    fn count_connection(&self, dest: u32) {
        // SAFETY: this CPU's own value, here and below.
        unsafe { (*DestStats::mine(dest)).stats.connections += 1 };
    }
    #[inline(always)]
    fn count_in(&self, dest: u32, bytes: u32) {
        let s = DestStats::mine(dest);
        // SAFETY: see above.
        unsafe {
            (*s).stats.packets_in += 1;
            (*s).stats.bytes_in += bytes as u64;
        }
    }
    #[inline(always)]
    fn uncount_in(&self, dest: u32, bytes: u32) {
        let s = DestStats::mine(dest);
        // SAFETY: see above.
        unsafe {
            (*s).stats.packets_in -= 1;
            (*s).stats.bytes_in -= bytes as u64;
        }
    }
    #[inline(always)]
    fn count_out(&self, dest: u32, bytes: u32) {
        let s = DestStats::mine(dest);
        // SAFETY: see above.
        unsafe {
            (*s).stats.packets_out += 1;
            (*s).stats.bytes_out += bytes as u64;
        }
    }
    #[inline(always)]
    fn may_send_icmp(&self) -> bool {
        may_send_icmp()
    }
    #[inline(always)]
    fn route<I: Ip>(&self, ends: [I::Addr; 2], protocol: u8, len: u32, hop: &mut Hop) -> Route {
        let len = if self.sized { len as u16 } else { 0 };
        question::<I>(ends[0], ends[1], self.ifindex, protocol, len);
        match ask(self.ctx, SKB as u32, hop) {
            FIB_SUCCESS => {
                let way = iface(hop.ifindex);
                if !SKB && way.ifindex == hop.ifindex && way.lower != 0 {
                    hop.ifindex |= hop::VLAN;
                }
                Route::Hop
            }
            FIB_NO_NEIGH => Route::NoNeighbour,
            refused if FIB_REFUSED.contains(&refused) => Route::None,
            _ => Route::Kernel,
        }
    }
    #[inline(always)]
    fn sized(&self) -> bool {
        self.sized
    }
    #[inline(always)]
    fn resolves(&self) -> bool {
        SKB
    }
    #[inline(always)]
    fn blur(&self, n: u32, noise: u32) -> u32 {
        forget(n, noise)
    }
    #[inline(always)]
    fn walk<W: Walker<Self>>(&self, count: u32, walker: &mut W) {
        let mut round = Round { maps: self, walker };
        // SAFETY: the callback gets back the pointer given here, while it is valid.
        unsafe { bpf_loop(count, step::<Self, W> as *mut c_void, &raw mut round as *mut c_void, 0) };
    }
}

#[inline(always)]
fn flags(dest: u32) -> u64 {
    // SAFETY: a valid value, read as a whole word.
    unsafe { (&raw const (*DestStates::at(dest)).flags).read_volatile() }
}

struct Round<M, W> {
    maps: *const M,
    walker: *mut W,
}

unsafe extern "C" fn step<M, W: Walker<M>>(i: u32, round: *mut Round<M, W>) -> i64 {
    // SAFETY: what walk passed.
    unsafe { (*(*round).walker).step(&*(*round).maps, i) as i64 }
}

#[inline(always)]
fn word(s: *mut ServiceState, which: Machine) -> *mut u64 {
    // SAFETY: fields of a valid value.
    unsafe {
        match which {
            Machine::Rr => &raw mut (*s).rr,
            Machine::Wrr => &raw mut (*s).wrr,
            Machine::Asked => &raw mut (*s).asked,
            Machine::Begun => &raw mut (*s).begun,
        }
    }
}

/// Generated ICMP errors a second, as the kernel's `icmp_msgs_per_sec`.
const ICMP_PER_S: u64 = 1000;

#[inline(always)]
pub fn count_evicted(family: u8) {
    // SAFETY: a valid value; the words are changed atomically.
    unsafe {
        let at = &raw mut (*clock()).evicted[(family == 6) as usize];
        atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(at, 1);
    }
}

/// Only the timer counts these.
#[inline(always)]
pub fn count_thinned() {
    // SAFETY: a valid value.
    unsafe {
        let at = &raw mut (*clock()).thinned;
        at.write_volatile(at.read_volatile() + 1);
    }
}

#[inline(always)]
fn may_send_icmp() -> bool {
    let c = clock();
    // SAFETY: a valid value; the word is changed atomically.
    unsafe {
        let now = ((&raw const (*c).now_s).read_volatile() as u64) << 32;
        let old = (&raw const (*c).icmp).read_volatile();
        let sent = if old >> 32 << 32 == now { old & 0xffff_ffff } else { 0 };
        if sent >= ICMP_PER_S {
            return false;
        }
        let at = &raw mut (*c).icmp;
        // Lost races count as sent: the limit is on the safe side.
        let _ = atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, now | (sent + 1));
    }
    true
}

/// Places that a next hop may have, from its hash on.
const PROBES: u32 = 4;

/// A place is claimed once, by its second word, and never changed: a hop that finds none is looked up each time.
#[inline(always)]
fn keep_reply_hop(hop: &Hop) -> u8 {
    let hash = (hop.macs[0] ^ hop.macs[1].rotate_left(16) ^ hop.ifindex).wrapping_mul(0x9e37_79b1) >> 24;
    let low = hop.macs[0] as u64 | (hop.macs[1] as u64) << 32;
    let high = hop.macs[2] as u64 | (hop.ifindex as u64) << 32;
    let mut i = 0;
    while i < PROBES {
        let n = (hash + i) & (REPLY_HOPS_MAX - 1);
        i += 1;
        if n == 0 {
            continue;
        }
        let words = ReplyHops::at(n) as *mut u64;
        // SAFETY: a Hop is two words; the second is claimed atomically, the first written by who claimed it.
        unsafe {
            let there = words.add(1).read_volatile();
            if there == high && words.read_volatile() == low {
                return n as u8;
            }
            if there == 0
                && words.read_volatile() == 0
                && atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(words, 0, low).1
            {
                words.add(1).write_volatile(high);
                return n as u8;
            }
        }
    }
    0
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const FIB_SUCCESS: i64 = 0;
const FIB_NO_NEIGH: i64 = 7;
/// Blackhole, unreachable, prohibit.
const FIB_REFUSED: core::ops::RangeInclusive<i64> = 1..=3;

/// `struct bpf_redir_neigh`: the next hop of the route found last, for the kernel to resolve. Its family is a word, then its address.
#[btf_map]
pub static NEXT_HOP: PerCpuArray<[u32; 5], 1> = PerCpuArray::new();

/// A question for the kernel's routing table, in [`calls::query`].
#[inline(never)]
fn question<I: Ip>(from: I::Addr, to: I::Addr, ifindex: u32, protocol: u8, len: u16) {
    let (from, to) = (I::bytes(from), I::bytes(to));
    let word = |b: &[u8; 16], i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    let q = calls::query();
    // SAFETY: this CPU's own memory; plain integers, for which 0 is a value.
    unsafe {
        *q = core::mem::zeroed();
        (*q).family = if I::FAMILY == 4 { AF_INET } else { AF_INET6 };
        (*q).l4_protocol = protocol;
        (*q).__bindgen_anon_1.tot_len = len;
        (*q).ifindex = ifindex;
        (*q).__bindgen_anon_3.ipv6_src = [word(&from, 0), word(&from, 4), word(&from, 8), word(&from, 12)];
        (*q).__bindgen_anon_4.ipv6_dst = [word(&to, 0), word(&to, 4), word(&to, 8), word(&to, 12)];
    }
}

/// Ask it. With `tell` != 0 the next hop is in [`NEXT_HOP`] then.
#[inline(never)]
fn ask(ctx: *mut c_void, tell: u32, found: &mut Hop) -> i64 {
    let q = calls::query();
    // SAFETY: the context of this program and a parameter block of the size given.
    let answer = unsafe { bpf_fib_lookup(ctx, q, size_of::<FibLookup>() as i32, 0) };
    // Six bytes are our MAC address, the six after them the next hop's. In words (see `Address`).
    const _: () =
        assert!(offset_of!(FibLookup, smac) % 4 == 0 && offset_of!(FibLookup, dmac) == offset_of!(FibLookup, smac) + 6);
    // SAFETY: as above.
    let ([a, b, c], ifindex) = unsafe { (*(&raw const (*q).smac as *const [u32; 3]), (*q).ifindex) };
    found.macs = [b >> 16 | c << 16, c >> 16 | a << 16, a >> 16 | b << 16];
    found.ifindex = ifindex;
    if tell != 0
        && let Some(next) = NEXT_HOP.get_ptr_mut(0)
    {
        // SAFETY: this CPU's own values. The helper has put the gateway's address, if there is one, in the place of the destination; an
        // IPv4 address is the first word of the union.
        unsafe {
            let a = (*q).__bindgen_anon_4.ipv6_dst;
            *next = [(*q).family as u32, a[0], a[1], a[2], a[3]];
        }
    }
    answer
}
