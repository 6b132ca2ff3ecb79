//! Plots of one run, each as SVG and PNG. They need no fonts on the system.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Once;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use thiserror::Error;

use crate::results::{Results, Scenario};
use crate::stats;

const FONT: &str = "monospace";
const WIDTH: u32 = 1_000;
const ROW: u32 = 24;
const AROUND: u32 = 150;
const GREY: RGBColor = RGBColor(110, 110, 110);
// Okabe and Ito's colours, told apart by colour-blind readers too.
const PALETTE: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// Why a plot could not be made.
#[derive(Debug, Error)]
pub enum PlotError {
    /// The file or its folder could not be written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The plot.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The drawing library refused.
    #[error("{}: {what}", .path.display())]
    Draw {
        /// The plot.
        path: PathBuf,
        /// What it said.
        what: String,
    },
}

type DrawResult<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;
type Area<DB> = DrawingArea<DB, Shift>;
type Chart<'a, DB, X> = ChartContext<'a, DB, Cartesian2d<X, RangedCoordf64>>;
type DrawChart<'a, DB, X> =
    Result<Chart<'a, DB, X>, DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// The plots that a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plot {
    Latency,
    Doorbells,
    Bystander,
    Cpu,
}

impl Plot {
    const ALL: [Self; 4] = [Self::Latency, Self::Doorbells, Self::Bystander, Self::Cpu];

    fn file_stem(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Doorbells => "doorbells",
            Self::Bystander => "bystander",
            Self::Cpu => "cpu",
        }
    }

    /// The scenarios that it shows. Those with wrong values yield no figure.
    fn scenarios(self, run: &Results) -> Vec<&Scenario> {
        let shown = |s: &&Scenario| {
            let bystander = s.name.starts_with("bystander/");
            let growth = s.name.contains('@');
            let plain = !bystander && !growth && s.name.matches('/').count() < 2;
            s.wrong() == 0
                && match self {
                    Self::Latency => plain,
                    Self::Doorbells => growth,
                    Self::Bystander => bystander,
                    Self::Cpu => plain && s.mechanism != "floor",
                }
        };
        let mut scenarios: Vec<&Scenario> = run.scenarios.iter().filter(shown).collect();
        match self {
            Self::Latency | Self::Cpu => {
                scenarios.sort_by_key(|s| (group(s), s.vcpu_ns.p50));
            }
            Self::Doorbells => scenarios.sort_by_key(|s| s.doorbells),
            Self::Bystander => {}
        }
        scenarios
    }

    fn draw<DB: DrawingBackend>(self, run: &Results, root: &Area<DB>) -> DrawResult<DB> {
        let scenarios = self.scenarios(run);
        root.fill(&WHITE)?;
        match self {
            Self::Latency => latency(root, &scenarios),
            Self::Doorbells => doorbells(root, &scenarios),
            Self::Bystander => bystander(root, &scenarios),
            Self::Cpu => cpu(root, &scenarios),
        }?;
        let release = run
            .host
            .kernel
            .as_deref()
            .and_then(|k| k.split(' ').next())
            .unwrap_or("unknown");
        let machine = clean(&format!(
            "{}, KVM {}, kernel {release}; {} run of {}",
            run.host.cpu_model.as_deref().unwrap_or("unknown CPU"),
            run.host.kvm.kind.name(),
            run.provenance.mode.name(),
            run.provenance.date,
        ));
        let (_, height) = root.dim_in_pixel();
        root.draw(&Text::new(
            machine,
            (12, height as i32 - 20),
            (FONT, 13).into_font().color(&GREY),
        ))?;
        root.present()
    }
}

