//! A command in a virtual machine with another kernel: Debian 12's own, under software emulation. Its root is this machine's, read-only,
//! under a layer of memory that is gone with it; so it finds the same programs and tests at the same paths, and changes nothing here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use rvs_control::api::TIMEOUT_VARIABLE;
use rvs_control::limits::ANSWER_TIMEOUT_S;
use rvs_lab::PATIENCE;

const USAGE: &str = "\
usage: cargo xtask vm [--icount] [--cpus N] [--memory MIB] [--seconds N] -- COMMAND [ARG]...
  --icount   each instruction takes one nanosecond of the machine's time: what it measures is exact, and is instructions";

/// What the first programs need to find the root: the bus, the file system, the layer of memory over it.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// How many times longer than on a machine of metal things may take: loading programs, most of all.
const SLOWER: u32 = 10;

struct Options {
    icount: bool,
    cpus: u32,
    memory_mib: u32,
    /// Longest time from switching on to the end, real time.
    seconds: u32,
    command: Vec<String>,
}

/// Runs the command in there as root, in this folder, with its output to ours; exits as it does. The kernel's own words go to
/// `target/x/vm-console.log`.
///
/// # Errors
/// There is no such kernel yet (`./x setup vm`), QEMU fails, or the machine stops before the command has ended.
pub fn run(root: &Path, args: &[String]) -> Result<ExitCode> {
    let options = parse(args)?;
    let tools = root.join(".tools/vm");
    let kernel = Kernel::find(&tools.join("kernel"))?;
    let logs = root.join("target/x");
    let work = logs.join(format!("vm-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("make {}", work.display()))?;
    let ended = boot(&options, &kernel, &work, &logs.join("vm-console.log"));
    // Best effort: it holds nothing that anybody needs.
    let _ = fs::remove_dir_all(&work);
    ended
}

fn parse(args: &[String]) -> Result<Options> {
    let mut options = Options { icount: false, cpus: 2, memory_mib: 3072, seconds: 1800, command: Vec::new() };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut number = || -> Result<u32> {
            let value = args.next().with_context(|| format!("{arg} needs a number\n{USAGE}"))?;
            value.parse().with_context(|| format!("{arg} {value}"))
        };
        match arg.as_str() {
            "--icount" => (options.icount, options.cpus) = (true, 1),
            "--cpus" => options.cpus = number()?,
            "--memory" => options.memory_mib = number()?,
            "--seconds" => options.seconds = number()?,
            "--" => options.command = args.by_ref().cloned().collect(),
            _ => bail!("vm does not know '{arg}'\n{USAGE}"),
        }
    }
    if options.command.is_empty() {
        bail!("{USAGE}");
    }
    Ok(options)
}

/// A kernel of a package, unpacked.
struct Kernel {
    image: PathBuf,
    modules: PathBuf,
    release: String,
}

impl Kernel {
    fn find(folder: &Path) -> Result<Kernel> {
        let missing = || format!("no kernel in {}: run `./x setup vm`", folder.display());
        let names = fs::read_dir(folder.join("lib/modules")).with_context(missing)?;
        let mut releases: Vec<String> = names.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        releases.sort();
        let release = releases.pop().with_context(missing)?;
        let image = folder.join(format!("boot/vmlinuz-{release}"));
        Ok(Kernel { image, modules: folder.join("lib/modules").join(&release), release })
    }

    /// Files of these modules and those that they need, in the order in which they load.
    fn files_of(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let path = self.modules.join("modules.dep");
        let text = fs::read_to_string(&path).with_context(|| format!("read {} (made by depmod)", path.display()))?;
        let mut files: Vec<String> = Vec::new();
        for module in wanted {
            let end = format!("/{module}.ko");
            let line = text.lines().find_map(|l| l.split_once(':').filter(|(file, _)| file.ends_with(&end)));
            let (file, needs) = line.with_context(|| format!("{} has no module {module}", self.release))?;
            // The last one that it names is needed by those before it.
            for file in needs.split_whitespace().rev().chain([file]) {
                if !files.iter().any(|f| f == file) {
                    files.push(file.to_owned());
                }
            }
        }
        Ok(files)
    }
}

fn boot(options: &Options, kernel: &Kernel, work: &Path, console: &Path) -> Result<ExitCode> {
    let initramfs = work.join("initramfs");
    fs::write(&initramfs, first_root(kernel)?).with_context(|| format!("write {}", initramfs.display()))?;
    // What the machine reads and writes here.
    let shared = work.join("shared");
    fs::create_dir_all(&shared)?;
    fs::write(shared.join("command"), script(&options.command)?)?;
    let mut qemu = Command::new("timeout");
    qemu.args(["--foreground", "--kill-after=5", &options.seconds.to_string(), "qemu-system-x86_64"]);
    qemu.args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-machine", "pc", "-cpu", "max"]);
    qemu.args(["-m", &options.memory_mib.to_string(), "-smp", &options.cpus.to_string()]);
    if options.icount {
        qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi,tb-size=512"]);
    }
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&initramfs);
    // Without mitigations: their cost is the processor's, not the programs'. And without what makes emulation slow: clearing of memory that
    // is written anyway, and a fifth level of page tables.
    let words = "console=ttyS0 panic=-1 oops=panic mitigations=off init_on_alloc=0 no5lvl rvs_release=";
    qemu.args(["-append", &format!("{words}{}", kernel.release)]);
    qemu.args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"]);
    qemu.args(["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]);
    let tag = format!("local,path={},mount_tag=shared,security_model=none", shared.display());
    qemu.args(["-virtfs", &tag]);
    qemu.stdin(Stdio::null()).env("LC_ALL", "C");
    let status = qemu.status().context("run timeout and qemu-system-x86_64: ./x setup vm installs it")?;
    match fs::read_to_string(shared.join("exit")).ok().and_then(|t| t.trim().parse::<u8>().ok()) {
        Some(code) => Ok(ExitCode::from(code)),
        None => bail!("the machine stopped before the command had ended ({status}); see {}", console.display()),
    }
}

/// What the machine runs in its root: the command, in this folder, with what the environment says of ours.
fn script(command: &[String]) -> Result<String> {
    let here = std::env::current_dir().context("the current folder")?;
    let mut text = String::new();
    for (name, value) in std::env::vars() {
        if name.starts_with("RVS_") || name == "PATH" || name == "RUST_BACKTRACE" {
            text += &format!("export {name}={}\n", quoted(&value));
        }
    }
    let timeout_s = ANSWER_TIMEOUT_S * u64::from(SLOWER);
    text += &format!("export HOME=/root {PATIENCE}={SLOWER} {TIMEOUT_VARIABLE}={timeout_s}\n");
    let words: Vec<String> = command.iter().map(|w| quoted(w)).collect();
    text += "stty -F /dev/ttyS1 raw -echo\n";
    text += &format!("(cd {} && {}) >/dev/ttyS1 2>&1 </dev/null\n", quoted(&shown(&here)), words.join(" "));
    text += "echo $? >/run/vm/exit; sync; echo o >/proc/sysrq-trigger; sleep 60\n";
    Ok(text)
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// For a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The first root: a shell, the modules, and the way to the real one.
fn first_root(kernel: &Kernel) -> Result<Vec<u8>> {
    const BUSYBOX: &str = "/bin/busybox";
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "modules", "lower", "upper", "new"] {
        archive.folder(folder);
    }
    archive.file("bin/busybox", &fs::read(BUSYBOX).with_context(|| format!("read {BUSYBOX} (busybox-static)"))?);
    let mut load = String::new();
    for file in kernel.files_of(&MODULES)? {
        let name = file.rsplit('/').next().unwrap_or(&file);
        let path = kernel.modules.join(&file);
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        archive.file(&format!("modules/{name}"), &bytes);
        load += &format!("insmod /modules/{name}\n");
    }
    let init = INIT.replace("@LOAD@", &load).replace("@MODULES@", &shown(&kernel.modules));
    archive.file("init", init.as_bytes());
    Ok(archive.end())
}

const INIT: &str = include_str!("vm/init.sh");

/// A cpio archive of the kind that the kernel unpacks ("newc": Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    const FOLDER: u32 = 0o040_755;
    const FILE: u32 = 0o100_755;

    fn folder(&mut self, name: &str) {
        self.entry(name, Self::FOLDER, &[]);
    }

    fn file(&mut self, name: &str, data: &[u8]) {
        self.entry(name, Self::FILE, data);
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let (size, name_size) = (data.len() as u32, name.len() as u32 + 1);
        // Number, mode, uid, gid, links, time, size, device, its kind, name's size, checksum (unused).
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        self.bytes.extend(fields.iter().flat_map(|f| format!("{f:08x}").into_bytes()));
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn what_is_typed_is_what_the_machine_gets() {
        let options = parse(&words("--icount --memory 512 -- a --icount b")).unwrap();
        assert_eq!((options.icount, options.cpus, options.memory_mib), (true, 1, 512));
        assert_eq!(options.command, ["a", "--icount", "b"]);
        for bad in ["", "--", "a b", "--memory", "--memory x -- a"] {
            assert!(parse(&words(bad)).is_err(), "{bad}");
        }
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn an_archive_is_padded_to_words_and_ends_with_its_trailer() {
        let mut archive = Archive::default();
        archive.folder("d");
        archive.file("d/f", b"abcde");
        let bytes = archive.end();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701000000010000"));
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"));
        let file = bytes.windows(5).position(|w| w == b"abcde").unwrap();
        assert_eq!(file % 4, 0);
    }
}
