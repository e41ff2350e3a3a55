//! The real server's end of tunnels: a program at an interface's tc ingress, and the virtual addresses that it takes out of tunnels for.
//! The filter stays by itself: nothing is pinned, and no process need go on.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

use aya::maps::{HashMap, Map, MapData, MapInfo};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType};
use aya::programs::{ProgramInfo, SchedClassifier, loaded_programs};
use aya::{Ebpf, EbpfLoader};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rvs_control::realserver::Decap;

use super::attach::{HANDLE, PRIORITY};
use super::{BpfError, REALSERVER_OBJECT, Result, failed, raw};

const PROGRAM: &str = "rvs_decap";
/// It tells clients of a smaller MSS.
const CLAMP: &str = "rvs_clamp";
const VIPS: &str = "VIPS";

/// What is on an interface.
pub(super) fn get(interface: &str) -> Result<Option<Decap>> {
    let Some(program) = attached(interface)? else { return Ok(None) };
    let mut decap = read(&program)?;
    // Without the other program it is only written down.
    if decap.mss.is_some() && filter(interface, &EGRESS).map_err(failed(what(interface)))?.is_none() {
        decap.mss = None;
    }
    Ok(Some(decap))
}

/// Does a test packet for this address come out of its tunnel there?
pub(super) fn prove(interface: &str, vip: IpAddr) -> Result<bool> {
    let Some(program) = attached(interface)? else { return Ok(false) };
    let fd = program.fd().map_err(failed(format!("program {PROGRAM}")))?;
    let (wrapped, bare) = test_packet(vip);
    let (code, out) = raw::test_run(fd.as_fd(), &wrapped).map_err(failed(format!("program {PROGRAM}, test packet")))?;
    // Goes on as the inner packet.
    Ok(code as i32 == TC_ACT_UNSPEC && out == bare)
}

/// Put the programs there, in the place of older ones, or (`None`) take them away.
pub(super) fn set(interface: &str, decap: Option<&Decap>) -> Result<()> {
    let Some(decap) = decap else {
        detach(interface, &EGRESS)?;
        return detach(interface, &INGRESS);
    };
    let mut ebpf = loaded(decap)?;
    match decap.mss {
        Some(_) => attach(program(&mut ebpf, CLAMP)?, interface, &EGRESS)?,
        None => detach(interface, &EGRESS)?,
    }
    attach(program(&mut ebpf, PROGRAM)?, interface, &INGRESS)
}

/// A side of an interface.
struct Side {
    hook: TcAttachType,
    /// Of its filters, within clsact.
    parent: u16,
    /// Ours there.
    program: &'static str,
}
const INGRESS: Side = Side { hook: TcAttachType::Ingress, parent: 0xfff2, program: PROGRAM };
const EGRESS: Side = Side { hook: TcAttachType::Egress, parent: 0xfff3, program: CLAMP };

fn what(interface: &str) -> String {
    format!("the programs for tunnels on {interface}")
}

/// Take our filter away, if there is one.
fn detach(interface: &str, side: &Side) -> Result<()> {
    if filter(interface, side).map_err(failed(what(interface)))?.is_some() {
        // Dropped, the link takes the filter away.
        drop(
            SchedClassifierLink::attached(interface, side.hook, PRIORITY, HANDLE, None)
                .map_err(failed(what(interface)))?,
        );
    }
    Ok(())
}

fn attach(program: &mut SchedClassifier, interface: &str, side: &Side) -> Result<()> {
    let id = if filter(interface, side).map_err(failed(what(interface)))?.is_some() {
        let there = SchedClassifierLink::attached(interface, side.hook, PRIORITY, HANDLE, None);
        program.attach_to_link(there.map_err(failed(what(interface)))?)
    } else {
        // It is there already, if another put it there; what counts is whether the filter goes in.
        let _ = tc::qdisc_add_clsact(interface);
        let options = TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, classid: None });
        program.attach_with_options(interface, side.hook, options)
    };
    let link = program.take_link(id.map_err(failed(what(interface)))?).map_err(failed(what(interface)))?;
    // Dropped, it would take the filter away; it owns nothing else.
    std::mem::forget(link);
    Ok(())
}

/// `TC_ACT_UNSPEC`: on to whoever comes next.
const TC_ACT_UNSPEC: i32 = -1;

/// Our program on an interface.
fn attached(interface: &str) -> Result<Option<ProgramInfo>> {
    let what = || format!("ask for the tc filters of {interface}");
    let Some(id) = filter(interface, &INGRESS).map_err(failed(what()))? else { return Ok(None) };
    Ok(loaded_programs().filter_map(std::result::Result::ok).find(|p| p.id() == id))
}

