//! `rvs why`: what would become of a packet.

use std::fmt::Write as _;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use clap::ValueEnum;
use rvs_control::api::{
    Connection, Forward, Outcome, Probe, ProbeProto, Proto, RequestBody, ResponseBody, ServiceId, TunnelKind, WhyDest,
    WhyRow,
};
use rvs_control::headers::{Ends, Headers, TCP_FLAGS, at};

use super::Error;
use super::show::{put, put_json};
use crate::backend::{Client, unexpected};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(value_enum)]
    proto: Protocol,
    /// Where the packet comes from: ADDRESS:PORT, [ADDRESS]:PORT; for icmp an address
    #[arg(value_name = "SOURCE", value_parser = end)]
    from: (IpAddr, u16),
    /// Where it goes
    #[arg(value_name = "DESTINATION", value_parser = end)]
    to: (IpAddr, u16),
    /// Interface that it comes in by [default: the one by which its source is reached]
    #[arg(long, value_name = "IF")]
    interface: Option<String>,
    /// TCP flags, with commas between: syn, ack, fin, rst, psh, urg [default: syn]
    #[arg(long, value_delimiter = ',', value_parser = flag)]
    flags: Vec<u8>,
    /// Print a JSON array of one object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
    /// An INIT
    Sctp,
    /// An echo request
    Icmp,
}

fn end(text: &str) -> Result<(IpAddr, u16), String> {
    let both = text.parse::<SocketAddr>().map(|at| (at.ip(), at.port()));
    let end = both.or_else(|_| text.trim_matches(['[', ']']).parse::<IpAddr>().map(|address| (address, 0)));
    end.map_err(|_| "not an address with its port (192.0.2.7:40000, [2001:db8::7]:40000)".to_owned())
}

fn flag(text: &str) -> Result<u8, String> {
    let bit = TCP_FLAGS.iter().position(|name| *name == text);
    bit.map(|bit| 1 << bit).ok_or_else(|| format!("no TCP flag: {}", TCP_FLAGS.join(", ")))
}

impl Args {
    fn probe(&self) -> Result<Probe, Error> {
        let proto = match self.proto {
            Protocol::Tcp => ProbeProto::Tcp,
            Protocol::Udp => ProbeProto::Udp,
            Protocol::Sctp => ProbeProto::Sctp,
            Protocol::Icmp => ProbeProto::Icmp,
        };
        if proto != ProbeProto::Icmp && (self.from.1 == 0 || self.to.1 == 0) {
            return Err(Error::Usage("tcp, udp and sctp need ports: ADDRESS:PORT, [ADDRESS]:PORT".to_owned()));
        }
        if proto != ProbeProto::Tcp && !self.flags.is_empty() {
            return Err(Error::Usage("only tcp has flags".to_owned()));
        }
        let syn = 1 << 1;
        let flags = if self.flags.is_empty() { syn } else { self.flags.iter().fold(0, |all, flag| all | flag) };
        Ok(Probe { proto, from: self.from, to: self.to, flags, interface: self.interface.clone() })
    }
}

