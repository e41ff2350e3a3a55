//! Packets: access to their bytes, and what their headers say. Offsets are those of untagged Ethernet and IP headers without options;
//! what differs is recognised, and goes on as [`crate::far`] shows it.

use ::core::hint::cold_path;

use crate::abi::Address;
use crate::conn::{self, Addressing};
use crate::csum::Delta;
use crate::ct::{Key, V4, V6};
use crate::far::{Extras, Far, Place, Walk, Walked};
use crate::frag::Part;
use crate::options::{Edit, Offer};
use crate::proto::sctp;
use crate::verdict::{Reason, Stage, Verdict, drop, pass};

/// A packet in memory, at its Ethernet header.
pub trait Packet {
    type W<'a>: Window
    where
        Self: 'a;
    /// May it be SCTP? On the hot path it is known when that is compiled that it is not: SCTP goes by [`crate::far`].
    const SCTP: bool = false;
    /// `proto`, below 4, so that BPF's verifier no longer knows which: it then goes on once for all. `noise` as for [`Frame::blur`].
    #[inline(always)]
    fn any_proto(proto: u64, _noise: u32) -> u64 {
        proto
    }
    /// The first `len` bytes; `None` if the packet is shorter. `len` is a constant wherever this is called.
    fn window(&mut self, len: usize) -> Option<Self::W<'_>>;
    /// The same at offsets from `by` bytes further on (fewer than 2048): those of headers behind extra ones. Of a packet that hides extra
    /// headers itself, only offsets behind those.
    fn beyond(&mut self, by: usize, len: usize) -> Option<Self::W<'_>>;
    /// Length with the Ethernet header.
    fn frame_len(&self) -> u32;
    /// Interface it came in by.
    fn ifindex(&self) -> u32;
    /// Along the extension headers.
    fn walk(&mut self, walk: Walk) -> Walked;
    /// The checksum of a TCP, UDP or ICMP header at `at`, after a change of the pseudo-header (`addresses`) and of the transport header (`ports`).
    /// A method, since the kernel keeps unfinished checksums that only it can change. False: the packet is too short.
    fn fix_transport(&mut self, at: usize, udp: bool, addresses: Delta, ports: Delta) -> bool;
    /// The same of an SCTP packet, `by` bytes further on than plain headers reach and `len` bytes long, whose ports were `ports[0]` and now are
    /// `ports[1]`, as they lie in it. A pseudo-header is no part of that checksum, but for the kernel's sum over the packet `addresses` counts.
    fn fix_crc<I: Ip>(&mut self, by: usize, len: u32, ports: [u32; 2], addresses: Delta) -> bool;
    /// [`sctp::event`] of the SCTP packet of `len` bytes at `at`.
    fn sctp_event(&mut self, at: usize, len: usize) -> u8;
    /// Four bytes anywhere in the packet.
    fn word_at(&mut self, at: usize) -> Option<[u8; 4]>;
    /// An address has changed that no transport checksum in this packet makes up for. A method, since the kernel may have summed it up.
    #[inline(always)]
    fn changed_address<I: Ip>(&mut self, _delta: Delta) {}
    /// Have the first `len` bytes where [`Self::window`] can reach them, if there are so many.
    #[inline(always)]
    fn reach(&mut self, _len: usize) {}
    /// Edit the options of a TCP segment, whose header length has been checked; one behind extra headers is left as it is. As
    /// [`crate::options::Editing::end`].
    fn edit_options<I: Ip>(&mut self, header: u32, edit: Edit) -> Option<(Delta, Offer)>;
    /// Make room for `n` bytes at `at + by`, in the transport header or right behind it: what is there moves back, or what is before it to
    /// the front. `by` is a multiple of four, at most [`crate::options::MOST`]; the others are constants. The new bytes are undefined. False:
    /// it can't be done, and nothing is changed (or the packet is lost).
    fn open_gap(&mut self, at: usize, by: usize, n: usize) -> bool;
    /// Ones-complement sum of the bytes from `from` on, at most `most` of them (bounded by [`crate::icmp`]'s quotes).
    fn sum_from(&self, from: usize, most: usize) -> u64;
    /// Put `n` bytes in front (their content is undefined).
    fn grow_head(&mut self, n: usize) -> bool;
    /// Make room for an outer header of family `O` and what follows it, `n` bytes in all, of this IP protocol: between the Ethernet header
    /// and the packet, the Ethernet header being written anew afterwards. A method, since the kernel has to know of large packets what
    /// they are wrapped in.
    #[inline(always)]
    fn wrap<O: Ip>(&mut self, n: usize, _protocol: u8) -> bool {
        self.grow_head(n)
    }
    /// The outer headers are written: `n` bytes behind the Ethernet header.
    #[inline(always)]
    fn wrapped<I: Ip>(&mut self, _n: usize) {}
    /// Take `n` bytes out, between the Ethernet header, which is to be written anew afterwards, and the rest. False: it can't be done, and
    /// nothing is changed.
    fn strip(&mut self, n: usize) -> bool;
    /// Cut the packet to `len` bytes.
    fn cut(&mut self, len: usize) -> bool;
}

