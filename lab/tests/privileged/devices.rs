//! What not every kernel has: VLAN devices, one in another too, a bond as the director's interface, and SCTP's own sockets. `./x test --vm` has a
//! kernel with all of them.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, Lab, NodeHandle, patient};
use socket2::{Domain, Protocol, Socket, Type};

use crate::early::there_and_back;
use crate::support::{SOON, Stop, Test, TestResult, at, check, director, http, lab_for, on_hooks, serve, test, vip};

pub fn tests() -> Vec<Test> {
    let mut tests = on_hooks("sctp_sockets", &[Hook::Xdp, Hook::Tc], sctp_sockets);
    for device in [Device::Vlan, Device::Qinq, Device::Bond] {
        for hook in [Hook::Xdp, Hook::Tc] {
            tests.push(test(&format!("director_by_{}_{hook}", device.name()), move || director_by(device, hook)));
        }
    }
    tests
}

/// What the director's way to its clients is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Device {
    Vlan,
    /// A VLAN device in a VLAN device (802.1ad).
    Qinq,
    Bond,
}

impl Device {
    fn name(self) -> &'static str {
        match self {
            Device::Vlan => "vlan",
            Device::Qinq => "qinq",
            Device::Bond => "bond",
        }
    }

    /// On this interface, which has no address; the new one's name.
    fn make(self, node: NodeHandle<'_>, interface: &str) -> TestResult<String> {
        let top = format!("{interface}-top");
        let lines = match self {
            Device::Vlan => vec![format!("link add link {interface} name {top} type vlan id 100")],
            Device::Qinq => vec![
                format!("link add link {interface} name {interface}-s type vlan proto 802.1ad id 200"),
                format!("link set {interface}-s up"),
                format!("link add link {interface}-s name {top} type vlan id 100"),
            ],
            Device::Bond => vec![
                format!("link add {top} type bond mode active-backup miimon 100"),
                format!("link set {interface} down"),
                format!("link set {interface} master {top}"),
            ],
        };
        match node.ns().ip(&[lines, vec![format!("link set {top} up")]].concat()) {
            Err(error) if error.to_string().contains("Unknown device type") => {
                Err(Stop::Skipped(format!("this kernel has no such device: {error}")))
            }
            made => made.map(|()| top).map_err(Stop::from),
        }
    }
}

/// A device on the interface, with the interface's addresses, and the node's routes by it.
fn stack(lab: &Lab, node: &str, interface: &str, device: Device) -> TestResult<String> {
    let handle = lab.node(node)?;
    let end = lab.topology().ends(node).find(|e| e.interface == interface).ok_or("no such end")?;
    handle.ns().ip(&[format!("addr flush dev {interface}")])?;
    // What makes a tag stay in the frame, where XDP sees it.
    handle.run(&["ethtool", "-K", interface, "txvlan", "off", "rxvlan", "off"])?;
    let top = device.make(handle, interface)?;
    let nodad = |v6: bool| if v6 { " nodad" } else { "" };
    let mut lines: Vec<String> =
        end.addresses.iter().map(|a| format!("addr add {a} dev {top}{}", nodad(a.addr().is_ipv6()))).collect();
    for route in handle.topology().routes.iter().filter(|r| r.from.is_none()) {
        let to = route.to.map_or_else(|| "default".to_owned(), |to| to.to_string());
        lines.push(format!("route replace {to} via {}", route.via));
    }
    handle.ns().ip(&lines)?;
    Ok(top)
}

const METHODS: [(&str, u16, &str); 4] =
    [("-m", 8080, "nat"), ("-g", 80, "dr"), ("-i", 80, "tun"), ("--fullnat", 8080, "fullnat")];

