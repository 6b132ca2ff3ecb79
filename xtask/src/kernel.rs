//! `cargo xtask kernel`: the patched kernel of the test VM, or as a package for a real machine.

mod config;
mod deb;
mod key;
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::apt::{self, Package};
use crate::lock::Lock;
use crate::progress::Progress;
use crate::sh::Cmd;
use crate::toolchain::Missing;
use key::Key;
use source::Tree;

/// What building a kernel needs.
const PACKAGES: [Package; 12] = [
    Package::new("make", "build-essential", "building the kernel"),
    Package::new("flex", "flex", "building the kernel"),
    Package::new("bison", "bison", "building the kernel"),
    Package::new("bc", "bc", "building the kernel"),
    Package::new("patch", "patch", "applying the patches"),
    Package::new("/usr/include/gelf.h", "libelf-dev", "building the kernel"),
    Package::new(
        "/usr/include/openssl/ssl.h",
        "libssl-dev",
        "building the kernel",
    ),
    Package::new("pahole", "pahole", "the kernel's type information for eBPF"),
    Package::new("cpio", "cpio", "building the kernel"),
    Package::new("depmod", "kmod", "building the kernel"),
    Package::new("zstd", "zstd", "building the kernel"),
    Package::new("xz", "xz-utils", "unpacking the kernel's source"),
];

/// The patches, from the root.
const PATCHES: &str = "kernel/patches/6.12";

/// Kernels for different purposes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// For tests and measurements in the VM.
    Patched,
    /// The same with lock and memory checkers.
    Debug,
    /// A newer kernel without patches, for interfaces that the others do not have.
    Next,
}

impl Variant {
    /// For people and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Patched => "patched",
            Self::Debug => "debug",
            Self::Next => "next",
        }
    }

    /// Where its source comes from.
    fn line(self) -> source::Line {
        match self {
            Self::Patched | Self::Debug => source::LTS,
            Self::Next => source::NEXT,
        }
    }

    /// The folder of its patches.
    fn patches(self) -> Option<&'static str> {
        match self {
            Self::Patched | Self::Debug => Some(PATCHES),
            Self::Next => None,
        }
    }

    /// Configuration fragments in `kernel/config`, in order.
    fn fragments(self) -> &'static [&'static str] {
        match self {
            Self::Patched | Self::Next => &["base.config"],
            Self::Debug => &["base.config", "debug.config"],
        }
    }

    /// Options of these fragments that it does not have.
    fn lacks(self) -> &'static [&'static str] {
        match self {
            Self::Patched | Self::Debug => &[],
            // Called SYSCTL there, and on where nobody says otherwise.
            Self::Next => &["CONFIG_PROC_SYSCTL"],
        }
    }

    /// What its configuration is made from.
    fn configuration(self, root: &Path) -> Result<String> {
        config::without(&fragments(root, self.fragments())?, self.lacks())
    }
}

/// What to build.
#[derive(Debug, Clone, Default, Args)]
pub struct KernelArgs {
    /// With lockdep, KASAN and the like, for `cargo xtask vm --kernel debug`
    #[arg(long)]
    debug: bool,
    /// A newer one without patches, for `cargo xtask vm --kernel next`
    #[arg(long, conflicts_with_all = ["debug", "deb"])]
    next: bool,
    /// A Debian package for a real machine, with a distribution's configuration and KVM as
    /// modules; takes hours
    #[arg(long, conflicts_with = "debug")]
    deb: bool,
    /// With --deb: this configuration, for example /boot/config-$(uname -r), instead of Debian's
    #[arg(long, value_name = "FILE", requires = "deb")]
    config: Option<PathBuf>,
    /// Fetch the newest source that apt knows, not the one in the cache
    #[arg(long)]
    update: bool,
    /// Compilers at a time (default: one for each CPU)
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

/// A built kernel.
#[derive(Debug)]
pub struct Built {
    /// For people.
    pub what: String,
    /// bzImage.
    pub image: PathBuf,
}

/// Installs what building kernels needs.
pub fn setup() -> Result<()> {
    apt::ensure(&PACKAGES)
}

/// Whether a kernel can be built here, perhaps after set-up.
pub fn check(variant: Variant) -> Result<(), Missing> {
    if !apt::can_install() {
        apt::check(&PACKAGES)?;
    }
    variant.line().check()
}

/// Builds what the arguments ask for.
pub fn run(root: &Path, args: &KernelArgs) -> Result<()> {
    if args.deb {
        return deb::build(root, args);
    }
    let variant = match (args.debug, args.next) {
        (true, _) => Variant::Debug,
        (_, true) => Variant::Next,
        _ => Variant::Patched,
    };
    let built = build(root, variant, args)?;
    println!("{}: {}", built.what, built.image.display());
    Ok(())
}

/// The folder of everything that is built here.
fn base(root: &Path) -> PathBuf {
    root.join("target/kernel")
}

/// The source with its patches; the folder of kernels must be locked.
struct Patched {
    tree: Tree,
}

impl Patched {
    fn prepare(base: &Path, package: &source::Package, patches: &[source::Patch]) -> Result<Self> {
        let tree = Tree::unpack(package, &base.join(format!("source-{}", package.version)))?;
        tree.apply(patches)?;
        Ok(Self { tree })
    }

