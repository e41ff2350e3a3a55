//! One connection with a PROXY header: a client and a server that talk TCP by the book, a director between them, and links that lose, double and
//! reorder. Whatever happens, the server reads the header and then exactly what its client wrote, and the client exactly what the server wrote.

mod client;
mod segment;
mod server;

use client::Client;
use segment::Segment;
use server::Server;

use crate::rng::Rng;
use rvs_datapath::mem::MemPacket;
use rvs_datapath::verdict::{Action, Reason};
use rvs_fixtures::case::{Engine, START_S};
use rvs_fixtures::frame::{TCP, check_sums, flag};
use rvs_fixtures::native::Native;
use rvs_fixtures::world::{BACK, CLIENT_MAC, LAN, Net, Server as RealServer, Virtual, World, octets, server_mac};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// What a connection came to.
#[derive(Clone, Copy, Default, Debug)]
pub struct Told {
    pub packets: u64,
    pub lost: u64,
    /// Bytes of the client and of the server.
    pub up: u64,
    pub down: u64,
    /// Headers that were put in.
    pub headers: u64,
    /// It ended by a reset of the client.
    pub reset: bool,
}

const SERVER: u8 = 12;
/// More than any connection takes.
const STEPS: u64 = 20_000;

enum Event {
    ToDirector { frame: Vec<u8>, ifindex: u32 },
    ToServer(Vec<u8>),
    ToClient(Vec<u8>),
    ClientTimer,
    ServerTimer,
}

struct Streams {
    rng: Rng,
    now_ms: u64,
    events: BTreeMap<(u64, u64), Event>,
    sent: u64,
    /// Of a hundred packets.
    loss: u64,
    late: u64,
    director: Native,
    client: Client,
    server: Server,
    told: Told,
}

/// The header as the specification has it.
fn header(client: SocketAddr, vip: SocketAddr) -> Vec<u8> {
    let n = if client.is_ipv6() { 16 } else { 4 };
    let family = if n == 4 { 0x11 } else { 0x21 };
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    bytes.extend([0x21, family, 0, 2 * n as u8 + 4]);
    bytes.extend(&octets(client.ip())[..n]);
    bytes.extend(&octets(vip.ip())[..n]);
    bytes.extend(client.port().to_be_bytes());
    bytes.extend(vip.port().to_be_bytes());
    bytes
}

/// Run one seed.
///
/// # Errors
/// What was broken.
pub fn run(seed: u64) -> Result<Told, String> {
    let mut s = Streams::new(seed);
    for step in 0..STEPS {
        if s.over() {
            return s.end().map_err(|what| format!("seed {seed}, at the end: {what}"));
        }
        s.one().map_err(|what| format!("seed {seed}, step {step}: {what}"))?;
    }
    Err(format!("seed {seed}: not at an end after {STEPS} steps: {}; {}", s.client.brief(), s.server.brief()))
}

impl Streams {
    fn new(seed: u64) -> Streams {
        let mut rng = Rng::new(seed);
        let net = if rng.chance(1, 2) { Net::V4 } else { Net::V6 };
        let own = rng.chance(1, 2);
        let cookies = u32::from(rng.chance(1, 3));
        let dest = RealServer::proxied(net, SERVER, 8080, own);
        let v = Virtual::new(net.vip(80), TCP, &[dest]).lending(&[net.local(1)]).limited(cookies, 0, 0);
        let mut director = Native::default();
        director.load(&World::of(&[v]).layout());
        director.set_now(START_S);
        let at = net.client(40_000 + rng.below(20_000) as u16);
        let mut client = Client::new(at, net.vip(80), cookies != 0, &mut rng);
        let server =
            Server::new(net.server(SERVER, 8080), header(at, net.vip(80)), cookies * 128, &mut client, &mut rng);
        let mut s = Streams {
            now_ms: 0,
            events: BTreeMap::new(),
            sent: 0,
            loss: [0, 5, 20, 40][rng.below(4) as usize],
            late: [0, 10, 40][rng.below(3) as usize],
            director,
            client,
            server,
            told: Told::default(),
            rng,
        };
        s.after(0, Event::ClientTimer);
        s.after(100, Event::ServerTimer);
        s
    }

    fn after(&mut self, ms: u64, event: Event) {
        self.sent += 1;
        self.events.insert((self.now_ms + ms, self.sent), event);
    }

