//! Listings, byte for byte as ipvsadm 1.31 prints them.

use std::net::IpAddr;

use rvs_control::api::{
    ConnRow, DaemonRole, DaemonRow, DestRow, Forward, Granularity, LocalAddressRow, Proto, Rates, ServiceId,
    ServiceRow, ServiceSpec, Stats, Status, Timeouts, TunnelChecksum, TunnelKind, conn_state_name,
};

use super::meaning::{Columns, Format};
use super::numbers::large_number;
use crate::names::Resolver;

/// Room for an address with its port in stock ipvsadm, bytes: longer names are cut off.
const NAME_BYTES_MAX: usize = 59;
/// What an IPv4 service's name is cut off to in a listing.
const SERVICE_COLUMN: usize = 33;
/// The same for an IPv4 service's dests.
const DEST_COLUMN: usize = 28;

pub fn version_line(status: &Status) -> String {
    let [major, minor, patch] = status.ipvs_version;
    format!("IP Virtual Server version {major}.{minor}.{patch} (size={})\n", status.conn_table_size)
}

pub fn title(columns: Columns) -> String {
    let counters = |names: [&str; 5]| {
        let [a, b, c, d, e] = names;
        format!("{:<33} {a:>8} {b:>8} {c:>8} {d:>8} {e:>8}\n  -> RemoteAddress:Port\n", "Prot LocalAddress:Port")
    };
    match columns {
        Columns::Rule => String::new(),
        Columns::Stats => counters(["Conns", "InPkts", "OutPkts", "InBytes", "OutBytes"]),
        Columns::Rate => counters(["CPS", "InPPS", "OutPPS", "InBPS", "OutBPS"]),
        Columns::Thresholds => format!(
            "{:<33} {:<10} {:<10} {:<10} {:<10}\n  -> RemoteAddress:Port\n",
            "Prot LocalAddress:Port", "Uthreshold", "Lthreshold", "ActiveConn", "InActConn"
        ),
        Columns::PersistentConn => format!(
            "{:<33} {:<9} {:<11} {:<10} {:<10}\n  -> RemoteAddress:Port\n",
            "Prot LocalAddress:Port", "Weight", "PersistConn", "ActiveConn", "InActConn"
        ),
        Columns::TunInfo => "Prot LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port           \
            Forward TunnelInfo    Weight ActiveConn InActConn\n"
            .into(),
        Columns::Plain => "Prot LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port           \
            Forward Weight ActiveConn InActConn\n"
            .into(),
    }
}

/// A service and its dests, in the order given.
pub fn service(service: &ServiceRow, dests: &[DestRow], format: Format, resolver: &mut dyn Resolver) -> String {
    let name = service_name(&service.id, format, resolver);
    let mut out = match format.columns {
        Columns::Rule => format!("-A {name}{}", rule_flags(&service.spec)),
        Columns::Stats => format!("{name:<33}{}", stats_columns(&service.stats, format)),
        Columns::Rate => format!("{name:<33}{}", rates_columns(&service.rates, format)),
        _ => format!("{name} {}{}", service.spec.scheduler, listed_flags(&service.spec)),
    };
    out.push('\n');
    let cut = format.columns != Columns::Rule && !is_v6(&service.id);
    for row in dests {
        let id = row.dest.id;
        let mut address = address_name(id.addr, id.port, service_proto(&service.id), format, resolver);
        if cut {
            truncate(&mut address, DEST_COLUMN);
        }
        out.push_str(&dest(row, &name, &address, format));
    }
    out
}

fn dest(row: &DestRow, service: &str, name: &str, format: Format) -> String {
    let DestRow { dest, active, inactive, persistent, stats, rates } = row;
    let weight = dest.weight;
    match format.columns {
        Columns::Rule => {
            format!(
                "-a {service} -r {name} {} -w {weight}{}\n",
                forward_switch(dest.forward),
                tunnel_rule(dest.forward)
            )
        }
        Columns::Stats => format!("  -> {name:<28}{}\n", stats_columns(stats, format)),
        Columns::Rate => format!("  -> {name:<28}{}\n", rates_columns(rates, format)),
        Columns::Thresholds => {
            format!("  -> {name:<28} {:<10} {:<10} {active:<10} {inactive:<10}\n", dest.upper, dest.lower)
        }
        Columns::PersistentConn => {
            format!("  -> {name:<28} {weight:<9} {persistent:<11} {active:<10} {inactive:<10}\n")
        }
        Columns::TunInfo => format!(
            "  -> {name:<28} {:<7} {:<13} {weight:<6} {active:<10} {inactive:<10}\n",
            forward_name(dest.forward),
            tunnel_info(dest.forward)
        ),
        Columns::Plain => {
            format!("  -> {name:<28} {:<7} {weight:<6} {active:<10} {inactive:<10}\n", forward_name(dest.forward))
        }
    }
}

fn stats_columns(stats: &Stats, format: Format) -> String {
    let Stats { conns, in_pkts, out_pkts, in_bytes, out_bytes } = *stats;
    [conns, in_pkts, out_pkts, in_bytes, out_bytes].map(|n| large_number(n, format.exact)).concat()
}

