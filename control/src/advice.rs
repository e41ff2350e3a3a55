//! What an operator can do about a verdict. docs/drops.md has it at length.

use rvs_datapath::verdict::Reason;

/// One line; `None`: all is well, or nothing can be done.
pub fn about(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::ByKernel => {
            "see that the next hop answers ARP or neighbour discovery, and that forwarding is on: ip neigh"
        }
        Reason::TtlExceeded | Reason::TtlLimited => "look for a routing loop, such as a DR real server behind a router",
        Reason::NoDest | Reason::NoDestLimited => {
            "see ipvsadm -Ln: add a real server, or give one a weight; with mh, mh-fallback looks further than the first choice"
        }
        Reason::SentTooBig | Reason::TooBigLimited | Reason::TooBig => {
            "raise the MTU towards the real servers by what the tunnel needs"
        }
        Reason::OtherInterface => "restart rvsd, or name the interface with --interface",
        Reason::OtherMac => "on a backup director this is normal; else ask for the interface that the packet comes by",
        Reason::OtherProtocol => "virtual services are TCP, UDP and SCTP",
        Reason::Options | Reason::SourceRoute => "no virtual service gets such packets",
        Reason::Fragment => "it came before the first fragment of its datagram, or long after: see docs/drops.md",
        Reason::FragmentHeld => "nothing: it goes on when the first fragment of its datagram has come",
        Reason::Cut => {
            "nothing; it is less work where the MTU towards the real servers has room for the tunnel's headers"
        }
        Reason::FragmentFlood => {
            "find out what changes the order of so many packets, or who floods: rvs trace --filter 'reason fragment_flood'"
        }
        Reason::FragmentLost => {
            "find out where first fragments are lost or filtered, or who floods: rvs trace --filter 'reason fragment_held'"
        }
        Reason::HeldLost => {
            "see that the interface is up and in rvs status, and that the MTU to the real servers is 120 or more"
        }
        Reason::FragmentTiny | Reason::FragmentOverlap | Reason::FragmentConflict => {
            "look for whoever makes such fragments; nobody honest does"
        }
        Reason::FragmentSctp => {
            "give the real server the virtual port, or have the sender use packets that need not be fragmented"
        }
        Reason::NoLocalAddress | Reason::NoLocalPort => "give the service (more) local addresses: ipvsadm -P",
        Reason::Entering => "ask again",
        Reason::ServerTold | Reason::ServerToldLimited => {
            "its connection has timed out, or it begins ones of its own from a virtual service's port: rvs set nat_icmp_send"
        }
        Reason::NoService => "see ipvsadm -Ln for the services' addresses, ports and protocols",
        Reason::NotLocal => {
            "on a backup director this is normal; else give the address to this host: ip addr add VIP/32 dev ..."
        }
        Reason::Cookie | Reason::CookieServer => {
            "more SYNs in a second than the service takes as they come: rvs service show; ask with --flags ack for a connection that is known"
        }
        Reason::CookieRefused => "without data and extra headers in its SYN the client gets through",
        Reason::ProxyRefused => {
            "a SYN without data and extra headers gets through: Fast Open is not for services with PROXY headers"
        }
        Reason::ProxyLocal => {
            "take the director itself out of the service's real servers, or turn PROXY headers off: rvs service set --proxy off"
        }
        Reason::DropPacket => "memory is short (rvs set amemthresh), or drop_packet is 3: rvs set drop_packet",
        Reason::SourceRate | Reason::ServiceRate => "see rvs service show, and raise the limit: rvs service set",
        Reason::NoConnection => {
            "the connection timed out (ipvsadm --set), or was made through another director; a new one of TCP begins with --flags syn"
        }
        Reason::Martian => "ask with the address of a client",
        Reason::TableFull => {
            "start rvsd with a larger --conns (IPv6: --conns6) after a teardown, or shorten timeouts: ipvsadm --set"
        }
        Reason::ReverseInUse => "give the services different ports on the real servers",
        Reason::DestGone => "add the real server again, or have the client connect anew",
        Reason::NoNeighbour => "see whether the real server (or the router to it) is up and answers: ip neigh",
        Reason::NoRoute => "see ip route get with the real server's address",
        Reason::LoopbackDest => "use -g, or another address of this host",
        Reason::ShortTransport | Reason::Short | Reason::Malformed | Reason::Extensions => "look for a broken sender",
        Reason::Internal => "please report it, with ipvsadm -Ln, rvs status and rvs drops --json",
        Reason::Route
        | Reason::Masq
        | Reason::MasqReply
        | Reason::Tunnel
        | Reason::Fullnat
        | Reason::FullnatReply
        | Reason::FullnatBare
        | Reason::ErrorIn
        | Reason::ErrorOut
        | Reason::Local
        | Reason::NotIp
        | Reason::Icmp
        | Reason::ReplyTtl => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvs_datapath::verdict::Kind;

    #[test]
    fn there_is_something_to_do_about_each_drop_and_answer() {
        for reason in Reason::ALL {
            assert!(about(*reason).is_some() || matches!(reason.kind(), Kind::Forward | Kind::Pass), "{reason:?}");
        }
    }
}
