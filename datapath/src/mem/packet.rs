//! Packets in plain memory.

use crate::crc;
use crate::csum::{self, Delta};
use crate::far::{self, Walk, Walked};
use crate::options::{self, Edit, Offer};
use crate::packet::{Frame, Ip, Packet, Window};
use crate::proto::sctp;
use std::cell::Cell;

/// A frame, and the interface it came in by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemPacket {
    pub bytes: Vec<u8>,
    pub ifindex: u32,
}

/// Some of its bytes. An access past them panics: the pipeline's mistake, never the sender's.
pub struct MemWindow<'a>(&'a [Cell<u8>]);

impl MemWindow<'_> {
    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[at + i].get())
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        for (cell, byte) in self.0[at..at + bytes.len()].iter().zip(bytes) {
            cell.set(*byte);
        }
    }
}

impl Window for MemWindow<'_> {
    fn r8(&self, at: usize) -> u8 {
        self.0[at].get()
    }
    fn r16(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self.read(at))
    }
    fn r32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.read(at))
    }
    fn r64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.read(at))
    }
    fn w8(&mut self, at: usize, v: u8) {
        self.0[at].set(v);
    }
    fn w16(&mut self, at: usize, v: u16) {
        self.write(at, &v.to_ne_bytes());
    }
    fn w32(&mut self, at: usize, v: u32) {
        self.write(at, &v.to_ne_bytes());
    }
    fn w64(&mut self, at: usize, v: u64) {
        self.write(at, &v.to_ne_bytes());
    }
}

impl Frame for MemPacket {
    fn windows(&mut self, near: usize, by: usize, len: usize) -> Option<(MemWindow<'_>, MemWindow<'_>)> {
        let all = Cell::from_mut(self.bytes.as_mut_slice()).as_slice_of_cells();
        Some((MemWindow(all.get(..near)?), MemWindow(all.get(by..by + len)?)))
    }
    fn shrink_head(&mut self, n: usize) -> bool {
        let there = n <= self.bytes.len();
        self.bytes.drain(..n.min(self.bytes.len()));
        there
    }
    fn came_by(&mut self, ifindex: u32) {
        self.ifindex = ifindex;
    }
    fn fix_far(&mut self, at: usize, by: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        self.fix_transport(at + by, udp, addresses, ports)
    }
}

impl Packet for MemPacket {
    type W<'a> = MemWindow<'a>;
    fn window(&mut self, len: usize) -> Option<MemWindow<'_>> {
        self.windows(len, 0, 0).map(|(w, _)| w)
    }
    fn beyond(&mut self, by: usize, len: usize) -> Option<MemWindow<'_>> {
        self.windows(0, by, len).map(|(_, w)| w)
    }
    fn walk(&mut self, walk: Walk) -> Walked {
        far::walk(self, walk)
    }
    fn edit_options<I: Ip>(&mut self, header: u32, edit: Edit) -> Option<(Delta, Offer)> {
        let mut editing = options::Editing::new(edit, I::L4, header, 0);
        let _ = (0..options::MOST).any(|i| editing.step(self, i));
        editing.end()
    }
    fn open_gap(&mut self, at: usize, by: usize, n: usize) -> bool {
        let at = at + by;
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
    fn fix_crc<I: Ip>(&mut self, by: usize, len: u32, [old, new]: [u32; 2], _: Delta) -> bool {
        let Some(mut w) = self.beyond(by, I::L4 + sctp::HEADER) else { return false };
        let sign = |x: u64| (x as i64 >> 63) as u64;
        w.w32(I::L4 + sctp::CHECKSUM, w.r32(I::L4 + sctp::CHECKSUM) ^ crc::change(old ^ new, len, sign));
        true
    }
    fn sctp_event(&mut self, at: usize, len: usize) -> u8 {
        sctp::event(self, at, len)
    }
    fn word_at(&mut self, at: usize) -> Option<[u8; 4]> {
        self.bytes.get(at..at + 4)?.try_into().ok()
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
    fn strip(&mut self, n: usize) -> bool {
        self.shrink_head(n)
    }
    fn cut(&mut self, len: usize) -> bool {
        let fits = len <= self.bytes.len();
        self.bytes.truncate(len);
        fits
    }
}
