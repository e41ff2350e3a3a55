//! The JSON of `nft -j list ruleset` (libnftables-json(5)).
//!
//! Only a text that is no such JSON is an error; a statement or expression that is not known makes its rule a `Maybe`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use serde_json::Value;

use super::{Base, Chain, Family, Hook, Rule, Test, Tool, Verdict, prefix_range, protocol_number, range_of};

/// Elements of the named sets and maps, by (table with family, name).
type Sets<'a> = BTreeMap<(String, &'a str), &'a [Value]>;

/// All chains but those of NAT.
pub(super) fn parse(number: usize, text: &str) -> Result<Vec<Chain>, String> {
    let ruleset: Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
    let objects = ruleset.get("nftables").and_then(Value::as_array).ok_or("no \"nftables\" list in the JSON")?;
    let of_kind = |kind: &'static str| objects.iter().filter_map(move |object| object.get(kind));

    let mut sets = Sets::new();
    for set in of_kind("set").chain(of_kind("map")) {
        let elements = set.get("elem").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        sets.insert((table(set), string(set, "name")), elements);
    }
    let mut chains: Vec<Chain> = of_kind("chain").filter_map(|object| chain(number, object)).collect();
    let index: BTreeMap<(String, String), usize> =
        chains.iter().enumerate().map(|(at, c)| ((c.table.clone(), c.name.clone()), at)).collect();
    for object in of_kind("rule") {
        let table = table(object);
        let rule = rule(object, &table, &sets);
        if let Some(&at) = index.get(&(table, string(object, "chain").to_owned())) {
            chains[at].rules.push(rule);
        }
    }
    Ok(chains)
}

fn string<'a>(object: &'a Value, field: &str) -> &'a str {
    object.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn table(object: &Value) -> String {
    format!("{} {}", string(object, "family"), string(object, "table"))
}

fn chain(reading: usize, object: &Value) -> Option<Chain> {
    let family = match string(object, "family") {
        "ip" => Family::Ip,
        "ip6" => Family::Ip6,
        "inet" | "netdev" => Family::Inet,
        "arp" => Family::Arp,
        _ => return None,
    };
    if string(object, "type") == "nat" {
        return None;
    }
    let hook = match string(object, "hook") {
        "ingress" | "prerouting" | "input" => Some(Hook::In),
        "output" => Some(Hook::Out),
        _ => None,
    };
    let base = hook.map(|hook| Base { hook, drop_by_policy: string(object, "policy") == "drop" });
    let name = string(object, "name").to_owned();
    Some(Chain { reading, tool: Tool::Nft, family, table: table(object), name, base, rules: Vec::new() })
}

fn rule(object: &Value, table: &str, sets: &Sets<'_>) -> Rule {
    let statements = object.get("expr").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let mut rule = Rule { text: render_all(statements), tests: Vec::new(), verdicts: Vec::new() };
    for statement in statements {
        let Some((kind, body)) = statement.as_object().and_then(|fields| fields.iter().next()) else { continue };
        if let Some(verdict) = verdict(kind, body) {
            rule.verdicts.push((Vec::new(), verdict));
            continue;
        }
        match kind.as_str() {
            "match" => rule.tests.extend(matches(body, table, sets)),
            "vmap" => rule.verdicts.extend(verdict_map(body, table, sets)),
            "mangle" if field(body.get("key")).as_deref() == Some("arp saddr ip") => {
                rule.verdicts.push((Vec::new(), Verdict::Rewrite));
            }
            // These stop the rule for some packets.
            "limit" | "quota" | "ct count" => rule.tests.push(Test::Unknown),
            "xt" => xt(body, &mut rule),
            // Counters, logs, marks and the like: the packet goes on.
            _ => {}
        }
    }
    rule
}

/// A match or target of iptables that nft shows by name only.
fn xt(body: &Value, rule: &mut Rule) {
    match (string(body, "type"), string(body, "name")) {
        ("match", "comment") => {}
        ("match", _) => rule.tests.push(Test::Unknown),
        ("target", "REJECT") => rule.verdicts.push((Vec::new(), Verdict::Reject)),
        ("target", "TARPIT" | "DELUDE") => rule.verdicts.push((Vec::new(), Verdict::Drop)),
        _ => {}
    }
}

fn verdict(kind: &str, body: &Value) -> Option<Verdict> {
    let target = || string(body, "target").to_owned();
    Some(match kind {
        "accept" => Verdict::Accept,
        "drop" => Verdict::Drop,
        "reject" => Verdict::Reject,
        "return" => Verdict::Return,
        "jump" => Verdict::Jump(target()),
        "goto" => Verdict::Goto(target()),
        _ => return None,
    })
}

