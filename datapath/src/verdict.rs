//! The one way out: what happens to a packet, and why. Each reason has a counter; all counters together are the packets seen.

use crate::abi::hop;

/// What the entry point does with the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Out of this interface, ready to go.
    Out(u32),
    /// Out of the interface it came in by.
    Back,
    /// Up to the kernel.
    Up,
    Drop,
}

/// Parts of the pipeline, each of which begins with the packet anew. A BPF program makes a function of each, verified by itself and
/// with a stack of its own; the hot path keeps its registers.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The way of a known connection; where all packets begin.
    Whole = 0,
    /// The connection is over, and the packet begins another: it makes room.
    Retire = 1,
    /// No connection: service and scheduler.
    First = 2,
    /// Enter the connection; the number is its dest.
    Enter = 3,
    /// ... and the entry for its replies; the number is `conn::Place`.
    Link = 4,
    /// Something is in the way of that.
    MakeWay = 5,
    /// No room for it: the connection is given up.
    GiveUp = 6,
    /// Answer the client with an ICMP error.
    TimeExceeded = 7,
    PortUnreachable = 8,
    /// To the dest that the number says: the first packet of a connection.
    Forward = 9,
    /// The first packet of a connection whose entries are made, to its dest; the number is `conn::Place`.
    Linked = 10,
    /// To the dest that the number says, of a connection that has been seen to and needs more than a rewrite (the next hop is not
    /// ready, the server is this host, the TTL is used up).
    Anew = 11,
    /// Into a tunnel to the dest that the number says.
    Tunnel = 12,
    /// Answer the client that the packet is too large; the number is how large it may be.
    TooBig = 13,
    /// ICMP.
    Related = 14,
    /// An ICMP error into a tunnel to the dest that the number says.
    ErrorTunnel = 15,
    /// FULLNAT: a local address and port for the connection, and the entry for its replies; the number is `conn::Place`.
    Lend = 16,
    /// ... a client's packet of the connection whose forward entry is in the slot that the number says.
    Fullnat = 17,
    /// ... one that begins the connection, or may have to tell the real server whose it is.
    Introduce = 18,
    /// ... a real server's reply that has hit the entry in the slot that the number says.
    FullnatReply = 19,
    /// ... the TCP options of such a reply.
    ReplyOptions = 20,
    /// ... such a reply on its way; the number is the slot of the connection's forward entry, and where it goes.
    FullnatSend = 21,
    /// A packet with IPv4 options or IPv6 extension headers: as [`Stage::Whole`].
    Far = 22,
    /// A fragment that is not the first one.
    Fragment = 23,
    /// A first fragment, which leaves word for those after it, if its connection is there; it then goes on in [`Stage::Far`] with the number 1.
    Note = 24,
    /// An ICMP error about a connection by full NAT.
    ErrorLent = 25,
    /// A real server's reply (NAT) with IPv4 options or IPv6 extension headers.
    FarReply = 26,
    /// An ICMP error about the outer packet of a tunnel.
    ErrorOuter = 27,
    /// A SYN that is answered with a cookie; the number is what its client's segments are to have room for.
    Challenge = 28,
    /// What brings a cookie back, or comes before the server has answered: see [`crate::cookie::knock`].
    Knock = 29,
    /// A client's packet of a connection whose server has not acknowledged its PROXY header; the number is the slot of its forward entry
    /// (or see [`crate::proxy::TURNED`]).
    Announce = 30,
    /// Of no flow that is known here, and it begins none; the number is the reason for which it is passed. An elder may know it.
    Stranger = 31,
    /// A fragment that came before the first one of its datagram.
    Early = 32,
    /// A first fragment that is none of ours: those after it are told. The number is the low half of its verdict.
    Elsewhere = 33,
    /// Too large for a tunnel, and to be cut: its parts may have as many bytes as the number says.
    Large = 34,
    /// For no service, and perhaps from a real server that is to be told so (`nat_icmp_send`).
    Reject = 35,
}

/// One word, so that it stays in a register: `ifindex:32 | 0:15 | resolve:1 | action:8 | reason:8`, or, if the packet goes on, which its
/// sign says, `1:1 | 0:15 | number:32 | 0:8 | stage:8` ([`Verdict::TAGGED`] has bit 15).
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Verdict(u64);

const OUT: u64 = 0;
const BACK: u64 = 1;
const UP: u64 = 2;
const DROP: u64 = 3;
/// With DROP: not dropped, but done with (so that who goes on has nothing to look at).
const DONE: u64 = 1 << 10;
/// The counter of what the elder has done, which no reason has: the elder has counted it.
const DONE_COUNTER: u64 = COUNTERS as u64 - 1;
const GO: u64 = 1 << 63;
const RESOLVE: u64 = 1 << 16;