/// Writes every plot that the runs have figures for into `folder` and returns
/// the files. Plots of several runs are numbered, one set per run.
///
/// # Errors
/// The folder or a file cannot be written.
pub fn write_all(runs: &[Results], folder: &Path) -> Result<Vec<PathBuf>, PlotError> {
    register_fonts();
    fs::create_dir_all(folder).map_err(|source| PlotError::Io {
        path: folder.into(),
        source,
    })?;
    let mut written = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        for plot in Plot::ALL {
            let rows = plot.scenarios(run).len() as u32;
            if rows == 0 {
                continue;
            }
            let rows = if plot == Plot::Doorbells { 16 } else { rows };
            let size = (WIDTH, rows * ROW + AROUND);
            let number = if runs.len() == 1 {
                String::new()
            } else {
                format!("{}-", index + 1)
            };
            let path = |kind| folder.join(format!("{number}{}.{kind}", plot.file_stem()));
            let refused = |path: &Path, e: &dyn std::fmt::Display| PlotError::Draw {
                path: path.into(),
                what: e.to_string(),
            };

            let (svg, mut text) = (path("svg"), String::new());
            plot.draw(
                run,
                &SVGBackend::with_string(&mut text, size).into_drawing_area(),
            )
            .map_err(|e| refused(&svg, &e))?;
            fs::write(&svg, text).map_err(|source| PlotError::Io {
                path: svg.clone(),
                source,
            })?;
            let png = path("png");
            plot.draw(run, &BitMapBackend::new(&png, size).into_drawing_area())
                .map_err(|e| refused(&png, &e))?;
            written.extend([svg, png]);
        }
    }
    Ok(written)
}

fn register_fonts() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // The font is a constant of its crate: the tests draw with it.
        let registered = register_font(FONT, FontStyle::Normal, epaint_default_fonts::HACK_REGULAR);
        debug_assert!(registered.is_ok());
    });
}

/// p50 to p99 per scenario, with marks at p50, p90 and p99.
fn latency<DB: DrawingBackend>(root: &Area<DB>, scenarios: &[&Scenario]) -> DrawResult<DB> {
    let low = scenarios
        .iter()
        .map(|s| s.vcpu_ns.p50)
        .min()
        .unwrap_or(1)
        .max(1) as f64;
    let high = scenarios.iter().map(|s| s.vcpu_ns.p99).max().unwrap_or(1) as f64;
    let range = (low / 1.5..(high * 1.5).max(low * 3.0)).log_scale();
    let title = "vCPU time per access: p50 (thick mark), p90, p99";
    let mut chart = rows(
        root,
        title,
        "vCPU time per access (log scale)",
        range,
        &names(scenarios),
    )?;
    for (series, operation) in operations(scenarios).into_iter().enumerate() {
        let color = PALETTE[series % PALETTE.len()];
        let mine = || {
            scenarios
                .iter()
                .enumerate()
                .filter(|(_, s)| s.operation == operation)
        };
        let center = |row: usize| (scenarios.len() - row) as f64 - 0.5;
        let bars = mine().map(|(row, s)| {
            let (from, to) = ((s.vcpu_ns.p50.max(1)) as f64, s.vcpu_ns.p99.max(1) as f64);
            Rectangle::new(
                [(from, center(row) - 0.18), (to, center(row) + 0.18)],
                color.mix(0.45).filled(),
            )
        });
        chart
            .draw_series(bars)?
            .label(clean(&operation))
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled()));
        let marks = mine().flat_map(|(row, s)| {
            let mark = |ns: u64, width| {
                let at = |offset: f64| (ns.max(1) as f64, center(row) + offset);
                PathElement::new(vec![at(-0.32), at(0.32)], color.stroke_width(width))
            };
            [
                mark(s.vcpu_ns.p50, 4),
                mark(s.vcpu_ns.p90, 2),
                mark(s.vcpu_ns.p99, 2),
            ]
        });
        chart.draw_series(marks)?;
    }
    legend(&mut chart)
}

/// Whole decades around a range, so that a log axis has labels.
fn decades(low: f64, high: f64) -> Range<f64> {
    let from = low.log10().floor();
    10f64.powf(from)..10f64.powf(high.log10().ceil().max(from + 1.0))
}

