//! The kernel's source: fetched once, patched so that a later patch rebuilds only what it
//! touches.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::lock::Lock;
use crate::sh::Cmd;
use crate::toolchain::{Missing, cache_dir};

/// A line of kernels as Debian packages its source.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// The package that holds the source.
    package: &'static str,
    /// Suites that carry it, the first that does counts; none where the machine's own do.
    suites: &'static [&'static str],
}

/// The line that the patches are for.
pub const LTS: Line = Line {
    package: "linux-source-6.12",
    suites: &[],
};

/// A newer one, for interfaces that the other does not have.
pub const NEXT: Line = Line {
    package: "linux-source-7.3",
    suites: &["trixie-backports", "testing", "unstable"],
};

/// A patch of the series.
#[derive(Debug, Clone)]
pub struct Patch {
    /// File name.
    pub name: String,
    /// Contents.
    pub text: String,
}

impl Patch {
    /// The files that it touches, from its `diff --git` lines.
    fn files(&self) -> Result<BTreeSet<String>> {
        let name = &self.name;
        let mut files = BTreeSet::new();
        for line in self.text.lines() {
            let Some(paths) = line.strip_prefix("diff --git ") else {
                continue;
            };
            let mut words = paths.split(' ');
            for (word, side) in [(words.next(), "a/"), (words.next(), "b/")] {
                let path = word.and_then(|word| word.strip_prefix(side));
                let plain = |path: &&str| {
                    let mut parts = Path::new(path).components();
                    !path.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
                };
                match path.filter(plain) {
                    Some(path) => files.insert(path.into()),
                    None => bail!("{name}: a strange path: {line}"),
                };
            }
        }
        if files.is_empty() {
            bail!("{name} is no patch in git's format: it has no line `diff --git a/… b/…`");
        }
        Ok(files)
    }
}

/// The series in a folder, in the order of the file names; an empty one where there is none.
pub fn series(folder: &Path) -> Result<Vec<Patch>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", folder.display())),
    };
    let mut patches = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "patch")
        {
            let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            patches.push(Patch {
                name: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into(),
                text: String::from_utf8_lossy(&text).into_owned(),
            });
        }
    }
    patches.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(patches)
}

impl Line {
    /// Whether the source is here, or can be fetched.
    pub fn check(self) -> Result<(), Missing> {
        if self.newest(&packages_folder()).is_some() {
            return Ok(());
        }
        apt::can_fetch(
            &format!("package {}", self.package),
            "a Debian system; or `git am kernel/patches/6.12/*.patch` in a tree of your own",
        )
    }

    /// The version in a package's file name, `NAME_VERSION_ARCHITECTURE.deb`.
    fn version_of(self, file: &Path) -> Option<&str> {
        let rest = file
            .file_name()?
            .to_str()?
            .strip_prefix(self.package)?
            .strip_prefix('_')?;
        let version = rest.strip_suffix("_all.deb")?;
        (!version.is_empty()).then_some(version)
    }

    /// The newest package in the cache.
    fn newest(self, folder: &Path) -> Option<PathBuf> {
        let files = fs::read_dir(folder)
            .ok()?
            .flatten()
            .map(|entry| entry.path());
        files
            .filter(|file| self.version_of(file).is_some())
            .max_by_key(|file| self.version_of(file).map(numbers))
    }

    /// The source package: what is in the cache, or with `renew` the newest that apt knows.
    pub fn fetch(self, renew: bool) -> Result<Package> {
        let folder = packages_folder();
        let file = match self.newest(&folder).filter(|_| !renew) {
            Some(file) => file,
            None => {
                let _lock = Lock::take(&folder)?;
                // A download that was cut short must not be taken for the package.
                let part = folder.join("part");
                if part.exists() {
                    fs::remove_dir_all(&part)
                        .with_context(|| format!("cannot remove {}", part.display()))?;
                }
                let fetched = match self.suites {
                    [] => apt::download(self.package, &part)?,
                    suites => apt::download_from(suites, self.package, &part)?,
                };
                let file = folder.join(fetched.file_name().unwrap_or_default());
                fs::rename(&fetched, &file)
                    .with_context(|| format!("cannot make {}", file.display()))?;
                file
            }
        };
        let version = self.version_of(&file);
        let version = version.context("the source package has a strange name")?;
        Ok(Package {
            version: version.to_owned(),
            archive: format!("usr/src/{}.tar.xz", self.package),
            file,
        })
    }
}

/// A source package in the cache.
#[derive(Debug)]
pub struct Package {
    file: PathBuf,
    /// Its version.
    pub version: String,
    /// The path of the source in it.
    archive: String,
}

fn packages_folder() -> PathBuf {
    cache_dir().join("kernels/source")
}

/// Numbers in a version, for comparing: `6.12.117-1~deb12u1` has 6, 12, 117, 1, 12, 1.
fn numbers(version: &str) -> Vec<u64> {
    let parts = version.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}

/// A source tree with its patches.
#[derive(Debug)]
pub struct Tree {
    /// The tree.
    pub dir: PathBuf,
    /// Beside it: untouched copies of every file that a patch ever touched.
    pristine: PathBuf,
}

