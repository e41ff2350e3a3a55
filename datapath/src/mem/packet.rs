//! Packets in plain memory.

use crate::csum::{self, Delta};
use crate::packet::{Packet, Window};

/// A frame, and the interface it came in by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemPacket {
    pub bytes: Vec<u8>,
    pub ifindex: u32,
}

/// Its first bytes. An access past them panics: the pipeline's mistake, never the sender's.
pub struct MemWindow<'a>(&'a mut [u8]);

impl Window for MemWindow<'_> {
    fn r8(&self, at: usize) -> u8 {
        self.0[at]
    }
    fn r16(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self.0[at], self.0[at + 1]])
    }
    fn r32(&self, at: usize) -> u32 {
        u32::from_ne_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
    fn r64(&self, at: usize) -> u64 {
        let word = |at| u64::from(self.r32(at));
        if cfg!(target_endian = "little") { word(at) | word(at + 4) << 32 } else { word(at) << 32 | word(at + 4) }
    }
    fn w8(&mut self, at: usize, v: u8) {
        self.0[at] = v;
    }
    fn w16(&mut self, at: usize, v: u16) {
        self.0[at..at + 2].copy_from_slice(&v.to_ne_bytes());
    }
    fn w32(&mut self, at: usize, v: u32) {
        self.0[at..at + 4].copy_from_slice(&v.to_ne_bytes());
    }
    fn w64(&mut self, at: usize, v: u64) {
        self.0[at..at + 8].copy_from_slice(&v.to_ne_bytes());
    }
}

impl Packet for MemPacket {
    type W<'a> = MemWindow<'a>;
    fn window(&mut self, len: usize) -> Option<MemWindow<'_>> {
        self.bytes.get_mut(..len).map(MemWindow)
    }
    fn bytes(&mut self, at: usize, len: usize) -> Option<MemWindow<'_>> {
        self.bytes.get_mut(at..at + len).map(MemWindow)
    }
    fn open_gap(&mut self, at: usize, n: usize) -> bool {
        let fits = at <= self.bytes.len();
        if fits {
            self.bytes.splice(at..at, std::iter::repeat_n(0xa5, n));
        }
        fits
    }
    fn frame_len(&self) -> u32 {
        self.bytes.len() as u32
    }
    fn ifindex(&self) -> u32 {
        self.ifindex
    }
    fn fix_transport(&mut self, at: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        let Some(mut w) = self.window(at + 2) else { return false };
        let (old, delta) = (w.r16(at), addresses.and(ports));
        w.w16(at, if udp { csum::adjust_udp(old, delta) } else { csum::adjust(old, delta) });
        true
    }
    fn sum_from(&self, from: usize, most: usize) -> u64 {
        let end = self.bytes.len().min(from + most);
        csum::sum(self.bytes.get(from..end).unwrap_or(&[]))
    }
    fn grow_head(&mut self, n: usize) -> bool {
        // What lies in front is undefined: something that a forgotten byte shows by.
        self.bytes.splice(0..0, std::iter::repeat_n(0xa5, n));
        true
    }
    fn cut(&mut self, len: usize) -> bool {
        let fits = len <= self.bytes.len();
        self.bytes.truncate(len);
        fits
    }
}
