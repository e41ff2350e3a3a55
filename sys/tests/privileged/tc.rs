//! The programs on interfaces: put there, replaced, taken off; and real connections through tc, with the endpoints' segmentation and
//! checksum offloads on, between a client, a director and a server in namespaces of their own.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rvs_control::model::{
    Command, Dest, DestKey, Env, Family, FwdMethod, Granularity, Model, Proto, SchedFlags, ServiceKey, ServiceSpec,
};
use rvs_control::plan::{Capacity, Planner, Way};
use rvs_datapath::abi::{Iface, Stats};
use rvs_datapath::verdict::Reason;
use rvs_sys::bpf::attach::{self, Done, Hook, Port};
use rvs_sys::bpf::{Dataplane, OBJECT, Sizes};

use crate::world::{Ns, run};

mod sctp;

pub const CASES: &[crate::Case] = &[
    ("programs_are_put_replaced_and_taken_off", programs_are_put_replaced_and_taken_off),
    ("an_interface_has_one_program_for_what_comes_in", an_interface_has_one_program_for_what_comes_in),
    ("a_refused_program_says_where_and_why", a_refused_program_says_where_and_why),
    ("a_tc_filter_does_where_there_are_no_links", a_tc_filter_does_where_there_are_no_links),
    ("nat_through_tc", nat_through_tc),
    ("dr_through_tc", dr_through_tc),
    ("neighbours_are_resolved_by_tc", neighbours_are_resolved_by_tc),
    ("a_local_real_server_by_nat", a_local_real_server_by_nat),
    ("icmp_errors_from_tc", icmp_errors_from_tc),
    ("a_server_behind_a_bridge", a_server_behind_a_bridge),
    ("sctp_checksums_through_tc", sctp::checksums),
];

/// A BPF file system of our own, gone with the test.
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount() -> Bpffs {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("rvssys-{}-tc{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let none: Option<&str> = None;
        nix::mount::mount(Some("bpf"), &folder, Some("bpf"), nix::mount::MsFlags::empty(), none)
            .expect("mount a bpffs");
        Bpffs(folder)
    }
    fn open(&self) -> Dataplane {
        let sizes = Sizes {
            flows4: 8192,
            flows6: 6144,
            services: 64,
            dests: 64,
            lists: 1024,
            tables: 1024,
            hops: 64,
            fullnat: true,
        };
        Dataplane::open(OBJECT, &self.0.join("pins"), &sizes).unwrap_or_else(|e| panic!("{}", chain(&e)))
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0);
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn chain(mut error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    while let Some(source) = error.source() {
        text += &format!(": {source}");
        error = source;
    }
    text
}

fn ifindex(ns: &Ns, name: &str) -> u32 {
    let text = ns.ip(&format!("-o link show dev {name}"));
    text.split(':').next().and_then(|n| n.trim().parse().ok()).expect("an interface number")
}

fn mac(ns: &Ns, name: &str) -> [u8; 6] {
    let text = ns.ip(&format!("-o link show dev {name}"));
    let text = text.split("link/ether ").nth(1).expect("a MAC address");
    let bytes: Vec<u8> = text[..17].split(':').map(|b| u8::from_str_radix(b, 16).expect("a byte")).collect();
    bytes.try_into().expect("six bytes")
}

/// Do it in a namespace, in a thread of its own.
fn within<T: Send + 'static>(ns: &Ns, f: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
    let name = ns.name.clone();
    std::thread::spawn(move || {
        rvs_sys::netns::enter(&name).expect("enter");
        f()
    })
}

// ---- attaching

