//! Processes that give up every right they do not need.
//!
//! A [`Confinement`] says what a process keeps; [`Confinement::apply`] takes away the rest, for
//! good: the user, capabilities, namespaces, paths (Landlock) and system calls (seccomp). It is
//! applied before the process starts threads, once everything is open that the process works on.
//! What needs rights later is left to a small process that keeps them ([`fork`]).
//!
//! ```no_run
//! use ioregion_sandbox::{Calls, Confinement, User};
//!
//! # fn main() -> Result<(), ioregion_sandbox::Error> {
//! // Open files and devices first.
//! Confinement::new(Calls::service().io_uring())
//!     .user(User::find("nobody")?)
//!     .isolated()
//!     .apply()?;
//! // From here on: threads, and descriptors that are open.
//! # Ok(())
//! # }
//! ```
//!
//! # What happens to a process that breaks its rules
//!
//! * A system call that is not allowed **ends the process** by SIGSYS, after a line on standard
//!   error that names the call; the kernel's audit and the exit status show it, too. An error
//!   instead would let the process go on with something undone that it relies on, and give
//!   whoever took it over as many attempts as they like.
//! * Opening and looking at files fails with `EACCES`: libraries look for files that they can do
//!   without (a processor count, the source lines of a panic), and ending a process for that
//!   would make faults worse. So does what Landlock and missing rights refuse.
//!
//! # What the rules do not see
//!
//! Requests over io_uring are not system calls. To them the user, Landlock and the namespaces
//! apply: no file can be opened, and a socket reaches nobody.

mod calls;
mod confine;
mod error;
mod message;
mod process;
mod user;
mod violation;

pub use calls::Calls;
pub use confine::{Confinement, FileAccess};
pub use error::Error;
pub use message::{receive, send};
pub use process::{Child, fork};
pub use user::User;
