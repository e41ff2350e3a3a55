//! Which network namespace this is, how to enter another, and whether a bpffs mount outlives this process.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// Where `ip netns add` puts names.
const NAMED: &str = "/run/netns";

/// A failed operation on a namespace or a mount, with its path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", .path.display())]
pub struct NetnsError {
    pub what: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NetnsError {
    move |source| NetnsError { what, path: path.into(), source }
}

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetNs {
    /// Its number on nsfs, as `ls -l /proc/self/ns/net` shows it: unique while the machine runs.
    pub inode: u64,
    /// Its name, if `ip netns` (or whoever keeps files in /run/netns) gave it one.
    pub name: Option<String>,
}

impl NetNs {
    /// A folder name that is the same for every process in the namespace: its name, or `netns-<inode>`.
    pub fn folder(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("netns-{}", self.inode))
    }
}

/// The calling thread's network namespace.
///
/// # Errors
/// When /proc is not mounted.
pub fn current() -> Result<NetNs, NetnsError> {
    let here = Path::new("/proc/thread-self/ns/net");
    let meta = fs::metadata(here).map_err(failed("read", here))?;
    // No folder: no named namespaces.
    let named = fs::read_dir(NAMED).into_iter().flatten().flatten();
    let mut names: Vec<String> = named
        .filter(|entry| fs::metadata(entry.path()).is_ok_and(|m| (m.dev(), m.ino()) == (meta.dev(), meta.ino())))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    // Several names for one namespace: the same choice every time.
    names.sort();
    Ok(NetNs { inode: meta.ino(), name: names.into_iter().next() })
}

/// Move the calling thread, and no other, into the named namespace. Sockets and threads made before stay where they
/// are; /proc/sys/net follows the thread.
///
/// # Errors
/// When there is no such name, or without CAP_SYS_ADMIN.
pub fn enter(name: &str) -> Result<(), NetnsError> {
    let path = Path::new(NAMED).join(name);
    let file = File::open(&path).map_err(failed("open the network namespace", &path))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(|e| failed("enter the network namespace", &path)(e.into()))
}

/// Whether a mount is still there when this process is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// It is (or would be) in the mount namespace of process 1.
    Yes,
    /// It is (or would be) only in a mount namespace of this process and its relatives: `ip netns exec`, `unshare -m`
    /// or a systemd unit with a file-system sandbox makes one. What is pinned there vanishes with the last of them.
    No,
    /// Process 1 can't be looked at.
    Unknown,
}

/// What a folder for pins is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BpfFolder {
    Bpffs(Lasting),
    /// There, but on another file system: a bpffs may be mounted on it.
    OtherFs(Lasting),
    /// Not there.
    Missing(Lasting),
}

/// Look at a folder for pins without changing anything. For `OtherFs` and `Missing`, whether a mount made there now
/// would last.
///
/// # Errors
/// When the folder can't be examined for another reason than that it is missing.
pub fn bpf_folder(folder: &Path) -> Result<BpfFolder, NetnsError> {
    match statfs(folder) {
        Ok(fs) if fs.filesystem_type() == BPF_FS_MAGIC => {
            let dev = fs::metadata(folder).map_err(failed("examine", folder))?.dev();
            Ok(BpfFolder::Bpffs(mount_lasts(dev)))
        }
        Ok(_) => Ok(BpfFolder::OtherFs(namespace_lasts())),
        Err(nix::errno::Errno::ENOENT) => Ok(BpfFolder::Missing(namespace_lasts())),
        Err(error) => Err(failed("examine", folder)(error.into())),
    }
}

/// Make sure that `folder` is there and on a bpffs: mounts one (root only, mode 0700) if it isn't. Whether it lasts.
///
/// # Errors
/// When the folder can't be made or the mount is refused (not root, or no BPF in this kernel).
pub fn ensure_bpffs(folder: &Path) -> Result<Lasting, NetnsError> {
    fs::create_dir_all(folder).map_err(failed("make the folder", folder))?;
    if let BpfFolder::Bpffs(lasting) = bpf_folder(folder)? {
        return Ok(lasting);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), folder, Some("bpf"), flags, Some("mode=0700"))
        .map_err(|e| failed("mount a bpffs on", folder)(e.into()))?;
    match bpf_folder(folder)? {
        BpfFolder::Bpffs(lasting) => Ok(lasting),
        BpfFolder::OtherFs(_) | BpfFolder::Missing(_) => {
            Err(failed("mount a bpffs on", folder)(io::Error::other("the mount does not show")))
        }
    }
}

/// Whether a mount made now would be in process 1's mount namespace. A mount belongs to one namespace and its id to no
/// other mount, so one shared id tells. (/proc/1/ns/mnt would say it more directly, but may be closed even to root.)
fn namespace_lasts() -> Lasting {
    match (fs::read_to_string("/proc/self/mountinfo"), fs::read_to_string("/proc/1/mountinfo")) {
        (Ok(ours), Ok(init)) if share_a_mount(&ours, &init) => Lasting::Yes,
        (Ok(_), Ok(_)) => Lasting::No,
        _ => Lasting::Unknown,
    }
}

/// Whether two `mountinfo` texts have a mount id in common.
fn share_a_mount(ours: &str, theirs: &str) -> bool {
    let id = |line: &'_ str| line.split(' ').next().and_then(|id| id.parse::<u64>().ok());
    let theirs: BTreeSet<u64> = theirs.lines().filter_map(id).collect();
    ours.lines().filter_map(id).any(|id| theirs.contains(&id))
}

/// Whether the file system `dev` is mounted in process 1's mount namespace. A private namespace shows the host's
/// mounts too, so this asks for the file system, not for the namespace.
fn mount_lasts(dev: u64) -> Lasting {
    match fs::read_to_string("/proc/1/mountinfo") {
        Ok(mounts) if mounted(&mounts, dev) => Lasting::Yes,
        Ok(_) => Lasting::No,
        Err(_) => Lasting::Unknown,
    }
}

/// Whether `mountinfo` (proc(5): id, parent, major:minor, ...) has a mount of the file system `dev`.
fn mounted(mountinfo: &str, dev: u64) -> bool {
    let number = format!("{}:{}", nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    mountinfo.lines().any(|line| line.split(' ').nth(2) == Some(number.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_found_by_its_number_only() {
        let table = "36 35 0:31 / /sys/fs/bpf rw,nosuid - bpf bpf rw,mode=700\n40 35 0:5 / /a rw - tmpfs 0:32 rw\n";
        assert!(mounted(table, nix::sys::stat::makedev(0, 31)));
        assert!(!mounted(table, nix::sys::stat::makedev(0, 32)));
        assert!(!mounted("", nix::sys::stat::makedev(0, 31)));
    }

    #[test]
    fn one_mount_id_in_common_is_the_same_namespace() {
        let host = "22 1 0:20 / / rw - ext4 a rw\n23 22 0:21 / /sys rw - sysfs b rw\n";
        assert!(share_a_mount("23 22 0:21 / /sys rw - sysfs b rw\n", host));
        assert!(!share_a_mount("40 39 0:20 / / rw - ext4 a rw\n1 22 0:21 / /sys rw - sysfs b rw\n", host));
        assert!(!share_a_mount("", host) && !share_a_mount("\n", "\n"));
    }

    #[test]
    fn a_missing_folder_is_an_answer() {
        let folder = std::env::temp_dir().join("rvs-no-such-folder");
        assert!(matches!(bpf_folder(&folder), Ok(BpfFolder::Missing(_))));
        assert!(matches!(bpf_folder(&std::env::temp_dir()), Ok(BpfFolder::OtherFs(_))));
    }
}
