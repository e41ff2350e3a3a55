//! `rvs service`: what a service has that `ipvsadm` does not know of: rate limits, SYN cookies, PROXY headers.

use std::io::Write;
use std::net::SocketAddr;

use clap::{Subcommand, ValueEnum};
use rvs_control::api::{Command, Defence, DefenceRow, Proto, RequestBody, ResponseBody, ServiceId};

use super::Error;
use super::show::{put, put_json};
use super::why::service_text;
use crate::backend::{BackendError, Client, unexpected};

#[derive(Debug, Subcommand)]
pub enum Args {
    /// Change settings of a service; what is not named stays
    Set {
        #[command(flatten)]
        service: Name,
        /// Answer SYNs with cookies: never, always, or those above this many in a second
        #[arg(long, value_name = "off|always|N", value_parser = cookies)]
        syn_cookies: Option<Cookies>,
        /// New connections in a second at most; 0: no limit
        #[arg(long, value_name = "N")]
        rate: Option<u32>,
        /// The same for each client (an IPv4 address, a /64 of IPv6), up to 65535; 0: no limit
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=65535))]
        source_rate: Option<u32>,
        /// Tell real servers who their clients are by a PROXY header, in front of each connection's first byte
        #[arg(long, value_enum, value_name = "v2|off")]
        proxy: Option<Proxy>,
    },
    /// Show these settings, of one service or of all
    Show {
        #[arg(value_enum, requires = "at")]
        proto: Option<Protocol>,
        #[arg(value_name = "SERVICE")]
        at: Option<SocketAddr>,
        /// Print a JSON array of {"service", "defence", "cookies_work", "proxy"}
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Debug, clap::Args)]
pub struct Name {
    #[arg(value_enum)]
    proto: Protocol,
    /// Its virtual address and port: ADDRESS:PORT, [ADDRESS]:PORT
    #[arg(value_name = "SERVICE")]
    at: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Proxy {
    V2,
    Off,
}

impl Name {
    fn id(&self) -> ServiceId {
        let proto = match self.proto {
            Protocol::Tcp => Proto::Tcp,
            Protocol::Udp => Proto::Udp,
            Protocol::Sctp => Proto::Sctp,
        };
        ServiceId::Virtual { proto, addr: self.at.ip(), port: self.at.port() }
    }
}

/// SYNs in a second from which on cookies are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookies(Option<u32>);

fn cookies(text: &str) -> Result<Cookies, String> {
    match text {
        "off" => Ok(Cookies(None)),
        "always" => Ok(Cookies(Some(0))),
        number => match number.parse() {
            Ok(n) => Ok(Cookies(Some(n))),
            Err(_) => Err("off, always, or a number of SYNs in a second".to_owned()),
        },
    }
}

pub fn run(args: &Args, client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    match args {
        Args::Set { service, syn_cookies, rate, source_rate, proxy } => {
            let id = service.id();
            let before = rows(client, Some(id))?.first().map(|row| row.defence).unwrap_or_default();
            if let Some(proxy) = proxy {
                ask(client, Command::Proxy { service: id, on: *proxy == Proxy::V2 })?;
            }
            let mut defence = before;
            if let Some(Cookies(above)) = syn_cookies {
                defence.cookies_above = *above;
            }
            defence.rate = rate.unwrap_or(defence.rate);
            defence.source_rate = source_rate.unwrap_or(defence.source_rate);
            if defence == before && proxy.is_some() {
                return Ok(());
            }
            ask(client, Command::Defend { service: id, defence })
        }
        Args::Show { proto, at, json } => {
            let service = proto.zip(*at).map(|(proto, at)| Name { proto, at }.id());
            let rows = rows(client, service)?;
            if *json {
                return put_json(stdout, &rows);
            }
            rows.iter().try_for_each(|row| put(stdout, &line(row)))
        }
    }
}

fn ask(client: &mut Client<'_>, command: Command) -> Result<(), Error> {
    client.start_command(command)?;
    match client.finish_command()? {
        None => Ok(()),
        Some(refusal) => Err(BackendError::Refused(refusal).into()),
    }
}

fn rows(client: &mut Client<'_>, service: Option<ServiceId>) -> Result<Vec<DefenceRow>, Error> {
    let mut rows = Vec::new();
    client.query(RequestBody::Defences(service), |body| match body {
        ResponseBody::Defences(more) => {
            rows.extend(more);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    Ok(rows)
}

/// `tcp 198.51.100.100:80  syn-cookies above 1000  rate 5000  source-rate 50  proxy off`.
fn line(row: &DefenceRow) -> String {
    let Defence { cookies_above, rate, source_rate } = row.defence;
    let cookies = match cookies_above {
        None => "off".to_owned(),
        Some(0) => "always".to_owned(),
        Some(n) => format!("above {n}"),
    };
    let idle =
        if cookies_above.is_some() && !row.cookies_work { " (not used: a real server is not by NAT)" } else { "" };
    let number = |n: u32| if n == 0 { "off".to_owned() } else { n.to_string() };
    format!(
        "{}  syn-cookies {cookies}{idle}  rate {}  source-rate {}  proxy {}\n",
        service_text(&row.service),
        number(rate),
        number(source_rate),
        if row.proxy { "v2" } else { "off" }
    )
}
