//! Answers to requests, made of the model and of what the maps count.

use std::net::IpAddr;
use std::ops::Range;

use rvs_control::api::{
    self, Code, ConnOrigin, ConnRow, Counters, CpuStats, DestCounters, DropRow, Probe, Rates, Refusal, Request,
    RequestBody, Response, ResponseBody, StatsReport, Status,
};
use rvs_control::filter::Filter;
use rvs_control::limits;
use rvs_control::model::{CommandError, DestKey, ServiceKey};
use rvs_datapath::abi::Stats;
use rvs_datapath::ct::{V4, V6};
use rvs_datapath::verdict::Reason;
use rvs_sys::bpf::{BpfError, ConnTable, Flow, combine};

use crate::director::{Director, shown};
use crate::rates::What;
use crate::tables;

/// An answer, or a listing that is read on as it is sent.
pub enum Answer {
    Lines(Vec<Response>),
    Connections(ConnectionList),
    Why(u64, Vec<Probe>),
    Trace(u64, Filter),
    Upgrade(u64, api::Upgrade),
}

pub fn answer(d: &mut Director, request: Request) -> Answer {
    let id = request.id;
    let body = match request.body {
        RequestBody::Connections => return Answer::Connections(ConnectionList::new(id)),
        RequestBody::Upgrade(upgrade) => return Answer::Upgrade(id, upgrade),
        RequestBody::Why(probes) => return Answer::Why(id, probes),
        RequestBody::Trace(filter) => match Filter::parse(&filter) {
            Ok(_) if d.tracing => {
                let reason = "another rvs trace is being told of packets: one at a time";
                ResponseBody::Refused(Refusal::new(Code::Full, reason))
            }
            Ok(filter) => return Answer::Trace(id, filter),
            Err(error) => ResponseBody::Refused(Refusal::new(Code::Invalid, error.to_string())),
        },
        RequestBody::List(filter) => match api::list(&d.model, &filter, &Counted(d)) {
            Ok(rows) => return Answer::Lines(api::in_chunks(id, rows, ResponseBody::List).collect()),
            Err(refusal) => ResponseBody::Refused(refusal),
        },
        RequestBody::LocalAddresses(service) => match d.check_local_addresses() {
            Ok(()) => {
                let rows = api::local_addresses(&d.model, service.map(Into::into));
                return Answer::Lines(api::in_chunks(id, rows, ResponseBody::LocalAddresses).collect());
            }
            Err(refusal) => ResponseBody::Refused(refusal),
        },
        RequestBody::Defences(service) => match service.map(ServiceKey::from) {
            Some(key) if d.model.service(&key).is_none() => {
                ResponseBody::Refused(Refusal::from(&CommandError::NoSuchService))
            }
            key => {
                let rows = api::defences(&d.model, key, |key| d.planner.asks(key));
                return Answer::Lines(api::in_chunks(id, rows, ResponseBody::Defences).collect());
            }
        },
        RequestBody::Command(command) => match d.command(command) {
            Ok(()) => ResponseBody::Done,
            Err(refusal) => ResponseBody::Refused(refusal),
        },
        RequestBody::Timeouts => {
            let t = d.model.timeouts();
            ResponseBody::Timeouts(api::Timeouts { tcp_s: t.tcp_s, tcp_fin_s: t.tcp_fin_s, udp_s: t.udp_s })
        }
        RequestBody::Settings => ResponseBody::Settings(api::settings(&d.model)),
        RequestBody::Daemons => ResponseBody::Daemons(api::daemons(&d.model)),
        RequestBody::Drops => or_refused(verdicts(d).map(ResponseBody::Drops)),
        RequestBody::Stats => or_refused(report(d).map(|r| ResponseBody::Stats(Box::new(r)))),
        RequestBody::Tables => or_refused(tables::report(d).map(|r| ResponseBody::Tables(Box::new(r)))),
        RequestBody::Resize(resize) => tables::resize(d, resize),
        RequestBody::Status => or_refused(status(d).map(|s| ResponseBody::Status(Box::new(s)))),
    };
    Answer::Lines(vec![Response::whole(id, body)])
}

pub fn or_refused(body: Result<ResponseBody, BpfError>) -> ResponseBody {
    body.unwrap_or_else(|error| ResponseBody::Refused(Refusal::new(Code::Failed, shown(&error))))
}

fn verdicts(d: &Director) -> Result<Vec<DropRow>, BpfError> {
    let counts = d.dataplane.maps.verdicts()?;
    Ok(Reason::ALL.iter().map(|r| DropRow { reason: r.name().to_owned(), packets: counts[*r as usize] }).collect())
}

