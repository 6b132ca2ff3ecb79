//! The log of a device: a file by which another process takes the device over.
//!
//! It holds which device it is of and, for each queue, what is in flight
//! ([`QueueLog`]), where it stands while it stands still, and the address space of its memory. The file is mapped and shared, so that it outlives a process that is killed at
//! any instruction (not the machine, whose drivers do not either). Whoever serves the device holds
//! a lock on it.
//!
//! Everything in it is checked: the file may be another device's, of another version, cut short, or
//! no log at all.

mod standing;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioregion_abi::vduse::VDUSE_NAME_MAX;
use ioregion_devices::virtio::{QueueLog, Words};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, posix_fallocate};

use crate::identity::Identity;
use crate::sys::Mapping;

/// First word. A file without it is left alone.
const MAGIC: u64 = u64::from_ne_bytes(*b"ioreglog");
/// Second word, written last.
const VERSION: u64 = 2;
/// There until then.
const UNFINISHED: u64 = 0;

/// Words of the head.
mod at {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    /// Two words.
    pub(super) const BOOT: usize = 2;
    pub(super) const INODE: usize = 4;
    pub(super) const KIND: usize = 5;
    pub(super) const QUEUES: usize = 6;
    pub(super) const QUEUE_SIZE: usize = 7;
    pub(super) const FEATURES: usize = 8;
    /// What the driver does; the only word of the head that changes.
    pub(super) const SESSION: usize = 9;
    /// The name, ended by a zero.
    pub(super) const NAME: usize = 10;
    pub(super) const END: usize = NAME + super::VDUSE_NAME_MAX / 8;
}

const NO_DRIVER: u64 = 0;
const DRIVER: u64 = 1;
const ENDING: u64 = 2;
const SUSPENDED: u64 = 3;

/// What a log is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// The device's name.
    pub name: String,
    /// Which device of that name.
    pub identity: Identity,
    /// Its virtio type.
    pub kind: u32,
    /// The features that it offers.
    pub features: u64,
    /// Its queues.
    pub queues: u16,
    /// The largest size of a queue.
    pub queue_size: u16,
}

/// Why a file cannot be the log of a device. Each names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogFileError {
    /// The system refuses.
    #[error("the log {}: {what}: {error}", .path.display())]
    System {
        /// Which file.
        path: PathBuf,
        /// What was asked for.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// Another service has it.
    #[error("the log {} is in use: another process serves its device", .0.display())]
    Locked(PathBuf),
    /// A file that is no log.
    #[error("{} is no log of a device; name another file, or remove it", .0.display())]
    NoLog(PathBuf),
    /// Another version of this program wrote it.
    #[error(
        "the log {} is of version {version}, this program knows {VERSION}: have the program that \
         wrote it serve the device, or remove both",
        .path.display()
    )]
    Version {
        /// Which file.
        path: PathBuf,
        /// What it says.
        version: u64,
    },
    /// A device that is still there, and whose service will need it.
    #[error(
        "{} is the log of the device {other}, whose requests it holds; name another file",
        .path.display()
    )]
    Other {
        /// Which file.
        path: PathBuf,
        /// That device's name.
        other: String,
    },
    /// The device was made with other options.
    #[error(
        "the device {name} was made with {was} {what}, by its log {}; this service would have \
         {is}: give it the options of the one before",
        .path.display()
    )]
    Options {
        /// Which file.
        path: PathBuf,
        /// The device.
        name: String,
        /// What differs.
        what: &'static str,
        /// What the log says.
        was: String,
        /// What was asked for.
        is: String,
    },
}

/// What the log says of the device's driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Session {
    /// Nobody drives the device.
    None,
    /// A driver is ready; the logs of queues are its.
    Driver,
    /// The same, but all queues have to stand still until it resets the device.
    Suspended,
    /// It was resetting the device: logs of queues may be gone.
    Ending,
}

/// The log of a device, which nobody else has.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    words: Arc<Mapped>,
    logged: Logged,
    /// It was said that the file was cut short.
    said: AtomicBool,
    /// Holds the lock.
    _file: Flock<File>,
}

/// The file's words.
#[derive(Debug)]
struct Mapped(Mapping);

impl Words for Mapped {
    fn load(&self, at: usize) -> u64 {
        self.0.load_long(8 * at as u64).unwrap_or_default()
    }

    fn store(&self, at: usize, value: u64) {
        self.0.store_long(8 * at as u64, value).unwrap_or_default();
    }
}

impl Log {
    /// Where logs lie unless something else is said: `/run/ioregion/vduse-NAME.log`.
    #[must_use]
    pub fn path_for(name: &str) -> PathBuf {
        Path::new("/run/ioregion").join(format!("vduse-{name}.log"))
    }

