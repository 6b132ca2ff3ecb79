//! The control device: making and removing devices.

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::AsFd as _;
use std::path::Path;

use ioregion_abi::vduse::{
    DevConfig, VDUSE_API_VERSION, VDUSE_API_VERSION_1, VDUSE_CREATE_DEV, VDUSE_DESTROY_DEV,
    VDUSE_F_QUEUE_READY, VDUSE_F_SUSPEND, VDUSE_GET_API_VERSION, VDUSE_GET_FEATURES,
    VDUSE_NAME_MAX, VDUSE_SET_API_VERSION, VDUSE_SET_FEATURES,
};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_CTRL_VQ;

use crate::error::Error;
use crate::sys;

const PATH: &str = "/dev/vduse/control";

/// The requests (`ioctl`) of [`Control::create`] and [`Control::destroy`]: what a filter of system
/// calls has to let through for a process that has the control device open.
pub const CONTROL_REQUESTS: [u64; 2] = [VDUSE_CREATE_DEV, VDUSE_DESTROY_DEV];

/// The `VDUSE_F_*` (bits) that a service can serve.
const SERVED: u64 = 1 << VDUSE_F_QUEUE_READY | 1 << VDUSE_F_SUSPEND;

/// What a device is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its name, here and on the vDPA bus.
    pub name: String,
    /// The virtio device type; kernels allow block (2) and network (1).
    pub device_id: u32,
    /// The virtio vendor.
    pub vendor_id: u32,
    /// All virtio features that it offers.
    pub features: u64,
    /// Queues.
    pub queues: u16,
    /// The configuration space.
    pub config: Vec<u8>,
}

/// How the queues of a device are grouped (API version 1).
///
/// Each group uses the memory of one address space, which its driver chooses; without being told
/// otherwise that is the first. Which queue is of which group, the device's file is told
/// ([`DeviceFile::group_queues`](crate::DeviceFile::group_queues)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Groups, at least one.
    pub groups: u16,
    /// Address spaces, at least one.
    pub spaces: u16,
}

impl Groups {
    /// All queues in one group and in one address space, which every API version has.
    pub const ONE: Self = Self {
        groups: 1,
        spaces: 1,
    };
}

/// `/dev/vduse/control`, with what was agreed upon with the kernel.
#[derive(Debug)]
pub struct Control {
    file: File,
    version: u64,
    features: u64,
}

impl Control {
    /// Opens the control device for devices of the API version 0, which need nothing that came
    /// later.
    ///
    /// # Errors
    ///
    /// Where there is none, or it may not be opened.
    pub fn open() -> Result<Self, Error> {
        Self::negotiate(VDUSE_API_VERSION, 0)
    }

    /// Opens the control device and agrees with the kernel on the newest API version and on all
    /// features that a [`Service`](crate::Service) can serve and the kernel has.
    ///
    /// # Errors
    ///
    /// As [`negotiate`](Self::negotiate).
    pub fn newest() -> Result<Self, Error> {
        Self::negotiate(VDUSE_API_VERSION_1, SERVED)
    }

