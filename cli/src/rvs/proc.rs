//! `rvs proc`: the files that monitoring agents read in /proc/net, byte for byte as the kernel writes them
//! (`ip_vs_ctl.c` `ip_vs_info_seq_show`, `ip_vs_stats_show`, `ip_vs_stats_percpu_show`; `ip_vs_conn.c`
//! `ip_vs_conn_seq_show`, `ip_vs_conn_sync_seq_show`; `ip_vs_app.c` `ip_vs_app_seq_show`).

use std::fmt::Write as _;
use std::io::Write;
use std::net::{IpAddr, Ipv6Addr};

use clap::ValueEnum;
use rvs_control::api::{
    ConnOrigin, ConnRow, DestRow, Filter, Granularity, ListRow, Proto, RequestBody, ResponseBody, ServiceId,
    ServiceRow, Stats, StatsReport, conn_state_name,
};

use super::Error;
use crate::backend::{BackendError, Client, unexpected};
use crate::ipvsadm::{forward_name, printable, protocol_name};

/// Ticks a second of the kernel that this stands in for: /proc/net/ip_vs shows persistence in ticks. 250 in Debian's
/// and most distributions' kernels (`CONFIG_HZ`).
const TICKS_PER_S: u64 = 250;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum File {
    /// Services and real servers
    IpVs,
    /// Connections
    IpVsConn,
    /// Connections, with where they came from
    IpVsConnSync,
    /// Helpers for protocols
    IpVsApp,
    /// Counters and rates of all traffic, hexadecimal
    IpVsStats,
    /// The same for each CPU
    IpVsStatsPercpu,
}

pub fn print(file: File, client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    match file {
        File::IpVs => services(client, stdout),
        File::IpVsConn => {
            let title = "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData\n";
            connections(client, stdout, title, conn_line)
        }
        File::IpVsConnSync => {
            let title = "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Origin Expires\n";
            connections(client, stdout, title, conn_sync_line)
        }
        File::IpVsApp => put(stdout, "prot port    usecnt name\n"),
        File::IpVsStats => put(stdout, &stats_text(&stats(client)?)),
        File::IpVsStatsPercpu => put(stdout, &stats_percpu_text(&stats(client)?)),
    }
}

fn put(stdout: &mut dyn Write, text: &str) -> Result<(), Error> {
    stdout.write_all(text.as_bytes()).map_err(Error::Output)
}

fn services(client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    let status = client.status()?;
    let [major, minor, patch] = status.ipvs_version;
    put(
        stdout,
        &format!(
            "IP Virtual Server version {major}.{minor}.{patch} (size={})\n\
             Prot LocalAddress:Port Scheduler Flags\n  \
             -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n",
            status.conn_table_size
        ),
    )?;
    let mut unwritten = None;
    let outcome = client.query(RequestBody::List(Filter::All), |body| {
        let ResponseBody::List(rows) = body else { return Err(unexpected(&body)) };
        for row in rows {
            let line = match row {
                ListRow::Service(service) => service_line(&service),
                ListRow::Dest(dest) => dest_line(&dest),
            };
            unwritten = unwritten.take().or(put(stdout, &line).err());
        }
        stop_if(unwritten.is_some())
    });
    finish(outcome, unwritten)
}

/// An answer can only be ended early by leaving it.
fn stop_if(unwritten: bool) -> Result<(), BackendError> {
    if unwritten { Err(BackendError::Closed) } else { Ok(()) }
}

fn finish(outcome: Result<(), BackendError>, unwritten: Option<Error>) -> Result<(), Error> {
    unwritten.map_or_else(|| outcome.map_err(Error::from), Err)
}

/// `%pI6` of the kernel: all groups, with leading zeros.
fn full_v6(addr: Ipv6Addr) -> String {
    addr.segments().map(|group| format!("{group:04x}")).join(":")
}

/// An address as /proc has it: IPv4 as a hexadecimal number.
fn hex_addr(addr: IpAddr) -> String {
    match addr {
        IpAddr::V4(v4) => format!("{:08X}", v4.to_bits()),
        IpAddr::V6(v6) => full_v6(v6),
    }
}

