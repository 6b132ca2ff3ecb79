//! `ioregion vduse`: make a device, attach it, serve it, and remove it again.
//!
//! All but serving needs rights, and is left to another process ([`keeper`]). This one opens what
//! the device works on, gives its own rights up, and serves.

mod keeper;
mod net;
mod wire;

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use ioregion_devices::blk::{Blk, BlkError, ImageError, Options};
use ioregion_devices::virtio::Device;
use ioregion_sandbox::{Calls, Confinement, User};
use ioregion_vduse::{
    BounceBuffer, DEVICE_REQUESTS, DeviceConfig, DeviceFile, Error, Log, Logged, Service,
    ServiceOptions, check_name, offered,
};
use keeper::{Errand, Handed, Keeper};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// How long a service that was killed may keep its image locked. What it has begun ends much sooner
/// unless the image's storage hangs.
const AFTERLIFE: Duration = Duration::from_secs(10);

/// Bytes that a service may lock: rings and buffers of io_uring for each of a few queues.
const LOCKED_MEMORY: u64 = 1 << 30;

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
    ///
    /// Where the service is killed, its interface goes, too, once the kernel gives the device up: 30
    /// seconds after that (/sys/class/vduse/NAME/msg_timeout).
    #[command(after_help = "Example:\n  ioregion vduse net --name net0 --tap tap0")]
    Net(net::NetArgs),
}

/// Whom a service runs as.
#[derive(Debug, Args)]
pub(crate) struct UserArgs {
    /// Whom the service runs as, by names or numbers, not root [default: 65534:65534 where root
    /// starts it, else whoever does]
    ///
    /// The service gives up all rights before a driver reaches it. What it works on is opened
    /// before that: its user needs no access to it.
    #[arg(long, value_name = "USER[:GROUP]")]
    user: Option<String>,
}

impl UserArgs {
    /// Another user than the one that this process runs as.
    fn find(&self) -> Result<Option<User>> {
        let default = nix::unistd::geteuid().is_root().then_some(User::NOBODY);
        let wanted = self.user.as_deref().map(User::find).transpose();
        Ok(wanted.context("--user")?.or(default))
    }
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
    /// Have this machine's driver copy its data through memory of the service, so many MiB of it,
    /// not through the kernel's: pinned while a driver uses the device
    #[arg(long, value_name = "MIB", num_args = 0..=1, default_missing_value = "64", value_parser = clap::value_parser!(u64).range(1..=1024))]
    umem: Option<u64>,
    /// Where to keep what is in flight, for the next service [default:
    /// /run/ioregion/vduse-NAME.log]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    #[command(flatten)]
    user: UserArgs,
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
    let log = args.log.clone();
    let log = log.unwrap_or_else(|| Log::path_for(&args.name));
    let umem = args.umem.map(|mib| mib << 20);
    let started = Started::new(&args.name, Some(log), &args.user, umem)?;
    // Before the rights to it are gone.
    let umem = umem.map(|size| BounceBuffer::new(&args.name, size));
    let umem = umem.transpose()?;
    let options = Options {
        read_only: args.read_only,
        queues: args.queues,
        serial: args.serial.clone(),
        direct: args.direct,
        io_uring: !args.no_io_uring,
    };
    let disk = open(args, &options)?;
    let calls = match options.io_uring {
        true => Calls::service().io_uring(),
        false => Calls::service(),
    };
    let options = ServiceOptions {
        packed: args.packed,
        ..ServiceOptions::default()
    };
    let disk = Arc::new(disk);
    let refresh = || Ok(disk.refresh()?);
    let served = Served {
        name: &args.name,
        device: Arc::clone(&disk) as _,
        queue_size: args.queue_size,
        options,
        umem,
        refresh: &refresh,
    };
    served.run(started, calls)
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

/// What there is before anything of the device is opened, and before there are other threads.
struct Started {
    signals: SignalFd,
    keeper: Keeper,
    user: Option<User>,
    log: Option<PathBuf>,
}

impl Started {
    /// `log`: where requests in flight are on record. Without a record a device is not taken over.
    /// `bounce`: the size that the device's bounce buffer is to have, in bytes.
    fn new(name: &str, log: Option<PathBuf>, user: &UserArgs, bounce: Option<u64>) -> Result<Self> {
        check_name(name)?;
        let user = user.find()?;
        // Other threads would get the signals otherwise, and the keeper, which ends with us.
        let mask = block_signals().context("blocking signals")?;
        let keeper = Keeper::start(Errand {
            name: name.into(),
            log: log.clone(),
            user,
            bounce,
        })?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC);
        Ok(Self {
            signals: signals.context("waiting for signals")?,
            keeper,
            user,
            log,
        })
    }
}

/// A device and how it is served.
struct Served<'a> {
    name: &'a str,
    device: Arc<dyn Device>,
    queue_size: u16,
    options: ServiceOptions,
    /// Memory of this process for the bounce buffer; none where it stays in the kernel.
    umem: Option<BounceBuffer>,
    /// Looks whether the configuration has changed.
    refresh: &'a dyn Fn() -> Result<bool>,
}

/// What changes while it is served.
struct State {
    signals: SignalFd,
    keeper: Keeper,
    /// What the process keeps, until the rest is taken away.
    confinement: Option<Confinement>,
    /// Where the log is to be, until it is open.
    path: Option<PathBuf>,
    log: Option<Arc<Log>>,
}

