//! What operators are told, against what the code says.

use std::collections::BTreeSet;

use rvs_datapath::verdict::{Kind, Reason};

fn drops() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/drops.md")).expect("docs/drops.md")
}

/// Names that begin a table row or are a heading, by the section that they are in.
fn explained(text: &str) -> BTreeSet<(&str, &str)> {
    let mut section = "";
    let mut found = BTreeSet::new();
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title;
        }
        let name = line.strip_prefix("| `").or_else(|| line.strip_prefix("### `"));
        if let Some((name, _)) = name.and_then(|rest| rest.split_once('`')) {
            assert!(found.insert((section, name)), "{name} is explained twice");
        }
    }
    found
}

#[test]
fn every_reason_is_explained_where_it_belongs() {
    let section = |reason: &Reason| match reason.kind() {
        Kind::Forward => "Forwarded",
        Kind::Answer => "Answered by the director",
        Kind::Pass => "Passed to the kernel",
        Kind::Held => "Held by rvsd",
        Kind::Drop => "Dropped",
    };
    let there_are: BTreeSet<(&str, &str)> = Reason::ALL.iter().map(|r| (section(r), r.name())).collect();
    let text = drops();
    let explained = explained(&text);
    let missing: Vec<_> = there_are.difference(&explained).collect();
    let unknown: Vec<_> = explained.difference(&there_are).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "docs/drops.md lacks {missing:?}, and has {unknown:?}");
}