    /// make on the source with its output in `objects`, in the same environment each time: the
    /// same source gives the same kernel.
    fn make(&self, objects: &Path, jobs: Option<usize>) -> Cmd {
        let jobs = jobs.or_else(|| std::thread::available_parallelism().ok().map(usize::from));
        Cmd::new("make")
            .arg("-C")
            .arg(&self.tree.dir)
            .arg(format!("O={}", objects.display()))
            .arg(format!("-j{}", jobs.unwrap_or(1)))
            .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
            .env("KBUILD_BUILD_USER", "ioregion")
            .env("KBUILD_BUILD_HOST", "ioregion")
            .env("KBUILD_BUILD_VERSION", "1")
    }

    /// Makes `objects/.config` from what is there and `fragments`.
    fn configure(&self, objects: &Path, fragments: &str, jobs: Option<usize>) -> Result<()> {
        let file = objects.join(".config");
        let read =
            || fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()));
        let text = format!("{}\n{fragments}", read()?);
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        logged(
            &self.make(objects, jobs).arg("olddefconfig"),
            &objects.join("config.log"),
        )?;
        config::check(fragments, &read()?)
    }
}

/// The kernel of a variant: from the cache where the same was built before.
pub fn build(root: &Path, variant: Variant, args: &KernelArgs) -> Result<Built> {
    let patches = match variant.patches() {
        Some(folder) => source::series(&root.join(folder))?,
        None => Vec::new(),
    };
    let fragments = variant.configuration(root)?;
    setup()?;
    let base = base(root);
    let package = variant.line().fetch(args.update)?;
    let version = &package.version;
    let compiler = Cmd::line("cc --version").probe().unwrap_or_default();
    let mut key = Key::default();
    key.add("version", version);
    key.add("compiler", compiler.lines().next().unwrap_or_default());
    key.add("configuration", &fragments);
    for patch in &patches {
        key.add(&patch.name, &patch.text);
    }
    let out = base.join(format!("{}-{}", variant.name(), key.short()));
    let built = Built {
        what: format!("{} kernel {version}", variant.name()),
        image: out.join("bzImage"),
    };
    // A kernel appears as a whole, so looking for it needs no lock: nobody waits here while
    // another variant is built.
    if key.is_in(&out) {
        return Ok(built);
    }
    let _lock = Lock::take(&base)?;
    if key.is_in(&out) {
        return Ok(built);
    }
    if let (Some(folder), true) = (variant.patches(), patches.is_empty()) {
        println!("{folder} holds no patch: building the unpatched source");
    }
    let started = Instant::now();
    let source = Patched::prepare(&base, &package, &patches)?;
    let objects = base.join(format!("build-{}", variant.name()));
    fs::create_dir_all(&objects).with_context(|| format!("cannot make {}", objects.display()))?;
    let configure = objects.join("config.log");
    logged(
        &source.make(&objects, args.jobs).arg("tinyconfig"),
        &configure,
    )?;
    source.configure(&objects, &fragments, args.jobs)?;
    let log = objects.join("build.log");
    logged(&source.make(&objects, args.jobs).arg("bzImage"), &log)?;
    keep(&objects, &out, &key)?;
    let seconds = started.elapsed().as_secs();
    println!("built linux {version} in {seconds} s");
    Ok(built)
}

/// The fragments of `kernel/config` one after the other.
fn fragments(root: &Path, names: &[&str]) -> Result<String> {
    let mut text = String::new();
    for name in names {
        let file = root.join("kernel/config").join(name);
        let fragment = fs::read_to_string(&file);
        text.push_str(&fragment.with_context(|| format!("reading {}", file.display()))?);
        text.push('\n');
    }
    Ok(text)
}

