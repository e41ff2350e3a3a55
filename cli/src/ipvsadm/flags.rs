//! The one table of commands and options, and the splitting of arguments by it, the way popt does it: what was typed,
//! nothing about what it means.

/// Every flag of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flag {
    // Commands.
    AddService,
    EditService,
    DelService,
    Clear,
    List,
    Zero,
    AddServer,
    EditServer,
    DelServer,
    Set,
    Help,
    Version,
    Restore,
    Save,
    StartDaemon,
    StopDaemon,
    AddLocalAddress,
    DelLocalAddress,
    GetLocalAddresses,
    // Options.
    TcpService,
    UdpService,
    SctpService,
    FwmarkService,
    Scheduler,
    Persistent,
    Netmask,
    RealServer,
    Masquerading,
    Ipip,
    Gatewaying,
    Fullnat,
    Weight,
    UThreshold,
    LThreshold,
    Numeric,
    Connection,
    McastInterface,
    Syncid,
    Timeout,
    Daemon,
    Stats,
    Rate,
    Thresholds,
    PersistentConn,
    Nosort,
    Sort,
    Exact,
    Ipv6,
    Ops,
    Pe,
    SchedFlags,
    McastGroup,
    McastPort,
    McastTtl,
    SyncMaxlen,
    TunInfo,
    TunType,
    TunPort,
    TunNocsum,
    TunCsum,
    TunRemcsum,
    LocalAddress,
}

/// Whether a flag has a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    No,
    Yes,
    /// Taken from the next argument unless that begins with a dash.
    Maybe,
}

struct Spec {
    flag: Flag,
    long: &'static str,
    short: Option<char>,
    value: Value,
}

const fn spec(flag: Flag, long: &'static str, short: Option<char>, value: Value) -> Spec {
    Spec { flag, long, short, value }
}

/// ipvsadm 1.31's table, then what FULLNAT adds. A long name that is here twice is the first one's.
const SPECS: &[Spec] = &[
    spec(Flag::AddService, "add-service", Some('A'), Value::No),
    spec(Flag::EditService, "edit-service", Some('E'), Value::No),
    spec(Flag::DelService, "delete-service", Some('D'), Value::No),
    spec(Flag::Clear, "clear", Some('C'), Value::No),
    spec(Flag::List, "list", Some('L'), Value::No),
    spec(Flag::List, "list", Some('l'), Value::No),
    spec(Flag::Zero, "zero", Some('Z'), Value::No),
    spec(Flag::AddServer, "add-server", Some('a'), Value::No),
    spec(Flag::EditServer, "edit-server", Some('e'), Value::No),
    spec(Flag::DelServer, "delete-server", Some('d'), Value::No),
    spec(Flag::Set, "set", None, Value::No),
    spec(Flag::Help, "help", Some('h'), Value::No),
    spec(Flag::Version, "version", Some('v'), Value::No),
    spec(Flag::Restore, "restore", Some('R'), Value::No),
    spec(Flag::Save, "save", Some('S'), Value::No),
    spec(Flag::StartDaemon, "start-daemon", None, Value::Yes),
    spec(Flag::StopDaemon, "stop-daemon", None, Value::Yes),
    spec(Flag::TcpService, "tcp-service", Some('t'), Value::Yes),
    spec(Flag::UdpService, "udp-service", Some('u'), Value::Yes),
    spec(Flag::SctpService, "sctp-service", None, Value::Yes),
    spec(Flag::FwmarkService, "fwmark-service", Some('f'), Value::Yes),
    spec(Flag::Scheduler, "scheduler", Some('s'), Value::Yes),
    spec(Flag::Persistent, "persistent", Some('p'), Value::Maybe),
    spec(Flag::Netmask, "netmask", Some('M'), Value::Yes),
    spec(Flag::RealServer, "real-server", Some('r'), Value::Yes),
    spec(Flag::Masquerading, "masquerading", Some('m'), Value::No),
    spec(Flag::Ipip, "ipip", Some('i'), Value::No),
    spec(Flag::Gatewaying, "gatewaying", Some('g'), Value::No),
    spec(Flag::Weight, "weight", Some('w'), Value::Yes),
    spec(Flag::UThreshold, "u-threshold", Some('x'), Value::Yes),
    spec(Flag::LThreshold, "l-threshold", Some('y'), Value::Yes),
    spec(Flag::Numeric, "numeric", Some('n'), Value::No),
    spec(Flag::Connection, "connection", Some('c'), Value::No),
    spec(Flag::McastInterface, "mcast-interface", None, Value::Yes),
    spec(Flag::Syncid, "syncid", None, Value::Yes),
    spec(Flag::Timeout, "timeout", None, Value::No),
    spec(Flag::Daemon, "daemon", None, Value::No),
    spec(Flag::Stats, "stats", None, Value::No),
    spec(Flag::Rate, "rate", None, Value::No),
    spec(Flag::Thresholds, "thresholds", None, Value::No),
    spec(Flag::PersistentConn, "persistent-conn", None, Value::No),
    spec(Flag::Nosort, "nosort", None, Value::No),
    spec(Flag::Sort, "sort", None, Value::No),
    spec(Flag::Exact, "exact", Some('X'), Value::No),
    spec(Flag::Ipv6, "ipv6", Some('6'), Value::No),
    spec(Flag::Ops, "ops", Some('o'), Value::No),
    spec(Flag::Pe, "pe", None, Value::Yes),
    spec(Flag::SchedFlags, "sched-flags", Some('b'), Value::Yes),
    spec(Flag::McastGroup, "mcast-group", None, Value::Yes),
    spec(Flag::McastPort, "mcast-port", None, Value::Yes),
    spec(Flag::McastTtl, "mcast-ttl", None, Value::Yes),
    spec(Flag::SyncMaxlen, "sync-maxlen", None, Value::Yes),
    spec(Flag::TunInfo, "tun-info", None, Value::No),
    spec(Flag::TunType, "tun-type", None, Value::Yes),
    spec(Flag::TunPort, "tun-port", None, Value::Yes),
    spec(Flag::TunNocsum, "tun-nocsum", None, Value::No),
    spec(Flag::TunCsum, "tun-csum", None, Value::No),
    spec(Flag::TunRemcsum, "tun-remcsum", None, Value::No),
    spec(Flag::Fullnat, "fullnat", None, Value::No),
    spec(Flag::AddLocalAddress, "add-laddr", Some('P'), Value::No),
    spec(Flag::DelLocalAddress, "del-laddr", Some('Q'), Value::No),
    spec(Flag::GetLocalAddresses, "get-laddr", Some('G'), Value::No),
    spec(Flag::LocalAddress, "local-address", Some('z'), Value::Yes),
];

