//! The channel's queue of requests, without any I/O.
//!
//! One request at a time waits for its response; requests are sent in the order in which they
//! were made. The wire protocol has no command ids, so the queue counts the responses that are
//! still to come for requests that were given up, and drops them.

use std::collections::{HashMap, VecDeque};

use crate::wire::Message;

/// Names one request for as long as its maker cares for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The device answered, or the posted request was sent.
    Done(u64),
    /// The channel broke or the region went away after the request had been sent: the guest
    /// reads all-ones.
    Lost,
    /// The region went away before the request was sent: it must be dispatched anew.
    Retry,
}

/// A request to be queued.
#[derive(Debug, Clone, Copy)]
pub struct New {
    /// The region that it belongs to.
    pub region: u64,
    /// The encoded command.
    pub message: Message,
    /// Whether it is a write.
    pub write: bool,
    /// Whether the device answers it.
    pub response: bool,
    /// Nobody waits for the outcome.
    pub detached: bool,
}

#[derive(Debug)]
struct Request {
    ticket: Ticket,
    new: New,
}

/// A response that no request asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Unsolicited;

/// The queue.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: VecDeque<Request>,
    in_flight: Option<Request>,
    owed: u64,
    outcomes: HashMap<Ticket, Outcome>,
    next: u64,
    broken: bool,
    undelivered: u64,
}

