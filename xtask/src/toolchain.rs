//! Finding what builds an eBPF program: a Rust toolchain with a `core` for
//! `bpfel-unknown-none` and a `bpf-linker` that reads its bitcode. Nothing here installs.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::sh::{Cmd, which_all};

/// The target of the eBPF program.
pub const BPF_TARGET: &str = "bpfel-unknown-none";
/// The bpf-linker that set-up installs and the oldest that is accepted.
pub const LINKER_VERSION: Version = Version(0, 13, 0);
/// LLVM majors for which that bpf-linker has a `llvm-N` feature.
pub const LINKER_LLVM: [u32; 3] = [21, 22, 23];
/// The oldest rustc that compiles the workspace (`rust-version` in `Cargo.toml`).
const OLDEST_RUSTC: Version = Version(1, 88, 0);

/// What both kinds of machine install to get an eBPF toolchain.
pub const RUSTUP_INSTALL: &str =
    "rustup toolchain install nightly --profile minimal --component rust-src";
/// The packages of a Rust compiler with a precompiled `core` for eBPF.
pub const DEBIAN_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// Something that is not here: why, and what would change that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Why it cannot be used.
    pub reason: String,
    /// What would enable it.
    pub enable: String,
}

impl Missing {
    /// A reason with its remedy.
    pub fn new(reason: impl Into<String>, enable: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            enable: enable.into(),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}\nto enable it: {}", self.reason, self.enable)
    }
}

impl std::error::Error for Missing {}

