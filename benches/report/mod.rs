//! What the benches of one run found, against baselines and targets, as one table.
//!
//! ```ignore
//! let report = Report::begin();
//! // ... run criterion ...
//! report.print(&[Row::new("join a mount", "join/256_live").baseline("scan/256_live").target(Target::MaxNanos(200.0))]);
//! ```
//!
//! Nothing is asserted: a target that is missed on a loaded machine is to be seen, not to fail.

// Each bench is a program of its own, and not all of them have every kind of target.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use comfy_table::{Table, presets};

/// A line of the table. Benches are named as in criterion's folders: `group/function/parameter`.
pub(crate) struct Row {
    what: String,
    ours: String,
    baseline: Option<String>,
    targets: Vec<Target>,
    /// A line that was measured by other means.
    fixed: Option<[String; 6]>,
}

/// Two things that are not times, side by side.
pub(crate) struct Beside {
    pub(crate) ours: String,
    pub(crate) baseline: String,
    pub(crate) ratio: f64,
}

/// What ours should reach.
pub(crate) enum Target {
    /// So many nanoseconds or fewer.
    MaxNanos(f64),
    /// The baseline takes at least so many times longer.
    MinRatio(f64),
    /// The slowest of ours and the others takes at most `factor` times as long as the fastest.
    FlatWithin { of: Vec<String>, factor: f64 },
    /// At most so many nanoseconds more than the baseline; how many they are is shown.
    MaxAdded(f64),
    /// At most `factor` times as long as the baseline, for a floor that nothing can beat.
    WithinBaseline { factor: f64 },
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, ours: impl Into<String>) -> Self {
        Row {
            what: what.into(),
            ours: ours.into(),
            baseline: None,
            targets: Vec::new(),
            fixed: None,
        }
    }

    /// Something that is not a time: shown as it is.
    pub(crate) fn measured(what: &str, ours: String, target: &str, met: bool) -> Self {
        let met = if met { "yes" } else { "NO" };
        let [what, target, met] = [what, target, met].map(str::to_owned);
        let fixed = Some([what, ours, "-".into(), "-".into(), target, met]);
        Row {
            fixed,
            ..Row::new("", "")
        }
    }

    /// The same with a baseline.
    pub(crate) fn compared(what: &str, beside: Beside, target: &str, met: bool) -> Self {
        let mut row = Row::measured(what, beside.ours, target, met);
        if let Some([_, _, baseline, ratio, ..]) = &mut row.fixed {
            *baseline = beside.baseline;
            *ratio = format!("{:.2}", beside.ratio);
        }
        row
    }

    pub(crate) fn baseline(mut self, bench: impl Into<String>) -> Self {
        self.baseline = Some(bench.into());
        self
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.targets.push(target);
        self
    }
}

/// Knows when the run began, so that it does not show estimates of an earlier one.
pub(crate) struct Report {
    began: SystemTime,
}

impl Report {
    pub(crate) fn begin() -> Self {
        Report {
            began: SystemTime::now(),
        }
    }

    /// Prints the rows that were measured in this run, if any.
    pub(crate) fn print(&self, rows: &[Row]) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_BORDERS_ONLY);
        table.set_header(["what", "ours", "baseline", "ratio", "target", "met"]);
        let mut lines = 0;
        for line in rows.iter().filter_map(|row| self.line(row)) {
            table.add_row(line);
            lines += 1;
        }
        if lines > 0 {
            println!("{table}");
        }
    }

    fn line(&self, row: &Row) -> Option<[String; 6]> {
        if row.fixed.is_some() {
            return row.fixed.clone();
        }
        let ours = self.nanos(&row.ours)?;
        let baseline = row.baseline.as_deref().and_then(|bench| self.nanos(bench));
        let ratio = baseline.map(|baseline| baseline / ours);
        let mut shown_ratio = ratio;
        let (mut targets, mut met) = (Vec::new(), Vec::new());
        for target in &row.targets {
            let (text, reached) = match target {
                Target::MaxNanos(most) => (format!("<= {}", time(*most)), Some(ours <= *most)),
                Target::MinRatio(least) => {
                    (format!(">= {least} x"), ratio.map(|ratio| ratio >= *least))
                }
                Target::FlatWithin { of, factor } => {
                    shown_ratio = self.spread(ours, of);
                    (
                        format!("flat within {factor} x"),
                        shown_ratio.map(|spread| spread <= *factor),
                    )
                }
                Target::MaxAdded(most) => {
                    let added = baseline.map(|baseline| ours - baseline);
                    let shown = added.map_or_else(String::new, |added| {
                        format!(
                            " (it is {} {})",
                            if added < 0.0 { "-" } else { "+" },
                            time(added.abs())
                        )
                    });
                    let text = format!("<= baseline + {}{shown}", time(*most));
                    (text, added.map(|added| added <= *most))
                }
                Target::WithinBaseline { factor } => {
                    let reached = ratio.map(|ratio| 1.0 / ratio <= *factor);
                    (format!("<= {factor} x baseline"), reached)
                }
            };
            targets.push(text);
            met.push(match reached {
                Some(true) => "yes",
                Some(false) => "NO",
                None => "not measured",
            });
        }
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        Some([
            row.what.clone(),
            time(ours),
            or_dash(baseline.map(time)),
            or_dash(shown_ratio.map(|ratio| format!("{ratio:.1}"))),
            targets.join("\n"),
            met.join("\n"),
        ])
    }

    /// The slowest over the fastest; nothing if one of them was not measured.
    fn spread(&self, ours: f64, others: &[String]) -> Option<f64> {
        let others: Option<Vec<f64>> = others.iter().map(|bench| self.nanos(bench)).collect();
        let all = || others.iter().flatten().copied().chain([ours]);
        others.as_ref()?;
        Some(all().fold(f64::MIN, f64::max) / all().fold(f64::MAX, f64::min))
    }

    /// The median time of a bench in this run.
    fn nanos(&self, bench: &str) -> Option<f64> {
        let path = criterion_folder().join(bench).join("new/estimates.json");
        if std::fs::metadata(&path).ok()?.modified().ok()? < self.began {
            return None;
        }
        let estimates = std::fs::read_to_string(path).ok()?;
        let estimates: serde_json::Value = serde_json::from_str(&estimates).ok()?;
        estimates["median"]["point_estimate"].as_f64()
    }
}

/// Where criterion writes, by its own rules.
fn criterion_folder() -> PathBuf {
    let of = |variable| std::env::var_os(variable).map(PathBuf::from);
    of("CRITERION_HOME")
        .or_else(|| of("CARGO_TARGET_DIR").map(|target| target.join("criterion")))
        .unwrap_or_else(|| workspace().join("target/criterion"))
}

/// The folder with the lock file: the bench may be of a crate further down.
fn workspace() -> &'static Path {
    let this = Path::new(env!("CARGO_MANIFEST_DIR"));
    let locked = |folder: &&Path| folder.join("Cargo.lock").exists();
    this.ancestors().find(locked).unwrap_or(this)
}

fn time(nanos: f64) -> String {
    match nanos {
        ..1e3 => format!("{nanos:.1} ns"),
        ..1e6 => format!("{:.1} us", nanos / 1e3),
        _ => format!("{:.1} ms", nanos / 1e6),
    }
}
