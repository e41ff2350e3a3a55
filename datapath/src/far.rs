//! Transport headers that lie further on than in a plain packet: behind IPv4 options, or behind IPv6 extension headers. Nothing else about
//! such a packet is special: [`Far`] shows it as a plain one, so that the same code handles both, and the extra headers stay as they are.

use crate::csum::Delta;
use crate::ct::{V4, V6};
use crate::frag::Part;
use crate::options::{Edit, Offer};
use crate::packet::{Frame, Ip, L3, Packet, Window};
use crate::verdict::{Reason, Verdict, drop, pass};
use core::marker::PhantomData;

/// Bytes of extra headers that are looked through at most: nine bits, a multiple of four.
pub const MOST: usize = 508;
/// Extension headers that are looked through at most.
const HEADERS: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// Where the transport header of a packet is.
#[derive(Clone, Copy)]
pub struct Place {
    /// IP protocol number.
    pub protocol: u8,
    /// Bytes between the plain IP header and the transport header.
    pub by: usize,
    /// Length of the IP packet.
    pub len: u32,
    /// Which part of its datagram it is.
    pub part: Part,
}

/// Is this the number of an extension header that another header follows? (Fragments are looked for elsewhere; mobility headers are the
/// last ones today, but have the field.)
#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6)
}

/// Along the extension headers (`ipv6_find_hdr`): what is to be looked through.
#[derive(Clone, Copy)]
pub struct Walk {
    /// Where they begin, as an offset of the frame.
    pub at: usize,
    /// Number of the first.
    pub first: u8,
    /// Bytes that they may take.
    pub len: usize,
}

/// Where they end, or why that is not known, in one word: `0:40 | protocol:8 | by:16`, or `1:1 | 0:63` and so on.
#[derive(Clone, Copy)]
pub struct Walked(u64);

impl Walked {
    const LYING: Walked = Walked(1 << 32);
    const TOO_MANY: Walked = Walked(2 << 32);
    const ROUTED: Walked = Walked(3 << 32);
    #[inline(always)]
    pub fn word(self) -> u64 {
        self.0
    }
    #[inline(always)]
    pub fn from_word(word: u64) -> Walked {
        Walked(word)
    }
    /// The transport protocol, and how many bytes they take.
    #[inline(always)]
    fn end(self) -> Result<(u8, usize), Verdict> {
        match self.0 >> 32 {
            0 => Ok(((self.0 >> 16) as u8, (self.0 & 0x1fc) as usize)),
            1 => Err(drop(Reason::Extensions)),
            2 => Err(pass(Reason::Options)),
            _ => Err(pass(Reason::SourceRoute)),
        }
    }
}

/// See [`Walk`]. A function of its own where the packet is ([`Frame::walk`]): its result is one number, whatever the way to it was.
#[inline(always)]
pub fn walk<P: Frame>(p: &mut P, w: Walk) -> Walked {
    let (mut by, mut protocol, mut i) = (0, w.first, 0);
    while i < HEADERS && is_extension(protocol) {
        // Each is at least eight bytes long.
        if by + 8 > w.len {
            return Walked::LYING;
        }
        let Some(header) = p.beyond(w.at + by, 8) else { return Walked::LYING };
        let units = header.r8(1) as usize;
        if protocol == ROUTING && header.r8(3) != 0 {
            return Walked::ROUTED;
        }
        by += if protocol == AUTHENTICATION { (units + 2) * 4 } else { (units + 1) * 8 };
        if by > w.len {
            return Walked::LYING;
        }
        if by > MOST {
            return Walked::TOO_MANY;
        }
        protocol = header.r8(0);
        by = P::blur(by, units);
        i += 1;
    }
    if is_extension(protocol) { Walked::TOO_MANY } else { Walked((protocol as u64) << 16 | by as u64) }
}

/// Which part of its datagram a fragment is that brings `len` bytes. Only the last one may end anywhere, and none behind 64 KiB.
#[inline(always)]
fn part(id: u32, at: u16, more: bool, len: usize) -> Result<Part, Verdict> {
    let wrong = more && !len.is_multiple_of(8) || at as usize * 8 + len > 0xffff;
    if wrong && (more || at != 0) { Err(drop(Reason::Malformed)) } else { Ok(Part::new(id, at, more)) }
}

/// Headers that may lie between the IP header and the transport header.
pub trait Extras: Ip {
    /// Header sanity of any packet, and where its transport header is.
    fn find<P: Packet>(p: &mut P) -> Result<Place, Verdict>;
    /// Transport protocol of a packet that an ICMP error quotes, `within` bytes further on than one of its own, and how many bytes of extra
    /// headers it has. `None`: its transport header is not there.
    fn find_quoted<P: Packet>(p: &mut P, within: usize) -> Option<(u8, usize)>;
}

