//! Namespaces and mounts against the kernel.

use std::path::{Path, PathBuf};
use std::process::Command;

use rvs_control::firewall::{Rules, Vip};
use rvs_sys::firewall::readings;
use rvs_sys::netns::{self, BpfFolder, Lasting};
use rvs_sys::sysctl::{ProcSys, Sysctl};

use crate::world::{Ns, run};

pub const CASES: &[crate::Case] = &[
    ("a_namespace_knows_its_name", a_namespace_knows_its_name),
    ("settings_are_the_namespaces_own", settings_are_the_namespaces_own),
    ("a_bpffs_of_the_host_lasts", a_bpffs_of_the_host_lasts),
    ("a_bpffs_of_a_private_mount_namespace_does_not", a_bpffs_of_a_private_mount_namespace_does_not),
];

/// These need the firewall tools.
pub const FIREWALL_CASES: &[crate::Case] =
    &[("rules_of_this_namespace_are_warned_about_by_name", rules_of_this_namespace_are_warned_about_by_name)];

/// Set, this program prints what `bpf_folder` and then `ensure_bpffs` say of the folder, and ends.
const INSIDE: &str = "RVS_TEST_BPF_FOLDER";

pub fn answer_from_inside() -> Option<String> {
    let folder = PathBuf::from(std::env::var_os(INSIDE)?);
    Some(format!("{:?} {:?}", netns::bpf_folder(&folder), netns::ensure_bpffs(&folder)))
}

fn a_namespace_knows_its_name() {
    let outside = netns::current().expect("this namespace");
    let ns = Ns::new();
    netns::enter(&ns.name).expect("enter");
    let inside = netns::current().expect("that namespace");
    assert_eq!((inside.name.as_deref(), inside.folder()), (Some(ns.name.as_str()), ns.name.clone()));
    assert_ne!(inside.inode, outside.inode);
    let error = netns::enter("rvssys-none").expect_err("no such namespace").to_string();
    assert_eq!(
        error,
        "cannot open the network namespace /run/netns/rvssys-none: No such file or directory (os error 2)"
    );
}

fn settings_are_the_namespaces_own() {
    let ns = Ns::new();
    let key = "net/ipv4/conf/all/arp_ignore";
    let proc = ProcSys::default();
    let outside = proc.read(key).expect("read");
    netns::enter(&ns.name).expect("enter");
    assert_eq!(proc.read(key).expect("read"), Some(0));
    assert_eq!(proc.write(key, 8).expect("write"), 0);
    assert_eq!(proc.read(key).expect("read"), Some(8));
    let other = std::thread::spawn(move || ProcSys::default().read(key));
    assert_eq!(other.join().expect("a thread").expect("read"), Some(8), "a child thread starts where its parent is");
    let file = ns.sh("cat /proc/sys/net/ipv4/conf/all/arp_ignore");
    assert_eq!(String::from_utf8_lossy(&file.stdout), "8\n");
    assert!(outside.is_some());
}

/// A folder with a bpffs that is unmounted and removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rvssys-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).expect("make a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// What this program says of `folder` when started by `command`.
fn ask_inside(command: &[&str], folder: &Path) -> String {
    let exe = std::env::current_exe().expect("this program");
    let assignment = format!("{INSIDE}={}", folder.display());
    let mut args: Vec<&str> = command[1..].to_vec();
    args.extend(["env", &assignment, exe.to_str().expect("a path")]);
    run(command[0], &args).trim().to_owned()
}

fn a_bpffs_of_the_host_lasts() {
    let folder = Folder::new("host");
    // This process itself may be in a private mount namespace (a container): ask what is expected of it.
    let expected = match netns::bpf_folder(&folder.0).expect("examine") {
        BpfFolder::OtherFs(lasting) => lasting,
        other => panic!("{other:?}"),
    };
    let sub = folder.0.join("a");
    assert_eq!(netns::bpf_folder(&sub).expect("examine"), BpfFolder::Missing(expected));
    assert_eq!(netns::ensure_bpffs(&folder.0).expect("mount"), expected);
    assert_eq!(netns::ensure_bpffs(&folder.0).expect("again"), expected);
    assert_eq!(netns::bpf_folder(&folder.0).expect("examine"), BpfFolder::Bpffs(expected));
    assert_eq!(netns::ensure_bpffs(&sub).expect("a folder in it"), expected);
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    let here = mounts.lines().filter(|l| l.split(' ').nth(1) == folder.0.to_str()).count();
    assert_eq!(here, 1, "mounted once");
    // Seen from a private mount namespace it is still the host's.
    let unshare = ask_inside(&["unshare", "-m"], &folder.0);
    assert_eq!(unshare, format!("Ok(Bpffs({expected:?})) Ok({expected:?})"));
    std::fs::remove_dir(&sub).expect("remove");
}

fn a_bpffs_of_a_private_mount_namespace_does_not() {
    let folder = Folder::new("private");
    let ns = Ns::new();
    let lasting = Lasting::No;
    for command in [&["unshare", "-m"][..], &["ip", "netns", "exec", &ns.name]] {
        let said = ask_inside(command, &folder.0);
        assert_eq!(said, format!("Ok(OtherFs({lasting:?})) Ok({lasting:?})"), "{command:?}");
        // And indeed it is gone now.
        assert!(matches!(netns::bpf_folder(&folder.0).expect("examine"), BpfFolder::OtherFs(_)));
    }
    let net = format!("--net=/run/netns/{}", ns.name);
    let entered = ask_inside(&["nsenter", &net], &folder.0);
    assert!(!entered.contains("No)"), "entering only the network namespace keeps the mounts: {entered}");
}

fn rules_of_this_namespace_are_warned_about_by_name() {
    let ns = Ns::new();
    netns::enter(&ns.name).expect("enter");
    let vip = |addr: &str| Vip { addr: addr.parse().expect("an address"), proto: 6, port: 80 };
    let vips = [vip("10.0.0.1"), vip("2001:db8::1")];
    let warnings = || {
        let (texts, errors) = readings();
        assert!(errors.is_empty(), "{errors:?}");
        let (rules, unreadable) = Rules::read(&texts);
        assert_eq!(unreadable, []);
        rules.warnings(&vips).iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(warnings(), [""; 0]);
    for command in [
        "iptables-nft -A INPUT -p tcp --dport 443 -j DROP",
        "iptables-nft -A INPUT -d 10.0.0.1 -p tcp -m multiport --dports 80,443 -j REJECT",
        "ip6tables-nft -t raw -A PREROUTING -p tcp --dport 80 -j DROP",
        "nft 'add table inet t; add chain inet t in { type filter hook input priority 5; policy drop; }; \
         add rule inet t in tcp dport 80 ip6 daddr 2001:db8::1 accept'",
    ] {
        let output = ns.sh(command);
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let but = ", but packets of a virtual service do not pass this chain";
    let reject = "-A INPUT -d 10.0.0.1/32 -p tcp -m multiport --dports 80,443 -j REJECT --reject-with \
                  icmp-port-unreachable";
    assert_eq!(
        warnings(),
        [
            format!("iptables table filter chain INPUT: `{reject}` could reject packets for 10.0.0.1:80/tcp{but}"),
            format!(
                "ip6tables table raw chain PREROUTING: `-A PREROUTING -p tcp -m tcp --dport 80 -j DROP` could drop \
                 packets for [2001:db8::1]:80/tcp{but}"
            ),
            format!("nft table inet t chain in: `policy drop` could drop packets for 10.0.0.1:80/tcp{but}"),
        ]
    );
}
