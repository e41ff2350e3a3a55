//! `ipvsadm`: the stock command of version 1.31 on top of rvsd. Options, output bytes, messages and exit codes are the
//! original's, as its recordings in `testdata/cli` show them; FULLNAT's options come on top.

mod flags;
mod meaning;
mod numbers;
mod order;
mod render;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::{BufRead, Read, Write};

use rvs_control::api::{
    Code, Command, DestRow, Filter, ListRow, Refusal, RequestBody, ResponseBody, ServiceId, ServiceRow,
};

use self::flags::{Flag, LowArgs};
use self::meaning::{Action, Columns, Fail, Format, meaning};
use crate::backend::{Backend, BackendError, Client, unexpected};
use crate::names::Resolver;

pub use render::{forward_name, printable, protocol_name};

/// What stock ipvsadm returns as -1: the kernel refused, or the arguments made no sense to popt.
const EXIT_KERNEL: u8 = 255;
/// No rvsd, or no rights.
const EXIT_NO_IPVS: u8 = 2;
/// A listing of something that is not there, or a feature that the data plane lacks.
const EXIT_REFUSED: u8 = 1;

const VERSION_LINE: &str = "ipvsadm v1.31 2019/12/24 (compiled with popt and IPVS v1.2.1)\n";
const USAGE: &str = include_str!("ipvsadm/usage.txt");

/// Longest line that `-R` takes, bytes. The longest sensible one is some 300.
const RESTORE_LINE_BYTES_MAX: u64 = 64 * 1024;

/// The standard streams.
pub struct Io<'a> {
    pub stdin: &'a mut dyn BufRead,
    pub stdout: &'a mut dyn Write,
    pub stderr: &'a mut dyn Write,
}

/// Why a run ended before its time.
enum Stop {
    Fail(Fail),
    Backend(BackendError),
    /// Nobody reads the output any more.
    Output,
}

impl From<Fail> for Stop {
    fn from(fail: Fail) -> Self {
        Stop::Fail(fail)
    }
}

impl From<BackendError> for Stop {
    fn from(error: BackendError) -> Self {
        Stop::Backend(error)
    }
}

/// Runs one command line and returns its exit code. `args` begins with the program's name.
pub fn run(args: &[String], io: Io<'_>, backend: &mut dyn Backend, resolver: &mut dyn Resolver, is_root: bool) -> u8 {
    let program = args.first().map_or("ipvsadm", String::as_str);
    let Io { stdin, stdout, stderr } = io;
    if !is_root {
        complain(stderr, &cannot_initialize("Permission denied (you must be root)"));
        return EXIT_NO_IPVS;
    }
    let low = LowArgs::split(args.get(1..).unwrap_or_default());
    // Help needs no rvsd; everything else complains about a missing one first, as stock does about a missing module.
    if let Some(text) = low.typed.first().and_then(|first| text_for(first.flag, program)) {
        return if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_ok() { 0 } else { EXIT_REFUSED };
    }
    let client = match Client::open(backend) {
        Ok(client) => client,
        Err(error) => {
            complain(stderr, &connect_message(&error));
            return EXIT_NO_IPVS;
        }
    };
    let mut runner = Runner { program, client, resolver, stdout, stderr };
    let outcome = if args.len() <= 1 { runner.bare() } else { runner.line(&low, Some(stdin)) };
    let outcome = outcome.and_then(|exit| runner.stdout.flush().map(|()| exit).map_err(|_| Stop::Output));
    match outcome {
        Ok(exit) => exit,
        Err(Stop::Output) => EXIT_REFUSED,
        Err(Stop::Fail(fail)) => {
            let _ = runner.stdout.flush();
            complain(runner.stderr, &fail.message);
            fail.exit
        }
        Err(Stop::Backend(error)) => {
            let _ = runner.stdout.flush();
            let (message, exit) = query_message(&error);
            complain(runner.stderr, &message);
            exit
        }
    }
}

/// A line on stderr; if nobody takes it there is nobody to tell.
fn complain(stderr: &mut dyn Write, message: &str) {
    let _ = writeln!(stderr, "{message}");
}

