//! rvsd: the director. A thin shell: it opens the data plane, reads the network, and lets clients of the control socket change what is
//! served. Everything that decides is in `rvs_control`; everything that forwards is in the kernel, and goes on without this process.
#![forbid(unsafe_code)]

mod answer;
mod director;
mod network;
mod options;
mod parts;
mod rates;
mod socket;
mod tables;
mod trace;
mod upgrade;
mod why;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use clap::Parser;
use nix::fcntl::{Flock, FlockArg};
use rvs_control::firewall::{Rules, Vip};
use rvs_control::model::ServiceKey;
use rvs_datapath::abi;
use rvs_sys::bpf::{self, BpfError, Dataplane, OBJECT, Upgrade};
use rvs_sys::netlink::Netlink;
use rvs_sys::netns::{self, Lasting};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use director::{Director, shown};
use options::Options;

/// All of it.
pub fn main() -> ExitCode {
    let options = Options::parse();
    log_to_stderr(options.log_json);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = match runtime {
        Ok(runtime) => tokio::task::LocalSet::new().block_on(&runtime, run(options)),
        Err(error) => Err(format!("no event loop: {error}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("rvsd: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(json: bool) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("RVS_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    // A second subscriber is an error only in tests, which have their own.
    let _ = if json { log.json().try_init() } else { log.try_init() };
}

async fn run(options: Options) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("must be run as root (it loads BPF programs and reads netlink)".to_owned());
    }
    let namespace = netns::current().map_err(|e| shown(&e))?;
    let pin = options.pin.clone().unwrap_or_else(|| Path::new("/run/rvs").join(namespace.folder()).join("bpf"));
    if options.check_upgrade {
        return say_plan(&pin);
    }
    let _lock = lock(&pin)?;
    let lasting = netns::ensure_bpffs(&pin).map_err(|e| shown(&e))?;
    if options.anew && begin_anew(&pin).map_err(|e| shown(&e))? {
        tracing::warn!("the data plane of another version is gone, with its connections and services");
    }
    let dataplane = Dataplane::open(OBJECT, &pin, &options.sizes()).map_err(|e| shown(&e))?;
    let adopted = !dataplane.fresh;
    if let Some(layout) = dataplane.upgraded {
        let (from, to) = (format!("{:016x}", layout.version), format!("{:016x}", abi::VERSION));
        tracing::info!(from, to, "the data plane of another version is taken over; its connections are being moved");
    }
    let mut director = Director::new(dataplane).map_err(|e| shown(&e))?;
    if lasting == Lasting::No {
        let warning = format!(
            "{} is mounted in this process's private mount namespace (ip netns exec makes one): the data plane ends with it. Use nsenter --net, or mount a bpffs there beforehand",
            pin.display()
        );
        tracing::warn!("{warning}");
        director.warnings.insert(warning);
    }
    let director = Rc::new(RefCell::new(director));
    let net = Netlink::open().map_err(|e| shown(&e))?;
    let mut network = network::Network::new(net, director.clone(), options.interfaces.clone());
    let listener = match listening(&mut network, &options.socket).await {
        Ok(listener) => listener,
        Err(reason) => {
            // What was at work before goes on; what this start has made does not stay half done.
            if !adopted && let Err(error) = director.borrow_mut().dataplane.teardown() {
                tracing::warn!(error = %shown(&error), "what was begun could not be taken down");
            }
            return Err(reason);
        }
    };
    let changed = Rc::new(Notify::new());
    let checked = Rc::new(Notify::new());
    tokio::task::spawn_local(socket::serve(listener, director.clone(), changed.clone()));
    tokio::task::spawn_local(network.follow(changed.clone()));
    tokio::task::spawn_local(ticks(director.clone(), checked.clone()));
    tokio::task::spawn_local(parts::run(director.clone()));
    tokio::task::spawn_local(firewall(director.clone(), checked));
    let moves = director.borrow().moves.clone();
    tokio::task::spawn_local(tables::moves(director.clone(), moves));
    ready(&options.socket, &pin, &director.borrow(), adopted);
    stopped().await?;
    if let Err(error) = director.borrow().dataplane.maps.take_for(0) {
        tracing::warn!(error = %shown(&error), "the programs go on handing packets over for some seconds");
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _ = std::fs::remove_file(&options.socket);
    if options.teardown {
        director.borrow_mut().dataplane.teardown().map_err(|e| shown(&e))?;
        tracing::info!("the data plane is down");
    } else {
        tracing::info!("stopped; the data plane goes on");
    }
    Ok(())
}

/// For `rvs upgrade`.
fn say_plan(pin: &Path) -> Result<(), String> {
    let plan = upgrade::plan(pin).map_err(|e| shown(&e))?;
    println!("{}", serde_json::to_string(&plan).map_err(|e| shown(&e))?);
    Ok(())
}

/// A data plane that can't be taken over goes. False: it can be, or there is none.
fn begin_anew(pin: &Path) -> Result<bool, BpfError> {
    match Upgrade::find(pin) {
        Err(BpfError::Refused(_)) => bpf::discard(pin),
        found => found.map(|_| false),
    }
}

/// The programs on their interfaces, then the control socket.
async fn listening(network: &mut network::Network, socket: &Path) -> Result<UnixListener, String> {
    network.start().await?;
    socket::listen(socket).map_err(|e| format!("control socket {}: {e}", socket.display()))
}

/// One rvsd for a pin folder.
fn lock(pin: &Path) -> Result<Flock<File>, String> {
    let path: PathBuf = pin.with_extension("lock");
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| format!("folder {}: {e}", folder.display()))?;
    }
    let file = File::create(&path).map_err(|e| format!("lock file {}: {e}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, e)| format!("another rvsd holds {} ({e}): one rvsd for a pin folder", path.display()))
}

fn ready(socket: &Path, pin: &Path, d: &Director, adopted: bool) {
    let interfaces: Vec<String> = d.interfaces.iter().map(|(name, how)| format!("{name}={how}")).collect();
    let line = format!(
        "rvsd: ready socket={} pin={} interfaces={} services={}{}",
        socket.display(),
        pin.display(),
        if interfaces.is_empty() { "none".to_owned() } else { interfaces.join(",") },
        d.model.service_count(),
        if adopted { " (took over a running data plane)" } else { "" },
    );
    println!("{line}");
    let _ = std::io::stdout().flush();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

/// What has to be done from time to time.
async fn ticks(director: Rc<RefCell<Director>>, checked: Rc<Notify>) {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut n, mut seen) = (0u64, 0);
    loop {
        second.tick().await;
        let mut d = director.borrow_mut();
        if let Err(error) = d.tick() {
            tracing::warn!(error = %shown(&error), "tick");
        }
        if n.is_multiple_of(rates::TICK.as_secs()) {
            let all = answer::Counted(&d).all();
            d.estimator.tick(all.into_iter());
        }
        // Soon after the first services, and then every minute.
        let services = d.model.service_count();
        if services != seen || n.is_multiple_of(60) {
            seen = services;
            checked.notify_one();
        }
        n += 1;
    }
}

/// Warn of firewall rules that XDP goes past. Reading them runs commands: beside the event loop, when asked.
async fn firewall(director: Rc<RefCell<Director>>, asked: Rc<Notify>) {
    let mut told = BTreeSet::new();
    loop {
        asked.notified().await;
        let vips: Vec<Vip> = director
            .borrow()
            .model
            .services()
            .filter_map(|(key, _)| match key {
                ServiceKey::Virtual { proto, addr, port } => {
                    Some(Vip { addr: *addr, proto: proto.number(), port: *port })
                }
                ServiceKey::Fwmark { .. } => None,
            })
            .collect();
        let found = tokio::task::spawn_blocking(move || {
            let mut lines = BTreeSet::new();
            if !vips.is_empty() {
                let (readings, errors) = rvs_sys::firewall::readings();
                let (rules, unreadable) = Rules::read(&readings);
                lines.extend(rules.warnings(&vips).iter().map(ToString::to_string));
                lines.extend(errors.iter().map(|e| shown(e)));
                lines.extend(unreadable.iter().map(|e| shown(e)));
            }
            lines
        });
        let Ok(found) = found.await else { continue };
        let mut d = director.borrow_mut();
        // A rule that was mended is warned about no longer.
        for gone in told.difference(&found) {
            d.warnings.remove(gone);
        }
        for new in found.difference(&told) {
            tracing::warn!("{new}");
            d.warnings.insert(new.clone());
        }
        told = found;
    }
}

async fn stopped() -> Result<(), String> {
    let say = |e: std::io::Error| format!("signals: {e}");
    let mut terminate = signal(SignalKind::terminate()).map_err(say)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(say)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(say)?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => tracing::info!("SIGHUP: there is no configuration file to read again"),
        }
    }
}
