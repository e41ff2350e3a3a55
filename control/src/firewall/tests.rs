use proptest::prelude::*;

use super::*;

const NFT: &str = include_str!("../../../testdata/firewall/nft-inet.json");
const NFT_OF_IPTABLES: &str = include_str!("../../../testdata/firewall/nft-of-iptables.json");
const IPTABLES: &str = include_str!("../../../testdata/firewall/iptables-nft.txt");
const IP6TABLES: &str = include_str!("../../../testdata/firewall/ip6tables-nft.txt");
const LEGACY: &str = include_str!("../../../testdata/firewall/iptables-legacy.txt");
const NFT_ARP: &str = include_str!("../../../testdata/firewall/nft-arp.json");
const ARPTABLES: &str = include_str!("../../../testdata/firewall/arptables-nft.txt");

fn read(readings: &[(Tool, &str)]) -> Rules {
    let readings: Vec<_> = readings.iter().map(|&(tool, text)| Reading { tool, text: text.into() }).collect();
    let (rules, problems) = Rules::read(&readings);
    assert_eq!(problems, []);
    rules
}

/// "10.0.0.1:80/tcp" or "[2001:db8::1]:53/udp".
fn vip(text: &str) -> Vip {
    let (socket, proto) = text.split_once('/').unwrap();
    let socket: std::net::SocketAddr = socket.parse().unwrap();
    Vip { addr: socket.ip(), proto: protocol_number(proto).unwrap(), port: socket.port() }
}

/// (chain, rule, effect) of every warning for one service.
fn warned(rules: &Rules, service: &str) -> Vec<(String, String, Effect)> {
    let service = vip(service);
    let warnings = rules.warnings(&[service]);
    assert!(warnings.iter().all(|w| w.services == [service]));
    warnings.into_iter().map(|w| (format!("{} {}", w.table, w.chain), w.rule, w.effect)).collect()
}

fn expect(rules: &Rules, service: &str, want: &[(&str, &str, Effect)]) {
    let got = warned(rules, service);
    let got: Vec<_> = got.iter().map(|(chain, rule, effect)| (chain.as_str(), rule.as_str(), *effect)).collect();
    assert_eq!(got, want, "{service}");
}

const INVALID: (&str, &str, Effect) =
    ("inet filter input", "ct state vmap { invalid : drop, new : continue }", Effect::Drop);
const POLICY: (&str, &str, Effect) = ("inet filter input", "policy drop", Effect::Drop);

#[test]
fn nft_rules_match_by_address_port_protocol_and_set() {
    let rules = read(&[(Tool::Nft, NFT)]);
    let by_source = ("inet filter input", "ip saddr 203.0.113.0/24 tcp flags syn tcp dport != 81 drop", Effect::Drop);
    // Port 22 is surely accepted by the verdict map: the policy is never reached.
    expect(&rules, "10.0.0.1:22/tcp", &[INVALID]);
    // The named set of the chain it jumps to accepts it.
    expect(&rules, "10.0.0.1:80/tcp", &[INVALID]);
    let map = "tcp dport vmap { 22 : accept, 80 : jump web, 8000-8999 : drop }";
    expect(&rules, "10.0.0.1:8500/tcp", &[INVALID, ("inet filter input", map, Effect::Drop)]);
    expect(&rules, "10.0.0.1:25/tcp", &[INVALID, ("inet filter input", "tcp dport vmap @verdicts", Effect::Drop)]);
    expect(&rules, "10.0.0.1:53/tcp", &[INVALID]);
    expect(&rules, "10.0.0.1:5500/udp", &[INVALID]);
    // A rate-limited accept is no sure one.
    expect(&rules, "10.0.0.1:9000/tcp", &[INVALID, by_source, POLICY]);
    expect(&rules, "10.0.0.1:81/tcp", &[INVALID, POLICY]);
    expect(&rules, "[2001:db8::9]:9000/tcp", &[INVALID, POLICY]);
    expect(&rules, "10.0.0.1:9/sctp", &[INVALID, ("inet filter input", "meta l4proto sctp drop", Effect::Drop)]);
    let blocked = ("inet filter input", "ip daddr @blocked drop", Effect::Drop);
    expect(&rules, "192.0.2.127:80/tcp", &[INVALID, blocked]);
    expect(&rules, "192.0.2.128:80/tcp", &[INVALID]);
    let rejected = (
        "inet filter input",
        "ip6 daddr { 2001:db8::1, 2001:db8:1::/48 } reject with icmpv6 port-unreachable",
        Effect::Reject,
    );
    expect(&rules, "[2001:db8:1::5]:80/tcp", &[INVALID, rejected]);
    let early = ("ip early pre", "udp dport 4000 drop", Effect::Drop);
    expect(&rules, "10.0.0.1:4000/udp", &[INVALID, POLICY, early]);
    expect(&rules, "[2001:db8::9]:4000/udp", &[INVALID, POLICY]);
}

