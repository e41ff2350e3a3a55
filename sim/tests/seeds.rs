//! 200 seeds, or the one of RVS_SIM_SEED.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use rvs_sim::Report;

const SEEDS: u64 = 200;
const STREAMS: u64 = 1500;

#[test]
fn no_seed_breaks_an_invariant() {
    if let Ok(seed) = std::env::var("RVS_SIM_SEED") {
        let seed = seed.parse().expect("RVS_SIM_SEED is a number");
        match rvs_sim::run(seed) {
            Ok(report) => println!("seed {seed}: {report:?}"),
            Err(failure) => panic!("{failure}"),
        }
        return;
    }
    let mut sum = Report::default();
    let mut failures = Vec::new();
    for seed in 0..SEEDS {
        match rvs_sim::run(seed) {
            Ok(report) => sum = add(sum, report),
            Err(failure) => failures.push(failure.to_string()),
        }
    }
    println!("{sum:?}");
    assert!(failures.is_empty(), "{} of {SEEDS} seeds failed:\n{}", failures.len(), failures.join("\n"));
    // Something must have happened for nothing to have gone wrong.
    let each = |n: u64| n / SEEDS;
    assert!(each(sum.packets) > 500 && each(sum.replies) > 200, "{sum:?}");
    assert!(each(sum.finished) > 2 && each(sum.renewed) > 2 && each(sum.lost) > 20 && sum.answers > SEEDS, "{sum:?}");
}

/// Connections with PROXY headers: each stream arrives whole behind its header, or is reset.
#[test]
fn streams_with_headers_arrive_whole() {
    let only = std::env::var("RVS_SIM_SEED").ok().map(|seed| seed.parse().expect("RVS_SIM_SEED is a number"));
    let seeds = only.map_or(0..STREAMS, |seed: u64| seed..seed + 1);
    let (mut failures, mut resets, mut sum) = (Vec::new(), 0, rvs_sim::streams::Told::default());
    for seed in seeds.clone() {
        match rvs_sim::streams::run(seed) {
            Ok(told) => {
                resets += u64::from(told.reset);
                sum.packets += told.packets;
                sum.lost += told.lost;
                sum.headers += told.headers;
                sum.up += told.up;
                sum.down += told.down;
            }
            Err(failure) => failures.push(failure),
        }
    }
    println!("{sum:?}, {resets} resets");
    let first: String = failures.iter().take(5).map(|f| format!("{f}\n")).collect();
    assert!(failures.is_empty(), "{} failed (RVS_SIM_SEED replays one):\n{first}", failures.len());
    if only.is_none() {
        assert!(resets > STREAMS / 20 && sum.lost > 10 * STREAMS && sum.headers > STREAMS, "{sum:?}");
    }
}

fn add(a: Report, b: Report) -> Report {
    Report {
        packets: a.packets + b.packets,
        replies: a.replies + b.replies,
        finished: a.finished + b.finished,
        renewed: a.renewed + b.renewed,
        lost: a.lost + b.lost,
        answers: a.answers + b.answers,
    }
}

#[test]
fn a_seed_is_replayed_to_the_same_end() {
    let runs = [7, 7].map(|seed| format!("{:?}", rvs_sim::run(seed)));
    assert_eq!(runs[0], runs[1]);
}
