//! Handing a [`DeviceEnd`] to another process, over a Unix socket.
//!
//! One frame (see the source of `frame`) with a description and the descriptors. The receiver
//! trusts none of it.
//! Descriptors are those of the wire, eventfds, BPF maps and shared memory: never KVM's.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use ioregion_abi::Size;
use ioregion_abi::wire::Layout;
use serde::{Deserialize, Serialize};

use crate::frame::{self, FrameError};
use crate::region::{DataMatch, Delivery, Doorbell, Sink, Wake};
use crate::registers::RegisterFile;
use crate::server::DeviceEnd;
use crate::source::{DoorbellSource, EventDoorbell, Eventfds, Port, PortParts, SlotDoorbell};
use crate::wire::{self, Transport};

/// Longest description, in bytes.
pub const MAX_DESCRIPTION: u32 = 64 << 20;

/// Why an end could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    /// The frame could not be sent or received.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The description contradicts itself or the descriptors that came.
    #[error("description: {0}")]
    Mismatch(&'static str),
    /// A descriptor does not work for what it is said to be.
    #[error("{what}: {error}")]
    Descriptor {
        /// What it is said to be.
        what: &'static str,
        /// What is wrong with it.
        error: io::Error,
    },
}

/// `(offset, size in bytes)`
type Place = (u64, u8);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    transport: String,
    v3: bool,
    wire_fds: u32,
    sources: Vec<SourceDescription>,
    regions: Vec<(u64, Vec<DoorbellDescription>)>,
    /// One descriptor each, after those of the sources: `(user_data, length, is it a BPF map)`.
    #[serde(default)]
    registers: Vec<(u64, u32, bool)>,
}

#[derive(Serialize, Deserialize)]
enum SourceDescription {
    /// One descriptor for each doorbell; `(index, place, value)`.
    Eventfds {
        user_data: u64,
        doorbells: Vec<(u32, Place, Option<u64>)>,
    },
    /// Slots, control words, eventfd, ring buffer; `(index, place)`.
    Port {
        user_data: u64,
        doorbells: Vec<(u32, Place)>,
        eventfd: bool,
        ringbuf: bool,
    },
}

/// Place, `(mask, value)`, delivery, wake, sink: the last three by their place in `DELIVERIES`,
/// `WAKES` and `SINKS`.
type DoorbellDescription = (Place, Option<(u64, u64)>, u8, u8, u8);

const DELIVERIES: [Delivery; 2] = [Delivery::Latest, Delivery::Fifo];
const WAKES: [Wake; 3] = [Wake::Never, Wake::WhenArmed, Wake::Always];
const SINKS: [Sink; 2] = [Sink::Ioeventfd, Sink::Coalesced];

/// Sends an end to the process at the other end of `socket`, and closes it here.
///
/// Hand an end over before it is used: a message that has arrived in part is not sent along.
///
/// # Errors
///
/// [`HandoffError::Frame`], among others for an end that is too large. The receiver
/// may then have a part of the descriptors, which it closes.
pub fn send(socket: &UnixStream, end: DeviceEnd) -> Result<(), HandoffError> {
    let (description, fds) = take_apart(end).map_err(|error| HandoffError::Descriptor {
        what: "eventfds or registers",
        error,
    })?;
    Ok(frame::send(socket, &description, &fds, MAX_DESCRIPTION)?)
}

/// Receives an end that [`send`] sent.
///
/// Blocks until it is complete; a receiver that must not wait for ever sets a read timeout on
/// the socket. Descriptors are closed on `exec`, and if anything is wrong, at once.
///
/// # Errors
///
/// [`HandoffError`].
pub fn recv(socket: &UnixStream) -> Result<DeviceEnd, HandoffError> {
    let (description, fds) = frame::recv(socket, MAX_DESCRIPTION, frame::MAX_DESCRIPTORS)?;
    put_together(description, fds)
}

fn take_apart(end: DeviceEnd) -> io::Result<(Description, Vec<OwnedFd>)> {
    let transport = end.wire.transport().name().to_owned();
    let mut fds = end.wire.into_fds();
    let wire_fds = fds.len() as u32;
    let mut sources = Vec::new();
    for source in end.sources {
        sources.push(match source {
            DoorbellSource::Eventfds(eventfds) => {
                let user_data = eventfds.user_data;
                let mut doorbells = Vec::new();
                for bell in eventfds.doorbells {
                    doorbells.push((bell.index, (bell.offset, bell.size.bytes()), bell.value));
                    fds.push(match Arc::try_unwrap(bell.eventfd) {
                        Ok(eventfd) => eventfd,
                        Err(shared) => shared.try_clone()?,
                    });
                }
                SourceDescription::Eventfds {
                    user_data,
                    doorbells,
                }
            }
            DoorbellSource::Port(port) => {
                let parts = port.parts;
                let description = SourceDescription::Port {
                    user_data: parts.user_data,
                    doorbells: (parts.doorbells.iter())
                        .map(|bell| (bell.index, (bell.offset, bell.size.bytes())))
                        .collect(),
                    eventfd: parts.eventfd.is_some(),
                    ringbuf: parts.ringbuf.is_some(),
                };
                fds.extend([parts.slots, parts.controls]);
                fds.extend(parts.eventfd);
                fds.extend(parts.ringbuf);
                description
            }
        });
    }
    let describe = |bell: &Doorbell| -> DoorbellDescription {
        (
            (bell.offset, bell.size.bytes()),
            bell.datamatch.map(|m| (m.mask, m.value)),
            place(&DELIVERIES, bell.delivery),
            place(&WAKES, bell.wake),
            place(&SINKS, bell.sink),
        )
    };
    let regions = (end.regions.iter())
        .map(|(user_data, bells)| (*user_data, bells.iter().map(describe).collect()))
        .collect();
    let mut registers = Vec::new();
    for (user_data, file) in end.registers {
        registers.push((user_data, file.len(), file.is_map()));
        fds.push(file.descriptor()?);
    }
    let v3 = end.layout == Layout::V3;
    Ok((
        Description {
            transport,
            v3,
            wire_fds,
            sources,
            regions,
            registers,
        },
        fds,
    ))
}