fn status(d: &Director) -> Result<Status, BpfError> {
    let mut connections = 0;
    for (service, s) in d.model.services() {
        for dest in s.dests() {
            let c = Counted(d).dest(service, &dest.key);
            connections += u64::from(c.active) + u64::from(c.inactive);
        }
    }
    Ok(Status {
        ready: true,
        rvsd: env!("CARGO_PKG_VERSION").to_owned(),
        ipvs_version: [1, 2, 1],
        // What listings show as `size=`: the kernel's default number of hash buckets, since scripts compare that line. Ours is fixed
        // by --conns and has nothing to do with how fast a connection is found.
        conn_table_size: 4096,
        pid: std::process::id(),
        uptime_s: d.uptime().as_secs(),
        services: u32::try_from(d.model.service_count()).unwrap_or(u32::MAX),
        dests: u32::try_from(d.model.dest_count()).unwrap_or(u32::MAX),
        connections,
        thinned: d.dataplane.maps.clock.get(0)?.thinned,
        interfaces: d.interfaces.iter().map(|(name, how)| format!("{name} {how}")).collect(),
        warnings: d.warnings.iter().cloned().collect(),
    })
}

/// All services together. Of the CPUs, what each has counted for the dests of today.
fn report(d: &Director) -> Result<StatsReport, BpfError> {
    let mut total = Stats::default();
    let mut cpus: Vec<Stats> = Vec::new();
    for (key, service) in d.model.services() {
        total = combine(total, Counted(d).service_stats(key)?, u64::wrapping_add);
        for dest in service.dests() {
            let Some((index, former)) = d.planner.dest_indexes(key, &dest.key) else { continue };
            for index in std::iter::once(index).chain(former.iter().copied()) {
                let values = d.dataplane.maps.dest_stats.get(index)?;
                cpus.resize(cpus.len().max(values.len()), Stats::default());
                for (sum, value) in cpus.iter_mut().zip(values) {
                    *sum = combine(*sum, value.stats, u64::wrapping_add);
                }
            }
        }
    }
    let cpus = cpus.into_iter().zip(0..).map(|(stats, cpu)| CpuStats { cpu, stats: api_stats(stats) }).collect();
    Ok(StatsReport { total: api_stats(total), rates: d.estimator.rates(&What::Total), cpus })
}

pub fn api_stats(s: Stats) -> api::Stats {
    api::Stats {
        conns: s.connections,
        in_pkts: s.packets_in,
        out_pkts: s.packets_out,
        in_bytes: s.bytes_in,
        out_bytes: s.bytes_out,
    }
}

/// The counters in the maps. A map that can't be read counts as zero in a listing: the rest is still worth showing.
pub struct Counted<'a>(pub &'a Director);

impl Counted<'_> {
    /// A dest's counters as shown, and what it adds to its service's.
    fn dest_stats(&self, service: &ServiceKey, dest: &DestKey) -> Result<(Stats, Stats), BpfError> {
        let Some((index, former)) = self.0.planner.dest_indexes(service, dest) else { return Ok(Default::default()) };
        let (mut shown, mut adds) = (Stats::default(), Stats::default());
        for index in std::iter::once(index).chain(former.iter().copied()) {
            let (s, a) = self.0.dataplane.maps.stats_of_dest(index)?;
            shown = combine(shown, s, u64::wrapping_add);
            adds = combine(adds, a, u64::wrapping_add);
        }
        Ok((shown, adds))
    }

    pub fn service_stats(&self, key: &ServiceKey) -> Result<Stats, BpfError> {
        let (Some(service), Some(index)) = (self.0.model.service(key), self.0.planner.service_index(key)) else {
            return Ok(Stats::default());
        };
        let mut sum = Stats::default();
        for dest in service.dests() {
            sum = combine(sum, self.dest_stats(key, &dest.key)?.1, u64::wrapping_add);
        }
        self.0.dataplane.maps.stats_of_service(index, sum)
    }

    /// All counters, for the estimator.
    pub fn all(&self) -> Vec<(What, Stats)> {
        let mut all = Vec::new();
        let mut total = Stats::default();
        for (key, service) in self.0.model.services() {
            let Some(index) = self.0.planner.service_index(key) else { continue };
            let mut sum = Stats::default();
            for dest in service.dests() {
                let (shown, adds) = self.dest_stats(key, &dest.key).unwrap_or_default();
                sum = combine(sum, adds, u64::wrapping_add);
                all.push((What::Dest(*key, dest.key), shown));
            }
            let stats = self.0.dataplane.maps.stats_of_service(index, sum).unwrap_or_default();
            total = combine(total, stats, u64::wrapping_add);
            all.push((What::Service(*key), stats));
        }
        all.push((What::Total, total));
        all
    }
}