/// A packet as it lies in memory, from its Ethernet header on.
pub trait Frame: Packet {
    /// The first `near` bytes, and [`Packet::beyond`].
    fn windows(&mut self, near: usize, by: usize, len: usize) -> Option<(Self::W<'_>, Self::W<'_>)>;
    /// Take `n` bytes off in front.
    fn shrink_head(&mut self, n: usize) -> bool;
    /// It counts as come in by this interface from now on.
    fn came_by(&mut self, ifindex: u32);
    /// [`Packet::fix_transport`] behind `by` bytes of extra headers.
    fn fix_far(&mut self, at: usize, by: usize, udp: bool, addresses: Delta, ports: Delta) -> bool;
    /// `n`, a multiple of four below 512, so that BPF's verifier knows only that. `noise` is any number that it does not know.
    #[inline(always)]
    fn blur(n: usize, _noise: usize) -> usize {
        n
    }
}

/// Checked bytes; numbers as they lie in memory (network order on the wire, so compare with `to_be` constants).
/// An access past the window is a programming error: offsets here are constants.
pub trait Window {
    fn r8(&self, at: usize) -> u8;
    fn r16(&self, at: usize) -> u16;
    fn r32(&self, at: usize) -> u32;
    fn r64(&self, at: usize) -> u64;
    fn w8(&mut self, at: usize, v: u8);
    fn w16(&mut self, at: usize, v: u16);
    fn w32(&mut self, at: usize, v: u32);
    fn w64(&mut self, at: usize, v: u64);
}

/// Length of the Ethernet header; the IP header begins here.
pub const L3: usize = 14;
pub const ETHERTYPE: usize = 12;

pub const IP_TCP: u8 = 6;
pub const IP_UDP: u8 = 17;
pub const IP_GRE: u8 = 47;
pub const IP_SCTP: u8 = 132;
pub const IP_ICMP: u8 = 1;
pub const IP_ICMP6: u8 = 58;

