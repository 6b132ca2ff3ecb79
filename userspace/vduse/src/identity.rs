//! Telling a device from others that had its name.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::control::check_name;
use crate::error::Error;

/// What tells one boot from the next.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Which device it is: no two devices have the same, whatever their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The boot of the machine that it was made in.
    pub boot: u128,
    /// Its number in that boot.
    pub inode: u64,
}

impl Identity {
    /// That of the device of this name.
    ///
    /// # Errors
    ///
    /// Where there is none, or the system does not say.
    pub fn of(name: &str) -> Result<Self, Error> {
        Self::of_boot(Self::boot_now()?, name)
    }

    /// The boot that the machine is in; all devices are of it.
    ///
    /// # Errors
    ///
    /// Where the system does not say.
    pub fn boot_now() -> Result<u128, Error> {
        let failed = |error| Error::Open {
            path: BOOT.into(),
            error,
        };
        let text = std::fs::read_to_string(BOOT).map_err(failed)?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let boot = u128::from_str_radix(&digits, 16);
        boot.map_err(|error| failed(io::Error::other(error)))
    }

    /// As [`of`](Self::of) where the boot is known, by looking at one path, without opening any.
    ///
    /// # Errors
    ///
    /// As [`of`](Self::of).
    pub fn of_boot(boot: u128, name: &str) -> Result<Self, Error> {
        check_name(name)?;
        // Numbers are not used again before the machine restarts.
        let path = Path::new("/sys/class/vduse").join(name);
        match std::fs::metadata(&path) {
            Ok(metadata) => Ok(Self {
                boot,
                inode: metadata.ino(),
            }),
            Err(error) => Err(Error::Open { path, error }),
        }
    }

    pub(crate) fn words(self) -> [u64; 3] {
        let low = u64::try_from(self.boot & u128::from(u64::MAX)).unwrap_or_default();
        let high = u64::try_from(self.boot >> 64).unwrap_or_default();
        [low, high, self.inode]
    }
}
