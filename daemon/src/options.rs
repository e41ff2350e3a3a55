//! The command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use rvs_sys::bpf::Sizes;

/// The director: a virtual server in eBPF, driven by ipvsadm.
#[derive(Parser, Clone, Debug)]
#[command(name = "rvsd", version)]
pub struct Options {
    /// Control socket, for ipvsadm and rvs.
    #[arg(long, value_name = "PATH", env = "RVS_SOCKET", default_value = rvs_control::api::DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Folder for pinned maps and links, on a bpffs (mounted there if it is not) [default: /run/rvs/<netns>/bpf].
    #[arg(long, value_name = "DIR")]
    pub pin: Option<PathBuf>,
    /// Interface to take packets from, and how: native XDP (xdp), generic XDP (skb), or tc. Repeat for several. Default: all
    /// Ethernet interfaces that are up, new ones too; native XDP where it can be had, else tc.
    #[arg(long = "interface", value_name = "IF[=xdp|skb|tc]")]
    pub interfaces: Vec<Interface>,
    /// IPv4 connections that the table holds at half load. Fixed while the pins exist, as are the next four.
    #[arg(long, value_name = "N", default_value_t = Sizes::default().flows4)]
    pub conns: u32,
    /// IPv6 connections that the table holds at half load.
    #[arg(long, value_name = "N", default_value_t = Sizes::default().flows6)]
    pub conns6: u32,
    /// Most virtual services.
    #[arg(long, value_name = "N", default_value_t = Sizes::default().services)]
    pub services: u32,
    /// Most real servers, counted for each service.
    #[arg(long, value_name = "N", default_value_t = Sizes::default().dests)]
    pub dests: u32,
    /// Most services with a hash scheduler (mh).
    #[arg(long, value_name = "N", default_value_t = Sizes::default().tables / 4096)]
    pub hash_services: u32,
    /// At the end (SIGTERM, SIGINT), take the data plane down as well. Otherwise it goes on forwarding.
    #[arg(long)]
    pub teardown: bool,
    /// Begin anew where another version's data plane is at work that can't be taken over: its connections end, and its services are forgotten.
    #[arg(long)]
    pub anew: bool,
    /// Say what this version would make of the data plane that is at work, as a JSON object, and end. (`rvs upgrade` asks so.)
    #[arg(long)]
    pub check_upgrade: bool,
    /// Log lines as JSON.
    #[arg(long)]
    pub log_json: bool,
}

impl Options {
    pub fn sizes(&self) -> Sizes {
        Sizes {
            flows4: self.conns,
            flows6: self.conns6,
            services: self.services,
            dests: self.dests,
            // A list and its successor, each with a head, for every dest that a service has; and some for long lists.
            lists: (self.dests.saturating_mul(2)).saturating_add(self.services.saturating_mul(4)).max(65536),
            tables: self.hash_services.saturating_add(2).saturating_mul(4096),
            hops: self.dests.saturating_mul(2),
            fullnat: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Native XDP.
    Xdp,
    /// Generic XDP.
    Skb,
    Tc,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Xdp => "xdp",
            Mode::Skb => "skb",
            Mode::Tc => "tc",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub mode: Option<Mode>,
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, mode) = match text.split_once('=') {
            None => (text, None),
            Some((name, "xdp")) => (name, Some(Mode::Xdp)),
            Some((name, "skb")) => (name, Some(Mode::Skb)),
            Some((name, "tc")) => (name, Some(Mode::Tc)),
            Some((_, other)) => return Err(format!("`{other}` is not a way to take packets: xdp, skb or tc")),
        };
        if name.is_empty() || name.len() > rvs_control::limits::INTERFACE_NAME_BYTES_MAX || name.contains('/') {
            return Err(format!("`{name}` is not the name of an interface"));
        }
        Ok(Interface { name: name.to_owned(), mode })
    }
}