/// The IP header of one family.
pub trait Ip: Addressing {
    /// IP header length.
    const HEADER: usize;
    /// Start of the transport header.
    const L4: usize = L3 + Self::HEADER;
    /// ... of TTL or hop limit.
    const TTL: usize;
    /// ... of the addresses.
    const SOURCE: usize;
    const DESTINATION: usize;
    const FAMILY: u8;
    const ETHERTYPE: u16;
    /// IP protocol number of its ICMP.
    const ICMP: u8;
    /// IP protocol number of such a packet inside another.
    const TUNNELLED: u8;
    fn address(w: &impl Window, at: usize) -> Self::Addr;
    /// Source and destination address as key words.
    fn addresses(w: &impl Window) -> Self::Words;
    fn set_address(w: &mut impl Window, at: usize, address: Self::Addr);
    fn delta(old: Self::Addr, new: Self::Addr) -> Delta;
    fn bytes(address: Self::Addr) -> [u8; 16];
    fn from_address(address: &Address) -> Self::Addr;
    /// No host that a reply could reach has this source address (RFC 1122 3.2.1.3, RFC 4291 2.5).
    fn martian(source: Self::Addr) -> bool;
    /// ICMP type of an error?
    fn is_error(kind: u8) -> bool;
    /// A quoted header whose addresses have changed: the change of its sum.
    fn fix_quoted_header(w: &mut impl Window, within: usize, addresses: Delta) -> Delta;
    /// Length of the IP packet, as its header says.
    fn total_len(w: &impl Window) -> u32;
    /// Key words as a slice; an address in two words and back (none is 0).
    fn slice(words: &Self::Words) -> &[u64];
    fn pair(address: Option<Self::Addr>) -> [u64; 2];
    fn from_pair(pair: [u64; 2]) -> Self::Addr;
    /// Ones-complement sum of an address.
    fn sum(address: Self::Addr) -> u64;
    /// TOS; flags and offset as the header of a tunnel is to have them, in host order (only DF); id.
    fn service(w: &impl Window) -> (u8, u16, u16);
    /// May routers fragment the packet? (IPv4 without DF.)
    fn may_fragment<P: Packet>(p: &mut P) -> bool;
    /// Ones-complement sum of a whole packet whose checksums are right, of its length without extra headers. (IPv6: it has none.)
    fn whole_sum(w: &impl Window, protocol: u8, len: u32) -> u64;
    /// A header from source to destination, with the length of what follows it; TOS and TTL; id and flags (IPv4).
    fn set_header(
        w: &mut impl Window,
        ends: [Self::Addr; 2],
        protocol: u8,
        len: u16,
        tos_ttl: [u8; 2],
        id_fragment: [u16; 2],
    );
    /// Transport protocol and length of the IP packet, if its header is sane and plain.
    fn plain(w: &impl Window, frame_len: u32) -> Option<(u8, u32)>;
    /// TTL - 1, and the header checksum for that (`ip_decrease_ttl`). The TTL is not 0.
    fn count_down(w: &mut impl Window);
    /// TTL - 1, and the header checksum for that and for `addresses`. The TTL is not 0.
    fn forward_header(w: &mut impl Window, addresses: Delta);
    /// The header checksum for `addresses`.
    fn fix_header(w: &mut impl Window, addresses: Delta);
    /// The packet has grown by so many bytes.
    fn grow(w: &mut impl Window, by: u16);
}

/// TTL 1, the first byte of its 16-bit word.
const TTL_UNIT: u16 = u16::from_ne_bytes([1, 0]);

