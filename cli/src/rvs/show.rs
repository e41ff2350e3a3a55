//! `rvs drops` and `rvs status`.

use std::io::Write;

use rvs_control::api::{RequestBody, ResponseBody, Status};
use serde::Serialize;

use super::Error;
use crate::backend::{Client, unexpected};

/// A table of the reasons for which packets were dropped. Reasons with no packet are left out of the table, not out of
/// the JSON.
pub fn drops(json: bool, client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    let mut rows = Vec::new();
    client.query(RequestBody::Drops, |body| match body {
        ResponseBody::Drops(more) => {
            rows.extend(more);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    if json {
        return put_json(stdout, &rows);
    }
    let width = rows.iter().map(|row| row.reason.len()).chain(["reason".len()]).max().unwrap_or(0);
    put(stdout, &format!("{:<width$} {:>12}\n", "reason", "packets"))?;
    for row in rows.iter().filter(|row| row.packets > 0) {
        put(stdout, &format!("{:<width$} {:>12}\n", row.reason, row.packets))?;
    }
    Ok(())
}

pub fn status(json: bool, client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    let status = client.status()?;
    if json { put_json(stdout, &status) } else { put(stdout, &status_text(&status)) }
}

fn status_text(status: &Status) -> String {
    let ready = if status.ready { "ready" } else { "not ready" };
    let mut text = format!(
        "rvsd {} {ready}, process {}, up {} s\nservices {}, real servers {}, connections {} (table size {})\n",
        status.rvsd,
        status.pid,
        status.uptime_s,
        status.services,
        status.dests,
        status.connections,
        status.conn_table_size
    );
    if status.thinned > 0 {
        text.push_str(&format!("connections taken by drop_entry {}\n", status.thinned));
    }
    for interface in &status.interfaces {
        text.push_str(&format!("interface {interface}\n"));
    }
    for warning in &status.warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    text
}

pub fn put(stdout: &mut dyn Write, text: &str) -> Result<(), Error> {
    stdout.write_all(text.as_bytes()).map_err(Error::Output)
}

pub fn put_json<T: Serialize>(stdout: &mut dyn Write, value: &T) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(value).map_err(Error::Json)?;
    text.push('\n');
    put(stdout, &text)
}
