//! The commands `ipvsadm` and `rvs`: what was typed becomes requests on rvsd's control socket, and answers become the
//! bytes that scripts and people expect.
//!
//! Both are functions of arguments, standard streams, a [`backend::Backend`] and a [`names::Resolver`]; the binaries
//! only put the real ones in.
#![forbid(unsafe_code)]

pub mod backend;
pub mod ipvsadm;
pub mod names;
pub mod realserver;
pub mod rvs;