impl Ip for V4 {
    const HEADER: usize = 20;
    const TTL: usize = L3 + 8;
    const SOURCE: usize = L3 + 12;
    const DESTINATION: usize = L3 + 16;
    const FAMILY: u8 = 4;
    const ETHERTYPE: u16 = 0x0800;
    const TUNNELLED: u8 = 4;
    const ICMP: u8 = IP_ICMP;
    #[inline(always)]
    fn address(w: &impl Window, at: usize) -> u32 {
        w.r32(at)
    }
    #[inline(always)]
    fn addresses(w: &impl Window) -> [u64; 1] {
        let both = w.r64(Self::SOURCE);
        [if cfg!(target_endian = "little") { both } else { both.rotate_left(32) }]
    }
    #[inline(always)]
    fn set_address(w: &mut impl Window, at: usize, address: u32) {
        w.w32(at, address);
    }
    #[inline(always)]
    fn delta(old: u32, new: u32) -> Delta {
        Delta::default().replace(old, new)
    }
    #[inline(always)]
    fn bytes(address: u32) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&address.to_ne_bytes());
        bytes
    }
    #[inline(always)]
    fn from_address(a: &Address) -> u32 {
        const _: () = assert!(u32::from_ne_bytes([1, 0, 0, 0]) == 1, "the first bytes of a word are its low ones");
        a.0[0] as u32
    }
    #[inline(always)]
    fn martian(source: u32) -> bool {
        let first = source.to_ne_bytes()[0];
        first == 0 || first == 127 || first >= 224
    }
    #[inline(always)]
    fn plain(w: &impl Window, frame_len: u32) -> Option<(u8, u32)> {
        let len = Self::total_len(w);
        // Too small or too large, in one comparison: the header is there.
        let fits = len.wrapping_sub(20) <= frame_len.wrapping_sub(Self::L4 as u32);
        // More fragments to come, or an offset.
        let fragment = w.r16(L3 + 6) & 0x3fffu16.to_be() != 0;
        (w.r8(L3) == 0x45 && fits && !fragment).then(|| (w.r8(L3 + 9), len))
    }
    #[inline(always)]
    fn count_down(w: &mut impl Window) {
        let check = u32::from(w.r16(L3 + 10)) + u32::from(TTL_UNIT);
        w.w16(L3 + 10, (check + u32::from(check >= 0xffff)) as u16);
        w.w16(Self::TTL, w.r16(Self::TTL).wrapping_sub(TTL_UNIT));
    }
    #[inline(always)]
    fn forward_header(w: &mut impl Window, addresses: Delta) {
        w.w16(L3 + 10, crate::csum::adjust(w.r16(L3 + 10), addresses.replace16(TTL_UNIT, 0)));
        w.w16(Self::TTL, w.r16(Self::TTL).wrapping_sub(TTL_UNIT));
    }
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, source quench, time exceeded (`ip_vs_in_icmp`).
        matches!(kind, 3 | 4 | 11)
    }
    #[inline(always)]
    fn fix_quoted_header(w: &mut impl Window, within: usize, addresses: Delta) -> Delta {
        crate::related::fix_checksum(w, L3 + 10 + within, addresses)
    }
    #[inline(always)]
    fn total_len(w: &impl Window) -> u32 {
        u32::from(u16::from_be(w.r16(L3 + 2)))
    }
    #[inline(always)]
    fn slice(words: &[u64; 1]) -> &[u64] {
        words
    }
    #[inline(always)]
    fn pair(address: Option<u32>) -> [u64; 2] {
        [u64::from(address.unwrap_or(0)), 0]
    }
    #[inline(always)]
    fn from_pair([address, _]: [u64; 2]) -> u32 {
        address as u32
    }
    #[inline(always)]
    fn sum(address: u32) -> u64 {
        u64::from(address)
    }
    #[inline(always)]
    fn service(w: &impl Window) -> (u8, u16, u16) {
        let df = u16::from_be(w.r16(L3 + 6)) & 0x4000;
        (w.r8(L3 + 1), df, if df != 0 { 0 } else { u16::from_be(w.r16(L3 + 4)) })
    }
    #[inline(always)]
    fn may_fragment<P: Packet>(p: &mut P) -> bool {
        p.window(Self::L4).is_some_and(|w| w.r16(L3 + 6) & 0x4000u16.to_be() == 0)
    }
    #[inline(always)]
    fn whole_sum(w: &impl Window, protocol: u8, len: u32) -> u64 {
        // The header's own sum is nothing; that of the segment what its pseudo-header lacks.
        let pseudo = Self::sum(w.r32(Self::SOURCE)) + Self::sum(w.r32(Self::DESTINATION));
        let pseudo = pseudo + u64::from(u16::from(protocol).to_be()) + u64::from(((len - 20) as u16).to_be());
        u64::from(!crate::csum::fold(pseudo))
    }
    #[inline(always)]
    fn set_header(
        w: &mut impl Window,
        [source, destination]: [u32; 2],
        protocol: u8,
        len: u16,
        [tos, ttl]: [u8; 2],
        [id, fragment]: [u16; 2],
    ) {
        let words = [
            0x4500_0000 | u32::from(tos) << 16 | u32::from(len.wrapping_add(20)),
            u32::from(id) << 16 | u32::from(fragment),
            u32::from(ttl) << 24 | u32::from(protocol) << 16,
        ];
        let mut sum = Self::sum(source) + Self::sum(destination);
        let mut i = 0;
        while i < words.len() {
            w.w32(L3 + 4 * i, words[i].to_be());
            sum += u64::from(words[i].to_be());
            i += 1;
        }
        w.w16(L3 + 10, !crate::csum::fold(sum));
        w.w32(Self::SOURCE, source);
        w.w32(Self::DESTINATION, destination);
    }
    #[inline(always)]
    fn fix_header(w: &mut impl Window, addresses: Delta) {
        w.w16(L3 + 10, crate::csum::adjust(w.r16(L3 + 10), addresses));
    }
    #[inline(always)]
    fn grow(w: &mut impl Window, by: u16) {
        let old = w.r16(L3 + 2);
        let new = u16::from_be(old).wrapping_add(by).to_be();
        w.w16(L3 + 2, new);
        Self::fix_header(w, Delta::default().replace16(old, new));
    }
}

