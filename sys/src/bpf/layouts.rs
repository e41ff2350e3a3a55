//! The layouts of the pinned maps that this version knows how to read beside its own: what an older version has left at work, flows are taken over from
//! (`rvs upgrade`). All that is known of older ones is here, and what all have in common in `rvs_datapath::elder`.
//!
//! A version that changes `rvs_datapath::abi` (or the meaning of an entry, in `ct` and `conn`) adds a row to [`KNOWN`] for the last one that was given
//! away: which of its maps are other than ours, and how to read them. All others are shared by the two while flows move, so these counters, services,
//! real servers and lists simply stay.
//!
//! Two kinds can't be other yet. The maps that the elder's flows go by, and that rvsd goes on writing (DESTS, TUNNELS, HOPS, IFACES, VLANS): rows would have to be written back to
//! the elder. And the hash maps (SERVICE_KEYS, WATCHED): they are pinned by name alone.

use super::{BpfError, Mapping, Plain, Result, Shape, failed};
use aya::maps::MapData;
use rvs_datapath::abi::{self, map};
use rvs_datapath::elder::VERSION_WORD;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// How the maps of a version lie in memory, as far as it is not as ours do.
pub struct Layout {
    pub version: u64,
    /// For people.
    pub name: &'static str,
    /// Arrays of other values than ours. Flows' own (CONN4 and CONN6, SIDE4 and SIDE6) are not among them.
    others: &'static [Other],
    /// What we would have in the place of a control word of the connection tables.
    pub(super) control: fn(u64) -> u64,
    /// The rows beside IPv4 flows, and beside IPv6 flows.
    sides: [Row; 2],
}

/// A value of another layout, in our words.
type Ours = fn(&[u64]) -> Vec<u64>;

/// An array whose values are other than ours.
struct Other {
    map: &'static str,
    /// 8-byte words of a value.
    words: usize,
    ours: Ours,
}

/// A row of SIDE4 or SIDE6: how many words, and which of them we have as our first, second, ...
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) words: usize,
    pub(super) at: &'static [usize],
}

/// Our own.
pub static OURS: Layout = Layout {
    version: abi::VERSION,
    name: "this version's",
    others: &[],
    control: |control| control,
    sides: [
        Row { words: abi::SIDE4_WORDS, at: &[0, 1, 2, 3, 4, 5, 6, 7] },
        Row { words: abi::SIDE6_WORDS, at: &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] },
    ],
};

/// Older ones, the newest first; the last is no version's, but that of builds with the feature `other-layout`, for tests.
static KNOWN: &[Layout] = &[Layout {
    version: abi::OTHER,
    name: "the other layout (for tests)",
    others: &[
        // The timeouts before seed and policy.
        Other { map: map::CONFIG, words: 84, ours: |w| [&w[..2], &w[4..75], &w[2..4], &w[75..]].concat() },
        Other { map: map::DEST_STATE, words: 8, ours: |w| w[..5].to_vec() },
    ],
    // `SYNCED:1 | dest:20` instead of `dest:20 | SYNCED:1`; an entry for replies has neither.
    control: |control| {
        const PART: u64 = ((1 << 21) - 1) << 18;
        if control & rvs_datapath::ct::REVERSE != 0 {
            return control;
        }
        let (dest, synced) = (control >> 18 & 0xf_ffff, control >> 38 & 1);
        control & !PART | dest << 19 | synced << 18
    },
    // `client, who, server, -, address...`
    sides: [Row { words: 8, at: &[1, 0, 2, 4] }, Row { words: 16, at: &[1, 0, 2, 4, 5, 6, 7, 8] }],
}];

impl Layout {
    /// That of the maps pinned in `dir`; `None`: there are none.
    ///
    /// # Errors
    /// A pin can't be read, or it is a layout that we have no reader for.
    pub fn of_pins(dir: &Path) -> Result<Option<&'static Layout>> {
        let path = dir.join(map::CONFIG);
        if !path.exists() {
            return Ok(None);
        }
        let version = version(&path)?;
        let known = std::iter::once(&OURS).chain(KNOWN).find(|l| l.version == version);
        known.map(Some).ok_or_else(|| {
            BpfError::Refused(format!(
                "the pins in {} were made by another version of rvsd (layout {version:016x}), which this one (layout {:016x}) can't take connections over from: go on with that version, or by one between the two; or begin anew with `rvsd --anew`, which ends all connections",
                dir.display(),
                abi::VERSION
            ))
        })
    }

    pub fn is_ours(&self) -> bool {
        self.version == abi::VERSION
    }
    fn other(&self, name: &str) -> Option<&'static Other> {
        self.others.iter().find(|o| o.map == name)
    }
    /// Is the map other than ours?
    pub(super) fn differs(&self, name: &str) -> bool {
        self.other(name).is_some()
    }
    /// The rows beside flows of this family.
    pub(super) fn side(&self, family: u8) -> Row {
        self.sides[usize::from(family != 4)]
    }
    /// Our shape of a map, with as many words as a value has there.
    pub(super) fn shape(&self, shape: Shape) -> Shape {
        let words = match shape.name {
            map::SIDE4 => self.side(4).words,
            map::SIDE6 => self.side(6).words,
            name => self.other(name).map_or(shape.words, |o| o.words),
        };
        Shape { words, ..shape }
    }
    /// Its map of this name, `len` values, read as ours.
    pub(super) fn open(&self, name: &'static str, fd: BorrowedFd<'_>, len: u32, words: usize) -> Result<Foreign> {
        let mapping = Mapping::new(fd, len as usize * words * 8).map_err(failed(format!("map {name} into memory")))?;
        Ok(Foreign { mapping, words, len, ours: self.other(name).map(|o| o.ours) })
    }
}