#[test]
fn port_0_stands_for_every_port() {
    let rules = read(&[(Tool::Iptables, LEGACY)]);
    expect(&rules, "10.0.0.1:0/tcp", &[("filter INPUT", "-A INPUT -p tcp -m tcp --dport 22 -j DROP", Effect::Drop)]);
    expect(&rules, "10.0.0.1:0/udp", &[]);
    let all = read(&[(Tool::Iptables, "*filter\n:INPUT DROP [0:0]\n-A INPUT -p tcp --dport 1: -j ACCEPT\n")]);
    expect(&all, "10.0.0.1:0/tcp", &[]);
}

#[test]
fn iptables_rules_of_both_families() {
    for (tool, text, vip, other) in [
        (Tool::Iptables, IPTABLES, "10.0.0.1", "10.0.0.2"),
        (Tool::Ip6tables, IP6TABLES, "[2001:db8::1]", "[2001:db8::2]"),
    ] {
        let rules = read(&[(tool, text)]);
        let bare = vip.trim_matches(['[', ']']);
        let bits = if tool == Tool::Iptables { 32 } else { 128 };
        let policy = ("filter INPUT", "policy drop", Effect::Drop);
        // The chain it jumps to accepts this address.
        expect(&rules, &format!("{vip}:80/tcp"), &[]);
        expect(&rules, &format!("{vip}:8005/tcp"), &[]);
        let got = warned(&rules, &format!("{other}:443/tcp"));
        let chains: Vec<_> = got.iter().map(|(chain, _, effect)| (chain.as_str(), *effect)).collect();
        assert_eq!(chains, [("filter WEB", Effect::Reject)], "a sure reject, so the policy is out of reach");
        assert!(got[0].1.starts_with("-A WEB -j REJECT --reject-with icmp"), "{got:?}");

        let early = format!("-A PREROUTING -d {bare}/{bits} -p tcp -m tcp --dport 25 -j DROP");
        expect(&rules, &format!("{vip}:25/tcp"), &[("mangle PREROUTING", &early, Effect::Drop), policy]);
        expect(&rules, &format!("{other}:25/tcp"), &[policy]);
        let raw = ("raw PREROUTING", "-A PREROUTING -p udp -m udp --dport 4000:4999 -j DROP", Effect::Drop);
        expect(&rules, &format!("{vip}:4999/udp"), &[raw, policy]);
        expect(&rules, &format!("{vip}:53/udp"), &[policy]);
        let negated = format!("-A INPUT ! -d {bare}/{bits} -p udp -m udp --dport 53 -j DROP");
        expect(&rules, &format!("{other}:53/udp"), &[("filter INPUT", &negated, Effect::Drop)]);
    }
}

#[test]
fn the_other_familys_rules_are_not_asked() {
    let rules = read(&[(Tool::Iptables, IPTABLES), (Tool::Ip6tables, IP6TABLES)]);
    assert!(rules.warnings(&[vip("10.0.0.2:443/tcp")]).iter().all(|w| w.tool == Tool::Iptables));
    assert!(rules.warnings(&[vip("[2001:db8::2]:443/tcp")]).iter().all(|w| w.tool == Tool::Ip6tables));
}