impl Counters for Counted<'_> {
    fn service(&self, service: &ServiceKey) -> (api::Stats, Rates) {
        let stats = self.service_stats(service).unwrap_or_default();
        (api_stats(stats), self.0.estimator.rates(&What::Service(*service)))
    }

    fn dest(&self, service: &ServiceKey, dest: &DestKey) -> DestCounters {
        let (stats, _) = self.dest_stats(service, dest).unwrap_or_default();
        let mut sums = [0u32; 3];
        if let Some((index, former)) = self.0.planner.dest_indexes(service, dest) {
            for index in std::iter::once(index).chain(former.iter().copied()) {
                let counts = self.0.dataplane.maps.connections_of(index).unwrap_or_default();
                sums.iter_mut().zip(counts).for_each(|(sum, n)| *sum = sum.saturating_add(n));
            }
        }
        DestCounters {
            active: sums[0],
            inactive: sums[1],
            persistent: sums[2],
            stats: api_stats(stats),
            rates: self.0.estimator.rates(&What::Dest(*service, *dest)),
        }
    }
}

/// Of both families' tables, the next buckets'.
fn flows(tables: (&ConnTable<V4>, &ConnTable<V6>), at4: &mut u32, at6: &mut u32) -> (Vec<Flow>, bool) {
    let (end4, end6) = (tables.0.buckets(), tables.1.buckets());
    let found = if *at4 < end4 {
        tables.0.flows(slice(at4, end4)).collect()
    } else {
        tables.1.flows(slice(at6, end6)).collect()
    };
    (found, *at4 >= end4 && *at6 >= end6)
}

/// All connections, read from the tables as they are sent: nothing is held but one chunk.
pub struct ConnectionList {
    id: u64,
    /// Next bucket of CONN4, then of CONN6.
    at4: u32,
    at6: u32,
    /// In the tables that are being left.
    old: bool,
    done: bool,
}

/// Buckets looked at between two looks at the socket.
const BUCKETS: u32 = 4096;

impl ConnectionList {
    fn new(id: u64) -> Self {
        ConnectionList { id, at4: 0, at6: 0, old: false, done: false }
    }

    fn slice(&mut self, d: &mut Director) -> (Vec<Flow>, bool) {
        let maps = &d.dataplane.maps;
        flows((&maps.conns4, &maps.conns6), &mut self.at4, &mut self.at6)
    }

    /// Those that are not in the new tables yet.
    fn old_ones(&mut self, d: &mut Director) -> (Vec<Flow>, bool) {
        let Ok(Some(tables)) = d.dataplane.elder_tables() else { return (Vec::new(), true) };
        let (mut found, done) = flows(tables, &mut self.at4, &mut self.at6);
        let maps = &d.dataplane.maps;
        found.retain(|f| !maps.knows(f));
        (found, done)
    }

    /// The next lines; `None` at the end. Another task may run between two calls.
    pub fn next(&mut self, d: &mut Director) -> Option<Vec<Response>> {
        if self.done {
            return None;
        }
        let maps = &mut d.dataplane.maps;
        if let (Ok(config), Ok(clock)) = (maps.config.get(0), maps.clock.get(0)) {
            maps.conns4.at(&config, &clock);
            maps.conns6.at(&config, &clock);
        }
        let (flows, done) = if self.old { self.old_ones(d) } else { self.slice(d) };
        if done {
            // Those that are still in the tables that are being left come last.
            (self.done, self.old, self.at4, self.at6) = (self.old, true, 0, 0);
        }
        let rows: Vec<ConnRow> = flows.iter().map(|f| row(d, f)).collect();
        let mut lines: Vec<Response> = rows
            .chunks(limits::ROWS_PER_CHUNK)
            .map(|rows| Response { id: self.id, last: false, body: ResponseBody::Connections(rows.to_vec()) })
            .collect();
        if self.done {
            lines.push(Response { id: self.id, last: true, body: ResponseBody::Connections(Vec::new()) });
        }
        Some(lines)
    }
}

fn slice(at: &mut u32, end: u32) -> Range<u32> {
    let from = *at;
    *at = from.saturating_add(BUCKETS).min(end);
    from..*at
}

fn row(d: &Director, f: &Flow) -> ConnRow {
    let address = |bytes: &[u8; 16]| {
        if f.family == 4 { IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]) } else { IpAddr::from(*bytes) }
    };
    let (addr, port) = d.planner.dest_address(f.dest).unwrap_or((address(&[0; 16]), 0));
    ConnRow {
        proto: [0, 6, 17, 132][f.proto as usize & 3],
        template: false,
        state: f.state as u8,
        expires_s: f.seconds_left.saturating_sub(1),
        client: (address(&f.client), f.client_port),
        virt: (address(&f.virtual_address), f.virtual_port),
        dest: (addr, if port == 0 { f.virtual_port } else { port }),
        origin: if f.synced { ConnOrigin::Sync } else { ConnOrigin::Local },
        engine: None,
    }
}
