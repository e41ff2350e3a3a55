//! CRC32c, SCTP's checksum (RFC 9260 appendix A), of packets whose first four bytes change: the ports.
//!
//! A CRC is linear: that of a changed packet differs by the CRC of the change alone (without the ones that it begins and ends with). The ports
//! are the first four bytes, so that this is their change times x^(8 * length), modulo the polynomial, and the rest of the packet need not
//! be read; what was wrong before is wrong after. Polynomials are as the checksum has them, x^0 in the highest bit of a word whose lowest byte
//! lies first in the packet.

/// 0x1edc6f41, the other way round.
const POLYNOMIAL: u32 = 0x82f6_3b78;
const ONE: u32 = 1 << 31;

#[inline(always)]
const fn product(a: u32, b: u32) -> u32 {
    let (mut sum, mut b, mut i) = (0, b, 0);
    while i < 32 {
        if a << i & ONE != 0 {
            sum ^= b;
        }
        b = b >> 1 ^ if b & 1 != 0 { POLYNOMIAL } else { 0 };
        i += 1;
    }
    sum
}

/// 1, `factor`, `factor`^2, ...
const fn powers(factor: u32) -> [u32; 256] {
    let mut powers = [ONE; 256];
    let mut i = 1;
    while i < powers.len() {
        powers[i] = product(powers[i - 1], factor);
        i += 1;
    }
    powers
}

/// x^(8 n) and x^(8 * 256 n).
static BYTES: [[u32; 256]; 2] = {
    let low = powers(ONE >> 8);
    [low, powers(product(low[255], low[1]))]
};

/// [`product`] without a branch, since a verifier would walk every combination of them; `sign` as in [`crate::ct::Buckets::sign`].
#[inline(always)]
fn times(a: u32, b: u32, sign: &impl Fn(u64) -> u64) -> u32 {
    // All ones if the highest bit is set.
    let mask = |word: u32| sign(u64::from(word) << 32) as u32;
    let (mut sum, mut a, mut b, mut i) = (0, a, b, 0);
    while i < 32 {
        sum ^= b & mask(a);
        b = b >> 1 ^ POLYNOMIAL & mask(b << 31);
        a <<= 1;
        i += 1;
    }
    sum
}

/// What the checksum of a packet of `len` bytes (at most 65535) changes by if its first word does by `changed`: all are XORed, as they lie in
/// the packet.
#[inline(always)]
pub fn change(changed: u32, len: u32, sign: impl Fn(u64) -> u64) -> u32 {
    let [low, high] = [len as usize & 0xff, len as usize >> 8 & 0xff];
    times(times(u32::from_le(changed), BYTES[0][low], &sign), BYTES[1][high], &sign).to_le()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the RFC has it: bit by bit, over everything.
    fn crc(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 })
        })
    }

    fn sign(x: u64) -> u64 {
        (x as i64 >> 63) as u64
    }

    fn updated(before: &[u8], after: &[u8]) -> u32 {
        let first = |bytes: &[u8]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        crc(before) ^ u32::from_le(change(first(before) ^ first(after), before.len() as u32, sign))
    }

    /// The usual check value, and RFC 3720 B.4.
    #[test]
    fn the_polynomial_is_the_right_one() {
        assert_eq!(crc(b"123456789"), 0xe306_9283);
        assert_eq!(crc(&[0; 32]), 0x8a91_36aa);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc(&ascending), 0x46dd_794e);
    }

    #[test]
    fn any_length_has_its_power() {
        let mut bytes: Vec<u8> = (0..65535u32).map(|i| (i * 31 / 8) as u8).collect();
        for len in (4..2100).chain([4095, 4096, 9000, 65534, 65535]) {
            let before = bytes[..len].to_vec();
            bytes[3] ^= 0x80;
            bytes[1] = bytes[1].wrapping_add(37);
            assert_eq!(updated(&before, &bytes[..len]), crc(&bytes[..len]), "{len} bytes");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn an_update_is_what_all_anew_would_be(mut bytes in proptest::collection::vec(any::<u8>(), 4..3000), ports: [u8; 4]) {
            let before = bytes.clone();
            bytes[..4].copy_from_slice(&ports);
            prop_assert_eq!(updated(&before, &bytes), crc(&bytes));
        }
    }
}
