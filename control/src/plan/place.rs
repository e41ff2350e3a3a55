//! Where things may lie: single indexes, and runs of entries. What is given back is used again only after a time.

use std::collections::{BTreeMap, BTreeSet};

use super::PlanError;

/// Indexes `first..end` of a map.
#[derive(Clone, Debug)]
pub(super) struct Indexes {
    what: &'static str,
    first: u32,
    end: u32,
    /// Never used so far from here on.
    next: u32,
    free: BTreeSet<u32>,
    /// Index and when it was retired, ms.
    retired: Vec<(u32, u64)>,
}

impl Indexes {
    pub fn new(what: &'static str, first: u32, end: u32) -> Self {
        Indexes { what, first, end, next: first, free: BTreeSet::new(), retired: Vec::new() }
    }
    pub fn take(&mut self) -> Result<u32, PlanError> {
        if let Some(index) = self.free.pop_first() {
            return Ok(index);
        }
        if self.next >= self.end {
            return Err(PlanError::Full { what: self.what, max: self.end - self.first });
        }
        self.next += 1;
        Ok(self.next - 1)
    }
    /// This one is in use (found in the maps). False: it is so already, or out of range.
    pub fn claim(&mut self, index: u32) -> bool {
        if index < self.first || index >= self.end {
            return false;
        }
        if index >= self.next {
            self.free.extend(self.next..index);
            self.next = index + 1;
            return true;
        }
        self.free.remove(&index)
    }
    /// Free at once.
    pub fn give(&mut self, index: u32) {
        self.free.insert(index);
    }
    pub fn retire(&mut self, index: u32, now_ms: u64) {
        self.retired.push((index, now_ms));
    }
    /// What was retired before `until_ms` is free.
    pub fn reclaim(&mut self, until_ms: u64) {
        let free = &mut self.free;
        self.retired.retain(|(index, at)| {
            let keep = *at > until_ms;
            if !keep {
                free.insert(*index);
            }
            keep
        });
    }
}

/// Entries `first..first + len` of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub first: u32,
    pub len: u32,
}

/// Runs of a map's entries: first fit.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    what: &'static str,
    end: u32,
    /// First entry and length, apart from each other.
    free: BTreeMap<u32, u32>,
    retired: Vec<(Run, u64)>,
}

impl Runs {
    pub fn new(what: &'static str, end: u32) -> Self {
        Runs { what, end, free: BTreeMap::from([(0, end)]), retired: Vec::new() }
    }
    pub fn take(&mut self, len: u32) -> Result<Run, PlanError> {
        let found = self.free.iter().find(|(_, l)| **l >= len).map(|(first, l)| (*first, *l));
        let Some((first, there)) = found else {
            return Err(PlanError::Full { what: self.what, max: self.end });
        };
        self.free.remove(&first);
        if there > len {
            self.free.insert(first + len, there - len);
        }
        Ok(Run { first, len })
    }
    /// This one is in use (found in the maps). False: part of it is so already, or out of range.
    pub fn claim(&mut self, run: Run) -> bool {
        let Some((first, len)) = self.free.range(..=run.first).next_back().map(|(f, l)| (*f, *l)) else { return false };
        let Some(end) = run.first.checked_add(run.len) else { return false };
        if first + len < end {
            return false;
        }
        self.free.remove(&first);
        if run.first > first {
            self.free.insert(first, run.first - first);
        }
        if first + len > end {
            self.free.insert(end, first + len - end);
        }
        true
    }
    pub fn retire(&mut self, run: Run, now_ms: u64) {
        self.retired.push((run, now_ms));
    }
    pub fn reclaim(&mut self, until_ms: u64) {
        let mut i = 0;
        while i < self.retired.len() {
            if self.retired[i].1 > until_ms {
                i += 1;
                continue;
            }
            let (run, _) = self.retired.swap_remove(i);
            self.give(run);
        }
    }
    fn give(&mut self, run: Run) {
        let Run { mut first, mut len } = run;
        if let Some((f, l)) = self.free.range(..first).next_back().map(|(f, l)| (*f, *l))
            && f + l == first
        {
            self.free.remove(&f);
            first = f;
            len += l;
        }
        if let Some(l) = self.free.remove(&(first + len)) {
            len += l;
        }
        self.free.insert(first, len);
    }
}
