//! Whose word about clients' addresses a real server takes (FULLNAT), and the programs that act on it, at a cgroup. They stay by
//! themselves: nothing is pinned, and no process need go on. A cgroup has sockets of many network namespaces; ours are told by the value of
//! the programs' map, which is the namespace's cookie.

use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::maps::{HashMap, Map, MapData, MapInfo};
use aya::programs::{CgroupSockAddr, Program, ProgramInfo, SockOps, loaded_programs};
use aya::{Ebpf, EbpfLoader};

use super::{BpfError, REALSERVER_OBJECT, Result, failed, raw};

const DIRECTORS: &str = "DIRECTORS";
const PEERS: &str = "PEERS";
/// The programs and where they go. The one that learns comes last: nothing is learnt that is not shown.
const PROGRAMS: [(&str, u32); 3] = [
    ("rvs_peer4", raw::BPF_CGROUP_INET4_GETPEERNAME),
    ("rvs_peer6", raw::BPF_CGROUP_INET6_GETPEERNAME),
    ("rvs_accepted", raw::BPF_CGROUP_SOCK_OPS),
];

type Directors = HashMap<MapData, [u8; 16], u64>;

/// Whose word is taken.
pub(super) fn get(cgroup: Option<&Path>) -> Result<BTreeSet<IpAddr>> {
    let cgroup = open(cgroup)?;
    match ours(cgroup.as_fd())? {
        Some(there) if there.programs.len() == PROGRAMS.len() => addresses(&there.directors),
        // Not all of them: the client's address is not shown, whatever is known of it.
        _ => Ok(BTreeSet::new()),
    }
}

