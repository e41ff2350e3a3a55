//! TCP as IPVS follows it: eleven states, three tables (`ip_vs_proto_tcp.c`, `tcp_states[]`).

use super::Way;
use crate::conn::{Row, Timeouts, class};
use crate::csum::Delta;
use crate::packet::{Ip, Packet, Window};

pub const NONE: u64 = 0;
pub const ESTABLISHED: u64 = 1;
pub const SYN_SENT: u64 = 2;
pub const SYN_RECV: u64 = 3;
pub const FIN_WAIT: u64 = 4;
pub const TIME_WAIT: u64 = 5;
pub const CLOSE: u64 = 6;
pub const CLOSE_WAIT: u64 = 7;
pub const LAST_ACK: u64 = 8;
pub const LISTEN: u64 = 9;
pub const SYNACK: u64 = 10;

pub const NAMES: [&str; 11] = [
    "NONE",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "SYNACK",
];

/// Bits of the TCP flags byte.
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;
pub const URG: u8 = 0x20;

/// Sequence number, acknowledged number and header length of a TCP segment, whose options can be reached then.
#[inline(always)]
pub fn numbers<I: Ip, P: Packet>(p: &mut P) -> Option<(u32, u32, u32)> {
    p.reach(I::L4 + 60);
    let w = p.window(I::L4 + 20)?;
    Some((u32::from_be(w.r32(I::L4 + 4)), u32::from_be(w.r32(I::L4 + 8)), u32::from(w.r8(I::L4 + 12) >> 4) * 4))
}

/// Add to a segment's sequence number. What that changes in its sum.
#[inline(always)]
pub fn renumber<I: Ip, P: Packet>(p: &mut P, by: u32) -> Option<Delta> {
    let mut w = p.window(I::L4 + 20)?;
    let old = w.r32(I::L4 + 4);
    let new = u32::from_be(old).wrapping_add(by).to_be();
    w.w32(I::L4 + 4, new);
    Some(Delta::default().replace(old, new))
}

/// `tcp_timeouts[]`; `--set` changes ESTABLISHED and FIN_WAIT. Active are ESTABLISHED, SYN_SENT, SYN_RECV and SYNACK
/// (`tcp_state_active_table[]`).
pub(crate) fn rows(t: &Timeouts) -> [Row; 11] {
    use class::{CLOSING, ESTABLISHED, HALF_OPEN};
    [
        Row::new(2, HALF_OPEN, false),
        Row::new(t.tcp, ESTABLISHED, true),
        Row::new(120, HALF_OPEN, true),
        Row::new(60, HALF_OPEN, true),
        Row::new(t.tcp_fin, CLOSING, false),
        Row::new(120, CLOSING, false),
        Row::new(10, CLOSING, false),
        Row::new(60, CLOSING, false),
        Row::new(30, CLOSING, false),
        Row::new(120, HALF_OPEN, false),
        Row::new(120, HALF_OPEN, true),
    ]
}

/// One row of a table: the next state of each state, a nibble each, NONE lowest.
const fn row(next: [u64; 11]) -> u64 {
    let mut packed = 0;
    let mut i = 0;
    while i < 11 {
        packed |= next[i] << (4 * i);
        i += 1;
    }
    packed
}

/// The flags that decide.
const FLAGS: u8 = RST | SYN | FIN | ACK;

/// Rows of one way by the flags byte. They are looked at in this order: RST, SYN, FIN, ACK (`tcp_state_idx`); none of them closes.
type Table = [u64; FLAGS as usize + 1];
const fn table(rows: [[u64; 11]; 4]) -> Table {
    let mut table = [row([CLOSE; 11]); FLAGS as usize + 1];
    let mut flags = 0;
    while flags < table.len() {
        let order = [RST, SYN, FIN, ACK];
        let mut i = order.len();
        while i > 0 {
            i -= 1;
            if flags & order[i] as usize != 0 {
                table[flags] = row(rows[i]);
            }
        }
        flags += 1;
    }
    table
}

/// By [`Way`], and after those four once more with `secure_tcp` (`tcp_states_dos[]`).
static ALL: [Table; 8] = {
    use {
        CLOSE as CL, CLOSE_WAIT as CW, ESTABLISHED as ES, FIN_WAIT as FW, LAST_ACK as LA, LISTEN as LI, SYN_RECV as SR,
        SYN_SENT as SS, SYNACK as SA, TIME_WAIT as TW,
    };
    //   NO  ES  SS  SR  FW  TW  CL  CW  LA  LI  SA
    let input = table([
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, SR],
        [SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SR],
        [CL, CW, SS, TW, TW, TW, CL, CW, LA, LI, TW],
        [ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES],
    ]);
    let output = table([
        [CL, CL, SS, CL, CL, TW, CL, CL, CL, CL, CL],
        [SS, ES, SS, SR, SS, SS, SS, SS, SS, LI, SR],
        [TW, FW, SS, TW, FW, TW, CL, TW, LA, LI, TW],
        [ES, ES, SS, ES, FW, TW, CL, CW, LA, ES, ES],
    ]);
    let input_only = table([
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL],
        [SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SR],
        [CL, FW, SS, TW, FW, TW, CL, CW, LA, LI, TW],
        [ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES],
    ]);
    let secure_input = table([
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL],
        [SR, ES, ES, SR, SR, SR, SR, SR, SR, SR, SA],
        [CL, CW, SS, TW, TW, TW, CL, CW, LA, LI, SA],
        [ES, ES, SS, SR, FW, TW, CL, CW, CL, LI, SA],
    ]);
    let secure_output = table([
        [CL, CL, SS, CL, CL, TW, CL, CL, CL, CL, CL],
        [SS, ES, SS, SA, SS, SS, SS, SS, SS, LI, SA],
        [TW, FW, SS, TW, FW, TW, CL, TW, LA, LI, TW],
        [ES, ES, SS, ES, FW, TW, CL, CW, LA, ES, ES],
    ]);
    let secure_input_only = table([
        [CL, CL, CL, SR, CL, CL, CL, CL, LA, LI, CL],
        [SA, ES, ES, SR, SA, SA, SA, SA, SA, SA, SA],
        [CL, FW, SS, TW, FW, TW, CL, CW, LA, LI, TW],
        [ES, ES, SS, ES, FW, TW, CL, CW, CL, LI, ES],
    ]);
    [input, output, input_only, input_only, secure_input, secure_output, secure_input_only, secure_input_only]
};

