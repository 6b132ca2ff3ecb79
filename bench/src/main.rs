//! `ioregion-bench`: reports what carrying a guest access costs.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use ioregion_bench::report::{self, Format};
use ioregion_bench::results::Results;
use ioregion_bench::{plot, report::update_readme};

/// Measures what carrying one guest access costs, per mechanism.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tables and plots of one or several results files.
    Report {
        /// Results files; absolute times of different files are never mixed.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Print Markdown instead of aligned text.
        #[arg(long)]
        markdown: bool,
        /// Replace the results section of this README.
        #[arg(long, value_name = "FILE")]
        readme: Option<PathBuf>,
        /// Write SVG and PNG plots into this folder.
        #[arg(long, value_name = "DIR")]
        plots: Option<PathBuf>,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Report {
            files,
            markdown,
            readme,
            plots,
        } => {
            let runs = files
                .iter()
                .map(|path| Results::load(path))
                .collect::<Result<Vec<_>, _>>()?;
            let format = if markdown {
                Format::Markdown
            } else {
                Format::Text
            };
            let text = report::render(&runs, format);
            io::stdout()
                .write_all(text.as_bytes())
                .context("report not printed")?;
            if let Some(readme) = readme {
                update_readme(&readme, &runs).context("README not updated")?;
            }
            if let Some(folder) = plots {
                for path in plot::write_all(&runs, &folder).context("plots not written")? {
                    eprintln!("wrote {}", path.display());
                }
            }
            Ok(())
        }
    }
}
