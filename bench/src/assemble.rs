//! Makes one results file of what the boots of a VM measured.

use thiserror::Error;

use crate::claims;
use crate::results::{Boot, PARALLEL_SUFFIX, Provenance, Results, VmFacts};

/// Why the boots do not make one run.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AssembleError {
    /// A file holds rows of another boot than it should.
    #[error("{name} was not measured in a {} boot", .boot.name())]
    WrongBoot {
        /// The row.
        name: String,
        /// The boot that it should come from.
        boot: Boot,
    },
    /// The facts name other boots than there are files of.
    #[error("the facts tell of other boots than those with results: {0}")]
    Facts(String),
}

/// One run: the figures of the counted boot, those of the parallel one (if there was one) under
/// names of their own, and the facts. `here` says what was built, where it was built.
///
/// # Errors
///
/// [`AssembleError`], where the parts do not belong together.
pub fn assemble(
    counted: Results,
    parallel: Option<Results>,
    facts: VmFacts,
    here: Provenance,
) -> Result<Results, AssembleError> {
    let told: Vec<Boot> = facts.boots.iter().map(|facts| facts.boot).collect();
    let mut expected = vec![Boot::Counted];
    expected.extend(parallel.as_ref().map(|_| Boot::Parallel));
    if told != expected {
        let names: Vec<&str> = told.iter().map(|boot| boot.name()).collect();
        return Err(AssembleError::Facts(names.join(", ")));
    }
    check(&counted, Boot::Counted)?;
    let mut results = counted;
    if let Some(parallel) = parallel {
        check(&parallel, Boot::Parallel)?;
        for mut scenario in parallel.scenarios {
            scenario.name += PARALLEL_SUFFIX;
            results.scenarios.push(scenario);
        }
        // Mechanisms are the same in both; rows that failed are not.
        let known: Vec<String> = results.mechanisms.iter().map(|m| m.name.clone()).collect();
        for mut mechanism in parallel.mechanisms {
            if !known.contains(&mechanism.name) || mechanism.name.contains('/') {
                mechanism.name += PARALLEL_SUFFIX;
                results.mechanisms.push(mechanism);
            }
        }
    }
    let measured = results.provenance;
    results.provenance = Provenance {
        profile: measured.profile,
        mode: measured.mode,
        seed: measured.seed,
        rounds: measured.rounds,
        vm: Some(facts),
        ..here
    };
    claims::complete(&mut results);
    Ok(results)
}

fn check(results: &Results, boot: Boot) -> Result<(), AssembleError> {
    let mut rows = results.scenarios.iter();
    match rows.find(|scenario| scenario.boot != Some(boot)) {
        Some(scenario) => Err(AssembleError::WrongBoot {
            name: scenario.name.clone(),
            boot,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{BootFacts, Mechanism, Mode};
    use crate::synthetic::{facts, in_boot};

    fn boot(boot: Boot) -> BootFacts {
        facts(&[boot]).boots.remove(0)
    }

    #[test]
    fn rows_of_both_boots_stand_side_by_side() {
        let mut parallel = in_boot(Boot::Parallel);
        parallel.mechanisms.push(Mechanism {
            name: "forward-mailbox/read".into(),
            available: false,
            reason: "it failed".into(),
        });
        let here = parallel.provenance.clone();
        let run = assemble(
            in_boot(Boot::Counted),
            Some(parallel),
            facts(&[Boot::Counted, Boot::Parallel]),
            Provenance {
                revision: Some("host's".into()),
                mode: Mode::Smoke,
                ..here
            },
        )
        .unwrap();
        let boot_of = |name| run.scenario(name).unwrap().boot;
        assert_eq!(boot_of("forward-stream/read"), Some(Boot::Counted));
        assert_eq!(boot_of("forward-stream/read/2cpu"), Some(Boot::Parallel));
        assert_eq!(run.provenance.revision.as_deref(), Some("host's"));
        assert_eq!(run.provenance.mode, Mode::Quick);
        let failed = run.mechanisms.iter().filter(|m| m.name.contains("2cpu"));
        assert_eq!(failed.count(), 1);
        assert!(run.claims.iter().any(|claim| claim.id == "vm-boot"));
    }

    #[test]
    fn parts_that_do_not_belong_together_are_refused() {
        let counted = || in_boot(Boot::Counted);
        let here = || counted().provenance;
        let told = facts(&[Boot::Counted]);
        assert!(assemble(counted(), None, told.clone(), here()).is_ok());
        let more = assemble(
            counted(),
            Some(in_boot(Boot::Parallel)),
            told.clone(),
            here(),
        );
        assert!(matches!(more, Err(AssembleError::Facts(_))));
        let wrong = assemble(in_boot(Boot::Parallel), None, told.clone(), here());
        assert!(matches!(wrong, Err(AssembleError::WrongBoot { .. })));
        let mut fewer = told;
        fewer.boots.push(boot(Boot::Parallel));
        assert!(assemble(counted(), None, fewer, here()).is_err());
    }
}