impl Verdict {
    /// None yet: the frame has VLAN tags, and what it came in by is to be found out first.
    pub const TAGGED: Verdict = Verdict(GO | 1 << 15);
    #[inline(always)]
    pub fn new(action: Action, reason: Reason) -> Verdict {
        let action = match action {
            Action::Out(ifindex) => u64::from(ifindex) << 32 | OUT << 8,
            Action::Back => BACK << 8,
            Action::Up => UP << 8,
            Action::Drop => DROP << 8,
        };
        Verdict(action | reason as u64)
    }
    /// Out of this interface, when the kernel has found the next hop's MAC address: only for callers whose
    /// [`crate::tables::Tables::resolves`] says that they can have it done.
    #[inline(always)]
    pub fn resolve(ifindex: u32, reason: Reason) -> Verdict {
        Verdict(u64::from(ifindex) << 32 | RESOLVE | OUT << 8 | reason as u64)
    }
    /// The elder has done it all, and this is its hook's code (see [`crate::elder`]), of which the low byte says enough. As an action this is a drop: who
    /// has one asks [`Verdict::code`].
    #[inline(always)]
    pub fn done(code: u32) -> Verdict {
        Verdict(u64::from(code as u8) << 32 | DONE | DROP << 8 | DONE_COUNTER)
    }
    #[inline(always)]
    pub fn code(self) -> Option<u8> {
        (self.0 & DONE != 0).then_some((self.0 >> 32) as u8)
    }
    /// Passed on, as it came: for a reason of that kind.
    #[inline(always)]
    pub fn is_passed(self) -> bool {
        const FIRST: u32 = Reason::NotIp as u32;
        const LAST: u32 = Reason::ReplyTtl as u32;
        self.counter().wrapping_sub(FIRST) <= LAST - FIRST
    }
    /// To a [`Stage::Stranger`] with this number.
    #[inline(always)]
    pub fn passed(number: u32) -> Verdict {
        Verdict(UP << 8 | u64::from(number as u8))
    }
    #[inline(always)]
    pub fn is_to_resolve(self) -> bool {
        self.0 & RESOLVE != 0
    }
    /// Not the end: the packet goes on in another stage of the pipeline, with a number for it.
    #[inline(always)]
    pub fn go(stage: Stage, number: u32) -> Verdict {
        Verdict(GO | u64::from(number) << 16 | stage as u64)
    }
    /// The stage that it goes on in.
    #[inline(always)]
    pub fn next(self) -> Option<(Stage, u32)> {
        if self.0 & GO == 0 {
            return None;
        }
        let stage = match self.0 & 0x3f {
            0 => Stage::Whole,
            1 => Stage::Retire,
            2 => Stage::First,
            3 => Stage::Enter,
            4 => Stage::Link,
            5 => Stage::MakeWay,
            6 => Stage::GiveUp,
            7 => Stage::TimeExceeded,
            8 => Stage::PortUnreachable,
            9 => Stage::Forward,
            10 => Stage::Linked,
            11 => Stage::Anew,
            12 => Stage::Tunnel,
            13 => Stage::TooBig,
            14 => Stage::Related,
            15 => Stage::ErrorTunnel,
            16 => Stage::Lend,
            17 => Stage::Fullnat,
            18 => Stage::Introduce,
            19 => Stage::FullnatReply,
            20 => Stage::ReplyOptions,
            21 => Stage::FullnatSend,
            22 => Stage::Far,
            23 => Stage::Fragment,
            24 => Stage::Note,
            25 => Stage::ErrorLent,
            27 => Stage::ErrorOuter,
            28 => Stage::Challenge,
            29 => Stage::Knock,
            30 => Stage::Announce,
            31 => Stage::Stranger,
            32 => Stage::Early,
            33 => Stage::Elsewhere,
            34 => Stage::Large,
            35 => Stage::Reject,
            _ => Stage::FarReply,
        };
        Some((stage, (self.0 >> 16) as u32))
    }
    #[inline(always)]
    pub fn action(self) -> Action {
        match self.0 >> 8 & 3 {
            OUT => Action::Out((self.0 >> 32) as u32),
            BACK => Action::Back,
            UP => Action::Up,
            _ => Action::Drop,
        }
    }
    /// Up to the kernel, and no further stage.
    #[inline(always)]
    pub fn is_up(self) -> bool {
        self.0 >> 8 == UP
    }
    /// Out of a VLAN device ([`hop::VLAN`]), of a packet that goes no further?
    #[inline(always)]
    pub fn is_by_vlan(self) -> bool {
        self.0 >> 62 != 0
    }
    /// Number of its reason's counter.
    #[inline(always)]
    pub fn counter(self) -> u32 {
        self.0 as u32 & (COUNTERS as u32 - 1)
    }
    pub fn reason(self) -> Reason {
        Reason::ALL.get(self.counter() as usize).copied().unwrap_or(Reason::Internal)
    }
    #[inline(always)]
    pub fn word(self) -> u64 {
        self.0
    }
    #[inline(always)]
    pub fn from_word(word: u64) -> Verdict {
        Verdict(word)
    }
}

