//! One of two directors that are set up alike: a namespace with two interfaces, the clients' wire and the servers' wire, and the commands that
//! drive it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rvs_fixtures::frame::{Frame, Mac, UDP};
use rvs_fixtures::replay::is_none_of_ours;
use rvs_fixtures::world::{BACK_MAC, BOTH, CLIENT_MAC, LAN_MAC, Net, SERVERS, server_mac};
use rvs_lab::netns::Output;
use rvs_lab::{Director, End, Hook, Lab, Link, Node, NodeHandle, Topology, eventually};
use rvs_sys::wire::Wire;

/// For a frame to come through.
const SOON: Duration = Duration::from_secs(10);
/// For a frame to come through that nothing else is done beside.
const LOOKS: u32 = 100_000;
/// For a command.
const COMMAND_TIME: Duration = Duration::from_secs(60);

const FRONT: &str = "front";
const BACK: &str = "back";

/// The network of `rvs_fixtures::world`, its hosts played by whoever has the wires.
pub fn topology() -> Topology {
    let settings = |all: &[(&str, &str)]| all.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let director = Node {
        name: "director".to_owned(),
        sysctls: settings(&[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            // Each error is to be seen.
            ("net/ipv4/icmp_ratelimit", "0"),
            ("net/ipv6/icmp/ratelimit", "0"),
        ]),
        ..Node::default()
    };
    let quiet = settings(&[("net/ipv6/conf/all/disable_ipv6", "1"), ("net/ipv6/conf/default/disable_ipv6", "1")]);
    let outside = Node { name: "outside".to_owned(), sysctls: quiet, ..Node::default() };
    let link = |interface: &str, addresses: &[String]| {
        let addresses = addresses.iter().filter_map(|a| a.parse().ok()).collect();
        // What the kernel leaves to a device to finish would be seen unfinished at a veth's other end.
        let finished = [("tx".to_owned(), false)].into();
        let (node, interface_of) = (director.name.clone(), interface.to_owned());
        let own = End { node, interface: interface_of, addresses, offload: finished, ..End::default() };
        // XDP sends only to a veth whose other end has NAPI, which comes with GRO.
        let offload = [("gro".to_owned(), true)].into();
        let far = End { node: outside.name.clone(), interface: interface.to_owned(), offload, ..End::default() };
        Link { ends: [own, far] }
    };
    let own = |text: &str| text.to_owned();
    let vips = BOTH.map(|net| net.vip(0).ip());
    let front = [own("172.16.0.1/24"), own("fd00:c::1/64"), format!("{}/32", vips[0]), format!("{}/128", vips[1])];
    let links = vec![link(FRONT, &front), link(BACK, &[own("10.0.0.1/24"), own("fd00:5::1/64")])];
    Topology {
        name: "beside".to_owned(),
        vips: vips.to_vec(),
        nodes: vec![director, outside],
        links,
        ..Topology::default()
    }
}

/// Who balances.
pub enum Who {
    /// The kernel, with this `ipvsadm`.
    Kernel(PathBuf),
    Rvs(Hook),
}

/// What a director sent: towards clients, and towards servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub front: Vec<Vec<u8>>,
    pub back: Vec<Vec<u8>>,
}

impl Sent {
    pub fn count(&self) -> usize {
        self.front.len() + self.back.len()
    }
}

pub struct Side<'a> {
    node: NodeHandle<'a>,
    tool: Option<PathBuf>,
    rvs: Option<Director<'a>>,
    front: Wire,
    back: Wire,
    markers: u32,
}

impl<'a> Side<'a> {
    pub fn start(lab: &'a Lab, who: Who) -> Result<Side<'a>> {
        let node = lab.node("director")?;
        node.ns().ip(&neighbours())?;
        let wire = |name: &str| -> Result<Wire> {
            let number = lab.node("outside")?.run(&["ip", "-o", "link", "show", "dev", name])?;
            let number = number.split(':').next().and_then(|n| n.trim().parse().ok());
            let number = number.with_context(|| format!("{name} has no number"))?;
            Ok(lab.node("outside")?.enter(|| Wire::open(number))??)
        };
        let (front, back) = (wire(FRONT)?, wire(BACK)?);
        let (tool, rvs) = match who {
            Who::Kernel(tool) => (Some(tool), None),
            Who::Rvs(hook) => (None, Some(Director::start(node, &[(FRONT, Some(hook)), (BACK, Some(hook))])?)),
        };
        Ok(Side { node, tool, rvs, front, back, markers: 0 })
    }

    pub fn node(&self) -> NodeHandle<'a> {
        self.node
    }

