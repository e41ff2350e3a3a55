//! The brain of RVS: what is configured, what may be configured, and what clients say to rvsd. A function of its inputs:
//! no sockets, no clock, no threads, no files.
#![forbid(unsafe_code)]

pub mod advice;
pub mod api;
pub mod capability;
pub mod filter;
pub mod firewall;
pub mod headers;
pub mod limits;
pub mod lists;
pub mod model;
pub mod net;
pub mod nexthop;
pub mod parts;
pub mod plan;
pub mod realserver;
pub mod settings;
