//! Programs on interfaces. What is attached is pinned beside the maps, and stays when the process that attached it is gone; the next
//! one puts its programs into the links that it finds, without an instant in which none is there.
//!
//! `links/<interface>-<hook>` is a bpf_link. Before Linux 6.6 tc programs have no links: a filter at the clsact qdisc then, with a
//! handle of our own, and `filters/<interface>-<hook>` is its program.

use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{Program, ProgramInfo, SchedClassifier, TcAttachType};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use super::raw::{self, LinkInfo};
use super::{BpfError, Dataplane, Result, failed};

/// Where a program sits on an interface.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Hook {
    /// In the driver, before there is an skb.
    XdpNative,
    /// XDP on skbs: any driver, but with unfinished checksums of local senders lost.
    XdpGeneric,
    /// tc ingress.
    Tc,
    /// tc egress, beside any of the others: replies of real servers that are this host itself (NAT).
    TcOut,
}

const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

impl Hook {
    pub const ALL: [Hook; 4] = [Hook::XdpNative, Hook::XdpGeneric, Hook::Tc, Hook::TcOut];

    /// As in `--interface eth0=xdp|skb|tc`, and in the names of pins.
    pub fn name(self) -> &'static str {
        match self {
            Hook::XdpNative => "xdp",
            Hook::XdpGeneric => "skb",
            Hook::Tc => "tc",
            Hook::TcOut => "tc_out",
        }
    }
    /// The program that goes there.
    pub fn program(self) -> &'static str {
        match self {
            Hook::XdpNative | Hook::XdpGeneric => "rvs_xdp",
            Hook::Tc => "rvs_tc_in",
            Hook::TcOut => "rvs_tc_out",
        }
    }
    /// The kernel's attach type and the flags of BPF_LINK_CREATE.
    fn kernel(self) -> (u32, u32) {
        match self {
            Hook::XdpNative => (raw::BPF_XDP, XDP_FLAGS_DRV_MODE),
            Hook::XdpGeneric => (raw::BPF_XDP, XDP_FLAGS_SKB_MODE),
            Hook::Tc => (raw::BPF_TCX_INGRESS, 0),
            Hook::TcOut => (raw::BPF_TCX_EGRESS, 0),
        }
    }
    /// What tc calls its direction; `None` for XDP.
    fn direction(self) -> Option<TcAttachType> {
        match self {
            Hook::XdpNative | Hook::XdpGeneric => None,
            Hook::Tc => Some(TcAttachType::Ingress),
            Hook::TcOut => Some(TcAttachType::Egress),
        }
    }
    /// Both for packets that come in: an interface has one of them.
    fn rivals(self, other: Hook) -> bool {
        self != other && self != Hook::TcOut && other != Hook::TcOut
    }
    /// What an operator can do when the kernel says no; empty if the error says it all.
    fn advice(self, error: &io::Error) -> &'static str {
        match (error.raw_os_error(), self) {
            (Some(libc::EOPNOTSUPP), Hook::XdpNative) => ": its driver has no native XDP: use tc",
            (Some(libc::EBUSY | libc::EEXIST), Hook::XdpNative | Hook::XdpGeneric) => {
                ": another XDP program is there: take it off (ip link set dev ... xdp off), or use tc"
            }
            (Some(libc::ERANGE | libc::EINVAL), Hook::XdpNative) => {
                ": its driver refuses XDP as it is set up (MTU, receive offloads or queues: see dmesg): use tc"
            }
            (Some(libc::EPERM), _) => ": CAP_NET_ADMIN and CAP_BPF are needed",
            _ => "",
        }
    }
}

impl std::str::FromStr for Hook {
    type Err = BpfError;
    fn from_str(text: &str) -> Result<Hook> {
        let known = Hook::ALL.into_iter().find(|h| h.name() == text && *h != Hook::TcOut);
        known.ok_or_else(|| BpfError::Refused(format!("{text:?} is not a way to attach: xdp, skb or tc")))
    }
}

/// An interface: its name, which names the pin, and its number, which counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port<'a> {
    pub name: &'a str,
    pub ifindex: u32,
}