    /// Opens the log of a device. A file that is not there, or that is of a device which no longer
    /// exists, becomes a new one; its folder is made, too.
    ///
    /// # Errors
    ///
    /// What is wrong with the file, with the remedy.
    pub fn open(path: &Path, logged: &Logged) -> Result<Self, LogFileError> {
        let exists = |name: &str, identity| Identity::of(name).is_ok_and(|is| is == identity);
        Self::open_with(path, logged, exists)
    }

    /// Makes the folder that a log at this path lies in, where there is none.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn make_folder(path: &Path) -> Result<(), LogFileError> {
        let Some(folder) = path.parent() else {
            return Ok(());
        };
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o755).create(folder);
        made.map_err(|error| LogFileError::System {
            path: path.into(),
            what: "making its folder",
            error,
        })
    }

    fn open_with(
        path: &Path,
        logged: &Logged,
        exists: impl FnOnce(&str, Identity) -> bool,
    ) -> Result<Self, LogFileError> {
        let failed = |what| {
            let path = path.to_owned();
            move |error| LogFileError::System { path, what, error }
        };
        Self::make_folder(path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            // A link would have this process write where its maker may not.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
            .map_err(failed("opening it"))?;
        let metadata = file.metadata().map_err(failed("looking at it"))?;
        if !metadata.is_file() {
            return Err(LogFileError::NoLog(path.into()));
        }
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    Errno::EWOULDBLOCK => LogFileError::Locked(path.into()),
                    errno => failed("locking it")(errno.into()),
                },
            )?;
        let bytes = Self::words_for(logged) as u64 * 8;
        let head = Head::read(&file).map_err(failed("reading it"))?;
        let keep = match head.word(at::MAGIC) {
            _ if metadata.len() == 0 => false,
            MAGIC if head.word(at::VERSION) == UNFINISHED => false,
            MAGIC if head.word(at::VERSION) != VERSION => {
                let (path, version) = (path.into(), head.word(at::VERSION));
                return Err(LogFileError::Version { path, version });
            }
            MAGIC if head.identity() == logged.identity.words() => {
                if let Some((what, was, is)) = head.differs(logged) {
                    let (path, name) = (path.into(), logged.name.clone());
                    return Err(LogFileError::Options {
                        path,
                        name,
                        what,
                        was,
                        is,
                    });
                }
                // Cut short.
                if metadata.len() != bytes {
                    return Err(LogFileError::NoLog(path.into()));
                }
                true
            }
            MAGIC => {
                let [low, high, inode] = head.identity();
                let boot = u128::from(high) << 64 | u128::from(low);
                let other = head.name();
                if exists(&other, Identity { boot, inode }) {
                    let path = path.into();
                    return Err(LogFileError::Other { path, other });
                }
                false
            }
            _ => return Err(LogFileError::NoLog(path.into())),
        };
        let size = i64::try_from(bytes).unwrap_or(i64::MAX);
        if !keep {
            let start = [MAGIC.to_ne_bytes(), UNFINISHED.to_ne_bytes()].concat();
            file.write_all_at(&start, 0).map_err(failed("writing it"))?;
            let written = start.len() as u64;
            file.set_len(written).map_err(failed("emptying it"))?;
            // All of it now: the mapping could not say that there is no room.
            posix_fallocate(&*file, 0, size)
                .map_err(|errno| failed("making room")(errno.into()))?;
        }
        let mapping = Mapping::new(&*file, 0, bytes, true, true).map_err(failed("mapping it"))?;
        let log = Self {
            path: path.into(),
            words: Arc::new(Mapped(mapping)),
            logged: logged.clone(),
            said: AtomicBool::new(false),
            _file: file,
        };
        if !keep {
            log.write_head();
        }
        Ok(log)
    }

    fn words_for(logged: &Logged) -> usize {
        standing::first(logged) + usize::from(logged.queues) * standing::WORDS
    }

    fn write_head(&self) {
        let logged = &self.logged;
        let mut words = [0; at::END];
        words[at::MAGIC] = MAGIC;
        words[at::BOOT..][..3].copy_from_slice(&logged.identity.words());
        words[at::KIND] = logged.kind.into();
        words[at::QUEUES] = logged.queues.into();
        words[at::QUEUE_SIZE] = logged.queue_size.into();
        words[at::FEATURES] = logged.features;
        words[at::SESSION] = NO_DRIVER;
        for (word, bytes) in words[at::NAME..]
            .iter_mut()
            .zip(logged.name.as_bytes().chunks(8))
        {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(padded);
        }
        for (at, word) in words.into_iter().enumerate() {
            self.words.store(at, word);
        }
        self.words.store(at::VERSION, VERSION);
    }

    /// Makes it the log of another device that is made like the one before, which is gone.
    pub fn renew(&mut self, identity: Identity) {
        self.logged.identity = identity;
        // Until it is whole again it is nobody's.
        self.words.store(at::VERSION, UNFINISHED);
        self.clear();
        // Nor has its driver moved any queue to another address space.
        for queue in 0..self.logged.queues {
            self.set_space(queue, 0);
        }
        self.write_head();
        // Of a file that was cut short this device has to hear, too.
        self.said = AtomicBool::new(false);
    }

    /// What it is of.
    #[must_use]
    pub fn logged(&self) -> &Logged {
        &self.logged
    }

    /// The log of a queue; nothing where the device has no such queue.
    #[must_use]
    pub fn queue(&self, index: u16) -> Option<QueueLog> {
        let room = self.logged.queue_size;
        let first = at::END + usize::from(index) * QueueLog::words_for(room);
        let words = Arc::clone(&self.words) as Arc<dyn Words>;
        (index < self.logged.queues).then(|| QueueLog::new(words, first, room))
    }

    /// Says so, once, where the file was cut short while it was used.
    pub(crate) fn check(&self) {
        if self.words.0.vanished() && !self.said.swap(true, Ordering::Relaxed) {
            tracing::error!(
                device = self.logged.name,
                "the log {} was cut short: the device goes on, but where this process dies \
                 nobody can take it over",
                self.path.display()
            );
        }
    }

    pub(crate) fn session(&self) -> Session {
        match self.words.load(at::SESSION) {
            DRIVER => Session::Driver,
            NO_DRIVER => Session::None,
            SUSPENDED => Session::Suspended,
            // Nothing is taken over from a log that says anything else.
            _ => Session::Ending,
        }
    }

    /// A driver will be ready once the kernel has the answer. No queue may be served yet.
    pub(crate) fn begin_session(&self) {
        self.clear();
        self.words.store(at::SESSION, DRIVER);
    }

    /// All queues stand still, with their positions on record, or may go on.
    pub(crate) fn suspend(&self, suspended: bool) {
        let session = if suspended { SUSPENDED } else { DRIVER };
        self.words.store(at::SESSION, session);
    }

    /// The driver has reset the device. No queue may be served any more.
    pub(crate) fn end_session(&self) {
        self.words.store(at::SESSION, ENDING);
        self.clear();
        self.words.store(at::SESSION, NO_DRIVER);
    }

    fn clear(&self) {
        for index in 0..self.logged.queues {
            self.clear_queue(index);
        }
    }

    /// Removes the file: the device is removed.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn remove(&self) -> Result<(), LogFileError> {
        std::fs::remove_file(&self.path).map_err(|error| LogFileError::System {
            path: self.path.clone(),
            what: "removing it",
            error,
        })
    }
}

