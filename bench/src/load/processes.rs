//! What a process and its descendants use.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// CPU time of processes, of each since it began.
#[derive(Debug)]
pub struct Cpu(BTreeMap<Pid, Duration>);

impl Cpu {
    /// What was used since `before`. Of a process that began since then that is all it has used.
    ///
    /// # Errors
    ///
    /// A process has ended meanwhile, so that what it used last is not known.
    pub fn since(&self, before: &Self) -> Result<Duration> {
        let ended = before.0.keys().find(|pid| !self.0.contains_key(pid));
        if let Some(pid) = ended {
            bail!("process {pid} ended while its CPU time was measured");
        }
        let used = self.0.iter().map(|(pid, now)| {
            let before = before.0.get(pid).copied().unwrap_or_default();
            now.saturating_sub(before)
        });
        Ok(used.sum())
    }
}

/// CPU time that a process and its descendants, and what the kernel did for them, have taken: of
/// all threads, also of those that ended, and of io_uring's workers, which are threads of their
/// process. Processes that have ended are not among them.
pub fn cpu(root: Pid) -> Result<Cpu> {
    let mut times = BTreeMap::new();
    for pid in family(root)? {
        let time = clock_getcpuclockid(pid).and_then(clock_gettime);
        match time {
            Ok(time) => times.insert(pid, time.into()),
            Err(Errno::ESRCH | Errno::EINVAL) if pid != root => continue,
            Err(error) => return Err(error).with_context(|| format!("the clock of process {pid}")),
        };
    }
    Ok(Cpu(times))
}

/// Resident memory of a process and its descendants in KiB: a sum, to which pages that several of
/// them have add once for each.
pub fn resident(root: Pid) -> Result<u64> {
    let mut sum = 0;
    for pid in family(root)? {
        let path = format!("/proc/{pid}/status");
        let Some(status) = look(&path)? else {
            ensure!(pid != root, "{path}: the process has ended");
            continue;
        };
        // One that has ended and that nobody has asked for its status has no memory.
        let Some(value) = status.lines().find_map(|line| line.strip_prefix("VmRSS:")) else {
            ensure!(pid != root, "{path} has no VmRSS");
            continue;
        };
        let kib = value.trim().strip_suffix(" kB");
        let kib = kib.with_context(|| format!("{path}: VmRSS is {value}"))?;
        let kib: u64 = (kib.trim().parse()).with_context(|| format!("{path}: VmRSS"))?;
        sum += kib;
    }
    Ok(sum)
}

/// A process and those that descend from it. Those whose parents have ended are not found.
fn family(root: Pid) -> Result<Vec<Pid>> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let name = entry.context("/proc")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let path = format!("/proc/{pid}/stat");
        let Some(stat) = look(&path)? else {
            continue;
        };
        let parent = parent(&stat).with_context(|| format!("{path}: {stat}"))?;
        children.entry(parent).or_default().push(pid);
    }
    let mut family = vec![root.as_raw()];
    let mut next = 0;
    while let Some(pid) = family.get(next) {
        // Each is removed once, so that this ends whatever the lists say.
        family.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    Ok(family.into_iter().map(Pid::from_raw).collect())
}

/// The parent in `/proc/PID/stat`: behind the program's name, which may contain anything.
fn parent(stat: &str) -> Option<i32> {
    let (_, behind) = stat.rsplit_once(')')?;
    behind.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// A file of a process; nothing where that has ended.
fn look(path: &str) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error).context(path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io::{BufRead as _, BufReader, Write as _};
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    /// A shell that waits for another one, which it has forked and which works when it is told to.
    struct Shells {
        outer: Child,
        stdin: ChildStdin,
        stdout: BufReader<ChildStdout>,
    }

    impl Shells {
        fn start() -> Self {
            let inner = "while read word && [ $word = work ]; do
                i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done
                echo done
            done";
            let outer = "/bin/sh -c \"$0\"; echo ended; read word";
            let mut outer = Command::new("/bin/sh")
                .args(["-c", outer, inner])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut shells = Self {
                stdin: outer.stdin.take().unwrap(),
                stdout: BufReader::new(outer.stdout.take().unwrap()),
                outer,
            };
            assert_eq!(shells.tell("work"), "done");
            shells
        }

        fn pid(&self) -> Pid {
            Pid::from_raw(self.outer.id().cast_signed())
        }

        fn tell(&mut self, word: &str) -> String {
            writeln!(self.stdin, "{word}").unwrap();
            let mut line = String::new();
            self.stdout.read_line(&mut line).unwrap();
            line.trim().into()
        }
    }

    impl Drop for Shells {
        fn drop(&mut self) {
            let _ = self.outer.kill();
            let _ = self.outer.wait();
        }
    }

    #[test]
    fn what_forked_processes_use_is_counted() {
        let mut shells = Shells::start();
        let [outer, inner] = family(shells.pid()).unwrap()[..] else {
            panic!("there are two shells");
        };
        assert_eq!(outer, shells.pid());
        let before = cpu(outer).unwrap();
        assert_eq!(shells.tell("work"), "done");
        let after = cpu(outer).unwrap();
        let used = after.since(&before).unwrap();
        // A loop of a shell takes longer than 50 ns.
        assert!(used >= Duration::from_millis(5), "{used:?}");
        let of_inner = after.0[&inner] - before.0[&inner];
        let of_outer = after.0[&outer] - before.0[&outer];
        assert_eq!(used, of_inner + of_outer);
        assert!(of_outer < of_inner);
        let all = resident(outer).unwrap();
        assert!(all > resident(inner).unwrap());
        let status = look(&format!("/proc/{outer}/status")).unwrap().unwrap();
        let own = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let own = own.unwrap().trim().trim_end_matches(" kB");
        assert!(all > own.parse().unwrap());
    }

    #[test]
    fn processes_that_end_while_they_are_measured_are_told_of() {
        let mut shells = Shells::start();
        let before = cpu(shells.pid()).unwrap();
        assert_eq!(before.0.len(), 2);
        assert_eq!(shells.tell("end"), "ended");
        let after = cpu(shells.pid()).unwrap();
        let error = after.since(&before).unwrap_err().to_string();
        assert!(error.contains("ended while"), "{error}");
        let alone = shells.pid();
        drop(shells);
        assert!(cpu(alone).is_err());
        assert!(resident(alone).is_err());
    }

    #[test]
    fn parents_are_found_behind_any_name() {
        assert_eq!(parent("7 (a) S 3 (x) S 5) R 42 1 2"), Some(42));
        assert_eq!(parent("7 (a)"), None);
        assert_eq!(parent(""), None);
    }
}
