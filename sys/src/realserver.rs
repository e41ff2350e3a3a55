//! Observe a real server, act on `rvs_control::realserver`'s plan, and put everything back.
//!
//! What takes the changes back is written to a record file before the first change, so that [`down`] works whatever
//! happens in between. A failed [`up`] leaves the host as it was.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use rvs_control::firewall::Rules;
use rvs_control::net::{Addr, Scope};
use rvs_control::realserver::{self, Decap, Mode, Mss, Observed, Op, Refused, Wanted};
use serde::{Deserialize, Serialize};

use crate::bpf::BpfError;
use crate::bpf::programs::Programs;
use crate::netlink::{Net, NetError};
use crate::netns::NetNs;
use crate::sysctl::{Sysctl, SysctlError};

/// Format of the record file.
const VERSION: u32 = 1;

/// Why a real server was not set up, looked at or taken down.
#[derive(Debug, thiserror::Error)]
pub enum RealserverError {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("cannot {what} the record {}: {source}", .path.display())]
    Record { what: &'static str, path: PathBuf, source: io::Error },
    #[error("the record {} cannot be understood ({why}); move it away if nothing is to be taken back", .path.display())]
    BadRecord { path: PathBuf, why: String },
    #[error(
        "the record {} is of another network namespace ({theirs}, this is {ours}): name another with --state, or \
         remove it if that namespace is gone", .path.display()
    )]
    OtherNamespace { path: PathBuf, theirs: u64, ours: u64 },
    /// Taking back failed in part; the record holds what is left.
    #[error("not everything could be put back; `rvs realserver down` tries the rest again: {}", .0.join("; "))]
    Left(Vec<String>),
    #[error("{error}; and then not everything could be put back, `rvs realserver down` tries the rest again: {}", .left.join("; "))]
    LeftAfter { error: Box<Self>, left: Vec<String> },
}

/// What [`down`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Down {
    /// There is no record: nothing to take back.
    Nothing,
    /// All was put back; things worth knowing, one line each.
    Restored { notes: Vec<String> },
}

/// Read everything that `rvs_control::realserver::desired` looks at, but the firewall rules.
///
/// # Errors
/// [`RealserverError::Net`], [`RealserverError::Sysctl`].
pub async fn observe(
    net: &impl Net,
    sysctl: &impl Sysctl,
    programs: &impl Programs,
    rules: Rules,
) -> Result<Observed, RealserverError> {
    let links = net.links().await?;
    let mut host = Observed { rules, ..Observed::default() };
    for key in realserver::settings(&links) {
        if let Some(value) = sysctl.read(&key)? {
            host.settings.insert(key, value);
        }
    }
    for link in links.iter().filter(|l| l.ethernet && !l.loopback) {
        if let Some(mut decap) = programs.tunnel(&link.name)? {
            // What is configured counts only if a test packet comes through.
            let mut proven = std::collections::BTreeSet::new();
            for vip in &decap.vips {
                if programs.prove(&link.name, *vip)? {
                    proven.insert(*vip);
                }
            }
            decap.vips = proven;
            host.decap.insert(link.name.clone(), decap);
        }
    }
    host.directors = programs.directors()?;
    host.links = links;
    host.addrs = net.addrs().await?;
    host.ipv4_default_routes = net.ipv4_default_routes().await?;
    Ok(host)
}