pub fn print(args: &Args, client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    let mut rows = Vec::new();
    client.query(RequestBody::Why(vec![args.probe()?]), |body| match body {
        ResponseBody::Why(more) => {
            rows.extend(more);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    if args.json {
        return put_json(stdout, &rows);
    }
    rows.iter().try_for_each(|row| put(stdout, &text(row)))
}

/// As a paragraph.
fn text(row: &WhyRow) -> String {
    let (came, left) = (Headers::read(&row.came.0), Headers::read(&row.left.0));
    let packet = came.and_then(|h| h.packet);
    let mut text = packet.map_or_else(|| "a frame".to_owned(), |ends| ends.to_string());
    let _ = writeln!(text, ", coming in by {} ({})", row.interface, row.hook);
    let outcome = match row.outcome {
        Outcome::Forwarded => "forwarded",
        Outcome::Answered => "answered",
        Outcome::Passed => "passed up",
        Outcome::Held => "held",
        Outcome::Dropped => "dropped",
    };
    line(&mut text, outcome, &format!("{}: {}", row.reason, row.text));
    if let Some(service) = &row.service {
        line(&mut text, "service", &service_text(service));
    }
    match (row.connection, &row.scheduler) {
        (Connection::New, Some(scheduler)) => line(&mut text, "connection", &format!("new, chosen by {scheduler}")),
        (Connection::New, None) => line(&mut text, "connection", "new"),
        (Connection::Known, _) => line(&mut text, "connection", "known"),
        (Connection::None, _) => {}
    }
    if let Some(dest) = &row.dest {
        line(&mut text, "real server", &dest_text(dest));
    }
    if row.came != row.left {
        changes(&mut text, row, came.zip(left));
    }
    if let Some(advice) = &row.advice {
        line(&mut text, "what to do", advice);
    }
    text
}

fn line(text: &mut String, name: &str, value: &str) {
    let _ = writeln!(text, "  {name:<14}{value}");
}

pub fn service_text(service: &ServiceId) -> String {
    match service {
        ServiceId::Virtual { proto, addr, port } => {
            let proto = match proto {
                Proto::Tcp => "tcp",
                Proto::Udp => "udp",
                Proto::Sctp => "sctp",
            };
            format!("{proto} {}", at(*addr, *port))
        }
        ServiceId::Fwmark { mark, .. } => format!("fwmark {mark}"),
    }
}

fn dest_text(dest: &WhyDest) -> String {
    let method = match dest.forward {
        Forward::Masq => "NAT".to_owned(),
        Forward::Local => "local".to_owned(),
        Forward::Route => "direct routing".to_owned(),
        Forward::Fullnat => "FULLNAT".to_owned(),
        Forward::Tunnel { kind, port, .. } => match kind {
            TunnelKind::Ipip => "tunnel, IPIP".to_owned(),
            TunnelKind::Gre => "tunnel, GRE".to_owned(),
            TunnelKind::Gue => format!("tunnel, GUE to port {port}"),
        },
    };
    let weight = dest.weight.map_or_else(|| "removed".to_owned(), |weight| format!("weight {weight}"));
    let header = if dest.proxy { ", PROXY header" } else { "" };
    format!("{} by {method}, {weight}{header}", at(dest.id.addr, dest.id.port))
}

/// What is different when it leaves.
fn changes(text: &mut String, row: &WhyRow, frames: Option<(Headers, Headers)>) {
    let Some((came, left)) = frames else { return };
    if let Some(out) = &row.out {
        let macs = if row.resolve {
            "to the MAC address that the kernel finds".to_owned()
        } else {
            format!("from {} to {}", left.from, left.to)
        };
        line(text, "leaves by", &format!("{out}, {macs}"));
    }
    let (Some(came), Some(left)) = (came.packet, left.packet) else { return };
    let tunnel = matches!(row.dest, Some(WhyDest { forward: Forward::Tunnel { .. }, .. }));
    if row.outcome == Outcome::Answered {
        return line(text, "answer", &left.to_string());
    }
    if tunnel {
        let Ends { source, destination, len, .. } = left;
        return line(text, "wrapped", &format!("{source} > {destination}, {} bytes for {}", len, came.len));
    }
    let of = |e: &Ends| e.ports.unwrap_or_default();
    for (name, before, after) in [
        ("source", at(came.source, of(&came)[0]), at(left.source, of(&left)[0])),
        ("destination", at(came.destination, of(&came)[1]), at(left.destination, of(&left)[1])),
        ("TTL", came.ttl.to_string(), left.ttl.to_string()),
    ] {
        if before != after {
            line(text, name, &format!("{before} -> {after}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvs_control::api::{DestId, Frame};
    use rvs_control::headers::frame;
    use rvs_control::net::Mac;

    fn args(words: &str) -> Args {
        #[derive(clap::Parser)]
        struct Whole {
            #[command(flatten)]
            args: Args,
        }
        let words = std::iter::once("why").chain(words.split(' '));
        <Whole as clap::Parser>::try_parse_from(words).expect("arguments").args
    }

    #[test]
    fn a_packet_is_asked_about() {
        let probe = args("tcp 192.0.2.7:40000 198.51.100.100:80 --flags ack,psh").probe().expect("a probe");
        assert_eq!((probe.flags, probe.to.1, probe.interface), (0x18, 80, None));
        let probe = args("udp [2001:db8::7]:40000 [2001:db8::8]:53 --interface eth0").probe().expect("a probe");
        assert_eq!((probe.from.0.is_ipv6(), probe.interface.as_deref()), (true, Some("eth0")));
        assert!(args("icmp 192.0.2.7 198.51.100.100").probe().is_ok());
        assert!(matches!(args("tcp 192.0.2.7 198.51.100.100:80").probe(), Err(Error::Usage(_))));
        let probe = args("sctp 192.0.2.7:1 198.51.100.100:9").probe().expect("a probe");
        assert_eq!((probe.proto, probe.to.1), (ProbeProto::Sctp, 9));
        assert!(matches!(args("udp 192.0.2.7:1 198.51.100.100:80 --flags syn").probe(), Err(Error::Usage(_))));
    }

    #[test]
    fn the_answer_says_what_changes() {
        let probe = args("tcp 192.0.2.7:40000 198.51.100.100:80").probe().expect("a probe");
        let came = frame(&probe, Mac([2, 0, 0, 0, 0, 9])).expect("a frame");
        let to = ("203.0.113.101".parse().expect("an address"), 8080);
        let mut left = frame(&Probe { to, ..probe }, Mac([2, 0, 0, 0, 5, 1])).expect("a frame");
        left[22] = 63;
        let service = ServiceId::Virtual { proto: Proto::Tcp, addr: "198.51.100.100".parse().expect("one"), port: 80 };
        let id = DestId { addr: to.0, port: 8080 };
        let row = WhyRow {
            interface: "front".into(),
            hook: "xdp".into(),
            outcome: Outcome::Forwarded,
            reason: "nat".into(),
            text: "sent to a real server by NAT".into(),
            advice: None,
            out: Some("back".into()),
            resolve: false,
            service: Some(service),
            scheduler: Some("wrr".into()),
            connection: Connection::New,
            dest: Some(WhyDest { id, forward: Forward::Masq, weight: Some(2), proxy: false }),
            came: Frame(came),
            left: Frame(left),
        };
        assert_eq!(
            text(&row),
            "192.0.2.7:40000 > 198.51.100.100:80 tcp syn, coming in by front (xdp)
  forwarded     nat: sent to a real server by NAT
  service       tcp 198.51.100.100:80
  connection    new, chosen by wrr
  real server   203.0.113.101:8080 by NAT, weight 2
  leaves by     back, from 02:00:00:00:00:01 to 02:00:00:00:05:01
  destination   198.51.100.100:80 -> 203.0.113.101:8080
  TTL           64 -> 63
"
        );
        let came = row.came.clone();
        let dropped = WhyRow {
            outcome: Outcome::Dropped,
            reason: "no_route".into(),
            text: "no route to the real server".into(),
            advice: Some("see ip route get".into()),
            dest: None,
            left: came,
            connection: Connection::None,
            ..row
        };
        assert_eq!(
            text(&dropped),
            "192.0.2.7:40000 > 198.51.100.100:80 tcp syn, coming in by front (xdp)
  dropped       no_route: no route to the real server
  service       tcp 198.51.100.100:80
  what to do    see ip route get
"
        );
    }
}
