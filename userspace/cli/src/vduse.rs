//! `ioregion vduse`: make a device, attach it, serve it, and remove it again.

mod net;

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use ioregion_devices::blk::{Blk, Options};
use ioregion_devices::virtio::Device;
use ioregion_vduse::{Control, DeviceConfig, DeviceFile, Service, ServiceOptions, offered, vdpa};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A disk over a file or a block device
    ///
    /// Makes the device, puts it on the vDPA bus and serves it until SIGTERM or SIGINT, which
    /// take it off the bus and remove it. SIGHUP has it take over the size that the image has
    /// then. With the module virtio_vdpa loaded it becomes a disk of
    /// this machine (/dev/vda), with vhost_vdpa one for a VMM (/dev/vhost-vdpa-0).
    #[command(
        after_help = "Example:\n  ioregion vduse blk --name disk0 --image disk.img --queues 2"
    )]
    Blk(BlkArgs),
    /// A network interface over a TAP device
    ///
    /// Makes the device, puts it on the vDPA bus and serves it until SIGTERM or SIGINT, which
    /// take it off the bus and remove it. What the interface sends comes out of the TAP device,
    /// and the other way round. With the module virtio_vdpa loaded it becomes an interface of
    /// this machine, with vhost_vdpa one for a VMM (/dev/vhost-vdpa-0).
    #[command(after_help = "Example:\n  ioregion vduse net --name net0 --tap tap0")]
    Net(net::NetArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BlkArgs {
    /// Name of the device, in /dev/vduse and on the vDPA bus
    #[arg(long)]
    name: String,
    /// The disk's contents: a regular file or a block device
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// Queues, each served by a thread
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Requests that a queue has room for: a power of two from 2 to 1024
    #[arg(long, value_name = "N", default_value = "256", value_parser = queue_size)]
    queue_size: u16,
    /// The driver cannot write
    #[arg(long)]
    read_only: bool,
    /// Serial number, at most 20 bytes
    #[arg(long, value_name = "TEXT", default_value = "")]
    serial: String,
    /// Go past the page cache, as far as the file system and each request allow it
    #[arg(long)]
    direct: bool,
    /// Carry out one request of a queue after the other, without io_uring
    #[arg(long)]
    no_io_uring: bool,
    /// Offer queues in the packed format, too
    #[arg(long)]
    packed: bool,
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(size @ 2..=1024) if u16::is_power_of_two(size) => Ok(size),
        _ => Err("a power of two from 2 to 1024 is needed".into()),
    }
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Blk(args) => blk(args),
        Command::Net(args) => net::run(args),
    }
}

fn blk(args: &BlkArgs) -> Result<()> {
    let options = Options {
        read_only: args.read_only,
        queues: args.queues,
        serial: args.serial.clone(),
        direct: args.direct,
        io_uring: !args.no_io_uring,
    };
    let disk = Blk::open(&args.image, &options)?;
    let options = ServiceOptions {
        packed: args.packed,
        ..ServiceOptions::default()
    };
    let disk = Arc::new(disk);
    let refresh = || Ok(disk.refresh()?);
    serve(
        &args.name,
        Arc::clone(&disk) as _,
        args.queue_size,
        options,
        &refresh,
    )
}

/// A device that was made and is removed when this goes, unless that was done.
struct Made<'a> {
    control: Control,
    name: Option<&'a str>,
}

impl Made<'_> {
    fn remove(mut self) -> Result<()> {
        let name = self.name.take().unwrap_or_default();
        Ok(self.control.destroy(name)?)
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.name
            && let Err(error) = self.control.destroy(name)
        {
            tracing::error!(%error, "the device stays");
        }
    }
}

/// Makes and serves a device until a signal asks for its end. `refresh` looks whether its
/// configuration has changed.
fn serve(
    name: &str,
    device: Arc<dyn Device>,
    queue_size: u16,
    options: ServiceOptions,
    refresh: &dyn Fn() -> Result<bool>,
) -> Result<()> {
    // Before there are other threads, which would get the signals otherwise.
    let signals = signals().context("waiting for signals")?;
    let control = Control::open()?;
    control.create(&DeviceConfig {
        name: name.into(),
        device_id: device.kind(),
        vendor_id: 0,
        features: offered(&*device, &options),
        queues: device.queues(),
        config: device.config(),
    })?;
    let made = Made {
        control,
        name: Some(name),
    };
    let file = DeviceFile::open(name)?;
    for index in 0..device.queues() {
        file.set_up_queue(index, queue_size)?;
    }
    let service = Service::start(name, file, device, options)?;
    // From here on the kernel sends requests, so that every way out stops the service last.
    let waited = vdpa::attach(name)
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            tracing::info!(name, "serving");
            let waited = wait(&signals, &service, refresh).context("waiting for signals");
            tracing::info!(name, "ending");
            let detached = vdpa::detach(name);
            waited.and(detached.map_err(Into::into))
        });
    let stopped = service.stop();
    let removed = made.remove();
    // What went wrong first explains what follows.
    stopped?;
    waited?;
    removed
}

fn signals() -> nix::Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGHUP);
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC)
}

/// Waits for a signal that ends the service, or until the device is no longer served.
fn wait(
    signals: &SignalFd,
    service: &Service,
    refresh: &dyn Fn() -> Result<bool>,
) -> nix::Result<()> {
    loop {
        let mut fds = [
            PollFd::new(service.ended().as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            done => done?,
        };
        if fds[0].any().unwrap_or(true) {
            return Ok(());
        }
        let signal = signals.read_signal()?;
        if signal.is_none_or(|signal| signal.ssi_signo != Signal::SIGHUP as u32) {
            return Ok(());
        }
        let told = refresh().and_then(|changed| match changed {
            true => Ok(service.config_changed()?),
            false => Ok(()),
        });
        // The device goes on as it was.
        if let Err(error) = told {
            tracing::error!("the configuration stays as it was: {error:#}");
        }
    }
}