/// `-b` beside -a and -e, as the FULLNAT kernel's ipvsadm has it; elsewhere it is the stock `--sched-flags`.
const FULLNAT_SHORT: Spec = spec(Flag::Fullnat, "fullnat", Some('b'), Value::No);

/// A flag as it was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Typed {
    pub flag: Flag,
    pub value: Option<String>,
    /// The argument it stands in, for messages.
    pub argument: String,
}

/// Why splitting stopped (popt's texts).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadArgument {
    pub argument: String,
    pub reason: &'static str,
}

/// The arguments, split. After an error, `typed` holds the flags before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LowArgs {
    pub typed: Vec<Typed>,
    pub error: Option<BadArgument>,
    /// Arguments that are no flags and no values.
    pub rest: Vec<String>,
}

impl LowArgs {
    /// Splits the arguments after the program's name.
    pub fn split(args: &[String]) -> Self {
        let mut low = LowArgs::default();
        let mut splitter = Splitter { args, next: 0 };
        let mut only_rest = false;
        while let Some(argument) = splitter.take() {
            if only_rest || !argument.starts_with('-') || argument == "-" {
                low.rest.push(argument.to_owned());
            } else if argument == "--" {
                only_rest = true;
            } else {
                let outcome = match argument.strip_prefix("--") {
                    Some(long) => splitter.long(argument, long, &mut low),
                    None => splitter.shorts(argument, &mut low),
                };
                if let Err(reason) = outcome {
                    low.error = Some(BadArgument { argument: argument.to_owned(), reason });
                    break;
                }
            }
        }
        low
    }
}

const UNKNOWN: &str = "unknown option";
const NO_VALUE: &str = "missing argument";
const UNWANTED_VALUE: &str = "option does not take an argument";

struct Splitter<'a> {
    args: &'a [String],
    next: usize,
}

