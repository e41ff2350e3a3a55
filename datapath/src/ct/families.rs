//! The two address families, and the keyed hash of each.

use super::{Family, PROTO_SHIFT, Seed};

/// Words: saddr in the low half, daddr in the high half.
#[derive(Clone, Copy, Debug)]
pub struct V4;
/// Words: saddr, daddr.
#[derive(Clone, Copy, Debug)]
pub struct V6;

/// One step of the NH family (Black et al., UMAC): two halves of a word, each moved by key material, multiplied.
/// Sums of such products collide for two given inputs with probability 2^-32 over the key.
#[inline(always)]
fn hash_pair(word: u64, key: u64) -> u64 {
    (word as u32).wrapping_add(key as u32) as u64 * ((word >> 32) as u32).wrapping_add((key >> 32) as u32) as u64
}
/// Spread the sum over all bits, so that any of them can number buckets.
#[inline(always)]
fn finish(sum: u64) -> u64 {
    let h = (sum ^ sum >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (h ^ h >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

impl Family for V4 {
    const KEYS: usize = 1;
    const WAYS: usize = 4;
    const WORDS: usize = 8;
    type Words = [u64; 1];
    #[inline(always)]
    fn hash(words: &[u64; 1], control: u64, seed: &Seed) -> u64 {
        let s = &seed.0;
        finish(hash_pair(words[0], s[0]).wrapping_add((control >> PROTO_SHIFT ^ s[1]).wrapping_mul(s[2] | 1)))
    }
}
impl Family for V6 {
    const KEYS: usize = 4;
    const WAYS: usize = 3;
    const WORDS: usize = 16;
    type Words = [u64; 4];
    #[inline(always)]
    fn hash(words: &[u64; 4], control: u64, seed: &Seed) -> u64 {
        let s = &seed.0;
        let addresses = hash_pair(words[0], s[0])
            .wrapping_add(hash_pair(words[1], s[3]))
            .wrapping_add(hash_pair(words[2], s[4]))
            .wrapping_add(hash_pair(words[3], s[5]));
        finish(addresses.wrapping_add((control >> PROTO_SHIFT ^ s[1]).wrapping_mul(s[2] | 1)))
    }
}