fn place<T: PartialEq>(table: &[T], value: T) -> u8 {
    table
        .iter()
        .position(|entry| *entry == value)
        .unwrap_or(usize::MAX) as u8
}

fn put_together(description: Description, fds: Vec<OwnedFd>) -> Result<DeviceEnd, HandoffError> {
    use HandoffError::Mismatch;
    let at_fault = |what| move |error| HandoffError::Descriptor { what, error };
    let mut fds = fds.into_iter();
    let mut next = || {
        fds.next()
            .ok_or(Mismatch("fewer descriptors than described"))
    };

    let transport = Transport::named(&description.transport);
    let transport = transport.ok_or(Mismatch("unknown transport"))?;
    let wire_fds = (0..description.wire_fds)
        .map(|_| next())
        .collect::<Result<_, _>>()?;
    let wire = wire::from_fds(transport, wire_fds).map_err(at_fault("wire"))?;
    let layout = if description.v3 {
        Layout::V3
    } else {
        Layout::Info
    };
    let mut end = DeviceEnd::new(wire, layout);

    for source in description.sources {
        end = end.source(match source {
            SourceDescription::Eventfds {
                user_data,
                doorbells,
            } => {
                let doorbells = (doorbells.into_iter())
                    .map(|(index, (offset, bytes), value)| {
                        let (eventfd, size) = (Arc::new(next()?), size(bytes)?);
                        Ok(EventDoorbell {
                            eventfd,
                            index,
                            offset,
                            size,
                            value,
                        })
                    })
                    .collect::<Result<_, HandoffError>>()?;
                let eventfds = Eventfds::new(user_data, doorbells);
                DoorbellSource::Eventfds(eventfds.map_err(at_fault("eventfds"))?)
            }
            SourceDescription::Port {
                user_data,
                doorbells,
                eventfd,
                ringbuf,
            } => {
                let doorbells = (doorbells.into_iter())
                    .map(|(index, (offset, bytes))| {
                        Ok(SlotDoorbell {
                            index,
                            offset,
                            size: size(bytes)?,
                        })
                    })
                    .collect::<Result<_, HandoffError>>()?;
                let port = Port::new(PortParts {
                    user_data,
                    doorbells,
                    slots: next()?,
                    controls: next()?,
                    eventfd: eventfd.then(&mut next).transpose()?,
                    ringbuf: ringbuf.then(&mut next).transpose()?,
                });
                DoorbellSource::Port(port.map_err(at_fault("port"))?)
            }
        });
    }
    for (user_data, bells) in description.regions {
        end = end.region(
            user_data,
            bells.into_iter().map(doorbell).collect::<Result<_, _>>()?,
        );
    }
    for (user_data, len, is_map) in description.registers {
        let file = RegisterFile::received(next()?, len, is_map).map_err(at_fault("registers"))?;
        end = end.with_registers(user_data, file);
    }
    match next() {
        Ok(_) => Err(Mismatch("more descriptors than described")),
        Err(_) => Ok(end),
    }
}

fn size(bytes: u8) -> Result<Size, HandoffError> {
    Size::from_bytes(bytes.into()).ok_or(HandoffError::Mismatch("no size of an access"))
}

fn doorbell(description: DoorbellDescription) -> Result<Doorbell, HandoffError> {
    let ((offset, bytes), datamatch, delivery, wake, sink) = description;
    let unknown = HandoffError::Mismatch("unknown kind of doorbell");
    let kinds = (
        DELIVERIES.get(usize::from(delivery)),
        WAKES.get(usize::from(wake)),
        SINKS.get(usize::from(sink)),
    );
    let (Some(&delivery), Some(&wake), Some(&sink)) = kinds else {
        return Err(unknown);
    };
    Ok(Doorbell {
        offset,
        size: size(bytes)?,
        datamatch: datamatch.map(|(mask, value)| DataMatch { mask, value }),
        delivery,
        wake,
        sink,
    })
}