/// A program in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Name that the interface had when the program was attached.
    pub name: String,
    pub hook: Hook,
    /// 0: the interface is gone.
    pub ifindex: u32,
    /// The kernel's number of the link; 0 for a filter.
    pub link: u32,
    /// ... of the program.
    pub program: u32,
}

/// What [`Dataplane::attach`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    New,
    /// A link was there: it has this object's program now.
    Replaced,
}

impl Dataplane {
    /// Put the hook's program on an interface of this thread's network namespace, or into what is pinned for it. Another program of
    /// ours for packets that come in is taken off: after that if the two can be there together, before it if not (native and generic
    /// XDP).
    ///
    /// # Errors
    /// The program doesn't load; or the kernel refuses, with the interface, the reason and what can be done. What was attached
    /// before still is.
    pub fn attach(&mut self, port: Port<'_>, hook: Hook) -> Result<Done> {
        let fd = self.program(hook.program())?;
        let all = list(&self.dir)?;
        let rivals: Vec<&Attached> = all.iter().filter(|a| a.ifindex == port.ifindex && a.hook.rivals(hook)).collect();
        let exclusive = |a: &&&Attached| a.hook.kernel().0 == hook.kernel().0;
        for a in rivals.iter().filter(exclusive) {
            detach(&self.dir, &a.name, a.hook)?;
        }
        let ours = all.iter().find(|a| a.hook == hook && a.link != 0 && a.ifindex == port.ifindex);
        let done = match ours {
            Some(a) => self.replace(a, port, fd.as_fd()),
            None => self.create(port, hook, fd.as_fd()),
        };
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                // Back to what was there, with the program of today; if even that fails, the first error says why.
                for a in rivals.iter().filter(exclusive) {
                    let _ = self.create(port, a.hook, fd.as_fd());
                }
                return Err(error);
            }
        };
        for a in rivals.iter().filter(|a| !exclusive(a)) {
            detach(&self.dir, &a.name, a.hook)?;
        }
        Ok(done)
    }

    /// A new program into a link, and the link's pin under the interface's name of today.
    fn replace(&mut self, a: &Attached, port: Port<'_>, program: BorrowedFd<'_>) -> Result<Done> {
        let path = link_pin(&self.dir, &a.name, a.hook);
        let at = || format!("replace {} on {}", a.hook.program(), port.name);
        let link = raw::get(&path).map_err(failed(at()))?;
        raw::link_update(link.as_fd(), program).map_err(failed(at()))?;
        if a.name != port.name {
            std::fs::rename(&path, link_pin(&self.dir, port.name, a.hook)).map_err(failed(at()))?;
        }
        Ok(Done::Replaced)
    }

    fn create(&mut self, port: Port<'_>, hook: Hook, program: BorrowedFd<'_>) -> Result<Done> {
        let (kind, flags) = hook.kernel();
        let link = match raw::link_create(program, port.ifindex, kind, flags) {
            Ok(link) => link,
            // Before 6.6 no such attach type is known.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && hook.direction().is_some() => {
                return self.filter(port, hook);
            }
            Err(error) => return Err(refused(port, hook, error)),
        };
        let path = link_pin(&self.dir, port.name, hook);
        make_folder(&path)?;
        // Left by an interface of that name which is gone, or has another name now (and then is attached to anew).
        let _ = std::fs::remove_file(&path);
        raw::pin(link.as_fd(), &path).map_err(failed(format!("pin {}", path.display())))?;
        Ok(Done::New)
    }

    /// A filter at the clsact qdisc, in the place of ours if there is one.
    ///
    /// # Errors
    /// As for [`Self::attach`].
    pub fn filter(&mut self, port: Port<'_>, hook: Hook) -> Result<Done> {
        let Some(direction) = hook.direction() else {
            return Err(BpfError::Refused(format!("{} is no tc hook", hook.name())));
        };
        let at = || format!("attach {} to {} as a tc filter", hook.program(), port.name);
        // It is there already, if another put it there; what counts is whether the filter goes in.
        let _ = tc::qdisc_add_clsact(port.name);
        let path = filter_pin(&self.dir, port.name, hook);
        make_folder(&path)?;
        let (known, renamed) = (path.exists(), self.gone(hook)?);
        let program = self.tc(hook.program())?;
        let there =
            SchedClassifierLink::attached(port.name, direction, PRIORITY, HANDLE, None).map_err(failed(at()))?;
        // (One that the interface had under another name, too.)
        let replaced = program.attach_to_link(there).ok();
        let (id, done) = match replaced {
            Some(id) => (id, Done::Replaced),
            None => {
                let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
                let options = TcAttachOptions::Netlink(options);
                (program.attach_with_options(port.name, direction, options).map_err(failed(at()))?, Done::New)
            }
        };
        // Dropped, it would take the filter away; it owns nothing else.
        std::mem::forget(program.take_link(id).map_err(failed(at()))?);
        let _ = std::fs::remove_file(&path);
        program.pin(&path).map_err(failed(format!("pin {}", path.display())))?;
        if let (Done::Replaced, false, Some(before)) = (done, known, renamed) {
            std::fs::remove_file(&before).map_err(failed(format!("remove {}", before.display())))?;
        }
        Ok(done)
    }

    /// The pin of a filter of this hook whose interface has another name now, or is gone. (Of several such, any: they are filters of one program.)
    fn gone(&self, hook: Hook) -> Result<Option<PathBuf>> {
        let all = pins(&self.dir.join("filters"))?;
        Ok(all.into_iter().find(|(_, name, at)| *at == hook && ifindex_of(name) == 0).map(|(path, _, _)| path))
    }

    /// A tc program by name, loaded if it was not.
    ///
    /// # Errors
    /// There is none of that name, or it doesn't load.
    pub fn tc(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        self.program(name)?;
        match self.ebpf.program_mut(name) {
            Some(Program::SchedClassifier(program)) => Ok(program),
            _ => Err(BpfError::Refused(format!("the object's {name} is no tc program"))),
        }
    }
}

