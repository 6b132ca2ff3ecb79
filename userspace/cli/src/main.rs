//! `ioregion`: devices in user space.

mod vduse;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Devices in user space.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Devices for this machine's kernel, or for a VMM, over VDUSE
    #[command(subcommand)]
    Vduse(vduse::Command),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let result = match Cli::parse().command {
        Command::Vduse(command) => vduse::run(&command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_of_each_device_has_an_example() {
        let mut command = Cli::command();
        let vduse = command.find_subcommand_mut("vduse").unwrap();
        for device in vduse.get_subcommands_mut() {
            let help = device.render_long_help().to_string();
            let example = help
                .lines()
                .find_map(|line| line.trim().strip_prefix("ioregion "))
                .unwrap();
            let words = std::iter::once("ioregion").chain(example.split_whitespace());
            Cli::try_parse_from(words).unwrap();
        }
    }

    #[test]
    fn network_devices_want_an_address_of_an_interface_and_room_for_large_packets() {
        let parse = |option: &str, value: &str| {
            let line = ["ioregion", "vduse", "net", "--name", "x", "--tap", "y"];
            Cli::try_parse_from(line.into_iter().chain([option, value]))
        };
        for (option, value, fine) in [
            ("--mac", "52:54:00:12:34:56", true),
            ("--mac", "01:00:5e:00:00:01", false),
            ("--mac", "52:54:00:12:34", false),
            ("--queue-size", "64", true),
            ("--queue-size", "1024", true),
            ("--queue-size", "32", false),
            ("--queue-size", "100", false),
            ("--queue-size", "2048", false),
            ("--without", "offloads", true),
            ("--without", "mergeable-buffers", true),
            ("--without", "packets", false),
        ] {
            let parsed = parse(option, value);
            assert_eq!(parsed.is_ok(), fine, "{option} {value}");
            // Why not is said, with what would be right.
            if let Err(error) = parsed {
                assert!(error.to_string().contains(value), "{error}");
            }
        }
    }

    #[test]
    fn sizes_that_make_no_queue_are_refused() {
        let parse = |size: &str| {
            let line = ["ioregion", "vduse", "blk", "--name", "x", "--image", "y"];
            Cli::try_parse_from(line.into_iter().chain(["--queue-size", size]))
        };
        for size in ["0", "3", "1", "2048", "65536", "-2"] {
            assert!(parse(size).is_err(), "{size}");
        }
        for size in ["2", "256", "1024"] {
            assert!(parse(size).is_ok(), "{size}");
        }
    }
}
