//! Admin commands are carried out, and events reported.

use std::sync::atomic::Ordering;

use super::admin::{Task, View};
use super::command::Command;
use super::controller::{Controller, lock};
use super::logs::Error;
use super::prp;
use super::queues::Answer;
use super::spec::Status;
use crate::memory::segments;

/// What became of an admin command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done: dword 0 of its answer.
    Answer(u32),
    /// It is answered when what it waits for is over.
    Later,
    /// It waits for an event.
    Event,
}

impl Controller {
    /// Reports events, as far as there are commands for that and room for their answers.
    pub(super) fn deliver(&self) {
        let mut vector = None;
        loop {
            let mut admin = lock(&self.admin);
            if !admin.events.is_due() || !self.keep_room() {
                break;
            }
            let Some((command, event)) = admin.events.take() else {
                break;
            };
            drop(admin);
            let (result, status) = match event {
                Some(event) => (event.result(), Status::SUCCESS),
                None => (0, Status::ABORTED),
            };
            let answer = Answer {
                command,
                result,
                status,
            };
            vector = self.answer(0, Some(answer)).or(vector);
        }
        if let Some(vector) = vector {
            self.vectors.raise(vector);
        }
    }

    /// Carries out what the admin queue has.
    pub(super) fn run_admin(&self) {
        let mut vector = None;
        while let Some((command, page)) = self.take(0) {
            let (result, status) = match self.execute(&command, page) {
                Ok(Outcome::Answer(result)) => (result, Status::SUCCESS),
                Ok(Outcome::Later) => continue,
                Ok(Outcome::Event) => {
                    self.answer(0, None);
                    self.deliver();
                    continue;
                }
                Err(status) => (0, status),
            };
            if status != Status::SUCCESS {
                self.note_error(Error {
                    sq: 0,
                    command: Some(command.id),
                    status,
                    lba: 0,
                    nsid: command.nsid,
                });
            }
            let answer = Answer {
                command: command.id,
                result,
                status,
            };
            vector = self.answer(0, Some(answer)).or(vector);
            // Log pages that are read and features that are set let events out.
            self.deliver();
        }
        if let Some(vector) = vector {
            self.vectors.raise(vector);
        }
    }

    /// Carries out an admin command.
    fn execute(&self, command: &Command, page: u64) -> Result<Outcome, Status> {
        let view = View {
            has_queues: self.has_queues(),
            blocks: self.image.sectors(),
            totals: self.totals(),
        };
        let task = lock(&self.admin).task(command, view)?;
        match task {
            Task::Done(result) => Ok(Outcome::Answer(result)),
            Task::Wait => Ok(Outcome::Event),
            Task::Tell(bytes) => {
                let len = u32::try_from(bytes.len()).map_err(|_| Status::INTERNAL)?;
                let place = prp::segments(&*self.memory, command.prp, len, page)?;
                let told = segments::write(&place, &*self.memory, 0, &bytes);
                told.map_err(|_| Status::DATA_TRANSFER)?;
                Ok(Outcome::Answer(0))
            }
            Task::WriteCache(used) => {
                self.write_cache.store(used, Ordering::Release);
                if !used {
                    // What is in it is safe when this is answered.
                    self.image.flush().map_err(|error| {
                        tracing::warn!(%error, "image");
                        Status::WRITE_FAULT
                    })?;
                }
                Ok(Outcome::Answer(0))
            }
            Task::CreateCq { id, place, vector } => self.create_cq(id, place, vector),
            Task::CreateSq { id, place, cq } => self.create_sq(id, place, cq, page),
            Task::DeleteCq(id) => self.delete_cq(id, command.id),
            Task::DeleteSq(id) => self.delete_sq(id, command.id),
            Task::Shadows(at) => self.set_shadows(at),
        }
    }
}
