//! PROXY headers: unmodified nginx and haproxy hear who their clients are, whatever the network loses.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rvs_lab::layouts::{Layout, Options};
use rvs_lab::load::{self, Load};
use rvs_lab::{Director, Hook, Lab, NodeHandle, Process, eventually};

use crate::support::{SOON, Test, TestResult, at, check, director, equal, http, lab_for, on_hooks, serve, vip};
use crate::transfers::there_and_back;

pub fn tests() -> Vec<Test> {
    let both = [Hook::Xdp, Hook::Tc];
    [
        on_hooks("proxy_headers_to_nginx_and_haproxy", &both, nginx_and_haproxy),
        on_hooks("proxy_headers_where_packets_are_lost", &both, lossy),
        on_hooks("proxy_headers_before_much_at_once", &both, much_at_once),
        on_hooks("proxy_headers_with_syn_cookies", &both, with_cookies),
        on_hooks("proxy_headers_are_turned_on_and_off_under_traffic", &both, on_and_off),
        on_hooks("proxy_headers_are_refused_where_they_can_not_be", &[Hook::Xdp], refused),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const LAYOUT: Layout = Layout::TwoArmed;
/// Where servers expect a header.
const PORT: u16 = 8090;
const PAIRS: [(&str, bool); 4] = [("-m", false), ("-m", true), ("--fullnat", false), ("--fullnat", true)];

fn lab_of(hook: Hook) -> TestResult<Lab> {
    lab_for(hook, LAYOUT, Options { servers: 2, ..Options::default() })
}

/// nginx on rs1 and haproxy on rs2, beside the lab's own servers.
fn servers(lab: &Lab) -> TestResult<[Process; 2]> {
    let servers = [nginx(lab.node("rs1")?)?, haproxy(lab.node("rs2")?)?];
    for (name, server) in ["rs1", "rs2"].into_iter().zip(&servers) {
        for ipv6 in [false, true] {
            let target = at(lab, name, ipv6, PORT)?;
            let node = lab.node(name)?;
            eventually(&format!("a server on {target}"), SOON, || {
                let met = node.enter(|| TcpStream::connect_timeout(&target, SOON)).map_err(|e| e.to_string())?;
                met.map(drop).map_err(|e| format!("{e}; its log: {}", server.log_tail()))
            })?;
        }
    }
    Ok(servers)
}

fn nginx(node: NodeHandle<'_>) -> TestResult<Process> {
    let (dir, name) = (node.dir(), node.name());
    let shown = dir.display();
    let config = format!(
        "daemon off; worker_processes 1; user root; pid {shown}/nginx-proxied.pid;
events {{ worker_connections 4096; }}
http {{
  log_format told '$proxy_protocol_addr $proxy_protocol_port $remote_addr $status';
  access_log {shown}/proxied-access.log told;
  server_tokens off; client_max_body_size 16m; default_type text/plain;
  client_body_temp_path {shown}/temp; proxy_temp_path {shown}/temp; fastcgi_temp_path {shown}/temp;
  uwsgi_temp_path {shown}/temp; scgi_temp_path {shown}/temp;
  server {{
    listen {PORT} proxy_protocol; listen [::]:{PORT} proxy_protocol;
    location = / {{ return 200 \"{name} $proxy_protocol_addr $proxy_protocol_server_addr $proxy_protocol_server_port\\n\"; }}
    location = /payload {{ root {shown}/web; }}
    location /upload/ {{ root {shown}/web; dav_methods PUT; }}
  }}
}}
"
    );
    let path = dir.join("nginx-proxied.conf");
    fs::write(&path, config)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&dir).arg("-e").arg(dir.join("nginx-proxied-error.log")).arg("-c").arg(&path);
    Ok(node.spawn("nginx-proxied", &mut command)?)
}

/// It answers `/` by itself, and has the rest from the node's nginx.
fn haproxy(node: NodeHandle<'_>) -> TestResult<Process> {
    let config = format!(
        "global
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend told
  bind 0.0.0.0:{PORT} accept-proxy
  bind :::{PORT} v6only accept-proxy
  http-request return status 200 content-type text/plain lf-string \"{} %[src] %[dst] %[dst_port]\\n\" if {{ path / }}
  default_backend files
backend files
  server own 127.0.0.1:8080
",
        node.name()
    );
    let path = node.dir().join("haproxy.cfg");
    fs::write(&path, config)?;
    Ok(node.spawn("haproxy", Command::new("haproxy").arg("-db").arg("-f").arg(&path))?)
}

/// A service whose servers get headers.
fn proxied(lab: &Lab, rvs: &Director<'_>, method: &str, ipv6: bool) -> TestResult<SocketAddr> {
    let web = vip(lab, ipv6, 80)?;
    serve(lab, rvs, "-t", web, method, PORT)?;
    rvs.rvs(&format!("service set tcp {web} --proxy v2"))?;
    Ok(web)
}

/// So many requests, each answered by a server that knows its client.
fn known(lab: &Lab, web: SocketAddr, load: &Load) -> TestResult {
    let report = load::http(lab.node("client")?, load, &|_| {})?;
    let client = at(lab, "client", web.is_ipv6(), 0)?.ip();
    let all = report.failed == 0 && report.answered() == load.requests && report.servers.len() == 2;
    check(all && report.clients.len() == 1 && report.clients.contains_key(&client), || format!("{web}: {report}"))
}

fn nginx_and_haproxy(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let mut rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let _servers = servers(&lab)?;
    for (method, ipv6) in PAIRS {
        let web = vip(&lab, ipv6, 80)?;
        serve(&lab, &rvs, "-t", web, method, PORT)?;
        let listed = rvs.ipvsadm("-Ln")? + &rvs.ipvsadm("-Sn")?;
        rvs.rvs(&format!("service set tcp {web} --proxy v2"))?;
        equal("what ipvsadm shows", &(rvs.ipvsadm("-Ln")? + &rvs.ipvsadm("-Sn")?), &listed)?;
        let due = format!("tcp {web}  syn-cookies off  rate off  source-rate off  proxy v2\n");
        equal("the service", &rvs.rvs("service show")?, &due)?;
        let client = at(&lab, "client", ipv6, 41000)?;
        let why = rvs.rvs(&format!("why tcp {client} {web}"))?;
        check(why.contains(", PROXY header"), || why)?;
        let before = rvs.verdicts()?;
        let load = Load { timeout: Duration::from_secs(20), ..Load::new(web, 1000) };
        let done = known(&lab, web, &load).and_then(|()| {
            // The virtual address and port are in it, too.
            let page = load::http_get(lab.node("client")?, web, "/", SOON)?;
            let page = String::from_utf8_lossy(&page).into_owned();
            let ends = format!("{} {} {}", client.ip(), web.ip(), web.port());
            check(page.trim_end().ends_with(&ends), || page)?;
            (0..4).try_for_each(|n| there_and_back(&lab, web, &format!("proxied-{method}-{ipv6}-{n}")))
        });
        let since = rvs.verdicts()?.since(&before);
        done.map_err(|why| format!("{method}, {web}: {why:?}, {since}"))?;
        println!("{method}, {web}: {since}");
        // Another rvsd finds it in the maps.
        rvs.kill();
        rvs.start_again()?;
        equal("the service", &rvs.rvs("service show")?, &due)?;
        known(&lab, web, &Load { requests: 50, ..load })?;
        rvs.ipvsadm(&format!("-D -t {web}"))?;
    }
    let log = fs::read_to_string(lab.node("rs1")?.dir().join("proxied-access.log"))?;
    let clients = [at(&lab, "client", false, 0)?.ip().to_string(), at(&lab, "client", true, 0)?.ip().to_string()];
    let told = log.lines().filter(|l| clients.iter().any(|c| l.split(' ').next() == Some(c))).count();
    // (Who looked whether it listens said nothing.)
    let others = log.lines().filter(|l| !l.starts_with("- ")).count() - told;
    check(told > 1900 && others == 0, || format!("{told} lines of clients, {others} others in nginx's log"))
}

/// Of a hundred packets each way some are lost, before the director and behind it.
fn lose(lab: &Lab, percent: u32) -> TestResult {
    for (node, hooks) in [("router", &["forward"][..]), ("rs1", &["input", "output"]), ("rs2", &["input", "output"])] {
        let node = lab.node(node)?;
        node.run(&["nft", "add table inet lossy"])?;
        for hook in hooks {
            node.run(&["nft", &format!("add chain inet lossy {hook} {{ type filter hook {hook} priority 0; }}")])?;
            let rule =
                format!("add rule inet lossy {hook} meta l4proto tcp iif != lo numgen random mod 100 < {percent} drop");
            let rule = if *hook == "output" { rule.replace("iif", "oif") } else { rule };
            node.run(&["nft", &rule])?;
        }
    }
    Ok(())
}

fn lossy(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let _servers = servers(&lab)?;
    let mut services = Vec::new();
    for (method, ipv6) in PAIRS {
        let web = proxied(&lab, &rvs, method, ipv6)?;
        // The servers' MAC addresses are known after this.
        http(&lab, web, 4)?;
        rvs.ipvsadm(&format!("-D -t {web}"))?;
        services.push((method, ipv6));
    }
    lose(&lab, 4)?;
    for (method, ipv6) in services {
        let web = proxied(&lab, &rvs, method, ipv6)?;
        let before = rvs.verdicts()?;
        let load = Load { timeout: Duration::from_secs(60), concurrency: 32, ..Load::new(web, 300) };
        let done = known(&lab, web, &load).and_then(|()| there_and_back(&lab, web, &format!("lossy-{method}-{ipv6}")));
        let since = rvs.verdicts()?.since(&before);
        done.map_err(|why| format!("{method}, {web}: {why:?}, {since}"))?;
        println!("{method}, {web}: {since}");
        rvs.ipvsadm(&format!("-D -t {web}"))?;
    }
    Ok(())
}

/// A client that writes much at once: under tc its first data come in a packet that is yet to be cut into segments, and that has no header;
/// the end of its handshake brought it, or, when that is lost, what it sends again.
fn much_at_once(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    for (method, ipv6) in PAIRS {
        let (web, target) = (vip(&lab, ipv6, 80)?, at(&lab, "rs1", ipv6, 9000)?);
        serve(&lab, &rvs, "-t", web, method, 9000)?;
        rvs.ipvsadm(&format!("-d -t {web} -r {}", at(&lab, "rs2", ipv6, 9000)?))?;
        rvs.rvs(&format!("service set tcp {web} --proxy v2"))?;
        lab.node("director")?.run(&["ping", "-c", "1", &target.ip().to_string()])?;
        let listener = lab.node("rs1")?.enter(|| TcpListener::bind(target))??;
        for lost in [false, true] {
            if lost {
                lose_acknowledgements(lab.node("router")?, web)?;
            }
            for n in 0..8 {
                upload(&lab, &listener, web).map_err(|e| format!("{method}, {web}, lost {lost}, {n}: {e:?}"))?;
            }
        }
        lab.node("router")?.run(&["nft", "delete table inet lossy"])?;
        rvs.ipvsadm(&format!("-D -t {web}"))?;
    }
    Ok(())
}

/// Of the client's packets without data, which the end of the handshake is the first of, every other one.
fn lose_acknowledgements(router: NodeHandle<'_>, web: SocketAddr) -> TestResult {
    router.run(&["nft", "add table inet lossy"])?;
    router.run(&["nft", "add chain inet lossy forward { type filter hook forward priority 0; }"])?;
    let (family, most) = if web.is_ipv6() { ("ip6", 72) } else { ("ip", 52) };
    let to = format!("{family} daddr {} tcp dport {}", web.ip(), web.port());
    let ack = "tcp flags & (syn|ack|rst|fin) == ack";
    router.run(&[
        "nft",
        &format!("add rule inet lossy forward {to} {ack} meta length <= {most} numgen inc mod 2 == 0 drop"),
    ])?;
    Ok(())
}

/// 300 kB in one write, read behind the header as they were written.
fn upload(lab: &Lab, listener: &TcpListener, web: SocketAddr) -> TestResult {
    let text = rvs_lab::service::payload("at once")[..300_000].to_vec();
    let sent = text.clone();
    thread::scope(|scope| -> TestResult {
        let server = scope.spawn(|| -> std::io::Result<(SocketAddr, Vec<u8>)> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            let client = heard(&mut stream)?;
            let mut read = Vec::new();
            stream.read_to_end(&mut read)?;
            Ok((client, read))
        });
        let own = lab.node("client")?.enter(|| -> std::io::Result<SocketAddr> {
            let mut stream = TcpStream::connect_timeout(&web, Duration::from_secs(5))?;
            stream.write_all(&sent)?;
            stream.local_addr()
        })??;
        let (client, read) = server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        equal("the client", &client.to_string(), &own.to_string())?;
        check(read == text, || format!("{} bytes of {}, or others", read.len(), text.len()))
    })
}

fn with_cookies(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let _servers = servers(&lab)?;
    for (method, ipv6) in PAIRS {
        let web = proxied(&lab, &rvs, method, ipv6)?;
        http(&lab, web, 4)?;
        rvs.rvs(&format!("service set tcp {web} --syn-cookies always"))?;
        let before = rvs.verdicts()?;
        let load = Load { timeout: Duration::from_secs(20), ..Load::new(web, 200) };
        let done =
            known(&lab, web, &load).and_then(|()| there_and_back(&lab, web, &format!("cookies-{method}-{ipv6}")));
        let since = rvs.verdicts()?.since(&before);
        done.map_err(|why| format!("{method}, {web}: {why:?}, {since}"))?;
        check(since.of("syn_cookie") >= 200, || format!("{since}"))?;
        rvs.ipvsadm(&format!("-D -t {web}"))?;
    }
    speaks_first(&lab, &rvs)
}

/// A server that has something to say when it knows to whom, and a client that waits for it: what completes the server's handshake is the
/// director's, and brings the header.
fn speaks_first(lab: &Lab, rvs: &Director<'_>) -> TestResult {
    for ipv6 in [false, true] {
        let (mail, server) = (vip(lab, ipv6, 25)?, at(lab, "rs1", ipv6, 25)?);
        rvs.ipvsadm(&format!("-A -t {mail} -s rr"))?;
        rvs.ipvsadm(&format!("-a -t {mail} -r {server} -m"))?;
        rvs.rvs(&format!("service set tcp {mail} --syn-cookies always --proxy v2"))?;
        lab.node("director")?.run(&["ping", "-c", "1", &server.ip().to_string()])?;
        let listener = lab.node("rs1")?.enter(|| TcpListener::bind(server))??;
        let greeting = thread::scope(|scope| {
            scope.spawn(|| -> std::io::Result<()> {
                let (mut client, _) = listener.accept()?;
                client.set_read_timeout(Some(Duration::from_secs(10)))?;
                let said = heard(&mut client)?;
                client.write_all(format!("220 {said}\r\n").as_bytes())
            });
            lab.node("client")?.enter(|| -> std::io::Result<(String, SocketAddr)> {
                let mut stream = TcpStream::connect_timeout(&mail, Duration::from_secs(5))?;
                stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                let mut text = String::new();
                stream.read_to_string(&mut text)?;
                Ok((text, stream.local_addr()?))
            })
        })??;
        equal("the greeting", &greeting.0, &format!("220 {}\r\n", greeting.1))?;
    }
    Ok(())
}

/// Whom a header says that the client is; the rest is left.
fn heard(stream: &mut TcpStream) -> std::io::Result<SocketAddr> {
    let mut start = [0; 16];
    stream.read_exact(&mut start)?;
    let mut rest = vec![0; usize::from(u16::from_be_bytes([start[14], start[15]]))];
    stream.read_exact(&mut rest)?;
    let right = start[..13] == *b"\r\n\r\n\0\r\nQUIT\n\x21";
    let word = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
    match rest.len() {
        12 if right => Ok(SocketAddr::new(<[u8; 4]>::try_from(&rest[..4]).unwrap_or_default().into(), word(8))),
        36 if right => Ok(SocketAddr::new(<[u8; 16]>::try_from(&rest[..16]).unwrap_or_default().into(), word(32))),
        _ => Err(std::io::Error::other(format!("no header: {start:02x?} {rest:02x?}"))),
    }
}

/// A server that takes connections with a header and without, and answers each line with which it was.
fn either(listener: &TcpListener, over: &AtomicBool) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    thread::scope(|scope| {
        while !over.load(Ordering::Relaxed) {
            let Ok((mut stream, _)) = listener.accept() else {
                thread::yield_now();
                continue;
            };
            scope.spawn(move || -> std::io::Result<()> {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(Duration::from_secs(20)))?;
                let mut first = [0];
                stream.peek(&mut first)?;
                let kind = if first[0] == b'\r' { heard(&mut stream)?.to_string() } else { "plain".to_owned() };
                let mut lines = BufReader::new(stream.try_clone()?);
                let mut line = String::new();
                while lines.read_line(&mut line)? != 0 {
                    stream.write_all(format!("{kind} {line}").as_bytes())?;
                    line.clear();
                }
                Ok(())
            });
        }
    });
    Ok(())
}

