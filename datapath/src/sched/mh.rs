//! mh: Maglev hashing as the kernel does it (`ip_vs_mh.c`). The table is built by the control plane ([`build`]), looked up here.

use super::{Member, folded};
use crate::abi::{Service, service};
use crate::packet::{Flow, Ip};
use crate::tables::{Tables, Walker};

/// Size of the table: the kernel's default, `CONFIG_IP_VS_MH_TAB_INDEX` 12.
pub const SIZE: u32 = 4093;
/// 6 = half of the index: how finely weights are told apart.
const WEIGHT_BITS: u32 = 6;

/// The two keys of `generate_hash_secret`.
const KEY1: u64 = 2_654_435_761;
const KEY2: u64 = 2_654_446_892;

/// hsiphash_1u32 of 64-bit kernels: SipHash-1-3 of one 32-bit word, truncated.
#[inline(always)]
fn hash(v: u32, key: u64) -> u32 {
    let mut s = [
        0x736f_6d65_7073_6575 ^ key,
        0x646f_7261_6e64_6f6d ^ key,
        0x6c79_6765_6e65_7261 ^ key,
        0x7465_6462_7974_6573 ^ key,
    ];
    let b = 4u64 << 56 | u64::from(v);
    s[3] ^= b;
    round(&mut s);
    s[0] ^= b;
    s[2] ^= 0xff;
    round(&mut s);
    round(&mut s);
    round(&mut s);
    (s[0] ^ s[1] ^ s[2] ^ s[3]) as u32
}
#[inline(always)]
fn round(s: &mut [u64; 4]) {
    s[0] = s[0].wrapping_add(s[1]);
    s[1] = s[1].rotate_left(13) ^ s[0];
    s[0] = s[0].rotate_left(32);
    s[2] = s[2].wrapping_add(s[3]);
    s[3] = s[3].rotate_left(16) ^ s[2];
    s[0] = s[0].wrapping_add(s[3]);
    s[3] = s[3].rotate_left(21) ^ s[0];
    s[2] = s[2].wrapping_add(s[1]);
    s[1] = s[1].rotate_left(17) ^ s[2];
    s[2] = s[2].rotate_left(32);
}

#[inline(always)]
pub fn pick<I: Ip, T: Tables>(t: &T, s: &Service, flow: &Flow<I>) -> Option<u32> {
    let port = if s.flags & service::HASH_PORT != 0 { u32::from(flow.key.sport()) } else { 0 };
    let client = folded(&I::bytes(flow.source())).wrapping_add(port);
    let (first, size) = (s.table as u32, (s.table >> 32) as u32);
    if size != SIZE {
        return None;
    }
    let start = hash(client, KEY1);
    let dest = t.table(first + start % SIZE)?;
    if t.available(dest) {
        return Some(dest);
    }
    if s.flags & service::HASH_FALLBACK == 0 {
        return None;
    }
    let mut walk = Walk { first, client, start: start % SIZE, dest: 0 };
    t.walk(SIZE, &mut walk);
    (walk.dest != 0).then_some(walk.dest)
}

struct Walk {
    first: u32,
    client: u32,
    start: u32,
    dest: u32,
}

impl<T: Tables> Walker<T> for Walk {
    /// `ip_vs_mh_get_fallback`: hash again with another offset each time.
    #[inline(always)]
    fn step(&mut self, t: &T, i: u32) -> bool {
        let w = self;
        let offset = (i + w.start) % SIZE;
        let at = hash(offset.wrapping_add(w.client), KEY1) % SIZE;
        match t.table(w.first + at) {
            Some(d) if t.available(d) => {
                w.dest = d;
                true
            }
            _ => false,
        }
    }
}

/// The lookup table of a service (`ip_vs_mh_permutate`, `ip_vs_mh_populate`), members in list order. `out` has [`SIZE`] places; without
/// any weight it is all 0.
pub fn build(members: &[Member], out: &mut [u32]) {
    out.fill(0);
    let weights = || members.iter().map(|m| m.last_weight).filter(|w| *w > 0);
    let Some(largest) = weights().max() else { return };
    let divisor = weights().fold(0, gcd);
    let shift = (32 - (largest / divisor).leading_zeros()).saturating_sub(WEIGHT_BITS);
    let turns = |w: u32| if w == 0 { 0 } else { ((w / divisor) >> shift).max(1) };
    // Each member walks its own permutation of the table: offset, offset + skip, ...
    let walk = |m: &Member, step: u32| {
        let base = folded(&m.address).wrapping_add(u32::from(m.port));
        let (offset, skip) = (hash(base, KEY1) % SIZE, hash(base, KEY2) % (SIZE - 1) + 1);
        ((u64::from(offset) + u64::from(skip) * u64::from(step)) % u64::from(SIZE)) as usize
    };
    let mut steps = [0u32; super::DESTS_MAX as usize];
    let mut filled = 0;
    loop {
        for (i, m) in members.iter().enumerate().take(super::DESTS_MAX as usize) {
            for _ in 0..turns(m.last_weight) {
                let mut at = walk(m, steps[i]);
                while out[at] != 0 {
                    steps[i] += 1;
                    at = walk(m, steps[i]);
                }
                out[at] = m.dest;
                steps[i] += 1;
                filled += 1;
                if filled == SIZE {
                    return;
                }
            }
        }
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