impl Queue {
    /// Adds a request at the end. On a broken queue it ends at once.
    pub fn push(&mut self, new: New) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        let request = Request { ticket, new };
        if self.broken {
            self.lose(&request);
        } else {
            self.waiting.push_back(request);
        }
        ticket
    }

    /// The message to send next; `None` while a response is awaited or nothing is queued.
    pub fn to_send(&self) -> Option<&Message> {
        match self.in_flight {
            Some(_) => None,
            None => self.waiting.front().map(|request| &request.new.message),
        }
    }

    /// Records that the message of [`to_send`](Self::to_send) is on the wire. Returns the
    /// request if that completes it.
    pub fn sent(&mut self) -> Option<Ticket> {
        let request = self.waiting.pop_front()?;
        if request.new.response {
            self.in_flight = Some(request);
            return None;
        }
        self.end(&request, Outcome::Done(0));
        Some(request.ticket)
    }

    /// Records a response. Returns the request that it answers, if it is still wanted.
    pub fn received(&mut self, data: u64) -> Result<Option<Ticket>, Unsolicited> {
        if self.owed > 0 {
            self.owed -= 1;
            return Ok(None);
        }
        let request = self.in_flight.take().ok_or(Unsolicited)?;
        self.end(&request, Outcome::Done(data));
        Ok(Some(request.ticket))
    }

    /// Ends all requests of a region that is about to go. Those that were sent, or that nobody
    /// could make anew, are lost if `abandon`; else the old device still gets or answers them.
    pub fn settle(&mut self, region: u64, abandon: bool) {
        let (settled, kept) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<VecDeque<_>, _>(|request| {
                request.new.region == region && (abandon || !request.new.detached)
            });
        self.waiting = kept;
        for request in &settled {
            if request.new.detached {
                self.lose(request);
            } else {
                self.end(request, Outcome::Retry);
            }
        }
        if abandon
            && let Some(request) = self
                .in_flight
                .take_if(|request| request.new.region == region)
        {
            self.owed += 1;
            self.end(&request, Outcome::Lost);
        }
    }

    /// Gives one request up, because its maker is gone.
    pub fn abandon(&mut self, ticket: Ticket) {
        self.waiting.retain(|request| request.ticket != ticket);
        if self
            .in_flight
            .take_if(|request| request.ticket == ticket)
            .is_some()
        {
            self.owed += 1;
        }
        self.outcomes.remove(&ticket);
    }

    /// Ends all requests: nothing more will be sent or received.
    pub fn break_off(&mut self) {
        self.broken = true;
        for request in std::mem::take(&mut self.waiting)
            .into_iter()
            .chain(self.in_flight.take())
        {
            self.lose(&request);
        }
    }

    /// Takes the outcome of a request, if it has ended.
    pub fn take(&mut self, ticket: Ticket) -> Option<Outcome> {
        self.outcomes.remove(&ticket)
    }

    /// Number of requests not sent yet.
    pub fn backlog(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nothing is on its way, in either direction: not even a response that nobody wants.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.in_flight.is_none() && self.owed == 0
    }

    /// Writes that were accepted but never reached the device.
    pub fn undelivered(&self) -> u64 {
        self.undelivered
    }

    fn lose(&mut self, request: &Request) {
        if request.new.write {
            self.undelivered += 1;
        }
        self.end(request, Outcome::Lost);
    }

    fn end(&mut self, request: &Request, outcome: Outcome) {
        if !request.new.detached {
            self.outcomes.insert(request.ticket, outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(n: u64) -> Message {
        let mut message = [0; 32];
        message[24..].copy_from_slice(&n.to_ne_bytes());
        message
    }

    fn new(region: u64, n: u64, response: bool) -> New {
        New {
            region,
            message: message(n),
            write: true,
            response,
            detached: false,
        }
    }

    #[test]
    fn late_response_of_an_abandoned_request_is_dropped() {
        let mut queue = Queue::default();
        let first = queue.push(new(1, 1, true));
        assert_eq!(queue.sent(), None);
        queue.abandon(first);
        let second = queue.push(new(1, 2, true));
        assert_eq!(queue.to_send(), Some(&message(2)));
        queue.sent();
        assert_eq!(queue.received(10), Ok(None));
        assert_eq!(queue.received(20), Ok(Some(second)));
        assert_eq!(queue.take(first), None);
        assert_eq!(queue.take(second), Some(Outcome::Done(20)));
        assert_eq!(queue.received(30), Err(Unsolicited));
    }

    #[test]
    fn removal_loses_what_was_sent_and_retries_the_rest() {
        let mut queue = Queue::default();
        let sent = queue.push(new(1, 1, true));
        queue.sent();
        let unsent = queue.push(new(1, 2, true));
        let other = queue.push(new(2, 3, true));
        queue.settle(1, true);
        assert_eq!(queue.take(sent), Some(Outcome::Lost));
        assert_eq!(queue.take(unsent), Some(Outcome::Retry));
        assert_eq!(queue.take(other), None);
        queue.sent();
        assert_eq!(queue.received(0), Ok(None));
        assert_eq!(queue.received(7), Ok(Some(other)));
    }

    #[test]
    fn modification_hands_replayed_writes_to_the_old_device() {
        let mut queue = Queue::default();
        queue.push(New {
            detached: true,
            ..new(1, 1, false)
        });
        let own = queue.push(new(1, 2, true));
        queue.settle(1, false);
        assert_eq!(queue.take(own), Some(Outcome::Retry));
        assert_eq!(queue.to_send(), Some(&message(1)));
        queue.settle(1, true);
        assert_eq!(queue.to_send(), None);
        assert_eq!(queue.undelivered(), 1);
    }

    #[test]
    fn modification_lets_the_old_device_answer_what_it_was_sent() {
        let mut queue = Queue::default();
        let sent = queue.push(new(1, 1, true));
        queue.sent();
        queue.settle(1, false);
        assert_eq!(queue.received(5), Ok(Some(sent)));
        assert_eq!(queue.take(sent), Some(Outcome::Done(5)));
    }

    proptest! {
        /// Whatever happens in whatever order, each request ends exactly once, and a response is
        /// given to the request whose command it answers.
        #[test]
        fn responses_meet_their_requests(steps in prop::collection::vec(0..6_u8, 1..200)) {
            let mut queue = Queue::default();
            let mut live = Vec::new();
            // The device: commands on the wire that ask for a response, oldest first.
            let mut device = VecDeque::new();
            let mut n = 0;
            for step in steps {
                match step {
                    0 | 1 => {
                        n += 1;
                        live.push((queue.push(new(u64::from(step), n, step == 0)), n));
                    }
                    2 => if let Some(sent) = queue.to_send().copied() {
                        let data = u64::from_ne_bytes(sent[24..].try_into().unwrap());
                        if queue.sent().is_none() {
                            device.push_back(data);
                        }
                    },
                    3 => if let Some(data) = device.pop_front() {
                        prop_assert!(queue.received(data).is_ok());
                    },
                    4 => if let Some((ticket, _)) = live.pop() {
                        queue.abandon(ticket);
                        prop_assert_eq!(queue.take(ticket), None);
                    },
                    _ => queue.settle(0, true),
                }
                live.retain(|&(ticket, n)| match queue.take(ticket) {
                    None => true,
                    Some(Outcome::Done(data)) => {
                        assert!(data == n || data == 0);
                        false
                    }
                    Some(_) => false,
                });
            }
            queue.break_off();
            for (ticket, _) in live {
                prop_assert!(queue.take(ticket).is_some());
            }
            prop_assert!(queue.outcomes.is_empty());
        }
    }
}