fn programs_are_put_replaced_and_taken_off() {
    let (ns, _far) = Ns::pair();
    rvs_sys::netns::enter(&ns.name).expect("enter");
    let pins = Bpffs::mount();
    let va = Port { name: "va", ifindex: ifindex(&ns, "va") };
    for hook in Hook::ALL {
        let mut first = pins.open();
        assert_eq!(first.attach(va, hook).expect("attach"), Done::New, "{hook:?}");
        let dir = first.dir().to_owned();
        let before = attach::list(&dir).expect("list");
        let [one] = &before[..] else { panic!("{before:?}") };
        assert_eq!((one.name.as_str(), one.hook, one.ifindex), ("va", hook, va.ifindex));
        drop(first);
        assert_eq!(attach::list(&dir).expect("list"), before, "it stays when its process is gone");

        ns.ip("link set va down");
        ns.ip("link set va name other");
        ns.ip("link set other up");
        let mut second = pins.open();
        let other = Port { name: "other", ..va };
        assert_eq!(second.attach(other, hook).expect("replace"), Done::Replaced);
        let after = attach::list(&dir).expect("list");
        let [new] = &after[..] else { panic!("{after:?}") };
        assert_eq!((new.name.as_str(), new.link, new.ifindex), ("other", one.link, one.ifindex));
        assert_ne!(new.program, one.program);
        // What is behind its gates (at egress, an elder) is held as long as it is on an interface.
        let held = |program: u32| dir.join("gates").join(program.to_string()).exists();
        assert_eq!((held(one.program), held(new.program)), (true, true), "{hook:?}");
        second.tidy().expect("tidy");
        assert_eq!((held(one.program), held(new.program)), (false, true), "{hook:?}");
        assert!(attach::detach(&dir, "other", hook).expect("detach"));
        assert!(!attach::detach(&dir, "other", hook).expect("nothing there"));
        assert_eq!(attach::list(&dir).expect("list"), []);
        let shown = ns.ip("-d link show dev other");
        assert!(!shown.contains("prog/xdp"), "{shown}");
        ns.ip("link set other down");
        ns.ip("link set other name va");
        ns.ip("link set va up");
    }
}

fn an_interface_has_one_program_for_what_comes_in() {
    let (ns, _far) = Ns::pair();
    rvs_sys::netns::enter(&ns.name).expect("enter");
    let pins = Bpffs::mount();
    let mut dataplane = pins.open();
    let va = Port { name: "va", ifindex: ifindex(&ns, "va") };
    dataplane.attach(va, Hook::TcOut).expect("attach");
    for hook in [Hook::XdpNative, Hook::XdpGeneric, Hook::Tc, Hook::XdpGeneric, Hook::XdpNative] {
        dataplane.attach(va, hook).unwrap_or_else(|e| panic!("{}", chain(&e)));
        let there: Vec<Hook> = attach::list(dataplane.dir()).expect("list").iter().map(|a| a.hook).collect();
        assert_eq!(there, [hook, Hook::TcOut]);
    }
    // The interface goes, and another of its name comes.
    ns.ip("link del va");
    let gone = attach::list(dataplane.dir()).expect("list");
    assert!(gone.iter().all(|a| a.ifindex == 0), "{gone:?}");
    ns.ip("link add va type veth peer name vx");
    let va = Port { name: "va", ifindex: ifindex(&ns, "va") };
    assert_eq!(dataplane.attach(va, Hook::XdpNative).expect("attach"), Done::New);
    let there = attach::list(dataplane.dir()).expect("list");
    assert!(there.iter().any(|a| a.hook == Hook::XdpNative && a.ifindex == va.ifindex), "{there:?}");
    assert!(attach::detach(dataplane.dir(), "va", Hook::TcOut).expect("detach what is gone"));
}

fn a_refused_program_says_where_and_why() {
    let (ns, _far) = Ns::pair();
    rvs_sys::netns::enter(&ns.name).expect("enter");
    let pins = Bpffs::mount();
    let mut dataplane = pins.open();
    let missing = Port { name: "nix0", ifindex: 9999 };
    for hook in Hook::ALL {
        let error = chain(&dataplane.attach(missing, hook).expect_err("no such interface"));
        assert!(error.contains("nix0") && error.contains(hook.name()), "{error}");
    }
    // Another program is there.
    let others = Bpffs::mount();
    let mut other = others.open();
    let va = Port { name: "va", ifindex: ifindex(&ns, "va") };
    other.attach(va, Hook::XdpNative).expect("attach");
    let error = chain(&dataplane.attach(va, Hook::XdpNative).expect_err("two of them"));
    assert!(error.starts_with("attach to va as xdp: another XDP program is there"), "{error}");
    ns.ip("link add br0 type bridge");
    let bridge = Port { name: "br0", ifindex: ifindex(&ns, "br0") };
    dataplane.attach(bridge, Hook::XdpGeneric).expect("attach");
    let error = chain(&dataplane.attach(bridge, Hook::XdpNative).expect_err("a bridge"));
    assert!(error.starts_with("attach to br0 as xdp: its driver has no native XDP: use tc"), "{error}");
    let there = attach::list(dataplane.dir()).expect("list");
    assert!(matches!(&there[..], [a] if a.name == "br0" && a.hook == Hook::XdpGeneric), "it is back: {there:?}");
}