fn text_for(flag: Flag, program: &str) -> Option<String> {
    match flag {
        Flag::Help => Some(format!("{VERSION_LINE}{}", USAGE.replace("{program}", program))),
        Flag::Version => Some(VERSION_LINE.to_owned()),
        _ => None,
    }
}

fn cannot_initialize(reason: &str) -> String {
    format!(
        "Can't initialize ipvs: {reason}\n\
         Are you sure that IP Virtual Server is built in the kernel or as module?"
    )
}

fn connect_message(error: &BackendError) -> String {
    match error {
        BackendError::Permission { .. } => cannot_initialize("Permission denied (you must be root)"),
        other => {
            format!("{}\n{other}: is the service rvsd running?", cannot_initialize("Protocol not available"))
        }
    }
}

/// What to say when a listing can't be had.
fn query_message(error: &BackendError) -> (String, u8) {
    match error {
        BackendError::Refused(refusal) => match refusal.code {
            Code::NoSuchService => ("No such service".into(), EXIT_REFUSED),
            Code::Unsupported => (refusal.reason.clone(), EXIT_REFUSED),
            _ => (refusal.reason.clone(), EXIT_KERNEL),
        },
        other => (other.to_string(), EXIT_KERNEL),
    }
}

/// What stock says to a refused command (`ipvs_strerror`), and the exit code.
fn refusal_message(command: &Command, refusal: &Refusal) -> (String, u8) {
    let about_dest = matches!(command, Command::AddDest { .. } | Command::EditDest { .. } | Command::DelDest { .. });
    let stock = match refusal.code {
        Code::ServiceExists => "Service already exists",
        Code::NoSuchService if about_dest => "Service not defined",
        Code::NoSuchService => "No such service",
        Code::NoSuchModule => "Scheduler or persistence engine not found",
        Code::DestExists => "Destination already exists",
        Code::NoSuchDest => "No such destination",
        Code::Invalid => "Invalid operation.  Possibly wrong module version, address not unicast, ...",
        Code::OutOfRange => "Numerical result out of range",
        Code::NoSuchInterface => "No such device",
        Code::DaemonRuns => "Daemon has already run",
        Code::NoDaemon => "No daemon is running",
        Code::LocalAddressExists => "Local address already exists",
        Code::NoSuchLocalAddress => "No such local address",
        Code::Full => "Memory allocation problem",
        Code::Unsupported | Code::Failed | Code::BadRequest | Code::BadVersion | Code::NotReady => &refusal.reason,
    };
    let exit = if refusal.code == Code::Unsupported { EXIT_REFUSED } else { EXIT_KERNEL };
    (stock.to_owned(), exit)
}

struct Runner<'a> {
    program: &'a str,
    client: Client<'a>,
    resolver: &'a mut dyn Resolver,
    stdout: &'a mut dyn Write,
    stderr: &'a mut dyn Write,
}