const _: () = assert!(hop::VLAN == 1 << 30);

impl core::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:?} {}", self.action(), self.reason().name())
    }
}

macro_rules! reasons {
    ($($variant:ident $name:literal $kind:ident $text:literal;)*) => {
        /// Why. The number is the index of its counter.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
        pub enum Reason { $($variant),* }
        impl Reason {
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),*];
            /// Name as in `rvs drops` and in metrics.
            pub fn name(self) -> &'static str { match self { $(Reason::$variant => $name),* } }
            pub fn kind(self) -> Kind { match self { $(Reason::$variant => Kind::$kind),* } }
            /// One line for operators.
            pub fn text(self) -> &'static str { match self { $(Reason::$variant => $text),* } }
        }
    };
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Kind {
    Forward,
    /// An answer of our own.
    Answer,
    Pass,
    /// Handed to rvsd: it comes again.
    Held,
    Drop,
}

reasons! {
    Route "dr" Forward "sent to a real server by direct routing";
    Masq "nat" Forward "sent to a real server by NAT";
    MasqReply "nat_reply" Forward "reply of a real server, sent to the client from the virtual address";
    Fullnat "fullnat" Forward "sent to a real server by full NAT";
    FullnatReply "fullnat_reply" Forward "reply of a real server by full NAT, sent to the client from the virtual address";
    FullnatBare "fullnat_bare" Forward "sent to a real server by full NAT without the client's address: no room for it in the packet";
    Tunnel "tun" Forward "sent to a real server in a tunnel";
    ErrorIn "icmp_error_in" Forward "an ICMP error about a connection, sent to its real server";
    ErrorOut "icmp_error_out" Forward "an ICMP error about a connection, sent to its client from the virtual address";
    Local "local" Forward "the real server is this host: handed up";
    ByKernel "nat_by_kernel" Forward "translated, and left to the kernel's forwarding: no ready next hop";
    TtlExceeded "ttl_exceeded" Answer "TTL used up: time exceeded sent to the client";
    NoDest "no_dest" Answer "no available real server: port unreachable sent to the client";
    SentTooBig "too_big" Answer "too large for the tunnel: fragmentation needed, or packet too big, sent to the client";
    Cookie "syn_cookie" Answer "a SYN answered with a cookie: its client is to prove its address first";
    CookieServer "syn_cookie_server" Answer "a real server answered in its client's place: an ACK where the client has nothing to say yet, or a RST of an older connection";
    ServerTold "server_told" Answer "a packet of no connection from a real server by NAT: port unreachable sent to it (nat_icmp_send)";
    NotIp "not_ip" Pass "not IPv4 or IPv6";
    OtherMac "other_mac" Pass "not for this interface's MAC address";
    OtherInterface "other_interface" Pass "interface not in the configuration";
    OtherProtocol "other_protocol" Pass "neither TCP, UDP nor SCTP";
    Icmp "icmp" Pass "ICMP: the kernel answers or forwards";
    Options "ip_options" Pass "more extension headers than are looked through: left to the kernel";
    SourceRoute "source_route" Pass "a routing header says that this is not its last destination: left to the kernel";
    Fragment "fragment" Pass "a fragment of ICMP, or of a datagram whose first fragment was none of ours; or that has not come yet, and rvsd is not there to hold it";
    ShortTransport "short_transport" Pass "TCP, UDP or SCTP header cut short or too small: left to the kernel";
    NoService "no_service" Pass "no virtual service has this address and port";
    NotLocal "not_local" Pass "the virtual address is not one of this host's (a backup director?)";
    NoConnection "no_connection" Pass "TCP or SCTP to a virtual service, but not a SYN or INIT, and of no known connection";
    ReplyTtl "reply_ttl" Pass "a reply whose TTL is used up: the kernel answers the real server";
    FragmentHeld "fragment_held" Held "a fragment that came before the first one of its datagram: rvsd holds it until then";
    Cut "cut" Held "too large for the tunnel, and allowed to be fragmented: rvsd cuts it into parts that fit";
    Short "short" Drop "IP header cut short";
    Malformed "malformed" Drop "IP version, header length or total length are wrong";
    FragmentTiny "fragment_tiny" Drop "a first fragment without the whole of the TCP, UDP or SCTP header";
    FragmentOverlap "fragment_overlap" Drop "a fragment that reaches into the first one";
    FragmentSctp "fragment_sctp" Drop "a fragment of SCTP by NAT to another port: its checksum is over the whole datagram";
    FragmentConflict "fragment_conflict" Drop "a fragment of two datagrams with the same id that go different ways";
    FragmentFlood "fragment_flood" Drop "a fragment that came before the first one of its datagram: more of them than rvsd can be handed, or too long";
    FragmentLost "fragment_lost" Drop "a fragment that rvsd held: the first one of its datagram did not come, or others needed the room";
    HeldLost "held_lost" Drop "rvsd held it, and could not send it on: its interface or the program there is gone, or the tunnel has no room for any part of it";
    Extensions "extension_headers" Drop "IPv6 extension headers that end behind the packet's end";
    Martian "martian_source" Drop "a source address that no client can have";
    TableFull "table_full" Drop "connection table full of flows that must not be evicted";
    ReverseInUse "reverse_in_use" Drop "every dest's reply tuple for this client and port is another flow's";
    NoLocalAddress "no_local_address" Drop "full NAT, and the service has no local addresses: ipvsadm -P";
    NoLocalPort "no_local_port" Drop "full NAT: of the local addresses tried no port is free for this real server: add more (ipvsadm -P)";
    Entering "entering" Drop "full NAT: the connection is being entered this instant";
    CookieRefused "syn_cookie_refused" Drop "SYN cookies, and a packet that they can't be used with: data or extra headers in a SYN, options in its first answer";
    ProxyRefused "proxy_refused" Drop "a PROXY header is to come first, and this SYN has data or extra headers";
    ProxyLocal "proxy_local" Drop "a PROXY header is to come first, which a real server that is this host can't be sent";
    SourceRate "source_rate" Drop "more new connections from this client in a second than its service allows";
    ServiceRate "service_rate" Drop "more new connections in a second than the service allows";
    DropPacket "drop_packet" Drop "one of so many new connections while memory is short, as the setting drop_packet says";
    DestGone "dest_gone" Drop "the connection's real server was removed";
    NoNeighbour "no_neighbour" Drop "the next hop to the real server has no known MAC address yet";
    NoRoute "no_route" Drop "no route to the real server, or its VLAN device has no program";
    TtlLimited "ttl_exceeded_limited" Drop "TTL used up: not answered, too many ICMP errors this second, or a fragment that is not the first";
    NoDestLimited "no_dest_limited" Drop "no available real server: not answered, too many ICMP errors this second, or it was one itself (schedule_icmp)";
    ServerToldLimited "server_told_limited" Drop "a packet of no connection from a real server by NAT: not answered, too many ICMP errors this second";
    TooBig "too_big_dropped" Drop "too large for the tunnel, and allowed to be fragmented, but rvsd, which does that, is not there or has too much of it to do: raise the MTU towards the real servers";
    TooBigLimited "too_big_limited" Drop "too large for the tunnel: not answered, too many ICMP errors this second";
    LoopbackDest "loopback_dest" Drop "the real server is a loopback address of this host, where no packet from outside may go: use -g, or another address";
    Internal "internal" Drop "a table of the data plane is missing an entry (a bug)";
}

