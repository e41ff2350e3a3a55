//! Bytes from a socket become lines, lines become values. Total: any input gives a value or an error.

use std::collections::VecDeque;

use serde::Serialize;

use super::{Request, Response};
use crate::limits;

/// A line that can't be taken; the connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a line on the control socket is longer than {max} bytes")]
    TooLong { max: usize },
}

/// Cuts a byte stream into lines. Holds at most one unfinished line of `max` bytes, and the finished ones not taken
/// yet: take them before feeding more.
#[derive(Debug)]
pub struct LineDecoder {
    max: usize,
    partial: Vec<u8>,
    lines: VecDeque<Vec<u8>>,
    dead: bool,
}

impl LineDecoder {
    /// `max` is the longest line taken, in bytes, without its newline.
    pub fn new(max: usize) -> Self {
        LineDecoder { max, partial: Vec::new(), lines: VecDeque::new(), dead: false }
    }

    /// For the server's side of a connection.
    pub fn for_requests() -> Self {
        Self::new(limits::REQUEST_BYTES_MAX)
    }

    /// For the client's side of a connection.
    pub fn for_responses() -> Self {
        Self::new(limits::RESPONSE_BYTES_MAX)
    }

    /// Takes what was read. After an error every further call gives the same error; lines that were complete before it
    /// can still be taken.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), FrameError> {
        while !self.dead {
            let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
                self.extend(bytes);
                break;
            };
            self.extend(&bytes[..end]);
            if !self.dead {
                self.lines.push_back(std::mem::take(&mut self.partial));
            }
            bytes = &bytes[end + 1..];
        }
        if self.dead { Err(FrameError::TooLong { max: self.max }) } else { Ok(()) }
    }

    /// The next complete line, without its newline.
    pub fn next_line(&mut self) -> Option<Vec<u8>> {
        self.lines.pop_front()
    }

    /// Whether the stream ended (or stands) in the middle of a line.
    pub fn has_partial(&self) -> bool {
        !self.partial.is_empty()
    }

    fn extend(&mut self, bytes: &[u8]) {
        if self.partial.len() + bytes.len() > self.max {
            self.dead = true;
            self.partial = Vec::new();
        } else {
            self.partial.extend_from_slice(bytes);
        }
    }
}

/// A line that is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("not a request: {0}")]
    Request(serde_json::Error),
    #[error("not a response: {0}")]
    Response(serde_json::Error),
}

/// A line without its newline becomes a request. The version is not looked at: the server refuses by value.
pub fn decode_request(line: &[u8]) -> Result<Request, DecodeError> {
    serde_json::from_slice(line).map_err(DecodeError::Request)
}

/// A line without its newline becomes a response.
pub fn decode_response(line: &[u8]) -> Result<Response, DecodeError> {
    serde_json::from_slice(line).map_err(DecodeError::Response)
}

/// A request or response as the bytes to send, newline included. Appends to `out`. Fails only if the value can't be
/// JSON, which none of this protocol's types allows.
pub fn encode<T: Serialize>(value: &T, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    serde_json::to_writer(&mut *out, value)?;
    out.push(b'\n');
    Ok(())
}