/// A client's connection, which hears what the server takes it for.
struct Talk {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
    own: String,
}

impl Talk {
    fn with(to: SocketAddr) -> std::io::Result<Talk> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let (lines, own) = (BufReader::new(stream.try_clone()?), stream.local_addr()?.to_string());
        Ok(Talk { stream, lines, own })
    }
    fn says(&mut self, word: &str) -> std::io::Result<String> {
        self.stream.write_all(format!("{word}\n").as_bytes())?;
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        let said = line.strip_suffix(&format!(" {word}\n")).map(str::to_owned);
        said.ok_or_else(|| std::io::Error::other(format!("said {word}, heard {line:?}")))
    }
}

/// Connections are what they began as; new ones are what the service is now.
fn on_and_off(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let mut rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    for (method, ipv6) in PAIRS {
        let web = vip(&lab, ipv6, 80)?;
        let target = at(&lab, "rs1", ipv6, 9000)?;
        serve(&lab, &rvs, "-t", web, method, 9000)?;
        let other = at(&lab, "rs2", ipv6, 9000)?;
        rvs.ipvsadm(&format!("-d -t {web} -r {other}"))?;
        lab.node("director")?.run(&["ping", "-c", "1", &target.ip().to_string()])?;
        let listener = lab.node("rs1")?.enter(|| TcpListener::bind(target))??;
        let over = AtomicBool::new(false);
        let client = lab.node("client")?;
        thread::scope(|scope| {
            let server = scope.spawn(|| either(&listener, &over));
            let mut talks: Vec<(Talk, bool)> = Vec::new();
            let mut turn = |rvs: &mut Director<'_>, n: usize| -> TestResult {
                let on = n.is_multiple_of(2);
                rvs.rvs(&format!("service set tcp {web} --proxy {}", if on { "v2" } else { "off" }))?;
                if n == 3 {
                    rvs.kill();
                    rvs.start_again()?;
                }
                for _ in 0..3 {
                    talks.push((client.enter(|| Talk::with(web))??, on));
                }
                for (talk, on) in &mut talks {
                    let kind = talk.says(&format!("turn{n}"))?;
                    let due = if *on { talk.own.clone() } else { "plain".to_owned() };
                    equal("what the server takes the connection for", &kind, &due)?;
                }
                Ok(())
            };
            let done = (0..8).try_for_each(|n| turn(&mut rvs, n));
            drop(talks);
            over.store(true, Ordering::Relaxed);
            server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            done
        })
        .map_err(|why| format!("{method}, {web}: {why:?}, {:?}", rvs.verdicts()))?;
        rvs.ipvsadm(&format!("-D -t {web}"))?;
    }
    Ok(())
}