    fn transmit(&mut self, event: impl Fn() -> Event) {
        if self.rng.chance(self.loss, 100) {
            self.told.lost += 1;
            return;
        }
        for _ in 0..if self.rng.chance(1, 15) { 2 } else { 1 } {
            let most = if self.rng.chance(self.late, 100) { 300 } else { 3 };
            let delay = 1 + self.rng.below(most);
            self.after(delay, event());
        }
    }

    fn one(&mut self) -> Result<(), String> {
        let Some(((at, _), event)) = self.events.pop_first() else { return Err("nothing left to happen".to_owned()) };
        self.now_ms = self.now_ms.max(at);
        self.director.set_now(START_S + (self.now_ms / 1000) as u32);
        match event {
            Event::ClientTimer => {
                let segments = self.client.act(&mut self.rng);
                self.of_client(&segments);
                let pause = 20 + self.rng.below(200);
                self.after(pause, Event::ClientTimer);
            }
            Event::ServerTimer => {
                let segments = self.server.act();
                self.of_server(&segments);
                self.after(150, Event::ServerTimer);
            }
            Event::ToDirector { frame, ifindex } => return self.direct(frame, ifindex),
            Event::ToServer(frame) => {
                let seen = Segment::of(&frame).ok_or("a frame to the server that is none")?;
                let segments = self.server.receive(&seen)?;
                self.of_server(&segments);
            }
            Event::ToClient(frame) => {
                let seen = Segment::of(&frame).ok_or("a frame to the client that is none")?;
                let segments = self.client.receive(&seen, &mut self.rng)?;
                self.of_client(&segments);
            }
        }
        Ok(())
    }

    fn of_client(&mut self, segments: &[Segment]) {
        for segment in segments {
            let frame = segment.client_frame();
            if segment.has(flag::SYN) {
                // (One that came after the client's FIN would begin another connection, as with IPVS.)
                self.after(1, Event::ToDirector { frame, ifindex: LAN });
                continue;
            }
            self.transmit(|| Event::ToDirector { frame: frame.clone(), ifindex: LAN });
        }
    }
    fn of_server(&mut self, segments: &[Segment]) {
        for frame in segments.iter().map(|s| s.server_frame(SERVER)) {
            self.transmit(|| Event::ToDirector { frame: frame.clone(), ifindex: BACK });
        }
    }

    fn direct(&mut self, frame: Vec<u8>, ifindex: u32) -> Result<(), String> {
        self.told.packets += 1;
        let before = frame.len();
        let mut p = MemPacket { bytes: frame, ifindex };
        let verdict = self.director.tables.run(&mut p);
        check_sums(&p.bytes).map_err(|wrong| format!("wrong {wrong} after {verdict:?}"))?;
        match verdict.reason() {
            Reason::NoConnection | Reason::NoService => return Ok(()),
            Reason::Masq | Reason::MasqReply | Reason::Fullnat | Reason::FullnatReply => {}
            Reason::Cookie | Reason::CookieServer => {}
            // Options that who was told of none has not to send; entries of the SYN doubled.
            Reason::CookieRefused | Reason::Entering => return Ok(()),
            other => return Err(format!("{other:?}")),
        }
        if !matches!(verdict.action(), Action::Out(_) | Action::Back) {
            return Err(format!("{verdict:?}"));
        }
        let bytes = p.bytes;
        if bytes[..6] == server_mac(SERVER) {
            self.told.headers += u64::from(bytes.len() >= before + 28);
            self.transmit(|| Event::ToServer(bytes.clone()));
        } else if bytes[..6] == CLIENT_MAC {
            self.transmit(|| Event::ToClient(bytes.clone()));
        } else {
            return Err(format!("{verdict:?} to {:02x?}", &bytes[..6]));
        }
        Ok(())
    }

    fn over(&self) -> bool {
        if self.client.has_reset() { self.server.is_reset() } else { self.client.is_done() && self.server.is_done() }
    }

    fn end(&self) -> Result<Told, String> {
        let told = Told {
            up: self.client.text.len() as u64,
            down: self.server.text.len() as u64,
            reset: self.client.has_reset(),
            ..self.told
        };
        if self.client.has_reset() {
            return Ok(told);
        }
        if self.server.read() != self.client.text {
            return Err(format!("the server read {} bytes of {}", self.server.read().len(), self.client.text.len()));
        }
        if self.client.read() != self.server.text {
            return Err(format!("the client read {} bytes of {}", self.client.read().len(), self.server.text.len()));
        }
        if self.director.tables.verdicts()[Reason::Internal as usize] != 0 {
            return Err("an internal error".to_owned());
        }
        Ok(told)
    }
}