impl Runner<'_> {
    /// No arguments at all: the table, with names.
    fn bare(&mut self) -> Result<u8, Stop> {
        self.list_all(Format::default()).map(|()| 0)
    }

    /// One command line. `stdin` is there unless the line came from it.
    fn line(&mut self, low: &LowArgs, stdin: Option<&mut dyn BufRead>) -> Result<u8, Stop> {
        let action = meaning(low, self.program, self.resolver)?;
        self.act(action, stdin)
    }

    fn act(&mut self, action: Action, stdin: Option<&mut dyn BufRead>) -> Result<u8, Stop> {
        match action {
            Action::Command(command) => return self.command(&command),
            Action::Restore => match stdin {
                Some(stdin) => return self.restore(stdin),
                // A restore within a restore would never end.
                None => return Err(Fail::try_help(self.program).into()),
            },
            Action::Text(flag) => self.print(&text_for(flag, self.program).unwrap_or_default())?,
            Action::ListAll(format) => self.list_all(format)?,
            Action::ListOne(id, format) => self.list_one(id, format)?,
            Action::ListConnections(format) => self.list_connections(format)?,
            Action::ListTimeouts => self.list_timeouts()?,
            Action::ListDaemons => self.list_daemons()?,
            Action::ListLocalAddresses(service, format) => self.list_local_addresses(service, format)?,
        }
        Ok(0)
    }

    fn print(&mut self, text: &str) -> Result<(), Stop> {
        self.stdout.write_all(text.as_bytes()).map_err(|_| Stop::Output)
    }

    fn command(&mut self, command: &Command) -> Result<u8, Stop> {
        self.client.start_command(command.clone())?;
        let refusal = self.client.finish_command()?;
        Ok(self.report(command, refusal.as_ref()))
    }

    /// The exit code of a command that was answered; says why if it was refused.
    fn report(&mut self, command: &Command, refusal: Option<&Refusal>) -> u8 {
        let Some(refusal) = refusal else { return 0 };
        let (message, exit) = refusal_message(command, refusal);
        complain(self.stderr, &message);
        exit
    }

    /// Commands from standard input, one a line, until one of them is no command. Commands that are refused don't end
    /// it; the exit code is the last line's.
    fn restore(&mut self, stdin: &mut dyn BufRead) -> Result<u8, Stop> {
        let mut unanswered = VecDeque::new();
        let restored = self.restore_lines(stdin, &mut unanswered);
        // Complaints about the commands before a line come before the complaint about it.
        let answered = self.answer_all(&mut unanswered)?;
        Ok(answered.unwrap_or(restored?))
    }

    /// The exit code of the last line, unless that is one of the `unanswered`.
    fn restore_lines(&mut self, stdin: &mut dyn BufRead, unanswered: &mut VecDeque<Command>) -> Result<u8, Stop> {
        let mut exit = 0;
        while let Some(words) = next_line(stdin)? {
            if words.is_empty() {
                continue;
            }
            let low = LowArgs::split(&words);
            match meaning(&low, self.program, self.resolver) {
                Ok(Action::Command(command)) => {
                    if !self.client.can_send() {
                        self.answer_one(unanswered)?;
                    }
                    self.client.start_command(command.clone())?;
                    unanswered.push_back(command);
                }
                Ok(action) => {
                    // A listing shows what the commands before it did; help ends everything.
                    self.answer_all(unanswered)?;
                    let ends = matches!(action, Action::Text(_));
                    exit = self.act(action, None)?;
                    if ends {
                        return Ok(exit);
                    }
                }
                Err(fail) if fail.goes_on => {
                    self.answer_all(unanswered)?;
                    complain(self.stderr, &fail.message);
                    exit = fail.exit;
                }
                Err(fail) => return Err(fail.into()),
            }
        }
        Ok(exit)
    }

    /// The exit code of the last command that was waiting for its answer, if any was.
    fn answer_all(&mut self, unanswered: &mut VecDeque<Command>) -> Result<Option<u8>, Stop> {
        let mut exit = None;
        while !unanswered.is_empty() {
            exit = Some(self.answer_one(unanswered)?);
        }
        Ok(exit)
    }

    fn answer_one(&mut self, unanswered: &mut VecDeque<Command>) -> Result<u8, Stop> {
        let refusal = self.client.finish_command()?;
        let Some(command) = unanswered.pop_front() else { return Ok(0) };
        Ok(self.report(&command, refusal.as_ref()))
    }

    fn list_all(&mut self, format: Format) -> Result<(), Stop> {
        if format.columns != Columns::Rule {
            let status = self.client.status()?;
            self.print(&render::version_line(&status))?;
        }
        let mut services = self.services(Filter::All)?;
        if !format.nosort {
            services = order::merge_sort(services, |a, b| order::compare_services(&a.0.id, &b.0.id));
        }
        self.print(&render::title(format.columns))?;
        services.into_iter().try_for_each(|(service, dests)| self.print_service(&service, dests, format))
    }

    fn list_one(&mut self, id: ServiceId, format: Format) -> Result<(), Stop> {
        let services = self.services(Filter::One(id))?;
        self.print(&render::title(format.columns))?;
        services.into_iter().try_for_each(|(service, dests)| self.print_service(&service, dests, format))
    }

    fn print_service(&mut self, service: &ServiceRow, dests: Vec<DestRow>, format: Format) -> Result<(), Stop> {
        let dests = if format.nosort {
            dests
        } else {
            order::merge_sort(dests, |a, b| order::compare_dests(&a.dest.id, &b.dest.id))
        };
        let text = render::service(service, &dests, format, self.resolver);
        self.print(&text)
    }

    fn services(&mut self, filter: Filter) -> Result<Vec<(ServiceRow, Vec<DestRow>)>, Stop> {
        let mut services: Vec<(ServiceRow, Vec<DestRow>)> = Vec::new();
        self.client.query(RequestBody::List(filter), |body| {
            let ResponseBody::List(rows) = body else { return Err(unexpected(&body)) };
            for row in rows {
                match row {
                    ListRow::Service(service) => services.push((service, Vec::new())),
                    ListRow::Dest(dest) => match services.last_mut() {
                        Some((_, dests)) => dests.push(dest),
                        None => return Err(BackendError::Garbled("a dest comes before any service".into())),
                    },
                }
            }
            Ok(())
        })?;
        Ok(services)
    }

    fn list_connections(&mut self, format: Format) -> Result<(), Stop> {
        self.print(&render::connections_title(format))?;
        let Runner { client, resolver, stdout, .. } = self;
        let mut unread = false;
        client
            .query(RequestBody::Connections, |body| {
                let ResponseBody::Connections(rows) = body else { return Err(unexpected(&body)) };
                for row in rows {
                    let line = render::connection(&row, format, *resolver);
                    unread = unread || stdout.write_all(line.as_bytes()).is_err();
                }
                // Closing the socket is the only way to end a listing early.
                if unread { Err(BackendError::Closed) } else { Ok(()) }
            })
            .map_err(|error| if unread { Stop::Output } else { error.into() })
    }

    fn list_timeouts(&mut self) -> Result<(), Stop> {
        let mut text = String::new();
        self.client.query(RequestBody::Timeouts, |body| match body {
            ResponseBody::Timeouts(timeouts) => {
                text = render::timeouts(&timeouts);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        self.print(&text)
    }

    fn list_daemons(&mut self) -> Result<(), Stop> {
        let mut text = String::new();
        self.client.query(RequestBody::Daemons, |body| match body {
            ResponseBody::Daemons(rows) => {
                text.extend(rows.iter().map(render::daemon));
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        self.print(&text)
    }

    fn list_local_addresses(&mut self, service: Option<ServiceId>, format: Format) -> Result<(), Stop> {
        let mut rows = Vec::new();
        self.client.query(RequestBody::LocalAddresses(service), |body| match body {
            ResponseBody::LocalAddresses(more) => {
                rows.extend(more);
                Ok(())
            }
            other => Err(unexpected(&other)),
        })?;
        for row in rows {
            let line = render::local_address(&row, format, self.resolver);
            self.print(&line)?;
        }
        Ok(())
    }
}

/// The words of the next line; `None` at the end.
fn next_line(stdin: &mut dyn BufRead) -> Result<Option<Vec<String>>, Stop> {
    let mut line = Vec::new();
    let read = stdin.take(RESTORE_LINE_BYTES_MAX).read_until(b'\n', &mut line);
    let read = read.map_err(|e| Fail {
        message: format!("can't read standard input: {e}"),
        exit: EXIT_KERNEL,
        goes_on: false,
    })?;
    if read == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') && read as u64 == RESTORE_LINE_BYTES_MAX {
        let message = format!("a line on standard input is longer than {RESTORE_LINE_BYTES_MAX} bytes");
        return Err(Fail { message, exit: EXIT_KERNEL, goes_on: false }.into());
    }
    let text = String::from_utf8_lossy(&line);
    Ok(Some(text.split_ascii_whitespace().map(str::to_owned).collect()))
}
