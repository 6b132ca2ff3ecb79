//! The small process that has the rights which serving a device does not need.
//!
//! Making a device, putting it on the vDPA bus, taking it off and removing it need
//! `/dev/vduse/control` and `CAP_NET_ADMIN`. The service does none of this itself: before it gives
//! its rights up it makes this process, the keeper. The keeper hands it the device's file, and has
//! no more rights than its errands need, which are all about the one device that it was made for.
//! Nor does the service wait for the bus: a driver may keep whoever asks it waiting for as long as
//! the device is not served, and if that were the service and it were killed, it could not end,
//! and nobody could take the device over.
//!
//! The keeper ends with the service. When the service ends without having had its device removed:
//!
//! * where there is a log of what is in flight, **the device stays**: its driver waits for the next
//!   service, which takes it over;
//! * else nobody could take it over, and the keeper takes it off the bus and removes it. As nobody
//!   answers its driver any more, that takes the kernel's message timeout.
//!
//! When the keeper is killed, the service goes on. It cannot have its device removed any more, so
//! that the device stays when it ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ioregion_sandbox::{Calls, Child, Confinement, FileAccess, User, receive, send};
use ioregion_vduse::{
    CONTROL_REQUESTS, Control, DeviceConfig, DeviceFile, Error, Identity, Log, SETTINGS,
    set_bounce_size, vdpa,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::prctl;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, fchown, unlinkat};

use super::wire::{self, Make, Request};

/// What follows where the keeper was killed.
pub(super) const GONE: &str =
    "the process that has the rights to the device is gone: the device stays when this one ends";

/// How long a service that was killed may keep its device open.
const LET_GO: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

/// Whom a keeper is for.
#[derive(Debug, Clone)]
pub(super) struct Errand {
    /// The device's name.
    pub(super) name: String,
    /// Where requests in flight are on record. Without a record a device is not taken over.
    pub(super) log: Option<PathBuf>,
    /// Whose the device's file is to be.
    pub(super) user: Option<User>,
    /// The size that the device's bounce buffer is to have, in bytes; otherwise the kernel's.
    pub(super) bounce: Option<u64>,
}

/// A device that the service can serve.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) file: DeviceFile,
    pub(super) identity: Identity,
    /// It was not there before.
    pub(super) is_new: bool,
    /// It is on the bus already.
    pub(super) on_bus: bool,
}

/// The service's side. Has the device removed when this goes, if it is the service's and that was
/// not done.
#[derive(Debug)]
pub(super) struct Keeper {
    name: String,
    child: Child,
    owns: bool,
}

impl Keeper {
    /// Makes the process, before this one starts threads or opens what is none of its business.
    pub(super) fn start(errand: Errand) -> Result<Self> {
        let name = errand.name.clone();
        let child = ioregion_sandbox::fork(move |socket| match Kept::start(errand) {
            Ok(kept) => {
                tell(&socket, Ok((Vec::new(), None)));
                kept.serve(&socket)
            }
            Err(error) => {
                tell(&socket, Err(error));
                1
            }
        })
        .context("making the process that has the rights to the device")?;
        let keeper = Self {
            name,
            child,
            owns: false,
        };
        keeper.answer()?;
        Ok(keeper)
    }

    fn ask(&self, request: &Request) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        // Whole, or not at all.
        nix::unistd::write(&self.child, &request.encode()).context(GONE)?;
        self.answer()
    }

    fn answer(&self) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut bytes = vec![0; wire::MOST];
        let (len, file) = receive(&self.child, &mut bytes)
            .context("hearing from the process that has the rights to the device")?;
        bytes.truncate(len);
        match bytes.split_first() {
            Some((&wire::DONE, rest)) => Ok((rest.into(), file)),
            Some((_, why)) => bail!("{}", String::from_utf8_lossy(why)),
            None => bail!(GONE),
        }
    }

    /// Makes the device, or finds the one that a service before has left.
    pub(super) fn make(&mut self, config: &DeviceConfig) -> Result<Handed> {
        let (bytes, file) = self.ask(&Request::Make(Make::of(config)))?;
        let (Some(found), Some(file)) = (wire::Found::decode(&bytes), file) else {
            bail!(GONE);
        };
        self.owns = found.is_new;
        Ok(Handed {
            file: DeviceFile::received(&self.name, file)?,
            identity: found.identity,
            is_new: found.is_new,
            on_bus: found.on_bus,
        })
    }

    /// From now on the device goes with this service, whoever made it.
    pub(super) fn own(&mut self) {
        self.owns = true;
    }

    /// Puts the device on the bus, if it is not there; it must be served meanwhile.
    pub(super) fn attach(&self) -> Result<()> {
        self.ask(&Request::Attach).map(drop)
    }

    /// Takes the device off the bus, if it is there; it must be served meanwhile.
    pub(super) fn detach(&self) -> Result<()> {
        self.ask(&Request::Detach).map(drop)
    }

    /// Removes the device, whose file nobody has open any more.
    pub(super) fn remove(&mut self) -> Result<()> {
        self.owns = false;
        self.ask(&Request::Remove).map(drop)
    }

    /// Removes the log of a device that is removed, and whose log nobody else can have.
    pub(super) fn forget(&self) -> Result<()> {
        self.ask(&Request::Forget).map(drop)
    }
}