/// Place of our filters among those of a qdisc.
pub(super) const PRIORITY: u16 = 0x5256;
pub(super) const HANDLE: TcHandle = TcHandle::new(0, 0x5256);

fn refused(port: Port<'_>, hook: Hook, source: io::Error) -> BpfError {
    let what = format!("attach to {} as {}{}", port.name, hook.name(), hook.advice(&source));
    BpfError::Failed { what, source: Box::new(source) }
}

pub(super) fn make_folder(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).map_err(failed(format!("folder {}", folder.display())))
}

/// bpffs takes no dots in names, and interfaces (`eth0.100`) no colons.
fn pin_name(interface: &str, hook: Hook) -> String {
    format!("{}-{}", interface.replace('.', ":"), hook.name())
}
fn of_pin_name(name: &str) -> Option<(String, Hook)> {
    let (interface, hook) = name.rsplit_once('-')?;
    let hook = Hook::ALL.into_iter().find(|h| h.name() == hook)?;
    Some((interface.replace(':', "."), hook))
}
fn link_pin(dir: &Path, interface: &str, hook: Hook) -> PathBuf {
    dir.join("links").join(pin_name(interface, hook))
}
fn filter_pin(dir: &Path, interface: &str, hook: Hook) -> PathBuf {
    dir.join("filters").join(pin_name(interface, hook))
}

/// What is attached, by what is pinned in `dir`: by name and hook.
///
/// # Errors
/// The folder, or a pin in it, can't be read.
pub fn list(dir: &Path) -> Result<Vec<Attached>> {
    let mut all = Vec::new();
    for (path, name, hook) in pins(&dir.join("links"))? {
        let at = || format!("link {}", path.display());
        let link = raw::get(&path).map_err(failed(at()))?;
        let LinkInfo { id, program, ifindex } = raw::link_info(link.as_fd()).map_err(failed(at()))?;
        all.push(Attached { name, hook, ifindex, link: id, program });
    }
    for (path, name, hook) in pins(&dir.join("filters"))? {
        let program = ProgramInfo::from_pin(&path).map_err(failed(format!("filter {}", path.display())))?;
        all.push(Attached { ifindex: ifindex_of(&name), name, hook, link: 0, program: program.id() });
    }
    all.sort_by(|a, b| (&a.name, a.hook).cmp(&(&b.name, b.hook)));
    Ok(all)
}