/// Make the host what is wanted, beside what an earlier `up` was told. Gives the changes that were needed, none when
/// it was right already.
///
/// # Errors
/// [`RealserverError::Refused`] before anything is changed; any other after everything was put back.
pub async fn up(
    net: &impl Net,
    sysctl: &impl Sysctl,
    programs: &impl Programs,
    wanted: &Wanted,
    rules: Rules,
    record: &RecordFile,
) -> Result<Vec<Op>, RealserverError> {
    wanted.check()?;
    let _lock = record.lock()?;
    let before = record.read()?;
    let ops = realserver::plan_up(wanted, &observe(net, sysctl, programs, rules).await?)?;
    let merged = before.clone().unwrap_or_default().told(wanted).and(&ops);
    record.write(Some(&merged))?;
    for (done, op) in ops.iter().enumerate() {
        let Err(error) = apply(net, sysctl, programs, op).await else { continue };
        let undo: Vec<Op> = ops[..done].iter().rev().map(Op::inverse).collect();
        let (left, problems, _) = take_back(net, sysctl, programs, &undo).await;
        if left.is_empty() {
            record.write(before.as_ref())?;
            return Err(error);
        }
        let rest = before.unwrap_or_default().before(left);
        record.write(Some(&rest))?;
        return Err(RealserverError::LeftAfter { error: Box::new(error), left: problems });
    }
    Ok(ops)
}

/// Put back what was there before [`up`].
///
/// # Errors
/// [`RealserverError::Left`] when something could not be put back; the rest was.
pub async fn down(
    net: &impl Net,
    sysctl: &impl Sysctl,
    programs: &impl Programs,
    record: &RecordFile,
) -> Result<Down, RealserverError> {
    let _lock = record.lock()?;
    let Some(before) = record.read()? else { return Ok(Down::Nothing) };
    let (left, problems, notes) = take_back(net, sysctl, programs, &before.undo).await;
    if left.is_empty() {
        record.write(None)?;
        return Ok(Down::Restored { notes });
    }
    record.write(Some(&Record { undo: left, ..before }))?;
    Err(RealserverError::Left(problems))
}

async fn apply(net: &impl Net, sysctl: &impl Sysctl, programs: &impl Programs, op: &Op) -> Result<(), RealserverError> {
    match op {
        Op::AddAddr { addr, .. } => net.add_addr(addr).await.map(|_| ())?,
        Op::DelAddr { addr, .. } => net.del_addr(addr.ifindex, addr.ip, addr.prefix_len).await.map(|_| ())?,
        Op::Decap { link, new, .. } => programs.set_tunnel(link, new.as_ref())?,
        Op::Directors { new, .. } => programs.set_directors(new)?,
        Op::Set { key, new, .. } => sysctl.write(key, *new).map(|_| ())?,
    }
    Ok(())
}

/// All of `undo` in turn, whatever fails: what is left with the reasons, and notes.
async fn take_back(
    net: &impl Net,
    sysctl: &impl Sysctl,
    programs: &impl Programs,
    undo: &[Op],
) -> (Vec<Op>, Vec<String>, Vec<String>) {
    let (mut left, mut problems, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for op in undo {
        match take_back_one(net, sysctl, programs, op).await {
            Ok(note) => notes.extend(note),
            Err(error) => {
                left.push(op.clone());
                problems.push(error.to_string());
            }
        }
    }
    (left, problems, notes)
}

async fn take_back_one(
    net: &impl Net,
    sysctl: &impl Sysctl,
    programs: &impl Programs,
    op: &Op,
) -> Result<Option<String>, RealserverError> {
    match op {
        Op::Set { key, old, new } => {
            let Some(now) = sysctl.read(key)? else { return Ok(Some(format!("{key} is gone with its interface"))) };
            if now != *new {
                sysctl.write(key, *new)?;
            }
            let changed = now != *old && now != *new;
            Ok(changed.then(|| format!("{key} was {now}, not the {old} that was set; it is {new} again")))
        }
        Op::Directors { new, .. } => {
            programs.set_directors(new)?;
            Ok(None)
        }
        Op::Decap { link, new, .. } => {
            if !net.links().await?.iter().any(|l| l.name == *link) {
                return Ok(Some(format!("the program for tunnels is gone with {link}")));
            }
            programs.set_tunnel(link, new.as_ref())?;
            Ok(None)
        }
        Op::AddAddr { link, addr } | Op::DelAddr { link, addr } => {
            let Some(ifindex) = net.links().await?.into_iter().find(|l| l.name == *link).map(|l| l.ifindex) else {
                return Ok(Some(format!("{} is gone with {link}", addr.ip)));
            };
            // The interface may have been made anew since.
            let addr = Addr { ifindex, ..addr.clone() };
            if matches!(op, Op::AddAddr { .. }) {
                net.add_addr(&addr).await?;
                return Ok(None);
            }
            let removed = net.del_addr(ifindex, addr.ip, addr.prefix_len).await?;
            Ok(removed.is_none().then(|| format!("{} was no longer on {link}", addr.ip)))
        }
    }
}

/// What [`up`] was told, and what takes its changes back, in the order to do it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Record {
    vips: Vec<IpAddr>,
    /// With full NAT.
    directors: Vec<IpAddr>,
    interfaces: Vec<String>,
    static_arp: bool,
    /// With tunnels: where GUE comes to.
    gue_port: Option<u16>,
    /// ... and what clients are told.
    mss: Mss,
    undo: Vec<Op>,
}

