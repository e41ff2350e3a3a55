//! Protocol state tables: IPVS's own states and transitions, as data.
pub mod sctp;
pub mod tcp;
