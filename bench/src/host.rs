//! Reads the facts about the machine and the build that a results file carries.
//! A fact that cannot be read stays `None`; nothing is assumed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::results::{Host, Kvm, KvmKind, Mode, Provenance};

impl Host {
    /// Reads the facts of this machine.
    pub fn gather() -> Self {
        let mut host = Self::read(Path::new("/"));
        if host.hypervisor == Some(true) {
            host.hypervisor_signature = hypervisor_signature();
        }
        host.kvm = host.kvm_kind(Path::new("/"));
        host
    }

    /// Everything that `/proc` and `/sys` under `root` tell.
    fn read(root: &Path) -> Self {
        let line = |path: &str| {
            let text = fs::read_to_string(root.join(path)).ok()?;
            let text = text.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        let cpuinfo = line("proc/cpuinfo").unwrap_or_default();
        let cores = cpuinfo
            .lines()
            .filter(|l| l.starts_with("processor"))
            .count();
        let memory_kib = line("proc/meminfo").and_then(|m| {
            field(&m, "MemTotal")?
                .split(' ')
                .next()?
                .parse::<u64>()
                .ok()
        });
        let kernel = line("proc/sys/kernel/osrelease").map(|release| {
            let version = line("proc/sys/kernel/version").unwrap_or_default();
            format!("{release} {version}").trim_end().to_owned()
        });
        Self {
            kernel,
            kvm: Kvm::default(),
            cpu_model: field(&cpuinfo, "model name"),
            cores: (cores > 0).then_some(cores),
            mitigations: folder(&root.join("sys/devices/system/cpu/vulnerabilities")),
            governor: line("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            clocksource: line("sys/devices/system/clocksource/clocksource0/current_clocksource"),
            memory_bytes: memory_kib.map(|kib| kib.saturating_mul(1024)),
            hypervisor: cpu_flags(&cpuinfo).map(|flags| flags.contains("hypervisor")),
            hypervisor_signature: None,
            // "none [integrity] confidentiality": the brackets mark the current mode.
            lockdown: line("sys/kernel/security/lockdown").and_then(|modes| {
                let (_, current) = modes.split_once('[')?;
                Some(current.split_once(']')?.0.to_owned())
            }),
        }
    }

    /// Concludes the kind of KVM from CPU flags, loaded modules and the hypervisor below.
    fn kvm_kind(&self, root: &Path) -> Kvm {
        let module = |name: &str| root.join("sys/module").join(name).is_dir();
        let cpuinfo = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        let Some(flags) = cpu_flags(&cpuinfo) else {
            return Kvm {
                kind: KvmKind::Unknown,
                told_by: "no CPU flags in /proc/cpuinfo".into(),
            };
        };
        let hardware = [
            ("vmx", "kvm_intel", KvmKind::Vmx),
            ("svm", "kvm_amd", KvmKind::Svm),
        ];
        let found = hardware
            .into_iter()
            .find(|(flag, name, _)| flags.contains(*flag) && module(name));
        let Some((flag, name, bare)) = found else {
            return if module("kvm_pvm") {
                Kvm {
                    kind: KvmKind::Pvm,
                    told_by: "module kvm_pvm, neither VMX nor SVM".into(),
                }
            } else {
                Kvm {
                    kind: KvmKind::Unknown,
                    told_by: "none of kvm_intel, kvm_amd, kvm_pvm in use".into(),
                }
            };
        };
        let signature = self.hypervisor_signature.as_deref();
        let (kind, below) = match (self.hypervisor, signature) {
            (Some(true), Some("TCGTCGTCGTCG")) => (KvmKind::Emulated, "on QEMU's emulator".into()),
            (Some(true), other) => (
                KvmKind::Nested,
                format!("on hypervisor {:?}", other.unwrap_or("unknown")),
            ),
            _ => (bare, "no hypervisor below".into()),
        };
        Kvm {
            kind,
            told_by: format!("CPU flag {flag}, module {name}, {below}"),
        }
    }

    /// One line that names the machine, for tables.
    pub fn line(&self) -> String {
        let text = |fact: &Option<String>| fact.clone().unwrap_or_else(|| "unknown".into());
        let cores = self
            .cores
            .map_or_else(|| "unknown".into(), |n| n.to_string());
        let memory = self.memory_bytes.map_or_else(
            || "unknown".into(),
            |b| format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64),
        );
        let release = text(&self.kernel);
        format!(
            "{}, {cores} CPUs, {memory}, kernel {}, KVM {} ({}), clock {}, governor {}",
            text(&self.cpu_model),
            release.split(' ').next().unwrap_or_default(),
            self.kvm.kind.name(),
            self.kvm.told_by,
            text(&self.clocksource),
            text(&self.governor),
        )
    }
}

impl Provenance {
    /// Facts about this process and the working tree in the current folder.
    pub fn gather(mode: Mode, seed: u64, rounds: usize) -> Self {
        let mut command: Vec<String> = std::env::args().collect();
        // The program's name, not where somebody keeps it.
        if let Some(program) = command.first_mut()
            && let Some(name) = Path::new(program.as_str()).file_name()
        {
            *program = name.to_string_lossy().into_owned();
        }
        Self {
            revision: git(&["rev-parse", "HEAD"]),
            dirty: git(&["status", "--porcelain"]).map(|changes| !changes.is_empty()),
            date: rfc3339(SystemTime::now()),
            command,
            profile: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            }
            .into(),
            mode,
            seed,
            rounds,
            vm: None,
        }
    }

