//! `rvs trace`: packets as they come, a line each, or as a pcapng file.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::time::{Duration, Instant};

use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption};
use pcap_file::pcapng::{PcapNgBlock, PcapNgWriter};
use pcap_file::{DataLink, PcapError};
use rvs_control::api::{Outcome, RequestBody, ResponseBody, TracedRow};
use rvs_control::headers::{Headers, at};

use super::Error;
use super::show::put;
use crate::backend::{Client, unexpected};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which packets, as in pcap-filter and with reason, service, dest: 'tcp port 80 and dropped' [default: all]
    #[arg(long, value_name = "EXPR", default_value = "")]
    filter: String,
    /// Write the packets to a pcapng file, the verdict in each one's comment; `-`: to standard output
    #[arg(long, value_name = "FILE")]
    pcap: Option<String>,
    /// End after so many packets
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// End after so many seconds
    #[arg(long, value_name = "S")]
    duration: Option<u64>,
}

pub fn print(
    args: &Args,
    client: &mut Client<'_>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Result<(), Error> {
    let mut to = Sink::open(args.pcap.as_deref(), stdout)?;
    let until = args.duration.map(|s| Instant::now() + Duration::from_secs(s));
    let (mut left, mut lost_before) = (args.count.unwrap_or(u64::MAX), 0);
    client.follow(RequestBody::Trace(args.filter.clone()), |body| {
        let ResponseBody::Traced { packets, lost } = body else { return Err(unexpected(&body).into()) };
        for row in packets {
            if left == 0 {
                break;
            }
            to.take(&row)?;
            left -= 1;
        }
        // At once, so that what was seen is there when we are stopped.
        to.flush()?;
        if lost > lost_before {
            // (If nobody takes it there is nobody to tell.)
            let _ = writeln!(stderr, "rvs: {} packets were lost: too many at once", lost - lost_before);
            lost_before = lost;
        }
        Ok(left > 0 && until.is_none_or(|until| Instant::now() < until))
    })
}