    /// `ipvsadm` with the words of a line, and this standard input.
    pub fn ipvsadm(&self, line: &str, stdin: &str) -> Result<Output> {
        match (&self.tool, &self.rvs) {
            (Some(tool), _) => {
                let mut command = Command::new(tool);
                command.args(line.split_whitespace());
                Ok(self.node.ns().output(&mut command, stdin, COMMAND_TIME)?)
            }
            (None, Some(rvs)) => Ok(rvs.ipvsadm_output(line, stdin)?),
            (None, None) => bail!("a side without a tool"),
        }
    }

    pub fn set(&self, name: &str, value: u32) -> Result<()> {
        match &self.rvs {
            Some(rvs) => rvs.rvs(&format!("set {name} {value}")).map(drop)?,
            None => self.node.ns().sysctl(&format!("net/ipv4/vs/{name}"), &value.to_string())?,
        }
        Ok(())
    }

    /// What RVS counted, by name; nothing of the kernel.
    pub fn verdicts(&self) -> String {
        let verdicts = self.rvs.as_ref().and_then(|rvs| rvs.verdicts().ok());
        verdicts.map(|v| v.since(&Default::default()).to_string()).unwrap_or_default()
    }

    /// A frame on the clients' wire, or on the servers', and all that the director sent for it.
    pub fn carry(&mut self, frame: &[u8], from_client: bool) -> Result<Sent> {
        let wire = if from_client { &self.front } else { &self.back };
        wire.send(frame).context("a frame on the wire")?;
        let mut sent = Sent::default();
        // Twice: what goes another way than the marker has gone by then.
        for _ in 0..2 {
            self.settle(&mut sent)?;
        }
        Ok(sent)
    }

    /// Puts frames on the clients' wire, one after the other and again from the first, so many in all; each when the one before has come out on
    /// the servers' wire.
    pub fn through(&self, frames: &[Vec<u8>], count: u32) -> Result<()> {
        for frame in frames.iter().cycle().take(count as usize) {
            self.front.send(frame).context("a frame on the wire")?;
            let mut looks = 0;
            while self.back.receive()?.is_none_or(|frame| frame[0] & 1 != 0) {
                looks += 1;
                if looks == LOOKS {
                    bail!("a frame has not come through; RVS counted {}", self.verdicts());
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Waits until packets that nobody balances have gone through, both ways: those before them have, then.
    pub fn settle(&mut self, sent: &mut Sent) -> Result<()> {
        self.markers += 1;
        let (net, text) = (Net::V4, format!("marker {:08}", self.markers));
        let (client, server) = (net.client(9), net.server(14, 9));
        let of = |from, to| Frame::new(UDP, from, to).payload(text.as_bytes());
        self.front.send(&of(client, server).macs(LAN_MAC, CLIENT_MAC).bytes())?;
        wait(&self.back, &text, &mut sent.back)?;
        self.back.send(&of(server, client).macs(BACK_MAC, server_mac(14)).bytes())?;
        wait(&self.front, &text, &mut sent.front)
    }
}

/// Frames that came before the marker, those that are compared.
fn wait(wire: &Wire, marker: &str, seen: &mut Vec<Vec<u8>>) -> Result<()> {
    eventually(&format!("the packet '{marker}'"), SOON, || {
        while let Some(frame) = wire.receive().map_err(|e| e.to_string())? {
            if frame.ends_with(marker.as_bytes()) {
                return Ok(());
            }
            let old = frame.windows(7).any(|w| w == b"marker ") && frame.len() < 64;
            if !old && !is_none_of_ours(&frame) && frame[0] & 1 == 0 {
                seen.push(frame);
            }
        }
        Err("it has not come".to_owned())
    })?;
    Ok(())
}

fn neighbours() -> Vec<String> {
    let mac = |m: Mac| m.map(|b| format!("{b:02x}")).join(":");
    let mut lines = vec![
        format!("link set {FRONT} address {}", mac(LAN_MAC)),
        format!("link set {BACK} address {}", mac(BACK_MAC)),
    ];
    let known = |address, to, dev: &str| format!("neigh replace {address} lladdr {} dev {dev} nud permanent", mac(to));
    for net in BOTH {
        lines.extend(net.clients().map(|client| known(client, CLIENT_MAC, FRONT)));
        lines.extend(SERVERS.map(|number| known(net.server(number, 0).ip(), server_mac(number), BACK)));
    }
    lines
}

/// The stock `ipvsadm` that `./x setup vm` has put there.
pub fn stock(root: &Path) -> Result<PathBuf> {
    let path = root.join(".tools/vm/ipvsadm/sbin/ipvsadm");
    if !path.is_file() {
        bail!("no {}: run `./x setup vm`", path.display());
    }
    Ok(path)
}
