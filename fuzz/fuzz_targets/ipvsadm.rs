//! Arguments of `ipvsadm`, and lines to be restored.
#![no_main]

#[path = "../outside.rs"]
#[allow(dead_code, reason = "of its targets each binary has one")]
mod outside;

libfuzzer_sys::fuzz_target!(|data: &[u8]| outside::ipvsadm(data));
