//! Signs of life while something takes long.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Says that something still runs: on a terminal by a dot every two seconds, elsewhere, where
/// every line is kept, by a line now and then.
#[derive(Debug)]
pub struct Progress {
    /// What takes long.
    what: String,
    started: Instant,
    /// The last sign of life.
    last: Instant,
    terminal: bool,
    /// Whether dots stand on the current line.
    dots: bool,
}

const DOT: Duration = Duration::from_secs(2);
const LINE: Duration = Duration::from_secs(30);

impl Progress {
    /// From now on `what` runs.
    pub fn new(what: &str) -> Self {
        let now = Instant::now();
        Self {
            what: what.into(),
            started: now,
            last: now,
            terminal: std::io::stdout().is_terminal(),
            dots: false,
        }
    }

    /// Prints a line.
    pub fn line(&mut self, text: &str) {
        self.end();
        println!("{text}");
        self.last = Instant::now();
    }

    /// From now on something else runs.
    pub fn now(&mut self, what: &str) {
        what.clone_into(&mut self.what);
        self.started = Instant::now();
    }

    /// To be called several times a second; `how_far` is asked only where a line is due.
    pub fn tick(&mut self, how_far: impl FnOnce() -> String) {
        let quiet = self.last.elapsed();
        if self.terminal && quiet >= DOT {
            print!("{}", if self.dots { "." } else { "  ." });
            let _ = std::io::stdout().flush();
            self.dots = true;
            self.last = Instant::now();
        } else if !self.terminal && quiet >= LINE {
            println!("{}", self.sign(&how_far()));
            self.last = Instant::now();
        }
    }

    fn sign(&self, how_far: &str) -> String {
        let seconds = self.started.elapsed().as_secs();
        let gap = if how_far.is_empty() { "" } else { ", " };
        format!("  … {}, {seconds} s{gap}{how_far}", self.what)
    }

    /// Ends a line of dots.
    pub fn end(&mut self) {
        if self.dots {
            println!();
            self.dots = false;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_says_what_runs_for_how_long_and_how_far_it_is() {
        let mut progress = Progress::new("boot");
        assert_eq!(progress.sign(""), "  … boot, 0 s");
        progress.now("make");
        progress.started -= Duration::from_secs(90);
        assert_eq!(progress.sign("5 files"), "  … make, 90 s, 5 files");
    }

    #[test]
    fn how_far_is_asked_only_where_a_line_is_due() {
        let mut progress = Progress::new("boot");
        progress.terminal = false;
        progress.tick(|| unreachable!("too early"));
        progress.last -= LINE;
        let mut asked = false;
        progress.tick(|| {
            asked = true;
            String::new()
        });
        assert!(asked);
        progress.tick(|| unreachable!("just said"));
    }
}
