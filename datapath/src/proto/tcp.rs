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

/// By [`Way`].
static NEXT: [Table; 4] = {
    use {
        CLOSE as CL, CLOSE_WAIT as CW, ESTABLISHED as ES, FIN_WAIT as FW, LAST_ACK as LA, LISTEN as LI, SYN_RECV as SR,
        SYN_SENT as SS, TIME_WAIT as TW,
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
    [input, output, input_only, input_only]
};

/// The next state. No flag of the four: CLOSE, as in the kernel. No branches: a verifier would walk every combination of them.
#[inline(always)]
pub fn next(state: u64, flags: u8, way: Way) -> u64 {
    NEXT[way as usize & 3][(flags & FLAGS) as usize] >> (4 * (state & 15)) & 0xf
}

/// A SYN on a flow in this state starts a new one at once (`is_new_conn_expected`, conn_reuse_mode 1).
#[inline(always)]
pub fn reusable(state: u64) -> bool {
    state == TIME_WAIT || state == CLOSE
}
