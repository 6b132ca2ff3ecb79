//! A wire over two FIFOs that were opened by their names.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use ioregion_dispatch::Transport;
use ioregion_dispatch::wire::{self, Wire};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// Makes both ends: the VMM's and the device's. The names are gone when this returns.
///
/// # Errors
///
/// The system's, for example where the folder of temporary files cannot be written to.
pub fn pair() -> Result<(Box<dyn Wire>, Box<dyn Wire>)> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = format!("ioregion-bench-{}-{number}", std::process::id());
    let folder = std::env::temp_dir().join(folder);
    std::fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let both = fifo(&folder.join("commands"))
        .and_then(|commands| Ok((commands, fifo(&folder.join("responses"))?)));
    // What is left of it does no harm.
    let _ = std::fs::remove_dir_all(&folder);
    let ([commands_out, commands_in], [responses_out, responses_in]) = both?;
    let end = |read, write| wire::from_fds(Transport::Pipes, vec![read, write]);
    Ok((
        end(responses_out, commands_in)?,
        end(commands_out, responses_in)?,
    ))
}

/// Makes a FIFO and opens it for reading and for writing.
fn fifo(path: &Path) -> Result<[OwnedFd; 2]> {
    let open = || -> std::io::Result<[OwnedFd; 2]> {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // Opening one end must not wait for the other.
        let read: File = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let write = OpenOptions::new().write(true).open(path)?;
        Ok([read.into(), write.into()])
    };
    open().with_context(|| format!("FIFO {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ioregion_dispatch::wire::Try;

    #[test]
    fn messages_pass_both_ways() {
        let (mut vmm, mut device) = pair().unwrap();
        for (from, to) in [(0, 1), (1, 0)] {
            let ends = [&mut vmm, &mut device];
            let message = [from as u8 + 1; wire::MESSAGE_LEN];
            assert_eq!(ends[from].try_send(&message).unwrap(), Try::Done(()));
            assert_eq!(ends[to].try_recv().unwrap(), Try::Done(message));
            assert_eq!(ends[to].try_recv().unwrap(), Try::WouldBlock);
        }
    }
}
