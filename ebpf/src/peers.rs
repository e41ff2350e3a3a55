//! FULLNAT at the real server: who the client is comes in a TCP option of the segment that completes the handshake (`datapath::fullnat`); it
//! is kept beside the socket, and shown to whoever asks for the peer's address: accept, getpeername. No process need know of it.

use aya_ebpf::Global;
use aya_ebpf::bindings::{bpf_sock_addr, bpf_sock_ops};
use aya_ebpf::btf_maps::{HashMap, SkStorage};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, cgroup_sock_addr, sock_ops};
use aya_ebpf::programs::{SockAddrContext, SockOpsContext};
use rvs_datapath::options::{Told, told};

/// The network namespace whose sockets these programs are for: a cgroup has those of many.
#[unsafe(no_mangle)]
static NETNS: Global<u64> = Global::new(0);

/// The directors' local addresses, as they lie in a packet: anybody else could say anything. The value is [`NETNS`], for who reads it back.
#[btf_map]
static DIRECTORS: HashMap<[u8; 16], u64, 4096> = HashMap::new();

#[btf_map]
static PEERS: SkStorage<Told> = SkStorage::new();

/// `BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB`: a connection that was accepted is there.
const PASSIVE_ESTABLISHED: u32 = 5;
const AF_INET: u32 = 2;
/// `BPF_SK_STORAGE_GET_F_CREATE`
const CREATE: u64 = 1;

#[sock_ops]
pub fn rvs_accepted(ctx: SockOpsContext) -> u32 {
    // SAFETY: the context of this program.
    if ctx.op() == PASSIVE_ESTABLISHED && unsafe { bpf_get_netns_cookie(ctx.ops.cast()) } == NETNS.load() {
        keep(ctx.ops);
    }
    1
}

#[inline(always)]
fn keep(ops: *mut bpf_sock_ops) -> Option<()> {
    // SAFETY: fields of the context.
    let (family, four, six) = unsafe {
        let o = &*ops;
        (o.family, o.remote_ip4, [o.remote_ip6[0], o.remote_ip6[1], o.remote_ip6[2], o.remote_ip6[3]])
    };
    let mapped = six[0] == 0 && six[1] == 0 && six[2] == 0xffffu32.to_be();
    let mut director = [0u8; 16];
    if family == AF_INET || mapped {
        director[..4].copy_from_slice(&(if family == AF_INET { four } else { six[3] }).to_ne_bytes());
    } else {
        let mut i = 0;
        while i < 4 {
            director[4 * i..4 * i + 4].copy_from_slice(&six[i].to_ne_bytes());
            i += 1;
        }
    }
    // SAFETY: nobody writes the value meanwhile.
    unsafe { DIRECTORS.get(&director) }?;
    let mut header = [0u8; 60];
    // SAFETY: fields of the context: the TCP header of the segment, options included, lies between them.
    let (from, end) =
        unsafe { ((*ops).__bindgen_anon_3.skb_data as usize, (*ops).__bindgen_anon_4.skb_data_end as usize) };
    let mut i = 0;
    while i < 60 {
        if from + i + 4 > end {
            break;
        }
        // SAFETY: checked against the end.
        let word = unsafe { *((from + i) as *const [u8; 4]) };
        header[i..i + 4].copy_from_slice(&word);
        i += 4;
    }
    let mut client = told(&header)?;
    // SAFETY: a field of the context.
    let socket = unsafe { (*ops).__bindgen_anon_2.sk };
    if socket.is_null() {
        return None;
    }
    // SAFETY: a socket of the context, and a value of the map's type.
    unsafe {
        bpf_sk_storage_get((&raw const PEERS).cast_mut().cast(), socket.cast(), (&raw mut client).cast(), CREATE)
    };
    Some(())
}

/// What is kept of this socket's peer.
#[inline(always)]
fn peer(ctx: &SockAddrContext) -> Option<Told> {
    // SAFETY: the context of this program; the value is the socket's own.
    unsafe {
        if bpf_get_netns_cookie(ctx.sock_addr.cast()) != NETNS.load() {
            return None;
        }
        PEERS.get_ptr_mut(ctx).as_ref().copied()
    }
}

#[cgroup_sock_addr(getpeername4)]
pub fn rvs_peer4(ctx: SockAddrContext) -> i32 {
    if let Some(client) = peer(&ctx)
        && client.v6 == 0
    {
        // SAFETY: fields of the context.
        unsafe {
            (*ctx.sock_addr).user_ip4 = client.address[0];
            (*ctx.sock_addr).user_port = u32::from(client.port);
        }
    }
    1
}

#[cgroup_sock_addr(getpeername6)]
pub fn rvs_peer6(ctx: SockAddrContext) -> i32 {
    if let Some(client) = peer(&ctx) {
        // A socket of both families shows an IPv4 address as a mapped one.
        let address = if client.v6 != 0 { client.address } else { [0, 0, 0xffffu32.to_be(), client.address[0]] };
        set6(ctx.sock_addr, address, client.port);
    }
    1
}

#[inline(always)]
fn set6(to: *mut bpf_sock_addr, address: [u32; 4], port: u16) {
    let mut i = 0;
    while i < 4 {
        // SAFETY: fields of the context; whole words, or the verifier refuses it.
        unsafe { core::ptr::write_volatile(&raw mut (*to).user_ip6[i], address[i]) };
        i += 1;
    }
    // SAFETY: as above.
    unsafe { (*to).user_port = u32::from(port) };
}