fn rates_columns(rates: &Rates, format: Format) -> String {
    let Rates { conns, in_pkts, out_pkts, in_bytes, out_bytes } = *rates;
    [conns, in_pkts, out_pkts, in_bytes, out_bytes].map(|n| large_number(n, format.exact)).concat()
}

fn is_v6(id: &ServiceId) -> bool {
    matches!(id.family(), rvs_control::api::Family::V6)
}

/// A mark's dests have the service names of TCP.
const fn service_proto(id: &ServiceId) -> u8 {
    match id {
        ServiceId::Virtual { proto: Proto::Tcp, .. } | ServiceId::Fwmark { .. } => 6,
        ServiceId::Virtual { proto: Proto::Udp, .. } => 17,
        ServiceId::Virtual { proto: Proto::Sctp, .. } => 132,
    }
}

fn service_name(id: &ServiceId, format: Format, resolver: &mut dyn Resolver) -> String {
    let rule = format.columns == Columns::Rule;
    match *id {
        ServiceId::Virtual { proto, addr, port } => {
            let name = address_name(addr, port, service_proto(id), format, resolver);
            let (switch, word) = match proto {
                Proto::Tcp => ("-t", "TCP"),
                Proto::Udp => ("-u", "UDP"),
                Proto::Sctp => ("--sctp-service", "SCTP"),
            };
            if rule {
                return format!("{switch} {name}");
            }
            let mut name = format!("{word:<4} {name}");
            if addr.is_ipv4() {
                truncate(&mut name, SERVICE_COLUMN);
            }
            name
        }
        // Rules have the mark as it can be read back; a listing shows it as an `int`, as stock does.
        ServiceId::Fwmark { mark, .. } if rule => format!("-f {mark}{}", if is_v6(id) { " -6" } else { "" }),
        ServiceId::Fwmark { mark, .. } => {
            format!("FWM  {}{}", mark.cast_signed(), if is_v6(id) { " IPv6" } else { "" })
        }
    }
}

/// `address:port`, IPv6 in brackets, as numbers or as names where there are any. IPv6 addresses stay numbers: stock
/// ipvsadm asks for their names in a way that never finds one, and it could not read a name in brackets back.
pub fn address_name(addr: IpAddr, port: u16, proto: u8, format: Format, resolver: &mut dyn Resolver) -> String {
    let (host, service) = if format.numeric {
        (None, None)
    } else {
        let host = if addr.is_ipv4() { resolver.addr_to_host(addr) } else { None };
        (host, resolver.port_to_service(port, proto))
    };
    let host = host.unwrap_or_else(|| addr.to_string());
    let service = service.unwrap_or_else(|| port.to_string());
    let mut name = if addr.is_ipv6() { format!("[{host}]:{service}") } else { format!("{host}:{service}") };
    truncate(&mut name, NAME_BYTES_MAX);
    name
}

/// Cuts to at most `bytes` bytes, at a character's border.
fn truncate(text: &mut String, bytes: usize) {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
}

fn rule_flags(spec: &ServiceSpec) -> String {
    let mut out = format!(" -s {}", spec.scheduler);
    if let Some(timeout) = spec.persistence_s {
        out.push_str(&format!(" -p {timeout}"));
        out.push_str(&granularity(spec.granularity, " -M "));
    }
    if let Some(engine) = &spec.engine {
        out.push_str(&format!(" --pe {engine}"));
    }
    if spec.one_packet {
        out.push_str(" -o");
    }
    if let Some(flags) = sched_flag_names(spec) {
        out.push_str(&format!(" -b {flags}"));
    }
    out
}

fn listed_flags(spec: &ServiceSpec) -> String {
    let mut out = String::new();
    if let Some(flags) = sched_flag_names(spec) {
        out.push_str(&format!(" ({flags})"));
    }
    if let Some(timeout) = spec.persistence_s {
        out.push_str(&format!(" persistent {timeout}"));
        out.push_str(&granularity(spec.granularity, " mask "));
    }
    if let Some(engine) = &spec.engine {
        out.push_str(&format!(" pe {engine}"));
    }
    if spec.one_packet {
        out.push_str(" ops");
    }
    out
}

/// Nothing for a single address, which is the default.
fn granularity(granularity: Granularity, word: &str) -> String {
    match granularity {
        Granularity::Netmask(mask) if mask.is_broadcast() => String::new(),
        Granularity::PrefixLen(128) => String::new(),
        Granularity::Netmask(mask) => format!("{word}{mask}"),
        Granularity::PrefixLen(len) => format!("{word}{len}"),
    }
}