impl Extras for V4 {
    #[inline(always)]
    fn find<P: Packet>(p: &mut P) -> Result<Place, Verdict> {
        let frame_len = p.frame_len();
        let Some(w) = p.window(V4::L4) else { return Err(drop(Reason::Short)) };
        let (version_ihl, len) = (w.r8(L3), V4::total_len(&w));
        let ihl = (version_ihl & 0xf) as usize * 4;
        if version_ihl >> 4 != 4 || ihl < V4::HEADER || (len as usize) < ihl || len > frame_len - L3 as u32 {
            return Err(drop(Reason::Malformed));
        }
        let fragment = u16::from_be(w.r16(L3 + 6));
        let (at, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
        let id = if at != 0 || more { u16::from_be(w.r16(L3 + 4)) } else { 0 };
        let part = part(u32::from(id), at, more, len as usize - ihl)?;
        Ok(Place { protocol: w.r8(L3 + 9), by: ihl - V4::HEADER, len, part })
    }
    #[inline(always)]
    fn find_quoted<P: Packet>(p: &mut P, within: usize) -> Option<(u8, usize)> {
        let w = p.window(V4::L4 + within)?;
        let version_ihl = w.r8(L3 + within);
        let ihl = (version_ihl & 0xf) as usize * 4;
        let first = w.r16(L3 + 6 + within) & 0x1fffu16.to_be() == 0;
        (version_ihl >> 4 == 4 && ihl >= V4::HEADER && first).then(|| (w.r8(L3 + 9 + within), ihl - V4::HEADER))
    }
}

impl Extras for V6 {
    #[inline(always)]
    fn find<P: Packet>(p: &mut P) -> Result<Place, Verdict> {
        let frame_len = p.frame_len();
        let (version, len, first) = {
            let Some(w) = p.window(V6::L4) else { return Err(drop(Reason::Short)) };
            (w.r8(L3) >> 4, V6::total_len(&w), w.r8(L3 + 6))
        };
        if version != 6 || len > frame_len - L3 as u32 {
            return Err(drop(Reason::Malformed));
        }
        let walk = Walk { at: V6::L4, first, len: len as usize - V6::HEADER };
        let (protocol, by) = p.walk(walk).end()?;
        if protocol != FRAGMENT {
            return Ok(Place { protocol, by, len, part: Part::WHOLE });
        }
        let room = len as usize - V6::HEADER;
        let (next, word, id) = {
            let w = if by + 8 > room { None } else { p.beyond(by, V6::L4 + 8) };
            let Some(w) = w else { return Err(drop(Reason::Extensions)) };
            (w.r8(V6::L4), u16::from_be(w.r16(V6::L4 + 2)), u32::from_be(w.r32(V6::L4 + 4)))
        };
        let by = by + 8;
        let part = part(if word & !6 == 0 { 0 } else { id }, word >> 3, word & 1 != 0, room - by)?;
        if !part.is_whole() {
            // Headers that belong to the datagram are in its first fragment alone.
            return if is_extension(next) {
                Err(pass(Reason::Options))
            } else {
                Ok(Place { protocol: next, by, len, part })
            };
        }
        // A datagram in one fragment (RFC 6946).
        let (protocol, more) = p.walk(Walk { at: V6::L4 + by, first: next, len: room - by }).end()?;
        if by + more > MOST || protocol == FRAGMENT {
            return Err(pass(Reason::Options));
        }
        Ok(Place { protocol, by: by + more, len, part })
    }
    #[inline(always)]
    fn find_quoted<P: Packet>(p: &mut P, within: usize) -> Option<(u8, usize)> {
        let (version, first) = {
            let w = p.window(V6::L4 + within)?;
            (w.r8(L3 + within) >> 4, w.r8(L3 + 6 + within))
        };
        // How much of it is quoted shows when its ports are looked for.
        if version != 6 { None } else { p.walk(Walk { at: V6::L4 + within, first, len: MOST }).end().ok() }
    }
}

/// A packet, everything of which from the transport header on lies `by` bytes further.
pub struct Far<'p, I, P> {
    p: &'p mut P,
    /// `None`: it has got new headers in front, which are in one piece, and nobody looks further.
    by: Option<usize>,
    family: PhantomData<I>,
}

impl<'p, I: Ip, P: Frame> Far<'p, I, P> {
    #[inline(always)]
    pub fn new(p: &'p mut P, by: usize) -> Self {
        Far { p, by: Some(by), family: PhantomData }
    }
}

/// Its two parts. Offsets are constants, so which of the two an access goes to is known when it is compiled.
pub struct Seam<W, I> {
    near: W,
    far: Option<W>,
    family: PhantomData<I>,
}

