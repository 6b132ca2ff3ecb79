//! `ioregion vduse`: make a device, attach it, serve it, and remove it again.

mod net;

use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use ioregion_devices::blk::{Blk, BlkError, ImageError, Options};
use ioregion_devices::virtio::Device;
use ioregion_vduse::{
    Control, DeviceConfig, DeviceFile, Error, Identity, Log, Logged, Service, ServiceOptions,
    offered, vdpa,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// How long a service that was killed may keep its image locked. What it has begun ends much sooner
/// unless the image's storage hangs.
const AFTERLIFE: Duration = Duration::from_secs(10);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A disk over a file or a block device
    ///
    /// Makes the device, puts it on the vDPA bus and serves it until SIGTERM or SIGINT, which
    /// take it off the bus and remove it. SIGHUP has it take over the size that the image has
    /// then. With the module virtio_vdpa loaded it becomes a disk of
    /// this machine (/dev/vda), with vhost_vdpa one for a VMM (/dev/vhost-vdpa-0).
    ///
    /// Where the device is there already, because the service before was killed, it is taken over:
    /// the driver notices nothing but the pause. That takes the same options as before and the log,
    /// and should come soon: 30 seconds after a question that nobody answers (a driver that comes or
    /// goes; /sys/class/vduse/NAME/msg_timeout) the kernel gives a device up. Such a device is
    /// removed and made anew.
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
    /// Puts a device on the vDPA bus, or takes it off
    ///
    /// Services have it done by a process of its own, which a driver may keep waiting for them.
    #[command(hide = true)]
    Bus {
        /// What to do
        what: Bus,
        /// Name of the device
        name: String,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Bus {
    /// On the bus
    Attach,
    /// Off the bus
    Detach,
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
    /// Where to keep what is in flight, for the next service [default:
    /// /run/ioregion/vduse-NAME.log]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
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
        Command::Bus { what, name } => match what {
            Bus::Attach => Ok(vdpa::attach(name)?),
            Bus::Detach => Ok(vdpa::detach(name)?),
        },
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
    let disk = open(args, &options)?;
    let options = ServiceOptions {
        packed: args.packed,
        ..ServiceOptions::default()
    };
    let disk = Arc::new(disk);
    let refresh = || Ok(disk.refresh()?);
    let log = args.log.clone();
    let served = Served {
        name: &args.name,
        device: Arc::clone(&disk) as _,
        queue_size: args.queue_size,
        options,
        log: Some(log.unwrap_or_else(|| Log::path_for(&args.name))),
        refresh: &refresh,
    };
    served.run()
}

/// Opens the image. Of a service that was killed the kernel first finishes what it has begun, which
/// keeps the image locked: until then nobody may take the disk over.
fn open(args: &BlkArgs, options: &Options) -> Result<Blk, BlkError> {
    let end = Instant::now() + AFTERLIFE;
    loop {
        match Blk::open(&args.image, options) {
            Err(BlkError::Image(ImageError::Locked(_)))
                if DeviceFile::exists(&args.name) && Instant::now() < end =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => return opened,
        }
    }
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

/// A device and how it is served.
struct Served<'a> {
    name: &'a str,
    device: Arc<dyn Device>,
    queue_size: u16,
    options: ServiceOptions,
    /// Where requests in flight are on record. Without a record a device is not taken over.
    log: Option<PathBuf>,
    /// Looks whether the configuration has changed.
    refresh: &'a dyn Fn() -> Result<bool>,
}

impl Served<'_> {
    /// Serves the device until a signal asks for its end, making it anew where the kernel gives it
    /// up.
    fn run(&self) -> Result<()> {
        // Before there are other threads, which would get the signals otherwise.
        let signals = signals().context("waiting for signals")?;
        while let Err(error) = self.serve(&signals) {
            match error.downcast_ref() {
                Some(Error::Broken(_)) => tracing::error!("{error:#}; it is made anew"),
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes the device, or takes it over, and serves it until a signal asks for its end; then it
    /// is gone. So it is where the kernel has given it up ([`Error::Broken`]).
    fn serve(&self, signals: &SignalFd) -> Result<()> {
        let (name, device) = (self.name, &self.device);
        let control = Control::open()?;
        let features = offered(&**device, &self.options);
        let created = control.create(&DeviceConfig {
            name: name.into(),
            device_id: device.kind(),
            vendor_id: 0,
            features,
            queues: device.queues(),
            config: device.config(),
        });
        let is_new = match created {
            Ok(()) => true,
            Err(Error::Kernel { error, .. })
                if self.log.is_some() && error.raw_os_error() == Some(Errno::EEXIST as i32) =>
            {
                false
            }
            Err(error) => return Err(error.into()),
        };
        let mut made = Made {
            control,
            name: is_new.then_some(name),
        };
        let started = self.start(is_new, features);
        if is_new || started.is_ok() || matches!(started, Err(Error::Broken(_))) {
            // Whatever comes now, it has to go.
            made.name = Some(name);
        }
        let (service, log) = match started {
            Ok(started) => started,
            Err(error) => {
                if matches!(error, Error::Broken(_)) {
                    self.detach()?;
                    made.remove()?;
                }
                return Err(error.into());
            }
        };
        // From here on the kernel sends requests, so that every way out stops the service last.
        let waited = self.attach().and_then(|()| {
            tracing::info!(name, "serving");
            let waited = wait(signals, &service, self.refresh).context("waiting for signals");
            tracing::info!(name, "ending");
            waited
        });
        let detached = self.detach();
        let stopped = service.stop();
        let removed = made.remove();
        if let (Ok(()), Some(log)) = (&removed, log) {
            log.remove()?;
        }
        // What went wrong first explains what follows.
        let is_wanted = waited?;
        detached?;
        removed?;
        match stopped {
            Err(error) if !is_wanted => bail!("{error}"),
            stopped => Ok(stopped?),
        }
    }

    /// Starts the service, of a device that may have been there before.
    fn start(&self, is_new: bool, features: u64) -> Result<(Service, Option<Arc<Log>>), Error> {
        let (name, device) = (self.name, &self.device);
        let file = DeviceFile::open(name)?;
        if !is_new {
            file.check_queues(device.queues())?;
        }
        let log = match &self.log {
            None => None,
            Some(path) => {
                let logged = Logged {
                    name: name.into(),
                    identity: Identity::of(name)?,
                    kind: device.kind(),
                    features,
                    queues: device.queues(),
                    queue_size: self.queue_size,
                };
                Some(Arc::new(Log::open(path, &logged)?))
            }
        };
        // Whoever put it on the bus has done that.
        if !vdpa::is_attached(name) {
            for index in 0..device.queues() {
                file.set_up_queue(index, self.queue_size)?;
            }
        }
        let device = Arc::clone(device);
        let service = match &log {
            None => Service::start(name, file, device, self.options)?,
            Some(log) => Service::start_logged(name, file, device, self.options, Arc::clone(log))?,
        };
        Ok((service, log))
    }

    fn attach(&self) -> Result<()> {
        if vdpa::is_attached(self.name) {
            return Ok(());
        }
        match on_bus("attach", self.name) {
            // The service before has asked for it, too.
            Err(_) if vdpa::is_attached(self.name) => Ok(()),
            done => done,
        }
    }

    fn detach(&self) -> Result<()> {
        match vdpa::is_attached(self.name) {
            true => on_bus("detach", self.name),
            false => Ok(()),
        }
    }
}

/// Has a process of its own ask the bus. The driver may keep that process waiting for as long as
/// the device is not served; if it were this one and it were killed, it could not end, and nobody
/// could take the device over.
fn on_bus(what: &str, name: &str) -> Result<()> {
    let output = std::process::Command::new("/proc/self/exe")
        .args(["vduse", "bus", what, name])
        // Out of the way of signals from a terminal.
        .process_group(0)
        .output()
        .context("starting the process that asks the vDPA bus")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let text = text.trim();
        bail!("{}", text.strip_prefix("error: ").unwrap_or(text));
    }
    Ok(())
}

fn signals() -> nix::Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGHUP);
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC)
}

/// Waits for a signal that ends the service, or until the device is no longer served; whether it
/// still should be.
fn wait(
    signals: &SignalFd,
    service: &Service,
    refresh: &dyn Fn() -> Result<bool>,
) -> nix::Result<bool> {
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
            return Ok(true);
        }
        let signal = signals.read_signal()?;
        if signal.is_none_or(|signal| signal.ssi_signo != Signal::SIGHUP as u32) {
            return Ok(false);
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
