//! Access to packets as tc sees them: perhaps large ones, to be cut into segments later (GSO), and with the kernel's knowledge about
//! their checksums, which has to stay true: unfinished (CHECKSUM_PARTIAL: the field holds the pseudo-header's sum only), summed up by
//! the device (CHECKSUM_COMPLETE: `skb->csum`), or neither.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_GRE,
    BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR,
};
use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_csum_update, bpf_l4_csum_replace, bpf_loop, bpf_skb_adjust_room, bpf_skb_change_head,
    bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
};
use core::ffi::c_void;
use rvs_datapath::csum::Delta;
use rvs_datapath::ct::V6;
use rvs_datapath::far::{self, Extras, MOST, Walk, Walked};
use rvs_datapath::options::{self, Edit, Editing, Offer};
use rvs_datapath::packet::{Frame, IP_GRE, IP_TCP, IP_UDP, Ip, L3, Packet, Window};
use rvs_datapath::proto::sctp;

use crate::ctx::{Bytes, beyond, blur, crc_change, forget, sum};
use crate::gap;

/// Headers that the pipeline may look at: IPv6 and TCP.
pub const HEADERS: usize = V6::L4 + 20;

/// An skb at its Ethernet header. As in XDP the bounds are read once, and again by whatever may move the packet.
pub struct Skb {
    skb: *mut __sk_buff,
    at: usize,
    end: usize,
    /// Not 0: the transport checksum is unfinished (bit 16), and this is its field.
    unfinished: u32,
    /// Length of the IP header, for that case.
    header: usize,
}

