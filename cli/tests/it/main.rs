//! The commands against a model in the same process: the recordings of the stock tools, random sequences, and the shell
//! scripts over a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

mod documents;
mod oracle;
mod roundtrip;
mod scripts;
mod transcript;
mod world;
