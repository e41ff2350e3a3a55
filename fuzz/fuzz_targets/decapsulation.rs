//! Frames at a real server's end of a tunnel: see `rvs_fixtures::any::decoders::decapsulation`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rvs_fixtures::any::decoders::decapsulation(data));
