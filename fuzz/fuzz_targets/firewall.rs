//! What the firewalls' tools print: see `rvs_fixtures::any::decoders::firewall`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rvs_fixtures::any::decoders::firewall(data));
