//! What must not be: garbage on the control socket, starts that can't work, ends that should leave something or nothing.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rvs_lab::director::program;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::netns::Output;
use rvs_lab::{Director, Hook, Lab, NodeHandle};

use crate::support::{SOON, Stop, Test, TestResult, check, director, equal, http, lab_for, said, serve, test, vip};

pub fn tests() -> Vec<Test> {
    vec![
        test("garbage_on_the_control_socket_is_answered_and_left", garbage),
        test("a_stalled_client_holds_up_nobody", stalled_client),
        test("rvsd_needs_root", needs_root),
        test("rvsd_names_a_missing_interface_and_leaves_nothing", missing_interface),
        test("a_second_rvsd_is_refused", second_rvsd),
        test("pins_of_another_version_are_refused", pins_of_another_version),
        test("a_bpffs_is_mounted_where_none_is", mounts_bpffs),
        test("sigterm_leaves_forwarding", sigterm),
        test("teardown_leaves_nothing", teardown),
    ]
}

const LAYOUT: Layout = Layout::TwoArmed;

fn lab() -> TestResult<Lab> {
    lab_for(Hook::Xdp, LAYOUT, Options { servers: 1, ..Options::default() })
}

fn start(lab: &Lab) -> TestResult<Director<'_>> {
    director(lab, LAYOUT.director_interfaces(), Hook::Xdp)
}

