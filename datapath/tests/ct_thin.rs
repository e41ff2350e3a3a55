//! drop_entry: who goes, how soon, and that the counters go along.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod ct_common;

use ct_common::Crowd;
use rvs_datapath::conn::{self, Conns};
use rvs_datapath::ct::{self, Seed, V4};
use rvs_datapath::proto::tcp::{ESTABLISHED, FIN_WAIT, SYN_RECV};

const SEED: Seed = Seed([3, 5, 7, 11, 13, 17]);

/// A table in which every flow of a crowd is in this state, its client's packets so many; and the crowd.
fn table(state: u64, udp: u32, packets: u32) -> (Crowd<V4>, rvs_datapath::mem::MemConns<V4>) {
    let crowd = Crowd::<V4>::new(SEED, 64, 100, udp, 1);
    let t = crowd.table();
    t.set_now(1000);
    for flow in &crowd.flows {
        let state = if udp > 0 { 0 } else { state };
        assert!(conn::open_forward::<V4, _>(&t, &flow.key, 1, state, 0).is_new());
        for _ in 1..packets {
            let ct::Found::Live(hit) = ct::lookup::<V4, _>(t.table(), &flow.key) else { panic!("it is there") };
            let _ = conn::touch::<V4, _, _>(&t, &hit, &flow.key.words, true, |s| s);
        }
    }
    (crowd, t)
}

/// Flows left after this many sweeps, with the clock standing `idle_s` after the last packet.
fn left(state: u64, udp: u32, packets: u32, idle_s: u32, sweeps: u32) -> usize {
    let (crowd, t) = table(state, udp, packets);
    t.set_now(1000 + idle_s);
    (0..sweeps).for_each(|sweep| t.thin(sweep));
    assert_eq!(t.counted(1), t.recount(1));
    crowd.entries(&t).len()
}

#[test]
fn half_open_ones_go_in_thirty_two_seconds() {
    assert_eq!(left(SYN_RECV, 0, 1, 0, 16), 0);
    // A 32nd of the table a second.
    let after_two_seconds = left(SYN_RECV, 0, 1, 0, 1);
    assert!((85..=99).contains(&after_two_seconds), "{after_two_seconds}");
}

#[test]
fn established_ones_go_if_they_did_little_and_are_idle() {
    assert_eq!(left(ESTABLISHED, 0, 1, 59, 64), 100);
    assert_eq!(left(ESTABLISHED, 0, 1, 61, 16), 0);
    // One in two, one in three, and none of more.
    for (packets, one_in) in [(2, 2), (3, 3)] {
        let gone = 100 - left(ESTABLISHED, 0, packets, 61, 16);
        assert!((100 / one_in / 2..=100 / one_in * 3 / 2).contains(&gone), "{packets} packets: {gone}");
        assert_eq!(left(ESTABLISHED, 0, packets, 61, 16 * one_in as u32), 0);
    }
    assert_eq!(left(ESTABLISHED, 0, 4, 800, 160), 100);
    assert_eq!(left(FIN_WAIT, 0, 1, 100, 160), 100);
}

#[test]
fn of_udp_some_go_that_are_idle() {
    assert_eq!(left(0, 1, 1, 59, 160), 100);
    let gone = 100 - left(0, 1, 1, 61, 16);
    assert!((3..=25).contains(&gone), "{gone}");
    assert_eq!(left(0, 1, 1, 61, 16 * 8), 0);
}

/// A flood of handshakes that are made up does not take the place of who has proved its address.
#[test]
fn who_has_proved_its_address_is_in_use_from_the_first_packet() {
    let crowd = Crowd::<V4>::new(SEED, 64, 2, 0, 1);
    let t = crowd.table();
    t.set_now(1000);
    for (flow, (marks, class)) in
        crowd.flows.iter().zip([(0, conn::class::FEW_PACKETS), (conn::PROVEN, conn::class::ESTABLISHED)])
    {
        assert!(conn::open_forward::<V4, _>(&t, &flow.key, 1, ESTABLISHED, marks).is_new());
        let ct::Found::Live(hit) = ct::lookup::<V4, _>(t.table(), &flow.key) else { panic!("it is there") };
        assert_eq!(conn::class(t.policy(), hit.control, 1000), class);
    }
}