impl AsFd for Keeper {
    /// Hangs up when the process ends.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.owns
            && let Err(error) = self.remove()
        {
            tracing::error!("the device stays: {error:#}");
        }
    }
}

/// The process's own side.
struct Kept {
    errand: Errand,
    control: Control,
    /// The machine's boot.
    boot: u128,
    /// The device that was there before.
    found: Option<DeviceFile>,
    /// The folder of the log.
    folder: Option<OwnedFd>,
    /// What the device was made like at first.
    like: Option<Make>,
    /// There is a device to remove.
    made: bool,
}

impl Kept {
    /// Gives up all rights but those that are needed.
    fn start(errand: Errand) -> Result<Self> {
        // For whoever lists processes; nothing depends on it.
        let _ = prctl::set_name(c"ioregion-keeper");
        let mut kept = Self {
            control: Control::newest()?,
            boot: Identity::boot_now()?,
            found: None,
            folder: None,
            like: None,
            made: false,
            errand,
        };
        let calls = Calls::netlink().requests(&CONTROL_REQUESTS);
        let mut confinement = Confinement::new(calls)
            .net_admin()
            .isolated()
            .file(Path::new("/dev/vduse"), FileAccess::Device);
        if let Some(user) = kept.errand.user {
            confinement = confinement.gives_to(user);
        }
        if kept.errand.bounce.is_some() {
            confinement = confinement.file(Path::new(SETTINGS), FileAccess::ReadWrite);
        }
        if let Some(log) = &kept.errand.log {
            Log::make_folder(log)?;
            let folder = folder_of(log);
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let opened = open(folder, flags, Mode::empty());
            kept.folder = Some(opened.with_context(|| format!("{}", folder.display()))?);
            confinement = confinement.file(folder, FileAccess::Remove);
            // It is its user's, and after this only what this process makes can be opened.
            if DeviceFile::exists(&kept.errand.name) {
                let file = open_device(&kept.errand.name)?;
                kept.give(&file)?;
                kept.found = Some(file);
            }
        }
        let confined = confinement.apply();
        confined.context("confining the process that has the rights to the device")?;
        Ok(kept)
    }

    /// Carries out requests until the service has ended: the exit status.
    fn serve(mut self, socket: &OwnedFd) -> u8 {
        let mut bytes = vec![0; wire::MOST];
        loop {
            let Ok((len @ 1.., _)) = receive(socket, &mut bytes) else {
                return self.ended();
            };
            let done = match bytes.get(..len).and_then(Request::decode) {
                Some(request) => self.handle(request),
                None => Err(anyhow::anyhow!("there is no such request")),
            };
            tell(socket, done);
        }
    }

