//! The packet fixtures through the program in the kernel, over real maps (BPF_PROG_TEST_RUN), compared with the same cases run natively.

use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;

use aya::programs::{TestRun, TestRunOptions};
use rvs_datapath::abi::{Clock, Config, DestState, Hop, REPLY_HOPS_MAX, ServiceState, Stats, Taker};
use rvs_datapath::elder::ELDER;
use rvs_datapath::verdict::{COUNTERS, Reason};
use rvs_fixtures::case::{Code, Counted, Engine, FlowRow, START_S, Sent};
use rvs_fixtures::cases;
use rvs_fixtures::native::{Native, SEED};
use rvs_fixtures::world::{
    BACK, BACK_MAC, CLIENT_MAC, LAN, LAN_MAC, LAN_VLAN, Layout, Net, REFUSED, SERVERS, STRANGER, VLANS, server_mac,
};
use rvs_sys::bpf::attach::Hook;
use rvs_sys::bpf::{Dataplane, OBJECT, Sizes};

use crate::world::Ns;

pub const CASES: &[crate::Case] = &[
    ("packet_fixtures_are_the_same_in_the_kernel_and_natively", || {
        same_in_the_kernel_and_natively(Hook::XdpNative, &[], Who::Alone)
    }),
    ("packet_fixtures_are_the_same_through_tc", || same_in_the_kernel_and_natively(Hook::Tc, RESOLVED, Who::Alone)),
    ("packet_fixtures_are_the_same_by_the_elder", || same_in_the_kernel_and_natively(Hook::XdpNative, &[], Who::Elder)),
    ("packet_fixtures_are_the_same_by_the_elder_through_tc", || {
        same_in_the_kernel_and_natively(Hook::Tc, RESOLVED, Who::Elder)
    }),
    ("packet_fixtures_are_the_same_when_an_elder_is_asked", || {
        same_in_the_kernel_and_natively(Hook::XdpNative, &[], Who::Heir)
    }),
    ("packet_fixtures_are_the_same_when_an_elder_is_asked_through_tc", || {
        same_in_the_kernel_and_natively(Hook::Tc, RESOLVED, Who::Heir)
    }),
];

/// Who has the flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Alone,
    /// The elder of the data plane that the packets come to, whose own tables are empty: all that it does goes through the gate.
    Elder,
    /// A data plane whose elder knows none of them, and leaves every packet that it is asked about as it is.
    Heir,
}

/// Cases in which a next hop has no known neighbour: tc has the kernel resolve it. And those with VLAN tags in the frame, where a test
/// of a tc program leaves them, and the kernel itself does not.
pub const RESOLVED: &[&str] = &[
    "a_hop_that_is_not_ready",
    "a_reply_whose_client_has_no_known_neighbour",
    "fullnat_whose_way_is_not_known",
    "vlan_tags_of_requests",
    "vlan_tags_of_what_passes",
    "vlan_tags_of_errors",
    "vlan_tags_towards_real_servers",
    "vlan_tags_of_replies",
];

