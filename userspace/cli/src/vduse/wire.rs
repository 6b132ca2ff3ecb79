//! What a service and its keeper say to each other: bytes, without I/O.

use ioregion_vduse::{DeviceConfig, Identity};

/// Bytes of a message at most: a configuration space has 4096.
pub(super) const MOST: usize = 8192;

/// The first byte of an answer; what was found follows, or why not.
pub(super) const DONE: u8 = 0;
pub(super) const FAILED: u8 = 1;

const MAKE: u8 = b'm';
const ATTACH: u8 = b'a';
const DETACH: u8 = b'd';
const REMOVE: u8 = b'r';
const FORGET: u8 = b'f';

/// What a service asks for, of its own device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Make it, or find it, and hand over its file.
    Make(Make),
    /// Put it on the bus.
    Attach,
    /// Take it off the bus.
    Detach,
    /// Remove it.
    Remove,
    /// Remove its log.
    Forget,
}

/// What a device is made like, but for its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Make {
    device_id: u32,
    features: u64,
    queues: u16,
    config: Vec<u8>,
}

impl Make {
    pub(super) fn of(config: &DeviceConfig) -> Self {
        Self {
            device_id: config.device_id,
            features: config.features,
            queues: config.queues,
            config: config.config.clone(),
        }
    }

    pub(super) fn config(&self, name: &str) -> DeviceConfig {
        DeviceConfig {
            name: name.into(),
            device_id: self.device_id,
            vendor_id: 0,
            features: self.features,
            queues: self.queues,
            config: self.config.clone(),
        }
    }

    /// Whether another one is the same device, whose configuration space may have changed.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let shape = |make: &Self| {
            (
                make.device_id,
                make.features,
                make.queues,
                make.config.len(),
            )
        };
        shape(self) == shape(other)
    }
}

/// Takes bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Make(make) => [
                &[MAKE][..],
                &make.device_id.to_ne_bytes(),
                &make.features.to_ne_bytes(),
                &make.queues.to_ne_bytes(),
                &make.config,
            ]
            .concat(),
            Self::Attach => vec![ATTACH],
            Self::Detach => vec![DETACH],
            Self::Remove => vec![REMOVE],
            Self::Forget => vec![FORGET],
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [MAKE, rest @ ..] => {
                let mut rest = rest;
                Some(Self::Make(Make {
                    device_id: u32::from_ne_bytes(take(&mut rest)?),
                    features: u64::from_ne_bytes(take(&mut rest)?),
                    queues: u16::from_ne_bytes(take(&mut rest)?),
                    config: rest.into(),
                }))
            }
            [ATTACH] => Some(Self::Attach),
            [DETACH] => Some(Self::Detach),
            [REMOVE] => Some(Self::Remove),
            [FORGET] => Some(Self::Forget),
            _ => None,
        }
    }
}

/// What is said of a device whose file is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) identity: Identity,
    pub(super) is_new: bool,
    pub(super) on_bus: bool,
}

impl Found {
    pub(super) fn encode(&self) -> Vec<u8> {
        [
            &[u8::from(self.is_new), u8::from(self.on_bus)][..],
            &self.identity.boot.to_ne_bytes(),
            &self.identity.inode.to_ne_bytes(),
        ]
        .concat()
    }

    pub(super) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let [is_new, on_bus] = take(&mut bytes)?.map(|byte: u8| byte != 0);
        let found = Self {
            identity: Identity {
                boot: u128::from_ne_bytes(take(&mut bytes)?),
                inode: u64::from_ne_bytes(take(&mut bytes)?),
            },
            is_new,
            on_bus,
        };
        bytes.is_empty().then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make() -> Make {
        Make {
            device_id: 2,
            features: 1 << 40 | 3,
            queues: 7,
            config: vec![9; 60],
        }
    }

    #[test]
    fn messages_arrive_as_they_were_sent_and_no_others_do() {
        let requests = [
            Request::Make(make()),
            Request::Attach,
            Request::Detach,
            Request::Remove,
            Request::Forget,
        ];
        for request in requests {
            let bytes = request.encode();
            assert!(bytes.len() <= MOST);
            assert_eq!(Request::decode(&bytes), Some(request));
        }
        for bytes in [&[][..], b"x", b"aa", b"m", b"m1234567890123"] {
            assert_eq!(Request::decode(bytes), None, "{bytes:?}");
        }
        let found = Found {
            identity: Identity {
                boot: u128::MAX - 5,
                inode: 77,
            },
            is_new: false,
            on_bus: true,
        };
        let bytes = found.encode();
        assert_eq!(Found::decode(&bytes), Some(found));
        assert_eq!(Found::decode(&bytes[1..]), None);
        assert_eq!(Found::decode(&[&bytes[..], &[0]].concat()), None);
    }

    #[test]
    fn device_is_made_again_like_it_was_with_another_configuration_at_most() {
        let (first, mut second) = (make(), make());
        second.config[0] = 1;
        assert!(first.is_like(&second));
        let others = [
            Make {
                device_id: 1,
                ..make()
            },
            Make {
                features: 3,
                ..make()
            },
            Make {
                queues: 8,
                ..make()
            },
            Make {
                config: vec![9; 61],
                ..make()
            },
        ];
        for other in others {
            assert!(!first.is_like(&other), "{other:?}");
        }
        assert_eq!(Make::of(&first.config("disk")), first);
    }
}
