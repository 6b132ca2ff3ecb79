//! What this machine offers for building and testing, with the reason for each "no".

use std::path::Path;

use crate::setup::BpfTools;
use crate::sh::{Cmd, table, which};
use crate::toolchain::{Missing, find_linker, find_toolchain};
use crate::{ebpf, tiers, vm};

/// The toolchain table.
pub fn toolchain_table(root: &Path) -> String {
    let toolchain = find_toolchain();
    let linker = find_linker(toolchain.as_ref().map_or(0, |toolchain| toolchain.llvm));
    let findings = [
        (
            "rustc",
            version_of("rustc", "--version", "https://rustup.rs"),
        ),
        (
            "nextest",
            version_of(
                "cargo-nextest",
                "nextest --version",
                "`cargo install cargo-nextest --locked` (else `cargo test` is used)",
            ),
        ),
        ("miri", tiers::miri()),
        (
            "eBPF toolchain",
            toolchain
                .as_ref()
                .map(ToString::to_string)
                .map_err(Clone::clone),
        ),
        (
            "bpf-linker",
            linker
                .as_ref()
                .map(|file| file.display().to_string())
                .map_err(Clone::clone),
        ),
        (
            "eBPF object",
            object(
                root,
                toolchain.and_then(|toolchain| linker.map(|linker| BpfTools { toolchain, linker })),
            ),
        ),
    ];
    let findings = findings.into_iter().chain([
        ("QEMU", vm::emulator()),
        ("stock kernel", vm::stock_kernel()),
    ]);
    let mut rows = vec![["what", "here", "detail", "enable"].map(String::from)];
    for (what, finding) in findings {
        let (here, detail, enable) = match finding {
            Ok(detail) => ("yes", detail, String::new()),
            Err(missing) => ("no", missing.reason, missing.enable),
        };
        rows.push([what.into(), here.into(), detail, enable]);
    }
    table(&rows)
}

/// The first line of what `program` says about its version.
fn version_of(program: &str, args: &str, enable: &str) -> Result<String, Missing> {
    let missing = |why| Missing::new(format!("{program} {why}"), enable);
    let file = which(program).ok_or_else(|| missing("is not in PATH"))?;
    let printed = Cmd::new(file).args(args.split_whitespace()).probe();
    let printed = printed.ok_or_else(|| missing("does not start"))?;
    Ok(printed.lines().next().unwrap_or_default().to_owned())
}

fn object(root: &Path, tools: Result<BpfTools, Missing>) -> Result<String, Missing> {
    let object = ebpf::object(root, false);
    if object.exists() {
        return Ok(object.display().to_string());
    }
    tools.and_then(|_| Err(Missing::new("not built", "`cargo xtask build-ebpf`")))
}
