//! Seeded simulation: clients, a director and its real servers, and the network between them, in one process.
#![forbid(unsafe_code)]
