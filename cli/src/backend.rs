//! The other end of the control socket, as a trait, so that tests answer requests in the same process.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rvs_control::api::{self, FrameError, LineDecoder, Refusal, Request, RequestBody, Response, ResponseBody, Status};
use rvs_control::limits;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("no rights to open {}", path.display())]
    Permission { path: PathBuf },
    #[error("can't reach rvsd at {}: {reason}", path.display())]
    Unreachable { path: PathBuf, reason: std::io::Error },
    #[error("lost the connection to rvsd: {0}")]
    Lost(std::io::Error),
    #[error("rvsd did not answer within {} s", timeout.as_secs_f32())]
    Silent { timeout: Duration },
    #[error("rvsd closed the connection in the middle of an answer")]
    Closed,
    #[error("rvsd gave an answer that is none: {0}")]
    Garbled(String),
    #[error("{}", .0.reason)]
    Refused(Refusal),
}

impl From<FrameError> for BackendError {
    fn from(error: FrameError) -> Self {
        BackendError::Garbled(error.to_string())
    }
}

/// Takes requests and gives the lines of their answers, in order.
pub trait Backend {
    /// Makes the connection. Called once, before the first request.
    fn connect(&mut self) -> Result<(), BackendError>;
    /// Sends a request, without waiting for its answer.
    fn send(&mut self, body: RequestBody) -> Result<(), BackendError>;
    /// The next line of the oldest answer that is not complete.
    fn receive(&mut self) -> Result<Response, BackendError>;
}

/// rvsd behind its unix socket.
#[derive(Debug)]
pub struct SocketBackend {
    path: PathBuf,
    stream: Option<UnixStream>,
    decoder: LineDecoder,
    next_id: u64,
    timeout: Duration,
}

impl SocketBackend {
    pub fn new(path: &Path) -> Self {
        let own = std::env::var(api::TIMEOUT_VARIABLE).ok().and_then(|text| text.parse().ok()).filter(|s| *s > 0);
        Self::with_timeout(path, Duration::from_secs(own.unwrap_or(limits::ANSWER_TIMEOUT_S)))
    }

    /// `timeout` bounds every wait for rvsd to take or give something; not zero.
    pub fn with_timeout(path: &Path, timeout: Duration) -> Self {
        let decoder = LineDecoder::for_responses();
        SocketBackend { path: path.to_owned(), stream: None, decoder, next_id: 0, timeout }
    }

    fn lost(&self, error: std::io::Error) -> BackendError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => BackendError::Silent { timeout: self.timeout },
            _ => BackendError::Lost(error),
        }
    }

    /// The socket that the environment names, or the default one.
    pub fn default_path() -> PathBuf {
        std::env::var_os(api::SOCKET_VARIABLE).map_or_else(|| api::DEFAULT_SOCKET.into(), PathBuf::from)
    }
}

impl Backend for SocketBackend {
    fn connect(&mut self) -> Result<(), BackendError> {
        match UnixStream::connect(&self.path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(self.timeout)).map_err(BackendError::Lost)?;
                stream.set_write_timeout(Some(self.timeout)).map_err(BackendError::Lost)?;
                self.stream = Some(stream);
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {
                Err(BackendError::Permission { path: self.path.clone() })
            }
            Err(reason) => Err(BackendError::Unreachable { path: self.path.clone(), reason }),
        }
    }

    fn send(&mut self, body: RequestBody) -> Result<(), BackendError> {
        self.next_id += 1;
        let mut line = Vec::new();
        api::encode(&Request::new(self.next_id, body), &mut line).map_err(|e| BackendError::Garbled(e.to_string()))?;
        let stream = self.stream.as_mut().ok_or(BackendError::Closed)?;
        stream.write_all(&line).map_err(|e| self.lost(e))
    }

    fn receive(&mut self) -> Result<Response, BackendError> {
        let stream = self.stream.as_mut().ok_or(BackendError::Closed)?;
        let mut chunk = [0_u8; 64 * 1024];
        loop {
            if let Some(line) = self.decoder.next_line() {
                return api::decode_response(&line).map_err(|e| BackendError::Garbled(e.to_string()));
            }
            match stream.read(&mut chunk) {
                Ok(0) => return Err(BackendError::Closed),
                Ok(n) => self.decoder.feed(&chunk[..n])?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(e)),
            }
        }
    }
}

