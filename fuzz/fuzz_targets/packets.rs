//! Packets through the whole pipeline: see `rvs_fixtures::any::packets` for the format of an input and for what must hold.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rvs_fixtures::any::packets(data));