fn same_in_the_kernel_and_natively(hook: Hook, except: &[&str], who: Who) {
    let ns = director();
    rvs_sys::netns::enter(&ns.name).expect("enter the namespace");
    let pins = Bpffs::mount(&format!("{}-{who:?}", hook.name()));
    let mut kernel = Kernel::open(&pins, hook).with(who);
    let mut native = Native::default();
    let (mut failed, mut packets) = (Vec::new(), 0);
    for case in cases::all().iter().filter(|c| !except.contains(&c.name)) {
        let run = std::panic::AssertUnwindSafe(|| {
            let (here, there) = (case.run(&mut native), case.run(&mut kernel));
            let here: Vec<Sent> = here.into_iter().filter(|s| carried(hook, &s.bytes)).collect();
            assert_eq!(here.len(), there.len(), "{}: packets natively and in the kernel", case.name);
            for (i, (here, there)) in here.iter().zip(&there).enumerate() {
                assert_eq!(here, there, "{}: packet {i}, natively and in the kernel", case.name);
            }
            there.len()
        });
        match std::panic::catch_unwind(run) {
            Ok(n) => packets += n,
            Err(_) => failed.push(case.name),
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
    assert!(packets > 10_000, "only {packets} packets were compared");
}

/// The kernel carries no frame shorter than its Ethernet header, and as an skb none shorter than its IP header.
pub fn carried(hook: Hook, frame: &[u8]) -> bool {
    frame.len()
        >= match (hook, frame.get(12..14)) {
            (Hook::Tc, Some([8, 0])) => 34,
            (Hook::Tc, Some([0x86, 0xdd])) => 54,
            (Hook::Tc, _) => 15,
            _ => 14,
        }
}

/// The director of `rvs_fixtures::world`: interfaces, addresses, routes and neighbours.
pub fn director() -> Ns {
    let ns = Ns::new();
    let mac = |m: [u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
    for (name, index, address, far) in [("lan", LAN, LAN_MAC, STRANGER), ("back", BACK, BACK_MAC, STRANGER + 1)] {
        ns.ip(&format!("link add {name} index {index} type veth peer name {name}-far index {far}"));
        ns.ip(&format!("link set {name} address {}", mac(address)));
        ns.ip(&format!("link set {name} up"));
        ns.ip(&format!("link set {name}-far up"));
    }
    for (name, addresses) in [("lan", ["172.16.0.1/24", "fd00:c::1/64"]), ("back", ["10.0.0.1/24", "fd00:5::1/64"])] {
        ns.ip(&format!("addr add {} dev {name}", addresses[0]));
        ns.ip(&format!("-6 addr add {} dev {name} nodad", addresses[1]));
    }
    // In the place of VLAN devices, which this kernel may not have: routes lead by them.
    for (at, (index, lower, _)) in (0..).zip(VLANS) {
        ns.ip(&format!("link add vlan{index} index {index} type veth peer name vlan{index}-far index {}", 41 + at));
        ns.ip(&format!(
            "link set vlan{index} address {}",
            mac(if [LAN, 32].contains(&lower) { LAN_MAC } else { BACK_MAC })
        ));
        ns.ip(&format!("link set vlan{index} up"));
        ns.ip(&format!("link set vlan{index}-far up"));
    }
    ns.ip(&format!("addr add 172.31.0.1/24 dev vlan{LAN_VLAN}"));
    ns.ip(&format!("-6 addr add fd00:31::1/64 dev vlan{LAN_VLAN} nodad"));
    for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        assert!(ns.sh(&format!("echo 1 > /proc/sys/net/{path}")).status.success(), "{path}");
    }
    for (net, family, bits) in [(Net::V4, "", 32), (Net::V6, "-6 ", 128)] {
        let known =
            |address, to, dev: &str| ns.ip(&format!("neigh add {address} lladdr {} dev {dev} nud permanent", mac(to)));
        for client in net.clients() {
            known(client, CLIENT_MAC, "lan");
        }
        known(net.vlan_client(0).ip(), CLIENT_MAC, &format!("vlan{LAN_VLAN}"));
        for number in SERVERS {
            known(net.server(number, 0).ip(), server_mac(number), "back");
        }
        ns.ip(&format!("{family}route add unreachable {}/{bits}", net.of(REFUSED)));
    }
    ns
}

/// A BPF file system of our own, gone with the test.
pub struct Bpffs(PathBuf);

impl Bpffs {
    pub fn mount(name: &str) -> Bpffs {
        let folder = std::env::temp_dir().join(format!("rvssys-{}-bpf-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let none: Option<&str> = None;
        nix::mount::mount(Some("bpf"), &folder, Some("bpf"), nix::mount::MsFlags::empty(), none)
            .expect("mount a bpffs");
        Bpffs(folder)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0);
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The programs and maps of the kernel.
pub struct Kernel {
    /// That which has the flows.
    pub dataplane: Dataplane,
    /// Its heir, which the packets come to; or its elder.
    other: Option<Dataplane>,
    who: Who,
    hook: Hook,
    /// What is loaded, to be taken away again.
    layout: Layout,
    /// Counters as they were when the case began: the kernel's are never set back.
    verdicts_before: [u64; COUNTERS],
    stats_before: Vec<Stats>,
    /// Counters as last read.
    verdicts: [u64; COUNTERS],
    last: Reason,
}

impl Kernel {
    pub fn open(pins: &Bpffs, hook: Hook) -> Kernel {
        // 4096 buckets for each family, as natively.
        let sizes = Sizes { flows4: 8192, flows6: 6144, ..SIZES };
        // Without the timer: the clock is ours.
        let folder = pins.0.join("fixtures");
        let dataplane = Dataplane::load(OBJECT, &folder, &sizes, &["rvs_xdp"], &[]).expect("load the data plane");
        let mut config = dataplane.maps.config.get(0).expect("the configuration");
        let buckets = (dataplane.maps.conns4.buckets(), dataplane.maps.conns6.buckets());
        assert_eq!(buckets, (4096, 4096), "both engines lay flows in the same places");
        config.seed = SEED;
        dataplane.maps.config.set(0, config).expect("set the seed");
        let verdicts = [0; COUNTERS];
        let (layout, stats_before) = (Layout::default(), Vec::new());
        Kernel {
            dataplane,
            other: None,
            who: Who::Alone,
            hook,
            layout,
            verdicts_before: verdicts,
            stats_before,
            verdicts,
            last: Reason::Route,
        }
    }
    fn with(mut self, who: Who) -> Kernel {
        if who == Who::Alone {
            return self;
        }
        let mut heir = self.dataplane.heir(OBJECT, [8192, 6144], &[self.hook]).expect("an heir");
        if who == Who::Heir {
            let config = self.dataplane.maps.config.get(0).expect("the configuration");
            let told = Config { flags: ELDER, ..config };
            self.dataplane.maps.config.set(0, told).expect("tell the elder");
            std::mem::swap(&mut self.dataplane, &mut heir);
        }
        Kernel { other: Some(heir), who, ..self }
    }
    fn counter(&self, reason: usize) -> u64 {
        self.dataplane.maps.verdicts.get(reason as u32).expect("a counter").iter().sum()
    }
    pub fn stats(&self, dest: u32) -> Stats {
        let values = self.dataplane.maps.dest_stats.get(dest).expect("counters");
        values.iter().map(|v| v.stats).fold(Stats::default(), |a, b| Stats {
            connections: a.connections + b.connections,
            packets_in: a.packets_in + b.packets_in,
            packets_out: a.packets_out + b.packets_out,
            bytes_in: a.bytes_in + b.bytes_in,
            bytes_out: a.bytes_out + b.bytes_out,
        })
    }
    /// Which counter went up by one: the reason of the packet just sent.
    fn reason(&mut self) -> Reason {
        let likely = self.last as usize;
        if self.counter(likely) == self.verdicts[likely] + 1 {
            self.verdicts[likely] += 1;
            return self.last;
        }
        let all = self.dataplane.maps.verdicts().expect("the counters");
        let up: Vec<usize> = (0..Reason::ALL.len()).filter(|i| all[*i] != self.verdicts[*i]).collect();
        assert_eq!(up.len(), 1, "counters that a packet moved: {up:?}");
        assert_eq!(all[up[0]], self.verdicts[up[0]] + 1);
        self.verdicts = all;
        self.last = Reason::ALL[up[0]];
        self.last
    }
}

const SIZES: Sizes =
    Sizes { flows4: 0, flows6: 0, services: 64, dests: 256, lists: 1024, tables: 16384, hops: 256, fullnat: true };

impl Engine for Kernel {
    fn reset(&mut self) {
        self.load(&Layout::default());
        let maps = &mut self.dataplane.maps;
        for words in [maps.conns4.words(), maps.conns6.words()] {
            words.iter().for_each(|w| w.store(0, SeqCst));
        }
        for i in 0..REPLY_HOPS_MAX {
            maps.reply_hops.set(i, Hop::default()).expect("clear");
        }
        for i in 0..SIZES.dests {
            maps.dest_state.set(i, DestState::default()).expect("clear");
        }
        for i in 0..SIZES.services {
            maps.service_state.set(i, ServiceState::default()).expect("clear");
        }
        maps.forget().expect("clear");
        // The limit of ICMP errors starts anew, too.
        maps.clock
            .set(0, Clock::at(START_S, &maps.config.get(0).expect("the configuration").policy))
            .expect("the clock");
        self.verdicts = maps.verdicts().expect("the counters");
        self.verdicts_before = self.verdicts;
        self.stats_before = (0..SIZES.dests).map(|d| self.stats(d)).collect();
    }
    fn load(&mut self, layout: &Layout) {
        let maps = &mut self.dataplane.maps;
        let gone = self.layout.keys.iter().filter(|(key, _)| layout.keys.iter().all(|(k, _)| k != key));
        for (key, _) in gone {
            maps.keys.remove(*key).expect("remove a service");
        }
        let ([flags, drop_rate], config) = (layout.settings, maps.config.get(0).expect("the configuration"));
        maps.config.set(0, Config { flags, drop_rate, ..config }).expect("the configuration");
        for (i, hop) in (0..).zip(&layout.hops) {
            maps.hops.set(i, *hop).expect("a hop");
        }
        for (i, (dest, flags)) in (0..).zip(layout.dests.iter().zip(&layout.dest_flags)).skip(1) {
            maps.dests.set(i, *dest).expect("a dest");
            maps.dest_state.word(i, 2).expect("its flags").store(*flags, SeqCst);
        }
        for (i, tunnel) in (0..).zip(&layout.tunnels) {
            maps.tunnels.set(i, *tunnel).expect("a tunnel");
        }
        for (key, _) in &self.layout.watched {
            if maps.watched.get(*key).expect("a watched address").is_some() {
                maps.watched.remove(*key).expect("an address is no longer watched");
            }
        }
        for (key, bits) in &layout.watched {
            maps.watched.insert(*key, *bits).expect("a watched address");
        }
        maps.taker.set(0, Taker { until_s: if layout.takes { u64::MAX } else { 0 } }).expect("the taker");
        for (i, local) in (0..).zip(&layout.locals) {
            maps.locals.set(i, *local).expect("a local address");
        }
        for (i, entry) in (0..).zip(&layout.lists) {
            maps.lists.set(i, *entry).expect("a list entry");
        }
        for (i, dest) in (0..).zip(&layout.tables) {
            maps.tables.set(i, *dest).expect("a place of a table");
        }
        for (i, service) in (0..).zip(&layout.services) {
            maps.services.set(i, *service).expect("a service");
        }
        for iface in &layout.ifaces {
            maps.ifaces.set(iface.ifindex, *iface).expect("an interface");
        }
        for (place, vlan) in &layout.vlans {
            maps.vlans.set(*place, *vlan).expect("a VLAN device");
        }
        for (key, index) in &layout.keys {
            maps.keys.insert(*key, u64::from(*index)).expect("a service");
        }
        self.layout = layout.clone();
    }
    fn set_now(&mut self, now_s: u32) {
        let maps = &self.dataplane.maps;
        let policy = maps.config.get(0).expect("the configuration").policy;
        maps.clock.set(0, Clock::at(now_s, &policy)).expect("the clock");
    }
    fn set_machines(&mut self, service: u32, state: ServiceState) {
        self.dataplane.maps.service_state.set(service, state).expect("machines");
    }
    fn set_lent(&mut self, dest: u32, lent: u64) {
        self.dataplane.maps.dest_state.word(dest, 4).expect("a dest").store(lent, SeqCst);
    }
    fn machines(&mut self, service: u32) -> ServiceState {
        self.dataplane.maps.service_state.get(service).expect("machines")
    }
    fn send(&mut self, frame: &[u8], ifindex: u32) -> Option<Sent> {
        // As the daemon would: the rings have room.
        while self.dataplane.early.take().is_some() || self.dataplane.large.take().is_some() {}
        if !carried(self.hook, frame) {
            return None;
        }
        // Words of struct xdp_md (its data_end and ingress_ifindex) or of struct __sk_buff (its ifindex).
        let mut context = [0u32; 11];
        let words = if self.hook == Hook::Tc {
            context[10] = ifindex;
            11
        } else {
            (context[1], context[3]) = (frame.len() as u32, ifindex);
            6
        };
        let context: Vec<u8> = context[..words].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = vec![0; 4096];
        let mut options = TestRunOptions::new();
        (options.data_in, options.data_out, options.ctx_in) = (Some(frame), Some(&mut out[..]), Some(&context[..]));
        let dataplane = match &mut self.other {
            Some(heir) if self.who == Who::Elder => heir,
            _ => &mut self.dataplane,
        };
        let done = match self.hook {
            Hook::Tc => dataplane.tc("rvs_tc_in").expect("the program").test_run(options),
            _ => dataplane.xdp("rvs_xdp").expect("the program").test_run(options),
        };
        let done = done.unwrap_or_else(|e| panic!("a frame of {} bytes by {ifindex}: {e:?}", frame.len()));
        out.truncate(done.data_size_out as usize);
        let code = match (self.hook, done.return_value) {
            (Hook::Tc, 2) | (Hook::XdpNative, 1) => Code::Drop,
            (Hook::Tc, u32::MAX) | (Hook::XdpNative, 2) => Code::Up,
            (Hook::XdpNative, 3) => Code::Back,
            (Hook::XdpNative, 4) => Code::Out,
            // The kernel does not tell where to: the source address does.
            (Hook::Tc, 7) if out[6..12] == if ifindex == LAN { LAN_MAC } else { BACK_MAC } => Code::Back,
            (Hook::Tc, 7) => Code::Out,
            (_, other) => panic!("the program returned {other}"),
        };
        Some(Sent { code, reason: self.reason(), bytes: out })
    }
    fn flows(&mut self) -> Vec<FlowRow> {
        let maps = &mut self.dataplane.maps;
        let (config, clock) = (maps.config.get(0).expect("configuration"), maps.clock.get(0).expect("clock"));
        maps.conns4.at(&config, &clock);
        maps.conns6.at(&config, &clock);
        let (four, six) = (maps.conns4.flows(0..maps.conns4.buckets()), maps.conns6.flows(0..maps.conns6.buckets()));
        let row = |f: rvs_sys::bpf::Flow| FlowRow {
            client: (f.client, f.client_port),
            virtual_end: (f.virtual_address, f.virtual_port),
            proto: f.proto,
            state: f.state,
            dest: f.dest,
        };
        let mut rows: Vec<FlowRow> = four.chain(six).map(row).collect();
        rows.sort();
        rows
    }
    fn counted(&mut self, dest: u32) -> Counted {
        let state = self.dataplane.maps.dest_state.get(dest).expect("a dest's state");
        let (is, was) = (self.stats(dest), self.stats_before[dest as usize]);
        Counted {
            active: state.active as i64,
            inactive: state.inactive as i64,
            stats: Stats {
                connections: is.connections - was.connections,
                packets_in: is.packets_in - was.packets_in,
                packets_out: is.packets_out - was.packets_out,
                bytes_in: is.bytes_in - was.bytes_in,
                bytes_out: is.bytes_out - was.bytes_out,
            },
        }
    }
    fn verdicts(&mut self) -> [u64; COUNTERS] {
        let all = self.dataplane.maps.verdicts().expect("the counters");
        // (What an elder has done its heir counts as that, too: by no reason.)
        std::array::from_fn(|i| if i < Reason::ALL.len() { all[i] - self.verdicts_before[i] } else { 0 })
    }
}
