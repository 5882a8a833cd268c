//! What was measured, as tables for people and as JSON for programs.

use std::collections::HashMap;
use std::time::Duration;

use blockmount::Step;
use comfy_table::CellAlignment;
use serde::Serialize;

use crate::report::{milliseconds, table};
use crate::speed::Passed;

/// The steps of a disk, in their order.
const STEPS: [Step; 5] = [
    Step::Attach,
    Step::Mount,
    Step::Unmount,
    Step::Unplug,
    Step::Detach,
];

/// All that was measured. Its JSON form is this structure, field by field; times are in milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct BenchReport {
    /// Where the disks were mounted: `local` for this machine, `qemu` for a virtual one.
    pub(crate) guest: &'static str,
    /// How often each was measured.
    pub(crate) rounds: usize,
    pub(crate) sizes: Vec<SizeReport>,
}

/// So many disks, all at once.
#[derive(Debug, Serialize)]
pub(crate) struct SizeReport {
    pub(crate) disks: usize,
    /// From the first request until the last disk is mounted.
    pub(crate) up: Beside,
    /// From the first release until the last disk is taken out.
    pub(crate) down: Beside,
    pub(crate) steps: Vec<StepReport>,
    /// The same disks with a manager that keeps what is released, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lingering: Option<LingeringReport>,
}

/// Disks that linger after their release, and are shared again.
#[derive(Debug, Serialize)]
pub(crate) struct LingeringReport {
    pub(crate) up: Lingered,
    pub(crate) down: Lingered,
}

/// One figure of disks that linger.
#[derive(Debug, Serialize)]
pub(crate) struct Lingered {
    pub(crate) ours: Quantiles,
    /// Of the median to that of ours without lingering.
    pub(crate) ratio: f64,
}

/// One figure of ours and of the floor.
#[derive(Debug, Serialize)]
pub(crate) struct Beside {
    pub(crate) ours: Quantiles,
    /// Bare commands and system calls, in the same rounds.
    pub(crate) floor: Quantiles,
    /// Of the medians.
    pub(crate) ratio: f64,
}

/// Each call of one step.
#[derive(Debug, Serialize)]
pub(crate) struct StepReport {
    pub(crate) step: String,
    pub(crate) ours: Quantiles,
    /// Where there is something barer than what a backend does.
    pub(crate) floor: Option<Quantiles>,
}

/// Nearest-rank percentiles, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
}

/// All rounds of one kind.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    up: Vec<Duration>,
    down: Vec<Duration>,
    steps: HashMap<Step, Vec<Duration>>,
}

/// What was measured of so many disks.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) ours: Rounds,
    pub(crate) floor: Rounds,
    pub(crate) lingering: Option<Rounds>,
}

impl Rounds {
    pub(crate) fn add(&mut self, passed: Passed) {
        self.up.push(passed.up);
        self.down.push(passed.down);
        for (step, times) in passed.steps {
            self.steps.entry(step).or_default().extend(times);
        }
    }
}

impl Quantiles {
    /// None of nothing.
    fn of(times: &[Duration]) -> Option<Self> {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().map(milliseconds)
        };
        Some(Quantiles {
            p50: rank(50)?,
            p90: rank(90)?,
            p99: rank(99)?,
        })
    }
}

impl Lingered {
    fn of(times: &[Duration], without: &Beside) -> Self {
        let ours = Quantiles::of(times).expect(ONE_ROUND);
        // It is a small part.
        let ratio = (ours.p50 / without.ours.p50 * 10_000.0).round() / 10_000.0;
        Lingered { ours, ratio }
    }
}

const ONE_ROUND: &str = "there is at least one round";

impl Beside {
    fn of(ours: &[Duration], floor: &[Duration]) -> Self {
        let of = |times| Quantiles::of(times).expect(ONE_ROUND);
        let (ours, floor) = (of(ours), of(floor));
        let ratio = (ours.p50 / floor.p50 * 100.0).round() / 100.0;
        Beside { ours, floor, ratio }
    }
}

impl SizeReport {
    pub(crate) fn of(disks: usize, measured: &Measured) -> Self {
        let Measured {
            ours,
            floor,
            lingering,
        } = measured;
        let (up, down) = (
            Beside::of(&ours.up, &floor.up),
            Beside::of(&ours.down, &floor.down),
        );
        let lingering = lingering.as_ref().map(|lingering| LingeringReport {
            up: Lingered::of(&lingering.up, &up),
            down: Lingered::of(&lingering.down, &down),
        });
        let times = |rounds: &Rounds, step| Quantiles::of(rounds.steps.get(&step)?);
        let steps = STEPS.into_iter().filter_map(|step| {
            Some(StepReport {
                step: step.to_string(),
                ours: times(ours, step)?,
                floor: times(floor, step),
            })
        });
        SizeReport {
            disks,
            up,
            down,
            steps: steps.collect(),
            lingering,
        }
    }

