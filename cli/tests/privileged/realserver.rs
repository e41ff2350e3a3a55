//! A real server and a peer on one wire; what the peer sees decides.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use rvs_cli::realserver::{self, Realserver};

use crate::world::Ns;

pub const CASES: &[(&str, fn())] = &[
    ("up_hides_the_vips_and_serves_them", up_hides_the_vips_and_serves_them),
    ("each_broken_thing_is_named_and_its_command_mends_it", each_broken_thing_is_named_and_its_command_mends_it),
    ("replies_do_not_announce_the_vip", replies_do_not_announce_the_vip),
    ("strict_source_checks_are_named_and_mended", strict_source_checks_are_named_and_mended),
    ("down_leaves_no_trace", down_leaves_no_trace),
    ("tunnels_end_here_and_no_longer", tunnels_end_here_and_no_longer),
    ("a_refusal_changes_nothing", a_refusal_changes_nothing),
];

/// These need the tools for ARP rules.
pub const ARP_CASES: &[(&str, fn())] =
    &[("arp_rules_and_static_entries_are_accepted", arp_rules_and_static_entries_are_accepted)];

const VIP: &str = "10.1.0.99";
const VIP6: &str = "fd00:1::99";
const RS_MAC: &str = "02:00:00:00:00:bb";

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Top,
}

#[derive(Subcommand)]
enum Top {
    #[command(subcommand)]
    Realserver(Realserver),
}

struct Wire {
    peer: Ns,
    rs: Ns,
    state: PathBuf,
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.state.parent().expect("a folder"));
    }
}

impl Wire {
    fn new() -> Self {
        let (peer, rs) = Ns::pair();
        peer.ip("addr add 10.1.0.1/24 dev va");
        peer.ip("-6 addr add fd00:1::1/64 dev va nodad");
        rs.ip(&format!("link set vb address {RS_MAC}"));
        rs.ip("addr add 10.1.0.2/24 dev vb");
        rs.ip("-6 addr add fd00:1::2/64 dev vb nodad");
        // The kernel's own link-local address goes through duplicate address detection while the tests look; without
        // any, the kernel has no source to ask for neighbours with when it sends from an address of lo.
        rs.ip("-6 addr flush dev vb scope link");
        rs.ip("-6 addr add fe80::bb/64 dev vb nodad");
        let state = std::env::temp_dir().join(&rs.name).join("realserver.json");
        Self { peer, rs, state }
    }

    /// `rvs realserver <words>` on the real server: exit code, stdout, stderr.
    fn rvs(&self, words: &str) -> (u8, String, String) {
        let state = self.state.to_str().expect("a path");
        let line = format!("rvs realserver {words} --state {state}");
        let cli = Cli::try_parse_from(line.split(' ')).expect("usage");
        let name = self.rs.name.clone();
        let run = move || {
            rvs_sys::netns::enter(&name).expect("enter");
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let Top::Realserver(command) = cli.command;
            let code = realserver::main(&command, &mut out, &mut err);
            (code, String::from_utf8(out).expect("text"), String::from_utf8(err).expect("text"))
        };
        std::thread::spawn(run).join().expect("rvs realserver")
    }

    fn up(&self) -> String {
        let (code, out, err) = self.rvs(&format!("up --vip {VIP} --vip {VIP6}"));
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        out
    }

    /// Whether the peer finds out the MAC address of `ip` by asking on the wire.
    fn answers(&self, ip: &str) -> bool {
        let family = if ip.contains(':') { "-6" } else { "-4" };
        self.peer.ip("neigh flush all");
        self.peer.sh(&format!("ping {family} -c 1 -W 1 {ip}"));
        self.peer.ip(&format!("neigh show {ip} dev va")).contains("lladdr")
    }

    /// Whether the real server serves `ip`, sent to it as a director does: straight to its MAC address.
    fn serves(&self, ip: &str) -> bool {
        let family = if ip.contains(':') { "-6" } else { "-4" };
        self.peer.ip(&format!("neigh replace {ip} lladdr {RS_MAC} dev va nud permanent"));
        let served = self.peer.sh(&format!("ping {family} -c 1 -W 1 {ip}")).status.success();
        self.peer.ip(&format!("neigh del {ip} dev va"));
        served
    }

