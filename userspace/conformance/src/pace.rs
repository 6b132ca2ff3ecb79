//! How patient the suite is and how much of it runs, for machines far slower than ordinary ones:
//! in an emulated VM an access takes a hundred times as long.
//!
//! Both come from the environment and change no assertion: a limit only says when to call a
//! machine hung, and an amount only how often the same thing is done.

use std::sync::OnceLock;
use std::time::Duration;

/// By what limits are multiplied: a whole number from 1.
pub const SLOWNESS: &str = "IOREGION_TEST_SLOWNESS";
/// Of how many accesses, rounds or changes of the long tests one is made: a whole number from 1.
pub const ONE_IN: &str = "IOREGION_TEST_ONE_IN";

/// The whole number in an environment variable; 1 where it is not set.
///
/// # Panics
///
/// If the variable holds something else: running with another pace than the one that was asked
/// for would show nothing.
fn whole_number(name: &str, value: Option<&str>) -> u32 {
    let Some(value) = value else { return 1 };
    match value.parse() {
        Ok(number) if number > 0 => number,
        _ => panic!("{name}={value:?} is not a whole number from 1"),
    }
}

fn from_environment(name: &str) -> u32 {
    let value = std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    whole_number(name, value.as_deref())
}

/// How long to wait for something that takes less than `limit` on an ordinary machine.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    static SLOWNESS_HERE: OnceLock<u32> = OnceLock::new();
    limit * *SLOWNESS_HERE.get_or_init(|| from_environment(SLOWNESS))
}

/// How much of a long test's `full` amount to do here, but not less than `least`; a smaller
/// amount than the full one is printed.
#[must_use]
pub fn amount(what: &str, full: u32, least: u32) -> u32 {
    static ONE_IN_HERE: OnceLock<u32> = OnceLock::new();
    let here = scaled(
        full,
        least,
        *ONE_IN_HERE.get_or_init(|| from_environment(ONE_IN)),
    );
    if here < full {
        println!("{what}: {here} of {full}, as {ONE_IN} says");
    }
    here
}

fn scaled(full: u32, least: u32, one_in: u32) -> u32 {
    (full / one_in).max(least.min(full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_shrink_to_their_least_and_never_grow() {
        assert_eq!(scaled(1000, 10, 1), 1000);
        assert_eq!(scaled(1000, 10, 4), 250);
        assert_eq!(scaled(1000, 10, 500), 10);
        assert_eq!(scaled(5, 10, 1), 5);
        assert_eq!(scaled(5, 10, 9), 5);
    }

    #[test]
    fn only_whole_numbers_from_one_are_taken() {
        assert_eq!(whole_number(ONE_IN, None), 1);
        assert_eq!(whole_number(ONE_IN, Some("25")), 25);
        for bad in ["", "0", "-1", "1.5", "fast"] {
            let refused = std::panic::catch_unwind(|| whole_number(SLOWNESS, Some(bad)));
            assert!(refused.is_err(), "{bad}");
        }
    }
}
