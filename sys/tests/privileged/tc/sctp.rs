//! SCTP by NAT through tc, its checksum finished or left to the device. Not every kernel has SCTP: frames are put together here, and the server has
//! a raw socket.

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rvs_control::model::{FwdMethod, Proto};
use rvs_datapath::verdict::Reason;
use rvs_fixtures::frame::{Frame, SCTP, chunk, crc32c};

use super::{FAMILIES, Lab, Net, Shape, fold, ifindex, mac, raw_socket, within};

/// `linux/if_packet.h`, `linux/virtio_net.h`.
const PACKET_VNET_HDR: i32 = 15;
const NEEDS_CSUM: u8 = 1;
const INIT: u8 = 1;
const DATA: u8 = 0;

/// Puts frames on the client's wire.
struct Wire(OwnedFd);

impl Wire {
    fn of(lab: &Lab) -> Wire {
        let index = ifindex(&lab.client, "c0");
        let wire = within(&lab.client, move || {
            // SAFETY: no memory is involved.
            let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
            assert!(fd >= 0, "a packet socket: {}", io::Error::last_os_error());
            let on = 1i32;
            // SAFETY: all zeros is an address; both structures are ours, and have these sizes.
            unsafe {
                let mut to: libc::sockaddr_ll = std::mem::zeroed();
                (to.sll_family, to.sll_ifindex) = (libc::AF_PACKET as u16, index as i32);
                let size = size_of::<libc::sockaddr_ll>() as u32;
                assert_eq!(libc::bind(fd, (&raw const to).cast(), size), 0, "{}", io::Error::last_os_error());
                let done = libc::setsockopt(fd, libc::SOL_PACKET, PACKET_VNET_HDR, (&raw const on).cast(), 4);
                assert_eq!(done, 0, "{}", io::Error::last_os_error());
                Wire(OwnedFd::from_raw_fd(fd))
            }
        });
        wire.join().expect("the client")
    }

    /// `unfinished`: where the sum begins that is left to the device, and where from there its field is.
    fn send(&self, frame: &[u8], unfinished: Option<(u16, u16)>) {
        let mut header = [0; 10];
        if let Some((start, offset)) = unfinished {
            header[0] = NEEDS_CSUM;
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        let bytes = [&header[..], frame].concat();
        // SAFETY: a buffer of ours and its size.
        let n = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(n, bytes.len() as isize, "{}", io::Error::last_os_error());
    }
}

/// The next SCTP packet that comes.
fn received(socket: &UdpSocket, net: Net) -> Vec<u8> {
    let mut buffer = vec![0; 4096];
    // SAFETY: a buffer of ours and its size.
    let n = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    assert!(n > 0, "no packet: {}", io::Error::last_os_error());
    buffer.truncate(n as usize);
    buffer.split_off(if net == Net::V4 { 20 } else { 0 })
}

pub fn checksums() {
    let mut lab = Lab::up(Shape::Gateway);
    lab.ways();
    let wire = Wire::of(&lab);
    let (to, from) = (mac(&lab.director, "lan"), mac(&lab.client, "c0"));
    for net in FAMILIES {
        let service = lab.service(Proto::Sctp, net, 80);
        lab.dest(service, (net.server(), 8080).into(), FwdMethod::Masq);
        let server = within(&lab.server, move || raw_socket(net, i32::from(SCTP))).join().expect("the server");
        let client = net.pick("172.16.0.2", "fd00:c::2");
        let transport = if net == Net::V4 { 34 } else { 54 };
        for (kind, len) in [(INIT, 16), (DATA, 0), (DATA, 13), (DATA, 1300)] {
            let frame = Frame::new(SCTP, (client, 40_000).into(), (net.vip(), 80).into()).macs(to, from);
            let frame = frame.payload(&chunk(kind, &vec![0x5a; len])).bytes();
            let mut there = frame[transport..].to_vec();
            there[2..4].copy_from_slice(&8080u16.to_be_bytes());
            there[8..12].fill(0);
            let crc = crc32c(&there);

            wire.send(&frame, None);
            let got = received(&server, net);
            assert_eq!(got[8..12], crc, "{net:?}, {len} bytes: finished by the client");
            assert_eq!(got[12..], there[12..]);

            // Nobody minds it on the way: it comes as it was left.
            let mut unfinished = frame.clone();
            unfinished[transport + 8..transport + 12].fill(0);
            wire.send(&unfinished, Some((transport as u16, 8)));
            assert_eq!(received(&server, net), there, "{net:?}, {len} bytes: unfinished");

            // The director's interface has the kernel finish it. (A packet socket can only ask for the Internet checksum, in two of the four bytes.)
            let tx = |state| {
                let done = lab.director.sh(&format!("ethtool -K back tx {state}"));
                assert!(done.status.success(), "ethtool");
            };
            tx("off");
            wire.send(&unfinished, Some((transport as u16, 8)));
            let got = received(&server, net);
            assert_eq!(fold(&got), 0xffff, "{net:?}, {len} bytes: finished on the way: {got:02x?}");
            assert_eq!((&got[..8], &got[10..]), (&there[..8], &there[10..]));
            tx("on");
        }
    }
    lab.nothing_lost();
    assert_eq!(lab.verdicts(Reason::Masq), 24);
}
