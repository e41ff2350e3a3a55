//! Which packets `rvs trace` is told of: as much of its filter as is cheap to look at for each packet. What passes here is looked at
//! once more, in full, by rvsd: so this may let too many pass, never too few.

use crate::abi::Trace;
use crate::ct::{V4, V6};
use crate::packet::{ETHERTYPE, IP_SCTP, IP_TCP, IP_UDP, Ip, L3};
use crate::verdict::Verdict;

/// The first bytes of a frame, as many as there are, and zeros behind them.
pub type Head = [u8; HEAD];
/// Up to the ports of an IPv6 packet.
pub const HEAD: usize = V6::L4 + 4;

#[inline(always)]
fn asked_for(f: &Trace, counter: u32) -> bool {
    let half = if counter & 64 == 0 { f.reasons[0] } else { f.reasons[1] };
    half >> (counter & 63) & 1 != 0
}

/// Is a packet that begins with these bytes, and met this verdict, to be told of?
#[inline(always)]
pub fn matches(f: &Trace, now_s: u32, head: &Head, verdict: Verdict) -> bool {
    if f.until_s <= now_s || !asked_for(f, verdict.counter()) {
        return false;
    }
    if f.family == 0 && f.protocol == 0 && f.port == 0 {
        return true;
    }
    let family = match u16::from_be_bytes([head[ETHERTYPE], head[ETHERTYPE + 1]]) {
        V4::ETHERTYPE => 4,
        V6::ETHERTYPE => 6,
        _ => return false,
    };
    (f.family == 0 || f.family == family) && if family == 4 { of::<V4, 4>(f, head) } else { of::<V6, 16>(f, head) }
}

#[inline(always)]
fn of<I: Ip, const ADDRESS: usize>(f: &Trace, head: &Head) -> bool {
    // Where the protocol is not that of a header right behind, ports are elsewhere.
    let (protocol, plain) = match I::FAMILY {
        4 => (head[L3 + 9], head[L3] & 0xf == 5),
        _ => (head[L3 + 6], matches!(head[L3 + 6], IP_TCP | IP_UDP | IP_SCTP)),
    };
    if f.protocol != 0 && f.protocol != protocol && (plain || I::FAMILY == 4) {
        return false;
    }
    if !(under::<ADDRESS>(f, head, I::SOURCE) || under::<ADDRESS>(f, head, I::DESTINATION)) {
        return false;
    }
    let port = f.port.to_be_bytes();
    let is = |at: usize| head[at] == port[0] && head[at + 1] == port[1];
    f.port == 0 || !plain || is(I::L4) || is(I::L4 + 2)
}

#[inline(always)]
fn under<const ADDRESS: usize>(f: &Trace, head: &Head, at: usize) -> bool {
    let (mut differ, mut i) = (0, 0);
    while i < ADDRESS {
        differ |= (head[at + i] ^ f.address[i]) & f.mask[i];
        i += 1;
    }
    differ == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::{Reason, drop, pass};

    const ANY: Trace =
        Trace { reasons: [u64::MAX; 2], address: [0; 16], mask: [0; 16], port: 0, protocol: 0, family: 0, until_s: 10 };

    /// 192.0.2.7:1000 to 198.51.100.100:80, TCP.
    fn v4() -> Head {
        let mut h = [0; HEAD];
        h[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        h[23] = IP_TCP;
        h[26..34].copy_from_slice(&[192, 0, 2, 7, 198, 51, 100, 100]);
        h[34..38].copy_from_slice(&[3, 0xe8, 0, 80]);
        h
    }

    /// fd00::7 port 1000 to fd00::8 port 53, UDP.
    fn v6() -> Head {
        let mut h = [0; HEAD];
        h[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
        h[20] = IP_UDP;
        (h[22], h[37], h[38], h[53]) = (0xfd, 7, 0xfd, 8);
        h[54..58].copy_from_slice(&[3, 0xe8, 0, 53]);
        h
    }

    fn address(bytes: &[u8], bits: usize) -> Trace {
        let mut f = Trace { family: if bytes.len() == 4 { 4 } else { 6 }, ..ANY };
        f.address[..bytes.len()].copy_from_slice(bytes);
        for bit in 0..bits {
            f.mask[bit / 8] |= 0x80 >> (bit % 8);
        }
        f
    }

    #[test]
    fn what_is_not_asked_for_does_not_pass() {
        let verdict = drop(Reason::NoRoute);
        let (four, six) = (v4(), v6());
        let yes = |f: Trace, head: &Head| assert!(matches(&f, 9, head, verdict), "{f:?}");
        let no = |f: Trace, head: &Head| assert!(!matches(&f, 9, head, verdict), "{f:?}");
        for head in [&four, &six] {
            yes(ANY, head);
            yes(Trace { reasons: [1 << Reason::NoRoute as u64, 0], ..ANY }, head);
            no(Trace { reasons: [!(1 << Reason::NoRoute as u64), u64::MAX], ..ANY }, head);
            no(Trace { until_s: 9, ..ANY }, head);
        }
        yes(Trace { family: 4, ..ANY }, &four);
        no(Trace { family: 6, ..ANY }, &four);
        no(Trace { family: 4, ..ANY }, &six);
        yes(Trace { family: 4, protocol: IP_TCP, port: 1000, ..ANY }, &four);
        yes(Trace { family: 4, port: 80, ..ANY }, &four);
        no(Trace { family: 4, port: 81, ..ANY }, &four);
        no(Trace { family: 4, protocol: IP_UDP, ..ANY }, &four);
        yes(Trace { family: 6, protocol: IP_UDP, port: 53, ..ANY }, &six);
        for head in [&four, &six] {
            yes(Trace { port: 1000, ..ANY }, head);
            no(Trace { port: 1001, ..ANY }, head);
        }
        yes(Trace { protocol: IP_UDP, ..ANY }, &six);
        no(Trace { protocol: IP_UDP, ..ANY }, &four);
        no(Trace { family: 6, port: 54, ..ANY }, &six);
        for yes_to in [&[192, 0, 2, 7], &[198, 51, 100, 100]] {
            yes(address(yes_to, 32), &four);
        }
        no(address(&[192, 0, 2, 8], 32), &four);
        yes(address(&[192, 0, 2, 8], 28), &four);
        no(address(&[192, 0, 2, 16], 28), &four);
        let mut seven = [0; 16];
        (seven[0], seven[15]) = (0xfd, 7);
        yes(address(&seven, 128), &six);
        seven[15] = 6;
        no(address(&seven, 128), &six);
        yes(address(&seven, 64), &six);
    }

    /// Options and extension headers move what is looked for: such packets pass, and are looked at later.
    #[test]
    fn what_can_not_be_told_passes() {
        let (mut four, mut six) = (v4(), v6());
        four[14] = 0x46;
        six[20] = 0;
        let verdict = pass(Reason::Options);
        assert!(matches(&Trace { family: 4, port: 9, ..ANY }, 0, &four, verdict));
        assert!(matches(&Trace { family: 6, protocol: IP_TCP, port: 9, ..ANY }, 0, &six, verdict));
        // Neither IPv4 nor IPv6.
        assert!(!matches(&Trace { family: 4, ..ANY }, 0, &[0; HEAD], verdict));
        assert!(!matches(&Trace { port: 9, ..ANY }, 0, &[0; HEAD], verdict));
        assert!(matches(&ANY, 0, &[0; HEAD], verdict));
    }
}