impl Record {
    /// VIPs and directors add up; of the rest the last word counts.
    fn told(mut self, wanted: &Wanted) -> Self {
        let add = |known: &mut Vec<IpAddr>, new: &[IpAddr]| {
            let new: Vec<IpAddr> = new.iter().filter(|a| !known.contains(a)).copied().collect();
            known.extend(new);
        };
        add(&mut self.vips, &wanted.vips);
        add(&mut self.directors, &wanted.directors);
        if wanted.mode != Mode::Fullnat {
            self.interfaces.clone_from(&wanted.interfaces);
            self.static_arp = wanted.static_arp;
            self.gue_port = (wanted.mode == Mode::Tun).then_some(wanted.gue_port);
            self.mss = if wanted.mode == Mode::Tun { wanted.mss } else { Mss::Off };
        }
        self
    }

    /// With the inverse of further changes before it. Of a setting the oldest value is kept.
    fn and(self, ops: &[Op]) -> Self {
        self.before(ops.iter().rev().map(Op::inverse).collect())
    }

    fn before(self, newer: Vec<Op>) -> Self {
        let known = |op: &Op| match op {
            Op::Decap { link, .. } => self.undo.iter().any(|o| matches!(o, Op::Decap { link: l, .. } if l == link)),
            Op::Directors { .. } => self.undo.iter().any(|o| matches!(o, Op::Directors { .. })),
            Op::Set { key, .. } => self.undo.iter().any(|o| matches!(o, Op::Set { key: k, .. } if k == key)),
            op => self.undo.contains(op),
        };
        let mut undo: Vec<Op> = newer.into_iter().filter(|op| !known(op)).collect();
        undo.extend(self.undo);
        Self { undo, ..self }
    }
}

/// The file that holds what takes the changes back, and the namespace it is for.
#[derive(Clone, Debug)]
pub struct RecordFile {
    path: PathBuf,
    namespace: NetNs,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    netns: u64,
    netns_name: Option<String>,
    vips: Vec<IpAddr>,
    #[serde(default)]
    directors: Vec<IpAddr>,
    interfaces: Vec<String>,
    static_arp: bool,
    #[serde(default)]
    gue_port: Option<u16>,
    #[serde(default)]
    mss: Option<String>,
    undo: Vec<StoredOp>,
}

/// [`Op`] on disk: what to do to take a change back.
#[derive(Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
enum StoredOp {
    AddAddr { link: String, addr: StoredAddr },
    DelAddr { link: String, addr: StoredAddr },
    Set { key: String, from: i64, to: i64 },
    Decap { link: String, from: Option<StoredDecap>, to: Option<StoredDecap> },
    Directors { from: Vec<IpAddr>, to: Vec<IpAddr> },
}

/// [`Decap`] on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredDecap {
    vips: Vec<IpAddr>,
    gue_port: u16,
    #[serde(default)]
    mss: Option<u16>,
}

