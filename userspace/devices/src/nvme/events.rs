//! Asynchronous events (section 5.2).

use std::collections::VecDeque;

use super::spec::{MAX_EVENT_REQUESTS, Status, log};

/// Something that the driver is told without having asked for it just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A write to the doorbell of a queue that there is not.
    NoSuchDoorbell,
    /// A doorbell value that the queue cannot have.
    DoorbellValue,
    /// The controller cannot go on.
    Persistent,
    /// The temperature has passed a threshold.
    Temperature,
    /// The namespace is of another size.
    Namespace,
}

impl Event {
    /// Type, information and log page.
    fn parts(self) -> (u32, u32, u8) {
        match self {
            Self::NoSuchDoorbell => (0, 0, log::ERROR),
            Self::DoorbellValue => (0, 1, log::ERROR),
            Self::Persistent => (0, 3, log::ERROR),
            Self::Temperature => (1, 1, log::HEALTH),
            Self::Namespace => (2, 0, log::CHANGED_NAMESPACES),
        }
    }

    fn kind(self) -> u32 {
        self.parts().0
    }

    /// Dword 0 of the answer that reports it.
    pub(super) fn result(self) -> u32 {
        let (kind, information, page) = self.parts();
        kind | information << 8 | u32::from(page) << 16
    }
}

/// Events, and the commands that wait for them.
#[derive(Debug, Default)]
pub(super) struct Events {
    requests: VecDeque<u16>,
    /// Requests that are answered without an event.
    aborted: VecDeque<u16>,
    /// Not reported yet; each once.
    pending: Vec<Event>,
    /// Types that were reported, and whose log page was not read since.
    masked: u32,
}

impl Events {
    /// A command waits for an event.
    pub(super) fn request(&mut self, command: u16) -> Result<(), Status> {
        if self.requests.len() == MAX_EVENT_REQUESTS {
            return Err(Status::EVENT_LIMIT);
        }
        self.requests.push_back(command);
        Ok(())
    }

    /// It does not any more, and is answered without one; whether it did.
    pub(super) fn abort(&mut self, command: u16) -> bool {
        let found = self.requests.iter().position(|other| *other == command);
        let found = found.and_then(|at| self.requests.remove(at));
        self.aborted.extend(found);
        found.is_some()
    }

    pub(super) fn note(&mut self, event: Event) {
        if !self.pending.contains(&event) {
            self.pending.push(event);
        }
    }

    fn next(&self) -> Option<usize> {
        let open = |event: &Event| self.masked & 1 << event.kind() == 0;
        self.pending.iter().position(open)
    }

    /// Whether there is something to report, and a command to report it with.
    pub(super) fn is_due(&self) -> bool {
        !self.aborted.is_empty() || !self.requests.is_empty() && self.next().is_some()
    }

    /// A command that is answered, with the event to report or as aborted. The event's type is
    /// masked until the log page is read.
    pub(super) fn take(&mut self) -> Option<(u16, Option<Event>)> {
        if let Some(command) = self.aborted.pop_front() {
            return Some((command, None));
        }
        let at = self.next()?;
        let command = self.requests.pop_front()?;
        let event = self.pending.remove(at);
        self.masked |= 1 << event.kind();
        Some((command, Some(event)))
    }

    /// The driver has read a log page and wants to hear of what is in it again.
    pub(super) fn was_read(&mut self, page: u8) {
        self.masked &= match page {
            log::ERROR => !1,
            log::HEALTH => !2,
            log::CHANGED_NAMESPACES => !4,
            _ => !0,
        };
    }

    /// A reset: nobody waits any more.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_is_told_once_until_its_log_page_was_read() {
        let mut events = Events::default();
        events.note(Event::DoorbellValue);
        events.note(Event::DoorbellValue);
        events.note(Event::NoSuchDoorbell);
        assert_eq!(events.take(), None);
        events.request(7).unwrap();
        events.request(8).unwrap();
        assert!(events.is_due());
        assert_eq!(events.take(), Some((7, Some(Event::DoorbellValue))));
        // The other one is of the same type.
        assert_eq!(events.take(), None);
        events.note(Event::Namespace);
        assert_eq!(events.take(), Some((8, Some(Event::Namespace))));
        events.request(9).unwrap();
        events.was_read(log::HEALTH);
        assert!(!events.is_due());
        events.was_read(log::ERROR);
        assert_eq!(events.take(), Some((9, Some(Event::NoSuchDoorbell))));
        assert_eq!(Event::DoorbellValue.result(), 0x0001_0100);
        assert_eq!(Event::Namespace.result(), 0x0004_0002);
    }

    #[test]
    fn requests_are_limited_and_can_be_aborted() {
        let mut events = Events::default();
        for command in 0..4 {
            events.request(command).unwrap();
        }
        assert_eq!(events.request(4), Err(Status::EVENT_LIMIT));
        assert!(events.abort(2));
        assert!(!events.abort(2));
        assert!(events.is_due());
        assert_eq!(events.take(), Some((2, None)));
        events.request(4).unwrap();
        events.reset();
        assert!(!events.abort(0));
    }
}
