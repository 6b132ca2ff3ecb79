//! Debian packages: installing what is missing, and fetching packages without installing them.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::sh::{Cmd, which};
use crate::toolchain::{Missing, cache_dir};

/// Something that a system package brings.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    /// A command in `PATH`, or an absolute path, that proves its presence.
    pub proof: &'static str,
    /// The apt package.
    pub name: &'static str,
    /// What for.
    pub why: &'static str,
}

impl Package {
    /// A row of a table of packages.
    pub const fn new(proof: &'static str, name: &'static str, why: &'static str) -> Self {
        Self { proof, name, why }
    }

    fn is_here(&self) -> bool {
        if self.proof.starts_with('/') {
            Path::new(self.proof).exists()
        } else {
            which(self.proof).is_some()
        }
    }
}

/// Finds out whether every package is here.
pub fn check(packages: &[Package]) -> Result<(), Missing> {
    let missing: Vec<&str> = packages
        .iter()
        .filter(|package| !package.is_here())
        .map(|package| package.name)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Missing::new(
        format!("packages are missing: {}", missing.join(" ")),
        format!(
            "as root `{}` or the like on another system",
            install_command(&missing)
        ),
    ))
}

/// Installs those of `packages` that are missing.
pub fn ensure(packages: &[Package]) -> Result<()> {
    let mut missing = Vec::new();
    for package in packages.iter().filter(|package| !package.is_here()) {
        let Package { proof, name, why } = package;
        println!("{proof} is missing ({why}): package {name}");
        missing.push(*name);
    }
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Whether apt can install packages here.
pub fn can_install() -> bool {
    which("apt-get").is_some() && is_root()
}

/// Whether apt has package lists at all (a fresh container image has none).
fn has_lists() -> bool {
    let entries = std::fs::read_dir("/var/lib/apt/lists");
    entries.is_ok_and(|mut entries| {
        entries.any(|entry| {
            entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
        })
    })
}

/// Renews apt's package lists.
pub fn update() -> Result<()> {
    Cmd::line("apt-get update").run()
}

fn install_command(packages: &[&str]) -> Cmd {
    // Somebody else may be installing: wait for them.
    Cmd::line("apt-get install -y --no-remove --no-install-recommends -o DPkg::Lock::Timeout=600")
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
}

/// Installs packages without removing others; renews old package lists once.
pub fn install(packages: &[&str]) -> Result<()> {
    let command = install_command(packages);
    if !can_install() {
        bail!(Missing::new(
            format!("packages are missing: {}", packages.join(" ")),
            format!("as root `{command}` or the like on another system"),
        ));
    }
    if has_lists() && command.run().is_ok() {
        return Ok(());
    }
    update()?;
    command.run()
}

/// Installs QEMU's emulator of x86-64 machines.
///
/// Where the machine has QEMU tools from its release's backports, the emulator comes from there
/// too: the one of the release itself would have them removed.
pub fn install_qemu() -> Result<()> {
    const EMULATOR: &str = "qemu-system-x86";
    let query = Cmd::line("dpkg-query --show --showformat=${Version} qemu-utils");
    if !query
        .probe()
        .is_some_and(|version| version.contains("~bpo"))
        || !can_install()
    {
        return install(&[EMULATOR]);
    }
    let about = std::fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let suite = format!("{}-backports", codename(&about).context("no release name")?);
    let list = cache_dir().join("apt").join(format!("{suite}.list"));
    println!("qemu-utils is from {suite}, so {EMULATOR} is taken from there, too");
    write_sources(&list, &suite)?;
    let source_list = format!("Dir::Etc::SourceList={}", list.display());
    // The system's own sources and lists stay as they are.
    Cmd::line("apt-get update -o APT::Get::List-Cleanup=0")
        .args(["-o", &source_list])
        .run()?;
    install_command(&[EMULATOR])
        .args(["-t", &suite, "-o", &source_list])
        .run()
}

/// `VERSION_CODENAME` of an os-release file.
fn codename(os_release: &str) -> Option<&str> {
    os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"'))
}

/// Writes a list of sources: the system's own main list, and `suite` from Debian's mirrors.
fn write_sources(list: &Path, suite: &str) -> Result<()> {
    let own = std::fs::read_to_string("/etc/apt/sources.list").unwrap_or_default();
    let line = format!(
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
         http://deb.debian.org/debian {suite} main\n"
    );
    println!("+ echo '{}' >> {}", line.trim_end(), list.display());
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(list.with_file_name(""))?;
        std::fs::write(list, format!("{own}\n{line}"))
    };
    write().with_context(|| format!("writing {}", list.display()))
}

/// Whether packages can be fetched and unpacked here; `what` says of which that is asked, `enable`
/// what helps where they cannot.
pub fn can_fetch(what: &str, enable: &str) -> Result<(), Missing> {
    for program in ["apt-get", "dpkg-deb"] {
        if which(program).is_none() {
            return Err(Missing::new(
                format!("{what} cannot be fetched: no {program}"),
                enable,
            ));
        }
    }
    Ok(())
}

/// Fetches a package file into `dir`; renews old package lists once. The user's own cache, so
/// root is not needed where the lists are there.
pub fn download(package: &str, dir: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let command = Cmd::line("apt-get download")
        .arg(package)
        // The folder need not be readable by apt's own user.
        .args(["-o", "APT::Sandbox::User=root"])
        .dir(dir);
    if which("apt-get").is_none() {
        bail!(Missing::new(
            format!("package {package} cannot be fetched: no apt-get"),
            "a Debian 12 or newer system",
        ));
    }
    if command.run().is_err() {
        update()?;
        command.run()?;
    }
    fetched(package, dir)
}

