//! Kernel modules: which ones a module needs, and their contents for the initramfs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::sh::Cmd;

/// A module ready to be loaded.
#[derive(Debug)]
pub struct Module {
    /// As the kernel calls it, with underscores.
    pub name: String,
    /// The uncompressed object.
    pub object: Vec<u8>,
}

/// Reads `wanted` and what they need from the folder `lib/modules/VERSION`, each module after
/// those that it needs. What is built into the kernel needs no module.
///
/// # Errors
/// Names the module that is neither there nor built in, or cannot be read.
pub fn read(folder: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(folder, &mut files).with_context(|| format!("reading {}", folder.display()))?;
    let list = folder.join("modules.builtin");
    let text =
        std::fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let built_in: Vec<String> = text
        .lines()
        .filter_map(|line| name_of(Path::new(line)))
        .collect();
    order(wanted, |name| match files.get(name) {
        Some(file) => {
            let object = object(file)?;
            let needs = depends(&object)
                .with_context(|| format!("{} is no kernel module", file.display()))?;
            Ok(Some((object, needs)))
        }
        None if built_in.iter().any(|other| other == name) => Ok(None),
        None => bail!(
            "the kernel has no module {name}, neither in {} nor built in",
            folder.display()
        ),
    })
}

/// An object and the names of the modules that it needs.
type Read = (Vec<u8>, Vec<String>);

/// Depth first: every module after its needs, each once.
fn order(
    wanted: &[&str],
    mut read: impl FnMut(&str) -> Result<Option<Read>>,
) -> Result<Vec<Module>> {
    enum Step {
        Enter(String),
        Leave(Module),
    }
    let mut steps: Vec<Step> = wanted
        .iter()
        .rev()
        .map(|name| Step::Enter((*name).into()))
        .collect();
    let mut seen = Vec::new();
    let mut ordered = Vec::new();
    while let Some(step) = steps.pop() {
        match step {
            Step::Leave(module) => ordered.push(module),
            Step::Enter(name) if seen.contains(&name) => {}
            Step::Enter(name) => {
                seen.push(name.clone());
                if let Some((object, needs)) = read(&name)? {
                    steps.push(Step::Leave(Module { name, object }));
                    steps.extend(needs.into_iter().rev().map(Step::Enter));
                }
            }
        }
    }
    Ok(ordered)
}

/// The module files under `folder` by name.
fn find(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        // `build` and `source` are links out of the folder.
        if entry.file_type()?.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The name of the module in a file: `kvm-amd.ko.xz` holds `kvm_amd`.
fn name_of(file: &Path) -> Option<String> {
    let (stem, packing) = file.file_name()?.to_str()?.split_once(".ko")?;
    matches!(packing, "" | ".xz" | ".zst" | ".gz").then(|| stem.replace('-', "_"))
}

/// The uncompressed contents of a module file.
fn object(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return std::fs::read(file).with_context(|| format!("reading {}", file.display())),
    };
    Cmd::new(program).arg("-dc").arg(file).bytes()
}

/// The modules that a module says it needs; `None` where the bytes are no module.
fn depends(object: &[u8]) -> Option<Vec<String>> {
    let info = section(object, b".modinfo")?;
    let list = info
        .split(|&byte| byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))?;
    let list = std::str::from_utf8(list).ok()?;
    let names = list.split(',').filter(|name| !name.is_empty());
    Some(names.map(|name| name.replace('-', "_")).collect())
}

/// The contents of a section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let offset_at = |at: usize| {
        let bytes = elf.get(at..)?.first_chunk()?;
        usize::try_from(u64::from_le_bytes(*bytes)).ok()
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    // Offsets of e_shoff, e_shentsize, e_shnum, e_shstrndx and, in a section's header, of
    // sh_name, sh_offset and sh_size: see elf(5).
    let (table, entry_size) = (offset_at(0x28)?, usize::from(u16_at(0x3a)?));
    let (count, names) = (usize::from(u16_at(0x3c)?), usize::from(u16_at(0x3e)?));
    let header = |index: usize| table.checked_add(index.checked_mul(entry_size)?);
    let contents = |header: usize| {
        let start = offset_at(header.checked_add(0x18)?)?;
        elf.get(start..start.checked_add(offset_at(header.checked_add(0x20)?)?)?)
    };
    let names = contents(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let own = names.get(usize::try_from(u32_at(header)?).ok()?..)?;
        let own = own.split(|&byte| byte == 0).next()?;
        (own == name).then(|| contents(header))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 64-bit ELF file with one section `.modinfo` and its names.
    fn module(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(0x40, 0);
        let info_at = elf.len();
        elf.extend(info);
        let names_at = elf.len();
        elf.extend(names);
        let table = elf.len();
        for (name, at, size) in [(1u32, info_at, info.len()), (10, names_at, names.len())] {
            let mut header = [0; 0x40];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        for (at, value) in [(0x3a, 0x40u16), (0x3c, 2), (0x3e, 1)] {
            elf[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        elf
    }

    #[test]
    fn needs_of_a_module_stand_in_its_information() {
        let needs = |info: &[u8]| depends(&module(info));
        let two = needs(b"license=GPL\0depends=kvm,irq-bypass\0name=x\0");
        assert_eq!(two, Some(vec!["kvm".into(), "irq_bypass".into()]));
        assert_eq!(needs(b"depends=\0"), Some(vec![]));
        assert_eq!(needs(b"license=GPL\0"), None);
    }

    #[test]
    fn what_is_no_module_is_refused_and_never_read_beyond_its_end() {
        let whole = module(b"depends=kvm\0");
        // The last section header ends with fields that nobody reads.
        for length in 0..whole.len() - 0x18 {
            assert_eq!(depends(&whole[..length]), None, "{length} bytes");
        }
        for at in 0..0x40 {
            let mut broken = whole.clone();
            broken[at] = 0xff;
            let _ = depends(&broken);
        }
        assert_eq!(depends(b"#!/bin/sh"), None);
    }

    #[test]
    fn modules_come_after_those_that_they_need_and_once() {
        let needs = |name: &str| -> Result<Option<Read>> {
            let needs: &[&str] = match name {
                "kvm_amd" => &["ccp", "kvm"],
                "kvm_intel" => &["kvm"],
                "kvm" => &["irqbypass"],
                // Built in.
                "ccp" => return Ok(None),
                "irqbypass" => &["kvm"],
                _ => bail!("no {name}"),
            };
            Ok(Some((
                vec![],
                needs.iter().map(ToString::to_string).collect(),
            )))
        };
        let names: Vec<String> = order(&["kvm_amd", "kvm_intel"], needs)
            .unwrap()
            .into_iter()
            .map(|module| module.name)
            .collect();
        assert_eq!(names, ["irqbypass", "kvm", "kvm_amd", "kvm_intel"]);
        assert!(order(&["veth"], needs).is_err());
    }

    #[test]
    fn module_is_named_by_its_file() {
        let name = |file| name_of(Path::new(file));
        assert_eq!(name("a/kvm-amd.ko.xz").as_deref(), Some("kvm_amd"));
        assert_eq!(name("kernel/net/veth.ko").as_deref(), Some("veth"));
        assert_eq!(name("modules.dep"), None);
        assert_eq!(name("x.kopf"), None);
    }
}
