//! The packet path of RVS as plain, portable Rust: no_std, no unsafe, generic over where the packet bytes, the tables and the
//! connection words live. The same code runs in the BPF programs, in native tests, in the simulation and in the daemon.
//!
//! Read [`core`] first: it is the way of a packet.
#![cfg_attr(not(any(test, feature = "mem")), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
pub mod conn;
pub mod cookie;
pub mod core;
pub mod crc;
pub mod csum;
pub mod ct;
pub mod elder;
pub mod far;
pub mod frag;
pub mod fullnat;
pub mod icmp;
pub mod limits;
#[cfg(any(test, feature = "mem"))]
pub mod mem;
pub mod near;
pub mod options;
pub mod packet;
pub mod proto;
pub mod proxy;
pub mod related;
pub mod sched;
pub mod tables;
pub mod trace;
pub mod tunnel;
pub mod verdict;
pub mod vlan;
pub mod xmit;