/// Where packets go.
enum Sink<'a> {
    Lines(&'a mut dyn Write),
    Pcap { path: String, file: PcapNgWriter<Box<dyn Write + 'a>>, interfaces: Vec<String> },
}

impl<'a> Sink<'a> {
    fn open(path: Option<&str>, stdout: &'a mut dyn Write) -> Result<Sink<'a>, Error> {
        let Some(path) = path else { return Ok(Sink::Lines(stdout)) };
        let failed = |error: PcapError| Error::Pcap { path: path.to_owned(), error };
        let to: Box<dyn Write + 'a> = if path == "-" {
            Box::new(stdout)
        } else {
            Box::new(BufWriter::new(File::create(path).map_err(|e| failed(PcapError::IoError(e)))?))
        };
        let file = PcapNgWriter::new(to).map_err(failed)?;
        Ok(Sink::Pcap { path: path.to_owned(), file, interfaces: Vec::new() })
    }

    fn take(&mut self, row: &TracedRow) -> Result<(), Error> {
        match self {
            Sink::Lines(stdout) => put(*stdout, &line(row)),
            Sink::Pcap { path, file, interfaces } => {
                record(file, interfaces, row).map_err(|error| Error::Pcap { path: path.clone(), error })
            }
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        match self {
            Sink::Lines(stdout) => stdout.flush().map_err(Error::Output),
            Sink::Pcap { path, file, .. } => file
                .get_mut()
                .flush()
                .map_err(|error| Error::Pcap { path: path.clone(), error: PcapError::IoError(error) }),
        }
    }
}

fn record<W: Write>(
    file: &mut PcapNgWriter<W>,
    interfaces: &mut Vec<String>,
    row: &TracedRow,
) -> Result<(), PcapError> {
    /// Times are in nanoseconds: 10^-9 s.
    const NANOSECONDS: u8 = 9;
    let known = interfaces.iter().position(|name| *name == row.interface);
    let number = match known {
        Some(number) => number,
        None => {
            let name = InterfaceDescriptionOption::IfName(Cow::Borrowed(&row.interface));
            let options = vec![name, InterfaceDescriptionOption::IfTsResol(NANOSECONDS)];
            let block = InterfaceDescriptionBlock { linktype: DataLink::ETHERNET, snaplen: 0, options };
            file.write_block(&block.into_block())?;
            interfaces.push(row.interface.clone());
            interfaces.len() - 1
        }
    };
    let packet = EnhancedPacketBlock {
        interface_id: u32::try_from(number).unwrap_or(u32::MAX),
        timestamp: Duration::from_nanos(row.at_ns),
        original_len: row.len,
        data: Cow::Borrowed(&row.bytes.0),
        options: vec![EnhancedPacketOption::Comment(Cow::Owned(verdict(row)))],
    };
    file.write_block(&packet.into_block()).map(|_| ())
}

/// `15:04:05.123456 front 192.0.2.7:40000 > 198.51.100.100:80 tcp syn, 74 bytes: forwarded, nat, to 203.0.113.101:8080, by back`; UTC.
fn line(row: &TracedRow) -> String {
    let (s, us) = (row.at_ns / 1_000_000_000, row.at_ns / 1000 % 1_000_000);
    let (hours, minutes, seconds) = (s / 3600 % 24, s / 60 % 60, s % 60);
    let packet = match Headers::read(&row.bytes.0) {
        Some(Headers { packet: Some(ends), .. }) => ends.to_string(),
        Some(h) => format!("{} > {} ethertype {:#06x}", h.from, h.to, h.ethertype),
        None => "no Ethernet header".to_owned(),
    };
    let time = format!("{hours:02}:{minutes:02}:{seconds:02}.{us:06}");
    format!("{time} {} {packet}, {} bytes: {}\n", row.interface, row.len, verdict(row))
}

/// What became of it.
fn verdict(row: &TracedRow) -> String {
    let outcome = match row.outcome {
        Outcome::Forwarded => "forwarded",
        Outcome::Answered => "answered",
        Outcome::Passed => "passed",
        Outcome::Held => "held",
        Outcome::Dropped => "dropped",
    };
    let dest = row.dest.map_or_else(String::new, |dest| format!(", real server {}", at(dest.addr, dest.port)));
    let out = row.out.as_ref().map_or_else(String::new, |out| format!(", by {out}"));
    format!("{outcome}, {}{dest}{out}", row.reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcapng::{Block, PcapNgReader};
    use rvs_control::api::{DestId, Frame, Probe, ProbeProto};
    use rvs_control::headers::frame;
    use rvs_control::net::Mac;

    fn row(interface: &str) -> TracedRow {
        let at = |text: &str| text.parse::<std::net::SocketAddr>().map(|a| (a.ip(), a.port())).expect("an address");
        let (from, to) = (at("192.0.2.7:40000"), at("198.51.100.100:80"));
        let probe = Probe { proto: ProbeProto::Tcp, from, to, flags: 2, interface: None };
        let bytes = frame(&probe, Mac([2; 6])).expect("a frame");
        TracedRow {
            at_ns: 1_700_000_000_123_456_789,
            interface: interface.to_owned(),
            outcome: Outcome::Forwarded,
            reason: "nat".into(),
            out: Some("back".into()),
            service: None,
            dest: Some(DestId { addr: "203.0.113.101".parse().expect("an address"), port: 8080 }),
            len: bytes.len() as u32,
            bytes: Frame(bytes),
        }
    }

    #[test]
    fn a_packet_is_a_line() {
        let should_be = "22:13:20.123456 front 192.0.2.7:40000 > 198.51.100.100:80 tcp syn, 54 bytes: \
                         forwarded, nat, real server 203.0.113.101:8080, by back\n";
        assert_eq!(line(&row("front")), should_be);
        let arp = TracedRow { bytes: Frame([[2; 6], [3; 6], [8, 6, 0, 1, 8, 0]].concat()), ..row("front") };
        assert!(line(&arp).contains("03:03:03:03:03:03 > 02:02:02:02:02:02 ethertype 0x0806"), "{}", line(&arp));
    }

    #[test]
    fn the_file_has_each_packet_with_its_verdict() {
        let mut bytes = Vec::new();
        let mut file = PcapNgWriter::new(&mut bytes).expect("a file");
        let mut interfaces = Vec::new();
        for interface in ["front", "back", "front"] {
            record(&mut file, &mut interfaces, &row(interface)).expect("written");
        }
        let mut reader = PcapNgReader::new(&bytes[..]).expect("a file");
        let (mut packets, mut names) = (Vec::new(), Vec::new());
        while let Some(block) = reader.next_block() {
            match block.expect("a block") {
                Block::InterfaceDescription(i) => names.push(format!("{:?}", i.options[0])),
                Block::EnhancedPacket(p) => {
                    assert_eq!(p.data, row("").bytes.0);
                    let EnhancedPacketOption::Comment(comment) = &p.options[0] else { panic!("{:?}", p.options) };
                    assert_eq!(*comment, verdict(&row("")));
                    packets.push((p.interface_id, p.original_len));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(packets, [(0, 54), (1, 54), (0, 54)]);
        assert_eq!(names, ["IfName(\"front\")", "IfName(\"back\")"]);
    }
}