    /// The lines of the table: all disks up and down, and then each step of a disk.
    fn rows(&self) -> Vec<[String; 7]> {
        let figure = |time: f64| format!("{time:.2}");
        let row = |what: &str, ours: &Quantiles, floor: Option<&Quantiles>, ratio: String| {
            [
                String::new(),
                what.to_owned(),
                figure(ours.p50),
                figure(ours.p90),
                figure(ours.p99),
                floor.map_or_else(String::new, |floor| figure(floor.p50)),
                ratio,
            ]
        };
        let whole = [("up", &self.up), ("down", &self.down)];
        let whole = whole.map(|(what, beside)| {
            let ratio = figure(beside.ratio);
            row(what, &beside.ours, Some(&beside.floor), ratio)
        });
        // Of steps there is no ratio: those of the floor wait neither for their turn nor for a device.
        let steps = self.steps.iter().map(|step| {
            let name = format!("  {}", step.step);
            row(&name, &step.ours, step.floor.as_ref(), String::new())
        });
        let lingering = self.lingering.iter().flat_map(|lingering| {
            let both = [("up again", &lingering.up), ("lingers", &lingering.down)];
            both.map(|(what, lingered)| {
                let ratio = format!("{:.4}", lingered.ratio);
                row(what, &lingered.ours, None, ratio)
            })
        });
        let mut rows: Vec<_> = whole.into_iter().chain(steps).chain(lingering).collect();
        rows[0][0] = self.disks.to_string();
        rows
    }
}

impl BenchReport {
    /// Everything, for people.
    pub(crate) fn to_text(&self) -> String {
        let header = ["disks", "ms", "p50", "p90", "p99", "floor p50", "ratio"];
        let mut table = table(&header);
        for size in &self.sizes {
            table.add_rows(size.rows());
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let floor = match self.guest {
            "local" => "bare system calls, one disk after the other",
            _ => "bare commands for QEMU and bare mounts in the guest",
        };
        let lingers = match self.sizes.iter().any(|size| size.lingering.is_some()) {
            true => "up again, lingers: of disks that linger; the ratio is to up and down\n",
            false => "",
        };
        format!(
            "{table}\nup, down: from the first disk to the last, all at once\n\
             steps: each call, with what it waits for; {} rounds\nfloor: {floor}\n{lingers}",
            self.rounds
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let times: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        let quantiles = Quantiles::of(&times).unwrap();
        assert_eq!(
            (quantiles.p50, quantiles.p90, quantiles.p99),
            (100.0, 180.0, 198.0)
        );
        let one = Quantiles::of(&times[..1]).unwrap();
        assert_eq!((one.p50, one.p90, one.p99), (200.0, 200.0, 200.0));
        assert_eq!(Quantiles::of(&[]), None);
    }

    #[test]
    fn a_ratio_is_of_medians_and_a_step_without_a_floor_has_none() {
        let passed = |milliseconds, step| Passed {
            up: Duration::from_millis(milliseconds),
            down: Duration::from_millis(1),
            steps: HashMap::from([(step, vec![Duration::from_millis(2)])]),
        };
        let mut measured = Measured::default();
        for milliseconds in [4, 6, 50] {
            measured.ours.add(passed(milliseconds, Step::Detach));
            measured.floor.add(passed(milliseconds / 2, Step::Attach));
        }
        let mut lingering = Rounds::default();
        lingering.add(Passed {
            up: Duration::from_micros(3),
            down: Duration::from_micros(2),
            steps: HashMap::new(),
        });
        measured.lingering = Some(lingering);
        let report = SizeReport::of(64, &measured);
        assert_eq!(report.up.ratio, 2.0);
        let lingering = report.lingering.as_ref().unwrap();
        assert_eq!((lingering.up.ratio, lingering.down.ratio), (0.0005, 0.002));
        let [step] = &report.steps[..] else {
            panic!("{report:?}");
        };
        assert_eq!(step.step, "detach");
        assert!(step.floor.is_none());
        let report = BenchReport {
            guest: "local",
            rounds: 3,
            sizes: vec![report],
        };
        let text = report.to_text();
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
    }
}