    /// One line that says what made the figures, for tables.
    pub fn line(&self) -> String {
        let revision = self
            .revision
            .as_deref()
            .map_or("unknown", |r| r.get(..12).unwrap_or(r));
        let dirty = match self.dirty {
            Some(true) => " with local changes",
            Some(false) => "",
            None => " (cleanness unknown)",
        };
        let vm = match &self.vm {
            Some(vm) => format!(", {}", vm.line()),
            None => String::new(),
        };
        format!(
            "{}, revision {revision}{dirty}, {} build, `{}` run of {} rounds, seed {}{vm}",
            self.date,
            self.profile,
            self.mode.name(),
            self.rounds,
            self.seed
        )
    }
}

fn field(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

fn cpu_flags(cpuinfo: &str) -> Option<BTreeSet<String>> {
    Some(
        field(cpuinfo, "flags")?
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
    )
}

fn folder(path: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            Some((
                entry.file_name().into_string().ok()?,
                text.trim().to_owned(),
            ))
        })
        .collect()
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

#[cfg(target_arch = "x86_64")]
fn hypervisor_signature() -> Option<String> {
    const HYPERVISOR_LEAF: u32 = 0x4000_0000;
    // SAFETY: every x86-64 CPU has the CPUID instruction; leaf 0x4000_0000 is
    // only meaningful under a hypervisor, which the caller has checked.
    #[allow(unused_unsafe)]
    let leaf = unsafe { std::arch::x86_64::__cpuid(HYPERVISOR_LEAF) };
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx]
        .map(u32::to_le_bytes)
        .concat();
    let text = String::from_utf8(bytes).ok()?;
    let text = text.trim_end_matches('\0');
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(not(target_arch = "x86_64"))]
fn hypervisor_signature() -> Option<String> {
    None
}

/// UTC, to the second; the epoch for a clock that stands before it.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to civil date (Howard Hinnant's algorithm), years counted from March.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn machine(flags: &str, module: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in [
            (
                "proc/cpuinfo",
                format!(
                    "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
                ),
            ),
            (
                "proc/meminfo",
                "MemTotal:       2048 kB\nMemFree: 1 kB\n".into(),
            ),
            ("proc/sys/kernel/osrelease", "6.12.0\n".into()),
            (
                "sys/devices/system/cpu/vulnerabilities/spectre_v2",
                "Mitigation: Retpolines\n".into(),
            ),
            (
                "sys/kernel/security/lockdown",
                "none [integrity] confidentiality\n".into(),
            ),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(root.path().join("sys/module").join(module)).unwrap();
        root
    }

    #[test]
    fn facts_are_read_and_missing_ones_stay_unknown() {
        let root = machine("fpu vmx", "kvm_intel");
        let host = Host::read(root.path());
        assert_eq!(host.kernel.as_deref(), Some("6.12.0"));
        assert_eq!(host.cpu_model.as_deref(), Some("Some CPU"));
        assert_eq!((host.cores, host.memory_bytes), (Some(2), Some(2 << 20)));
        assert_eq!(host.lockdown.as_deref(), Some("integrity"));
        assert_eq!(host.mitigations["spectre_v2"], "Mitigation: Retpolines");
        assert_eq!(host.hypervisor, Some(false));
        assert_eq!((host.governor, host.clocksource), (None, None));

        let nothing = Host::read(Path::new("/nonexistent"));
        assert_eq!(
            (nothing.cores, nothing.hypervisor, &nothing.lockdown),
            (None, None, &None)
        );
        assert_eq!(
            nothing.kvm_kind(Path::new("/nonexistent")).kind,
            KvmKind::Unknown
        );
        assert!(nothing.line().starts_with("unknown, unknown CPUs"));
    }

    #[test]
    fn kind_of_kvm_follows_flags_modules_and_the_hypervisor_below() {
        let cases = [
            ("vmx", "kvm_intel", None, KvmKind::Vmx),
            ("svm", "kvm_amd", None, KvmKind::Svm),
            (
                "svm hypervisor",
                "kvm_amd",
                Some("KVMKVMKVM"),
                KvmKind::Nested,
            ),
            ("vmx hypervisor", "kvm_intel", None, KvmKind::Nested),
            (
                "svm hypervisor",
                "kvm_amd",
                Some("TCGTCGTCGTCG"),
                KvmKind::Emulated,
            ),
            ("fpu hypervisor", "kvm_pvm", Some("KVMKVMKVM"), KvmKind::Pvm),
            ("vmx", "kvm", None, KvmKind::Unknown),
        ];
        for (flags, module, signature, kind) in cases {
            let root = machine(flags, module);
            let mut host = Host::read(root.path());
            host.hypervisor_signature = signature.map(str::to_owned);
            assert_eq!(
                host.kvm_kind(root.path()).kind,
                kind,
                "{flags} {module} {signature:?}"
            );
        }
    }

    #[test]
    fn facts_of_this_machine_are_gathered() {
        let host = Host::gather();
        assert!(host.cores.is_some_and(|n| n > 0));
        assert!(!host.kvm.told_by.is_empty());
        println!("{}", host.line());
    }

    #[test]
    fn dates_are_rfc3339() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(at(1_798_761_599), "2026-12-31T23:59:59Z");
        assert_eq!(
            rfc3339(UNIX_EPOCH - Duration::from_secs(1)),
            "1970-01-01T00:00:00Z"
        );
    }

    #[test]
    fn provenance_names_the_program_without_its_folder() {
        let provenance = Provenance::gather(Mode::Smoke, 3, 2);
        assert!(
            !provenance.command[0].contains('/'),
            "{:?}",
            provenance.command
        );
        assert!(
            provenance
                .line()
                .contains("`smoke` run of 2 rounds, seed 3")
        );
    }
}