impl<'a> Splitter<'a> {
    fn take(&mut self) -> Option<&'a str> {
        let argument = self.args.get(self.next)?;
        self.next += 1;
        Some(argument)
    }

    fn long(&mut self, argument: &str, long: &str, low: &mut LowArgs) -> Result<(), &'static str> {
        let (name, attached) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (long, None),
        };
        let spec = SPECS.iter().find(|s| s.long == name).ok_or(UNKNOWN)?;
        if spec.value == Value::No && attached.is_some() {
            return Err(UNWANTED_VALUE);
        }
        let value = match attached {
            Some(value) => Some(value.to_owned()),
            None => self.value_for(spec)?,
        };
        low.typed.push(Typed { flag: spec.flag, value, argument: argument.to_owned() });
        Ok(())
    }

    /// One argument of short flags: `-Ln`, `-w5`, `-w=5`.
    fn shorts(&mut self, argument: &str, low: &mut LowArgs) -> Result<(), &'static str> {
        let mut chars = argument.chars();
        chars.next();
        while let Some(short) = chars.next() {
            let spec = find_short(short, low).ok_or(UNKNOWN)?;
            let attached = chars.as_str();
            let text = attached.strip_prefix('=').unwrap_or(attached);
            let value = if spec.value == Value::No {
                chars = text.chars();
                None
            } else if attached.is_empty() {
                self.value_for(spec)?
            } else {
                chars = "".chars();
                Some(text.to_owned())
            };
            low.typed.push(Typed { flag: spec.flag, value, argument: argument.to_owned() });
            // popt looks for a flag behind the equals sign.
            if spec.value == Value::No && attached == "=" {
                return Err(UNKNOWN);
            }
        }
        Ok(())
    }

    fn value_for(&mut self, spec: &Spec) -> Result<Option<String>, &'static str> {
        match (spec.value, self.args.get(self.next)) {
            (Value::No, _) | (Value::Maybe, None) => Ok(None),
            (Value::Yes, None) => Err(NO_VALUE),
            (Value::Maybe, Some(next)) if next.starts_with('-') => Ok(None),
            (Value::Yes | Value::Maybe, Some(next)) => {
                self.next += 1;
                Ok(Some(next.clone()))
            }
        }
    }
}

fn find_short(short: char, low: &LowArgs) -> Option<&'static Spec> {
    let about_server = matches!(low.typed.first(), Some(t) if matches!(t.flag, Flag::AddServer | Flag::EditServer));
    if short == 'b' && about_server {
        return Some(&FULLNAT_SHORT);
    }
    SPECS.iter().find(|s| s.short == Some(short))
}

/// What an option is called in messages, in the order that they are checked. Several flags share one name: only one
/// of them may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Opt {
    Numeric,
    Connection,
    Service,
    Scheduler,
    Persistent,
    Netmask,
    Server,
    Forward,
    Weight,
    UThreshold,
    LThreshold,
    McastInterface,
    Timeout,
    Daemon,
    Stats,
    Rate,
    Thresholds,
    PersistentConn,
    Nosort,
    Syncid,
    Exact,
    Ops,
    Pe,
    SchedFlags,
    McastGroup,
    McastPort,
    McastTtl,
    SyncMaxlen,
    TunInfo,
    TunType,
    TunPort,
    TunNocsum,
    TunCsum,
    TunRemcsum,
    LocalAddress,
}

impl Opt {
    pub const ALL: [Opt; 35] = [
        Opt::Numeric,
        Opt::Connection,
        Opt::Service,
        Opt::Scheduler,
        Opt::Persistent,
        Opt::Netmask,
        Opt::Server,
        Opt::Forward,
        Opt::Weight,
        Opt::UThreshold,
        Opt::LThreshold,
        Opt::McastInterface,
        Opt::Timeout,
        Opt::Daemon,
        Opt::Stats,
        Opt::Rate,
        Opt::Thresholds,
        Opt::PersistentConn,
        Opt::Nosort,
        Opt::Syncid,
        Opt::Exact,
        Opt::Ops,
        Opt::Pe,
        Opt::SchedFlags,
        Opt::McastGroup,
        Opt::McastPort,
        Opt::McastTtl,
        Opt::SyncMaxlen,
        Opt::TunInfo,
        Opt::TunType,
        Opt::TunPort,
        Opt::TunNocsum,
        Opt::TunCsum,
        Opt::TunRemcsum,
        Opt::LocalAddress,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Opt::Numeric => "numeric",
            Opt::Connection => "connection",
            Opt::Service => "service-address",
            Opt::Scheduler => "scheduler",
            Opt::Persistent => "persistent",
            Opt::Netmask => "netmask",
            Opt::Server => "real-server",
            Opt::Forward => "forwarding-method",
            Opt::Weight => "weight",
            Opt::UThreshold => "u-threshold",
            Opt::LThreshold => "l-threshold",
            Opt::McastInterface => "mcast-interface",
            Opt::Timeout => "timeout",
            Opt::Daemon => "daemon",
            Opt::Stats => "stats",
            Opt::Rate => "rate",
            Opt::Thresholds => "thresholds",
            Opt::PersistentConn => "persistent-conn",
            Opt::Nosort => "nosort",
            Opt::Syncid => "syncid",
            Opt::Exact => "exact",
            Opt::Ops => "ops",
            Opt::Pe => "pe",
            Opt::SchedFlags => "sched-flags",
            Opt::McastGroup => "mcast-group",
            Opt::McastPort => "mcast-port",
            Opt::McastTtl => "mcast-ttl",
            Opt::SyncMaxlen => "sync-maxlen",
            Opt::TunInfo => "tun-info",
            Opt::TunType => "tun-type",
            Opt::TunPort => "tun-port",
            Opt::TunNocsum => "tun-nocsum",
            Opt::TunCsum => "tun-csum",
            Opt::TunRemcsum => "tun-remcsum",
            Opt::LocalAddress => "local-address",
        }
    }
}

