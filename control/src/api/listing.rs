//! From the model and the data plane's counters to the rows of a listing, lazily: nothing here holds a whole table.

use std::iter::Peekable;

use super::{
    Code, DaemonRow, DefenceRow, DestRow, Filter, ListRow, LocalAddressRow, Rates, Refusal, Response, ResponseBody,
    ServiceRow, SettingRow, Stats,
};
use crate::limits;
use crate::model::{DaemonRole, Dest, DestKey, Model, Service, ServiceKey};

/// What the data plane counts for a dest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DestCounters {
    pub active: u32,
    pub inactive: u32,
    pub persistent: u32,
    pub stats: Stats,
    pub rates: Rates,
}

/// What the data plane counts; asked for row by row while a listing is written.
pub trait Counters {
    fn service(&self, service: &ServiceKey) -> (Stats, Rates);
    fn dest(&self, service: &ServiceKey, dest: &DestKey) -> DestCounters;
}

/// The rows that a filter asks for: each service with its dests, oldest service and newest dest first.
pub fn list<'a>(
    model: &'a Model,
    filter: &Filter,
    counters: &'a dyn Counters,
) -> Result<impl Iterator<Item = ListRow> + 'a, Refusal> {
    let (one, all) = match filter {
        Filter::All => (None, Some(model.services_by_age())),
        Filter::One(id) => {
            let key = ServiceKey::from(*id);
            let service = model.service(&key).ok_or_else(|| Refusal::new(Code::NoSuchService, "no such service"))?;
            (Some((key, service)), None)
        }
    };
    let all = all.into_iter().flatten().map(|(key, service)| (*key, service));
    Ok(one.into_iter().chain(all).flat_map(move |(key, service)| service_rows(key, service, counters)))
}

fn service_rows<'a>(
    key: ServiceKey,
    service: &'a Service,
    counters: &'a dyn Counters,
) -> impl Iterator<Item = ListRow> + 'a {
    let (stats, rates) = counters.service(&key);
    let row = ServiceRow { id: key.into(), spec: (&service.config).into(), stats, rates };
    let dests = service.dests().map(move |dest| ListRow::Dest(dest_row(&key, dest, counters)));
    std::iter::once(ListRow::Service(row)).chain(dests)
}

fn dest_row(service: &ServiceKey, dest: &Dest, counters: &dyn Counters) -> DestRow {
    let DestCounters { active, inactive, persistent, stats, rates } = counters.dest(service, &dest.key);
    DestRow { dest: dest.into(), active, inactive, persistent, stats, rates }
}

/// The sync daemons that run, the master first.
pub fn daemons(model: &Model) -> Vec<DaemonRow> {
    let roles = [DaemonRole::Master, DaemonRole::Backup];
    roles.into_iter().filter_map(|role| model.daemon(role).map(|daemon| DaemonRow::new(role, daemon))).collect()
}

/// FULLNAT's local addresses, of one service or of all.
pub fn local_addresses(model: &Model, service: Option<ServiceKey>) -> impl Iterator<Item = LocalAddressRow> {
    let services = model.services().filter(move |(key, _)| service.is_none_or(|asked| asked == **key));
    services.flat_map(|(key, service)| {
        service.local_addresses.iter().map(|addr| LocalAddressRow { service: (*key).into(), addr: *addr })
    })
}

/// What services have that `ipvsadm` does not know of, of one or of all. `work`: do its cookies?
pub fn defences(
    model: &Model,
    service: Option<ServiceKey>,
    work: impl Fn(&ServiceKey) -> bool,
) -> impl Iterator<Item = DefenceRow> {
    let services = model.services_by_age().filter(move |(key, _)| service.is_none_or(|asked| asked == **key));
    services.map(move |(key, service)| DefenceRow {
        service: (*key).into(),
        defence: service.defence.into(),
        cookies_work: work(key),
        proxy: service.proxy,
    })
}

/// All settings of the whole director.
pub fn settings(model: &Model) -> Vec<SettingRow> {
    let row = |(number, s): (usize, crate::settings::Setting)| SettingRow {
        name: s.name.to_owned(),
        value: model.settings().get(number),
        default: s.default,
        most: s.most,
        text: s.text.to_owned(),
    };
    crate::settings::ALL.into_iter().enumerate().map(row).collect()
}

/// The lines of an answer made of rows: at most [`limits::ROWS_PER_CHUNK`] rows each, the last one marked; no rows are
/// one empty line.
pub fn in_chunks<T, R: Iterator<Item = T>>(id: u64, rows: R, body: fn(Vec<T>) -> ResponseBody) -> Chunks<T, R> {
    Chunks { id, rows: Some(rows.peekable()), body }
}

/// See [`in_chunks`].
pub struct Chunks<T, R: Iterator<Item = T>> {
    id: u64,
    rows: Option<Peekable<R>>,
    body: fn(Vec<T>) -> ResponseBody,
}

impl<T, R: Iterator<Item = T>> Iterator for Chunks<T, R> {
    type Item = Response;

    fn next(&mut self) -> Option<Response> {
        let mut rows = self.rows.take()?;
        let chunk: Vec<T> = rows.by_ref().take(limits::ROWS_PER_CHUNK).collect();
        let last = rows.peek().is_none();
        if !last {
            self.rows = Some(rows);
        }
        Some(Response { id: self.id, last, body: (self.body)(chunk) })
    }
}
