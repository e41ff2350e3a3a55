//! `rvs set`: the settings of the whole director, by the kernel's names (`net.ipv4.vs.*`).

use std::io::Write;

use rvs_control::api::{Command, RequestBody, ResponseBody, SettingRow};

use super::Error;
use super::show::{put, put_json};
use crate::backend::{BackendError, Client, unexpected};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A setting; without a value it is shown
    name: Option<String>,
    /// Its new value
    value: Option<u32>,
    /// Print a JSON array of {"name", "value", "default", "most", "text"}
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, client: &mut Client<'_>, stdout: &mut dyn Write) -> Result<(), Error> {
    if let (Some(name), Some(value)) = (&args.name, args.value) {
        client.start_command(Command::Set { name: name.clone(), value })?;
        return match client.finish_command()? {
            None => Ok(()),
            Some(refusal) => Err(BackendError::Refused(refusal).into()),
        };
    }
    let mut rows = Vec::new();
    client.query(RequestBody::Settings, |body| match body {
        ResponseBody::Settings(more) => {
            rows.extend(more);
            Ok(())
        }
        other => Err(unexpected(&other)),
    })?;
    if let Some(name) = &args.name {
        let names: Vec<String> = rows.iter().map(|row| row.name.clone()).collect();
        rows.retain(|row| row.name == *name);
        if rows.is_empty() {
            return Err(Error::Usage(format!("no setting is called `{name}`: {}", names.join(", "))));
        }
    }
    if args.json { put_json(stdout, &rows) } else { put(stdout, &table(&rows)) }
}

/// `drop_entry    0  (0)  take half-open ...`: name, value, default, what it is.
fn table(rows: &[SettingRow]) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    rows.iter()
        .map(|row| format!("{:<width$} {:>6}  (default {})  {}\n", row.name, row.value, row.default, row.text))
        .collect()
}