impl Ip for V6 {
    const HEADER: usize = 40;
    const TTL: usize = L3 + 7;
    const SOURCE: usize = L3 + 8;
    const DESTINATION: usize = L3 + 24;
    const FAMILY: u8 = 6;
    const ETHERTYPE: u16 = 0x86dd;
    const TUNNELLED: u8 = 41;
    const ICMP: u8 = IP_ICMP6;
    #[inline(always)]
    fn address(w: &impl Window, at: usize) -> [u64; 2] {
        [w.r64(at), w.r64(at + 8)]
    }
    #[inline(always)]
    fn addresses(w: &impl Window) -> [u64; 4] {
        [w.r64(Self::SOURCE), w.r64(Self::SOURCE + 8), w.r64(Self::DESTINATION), w.r64(Self::DESTINATION + 8)]
    }
    #[inline(always)]
    fn set_address(w: &mut impl Window, at: usize, address: [u64; 2]) {
        w.w64(at, address[0]);
        w.w64(at + 8, address[1]);
    }
    #[inline(always)]
    fn delta(old: [u64; 2], new: [u64; 2]) -> Delta {
        Delta::default()
            .replace(old[0] as u32, new[0] as u32)
            .replace((old[0] >> 32) as u32, (new[0] >> 32) as u32)
            .replace(old[1] as u32, new[1] as u32)
            .replace((old[1] >> 32) as u32, (new[1] >> 32) as u32)
    }
    #[inline(always)]
    fn bytes(a: [u64; 2]) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&a[0].to_ne_bytes());
        bytes[8..].copy_from_slice(&a[1].to_ne_bytes());
        bytes
    }
    #[inline(always)]
    fn from_address(a: &Address) -> [u64; 2] {
        a.0
    }
    #[inline(always)]
    fn martian(source: [u64; 2]) -> bool {
        let multicast = source[0].to_ne_bytes()[0] == 0xff;
        // ::, ::1, and what is mapped from IPv4 (::ffff:0:0/96), which is in no packet (`ip6_rcv_core`).
        let low = u64::from_be(source[1]);
        multicast || source[0] == 0 && (low <= 1 || low >> 32 == 0xffff)
    }
    #[inline(always)]
    fn plain(w: &impl Window, frame_len: u32) -> Option<(u8, u32)> {
        let len = Self::total_len(w);
        (w.r8(L3) >> 4 == 6 && len <= frame_len - L3 as u32).then(|| (w.r8(L3 + 6), len))
    }
    #[inline(always)]
    fn count_down(w: &mut impl Window) {
        // Next header and hop limit share a word; the hop limit is its second byte. No header checksum in IPv6.
        let old = w.r16(L3 + 6);
        w.w16(L3 + 6, old.wrapping_sub(u16::from_ne_bytes([0, 1])));
    }
    #[inline(always)]
    fn forward_header(w: &mut impl Window, _: Delta) {
        Self::count_down(w);
    }
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, too big, time exceeded, parameter problem.
        matches!(kind, 1..=4)
    }
    #[inline(always)]
    fn fix_quoted_header(_: &mut impl Window, _: usize, addresses: Delta) -> Delta {
        addresses
    }
    #[inline(always)]
    fn total_len(w: &impl Window) -> u32 {
        u32::from(u16::from_be(w.r16(L3 + 4))) + 40
    }
    #[inline(always)]
    fn slice(words: &[u64; 4]) -> &[u64] {
        words
    }
    #[inline(always)]
    fn pair(address: Option<[u64; 2]>) -> [u64; 2] {
        address.unwrap_or([0, 0])
    }
    #[inline(always)]
    fn from_pair(pair: [u64; 2]) -> [u64; 2] {
        pair
    }
    #[inline(always)]
    fn sum(a: [u64; 2]) -> u64 {
        let halves = |v: u64| (v & 0xffff_ffff) + (v >> 32);
        halves(a[0]) + halves(a[1])
    }
    #[inline(always)]
    fn service(w: &impl Window) -> (u8, u16, u16) {
        // Routers don't fragment IPv6, and so not what carries it.
        ((u16::from_be(w.r16(L3)) >> 4) as u8, 0x4000, 0)
    }
    #[inline(always)]
    fn may_fragment<P: Packet>(_: &mut P) -> bool {
        false
    }
    #[inline(always)]
    fn whole_sum(w: &impl Window, protocol: u8, len: u32) -> u64 {
        let [a, b] = [Self::address(w, Self::SOURCE), Self::address(w, Self::DESTINATION)];
        let addresses = Self::sum(a) + Self::sum(b);
        let pseudo = addresses + u64::from(u16::from(protocol).to_be()) + u64::from(((len - 40) as u16).to_be());
        let header = u64::from(w.r32(L3)) + u64::from(w.r32(L3 + 4)) + addresses;
        header + u64::from(!crate::csum::fold(pseudo))
    }
    #[inline(always)]
    fn set_header(
        w: &mut impl Window,
        [source, destination]: [[u64; 2]; 2],
        protocol: u8,
        len: u16,
        [tos, ttl]: [u8; 2],
        _: [u16; 2],
    ) {
        w.w32(L3, (0x6000_0000 | u32::from(tos) << 20).to_be());
        w.w16(L3 + 4, len.to_be());
        w.w16(L3 + 6, (u16::from(protocol) << 8 | u16::from(ttl)).to_be());
        Self::set_address(w, Self::SOURCE, source);
        Self::set_address(w, Self::DESTINATION, destination);
    }
    #[inline(always)]
    fn fix_header(_: &mut impl Window, _: Delta) {}
    #[inline(always)]
    fn grow(w: &mut impl Window, by: u16) {
        w.w16(L3 + 4, u16::from_be(w.r16(L3 + 4)).wrapping_add(by).to_be());
    }
}