impl From<Decap> for StoredDecap {
    fn from(d: Decap) -> Self {
        Self { vips: d.vips.into_iter().collect(), gue_port: d.gue_port, mss: d.mss }
    }
}

impl From<StoredDecap> for Decap {
    fn from(d: StoredDecap) -> Self {
        Self { vips: d.vips.into_iter().collect(), gue_port: d.gue_port, mss: d.mss }
    }
}

/// [`Addr`] on disk, without the interface, which goes by name.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredAddr {
    ip: IpAddr,
    prefix_len: u8,
    /// `RT_SCOPE_*`.
    scope: u8,
    flags: u32,
    label: Option<String>,
    broadcast: Option<Ipv4Addr>,
    peer: Option<IpAddr>,
    preferred_s: u32,
    valid_s: u32,
}

impl RecordFile {
    /// The record at `path` for a namespace.
    pub fn new(path: PathBuf, namespace: NetNs) -> Self {
        Self { path, namespace }
    }

    /// Where the record of a namespace is unless the user says otherwise: /run/rvs/realserver.json, in a named
    /// namespace /run/rvs/realserver-NAME.json.
    pub fn default_path(namespace: &NetNs) -> PathBuf {
        let run = Path::new("/run/rvs");
        match &namespace.name {
            Some(name) => run.join(format!("realserver-{name}.json")),
            None => run.join("realserver.json"),
        }
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> RealserverError {
        let path = self.path.clone();
        move |source| RealserverError::Record { what, path, source }
    }

    fn folder(&self) -> &Path {
        self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Keep others from changing the host by a record in the same folder meanwhile, until the file is dropped.
    fn lock(&self) -> Result<File, RealserverError> {
        fs::create_dir_all(self.folder()).map_err(self.failed("make the folder of"))?;
        let folder = File::open(self.folder()).map_err(self.failed("open the folder of"))?;
        folder.lock().map_err(self.failed("lock the folder of"))?;
        Ok(folder)
    }

    /// What [`up`] was told so far, one for each kind of forwarding; none without a record.
    ///
    /// # Errors
    /// When the record can't be read, or is of another namespace.
    pub fn told(&self) -> Result<Vec<Wanted>, RealserverError> {
        let Some(record) = self.read()? else { return Ok(Vec::new()) };
        let base = Wanted {
            mode: if record.gue_port.is_some() { Mode::Tun } else { Mode::Dr },
            vips: record.vips,
            directors: Vec::new(),
            interfaces: record.interfaces,
            static_arp: record.static_arp,
            gue_port: record.gue_port.unwrap_or(realserver::GUE_PORT),
            mss: record.mss,
        };
        let fullnat = Wanted { mode: Mode::Fullnat, vips: Vec::new(), directors: record.directors, ..base.clone() };
        let told = |wanted: &Wanted| !wanted.vips.is_empty() || !wanted.directors.is_empty();
        Ok([base, fullnat].into_iter().filter(told).collect())
    }

    fn read(&self) -> Result<Option<Record>, RealserverError> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("read")(error)),
        };
        let bad = |why: String| RealserverError::BadRecord { path: self.path.clone(), why };
        let stored: Stored = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if stored.version != VERSION {
            return Err(bad(format!("it has version {}, this program knows {VERSION}", stored.version)));
        }
        if stored.netns != self.namespace.inode {
            // A namespace of this name was made anew: what the record is about went with the old one.
            if stored.netns_name.is_some() && stored.netns_name == self.namespace.name {
                return Ok(None);
            }
            let (path, theirs, ours) = (self.path.clone(), stored.netns, self.namespace.inode);
            return Err(RealserverError::OtherNamespace { path, theirs, ours });
        }
        let Stored { vips, directors, interfaces, static_arp, gue_port, mss, .. } = stored;
        let mss = mss.map(|mss| mss.parse().map_err(bad)).transpose()?.unwrap_or_default();
        Ok(Some(Record {
            vips,
            directors,
            interfaces,
            static_arp,
            gue_port,
            mss,
            undo: stored.undo.into_iter().map(Op::from).collect(),
        }))
    }

    /// Replace the record in one step; `None` removes it.
    fn write(&self, record: Option<&Record>) -> Result<(), RealserverError> {
        let Some(record) = record else {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed("remove")(error)),
                _ => Ok(()),
            };
        };
        let stored = Stored {
            version: VERSION,
            netns: self.namespace.inode,
            netns_name: self.namespace.name.clone(),
            vips: record.vips.clone(),
            directors: record.directors.clone(),
            interfaces: record.interfaces.clone(),
            static_arp: record.static_arp,
            gue_port: record.gue_port,
            mss: (record.mss != Mss::Off).then(|| record.mss.to_string()),
            undo: record.undo.iter().map(StoredOp::from).collect(),
        };
        let text = serde_json::to_string_pretty(&stored).map_err(|e| self.failed("write")(e.into()))?;
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &self.path)
        };
        write().map_err(self.failed("write"))
    }
}

