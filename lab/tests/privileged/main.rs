//! The lab, and the director in it from end to end: rvsd, ipvsadm, real clients and real servers in network namespaces.
//!
//! Needs root; without it every test is listed as ignored, and says so. A test that this kernel or build can't run is
//! listed as ignored with the reason. The programs under test are found as `rvs_lab::director::program` says.

mod bad_input;
mod defence;
mod devices;
mod early;
mod flooded;
mod fragments;
mod layouts;
mod operations;
mod paths;
mod plain;
mod proxied;
mod resized;
mod restart;
mod scale;
mod sctp;
mod seen;
mod support;
mod talk;
mod tools;
mod talking;
mod traffic;
mod transfers;
mod tutorials;
mod upgraded;

use libtest_mimic::{Arguments, Trial};

fn main() {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED: the lab's tests: not root, so no network namespaces");
    }
    let tests = [
        plain::tests(),
        tutorials::tests(),
        layouts::tests(),
        resized::tests(),
        upgraded::tests(),
        restart::tests(),
        transfers::tests(),
        paths::tests(),
        operations::tests(),
        traffic::tests(),
        flooded::tests(),
        fragments::tests(),
        early::tests(),
        sctp::tests(),
        bad_input::tests(),
        defence::tests(),
        devices::tests(),
        proxied::tests(),
        scale::tests(),
        seen::tests(),
        tools::tests(),
    ];
    let trial = |test: support::Test| Trial::ignorable_test(test.name, test.run).with_ignored_flag(!root);
    libtest_mimic::run(&Arguments::from_args(), tests.into_iter().flatten().map(trial).collect()).exit();
}