    /// Opens the control device and agrees with the kernel on the newest API version up to
    /// `version` and on those of the `VDUSE_F_*` in `features` (bits) that it has.
    ///
    /// A [`Service`](crate::Service) serves devices of any version and with any of the features
    /// that this library knows: see [`newest`](Self::newest).
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`Error::Version`] where the kernel has no version in common.
    pub fn negotiate(version: u64, features: u64) -> Result<Self, Error> {
        let open = |error| Error::Open {
            path: PATH.into(),
            error,
        };
        let file = File::options()
            .read(true)
            .write(true)
            .open(PATH)
            .map_err(open)?;
        let fd = file.as_fd();
        let wanted = (0..=version.min(VDUSE_API_VERSION_1)).rev();
        let mut tried = wanted.map(|version| {
            let set = sys::pass(fd, VDUSE_SET_API_VERSION, &version);
            set.map(|()| version)
        });
        let Some(version) = tried.find_map(Result::ok) else {
            let mut has = 0;
            sys::update(fd, VDUSE_GET_API_VERSION, &mut has).map_err(open)?;
            return Err(Error::Version(has));
        };
        // Kernels without features know neither request.
        let mut has = 0;
        let features = match sys::update(fd, VDUSE_GET_FEATURES, &mut has) {
            Ok(()) => features & has,
            Err(_) => 0,
        };
        if features != 0 {
            sys::pass(fd, VDUSE_SET_FEATURES, &features).map_err(open)?;
        }
        Ok(Self {
            file,
            version,
            features,
        })
    }

    /// The API version of devices made here.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The `VDUSE_F_*` (bits) of devices made here.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Makes a device; its file is `/dev/vduse/NAME`. Queues all are of one group and in one
    /// address space.
    ///
    /// # Errors
    ///
    /// What is wrong with the configuration, or what the kernel says: `EEXIST` for a name that
    /// is taken, `EINVAL` for features that it does not allow, such as the control queue of
    /// network devices, which would let the kernel wait for user space.
    pub fn create(&self, config: &DeviceConfig) -> Result<(), Error> {
        self.create_grouped(config, Groups::ONE)
    }

    /// Makes a device whose queues are of several groups.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create); [`Error::Config`] where version 0 was agreed upon, which has
    /// one group and one address space.
    pub fn create_grouped(&self, config: &DeviceConfig, groups: Groups) -> Result<(), Error> {
        let request = encode(config, groups, self.version)?;
        sys::pass_bytes(self.file.as_fd(), VDUSE_CREATE_DEV, &request).map_err(|error| {
            let what = match error.raw_os_error() {
                // The kernel says no more than that something is wrong.
                Some(libc::EINVAL) if wants_control_queue(config) => {
                    "making it with a control queue (VIRTIO_NET_F_CTRL_VQ), which the kernel \
                     allows no VDUSE device"
                }
                _ => "making it",
            };
            Error::Kernel {
                name: config.name.clone(),
                what,
                error,
            }
        })
    }

    /// Removes a device that is off the vDPA bus and whose file nobody has open.
    ///
    /// # Errors
    ///
    /// What the kernel says: `EBUSY` where it is in use, `EINVAL` where there is none.
    pub fn destroy(&self, name: &str) -> Result<(), Error> {
        let request = padded(name)?;
        sys::pass_bytes(self.file.as_fd(), VDUSE_DESTROY_DEV, &request).map_err(|error| {
            Error::Kernel {
                name: name.into(),
                what: "removing it",
                error,
            }
        })
    }
}

/// Whether the kernel has VDUSE, and this process may use it.
///
/// # Errors
///
/// Why not, with the remedy.
pub fn available() -> Result<(), Error> {
    Control::open().map(drop)
}

fn wants_control_queue(config: &DeviceConfig) -> bool {
    config.device_id == VIRTIO_ID_NET && config.features & 1 << VIRTIO_NET_F_CTRL_VQ != 0
}

/// A name as the kernel wants it.
fn padded(name: &str) -> Result<[u8; VDUSE_NAME_MAX], Error> {
    let bad = name.is_empty()
        || name.len() >= VDUSE_NAME_MAX
        || name.contains(['/', '\0'])
        || matches!(name, "." | ".." | "control");
    if bad {
        return Err(Error::Name(name.into()));
    }
    let mut bytes = [0; VDUSE_NAME_MAX];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    Ok(bytes)
}

/// Whether a device can have this name.
///
/// # Errors
///
/// [`Error::Name`], with what a name must be.
pub fn check_name(name: &str) -> Result<(), Error> {
    padded(name).map(drop)
}

/// The file of a device.
pub(crate) fn path_of(name: &str) -> Result<std::path::PathBuf, Error> {
    padded(name)?;
    Ok(Path::new("/dev/vduse").join(name))
}