/// No state: it has to be looked up.
const LOOK: u64 = 15;

/// For packets that change nothing, whichever of the two tables holds: where those differ and one would say so, [`LOOK`].
static UNCHANGED: [Table; 4] = {
    let mut tables = [ALL[0], ALL[1], ALL[2], ALL[3]];
    let mut at = 0;
    while at < 4 * 11 * tables[0].len() {
        let (way, state, flags) = (at % 4, (at / 4 % 11) as u64, at / 44);
        let (plain, secure) = (nibble(ALL[way][flags], state), nibble(ALL[way + 4][flags], state));
        if plain != secure && (plain == state || secure == state) {
            tables[way][flags] |= LOOK << (4 * state);
        }
        at += 1;
    }
    tables
};

#[inline(always)]
const fn nibble(row: u64, state: u64) -> u64 {
    row >> (4 * (state & 15)) & 0xf
}

/// The next state, `secure`: with `secure_tcp`. No flag of the four: CLOSE, as in the kernel. No branches: a verifier would walk every combination of
/// them.
#[inline(always)]
pub fn next(state: u64, flags: u8, way: Way, secure: bool) -> u64 {
    nibble(ALL[way as usize & 3 | (secure as usize) << 2][(flags & FLAGS) as usize], state)
}

/// The next state if it is this one; else some other number, of which nothing follows: whether there is `secure_tcp` is not asked here.
#[inline(always)]
pub fn unchanged(state: u64, flags: u8, way: Way) -> u64 {
    nibble(UNCHANGED[way as usize & 3][(flags & FLAGS) as usize], state)
}

/// A SYN on a flow in this state starts a new one at once (`is_new_conn_expected`, conn_reuse_mode 1).
#[inline(always)]
pub fn reusable(state: u64) -> bool {
    state == TIME_WAIT || state == CLOSE
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAYS: [Way; 3] = [Way::Input, Way::Output, Way::InputOnly];

    #[test]
    fn what_seems_unchanged_is_so_with_either_table() {
        let mut looked_up = 0;
        for (way, state, flags) in
            WAYS.into_iter().flat_map(|w| (0..11).flat_map(move |s| (0..=63u8).map(move |f| (w, s, f))))
        {
            let (plain, secure) = (next(state, flags, way, false), next(state, flags, way, true));
            let seems = unchanged(state, flags, way);
            assert_eq!(seems == state, plain == state && secure == state, "{way:?} {state} {flags:#x}");
            looked_up += u32::from(plain == state && secure != state);
        }
        assert!(looked_up > 0, "there is something to look up");
    }

    /// Where `tcp_states_dos[]` differs: a flow counts as open only when both ends have been heard of.
    #[test]
    fn with_secure_tcp_an_ack_alone_opens_nothing() {
        for (way, state, flags, plain, secure) in [
            (Way::Input, SYN_RECV, ACK, ESTABLISHED, SYN_RECV),
            (Way::Input, SYNACK, ACK, ESTABLISHED, SYNACK),
            (Way::Input, SYNACK, SYN, SYN_RECV, SYNACK),
            (Way::Input, SYNACK, FIN | ACK, TIME_WAIT, SYNACK),
            (Way::Input, SYNACK, RST, SYN_RECV, CLOSE),
            (Way::Output, SYN_RECV, SYN | ACK, SYN_RECV, SYNACK),
            (Way::Output, SYNACK, SYN, SYN_RECV, SYNACK),
            (Way::Output, SYN_RECV, ACK, ESTABLISHED, ESTABLISHED),
            (Way::InputOnly, NONE, SYN, SYN_RECV, SYNACK),
            (Way::InputOnly, SYN_RECV, ACK, ESTABLISHED, ESTABLISHED),
            (Way::InputOnly, SYNACK, ACK, ESTABLISHED, ESTABLISHED),
        ] {
            let both = [false, true].map(|on| next(state, flags, way, on));
            assert_eq!(both, [plain, secure], "{way:?} {state} {flags:#x}");
        }
    }
}