/// The head of a file that may be anything.
struct Head([u8; 8 * at::END]);

impl Head {
    /// What is not there counts as zeroes.
    fn read(file: &File) -> io::Result<Self> {
        let mut head = Self([0; 8 * at::END]);
        let mut done = 0;
        while done < head.0.len() {
            match file.read_at(&mut head.0[done..], done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(head)
    }

    fn word(&self, at: usize) -> u64 {
        let bytes = self.0.get(8 * at..).and_then(|rest| rest.first_chunk());
        u64::from_ne_bytes(*bytes.unwrap_or(&[0; 8]))
    }

    fn identity(&self) -> [u64; 3] {
        [at::BOOT, at::BOOT + 1, at::INODE].map(|at| self.word(at))
    }

    fn name(&self) -> String {
        let bytes = &self.0[8 * at::NAME..];
        let end = bytes.iter().position(|&byte| byte == 0);
        String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
    }

    /// What differs from a device, in the log and there.
    fn differs(&self, logged: &Logged) -> Option<(&'static str, String, String)> {
        let (was, is) = (self.word(at::FEATURES), logged.features);
        if was != is {
            return Some(("as features", format!("{was:#x}"), format!("{is:#x}")));
        }
        let numbers = [
            ("as its type", at::KIND, u64::from(logged.kind)),
            ("queues", at::QUEUES, logged.queues.into()),
            ("as queue size", at::QUEUE_SIZE, logged.queue_size.into()),
        ];
        let differs = numbers.into_iter().find(|&(_, at, is)| self.word(at) != is);
        differs.map(|(what, at, is)| (what, self.word(at).to_string(), is.to_string()))
    }
}

#[cfg(test)]
mod tests;