impl Skb {
    #[inline(always)]
    pub fn new(skb: *mut __sk_buff) -> Self {
        let mut packet = Skb { skb, at: 0, end: 0, unfinished: 0, header: 0 };
        packet.reread();
        packet
    }
    #[inline(always)]
    pub fn reread(&mut self) {
        // SAFETY: fields of the context.
        unsafe { (self.at, self.end) = ((*self.skb).data as usize, (*self.skb).data_end as usize) };
    }
    /// Have the headers where they can be reached: what a device or a socket left in fragments.
    #[inline(always)]
    pub fn pull(&mut self) {
        self.reach(HEADERS);
    }
    /// ... also behind extra ones, and those of a packet that an ICMP error quotes.
    #[inline(always)]
    pub fn pull_far(&mut self) {
        self.reach(2 * (V6::L4 + MOST) + 8);
    }
    /// Find out whether the transport checksum is unfinished, for [`Packet::sum_from`]: such a field takes no notice of a change of
    /// what is not in the pseudo-header. (An unfinished one of SCTP, which is 0, stays so on the way back to where it came from: that device
    /// takes it so.)
    #[inline(always)]
    pub fn look_at_checksum<I: Extras>(&mut self) {
        let Ok(place) = I::find(self) else { return };
        match place.protocol {
            IP_TCP => self.look_at::<I>(I::L4 + 16, place.by),
            IP_UDP => self.look_at::<I>(I::L4 + 6, place.by),
            _ => {}
        }
    }
    #[inline(always)]
    fn look_at<I: Ip>(&mut self, at: usize, by: usize) {
        let Some(w) = self.beyond(by, at + 2) else { return };
        let old = w.r16(at);
        // SAFETY: the context of this program.
        unsafe { bpf_l4_csum_replace(self.skb, (at + by) as u32, 0, 1, 0) };
        self.reread();
        let Some(mut w) = self.beyond(by, at + 2) else { return };
        if w.r16(at) == old {
            self.unfinished = 1 << 16 | old as u32;
            self.header = I::HEADER + by;
        }
        w.w16(at, old);
    }
    /// Change the checksum field at `at`, as the kernel keeps it. False: the packet is too short.
    #[inline(always)]
    fn change(&mut self, at: usize, delta: u16, flags: u32) -> bool {
        // Nothing (either zero of ones-complement).
        if delta == 0 || delta == u16::MAX {
            return true;
        }
        // SAFETY: the context of this program.
        unsafe { bpf_l4_csum_replace(self.skb, at as u32, 0, delta as u64, flags as u64) == 0 }
    }
    #[inline(always)]
    fn fix(&mut self, at: usize, by: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        let udp = if udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        let (addresses, ports) = (addresses.fold(), ports.fold());
        let done = self.change(at + by, addresses, BPF_F_PSEUDO_HDR | udp) && self.change(at + by, ports, udp);
        // For a sum over the packet the kernel takes the addresses for made up for by the IP header's checksum, which IPv6 has not
        // (BPF_F_IPV6 of Linux 6.16).
        if at >= V6::L4 {
            self.tell_sum(addresses as u32);
        }
        self.reread();
        done
    }
    /// Tell the kernel's sum over the packet of a change that no checksum in the packet makes up for.
    #[inline(always)]
    pub fn tell_sum(&mut self, delta: u32) {
        // SAFETY: the context of this program. It fails if the kernel has no such sum.
        unsafe { bpf_csum_update(self.skb, delta) };
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn windows(&mut self, near: usize, by: usize, len: usize) -> Option<(Bytes, Bytes)> {
        Some((self.window(near)?, self.beyond(by, len)?))
    }
    // The kernel has done these.
    #[inline(always)]
    fn shrink_head(&mut self, _: usize) -> bool {
        false
    }
    #[inline(always)]
    fn came_by(&mut self, _: u32) {}
    #[inline(always)]
    fn fix_far(&mut self, at: usize, by: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        self.fix(at, by, udp, addresses, ports)
    }
    #[inline(always)]
    fn blur(n: usize, noise: usize) -> usize {
        blur(n, noise)
    }
}

struct Round {
    skb: *mut __sk_buff,
    editing: Editing,
}

unsafe extern "C" fn step(i: u32, round: *mut Round) -> i64 {
    // SAFETY: what `edit_options` passed.
    let round = unsafe { &mut *round };
    round.editing.step(&mut Skb::new(round.skb), i as usize) as i64
}

impl Packet for Skb {
    type W<'b> = Bytes;
    #[inline(always)]
    fn window(&mut self, len: usize) -> Option<Bytes> {
        (self.at + len <= self.end).then_some(Bytes { at: self.at as *mut u8, len })
    }
    #[inline(always)]
    fn beyond(&mut self, by: usize, len: usize) -> Option<Bytes> {
        beyond(self.at, by, len, self.end)
    }
    #[inline(always)]
    fn reach(&mut self, len: usize) {
        if self.at + len > self.end {
            // SAFETY: the context of this program. If it fails the packet is shorter.
            unsafe { bpf_skb_pull_data(self.skb, (*self.skb).len.min(len as u32)) };
            self.reread();
        }
    }
    #[inline(always)]
    fn edit_options<I: Ip>(&mut self, header: u32, edit: Edit) -> Option<(Delta, Offer)> {
        let noise = self.window(I::L4 + 8)?.r32(I::L4 + 4);
        let editing = Editing::new(edit, I::L4, header, forget(0, noise));
        let mut round = Round { skb: self.skb, editing };
        // SAFETY: the callback gets back the pointer given here, while it is valid.
        unsafe { bpf_loop(options::MOST as u32, step as *mut c_void, &raw mut round as *mut c_void, 0) };
        round.editing.end()
    }
    /// The tail moves: of an unfinished checksum the kernel remembers where it begins.
    #[inline(always)]
    fn open_gap(&mut self, at: usize, by: usize, n: usize) -> bool {
        let done = gap::move_tail(self.skb, (at + by) as u32, n as u32);
        self.reread();
        done
    }
    #[inline(always)]
    fn frame_len(&self) -> u32 {
        // SAFETY: a field of the context.
        unsafe { (*self.skb).len }
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a field of the context.
        unsafe { (*self.skb).ifindex }
    }
    #[inline(always)]
    fn walk(&mut self, walk: Walk) -> Walked {
        Walked::from_word(tc_walk(self.skb, walk.at as u32, walk.first as u32, walk.len as u32))
    }
    #[inline(always)]
    fn fix_transport(&mut self, at: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        self.fix(at, 0, udp, addresses, ports)
    }
    #[inline(always)]
    fn fix_crc<I: Ip>(&mut self, by: usize, len: u32, [old, new]: [u32; 2], addresses: Delta) -> bool {
        self.changed_address::<I>(addresses);
        if old == new {
            return true;
        }
        self.tell_sum(Delta::default().replace(old, new).fold() as u32);
        let done = tc_fix_crc(self.skb, (I::L4 + sctp::CHECKSUM + by) as u32, old ^ new, len) != 0;
        self.reread();
        done
    }
    #[inline(always)]
    fn sctp_event(&mut self, at: usize, len: usize) -> u8 {
        tc_sctp_event(self.skb, at as u32, len as u32) as u8
    }
    #[inline(always)]
    fn word_at(&mut self, at: usize) -> Option<[u8; 4]> {
        load(self.skb, at as u32).map(u32::to_ne_bytes)
    }
    #[inline(always)]
    fn changed_address<I: Ip>(&mut self, delta: Delta) {
        // IPv4's header makes up for it.
        if I::FAMILY == 6 {
            self.tell_sum(delta.fold() as u32);
        }
    }
    /// Of a packet that [`Self::look_at_checksum`] has seen. An unfinished checksum will be finished on the way out, over what is
    /// left of the packet then: from there on it sums up to the complement of what the field holds now.
    #[inline(always)]
    fn sum_from(&self, from: usize, most: usize) -> u64 {
        if self.unfinished != 0 {
            return tc_sum(self.skb, from as u32, self.header as u32) + !(self.unfinished as u16) as u64;
        }
        tc_sum(self.skb, from as u32, most as u32)
    }
    #[inline(always)]
    fn grow_head(&mut self, n: usize) -> bool {
        // SAFETY: the context of this program.
        let done = unsafe { bpf_skb_change_head(self.skb, n as u32, 0) } == 0;
        self.reread();
        done
    }
    #[inline(always)]
    fn wrap<O: Ip>(&mut self, n: usize, protocol: u8) -> bool {
        let outer = if O::FAMILY == 4 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 };
        let transport = match protocol {
            IP_UDP => BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
            IP_GRE => BPF_F_ADJ_ROOM_ENCAP_L4_GRE,
            _ => 0,
        };
        // SAFETY: the context of this program.
        let done =
            unsafe { bpf_skb_adjust_room(self.skb, n as i32, BPF_ADJ_ROOM_MAC, (outer | transport) as u64) } == 0;
        self.reread();
        done
    }
    #[inline(always)]
    fn wrapped<I: Ip>(&mut self, n: usize) {
        let Some(w) = self.window(L3 + n) else { return };
        // SAFETY: bytes of the packet, checked; a multiple of four.
        let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, w.at.add(L3) as *mut u32, n as u32, 0) };
        self.tell_sum(sum as u32);
        if I::FAMILY == 6 {
            // The inner hop limit, one less.
            self.tell_sum(!u32::from(u16::from_ne_bytes([0, 1])));
        }
    }
    #[inline(always)]
    fn strip(&mut self, n: usize) -> bool {
        // SAFETY: the context of this program.
        let done = unsafe { bpf_skb_adjust_room(self.skb, -(n as i32), BPF_ADJ_ROOM_MAC, 0) } == 0;
        self.reread();
        done
    }
    /// In one piece then, no longer to be cut into segments, and without a sum of the device's.
    #[inline(always)]
    fn cut(&mut self, len: usize) -> bool {
        // SAFETY: the context of this program.
        let done = unsafe {
            // The kernel does all that only if there is something to cut.
            ((*self.skb).len > len as u32 || bpf_skb_change_tail(self.skb, len as u32 + 1, 0) == 0)
                && bpf_skb_change_tail(self.skb, len as u32, 0) == 0
        };
        self.reread();
        done
    }
}

