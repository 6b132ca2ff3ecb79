//! Configuration fragments, and whether a made configuration holds what they ask for.

use anyhow::{Result, bail};

/// The name and the value of a line of a configuration; `None` for comments and empty lines.
/// An option that is off has the value `n`.
fn option(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if let Some((name, value)) = line.split_once('=') {
        return name.starts_with("CONFIG_").then_some((name, value));
    }
    let name = line.strip_prefix("# ")?.strip_suffix(" is not set")?;
    name.starts_with("CONFIG_").then_some((name, "n"))
}

/// The last value of an option in `config`; an option that is not mentioned is off.
fn value<'a>(config: &'a str, name: &str) -> &'a str {
    let mut found = config
        .lines()
        .filter_map(option)
        .filter(|(other, _)| *other == name);
    found.next_back().map_or("n", |(_, value)| value)
}

/// Options that `fragments` ask for and `config` does not have, each with both values. A later
/// fragment overrides an earlier one.
pub fn lost(fragments: &str, config: &str) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in fragments.lines().filter_map(option) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let lost = |name: &&str| {
        let (wanted, made) = (value(fragments, name), value(config, name));
        (wanted != made).then(|| format!("{name}={wanted} (it became {made})"))
    };
    names.iter().filter_map(lost).collect()
}

/// The options of a fragment that a configuration has too, whatever their values there.
pub fn mentioned(fragment: &str, config: &str) -> String {
    let has = |name: &str| {
        let mut options = config.lines().filter_map(option);
        options.any(|(other, _)| other == name)
    };
    let kept = fragment
        .lines()
        .filter(|line| option(line).is_some_and(|(name, _)| has(name)));
    kept.collect::<Vec<&str>>().join("\n")
}

/// Fragments without options that this kernel does not have.
///
/// # Errors
///
/// Names an option that no fragment asks for anyway.
pub fn without(fragments: &str, names: &[&str]) -> Result<String> {
    for name in names {
        if !fragments
            .lines()
            .filter_map(option)
            .any(|(other, _)| other == *name)
        {
            bail!("kernel/config does not ask for {name}, which some kernel is to do without");
        }
    }
    let keeps = |line: &&str| option(line).is_none_or(|(name, _)| !names.contains(&name));
    Ok(fragments
        .lines()
        .filter(keeps)
        .collect::<Vec<&str>>()
        .join("\n"))
}

/// An error that names every option that was lost.
pub fn check(fragments: &str, config: &str) -> Result<()> {
    let lost = lost(fragments, config);
    if lost.is_empty() {
        return Ok(());
    }
    bail!(
        "the kernel's configuration lost options that kernel/config asks for, probably because \
         something that they depend on is off: {}",
        lost.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAGMENT: &str = "# a comment, CONFIG_NOT=y\nCONFIG_KVM=y\n# CONFIG_SIZE is not set\n\
        CONFIG_VT=n\nCONFIG_NAME=\"-x=y\"\nCONFIG_BITS=17\n";

    #[test]
    fn kept_options_are_no_loss_however_off_is_written() {
        let config = "CONFIG_KVM=y\n# CONFIG_SIZE is not set\nCONFIG_NAME=\"-x=y\"\n\
            CONFIG_BITS=17\nCONFIG_MORE=y\n";
        assert_eq!(lost(FRAGMENT, config), Vec::<String>::new());
        assert!(check(FRAGMENT, config).is_ok());
    }

    #[test]
    fn every_lost_option_is_named_with_what_became_of_it() {
        let config = "# CONFIG_KVM is not set\nCONFIG_SIZE=y\nCONFIG_NAME=\"-x=y\"\nCONFIG_VT=y\n";
        let lost = lost(FRAGMENT, config);
        let expected = [
            "CONFIG_KVM=y (it became n)",
            "CONFIG_SIZE=n (it became y)",
            "CONFIG_VT=n (it became y)",
            "CONFIG_BITS=17 (it became n)",
        ];
        assert_eq!(lost, expected);
        let error = check(FRAGMENT, config).unwrap_err().to_string();
        assert!(error.contains("CONFIG_BITS=17"), "{error}");
    }

    #[test]
    fn built_in_is_not_the_same_as_a_module() {
        assert_eq!(lost("CONFIG_KVM=m\n", "CONFIG_KVM=y\n").len(), 1);
    }

    #[test]
    fn later_fragment_overrides_an_earlier_one() {
        let fragments = "CONFIG_A=y\nCONFIG_A=n\n";
        assert!(lost(fragments, "").is_empty());
        assert_eq!(lost(fragments, "CONFIG_A=y\n").len(), 1);
    }

    #[test]
    fn options_that_a_kernel_does_not_have_are_left_out_by_name() {
        let fragments = "# a comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_AB=y\nCONFIG_A=m";
        let kept = without(fragments, &["CONFIG_A", "CONFIG_B"]).unwrap();
        assert_eq!(kept, "# a comment\nCONFIG_AB=y");
        assert_eq!(without(fragments, &[]).unwrap(), fragments);
        let error = without(fragments, &["CONFIG_C"]).unwrap_err().to_string();
        assert!(error.contains("CONFIG_C"), "{error}");
    }

    #[test]
    fn only_options_that_a_configuration_mentions_are_kept() {
        let config = "CONFIG_A=\"x\"\n# CONFIG_B is not set\nCONFIG_AB=y\n";
        let fragment = "# a comment\nCONFIG_A=\"\"\nCONFIG_B=y\nCONFIG_C=y\n";
        assert_eq!(mentioned(fragment, config), "CONFIG_A=\"\"\nCONFIG_B=y");
        assert_eq!(mentioned(fragment, ""), "");
    }
}