/// Requests with their whole answers, on top of a [`Backend`].
pub struct Client<'a> {
    backend: &'a mut dyn Backend,
    unanswered: usize,
}

impl<'a> Client<'a> {
    pub fn open(backend: &'a mut dyn Backend) -> Result<Self, BackendError> {
        backend.connect()?;
        Ok(Client { backend, unanswered: 0 })
    }

    /// Sends a command without waiting for its answer; [`Client::finish_command`] takes it. `false` if as many are
    /// unanswered as a client may have: take an answer first.
    pub fn can_send(&self) -> bool {
        self.unanswered < limits::PIPELINE_MAX
    }

    pub fn start_command(&mut self, command: api::Command) -> Result<(), BackendError> {
        self.backend.send(RequestBody::Command(command))?;
        self.unanswered += 1;
        Ok(())
    }

    /// The answer to the oldest command that has none: `Ok(Some(refusal))` if it was refused.
    pub fn finish_command(&mut self) -> Result<Option<Refusal>, BackendError> {
        self.unanswered = self.unanswered.saturating_sub(1);
        match self.backend.receive()?.body {
            ResponseBody::Done => Ok(None),
            ResponseBody::Refused(refusal) => Ok(Some(refusal)),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a query and hands each line of its answer to `take`. A refusal is an error.
    pub fn query(
        &mut self,
        body: RequestBody,
        mut take: impl FnMut(ResponseBody) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        self.backend.send(body)?;
        loop {
            let response = self.backend.receive()?;
            match response.body {
                ResponseBody::Refused(refusal) => return Err(BackendError::Refused(refusal)),
                body => take(body)?,
            }
            if response.last {
                return Ok(());
            }
        }
    }

    /// The same of an answer without end: until `take` says that it has enough (`false`).
    pub fn follow<E: From<BackendError>>(
        &mut self,
        body: RequestBody,
        mut take: impl FnMut(ResponseBody) -> Result<bool, E>,
    ) -> Result<(), E> {
        self.backend.send(body)?;
        loop {
            match self.backend.receive()?.body {
                ResponseBody::Refused(refusal) => return Err(BackendError::Refused(refusal).into()),
                body => {
                    if !take(body)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    pub fn status(&mut self) -> Result<Status, BackendError> {
        let mut status = None;
        self.query(RequestBody::Status, |body| match body {
            ResponseBody::Status(s) => {
                status = Some(*s);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        status.ok_or(BackendError::Closed)
    }
}

/// An answer of the wrong kind, as an error.
pub fn unexpected(body: &ResponseBody) -> BackendError {
    let kind = match body {
        ResponseBody::Done => "done",
        ResponseBody::Refused(_) => "refused",
        ResponseBody::List(_) => "list",
        ResponseBody::Connections(_) => "connections",
        ResponseBody::Timeouts(_) => "timeouts",
        ResponseBody::Daemons(_) => "daemons",
        ResponseBody::Drops(_) => "drops",
        ResponseBody::Tables(_) => "tables",
        ResponseBody::Upgrade(_) => "upgrade",
        ResponseBody::Stats(_) => "stats",
        ResponseBody::LocalAddresses(_) => "local_addresses",
        ResponseBody::Defences(_) => "defences",
        ResponseBody::Settings(_) => "settings",
        ResponseBody::Status(_) => "status",
        ResponseBody::Why(_) => "why",
        ResponseBody::Traced { .. } => "traced",
    };
    BackendError::Garbled(format!("`{kind}` answers another question"))
}