    fn rs_sh(&self, command: &str) {
        let output = self.rs.sh(command);
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Every setting of IP interfaces and every address of the real server, byte for byte.
    fn snapshot(&self) -> Vec<String> {
        let settings = self.rs.sh("grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf 2>/dev/null | sort");
        let settings = String::from_utf8(settings.stdout).expect("text");
        assert!(settings.lines().count() > 100);
        settings.lines().map(str::to_owned).chain([self.rs.ip("-j addr")]).collect()
    }

    /// The check must find exactly these problems; runs the commands it names, after which it must find none.
    fn mends(&self, broken: &str, problems: &[&str]) {
        let (code, out, err) = self.rvs("check");
        assert_eq!((code, err.as_str()), (1, ""), "{broken}: {out}");
        let found: Vec<&str> = out.lines().filter_map(|line| line.strip_prefix("wrong: ")).collect();
        assert_eq!(found, problems, "{broken}");
        for command in out.lines().filter_map(|line| line.strip_prefix("  mend: ")) {
            self.rs_sh(command);
        }
        let (code, out, _) = self.rvs("check");
        assert_eq!(code, 0, "{broken}, mended: {out}");
    }
}

/// Says only what differs.
fn assert_same(before: &[String], after: &[String]) {
    let lost: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    assert!(lost.is_empty() && new.is_empty(), "was {lost:#?}, is {new:#?}");
}

fn up_hides_the_vips_and_serves_them() {
    let wire = Wire::new();
    wire.rs.ip(&format!("addr add {VIP}/32 dev lo"));
    wire.rs.ip(&format!("-6 addr add {VIP6}/128 dev lo nodad"));
    // With this address the interface hears what is asked about the VIP: the same last 24 bits, the same group.
    wire.rs.ip("-6 addr add fd00:7::99/64 dev vb nodad");
    assert!(wire.answers(VIP), "without the settings the kernel answers for an address of lo");
    assert!(!wire.answers(VIP6), "for IPv6 it never does");
    wire.rs.ip(&format!("addr del {VIP}/32 dev lo"));
    wire.rs.ip(&format!("-6 addr del {VIP6}/128 dev lo"));
    assert!(!wire.serves(VIP) && !wire.serves(VIP6));

    let out = wire.up();
    assert!(out.ends_with("ready for direct routing: 10.1.0.99, fd00:1::99\n"), "{out}");
    for vip in [VIP, VIP6] {
        assert!(!wire.answers(vip), "{vip} is hidden");
        assert!(wire.serves(vip), "{vip} is served");
    }
    assert!(wire.answers("10.1.0.2") && wire.answers("fd00:1::2"), "its own addresses are not hidden");
    let again = wire.up();
    assert_eq!(again, "nothing to do\nready for direct routing: 10.1.0.99, fd00:1::99\n");
    assert_eq!(wire.rvs("check").0, 0);
}

fn each_broken_thing_is_named_and_its_command_mends_it() {
    let wire = Wire::new();
    wire.up();
    let both = |name: &str, value: u8| {
        let conf = "/proc/sys/net/ipv4/conf";
        wire.rs_sh(&format!("echo {value} > {conf}/all/{name}; echo {value} > {conf}/vb/{name}"));
    };
    both("arp_ignore", 0);
    assert!(wire.answers(VIP));
    wire.mends("arp_ignore 0", &["vb answers ARP requests for the VIPs: its arp_ignore is 0"]);
    assert!(!wire.answers(VIP));
    both("arp_ignore", 4);
    assert!(wire.answers(VIP), "4 means nothing to the kernel");
    wire.mends("arp_ignore 4", &["vb answers ARP requests for the VIPs: its arp_ignore is 4"]);
    both("arp_announce", 1);
    wire.mends("arp_announce 1", &["vb may announce a VIP in ARP requests: its arp_announce is 1"]);

    wire.rs.ip(&format!("addr del {VIP}/32 dev lo"));
    wire.mends("no VIP", &["the VIP 10.1.0.99 is no address of this host"]);
    wire.rs.ip(&format!("-6 addr del {VIP6}/128 dev lo"));
    wire.mends("no IPv6 VIP", &["the VIP fd00:1::99 is no address of this host"]);
    wire.rs_sh("echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6");
    let off = "lo cannot hold fd00:1::99: its disable_ipv6 is 1";
    wire.mends("no IPv6 on lo", &[off, "the VIP fd00:1::99 is no address of this host"]);

    wire.rs.ip(&format!("addr del {VIP}/32 dev lo"));
    wire.rs.ip(&format!("addr add {VIP}/24 dev lo"));
    wire.mends("a network on lo", &["the VIP 10.1.0.99 is on lo as a /24"]);
    wire.rs.ip(&format!("addr add {VIP}/32 dev vb"));
    assert!(wire.answers(VIP));
    wire.mends("VIP on the wire", &["the VIP 10.1.0.99 is an address of vb itself"]);
    wire.rs.ip(&format!("-6 addr add {VIP6}/64 dev vb nodad"));
    assert!(wire.answers(VIP6));
    wire.mends("IPv6 VIP on the wire", &["the VIP fd00:1::99 is an address of vb itself"]);
    wire.rs.ip("link set lo down");
    wire.mends("lo down", &["lo is down", "the VIP fd00:1::99 is no address of this host"]);
    for vip in [VIP, VIP6] {
        assert!(!wire.answers(vip) && wire.serves(vip), "{vip}");
    }
}

fn replies_do_not_announce_the_vip() {
    let wire = Wire::new();
    wire.up();
    // The real server asks for the peer's address in order to send from the VIP: does the peer learn the VIP by it?
    let announced = || {
        wire.rs.ip("neigh flush all");
        wire.peer.ip("neigh flush all");
        wire.rs.sh(&format!("ping -c 1 -W 1 -I {VIP} 10.1.0.1"));
        wire.peer.ip(&format!("neigh show {VIP} dev va")).contains(RS_MAC)
    };
    assert!(!announced());
    wire.rs_sh("cd /proc/sys/net/ipv4/conf; echo 0 > all/arp_announce; echo 0 > vb/arp_announce");
    assert!(announced(), "this is what the setting is for");
    wire.mends("arp_announce 0", &["vb may announce a VIP in ARP requests: its arp_announce is 0"]);
    assert!(!announced());
}

fn strict_source_checks_are_named_and_mended() {
    let wire = Wire::new();
    // A second wire with the way back to the clients.
    let router = Ns::new();
    let (router_name, rs_name) = (router.name.as_str(), wire.rs.name.as_str());
    let ends = ["type", "veth", "peer", "name", "wb", "netns", rs_name];
    crate::world::run("ip", &[&["link", "add", "wa", "netns", router_name], &ends[..]].concat());
    router.ip("link set wa up");
    router.ip("addr add 10.2.0.1/24 dev wa");
    wire.rs.ip("link set wb addrgenmode none up");
    wire.rs.ip("addr add 10.2.0.2/24 dev wb");
    wire.rs.ip("route add default via 10.2.0.1");
    wire.rs_sh("cd /proc/sys/net/ipv4/conf; echo 0 > all/rp_filter; echo 1 > vb/rp_filter; echo 1 > wb/rp_filter");
    wire.peer.ip("addr add 198.51.100.9/32 dev lo");
    // Whether a client's request that comes by vb gets to the kernel's ICMP.
    let heard = || {
        let count = || {
            let output = wire.rs.sh("awk '/^Icmp:/ && !/InMsgs/ {print $2}' /proc/net/snmp");
            String::from_utf8(output.stdout).expect("text").trim().parse::<u64>().expect("a number")
        };
        let before = count();
        wire.peer.ip(&format!("neigh replace {VIP} lladdr {RS_MAC} dev va nud permanent"));
        wire.peer.sh(&format!("ping -c 1 -W 1 -I 198.51.100.9 {VIP}"));
        wire.peer.ip(&format!("neigh del {VIP} dev va"));
        count() > before
    };
    let before = wire.snapshot();
    let (code, out, _) = wire.rvs(&format!("up --vip {VIP}"));
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("sysctl -w net.ipv4.conf.vb.rp_filter=2 (was 1)\n") && !out.contains("wb.rp_filter"), "{out}");
    assert!(heard());
    wire.rs_sh("echo 1 > /proc/sys/net/ipv4/conf/vb/rp_filter");
    assert!(!heard(), "this is what the setting is for");
    let problem = "vb drops requests of clients that are routed by another interface: its rp_filter is 1";
    wire.mends("rp_filter 1", &[problem]);
    wire.rs_sh("cd /proc/sys/net/ipv4/conf; echo 1 > all/rp_filter; echo 0 > vb/rp_filter");
    wire.mends("rp_filter of all", &[problem]);
    assert!(heard(), "loose on the interface beats strict on all");
    wire.rs_sh("echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter");
    assert_eq!(wire.rvs("down").0, 0);
    assert_same(&before, &wire.snapshot());
}

