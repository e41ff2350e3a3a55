//! Addresses in keys and rows.

use crate::ct::{self, Family};

/// An address as a family's key words hold it.
pub trait Addressing: Family {
    type Addr: Copy + PartialEq + core::fmt::Debug + Default;
    /// An address in whole words.
    type AddrWords: Copy + AsRef<[u64]> + AsMut<[u64]>;
    const NOWHERE: Self::AddrWords;
    fn to_words(address: Self::Addr) -> Self::AddrWords;
    fn from_words(words: Self::AddrWords) -> Self::Addr;
    fn words(source: Self::Addr, destination: Self::Addr) -> Self::Words;
    fn source(words: &Self::Words) -> Self::Addr;
    fn destination(words: &Self::Words) -> Self::Addr;
}
impl Addressing for ct::V4 {
    /// As it lies in the packet.
    type Addr = u32;
    type AddrWords = [u64; 1];
    const NOWHERE: [u64; 1] = [0];
    #[inline(always)]
    fn to_words(address: u32) -> [u64; 1] {
        [u64::from(address)]
    }
    #[inline(always)]
    fn from_words([address]: [u64; 1]) -> u32 {
        address as u32
    }
    #[inline(always)]
    fn words(source: u32, destination: u32) -> [u64; 1] {
        [source as u64 | (destination as u64) << 32]
    }
    #[inline(always)]
    fn source(words: &[u64; 1]) -> u32 {
        words[0] as u32
    }
    #[inline(always)]
    fn destination(words: &[u64; 1]) -> u32 {
        (words[0] >> 32) as u32
    }
}
impl Addressing for ct::V6 {
    /// As it lies in the packet.
    type Addr = [u64; 2];
    type AddrWords = [u64; 2];
    const NOWHERE: [u64; 2] = [0; 2];
    #[inline(always)]
    fn to_words(address: [u64; 2]) -> [u64; 2] {
        address
    }
    #[inline(always)]
    fn from_words(words: [u64; 2]) -> [u64; 2] {
        words
    }
    #[inline(always)]
    fn words(s: [u64; 2], d: [u64; 2]) -> [u64; 4] {
        [s[0], s[1], d[0], d[1]]
    }
    #[inline(always)]
    fn source(words: &[u64; 4]) -> [u64; 2] {
        [words[0], words[1]]
    }
    #[inline(always)]
    fn destination(words: &[u64; 4]) -> [u64; 2] {
        [words[2], words[3]]
    }
}
