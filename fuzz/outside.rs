//! Targets of crates that the fixtures do not depend on: for the fuzzer, and for `fixtures/tests/corpus.rs`.

#[path = "../cli/tests/it/world.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "made for the tests of rvs-cli")]
mod world;

use rvs_control::capability::Capabilities;

/// A datagram of a netlink socket; the first two bytes are a message type that its first message gets, if it has one, with a right length.
pub fn netlink(data: &[u8]) {
    let [low, high, datagram @ ..] = data else { return };
    let _ = rvs_sys::netlink::events(datagram);
    let mut honest = datagram.to_vec();
    if honest.len() >= 16 {
        let length = honest.len() as u32;
        honest[..4].copy_from_slice(&length.to_ne_bytes());
        honest[4..6].copy_from_slice(&[*low, *high]);
        let _ = rvs_sys::netlink::events(&honest);
    }
}

/// Lines: each is the arguments of a run of `ipvsadm`, except what follows a line `-R`: that is what it reads. A command that fails changes
/// nothing; exit codes are those that there are; and what is saved is restored.
pub fn ipvsadm(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut world = world::World::new(Capabilities::all());
    let mut rest = &text[..];
    for _ in 0..20 {
        let Some((line, more)) = rest.split_once('\n').or((!rest.is_empty()).then_some((rest, ""))) else { break };
        let args: Vec<&str> = line.split_ascii_whitespace().collect();
        let reads = args.contains(&"-R") || args.contains(&"--restore");
        let before = world.model.clone();
        let outcome = world.ipvsadm(&args, if reads { more } else { "" }, true);
        assert!([0, 1, 2, 255].contains(&outcome.exit), "{args:?}: {outcome:?}");
        assert!(reads || outcome.exit == 0 || world.model == before, "{args:?} failed and changed something");
        rest = if reads { "" } else { more };
    }
    let saved = world.ipvsadm(&["-S", "-n"], "", true);
    assert_eq!(saved.exit, 0);
    let mut other = world::World::new(Capabilities::all());
    let restored = other.ipvsadm(&["-R"], &saved.stdout, true);
    assert_eq!((restored.exit, restored.stderr.as_str()), (0, ""), "{}", saved.stdout);
    // (Services of one place of the kernel's hash come in the opposite order of that in which they were added.)
    let again = other.ipvsadm(&["-S", "-n"], "", true).stdout;
    assert_eq!(services(&again), services(&saved.stdout));
}

/// Each service with its real servers.
fn services(saved: &str) -> Vec<Vec<&str>> {
    let mut all: Vec<Vec<&str>> = Vec::new();
    for line in saved.lines() {
        match all.last_mut() {
            Some(service) if line.starts_with("-a") => service.push(line),
            _ => all.push(vec![line]),
        }
    }
    all.sort();
    all
}