/// `tcp dport vmap { 22 : accept, 80 : jump web }`: each verdict with its own test.
fn verdict_map(body: &Value, table: &str, sets: &Sets<'_>) -> Vec<(Vec<Test>, Verdict)> {
    let Some(pairs) = elements(body.get("data"), table, sets) else { return Vec::new() };
    let of_pair = |pair: &Value| {
        let (key, action) = (pair.get(0)?, pair.get(1)?);
        let (kind, target) = action.as_object()?.iter().next()?;
        let tests = tests_for(field(body.get("key")).as_deref(), &[unwrap(key)]);
        Some((tests, verdict(kind, target)?))
    };
    pairs.iter().filter_map(of_pair).collect()
}

fn matches(body: &Value, table: &str, sets: &Sets<'_>) -> Vec<Test> {
    let not = match string(body, "op") {
        "==" | "in" => false,
        "!=" => true,
        _ => return vec![Test::Unknown],
    };
    let Some(values) = elements(body.get("right"), table, sets) else { return vec![Test::Unknown] };
    let values: Vec<&Value> = values.iter().map(unwrap).collect();
    let mut tests = tests_for(field(body.get("left")).as_deref(), &values);
    // What goes before the last test (it is IPv4, it is TCP) holds for a negated match too.
    if let Some(last) = tests.pop() {
        tests.push(last.not(not));
    }
    tests
}

/// What a match compares with: one value, the elements of a set, or those of a named set.
fn elements<'a>(right: Option<&'a Value>, table: &str, sets: &Sets<'a>) -> Option<&'a [Value]> {
    match right? {
        Value::String(name) if name.starts_with('@') => sets.get(&(table.to_owned(), &name[1..])).copied(),
        Value::Object(fields) if fields.contains_key("set") => match fields.get("set")? {
            Value::Array(list) => Some(list),
            one => Some(std::slice::from_ref(one)),
        },
        Value::Array(list) => Some(list),
        one => Some(std::slice::from_ref(one)),
    }
}

/// An element with a timeout or comment is wrapped: {"elem": {"val": ..., "timeout": ...}}.
fn unwrap(element: &Value) -> &Value {
    element.get("elem").and_then(|e| e.get("val")).unwrap_or(element)
}

/// "tcp dport", "ip daddr", "meta l4proto", ...; `None` for masks, concatenations and the like.
fn field(left: Option<&Value>) -> Option<String> {
    let left = left?;
    if let Some(payload) = left.get("payload") {
        return Some(format!("{} {}", payload.get("protocol")?.as_str()?, payload.get("field")?.as_str()?));
    }
    Some(format!("meta {}", left.get("meta")?.get("key")?.as_str()?))
}

/// Tests that all have to hold for the field to be one of the values.
fn tests_for(field: Option<&str>, values: &[&Value]) -> Vec<Test> {
    let known = field.and_then(|field| match field {
        "ip daddr" => Some(vec![Test::V4, Test::Dst(all(values, addresses)?)]),
        "ip6 daddr" => Some(vec![Test::V6, Test::Dst(all(values, addresses)?)]),
        "ip saddr" => Some(vec![Test::V4, Test::Unknown]),
        "ip6 saddr" => Some(vec![Test::V6, Test::Unknown]),
        "ip protocol" => Some(vec![Test::V4, Test::Proto(all(values, protocol)?)]),
        "ip6 nexthdr" => Some(vec![Test::V6, Test::Proto(all(values, protocol)?)]),
        "meta l4proto" => Some(vec![Test::Proto(all(values, protocol)?)]),
        "meta nfproto" | "meta protocol" => version(values),
        "meta iifname" | "meta iif" => Some(vec![Test::Iif(all(values, name)?)]),
        "meta oifname" | "meta oif" => Some(vec![Test::Oif(all(values, name)?)]),
        "th dport" => Some(vec![Test::Dport(all(values, ports)?)]),
        "arp htype" | "arp ptype" | "arp hlen" | "arp plen" => Some(vec![Test::Always]),
        "arp operation" => Some(vec![Test::ArpOp(all(values, arp_operation)?)]),
        "arp daddr ip" => Some(vec![Test::ArpTarget(all(values, addresses)?)]),
        "arp saddr ip" => Some(vec![Test::ArpSender(all(values, addresses)?)]),
        other => transport(other, values),
    });
    known.unwrap_or_else(|| vec![Test::Unknown])
}

/// A field of a transport header: its protocol, and its destination port where it is that.
fn transport(field: &str, values: &[&Value]) -> Option<Vec<Test>> {
    let (header, name) = field.split_once(' ')?;
    let proto = match header {
        "tcp" | "udp" | "sctp" | "dccp" | "udplite" | "icmp" | "icmpv6" | "igmp" | "esp" | "ah" => {
            protocol_number(header)?
        }
        _ => return None,
    };
    let own = if name == "dport" { Test::Dport(all(values, ports)?) } else { Test::Unknown };
    Some(vec![Test::Proto(vec![proto]), own])
}

