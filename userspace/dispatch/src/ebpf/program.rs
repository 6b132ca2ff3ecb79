//! The program as an embedder sees it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use ioregion_abi::bpf::MAX_DOORBELLS;
use nix::errno::Errno;

use super::binding::Threads;
use super::control::Control;
use super::local::Local;
use super::remote::Remote;

/// File name of the object that `cargo xtask build-ebpf` makes, below `target/`.
const OBJECT: &str = "bpf/ioregion.bpf.o";
/// Directories above the executable that are searched: `target/TRIPLE/release/deps` and its like.
/// Not all, since anyone may create files in `/tmp`.
const SEARCHED: usize = 4;
/// Names another object file.
const OBJECT_VARIABLE: &str = "IOREGION_BPF_OBJECT";

/// A loaded eBPF program.
///
/// It is attached to KVM's tracepoints once a region needs that
/// ([`Via::Tracepoints`](crate::Via::Tracepoints)); regions whose accesses KVM itself shows to it
/// ([`Via::Hook`](crate::Via::Hook)) do not.
///
/// It observes the accesses of the vCPU threads that are registered with it, and of no others.
/// Dropping it (or the process ending in whatever way) detaches it; nothing is pinned.
#[derive(Debug)]
pub struct Program {
    control: Box<dyn Control>,
    threads: Threads,
}

/// What the program has counted; all since it was loaded or the vCPU was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProgramCounters {
    /// Writes that matched a doorbell.
    pub matched: u64,
    /// Writes that matched none. Where the program is attached to tracepoints as well, it sees what
    /// KVM shows it ([`Via::Hook`](crate::Via::Hook)) once more, and knows nothing of it there.
    pub unmatched: u64,
    /// Wake-ups sent through ring buffers.
    pub wakeups: u64,
    /// Wake-ups that a ring buffer refused because it held unread ones.
    pub wakeups_refused: u64,
    /// Writes that the program did not see: skipped by the kernel because the program was
    /// running already on that CPU, or past the longest string output, or without a slot.
    pub lost: u64,
}

/// Why the program cannot be used here. The message says what would help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no object file.
    #[error(
        "no eBPF object at {searched:?}; build it with `cargo xtask build-ebpf`, or name one in {OBJECT_VARIABLE}"
    )]
    NotBuilt {
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// The file cannot be read.
    #[error(
        "the eBPF object {path} cannot be read: {error}; build it with `cargo xtask build-ebpf`"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The cause.
        error: io::Error,
    },
    /// The file is damaged, or no eBPF object at all.
    #[error(
        "this is no eBPF object that could be loaded; build it with `cargo xtask build-ebpf` ({0})"
    )]
    Damaged(Box<dyn std::error::Error + Send + Sync>),
    /// The object is not this library's.
    #[error("the eBPF object has no {missing}; build it from the same revision as this library")]
    Object {
        /// The program or map that it lacks.
        missing: &'static str,
    },
    /// The process may not load BPF programs.
    #[error(
        "loading BPF programs is not permitted: run as root or with CAP_BPF and CAP_PERFMON, or have the loader do it; kernel lockdown above `integrity` forbids it altogether ({0})"
    )]
    NotPermitted(io::Error),
    /// The kernel has no such tracepoint.
    #[error(
        "the kernel has no tracepoint {name}: it needs CONFIG_TRACEPOINTS and KVM, built in or as a loaded module (`modprobe kvm`) ({error})"
    )]
    NoTracepoint {
        /// Name of the tracepoint.
        name: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The kernel or the verifier refused the object.
    #[error(
        "the kernel refuses the eBPF object (it needs 5.17 or newer with CONFIG_BPF_SYSCALL, and CONFIG_DEBUG_INFO_BTF for typed maps): {0}"
    )]
    Refused(Box<dyn std::error::Error + Send + Sync>),
    /// The loader cannot be reached, or refused.
    #[error(
        "the eBPF loader at {path}: {error}; is `ioregion-loader` running, and may this user open its socket?"
    )]
    Loader {
        /// The loader's socket.
        path: PathBuf,
        /// The cause.
        error: io::Error,
    },
    /// Another error of the operating system.
    #[error(transparent)]
    Io(io::Error),
}

impl LoadError {
    pub(super) fn load(error: EbpfError) -> Self {
        match error {
            EbpfError::MapError(error) => error.into(),
            EbpfError::ParseError(_) | EbpfError::RelocationError(_) => Self::Damaged(error.into()),
            error => Self::Refused(error.into()),
        }
    }

    pub(super) fn verify(error: ProgramError) -> Self {
        match error {
            ProgramError::LoadError { io_error, .. } if is_permission(&io_error) => {
                Self::NotPermitted(io_error)
            }
            error => Self::Refused(error.into()),
        }
    }

    pub(super) fn attach(name: &'static str, error: ProgramError) -> Self {
        match error {
            ProgramError::SyscallError(error) if is_permission(&error.io_error) => {
                Self::NotPermitted(error.io_error)
            }
            ProgramError::SyscallError(error)
                if error.io_error.kind() == io::ErrorKind::NotFound =>
            {
                Self::NoTracepoint {
                    name,
                    error: error.io_error,
                }
            }
            ProgramError::SyscallError(error) => Self::Io(error.io_error),
            error => Self::Refused(error.into()),
        }
    }
}

