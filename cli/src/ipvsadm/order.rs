//! The order of a sorted listing. Stock ipvsadm compares by subtracting in an `int`, which wraps: 192.168.0.1 comes
//! before 10.0.0.1, and three addresses can go in a circle. The order then depends on how the C library's merge sort
//! compares, so that is what this does.

use std::net::IpAddr;

use rvs_control::api::{DestId, Family, Proto, ServiceId};

/// How `a` compares to `b` in C: negative, zero or positive.
type Compare<T> = fn(&T, &T) -> i32;

/// glibc's `qsort`: a merge sort from the top down, first half the smaller one, stable.
pub fn merge_sort<T>(items: Vec<T>, compare: Compare<T>) -> Vec<T> {
    if items.len() < 2 {
        return items;
    }
    let mut first = items;
    let second = first.split_off(first.len() / 2);
    let mut first = merge_sort(first, compare).into_iter().peekable();
    let mut second = merge_sort(second, compare).into_iter().peekable();
    let mut merged = Vec::with_capacity(first.len() + second.len());
    while let (Some(a), Some(b)) = (first.peek(), second.peek()) {
        let next = if compare(a, b) <= 0 { first.next() } else { second.next() };
        merged.extend(next);
    }
    merged.extend(first);
    merged.extend(second);
    merged
}

/// By mark, family, protocol, address and port (`ipvs_cmp_services`).
pub fn compare_services(a: &ServiceId, b: &ServiceId) -> i32 {
    let (a, b) = (ServiceFields::of(a), ServiceFields::of(b));
    let differences = [wrapping(a.mark, b.mark), a.family - b.family, a.proto - b.proto, addresses(a.addr, b.addr)];
    first_difference(differences, a.port, b.port)
}

/// By address and port (`ipvs_cmp_dests`).
pub fn compare_dests(a: &DestId, b: &DestId) -> i32 {
    first_difference([addresses(a.addr, b.addr)], a.port, b.port)
}

fn first_difference<const N: usize>(differences: [i32; N], a_port: u16, b_port: u16) -> i32 {
    let ports = i32::from(a_port) - i32::from(b_port);
    differences.into_iter().find(|d| *d != 0).unwrap_or(ports)
}

struct ServiceFields {
    mark: u32,
    family: i32,
    proto: i32,
    addr: IpAddr,
    port: u16,
}

impl ServiceFields {
    fn of(id: &ServiceId) -> Self {
        // AF_INET and AF_INET6 of Linux; a mark counts as TCP.
        let family = match id.family() {
            Family::V4 => 2,
            Family::V6 => 10,
        };
        match *id {
            ServiceId::Virtual { proto, addr, port } => {
                let proto = match proto {
                    Proto::Tcp => 6,
                    Proto::Udp => 17,
                    Proto::Sctp => 132,
                };
                ServiceFields { mark: 0, family, proto, addr, port }
            }
            ServiceId::Fwmark { mark, .. } => {
                let addr = IpAddr::from([0_u8; 4]);
                ServiceFields { mark, family, proto: 6, addr, port: 0 }
            }
        }
    }
}

fn wrapping(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b).cast_signed()
}

/// Word by word as the first one's family has them; an IPv4 address is one word and three zeros.
fn addresses(a: IpAddr, b: IpAddr) -> i32 {
    let count = if a.is_ipv6() { 4 } else { 1 };
    let pairs = words(a).into_iter().zip(words(b)).take(count);
    pairs.map(|(a, b)| wrapping(a, b)).find(|d| *d != 0).unwrap_or(0)
}

fn words(addr: IpAddr) -> [u32; 4] {
    match addr {
        IpAddr::V4(v4) => [v4.to_bits(), 0, 0, 0],
        IpAddr::V6(v6) => {
            let bits = v6.to_bits();
            [96, 64, 32, 0].map(|shift| (bits >> shift & 0xffff_ffff) as u32)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(dests: &[&str]) -> Vec<String> {
        let ids = dests.iter().map(|d| DestId { addr: d.parse().unwrap(), port: 80 }).collect();
        merge_sort(ids, compare_dests).into_iter().map(|id| id.addr.to_string()).collect()
    }

    #[test]
    fn differences_wrap_as_an_int_does() {
        assert_eq!(sorted(&["10.0.0.1", "192.168.0.1"]), ["192.168.0.1", "10.0.0.1"]);
        assert_eq!(sorted(&["10.0.0.2", "10.0.0.1", "127.0.0.1"]), ["10.0.0.1", "10.0.0.2", "127.0.0.1"]);
        assert_eq!(sorted(&["8.8.8.8", "fd00:5::11"]), ["fd00:5::11", "8.8.8.8"]);
    }

    #[test]
    fn a_circle_of_comparisons_keeps_every_entry() {
        let circle = ["0.0.0.1", "128.0.0.0", "64.0.0.0", "192.0.0.0", "1.2.3.4", "200.0.0.1"];
        let mut out = sorted(&circle);
        out.sort();
        let mut all: Vec<String> = circle.iter().map(|s| (*s).to_owned()).collect();
        all.sort();
        assert_eq!(out, all);
    }

    #[test]
    fn marks_above_two_thousand_million_come_first() {
        let mark = |mark| ServiceId::Fwmark { mark, family: Family::V4 };
        let tcp = ServiceId::Virtual { proto: Proto::Tcp, addr: "1.2.3.4".parse().unwrap(), port: 80 };
        assert_eq!(merge_sort(vec![tcp, mark(7), mark(u32::MAX)], compare_services), [mark(u32::MAX), tcp, mark(7)]);
    }
}