impl Flag {
    /// The option that a flag counts as. `-6` and `--sort` are never counted.
    pub const fn opt(self) -> Option<Opt> {
        Some(match self {
            Flag::Numeric => Opt::Numeric,
            Flag::Connection => Opt::Connection,
            Flag::TcpService | Flag::UdpService | Flag::SctpService | Flag::FwmarkService => Opt::Service,
            Flag::Scheduler => Opt::Scheduler,
            Flag::Persistent => Opt::Persistent,
            Flag::Netmask => Opt::Netmask,
            Flag::RealServer => Opt::Server,
            Flag::Masquerading | Flag::Ipip | Flag::Gatewaying | Flag::Fullnat => Opt::Forward,
            Flag::Weight => Opt::Weight,
            Flag::UThreshold => Opt::UThreshold,
            Flag::LThreshold => Opt::LThreshold,
            Flag::McastInterface => Opt::McastInterface,
            Flag::Timeout => Opt::Timeout,
            Flag::Daemon => Opt::Daemon,
            Flag::Stats => Opt::Stats,
            Flag::Rate => Opt::Rate,
            Flag::Thresholds => Opt::Thresholds,
            Flag::PersistentConn => Opt::PersistentConn,
            Flag::Nosort => Opt::Nosort,
            Flag::Syncid => Opt::Syncid,
            Flag::Exact => Opt::Exact,
            Flag::Ops => Opt::Ops,
            Flag::Pe => Opt::Pe,
            Flag::SchedFlags => Opt::SchedFlags,
            Flag::McastGroup => Opt::McastGroup,
            Flag::McastPort => Opt::McastPort,
            Flag::McastTtl => Opt::McastTtl,
            Flag::SyncMaxlen => Opt::SyncMaxlen,
            Flag::TunInfo => Opt::TunInfo,
            Flag::TunType => Opt::TunType,
            Flag::TunPort => Opt::TunPort,
            Flag::TunNocsum => Opt::TunNocsum,
            Flag::TunCsum => Opt::TunCsum,
            Flag::TunRemcsum => Opt::TunRemcsum,
            Flag::LocalAddress => Opt::LocalAddress,
            _ => return None,
        })
    }

    /// What a command is called in messages; `None` for an option.
    pub const fn command_name(self) -> Option<&'static str> {
        Some(match self {
            Flag::AddService => "add-service",
            Flag::EditService => "edit-service",
            Flag::DelService => "delete-service",
            Flag::Clear => "flush",
            Flag::List => "list",
            Flag::AddServer => "add-server",
            Flag::DelServer => "delete-server",
            Flag::EditServer => "edit-server",
            Flag::Set => "set",
            Flag::StartDaemon => "start-daemon",
            Flag::StopDaemon => "stop-daemon",
            Flag::Restore => "restore",
            Flag::Save => "save",
            Flag::Zero => "zero",
            Flag::AddLocalAddress => "add-laddr",
            Flag::DelLocalAddress => "del-laddr",
            Flag::GetLocalAddresses => "get-laddr",
            _ => return None,
        })
    }

    /// How an option goes with this command.
    pub const fn rule(self, opt: Opt) -> Rule {
        match (self, opt) {
            (Flag::AddService | Flag::EditService | Flag::DelService, Opt::Service)
            | (Flag::AddServer | Flag::EditServer | Flag::DelServer, Opt::Service | Opt::Server)
            | (Flag::AddLocalAddress | Flag::DelLocalAddress, Opt::Service | Opt::LocalAddress) => Rule::Needed,
            (Flag::List, Opt::Connection | Opt::Service | Opt::Timeout | Opt::Daemon) => Rule::OneOf,
            (
                Flag::AddService | Flag::EditService,
                Opt::Scheduler | Opt::Persistent | Opt::Netmask | Opt::Ops | Opt::Pe | Opt::SchedFlags,
            )
            | (
                Flag::AddServer | Flag::EditServer,
                Opt::Forward
                | Opt::Weight
                | Opt::UThreshold
                | Opt::LThreshold
                | Opt::TunType
                | Opt::TunPort
                | Opt::TunNocsum
                | Opt::TunCsum
                | Opt::TunRemcsum,
            )
            | (
                Flag::List,
                Opt::Numeric
                | Opt::Stats
                | Opt::Rate
                | Opt::Thresholds
                | Opt::PersistentConn
                | Opt::Nosort
                | Opt::Exact
                | Opt::TunInfo,
            )
            | (
                Flag::StartDaemon,
                Opt::McastInterface | Opt::Syncid | Opt::McastGroup | Opt::McastPort | Opt::McastTtl | Opt::SyncMaxlen,
            )
            | (Flag::StopDaemon, Opt::Syncid)
            | (Flag::Save | Flag::GetLocalAddresses, Opt::Numeric)
            | (Flag::Zero | Flag::GetLocalAddresses, Opt::Service) => Rule::Allowed,
            _ => Rule::Illegal,
        }
    }
}