macro_rules! access {
    ($($read:ident $write:ident $t:ty;)*) => { $(
        #[inline(always)]
        fn $read(&self, at: usize) -> $t {
            match &self.far {
                Some(far) if at >= I::L4 => far.$read(at),
                _ => self.near.$read(at),
            }
        }
        #[inline(always)]
        fn $write(&mut self, at: usize, v: $t) {
            match &mut self.far {
                Some(far) if at >= I::L4 => far.$write(at, v),
                _ => self.near.$write(at, v),
            }
        }
    )* };
}

impl<W: Window, I: Ip> Window for Seam<W, I> {
    #[inline(always)]
    fn r8(&self, at: usize) -> u8 {
        match &self.far {
            Some(far) if at >= I::L4 => far.r8(at),
            _ => self.near.r8(at),
        }
    }
    #[inline(always)]
    fn w8(&mut self, at: usize, v: u8) {
        match &mut self.far {
            Some(far) if at >= I::L4 => far.w8(at, v),
            _ => self.near.w8(at, v),
        }
    }
    access! { r16 w16 u16; r32 w32 u32; r64 w64 u64; }
}

impl<I: Ip, P: Frame> Packet for Far<'_, I, P> {
    type W<'a>
        = Seam<P::W<'a>, I>
    where
        Self: 'a;
    const SCTP: bool = true;
    #[inline(always)]
    fn any_proto(proto: u64, noise: u32) -> u64 {
        (P::blur(4 * proto as usize, noise as usize) as u64 / 4) & 3
    }
    #[inline(always)]
    fn window(&mut self, len: usize) -> Option<Self::W<'_>> {
        let (near, far) = match self.by {
            Some(by) if len > I::L4 => {
                let (near, far) = self.p.windows(I::L4, by, len)?;
                (near, Some(far))
            }
            _ => (self.p.window(len)?, None),
        };
        Some(Seam { near, far, family: PhantomData })
    }
    #[inline(always)]
    fn beyond(&mut self, by: usize, len: usize) -> Option<Self::W<'_>> {
        Some(Seam { near: self.p.beyond(self.by.unwrap_or(0) + by, len)?, far: None, family: PhantomData })
    }
    #[inline(always)]
    fn frame_len(&self) -> u32 {
        self.p.frame_len()
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.p.ifindex()
    }
    #[inline(always)]
    fn walk(&mut self, walk: Walk) -> Walked {
        self.p.walk(Walk { at: walk.at + self.by.unwrap_or(0), ..walk })
    }
    #[inline(always)]
    fn fix_transport(&mut self, at: usize, udp: bool, addresses: Delta, ports: Delta) -> bool {
        self.p.fix_far(at, self.by.unwrap_or(0), udp, addresses, ports)
    }
    #[inline(always)]
    fn fix_crc<F: Ip>(&mut self, by: usize, len: u32, ports: [u32; 2], addresses: Delta) -> bool {
        self.p.fix_crc::<F>(by + self.by.unwrap_or(0), len, ports, addresses)
    }
    #[inline(always)]
    fn sctp_event(&mut self, at: usize, len: usize) -> u8 {
        self.p.sctp_event(at + self.by.unwrap_or(0), len)
    }
    #[inline(always)]
    fn word_at(&mut self, at: usize) -> Option<[u8; 4]> {
        self.p.word_at(at)
    }
    #[inline(always)]
    fn changed_address<F: Ip>(&mut self, delta: Delta) {
        self.p.changed_address::<F>(delta);
    }
    #[inline(always)]
    fn sum_from(&self, from: usize, most: usize) -> u64 {
        self.p.sum_from(from, most)
    }
    #[inline(always)]
    fn grow_head(&mut self, n: usize) -> bool {
        self.by = None;
        self.p.grow_head(n)
    }
    #[inline(always)]
    fn wrap<O: Ip>(&mut self, n: usize, protocol: u8) -> bool {
        self.by = None;
        self.p.wrap::<O>(n, protocol)
    }
    #[inline(always)]
    fn wrapped<F: Ip>(&mut self, n: usize) {
        self.p.wrapped::<F>(n);
    }
    #[inline(always)]
    fn cut(&mut self, len: usize) -> bool {
        self.p.cut(len)
    }
    #[inline(always)]
    fn strip(&mut self, n: usize) -> bool {
        self.p.strip(n)
    }
    #[inline(always)]
    fn reach(&mut self, len: usize) {
        self.p.reach(len + self.by.unwrap_or(0));
    }
    #[inline(always)]
    fn edit_options<F: Ip>(&mut self, header: u32, edit: Edit) -> Option<(Delta, Offer)> {
        if self.by == Some(0) {
            self.p.edit_options::<F>(header, edit)
        } else {
            Some((Delta::default(), Offer::default()))
        }
    }
    /// Not behind extra headers.
    #[inline(always)]
    fn open_gap(&mut self, at: usize, by: usize, n: usize) -> bool {
        self.by == Some(0) && self.p.open_gap(at, by, n)
    }
}
