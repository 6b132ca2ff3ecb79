//! Installing what is missing, each command printed before it runs; nothing where nothing is.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::apt::{self, Package};
use crate::sh::{Cmd, which};
use crate::toolchain::{
    self, DEBIAN_PACKAGES, LINKER_VERSION, Missing, RUSTUP_INSTALL, Toolchain, find_linker,
    find_toolchain,
};

/// What every build and test needs.
const PACKAGES: [Package; 2] = [
    Package::new("c++", "build-essential", "linking host programs; fuzzing"),
    Package::new("ip", "iproute2", "tests in network namespaces"),
];

/// What builds the eBPF program.
#[derive(Debug)]
pub struct BpfTools {
    /// The compiler and its cargo.
    pub toolchain: Toolchain,
    /// The bpf-linker.
    pub linker: PathBuf,
}

/// Finds the eBPF tools without installing anything.
pub fn find() -> Result<BpfTools, Missing> {
    let toolchain = find_toolchain()?;
    let linker = find_linker(toolchain.llvm)?;
    Ok(BpfTools { toolchain, linker })
}

/// Finds the system packages and eBPF tools and installs those that are missing.
pub fn setup() -> Result<BpfTools> {
    apt::ensure(&PACKAGES)?;
    let toolchain = match find_toolchain() {
        Ok(toolchain) => toolchain,
        Err(missing) => install_toolchain(missing)?,
    };
    println!("eBPF toolchain: {toolchain}");
    let linker = match find_linker(toolchain.llvm) {
        Ok(linker) => linker,
        Err(missing) => install_linker(toolchain.llvm, missing)?,
    };
    println!("bpf-linker: {}", linker.display());
    Ok(BpfTools { toolchain, linker })
}

/// Whether apt can install the compiler packages here, perhaps after renewing its lists.
fn apt_offers_toolchain() -> bool {
    if !apt::can_install() {
        return false;
    }
    let show = Cmd::line("apt-cache show --no-all-versions").args(DEBIAN_PACKAGES);
    show.probe().is_some() || (apt::update().is_ok() && show.probe().is_some())
}

fn install_toolchain(missing: Missing) -> Result<Toolchain> {
    println!("{}", missing.reason);
    if apt_offers_toolchain() {
        apt::install(&DEBIAN_PACKAGES)?;
    } else if which("rustup").is_some() {
        // A nightly that is already here is completed, not exchanged for a newer one.
        let nightly = Cmd::line("rustup run nightly rustc --version").scrubbed();
        let install = match nightly.probe() {
            Some(_) => "rustup component add rust-src --toolchain nightly",
            None => RUSTUP_INSTALL,
        };
        Cmd::line(install).scrubbed().run()?;
    } else {
        bail!(missing);
    }
    Ok(find_toolchain()?)
}

/// Builds bpf-linker into the cache against the libLLVM of an installed Rust toolchain.
fn install_linker(llvm: u32, missing: Missing) -> Result<PathBuf> {
    println!("{}", missing.reason);
    let libraries = toolchain::llvm_libraries(&toolchain::sysroots());
    let Some((major, library)) = toolchain::choose_llvm(&libraries, llvm) else {
        bail!(Missing::new(
            format!(
                "{}; and no installed Rust toolchain ships a libLLVM.so that bpf-linker \
                 {LINKER_VERSION} supports ({:?}) and that reads bitcode of LLVM {llvm}",
                missing.reason,
                toolchain::LINKER_LLVM
            ),
            format!("`rustup toolchain install stable`; or {}", missing.enable),
        ));
    };
    let root = toolchain::linker_root(&toolchain::cache_dir(), major);
    let prefix = root.join("llvm");
    let lib = prefix.join("lib");
    let prepare = || -> std::io::Result<()> {
        if prefix.exists() {
            std::fs::remove_dir_all(&prefix)?;
        }
        std::fs::create_dir_all(&lib)?;
        symlink(library, lib.join("libLLVM.so"))?;
        symlink(library, lib.join(library.file_name().unwrap_or_default()))
    };
    prepare().with_context(|| format!("cannot prepare {}", lib.display()))?;
    println!(
        "building bpf-linker {LINKER_VERSION} against {} (once, one to five minutes; kept in {})",
        library.display(),
        root.display()
    );
    // The prefix becomes the program's run path, so it stays where it is.
    Cmd::line("cargo install bpf-linker --locked --force --no-default-features")
        .args(["--version", &LINKER_VERSION.to_string()])
        .args(["--features", &format!("llvm-{major}")])
        .arg("--root")
        .arg(&root)
        .env("LLVM_PREFIX", &prefix)
        .dir(&root)
        .scrubbed()
        .run()?;
    Ok(find_linker(llvm)?)
}