impl LoadError {
    /// The errno that comes closest.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::NotPermitted(_) => Errno::EPERM,
            Self::NoTracepoint { .. } | Self::NotBuilt { .. } => Errno::ENOENT,
            Self::Unreadable { error, .. } | Self::Loader { error, .. } | Self::Io(error) => {
                error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
            }
            _ => Errno::EIO,
        }
    }

    /// What a loader said when it was asked to attach the program.
    pub(super) fn attached(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM) => Self::NotPermitted(error),
            Some(libc::ENOENT) => Self::NoTracepoint {
                name: "kvm_mmio or kvm_pio",
                error,
            },
            _ => Self::Io(error),
        }
    }
}

impl From<MapError> for LoadError {
    fn from(error: MapError) -> Self {
        match error {
            MapError::CreateError { io_error, .. } if is_permission(&io_error) => {
                Self::NotPermitted(io_error)
            }
            MapError::CreateError { io_error, .. } if is_shortage(&io_error) => Self::Io(io_error),
            error => Self::Refused(error.into()),
        }
    }
}

impl From<ProgramError> for LoadError {
    fn from(error: ProgramError) -> Self {
        Self::Refused(error.into())
    }
}

/// Whether the object is not to blame.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
    )
}

fn is_permission(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

impl Program {
    /// Loads the program from an object in memory, and makes sure that it can be attached.
    ///
    /// # Errors
    ///
    /// [`LoadError`], with the reason and the remedy.
    pub fn load(object: &[u8]) -> Result<Arc<Self>, LoadError> {
        Self::load_sized(object, MAX_DOORBELLS)
    }

    /// The same with room for another number of doorbells than
    /// [`MAX_DOORBELLS`](ioregion_abi::bpf::MAX_DOORBELLS).
    ///
    /// # Errors
    ///
    /// [`LoadError`], with the reason and the remedy.
    pub fn load_sized(object: &[u8], max_doorbells: u32) -> Result<Arc<Self>, LoadError> {
        Ok(Self::with_control(Box::new(Local::load(
            object,
            max_doorbells,
            None,
        )?)))
    }

    /// Loads the object that [`find`](Self::find) finds.
    ///
    /// # Errors
    ///
    /// [`LoadError`], with the reason and the remedy.
    pub fn load_default() -> Result<Arc<Self>, LoadError> {
        let path = Self::find()?;
        let object = std::fs::read(&path).map_err(|error| LoadError::Unreadable { path, error })?;
        Self::load(&object)
    }

    /// Has a privileged loader (`ioregion-loader`, or any caller of
    /// [`serve_vmm`](super::serve_vmm)) hold the program for this process, which needs no
    /// privileges then. When the loader goes, so does the program, and the VM's doorbells are
    /// carried over their channels instead ([`Event::ProgramGone`](crate::Event::ProgramGone)).
    ///
    /// # Errors
    ///
    /// [`LoadError::Loader`].
    pub fn connect(loader: impl AsRef<Path>) -> Result<Arc<Self>, LoadError> {
        Ok(Self::with_control(Box::new(Remote::connect(
            loader.as_ref(),
        )?)))
    }

    /// The object file: the one that `IOREGION_BPF_OBJECT` names, else `bpf/ioregion.bpf.o` in
    /// a directory above the running executable (`target/` in a checkout).
    ///
    /// # Errors
    ///
    /// [`LoadError::NotBuilt`] with the places that were searched.
    pub fn find() -> Result<PathBuf, LoadError> {
        if let Some(path) = std::env::var_os(OBJECT_VARIABLE) {
            return Ok(path.into());
        }
        let executable = std::env::current_exe().map_err(LoadError::Io)?;
        let searched: Vec<_> = executable
            .ancestors()
            .skip(1)
            .take(SEARCHED)
            .map(|dir| dir.join(OBJECT))
            .collect();
        let found = searched.iter().find(|path| Path::is_file(path)).cloned();
        found.ok_or(LoadError::NotBuilt { searched })
    }

    fn with_control(control: Box<dyn Control>) -> Arc<Self> {
        Arc::new(Self {
            control,
            threads: Threads::default(),
        })
    }

    pub(crate) fn control(&self) -> &dyn Control {
        &*self.control
    }

    pub(super) fn threads(&self) -> &Threads {
        &self.threads
    }

    /// Hands what the program has logged since the last call to the logger of the `log` crate.
    /// Only an object that was built with `cargo xtask build-ebpf --log` logs anything, and a
    /// loader keeps its programs' logs to itself.
    #[cfg(feature = "log")]
    pub fn flush_log(&self) {
        self.control.flush_log();
    }

    /// Puts the program on its tracepoints before a region needs them, or takes it off again, for
    /// measuring what it costs while no region uses it: doorbells that are rung after it was taken
    /// off are swallowed and lost. The next region that needs them puts it back.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; a loader's program cannot be taken off.
    #[doc(hidden)]
    pub fn set_attached(&self, attached: bool) -> Result<(), LoadError> {
        self.control.set_attached(attached)
    }

    /// How often the kernel skipped the program because it was running already on that CPU:
    /// each may be a doorbell whose value was lost.
    ///
    /// # Errors
    ///
    /// The operating system's or the loader's.
    pub fn recursion_misses(&self) -> io::Result<u64> {
        self.control.recursion_misses()
    }
}
