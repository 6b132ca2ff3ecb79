//! `ioregion vduse net`.

use std::sync::Arc;

use anyhow::Result;
use clap::{Args, ValueEnum};
use ioregion_devices::net::{MIN_QUEUE_SIZE, Mac, Net, Options, TAP_REQUESTS, Tap};
use ioregion_sandbox::Calls;
use ioregion_vduse::ServiceOptions;

use super::{Served, Started, UserArgs, queue_size};

#[derive(Debug, Args)]
pub(crate) struct NetArgs {
    /// Name of the device, in /dev/vduse and on the vDPA bus
    #[arg(long)]
    name: String,
    /// The TAP device; where there is none of this name, one that goes with the service
    #[arg(long, value_name = "DEV")]
    tap: String,
    /// The interface's address, like 52:54:00:12:34:56 (default: the driver makes one up)
    #[arg(long, value_name = "ADDRESS")]
    mac: Option<Mac>,
    /// Buffers that each of the two queues has room for: a power of two from 64 to 1024
    #[arg(long, value_name = "N", default_value = "256", value_parser = net_queue_size)]
    queue_size: u16,
    /// Offer queues in the packed format, too
    #[arg(long)]
    packed: bool,
    /// Do not offer this (repeatable)
    #[arg(long, value_enum, value_name = "WHAT")]
    without: Vec<Offer>,
    #[command(flatten)]
    user: UserArgs,
}

/// What can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Offer {
    /// Checksums and segmentation that are left to the other side
    Offloads,
    /// Packets that reach the driver in several buffers
    MergeableBuffers,
}

fn net_queue_size(text: &str) -> Result<u16, String> {
    match queue_size(text) {
        Ok(size) if size >= MIN_QUEUE_SIZE => Ok(size),
        _ => Err("a power of two from 64 to 1024 is needed".into()),
    }
}

pub(super) fn run(args: &NetArgs) -> Result<()> {
    // A record knows of one buffer at a time, and a packet can lie in several.
    let log = None;
    let started = Started::new(&args.name, log, &args.user, None)?;
    let options = Options {
        mac: args.mac,
        offloads: !args.without.contains(&Offer::Offloads),
        mergeable: !args.without.contains(&Offer::MergeableBuffers),
    };
    let net = Arc::new(Net::new(Tap::open(&args.tap)?, &options));
    let options = ServiceOptions {
        packed: args.packed,
        ..ServiceOptions::default()
    };
    // Nothing of its configuration ever changes.
    let refresh = || Ok(false);
    let served = Served {
        name: &args.name,
        device: Arc::clone(&net) as _,
        queue_size: args.queue_size,
        options,
        umem: None,
        refresh: &refresh,
    };
    let served = served.run(started, Calls::service().requests(&TAP_REQUESTS));
    tracing::info!(traffic = ?net.traffic(), "packets");
    served
}