fn service_line(row: &ServiceRow) -> String {
    let scheduler = &row.spec.scheduler;
    let ops = if row.spec.one_packet { "ops " } else { "" };
    let mut line = match row.id {
        ServiceId::Virtual { proto, addr, port } => {
            let proto = match proto {
                Proto::Tcp => "TCP",
                Proto::Udp => "UDP",
                Proto::Sctp => "SCTP",
            };
            match addr {
                // The kernel does not show one-packet scheduling here.
                IpAddr::V6(v6) => format!("{proto}  [{}]:{port:04X} {scheduler} ", full_v6(v6)),
                IpAddr::V4(_) => format!("{proto}  {}:{port:04X} {scheduler} {ops} ", hex_addr(addr)),
            }
        }
        ServiceId::Fwmark { mark, .. } => format!("FWM  {mark:08X} {scheduler} {ops}"),
    };
    if let Some(timeout_s) = row.spec.persistence_s {
        // A prefix length is shown as the number that the field has in network byte order.
        let mask = match row.spec.granularity {
            Granularity::Netmask(mask) => mask.to_bits(),
            Granularity::PrefixLen(len) => u32::from(len).swap_bytes(),
        };
        let _ = write!(line, "persistent {} {mask:08X}", u64::from(timeout_s) * TICKS_PER_S);
    }
    line.push('\n');
    line
}

fn dest_line(row: &DestRow) -> String {
    let DestRow { dest, active, inactive, .. } = row;
    let addr = match dest.id.addr {
        IpAddr::V6(v6) => format!("[{}]", full_v6(v6)),
        v4 => hex_addr(v4),
    };
    let (port, method, weight) = (dest.id.port, forward_name(dest.forward), dest.weight);
    format!("  -> {addr}:{port:04X}      {method:<7} {weight:<6} {active:<10} {inactive:<10}\n")
}

fn connections(
    client: &mut Client<'_>,
    stdout: &mut dyn Write,
    title: &str,
    line: fn(&ConnRow) -> String,
) -> Result<(), Error> {
    put(stdout, title)?;
    let mut unwritten = None;
    let outcome = client.query(RequestBody::Connections, |body| {
        let ResponseBody::Connections(rows) = body else { return Err(unexpected(&body)) };
        for row in rows {
            unwritten = unwritten.take().or(put(stdout, &line(&row)).err());
        }
        stop_if(unwritten.is_some())
    });
    finish(outcome, unwritten)
}

/// What both connection files begin their lines with, up to the state.
fn conn_start(row: &ConnRow) -> String {
    let end = |(addr, port): (IpAddr, u16)| format!("{} {port:04X}", hex_addr(addr));
    format!(
        "{:<3} {} {} {} {:<11}",
        protocol_name(row.proto),
        end(row.client),
        end(row.virt),
        end(row.dest),
        conn_state_name(row.proto, row.template, row.state)
    )
}

fn conn_line(row: &ConnRow) -> String {
    let engine =
        row.engine.as_ref().map(|e| format!(" {} {}", printable(&e.name), printable(&e.data))).unwrap_or_default();
    format!("{} {:>7}{engine}\n", conn_start(row), row.expires_s)
}

fn conn_sync_line(row: &ConnRow) -> String {
    let origin = match row.origin {
        ConnOrigin::Local => "LOCAL",
        ConnOrigin::Sync => "SYNC",
    };
    format!("{} {origin:<6} {:>7}\n", conn_start(row), row.expires_s)
}

fn stats(client: &mut Client<'_>) -> Result<StatsReport, Error> {
    let mut report = None;
    client.query(RequestBody::Stats, |body| match body {
        ResponseBody::Stats(stats) => {
            report = Some(*stats);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    report.ok_or(Error::Backend(BackendError::Closed))
}

fn columns(values: [u64; 5]) -> String {
    let [conns, in_pkts, out_pkts, in_bytes, out_bytes] = values;
    format!("{conns:8X} {in_pkts:8X} {out_pkts:8X} {in_bytes:16X} {out_bytes:16X}")
}

fn counters(stats: &Stats) -> String {
    columns([stats.conns, stats.in_pkts, stats.out_pkts, stats.in_bytes, stats.out_bytes])
}

fn rates(report: &StatsReport) -> String {
    let r = report.rates;
    columns([r.conns, r.in_pkts, r.out_pkts, r.in_bytes, r.out_bytes])
}

fn stats_text(report: &StatsReport) -> String {
    format!(
        "   Total Incoming Outgoing         Incoming         Outgoing\n   \
         Conns  Packets  Packets            Bytes            Bytes\n\
         {}\n\n Conns/s   Pkts/s   Pkts/s          Bytes/s          Bytes/s\n{}\n",
        counters(&report.total),
        rates(report)
    )
}

fn stats_percpu_text(report: &StatsReport) -> String {
    let mut text = "       Total Incoming Outgoing         Incoming         Outgoing\n\
        CPU    Conns  Packets  Packets            Bytes            Bytes\n"
        .to_owned();
    for row in &report.cpus {
        let _ = writeln!(text, "{:3X} {}", row.cpu, counters(&row.stats));
    }
    let _ = writeln!(text, "  ~ {}", counters(&report.total));
    let _ = write!(text, "\n     Conns/s   Pkts/s   Pkts/s          Bytes/s          Bytes/s\n    {}\n", rates(report));
    text
}
