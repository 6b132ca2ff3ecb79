//! The table of disks.

use super::{Burst, Disks, Row};
use crate::report::Format;
use crate::results::Claim;
use crate::stats::median;
use crate::table::Table;

impl Disks {
    /// The table, with what it rests on.
    #[must_use]
    pub fn render(&self, format: Format) -> String {
        let mut table = Table::new(
            "Disks over VDUSE: ours / qemu-storage-daemon",
            [
                "load",
                ">requests/s",
                ">theirs",
                ">ratio (95 % interval)",
                "verdict",
                ">CPU µs per request",
                ">theirs",
                ">ratio (95 % interval)",
                "verdict",
            ],
        );
        for row in &self.rows {
            table.push(self.cells(row));
        }
        let kib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
        let (ours, theirs) = (self.ours, self.theirs);
        let memory = format!(
            "Resident memory at rest, before and after the load: {} and {} MiB, theirs {} and {} MiB \
             (claim vduse-rss: {}).",
            kib(ours.before),
            kib(ours.after),
            kib(theirs.before),
            kib(theirs.after),
            self.claim("vduse-rss").map_or("no verdict", verdict),
        );
        let both = format!("Both sides: {}.", self.settings.both.join(", "));
        let made = format!("{}: {}", self.provenance.line(), self.host.line());
        match format {
            Format::Text => {
                let (ours, theirs) = (&self.settings.ours, &self.settings.theirs);
                format!(
                    "{made}\n{both}\n  ours:   {ours}\n  theirs: {theirs}\n\n{}\n{memory}\n",
                    table.text()
                )
            }
            Format::Markdown => {
                format!("{made}\n\n{both}\n\n{}\n{memory}\n", table.markdown())
            }
        }
    }

    fn claim(&self, id: &str) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.id == id)
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let name = row.load.name();
        let middle = |side: &[Burst], figure: fn(&Burst) -> f64, digits: usize| {
            let figures: Vec<f64> = side.iter().map(figure).collect();
            median(&figures).map_or_else(String::new, |f| format!("{f:.digits$}"))
        };
        let kib = row.load.bytes >> 10;
        let mut cells = vec![format!("{name}, {kib} KiB")];
        for (what, figure, digits) in [
            ("iops", (|burst| burst.rate) as fn(&Burst) -> f64, 0),
            ("cpu", |burst| burst.cpu_ns / 1000.0, 2),
        ] {
            cells.push(middle(&row.ours, figure, digits));
            cells.push(middle(&row.theirs, figure, digits));
            let claim = self.claim(&format!("vduse-blk-{name}-{what}"));
            let ratio = claim.and_then(|claim| claim.value.zip(claim.ci95));
            cells.push(match (ratio, claim) {
                (Some((value, [low, high])), _) => format!("{value:.3} ({low:.3} to {high:.3})"),
                (None, Some(claim)) => claim.note.clone(),
                (None, None) => String::new(),
            });
            cells.push(claim.map_or("", verdict).into());
        }
        cells
    }
}

fn verdict(claim: &Claim) -> &'static str {
    match claim.holds {
        Some(true) => "holds",
        Some(false) => "MISS",
        None => "no verdict",
    }
}
