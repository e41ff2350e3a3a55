//! Integers under /proc/sys, with the value they had before for undo. /proc/sys/net shows the namespace of the thread
//! that opens it.

use std::fs;
use std::io;
use std::path::PathBuf;

/// A failed read or write, with the setting's name as sysctl(8) takes it.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    #[error("cannot read {key}: {source}")]
    Read { key: String, source: io::Error },
    #[error("cannot set {key} to {value}: {source}")]
    Write { key: String, value: i64, source: io::Error },
    #[error("{key} holds {text:?}, not a number")]
    NotANumber { key: String, text: String },
    #[error(
        "{key:?} is not the name of a setting: want components of /proc/sys, such as net/ipv4/conf/eth0/arp_ignore"
    )]
    BadKey { key: String },
    /// Only from [`fake::FakeSysctl`].
    #[error("{op}: failed on purpose (operation {nth})")]
    Injected { op: String, nth: u64 },
}

/// Settings by path below /proc/sys with slashes ("net/ipv4/conf/eth0.10/arp_ignore"): interface names may have dots.
pub trait Sysctl {
    /// The setting's value; `None` when the kernel has no such setting.
    fn read(&self, key: &str) -> Result<Option<i64>, SysctlError>;

    /// Set it; gives the value it had.
    fn write(&self, key: &str, value: i64) -> Result<i64, SysctlError>;
}

/// The kernel's settings.
#[derive(Clone, Debug)]
pub struct ProcSys {
    root: PathBuf,
}

impl Default for ProcSys {
    fn default() -> Self {
        Self { root: "/proc/sys".into() }
    }
}

impl ProcSys {
    fn path(&self, key: &str) -> Result<PathBuf, SysctlError> {
        let component = |part: &str| !matches!(part, "" | "." | "..");
        if key.split('/').all(component) {
            Ok(self.root.join(key))
        } else {
            Err(SysctlError::BadKey { key: key.into() })
        }
    }
}

impl Sysctl for ProcSys {
    fn read(&self, key: &str) -> Result<Option<i64>, SysctlError> {
        let text = match fs::read_to_string(self.path(key)?) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SysctlError::Read { key: key.into(), source }),
        };
        let text = text.trim();
        text.parse().map(Some).map_err(|_| SysctlError::NotANumber { key: key.into(), text: text.into() })
    }

    fn write(&self, key: &str, value: i64) -> Result<i64, SysctlError> {
        let missing = || SysctlError::Read { key: key.into(), source: io::ErrorKind::NotFound.into() };
        let old = self.read(key)?.ok_or_else(missing)?;
        fs::write(self.path(key)?, format!("{value}\n")).map_err(|source| SysctlError::Write {
            key: key.into(),
            value,
            source,
        })?;
        Ok(old)
    }
}

/// The twin for tests.
pub mod fake {
    use std::collections::BTreeMap;
    use std::sync::{Mutex, PoisonError};

    use super::{Sysctl, SysctlError};

    #[derive(Debug, Default)]
    struct State {
        values: BTreeMap<String, i64>,
        ops: u64,
        fail: Option<u64>,
    }

    /// Settings in memory; fails the operation it was asked to fail, which then has changed nothing.
    #[derive(Debug, Default)]
    pub struct FakeSysctl {
        state: Mutex<State>,
    }

    impl FakeSysctl {
        pub fn new(values: impl IntoIterator<Item = (String, i64)>) -> Self {
            Self { state: Mutex::new(State { values: values.into_iter().collect(), ..State::default() }) }
        }

        /// Fail the `nth` operation from now on, counted from 1.
        pub fn fail_nth(&self, nth: u64) {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.ops = 0;
            state.fail = Some(nth);
        }

        pub fn values(&self) -> BTreeMap<String, i64> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).values.clone()
        }

        fn op<T>(&self, op: String, run: impl FnOnce(&mut BTreeMap<String, i64>) -> T) -> Result<T, SysctlError> {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.ops += 1;
            let nth = state.ops;
            if state.fail == Some(nth) { Err(SysctlError::Injected { op, nth }) } else { Ok(run(&mut state.values)) }
        }
    }

    impl Sysctl for FakeSysctl {
        fn read(&self, key: &str) -> Result<Option<i64>, SysctlError> {
            self.op(format!("read {key}"), |values| values.get(key).copied())
        }

        fn write(&self, key: &str, value: i64) -> Result<i64, SysctlError> {
            let old =
                self.op(format!("write {key}"), |values| values.get_mut(key).map(|v| std::mem::replace(v, value)))?;
            old.ok_or_else(|| SysctlError::Read { key: key.into(), source: std::io::ErrorKind::NotFound.into() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_below_the_root() {
        for key in ["", "net/../../etc/passwd", "/etc/passwd", "net//x", "net/./x", ".."] {
            assert!(matches!(ProcSys::default().read(key), Err(SysctlError::BadKey { .. })), "{key:?}");
        }
    }

    #[test]
    fn what_is_not_there_is_none_and_what_is_no_number_an_error() {
        let proc = ProcSys::default();
        assert_eq!(proc.read("net/ipv4/conf/no.such/arp_ignore").unwrap(), None);
        assert!(matches!(proc.read("kernel/ostype"), Err(SysctlError::NotANumber { .. })));
        assert!(proc.read("kernel/pid_max").unwrap().is_some_and(|n| n > 0));
    }

    #[test]
    fn a_write_gives_the_old_value() {
        let root = std::env::temp_dir().join(format!("rvs-sysctl-{}", std::process::id()));
        fs::create_dir_all(root.join("net")).unwrap();
        fs::write(root.join("net/x"), "1\n").unwrap();
        let proc = ProcSys { root: root.clone() };
        assert_eq!(proc.write("net/x", 2).unwrap(), 1);
        assert_eq!(proc.write("net/x", 1).unwrap(), 2);
        assert_eq!(fs::read_to_string(root.join("net/x")).unwrap(), "1\n");
        assert!(proc.write("net/y", 1).is_err(), "never made anew");
        fs::remove_dir_all(root).unwrap();
    }
}
