//! A service's list of dests and the words of its schedulers' machines, after each change as the kernel has them
//! (`__ip_vs_update_dest`, `__ip_vs_unlink_dest`, and the callbacks `ip_vs_rr_del_dest`, `ip_vs_wrr_dest_changed`,
//! `ip_vs_mh_dest_changed`, `ip_vs_sh_dest_changed`, `ip_vs_dh_dest_changed`). The data plane reads the list from `LISTS` and moves the machines in `SERVICE_STATE`.

use rvs_datapath::abi::{ListEntry, ListHead, ServiceState};
use rvs_datapath::sched::{self, dh, mh, sh};

/// One change of a service's list. Dests are indexes in `DESTS`, weights the effective ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// A new dest: it comes first in the list.
    Add {
        dest: u32,
        weight: u32,
    },
    Remove {
        dest: u32,
    },
    /// An edit: the dest keeps its place. The machine is fitted even if the weight is the old one, as for any edit.
    Weight {
        dest: u32,
        weight: u32,
    },
    /// An edit that gives the dest another index: it keeps its place.
    Replace {
        dest: u32,
        with: u32,
        weight: u32,
    },
    /// The service gets a scheduler, its first or another (`ip_vs_bind_scheduler`): the machine starts from the beginning. An edit that names
    /// the scheduler that it has is no change.
    Scheduler,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ListError {
    #[error("dest {0} is in the list already")]
    Exists(u32),
    #[error("dest {0} is not in the list")]
    Missing(u32),
    #[error("the list has {max} dests, the most that a service can have", max = sched::DESTS_MAX)]
    Full,
}

/// A list and its machines. `machines` is what the data plane last made of them: read it as late as possible before [`List::after`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct List {
    /// In the kernel's order, last added first.
    pub entries: Vec<ListEntry>,
    pub machines: ServiceState,
}

impl List {
    /// The list and the machines after a change.
    pub fn after(&self, change: Change) -> Result<List, ListError> {
        let mut entries = self.entries.clone();
        let place = |dest| self.entries.iter().position(|e| e.dest == dest);
        let rr = self.machines.rr;
        let rr = match change {
            Change::Add { dest, weight } => {
                if place(dest).is_some() {
                    return Err(ListError::Exists(dest));
                }
                if entries.len() >= sched::DESTS_MAX as usize {
                    return Err(ListError::Full);
                }
                entries.insert(0, ListEntry { dest, weight });
                // The position is a dest, and all of them have moved on by one; before the first it stays there.
                if rr == 0 { 0 } else { rr + 1 }
            }
            Change::Remove { dest } => {
                let at = place(dest).ok_or(ListError::Missing(dest))?;
                entries.remove(at);
                // Of the dest that is the position, its predecessor; of those before it, nothing changes.
                if rr > at as u64 { rr - 1 } else { rr }
            }
            Change::Weight { dest, weight } => {
                let at = place(dest).ok_or(ListError::Missing(dest))?;
                entries[at].weight = weight;
                rr
            }
            Change::Replace { dest, with, weight } => {
                let at = place(dest).ok_or(ListError::Missing(dest))?;
                entries[at] = ListEntry { dest: with, weight };
                rr
            }
            Change::Scheduler => 0,
        };
        let head = head(&entries);
        let current = if change == Change::Scheduler { 0 } else { (self.machines.wrr >> 32) as u32 };
        // The place goes back to the head of the list.
        let wrr = u64::from(fitted(current, head)) << 32;
        Ok(List { entries, machines: ServiceState { rr, wrr, ..self.machines } })
    }

    /// The run of entries for `LISTS`: the head, then the dests.
    pub fn run(&self) -> Vec<ListEntry> {
        let mut run = Vec::with_capacity(self.entries.len() + 1);
        run.push(head(&self.entries));
        run.extend_from_slice(&self.entries);
        run
    }
}

/// What wrr needs to know of a list: the greatest common divisor of its weights (1 without any), and the largest weight less divisor - 1.
pub fn head(entries: &[ListEntry]) -> ListHead {
    let weights = || entries.iter().map(|e| e.weight).filter(|w| *w > 0);
    let divisor = weights().fold(0, gcd).max(1);
    let largest = weights().max().map_or(0, |w| w - (divisor - 1));
    ListHead { dest: divisor, weight: largest }
}

/// wrr's current weight after a change: within the new bounds, and on a level that the new divisor visits.
fn fitted(current: u32, head: ListHead) -> u32 {
    let (divisor, largest) = (head.dest, head.weight);
    if current > largest || current == 0 {
        largest
    } else if divisor > 1 {
        current / divisor * divisor + 1
    } else {
        current
    }
}

/// The last weight of a dest that was not 0, for [`mh`]: of a new dest (`before` is `None`) its weight, whatever that is.
pub fn last_weight(before: Option<u32>, weight: u32) -> u32 {
    match before {
        Some(last) if weight == 0 => last,
        _ => weight,
    }
}