/// Which layout the maps have whose CONFIG this is.
pub(super) fn version(config: &Path) -> Result<u64> {
    let at = || failed(format!("pinned map {}", config.display()));
    let data = MapData::from_pin(config).map_err(at())?;
    let bytes = data.info().map_err(at())?.value_size() as usize;
    // (All versions whose connections can be taken over have it in memory.)
    let mapping = Mapping::new(data.fd().as_fd(), bytes).map_err(|why| {
        BpfError::Refused(format!(
            "{} was made by another version of rvsd, or by something else ({bytes} bytes, {why}): go on with that version, or begin anew with `rvsd --anew`, which ends all connections",
            config.display()
        ))
    })?;
    let word = mapping.words().get(VERSION_WORD).map(|w| w.load(Ordering::Acquire));
    word.ok_or_else(|| BpfError::Refused(format!("{} is empty", config.display())))
}

/// An array of perhaps another layout.
pub(super) struct Foreign {
    mapping: Mapping,
    words: usize,
    len: u32,
    ours: Option<Ours>,
}

impl Foreign {
    /// A value in our words.
    pub(super) fn words(&self, index: u32) -> Vec<u64> {
        let at = (index & (self.len - 1)) as usize * self.words;
        let words: Vec<u64> = self.raw()[at..at + self.words].iter().map(load).collect();
        self.ours.map_or(words.clone(), |ours| ours(&words))
    }
    pub(super) fn get<T: Plain>(&self, index: u32) -> T {
        super::value_of(&self.words(index))
    }
    pub(super) fn raw(&self) -> &[AtomicU64] {
        self.mapping.words()
    }
    /// All values, in the place of what `to` has.
    pub(super) fn copy_to(&self, to: &Mapping) {
        let ours = (0..self.len).flat_map(|i| self.words(i));
        for (word, new) in to.words().iter().zip(ours) {
            word.store(new, Ordering::Release);
        }
    }
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::{Sizes, shapes};
    use rvs_datapath::{conn, ct};

    #[test]
    fn what_is_other_becomes_as_long_as_ours() {
        let shapes = shapes(&Sizes::default()).expect("shapes");
        for layout in KNOWN {
            assert_ne!(layout.version, OURS.version);
            for other in layout.others {
                let shape = shapes.iter().find(|s| s.name == other.map).expect("one of our maps");
                assert_eq!((other.ours)(&vec![0; other.words]).len(), shape.words, "{}", other.map);
            }
            for (row, words) in layout.sides.iter().zip([abi::SIDE4_WORDS, abi::SIDE6_WORDS]) {
                assert!(row.at.len() <= words && row.at.iter().all(|at| *at < row.words));
            }
        }
    }

    /// `CONFIG` of the other layout: each word once, in our order.
    #[test]
    fn the_other_layouts_configuration() {
        let other = &KNOWN[KNOWN.len() - 1];
        let words: Vec<u64> = (0..84).collect();
        let config = other.other(map::CONFIG).expect("CONFIG is other");
        let ours: abi::Config = crate::bpf::value_of(&(config.ours)(&words));
        assert_eq!((ours.version, ours.seed.0, ours.timeouts_s), (0, [4, 5, 6, 7, 8, 9], [2, 0, 3, 0]));
        assert_eq!(
            (u64::from(ours.policy.epoch), u64::from(ours.drop_rate), u64::from(ours.settings[14])),
            (74, 75, 83)
        );
    }

    #[test]
    fn the_other_layouts_entries() {
        let other = &KNOWN[KNOWN.len() - 1];
        let rest = 443 << 48 | 1 << ct::PROTO_SHIFT | ct::LINKED | 0x2_5a5a;
        for (dest, synced) in [(1, 0), (conn::DEST_MAX, 1), (0x5_a5a5, 1)] {
            let there = rest | u64::from(dest) << 18 | synced << 38;
            let ours = (other.control)(there);
            assert_eq!((conn::dest(ours), ours & conn::SYNCED != 0), (dest, synced == 1));
            assert_eq!(ours & !(((1 << 21) - 1) << 18), rest);
        }
        let reverse = rest | ct::REVERSE | 0x7f_ffff << 15;
        assert_eq!(((other.control)(reverse), (other.control)(0)), (reverse, 0));
    }
}
