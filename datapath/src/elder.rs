//! What versions of the data plane promise each other, so that flows can go from one's tables to the other's while packets come. It is
//! little, and never changes: what is here is pinned by a test, with the names of pins in `rvs_sys::bpf`.
//!
//! The *elder* is the data plane that was at work: its programs, loaded still, with its tables. The new one has the hooks. A packet that is of no
//! flow in the new tables goes to the elder by a tail call, as the hook would have given it:
//!
//! * If the elder knows its flow, it does all that is to be done, counts it, and returns the hook's code (R0), which is what the hook then returns.
//! * Else it leaves the packet as it is, counts nothing, and returns [`NOT_MINE`]: the new programs go on as if it had not been asked.
//!
//! The second only when the elder has been told that it is one, by [`ELDER`] in the flags of its `CONFIG`: until then it begins flows as before.
//! So it does not matter in which order the links get the new programs: whichever a packet meets, flows begin in one place.
//!
//! Of `CONFIG` the first 8-byte word is the version, and the low half of the second has the flags. Of the connection tables it is promised that they
//! are arrays of 8-byte words in maps of one value (`CONN4`, `CONN6`), of which each entry has one that frees it by becoming 0; and of dests' state
//! that it is in such words too (`DEST_STATE`). How to read them is what a newer version has to know of older ones (`rvs_sys::bpf::elder`).

/// What the elder returns for a packet that is none of its flows': of XDP and of tc ingress. (At tc egress what a program does not know
/// simply goes on.)
pub const NOT_MINE: u32 = 0x5256_5300;

/// In the flags of the elder's `CONFIG`: it begins no flows.
pub const ELDER: u32 = 1 << 31;

/// Numbers of the words of `CONFIG`.
pub const VERSION_WORD: usize = 0;
pub const FLAGS_WORD: usize = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Config;

    /// Whoever has to change this breaks `rvs upgrade` from every version before.
    #[test]
    fn the_promise_is_kept() {
        assert_eq!((NOT_MINE, ELDER), (0x5256_5300, 0x8000_0000));
        assert_eq!(core::mem::offset_of!(Config, version), 8 * VERSION_WORD);
        assert_eq!(core::mem::offset_of!(Config, flags), 8 * FLAGS_WORD);
    }
}
