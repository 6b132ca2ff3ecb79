//! What a process keeps, and taking away the rest.

use std::io;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, PathBeneath,
    PathFd, Ruleset, RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetStatus,
    Scope,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{
    UnlinkatFlags, chdir, chroot, geteuid, mkdtemp, setgroups, setresgid, setresuid, unlinkat,
};

use crate::calls::Calls;
use crate::error::{Error, system};
use crate::process::threads;
use crate::user::User;
use crate::violation;

/// The newest Landlock that this program knows; of what a kernel does not have, less is
/// restricted.
const LANDLOCK: ABI = ABI::V6;

/// What a process may do with a file, or with all files in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    /// Open it to read.
    Read,
    /// Open it to read and write.
    ReadWrite,
    /// Open it to read and write, and send it requests (`ioctl`), as far as the calls allow them.
    Device,
    /// Remove it; of a folder only.
    Remove,
}

impl FileAccess {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile.into(),
            Self::ReadWrite => AccessFs::ReadFile | AccessFs::WriteFile,
            Self::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
            Self::Remove => AccessFs::RemoveFile.into(),
        }
    }
}

/// What a process keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confinement {
    calls: Calls,
    user: Option<User>,
    net_admin: bool,
    gives_to: Option<User>,
    isolated: bool,
    network: bool,
    files: Vec<(PathBuf, FileAccess)>,
    locked_memory: Option<u64>,
}

impl Confinement {
    /// Nothing but these system calls, and what is open.
    #[must_use]
    pub fn new(calls: Calls) -> Self {
        Self {
            calls,
            user: None,
            net_admin: false,
            gives_to: None,
            isolated: false,
            network: false,
            files: Vec::new(),
            locked_memory: None,
        }
    }

    /// Becomes this user, which only root can. Otherwise the user stays.
    #[must_use]
    pub fn user(mut self, user: User) -> Self {
        self.user = Some(user);
        self
    }

    /// Keeps `CAP_NET_ADMIN`, where the process has it, and the network.
    #[must_use]
    pub fn net_admin(mut self) -> Self {
        (self.net_admin, self.network) = (true, true);
        self
    }

    /// Keeps the right to give files that it has open to this user, and to nobody else
    /// (`CAP_CHOWN`, where the process has it).
    #[must_use]
    pub fn gives_to(mut self, user: User) -> Self {
        self.gives_to = Some(user);
        self
    }

    /// Moves into an empty root folder and a network of its own with nobody in it, where the
    /// process has the right to. Then sockets reach nobody, not even by path or over io_uring.
    #[must_use]
    pub fn isolated(mut self) -> Self {
        self.isolated = true;
        self
    }

    /// Keeps a right to a file, or to all files in a folder; the root folder then stays, and
    /// paths can be looked at. Where a path leads is settled by
    /// [`apply`](Self::apply).
    #[must_use]
    pub fn file(mut self, path: &Path, access: FileAccess) -> Self {
        self.files.push((path.into(), access));
        self
    }

    /// Sets how many bytes the process may lock into memory (rings and buffers of io_uring), for
    /// which root needs no limit, but others do. As far as the process has the right to.
    #[must_use]
    pub fn locked_memory(mut self, bytes: u64) -> Self {
        self.locked_memory = Some(bytes);
        self
    }

    /// Takes everything else away from this process, and from the threads and processes that it
    /// will start. There is no way back, and after an error the process is confined in part: it
    /// has to end.
    ///
    /// # Errors
    ///
    /// [`Error::Threads`] where there are threads already; whatever could not be taken away.
    pub fn apply(self) -> Result<(), Error> {
        match threads()? {
            1 => {}
            more => return Err(Error::Threads(more)),
        }
        let root = geteuid().is_root();
        if let Some(user) = self.user
            && !root
        {
            return Err(Error::NotRoot(user));
        }
        // All that needs paths or rights, before both go.
        let rules = self.rules()?;
        if let Some(bytes) = self.locked_memory {
            lock_memory(bytes)?;
        }
        let isolated = self.isolate()?;
        self.drop_rights()?;

        let status = rules
            .restrict_self()
            .map_err(|error| Error::Landlock(error.to_string()))?;
        if status.ruleset == RulesetStatus::NotEnforced {
            return Err(Error::Landlock("it is not enforced".into()));
        }
        if status.ruleset == RulesetStatus::PartiallyEnforced {
            tracing::warn!("this kernel's Landlock is older than 6.12: signals and TCP are free");
        }
        violation::install()?;
        let removes = |&(_, access): &(_, FileAccess)| access == FileAccess::Remove;
        let mut calls = self.calls.paths(!self.files.is_empty());
        if self.files.iter().any(removes) {
            calls = calls.removing();
        }
        if let Some(user) = self.gives_to {
            calls = calls.giving(user);
        }
        for program in calls.signalling(std::process::id()).programs()? {
            seccompiler::apply_filter(&program)
                .map_err(|error| Error::Filter(error.to_string()))?;
        }
        let user = self.user.map(tracing::field::display);
        tracing::debug!(user, isolated, "confined");
        Ok(())
    }