/// A packet for the address in an IPIP tunnel of IPv4, and the same without.
fn test_packet(vip: IpAddr) -> (Vec<u8>, Vec<u8>) {
    let mut inner = vec![0; 20];
    let (protocol, ethertype) = match vip {
        IpAddr::V4(vip) => {
            let client = [192, 0, 2, 1];
            let header = [[0x45, 0, 0, 40], [0, 0, 0x40, 0], [64, 6, 0, 0], client, vip.octets()].concat();
            inner.splice(0..0, header);
            (4, [0x08, 0x00])
        }
        IpAddr::V6(vip) => {
            let client = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
            inner.splice(0..0, [&[0x60, 0, 0, 0, 0, 20, 6, 64][..], &client, &vip.octets()].concat());
            (41, [0x86, 0xdd])
        }
    };
    let len = ((20 + inner.len()) as u16).to_be_bytes();
    let outer =
        [[0x45, 0, len[0], len[1]], [0, 0, 0x40, 0], [64, protocol, 0, 0], [192, 0, 2, 2], [192, 0, 2, 3]].concat();
    let macs = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    ([&macs[..], &[0x08, 0x00], &outer, &inner].concat(), [&macs[..], &ethertype, &inner].concat())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).ok_or_else(|| BpfError::Refused(format!("the object has no {name}")))?;
    program.try_into().map_err(failed(format!("program {name}")))
}

fn loaded(decap: &Decap) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    loader.override_global("GUE_PORT", &decap.gue_port, true);
    let mss = decap.mss.unwrap_or(0);
    loader.override_global("MSS", &mss, true);
    let mut ebpf = loader.load(REALSERVER_OBJECT).map_err(failed("load the program for tunnels"))?;
    for name in [PROGRAM, CLAMP] {
        program(&mut ebpf, name)?.load().map_err(failed(format!("program {name}")))?;
    }
    let map = ebpf.map_mut(VIPS).ok_or_else(|| BpfError::Refused(format!("the object has no map {VIPS}")))?;
    let mut vips: HashMap<_, [u8; 16], [u16; 2]> = HashMap::try_from(map).map_err(failed(format!("map {VIPS}")))?;
    for vip in &decap.vips {
        // The values are for who reads them back; the programs have them as constants.
        vips.insert(rvs_control::plan::bytes(*vip), [decap.gue_port, mss], 0)
            .map_err(failed(format!("map {VIPS}, insert")))?;
    }
    Ok(ebpf)
}

fn read(program: &ProgramInfo) -> Result<Decap> {
    let mut decap = Decap { vips: BTreeSet::new(), gue_port: 0, mss: None };
    for id in program.map_ids().map_err(failed(format!("program {PROGRAM}")))?.unwrap_or_default() {
        let info = MapInfo::from_id(id).map_err(failed(format!("map {id}")))?;
        if info.name_as_str() != Some(VIPS) {
            continue;
        }
        let data = MapData::from_id(id).map_err(failed(format!("map {VIPS}")))?;
        let vips: HashMap<_, [u8; 16], [u16; 2]> =
            HashMap::try_from(Map::HashMap(data)).map_err(failed(format!("map {VIPS}")))?;
        for entry in vips.iter() {
            let (address, [port, mss]) = entry.map_err(failed(format!("map {VIPS}, list")))?;
            (decap.gue_port, decap.mss) = (port, Some(mss).filter(|mss| *mss != 0));
            decap.vips.insert(super::address(address));
        }
    }
    Ok(decap)
}

/// The kernel's number of our program on a side of an interface.
fn filter(interface: &str, side: &Side) -> io::Result<Option<u32>> {
    let ifindex = match super::attach::ifindex_of(interface) {
        0 => return Err(io::ErrorKind::NotFound.into()),
        ifindex => ifindex,
    };
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle { major: 0xffff, minor: side.parent };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let payload = NetlinkPayload::from(RouteNetlinkMessage::GetTrafficFilter(message));
    let mut request = NetlinkMessage::new(header, payload);
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut found = None;
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut at = 0;
        while at < received.len() {
            let reply =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(&received[at..]).map_err(io::Error::other)?;
            match reply.payload {
                NetlinkPayload::Done(_) => return Ok(found),
                // No such qdisc: no filter.
                NetlinkPayload::Error(error) if error.code.is_some() => return Ok(None),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(m)) => {
                    found = found.or_else(|| ours(&m, side.program));
                }
                _ => {}
            }
            let length = reply.header.length as usize;
            if length == 0 {
                return Ok(found);
            }
            at += length.next_multiple_of(4);
        }
    }
}

fn ours(message: &TcMessage, name: &str) -> Option<u32> {
    let options = message.attributes.iter().filter_map(|a| match a {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let bpf: Vec<&TcFilterBpfOption> = options
        .flatten()
        .filter_map(|o| match o {
            TcOption::Bpf(option) => Some(option),
            _ => None,
        })
        .collect();
    let named = bpf.iter().any(|o| matches!(o, TcFilterBpfOption::ProgName(of) if of.starts_with(name)));
    let id = bpf.iter().find_map(|o| if let TcFilterBpfOption::ProgId(id) = o { Some(*id) } else { None });
    id.filter(|_| named)
}
