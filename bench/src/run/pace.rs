//! How long each row is measured in one round.

use std::time::Duration;

use ioregion_bench::results::{Boot, Mode};

use super::entry::Entry;
use super::figures::Summary;
use crate::scenarios::{Operation, Placement, Row, Wait};

/// What decides when there is enough.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// Time, on a clock that others share.
    Timed(Slot),
    /// The number of accesses: where time is counted, more of them say the same.
    Counted(Counts),
}

/// How long a row is measured in one round.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// With each access timed.
    pub timed: Duration,
    /// The same for rows that claims compare, references included.
    compared: Duration,
    /// Untimed, for throughput.
    pub plain: Duration,
    /// What becomes of a round's times.
    pub summary: Summary,
}

/// How many accesses of a row are made in one round; of a row with many doorbells at least one to
/// each.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Before anything is measured.
    pub warm: u32,
    /// Each timed.
    pub timed: u32,
    /// The same where nobody waits for responses.
    posted: u32,
    /// The same where a device task sleeps: how often such accesses wake it changes from one time
    /// slice to the next.
    waking: u32,
}

impl Pace {
    /// The pace of a run.
    pub fn of(mode: Mode, boot: Option<Boot>) -> Self {
        let summary = match boot {
            None => Summary::Midmean,
            Some(_) => Summary::FirstDecile,
        };
        let slot = |timed, compared, plain| {
            Self::Timed(Slot {
                timed: Duration::from_millis(timed),
                compared: Duration::from_millis(compared),
                plain: Duration::from_millis(plain),
                summary,
            })
        };
        match (boot, mode) {
            (Some(Boot::Counted), _) => Self::Counted(Counts {
                warm: 64,
                timed: 384,
                posted: 1_536,
                waking: 6_144,
            }),
            (Some(Boot::Parallel), _) => slot(150, 150, 100),
            (None, Mode::Smoke) => slot(4, 4, 4),
            (None, Mode::Quick) => slot(26, 200, 26),
            (None, Mode::Full) => slot(350, 600, 350),
        }
    }
}

impl Pace {
    /// Whether a row is measured in a round. Counted time hardly differs from one to the next: what
    /// takes long to set up is measured in the first and in the last.
    pub fn measures(self, row: &Row, round: usize, rounds: usize) -> bool {
        matches!(self, Self::Timed(_)) || !row.is_heavy() || round == 0 || round + 1 == rounds
    }
}

impl Slot {
    /// The slot of one of the row's VMs.
    pub fn of(self, entry: &Entry) -> Self {
        let row = entry.row;
        let timed = if entry.compared {
            self.compared
        } else {
            self.timed
        };
        Self {
            timed: timed / row.vms,
            plain: self.plain / row.vms,
            ..self
        }
    }
}

impl Counts {
    /// The counts of one of the row's VMs.
    pub fn of(self, entry: &Entry) -> Self {
        let row = entry.row;
        if let Some(burst) = row.burst {
            let warm = burst / 4;
            let timed = burst - warm;
            return Self {
                warm,
                timed,
                ..self
            };
        }
        let wakes = row.placement != Placement::Vcpu && row.wait == Wait::Sleep;
        let timed = match row.operation {
            Operation::Posted if wakes => self.waking,
            Operation::Posted | Operation::RoundTrip => self.posted,
            _ => self.timed,
        };
        Self {
            warm: (self.warm / row.vms).max(1),
            timed: (timed / row.vms).max(row.cycle()),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenarios::ROWS;

    fn entry(name: &str) -> Entry {
        Entry::new(ROWS.iter().find(|row| row.name == name).unwrap())
    }

    #[test]
    fn counts_cover_all_doorbells_and_fit_into_a_burst() {
        let Pace::Counted(counts) = Pace::of(Mode::Full, Some(Boot::Counted)) else {
            panic!("not counted")
        };
        let timed = |name| counts.of(&entry(name)).timed;
        assert_eq!(timed("ioeventfd/posted@10000"), 10_000);
        assert!(timed("ioeventfd/posted") > timed("forward-stream/read"));
        let burst = counts.of(&entry("ioregionfd-mailbox-unread/posted"));
        assert_eq!(burst.warm + burst.timed, 60);
        let shared = counts.of(&entry("bystander-64/exit"));
        assert!(shared.warm >= 1 && shared.timed * 64 <= timed("kvm-run/posted"));
    }

    #[test]
    fn heavy_rows_are_measured_at_both_ends_of_a_counted_run() {
        let counted = Pace::of(Mode::Full, Some(Boot::Counted));
        let rounds = |pace: Pace, name| {
            let row = entry(name).row;
            (0..6).filter(|round| pace.measures(row, *round, 6)).count()
        };
        assert_eq!(rounds(counted, "ebpf-ioeventfd-polled/posted@10000"), 2);
        assert_eq!(rounds(counted, "ebpf-ioeventfd-polled/posted@1"), 6);
        let timed = Pace::of(Mode::Full, None);
        assert_eq!(rounds(timed, "ebpf-ioeventfd-polled/posted@10000"), 6);
    }
}