    /// What Landlock is to allow.
    fn rules(&self) -> Result<RulesetCreated, Error> {
        let failed = |error: landlock::RulesetError| Error::Landlock(error.to_string());
        let all = AccessFs::from_all(LANDLOCK);
        // Nothing at all is no choice; what came later is.
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(ABI::V1))
            .map_err(failed)?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(all)
            .map_err(failed)?
            .scope(Scope::from_all(LANDLOCK))
            .map_err(failed)?;
        if !self.network {
            rules = rules
                .handle_access(AccessNet::from_all(LANDLOCK))
                .map_err(failed)?;
        }
        let mut rules = rules.create().map_err(failed)?;
        for (path, access) in &self.files {
            let bad = |why: String| Error::File {
                path: path.clone(),
                why,
            };
            let file = PathFd::new(path).map_err(|error| bad(error.to_string()))?;
            rules = rules
                .add_rule(PathBeneath::new(file, access.rights()))
                .map_err(|error| bad(error.to_string()))?;
        }
        Ok(rules)
    }

    /// Whether the process has moved away from everybody else.
    fn isolate(&self) -> Result<bool, Error> {
        if !self.isolated {
            return Ok(false);
        }
        let may = caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN);
        if !may.map_err(failed("reading capabilities"))? {
            tracing::warn!("without CAP_SYS_ADMIN there is no empty root folder or network");
            return Ok(false);
        }
        let mut spaces = CloneFlags::CLONE_NEWIPC;
        spaces.set(CloneFlags::CLONE_NEWNET, !self.network);
        unshare(spaces).map_err(system("namespaces of its own"))?;
        if self.files.is_empty() {
            leave_files().map_err(system("an empty root folder"))?;
        }
        Ok(true)
    }

    /// Gives up user, groups and capabilities.
    fn drop_rights(&self) -> Result<(), Error> {
        let dropped = "dropping capabilities";
        let root = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP);
        if root.map_err(failed("reading capabilities"))? {
            caps::clear(None, CapSet::Bounding).map_err(failed(dropped))?;
        }
        let has = caps::read(None, CapSet::Permitted).map_err(failed("reading capabilities"))?;
        if let Some(user) = self.user {
            setgroups(&[]).map_err(system("leaving groups"))?;
            let (uid, gid) = (user.uid(), user.gid());
            setresgid(gid, gid, gid).map_err(system("changing the group"))?;
            setresuid(uid, uid, uid).map_err(system("changing the user"))?;
        }
        let mut keep = CapsHashSet::new();
        // A change of user has taken them away.
        let wanted = [
            (self.net_admin, Capability::CAP_NET_ADMIN),
            (self.gives_to.is_some(), Capability::CAP_CHOWN),
        ];
        keep.extend(wanted.into_iter().filter_map(|(is_wanted, capability)| {
            let kept = is_wanted && self.user.is_none() && has.contains(&capability);
            kept.then_some(capability)
        }));
        // The kernel may be too old for ambient ones; it then has none.
        let _ = caps::clear(None, CapSet::Ambient);
        caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).map_err(failed(dropped))?;
        caps::set(None, CapSet::Effective, &keep).map_err(failed(dropped))?;
        caps::set(None, CapSet::Permitted, &keep).map_err(failed(dropped))?;
        for (what, option, value) in [
            ("giving up new privileges", libc::PR_SET_NO_NEW_PRIVS, 1),
            // Nobody of the same user looks into this process or leads it astray.
            ("closing the process to others", libc::PR_SET_DUMPABLE, 0),
        ] {
            // SAFETY: Both take an integer and touch no memory.
            let done = unsafe { libc::prctl(option, value, 0, 0, 0) };
            Errno::result(done).map_err(system(what))?;
        }
        Ok(())
    }
}

fn failed(what: &'static str) -> impl FnOnce(caps::errors::CapsError) -> Error {
    move |error| Error::System {
        what,
        error: io::Error::other(error.to_string()),
    }
}

/// Moves into a folder that is gone: nothing can be found or made in it. (A mount namespace would
/// do, too, but would keep file systems mounted that everybody else has unmounted.)
fn leave_files() -> io::Result<()> {
    let parent = std::env::temp_dir();
    let folder = mkdtemp(&parent.join("ioregion-root-XXXXXX"))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let moved = open(&parent, flags, Mode::empty()).and_then(|parent| {
        let moved = chroot(&folder).and_then(|()| chdir("/"));
        let name = folder.file_name().unwrap_or_default();
        moved.and(unlinkat(&parent, name, UnlinkatFlags::RemoveDir))
    });
    Ok(moved?)
}

fn lock_memory(bytes: u64) -> Result<(), Error> {
    let limit = Resource::RLIMIT_MEMLOCK;
    let (soft, hard) = getrlimit(limit).map_err(system("reading a limit"))?;
    if soft == bytes && hard == bytes {
        return Ok(());
    }
    match setrlimit(limit, bytes, bytes) {
        // As much as there is without the right to more.
        Err(Errno::EPERM) => setrlimit(limit, hard, hard),
        done => done,
    }
    .map_err(system("limiting locked memory"))
}
