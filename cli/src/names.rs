//! Names of hosts and services, as the C library knows them, behind a trait so that tests have fixed ones.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

/// IP protocol numbers that have services.
const PROTOCOLS: [(u8, &str); 3] = [(6, "tcp"), (17, "udp"), (132, "sctp")];

pub trait Resolver {
    /// A host's first IPv4 address (`gethostbyname`).
    fn host_to_v4(&mut self, name: &str) -> Option<Ipv4Addr>;
    /// The name of an address (`gethostbyaddr`).
    fn addr_to_host(&mut self, addr: IpAddr) -> Option<String>;
    /// A service's port for an IP protocol number (`getservbyname`).
    fn service_to_port(&mut self, name: &str, proto: u8) -> Option<u16>;
    /// A port's service for an IP protocol number (`getservbyport`).
    fn port_to_service(&mut self, port: u16, proto: u8) -> Option<String>;
}

/// The text of /etc/services, looked up as the C library does: the first line that fits wins, names include aliases.
#[derive(Debug, Default)]
pub struct Services {
    by_name: BTreeMap<(u8, String), u16>,
    by_port: BTreeMap<(u8, u16), String>,
}

impl Services {
    /// Lines that make no sense are left out, as the C library does.
    pub fn parse(text: &str) -> Self {
        let mut services = Services::default();
        for line in text.lines() {
            services.add_line(line);
        }
        services
    }

    fn add_line(&mut self, line: &str) -> Option<()> {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let name = words.next()?;
        let (port, proto) = words.next()?.split_once('/')?;
        let port: u16 = port.parse().ok()?;
        let (number, _) = PROTOCOLS.into_iter().find(|(_, word)| *word == proto)?;
        self.by_port.entry((number, port)).or_insert_with(|| name.to_owned());
        for name in std::iter::once(name).chain(words) {
            self.by_name.entry((number, name.to_owned())).or_insert(port);
        }
        Some(())
    }

    pub fn port(&self, name: &str, proto: u8) -> Option<u16> {
        self.by_name.get(&(proto, name.to_owned())).copied()
    }

    pub fn name(&self, port: u16, proto: u8) -> Option<&str> {
        self.by_port.get(&(proto, port)).map(String::as_str)
    }
}

/// The system's own resolver. What it was asked once it remembers: a listing asks for the same names again and again.
#[derive(Debug, Default)]
pub struct SystemResolver {
    services: Option<Services>,
    hosts: BTreeMap<IpAddr, Option<String>>,
}

impl SystemResolver {
    pub fn new() -> Self {
        Self::default()
    }

    fn services(&mut self) -> &Services {
        self.services
            .get_or_insert_with(|| Services::parse(&std::fs::read_to_string("/etc/services").unwrap_or_default()))
    }
}

impl Resolver for SystemResolver {
    fn host_to_v4(&mut self, name: &str) -> Option<Ipv4Addr> {
        // An empty name would ask for the wildcard address.
        if name.is_empty() {
            return None;
        }
        dns_lookup::lookup_host(name).ok()?.into_iter().find_map(|addr| match addr {
            IpAddr::V4(v4) => Some(v4),
            IpAddr::V6(_) => None,
        })
    }

    fn addr_to_host(&mut self, addr: IpAddr) -> Option<String> {
        self.hosts
            .entry(addr)
            .or_insert_with(|| {
                // Without a name the C library gives the address back as text.
                let name = dns_lookup::lookup_addr(&addr).ok()?;
                name.parse::<IpAddr>().is_err().then_some(name)
            })
            .clone()
    }

    fn service_to_port(&mut self, name: &str, proto: u8) -> Option<u16> {
        self.services().port(name, proto)
    }

    fn port_to_service(&mut self, port: u16, proto: u8) -> Option<String> {
        self.services().name(port, proto).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# a comment\n\
        http\t\t80/tcp\t\twww\t\t# WorldWideWeb HTTP\n\
        domain\t53/tcp\n\
        domain\t53/udp\n\
        second\t80/tcp\n\
        broken\n\
        big 70000/tcp\n\
        odd 12/ddp\n";

    #[test]
    fn services_are_found_by_name_alias_and_port() {
        let services = Services::parse(TEXT);
        assert_eq!(services.port("http", 6), Some(80));
        assert_eq!(services.port("www", 6), Some(80));
        assert_eq!(services.port("http", 17), None);
        assert_eq!(services.port("domain", 17), Some(53));
        assert_eq!(services.name(80, 6), Some("http"));
        assert_eq!(services.name(53, 17), Some("domain"));
        assert_eq!(services.port("big", 6), None);
        assert_eq!(services.port("odd", 6), None);
    }
}