/// The lookup table for `TABLES` of a scheduler that has one; `members` in list order. It is built anew whenever a dest is added, edited or
/// removed. (The kernel's dh does not look at edits, but its table knows nothing that they could change.)
pub fn table(scheduler: sched::Kind, members: &[sched::Member]) -> Option<Vec<u32>> {
    let size = match scheduler {
        sched::Kind::Mh => mh::SIZE,
        sched::Kind::Sh => sh::SIZE,
        sched::Kind::Dh => dh::SIZE,
        _ => return None,
    };
    let mut table = vec![0; size as usize];
    match scheduler {
        sched::Kind::Mh => mh::build(members, &mut table),
        sched::Kind::Sh => sh::build(members, &mut table),
        _ => dh::build(members, &mut table),
    }
    Some(table)
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list of these weights, dests 1, 2, ... in list order; the machines as given.
    fn list(weights: &[u32], rr: u64, wrr: (u32, u32)) -> List {
        let entries = weights.iter().zip(1..).map(|(&weight, dest)| ListEntry { dest, weight }).collect();
        let machines = ServiceState { rr, wrr: u64::from(wrr.0) | u64::from(wrr.1) << 32, ..ServiceState::default() };
        List { entries, machines }
    }
    fn dests(list: &List) -> Vec<u32> {
        list.entries.iter().map(|e| e.dest).collect()
    }

    #[test]
    fn a_new_dest_comes_first_and_the_turn_stays_with_its_dest() {
        let after = list(&[1, 1, 1], 2, (0, 0)).after(Change::Add { dest: 9, weight: 5 }).unwrap();
        assert_eq!((dests(&after), after.machines.rr), (vec![9, 1, 2, 3], 3));
        let unused = list(&[1, 1], 0, (0, 0)).after(Change::Add { dest: 9, weight: 5 }).unwrap();
        assert_eq!(unused.machines.rr, 0);
    }

    #[test]
    fn removing_the_dest_whose_turn_it_was_gives_the_turn_to_the_one_before() {
        for (removed, rr_before, rr_after) in [(1, 1, 0), (2, 2, 1), (3, 2, 2), (1, 2, 1), (1, 0, 0), (3, 3, 2)] {
            let after = list(&[1, 1, 1], rr_before, (0, 0)).after(Change::Remove { dest: removed }).unwrap();
            assert_eq!(after.machines.rr, rr_after, "dest {removed} removed with the turn at {rr_before}");
            assert!(!dests(&after).contains(&removed));
        }
    }

    #[test]
    fn weighted_round_robin_starts_at_the_head_with_a_fitting_weight() {
        // Divisor and largest of the new weights, and the current weight before and after.
        for (weights, changed, before, after) in [
            (&[4, 3, 2][..], 2, 3, 3u32), // 4 2 2: divisor 2, so levels 3 and 1; 3 / 2 * 2 + 1
            (&[4, 3, 2], 3, 4, 4),        // 4 3 3: as it was
            (&[9, 3, 3], 6, 8, 7),        // 9 6 3: levels 7, 4, 1; 8 is above the largest
            (&[9, 3, 3], 6, 6, 7),        // 6 / 3 * 3 + 1
            (&[1, 1, 1], 0, 0, 1),        // not begun: the largest
            (&[5, 0, 0], 0, 3, 1),        // 5 alone: level 1
        ] {
            let after_change =
                list(weights, 0, (2, before)).after(Change::Weight { dest: 2, weight: changed }).unwrap();
            assert_eq!(after_change.machines.wrr, u64::from(after) << 32, "{weights:?}");
        }
    }

    #[test]
    fn the_head_is_the_divisor_and_the_largest_level() {
        for (weights, divisor, largest) in
            [(&[][..], 1, 0), (&[0, 0], 1, 0), (&[4, 6], 2, 5), (&[0, 7], 7, 1), (&[1, 2, 3], 1, 3)]
        {
            let run = list(weights, 0, (0, 0)).run();
            assert_eq!(run[0], ListEntry { dest: divisor, weight: largest }, "{weights:?}");
            assert_eq!(run.len(), weights.len() + 1);
        }
    }

    #[test]
    fn another_scheduler_begins_at_the_beginning() {
        let after = list(&[1, 2], 2, (1, 1)).after(Change::Scheduler).unwrap();
        assert_eq!((after.machines.rr, after.machines.wrr), (0, 2 << 32));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let full = list(&vec![1; sched::DESTS_MAX as usize], 0, (0, 0));
        assert_eq!(full.after(Change::Add { dest: 9999, weight: 1 }), Err(ListError::Full));
        let small = list(&[1], 0, (0, 0));
        assert_eq!(small.after(Change::Add { dest: 1, weight: 1 }), Err(ListError::Exists(1)));
        assert_eq!(small.after(Change::Remove { dest: 2 }), Err(ListError::Missing(2)));
        assert_eq!(small.after(Change::Weight { dest: 2, weight: 1 }), Err(ListError::Missing(2)));
    }

    #[test]
    fn a_weight_of_zero_is_not_remembered_as_the_last_one() {
        assert_eq!(last_weight(Some(3), 0), 3);
        assert_eq!(last_weight(Some(3), 5), 5);
        assert_eq!(last_weight(None, 0), 0);
    }
}
