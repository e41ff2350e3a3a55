//! The eBPF programs are part of this crate; they are built apart, for another target.

use std::path::Path;

fn main() {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ebpf/target/bpfel-unknown-none/release");
    for (name, variable) in [("rvs-ebpf", "RVS_EBPF_OBJECT"), ("rvs-realserver", "RVS_REALSERVER_OBJECT")] {
        let object = built.join(name);
        println!("cargo:rerun-if-changed={}", object.display());
        assert!(object.exists(), "the eBPF programs are not built yet ({}): run `./x build`", object.display());
        println!("cargo:rustc-env={variable}={}", object.display());
    }
}
