//! The patched kernel as Debian packages for a real machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{KernelArgs, PATCHES, Patched, base, config, fragments, logged, setup, source};
use crate::apt::{self, Package};
use crate::lock::Lock;
use crate::sh::Cmd;

/// What building packages needs beyond building kernels.
const PACKAGES: [Package; 3] = [
    Package::new("dpkg-buildpackage", "dpkg-dev", "building packages"),
    Package::new("dh", "debhelper", "building packages"),
    Package::new("rsync", "rsync", "building packages"),
];

/// What is changed in the distribution's configuration.
pub const FRAGMENTS: [&str; 1] = ["deb.config"];

/// What is changed in it where it has the option at all.
const KEYS: [&str; 1] = ["deb-keys.config"];

/// Debian's configurations of the same source.
const CONFIGURATIONS: &str = "linux-config-6.12";

/// Builds the packages into `target/kernel/deb`.
pub fn build(root: &Path, args: &KernelArgs) -> Result<()> {
    let patches = source::series(&root.join(PATCHES))?;
    let changes = fragments(root, &FRAGMENTS)?;
    let keys = fragments(root, &KEYS)?;
    setup()?;
    apt::ensure(&PACKAGES)?;
    let base = base(root);
    let _lock = Lock::take(&base)?;
    let package = source::LTS.fetch(args.update)?;
    let distribution = match &args.config {
        Some(file) => fs::read_to_string(file)
            .with_context(|| format!("reading the configuration {}", file.display()))?,
        None => debian_configuration(&base, &package.version)?,
    };
    let keys = config::mentioned(&keys, &distribution);
    let source = Patched::prepare(&base, &package, &patches)?;
    // The packages appear in the folder above the objects.
    let folder = base.join("deb");
    let objects = folder.join("build");
    fs::create_dir_all(&objects)
        .and_then(|()| fs::write(objects.join(".config"), distribution))
        .with_context(|| format!("cannot write into {}", objects.display()))?;
    source.configure(&objects, &format!("{changes}\n{keys}"), args.jobs)?;
    let before = packages(&folder)?;
    println!("building with a distribution's configuration takes hours and tens of gigabytes");
    let make = source
        .make(&objects, args.jobs)
        .arg("bindeb-pkg")
        // Without the package of debugging symbols.
        .env("DEB_BUILD_PROFILES", "pkg.linux-upstream.nokerneldbg")
        .env("INSTALL_MOD_STRIP", "1");
    logged(&make, &folder.join("build.log"))?;
    let built: Vec<PathBuf> = packages(&folder)?
        .into_iter()
        .filter(|now| !before.contains(now))
        .map(|(file, _)| file)
        .collect();
    let image = built.iter().find(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("linux-image-")
    });
    let Some(image) = image else {
        bail!(
            "make ended well but made no package linux-image-* in {}",
            folder.display()
        );
    };
    for file in &built {
        println!("{}", file.display());
    }
    println!("install with: apt-get install {}", image.display());
    Ok(())
}

/// The packages in a folder with their times of change.
fn packages(folder: &Path) -> Result<Vec<(PathBuf, std::time::SystemTime)>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut packages = Vec::new();
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            packages.push((path, entry.metadata()?.modified()?));
        }
    }
    packages.sort();
    Ok(packages)
}

/// Debian's configuration for ordinary machines, of this version of the source.
fn debian_configuration(base: &Path, version: &str) -> Result<String> {
    let folder = base.join("deb-config");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let package =
        apt::download(&format!("{CONFIGURATIONS}={version}"), &folder).with_context(|| {
            format!(
                "apt has no {CONFIGURATIONS} of the source's version {version}: fetch the newest \
                 source with --update, or name a configuration with --config"
            )
        })?;
    Cmd::line("dpkg-deb --extract")
        .arg(&package)
        .arg(&folder)
        .run()?;
    let file = folder.join(format!(
        "usr/src/{CONFIGURATIONS}/config.amd64_none_amd64.xz"
    ));
    let text = Cmd::line("xz -dc").arg(&file).bytes()?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