/// A function of its own, so that the verifier goes through its rounds once, and not for each that asks.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tc_sum(skb: *mut __sk_buff, from: u32, most: u32) -> u64 {
    let packet = Skb::new(skb);
    sum(packet.at + (from & 0xff) as usize, packet.end, most as usize)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tc_walk(skb: *mut __sk_buff, at: u32, first: u32, len: u32) -> u64 {
    far::walk(&mut Skb::new(skb), Walk { at: at as usize, first: first as u8, len: len as usize }).word()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tc_sctp_event(skb: *mut __sk_buff, at: u32, len: u32) -> u32 {
    sctp::event(&mut Skb::new(skb), at as usize, len as usize) as u32
}

#[inline(always)]
fn load(skb: *mut __sk_buff, at: u32) -> Option<u32> {
    let mut word = 0u32;
    // SAFETY: the context of this program, and as many bytes as there is room for.
    let failed = unsafe { bpf_skb_load_bytes(skb.cast(), at, (&raw mut word).cast(), 4) };
    (failed == 0).then_some(word)
}

/// The CRC at `at`, of a packet of `len` bytes whose first word has changed. An unfinished one (CHECKSUM_PARTIAL) is 0, to be made of the packet as
/// it leaves, and must stay so: it is told by its taking no notice of a change. 0: the packet is too short.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tc_fix_crc(skb: *mut __sk_buff, at: u32, changed: u32, len: u32) -> u32 {
    let Some(old) = load(skb, at) else { return 0 };
    // SAFETY: the context of this program.
    unsafe { bpf_l4_csum_replace(skb, at, 0, 1, 0) };
    if load(skb, at) == Some(old) {
        return 1;
    }
    let new = old ^ crc_change(changed, len);
    // SAFETY: as above, and four bytes of our own.
    unsafe {
        bpf_csum_update(skb, Delta::default().replace(old, new).fold() as u32);
        (bpf_skb_store_bytes(skb, at, (&raw const new).cast(), 4, 0) == 0) as u32
    }
}