/// How the cost grows with the number of registered doorbells.
fn doorbells<DB: DrawingBackend>(root: &Area<DB>, scenarios: &[&Scenario]) -> DrawResult<DB> {
    let times: Vec<f64> = scenarios.iter().map(|s| typical(s).max(1.0)).collect();
    let low = times.iter().copied().fold(f64::INFINITY, f64::min);
    let high = times.iter().copied().fold(1.0, f64::max);
    let most = scenarios
        .iter()
        .map(|s| s.doorbells)
        .max()
        .unwrap_or(1)
        .max(2);
    let mut chart = ChartBuilder::on(root)
        .caption(
            "vCPU time per posted doorbell over the number of doorbells",
            (FONT, 18),
        )
        .margin(14)
        .margin_bottom(34)
        .x_label_area_size(50)
        .y_label_area_size(90)
        .build_cartesian_2d(
            (0.8..f64::from(most) * 1.25).log_scale(),
            decades(low, high).log_scale(),
        )?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GREY.mix(0.25))
        .label_style((FONT, 13))
        .axis_desc_style((FONT, 14))
        .y_labels(20)
        .x_desc("registered doorbells (log scale)")
        .y_desc("vCPU time per access (log scale)")
        .x_label_formatter(&|n| format!("{n:.0}"))
        .y_label_formatter(&|ns| time(*ns))
        .draw()?;
    let stems = scenarios
        .iter()
        .filter_map(|s| Some(s.name.split_once('@')?.0))
        .fold(Vec::new(), |mut seen, stem| {
            if !seen.contains(&stem) {
                seen.push(stem);
            }
            seen
        });
    for (series, stem) in stems.into_iter().enumerate() {
        let color = PALETTE[series % PALETTE.len()];
        let mine = |s: &&&Scenario| s.name.split_once('@').is_some_and(|(of, _)| of == stem);
        let points = scenarios
            .iter()
            .filter(mine)
            .map(|s| (f64::from(s.doorbells.max(1)), typical(s).max(1.0)));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(4))?
            .label(clean(stem))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 14, y)], color.stroke_width(3)));
    }
    legend(&mut chart)
}

/// What the attached program costs other VMs.
fn bystander<DB: DrawingBackend>(root: &Area<DB>, scenarios: &[&Scenario]) -> DrawResult<DB> {
    let high = scenarios.iter().map(|s| typical(s)).fold(1.0, f64::max);
    let title = "Access of a VM that is not ours, without and with the program attached";
    let axis = "mean vCPU time per access (median of rounds)";
    let mut chart = rows(root, title, axis, 0.0..high * 1.15, &names(scenarios))?;
    for (row, s) in scenarios.iter().enumerate() {
        let color = PALETTE[usize::from(s.name.ends_with("+attached"))];
        chart.draw_series([bar(scenarios.len() - row, 0.0, typical(s), color)])?;
        note(root, &chart, typical(s), scenarios.len() - row)?;
    }
    Ok(())
}

/// CPU time per access: of the vCPU, and on top of it of the device task.
fn cpu<DB: DrawingBackend>(root: &Area<DB>, scenarios: &[&Scenario]) -> DrawResult<DB> {
    let high = scenarios
        .iter()
        .map(|s| s.cpu_ns_per_access.total())
        .fold(1.0, f64::max);
    let title = "CPU time per access, vCPU and device task together";
    let mut chart = rows(
        root,
        title,
        "CPU time per access",
        0.0..high * 1.15,
        &names(scenarios),
    )?;
    let row = |index: usize| scenarios.len() - index;
    let (of_vcpu, of_device) = (PALETTE[0], PALETTE[4]);
    chart
        .draw_series(
            scenarios
                .iter()
                .enumerate()
                .map(|(i, s)| bar(row(i), 0.0, s.cpu_ns_per_access.vcpu, of_vcpu)),
        )?
        .label("vCPU thread")
        .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], of_vcpu.filled()));
    chart
        .draw_series(scenarios.iter().enumerate().map(|(i, s)| {
            bar(
                row(i),
                s.cpu_ns_per_access.vcpu,
                s.cpu_ns_per_access.total(),
                of_device,
            )
        }))?
        .label("device task")
        .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], of_device.filled()));
    for (i, s) in scenarios.iter().enumerate() {
        note(root, &chart, s.cpu_ns_per_access.total(), row(i))?;
    }
    legend(&mut chart)
}