fn version(values: &[&Value]) -> Option<Vec<Test>> {
    match values {
        [Value::String(name)] if name == "ipv4" || name == "ip" => Some(vec![Test::V4]),
        [Value::String(name)] if name == "ipv6" || name == "ip6" => Some(vec![Test::V6]),
        _ => None,
    }
}

fn all<T>(values: &[&Value], parse: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    values.iter().map(|value| parse(value)).collect()
}

fn addresses(value: &Value) -> Option<(IpAddr, IpAddr)> {
    if let Some(prefix) = value.get("prefix") {
        let length = u32::try_from(prefix.get("len")?.as_u64()?).ok()?;
        return Some(range_of(string(prefix, "addr").parse().ok()?, length));
    }
    if let Some(range) = value.get("range") {
        return Some((range.get(0)?.as_str()?.parse().ok()?, range.get(1)?.as_str()?.parse().ok()?));
    }
    prefix_range(value.as_str()?)
}

fn ports(value: &Value) -> Option<(u16, u16)> {
    let port = |value: &Value| value.as_u64().and_then(|n| u16::try_from(n).ok());
    match value.get("range") {
        Some(range) => Some((port(range.get(0)?)?, port(range.get(1)?)?)),
        None => port(value).map(|port| (port, port)),
    }
}

fn protocol(value: &Value) -> Option<u8> {
    match value {
        Value::String(name) => protocol_number(name),
        number => number.as_u64().and_then(|n| u8::try_from(n).ok()),
    }
}

fn arp_operation(value: &Value) -> Option<u16> {
    match value {
        Value::String(name) => match name.as_str() {
            "request" => Some(1),
            "reply" => Some(2),
            _ => None,
        },
        number => number.as_u64().and_then(|n| u16::try_from(n).ok()),
    }
}

fn name(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// A rule much as nft writes it; what this does not know, as compact JSON.
fn render_all(statements: &[Value]) -> String {
    let parts: Vec<String> = statements.iter().map(render_statement).filter(|part| !part.is_empty()).collect();
    parts.join(" ")
}

fn render_statement(statement: &Value) -> String {
    let Some((kind, body)) = statement.as_object().and_then(|fields| fields.iter().next()) else {
        return statement.to_string();
    };
    match kind.as_str() {
        "match" => {
            let op = match string(body, "op") {
                "==" | "in" => String::new(),
                op => format!("{op} "),
            };
            format!("{} {op}{}", render(body.get("left")), render(body.get("right")))
        }
        "vmap" => format!("{} vmap {}", render(body.get("key")), render(body.get("data"))),
        "accept" | "drop" | "return" | "continue" => kind.clone(),
        "jump" | "goto" => format!("{kind} {}", string(body, "target")),
        "reject" => match (string(body, "type"), string(body, "expr")) {
            ("", _) => "reject".into(),
            (kind, "") => format!("reject with {kind}"),
            (kind, code) => format!("reject with {kind} {code}"),
        },
        "counter" => String::new(),
        "log" => "log".into(),
        "xt" => format!("xt {} {}", string(body, "type"), string(body, "name")),
        _ => statement.to_string(),
    }
}

fn render(value: Option<&Value>) -> String {
    let Some(value) = value else { return String::new() };
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(|v| render(Some(v))).collect::<Vec<_>>().join(","),
        Value::Object(fields) => match fields.iter().next().map(|(kind, body)| (kind.as_str(), body)) {
            Some(("payload", _)) => field(Some(value)).unwrap_or_else(|| value.to_string()),
            Some(("meta", body)) => match string(body, "key") {
                key @ ("iifname" | "oifname" | "iif" | "oif" | "mark") => key.into(),
                key => format!("meta {key}"),
            },
            Some(("ct", body)) => format!("ct {}", string(body, "key")),
            Some(("prefix", body)) => format!("{}/{}", string(body, "addr"), render(body.get("len"))),
            Some(("range", body)) => format!("{}-{}", render(body.get(0)), render(body.get(1))),
            Some(("set", Value::Array(list))) => {
                let mut text = String::from("{ ");
                for (number, element) in list.iter().enumerate() {
                    let comma = if number == 0 { "" } else { ", " };
                    let shown = match element {
                        Value::Array(pair) if pair.len() == 2 => {
                            format!(
                                "{} : {}",
                                render(pair.first()),
                                pair.get(1).map(render_statement).unwrap_or_default()
                            )
                        }
                        element => render(Some(unwrap(element))),
                    };
                    // Writing to a String can't fail.
                    let _ = write!(text, "{comma}{shown}");
                }
                text + " }"
            }
            _ => value.to_string(),
        },
        other => other.to_string(),
    }
}
