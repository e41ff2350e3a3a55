//! The director.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    rvsd::main()
}
