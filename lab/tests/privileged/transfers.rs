//! Big files through the director, both ways: no byte lost, doubled or changed.

use std::net::TcpStream;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Hook, Lab, load, service};

use crate::support::{Test, TestResult, check, director, http, lab, serve, test, vip};

pub fn tests() -> Vec<Test> {
    // After XDP nobody finishes a checksum that an endpoint left to its device, or cuts a segment: there, none is left.
    let cases = [
        ("transfers_xdp", Hook::Xdp, false),
        ("transfers_skb", Hook::Skb, false),
        ("transfers_tc", Hook::Tc, false),
        ("transfers_tc_with_offloads", Hook::Tc, true),
    ];
    let tunnels = [
        ("tunnels_xdp", Hook::Xdp, false),
        ("tunnels_skb", Hook::Skb, false),
        ("tunnels_tc", Hook::Tc, false),
        ("tunnels_tc_with_offloads", Hook::Tc, true),
    ];
    let cases = cases.map(|(name, hook, offload)| test(name, move || transfers(hook, offload)));
    let tunnels = tunnels.map(|(name, hook, offload)| test(name, move || through_tunnels(hook, offload)));
    let narrow = [("a_narrow_path_xdp", Hook::Xdp), ("a_narrow_path_tc", Hook::Tc)];
    let narrow = narrow.map(|(name, hook)| test(name, move || narrow_path(hook)));
    let told = [test("clients_are_told_of_an_mss_that_goes_through_tunnels", told_an_mss)];
    cases.into_iter().chain(tunnels).chain(narrow).chain(told).collect()
}

const TRANSFER_TIME: Duration = Duration::from_secs(30);

fn transfers(hook: Hook, offload: bool) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab(&layout.topology(&Options { servers: 2, offload, ..Options::default() }))?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    for (method, port) in [("-m", 8080), ("-m", 80), ("-g", 80), ("--fullnat", 8080)] {
        for ipv6 in [false, true] {
            let vip = vip(&lab, ipv6, 80)?;
            serve(&lab, &rvs, "-t", vip, method, port)?;
            // The first packets to each real server make its MAC address known.
            http(&lab, vip, 2)?;
            let before = rvs.verdicts()?;
            for turn in 0..2 {
                there_and_back(&lab, vip, &format!("{method}-{port}-{ipv6}-{turn}"))
                    .map_err(|why| format!("{method} to {port}, {vip}: {why:?}"))?;
            }
            let since = rvs.verdicts()?.since(&before);
            let verdict = match method {
                "-m" => "nat",
                "-g" => "dr",
                _ => "fullnat",
            };
            // 4 MB each way in frames of 1500 bytes; one frame may carry 64 KiB where segmentation is left to the device.
            let least = if offload { 4 * 1024 * 1024 / 65536 } else { 4 * 1024 * 1024 / 1500 };
            check(since.of(verdict) > least, || format!("{method}: the data plane forwarded {since}"))?;
            rvs.ipvsadm(&format!("-D -t {vip}"))?;
        }
    }
    Ok(())
}

/// A link to the client that takes smaller packets than the rest: its router tells the virtual address, and the real server, which is meant,
/// has to hear of it.
fn narrow_path(hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab(&layout.topology(&Options { servers: 1, offload: false, ..Options::default() }))?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    lab.node("router")?.run(&["ip", "link", "set", "client", "mtu", "1400"])?;
    for (method, port) in [("-m", 8080), ("-g", 80), ("--fullnat", 8080)] {
        for ipv6 in [false, true] {
            let vip = vip(&lab, ipv6, 80)?;
            serve(&lab, &rvs, "-t", vip, method, port)?;
            // What the server has learnt by the method before.
            lab.node("rs1")?.run(&["ip", if ipv6 { "-6" } else { "-4" }, "route", "flush", "cache"])?;
            let before = rvs.verdicts()?;
            let name = format!("narrow-{method}-{ipv6}");
            // What the server has learnt about one local address says nothing of the other, so that it advertises full frames there; and
            // the router's veth loses what is too large for it without a word.
            let done = if method == "--fullnat" { there(&lab, vip) } else { there_and_back(&lab, vip, &name) };
            done.map_err(|why| format!("{method}, {vip}: {why:?}"))?;
            let since = rvs.verdicts()?.since(&before);
            check(since.of("icmp_error_in") > 0, || format!("{method}, {vip}: no error was passed on: {since}"))?;
            rvs.ipvsadm(&format!("-D -t {vip}"))?;
        }
    }
    Ok(())
}

