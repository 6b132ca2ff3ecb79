//! Why a process cannot be confined.

use std::io;
use std::path::PathBuf;

/// Why a process cannot be confined. It must not go on with what it has.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Rights belong to threads: others would keep theirs.
    #[error("a process is confined before it starts threads; this one has {0}")]
    Threads(usize),
    /// A user or group that there is not.
    #[error("there is no {what} {name:?}; a number is taken as it is")]
    Unknown {
        /// `user` or `group`.
        what: &'static str,
        /// What was asked for.
        name: String,
    },
    /// Root keeps its files, whatever else it gives up.
    #[error("{0:?} is root: name a user that owns nothing else")]
    Root(String),
    /// Another user is for root to choose.
    #[error("only root can run a service as the user {0}; leave the user away, or start as root")]
    NotRoot(User),
    /// A file that is to be allowed.
    #[error("{}, which is to be allowed: {why}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The kernel refused a step.
    #[error("{what}: {error}")]
    System {
        /// Which step.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// No Landlock.
    #[error(
        "paths cannot be restricted ({0}): the kernel needs Landlock (CONFIG_SECURITY_LANDLOCK, \
         and `landlock` in the parameter `lsm`)"
    )]
    Landlock(String),
    /// No seccomp.
    #[error("system calls cannot be restricted ({0}): the kernel needs CONFIG_SECCOMP_FILTER")]
    Filter(String),
}

use crate::user::User;

pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::System {
        what,
        error: error.into(),
    }
}