/// What the pipeline needs to know of a TCP, UDP or SCTP packet.
pub struct Flow<I: Ip> {
    pub key: Key<I::Words>,
    pub tcp: bool,
    /// Neither: UDP.
    pub sctp: bool,
    /// TCP flags byte; event of SCTP ([`sctp::event`]); 0 for UDP.
    pub flags: u8,
    pub ttl: u8,
    /// Bytes of extra headers before the transport header.
    pub by: u16,
    /// Of a fragment that is not the first one, the ports are not known, and 0 here.
    pub part: Part,
    /// Length of the IP packet.
    pub len: u32,
    /// What its client has proved its address with (`cookie`); 0: nothing.
    pub cookie: u32,
    /// The dest of its connection, where that has been looked up before; 0: not.
    pub dest: u32,
    /// The packet is an ICMP error about this flow (`schedule_icmp`).
    pub error: bool,
}

impl<I: Ip> Flow<I> {
    #[inline(always)]
    pub fn source(&self) -> I::Addr {
        I::source(&self.key.words)
    }
    #[inline(always)]
    pub fn destination(&self) -> I::Addr {
        I::destination(&self.key.words)
    }
    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        if self.sctp {
            IP_SCTP
        } else if self.tcp {
            IP_TCP
        } else {
            IP_UDP
        }
    }
    /// As in [`crate::ct::proto`].
    #[inline(always)]
    pub fn proto(&self) -> u64 {
        number(self.tcp, self.sctp)
    }
    /// The same where its packet shows as a `P`.
    #[inline(always)]
    pub fn proto_by<P: Packet>(&self) -> u64 {
        number(self.tcp, P::SCTP && self.sctp)
    }
    /// Length of the transport header and all behind it.
    #[inline(always)]
    pub fn transport_len(&self) -> u32 {
        self.len.wrapping_sub(I::HEADER as u32 + u32::from(self.by))
    }
}