/// `major.minor.patch`; a suffix such as `-nightly` is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The first word of `text` that looks like a version.
    pub fn find_in(text: &str) -> Option<Self> {
        text.split_whitespace().find_map(|word| {
            let word = word.split(['-', '+']).next()?;
            let mut parts = word.split('.').map(|part| part.parse().ok());
            let version = Self(parts.next()??, parts.next()??, parts.next()??);
            parts.next().is_none().then_some(version)
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Where a toolchain's `core` for the eBPF target comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Core {
    /// `libcore-*.rlib` lies in the target's library folder.
    Precompiled,
    /// rust-src is in the sysroot: cargo builds core (`-Z build-std=core`).
    Source,
}

/// A Rust toolchain, called by path so that no rustup proxy chooses another one.
#[derive(Debug, Clone)]
pub struct Toolchain {
    /// The folder above `bin/rustc`.
    pub sysroot: PathBuf,
    /// Of rustc.
    pub version: Version,
    /// Whether unstable flags need no `RUSTC_BOOTSTRAP`.
    pub nightly: bool,
    /// Major version of rustc's LLVM.
    pub llvm: u32,
    /// Its way to a `core` for eBPF, if any.
    pub core: Option<Core>,
}

impl Toolchain {
    fn inspect(sysroot: PathBuf) -> Option<Self> {
        let rustc = sysroot.join("bin/rustc");
        let about = Cmd::new(&rustc).arg("-vV").scrubbed().probe()?;
        let (version, nightly, llvm) = parse_rustc(&about)?;
        let target_libdir = Cmd::new(&rustc)
            .args(["--print", "target-libdir", "--target", BPF_TARGET])
            .scrubbed()
            .probe();
        let core = find_core(&sysroot, target_libdir.as_deref().map(Path::new));
        Some(Self {
            sysroot,
            version,
            nightly,
            llvm,
            core,
        })
    }

    /// A program of this toolchain, for example `cargo`.
    pub fn bin(&self, name: &str) -> PathBuf {
        self.sysroot.join("bin").join(name)
    }

    /// Why it does not build eBPF programs; `None` where it does.
    fn lacks(&self) -> Option<String> {
        if self.version < OLDEST_RUSTC {
            Some(format!("older than {OLDEST_RUSTC}"))
        } else if !self.bin("cargo").exists() {
            Some("no cargo beside its rustc".into())
        } else if self.core.is_none() {
            Some(format!(
                "neither a precompiled core for {BPF_TARGET} nor rust-src"
            ))
        } else {
            None
        }
    }

    /// Lower is better: a precompiled core, then nightly, then stable with rust-src.
    fn rank(&self) -> u8 {
        match (self.core, self.nightly) {
            (Some(Core::Precompiled), _) => 0,
            (Some(Core::Source), true) => 1,
            (Some(Core::Source), false) => 2,
            (None, _) => 3,
        }
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let channel = if self.nightly { "-nightly" } else { "" };
        let core = match self.core {
            Some(Core::Precompiled) => "precompiled core",
            Some(Core::Source) => "core from rust-src",
            None => "no core for eBPF",
        };
        write!(
            out,
            "rustc {}{channel} in {}, LLVM {}, {core}",
            self.version,
            self.sysroot.display(),
            self.llvm
        )
    }
}

/// Version, nightliness and LLVM major from `rustc -vV`.
fn parse_rustc(about: &str) -> Option<(Version, bool, u32)> {
    let field = |name| about.lines().find_map(|line| line.strip_prefix(name));
    let release = field("release: ")?;
    let llvm = field("LLVM version: ")?.split('.').next()?.parse().ok()?;
    let nightly = release.contains("nightly") || release.contains("dev");
    Some((Version::find_in(release)?, nightly, llvm))
}

/// Looks for a `core` for eBPF in a target library folder, else for rust-src in a sysroot.
fn find_core(sysroot: &Path, target_libdir: Option<&Path>) -> Option<Core> {
    let is_core = |name: &str| name.starts_with("libcore-") && name.ends_with(".rlib");
    if target_libdir.is_some_and(|dir| names_in(dir).iter().any(|name| is_core(name))) {
        Some(Core::Precompiled)
    } else {
        has_rust_src(sysroot).then_some(Core::Source)
    }
}

/// Whether the sysroot holds the sources of `core`.
pub fn has_rust_src(sysroot: &Path) -> bool {
    let core = "lib/rustlib/src/rust/library/core/src/lib.rs";
    sysroot.join(core).is_file()
}

/// The names in a folder, sorted; empty where it cannot be read.
fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Sysroots of rustup's toolchains in `rustup_home`, each once, nightlies last (they change
/// under us most often).
fn rustup_sysroots(rustup_home: &Path) -> Vec<PathBuf> {
    let dir = rustup_home.join("toolchains");
    let mut names = names_in(&dir);
    names.sort_by_key(|name| name.contains("nightly"));
    let mut found = Vec::new();
    for name in names {
        if let Ok(sysroot) = dir.join(name).canonicalize()
            && sysroot.join("bin/rustc").is_file()
            && !found.contains(&sysroot)
        {
            found.push(sysroot);
        }
    }
    found
}

/// Every sysroot on this machine: rustup's, then those of the compilers in `PATH`.
pub fn sysroots() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let rustup_home = std::env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let rustup_home = rustup_home.or(home.map(|home| home.join(".rustup")));
    let mut found = rustup_home.map_or_else(Vec::new, |home| rustup_sysroots(&home));
    for rustc in which_all("rustc") {
        let sysroot = Cmd::new(rustc)
            .args(["--print", "sysroot"])
            .scrubbed()
            .probe();
        if let Some(Ok(sysroot)) = sysroot.map(|dir| Path::new(&dir).canonicalize())
            && !found.contains(&sysroot)
        {
            found.push(sysroot);
        }
    }
    found
}

/// The best toolchain for eBPF here; otherwise each toolchain's reason and what to install.
pub fn find_toolchain() -> Result<Toolchain, Missing> {
    let all: Vec<Toolchain> = sysroots()
        .into_iter()
        .filter_map(Toolchain::inspect)
        .collect();
    let fit = all.iter().filter(|toolchain| toolchain.lacks().is_none());
    if let Some(best) = fit.min_by_key(|toolchain| toolchain.rank()) {
        return Ok(best.clone());
    }
    let mut reason = format!("no Rust toolchain here builds for {BPF_TARGET}");
    for toolchain in &all {
        let lacks = toolchain.lacks().unwrap_or_default();
        reason.push_str(&format!(
            "; {} ({}): {lacks}",
            toolchain.sysroot.display(),
            toolchain.version
        ));
    }
    Err(Missing::new(
        reason,
        format!(
            "`cargo xtask setup`; or with rustup `{RUSTUP_INSTALL}`; or on Debian 12 as root \
             `apt-get install --no-remove --no-install-recommends {}`",
            DEBIAN_PACKAGES.join(" ")
        ),
    ))
}

/// `$IOREGION_CACHE`, else `ioregion` in the user's cache folder.
pub fn cache_dir() -> PathBuf {
    cache_dir_from(|name| std::env::var_os(name).map(PathBuf::from))
}

fn cache_dir_from(var: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let var = |name| var(name).filter(|dir| dir.is_absolute());
    let user = || var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    var("IOREGION_CACHE")
        .or_else(|| Some(user()?.join("ioregion")))
        .unwrap_or_else(|| std::env::temp_dir().join("ioregion"))
}

/// Where set-up installs the bpf-linker that links against this LLVM major.
pub fn linker_root(cache: &Path, llvm: u32) -> PathBuf {
    cache.join(format!("bpf-linker-{LINKER_VERSION}-llvm-{llvm}"))
}

/// A bpf-linker that starts and is new enough for bitcode of LLVM `llvm`: from `PATH`, else
/// from the cache.
pub fn find_linker(llvm: u32) -> Result<PathBuf, Missing> {
    let mut reasons = Vec::new();
    let cache = cache_dir();
    let cached = LINKER_LLVM
        .iter()
        .filter(|&&major| major >= llvm)
        .map(|&major| linker_root(&cache, major).join("bin/bpf-linker"))
        .filter(|file| file.exists());
    for file in which_all("bpf-linker").into_iter().chain(cached) {
        match check_linker(Cmd::new(&file).arg("--version").probe().as_deref()) {
            Ok(()) => return Ok(file),
            Err(reason) => reasons.push(format!("{}: {reason}", file.display())),
        }
    }
    if reasons.is_empty() {
        reasons.push(format!("neither in PATH nor in {}", cache.display()));
    }
    Err(Missing::new(
        format!(
            "no bpf-linker {LINKER_VERSION} or newer ({})",
            reasons.join("; ")
        ),
        format!(
            "`cargo xtask setup`; or put bpf-linker {LINKER_VERSION} \
             (`cargo binstall bpf-linker@{LINKER_VERSION}`) into PATH"
        ),
    ))
}

/// Judges what `bpf-linker --version` printed (`None`: it did not start).
fn check_linker(printed: Option<&str>) -> Result<(), String> {
    let printed = printed.ok_or("does not start (is its libLLVM gone?)")?;
    match Version::find_in(printed) {
        Some(version) if version >= LINKER_VERSION => Ok(()),
        _ => Err(format!("is `{printed}`")),
    }
}

/// The libLLVM shared objects that the toolchains in `sysroots` carry, with their majors.
pub fn llvm_libraries(sysroots: &[PathBuf]) -> Vec<(u32, PathBuf)> {
    let mut found = Vec::new();
    for lib in sysroots.iter().map(|sysroot| sysroot.join("lib")) {
        for name in names_in(&lib) {
            let major = name.strip_prefix("libLLVM.so.").and_then(|version| {
                let digits = version.split(['.', '-']).next()?;
                digits.parse().ok()
            });
            found.extend(major.map(|major| (major, lib.join(name))));
        }
    }
    found
}

/// The library to link bpf-linker against: the oldest LLVM that reads bitcode of LLVM `llvm`
/// and that bpf-linker supports; of equals the first.
pub fn choose_llvm(libraries: &[(u32, PathBuf)], llvm: u32) -> Option<(u32, &Path)> {
    let fit = libraries
        .iter()
        .filter(|(major, _)| *major >= llvm && LINKER_LLVM.contains(major));
    fit.min_by_key(|(major, _)| *major)
        .map(|(major, file)| (*major, file.as_path()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn touch(file: PathBuf) {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "").unwrap();
    }

    #[test]
    fn version_is_found_in_tool_output() {
        let found = |text| Version::find_in(text);
        assert_eq!(found("bpf-linker 0.13.0"), Some(Version(0, 13, 0)));
        assert_eq!(found("1.97.0-nightly"), Some(Version(1, 97, 0)));
        assert_eq!(found("rustc 1.95.0 (5980 2026)"), Some(Version(1, 95, 0)));
        assert_eq!(found("1.2 and 1.2.3.4"), None);
    }

    #[test]
    fn rustc_description_gives_version_channel_and_llvm() {
        let about = "rustc 1.97.0-nightly\nhost: x\nrelease: 1.97.0-nightly\nLLVM version: 22.1.4";
        assert_eq!(parse_rustc(about), Some((Version(1, 97, 0), true, 22)));
        assert_eq!(parse_rustc("rustc 1.97.0"), None);
    }

    #[test]
    fn precompiled_core_wins_over_sources() {
        let dir = tempfile::tempdir().unwrap();
        let libdir = dir.path().join("target-lib");
        assert_eq!(find_core(dir.path(), Some(&libdir)), None);
        touch(
            dir.path()
                .join("lib/rustlib/src/rust/library/core/src/lib.rs"),
        );
        assert_eq!(find_core(dir.path(), Some(&libdir)), Some(Core::Source));
        touch(libdir.join("libcore-8056.rmeta"));
        assert_eq!(find_core(dir.path(), Some(&libdir)), Some(Core::Source));
        touch(libdir.join("libcore-8056.rlib"));
        let found = find_core(dir.path(), Some(&libdir));
        assert_eq!(found, Some(Core::Precompiled));
        assert_eq!(find_core(dir.path(), None), Some(Core::Source));
    }

    #[test]
    fn rustup_sysroots_are_listed_once_with_nightly_last() {
        let dir = tempfile::tempdir().unwrap();
        let toolchains = dir.path().canonicalize().unwrap().join("toolchains");
        touch(toolchains.join("nightly-x/bin/rustc"));
        touch(toolchains.join("stable-x/bin/rustc"));
        fs::create_dir(toolchains.join("broken")).unwrap();
        std::os::unix::fs::symlink(toolchains.join("stable-x"), toolchains.join("1.95.0")).unwrap();
        let expected = [toolchains.join("stable-x"), toolchains.join("nightly-x")];
        assert_eq!(rustup_sysroots(dir.path()), expected);
        assert!(rustup_sysroots(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn llvm_major_comes_from_the_shared_object_name() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("lib/libLLVM.so.22.1-rust-1.95.0-stable");
        touch(library.clone());
        touch(dir.path().join("lib/libLLVM-22-rust-1.95.0-stable.so"));
        let found = llvm_libraries(&[dir.path().to_owned()]);
        assert_eq!(found, [(22, library)]);
    }

    #[test]
    fn linker_links_against_the_oldest_llvm_that_reads_the_bitcode() {
        let libraries: Vec<(u32, PathBuf)> = [20, 24, 23, 22]
            .map(|major| (major, format!("{major}").into()))
            .into();
        let chosen = |llvm| choose_llvm(&libraries, llvm).map(|(major, _)| major);
        assert_eq!(chosen(20), Some(22));
        assert_eq!(chosen(23), Some(23));
        assert_eq!(chosen(24), None);
    }

    #[test]
    fn old_or_broken_linker_is_refused() {
        assert_eq!(check_linker(Some("bpf-linker 0.13.0")), Ok(()));
        assert_eq!(check_linker(Some("bpf-linker 0.14.2")), Ok(()));
        assert!(
            check_linker(Some("bpf-linker 0.9.15"))
                .unwrap_err()
                .contains("0.9.15")
        );
        assert!(check_linker(None).unwrap_err().contains("does not start"));
    }

    #[test]
    fn cache_folder_follows_the_environment() {
        let with = |pairs: &[(&str, &str)]| {
            cache_dir_from(|name| {
                let pair = pairs.iter().find(|(key, _)| *key == name)?;
                Some(PathBuf::from(pair.1))
            })
        };
        let (home, xdg) = (("HOME", "/h"), ("XDG_CACHE_HOME", "/x"));
        assert_eq!(
            with(&[home, xdg, ("IOREGION_CACHE", "/c")]),
            Path::new("/c")
        );
        assert_eq!(with(&[home, xdg]), Path::new("/x/ioregion"));
        assert_eq!(with(&[home]), Path::new("/h/.cache/ioregion"));
        assert_eq!(
            with(&[home, ("XDG_CACHE_HOME", "")]),
            Path::new("/h/.cache/ioregion")
        );
    }
}