/// sh and mh have names for the first two flags; the third they don't show.
fn sched_flag_names(spec: &ServiceSpec) -> Option<String> {
    let names: &[(u8, &str)] = match spec.scheduler.as_str() {
        "sh" => &[(1, "sh-fallback"), (2, "sh-port")],
        "mh" => &[(1, "mh-fallback"), (2, "mh-port")],
        _ => &[(1, "flag-1"), (2, "flag-2"), (4, "flag-3")],
    };
    let set: Vec<&str> = names.iter().filter(|(bit, _)| spec.sched_flags & bit != 0).map(|(_, name)| *name).collect();
    (!set.is_empty()).then(|| set.join(","))
}

pub const fn forward_name(forward: Forward) -> &'static str {
    match forward {
        Forward::Masq => "Masq",
        Forward::Local => "Local",
        Forward::Tunnel { .. } => "Tunnel",
        Forward::Route => "Route",
        Forward::Fullnat => "FullNat",
    }
}

const fn forward_switch(forward: Forward) -> &'static str {
    match forward {
        Forward::Masq => "-m",
        Forward::Tunnel { .. } => "-i",
        Forward::Route | Forward::Local => "-g",
        Forward::Fullnat => "-b",
    }
}

const fn tunnel_kind(kind: TunnelKind) -> &'static str {
    match kind {
        TunnelKind::Ipip => "ipip",
        TunnelKind::Gue => "gue",
        TunnelKind::Gre => "gre",
    }
}

fn tunnel_rule(forward: Forward) -> String {
    let Forward::Tunnel { kind, port, checksum } = forward else { return String::new() };
    let checksum = match checksum {
        TunnelChecksum::None => "--tun-nocsum",
        TunnelChecksum::Csum => "--tun-csum",
        TunnelChecksum::Remcsum => "--tun-remcsum",
    };
    let name = tunnel_kind(kind);
    match kind {
        TunnelKind::Ipip => format!(" --tun-type {name}"),
        TunnelKind::Gue => format!(" --tun-type {name} --tun-port {port} {checksum}"),
        TunnelKind::Gre => format!(" --tun-type {name} {checksum}"),
    }
}

fn tunnel_info(forward: Forward) -> String {
    let Forward::Tunnel { kind, port, checksum } = forward else { return "n/a".into() };
    let checksum = match checksum {
        TunnelChecksum::None => "-c",
        TunnelChecksum::Csum => "+c",
        TunnelChecksum::Remcsum => "r+c",
    };
    let name = tunnel_kind(kind);
    match kind {
        TunnelKind::Ipip => name.into(),
        TunnelKind::Gue => format!("{name}:{port}:{checksum}"),
        TunnelKind::Gre => format!("{name}:{checksum}"),
    }
}

pub fn connections_title(format: Format) -> String {
    let columns = format!("pro expire {:<11} {:<18} {:<18} ", "state", "source", "virtual");
    let rest =
        if format.engine { format!("{:<18} {:<16} pe_data", "destination", "pe name") } else { "destination".into() };
    format!("IPVS connection entries\n{columns}{rest}\n")
}

pub fn connection(row: &ConnRow, format: Format, resolver: &mut dyn Resolver) -> String {
    let mut name = |(addr, port): (IpAddr, u16)| address_name(addr, port, row.proto, format, resolver);
    let (client, virt, dest) = (name(row.client), name(row.virt), name(row.dest));
    let expires = format!("{:02}:{:02}", row.expires_s / 60, row.expires_s % 60);
    let state = conn_state_name(row.proto, row.template, row.state);
    let start = format!("{:<3} {expires:<6} {state:<11} {client:<18} {virt:<18} ", protocol_name(row.proto));
    match &row.engine {
        Some(engine) if format.engine => {
            format!("{start}{dest:<16} {:<18} {}\n", printable(&engine.name), printable(&engine.data))
        }
        _ => format!("{start}{dest}\n"),
    }
}

/// The kernel's names (`ip_vs_proto_name`).
pub fn protocol_name(proto: u8) -> String {
    match proto {
        0 => "IP".into(),
        1 => "ICMP".into(),
        6 => "TCP".into(),
        17 => "UDP".into(),
        58 => "ICMPv6".into(),
        132 => "SCTP".into(),
        other => format!("IP_{other}"),
    }
}

/// Data that came over the network, made safe for a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

pub fn timeouts(t: &Timeouts) -> String {
    format!("Timeout (tcp tcpfin udp): {} {} {}\n", t.tcp_s, t.tcp_fin_s, t.udp_s)
}

pub fn daemon(row: &DaemonRow) -> String {
    let role = match row.role {
        DaemonRole::Master => "master",
        DaemonRole::Backup => "backup",
    };
    let DaemonRow { interface, syncid, maxlen, group, port, ttl, .. } = row;
    format!(
        "{role} sync daemon (mcast={interface}, syncid={syncid}, maxlen={maxlen}, group={group}, port={port}, \
         ttl={ttl})\n"
    )
}

pub fn local_address(row: &LocalAddressRow, format: Format, resolver: &mut dyn Resolver) -> String {
    let plain = Format { columns: Columns::Plain, ..format };
    let mut name = service_name(&row.service, plain, resolver);
    name.push(' ');
    format!("{name:<33} {}\n", row.addr)
}