impl Served<'_> {
    /// Serves the device until a signal asks for its end, making it anew where the kernel gives it
    /// up. System calls that the device makes are `calls`.
    fn run(&self, started: Started, calls: Calls) -> Result<()> {
        let Started {
            signals,
            keeper,
            user,
            log: path,
        } = started;
        let calls = calls.receiving().requests(&DEVICE_REQUESTS);
        let confinement = Confinement::new(calls)
            .isolated()
            .locked_memory(LOCKED_MEMORY + self.umem.as_ref().map_or(0, BounceBuffer::size));
        let confinement = match user {
            Some(user) => confinement.user(user),
            None => confinement,
        };
        let mut state = State {
            signals,
            keeper,
            confinement: Some(confinement),
            path,
            log: None,
        };
        while let Err(error) = self.serve(&mut state) {
            match error.downcast_ref() {
                Some(Error::Broken(_)) => tracing::error!("{error:#}; it is made anew"),
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes the device, or takes it over, and serves it until a signal asks for its end; then it
    /// is gone, and its log. The device is gone, too, where the kernel has given it up
    /// ([`Error::Broken`]).
    fn serve(&self, state: &mut State) -> Result<()> {
        let (name, device) = (self.name, &self.device);
        let features = offered(&**device, &self.options);
        let handed = state.keeper.make(&DeviceConfig {
            name: name.into(),
            device_id: device.kind(),
            vendor_id: 0,
            features,
            queues: device.queues(),
            config: device.config(),
        })?;
        let service = match self.start(state, handed, features) {
            Ok(service) => service,
            Err(error) => {
                if let Some(Error::Broken(_)) = error.downcast_ref() {
                    state.keeper.own();
                    state.keeper.detach()?;
                    state.keeper.remove()?;
                }
                return Err(error);
            }
        };
        // Whatever comes now, it has to go.
        state.keeper.own();
        // From here on the kernel sends requests, so that every way out stops the service last.
        let waited = state.keeper.attach().and_then(|()| {
            tracing::info!(name, "serving");
            let (signals, keeper) = (&state.signals, &state.keeper);
            let waited = wait(signals, keeper, &service, self.refresh);
            tracing::info!(name, "ending");
            waited.context("waiting for signals")
        });
        let detached = state.keeper.detach();
        let stopped = service.stop();
        let removed = state.keeper.remove();
        // What went wrong first explains what follows.
        let is_wanted = waited?;
        detached?;
        removed?;
        match stopped {
            Err(error) if !is_wanted => bail!("{error}"),
            stopped => stopped?,
        }
        // While it is locked.
        if let Err(error) = state.keeper.forget() {
            tracing::warn!("the log stays, of a device that is gone: {error:#}");
        }
        Ok(())
    }

    /// Starts the service, of a device that may have been there before. The first time, this takes
    /// the process's rights away.
    fn start(&self, state: &mut State, handed: Handed, features: u64) -> Result<Service> {
        let (name, device) = (self.name, &self.device);
        let Handed {
            mut file,
            identity,
            is_new,
            on_bus,
        } = handed;
        if let Some(buffer) = &self.umem {
            file.own_bounce_buffer(buffer);
        }
        if !is_new {
            file.check_queues(device.queues())?;
        }
        if let Some(path) = state.path.take() {
            let logged = Logged {
                name: name.into(),
                identity,
                kind: device.kind(),
                features,
                queues: device.queues(),
                queue_size: self.queue_size,
            };
            state.log = Some(Arc::new(Log::open(&path, &logged)?));
        } else if let Some(log) = &mut state.log {
            let alone = Arc::get_mut(log);
            alone
                .context("threads of the device before have the log")?
                .renew(identity);
        }
        // Whoever put it on the bus has done that.
        if !on_bus {
            for index in 0..device.queues() {
                file.set_up_queue(index, self.queue_size)?;
            }
        }
        if let Some(confinement) = state.confinement.take() {
            confinement.apply().context("confining the service")?;
        }
        let device = Arc::clone(device);
        let service = match &state.log {
            None => Service::start(name, file, device, self.options)?,
            Some(log) => Service::start_logged(name, file, device, self.options, Arc::clone(log))?,
        };
        Ok(service)
    }
}

/// Blocks the signals that a service waits for.
fn block_signals() -> nix::Result<SigSet> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGHUP);
    mask.thread_block()?;
    Ok(mask)
}

/// Waits for a signal that ends the service, or until the device is no longer served; whether it
/// still should be.
fn wait(
    signals: &SignalFd,
    keeper: &Keeper,
    service: &Service,
    refresh: &dyn Fn() -> Result<bool>,
) -> nix::Result<bool> {
    let mut is_kept = true;
    loop {
        let mut fds = [
            PollFd::new(service.ended().as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(keeper.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds[..if is_kept { 3 } else { 2 }], PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            done => done?,
        };
        let [ended, signalled, unkept] = fds.map(|fd| fd.any().unwrap_or(true));
        if ended {
            return Ok(true);
        }
        if is_kept && unkept {
            // It says nothing by itself. The driver need not suffer for it.
            tracing::error!("{}", keeper::GONE);
            is_kept = false;
        }
        if !signalled {
            continue;
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
