//! The director over maps of the other layout, as an older version would have made them: tests of upgrades begin with it.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    rvsd::main()
}
