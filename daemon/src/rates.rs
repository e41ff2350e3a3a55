//! Rates as the kernel's estimator has them (`ip_vs_est.c`): every two seconds each rate moves a quarter of the way to what the last
//! two seconds brought. Connections and packets are kept times 2^10, bytes times 2^5.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::time::Duration;

use rvs_control::api::Rates;
use rvs_control::model::{DestKey, ServiceKey};
use rvs_datapath::abi::Stats;

pub const TICK: Duration = Duration::from_secs(2);

/// What counters are kept of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    Service(ServiceKey),
    Dest(ServiceKey, DestKey),
    Total,
}

#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    last: Stats,
    /// Scaled: connections, packets in and out, bytes in and out.
    rates: [u64; 5],
    /// Seen in this tick.
    seen: bool,
}

#[derive(Debug, Default)]
pub struct Estimator {
    estimates: BTreeMap<What, Estimate>,
}

/// Half a second's worth, since a tick is two seconds: 2^10 / 2, 2^5 / 2.
const SHIFT: [u32; 5] = [9, 9, 9, 4, 4];
/// From scaled to shown, rounded.
const SCALE: [u32; 5] = [10, 10, 10, 5, 5];

impl Estimator {
    /// The counters of this tick.
    pub fn tick(&mut self, now: impl Iterator<Item = (What, Stats)>) {
        for (what, stats) in now {
            let e = self.estimates.entry(what).or_insert_with(|| Estimate { last: stats, ..Estimate::default() });
            let deltas = fields(stats).into_iter().zip(fields(e.last)).map(|(new, old)| new.saturating_sub(old));
            for (i, delta) in deltas.enumerate() {
                let rate = (delta << SHIFT[i]) as i64;
                let before = e.rates[i] as i64;
                e.rates[i] = (before + ((rate - before) >> 2)).max(0) as u64;
            }
            e.last = stats;
            e.seen = true;
        }
        // What is gone is forgotten; a new one of that name begins at zero.
        self.estimates.retain(|_, e| std::mem::take(&mut e.seen));
    }

    pub fn rates(&self, what: &What) -> Rates {
        let Some(e) = self.estimates.get(what) else { return Rates::default() };
        let shown = |i: usize| (e.rates[i] + (1 << (SCALE[i] - 1)) - 1) >> SCALE[i];
        Rates { conns: shown(0), in_pkts: shown(1), out_pkts: shown(2), in_bytes: shown(3), out_bytes: shown(4) }
    }
}

fn fields(s: Stats) -> [u64; 5] {
    [s.connections, s.packets_in, s.packets_out, s.bytes_in, s.bytes_out]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(n: u64) -> Stats {
        Stats { connections: n, packets_in: 6 * n, packets_out: 4 * n, bytes_in: 395 * n, bytes_out: 396 * n }
    }

    #[test]
    fn a_steady_load_is_shown_as_it_is() {
        let mut e = Estimator::default();
        for tick in 0..80 {
            e.tick([(What::Total, stats(200 * tick))].into_iter());
        }
        let r = e.rates(&What::Total);
        assert_eq!((r.conns, r.in_pkts, r.out_pkts, r.in_bytes, r.out_bytes), (100, 600, 400, 39500, 39600));
    }

    #[test]
    fn a_burst_fades_by_quarters_and_what_is_gone_is_forgotten() {
        let mut e = Estimator::default();
        e.tick([(What::Total, stats(0))].into_iter());
        e.tick([(What::Total, stats(12))].into_iter());
        // 12 connections in two seconds, a quarter of 6 a second.
        assert_eq!(e.rates(&What::Total).in_pkts, 9);
        e.tick([(What::Total, stats(12))].into_iter());
        assert_eq!(e.rates(&What::Total).in_pkts, 7);
        e.tick(std::iter::empty());
        assert_eq!(e.rates(&What::Total), Rates::default());
    }
}
