//! TCP options, changed in place: byte by byte from the first on, so that every offset is a number that a verifier knows.

use crate::csum::Delta;
use crate::packet::{Ip, Packet, Window};
use crate::tables::Tables;

const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
const FAST_OPEN: u8 = 34;
/// The client's address (see `fullnat`); also RFC 6994's experiments, of which the old Fast Open is one.
pub const TOA: u8 = 254;

/// What to do with a segment's options.
#[derive(Clone, Copy)]
pub struct Edit {
    /// Blank what only holds between two hosts that know each other: timestamps (those of many clients would come from one address, and a
    /// server that has seen a later one drops the segment, RFC 7323 5) and Fast Open.
    pub timestamps: bool,
    /// Blank the client's address: nobody but the director says it.
    pub toa: bool,
    /// Taken from the MSS.
    pub mss_less: u16,
    /// Added to the edges of SACK blocks.
    pub sack: u32,
}

/// Longest options.
const MOST: usize = 40;

/// Where the walk is: `done:8 | left:8 | kind:8`, the kind of the option (END: between two of them), how much of its body is left and how much
/// is done. One word, of which a verifier is to know nothing: else it would go through every way that options can follow each other.
#[derive(Clone, Copy)]
struct At(u32);

impl At {
    #[inline(always)]
    fn kind(self) -> u8 {
        self.0 as u8
    }
    #[inline(always)]
    fn left(self) -> u32 {
        self.0 >> 8 & 0xff
    }
    #[inline(always)]
    fn done(self) -> u32 {
        self.0 >> 16
    }
    #[inline(always)]
    fn body(kind: u8, left: u32) -> At {
        At(if left == 0 { 0 } else { left << 8 | u32::from(kind) })
    }
    /// One more byte of the body.
    #[inline(always)]
    fn on(self) -> At {
        if self.left() == 1 { At(0) } else { At(self.0 + (1 << 16) - (1 << 8)) }
    }
}

/// Edit the options of a segment whose TCP header, `header` bytes long, has been checked. The change of the checksum; `None`: the packet
/// is shorter than it says. Options that are cut short or lie about their length end the walk, as in the kernel.
#[inline(always)]
pub fn edit<I: Ip, P: Packet, T: Tables>(p: &mut P, t: &T, header: u32, edit: Edit) -> Option<Delta> {
    let mut delta = Delta::default();
    // What a verifier knows nothing of.
    let noise = p.bytes(I::L4 + 4, 4)?.r32(0);
    let mut state = At(0);
    let mut i = 0;
    while i < MOST {
        let at = I::L4 + 20 + i;
        if 20 + i as u32 >= header {
            break;
        }
        state = At(t.blur(state.0, noise));
        let byte = p.bytes(at, 1)?.r8(0);
        if state.left() != 0 {
            delta = body(p, i, at, state, &edit, delta)?;
            state = state.on();
        } else if state.kind() != END {
            // Its length.
            if byte < 2 || i as u32 + 19 + u32::from(byte) > header {
                break;
            }
            let (kind, left) = (state.kind(), u32::from(byte) - 2);
            if blank(kind, &edit) {
                delta = put(p, i - 1, at - 1, NOP, delta)?;
                delta = put(p, i, at, NOP, delta)?;
            }
            // Only whole values are looked at.
            let whole = (kind != MSS || left == 2) && (kind != SACK || left & 7 == 0);
            state = At::body(if whole { kind } else { NOP }, left);
        } else if byte == END {
            break;
        } else {
            state = At(if byte == NOP { 0 } else { u32::from(byte) });
        }
        i += 1;
    }
    Some(delta)
}

/// A byte of an option's body.
#[inline(always)]
fn body<P: Packet>(p: &mut P, i: usize, at: usize, state: At, edit: &Edit, delta: Delta) -> Option<Delta> {
    let kind = state.kind();
    if blank(kind, edit) {
        put(p, i, at, NOP, delta)
    } else if kind == MSS && state.done() == 0 && edit.mss_less != 0 {
        lower(p, i, at, edit.mss_less, delta)
    } else if kind == SACK && state.done() & 3 == 0 && edit.sack != 0 {
        shift(p, i, at, edit.sack, delta)
    } else {
        Some(delta)
    }
}