fn pins(folder: &Path) -> Result<Vec<(PathBuf, String, Hook)>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(format!("folder {}", folder.display()))(error)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed(format!("folder {}", folder.display())))?;
        if let Some((name, hook)) = entry.file_name().to_str().and_then(of_pin_name) {
            all.push((entry.path(), name, hook));
        }
    }
    Ok(all)
}

/// The program pinned at `pin` into the place that another one has there.
///
/// # Errors
/// The kernel refuses, or a pin is gone.
pub(super) fn put_back(dir: &Path, a: &Attached, pin: &Path) -> Result<()> {
    let at = || format!("put the old {} back on {}", a.hook.program(), a.name);
    if a.link != 0 {
        let program = ProgramInfo::from_pin(pin).and_then(|info| info.fd()).map_err(failed(at()))?;
        let link = raw::get(&link_pin(dir, &a.name, a.hook)).map_err(failed(at()))?;
        return raw::link_update(link.as_fd(), program.as_fd()).map_err(failed(at()));
    }
    let Some(direction) = a.hook.direction() else { return Ok(()) };
    let mut program = SchedClassifier::from_pin(pin).map_err(failed(at()))?;
    let there = SchedClassifierLink::attached(&a.name, direction, PRIORITY, HANDLE, None).map_err(failed(at()))?;
    let id = program.attach_to_link(there).map_err(failed(at()))?;
    // Dropped, it would take the filter away.
    std::mem::forget(program.take_link(id).map_err(failed(at()))?);
    let path = filter_pin(dir, &a.name, a.hook);
    let _ = std::fs::remove_file(&path);
    program.pin(&path).map_err(failed(format!("pin {}", path.display())))
}

/// Take a program off, and its pin away. False: none was there.
///
/// # Errors
/// The kernel refuses, or the pin can't be removed.
pub fn detach(dir: &Path, interface: &str, hook: Hook) -> Result<bool> {
    let at = || format!("detach {} from {interface}", hook.program());
    let gone = |path: &Path| std::fs::remove_file(path).map_err(failed(at()));
    let (link, filter) = (link_pin(dir, interface, hook), filter_pin(dir, interface, hook));
    let mut found = false;
    if link.exists() {
        let fd = raw::get(&link).map_err(failed(at()))?;
        // At once; without it the kernel detaches some time after the last reference. It fails only where the interface is gone.
        let _ = raw::link_detach(fd.as_fd());
        gone(&link)?;
        found = true;
    }
    if let (true, Some(direction)) = (filter.exists(), hook.direction()) {
        if ifindex_of(interface) != 0 {
            let link = SchedClassifierLink::attached(interface, direction, PRIORITY, HANDLE, None);
            // Dropped, it takes the filter away; there may be none, if somebody removed the qdisc.
            drop(link.map_err(failed(at()))?);
        }
        gone(&filter)?;
        found = true;
    }
    Ok(found)
}

/// 0: no such interface.
pub(super) fn ifindex_of(name: &str) -> u32 {
    let Ok(name) = CString::new(name) else { return 0 };
    // SAFETY: a string that ends with 0.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_named_for_interface_and_hook() {
        for (interface, name) in [("eth0", "eth0-xdp"), ("eth0.100", "eth0:100-xdp"), ("a-b-skb", "a-b-skb-xdp")] {
            assert_eq!(pin_name(interface, Hook::XdpNative), name);
            assert_eq!(of_pin_name(name), Some((interface.into(), Hook::XdpNative)));
        }
        assert_eq!(of_pin_name("eth0-tc_out"), Some(("eth0".into(), Hook::TcOut)));
        assert!(of_pin_name("eth0").is_none() && of_pin_name("eth0-").is_none());
    }

    #[test]
    fn hooks_are_typed_as_they_are_named() {
        for hook in [Hook::XdpNative, Hook::XdpGeneric, Hook::Tc] {
            assert_eq!(hook.name().parse::<Hook>().expect("a hook"), hook);
        }
        assert!("tc_out".parse::<Hook>().is_err() && "".parse::<Hook>().is_err());
    }
}
