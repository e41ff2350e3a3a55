//! The real binaries and the shell scripts, over a real unix socket.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rvs_cli::backend::{BackendError, Client, SocketBackend};
use rvs_control::api::{self, LineDecoder};
use rvs_control::capability::Capabilities;

use crate::world::World;

/// A folder of its own, gone afterwards, with a server on a socket in it.
struct Director {
    folder: PathBuf,
    world: Arc<Mutex<World>>,
}

impl Director {
    fn start(name: &str, capabilities: Capabilities) -> Self {
        let folder = std::env::temp_dir().join(format!("rvs-cli-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let world = Arc::new(Mutex::new(World::new(capabilities)));
        let listener = UnixListener::bind(folder.join("sock")).unwrap();
        let served = Arc::clone(&world);
        // Ends with the process: nothing waits for it.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), &served);
            }
        });
        Director { folder, world }
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("sock")
    }

    /// Runs a shell line with our commands in front of the path.
    fn shell(&self, line: &str) -> Output {
        let built = Path::new(env!("CARGO_BIN_EXE_ipvsadm")).parent().unwrap();
        let packaging = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging");
        Command::new("sh")
            .args(["-c", line])
            .current_dir(&self.folder)
            .env("PATH", format!("{}:{packaging}:{}", built.display(), std::env::var("PATH").unwrap()))
            .env(api::SOCKET_VARIABLE, self.socket())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn stdout(&self, line: &str) -> String {
        let output = self.shell(line);
        assert!(output.status.success(), "{line}: {output:?}");
        assert!(output.stderr.is_empty(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Director {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn serve(mut stream: UnixStream, world: &Mutex<World>) {
    let mut decoder = LineDecoder::for_requests();
    let mut chunk = [0; 4096];
    loop {
        let n = stream.read(&mut chunk).unwrap();
        if n == 0 {
            return;
        }
        decoder.feed(&chunk[..n]).unwrap();
        while let Some(line) = decoder.next_line() {
            let request = api::decode_request(&line).unwrap();
            let mut out = Vec::new();
            for response in world.lock().unwrap().answer(&request) {
                api::encode(&response, &mut out).unwrap();
            }
            if stream.write_all(&out).is_err() {
                return;
            }
        }
    }
}

/// Everything here runs `ipvsadm`, which takes nothing from anyone but root.
fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

const RULES: &str = "-A -t 192.0.2.1:80 -s wrr\n\
    -a -t 192.0.2.1:80 -r 10.0.0.11:80 -m -w 1\n\
    -a -t 192.0.2.1:80 -r 10.0.0.12:80 -m -w 2\n\
    -A -f 4294967295 -s rr\n";

#[test]
fn save_and_restore_scripts() {
    if !is_root() {
        return;
    }
    let director = Director::start("save", Capabilities::all());
    std::fs::write(director.folder.join("rules"), format!("# saved on Monday\n\n{RULES}")).unwrap();
    director.stdout("ipvsadm -A -u 192.0.2.9:53");
    assert_eq!(director.stdout("ipvsadm-restore < rules"), "");
    let mut sorted: Vec<String> = director.stdout("ipvsadm-save -n").lines().map(str::to_owned).collect();
    let mut expected: Vec<String> = RULES.lines().map(str::to_owned).collect();
    sorted.sort();
    expected.sort();
    assert_eq!(sorted, expected, "the old service is gone, the rules are there");
    director.stdout("ipvsadm-save -n > a && ipvsadm-save -n | ipvsadm-restore && ipvsadm-save -n > b && cmp a b");
    director.stdout("ipvsadm-save > names && ipvsadm-restore < names && ipvsadm-save -n | cmp - a");
    let usage = director.shell("ipvsadm-save --nosuch");
    assert_eq!(usage.status.code(), Some(2));
    let unreadable = director.shell("ipvsadm-restore < nosuch");
    assert_ne!(unreadable.status.code(), Some(0));
    assert_eq!(director.world.lock().unwrap().model.service_count(), 2);
    director.stdout(": > empty && ipvsadm-restore < empty");
    assert_eq!(director.world.lock().unwrap().model.service_count(), 0);
}

#[test]
fn the_service_script_saves_and_restores() {
    if !is_root() {
        return;
    }
    let director = Director::start("service", Capabilities::all());
    director.stdout("ipvsadm -A -t 192.0.2.1:80");
    director.stdout("RULES=$PWD/rules DAEMON=both SYNCID=3 ipvsadm-service start");
    assert_eq!(director.stdout("ipvsadm -L --daemon").matches("mcast=eth0, syncid=3").count(), 2);
    director.stdout("RULES=$PWD/rules DAEMON=both ipvsadm-service stop");
    assert_eq!(director.stdout("ipvsadm -L --daemon"), "");
    assert_eq!(director.world.lock().unwrap().model.service_count(), 0);
    let mode = std::fs::metadata(director.folder.join("rules")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    director.stdout("RULES=$PWD/rules AUTO=false ipvsadm-service start");
    assert_eq!(director.world.lock().unwrap().model.service_count(), 0);
    director.stdout("RULES=$PWD/rules ipvsadm-service start");
    assert_eq!(director.world.lock().unwrap().model.service_count(), 1);
    // A save that fails leaves the old file and no other.
    let failed = director.shell("RULES=$PWD/rules RVS_SOCKET=$PWD/nosuch ipvsadm-service stop");
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(director.stdout("cat rules"), "-A -t 192.0.2.1:80 -s wlc\n");
    assert_eq!(director.stdout("ls"), "rules\nsock\n");
}

#[test]
fn what_the_data_plane_lacks_is_refused_in_one_line() {
    if !is_root() {
        return;
    }
    let director = Director::start("lacks", Capabilities::current());
    director.stdout("ipvsadm -A -t 192.0.2.1:80 -s rr");
    let lines = [
        "-A -t 192.0.2.1:81 -s lblc",
        "-E -t 192.0.2.1:80 -p 60",
        "-A -f 7 -s rr",
        "-a -t 192.0.2.1:80 -r 10.0.0.1:80 -x 9",
        "--start-daemon master",
    ];
    for line in lines {
        let output = director.shell(&format!("ipvsadm {line}"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{line}: {stderr}");
        assert!(stderr.starts_with("not supported yet: "), "{line}: {stderr}");
        assert!(output.stdout.is_empty());
    }
    assert_eq!(director.stdout("ipvsadm -S -n"), "-A -t 192.0.2.1:80 -s rr\n");
}

#[test]
fn without_rvsd_both_commands_say_so() {
    if !is_root() {
        return;
    }
    let director = Director::start("down", Capabilities::all());
    let output = director.shell("RVS_SOCKET=$PWD/nosuch ipvsadm -Ln");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!((output.status.code(), lines.len()), (Some(2), 3), "{stderr}");
    assert_eq!(lines[0], "Can't initialize ipvs: Protocol not available");
    assert_eq!(lines[1], "Are you sure that IP Virtual Server is built in the kernel or as module?");
    assert!(lines[2].contains("nosuch") && lines[2].contains("rvsd"), "{}", lines[2]);
    assert!(director.stdout("RVS_SOCKET=$PWD/nosuch ipvsadm --version").starts_with("ipvsadm v1.31 "));
    assert!(director.stdout("RVS_SOCKET=$PWD/nosuch ipvsadm -h").contains("\nUsage:\n  ipvsadm -A|E "));
    let output = director.shell("rvs --socket nosuch status");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("rvs: can't reach rvsd at nosuch: "));
    assert_eq!(director.shell("rvs nosuch").status.code(), Some(2));
}

#[test]
fn an_rvsd_that_is_stuck_does_not_hold_a_client_for_ever() {
    let director = Director::start("stuck", Capabilities::all());
    let socket = director.folder.join("stuck");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut backend = SocketBackend::with_timeout(&socket, Duration::from_millis(50));
    let mut client = Client::open(&mut backend).unwrap();
    assert!(matches!(client.status(), Err(BackendError::Silent { .. })));
    // Half an answer and then nothing more is an error, too.
    let mut backend = SocketBackend::new(&socket);
    let mut client = Client::open(&mut backend).unwrap();
    let answering = std::thread::spawn(move || {
        let mut stream = listener.incoming().nth(1).unwrap().unwrap();
        stream.write_all(b"{\"id\":1,\"last\":tr").unwrap();
    });
    answering.join().unwrap();
    assert!(matches!(client.status(), Err(BackendError::Closed | BackendError::Lost(_))));
}

#[test]
fn rvs_shows_status_and_drops() {
    let director = Director::start("shows", Capabilities::all());
    let drops = director.stdout("rvs drops");
    assert_eq!(drops, "reason              packets\nno destination            3\n");
    let json: serde_json::Value = serde_json::from_str(&director.stdout("rvs drops --json")).unwrap();
    assert_eq!(json[1]["reason"], "malformed");
    let status = director.stdout("rvs status");
    assert!(status.starts_with("rvsd 0.1.0 ready, process 1, "), "{status}");
    assert!(status.contains("\ninterface eth0 xdp\n"), "{status}");
    let json: serde_json::Value = serde_json::from_str(&director.stdout("rvs status --json")).unwrap();
    assert_eq!(json["ready"], true);
}

#[test]
fn a_reader_that_goes_away_ends_the_listing() {
    if !is_root() {
        return;
    }
    let director = Director::start("head", Capabilities::all());
    let rules: String = (1..200).map(|n| format!("-A -t 192.0.2.{n}:80\n")).collect();
    std::fs::write(director.folder.join("rules"), rules).unwrap();
    director.stdout("ipvsadm -R < rules");
    assert_eq!(director.stdout("ipvsadm -Ln | head -n 1"), "IP Virtual Server version 1.2.1 (size=4096)\n");
}