/// By each kind of tunnel, real servers of either family: full frames don't fit, so that the client has to be told of a smaller MTU.
fn through_tunnels(hook: Hook, offload: bool) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab(&layout.topology(&Options { servers: 2, offload, ..Options::default() }))?;
    let rvs = director(&lab, layout.director_interfaces(), hook)?;
    let (vip4, vip6) = (vip(&lab, false, 80)?, vip(&lab, true, 80)?);
    for server in ["rs1", "rs2"] {
        let up = format!("up --mode tun --interface eth0 --vip {} --vip {}", vip4.ip(), vip6.ip());
        let said = lab.node(server)?.realserver(&up)?;
        check(said.contains("ready for tunnels"), || said)?;
    }
    for kind in ["", "--tun-type gre", "--tun-type gre --tun-csum", "--tun-type gue --tun-port 6080 --tun-csum"] {
        for (vip, to) in [(vip4, false), (vip6, true), (vip4, true), (vip6, false)] {
            rvs.ipvsadm(&format!("-A -t {vip} -s rr"))?;
            for server in ["rs1", "rs2"] {
                let target = crate::support::at(&lab, server, to, 80)?;
                rvs.ipvsadm(&format!("-a -t {vip} -r {target} -i {kind} -w 1"))?;
            }
            let name = format!("{}-{vip}-{to}", kind.replace(' ', ""));
            let before = rvs.verdicts()?;
            http(&lab, vip, 2).map_err(|why| format!("{name}: {why:?}"))?;
            there_and_back(&lab, vip, &name).map_err(|why| format!("{name}: {why:?}"))?;
            let since = rvs.verdicts()?.since(&before);
            let least = if offload { 2 * 1024 * 1024 / 65536 } else { 2 * 1024 * 1024 / 1500 };
            check(since.of("tun") > least, || format!("{name}: the data plane forwarded {since}"))?;
            rvs.ipvsadm(&format!("-D -t {vip}"))?;
        }
    }
    Ok(())
}

/// A download.
fn there(lab: &Lab, vip: std::net::SocketAddr) -> TestResult {
    let body = load::http_get(lab.node("client")?, vip, "/payload", TRANSFER_TIME)?;
    check(lab.topology().servers().any(|s| body == service::payload(&s.name)), || {
        format!("the download of {} bytes is no server's file", body.len())
    })
}

/// One download and one upload; the two servers take turns.
pub fn there_and_back(lab: &Lab, vip: std::net::SocketAddr, name: &str) -> TestResult {
    there(lab, vip)?;
    let client = lab.node("client")?;
    let servers: Vec<&str> = lab.topology().servers().map(|n| n.name.as_str()).collect();
    let sent = service::payload(name);
    load::http_put(client, vip, &format!("/upload/{name}"), &sent, TRANSFER_TIME)?;
    let kept = |server: &str| Ok::<_, rvs_lab::Error>(lab.node(server)?.dir().join("web/upload").join(name));
    for server in servers {
        if let Ok(bytes) = std::fs::read(kept(server)?) {
            return check(bytes == sent, || format!("the upload of {} bytes differs", bytes.len()));
        }
    }
    Err("no server has the upload".into())
}

/// What real servers tell their clients to send at most, asked for and taken back.
fn told_an_mss() -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab(&layout.topology(&Options { servers: 1, ..Options::default() }))?;
    let rvs = director(&lab, layout.director_interfaces(), Hook::Xdp)?;
    let vips = [vip(&lab, false, 80)?, vip(&lab, true, 80)?];
    for vip in vips {
        serve(&lab, &rvs, "-t", vip, "-i", 80)?;
    }
    // Of 1500 bytes without and with the largest outer headers (52 bytes), less those inside; a segment has 12 bytes of timestamps too.
    let (bare, room) = ([1448, 1428], [1396, 1376]);
    for (mss, due) in [("off", bare), ("auto", room), ("1000", [988, 968]), ("off", bare)] {
        let up = format!("up --mode tun --mss {mss} --interface eth0 --vip {} --vip {}", vips[0].ip(), vips[1].ip());
        lab.node("rs1")?.realserver(&up)?;
        for (vip, due) in vips.into_iter().zip(due) {
            let told = lab.node("client")?.enter(|| -> TestResult<u32> {
                let stream = TcpStream::connect_timeout(&vip, TRANSFER_TIME)?;
                Ok(getsockopt(&stream, sockopt::TcpMaxSeg)?)
            })??;
            check(told == due, || format!("--mss {mss}, {vip}: segments of {told} bytes, not {due}"))?;
        }
        let wrong = lab.node("rs1")?.realserver(&up.replacen("up", "check", 1))?;
        check(wrong.contains("ready for tunnels"), || wrong)?;
    }
    lab.node("rs1")?.realserver("down")?;
    let left = lab.node("rs1")?.run(&["tc", "filter", "show", "dev", "eth0", "egress"])?;
    check(left.is_empty(), || left)
}