fn connect(rvs: &Director<'_>) -> TestResult<UnixStream> {
    let stream = UnixStream::connect(rvs.socket())?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

fn garbage() -> TestResult {
    let lab = lab()?;
    let rvs = start(&lab)?;
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, "-m", 80)?;
    let rules = rvs.ipvsadm("-Sn")?;
    // Half a request, kept open all the while.
    let mut half = connect(&rvs)?;
    half.write_all(br#"{"version":1,"id":1,"body":{"comm"#)?;
    let long = [b'x'; 64 * 1024];
    let deep = "[".repeat(10_000) + "\n";
    let wrong: [&[u8]; 7] = [
        b"hello\n",
        b"\n",
        b"{}\n",
        b"\xff\xfe\x00\x01\n",
        br#"{"version":1,"id":7,"body":"launch"}
"#,
        &long,
        deep.as_bytes(),
    ];
    for bytes in wrong {
        let mut stream = connect(&rvs)?;
        // Refused in the middle of it, most likely: then the rest can't be sent.
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        let heard = BufReader::new(&stream).read_line(&mut answer);
        check(heard.is_ok() && answer.contains("refused"), || {
            format!(
                "{:?} was answered by {answer:?}, {heard:?}",
                String::from_utf8_lossy(&bytes[..bytes.len().min(40)])
            )
        })?;
        equal("what is configured", &rvs.ipvsadm("-Sn")?, &rules)?;
    }
    // Cut off: forgotten.
    drop(half);
    equal("what is configured", &rvs.ipvsadm("-Sn")?, &rules)?;
    http(&lab, vip, 10).map(drop)
}

fn stalled_client() -> TestResult {
    let lab = lab()?;
    let rvs = start(&lab)?;
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, "-m", 80)?;
    http(&lab, vip, 500)?;
    // Each asks for more than the socket holds, and reads nothing.
    let version = 1;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let mut stream = connect(&rvs)?;
        for id in 0..40 {
            writeln!(stream, r#"{{"version":{version},"id":{id},"body":"connections"}}"#)?;
        }
        stalled.push(stream);
    }
    for n in 0..20 {
        rvs.ipvsadm(&format!("-A -t {}:{} -s rr", vip.ip(), 1000 + n))?;
        let rows = rvs.ipvsadm("-Lnc")?.lines().count();
        check(rows >= 500, || format!("{rows} lines of connections"))?;
    }
    // One of them reads at last, and gets all it asked for.
    let mut first = stalled.swap_remove(0);
    first.shutdown(std::net::Shutdown::Write)?;
    let mut text = String::new();
    first.read_to_string(&mut text)?;
    let ends = text.lines().filter(|l| l.contains(r#""last":true"#)).count();
    check(ends == 40, || {
        format!("{ends} whole answers of 40, in {} bytes: {}", text.len(), &text[..text.len().min(300)])
    })
}

/// Runs rvsd to its end, which must come soon.
fn run_rvsd(node: NodeHandle<'_>, options: &[&str]) -> TestResult<Output> {
    let mut command = Command::new(program("rvsd")?);
    command.arg("--socket").arg(node.dir().join("other.sock")).args(options);
    Ok(node.ns().output(&mut command, "", Duration::from_secs(30))?)
}

/// It ended with exit code 1, and its last line is this reason.
fn ended_with(output: &Output, reason: &str) -> TestResult {
    let last = output.stderr.lines().last().unwrap_or_default();
    check(output.status.code() == Some(1) && last.starts_with("rvsd: ") && last.contains(reason), || {
        format!("rvsd should have ended with '{reason}': {}\n{}", output.status, said(output))
    })
}

fn needs_root() -> TestResult {
    let lab = lab()?;
    let node = lab.node("director")?;
    let rvsd = program("rvsd")?.to_string_lossy().into_owned();
    let nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let run = |words: &[&str]| node.output(&[&nobody[..], words].concat(), "", SOON);
    if !run(&["test", "-x", &rvsd])?.status.success() {
        return Err(Stop::Skipped(format!("users other than root can't run {rvsd}")));
    }
    ended_with(&run(&[&rvsd])?, "must be run as root")
}

fn missing_interface() -> TestResult {
    let lab = lab()?;
    let node = lab.node("director")?;
    let pins = node.dir().join("bpf");
    let shown = pins.to_string_lossy();
    let output = run_rvsd(node, &["--pin", &shown, "--interface", "front=xdp", "--interface", "nothing"])?;
    ended_with(&output, "no interface nothing; there are:")?;
    check(output.stderr.contains("front") && output.stderr.contains("back"), || output.stderr.clone())?;
    nothing_left(node, &pins)?;
    // One that is there, but can't be had as wanted.
    let output = run_rvsd(node, &["--pin", &shown, "--interface", "front=xdp", "--interface", "lo=xdp"])?;
    ended_with(&output, "lo")?;
    nothing_left(node, &pins)
}

/// No pins, no programs on interfaces.
fn nothing_left(node: NodeHandle<'_>, pins: &Path) -> TestResult {
    let mut left = Vec::new();
    for folder in [pins.to_owned(), pins.join("links"), pins.join("filters")] {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        // What bpffs itself shows, and folders.
        let own = |e: &std::fs::DirEntry| {
            e.file_type().is_ok_and(|t| t.is_dir()) || e.file_name().to_string_lossy().ends_with(".debug")
        };
        left.extend(entries.filter(|e| !own(e)).map(|e| e.path()));
    }
    check(left.is_empty(), || format!("pins are left: {left:?}"))?;
    let links = node.run(&["ip", "-details", "link", "show"])?;
    check(!links.contains("prog/xdp"), || format!("a program is left:\n{links}"))?;
    let net = node.run(&["bpftool", "net", "show"])?;
    check(!net.contains("rvs_"), || format!("a program is left:\n{net}"))
}

fn second_rvsd() -> TestResult {
    let lab = lab()?;
    let rvs = start(&lab)?;
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, "-m", 80)?;
    let pins = rvs.pins();
    let output = run_rvsd(rvs.node(), &["--pin", &pins.to_string_lossy(), "--interface", "front=xdp"])?;
    ended_with(&output, "another rvsd holds")?;
    http(&lab, vip, 10)?;
    // The socket is one daemon's too.
    rvs.node().run(&["ip", "link", "add", "spare", "up", "type", "veth", "peer", "name", "spare-end"])?;
    let elsewhere = rvs.node().dir().join("bpf2");
    let mut command = Command::new(program("rvsd")?);
    command.arg("--socket").arg(rvs.socket()).arg("--pin").arg(&elsewhere).args(["--interface", "spare=skb"]);
    let output = rvs.node().ns().output(&mut command, "", Duration::from_secs(30))?;
    ended_with(&output, "another rvsd is listening there")?;
    http(&lab, vip, 10).map(drop)
}

fn pins_of_another_version() -> TestResult {
    let lab = lab()?;
    let node = lab.node("director")?;
    for (folder, size) in [("bpf-small", "8"), ("bpf-large", "4096")] {
        let pins = node.dir().join(folder);
        let shown = pins.to_string_lossy();
        std::fs::create_dir_all(&pins)?;
        node.run(&["mount", "-t", "bpf", "bpf", &shown])?;
        let config = pins.join("CONFIG");
        let words =
            format!("bpftool map create {} type array key 4 value {size} entries 1 name CONFIG", config.display());
        node.run(&words.split(' ').collect::<Vec<_>>())?;
        let output = run_rvsd(node, &["--pin", &shown, "--interface", "front=xdp"])?;
        ended_with(&output, "another version of rvsd")?;
        check(config.exists(), || "the other version's pins were taken away".to_owned())?;
        std::fs::remove_file(&config)?;
        nothing_left(node, &pins)?;
    }
    Ok(())
}

fn mounts_bpffs() -> TestResult {
    let lab = lab()?;
    let node = lab.node("director")?;
    let mounted = |pins: &Path| -> TestResult<bool> {
        let mounts = std::fs::read_to_string("/proc/self/mounts")?;
        Ok(mounts.lines().any(|l| l.split(' ').nth(1) == Some(&pins.to_string_lossy()) && l.contains(" bpf ")))
    };
    let pins = node.dir().join("bpf");
    check(!mounted(&pins)?, || "a bpffs is there already".to_owned())?;
    let rvs = start(&lab)?;
    check(mounted(&pins)? && rvs.pins().join("CONFIG").exists(), || format!("no bpffs on {}", pins.display()))
}

fn sigterm() -> TestResult {
    let lab = lab()?;
    let mut rvs = start(&lab)?;
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, "-m", 8080)?;
    http(&lab, vip, 2)?;
    let rules = rvs.ipvsadm("-Sn")?;
    rvs.stop()?;
    check(!rvs.socket().exists(), || "the control socket is left".to_owned())?;
    let output = rvs.ipvsadm_output("-Ln", "")?;
    check(output.status.code() == Some(2) && output.stderr.contains("is the service rvsd running?"), || said(&output))?;
    http(&lab, vip, 100)?;
    rvs.start_again()?;
    equal("what is configured", &rvs.ipvsadm("-Sn")?, &rules)?;
    http(&lab, vip, 10).map(drop)
}

fn teardown() -> TestResult {
    let lab = lab()?;
    let node = lab.node("director")?;
    let wanted: Vec<_> = LAYOUT.director_interfaces().iter().map(|&name| (name, Some(Hook::Xdp))).collect();
    let mut rvs = Director::start_with(node, &wanted, &["--teardown"])?;
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, "-m", 8080)?;
    http(&lab, vip, 10)?;
    rvs.stop()?;
    nothing_left(node, &rvs.pins())?;
    // And again from nothing.
    rvs.start_again()?;
    equal("what is configured", &rvs.ipvsadm("-Sn")?, "")
}
