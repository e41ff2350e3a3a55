//! The same packets natively and by the program in the kernel (as root): the same verdict, reason and bytes, and the same connections after.
//! The first byte says in which part of the world (`rvs_fixtures::any::part`); packets are as in `packets`. `RVS_FUZZ_TC=1`: by the tc program.
#![no_main]

#[path = "../../sys/tests/privileged/fixtures.rs"]
#[allow(dead_code, clippy::expect_used, reason = "made for the tests of rvs-sys")]
mod fixtures;
#[path = "../../sys/tests/privileged/world.rs"]
#[allow(dead_code, clippy::expect_used, reason = "made for the tests of rvs-sys")]
mod world;

use std::cell::RefCell;

use fixtures::{Bpffs, Kernel, carried, director};
use rvs_datapath::verdict::Reason;
use rvs_fixtures::any::{part, unpacked};
use rvs_fixtures::case::{Engine, START_S, Sent};
use rvs_fixtures::native::Native;
use rvs_sys::bpf::attach::Hook;

type Case = (&'static str, fn());

/// The two engines; the namespace and the pins are gone with the process's end.
struct Engines {
    native: Native,
    kernel: Kernel,
    hook: Hook,
    _pins: Bpffs,
    _ns: world::Ns,
}

impl Engines {
    fn new() -> Engines {
        if let Some(why) = world::unavailable() {
            eprintln!("SKIPPED: differential: {why}");
            std::process::exit(77);
        }
        let hook = if std::env::var_os("RVS_FUZZ_TC").is_some() { Hook::Tc } else { Hook::XdpNative };
        let ns = director();
        rvs_sys::netns::enter(&ns.name).expect("enter the namespace");
        let pins = Bpffs::mount("fuzz");
        let kernel = Kernel::open(&pins, hook);
        Engines { native: Native::default(), kernel, hook, _pins: pins, _ns: ns }
    }
    fn run(&mut self, data: &[u8]) {
        let [number, packets @ ..] = data else { return };
        let layout = part(*number).layout();
        for engine in [&mut self.native as &mut dyn Engine, &mut self.kernel] {
            engine.reset();
            engine.load(&layout);
        }
        let mut now_s = START_S;
        for (frame, ifindex, seconds) in unpacked(packets).filter(|(frame, ..)| carried(self.hook, frame)) {
            now_s += seconds;
            self.native.set_now(now_s);
            self.kernel.set_now(now_s);
            let there = self.kernel.send(frame, ifindex);
            let here = self.native.send(frame, ifindex);
            // By tc the kernel resolves a neighbour that is not known.
            let resolved =
                |s: &Sent| self.hook == Hook::Tc && matches!(s.reason, Reason::NoNeighbour | Reason::ByKernel);
            if here.as_ref().is_some_and(resolved) {
                continue;
            }
            assert_eq!(here, there, "natively and in the kernel, for {frame:02x?}");
        }
        assert_eq!(self.native.flows(), self.kernel.flows(), "connections, natively and in the kernel");
    }
}

thread_local! {
    static ENGINES: RefCell<Option<Engines>> = const { RefCell::new(None) };
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ENGINES.with(|engines| engines.borrow_mut().get_or_insert_with(Engines::new).run(data));
});
