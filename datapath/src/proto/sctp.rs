//! SCTP as IPVS follows it: fourteen states, three tables (`ip_vs_proto_sctp.c`, `sctp_states[]`).

use super::Way;
use crate::conn::{Row, class};
use crate::packet::Packet;

pub const NONE: u64 = 0;
pub const INIT1: u64 = 1;
pub const INIT_AGAIN: u64 = 2;
pub const COOKIE_SENT: u64 = 3;
pub const COOKIE_REPLIED: u64 = 4;
pub const COOKIE_WAIT: u64 = 5;
pub const COOKIE: u64 = 6;
pub const COOKIE_ECHOED: u64 = 7;
pub const ESTABLISHED: u64 = 8;
pub const SHUTDOWN_SENT: u64 = 9;
pub const SHUTDOWN_RECEIVED: u64 = 10;
pub const SHUTDOWN_ACK_SENT: u64 = 11;
pub const REJECTED: u64 = 12;
/// An INIT on a flow in this state starts a new one at once (`is_new_conn_expected`).
pub const CLOSED: u64 = 13;

pub const NAMES: [&str; 14] = [
    "NONE",
    "INIT1",
    "INIT",
    "C-SENT",
    "C-REPLIED",
    "C-WAIT",
    "COOKIE",
    "C-ECHOED",
    "ESTABLISHED",
    "S-SENT",
    "S-RECEIVED",
    "S-ACK-SENT",
    "REJECTED",
    "CLOSED",
];

/// `sctp_timeouts[]`: NONE 2 s, INIT1 4 s, ESTABLISHED 15 min, REJECTED 4 s, all others `IP_VS_SCTP_MAX_RTO` (60 s + 1).
pub(crate) fn rows() -> [Row; 14] {
    let mut rows = [Row::new(61, class::HALF_OPEN, false); 14];
    rows[NONE as usize] = Row::new(2, class::HALF_OPEN, false);
    rows[INIT1 as usize] = Row::new(4, class::HALF_OPEN, false);
    rows[ESTABLISHED as usize] = Row::new(900, class::ESTABLISHED, true);
    for closing in [SHUTDOWN_SENT, SHUTDOWN_RECEIVED, SHUTDOWN_ACK_SENT, CLOSED] {
        rows[closing as usize] = Row::new(61, class::CLOSING, false);
    }
    rows[REJECTED as usize] = Row::new(4, class::CLOSING, false);
    rows
}

/// Length of the common header, and where its checksum is.
pub const HEADER: usize = 12;
pub const CHECKSUM: usize = 8;
/// Type, flags, length: of each chunk.
const CHUNK: usize = 4;

/// Events (`ipvs_sctp_event_t`), in the order of the tables' rows. DATA stands for all chunks that say nothing of a state.
pub const DATA: u8 = 0;
pub const INIT: u8 = 1;
pub const INIT_ACK: u8 = 2;
pub const COOKIE_ECHO: u8 = 3;
pub const COOKIE_ACK: u8 = 4;
pub const SHUTDOWN: u8 = 5;
pub const SHUTDOWN_ACK: u8 = 6;
pub const SHUTDOWN_COMPLETE: u8 = 7;
pub const ERROR: u8 = 8;
pub const ABORT: u8 = 9;
/// No chunk: the state stays, whichever it is.
pub const NOTHING: u8 = 10;

/// Chunk types (RFC 9260 3.2) to events, a nibble each, type 0 lowest. SACK, HEARTBEAT and its ACK, and the two of ECN are like DATA.
const EVENTS: u64 = pack([
    DATA,
    INIT,
    INIT_ACK,
    DATA,
    DATA,
    DATA,
    ABORT,
    SHUTDOWN,
    SHUTDOWN_ACK,
    ERROR,
    COOKIE_ECHO,
    COOKIE_ACK,
    DATA,
    DATA,
    SHUTDOWN_COMPLETE,
]);

/// Small numbers in nibbles, the first lowest.
const fn pack<const N: usize>(numbers: [u8; N]) -> u64 {
    let (mut packed, mut i) = (0, 0);
    while i < N {
        packed |= (numbers[i] as u64) << (4 * i);
        i += 1;
    }
    packed
}

#[inline(always)]
fn event_of(chunk: u8) -> u8 {
    if chunk < 16 { (EVENTS >> (4 * chunk)) as u8 & 0xf } else { DATA }
}

