//! rvsd is killed and started again while traffic flows: nobody but the operator notices.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use rvs_lab::counters::Kernel;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, NodeHandle};

use crate::support::{Test, TestResult, check, director, equal, lab_for, on_hooks, serve, vip};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("kill_9_under_load_nat", &hooks, nat),
        on_hooks("kill_9_under_load_dr", &hooks, dr),
        on_hooks("an_interface_no_longer_named_is_left", &hooks, fewer_interfaces),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn nat(hook: Hook) -> TestResult {
    kill_9_under_load("-m", hook)
}

fn dr(hook: Hook) -> TestResult {
    kill_9_under_load("-g", hook)
}

const REQUESTS: u32 = 50_000;
/// ab says so after each tenth.
const TENTH: u32 = REQUESTS / 10;
const LOAD_TIME: Duration = Duration::from_secs(120);

fn kill_9_under_load(method: &str, hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 2, ..Options::default() })?;
    let mut rvs = director(&lab, layout.director_interfaces(), hook)?;
    let vip = vip(&lab, false, 80)?;
    serve(&lab, &rvs, "-t", vip, method, 80)?;
    crate::support::shares(&lab, vip, &[("rs1", 1), ("rs2", 1)])?;
    let (rules, listing) = (rvs.ipvsadm("-Sn")?, configured(&rvs)?);
    let links = links(rvs.node())?;
    check(links.len() >= 2, || format!("links of two interfaces: {links:?}"))?;
    let kernel = Kernel::read(&rvs.node().ns())?;

    let mut ab = Command::new("ab");
    ab.args(["-n", &REQUESTS.to_string(), "-c", "64", &format!("http://{vip}/")]);
    let ab = lab.node("client")?.spawn("ab", &mut ab)?;
    for (killed_after, started_after) in [(2, 3), (5, 6)] {
        ab.wait_line(&format!("Completed {} requests", killed_after * TENTH), LOAD_TIME)?;
        rvs.kill();
        // A tenth of all requests with no rvsd at all.
        ab.wait_line(&format!("Completed {} requests", started_after * TENTH), LOAD_TIME)?;
        same_links(&links, rvs.node())?;
        rvs.start_again()?;
        same_links(&links, rvs.node())?;
        equal("what is configured", &rvs.ipvsadm("-Sn")?, &rules)?;
    }
    let status = ab.wait(LOAD_TIME)?;
    let report = std::fs::read_to_string(ab.log())?;
    let number =
        |name: &str| report.lines().find_map(|l| l.strip_prefix(name)).and_then(|l| l.trim().parse::<u32>().ok());
    check(
        status.success() && number("Complete requests:") == Some(REQUESTS) && number("Failed requests:") == Some(0),
        || format!("ab: {status}\n{report}"),
    )?;
    equal("what is configured", &configured(&rvs)?, &listing)?;
    same_links(&links, rvs.node())?;
    let now = Kernel::read(&rvs.node().ns())?;
    check(now.forwarded == kernel.forwarded, || format!("the kernel forwarded: {kernel:?} {now:?}"))?;
    let rows = rvs.ipvsadm("-Lnc")?.lines().filter(|l| l.starts_with("TCP ")).count();
    check(rows > 1000, || format!("{rows} connections are listed after {REQUESTS}"))
}

fn fewer_interfaces(hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 1, ..Options::default() })?;
    let mut rvs = director(&lab, layout.director_interfaces(), hook)?;
    let both = links(rvs.node())?;
    check(both.len() == 2, || format!("links of two interfaces: {both:?}"))?;
    rvs.kill();
    let rvs = director(&lab, &["front"], hook)?;
    let left = links(rvs.node())?;
    let front: BTreeMap<_, _> = both.into_iter().filter(|(name, _)| name.starts_with("front")).collect();
    check(left == front, || format!("the links are {left:?}, that of front was {front:?}"))
}

/// `ipvsadm -Ln` without its two columns of connections.
fn configured(rvs: &Director<'_>) -> TestResult<String> {
    let kept = |line: &str| match line.strip_prefix("  -> ") {
        Some(dest) if !dest.starts_with("Remote") => dest.split_whitespace().take(3).collect::<Vec<_>>().join(" "),
        _ => line.to_owned(),
    };
    Ok(rvs.ipvsadm("-Ln")?.lines().map(kept).collect::<Vec<_>>().join("\n"))
}

/// The kernel's number of each pinned link: another one would mean that the program had been taken off.
fn links(node: NodeHandle<'_>) -> TestResult<BTreeMap<String, String>> {
    let mut numbers = BTreeMap::new();
    for entry in std::fs::read_dir(node.dir().join("bpf/links"))? {
        let entry = entry?;
        let shown = node.run(&["bpftool", "link", "show", "pinned", &entry.path().to_string_lossy()])?;
        let number = shown.split(':').next().unwrap_or_default().to_owned();
        numbers.insert(entry.file_name().to_string_lossy().into_owned(), number);
    }
    Ok(numbers)
}

fn same_links(before: &BTreeMap<String, String>, node: NodeHandle<'_>) -> TestResult {
    let now = links(node)?;
    check(now == *before, || format!("the links were {before:?} and are {now:?}"))
}