fn refused(hook: Hook) -> TestResult {
    let lab = lab_of(hook)?;
    let rvs = director(&lab, LAYOUT.director_interfaces(), hook)?;
    let (web, server) = (vip(&lab, false, 80)?, at(&lab, "rs1", false, 80)?);
    let says = |done: rvs_lab::Result<String>, what: &str| {
        check(done.as_ref().is_err_and(|e| e.to_string().contains(what)), || format!("{done:?} instead of '{what}'"))
    };
    serve(&lab, &rvs, "-t", web, "-g", 80)?;
    says(rvs.rvs(&format!("service set tcp {web} --proxy v2")), "whose replies come by here")?;
    rvs.ipvsadm(&format!("-D -t {web}"))?;
    rvs.ipvsadm(&format!("-A -t {web} -s rr"))?;
    rvs.rvs(&format!("service set tcp {web} --proxy v2"))?;
    for method in ["-g", "-i"] {
        says(rvs.ipvsadm(&format!("-a -t {web} -r {server} {method}")), "")?;
    }
    rvs.ipvsadm(&format!("-a -t {web} -r {server} -m"))?;
    says(rvs.ipvsadm(&format!("-e -t {web} -r {server} -g")), "")?;
    rvs.ipvsadm(&format!("-A -u {web} -s rr"))?;
    says(rvs.rvs(&format!("service set udp {web} --proxy v2")), "for TCP services")?;
    // The director as its own real server would wait for a header.
    let own = at(&lab, "director", false, 8080)?;
    rvs.ipvsadm(&format!("-d -t {web} -r {server}"))?;
    rvs.ipvsadm(&format!("-a -t {web} -r {own} -m"))?;
    let client = at(&lab, "client", false, 41000)?;
    eventually("a PROXY header that can't be sent", SOON, || {
        let why = rvs.rvs(&format!("why tcp {client} {web}")).map_err(|e| e.to_string())?;
        if why.contains("proxy_local") { Ok(()) } else { Err(why) }
    })?;
    Ok(())
}
