//! Loads the object and says what the verifier made of each program.
use rvs_sys::bpf::{Dataplane, Sizes};
fn main() {
    let object = std::fs::read(std::env::args().nth(1).expect("object")).unwrap();
    let dir = std::path::PathBuf::from(std::env::args().nth(2).expect("pin dir"));
    match Dataplane::open(&object, &dir, &Sizes { flows4: 1 << 16, flows6: 1 << 14, ..Sizes::default() }) {
        Ok(mut d) => {
            for n in ["rvs_start", "rvs_xdp"] {
                let i = d.xdp(n).unwrap().info().unwrap();
                println!(
                    "{n}: verified {:?} insns, xlated {:?}",
                    i.verified_instruction_count(),
                    i.size_translated().map(|s| s / 8)
                );
            }
            println!("{:?}", d.maps.clock.get(0));
        }
        Err(e) => {
            let mut e: &dyn std::error::Error = &e;
            loop {
                println!("{e}");
                match e.source() {
                    Some(s) => e = s,
                    None => break,
                }
            }
        }
    }
}