/// `struct vduse_dev_config` and the configuration space behind it.
fn encode(config: &DeviceConfig, groups: Groups, version: u64) -> Result<Vec<u8>, Error> {
    let bad = |what| Error::Config {
        name: config.name.clone(),
        what,
    };
    if config.queues == 0 {
        return Err(bad("a device needs at least one queue"));
    }
    if groups.groups == 0 || groups.spaces == 0 {
        return Err(bad(
            "a device needs at least one group and one address space",
        ));
    }
    if version < VDUSE_API_VERSION_1 && groups != Groups::ONE {
        return Err(bad(
            "groups of queues and address spaces need API version 1, which this kernel does not \
             have or which was not asked for",
        ));
    }
    let size = u32::try_from(config.config.len()).unwrap_or(u32::MAX);
    if size > 4096 {
        return Err(bad("the configuration space is larger than 4096 bytes"));
    }
    let mut bytes = vec![0; size_of::<DevConfig>()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(offset_of!(DevConfig, name), &padded(&config.name)?);
    put(
        offset_of!(DevConfig, vendor_id),
        &config.vendor_id.to_ne_bytes(),
    );
    put(
        offset_of!(DevConfig, device_id),
        &config.device_id.to_ne_bytes(),
    );
    put(
        offset_of!(DevConfig, features),
        &config.features.to_ne_bytes(),
    );
    let queues = u32::from(config.queues);
    put(offset_of!(DevConfig, vq_num), &queues.to_ne_bytes());
    put(offset_of!(DevConfig, vq_align), &4096u32.to_ne_bytes());
    if version >= VDUSE_API_VERSION_1 {
        let (groups, spaces) = (u32::from(groups.groups), u32::from(groups.spaces));
        put(offset_of!(DevConfig, ngroups), &groups.to_ne_bytes());
        put(offset_of!(DevConfig, nas), &spaces.to_ne_bytes());
    }
    put(offset_of!(DevConfig, config_size), &size.to_ne_bytes());
    bytes.extend(&config.config);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DeviceConfig {
        DeviceConfig {
            name: "disk".into(),
            device_id: 2,
            vendor_id: 0x1234_5678,
            features: 0xaabb_ccdd_eeff_0011,
            queues: 3,
            config: vec![9; 5],
        }
    }

    #[test]
    fn configuration_is_laid_out_as_in_the_header() {
        for (version, spaces) in [(0, 0u32), (1, 1)] {
            let bytes = encode(&config(), Groups::ONE, version).unwrap();
            assert_eq!(bytes.len(), 336 + 5);
            assert_eq!(bytes[..5], *b"disk\0");
            assert_eq!(bytes[256..260], 0x1234_5678u32.to_ne_bytes());
            assert_eq!(bytes[260..264], 2u32.to_ne_bytes());
            assert_eq!(bytes[264..272], 0xaabb_ccdd_eeff_0011u64.to_ne_bytes());
            assert_eq!(bytes[272..276], 3u32.to_ne_bytes());
            assert_eq!(bytes[280..284], spaces.to_ne_bytes());
            assert_eq!(bytes[284..288], spaces.to_ne_bytes());
            assert_eq!(bytes[288..332], [0; 44]);
            assert_eq!(bytes[332..336], 5u32.to_ne_bytes());
            assert_eq!(bytes[336..], [9; 5]);
        }
    }

    #[test]
    fn groups_need_the_version_that_has_them() {
        let groups = |groups, spaces| Groups { groups, spaces };
        let bytes = encode(&config(), groups(3, 2), 1).unwrap();
        assert_eq!(bytes[280..284], 3u32.to_ne_bytes());
        assert_eq!(bytes[284..288], 2u32.to_ne_bytes());
        for (refused, version) in [
            (groups(2, 1), 0),
            (groups(1, 2), 0),
            (groups(0, 1), 1),
            (groups(1, 0), 1),
        ] {
            let error = encode(&config(), refused, version).unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error}");
        }
    }

    #[test]
    fn names_and_configurations_that_cannot_be_are_refused() {
        let long = "x".repeat(256);
        for name in ["", "a/b", "..", ".", "control", "a\0b", &long] {
            let config = DeviceConfig {
                name: name.into(),
                ..config()
            };
            assert!(
                matches!(encode(&config, Groups::ONE, 0), Err(Error::Name(_))),
                "{name:?}"
            );
        }
        assert!(padded(&"x".repeat(255)).is_ok());
        let none = DeviceConfig {
            queues: 0,
            ..config()
        };
        assert!(matches!(
            encode(&none, Groups::ONE, 0),
            Err(Error::Config { .. })
        ));
        let large = DeviceConfig {
            config: vec![0; 4097],
            ..config()
        };
        assert!(matches!(
            encode(&large, Groups::ONE, 0),
            Err(Error::Config { .. })
        ));
    }
}