impl From<&Op> for StoredOp {
    fn from(op: &Op) -> Self {
        match op.clone() {
            Op::AddAddr { link, addr } => Self::AddAddr { link, addr: addr.into() },
            Op::DelAddr { link, addr } => Self::DelAddr { link, addr: addr.into() },
            Op::Set { key, old, new } => Self::Set { key, from: old, to: new },
            Op::Decap { link, old, new } => {
                Self::Decap { link, from: old.map(StoredDecap::from), to: new.map(StoredDecap::from) }
            }
            Op::Directors { old, new } => {
                Self::Directors { from: old.into_iter().collect(), to: new.into_iter().collect() }
            }
        }
    }
}

impl From<StoredOp> for Op {
    fn from(op: StoredOp) -> Self {
        match op {
            StoredOp::AddAddr { link, addr } => Self::AddAddr { link, addr: addr.into() },
            StoredOp::DelAddr { link, addr } => Self::DelAddr { link, addr: addr.into() },
            StoredOp::Set { key, from, to } => Self::Set { key, old: from, new: to },
            StoredOp::Decap { link, from, to } => {
                Self::Decap { link, old: from.map(Decap::from), new: to.map(Decap::from) }
            }
            StoredOp::Directors { from, to } => {
                Self::Directors { old: from.into_iter().collect(), new: to.into_iter().collect() }
            }
        }
    }
}

impl From<Addr> for StoredAddr {
    fn from(addr: Addr) -> Self {
        let scope = match addr.scope {
            Scope::Global => 0,
            Scope::Site => 200,
            Scope::Link => 253,
            Scope::Host => 254,
            Scope::Other(number) => number,
        };
        let Addr { ifindex: _, ip, prefix_len, scope: _, flags, label, broadcast, peer, preferred_s, valid_s } = addr;
        Self { ip, prefix_len, scope, flags, label, broadcast, peer, preferred_s, valid_s }
    }
}