#[test]
fn nothing_is_said_twice() {
    let texts = [(Tool::Iptables, IPTABLES), (Tool::Ip6tables, IP6TABLES)];
    let once = read(&texts);
    let mut with_nft = texts.to_vec();
    with_nft.extend([(Tool::Nft, NFT_OF_IPTABLES), (Tool::Iptables, IPTABLES), (Tool::Iptables, LEGACY)]);
    let more = read(&with_nft);
    let services = [vip("10.0.0.2:443/tcp"), vip("10.0.0.1:25/tcp"), vip("[2001:db8::1]:4000/udp")];
    assert!(!once.warnings(&services).is_empty());
    assert_eq!(once.warnings(&services), more.warnings(&services));
    let ssh = more.warnings(&[vip("10.0.0.1:22/tcp")]);
    assert!(ssh.iter().any(|w| w.rule.contains("--dport 22")), "the legacy variant has rules of its own: {ssh:?}");
    // Where only nft is there, its view of iptables' rules has to do.
    let nft_only = read(&[(Tool::Nft, NFT_OF_IPTABLES)]);
    let rules: Vec<_> = nft_only.warnings(&services[1..2]).into_iter().map(|w| w.rule).collect();
    assert_eq!(rules, ["policy drop", "ip daddr 10.0.0.1 tcp dport 25 drop"]);
}

#[test]
fn a_warning_reads_well() {
    let rules = read(&[(Tool::Iptables, LEGACY)]);
    let one = vip("10.0.0.1:22/tcp");
    let text = |vips: &[Vip]| rules.warnings(vips).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(
        text(&[one]),
        ["iptables table filter chain INPUT: `-A INPUT -p tcp -m tcp --dport 22 -j DROP` could drop packets for \
          10.0.0.1:22/tcp, but packets of a virtual service do not pass this chain"]
    );
    let many = text(&[one, vip("10.0.0.2:22/tcp"), vip("10.0.0.3:22/tcp"), vip("10.0.0.3:23/tcp")]);
    assert_eq!(many.len(), 1);
    assert!(many[0].contains("packets for 10.0.0.1:22/tcp and 2 more,"), "{many:?}");
}

#[test]
fn free_text_is_no_option() {
    let rules = read(&[(
        Tool::Iptables,
        "*filter\n:INPUT ACCEPT [0:0]\n\
         -A INPUT -m comment --comment \"-j DROP ! -p\" -j ACCEPT\n\
         -A INPUT -j DROP\n",
    )]);
    expect(&rules, "10.0.0.1:80/tcp", &[]);
}

#[test]
fn unknown_options_and_targets_are_taken_seriously() {
    let text = "*filter\n:INPUT ACCEPT [0:0]\n:LOOP - [0:0]\n\
        [5:300] -A INPUT -m set --match-set allowed src -j ACCEPT\n\
        -A INPUT -p tcp --tcp-flags SYN,ACK SYN -m hashlimit --hashlimit-above 5/sec --hashlimit-name x -j DROP\n\
        -A INPUT -g LOOP\n\
        -A INPUT -p tcp -j REJECT\n\
        -A LOOP -j NFQUEUE --queue-num 1\n";
    let rules = read(&[(Tool::Iptables, text)]);
    let got = warned(&rules, "10.0.0.1:80/tcp");
    assert_eq!(got.len(), 1, "the goto never comes back, so the reject is out of reach: {got:?}");
    assert!(got[0].1.contains("hashlimit"));
}

#[test]
fn chains_that_multiply_or_loop_come_to_an_end() {
    let mut text = String::from("*filter\n:INPUT ACCEPT [0:0]\n");
    for n in 0..16 {
        text.push_str(&format!(":C{n} - [0:0]\n"));
    }
    text.push_str("-A INPUT -j C0\n");
    for n in 0..16 {
        for _ in 0..8 {
            text.push_str(&format!("-A C{n} -j C{}\n", n + 1));
        }
    }
    let deep = read(&[(Tool::Iptables, &text)]);
    assert_eq!(warned(&deep, "10.0.0.1:80/tcp")[0].2, Effect::Unknown);
    let looping = read(&[(Tool::Iptables, "*filter\n:INPUT ACCEPT [0:0]\n:A - [0:0]\n-A INPUT -j A\n-A A -j A\n")]);
    assert_eq!(warned(&looping, "10.0.0.1:80/tcp")[0].2, Effect::Unknown);
}