/// The event that an SCTP packet of `len` bytes at `at` is: that of its first chunk, but of a COOKIE ECHO or COOKIE ACK with an ABORT behind
/// it, ABORT (`set_sctp_state`). A function of its own where the packet is ([`Packet::sctp_event`]).
#[inline(always)]
pub fn event<P: Packet>(p: &mut P, at: usize, len: usize) -> u8 {
    let end = at + len;
    let Some([first, _, high, low]) = chunk(p, at + HEADER, end) else { return NOTHING };
    let event = event_of(first);
    if event != COOKIE_ECHO && event != COOKIE_ACK {
        return event;
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length < CHUNK {
        return event;
    }
    match chunk(p, at + HEADER + length.next_multiple_of(4), end) {
        Some([second, ..]) if event_of(second) == ABORT => ABORT,
        _ => event,
    }
}

#[inline(always)]
fn chunk<P: Packet>(p: &mut P, at: usize, end: usize) -> Option<[u8; CHUNK]> {
    if at + CHUNK > end { None } else { p.word_at(at) }
}

/// Rows of one way by event, each with the next state of each state.
type Table = [u64; 16];
const fn table(rows: [[u64; 14]; 10]) -> Table {
    // NOTHING, and what is no event.
    let mut table = [row([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]); 16];
    let mut event = 0;
    while event < rows.len() {
        table[event] = row(rows[event]);
        event += 1;
    }
    table
}
const fn row(next: [u64; 14]) -> u64 {
    let (mut states, mut i) = ([0; 14], 0);
    while i < next.len() {
        states[i] = next[i] as u8;
        i += 1;
    }
    pack(states)
}

/// By [`Way`].
static NEXT: [Table; 4] = {
    use {
        CLOSED as CL, COOKIE as CO, COOKIE_ECHOED as CE, COOKIE_REPLIED as CR, COOKIE_SENT as CS, COOKIE_WAIT as CW,
        ESTABLISHED as ES, INIT_AGAIN as IN, INIT1 as I1, REJECTED as RJ, SHUTDOWN_ACK_SENT as SA,
        SHUTDOWN_RECEIVED as SR, SHUTDOWN_SENT as SS,
    };
    //   NO  I1  IN  CS  CR  CW  CO  CE  ES  SS  SR  SA  RJ  CL
    let input = table([
        [ES, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL],
        [I1, IN, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, IN, IN],
        [CW, CW, CW, CS, CR, CO, CO, CE, ES, SS, SR, SA, RJ, CL],
        [CR, IN, IN, CR, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL],
        [ES, I1, IN, CS, CR, CW, CO, ES, ES, SS, SR, SA, RJ, CL],
        [SR, I1, IN, CS, CR, CW, CO, CE, SR, SS, SR, SA, RJ, CL],
        [CL, IN, IN, CS, CR, CW, CO, CE, ES, CL, SR, CL, RJ, CL],
        [CL, CL, CL, CS, CR, CW, CO, CE, ES, SS, SR, CL, RJ, CL],
        [CL, I1, IN, CS, CR, CW, CO, CL, ES, SS, SR, SA, RJ, CL],
        [CL, CL, CL, CL, CL, RJ, CL, CL, CL, CL, CL, CL, CL, CL],
    ]);
    let output = table([
        [ES, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL],
        [CW, CW, CW, CW, CW, CW, CW, CW, ES, CW, CW, CW, CW, CW],
        [CS, CS, CS, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL],
        [CE, CE, CE, CE, CE, CE, CE, CE, ES, SS, SR, SA, RJ, CL],
        [ES, ES, ES, ES, ES, ES, ES, ES, ES, SS, SR, SA, RJ, CL],
        [SS, SS, SS, SS, SS, SS, SS, SS, SS, SS, SR, SA, RJ, CL],
        [SA, SA, SA, SA, SA, CW, CO, CE, ES, SA, SA, SA, RJ, CL],
        [CL, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL],
        [CL, CL, CL, CL, CL, CW, CO, CE, ES, SS, SR, SA, RJ, CL],
        [CL, RJ, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL, CL],
    ]);
    let input_only = table([
        [ES, I1, IN, CS, CR, ES, CO, CE, ES, SS, SR, SA, RJ, CL],
        [I1, IN, IN, IN, IN, IN, CO, CE, ES, SS, SR, SA, IN, IN],
        [CE, CE, CE, CE, CE, CE, CO, CE, ES, SS, SR, SA, RJ, CL],
        [ES, ES, ES, ES, ES, ES, CO, CE, ES, SS, SR, SA, RJ, CL],
        [ES, I1, IN, ES, ES, CW, ES, ES, ES, SS, SR, SA, RJ, CL],
        [SR, I1, IN, CS, CR, CW, CO, CE, SR, SS, SR, SA, RJ, CL],
        [CL, IN, IN, CS, CR, CW, CO, CE, CL, CL, SR, CL, RJ, CL],
        [CL, CL, CL, CL, CL, CW, CO, CE, ES, SS, CL, CL, RJ, CL],
        [CL, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL],
        [CL, CL, CL, CL, CL, RJ, CL, CL, CL, CL, CL, CL, CL, CL],
    ]);
    [input, output, input_only, input_only]
};

/// The next state. No branches: a verifier would walk every combination of them.
#[inline(always)]
pub fn next(state: u64, event: u8, way: Way) -> u64 {
    NEXT[way as usize & 3][event as usize & 15] >> (4 * (state & 15)) & 0xf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_states_lead_to_states_and_nothing_to_no_other() {
        for way in [Way::Input, Way::Output, Way::InputOnly] {
            for state in 0..14 {
                assert!((0..16).all(|event| next(state, event, way) <= CLOSED));
                assert_eq!(next(state, NOTHING, way), state);
            }
        }
        // INIT1 is what a flow begins in.
        assert_eq!([Way::Input, Way::InputOnly].map(|way| next(NONE, INIT, way)), [INIT1; 2]);
    }

    #[test]
    fn chunks_are_the_events_of_the_kernel() {
        let events: Vec<u8> = (0..=255).map(event_of).collect();
        let known = [
            (1, INIT),
            (2, INIT_ACK),
            (6, ABORT),
            (7, SHUTDOWN),
            (8, SHUTDOWN_ACK),
            (9, ERROR),
            (10, COOKIE_ECHO),
            (11, COOKIE_ACK),
            (14, SHUTDOWN_COMPLETE),
        ];
        for (chunk, event) in events.iter().enumerate() {
            assert_eq!(*event, known.iter().find(|k| k.0 == chunk).map_or(DATA, |k| k.1), "chunk {chunk}");
        }
    }
}
