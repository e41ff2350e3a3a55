//! Rules that no compiler and no clippy lint checks, so that they survive: each finding names file, line and rule.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

/// A file longer than this is two files.
const MAX_LINES: usize = 800;

/// The one file that may sleep: it waits for a condition against a deadline.
const SLEEPER: &str = "lab/src/eventually.rs";

/// Recorded data is kept as it was recorded, and licences as they were written.
const NOT_OURS: [&str; 3] = ["testdata/", "LICENSE-", "Cargo.lock"];

/// Crates that may hold unsafe code; every other crate root forbids it.
const MAY_BE_UNSAFE: [&str; 2] = ["sys/", "ebpf/"];

#[derive(Debug, PartialEq, Eq)]
struct Finding {
    line: usize,
    rule: String,
}

/// Checks every file that git knows or would add; prints the findings. Fails when there is one, or when git can't list.
pub fn run(root: &Path) -> Result<ExitCode> {
    let files = tracked_files(root)?;
    let mut checked = 0;
    let mut findings = 0;
    for file in files.iter().filter(|f| !NOT_OURS.iter().any(|n| f.contains(n))) {
        // A file that is listed but gone, or that is no text, has no lines to check.
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        checked += 1;
        for finding in check(file, &text) {
            println!("{file}:{}: {}", finding.line, finding.rule);
            findings += 1;
        }
    }
    println!("tidy: {checked} files, {findings} findings");
    Ok(if findings == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tracked_files(root: &Path) -> Result<Vec<String>> {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("cannot run git to list the files")?;
    if !listed.status.success() {
        bail!("git ls-files failed: {}", String::from_utf8_lossy(&listed.stderr).trim());
    }
    Ok(String::from_utf8(listed.stdout)?.lines().map(str::to_owned).collect())
}

fn check(file: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let source = file.ends_with(".rs") || file == "x";
    let lines = text.lines().count();
    if source && lines > MAX_LINES {
        findings.push(Finding { line: MAX_LINES + 1, rule: format!("{lines} lines, more than {MAX_LINES}: split it") });
    }
    if is_safe_crate_root(file) && !text.contains("#![forbid(unsafe_code)]") {
        findings.push(Finding { line: 1, rule: "this crate root lacks #![forbid(unsafe_code)]".to_owned() });
    }
    for (number, line) in text.lines().enumerate() {
        for rule in check_line(file, line) {
            findings.push(Finding { line: number + 1, rule });
        }
    }
    findings
}

fn is_safe_crate_root(file: &str) -> bool {
    let parts: Vec<&str> = file.split('/').collect();
    let root = matches!(parts.as_slice(), [_, "src", "lib.rs" | "main.rs"] | [_, "src", "bin", _]);
    root && !MAY_BE_UNSAFE.iter().any(|c| file.starts_with(c))
}

fn check_line(file: &str, line: &str) -> Vec<String> {
    let mut rules = Vec::new();
    if let Some(path) = machine_path(line) {
        rules.push(format!("'{path}' is a path of one machine"));
    }
    if !file.ends_with(".rs") {
        return rules;
    }
    let code = line.split("//").next().unwrap_or(line);
    if code.trim() == "#[ignore]" {
        rules.push("#[ignore] without a reason: write #[ignore = \"why\"]".to_owned());
    }
    let sleeps =
        code.contains(concat!("thread::", "sleep(")) || (in_tests(file) && code.contains(concat!("time::", "sleep(")));
    if sleeps && file != SLEEPER {
        rules.push(format!("sleeps; wait for the condition with what {SLEEPER} gives"));
    }
    rules
}

fn in_tests(file: &str) -> bool {
    file.contains("/tests/") || file.ends_with("/tests.rs")
}

/// The first path in the line that can exist only where somebody works on this project.
fn machine_path(line: &str) -> Option<&'static str> {
    const PATHS: [&str; 4] =
        [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/tm", "p/"), concat!("../sha", "red")];
    PATHS.into_iter().find(|path| line.contains(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(file: &str, text: &str) -> Vec<String> {
        check(file, text).into_iter().map(|f| format!("{}: {}", f.line, f.rule)).collect()
    }

    #[test]
    fn long_files_are_named() {
        let text = "//\n".repeat(MAX_LINES + 1);
        assert_eq!(rules("control/src/model.rs", &text), ["801: 801 lines, more than 800: split it"]);
        assert!(rules("control/src/model.rs", &"//\n".repeat(MAX_LINES)).is_empty());
        assert!(rules("docs/long.md", &text).is_empty());
    }

    #[test]
    fn crate_roots_forbid_unsafe_but_for_the_two_that_need_it() {
        assert_eq!(rules("control/src/lib.rs", "").len(), 1);
        assert_eq!(rules("cli/src/bin/rvs.rs", "").len(), 1);
        assert!(rules("sys/src/lib.rs", "").is_empty());
        assert!(rules("control/src/plan.rs", "").is_empty());
        assert!(rules("control/src/lib.rs", "#![forbid(unsafe_code)]").is_empty());
    }

    #[test]
    fn ignored_tests_say_why() {
        assert_eq!(rules("a/tests/t.rs", "x\n    #[ignore]\n").len(), 1);
        assert!(rules("a/tests/t.rs", "#[ignore = \"needs two NICs\"]").is_empty());
    }

    #[test]
    fn only_the_one_file_sleeps() {
        let call = concat!("std::thread::", "sleep(SECOND);");
        assert_eq!(rules("daemon/src/a.rs", call).len(), 1);
        assert!(rules(SLEEPER, call).is_empty());
        let timer = concat!("tokio::time::", "sleep(d).await;");
        assert!(rules("daemon/src/a.rs", timer).is_empty(), "a daemon's timer is no test's sleep");
        assert_eq!(rules("daemon/tests/a.rs", timer).len(), 1);
    }

    #[test]
    fn paths_of_one_machine_are_found_in_any_file() {
        assert_eq!(rules("README.md", concat!("see /ho", "me/me/notes")).len(), 1);
        assert!(rules("README.md", "see /run/rvs").is_empty());
    }
}