/// Take the word of these alone; of nobody: take the programs away.
pub(super) fn set(cgroup: Option<&Path>, wanted: &BTreeSet<IpAddr>) -> Result<()> {
    let cgroup = open(cgroup)?;
    if let Some(mut there) = ours(cgroup.as_fd())? {
        if !wanted.is_empty() && there.programs.len() == PROGRAMS.len() {
            return change(&mut there.directors, wanted);
        }
        // None is wanted, or some are missing: begin anew. What learns goes first.
        for (program, name, at) in there.programs.into_iter().rev() {
            let fd = program.fd().map_err(failed(format!("program {name}")))?;
            raw::cgroup_detach(cgroup.as_fd(), fd.as_fd(), at).map_err(failed(format!("take {name} away")))?;
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let mut ebpf = loaded(wanted)?;
    for (name, at) in PROGRAMS {
        let fd = load(&mut ebpf, name)?;
        raw::cgroup_attach(cgroup.as_fd(), fd.as_fd(), at).map_err(failed(format!("attach {name} to the cgroup")))?;
    }
    Ok(())
}

fn loaded(wanted: &BTreeSet<IpAddr>) -> Result<Ebpf> {
    let cookie = cookie()?;
    let mut loader = EbpfLoader::new();
    loader.override_global("NETNS", &cookie, true);
    let mut ebpf = loader.load(REALSERVER_OBJECT).map_err(failed("load the programs for clients' addresses"))?;
    let map = ebpf.map_mut(DIRECTORS).ok_or_else(|| BpfError::Refused(format!("the object has no map {DIRECTORS}")))?;
    let mut directors = HashMap::try_from(map).map_err(failed(format!("map {DIRECTORS}")))?;
    change(&mut directors, wanted)?;
    Ok(ebpf)
}

fn load(ebpf: &mut Ebpf, name: &str) -> Result<std::os::fd::OwnedFd> {
    let missing = || BpfError::Refused(format!("the object has no program {name}"));
    let what = || format!("program {name}");
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    let fd = match program {
        Program::SockOps(p) => load_ops(p),
        Program::CgroupSockAddr(p) => load_addr(p),
        _ => return Err(missing()),
    };
    fd.map_err(failed(what()))
}

fn load_ops(p: &mut SockOps) -> std::result::Result<std::os::fd::OwnedFd, aya::programs::ProgramError> {
    p.load()?;
    Ok(p.fd()?.as_fd().try_clone_to_owned()?)
}

fn load_addr(p: &mut CgroupSockAddr) -> std::result::Result<std::os::fd::OwnedFd, aya::programs::ProgramError> {
    p.load()?;
    Ok(p.fd()?.as_fd().try_clone_to_owned()?)
}

fn change<T: BorrowMut<MapData>>(directors: &mut HashMap<T, [u8; 16], u64>, wanted: &BTreeSet<IpAddr>) -> Result<()> {
    let cookie = cookie()?;
    for gone in addresses(directors)?.difference(wanted) {
        let key = rvs_control::plan::bytes(*gone);
        directors.remove(&key).map_err(failed(format!("map {DIRECTORS}, remove")))?;
    }
    for director in wanted {
        let key = rvs_control::plan::bytes(*director);
        directors.insert(key, cookie, 0).map_err(failed(format!("map {DIRECTORS}, insert")))?;
    }
    Ok(())
}

fn addresses<T: Borrow<MapData>>(directors: &HashMap<T, [u8; 16], u64>) -> Result<BTreeSet<IpAddr>> {
    let of = |key: std::result::Result<[u8; 16], _>| key.map(super::address);
    directors.keys().map(of).collect::<std::result::Result<_, _>>().map_err(failed(format!("map {DIRECTORS}, list")))
}

/// What is at the cgroup for our namespace.
struct There {
    /// In the order of [`PROGRAMS`].
    programs: Vec<(ProgramInfo, &'static str, u32)>,
    directors: Directors,
}

/// The program that learns is known by the namespace in its map, the others by the map that they have in common with it.
fn ours(cgroup: BorrowedFd<'_>) -> Result<Option<There>> {
    let what = || "the programs of the cgroup";
    let cookie = cookie()?;
    let [.., (learns, _)] = PROGRAMS;
    let at_cgroup = |name: &'static str, at: u32| -> Result<Vec<ProgramInfo>> {
        let ids = raw::cgroup_programs(cgroup, at).map_err(failed(format!("{} ({name})", what())))?;
        let all = loaded_programs().filter_map(std::result::Result::ok);
        Ok(all.filter(|p| ids.contains(&p.id()) && p.name_as_str() == Some(name)).collect())
    };
    let mut found = None;
    for program in at_cgroup(learns, raw::BPF_CGROUP_SOCK_OPS)? {
        let Some(map) = map_of(&program, DIRECTORS)? else { continue };
        let data = MapData::from_id(map).map_err(failed(what()))?;
        let directors: Directors = HashMap::try_from(Map::HashMap(data)).map_err(failed(what()))?;
        let first = directors.iter().next().and_then(std::result::Result::ok);
        if first.is_some_and(|(_, of)| of == cookie) {
            found = map_of(&program, PEERS)?.map(|peers| (peers, directors));
        }
    }
    let Some((peers, directors)) = found else { return Ok(None) };
    let mut programs = Vec::new();
    for (name, at) in PROGRAMS {
        for program in at_cgroup(name, at)? {
            if map_of(&program, PEERS)? == Some(peers) {
                programs.push((program, name, at));
            }
        }
    }
    Ok(Some(There { programs, directors }))
}

/// A program's map of this name.
fn map_of(program: &ProgramInfo, name: &str) -> Result<Option<u32>> {
    let what = || "the programs of the cgroup";
    for id in program.map_ids().map_err(failed(what()))?.unwrap_or_default() {
        let info = MapInfo::from_id(id).map_err(failed(what()))?;
        if info.name_as_str() == Some(name) {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

fn cookie() -> Result<u64> {
    raw::netns_cookie().map_err(failed("the number of this network namespace"))
}

/// The cgroup, or the host's first one.
fn open(cgroup: Option<&Path>) -> Result<File> {
    let path = match cgroup {
        Some(path) => path.to_owned(),
        None => hierarchy()?,
    };
    File::open(&path).map_err(failed(format!("cgroup {}", path.display())))
}

/// Where the cgroup hierarchy of version 2 is mounted: programs are attached to none other.
fn hierarchy() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").map_err(failed("read /proc/self/mounts"))?;
    let found = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next() == Some("cgroup2")).then(|| PathBuf::from(path))
    });
    found.ok_or_else(|| {
        BpfError::Refused(
            "no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup, or name one with --cgroup".into(),
        )
    })
}
