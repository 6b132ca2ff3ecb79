//! The device status: what the driver may write when, and what it means. No I/O.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
};

use super::device::Refusal;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// What a driver may set. That the device needs a reset is the device's word.
const SETTABLE: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED) as u8;

/// What a status means for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do.
    Noted,
    /// The driver has given the device up or takes it over: nothing may be in flight.
    Reset,
    /// The driver is ready, with these features: the queues can be served.
    Start(u64),
}

/// Why a status is refused: the driver reads the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StatusError {
    /// Bits that only a reset clears.
    #[error("the status {new:#x} lacks bits of {old:#x}, which only a reset clears")]
    Cleared {
        /// What the driver had written before.
        old: u8,
        /// What it wrote now.
        new: u8,
    },
    /// Bits that mean nothing or are not the driver's.
    #[error("the status {0:#x} has bits that a driver cannot set")]
    Undefined(u8),
    /// The driver is ready but features are not settled.
    #[error("the driver is ready without having settled features")]
    TooEarly,
    /// Features that the device does not work with.
    #[error("{0}")]
    Features(#[from] Refusal),
}

/// The status of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    bits: u8,
    features: u64,
}

impl Status {
    /// That of a device whose driver is ready with these features.
    #[must_use]
    pub fn ready(features: u64) -> Self {
        let bits = SETTABLE & !(VIRTIO_CONFIG_S_FAILED as u8);
        Self { bits, features }
    }

    /// What the driver reads.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Follows a write of the driver's. `features` are those that it has taken; whether the
    /// device works with them, `check` says.
    ///
    /// # Errors
    ///
    /// Why the write is refused: the status stays as it was.
    pub fn write(
        &mut self,
        bits: u8,
        features: u64,
        check: impl FnOnce(u64) -> Result<(), Refusal>,
    ) -> Result<Step, StatusError> {
        if bits == 0 {
            *self = Self::default();
            return Ok(Step::Reset);
        }
        if bits & !SETTABLE != 0 {
            return Err(StatusError::Undefined(bits));
        }
        if self.bits & !bits != 0 {
            let (old, new) = (self.bits, bits);
            return Err(StatusError::Cleared { old, new });
        }
        let set = bits & !self.bits;
        if set & DRIVER_OK != 0 && bits & FEATURES_OK == 0 {
            return Err(StatusError::TooEarly);
        }
        if set & FEATURES_OK != 0 {
            check(features)?;
            // From here on the driver cannot change them.
            self.features = features;
        }
        self.bits = bits;
        Ok(match set & DRIVER_OK {
            0 => Step::Noted,
            _ => Step::Start(self.features),
        })
    }

    /// Takes the last write back: the device could not follow it.
    pub fn undo(&mut self, before: Self) {
        *self = before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fine(_: u64) -> Result<(), Refusal> {
        Ok(())
    }

    #[test]
    fn driver_that_keeps_the_order_starts_the_device() {
        let mut status = Status::default();
        for (bits, step) in [(0, Step::Reset), (1, Step::Noted), (3, Step::Noted)] {
            assert_eq!(status.write(bits, 5, fine), Ok(step));
        }
        assert_eq!(status.write(11, 5, fine), Ok(Step::Noted));
        // Features that change after they were settled do not count.
        assert_eq!(status.write(15, 7, fine), Ok(Step::Start(5)));
        assert_eq!(status.write(15, 5, fine), Ok(Step::Noted));
        assert_eq!(status.write(0, 5, fine), Ok(Step::Reset));
        assert_eq!(status, Status::default());
    }

    #[test]
    fn bad_features_leave_the_status_as_it_was() {
        let mut status = Status::default();
        status.write(3, 0, fine).unwrap();
        let missing = Refusal::Missing(1);
        let refused = status.write(11, 2, |_| Err(missing));
        assert_eq!(refused, Err(StatusError::Features(missing)));
        assert_eq!(status.bits(), 3);
        assert_eq!(status.write(7, 2, fine), Err(StatusError::TooEarly));
        assert_eq!(status.write(11, 3, fine), Ok(Step::Noted));
    }

    #[test]
    fn bits_that_are_not_the_drivers_are_refused() {
        for bits in [0x10, 0x20, 0x40, 0x4f] {
            let refused = Status::default().write(bits, 0, fine);
            assert_eq!(refused, Err(StatusError::Undefined(bits)));
        }
    }

    proptest! {
        #[test]
        fn device_runs_only_with_checked_features_and_never_twice(
            writes in proptest::collection::vec((any::<u8>(), 0..8u64), 1..40),
        ) {
            let mut status = Status::default();
            let mut running = false;
            for (bits, features) in writes {
                let before = status;
                let even = |features: u64| match features % 2 {
                    0 => Ok(()),
                    _ => Err(Refusal::Missing(1)),
                };
                match status.write(bits, features, even) {
                    Ok(Step::Reset) => running = false,
                    Ok(Step::Start(features)) => {
                        prop_assert!(!running && features % 2 == 0);
                        prop_assert!(status.bits() & (FEATURES_OK | DRIVER_OK) == 12);
                        running = true;
                    }
                    Ok(Step::Noted) => prop_assert_eq!(status.bits() & before.bits(), before.bits()),
                    Err(_) => prop_assert_eq!(status, before),
                }
            }
        }
    }
}
