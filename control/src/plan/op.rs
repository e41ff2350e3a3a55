//! What the planner asks for.

use rvs_datapath::abi::{self, ListEntry};
use rvs_datapath::conn;

use crate::lists;
use crate::settings::Settings;

/// One write. Values of `abi` are whole; the counters' offsets in them are kept as they are in the maps, except where said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOp {
    /// Lead a virtual address to a service, or (`None`) no longer.
    Key {
        key: abi::ServiceKey,
        value: Option<u64>,
    },
    /// May fragments to this address, or from it, be ours? Bits `abi::watched`; 0: no.
    Watch {
        key: abi::ServiceKey,
        bits: u64,
    },
    /// A service's record. `fresh`: its counters begin at zero.
    Service {
        index: u32,
        value: abi::Service,
        fresh: bool,
    },
    /// Change the list `old` and the machines that go with it, write the new run at `first`, and publish it.
    List {
        service: u32,
        old: Vec<ListEntry>,
        change: lists::Change,
        first: u32,
    },
    /// A hash scheduler's table, published; empty: none.
    Table {
        service: u32,
        first: u32,
        places: Vec<u32>,
    },
    /// A service's local addresses, published; empty: none.
    Locals {
        service: u32,
        first: u32,
        addresses: Vec<abi::Local>,
    },
    Dest {
        index: u32,
        value: abi::Dest,
    },
    DestInfo {
        index: u32,
        value: abi::DestInfo,
    },
    /// How packets for it are wrapped.
    Tunnel {
        index: u32,
        value: abi::Tunnel,
    },
    /// Weight 0, for hash schedulers.
    Quiesced {
        index: u32,
        quiesced: bool,
    },
    /// A dest's counters begin to count for a service; `fresh`: its own from zero.
    StatsIn {
        service: u32,
        dest: u32,
        fresh: bool,
    },
    /// ... and no longer do. What they were stays with the service.
    StatsOut {
        service: u32,
        dest: u32,
    },
    /// Show the counters of a service and these dests from zero.
    Zero {
        service: u32,
        dests: Vec<u32>,
    },
    Hop {
        index: u32,
        value: abi::Hop,
    },
    /// Timeouts of states, from the ones there are; in seconds: ESTABLISHED, FIN_WAIT, UDP.
    Timeouts(conn::Timeouts),
    /// The settings of the whole director, and what they come to.
    Settings(Settings),
}
