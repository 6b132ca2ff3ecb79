//! The configuration space of a network device, and addresses.

use std::fmt;
use std::str::FromStr;

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

/// Offsets in `struct virtio_net_config`.
mod at {
    pub(super) const MAC: usize = 0;
    pub(super) const STATUS: usize = 6;
    pub(super) const MAX_QUEUE_PAIRS: usize = 8;
    pub(super) const MTU: usize = 10;
    /// Up to the end of what the features here need.
    pub(super) const END: usize = 12;
}

/// The configuration space.
pub(super) fn space(mac: Option<Mac>, mtu: u16) -> Vec<u8> {
    let mut space = vec![0; at::END];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(at::MAC, &mac.map_or([0; 6], |mac| mac.0));
    let status = VIRTIO_NET_S_LINK_UP.to_le_bytes();
    put(at::STATUS, &status[..2]);
    put(at::MAX_QUEUE_PAIRS, &1u16.to_le_bytes());
    put(at::MTU, &mtu.to_le_bytes());
    space
}

/// The address of one interface, as text `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Takes an address that an interface can have.
    ///
    /// # Errors
    ///
    /// All zeroes, and addresses of groups.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        if bytes == [0; 6] || bytes[0] & 1 != 0 {
            return Err(MacError::NoInterface(Self(bytes)));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let bad = || MacError::Text(text.into());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None => Self::new(bytes),
            Some(_) => Err(bad()),
        }
    }
}

/// Why an address is none of an interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MacError {
    /// Not written as an address.
    #[error("{0:?} is no address; they look like 52:54:00:12:34:56")]
    Text(String),
    /// The address of a group or of nobody.
    #[error("{0} is the address of a group or of nobody; let the first byte be 02")]
    NoInterface(Mac),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_net::virtio_net_config as C;

    #[test]
    fn offsets_are_those_of_the_kernel_header() {
        assert_eq!(at::MAC, offset_of!(C, mac));
        assert_eq!(at::STATUS, offset_of!(C, status));
        assert_eq!(at::MAX_QUEUE_PAIRS, offset_of!(C, max_virtqueue_pairs));
        assert_eq!(at::MTU, offset_of!(C, mtu));
        assert_eq!(at::END, offset_of!(C, speed));
    }

    #[test]
    fn space_says_address_link_and_mtu() {
        let mac = "52:54:00:Ab:34:56".parse().unwrap();
        let space = space(Some(mac), 1500);
        assert_eq!(
            space,
            [0x52, 0x54, 0, 0xab, 0x34, 0x56, 1, 0, 1, 0, 0xdc, 5]
        );
        assert_eq!(mac.to_string(), "52:54:00:ab:34:56");
    }

    #[test]
    fn addresses_that_no_interface_has_are_refused() {
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:0:12:34:56",
            "52:54:00:12:34:+6",
            "52-54-00-12-34-56",
            "52:54:00:12:34:5g",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacError::Text(text.into())));
        }
        for text in [
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            let refused = text.parse::<Mac>();
            assert!(matches!(refused, Err(MacError::NoInterface(_))), "{text}");
        }
    }
}