/// The file of a package that apt fetched into `dir`.
fn fetched(package: &str, dir: &Path) -> Result<PathBuf> {
    let start = format!("{}_", package.split('=').next().unwrap_or(package));
    let entries = std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let fetched = entries.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&start) && name.ends_with(".deb")
    });
    fetched.with_context(|| format!("apt-get fetched no {start}*.deb into {}", dir.display()))
}

/// Fetches a package file into `dir` from the first of other suites of Debian's that carries it,
/// on the mirror that this machine uses. Neither the system's sources nor its lists change.
pub fn download_from(suites: &[&str], package: &str, dir: &Path) -> Result<PathBuf> {
    can_fetch(
        &format!("package {package}"),
        "a Debian 12 or newer system; or the file in the cache by other means",
    )?;
    let mut mirror = mirror();
    if mirror.is_none() {
        update()?;
        mirror = self::mirror();
    }
    let Some(mirror) = mirror else {
        bail!(Missing::new(
            format!("package {package} cannot be fetched: apt has no source of Debian's"),
            "a line for Debian's main archive in apt's sources",
        ));
    };
    let folder = cache_dir().join("apt");
    for suite in suites {
        let list = folder.join(format!("{suite}.list"));
        let lists = folder.join(format!("lists-{suite}"));
        let line = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        println!("+ echo '{}' > {}", line.trim_end(), list.display());
        std::fs::create_dir_all(lists.join("partial"))
            .and_then(|()| std::fs::write(&list, line))
            .with_context(|| format!("writing {}", list.display()))?;
        let here = [
            format!("Dir::Etc::SourceList={}", list.display()),
            "Dir::Etc::SourceParts=/dev/null".into(),
            format!("Dir::State::Lists={}", lists.display()),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            "APT::Sandbox::User=root".into(),
        ];
        let here = here.iter().flat_map(|option| ["-o", option]);
        let update = Cmd::line("apt-get update").args(here.clone());
        if update.run().is_err() {
            println!("{suite} cannot be read");
            continue;
        }
        let names = Cmd::line("apt-cache pkgnames").args(here.clone());
        let names = names.arg(package).probe().unwrap_or_default();
        if !names.lines().any(|name| name == package) {
            println!("{suite} carries no {package}");
            continue;
        }
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let download = Cmd::line("apt-get download").args(here).arg(package);
        download.dir(dir).run()?;
        return fetched(package, dir);
    }
    bail!(Missing::new(
        format!("none of the suites {} carries {package}", suites.join(", ")),
        "the newest line of kernels that Debian packages: adapt xtask/src/kernel/source.rs",
    ));
}

/// The keys that sign all of Debian's suites.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where apt has this machine's release of Debian from.
fn mirror() -> Option<String> {
    let about = std::fs::read_to_string("/etc/os-release").ok()?;
    let codename = codename(&about)?;
    // As apt reads its sources, in whatever format they are.
    let targets = Cmd::line("apt-get indextargets --format")
        .arg("$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)")
        .arg("Created-By: Packages")
        .probe()?;
    mirror_of(codename, &targets)
}

/// The mirror of a release's main archive, in lines of origin, code name, component and address.
fn mirror_of(codename: &str, targets: &str) -> Option<String> {
    let wanted = ["Debian", codename, "main"];
    targets.lines().find_map(|line| {
        let mut words = line.split(' ');
        let is_wanted = wanted.iter().all(|want| words.next() == Some(want));
        is_wanted.then(|| words.next().map(String::from)).flatten()
    })
}

/// The names of packages that begin with `prefix`; renews the lists once where there are none.
pub fn names(prefix: &str) -> Result<Vec<String>> {
    let names = || {
        let printed = Cmd::line("apt-cache pkgnames").arg(prefix).probe();
        let names = printed.unwrap_or_default();
        names.lines().map(String::from).collect::<Vec<_>>()
    };
    let found = names();
    if !found.is_empty() || which("apt-get").is_none() || !is_root() {
        return Ok(found);
    }
    update()?;
    Ok(names())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_name_comes_from_os_release() {
        let about = "ID=debian\nVERSION_CODENAME=bookworm\nID_LIKE=x\n";
        assert_eq!(codename(about), Some("bookworm"));
        assert_eq!(codename("VERSION_CODENAME=\"noble\""), Some("noble"));
        assert_eq!(codename("ID=arch"), None);
    }

    #[test]
    fn mirror_is_that_of_the_release_itself() {
        let targets = "Other bookworm main http://x/other/\n\
            Debian bookworm-updates main http://x/updates/\n\
            Debian bookworm contrib http://x/contrib/\nDebian bookworm main http://x/debian/\n";
        let mirror = |name| mirror_of(name, targets);
        assert_eq!(mirror("bookworm").as_deref(), Some("http://x/debian/"));
        assert_eq!(mirror("trixie"), None);
    }

    #[test]
    fn missing_packages_are_named_with_the_command_that_installs_them() {
        let here = Package::new("sh", "dash", "a shell");
        let path = Package::new("/nonexistent/header.h", "libx-dev", "tests");
        let command = Package::new("no-such-command", "x-utils", "tests");
        assert_eq!(check(&[here]), Ok(()));
        let missing = check(&[here, path, command]).unwrap_err();
        assert_eq!(missing.reason, "packages are missing: libx-dev x-utils");
        assert!(missing.enable.contains("--no-remove"), "{missing}");
    }
}
