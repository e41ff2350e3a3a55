//! The eBPF programs are part of this crate; they are built apart, for another target.

use std::path::Path;

fn main() {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ebpf/target");
    // Programs over maps of the other layout, from which tests upgrade, are built into a folder of their own.
    let folder = if cfg!(feature = "other-layout") { "other-layout/bpfel-unknown-none" } else { "bpfel-unknown-none" };
    let objects =
        [("rvs-ebpf", folder, "RVS_EBPF_OBJECT"), ("rvs-realserver", "bpfel-unknown-none", "RVS_REALSERVER_OBJECT")];
    for (name, folder, variable) in objects {
        let object = target.join(folder).join("release").join(name);
        println!("cargo:rerun-if-changed={}", object.display());
        assert!(object.exists(), "the eBPF programs are not built yet ({}): run `./x build`", object.display());
        println!("cargo:rustc-env={variable}={}", object.display());
    }
}
