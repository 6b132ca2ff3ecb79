//! What happens when the last of several things is over.

/// What waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// An admin command is answered.
    Answer(u16),
    /// A reset is over.
    Reset,
    /// A shutdown makes everything safe.
    Shutdown,
}

/// All that waits.
#[derive(Debug, Default)]
pub(super) struct Waits {
    list: Vec<(u64, usize, Then)>,
    next: u64,
}

impl Waits {
    /// Something waits for so many things, at least one; its name.
    pub(super) fn begin(&mut self, things: usize, then: Then) -> u64 {
        self.next += 1;
        self.list.push((self.next, things, then));
        self.next
    }

    /// One thing is over: what to do now, if it was the last one.
    pub(super) fn done(&mut self, name: u64) -> Option<Then> {
        let at = self.list.iter().position(|wait| wait.0 == name)?;
        let (_, left, _) = &mut self.list[at];
        *left -= 1;
        (*left == 0).then(|| self.list.swap_remove(at).2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_thing_ends_the_wait_once() {
        let mut waits = Waits::default();
        let (one, two) = (waits.begin(2, Then::Reset), waits.begin(1, Then::Answer(3)));
        assert_eq!(waits.done(one), None);
        assert_eq!(waits.done(two), Some(Then::Answer(3)));
        assert_eq!(waits.done(one), Some(Then::Reset));
        assert_eq!(waits.done(one), None);
        assert_eq!(waits.done(17), None);
    }
}
