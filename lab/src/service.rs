//! The real servers' programs: nginx and dnsmasq from Debian's packages, each with files of its own.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::eventually::{eventually, patient};
use crate::load;
use crate::netns::Netns;
use crate::process::Process;
use crate::topology::Service;

/// Size of the big file, and of what uploads carry.
pub const PAYLOAD_LEN: usize = 2 * 1024 * 1024;

/// A program that is not ready by then is broken.
const START_TIME: Duration = Duration::from_secs(10);

const DNS_PORT: u16 = 53;

/// The big file of a server: the same bytes for the same name, different ones for another. No two chunks are alike, so
/// that a segment lost, doubled or moved shows.
pub fn payload(server: &str) -> Vec<u8> {
    let mut state =
        server.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |s, b| (s ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..PAYLOAD_LEN / 8).flat_map(|_| next()).collect()
}

/// Starts the program in the namespace with its files in `dir`, and waits until it answers.
pub(crate) fn start(service: &Service, name: &str, ns: &Netns, dir: &Path) -> Result<Process> {
    match service {
        Service::Http { ports } => start_http(name, ports, ns, dir),
        Service::Dns => start_dns(name, ns, dir),
    }
}

fn start_http(name: &str, ports: &[u16], ns: &Netns, dir: &Path) -> Result<Process> {
    let web = dir.join("web");
    for folder in ["web/upload", "temp"] {
        fs::create_dir_all(dir.join(folder)).map_err(Error::file("make", dir.join(folder)))?;
    }
    fs::write(web.join("payload"), payload(name)).map_err(Error::file("write", &web))?;
    let config = dir.join("nginx.conf");
    fs::write(&config, nginx_config(name, ports, dir)).map_err(Error::file("write", &config))?;
    let error_log = dir.join("nginx-error.log");
    let mut command = Command::new("nginx");
    command.arg("-p").arg(dir).arg("-e").arg(&error_log).arg("-c").arg(&config);
    let process = Process::spawn("nginx", ns, &mut command, dir)?;
    for &port in ports {
        for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let target = SocketAddr::new(address, port);
            wait_ready(&process, &format!("nginx of {name} on {target}"), || {
                ns.enter(|| TcpStream::connect_timeout(&target, START_TIME))
                    .map_err(|e| e.to_string())?
                    .map(drop)
                    .map_err(|e| e.to_string())
            })?;
        }
    }
    Ok(process)
}

fn start_dns(name: &str, ns: &Netns, dir: &Path) -> Result<Process> {
    let mut command = Command::new("dnsmasq");
    command.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--no-daemon",
        "--user=root",
        "--pid-file=",
    ]);
    command.arg(format!("--port={DNS_PORT}")).arg(format!("--txt-record={},{name}", load::DNS_NAME));
    // An answer that goes in several packets: sixteen strings of 250 bytes.
    let large: String = (0..16u8).map(|i| format!(",{}", char::from(b'a' + i).to_string().repeat(250))).collect();
    command.arg(format!("--txt-record={}{large}", load::DNS_LARGE)).arg("--edns-packet-max=4096");
    let process = Process::spawn("dnsmasq", ns, &mut command, dir)?;
    let target = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS_PORT);
    wait_ready(&process, &format!("dnsmasq of {name}"), || {
        let answer =
            ns.enter(|| load::ask_dns(target, patient(Duration::from_millis(200)))).map_err(|e| e.to_string())??;
        if answer == name { Ok(()) } else { Err(format!("it calls itself {answer}")) }
    })?;
    Ok(process)
}

/// Waits until `ready` is true; a program that has ended is not waited for.
fn wait_ready(process: &Process, what: &str, mut ready: impl FnMut() -> Result<(), String>) -> Result<()> {
    eventually(what, START_TIME, || match ready() {
        Ok(()) => Ok(Ok(())),
        Err(_) if process.has_ended() => Ok(Err(Error::unexpected(what, format!("it ended: {}", process.log_tail())))),
        Err(why) => Err(format!("{why}; its log: {}", process.log_tail())),
    })?
}

fn nginx_config(name: &str, ports: &[u16], dir: &Path) -> String {
    let dir = dir.display();
    let listen: String = ports.iter().map(|p| format!("listen {p}; listen [::]:{p}; ")).collect();
    format!(
        "daemon off; worker_processes 1; user root; pid {dir}/nginx.pid;
events {{ worker_connections 4096; }}
http {{
  access_log off; server_tokens off; client_max_body_size 16m; default_type text/plain;
  client_body_temp_path {dir}/temp; proxy_temp_path {dir}/temp; fastcgi_temp_path {dir}/temp;
  uwsgi_temp_path {dir}/temp; scgi_temp_path {dir}/temp;
  server {{
    {listen}
    location = / {{ return 200 \"{name} $remote_addr $server_addr:$server_port\\n\"; }}
    location = /payload {{ root {dir}/web; }}
    location /upload/ {{ root {dir}/web; dav_methods PUT; }}
  }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_differ_by_server_and_not_by_call() {
        assert_eq!(payload("rs1").len(), PAYLOAD_LEN);
        assert!(payload("rs1") == payload("rs1") && payload("rs1") != payload("rs2"));
    }
}