fn arp_rules_and_static_entries_are_accepted() {
    let wire = Wire::new();
    wire.rs.ip(&format!("addr add {VIP}/32 dev lo"));
    let check = format!("check --vip {VIP}");
    assert_eq!(wire.rvs(&check).0, 1);
    let (code, out, _) = wire.rvs(&format!("{check} --static-arp"));
    assert_eq!((code, out.as_str()), (0, "ready for direct routing: 10.1.0.99\n"));

    for (add, remove) in [
        (
            format!(
                "arptables -A INPUT -d {VIP} -j DROP && arptables -A OUTPUT -s {VIP} -j mangle --mangle-ip-s 10.1.0.2"
            ),
            "arptables -F",
        ),
        (
            format!(
                "nft 'add table arp t; add chain arp t i {{ type filter hook input priority 0; }}; \
                 add rule arp t i arp daddr ip {VIP} drop; \
                 add chain arp t o {{ type filter hook output priority 0; }}; \
                 add rule arp t o arp saddr ip {VIP} arp saddr ip set 10.1.0.2'"
            ),
            "nft delete table arp t",
        ),
    ] {
        assert!(wire.answers(VIP));
        wire.rs_sh(&add);
        assert!(!wire.answers(VIP), "{add}");
        let (code, out, err) = wire.rvs(&check);
        assert_eq!((code, err.as_str()), (0, ""), "{add}: {out}");
        wire.rs_sh(remove);
        assert_eq!(wire.rvs(&check).0, 1);
    }
    wire.rs.ip("link set vb arp off");
    let (code, out, _) = wire.rvs(&format!("{check} --interface vb"));
    assert_eq!(code, 0, "an interface without ARP: {out}");
}

