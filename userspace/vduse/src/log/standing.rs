//! What the log says of queues that are not served: two words each, behind the logs of all queues.

use ioregion_devices::virtio::{Position, QueueLog, Words as _};

use super::{Log, Logged, at};

/// Words of each queue.
pub(super) const WORDS: usize = 2;
/// Where it stands: see `encode`.
const POSITION: usize = 0;
/// Its address space.
const SPACE: usize = 1;

/// A queue that does not stand still.
const MOVING: u64 = 0;
const SPLIT: u64 = 1 << 62;
const PACKED: u64 = 2 << 62;

/// Where the words of the first queue are.
pub(super) fn first(logged: &Logged) -> usize {
    at::END + usize::from(logged.queues) * QueueLog::words_for(logged.queue_size)
}

impl Log {
    /// Where a word of a queue is.
    fn at_queue(&self, queue: u16, word: usize) -> Option<usize> {
        let first = first(&self.logged);
        let at = first + usize::from(queue) * WORDS + word;
        (queue < self.logged.queues).then_some(at)
    }

    /// Where a queue stands that stands still.
    pub(crate) fn position(&self, queue: u16) -> Option<Position> {
        let at = self.at_queue(queue, POSITION)?;
        decode(self.words.load(at))
    }

    /// A queue stands still, or not any more.
    pub(crate) fn set_position(&self, queue: u16, position: Option<Position>) {
        if let Some(at) = self.at_queue(queue, POSITION) {
            self.words.store(at, position.map_or(MOVING, encode));
        }
    }

    /// The address space of a queue. Resets do not change it.
    pub(crate) fn space(&self, queue: u16) -> u32 {
        let at = self.at_queue(queue, SPACE);
        let space = at.map(|at| self.words.load(at));
        space.and_then(|space| space.try_into().ok()).unwrap_or(0)
    }

    pub(crate) fn set_space(&self, queue: u16, space: u32) {
        if let Some(at) = self.at_queue(queue, SPACE) {
            self.words.store(at, space.into());
        }
    }

    /// Forgets what is known of a queue but its address space.
    pub(crate) fn clear_queue(&self, index: u16) {
        if let Some(queue) = self.queue(index) {
            queue.clear();
        }
        self.set_position(index, None);
    }
}

fn encode(position: Position) -> u64 {
    let half = |at: u16, wrap: bool| u64::from(at & 0x7fff) | u64::from(wrap) << 15;
    match position {
        Position::Split { avail } => SPLIT | u64::from(avail),
        Position::Packed {
            avail_wrap,
            avail,
            used_wrap,
            used,
        } => PACKED | half(used, used_wrap) << 16 | half(avail, avail_wrap),
    }
}

/// What a word says, which may be anything.
fn decode(word: u64) -> Option<Position> {
    let half = |bits: u64| {
        (
            u16::try_from(bits & 0x7fff).unwrap_or(0),
            bits & 1 << 15 != 0,
        )
    };
    let ((avail, avail_wrap), (used, used_wrap)) = (half(word), half(word >> 16));
    match word & !0xffff_ffff {
        SPLIT if used == 0 && !used_wrap => Some(Position::Split {
            avail: avail | u16::from(avail_wrap) << 15,
        }),
        PACKED => Some(Position::Packed {
            avail_wrap,
            avail,
            used_wrap,
            used,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn positions_are_read_as_they_were_written(
            (avail, used) in (..0x8000u16, ..0x8000u16),
            (avail_wrap, used_wrap, index) in any::<(bool, bool, u16)>(),
        ) {
            let packed = Position::Packed { avail_wrap, avail, used_wrap, used };
            for position in [packed, Position::Split { avail: index }] {
                prop_assert_eq!(decode(encode(position)), Some(position));
            }
        }

        #[test]
        fn any_word_is_a_position_or_none(kind in 0..4u64, low: u32) {
            let word = kind << 62 | u64::from(low);
            if let Some(position) = decode(word) {
                prop_assert_eq!(encode(position), word);
            }
        }
    }

    #[test]
    fn moving_queue_has_no_position() {
        assert_eq!(decode(MOVING), None);
    }
}