impl From<StoredAddr> for Addr {
    fn from(addr: StoredAddr) -> Self {
        let scope = match addr.scope {
            0 => Scope::Global,
            200 => Scope::Site,
            253 => Scope::Link,
            254 => Scope::Host,
            number => Scope::Other(number),
        };
        let StoredAddr { ip, prefix_len, scope: _, flags, label, broadcast, peer, preferred_s, valid_s } = addr;
        // The interface is looked up by name when it is used.
        Self { ifindex: 0, ip, prefix_len, scope, flags, label, broadcast, peer, preferred_s, valid_s }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rvs_control::net::{Link, Mac};

    use super::*;
    use crate::bpf::programs::FakePrograms;
    use crate::netlink::fake::{FakeNet, World};
    use crate::sysctl::fake::FakeSysctl;
    use rvs_control::realserver::GUE_PORT;

    /// A folder that goes away with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("rvs-realserver-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn record(&self, inode: u64, name: Option<&str>) -> RecordFile {
            RecordFile::new(self.0.join("record.json"), NetNs { inode, name: name.map(str::to_owned) })
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn link(ifindex: u32, name: &str) -> Link {
        let loopback = name == "lo";
        Link {
            ifindex,
            name: name.into(),
            mac: (!loopback).then_some(Mac([2, 0, 0, 0, 0, 1])),
            mtu: 1500,
            kind: String::new(),
            master: None,
            port_kind: String::new(),
            lower: None,
            vlan: None,
            up: true,
            running: true,
            loopback,
            ethernet: !loopback,
            noarp: false,
        }
    }

    /// lo with a VIP in a too wide prefix, and eth0.
    fn host() -> (FakeNet, FakeSysctl) {
        let links = vec![link(1, "lo"), link(2, "eth0")];
        let settings = realserver::settings(&links).into_iter().map(|key| (key, 0));
        let sysctl = FakeSysctl::new(settings);
        let wide = Addr { prefix_len: 64, label: None, ..Addr::host(1, "2001:db8::1".parse().unwrap()) };
        (FakeNet::new(World { links, addrs: vec![wide], ..World::default() }), sysctl)
    }

    fn wanted(vips: &[&str]) -> Wanted {
        let vips = vips.iter().map(|v| v.parse().unwrap()).collect();
        let directors = Vec::new();
        Wanted {
            mode: Mode::Dr,
            vips,
            directors,
            interfaces: Vec::new(),
            static_arp: false,
            gue_port: GUE_PORT,
            mss: Mss::Off,
        }
    }

    fn state(net: &FakeNet, sysctl: &FakeSysctl) -> (World, BTreeMap<String, i64>) {
        (net.world(), sysctl.values())
    }

    #[tokio::test]
    async fn up_is_idempotent_and_down_puts_everything_back() {
        let folder = Folder::new("idempotent");
        let record = folder.record(7, None);
        let (net, sysctl) = host();
        let before = state(&net, &sysctl);
        assert_eq!(down(&net, &sysctl, &FakePrograms::default(), &record).await.unwrap(), Down::Nothing);
        assert_eq!(record.told().unwrap(), []);
        let vips = wanted(&["192.0.2.1", "2001:db8::1"]);
        assert_eq!(
            up(&net, &sysctl, &FakePrograms::default(), &vips, Rules::default(), &record).await.unwrap().len(),
            7
        );
        let ready = state(&net, &sysctl);
        assert_eq!(up(&net, &sysctl, &FakePrograms::default(), &vips, Rules::default(), &record).await.unwrap(), []);
        assert_eq!(state(&net, &sysctl), ready);

        // Something is broken by hand, and a VIP is added: the oldest values are what comes back.
        sysctl.write("net/ipv4/conf/all/arp_ignore", 5).unwrap();
        let more = wanted(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
        let ops = up(&net, &sysctl, &FakePrograms::default(), &more, Rules::default(), &record).await.unwrap();
        assert_eq!(ops.len(), 2, "{ops:?}");
        assert_eq!(record.told().unwrap(), [wanted(&["192.0.2.1", "2001:db8::1", "192.0.2.2"])]);
        assert_eq!(
            down(&net, &sysctl, &FakePrograms::default(), &record).await.unwrap(),
            Down::Restored { notes: Vec::new() }
        );
        assert_eq!(state(&net, &sysctl), before);
        assert_eq!(down(&net, &sysctl, &FakePrograms::default(), &record).await.unwrap(), Down::Nothing);
    }

    #[tokio::test]
    async fn whichever_operation_fails_nothing_stays_half_done() {
        let vips = wanted(&["192.0.2.1", "2001:db8::1"]);
        let mut failures = 0;
        for (nth, in_sysctl) in (1..40).flat_map(|n| [(n, false), (n, true)]) {
            let folder = Folder::new(&format!("fail-{nth}-{in_sysctl}"));
            let record = folder.record(7, None);
            let (net, sysctl) = host();
            let before = state(&net, &sysctl);
            if in_sysctl {
                sysctl.fail_nth(nth)
            } else {
                net.fail_nth(nth)
            }
            match up(&net, &sysctl, &FakePrograms::default(), &vips, Rules::default(), &record).await {
                Ok(_) => {
                    if in_sysctl {
                        sysctl.fail_nth(0)
                    } else {
                        net.fail_nth(0)
                    }
                    down(&net, &sysctl, &FakePrograms::default(), &record).await.unwrap();
                }
                Err(error) => {
                    failures += 1;
                    assert!(error.to_string().contains("failed on purpose"), "{error}");
                }
            }
            assert_eq!(state(&net, &sysctl), before, "operation {nth} (of the settings: {in_sysctl})");
            assert!(!record.path.exists());
        }
        // links, addrs, routes, 3 changes; 7 reads, 4 writes: each failed once.
        assert_eq!(failures, 6 + 11);
    }

    #[tokio::test]
    async fn a_down_that_fails_can_be_tried_again() {
        for nth in 1..12 {
            let folder = Folder::new(&format!("again-{nth}"));
            let record = folder.record(7, None);
            let (net, sysctl) = host();
            let before = state(&net, &sysctl);
            let vips = wanted(&["192.0.2.1", "2001:db8::1"]);
            up(&net, &sysctl, &FakePrograms::default(), &vips, Rules::default(), &record).await.unwrap();
            net.fail_nth(nth);
            sysctl.fail_nth(nth);
            let first = down(&net, &sysctl, &FakePrograms::default(), &record).await;
            assert_eq!(first.is_err(), record.path.exists(), "{first:?}");
            net.fail_nth(0);
            sysctl.fail_nth(0);
            down(&net, &sysctl, &FakePrograms::default(), &record).await.unwrap();
            assert_eq!(state(&net, &sysctl), before, "operation {nth}");
        }
    }

    #[tokio::test]
    async fn what_changed_meanwhile_is_told() {
        let folder = Folder::new("notes");
        let record = folder.record(7, None);
        let (net, sysctl) = host();
        up(&net, &sysctl, &FakePrograms::default(), &wanted(&["192.0.2.1"]), Rules::default(), &record).await.unwrap();
        sysctl.write("net/ipv4/conf/all/arp_announce", 1).unwrap();
        net.edit(|world| world.addrs.retain(|a| a.ip.is_ipv6()), []);
        let notes = match down(&net, &sysctl, &FakePrograms::default(), &record).await.unwrap() {
            Down::Restored { notes } => notes,
            Down::Nothing => panic!("there is a record"),
        };
        assert_eq!(
            notes,
            [
                "192.0.2.1 was no longer on lo",
                "net/ipv4/conf/all/arp_announce was 1, not the 2 that was set; it is 0 again"
            ]
        );
    }

    #[tokio::test]
    async fn a_record_of_another_namespace_is_not_used() {
        let folder = Folder::new("other");
        let (net, sysctl) = host();
        let vips = wanted(&["192.0.2.1"]);
        up(&net, &sysctl, &FakePrograms::default(), &vips, Rules::default(), &folder.record(7, Some("rs1")))
            .await
            .unwrap();
        let error = down(&net, &sysctl, &FakePrograms::default(), &folder.record(8, Some("rs2")))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("is of another network namespace (7, this is 8)"), "{error}");
        let anew = down(&net, &sysctl, &FakePrograms::default(), &folder.record(8, Some("rs1"))).await.unwrap();
        assert_eq!(anew, Down::Nothing, "a namespace of the same name made anew");
        fs::write(folder.0.join("record.json"), "{\"version\":1").unwrap();
        let error = down(&net, &sysctl, &FakePrograms::default(), &folder.record(7, None)).await.unwrap_err();
        assert!(matches!(error, RealserverError::BadRecord { .. }), "{error}");
    }
}