/// Copies what is worth keeping into `out`, which appears complete or not at all.
fn keep(objects: &Path, out: &Path, key: &Key) -> Result<()> {
    let part = out.with_extension("part");
    let copy = || -> std::io::Result<()> {
        for old in [&part, out] {
            if old.exists() {
                fs::remove_dir_all(old)?;
            }
        }
        fs::create_dir_all(&part)?;
        for (from, to) in [
            ("arch/x86/boot/bzImage", "bzImage"),
            (".config", "config"),
            ("System.map", "System.map"),
            ("build.log", "build.log"),
        ] {
            fs::copy(objects.join(from), part.join(to))?;
        }
        key.write(&part)?;
        fs::rename(&part, out)
    };
    copy().with_context(|| format!("cannot keep the kernel in {}", out.display()))
}

/// Prints and runs a command whose output goes to a log; tells now and then how far it is, and
/// of a failure what stands around the first error.
fn logged(command: &Cmd, log: &Path) -> Result<()> {
    println!("output in {}", log.display());
    let mut child = command.spawn(log)?;
    let mut progress = Progress::new("make");
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for make")? {
            break status;
        }
        progress.tick(|| {
            let text = fs::read(log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let compiled = text
                .lines()
                .filter(|line| line.trim_start().starts_with("CC "));
            format!("{} files compiled", compiled.count())
        });
        std::thread::sleep(Duration::from_millis(100));
    };
    drop(progress);
    if status.success() {
        return Ok(());
    }
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    bail!("`{command}` failed: {status}\n{}", first_error(&text));
}

/// The lines around the first error in a log of make, else its end.
fn first_error(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let error = lines
        .iter()
        .position(|line| line.contains("error:") || line.contains("***"));
    let start = error.map_or(lines.len().saturating_sub(20), |line| {
        line.saturating_sub(5)
    });
    let shown = lines.iter().skip(start).take(20).copied();
    shown.collect::<Vec<&str>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_error_is_shown_with_what_stands_around_it() {
        let noise: String = (0..50)
            .map(|number| format!("  CC x{number}.o\n"))
            .collect();
        let log = format!("{noise}a.c: In function 'f':\na.c:1:2: error: no\nmake: *** [x] 1\n");
        let shown = first_error(&log);
        assert!(shown.starts_with("  CC x46.o"), "{shown}");
        assert!(shown.ends_with("make: *** [x] 1"), "{shown}");
        assert!(first_error(&noise).starts_with("  CC x30.o"));
        assert_eq!(first_error(""), "");
    }

    #[test]
    fn failing_command_is_an_error_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let command = Cmd::new("sh").args(["-c", "echo 'x.c:1: error: bad'; exit 2"]);
        let error = logged(&command, &log).unwrap_err().to_string();
        assert!(error.contains("x.c:1: error: bad"), "{error}");
        assert!(logged(&Cmd::new("true"), &log).is_ok());
    }

    #[test]
    fn fragments_of_every_variant_are_in_the_repository() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let base = fragments(&root, Variant::Patched.fragments()).unwrap();
        let debug = fragments(&root, Variant::Debug.fragments()).unwrap();
        assert!(base.contains("CONFIG_KVM=y") && !base.contains("CONFIG_KASAN"));
        assert!(debug.starts_with(&base) && debug.contains("CONFIG_PROVE_LOCKING=y"));
        let next = Variant::Next.configuration(&root).unwrap();
        assert!(next.contains("CONFIG_VDPA_USER=y") && !next.contains("CONFIG_PROC_SYSCTL"));
        let deb = fragments(&root, &deb::FRAGMENTS).unwrap();
        assert!(deb.contains("CONFIG_KVM=m"));
    }

    #[test]
    fn kernel_is_kept_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (objects, out) = (dir.path().join("objects"), dir.path().join("patched-1"));
        let mut key = Key::default();
        key.add("version", "1");
        fs::create_dir_all(objects.join("arch/x86/boot")).unwrap();
        fs::write(objects.join("arch/x86/boot/bzImage"), "image").unwrap();
        assert!(keep(&objects, &out, &key).is_err());
        assert!(!key.is_in(&out));
        for name in [".config", "System.map", "build.log"] {
            fs::write(objects.join(name), name).unwrap();
        }
        keep(&objects, &out, &key).unwrap();
        assert!(key.is_in(&out));
        assert_eq!(fs::read_to_string(out.join("bzImage")).unwrap(), "image");
    }
}
