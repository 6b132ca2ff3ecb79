//! What the VM's first process and the program outside that started the VM say to each other:
//! the manifest goes in with the initramfs, reports come out on the second serial line.

mod manifest;
mod report;

pub use manifest::{Job, Manifest, ManifestError};
pub use report::{Ending, Report};

/// Where the manifest lies in the initramfs.
pub const MANIFEST: &str = "/ioregion/manifest";

/// The serial line that carries the programs' output and the reports; the first one is the
/// kernel's, so that neither breaks into the other's lines.
pub const REPORT_TTY: &str = "/dev/ttyS1";
