//! How much memory there is (`/proc/meminfo`).

use std::io;

const PATH: &str = "/proc/meminfo";

/// Pages that are free, as IPVS reckons them (`update_defense_level`: free ones and buffers).
///
/// # Errors
/// The file can't be read, or lacks a line.
pub fn free_pages() -> io::Result<u64> {
    let text = std::fs::read_to_string(PATH)?;
    // SAFETY: a call without memory arguments.
    let page_bytes =
        u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok().filter(|n| *n > 0).unwrap_or(4096);
    Ok((bytes(&text, "MemFree")? + bytes(&text, "Buffers")?) / page_bytes)
}

/// Bytes that can be had without swapping.
///
/// # Errors
/// As above.
pub fn available() -> io::Result<u64> {
    bytes(&std::fs::read_to_string(PATH)?, "MemAvailable")
}

fn bytes(text: &str, name: &str) -> io::Result<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')?.trim().strip_suffix("kB"));
    let kib = line.and_then(|kib| kib.trim().parse::<u64>().ok()?.checked_mul(1024));
    kib.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{PATH} has no {name} line")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_their_names() {
        let text = "MemTotal:       100 kB\nMemFree:          400 kB\nMemAvailable:   900 kB\nBuffers:         x kB\n";
        assert_eq!(bytes(text, "MemFree").unwrap(), 400 * 1024);
        assert_eq!(bytes(text, "Mem").unwrap_err().to_string(), "/proc/meminfo has no Mem line");
        assert!(bytes(text, "Buffers").is_err() && bytes("", "MemFree").is_err());
        assert!(free_pages().unwrap() > 0 && available().unwrap() > 0);
    }
}
