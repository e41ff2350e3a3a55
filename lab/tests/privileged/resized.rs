//! Tables of another size while connections talk, by every method, and rvsd killed at any moment of it: none breaks, and the counters are right.

use std::thread;
use std::time::Duration;

use rvs_lab::{Hook, eventually};

use crate::support::{Test, TestResult, check, on_hooks};
use crate::talking::{LONG, begin, counters, left_over, places, tables, while_talking};

pub fn tests() -> Vec<Test> {
    let hooks = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("resized_under_way", &hooks, resized),
        on_hooks("resized_and_killed", &hooks, killed),
        on_hooks("what_a_table_can_not_be", &[Hook::Xdp], refused),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn resized(hook: Hook) -> TestResult {
    while_talking(hook, |rvs| {
        for (line, should_be) in [
            ("conntable resize 65536", [131_072, 49_152]),
            ("conntable resize 8192 --ipv6 6144", [16_384, 12_288]),
            ("conntable resize --ipv6 100000", [16_384, 393_216]),
            ("conntable resize 16384 --ipv6 6144", [32_768, 12_288]),
        ] {
            // (A second, mostly for the kernel to look through the programs; a busy machine takes its time.)
            begin(rvs, line)?.wait(LONG)?;
            let now = tables(rvs)?;
            check(places(&now) == should_be && now.get("moving").is_none(), || format!("{line}: {now}"))?;
            counters(rvs)?;
            println!("{line}:\n{}", rvs.rvs("conntable show")?);
        }
        left_over(rvs)
    })
}

/// At different moments of it.
fn killed(hook: Hook) -> TestResult {
    while_talking(hook, |rvs| {
        let mut small = false;
        for pause in [0, 30, 200, 500, 900, 1300, 1700, 2500] {
            small = !small;
            let (flows, places4) = if small { (8192, 16_384) } else { (65_536, 131_072) };
            let client = begin(rvs, &format!("conntable resize {flows}"))?;
            // (It is not known where that is: that is the point.)
            thread::park_timeout(Duration::from_millis(pause));
            rvs.kill();
            let _ = client.wait(LONG);
            rvs.start_again()?;
            eventually("the move to end", LONG, || {
                let now = tables(rvs).map_err(|e| format!("{e:?}"))?;
                if now.get("moving").is_none() { Ok(()) } else { Err(now.to_string()) }
            })?;
            let now = places(&tables(rvs)?);
            println!("{hook}, killed after {pause} ms: {now:?}");
            counters(rvs)?;
            left_over(rvs)?;
            if now[0] != places4 {
                begin(rvs, &format!("conntable resize {flows}"))?.wait(LONG)?;
            }
        }
        Ok(())
    })
}

fn refused(hook: Hook) -> TestResult {
    while_talking(hook, |rvs| {
        let before = places(&tables(rvs)?);
        for (line, why) in [
            ("conntable resize", "how many connections"),
            ("conntable resize 4000000000", "too large"),
            ("conntable resize 8388608 --ipv6 99999999", "too large"),
        ] {
            let said = rvs.rvs(line).err().map(|e| e.to_string()).unwrap_or_default();
            check(said.contains(why), || format!("{line} said {said:?}"))?;
        }
        let now = places(&tables(rvs)?);
        check(now == before, || format!("{before:?} before, {now:?}"))
    })
}
