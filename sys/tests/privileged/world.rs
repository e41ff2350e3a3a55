//! Namespaces that go away with the test, and commands run in them.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Why the tests can't run here; `None` when they can.
pub fn unavailable() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root".into());
    }
    let name = format!("rvssys-{}-probe", std::process::id());
    let made = Command::new("ip").args(["netns", "add", &name]).output();
    let gone = Command::new("ip").args(["netns", "del", &name]).output();
    match (made, gone) {
        (Ok(made), Ok(_)) if made.status.success() => None,
        (Ok(made), _) => Some(format!("no network namespace: {}", String::from_utf8_lossy(&made.stderr).trim())),
        (Err(error), _) => Some(format!("cannot run ip: {error}")),
    }
}

/// Why a test can't run that uses these programs.
pub fn missing(programs: &[&str]) -> Option<String> {
    let there = |program: &str| {
        let found =
            Command::new("sh").args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin; command -v {program}")]).output();
        found.is_ok_and(|output| output.status.success())
    };
    programs.iter().find(|program| !there(program)).map(|program| format!("{program} is not installed"))
}

/// Why there can be no VLAN devices here; only asked where namespaces work.
pub fn no_vlan() -> Option<String> {
    let ns = Ns::new();
    let args = ["-n", &ns.name, "link", "add", "link", "lo", "name", "v", "type", "vlan", "id", "1"];
    let output = Command::new("ip").args(args).output().expect("run ip");
    let errors = String::from_utf8_lossy(&output.stderr);
    errors.contains("Unknown device type").then(|| "this kernel has no VLAN devices".into())
}

/// One named network namespace with lo up, deleted when dropped.
pub struct Ns {
    pub name: String,
}

impl Ns {
    pub fn new() -> Self {
        let name = format!("rvssys-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        run("ip", &["netns", "add", &name]);
        let ns = Self { name };
        ns.ip("link set lo up");
        ns
    }

    /// Two namespaces joined by a veth pair, `va` here and `vb` there, both up, without addresses.
    pub fn pair() -> (Self, Self) {
        let (a, b) = (Self::new(), Self::new());
        run("ip", &["link", "add", "va", "netns", &a.name, "type", "veth", "peer", "name", "vb", "netns", &b.name]);
        a.ip("link set va up");
        b.ip("link set vb up");
        (a, b)
    }

    /// `ip -n <name> <words>`; the output.
    pub fn ip(&self, words: &str) -> String {
        let mut args = vec!["-n", &self.name];
        args.extend(words.split(' '));
        run("ip", &args)
    }

    /// A shell command in the namespace, in the caller's mount namespace.
    pub fn sh(&self, command: &str) -> Output {
        let net = format!("--net=/run/netns/{}", self.name);
        Command::new("nsenter").args([&net, "sh", "-c", command]).output().expect("run nsenter")
    }

    /// Move the calling thread here and run `test` on a runtime of its own, so that sockets open in this namespace.
    pub fn block_on<T>(&self, test: impl Future<Output = T>) -> T {
        rvs_sys::netns::enter(&self.name).expect("enter the namespace");
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(test)
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Run a command that must succeed; its output.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("run a program");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
