//! What goes into the VM: the first process, modules, programs and what they need.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ioregion_init::{Job, MANIFEST, Manifest};

use super::cpio::Tree;
use super::modules::Module;
use crate::sh::{Cmd, which};
use crate::toolchain::Missing;

/// The contents of an initramfs.
#[derive(Debug, Default)]
pub struct Initramfs {
    tree: Tree,
    manifest: Manifest,
}

impl Initramfs {
    /// With `init`, a static program, as the first process.
    pub fn new(init: &Path) -> Result<Self> {
        let mut initramfs = Self::default();
        initramfs.program(init, "/init")?;
        // What the first process finds open before it has mounted anything.
        initramfs.tree.character_device("/dev/console", 5, 1)?;
        Ok(initramfs)
    }

    /// Adds modules, to be loaded in this order.
    pub fn modules(&mut self, modules: Vec<Module>) -> Result<()> {
        for Module { name, object } in modules {
            let path = format!("/lib/modules/{name}.ko");
            self.tree.file(&path, 0o644, object)?;
            self.manifest.modules.push(path);
        }
        Ok(())
    }

    /// Sets a variable in every program's environment.
    pub fn env(&mut self, name: &str, value: &str) {
        self.manifest.env.push((name.into(), value.into()));
    }

    /// Adds a program at `path`.
    pub fn program(&mut self, file: &Path, path: &str) -> Result<()> {
        self.tree.file(path, 0o755, read(file)?)
    }

    /// Adds a file at `path`.
    pub fn file(&mut self, file: &Path, path: &str) -> Result<()> {
        self.tree.file(path, 0o644, read(file)?)
    }

    /// Adds a program to run, with its arguments; it is killed after `limit_s` seconds.
    pub fn job(&mut self, name: &str, file: &Path, args: &[String], limit_s: u32) -> Result<()> {
        let path = format!("/ioregion/bin/{name}");
        self.program(file, &path)?;
        let mut argv = vec![path];
        argv.extend_from_slice(args);
        self.manifest.jobs.push(Job {
            name: name.into(),
            limit_s,
            argv,
        });
        Ok(())
    }

    /// The programs are shared by several VMs.
    pub fn share(&mut self) {
        self.manifest.shared = true;
    }

    /// How many programs are to run.
    pub fn jobs(&self) -> usize {
        self.manifest.jobs.len()
    }

    /// Adds a program of this machine with the shared libraries that it needs, all at the places
    /// where they are here.
    pub fn host_program(&mut self, name: &str) -> Result<()> {
        let Some(program) = which(name) else {
            bail!(Missing::new(
                format!("{name} is to be packed into the VM, but is not in PATH"),
                format!("install the package that has {name}"),
            ));
        };
        let mut files = vec![program.clone()];
        // Fails for a static program, which needs nothing.
        if let Some(printed) = Cmd::new("ldd").arg(&program).probe() {
            files.extend(libraries(&printed));
        }
        for file in files {
            let path = file.to_str().context("a path that is no text")?.to_owned();
            self.program(&file, &path)?;
        }
        Ok(())
    }

    /// Writes the archive and returns its size in bytes.
    pub fn write(mut self, file: &Path) -> Result<u64> {
        let manifest = self.manifest.encode()?;
        self.tree.file(MANIFEST, 0o644, manifest.into_bytes())?;
        let write = || -> std::io::Result<u64> {
            let mut out = BufWriter::new(File::create(file)?);
            self.tree.write(&mut out)?;
            out.flush()?;
            Ok(file.metadata()?.len())
        };
        write().with_context(|| format!("writing {}", file.display()))
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("reading {}", file.display()))
}

/// Whether a file can be started in the VM: executable and without an interpreter of its own.
pub fn is_static_program(file: &Path) -> Result<()> {
    let mode = file.metadata().map(|meta| meta.permissions().mode());
    let mode = mode.with_context(|| format!("reading {}", file.display()))?;
    if mode & 0o111 == 0 {
        bail!("{} is not executable", file.display());
    }
    // `ldd` succeeds only for programs that need shared libraries.
    match Cmd::new("ldd").arg(file).probe() {
        Some(printed) if !printed.contains("statically linked") => bail!(
            "{} needs shared libraries, which the VM has not; build it with \
             RUSTFLAGS='-C target-feature=+crt-static' and --target",
            file.display()
        ),
        _ => Ok(()),
    }
}

/// The files in the output of `ldd`: `name => /path (0x…)` and `/path (0x…)`.
fn libraries(ldd: &str) -> Vec<PathBuf> {
    let file = |line: &str| {
        let (path, _) = line.trim().rsplit_once(" (0x")?;
        let path = path.rsplit_once(" => ").map_or(path, |(_, path)| path);
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    ldd.lines().filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_prints() {
        let printed = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlost => not found\n";
        let expected = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(libraries(printed), expected.map(PathBuf::from));
        assert!(libraries("\tstatically linked\n").is_empty());
    }

    #[test]
    fn jobs_and_modules_end_up_in_the_archive_and_its_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::write(&program, "#!").unwrap();
        let mut initramfs = Initramfs::new(&program).unwrap();
        let kvm = Module {
            name: "kvm".into(),
            object: vec![1],
        };
        initramfs.modules(vec![kvm]).unwrap();
        initramfs.env("A", "b");
        initramfs.job("one", &program, &["--x".into()], 5).unwrap();
        let file = dir.path().join("initramfs");
        let size = initramfs.write(&file).unwrap();
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(bytes.len() as u64, size);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains(
            "module\t/lib/modules/kvm.ko\nenv\tA\tb\nrun\tone\t5\t/ioregion/bin/one\t--x\n"
        ));
    }

    #[test]
    fn missing_programs_are_named() {
        let error = Initramfs::new(Path::new("/nonexistent/init")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/init"));
        let error = is_static_program(Path::new("/nonexistent")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent"));
    }
}
