//! The first process of the test VM: mounts, loads modules, runs what the manifest names, one
//! program after the other, reports on the second serial line and powers off.
//!
//! It waits for nobody, unless several VMs share the programs: then it asks outside for each.
//! Whatever fails becomes a report, and the VM ends.

mod machine;
mod programs;
mod results;

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};

use anyhow::{Context as _, Result};
use ioregion_init::{Job, MANIFEST, Manifest, Report};
use nix::sys::reboot::{RebootMode, reboot};

fn main() {
    if nix::unistd::getpid().as_raw() != 1 {
        eprintln!("this is the first process of the test VM; start it with `cargo xtask vm`");
        std::process::exit(2);
    }
    let mounted = machine::mount_all();
    match machine::report_line() {
        Ok(line) => {
            let log = Log { line };
            if let Err(error) = mounted.and_then(|()| work(&log)) {
                log.say(&Report::Broken(format!("{error:#}")));
            }
            log.flush();
        }
        // Without a report line the run fails outside; the reason stands in the kernel's log.
        Err(error) => eprintln!("no report line: {error:#}"),
    }
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    // Returning ends the first process: the kernel panics, which ends the VM.
    eprintln!("cannot power off: {error}");
}

/// Where reports go.
struct Log {
    line: File,
}

impl Log {
    /// Writes one report, on a line of its own whatever a program left behind, and notes it in
    /// the kernel's log, so that what the kernel says can be told to belong to a program.
    fn say(&self, report: &Report) {
        // In one piece each: every write to the kernel's log is a message of its own.
        self.write(report);
        if let Ok(mut kernel) = OpenOptions::new().write(true).open("/dev/kmsg") {
            let _ = kernel.write_all(format!("<6>{report}\n").as_bytes());
        }
    }

    /// Writes one report only for the machine outside.
    fn write(&self, report: &Report) {
        let _ = (&self.line).write_all(format!("\n{report}\n").as_bytes());
    }

    fn flush(&self) {
        let _ = nix::sys::termios::tcdrain(&self.line);
    }
}

fn work(log: &Log) -> Result<()> {
    let text = std::fs::read_to_string(MANIFEST).with_context(|| format!("reading {MANIFEST}"))?;
    let manifest = Manifest::decode(&text)?;
    let unloaded = machine::load_modules(&manifest.modules);
    machine::prepare()?;
    let kept = machine::kvm(&unloaded);
    log.say(&Report::Kvm(kept.as_ref().map(drop).map_err(String::clone)));

    let mut children = programs::Children::new(&log.line, &manifest.env)?;
    let (mut passed, mut total) = (0, 0);
    let mut answers = BufReader::new(&log.line);
    while let Some(job) = next(&manifest, total, log, &mut answers)? {
        let name = job.name.clone();
        log.say(&Report::Start { name: name.clone() });
        let (ending, time) = children.run(job);
        passed += usize::from(ending.passed());
        total += 1;
        log.say(&Report::End {
            name,
            millis: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
            ending,
        });
        results::send(|report| log.write(report))?;
    }
    log.say(&Report::Verdict { passed, total });
    Ok(())
}

/// The program to run after `done` others; `None` after the last.
fn next<'a>(
    manifest: &'a Manifest,
    done: usize,
    log: &Log,
    answers: &mut BufReader<&File>,
) -> Result<Option<&'a Job>> {
    if !manifest.shared {
        return Ok(manifest.jobs.get(done));
    }
    log.write(&Report::Next);
    let mut answer = String::new();
    answers
        .read_line(&mut answer)
        .context("which program is next?")?;
    let number: usize = answer
        .trim()
        .parse()
        .with_context(|| format!("no number: {answer:?}"))?;
    Ok(manifest.jobs.get(number))
}
