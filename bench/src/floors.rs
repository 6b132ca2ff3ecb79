//! Floors without a guest: what two host threads pay to wake each other and be answered.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::gettid;

use crate::run::{Cost, Run, pin};
use crate::scenarios::Carrier;

/// Bytes of one message, as on the wire.
const MESSAGE: usize = ioregion_dispatch::wire::MESSAGE_LEN;

/// One end of a ping-pong; a message carries a number.
trait End: Send {
    fn send(&mut self, number: u64) -> Result<()>;
    /// `None`: the other end is gone.
    fn receive(&mut self) -> Result<Option<u64>>;
}

struct Eventfds {
    ours: EventFd,
    theirs: EventFd,
    received: u64,
}

impl End for Eventfds {
    fn send(&mut self, number: u64) -> Result<()> {
        // An eventfd carries no number, but a large one says that this is the end.
        self.theirs.write(if number == 0 { 1 << 32 } else { 1 })?;
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<u64>> {
        let count = self.ours.read()?;
        self.received += count;
        Ok((count < 1 << 32).then_some(self.received))
    }
}

impl End for UnixStream {
    fn send(&mut self, number: u64) -> Result<()> {
        let mut message = [0; MESSAGE];
        message[..8].copy_from_slice(&number.to_ne_bytes());
        Ok(self.write_all(&message)?)
    }

    fn receive(&mut self) -> Result<Option<u64>> {
        let mut message = [0; MESSAGE];
        self.read_exact(&mut message)?;
        let mut number = [0; 8];
        number.copy_from_slice(&message[..8]);
        let number = u64::from_ne_bytes(number);
        Ok((number != 0).then_some(number))
    }
}

/// When there are enough round trips.
#[derive(Debug, Clone, Copy)]
pub enum Enough {
    /// After this time.
    Time(Duration),
    /// After so many.
    Trips(u64),
}

/// Round trips between a thread on `here` and one on `there`.
pub fn ping_pong(carrier: Carrier, here: usize, there: usize, enough: Enough) -> Result<Run> {
    match carrier {
        Carrier::EventfdPingPong => {
            let eventfd = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC);
            let (a, b) = (eventfd()?, eventfd()?);
            let twin = |e: &EventFd| -> Result<EventFd> {
                // SAFETY: It is a duplicate of an eventfd.
                Ok(unsafe { EventFd::from_owned_fd(e.as_fd().try_clone_to_owned()?) })
            };
            let other = Eventfds {
                ours: twin(&b)?,
                theirs: twin(&a)?,
                received: 0,
            };
            play(
                Eventfds {
                    ours: a,
                    theirs: b,
                    received: 0,
                },
                other,
                here,
                there,
                enough,
            )
        }
        Carrier::SocketpairPingPong => {
            let (a, b) = UnixStream::pair()?;
            play(a, b, here, there, enough)
        }
        other => bail!("{other:?} is no ping-pong"),
    }
}

fn play(
    mut a: impl End,
    mut b: impl End,
    here: usize,
    there: usize,
    enough: Enough,
) -> Result<Run> {
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || -> Result<Cost> {
            pin(Some(there))?;
            let before = Cost::of(gettid())?;
            while let Some(number) = b.receive()? {
                b.send(number)?;
            }
            Ok(Cost::of(gettid())?.since(before))
        });
        let caller = scope.spawn(move || -> Result<Run> {
            pin(Some(here))?;
            let mut run = Run::default();
            let before = Cost::of(gettid())?;
            let began = Instant::now();
            while match enough {
                Enough::Time(time) => run.wall < time,
                Enough::Trips(trips) => run.accesses < trips,
            } {
                let number = run.accesses + 1;
                let sent = Instant::now();
                a.send(number)?;
                let answer = a.receive()?.context("no answer")?;
                run.timings.push(sent.elapsed().as_nanos() as f64);
                if answer != number {
                    bail!("message {number} was answered with {answer}");
                }
                run.accesses = number;
                run.wall = began.elapsed();
            }
            run.vcpu = Cost::of(gettid())?.since(before);
            a.send(0)?;
            Ok(run)
        });
        let mut run = caller
            .join()
            .map_err(|_| anyhow!("the caller panicked"))??;
        run.device = echo.join().map_err(|_| anyhow!("the echo panicked"))??;
        Ok(run)
    })
}
