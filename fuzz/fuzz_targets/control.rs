//! Bytes on the control socket: see `rvs_fixtures::any::decoders::control`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rvs_fixtures::any::decoders::control(data));