#[inline(always)]
fn blank(kind: u8, edit: &Edit) -> bool {
    kind == TOA && edit.toa || (kind == TIMESTAMPS || kind == FAST_OPEN) && edit.timestamps
}

/// A byte at offset `i` of the options, which begin on an even one.
#[inline(always)]
fn put<P: Packet>(p: &mut P, i: usize, at: usize, byte: u8, delta: Delta) -> Option<Delta> {
    let mut w = p.bytes(at, 1)?;
    let old = w.r8(0);
    w.w8(0, byte);
    let word = |b: u8| if i.is_multiple_of(2) { u16::from_ne_bytes([b, 0]) } else { u16::from_ne_bytes([0, b]) };
    Some(delta.replace16(word(old), word(byte)))
}

/// A sum does not care for the order of bytes, but for which of a pair each is.
#[inline(always)]
fn paired(i: usize, word: u16) -> u16 {
    if i.is_multiple_of(2) { word } else { word.swap_bytes() }
}

#[inline(always)]
fn lower<P: Packet>(p: &mut P, i: usize, at: usize, less: u16, delta: Delta) -> Option<Delta> {
    let mut w = p.bytes(at, 2)?;
    let old = w.r16(0);
    let mss = u16::from_be(old);
    // One that small is nobody's who means it.
    let new = if mss > 2 * less { (mss - less).to_be() } else { old };
    w.w16(0, new);
    Some(delta.replace16(paired(i, old), paired(i, new)))
}

#[inline(always)]
fn shift<P: Packet>(p: &mut P, i: usize, at: usize, by: u32, delta: Delta) -> Option<Delta> {
    let mut w = p.bytes(at, 4)?;
    let old = w.r32(0);
    let new = u32::from_be(old).wrapping_add(by).to_be();
    w.w32(0, new);
    let delta = delta.replace16(paired(i, old as u16), paired(i, new as u16));
    Some(delta.replace16(paired(i, (old >> 16) as u16), paired(i, (new >> 16) as u16)))
}

/// What a director says of its client. Port and address as they lie in the packet; an IPv4 address is the first word.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Told {
    pub address: [u32; 4],
    pub port: u16,
    /// 1: IPv6.
    pub v6: u16,
}

/// The client's address in a TCP header, which is followed by anything up to its largest size. It is the first option, as the director puts
/// it in.
#[inline(always)]
pub fn told(header: &[u8; 60]) -> Option<Told> {
    let length = (header[12] >> 4) * 4;
    let word = |i: usize| u32::from_ne_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
    let port = u16::from_ne_bytes([header[22], header[23]]);
    match (header[20], header[21]) {
        (TOA, 8) if length >= 28 => Some(Told { address: [word(24), 0, 0, 0], port, v6: 0 }),
        (TOA, 20) if length >= 40 => Some(Told { address: [word(24), word(28), word(32), word(36)], port, v6: 1 }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_address_is_read_and_nothing_else() {
        let mut four = [0u8; 60];
        four[12] = 7 << 4;
        four[20..28].copy_from_slice(&[254, 8, 0x12, 0x34, 192, 0, 2, 7]);
        let told_of = told(&four).unwrap();
        assert_eq!(told_of.address[0].to_ne_bytes(), [192, 0, 2, 7]);
        assert_eq!((told_of.port.to_ne_bytes(), told_of.v6), ([0x12, 0x34], 0));
        for (at, byte) in [(12, 6 << 4), (20, 253), (21, 7), (21, 20)] {
            let mut wrong = four;
            wrong[at] = byte;
            assert_eq!(told(&wrong), None, "byte {at} = {byte}");
        }
        let mut six = [0u8; 60];
        six[12] = 10 << 4;
        six[20..40].copy_from_slice(&[254, 20, 0, 80, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        let told_of = told(&six).unwrap();
        assert_eq!(told_of.address.map(u32::to_ne_bytes).concat(), six[24..40]);
        assert_eq!(told_of.v6, 1);
        six[12] = 9 << 4;
        assert_eq!(told(&six), None);
    }
}
