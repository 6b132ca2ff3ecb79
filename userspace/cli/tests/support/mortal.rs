//! Services that are killed and started again.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;

use super::{LONG, Service, command, wait};

/// How often services are killed.
pub fn rounds() -> u64 {
    let set = std::env::var("IOREGION_TEST_KILLS").ok();
    let full = std::env::var_os("IOREGION_FULL").map(|_| 100);
    set.map(|set| set.parse().unwrap()).or(full).unwrap_or(20)
}

/// A seed that no run has had; print it.
pub fn seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::from(now.subsec_nanos())
}

/// A service that can be started again with the same command line; what it says goes to a file.
pub struct Mortal {
    pub service: Service,
    image: PathBuf,
    options: Vec<String>,
    said: PathBuf,
    /// How many queues had been taken over when it was killed last.
    taken_before: usize,
}

impl Mortal {
    pub fn start(name: &str, image: &Path, options: &[&str]) -> Self {
        let said = image.with_file_name("said");
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        let mut command = Self::command(name, image, &options, &said);
        Self {
            service: Service::start_as(name, &mut command),
            image: image.into(),
            options,
            said,
            taken_before: 0,
        }
    }

    fn command(name: &str, image: &Path, options: &[String], said: &Path) -> Command {
        let mut command = command(name, image);
        let file = OpenOptions::new().create(true).append(true).open(said);
        command
            .args(options)
            .env("NO_COLOR", "1")
            .stderr(file.unwrap());
        command
    }

    pub fn kill(&mut self) {
        self.taken_before = self.taken_over().len();
        self.service.signal(Signal::SIGKILL);
        wait(&mut self.service.child);
    }

    pub fn revive(&mut self) {
        let ended = self.service.child.try_wait().unwrap();
        assert!(ended.is_some());
        let name = &self.service.name;
        let mut command = Self::command(name, &self.image, &self.options, &self.said);
        let serial = format!("serial-{name}");
        self.service.child = command.args(["--serial", &serial]).spawn().unwrap();
    }

    /// What services said.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }

    /// Waits until one of them has said so.
    pub fn wait_for(&self, text: &str) {
        let until = Instant::now() + LONG;
        while !self.said().contains(text) {
            assert!(
                Instant::now() < until,
                "nobody said {text:?}: {}",
                self.said()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the service serves a queue of the one before.
    pub fn wait_until_taken_over(&self) {
        let until = Instant::now() + LONG;
        while self.taken_over().len() <= self.taken_before {
            assert!(Instant::now() < until, "nobody took over: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many requests each service took over from the one before.
    pub fn taken_over(&self) -> Vec<u32> {
        let said = self.said();
        let taken = said.lines().filter(|line| line.contains("taken over"));
        let number = |line: &str| {
            let (_, rest) = line.split_once("in_flight=")?;
            rest.split_whitespace().next()?.parse().ok()
        };
        taken.map(|line| number(line).unwrap()).collect()
    }
}