fn a_tc_filter_does_where_there_are_no_links() {
    let (ns, _far) = Ns::pair();
    rvs_sys::netns::enter(&ns.name).expect("enter");
    let pins = Bpffs::mount();
    let va = Port { name: "va", ifindex: ifindex(&ns, "va") };
    for (hook, direction) in [(Hook::Tc, "ingress"), (Hook::TcOut, "egress")] {
        let filters = |name: &str| run("tc", &["-n", &ns.name, "filter", "show", "dev", name, direction]);
        let rename = |from: &str, to: &str| {
            for change in [format!("{from} down"), format!("{from} name {to}"), format!("{to} up")] {
                ns.ip(&format!("link set {change}"));
            }
        };
        let mut first = pins.open();
        assert_eq!(first.filter(va, hook).expect("attach"), Done::New);
        let dir = first.dir().to_owned();
        let before = attach::list(&dir).expect("list");
        drop(first);
        assert_eq!(filters("va").matches("direct-action").count(), 1, "{}", filters("va"));
        assert_eq!(before[0].ifindex, va.ifindex);
        rename("va", "other");
        let mut second = pins.open();
        let other = Port { name: "other", ..va };
        assert_eq!(second.filter(other, hook).expect("replace"), Done::Replaced);
        let after = attach::list(&dir).expect("list");
        assert_eq!((after.len(), after[0].name.as_str(), after[0].ifindex), (1, "other", va.ifindex), "{after:?}");
        assert_ne!(after[0].program, before[0].program);
        drop(second);
        let text = filters("other");
        assert_eq!(text.matches("direct-action").count(), 1, "{text}");
        assert!(text.contains(&format!(" id {} name {} ", after[0].program, hook.program())), "{text}");
        assert!(attach::detach(&dir, "other", hook).expect("detach"));
        assert_eq!((filters("other"), attach::list(&dir).expect("list")), (String::new(), vec![]));
        rename("other", "va");
    }
}

// ---- real traffic

const FAMILIES: [Net; 2] = [Net::V4, Net::V6];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Net {
    V4,
    V6,
}

