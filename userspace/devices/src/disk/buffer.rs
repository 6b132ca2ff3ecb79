//! Memory of this process for a piece of a request.

/// Bytes that begin at a multiple of a power of two.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Zeroes.
    pub(super) fn new(len: usize, align: usize) -> Self {
        let bytes = vec![0; len + align];
        let past = bytes.as_ptr().addr() % align;
        Self {
            start: if past == 0 { 0 } else { align - past },
            bytes,
            len,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_where_they_must() {
        for align in [1, 512, 4096] {
            for len in [0, 1, 512, 100_000] {
                let mut buffer = Buffer::new(len, align);
                let bytes = buffer.bytes();
                assert_eq!(bytes.len(), len);
                assert_eq!(bytes.as_ptr().addr() % align, 0);
            }
        }
    }
}
