//! `rvs realserver` against the real kernel, with a peer on the wire, in network namespaces of its own. As root:
//! `cargo test -p rvs-cli --test privileged`. Without root, or where namespaces can't be made, every test counts as
//! ignored and a SKIPPED line says why.
#![allow(clippy::expect_used, reason = "a test program with a harness of its own: a panic is a failed test")]

#[path = "../../../sys/tests/privileged/world.rs"]
#[allow(dead_code, reason = "shared with the tests of rvs-sys, which use more of it")]
mod world;

mod realserver;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let all = world::unavailable().or_else(|| world::missing(&["ping", "nsenter", "sysctl"]));
    let arp = all.clone().or_else(|| world::missing(&["arptables", "nft"]));
    let mut trials = Vec::new();
    for (cases, skip) in [(realserver::CASES, &all), (realserver::ARP_CASES, &arp)] {
        for &(name, run) in cases {
            if let Some(why) = skip.as_ref().filter(|_| !arguments.list) {
                eprintln!("SKIPPED: {name}: {why}");
            }
            trials.push(Trial::test(name, move || catch(run)).with_ignored_flag(skip.is_some()));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn catch(run: fn()) -> Result<(), Failed> {
    std::thread::spawn(run).join().map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Failed::from(text.unwrap_or("panicked"))
    })
}