fn down_leaves_no_trace() {
    let wire = Wire::new();
    wire.rs_sh("cd /proc/sys/net/ipv4/conf; echo 4 > vb/arp_ignore; echo 1 > all/arp_announce");
    wire.rs.ip("addr add 10.1.0.99/24 dev lo label lo:vip");
    wire.rs.ip("-6 addr add fd00:1::99/64 dev lo");
    let before = wire.snapshot();
    assert_eq!(wire.rvs("down").1, "nothing to put back: there is no record of an `rvs realserver up`\n");
    wire.up();
    let ready = wire.snapshot();
    assert!(ready != before);
    // More VIPs, and broken by hand: what comes back is what was there first.
    wire.rs_sh("echo 0 > /proc/sys/net/ipv4/conf/all/arp_announce; echo 0 > /proc/sys/net/ipv4/conf/vb/arp_announce");
    let (code, out, _) = wire.rvs("up --vip 10.1.0.98");
    assert_eq!(code, 0, "{out}");
    assert!(wire.snapshot() != ready);
    let (code, out, err) = wire.rvs("down");
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, "everything is as it was before `rvs realserver up`\n");
    assert_same(&before, &wire.snapshot());
    assert!(!wire.state.exists());
    assert_eq!(wire.rvs("down").0, 0);
    assert_eq!(wire.rvs("check").2, "rvs: no VIP was given: name at least one with --vip\n");
}

fn tunnels_end_here_and_no_longer() {
    let wire = Wire::new();
    let filters = || String::from_utf8(wire.rs.sh("tc filter show dev vb ingress").stdout).expect("text");
    let (code, out, err) = wire.rvs(&format!("up --mode tun --vip {VIP} --vip {VIP6}"));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.ends_with(&format!("ready for tunnels: {VIP}, {VIP6}\n")), "{out}");
    assert!(filters().contains("rvs_decap"));
    assert_eq!(wire.rvs("check").0, 0);
    // Another VIP is added to those there are.
    assert_eq!(wire.rvs("up --mode tun --vip 10.1.0.98").0, 0);
    assert_eq!(wire.rvs(&format!("check --mode tun --vip {VIP} --vip 10.1.0.98")).0, 0);
    assert_eq!(filters().matches("handle").count(), 1);
    // Without the program nothing comes out, and check says so.
    wire.rs_sh("tc filter del dev vb ingress pref 21078");
    let (code, out, _) = wire.rvs("check");
    assert_eq!(code, 1);
    assert!(out.starts_with("wrong: vb leaves packets for the VIPs in their tunnels\n"), "{out}");
    assert_eq!(wire.rvs(&format!("up --mode tun --vip {VIP} --vip {VIP6} --vip 10.1.0.98")).0, 0);
    assert_eq!(wire.rvs("check").0, 0);
    let (code, out, err) = wire.rvs("down");
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(filters(), "");
}

fn a_refusal_changes_nothing() {
    let wire = Wire::new();
    let before = wire.snapshot();
    for (words, reason) in [
        ("up --vip 10.1.0.99 --mode fullnat", "a real server for full NAT has no VIP: leave 10.1.0.99 out"),
        ("up --vip 10.1.0.99 --interface eth7", "there is no interface eth7 in this network namespace"),
        ("up --vip 127.0.0.1", "127.0.0.1 cannot be a VIP: it is a loopback address"),
        (
            "up --vip 10.1.0.2",
            "the VIP 10.1.0.2 is an address of vb itself: it is answered for there, so clients may find this host \
             instead of the director; mend it first: ip addr del 10.1.0.2/24 dev vb",
        ),
    ] {
        let (code, out, err) = wire.rvs(words);
        assert_eq!((code, out.as_str(), err.as_str()), (1, "", format!("rvs: {reason}\n").as_str()), "{words}");
        assert_same(&before, &wire.snapshot());
        assert!(!wire.state.exists());
    }
}
