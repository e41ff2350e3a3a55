//! The control socket: lines in, lines out, one task a client. A client that sends garbage gets an error and is left; one that stalls
//! holds up nobody.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rvs_control::api::{LineDecoder, Response, ResponseBody, decode_request, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::answer::{Answer, answer};
use crate::director::Director;
use crate::{trace, upgrade, why};

/// Clients at a time: each has a decoder of at most one request line.
const CLIENTS_MAX: usize = 256;
/// A client that does not read its answer is left.
const WRITE_TIME: Duration = Duration::from_secs(60);

/// Listen on `path`; a socket that nobody listens on any more is replaced.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::other("another rvsd is listening there"));
    }
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serve clients for ever. `changed` is called after each request that may have changed something.
pub async fn serve(listener: UnixListener, director: Rc<RefCell<Director>>, changed: Rc<tokio::sync::Notify>) {
    let clients = std::sync::Arc::new(tokio::sync::Semaphore::new(CLIENTS_MAX));
    loop {
        let Ok(place) = clients.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (director, changed) = (director.clone(), changed.clone());
                tokio::task::spawn_local(async move {
                    if let Err(error) = client(stream, &director, &changed).await {
                        tracing::debug!(%error, "a client of the control socket is gone");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept on the control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A command that adds a real server is answered when the way to it is known: who then sends a request finds it reachable. This long at
/// most, for all commands of a client together, since the server may be down.
const WAY_TIME: Duration = Duration::from_millis(250);

async fn client(mut stream: UnixStream, director: &RefCell<Director>, changed: &tokio::sync::Notify) -> io::Result<()> {
    let mut decoder = LineDecoder::for_requests();
    let mut patience = WAY_TIME;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        let fed = decoder.feed(&buffer[..n]);
        let mut out = Vec::new();
        let mut asked = false;
        while let Some(line) = decoder.next_line() {
            asked = true;
            let request = match decode_request(&line) {
                Ok(request) => request,
                Err(error) => return refuse(&mut stream, out, &error).await,
            };
            if let Err(refusal) = request.check_version() {
                put(&Response::whole(request.id, ResponseBody::Refused(refusal)), &mut out)?;
                continue;
            }
            let answered = answer(&mut director.borrow_mut(), request);
            match answered {
                Answer::Lines(lines) => lines.iter().try_for_each(|l| put(l, &mut out))?,
                Answer::Connections(mut list) => loop {
                    let lines = list.next(&mut director.borrow_mut());
                    let Some(lines) = lines else { break };
                    lines.iter().try_for_each(|l| put(l, &mut out))?;
                    send(&mut stream, &mut out).await?;
                    // Commands of others come in between.
                    tokio::task::yield_now().await;
                },
                Answer::Why(id, probes) => {
                    let rows = why::rows(director, &probes).await;
                    let body = rows.map_or_else(ResponseBody::Refused, ResponseBody::Why);
                    put(&Response::whole(id, body), &mut out)?;
                }
                Answer::Upgrade(id, what) => {
                    let found = upgrade::check(director, &what).await;
                    let program = found.as_ref().ok().filter(|_| !what.check).map(|report| report.program.clone());
                    let body = found.map_or_else(ResponseBody::Refused, |r| ResponseBody::Upgrade(Box::new(r)));
                    put(&Response::whole(id, body), &mut out)?;
                    if let Some(program) = program {
                        send(&mut stream, &mut out).await?;
                        return Err(upgrade::go_on_as(&program));
                    }
                }
                Answer::Trace(id, filter) => {
                    send(&mut stream, &mut out).await?;
                    return trace::stream(&mut stream, director, id, &filter).await;
                }
            }
        }
        if asked {
            changed.notify_one();
        }
        let unready = director.borrow_mut().take_unready();
        if !unready.is_empty() && !patience.is_zero() {
            let begun = tokio::time::Instant::now();
            let _ = tokio::time::timeout(patience, ready(director, unready)).await;
            patience = patience.saturating_sub(begun.elapsed());
        }
        send(&mut stream, &mut out).await?;
        if let Err(error) = fed {
            return refuse(&mut stream, Vec::new(), &error).await;
        }
    }
}

/// Until there is a way to each of them.
async fn ready(director: &RefCell<Director>, mut unready: BTreeSet<IpAddr>) {
    let mut looked = director.borrow().looked.subscribe();
    loop {
        unready.retain(|address| director.borrow().planner.lacks_way(*address));
        if unready.is_empty() || looked.changed().await.is_err() {
            return;
        }
    }
}

pub fn put(response: &Response, out: &mut Vec<u8>) -> io::Result<()> {
    encode(response, out).map_err(io::Error::other)
}

pub async fn send(stream: &mut UnixStream, out: &mut Vec<u8>) -> io::Result<()> {
    let sent = tokio::time::timeout(WRITE_TIME, stream.write_all(out)).await;
    out.clear();
    sent.unwrap_or_else(|_| Err(io::Error::other("the client does not read")))
}

/// The last words to somebody who does not speak our language.
async fn refuse(stream: &mut UnixStream, mut out: Vec<u8>, error: &dyn std::error::Error) -> io::Result<()> {
    put(&Response::to_garbage(error), &mut out)?;
    send(stream, &mut out).await
}
