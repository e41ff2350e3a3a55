//! Services and dests in the words of the maps.

use std::net::IpAddr;

use rvs_datapath::abi::{self, dest as flag, service as service_flag, tunnel};

use crate::model::{Family, FwdMethod, Granularity, Service, ServiceKey, TunnelChecksum, TunnelKind};

/// An address as `abi` has it.
pub fn bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&a.octets());
            bytes
        }
        IpAddr::V6(a) => a.octets(),
    }
}

/// The way back.
pub fn address(bytes: &[u8; 16], v6: bool) -> IpAddr {
    if v6 { IpAddr::from(*bytes) } else { IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]) }
}

pub(super) fn abi_key(key: &ServiceKey) -> abi::ServiceKey {
    let family = |f: Family| if f == Family::V4 { 4 } else { 6 };
    match key {
        ServiceKey::Virtual { proto, addr, port } => abi::ServiceKey {
            address: bytes(*addr),
            port: *port,
            protocol: proto.number(),
            family: family(Family::of(addr)),
        },
        ServiceKey::Fwmark { mark, family: f } => {
            let mut address = [0; 16];
            address[..4].copy_from_slice(&mark.to_ne_bytes());
            abi::ServiceKey { address, port: 0, protocol: 0, family: family(*f) }
        }
    }
}

/// The settings of a service in its record; list, table, serial and whether its cookies work stay.
pub(super) fn describe(record: &mut abi::Service, service: &Service, key: &ServiceKey, local: bool) {
    let c = &service.config;
    let flags = |on: bool, bit: u32| if on { bit } else { 0 };
    let bits = u32::from(c.sched_flags.bits());
    record.flags = record.flags & service_flag::ASKS
        | flags(bits & 1 != 0, service_flag::HASH_FALLBACK)
        | flags(bits & 2 != 0, service_flag::HASH_PORT)
        | flags(bits & 4 != 0, service_flag::FLAG_3)
        | flags(c.one_packet, service_flag::ONE_PACKET)
        | flags(service.proxy, service_flag::PROXY)
        | flags(local, service_flag::LOCAL);
    record.cookies = service.defence.cookies_above.map_or(0, |above| above.saturating_add(1));
    record.rate = service.defence.rate;
    record.source_rate = service.defence.source_rate;
    record.scheduler = c.scheduler.map_or(0, |s| s as u32);
    record.persistence_s = c.persistence_s.unwrap_or(0);
    record.netmask = match c.granularity {
        Granularity::V4(mask) => u32::from_ne_bytes(mask.octets()),
        Granularity::V6(prefix) => u32::from(prefix),
    };
    record.engine = [0; 16];
    if let Some(engine) = c.engine {
        let name = engine.name().as_bytes();
        record.engine[..name.len()].copy_from_slice(name);
    }
    record.key = abi_key(key);
}

/// `cookies`: may the service's SYNs be answered with cookies? `proxy`: is the server told of its clients by PROXY headers?
pub(super) fn method_bits(method: FwdMethod, cookies: bool, proxy: bool) -> u32 {
    let header = if proxy { flag::PROXY } else { 0 };
    match method {
        // Sequence numbers are the connection's own then.
        FwdMethod::Masq if cookies || proxy => flag::FULLNAT | flag::OWN | header,
        FwdMethod::Masq => flag::MASQ,
        FwdMethod::Local => flag::LOCAL_NODE,
        FwdMethod::Tunnel(_) => flag::TUNNEL,
        FwdMethod::Route => flag::ROUTE,
        FwdMethod::Fullnat => flag::FULLNAT | header,
    }
}

/// How a dest's packets are wrapped; from where is not known yet.
pub(super) fn tunnel_record(method: FwdMethod) -> abi::Tunnel {
    match method {
        FwdMethod::Tunnel(t) => abi::Tunnel {
            port: t.port,
            kind: tunnel_kind(t.kind),
            flags: tunnel_checksum(t.checksum),
            ..abi::Tunnel::default()
        },
        _ => abi::Tunnel::default(),
    }
}

fn tunnel_kind(kind: TunnelKind) -> u8 {
    match kind {
        TunnelKind::Ipip => tunnel::IPIP,
        TunnelKind::Gue => tunnel::GUE,
        TunnelKind::Gre => tunnel::GRE,
    }
}

fn tunnel_checksum(checksum: TunnelChecksum) -> u8 {
    match checksum {
        TunnelChecksum::None => 0,
        TunnelChecksum::Csum => tunnel::CSUM,
        TunnelChecksum::Remcsum => tunnel::REMCSUM,
    }
}
