//! The few system calls that the library has no words for.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
/// Attach types.
pub const BPF_CGROUP_SOCK_OPS: u32 = 3;
pub const BPF_CGROUP_INET4_GETPEERNAME: u32 = 29;
pub const BPF_CGROUP_INET6_GETPEERNAME: u32 = 30;
pub const BPF_XDP: u32 = 37;
pub const BPF_TCX_INGRESS: u32 = 46;
pub const BPF_TCX_EGRESS: u32 = 47;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// `union bpf_attr` of BPF_MAP_CREATE, as far as we fill it.
#[repr(C)]
#[derive(Default)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
    rest: [u32; 14],
}

fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<i32> {
    // SAFETY: `attr` is a valid, initialised attribute block of the size given; the kernel reads it only.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as i32) }
}

/// The same where the kernel writes to the block, too.
fn bpf_mut<T>(command: libc::c_int, mut attr: T) -> io::Result<T> {
    // SAFETY: `attr` is a valid, initialised attribute block of the size given.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(attr) }
}

/// An array of one value of `bytes`, which user space can map. (An object file gives value sizes only at compile time.)
pub fn create_mappable(name: &str, bytes: u32) -> io::Result<OwnedFd> {
    let mut attr = Create {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: bytes,
        max_entries: 1,
        map_flags: BPF_F_MMAPABLE,
        ..Create::default()
    };
    for (to, from) in attr.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let fd = bpf(BPF_MAP_CREATE, &attr)?;
    // SAFETY: a new file descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Pin {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(BPF_OBJ_PIN, &Pin { path: path.as_ptr() as u64, fd: fd.as_raw_fd() as u32, flags: 0 }).map(|_| ())
}

/// What is pinned at a path.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Get {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = bpf(BPF_OBJ_GET, &Get { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: a new file descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A program on an interface, as a link.
pub fn link_create(program: BorrowedFd<'_>, ifindex: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    /// `union bpf_attr` of BPF_LINK_CREATE; `rest`: relative_fd and expected_revision of tcx, none.
    #[repr(C)]
    struct Create {
        program: u32,
        ifindex: u32,
        attach_type: u32,
        flags: u32,
        rest: [u64; 2],
    }
    let attr = Create { program: program.as_raw_fd() as u32, ifindex, attach_type, flags, rest: [0; 2] };
    let fd = bpf(BPF_LINK_CREATE, &attr)?;
    // SAFETY: a new file descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Another program into a link, atomically.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        link: u32,
        program: u32,
        flags: u32,
        old: u32,
    }
    let attr = Update { link: link.as_raw_fd() as u32, program: program.as_raw_fd() as u32, flags: 0, old: 0 };
    bpf(BPF_LINK_UPDATE, &attr).map(|_| ())
}

/// The link stays, without an interface.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &(link.as_raw_fd() as u32)).map(|_| ())
}

/// `union bpf_attr` of BPF_PROG_ATTACH and BPF_PROG_DETACH.
#[repr(C)]
struct CgroupAttach {
    cgroup: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

/// A program at a cgroup, beside others; it stays until it is taken away.
pub fn cgroup_attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, attach_type: u32) -> io::Result<()> {
    let (cgroup, program) = (cgroup.as_raw_fd() as u32, program.as_raw_fd() as u32);
    let attr = CgroupAttach { cgroup, program, attach_type, flags: BPF_F_ALLOW_MULTI, replaced: 0 };
    bpf(BPF_PROG_ATTACH, &attr).map(|_| ())
}

pub fn cgroup_detach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>, attach_type: u32) -> io::Result<()> {
    let (cgroup, program) = (cgroup.as_raw_fd() as u32, program.as_raw_fd() as u32);
    bpf(BPF_PROG_DETACH, &CgroupAttach { cgroup, program, attach_type, flags: 0, replaced: 0 }).map(|_| ())
}

/// The kernel's numbers of the programs at a cgroup.
pub fn cgroup_programs(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    /// `union bpf_attr` of BPF_PROG_QUERY.
    #[repr(C)]
    struct Query {
        cgroup: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        rest: [u32; 5],
    }
    // The kernel takes 64 at most.
    let mut ids = vec![0u32; 64];
    let mut attr = Query {
        cgroup: cgroup.as_raw_fd() as u32,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        rest: [0; 5],
    };
    // SAFETY: a valid attribute block of the size given, and a buffer of the size in it; the kernel writes to both.
    let r = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut attr, size_of::<Query>()) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    ids.truncate(attr.count as usize);
    Ok(ids)
}

/// Number of this thread's network namespace that the kernel's programs see (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let (mut cookie, mut length) = (0u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: an open socket, and a buffer of the length given.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// `union bpf_attr` of BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct Run {
    program: u32,
    returned: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    rest: u32,
}
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

/// Have a frame come in by an interface of this thread's network namespace, at the XDP program given, which decides what becomes of it as if the
/// device had brought it (Linux 5.18).
pub fn inject(program: BorrowedFd<'_>, ifindex: u32, frame: &[u8]) -> io::Result<()> {
    let len = frame.len() as u32;
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, len, 0, ifindex, 0, 0u32];
    let attr = Run {
        program: program.as_raw_fd() as u32,
        size_in: len,
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        context_size_in: size_of_val(&context) as u32,
        context_in: context.as_ptr() as u64,
        flags: BPF_F_TEST_XDP_LIVE_FRAMES,
        batch_size: 1,
        ..Run::default()
    };
    bpf_mut(BPF_PROG_TEST_RUN, attr).map(drop)
}

/// Run a program once on a frame, wherever it is attached: its code, and what it made of the frame.
pub fn test_run(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<(u32, Vec<u8>)> {
    let mut out = vec![0u8; frame.len() + 256];
    let attr = Run {
        program: program.as_raw_fd() as u32,
        size_in: frame.len() as u32,
        size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        ..Run::default()
    };
    // (The kernel writes to the buffer of the size given.)
    let attr = bpf_mut(BPF_PROG_TEST_RUN, attr)?;
    out.truncate(attr.size_out as usize);
    Ok((attr.returned, out))
}

/// The kernel's numbers.
pub struct LinkInfo {
    pub id: u32,
    pub program: u32,
    /// 0: the interface is gone.
    pub ifindex: u32,
}

/// About a link of an XDP or tcx program.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    /// Words of `struct bpf_link_info`: type, id, program, a gap, and then by type, for both of these first the ifindex.
    const WORDS: usize = 16;
    #[repr(C)]
    struct Info {
        fd: u32,
        len: u32,
        at: u64,
    }
    let mut words = [0u32; WORDS];
    let attr = Info { fd: link.as_raw_fd() as u32, len: size_of_val(&words) as u32, at: words.as_mut_ptr() as u64 };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &attr)?;
    // SAFETY: memory of ours. Volatile: the kernel wrote it, by an address that is a number to the compiler.
    let [_, id, program, _, ifindex, ..] = unsafe { std::ptr::read_volatile(&raw const words) };
    Ok(LinkInfo { id, program, ifindex })
}

/// A map's one value in our memory, shared with the programs: whole words, read and written atomically.
pub struct Mapping {
    at: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: the memory is shared with other writers anyway, and is only reached through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn new(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<Mapping> {
        // SAFETY: a new mapping; no memory of ours is touched.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Mapping { at, bytes }) }
    }
    pub fn words(&self) -> &[std::sync::atomic::AtomicU64] {
        // SAFETY: page-aligned memory of this many bytes, valid while self is, reached only through atomics.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.bytes / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in new, whose borrows have ended.
        unsafe { libc::munmap(self.at, self.bytes) };
    }
}