impl Net {
    fn pick(self, v4: &str, v6: &str) -> IpAddr {
        if self == Net::V4 { v4 } else { v6 }.parse().expect("an address")
    }
    fn vip(self) -> IpAddr {
        self.pick("172.16.0.100", "fd00:c::100")
    }
    fn director(self) -> IpAddr {
        self.pick("10.0.0.1", "fd00:5::1")
    }
    fn server(self) -> IpAddr {
        self.pick("10.0.0.2", "fd00:5::2")
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    /// The server's gateway is the director.
    Gateway,
    /// The same, and on the director the server is behind a bridge, `br0`.
    Bridge,
    /// The server answers by a way of its own (`s1 - c1`), and has the virtual addresses on lo.
    Direct,
}

/// The client, the director, and a server: `c0 - lan`, `back - s0`.
struct Lab {
    client: Ns,
    director: Ns,
    server: Ns,
    /// The director's interface towards the server.
    back: &'static str,
    dataplane: Dataplane,
    model: Model,
    planner: Planner,
    /// The last to go.
    _pins: Bpffs,
}

fn veth(a: (&Ns, &str), b: (&Ns, &str)) {
    run("ip", &["link", "add", a.1, "netns", &a.0.name, "type", "veth", "peer", "name", b.1, "netns", &b.0.name]);
    for (ns, name) in [a, b] {
        ns.ip(&format!("link set {name} up"));
    }
}

fn addresses(ns: &Ns, name: &str, v4: &str, v6: &str) {
    ns.ip(&format!("addr add {v4} dev {name}"));
    ns.ip(&format!("-6 addr add {v6} dev {name} nodad"));
}

fn routes(ns: &Ns, to: [&str; 2], how: [&str; 2]) {
    ns.ip(&format!("route add {} {}", to[0], how[0]));
    ns.ip(&format!("-6 route add {} {}", to[1], how[1]));
}

fn sysctl(ns: &Ns, settings: &[(&str, u32)]) {
    for (key, value) in settings {
        let done = ns.sh(&format!("echo {value} > /proc/sys/net/{key}"));
        assert!(done.status.success(), "{key}");
    }
}

/// Nothing of the host is asked for in these tests.
struct Nobody;
impl Env for Nobody {
    fn is_local(&self, _: IpAddr) -> bool {
        false
    }
    fn is_broadcast(&self, _: Ipv4Addr) -> bool {
        false
    }
    fn interface_mtu(&self, _: &str) -> Option<u32> {
        None
    }
}

impl Lab {
    fn up(shape: Shape) -> Lab {
        let (client, director, server) = (Ns::new(), Ns::new(), Ns::new());
        veth((&client, "c0"), (&director, "lan"));
        veth((&director, "back"), (&server, "s0"));
        addresses(&client, "c0", "172.16.0.2/24", "fd00:c::2/64");
        addresses(&director, "lan", "172.16.0.1/24", "fd00:c::1/64");
        addresses(&director, "lan", "172.16.0.100/32", "fd00:c::100/128");
        let back = if shape == Shape::Bridge { "br0" } else { "back" };
        if shape == Shape::Bridge {
            director.ip("link add br0 type bridge");
            director.ip("link set back master br0");
            director.ip("link set br0 up");
        }
        addresses(&director, back, "10.0.0.1/24", "fd00:5::1/64");
        addresses(&server, "s0", "10.0.0.2/24", "fd00:5::2/64");
        routes(&client, ["10.0.0.0/24", "fd00:5::/64"], ["via 172.16.0.1", "via fd00:c::1"]);
        sysctl(&director, &[("ipv4/ip_forward", 1), ("ipv6/conf/all/forwarding", 1)]);
        if shape == Shape::Direct {
            veth((&server, "s1"), (&client, "c1"));
            let own = [("ipv4/conf/all/arp_ignore", 1), ("ipv4/conf/all/arp_announce", 2)];
            sysctl(&server, &own);
            addresses(&server, "lo", "172.16.0.100/32", "fd00:c::100/128");
            sysctl(&client, &[("ipv4/conf/all/rp_filter", 0), ("ipv4/conf/c1/rp_filter", 0)]);
            addresses(&client, "c1", "172.17.0.2/24", "fd00:d::2/64");
            addresses(&server, "s1", "172.17.0.1/24", "fd00:d::1/64");
            routes(&server, ["172.16.0.0/24", "fd00:c::/64"], ["via 172.17.0.2", "via fd00:d::2"]);
        } else {
            routes(&server, ["default", "default"], ["via 10.0.0.1", "via fd00:5::1"]);
        }
        rvs_sys::netns::enter(&director.name).expect("enter");
        let pins = Bpffs::mount();
        let dataplane = pins.open();
        let m = &dataplane.maps;
        let planner = Planner::new(&Capacity {
            services: m.services.len(),
            dests: m.dests.len(),
            lists: m.lists.len(),
            tables: m.tables.len(),
            hops: m.hops.len(),
        });
        let mut lab = Lab { client, director, server, back, dataplane, model: Model::new(), planner, _pins: pins };
        for name in ["lan", back] {
            let port = Port { name, ifindex: ifindex(&lab.director, name) };
            let iface = Iface::new(port.ifindex, mac(&lab.director, name), 0, 1500);
            lab.dataplane.maps.ifaces.set(port.ifindex, iface).expect("the interface");
            lab.attach(name, Hook::Tc);
        }
        let step = lab.planner.locals(FAMILIES.map(Net::vip).into());
        lab.dataplane.maps.apply(&step.ops).expect("write");
        lab
    }
    fn attach(&mut self, name: &str, hook: Hook) {
        let port = Port { name, ifindex: ifindex(&self.director, name) };
        self.dataplane.attach(port, hook).unwrap_or_else(|e| panic!("{}", chain(&e)));
    }
    fn command(&mut self, command: &Command) {
        let change = self.model.apply(command, &Nobody).expect("a good command");
        let step = self.planner.change(&self.model, &change, 0).expect("room");
        self.dataplane.maps.apply(&step.ops).expect("write");
    }
    fn service(&mut self, proto: Proto, net: Net, port: u16) -> ServiceKey {
        let key = ServiceKey::Virtual { proto, addr: net.vip(), port };
        let family = if net == Net::V4 { Family::V4 } else { Family::V6 };
        let spec = ServiceSpec {
            scheduler: "rr".into(),
            sched_flags: SchedFlags::NONE,
            persistence_s: None,
            granularity: Granularity::host(family),
            engine: None,
            one_packet: false,
        };
        self.command(&Command::AddService(key, spec));
        key
    }
    fn dest(&mut self, service: ServiceKey, to: SocketAddr, method: FwdMethod) {
        let key = DestKey { addr: to.ip(), port: to.port() };
        let dest = Dest { key, method, weight: 1, upper: 0, lower: 0 };
        self.command(&Command::AddDest(service, dest));
    }
    /// The ways to the server as they are.
    fn ways(&mut self) {
        let (to, from) = (mac(&self.server, "s0"), mac(&self.director, self.back));
        let word = |a: [u8; 4]| u32::from_ne_bytes(a);
        let macs = [
            word([to[0], to[1], to[2], to[3]]),
            word([to[4], to[5], from[0], from[1]]),
            word([from[2], from[3], from[4], from[5]]),
        ];
        let hop = Way::Hop { macs, ifindex: ifindex(&self.director, self.back), mtu: 1500, source: None };
        self.tell(FAMILIES.iter().map(|n| (n.server(), hop)).collect());
    }
    fn tell(&mut self, ways: BTreeMap<IpAddr, Way>) {
        let step = self.planner.ways(ways, 0);
        self.dataplane.maps.apply(&step.ops).expect("write");
    }
    fn stats(&self, service: ServiceKey, to: SocketAddr) -> Stats {
        let key = DestKey { addr: to.ip(), port: to.port() };
        let (index, _) = self.planner.dest_indexes(&service, &key).expect("the dest");
        self.dataplane.maps.stats_of_dest(index).expect("counters").0
    }
    fn verdicts(&self, reason: Reason) -> u64 {
        self.dataplane.maps.verdicts().expect("counters")[reason as usize]
    }
    /// Segmentation and checksums left to the device, by the endpoints and by the director's interfaces: where both do, nobody ever
    /// finishes (or checks) them; where only the endpoints do, the director's kernel has to.
    fn offloads(&self, endpoints: bool, director: bool) {
        let (client, server) = ((&self.client, "c0"), (&self.server, "s0"));
        let own = [(&self.director, "lan", director), (&self.director, "back", director)];
        let all = [client, server].map(|(ns, name)| (ns, name, endpoints)).into_iter().chain(own);
        for (ns, name, on) in all {
            let state = if on { "on" } else { "off" };
            let done = ns.sh(&format!("ethtool -K {name} tx {state} tso {state} gso {state}"));
            assert!(done.status.success(), "ethtool: {}", String::from_utf8_lossy(&done.stderr));
        }
    }
    /// Nothing was dropped, and nothing took the kernel's own way.
    fn nothing_lost(&self) {
        for reason in Reason::ALL {
            let lost = matches!(reason.kind(), rvs_datapath::verdict::Kind::Drop) || *reason == Reason::ByKernel;
            assert!(!lost || self.verdicts(*reason) == 0, "{}: {}", reason.name(), self.verdicts(*reason));
        }
    }
}

const AMOUNT: usize = 2 << 20;
const DEADLINE: Duration = Duration::from_secs(20);

/// Bytes in which no stretch looks like another.
fn bytes(seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    (0..AMOUNT / 8).flat_map(|_| next().to_le_bytes()).collect()
}

/// A server for one connection: takes AMOUNT bytes, gives AMOUNT others. What it got, and from whom.
fn serve(ns: &Ns, at: SocketAddr) -> std::thread::JoinHandle<(Vec<u8>, IpAddr)> {
    let (ready, wait) = std::sync::mpsc::channel();
    let server = within(ns, move || {
        let listener = TcpListener::bind(at).expect("listen");
        ready.send(()).expect("the test waits");
        let (mut stream, peer) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        stream.set_write_timeout(Some(DEADLINE)).expect("a deadline");
        let mut got = vec![0; AMOUNT];
        stream.read_exact(&mut got).expect("upload");
        stream.write_all(&bytes(2)).expect("download");
        (got, peer.ip())
    });
    wait.recv_timeout(DEADLINE).expect("the server listens");
    server
}

/// Both ways through the service; the client's own address arrives at the server.
fn transfer(lab: &Lab, service: SocketAddr, server: (&Ns, SocketAddr)) {
    let served = serve(server.0, server.1);
    let client = within(&lab.client, move || {
        let mut stream = TcpStream::connect_timeout(&service, DEADLINE).expect("connect");
        stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        stream.set_write_timeout(Some(DEADLINE)).expect("a deadline");
        stream.write_all(&bytes(1)).expect("upload");
        stream.shutdown(Shutdown::Write).expect("shut down");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("download");
        (got, stream.local_addr().expect("an address").ip())
    });
    let (got, ours) = client.join().expect("the client");
    assert!(got == bytes(2), "download: {} bytes", got.len());
    let (got, peer) = served.join().expect("the server");
    assert!(got == bytes(1), "upload: {} bytes", got.len());
    assert_eq!(peer, ours);
}

/// Datagrams of these lengths, there and back.
fn datagrams(lab: &Lab, service: SocketAddr, server: (&Ns, SocketAddr)) {
    const LENGTHS: [usize; 5] = [0, 1, 13, 512, 1400];
    let socket = move |at: SocketAddr| {
        let socket = UdpSocket::bind(at).expect("bind");
        socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        socket
    };
    let at = server.1;
    let (ready, wait) = std::sync::mpsc::channel();
    let served = within(server.0, move || {
        let socket = socket(at);
        ready.send(()).expect("the test waits");
        for _ in LENGTHS {
            let mut buffer = [0; 2048];
            let (n, peer) = socket.recv_from(&mut buffer).expect("receive");
            buffer[..n].reverse();
            socket.send_to(&buffer[..n], peer).expect("answer");
        }
    });
    wait.recv_timeout(DEADLINE).expect("the server listens");
    let client = within(&lab.client, move || {
        let any: IpAddr = if service.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = socket((any, 0).into());
        socket.connect(service).expect("connect");
        for n in LENGTHS {
            let sent: Vec<u8> = bytes(3)[..n].to_vec();
            socket.send(&sent).expect("send");
            let mut buffer = [0; 2048];
            let got = socket.recv(&mut buffer).expect("receive");
            assert!(buffer[..got].iter().rev().eq(&sent), "{n} bytes");
        }
    });
    client.join().expect("the client");
    served.join().expect("the server");
}

/// TCP and UDP, both families, with what is left to devices and what is not.
fn everything(lab: &mut Lab, method: FwdMethod) {
    let masq = method == FwdMethod::Masq;
    for net in FAMILIES {
        let (to, port) = if masq { (net.server(), 8080) } else { (net.vip(), 80) };
        let dest: SocketAddr = (net.server(), port).into();
        let service = lab.service(Proto::Tcp, net, 80);
        lab.dest(service, dest, method);
        for (on, director) in [(true, true), (true, false), (false, true)] {
            lab.offloads(on, director);
            let before = lab.stats(service, dest);
            transfer(lab, (net.vip(), 80).into(), (&lab.server, (to, port).into()));
            let after = lab.stats(service, dest);
            let (packets, octets) = (after.packets_in - before.packets_in, after.bytes_in - before.bytes_in);
            assert_eq!(after.connections - before.connections, 1);
            assert!(octets > AMOUNT as u64, "{octets} bytes in");
            // With segmentation offload the packets of the upload come whole: far more than a segment each.
            assert_eq!(octets / packets > 1500, on, "{octets} bytes in {packets} packets, offloads {on}");
            assert_eq!(after.bytes_out - before.bytes_out > AMOUNT as u64, masq);
            let service = lab.udp(net, method);
            datagrams(lab, (net.vip(), 53).into(), (&lab.server, (to, 53).into()));
            lab.command(&Command::DelService(service));
        }
    }
    lab.nothing_lost();
    let (route, masqueraded) = (lab.verdicts(Reason::Route), lab.verdicts(Reason::Masq));
    assert!(if masq { route == 0 && masqueraded > 0 } else { route > 0 && masqueraded == 0 });
}

impl Lab {
    fn udp(&mut self, net: Net, method: FwdMethod) -> ServiceKey {
        let service = self.service(Proto::Udp, net, 53);
        self.dest(service, (net.server(), 53).into(), method);
        service
    }
}

fn nat_through_tc() {
    let mut lab = Lab::up(Shape::Gateway);
    lab.ways();
    everything(&mut lab, FwdMethod::Masq);
    assert!(lab.verdicts(Reason::MasqReply) > 0);
}

fn a_server_behind_a_bridge() {
    let mut lab = Lab::up(Shape::Bridge);
    lab.ways();
    everything(&mut lab, FwdMethod::Masq);
    assert!(lab.verdicts(Reason::MasqReply) > 0);
}

fn dr_through_tc() {
    let mut lab = Lab::up(Shape::Direct);
    lab.ways();
    everything(&mut lab, FwdMethod::Route);
}

/// No ways are told: the kernel's tables are asked, and nobody has spoken with the server before.
fn neighbours_are_resolved_by_tc() {
    for (shape, method) in [(Shape::Gateway, FwdMethod::Masq), (Shape::Direct, FwdMethod::Route)] {
        let mut lab = Lab::up(shape);
        let flush = |lab: &Lab| {
            lab.director.ip("neigh flush all");
            lab.director.ip("-6 neigh flush all");
        };
        for net in FAMILIES {
            flush(&lab);
            lab.udp(net, method);
            let to = if shape == Shape::Direct { net.vip() } else { net.server() };
            datagrams(&lab, (net.vip(), 53).into(), (&lab.server, (to, 53).into()));
            // Packets to be cut into segments are longer than the route's MTU, and no obstacle.
            let service = lab.service(Proto::Tcp, net, 80);
            lab.dest(service, (net.server(), 80).into(), method);
            transfer(&lab, (net.vip(), 80).into(), (&lab.server, (to, 80).into()));
        }
        lab.nothing_lost();
    }
}

fn a_local_real_server_by_nat() {
    let mut lab = Lab::up(Shape::Gateway);
    lab.attach("lan", Hook::TcOut);
    lab.tell(FAMILIES.iter().map(|n| (n.director(), Way::Local)).collect());
    for net in FAMILIES {
        let dest: SocketAddr = (net.director(), 8080).into();
        let service = lab.service(Proto::Tcp, net, 80);
        lab.dest(service, dest, FwdMethod::Masq);
        for director in [true, false] {
            lab.offloads(true, director);
            transfer(&lab, (net.vip(), 80).into(), (&lab.director, dest));
        }
        let stats = lab.stats(service, dest);
        assert_eq!(stats.connections, 2);
        assert!(stats.bytes_in > 2 * AMOUNT as u64 && stats.bytes_out > 2 * AMOUNT as u64, "{stats:?}");
        let service = lab.service(Proto::Udp, net, 53);
        lab.dest(service, (net.director(), 53).into(), FwdMethod::Masq);
        datagrams(&lab, (net.vip(), 53).into(), (&lab.director, (net.director(), 53).into()));
        // What is not of the service passes as it is.
        transfer(&lab, (net.director(), 9000).into(), (&lab.director, (net.director(), 9000).into()));
    }
    lab.nothing_lost();
    // It was the program: without it the reply has the wrong source.
    attach::detach(lab.dataplane.dir(), "lan", Hook::TcOut).expect("detach");
    let service: SocketAddr = (Net::V4.vip(), 53).into();
    let client = within(&lab.client, move || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a deadline");
        socket.connect(service).expect("connect");
        socket.send(b"x").expect("send");
        socket.recv(&mut [0; 16]).expect_err("no answer").kind()
    });
    let kind = client.join().expect("the client");
    assert!(matches!(kind, ErrorKind::WouldBlock | ErrorKind::ConnectionRefused), "{kind:?}");
}

