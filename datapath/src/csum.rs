//! Internet checksum arithmetic (RFC 1071, RFC 1624). Ones-complement sums do not care for byte order, so all of it is on numbers as
//! they lie in the packet.

/// What has to be added to a sum because data changed, not yet folded.
#[derive(Clone, Copy, Default, Debug)]
pub struct Delta(u64);

impl Delta {
    #[inline(always)]
    #[must_use]
    pub fn replace(self, old: u32, new: u32) -> Delta {
        Delta(self.0 + u64::from(!old) + u64::from(new))
    }
    #[inline(always)]
    #[must_use]
    pub fn replace16(self, old: u16, new: u16) -> Delta {
        Delta(self.0 + u64::from(!old) + u64::from(new))
    }
    #[inline(always)]
    #[must_use]
    pub fn and(self, other: Delta) -> Delta {
        Delta(self.0 + other.0)
    }
    #[inline(always)]
    pub fn fold(self) -> u16 {
        fold(self.0)
    }
}

/// A sum of 16- or 32-bit words, to 16 bits.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let s = (sum & 0xffff_ffff) + (sum >> 32);
    let s = (s & 0xffff) + (s >> 16);
    let s = (s & 0xffff) + (s >> 16);
    ((s & 0xffff) + (s >> 16)) as u16
}

/// A checksum field after its data changed (RFC 1624, eqn. 3).
#[inline(always)]
pub fn adjust(check: u16, delta: Delta) -> u16 {
    !fold(u64::from(!check) + delta.0)
}

/// The same for UDP: 0 means "none" and stays; a result of 0 is sent as 0xffff (RFC 768).
#[inline(always)]
pub fn adjust_udp(check: u16, delta: Delta) -> u16 {
    if check == 0 {
        return 0;
    }
    let new = adjust(check, delta);
    if new == 0 { 0xffff } else { new }
}

/// Sum of bytes as they lie (an odd last byte is the first of its word).
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|c| u64::from(u16::from_ne_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum()
}
