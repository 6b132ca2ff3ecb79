//! What made a results file.

use serde::{Deserialize, Serialize};

/// How thorough a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Seconds; proves that the benchmark runs, its figures mean nothing.
    Smoke,
    /// Under two minutes.
    Quick,
    /// As long as it takes.
    Full,
}

impl Mode {
    /// The word used in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Smoke => "smoke",
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }
}

/// What made the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Provenance {
    /// Git revision of the working tree, where it is one.
    pub revision: Option<String>,
    /// Whether tracked or new files differed from that revision.
    pub dirty: Option<bool>,
    /// When the run started, RFC 3339, UTC.
    pub date: String,
    /// The command line.
    pub command: Vec<String>,
    /// Build profile: `release` or `debug`.
    pub profile: String,
    /// How thorough the run was.
    pub mode: Mode,
    /// Seed of everything random in the run and in its statistics.
    pub seed: u64,
    /// Rounds, each of which runs every scenario once.
    pub rounds: usize,
    /// The VM that it ran in; `None` on a machine.
    #[serde(default)]
    pub vm: Option<VmFacts>,
}

/// Which kind of boot of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// One CPU; time is the count of instructions, so that the same run takes the same time.
    Counted,
    /// Two emulated CPUs that really run at the same time; wall time.
    Parallel,
}

impl Boot {
    /// The word used on command lines, in files and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counted => "counted",
            Self::Parallel => "parallel",
        }
    }
}

impl std::str::FromStr for Boot {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::Counted, Self::Parallel].into_iter();
        let mut named = all.filter(|boot| boot.name() == name);
        named
            .next()
            .ok_or_else(|| format!("no kind of boot: {name}; there are: counted, parallel"))
    }
}

/// What is known of a VM that was measured in; written by whoever booted it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmFacts {
    /// `patched`, `stock`, or another short name of the kernel.
    pub kernel: String,
    /// The kernel in words.
    pub what: String,
    /// Names of the patches that it has, in order; none for a distribution's kernel.
    pub patches: Vec<String>,
    /// The emulator and its version.
    pub emulator: String,
    /// The boots whose figures stand in the file.
    pub boots: Vec<BootFacts>,
    /// Wall time of `cargo xtask vm --empty` with everything built, in seconds.
    pub empty_seconds: Option<f64>,
    /// From power on to the verdict in it, in seconds.
    pub empty_verdict_seconds: Option<f64>,
}

/// One boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootFacts {
    /// Which kind.
    pub boot: Boot,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Nanoseconds that an instruction counts; `None` where time is the wall's.
    pub ns_per_instruction: Option<u32>,
    /// Further kernel parameters.
    pub parameters: Vec<String>,
    /// Why earlier attempts failed; empty where the first one came to its end.
    pub retries: Vec<String>,
}

impl VmFacts {
    /// Whether the mitigations of CPU vulnerabilities were off.
    pub fn mitigations_off(&self) -> bool {
        let mut boots = self.boots.iter();
        boots.all(|boot| boot.parameters.iter().any(|p| p == "mitigations=off"))
    }

    /// A few words that tell this VM from others and from machines.
    pub fn short(&self) -> String {
        let mitigations = if self.mitigations_off() { "off" } else { "on" };
        format!("VM, {} kernel, mitigations {mitigations}", self.kernel)
    }

    /// One line for tables.
    pub fn line(&self) -> String {
        let boots = self.boots.iter().map(|facts| {
            let time = match facts.ns_per_instruction {
                Some(ns) => format!("time counted in instructions of {ns} ns"),
                None => "wall time".into(),
            };
            let retries = match facts.retries.len() {
                0 => String::new(),
                n => format!(", failed before ({n}): {}", facts.retries.join("; ")),
            };
            let (name, cpus) = (facts.boot.name(), facts.cpus);
            let plural = if cpus == 1 { "" } else { "s" };
            format!("boot `{name}`: {cpus} CPU{plural}, {time}{retries}")
        });
        let boots: Vec<String> = boots.collect();
        let patches = match self.patches.len() {
            0 => "no patches".into(),
            n => format!("{n} patches"),
        };
        format!(
            "{} ({}, {patches}) on {}; {}",
            self.short(),
            self.what,
            self.emulator,
            boots.join("; ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::facts;

    #[test]
    fn line_names_boots_retries_and_mitigations() {
        let mut vm = facts(&[Boot::Counted, Boot::Parallel]);
        vm.boots[1].cpus = 2;
        vm.boots[1].retries = vec!["it hung".into()];
        let line = vm.line();
        for part in [
            "mitigations off",
            "1 patches",
            "boot `counted`: 1 CPU, time counted in instructions of 1 ns",
            "boot `parallel`: 2 CPUs, wall time, failed before (1): it hung",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
        vm.boots[0].parameters = vec!["mitigations=auto".into()];
        assert!(vm.short().ends_with("mitigations on"));
    }

    #[test]
    fn facts_with_anything_unknown_are_refused() {
        let text = serde_json::to_string(&facts(&[Boot::Counted])).unwrap();
        assert_eq!(
            serde_json::from_str::<VmFacts>(&text).unwrap(),
            facts(&[Boot::Counted])
        );
        for wrong in [
            text.replace("\"counted\"", "\"other\""),
            text.replace("\"cpus\":1", "\"cpus\":-1"),
            text.replace("\"what\"", "\"which\""),
        ] {
            assert!(serde_json::from_str::<VmFacts>(&wrong).is_err(), "{wrong}");
        }
        assert_eq!("parallel".parse(), Ok(Boot::Parallel));
        assert!("serial".parse::<Boot>().is_err());
    }
}