/// Counters kept (a power of two, so that an index is easily bounded).
pub const COUNTERS: usize = 128;
const _: () = assert!(Reason::ALL.len() < COUNTERS);

#[inline(always)]
pub fn pass(reason: Reason) -> Verdict {
    Verdict::new(Action::Up, reason)
}
/// Of no flow: passed for this reason, unless an elder knows better.
#[inline(always)]
pub fn stranger(reason: Reason) -> Verdict {
    Verdict::go(Stage::Stranger, reason as u32)
}
#[inline(always)]
pub fn drop(reason: Reason) -> Verdict {
    Verdict::new(Action::Drop, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_to_pass_are_neighbours() {
        for reason in Reason::ALL {
            let verdict = Verdict::new(Action::Up, *reason);
            assert_eq!(verdict.is_passed(), reason.kind() == Kind::Pass, "{reason:?}");
            assert_eq!((Verdict::passed(*reason as u32), verdict.code()), (verdict, None));
        }
    }

    #[test]
    fn what_the_elder_did_is_no_reason_of_ours() {
        for code in [0, 1, 4, 7, 0xff] {
            let done = Verdict::done(u32::from(code));
            assert_eq!((done.action(), done.code()), (Action::Drop, Some(code)));
            assert!(done.next().is_none() && !done.is_by_vlan() && !done.is_passed());
            assert!(done.counter() as usize >= Reason::ALL.len());
        }
    }
}
