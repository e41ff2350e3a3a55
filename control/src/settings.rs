//! `net.ipv4.vs.*`: the settings of the whole director, by the kernel's names, ranges and defaults (`vs_vars[]` in ip_vs_ctl.c), and what
//! they come to each second (`update_defense_level`).

use rvs_datapath::abi::{SETTINGS_MAX, config};

/// A setting. Its number is its place in [`ALL`], and in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    pub name: &'static str,
    pub default: u32,
    pub most: u32,
    /// One line for operators.
    pub text: &'static str,
}

const DROP_ENTRY: usize = 0;
const DROP_PACKET: usize = 1;
const SECURE_TCP: usize = 2;
const AMEMTHRESH: usize = 3;
const AM_DROPRATE: usize = 4;
const SLOPPY_TCP: usize = 5;
const SLOPPY_SCTP: usize = 6;
const SCHEDULE_ICMP: usize = 7;
const NAT_ICMP_SEND: usize = 8;

const fn mode(name: &'static str, text: &'static str) -> Setting {
    Setting { name, default: 0, most: 3, text }
}
const fn switch(name: &'static str, text: &'static str) -> Setting {
    Setting { name, default: 0, most: 1, text }
}
const fn number(name: &'static str, default: u32, text: &'static str) -> Setting {
    Setting { name, default, most: i32::MAX as u32, text }
}

/// All of them. The order is that of the map: new ones come last.
pub const ALL: [Setting; 9] = [
    mode(
        "drop_entry",
        "take half-open and idle connections out of the table: 0 never, 1 while memory is short (2: it is), 3 always",
    ),
    mode(
        "drop_packet",
        "drop one of so many new connections: 0 never, 1 while memory is short (2: it is), 3 one of am_droprate, always",
    ),
    mode("secure_tcp", "count a TCP connection as open later: 0 never, 1 while memory is short (2: it is), 3 always"),
    number("amemthresh", 1024, "memory is short when fewer pages than this are free"),
    number("am_droprate", 10, "of how many new connections drop_packet 3 drops one"),
    switch("sloppy_tcp", "1: a TCP connection may begin with any packet but a RST"),
    switch("sloppy_sctp", "1: an SCTP connection may begin with any chunk"),
    switch("schedule_icmp", "1: an ICMP error about no connection begins one, with whichever real server is next"),
    switch("nat_icmp_send", "1: a real server (NAT) that sends a packet of no connection is told: port unreachable"),
];
const _: () = assert!(ALL.len() <= SETTINGS_MAX);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    #[error("no setting is called `{0}`: {names}", names = ALL.map(|s| s.name).join(", "))]
    Unknown(String),
    #[error("{name} is 0..{most}: {value} is not", name = .0.name, most = .0.most, value = .1)]
    Range(Setting, u32),
    #[error("am_droprate 0 would drop nothing and everything: 1 or more")]
    NoRate,
}

/// The settings as they are, and how much memory there was when it was looked at last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    values: [u32; SETTINGS_MAX],
    free_pages: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let mut values = [0; SETTINGS_MAX];
        for (value, setting) in values.iter_mut().zip(ALL) {
            *value = setting.default;
        }
        Settings { values, free_pages: u64::MAX }
    }
}

/// What the data plane is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// Bits of [`rvs_datapath::abi::config`].
    pub flags: u32,
    /// Drop one of so many; 0: none.
    pub drop_rate: u32,
}

/// The number of a setting.
///
/// # Errors
/// There is none of that name.
pub fn number_of(name: &str) -> Result<usize, SettingError> {
    ALL.iter().position(|s| s.name == name).ok_or_else(|| SettingError::Unknown(name.to_owned()))
}

impl Settings {
    /// As a map has them.
    pub fn restore(values: [u32; SETTINGS_MAX]) -> Settings {
        Settings { values, ..Settings::default() }
    }
    pub fn values(&self) -> [u32; SETTINGS_MAX] {
        self.values
    }
    pub fn get(&self, number: usize) -> u32 {
        self.values.get(number).copied().unwrap_or(0)
    }
    /// # Errors
    /// There is none of that name, or the value is out of its range.
    pub fn with(&self, name: &str, value: u32) -> Result<Settings, SettingError> {
        let number = number_of(name)?;
        let setting = ALL[number];
        if value > setting.most {
            return Err(SettingError::Range(setting, value));
        }
        if number == AM_DROPRATE && value == 0 {
            return Err(SettingError::NoRate);
        }
        let mut after = *self;
        after.values[number] = value;
        Ok(after.seen(self.free_pages))
    }

