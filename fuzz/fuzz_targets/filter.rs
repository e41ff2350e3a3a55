//! Filters of `rvs trace`, and frames as people see them: see `rvs_fixtures::any::decoders::filter`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rvs_fixtures::any::decoders::filter(data));
