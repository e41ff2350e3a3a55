//! Waiting for a condition against a deadline: the only place of the project that sleeps.

use std::env;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// First pause between two looks; doubles up to [`MAX_PAUSE`], so that quick things are quick and slow ones cost little.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(50);

/// A machine that is so many times slower than others says so in this variable: all deadlines are longer there, by that much.
pub const PATIENCE: &str = "RVS_PATIENCE";

/// The deadline for this machine.
pub fn patient(deadline: Duration) -> Duration {
    static TIMES: OnceLock<u32> = OnceLock::new();
    let times = TIMES.get_or_init(|| env::var(PATIENCE).ok().and_then(|t| t.parse().ok()).unwrap_or(1));
    deadline.saturating_mul(*times)
}

/// Calls `look` until it is `Ok`, at least once, and for at most `deadline` (as [`patient`] has it).
///
/// `look` returns what was found, or what it saw instead. A miss is [`Error::Timeout`] with the last thing seen.
pub fn eventually<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<T, String>) -> Result<T> {
    let (start, deadline) = (Instant::now(), patient(deadline));
    let mut pause = FIRST_PAUSE;
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(last) if start.elapsed() >= deadline => {
                return Err(Error::Timeout { what: what.to_owned(), waited: start.elapsed(), last });
            }
            Err(_) => thread::sleep(pause),
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_true_at_once_is_looked_at_once() {
        let mut looks = 0;
        let found = eventually("now", Duration::ZERO, || {
            looks += 1;
            Ok(7)
        });
        assert_eq!((found.unwrap(), looks), (7, 1));
    }

    #[test]
    fn waits_until_it_is_true() {
        let mut looks = 0;
        let found = eventually("the fifth look", Duration::from_secs(60), || {
            looks += 1;
            if looks == 5 { Ok(()) } else { Err(format!("look {looks}")) }
        });
        assert!(found.is_ok());
    }

    #[test]
    fn says_what_it_saw_last_when_the_time_is_over() {
        let error = eventually::<()>("the moon", Duration::from_millis(5), || Err("clouds".to_owned())).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("the moon") && text.contains("clouds"), "{text}");
    }
}
