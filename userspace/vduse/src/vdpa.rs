//! The vDPA bus: where drivers find devices, by generic netlink.

use neli::consts::nl::{GenlId, NlmF};
use neli::consts::socket::NlFamily;
use neli::err::RouterError;
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, NlattrBuilder, NoUserHeader};
use neli::nl::NlPayload;
use neli::router::synchronous::NlRouter;
use neli::types::GenlBuffer;
use neli::utils::Groups;

use crate::error::Error;

/// The family, `VDPA_GENL_NAME`.
const FAMILY: &str = "vdpa";
/// Its version, `VDPA_GENL_VERSION`.
const VERSION: u8 = 1;
/// The management device of VDUSE.
const MANAGEMENT: &str = "vduse";

mod wire {
    #![allow(missing_docs, reason = "made by the macro")]

    /// `enum vdpa_command`.
    #[neli::neli_enum(serialized_type = "u8")]
    pub enum Command {
        DevNew = 3,
        DevDel = 4,
    }
    impl neli::consts::genl::Cmd for Command {}

    /// `enum vdpa_attr`.
    #[neli::neli_enum(serialized_type = "u16")]
    pub enum Attribute {
        MgmtdevDevName = 2,
        DevName = 4,
    }
    impl neli::consts::genl::NlAttrType for Attribute {}
}
use wire::{Attribute, Command};

/// Puts a device on the bus. A driver that takes it is done with its set-up when this returns, so
/// whoever serves the device must do so on another thread. Better in another process: a process
/// that is killed here is not gone, and nobody can take its devices over, before the driver is done.
///
/// # Errors
///
/// What the kernel says: `EPERM` without `CAP_NET_ADMIN`, `EINVAL` where there is no such device
/// or a queue of it was not set up, `EEXIST` where it is on the bus.
pub fn attach(name: &str) -> Result<(), Error> {
    let attributes = [
        (Attribute::MgmtdevDevName, MANAGEMENT),
        (Attribute::DevName, name),
    ];
    send(name, "putting it on", Command::DevNew, &attributes)
}

/// Whether a device is on the bus.
#[must_use]
pub fn is_attached(name: &str) -> bool {
    std::path::Path::new("/sys/bus/vdpa/devices")
        .join(name)
        .exists()
}

/// Takes a device off the bus. Its driver lets go of it before this returns; it must be served
/// meanwhile, better by another process, as with [`attach`].
///
/// # Errors
///
/// What the kernel says: `ENODEV` where it is not on the bus.
pub fn detach(name: &str) -> Result<(), Error> {
    let attributes = [(Attribute::DevName, name)];
    send(name, "taking it off", Command::DevDel, &attributes)
}

fn send(
    name: &str,
    what: &'static str,
    command: Command,
    attributes: &[(Attribute, &str)],
) -> Result<(), Error> {
    let failed = |why: String| Error::Bus {
        name: name.into(),
        what,
        why,
    };
    let (router, _) = NlRouter::connect(NlFamily::Generic, None, Groups::empty())
        .map_err(|error| failed(format!("no netlink socket: {error}")))?;
    let family = router.resolve_genl_family(FAMILY).map_err(|error| {
        failed(format!(
            "the kernel has none (is the module vdpa loaded?): {error}"
        ))
    })?;
    let mut buffer = GenlBuffer::<Attribute, neli::types::Buffer>::new();
    for &(kind, text) in attributes {
        let kind = AttrTypeBuilder::default().nla_type(kind).build();
        let kind = kind.map_err(|error| failed(error.to_string()))?;
        let attribute = NlattrBuilder::default()
            .nla_type(kind)
            .nla_payload(text)
            .build();
        buffer.push(attribute.map_err(|error| failed(error.to_string()))?);
    }
    let message = GenlmsghdrBuilder::<Command, Attribute, NoUserHeader>::default()
        .cmd(command)
        .version(VERSION)
        .attrs(buffer)
        .build()
        .map_err(|error| failed(error.to_string()))?;
    let replies = router.send::<_, _, GenlId, Genlmsghdr<Command, Attribute>>(
        family,
        NlmF::ACK,
        NlPayload::Payload(message),
    );
    // The kernel sends nothing but its acknowledgement, which is no reply.
    for reply in replies.map_err(|error| failed(error.to_string()))? {
        reply.map_err(|error| match error {
            RouterError::Nlmsgerr(error) => {
                failed(std::io::Error::from_raw_os_error(-error.error()).to_string())
            }
            error => failed(error.to_string()),
        })?;
    }
    Ok(())
}
