//! The eBPF programs are part of this crate; they are built apart, for another target.

use std::path::Path;

fn main() {
    let object = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ebpf/target/bpfel-unknown-none/release/rvs-ebpf");
    println!("cargo:rerun-if-changed={}", object.display());
    assert!(object.exists(), "the eBPF programs are not built yet ({}): run `./x build`", object.display());
    println!("cargo:rustc-env=RVS_EBPF_OBJECT={}", object.display());
}
