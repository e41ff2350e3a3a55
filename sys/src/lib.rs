pub mod bpf;
pub mod firewall;
pub mod memory;
pub mod netlink;
pub mod netns;
pub mod realserver;
pub mod sysctl;
pub mod wire;