/// How an option goes with a command, or with a tunnel type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    Needed,
    Allowed,
    /// At most one of those that have this rule.
    OneOf,
    Illegal,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(line: &str) -> LowArgs {
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        LowArgs::split(&args)
    }

    fn flags(line: &str) -> Vec<(Flag, Option<String>)> {
        let low = split(line);
        assert_eq!(low.error, None, "{line}");
        low.typed.into_iter().map(|t| (t.flag, t.value)).collect()
    }

    #[test]
    fn values_come_attached_or_next() {
        for line in ["-a -w 5", "-a -w5", "-a -w=5", "-aw5", "-a --weight 5", "-a --weight=5"] {
            assert_eq!(flags(line), [(Flag::AddServer, None), (Flag::Weight, Some("5".into()))], "{line}");
        }
    }

    #[test]
    fn persistent_takes_a_value_only_if_it_is_no_flag() {
        assert_eq!(flags("-p 50"), [(Flag::Persistent, Some("50".into()))]);
        assert_eq!(flags("-p"), [(Flag::Persistent, None)]);
        assert_eq!(flags("-p -n"), [(Flag::Persistent, None), (Flag::Numeric, None)]);
        assert_eq!(flags("-p "), [(Flag::Persistent, Some(String::new()))]);
        assert_eq!(flags("-w= 5"), [(Flag::Weight, Some(String::new()))], "the 5 is a word of its own");
        assert_eq!(flags("-n=c"), [(Flag::Numeric, None), (Flag::Connection, None)]);
    }

    #[test]
    fn errors_name_the_argument() {
        let bad = |line: &str| split(line).error.map(|e| format!("{}: {}", e.argument, e.reason));
        assert_eq!(bad("-A -1").as_deref(), Some("-1: unknown option"));
        assert_eq!(bad("-A --nosuch=3").as_deref(), Some("--nosuch=3: unknown option"));
        assert_eq!(bad("-a -w").as_deref(), Some("-w: missing argument"));
        assert_eq!(bad("-Lnw").as_deref(), Some("-Lnw: missing argument"));
        assert_eq!(bad("-L --stats=yes").as_deref(), Some("--stats=yes: option does not take an argument"));
        assert_eq!(bad("-L -n=").as_deref(), Some("-n=: unknown option"));
        assert_eq!(bad("-L --stat").as_deref(), Some("--stat: unknown option"), "no abbreviations");
    }

    #[test]
    fn words_are_kept_apart() {
        let low = split("--set 1 2 -- -3 -");
        assert_eq!(low.rest, ["1", "2", "-3", "-"]);
        assert_eq!(low.typed.len(), 1);
    }

    #[test]
    fn b_is_fullnat_for_servers_and_scheduler_flags_for_services() {
        assert_eq!(flags("-a -b"), [(Flag::AddServer, None), (Flag::Fullnat, None)]);
        assert_eq!(flags("-A -b flag-1"), [(Flag::AddService, None), (Flag::SchedFlags, Some("flag-1".into()))]);
    }

    #[test]
    fn every_option_has_a_flag() {
        for opt in Opt::ALL {
            assert!(SPECS.iter().any(|s| s.flag.opt() == Some(opt)), "{opt:?}");
        }
    }
}