/// See [`Flow::proto`].
#[inline(always)]
fn number(tcp: bool, sctp: bool) -> u64 {
    if sctp {
        conn::SCTP
    } else if tcp {
        conn::TCP
    } else {
        conn::UDP
    }
}

/// From bytes to flow, of a plain packet; `Err` is what becomes of any other, and of one that has none.
#[inline(always)]
pub fn parse<I: Ip, P: Packet>(p: &mut P) -> Result<Flow<I>, Verdict> {
    let frame_len = p.frame_len();
    let plain = {
        let Some(w) = p.window(I::L4) else { return Err(drop(Reason::Short)) };
        I::plain(&w, frame_len)
    };
    match plain {
        Some((protocol @ (IP_TCP | IP_UDP | IP_ICMP | IP_ICMP6), len)) => {
            transport(p, &Place { protocol, by: 0, len, part: Part::WHOLE })
        }
        _ => {
            cold_path();
            Err(Verdict::go(Stage::Far, 0))
        }
    }
}

/// The same of a packet whose transport header is looked for, and found.
#[inline(always)]
pub fn parse_far<'p, I: Extras, P: Frame>(p: &'p mut P) -> Result<(Far<'p, I, P>, Flow<I>), Verdict> {
    let place = I::find(p)?;
    let mut far = Far::new(p, place.by);
    let flow = transport(&mut far, &place)?;
    Ok((far, flow))
}

/// Flow of a packet that shows as a plain one.
#[inline(always)]
fn transport<I: Ip, P: Packet>(p: &mut P, place: &Place) -> Result<Flow<I>, Verdict> {
    let Place { protocol, by, len, part } = *place;
    let sctp = P::SCTP && protocol == IP_SCTP;
    let (tcp, header) = match protocol {
        IP_TCP => (true, 20),
        IP_UDP => (false, 8),
        IP_SCTP if P::SCTP => (false, sctp::HEADER),
        IP_ICMP | IP_ICMP6 if part.is_whole() => return Err(Verdict::go(Stage::Related, 0)),
        IP_ICMP | IP_ICMP6 => return Err(pass(Reason::Fragment)),
        _ => return Err(pass(Reason::OtherProtocol)),
    };
    // Of a datagram's first fragment, the header is nowhere else.
    let short = if part.is_whole() { pass(Reason::ShortTransport) } else { drop(Reason::FragmentTiny) };
    // `by` bytes and the IP header are within it.
    let plain = len - by as u32;
    let (ports, flags) = if part.is_later() {
        (0, 0)
    } else if plain < (I::HEADER + header) as u32 {
        return Err(short);
    } else if tcp {
        let Some(w) = p.window(I::L4 + 20) else { return Err(short) };
        let doff = u32::from(w.r8(I::L4 + 12) >> 4) * 4;
        if doff < 20 || doff > plain - I::HEADER as u32 {
            return Err(short);
        }
        (w.r32(I::L4), w.r8(I::L4 + 13))
    } else if sctp {
        let event = p.sctp_event(I::L4, plain as usize - I::HEADER);
        let Some(w) = p.window(I::L4 + sctp::HEADER) else { return Err(short) };
        (w.r32(I::L4), event)
    } else {
        let Some(w) = p.window(I::L4 + 8) else { return Err(short) };
        (w.r32(I::L4), 0)
    };
    let Some(w) = p.window(I::L4) else { return Err(drop(Reason::Short)) };
    let mut proto = number(tcp, sctp);
    let (mut tcp, mut sctp) = (tcp, sctp);
    if P::SCTP {
        proto = P::any_proto(proto, ports);
        (tcp, sctp) = (proto == conn::TCP, proto == conn::SCTP);
    }
    let key = Key::of(I::addresses(&w), u32::from_be(ports), proto);
    Ok(Flow { key, tcp, sctp, flags, ttl: w.r8(I::TTL), by: by as u16, part, len, cookie: 0, dest: 0, error: false })
}
