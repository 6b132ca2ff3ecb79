//! Debian's packaged cloud kernel: fetched once, unpacked in the cache, never installed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Kernel;
use crate::apt;
use crate::sh::Cmd;
use crate::toolchain::{Missing, cache_dir};

/// What the package names begin and end with; between them stands the kernel's release.
const PREFIX: &str = "linux-image-6.12.";
const SUFFIX: &str = "-cloud-amd64-unsigned";

/// Whether the kernel is here, or can be fetched.
pub fn check() -> Result<(), Missing> {
    if cached(&folder()).is_some() {
        return Ok(());
    }
    apt::can_fetch(
        "Debian's kernel package",
        "a Debian system; or `cargo xtask vm --image FILE` with a kernel of your own",
    )
}

/// The kernel in the cache, else the newest that apt knows.
pub fn kernel() -> Result<Kernel> {
    let folder = folder();
    let unpacked = match cached(&folder) {
        Some(unpacked) => unpacked,
        None => fetch(&folder)?,
    };
    let name = unpacked.file_name().unwrap_or_default().to_string_lossy();
    let release = release_of(&name).context("the cache holds a package of another name")?;
    Ok(Kernel {
        what: format!("stock kernel {release}"),
        image: unpacked.join("boot").join(format!("vmlinuz-{release}")),
        modules: Some(unpacked.join("lib/modules").join(release)),
    })
}

fn folder() -> PathBuf {
    cache_dir().join("kernels/stock")
}

/// The kernel's release in the name of its package.
fn release_of(package: &str) -> Option<String> {
    let release = package.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    Some(format!("6.12.{release}-cloud-amd64"))
}

/// The patch level of a package of ours: `linux-image-6.12.117+deb12-cloud-amd64-unsigned` has
/// 117.
fn level(package: &str) -> Option<u32> {
    let release = package.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    let digits = release.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// The newest unpacked kernel.
fn cached(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let newest = names
        .filter(|name| level(name).is_some())
        .max_by_key(|name| level(name))?;
    Some(folder.join(newest))
}

fn fetch(folder: &Path) -> Result<PathBuf> {
    let names = apt::names(PREFIX)?;
    let newest = names.iter().max_by_key(|name| level(name));
    let Some(package) = newest.filter(|name| level(name).is_some()) else {
        bail!(Missing::new(
            format!("apt knows no package {PREFIX}*{SUFFIX}"),
            "Debian 12 with its security suite, or newer; or `cargo xtask vm --image FILE`",
        ));
    };
    let place = folder.join(package);
    let fresh = folder.join(format!("{package}.part"));
    if fresh.exists() {
        std::fs::remove_dir_all(&fresh)
            .with_context(|| format!("cannot remove {}", fresh.display()))?;
    }
    let package = apt::download(package, &fresh)?;
    Cmd::line("dpkg-deb --extract")
        .arg(&package)
        .arg(&fresh)
        .run()?;
    std::fs::remove_file(&package)
        .and_then(|()| std::fs::rename(&fresh, &place))
        .with_context(|| format!("cannot put the kernel into {}", place.display()))?;
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_package_is_chosen_by_number() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cached(dir.path()), None);
        for name in [
            "linux-image-6.12.99+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.117+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.200+deb12-cloud-amd64-unsigned.part",
            "linux-image-6.12.300+deb12-amd64-unsigned",
        ] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let newest = cached(dir.path()).unwrap();
        let name = newest.file_name().unwrap().to_str().unwrap();
        assert_eq!(level(name), Some(117));
        assert_eq!(
            release_of(name).as_deref(),
            Some("6.12.117+deb12-cloud-amd64")
        );
    }

    #[test]
    fn other_packages_have_no_level() {
        assert_eq!(level("linux-image-6.12.x-cloud-amd64-unsigned"), None);
        assert_eq!(level("linux-image-6.12-cloud-amd64"), None);
    }
}
