//! What a VM run prints.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ioregion_init::Report;

use super::console::Ran;
use super::qemu::Run;
use crate::progress::Progress;
use crate::sh::table;

/// Where one VM or several are shown.
#[derive(Debug)]
pub struct Screen {
    progress: Mutex<Progress>,
    /// What runs, by VM.
    running: Mutex<Vec<String>>,
}

impl Screen {
    /// For VMs that are about to start.
    pub fn new(vms: usize) -> Self {
        Self {
            progress: Mutex::new(Progress::new("the VM boots")),
            running: Mutex::new(vec!["boot".into(); vms]),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        // A line that was half printed does no harm.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn runs(&self, vm: usize, what: &str) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = running.get_mut(vm) {
            what.clone_into(place);
        }
        self.progress().now(&running.join(" and "));
    }
}

/// Prints what programs say, as it comes where there is one VM, and program by program where there
/// are several; reports in words.
#[derive(Debug)]
pub struct Shown<'a> {
    screen: &'a Screen,
    vm: usize,
    /// What is printed when the program ends.
    kept: Option<Vec<String>>,
    /// When the last line came.
    last: Instant,
    /// Whether the last line was empty: one before a report is the first process's.
    empty: bool,
}

/// A test that takes longer is shown with its time.
const LONG: Duration = Duration::from_secs(2);

impl<'a> Shown<'a> {
    /// For a VM that is about to start: the only one, or number `vm` of several.
    pub fn new(screen: &'a Screen, vm: Option<usize>) -> Self {
        Self {
            screen,
            vm: vm.unwrap_or(0),
            kept: vm.map(|_| Vec::new()),
            last: Instant::now(),
            empty: false,
        }
    }

    /// Shows a line, or that there is none yet.
    pub fn show(&mut self, line: Option<&str>, report: Option<&Report>) {
        let Some(line) = line else {
            self.screen.progress().tick(String::new);
            return;
        };
        if let Some(Report::Start { name }) = report {
            self.screen.runs(self.vm, name);
        }
        if std::mem::replace(&mut self.empty, line.is_empty()) && report.is_none() {
            self.print("");
        }
        let text = match report {
            None if line.is_empty() => return,
            // What comes as a result is not for eyes, nor what VMs are told.
            Some(Report::Data(_) | Report::Next) => return,
            Some(report) => in_words(report),
            None => with_time(line, self.last.elapsed()),
        };
        self.last = Instant::now();
        self.print(&text);
        if let Some(Report::End { .. } | Report::Kvm(_) | Report::Verdict { .. }) = report {
            self.release();
        }
    }

    fn print(&mut self, line: &str) {
        match &mut self.kept {
            Some(kept) => kept.push(line.into()),
            None => self.screen.progress().line(line),
        }
    }

    /// Prints what was kept, in one piece.
    fn release(&mut self) {
        let mut progress = self.screen.progress();
        for line in self.kept.iter_mut().flat_map(|kept| kept.drain(..)) {
            progress.line(&line);
        }
    }
}

impl Drop for Shown<'_> {
    /// A VM that ended in the middle of a program.
    fn drop(&mut self) {
        self.release();
    }
}

/// A test's line with the time since the line before, where that is long.
fn with_time(line: &str, time: Duration) -> String {
    if line.starts_with("test ") && line.contains(" ... ") && time >= LONG {
        format!("{line} ({:.0} s)", time.as_secs_f64())
    } else {
        line.into()
    }
}

fn in_words(report: &Report) -> String {
    match report {
        Report::Start { name } => format!("-- {name}"),
        Report::End {
            name,
            millis,
            ending,
        } => format!("-- {name}: {ending}, {:.1} s", seconds(*millis)),
        Report::Kvm(Ok(())) => "-- KVM is usable in the VM".into(),
        Report::Kvm(Err(why)) => format!("-- KVM is not usable in the VM: {why}"),
        Report::File { name, size, .. } => format!("-- result {name}, {size} bytes"),
        Report::Data(bytes) => format!("-- {} bytes", bytes.len()),
        Report::Next => "-- next".into(),
        Report::Broken(why) => format!("-- gave up: {why}"),
        Report::Verdict { passed, total } => format!("-- {passed} of {total} passed"),
    }
}

fn seconds(millis: u64) -> f64 {
    Duration::from_millis(millis).as_secs_f64()
}

/// The programs with their results and times.
pub fn summary(runs: &[Run]) -> String {
    let mut rows = vec![["program", "result", "seconds", "tests"].map(String::from)];
    for Ran {
        name,
        ending,
        millis,
        tests,
        ..
    } in runs.iter().flat_map(|run| &run.console.ran)
    {
        let (result, time) = match ending {
            Some(ending) if ending.passed() => ("passed".into(), seconds(*millis)),
            Some(ending) => (format!("FAILED: {ending}"), seconds(*millis)),
            None => ("FAILED: did not end".into(), 0.0),
        };
        rows.push([
            name.clone(),
            result,
            format!("{time:.1}"),
            tests.to_string(),
        ]);
    }
    let mut text = if rows.len() > 1 {
        table(&rows)
    } else {
        String::new()
    };
    for run in runs.iter().filter(|run| !run.stopped.is_zero()) {
        text.push_str(&format!(
            "the VM stood still for {:.0} s, stopped from outside\n",
            run.stopped.as_secs_f64()
        ));
    }
    text
}

/// Prints the end of a log: around the first fault where there is one.
pub fn tail(log: &Path, run: &Run) {
    const LINES: usize = 40;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let first = run.console.faults.first().map(|fault| fault.number - 1);
    let is_kernel = log.ends_with("kernel.log");
    let start = match first.filter(|_| is_kernel) {
        Some(fault) => fault.saturating_sub(5),
        None => lines.len().saturating_sub(LINES),
    };
    if lines.is_empty() {
        return;
    }
    println!("\n{} from line {}:", log.display(), start + 1);
    for line in lines.iter().skip(start).take(LINES) {
        println!("| {}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_tests_are_shown_with_their_time() {
        let line = "test a ... ok";
        assert_eq!(
            with_time(line, Duration::from_secs(12)),
            "test a ... ok (12 s)"
        );
        assert_eq!(with_time(line, Duration::from_secs(1)), line);
        let result = "test result: ok. 1 passed; 0 failed;";
        assert_eq!(with_time(result, Duration::from_secs(12)), result);
    }
}
