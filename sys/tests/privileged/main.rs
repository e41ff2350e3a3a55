//! Tests against the real kernel, in network namespaces of their own. As root:
//! `cargo test -p rvs-sys --test privileged`. Without root, or where namespaces can't be made, every test counts as
//! ignored and a SKIPPED line says why.

#![allow(clippy::expect_used, reason = "a test program with a harness of its own: a panic is a failed test")]

mod fixtures;
mod net;
mod ns;
mod rehearsal;
mod tc;
mod world;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

type Case = (&'static str, fn());

fn main() -> ExitCode {
    // The mount tests look at mounts from inside another mount namespace: by running this program there.
    if let Some(answer) = ns::answer_from_inside() {
        println!("{answer}");
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    let all = world::unavailable();
    let vlan = all.clone().or_else(world::no_vlan);
    let firewall = all.clone().or_else(|| world::missing(&["nft", "iptables-nft", "ip6tables-nft"]));
    let ethtool = all.clone().or_else(|| world::missing(&["ethtool", "tc"]));
    let mut trials = Vec::new();
    for (cases, skip) in [
        (fixtures::CASES, &all),
        (rehearsal::CASES, &all),
        (net::CASES, &all),
        (ns::CASES, &all),
        (net::VLAN_CASES, &vlan),
        (ns::FIREWALL_CASES, &firewall),
        (tc::CASES, &ethtool),
    ] {
        for &(name, run) in cases {
            if let Some(why) = skip.as_ref().filter(|_| !arguments.list) {
                eprintln!("SKIPPED: {name}: {why}");
            }
            trials.push(Trial::test(name, move || catch(run)).with_ignored_flag(skip.is_some()));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Each test in a thread of its own: entering a namespace is for the thread's whole life.
fn catch(run: fn()) -> Result<(), Failed> {
    std::thread::spawn(run).join().map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Failed::from(text.unwrap_or("panicked"))
    })
}