// ---- ICMP errors

/// A raw socket for the ICMP messages of a namespace, made in this thread.
fn icmp_socket(net: Net) -> UdpSocket {
    raw_socket(net, if net == Net::V4 { libc::IPPROTO_ICMP } else { libc::IPPROTO_ICMPV6 })
}

fn raw_socket(net: Net, protocol: i32) -> UdpSocket {
    let family = if net == Net::V4 { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "a raw socket: {}", std::io::Error::last_os_error());
    // SAFETY: a new socket that nobody else has. (Receiving is all the same for a datagram socket.)
    let socket = unsafe { UdpSocket::from_raw_fd(fd) };
    socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    socket
}

fn set_hops(socket: &UdpSocket, net: Net, hops: i32) {
    let (level, option) =
        if net == Net::V4 { (libc::IPPROTO_IP, libc::IP_TTL) } else { (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS) };
    // SAFETY: an integer of ours, and its size.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const hops).cast(), size_of::<i32>() as u32)
    };
    assert_eq!(done, 0);
}

/// Sum of 16-bit words, folded.
fn fold(bytes: &[u8]) -> u16 {
    let word = |c: &[u8]| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Send a datagram of `length` with so many hops to the service; the ICMP message that comes back, from its type on.
fn provoke(lab: &Lab, net: Net, hops: i32, length: usize) -> (Vec<u8>, u16) {
    let client = within(&lab.client, move || {
        let icmp = icmp_socket(net);
        let any: IpAddr = if net == Net::V4 { [0; 4].into() } else { [0u16; 8].into() };
        let socket = UdpSocket::bind((any, 0)).expect("bind");
        set_hops(&socket, net, hops);
        socket.send_to(&bytes(4)[..length], (net.vip(), 53)).expect("send");
        let port = socket.local_addr().expect("an address").port();
        loop {
            let mut buffer = vec![0; 4096];
            // SAFETY: a buffer of ours and its size.
            let n = unsafe { libc::recv(icmp.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            assert!(n > 0, "no ICMP error: {}", std::io::Error::last_os_error());
            buffer.truncate(n as usize);
            if net == Net::V4 {
                assert_eq!(buffer[12..16], [172, 16, 0, 100], "it comes from the virtual address");
                assert_eq!(fold(&buffer[..20]), 0xffff, "IP header checksum");
                buffer.drain(..20);
                return (buffer, port);
            }
            // Neighbour discovery comes by too.
            if buffer[0] < 128 {
                return (buffer, port);
            }
        }
    });
    client.join().expect("the client")
}

fn icmp_errors_from_tc() {
    let mut lab = Lab::up(Shape::Gateway);
    lab.ways();
    for net in FAMILIES {
        let service = lab.udp(net, FwdMethod::Masq);
        let empty = lab.model.service(&service).expect("the service").dests().next().expect("the dest").key;
        let [exceeded, unreachable] = if net == Net::V4 { [[11, 0], [3, 3]] } else { [[3, 0], [1, 4]] };
        for (what, hops, type_code) in [("time exceeded", 1, exceeded), ("port unreachable", 64, unreachable)] {
            if hops > 1 {
                lab.command(&Command::DelDest(service, empty));
            }
            // The endpoint's checksums: finished; unfinished, and finished by the director's interface or never.
            for (client_tx, director_tx) in [("off", "on"), ("on", "off"), ("on", "on")] {
                for (ns, name, state) in [(&lab.client, "c0", client_tx), (&lab.director, "lan", director_tx)] {
                    assert!(ns.sh(&format!("ethtool -K {name} tx {state}")).status.success(), "ethtool");
                }
                // Quoted whole, with an odd length, and cut.
                for length in [8, 101, 1300] {
                    let (message, port) = provoke(&lab, net, hops, length);
                    let at = format!("{what}, {net:?}, {length} bytes, tx {client_tx} {director_tx}");
                    assert_eq!(message[..2], type_code, "{at}");
                    let (header, most) = if net == Net::V4 { (20, 548) } else { (40, 1232) };
                    assert_eq!(message.len() - 8, (header + 8 + length).min(most), "{at}");
                    let quoted = &message[8 + header..];
                    let ports: Vec<u8> = [port.to_be_bytes(), 53u16.to_be_bytes()].concat();
                    assert_eq!(quoted[..4], ports, "{at}");
                    assert!(quoted[8..] == bytes(4)[..quoted.len() - 8], "{at}: the quote");
                    // (The kernel checks ICMPv6 itself: a wrong one would not have come.)
                    if net == Net::V4 && director_tx != client_tx {
                        assert_eq!(fold(&message), 0xffff, "{at}: checksum");
                    }
                }
            }
        }
    }
    let sent = (lab.verdicts(Reason::TtlExceeded), lab.verdicts(Reason::NoDest));
    assert_eq!(sent, (18, 18));
}
