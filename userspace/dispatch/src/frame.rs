//! Frames on a Unix socket between processes that need not trust each other: a header (magic
//! number, length of the text, number of descriptors), a text in JSON, then the descriptors in
//! messages of one byte each.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Serialize, de::DeserializeOwned};

mod scm;

/// Most descriptors of a frame.
pub(crate) const MAX_DESCRIPTORS: u32 = 1 << 17;
const MAGIC: u32 = u32::from_le_bytes(*b"iorg");
/// Descriptors in one message.
const BATCH: usize = 200;

/// Why a frame could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The socket failed or was closed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
    /// The peer speaks something else.
    #[error("not a frame of ours: magic number {0:#x}")]
    Magic(u32),
    /// A length or count exceeds its limit.
    #[error("{what}: {count} exceeds the limit of {limit}")]
    Limit {
        /// What is too much.
        what: &'static str,
        /// How much there is.
        count: u64,
        /// How much may be.
        limit: u64,
    },
    /// The text cannot be understood.
    #[error("text: {0}")]
    Text(#[from] serde_json::Error),
    /// The descriptors are not those that were announced.
    #[error("descriptors: {0}")]
    Descriptors(&'static str),
}

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Io(error) => error,
            error => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

/// Sends a frame. If it fails, the receiver may have a part of it.
pub(crate) fn send<T: Serialize>(
    mut socket: &UnixStream,
    text: &T,
    fds: &[OwnedFd],
    max_text: u32,
) -> Result<(), FrameError> {
    let text = serde_json::to_vec(text)?;
    let text_len = check_limit("text", text.len() as u64, max_text)?;
    let fds_len = check_limit("descriptors", fds.len() as u64, MAX_DESCRIPTORS)?;
    let mut header = [0; 12];
    for (bytes, word) in header
        .as_chunks_mut::<4>()
        .0
        .iter_mut()
        .zip([MAGIC, text_len, fds_len])
    {
        *bytes = word.to_le_bytes();
    }
    socket.write_all(&header)?;
    socket.write_all(&text)?;
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    for batch in raw.chunks(BATCH) {
        scm::send(socket, batch)?;
    }
    Ok(())
}

/// Receives a frame, waiting until it is complete. Descriptors are closed on `exec`, and if
/// anything is wrong, at once; of a frame that announces more than `max_fds`, none is taken.
pub(crate) fn recv<T: DeserializeOwned>(
    mut socket: &UnixStream,
    max_text: u32,
    max_fds: u32,
) -> Result<(T, Vec<OwnedFd>), FrameError> {
    let mut header = [0; 12];
    socket.read_exact(&mut header)?;
    let word = |i: usize| u32::from_le_bytes(header.as_chunks::<4>().0[i]);
    if word(0) != MAGIC {
        return Err(FrameError::Magic(word(0)));
    }
    let text_len = check_limit("text", word(1).into(), max_text)?;
    let fds_len = check_limit("descriptors", word(2).into(), max_fds)? as usize;
    // Grows with what really arrives.
    let mut text = Vec::new();
    socket.take(text_len.into()).read_to_end(&mut text)?;
    if text.len() != text_len as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let text = serde_json::from_slice(&text)?;
    let mut fds = Vec::new();
    while fds.len() < fds_len {
        let before = fds.len();
        if !scm::recv(socket, &mut fds)? {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        if fds.len() == before {
            return Err(FrameError::Descriptors("a message without descriptors"));
        }
    }
    if fds.len() != fds_len {
        return Err(FrameError::Descriptors("more than announced"));
    }
    Ok((text, fds))
}

fn check_limit(what: &'static str, count: u64, limit: u32) -> Result<u32, FrameError> {
    u32::try_from(count)
        .ok()
        .filter(|count| *count <= limit)
        .ok_or(FrameError::Limit {
            what,
            count,
            limit: limit.into(),
        })
}