impl Tree {
    /// Unpacks the package at `dir` unless that was done before.
    pub fn unpack(package: &Package, dir: &Path) -> Result<Self> {
        let tree = Self {
            dir: dir.to_owned(),
            pristine: beside(dir, ".pristine"),
        };
        if dir.exists() {
            return Ok(tree);
        }
        let part = beside(dir, ".part");
        for old in [&part, &tree.pristine] {
            if old.exists() {
                fs::remove_dir_all(old)
                    .with_context(|| format!("cannot remove {}", old.display()))?;
            }
        }
        let (packed, fresh) = (part.join("package"), part.join("tree"));
        fs::create_dir_all(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
        Cmd::line("dpkg-deb --extract")
            .arg(&package.file)
            .arg(&packed)
            .run()?;
        let archive = packed.join(&package.archive);
        Cmd::line("tar --extract --strip-components=1 --file")
            .arg(&archive)
            .arg("--directory")
            .arg(&fresh)
            .run()?;
        fs::rename(&fresh, dir)
            .and_then(|()| fs::remove_dir_all(&part))
            .with_context(|| format!("cannot put the source into {}", dir.display()))?;
        Ok(tree)
    }

    /// Makes the tree the pristine source with exactly `patches`. Files that come out as they
    /// are already keep their time of change, so that make does not build them again.
    ///
    /// # Errors
    /// Names the patch that does not apply, with what `patch` says.
    pub fn apply(&self, patches: &[Patch]) -> Result<()> {
        let mut touched = BTreeSet::new();
        for patch in patches {
            touched.extend(patch.files()?);
        }
        for file in &touched {
            self.keep(file)?;
        }
        let scratch = beside(&self.dir, ".scratch");
        if scratch.exists() {
            fs::remove_dir_all(&scratch)
                .with_context(|| format!("cannot remove {}", scratch.display()))?;
        }
        fs::create_dir_all(&scratch)
            .with_context(|| format!("cannot make {}", scratch.display()))?;
        for file in &touched {
            if let Some(contents) = self.pristine(file)? {
                write(&scratch.join(file), &contents)?;
            }
        }
        for patch in patches {
            apply(patch, &scratch)?;
        }
        // What earlier series touched and this one does not becomes pristine again.
        for file in self.kept()? {
            let wanted = match touched.contains(&file) {
                true => read(&scratch.join(&file))?,
                false => self.pristine(&file)?,
            };
            self.put(&file, wanted)?;
        }
        fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))
    }

    /// Keeps the pristine contents of a file, once: until then no patch has touched it.
    fn keep(&self, file: &str) -> Result<()> {
        let copy = self.pristine.join(file);
        let absent = absent(&copy);
        if copy.exists() || absent.exists() {
            return Ok(());
        }
        match read(&self.dir.join(file))? {
            Some(contents) => write(&copy, &contents),
            None => write(&absent, b""),
        }
    }

    /// The pristine contents of a kept file; `None` where the source has no such file.
    fn pristine(&self, file: &str) -> Result<Option<Vec<u8>>> {
        read(&self.pristine.join(file))
    }

    /// Every kept file.
    fn kept(&self) -> Result<Vec<String>> {
        fn walk(dir: &Path, base: &Path, files: &mut Vec<String>) -> std::io::Result<()> {
            for entry in fs::read_dir(dir)? {
                let path = entry?.path();
                if path.is_dir() {
                    walk(&path, base, files)?;
                } else if let Some(file) = path.strip_prefix(base).ok().and_then(Path::to_str) {
                    files.push(file.strip_suffix(ABSENT).unwrap_or(file).into());
                }
            }
            Ok(())
        }
        let mut files = Vec::new();
        if self.pristine.exists() {
            walk(&self.pristine, &self.pristine, &mut files)
                .with_context(|| format!("reading {}", self.pristine.display()))?;
        }
        Ok(files)
    }

    /// Gives a file of the tree these contents, or removes it; leaves it alone where it has them.
    fn put(&self, file: &str, wanted: Option<Vec<u8>>) -> Result<()> {
        let path = self.dir.join(file);
        let there = read(&path)?;
        match wanted {
            wanted if wanted == there => Ok(()),
            Some(contents) => write(&path, &contents),
            None => fs::remove_file(&path).with_context(|| format!("removing {}", path.display())),
        }
    }
}

/// What marks, among the pristine copies, a file that the source does not have.
const ABSENT: &str = ".is-absent";

fn absent(copy: &Path) -> PathBuf {
    beside(copy, ABSENT)
}

/// A path with something added to its last name, which may contain dots.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

fn write(path: &Path, contents: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(path, contents))
        .with_context(|| format!("writing {}", path.display()))
}

/// Applies one patch without guessing: every line of context must be there.
fn apply(patch: &Patch, dir: &Path) -> Result<()> {
    let file = beside(dir, ".patch");
    fs::write(&file, &patch.text).with_context(|| format!("writing {}", file.display()))?;
    let command = Cmd::line("patch --strip=1 --force --fuzz=0 --no-backup-if-mismatch")
        .args(["--reject-file=-", "--directory"])
        .arg(dir)
        .arg("--input")
        .arg(&file);
    println!("applying {}", patch.name);
    let (success, said) = command.transcript()?;
    let _ = fs::remove_file(&file);
    if !success {
        bail!(
            "{} does not apply to the kernel's source; the tree stays as it was:\n{}",
            patch.name,
            said.trim()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