    /// With so many pages free: modes 1 become 2 while memory is short, and 1 again when it is not.
    #[must_use]
    pub fn seen(&self, free_pages: u64) -> Settings {
        let mut after = Settings { free_pages, ..*self };
        let short = after.is_short();
        for mode in [DROP_ENTRY, DROP_PACKET, SECURE_TCP] {
            match after.values[mode] {
                1 if short => after.values[mode] = 2,
                2 if !short => after.values[mode] = 1,
                _ => {}
            }
        }
        after
    }

    fn is_short(&self) -> bool {
        self.free_pages < u64::from(self.values[AMEMTHRESH])
    }

    pub fn level(&self) -> Level {
        let on = |mode: usize| self.values[mode] >= 2;
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let threshold = u64::from(self.values[AMEMTHRESH]);
        let drop_rate = match self.values[DROP_PACKET] {
            3 => self.values[AM_DROPRATE],
            // The less there is, the more are dropped: up to each.
            2 if self.is_short() => u32::try_from(threshold / (threshold - self.free_pages)).unwrap_or(u32::MAX),
            _ => 0,
        };
        Level {
            flags: flag(on(DROP_ENTRY), config::DROP_ENTRY)
                | flag(on(SECURE_TCP), config::SECURE_TCP)
                | flag(self.values[SLOPPY_TCP] != 0, config::SLOPPY_TCP)
                | flag(self.values[SLOPPY_SCTP] != 0, config::SLOPPY_SCTP)
                | flag(self.values[SCHEDULE_ICMP] != 0, config::SCHEDULE_ICMP)
                | flag(self.values[NAT_ICMP_SEND] != 0, config::NAT_ICMP_SEND),
            drop_rate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pairs: &[(&str, u32)]) -> Settings {
        pairs.iter().fold(Settings::default(), |s, (name, value)| s.with(name, *value).unwrap())
    }

    #[test]
    fn modes_come_and_go_with_memory() {
        let s = set(&[("drop_entry", 1), ("drop_packet", 1), ("secure_tcp", 1), ("amemthresh", 1000)]);
        assert_eq!(s.level(), Level::default());
        let short = s.seen(900);
        assert_eq!(short.values()[..3], [2, 2, 2]);
        // 1000 / (1000 - 900).
        assert_eq!(short.level(), Level { flags: config::DROP_ENTRY | config::SECURE_TCP, drop_rate: 10 });
        assert_eq!(short.seen(1).level().drop_rate, 1);
        assert_eq!(short.seen(999).level().drop_rate, 1000);
        assert_eq!(short.seen(1000), s.seen(1000));
        // As the kernel does: set to 2 while there is memory, it is 1 a second later.
        assert_eq!(set(&[("drop_entry", 2)]).seen(5000).get(DROP_ENTRY), 1);
    }

    #[test]
    fn mode_three_asks_nobody() {
        let s = set(&[("drop_packet", 3), ("am_droprate", 7), ("secure_tcp", 3)]).seen(u64::MAX);
        assert_eq!(s.level(), Level { flags: config::SECURE_TCP, drop_rate: 7 });
        assert_eq!(set(&[("sloppy_tcp", 1)]).level().flags, config::SLOPPY_TCP);
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        let fails = |name, value| Settings::default().with(name, value).unwrap_err().to_string();
        assert_eq!(fails("drop_entry", 4), "drop_entry is 0..3: 4 is not");
        assert_eq!(fails("sloppy_tcp", 2), "sloppy_tcp is 0..1: 2 is not");
        assert!(fails("am_droprate", 0).contains("1 or more"));
        assert!(fails("nosuch", 0).contains("drop_entry, drop_packet"));
    }

    #[test]
    fn defaults_are_the_kernels() {
        let of = |name| Settings::default().get(number_of(name).unwrap());
        assert_eq!(["drop_entry", "amemthresh", "am_droprate"].map(of), [0, 1024, 10]);
    }
}
