//! `rvs conntable`: how full the connection tables are, and tables of another size, while packets come.

use std::io::Write;
use std::time::Duration;

use rvs_control::api::{RequestBody, Resize, ResponseBody, StateRow, TableRow, TablesReport};

use super::Error;
use super::show::{put, put_json};
use crate::backend::{BackendError, Client, unexpected};

#[derive(Debug, clap::Subcommand)]
pub enum Args {
    /// Size, connections by state and by what would go first, memory
    Show {
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Move all connections to tables of another size
    Resize {
        /// IPv4 connections that the table is to hold at half load (by NAT each counts twice); as it is, if left out
        flows: Option<u32>,
        /// IPv6 connections
        #[arg(long, value_name = "FLOWS")]
        ipv6: Option<u32>,
        /// Do not wait until all are moved
        #[arg(long)]
        no_wait: bool,
    },
}

pub fn run(args: &Args, client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    match *args {
        Args::Show { json } => {
            let report = report(client)?;
            if json { put_json(stdout, &report) } else { put(stdout, &text(&report)) }
        }
        Args::Resize { flows: None, ipv6: None, .. } => {
            Err(Error::Usage("how many connections are the tables to hold? FLOWS, --ipv6 FLOWS, or both".into()))
        }
        Args::Resize { flows, ipv6, no_wait } => {
            client.query(RequestBody::Resize(Resize { ipv4: flows, ipv6 }), |body| match body {
                ResponseBody::Done => Ok(()),
                other => Err(unexpected(&other)),
            })?;
            if no_wait { Ok(()) } else { wait(client) }
        }
    }
}

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(50);

/// Until all connections are moved.
fn wait(client: &mut Client<'_>) -> Result<(), Error> {
    while report(client)?.moving.is_some() {
        std::thread::park_timeout(LOOK);
    }
    Ok(())
}

pub(super) fn report(client: &mut Client<'_>) -> Result<TablesReport, BackendError> {
    let mut report = None;
    client.query(RequestBody::Tables, |body| match body {
        ResponseBody::Tables(found) => {
            report = Some(*found);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    report.ok_or_else(|| unexpected(&ResponseBody::Done))
}

fn text(report: &TablesReport) -> String {
    let mut text: String = report.tables.iter().map(table).collect();
    if let Some(moving) = &report.moving {
        text.push_str(&format!("moving: {} connections moved, {} left in the old tables", moving.moved, moving.left));
        if moving.stuck > 0 {
            text.push_str(&format!(", of which {} can't be moved and stay there until they end", moving.stuck));
        }
        text.push('\n');
    }
    text
}

fn table(row: &TableRow) -> String {
    let fill = f64::from(row.entries) * 100.0 / f64::from(row.places.max(1));
    let mut text = format!(
        "IPv{}: {} places ({} connections at half load), {} MiB\n  connections {}, entries {} ({fill:.1}% full), evicted {}\n",
        row.family,
        row.places,
        row.flows_at_half_load,
        row.memory >> 20,
        row.flows,
        row.entries,
        row.evicted
    );
    for (title, rows) in [("by state", &row.states), ("who goes first", &row.classes)] {
        if !rows.is_empty() {
            let all: Vec<String> = rows.iter().map(|StateRow { name, flows }| format!("{name} {flows}")).collect();
            text.push_str(&format!("  {title}: {}\n", all.join(", ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvs_control::api::TablesMove;

    #[test]
    fn tables_as_text() {
        let state = |name: &str, flows| StateRow { name: name.into(), flows };
        let row = TableRow {
            family: 4,
            places: 2_097_152,
            flows_at_half_load: 1_048_576,
            entries: 600,
            flows: 300,
            memory: 32 << 20,
            evicted: 2,
            states: vec![state("TCP ESTABLISHED", 299), state("UDP", 1)],
            classes: vec![state("udp", 1), state("in use", 299)],
        };
        let report = TablesReport { tables: vec![row], moving: Some(TablesMove { moved: 7, left: 3, stuck: 1 }) };
        let should_be = "IPv4: 2097152 places (1048576 connections at half load), 32 MiB
  connections 300, entries 600 (0.0% full), evicted 2
  by state: TCP ESTABLISHED 299, UDP 1
  who goes first: udp 1, in use 299
moving: 7 connections moved, 3 left in the old tables, of which 1 can't be moved and stay there until they end
";
        assert_eq!(text(&report), should_be);
    }
}