/// A chart with one labelled row per name; row `i` from the top lies between
/// `names.len() - i - 1` and `names.len() - i`.
fn rows<'a, DB: DrawingBackend, X>(
    root: &'a Area<DB>,
    title: &str,
    axis: &str,
    x: X,
    names: &[String],
) -> DrawChart<'a, DB, X::CoordDescType>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(root)
        .caption(title, (FONT, 18))
        .margin(14)
        .margin_bottom(34)
        .x_label_area_size(50)
        .y_label_area_size(300)
        .build_cartesian_2d(x, 0.0..names.len() as f64)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GREY.mix(0.25))
        .y_labels(0)
        .label_style((FONT, 13))
        .axis_desc_style((FONT, 14))
        .x_desc(axis)
        .x_label_formatter(&|ns| time(*ns))
        .draw()?;
    let (
        Range { start: left, .. },
        Range {
            start: top,
            end: bottom,
        },
    ) = chart.plotting_area().get_pixel_range();
    let style = (FONT, 13)
        .into_font()
        .color(&BLACK)
        .pos(Pos::new(HPos::Right, VPos::Center));
    for (row, name) in names.iter().enumerate() {
        let y = top + ((bottom - top) as f64 * (row as f64 + 0.5) / names.len() as f64) as i32;
        root.draw(&Text::new(name.clone(), (left - 8, y), style.clone()))?;
    }
    Ok(chart)
}

fn bar(top: usize, from: f64, to: f64, color: RGBColor) -> Rectangle<(f64, f64)> {
    let top = top as f64;
    Rectangle::new([(from, top - 0.8), (to, top - 0.2)], color.filled())
}

/// The figure in words, right of its bar.
fn note<DB: DrawingBackend>(
    root: &Area<DB>,
    chart: &Chart<'_, DB, RangedCoordf64>,
    ns: f64,
    top: usize,
) -> DrawResult<DB> {
    let (x, y) = chart
        .plotting_area()
        .map_coordinate(&(ns, top as f64 - 0.5));
    let style = (FONT, 13)
        .into_font()
        .color(&GREY)
        .pos(Pos::new(HPos::Left, VPos::Center));
    root.draw(&Text::new(time(ns), (x + 6, y), style))
}

fn legend<'a, DB: DrawingBackend + 'a, C: CoordTranslate>(
    chart: &mut ChartContext<'a, DB, C>,
) -> DrawResult<DB> {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(GREY.mix(0.5))
        .label_font((FONT, 13))
        .draw()
}

/// The mean vCPU time of a typical round, as the claims use it.
fn typical(s: &Scenario) -> f64 {
    stats::median(&s.round_means_ns).unwrap_or(s.vcpu_ns.mean)
}

fn operations(scenarios: &[&Scenario]) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for s in scenarios {
        if !seen.contains(&s.operation) {
            seen.push(s.operation.clone());
        }
    }
    seen
}

/// Floors first, then by operation.
fn group(s: &Scenario) -> (bool, String) {
    (s.mechanism != "floor", s.operation.clone())
}

fn names(scenarios: &[&Scenario]) -> Vec<String> {
    scenarios
        .iter()
        .map(|s| clean(&s.name).chars().take(40).collect())
        .collect()
}

/// Control characters have no place in a picture, nor in XML.
fn clean(text: &str) -> String {
    text.replace(char::is_control, "?")
}

fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let digits = if value < 10.0 {
        2
    } else {
        usize::from(value < 100.0)
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text} {unit}")
}

#[cfg(test)]
mod tests;
