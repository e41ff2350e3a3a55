//! Maps that a data plane left behind: see `rvs_fixtures::any::decoders::restore`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rvs_fixtures::any::decoders::restore(data));
