//! Networks to try RVS in: routers, directors, clients and real servers as network namespaces on one machine.
//!
//! A [`Topology`] says what there is (ready ones are in [`layouts`]); [`Lab::up`] builds it, and dropping the [`Lab`] takes
//! all of it down. Its nodes run commands ([`NodeHandle::run`]), programs ([`NodeHandle::spawn`]) and clients
//! ([`load::http`], [`load::dns`]). Needs root; whatever fails says what and where.
#![forbid(unsafe_code)]

pub mod cli;
pub mod counters;
pub mod demo;
pub mod director;
mod error;
mod eventually;
mod lab;
pub mod layouts;
pub mod load;
pub mod netns;
mod process;
pub mod service;
mod topology;

pub use director::{Director, Hook, Verdicts};
pub use error::{Error, Result};
pub use eventually::{PATIENCE, eventually, patient};
pub use lab::{Lab, NodeHandle, PREFIX, State};
pub use process::Process;
pub use topology::{Bridge, End, Link, Node, Route, Service, Topology};