#[test]
fn arp_rules_that_hide_a_vip() {
    let hides = |rules: &Rules, vip: &str, iif| rules.arp_hides(vip.parse().unwrap(), iif);
    let nft = read(&[(Tool::Nft, NFT_ARP)]);
    assert!(hides(&nft, "10.1.0.99", "va"));
    assert!(!hides(&nft, "10.1.0.100", "va"));
    assert!(hides(&nft, "10.1.0.98", "vb") && hides(&nft, "10.1.0.70", "vb"));
    assert!(nft.arp_rewrites("10.1.0.99".parse().unwrap(), "va"));
    assert!(!nft.arp_rewrites("10.1.0.98".parse().unwrap(), "va"));

    let arptables = read(&[(Tool::Arptables, ARPTABLES)]);
    assert!(hides(&arptables, "10.1.0.99", "vb"), "every interface");
    assert!(hides(&arptables, "10.1.0.5", "va") && !hides(&arptables, "10.3.0.5", "vb"));
    assert!(hides(&arptables, "10.4.0.5", "vb"), "a negated address");
    assert!(arptables.arp_rewrites("10.1.0.99".parse().unwrap(), "vb"));
    assert!(!arptables.arp_rewrites("10.1.0.98".parse().unwrap(), "vb"));
}

#[test]
fn an_arp_rule_that_may_not_be_reached_hides_nothing() {
    let hides = |input: &str| {
        let text = format!("*filter\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n{input}\n");
        read(&[(Tool::Arptables, &text)]).arp_hides("10.1.0.99".parse().unwrap(), "va")
    };
    assert!(hides("-A INPUT -d 10.1.0.99 -j DROP"));
    assert!(!hides("-A INPUT -j ACCEPT\n-A INPUT -d 10.1.0.99 -j DROP"));
    assert!(!hides("-A INPUT --src-mac 02:00:00:00:00:01 -j ACCEPT\n-A INPUT -d 10.1.0.99 -j DROP"));
    assert!(!hides("-A INPUT -s 10.1.0.1 -d 10.1.0.99 -j DROP"), "only for some who ask");
    assert!(!hides("-A INPUT -i vb -d 10.1.0.99 -j DROP"));
    assert!(!hides("-A OUTPUT -d 10.1.0.99 -j DROP"));
    // The names and options of the arptables before nf_tables.
    let old = "*filter\n:IN ACCEPT\n:OUT ACCEPT\n-A IN -d 10.1.0.99 -j DROP\n-A OUT -s 10.1.0.99 -j mangle --mangle-ip-s 10.1.0.2\n";
    let old = read(&[(Tool::Arptables, old)]);
    assert!(old.arp_hides("10.1.0.99".parse().unwrap(), "va") && old.arp_rewrites("10.1.0.99".parse().unwrap(), "va"));
}

#[test]
fn what_is_no_ruleset_is_an_error_and_what_is_odd_is_not() {
    let reading = |text: &str| Rules::read(&[Reading { tool: Tool::Nft, text: text.into() }]).1;
    assert_eq!(reading("{}")[0].to_string(), "cannot read the firewall rules of nft: no \"nftables\" list in the JSON");
    assert_eq!(reading("").len(), 1);
    assert_eq!(reading("{\"nftables\":[1,null,{\"chain\":3},{\"rule\":{\"expr\":[[],{}]}}]}"), []);
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic(text in "(?s)\\*filter\n:INPUT DROP\n(-A INPUT [-!a-z0-9:,/\"\\\\ .+]*\n){0,4}.*", cut in 0usize..9000) {
        let nft = NFT.get(..NFT.len().saturating_sub(cut)).unwrap_or_default();
        for tool in [Tool::Iptables, Tool::Ip6tables, Tool::Arptables] {
            let (rules, _) = Rules::read(&[Reading { tool, text: text.clone() }, Reading { tool: Tool::Nft, text: nft.into() }]);
            let _ = rules.warnings(&[vip("10.0.0.1:80/tcp"), vip("[2001:db8::1]:0/udp")]);
            let _ = rules.arp_hides("10.0.0.1".parse().unwrap(), "eth0");
        }
    }
}