fn director_by(device: Device, hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 2, ..Options::default() })?;
    let top = stack(&lab, "director", "front", device)?;
    if device != Device::Bond {
        stack(&lab, "router", "front", device)?;
    }
    for server in lab.topology().servers() {
        let server = lab.node(&server.name)?;
        let words =
            |flag: &str, all: &[std::net::IpAddr]| all.iter().map(|a| format!(" {flag} {a}")).collect::<String>();
        server.realserver(&format!("up --mode tun{}", words("--vip", &lab.topology().vips)))?;
        server.realserver(&format!("up --mode fullnat{}", words("--director", &lab.topology().locals)))?;
    }
    // XDP takes a VLAN's frames where they come in, for the VLAN devices that are the director's interfaces, too; those have tc.
    let mut wanted = vec![("back", Some(hook))];
    match (device, hook) {
        (Device::Vlan | Device::Qinq, Hook::Xdp) => {
            wanted.extend([("front", Some(hook)), (top.as_str(), Some(Hook::Tc))]);
            if device == Device::Qinq {
                wanted.push(("front-s", Some(Hook::Tc)));
            }
        }
        _ => wanted.push((top.as_str(), Some(hook))),
    }
    let rvs = Director::start(lab.node("director")?, &wanted)?;
    for (method, port, verdict) in METHODS {
        for ipv6 in [false, true] {
            let web = vip(&lab, ipv6, 80)?;
            serve(&lab, &rvs, "-t", web, method, port)?;
            http(&lab, web, 2).map_err(|e| {
                format!(
                    "{e:?}: {}",
                    rvs.verdicts().map(|v| v.since(&Default::default()).to_string()).unwrap_or_default()
                )
            })?;
            let before = rvs.verdicts()?;
            let report = http(&lab, web, 10)?;
            let since = rvs.verdicts()?.since(&before);
            check(since.to_servers() >= 50 && since.to_servers() == since.of(verdict), || {
                format!("{method} {web}: {since}")
            })?;
            let client = at(&lab, "client", ipv6, 0)?.ip();
            check(report.clients.keys().eq([&client]), || format!("{method} {web}: {report}"))?;
            rvs.ipvsadm(&format!("-D -t {web}"))?;
            // Fragments that rvsd holds come again by the device that they came by, whatever the method: two are enough.
            if matches!((method, ipv6), ("-m", false) | ("--fullnat", true)) {
                there_and_back(&lab, &rvs, method, ipv6)?;
            }
        }
    }
    Ok(())
}

/// Associations of the kernel's own SCTP.
fn sctp_sockets(hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 1, ..Options::default() })?;
    // (Tried before anything takes time.)
    drop(sctp(lab.node("client")?, at(&lab, "client", false, 0)?)?);
    // Packets that are yet to be cut are none of ours (docs/compatibility.md).
    for node in ["client", "rs1"] {
        lab.node(node)?.run(&["ethtool", "-K", "eth0", "tx-sctp-segmentation", "off"])?;
    }
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    for ipv6 in [false, true] {
        for (method, own_port) in [("-m", 3869), ("-g", 3868)] {
            let service = vip(&lab, ipv6, 3868)?;
            let dest = at(&lab, "rs1", ipv6, own_port)?;
            rvs.ipvsadm(&format!("-A --sctp-service {service} -s rr"))?;
            rvs.ipvsadm(&format!("-a --sctp-service {service} -r {dest} {method}"))?;
            // By direct routing the server has the virtual address. Of no other may it tell its client.
            let listens = if method == "-m" { dest } else { service };
            association(&lab, &rvs, service, listens).map_err(|e| match e {
                Stop::Failed(why) => Stop::Failed(format!("{method} {service}: {why}; {:?}", rvs.verdicts())),
                skipped => skipped,
            })?;
            rvs.ipvsadm(&format!("-D --sctp-service {service}"))?;
        }
    }
    Ok(())
}

fn association(lab: &Lab, rvs: &Director<'_>, service: SocketAddr, listens: SocketAddr) -> TestResult {
    let server = sctp(lab.node("rs1")?, listens)?;
    server.listen(1)?;
    let client = sctp(lab.node("client")?, at(lab, "client", service.is_ipv6(), 0)?)?;
    client.connect_timeout(&service.into(), patient(SOON))?;
    let (server, from) = server.accept()?;
    let from = from.as_socket().ok_or("a client without an address")?;
    check(Some(from) == client.local_addr()?.as_socket(), || format!("the server sees {from}"))?;
    let rows = rvs.ipvsadm("-Lnc")?;
    let row = rows.lines().find(|l| l.starts_with("SCTP ") && l.contains(&from.to_string()));
    check(row.is_some_and(|row| row.contains(" ESTABLISHED ")), || format!("no established {from} in\n{rows}"))?;
    for length in [1, 1000, 20_000] {
        let words: Vec<u8> = (0..length).map(|n: u32| n as u8).collect();
        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
            from.write_all(&words)?;
            let mut heard = vec![0; words.len()];
            to.set_read_timeout(Some(patient(SOON)))?;
            to.read_exact(&mut heard)?;
            check(heard == words, || format!("{length} bytes did not arrive as they were sent"))?;
        }
    }
    Ok(())
}

/// A socket of SCTP there, of one association (RFC 6458 4), bound to this address alone.
fn sctp(node: NodeHandle<'_>, own: SocketAddr) -> TestResult<Socket> {
    let open = || -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(own), Type::STREAM, Some(Protocol::from(132)))?;
        socket.bind(&own.into())?;
        Ok(socket)
    };
    node.enter(open)?.map_err(|error| match error.kind() {
        ErrorKind::Unsupported => Stop::Skipped("this kernel has no SCTP".to_owned()),
        _ if error.raw_os_error() == Some(nix::libc::EPROTONOSUPPORT) => {
            Stop::Skipped("this kernel has no SCTP".to_owned())
        }
        _ => Stop::from(error),
    })
}
