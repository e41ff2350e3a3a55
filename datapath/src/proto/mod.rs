//! Protocol state tables: IPVS's own states and transitions, as data.
pub mod sctp;
pub mod tcp;

/// Who sent the packet, and whether the director sees both ways. (As wide as what it is an index of: no packet has to widen it.)
#[repr(u64)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the client; replies go by us too (NAT, FULLNAT).
    Input,
    /// From the server.
    Output,
    /// From the client; replies don't go by us (DR, TUN).
    InputOnly,
}