    fn handle(&mut self, request: Request) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        match request {
            Request::Make(make) => {
                let (found, file) = self.make(make)?;
                let file = file.as_fd().try_clone_to_owned();
                return Ok((found.encode(), Some(file.context("the device's file")?)));
            }
            Request::Attach => self.attach()?,
            Request::Detach => self.detach()?,
            Request::Remove => {
                self.control.destroy(&self.errand.name)?;
                self.made = false;
            }
            Request::Forget => self.forget()?,
        }
        Ok((Vec::new(), None))
    }

    fn make(&mut self, make: Make) -> Result<(wire::Found, DeviceFile)> {
        ensure!(!self.made, "the device was made already");
        if let Some(like) = &self.like {
            ensure!(like.is_like(&make), "the device was another one at first");
        }
        let is_new = self.found.is_none();
        if is_new {
            self.control.create(&make.config(&self.errand.name))?;
        }
        let handed = self.hand(is_new);
        match &handed {
            Ok(_) => {
                self.made = true;
                self.like.get_or_insert(make);
            }
            Err(_) if is_new => {
                if let Err(error) = self.control.destroy(&self.errand.name) {
                    tracing::error!(%error, "the device stays");
                }
            }
            Err(_) => {}
        }
        handed
    }

    /// The device's file, and what is to be said of the device.
    fn hand(&mut self, is_new: bool) -> Result<(wire::Found, DeviceFile)> {
        let name = &self.errand.name;
        let found = wire::Found {
            identity: Identity::of_boot(self.boot, name)?,
            is_new,
            on_bus: vdpa::is_attached(name),
        };
        if let Some(size) = self.errand.bounce {
            set_bounce_size(name, size)?;
        }
        if let Some(file) = self.found.take() {
            return Ok((found, file));
        }
        let file = DeviceFile::open(name)?;
        self.give(&file)?;
        Ok((found, file))
    }

    /// Gives the device's file to the service's user.
    fn give(&self, file: &DeviceFile) -> Result<()> {
        let Some(user) = self.errand.user else {
            return Ok(());
        };
        let given = fchown(file, Some(user.uid()), Some(user.gid()));
        given.with_context(|| format!("giving /dev/vduse/{} to the user {user}", file.name()))
    }

    fn attach(&self) -> Result<(), Error> {
        let name = &self.errand.name;
        if vdpa::is_attached(name) {
            return Ok(());
        }
        match vdpa::attach(name) {
            // The keeper before has asked for it, too.
            Err(_) if vdpa::is_attached(name) => Ok(()),
            done => done,
        }
    }

    fn detach(&self) -> Result<(), Error> {
        match vdpa::is_attached(&self.errand.name) {
            true => vdpa::detach(&self.errand.name),
            false => Ok(()),
        }
    }

    fn forget(&self) -> Result<()> {
        let name = self.errand.log.as_ref().and_then(|log| log.file_name());
        let (Some(folder), Some(name)) = (&self.folder, name) else {
            return Ok(());
        };
        match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            removed => removed.with_context(|| format!("removing {}", name.display())),
        }
    }

    /// What is left to do for a service that did not have it done.
    fn ended(&self) -> u8 {
        let device = &self.errand.name;
        if !self.made {
            return 0;
        }
        if self.errand.log.is_some() {
            tracing::info!(device, "its service is gone, and it waits for the next one");
            return 0;
        }
        tracing::warn!(device, "its service is gone; it is removed");
        let until = Instant::now() + LET_GO;
        let removed = self.detach().and_then(|()| {
            loop {
                match self.control.destroy(device) {
                    // Descriptors of a process that ends go one after the other.
                    Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
                    done => return done,
                }
            }
        });
        match removed {
            Ok(()) => 0,
            Err(error) => {
                tracing::error!(%error, "the device stays");
                1
            }
        }
    }
}

/// The folder that a file lies in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Opens the file of a device whose service may have been killed a moment ago.
fn open_device(name: &str) -> Result<DeviceFile, Error> {
    let until = Instant::now() + LET_GO;
    loop {
        match DeviceFile::open(name) {
            Err(Error::Open { error, .. })
                if error.raw_os_error() == Some(Errno::EBUSY as i32) && Instant::now() < until =>
            {
                std::thread::sleep(PAUSE);
            }
            opened => return opened,
        }
    }
}

/// Sends an answer. Where nobody is left to read it, the next read says so.
fn tell(socket: &OwnedFd, done: Result<(Vec<u8>, Option<OwnedFd>)>) {
    let (answer, file) = match done {
        Ok((bytes, file)) => ([&[wire::DONE][..], &bytes].concat(), file),
        Err(error) => {
            let why = format!("{error:#}");
            let why = why.bytes().take(wire::MOST - 1);
            (std::iter::once(wire::FAILED).chain(why).collect(), None)
        }
    };
    let _ = send(socket, &answer, file.as_ref().map(AsFd::as_fd));
}
