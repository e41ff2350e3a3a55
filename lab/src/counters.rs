//! The kernel's own counters of a namespace: what it forwarded, and what its sockets got.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::netns::Netns;

/// Counters of one namespace, both families.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kernel {
    /// Packets forwarded by the kernel itself: `Ip: ForwDatagrams` and `Ip6OutForwDatagrams`.
    pub forwarded: [u64; 2],
    /// TCP segments handed to TCP, both families (one more after merging counts as one): `Tcp: InSegs`.
    pub tcp_in: u64,
    /// UDP datagrams handed to sockets: `Udp: InDatagrams` and `Udp6InDatagrams`.
    pub udp_in: [u64; 2],
}

impl Kernel {
    /// Reads them. Fails when the namespace can't be entered or the kernel tells less than that.
    pub fn read(ns: &Netns) -> Result<Self> {
        let v4 = snmp(&ns.proc_net("snmp")?);
        let v6 = snmp6(&ns.proc_net("snmp6")?);
        let of = |table: &BTreeMap<String, u64>, name: &str| {
            table.get(name).copied().ok_or_else(|| {
                Error::unexpected(format!("{}: /proc/net/snmp", ns.name()), format!("no counter {name}"))
            })
        };
        Ok(Self {
            forwarded: [of(&v4, "Ip.ForwDatagrams")?, of(&v6, "Ip6OutForwDatagrams")?],
            tcp_in: of(&v4, "Tcp.InSegs")?,
            udp_in: [of(&v4, "Udp.InDatagrams")?, of(&v6, "Udp6InDatagrams")?],
        })
    }
}

/// Pairs of lines: `Ip: Name Name ...`, then `Ip: 1 2 ...`.
fn snmp(text: &str) -> BTreeMap<String, u64> {
    let lines: Vec<&str> = text.lines().collect();
    let mut table = BTreeMap::new();
    for [names, values] in lines.as_chunks().0 {
        let (mut names, mut values) = (names.split_whitespace(), values.split_whitespace());
        let (Some(kind), Some(same)) = (names.next(), values.next()) else { continue };
        if kind == same {
            let kind = kind.trim_end_matches(':');
            // Some values are negative (Tcp: MaxConn is -1): none of ours.
            table.extend(
                names.zip(values).filter_map(|(name, value)| Some((format!("{kind}.{name}"), value.parse().ok()?))),
            );
        }
    }
    table
}

/// `Name value` a line.
fn snmp6(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .filter_map(|(n, v)| Some((n.to_owned(), v.trim().parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_are_read() {
        let table = snmp("Ip: Forwarding ForwDatagrams\nIp: 1 42\nTcp: MaxConn InSegs\nTcp: -1 7\nUdp: InDatagrams\n");
        assert_eq!(table.get("Ip.ForwDatagrams"), Some(&42));
        assert_eq!(table.get("Tcp.InSegs"), Some(&7));
        assert_eq!(table.get("Tcp.MaxConn"), None);
        assert_eq!(table.get("Udp.InDatagrams"), None, "names without values");
        assert_eq!(snmp6("Ip6OutForwDatagrams    \t9\n").get("Ip6OutForwDatagrams"), Some(&9));
    }
}
