//! A data plane of another layout is taken over by this version while connections talk, by every method, and rvsd killed at any moment of it: none breaks, and
//! services, counters and settings stay. What can't be taken over is refused, and goes on.

use std::thread;
use std::time::Duration;

use rvs_lab::director::program;
use rvs_lab::layouts::{Layout, Options};
use rvs_lab::{Director, Hook, eventually};
use serde_json::Value;

use crate::support::{Test, TestResult, check, equal, lab_for, on_hooks, vip};
use crate::talking::{FLOWS, LONG, METHODS, begin, counters, left_over, tables, while_talking_by};

/// rvsd as an older version: other entries, other rows beside them, other counters of real servers, another configuration.
const OLD: &str = "rvsd-other-layout";

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("upgraded_under_way", &hooks, upgraded),
        on_hooks("upgraded_and_killed", &hooks, killed),
        on_hooks("upgraded_to_what_can_not_read_it", &[Hook::Xdp], refused),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The words for `rvs upgrade` to a program.
fn to(name: &str) -> TestResult<String> {
    Ok(format!("--rvsd {}", program(name)?.display()))
}

/// What `rvs upgrade` would come to.
fn plan(rvs: &Director<'_>, words: &str) -> TestResult<Value> {
    Ok(serde_json::from_str(&rvs.rvs(&format!("upgrade --check --json {words}"))?)?)
}

/// What stays.
fn state(rvs: &Director<'_>) -> TestResult<String> {
    Ok([rvs.ipvsadm("-Sn")?, rvs.ipvsadm("-L --timeout")?, rvs.rvs("set")?].concat())
}

/// Connections that each service has begun.
fn begun(rvs: &Director<'_>) -> TestResult<String> {
    let listing = rvs.ipvsadm("-Ln --stats --exact")?;
    let service = |line: &str| {
        let mut words = line.split_whitespace();
        let (proto, name, conns) = (words.next()?, words.next()?, words.next()?);
        (proto == "TCP").then(|| format!("{name} {conns}\n"))
    };
    Ok(listing.lines().filter_map(service).collect())
}

fn upgraded(hook: Hook) -> TestResult {
    while_talking_by(OLD, hook, |rvs| {
        rvs.ipvsadm("--set 1000 130 310")?;
        rvs.rvs("set sloppy_tcp 1")?;
        let (before, conns, words) = (state(rvs)?, begun(rvs)?, to("rvsd")?);
        let plan = plan(rvs, &words)?;
        let flows = (METHODS.len() * FLOWS) as u64;
        let planned = [0, 1].map(|i| plan["flows"][i].as_u64().unwrap_or(0));
        check(planned == [flows; 2] && plan["from"] != plan["to"], || format!("{plan}"))?;
        check(tables(rvs)?.get("moving").is_none(), || "a look has begun it".into())?;
        let upgrade = begin(rvs, &format!("upgrade {words}"))?;
        let end = format!("{} is at work; all connections are in its tables", program("rvsd")?.display());
        println!("{hook}: {}", upgrade.wait_line(&end, LONG)?);
        rvs.becomes("rvsd");
        equal("services, timeouts and settings", &state(rvs)?, &before)?;
        equal("connections so far", &begun(rvs)?, &conns)?;
        counters(rvs)?;
        left_over(rvs)?;
        // It is a data plane as any other.
        rvs.kill();
        rvs.start_again()?;
        equal("services, timeouts and settings", &state(rvs)?, &before)?;
        let said = rvs.rvs("upgrade --check")?;
        check(said.contains("as it is, nothing is moved"), || said.clone())?;
        begin(rvs, "conntable resize 65536")?.wait(LONG)?;
        Ok(())
    })
}

fn killed(hook: Hook) -> TestResult {
    // Before the new maps are there, and so long after.
    for pause in [None, Some(0), Some(150), Some(600)] {
        while_talking_by(OLD, hook, |rvs| {
            let (before, client) = (state(rvs)?, begin(rvs, &format!("upgrade {}", to("rvsd")?))?);
            let new = rvs.pins().join("next/CONFIG");
            if pause.is_some() {
                eventually("the new maps", LONG, || if new.exists() { Ok(()) } else { Err(String::new()) })?;
            }
            // (It is not known where that is: that is the point.)
            thread::park_timeout(Duration::from_millis(pause.unwrap_or(300)));
            rvs.kill();
            drop(client);
            let under_way = new.exists();
            rvs.becomes("rvsd");
            rvs.start_again()?;
            eventually("the move to end", LONG, || {
                let now = tables(rvs).map_err(|e| format!("{e:?}"))?;
                if now.get("moving").is_none() { Ok(()) } else { Err(now.to_string()) }
            })?;
            println!("{hook}, killed after {pause:?} ms, {}under way", if under_way { "" } else { "not " });
            equal("services, timeouts and settings", &state(rvs)?, &before)?;
            counters(rvs)?;
            left_over(rvs)
        })?;
    }
    Ok(())
}

/// The other layout's rvsd has no reader of ours.
fn refused(hook: Hook) -> TestResult {
    let layout = Layout::TwoArmed;
    let lab = lab_for(hook, layout, Options { servers: 1, ..Options::default() })?;
    let interfaces: Vec<_> = layout.director_interfaces().iter().map(|&name| (name, Some(hook))).collect();
    let mut rvs = Director::start_with(lab.node("director")?, &interfaces, &[])?;
    let target = vip(&lab, false, 80)?;
    rvs.ipvsadm(&format!("-A -t {target} -s rr"))?;
    let before = state(&rvs)?;
    let why = "can't take connections over from";
    for line in [format!("upgrade --check {}", to(OLD)?), format!("upgrade {}", to(OLD)?)] {
        let said = rvs.rvs(&line).err().map(|e| e.to_string()).unwrap_or_default();
        check(said.contains(why) && said.contains("rvsd --anew"), || format!("{line} said {said:?}"))?;
    }
    let said = rvs.rvs("upgrade --rvsd /bin/false").err().map(|e| e.to_string()).unwrap_or_default();
    check(said.contains("and no word"), || format!("/bin/false: {said:?}"))?;
    equal("after a refusal", &state(&rvs)?, &before)?;
    rvs.kill();
    rvs.becomes(OLD);
    let said = rvs.start_again().err().map(|e| e.to_string()).unwrap_or_default();
    check(said.contains(why), || format!("a start said {said:?}"))?;
    rvs.becomes("rvsd");
    rvs.start_again()?;
    equal("after a start that was refused", &state(&rvs)?, &before)?;
    rvs.kill();
    drop(rvs);
    let anew = Director::start_as(OLD, lab.node("director")?, &interfaces, &["--anew"])?;
    let listed = anew.ipvsadm("-Sn")?;
    check(listed.is_empty(), || format!("begun anew, it has {listed:?}"))
}
