use proptest::prelude::*;
use rvs_datapath::trace::{self, HEAD};
use rvs_datapath::verdict::Verdict;

use super::*;
use crate::api::{Probe, ProbeProto};
use crate::headers::{Headers, frame};
use crate::net::Mac;

fn probe(proto: ProbeProto, from: &str, to: &str) -> Vec<u8> {
    let end = |text: &str| text.parse::<SocketAddr>().map(|a| (a.ip(), a.port())).unwrap();
    frame(&Probe { proto, from: end(from), to: end(to), flags: 2, interface: None }, Mac([2; 6])).unwrap()
}

fn web() -> ServiceId {
    ServiceId::Virtual { proto: Proto::Tcp, addr: "198.51.100.100".parse().unwrap(), port: 80 }
}

fn holds(filter: &str, frame: &[u8], reason: Reason) -> bool {
    let headers = Headers::read(frame).unwrap();
    let dest = DestId { addr: "203.0.113.101".parse().unwrap(), port: 8080 };
    let seen = Seen { packet: headers.packet.as_ref(), reason, service: Some(web()), dest: Some(dest) };
    Filter::parse(filter).unwrap().matches(seen)
}

#[test]
fn it_says_what_it_says() {
    let syn = probe(ProbeProto::Tcp, "192.0.2.7:40000", "198.51.100.100:80");
    let dns = probe(ProbeProto::Udp, "[2001:db8::7]:40000", "[2001:db8::8]:53");
    let ping = probe(ProbeProto::Icmp, "192.0.2.7:0", "198.51.100.100:0");
    for (filter, by) in [
        ("", [true, true, true]),
        ("tcp", [true, false, false]),
        ("ip6", [false, true, false]),
        ("icmp or udp", [false, true, true]),
        ("sctp or sctp port 80", [false, false, false]),
        ("host 192.0.2.7", [true, false, true]),
        ("src host 198.51.100.100", [false, false, false]),
        ("dst 198.51.100.100 and not port 80", [false, false, true]),
        ("net 192.0.2.0/24 && tcp", [true, false, false]),
        ("src net 2001:db8::/32", [false, true, false]),
        ("port 80", [true, false, false]),
        ("src port 40000", [true, true, false]),
        ("tcp dst port 80", [true, false, false]),
        ("portrange 50-60", [false, true, false]),
        ("proto 17", [false, true, false]),
        ("not (tcp or udp)", [false, false, true]),
        ("! tcp and ! udp", [false, false, true]),
        ("udp or tcp and port 81", [false, true, false]),
        ("reason no_route", [true, true, true]),
        ("reason dr,nat", [false, false, false]),
        ("dropped and not reason table_full", [true, true, true]),
        ("forwarded or passed or answered", [false, false, false]),
        ("service tcp:198.51.100.100:80", [true, true, true]),
        ("service udp:198.51.100.100:80", [false, false, false]),
        ("dest 203.0.113.101", [true, true, true]),
        ("dest 203.0.113.101:8081", [false, false, false]),
    ] {
        for (frame, is) in [&syn, &dns, &ping].into_iter().zip(by) {
            assert_eq!(holds(filter, frame, Reason::NoRoute), is, "{filter:?} of {:?}", Headers::read(frame));
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (filter, error) in [
        ("prot 80", "\"prot\" where a condition (host, net, port, tcp, reason, ...) should be"),
        ("port http", "\"http\" where a port should be"),
        ("port", "the filter ends where a port should follow"),
        ("(tcp", "the filter ends where a closing parenthesis should follow"),
        ("tcp udp", "\"udp\" where and, or, or the end should be"),
        ("host 192.0.2.0/24", "\"192.0.2.0/24\" where an address should be"),
        ("net 192.0.2.0/33", "\"192.0.2.0/33\" where a network (ADDRESS/BITS) should be"),
        ("portrange 9-8", "\"9-8\" where two ports (PORT-PORT) should be"),
        ("reason lost", "\"lost\" is no reason: see rvs drops --json for all of them"),
        ("src reason dr", "\"reason\" where a condition (host, net, port, tcp, reason, ...) should be"),
        ("service 198.51.100.100:80", "\"198.51.100.100:80\" where a service (tcp:ADDRESS:PORT) should be"),
    ] {
        assert_eq!(Filter::parse(filter).unwrap_err().to_string(), error, "{filter}");
    }
    assert_eq!(Filter::parse(&"(".repeat(100)), Err(FilterError::TooDeep));
    assert_eq!(Filter::parse(&"x".repeat(5000)), Err(FilterError::TooLong(5000)));
}

#[test]
fn the_data_plane_looks_at_what_is_cheap() {
    let look = |text| Filter::parse(text).unwrap().first_look();
    let all = Trace { reasons: [u64::MAX; 2], ..Trace::default() };
    assert_eq!(look(""), all);
    assert_eq!(look("tcp port 80"), Trace { protocol: 6, port: 80, ..all });
    let net = look("net 10.0.0.0/8 and reason dr");
    assert_eq!((net.reasons, net.family, net.address[0], net.mask[..2].to_vec()), ([1, 0], 4, 10, vec![255, 0]));
    assert_eq!(look("host 10.0.0.1 or port 80"), all);
    assert_eq!(look("service tcp:198.51.100.100:80"), Trace { protocol: 6, family: 4, ..all });
    assert_eq!(look("not reason dr").reasons, [!1, u64::MAX]);
}

fn term() -> impl Strategy<Value = String> {
    let host = prop_oneof![Just("192.0.2.7"), Just("198.51.100.100"), Just("2001:db8::7"), Just("10.0.0.1")];
    prop_oneof![
        host.clone().prop_map(|h| format!("host {h}")),
        host.prop_map(|h| format!("src {h}")),
        Just("net 192.0.0.0/8".to_owned()),
        Just("net 2001::/16".to_owned()),
        (79..82u16).prop_map(|p| format!("port {p}")),
        (79..82u16).prop_map(|p| format!("tcp dst port {p}")),
        prop_oneof![Just("tcp"), Just("udp"), Just("icmp"), Just("ip"), Just("ip6"), Just("dropped")]
            .prop_map(str::to_owned),
        Just("reason dr,no_route".to_owned()),
        Just("service tcp:198.51.100.100:80".to_owned()),
    ]
}

fn expression() -> impl Strategy<Value = String> {
    term().prop_recursive(4, 16, 2, |inner| {
        prop_oneof![
            inner.clone().prop_map(|a| format!("not ({a})")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} and {b})")),
            (inner.clone(), inner).prop_map(|(a, b)| format!("({a}) or ({b})")),
        ]
    })
}

proptest! {
    /// The data plane never leaves out what the filter is for.
    #[test]
    fn the_first_look_lets_all_of_it_pass(
        text in expression(), kind in 0..3, v6: bool, ports in [79..82u16, 79..82u16], reason in 0..Reason::ALL.len(),
    ) {
        let proto = [ProbeProto::Tcp, ProbeProto::Udp, ProbeProto::Icmp][kind as usize];
        let [from, to] = if v6 { ["[2001:db8::7]", "[2001:db8::8]"] } else { ["192.0.2.7", "198.51.100.100"] };
        let frame = probe(proto, &format!("{from}:{}", ports[0]), &format!("{to}:{}", ports[1]));
        let reason = Reason::ALL[reason];
        let mut head = [0; HEAD];
        let n = frame.len().min(HEAD);
        head[..n].copy_from_slice(&frame[..n]);
        let look = Trace { until_s: 1, ..Filter::parse(&text).unwrap().first_look() };
        let service = matches!((proto, v6), (ProbeProto::Tcp, false)).then(web);
        let ends = Headers::read(&frame).unwrap().packet;
        let seen = Seen { packet: ends.as_ref(), reason, service, dest: None };
        if Filter::parse(&text).unwrap().matches(seen) {
            prop_assert!(trace::matches(&look, 0, &head, Verdict::from_word(reason as u64)), "{} {:?}", text, look);
        }
    }

    #[test]
    fn any_text_is_a_filter_or_an_error(text: String) {
        let _ = Filter::parse(&text);
    }
}
