//! SCTP states (numbers and timeouts of the kernel's `ip_vs_proto_sctp.c`). The transitions come with the protocol.

use crate::conn::{Row, class};

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
    rows[0] = Row::new(2, class::HALF_OPEN, false);
    rows[1] = Row::new(4, class::HALF_OPEN, false);
    rows[8] = Row::new(900, class::ESTABLISHED, true);
    for closing in [9, 10, 11, 13] {
        rows[closing] = Row::new(61, class::CLOSING, false);
    }
    rows[12] = Row::new(4, class::CLOSING, false);
    rows
}
