//! What the VM's first process and the program outside that started the VM say to each other:
//! the manifest goes in with the initramfs, reports come out on the second serial line.

pub mod hex;
mod manifest;
mod report;

pub use manifest::{Job, Manifest, ManifestError};
pub use report::{Ending, Report};

/// Where the manifest lies in the initramfs.
pub const MANIFEST: &str = "/ioregion/manifest";

/// The serial line that carries the programs' output and the reports; the first one is the
/// kernel's, so that neither breaks into the other's lines.
pub const REPORT_TTY: &str = "/dev/ttyS1";

/// Where programs leave files for the machine outside; the environment variable
/// [`RESULTS_VARIABLE`] says so to them.
pub const RESULTS: &str = "/ioregion/results";

/// The environment variable of programs that holds [`RESULTS`].
pub const RESULTS_VARIABLE: &str = "IOREGION_RESULTS";
