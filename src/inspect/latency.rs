//! How long the calls of each step have taken, in a fixed number of counters.

use std::time::Duration;

use parking_lot::Mutex;

use super::{StepBucket, StepStatus};
use crate::Step;

/// The steps whose calls are timed, in the order of a disk's life.
const STEPS: [Step; 9] = [
    Step::Attach,
    Step::Mount,
    Step::Combine,
    Step::Bind,
    Step::Unbind,
    Step::Separate,
    Step::Unmount,
    Step::Unplug,
    Step::Detach,
];

/// Each power of two microseconds is divided into so many counters, two to the power of this.
const DIVISION_BITS: u32 = 4;
const DIVISIONS: usize = 1 << DIVISION_BITS;
/// What takes longer than two to the power of this, in microseconds, is counted with what takes that long: 19 hours.
const LONGEST_BITS: u32 = 36;
const COUNTERS: usize = (LONGEST_BITS - DIVISION_BITS + 1) as usize * DIVISIONS;
/// The bounds that are shown: from 64 microseconds to 67 seconds.
const SHOWN_BITS: std::ops::RangeInclusive<u32> = 6..=26;

/// The times of all steps.
#[derive(Default)]
pub(crate) struct Latencies([Mutex<Times>; STEPS.len()]);

#[derive(Default)]
struct Times {
    succeeded: u64,
    failed: u64,
    total: Duration,
    longest: Duration,
    /// Empty before the first call.
    counters: Vec<u64>,
}

impl Latencies {
    /// Takes in a call. Held for it is a lock of this step alone.
    pub(super) fn took(&self, step: Step, time: Duration) {
        if let Some(mut times) = self.of(step) {
            times.took(time);
        }
    }

    pub(super) fn failed(&self, step: Step) {
        if let Some(mut times) = self.of(step) {
            times.failed += 1;
        }
    }

    fn of(&self, step: Step) -> Option<parking_lot::MutexGuard<'_, Times>> {
        let index = STEPS.iter().position(|timed| *timed == step)?;
        Some(self.0[index].lock())
    }

    /// The steps that were called.
    pub(super) fn read(&self) -> Vec<StepStatus> {
        let steps = STEPS.iter().zip(&self.0);
        steps
            .filter_map(|(step, times)| times.lock().status(*step))
            .collect()
    }
}

impl Times {
    fn took(&mut self, time: Duration) {
        self.succeeded += 1;
        self.total = self.total.saturating_add(time);
        self.longest = self.longest.max(time);
        if self.counters.is_empty() {
            self.counters.resize(COUNTERS, 0);
        }
        self.counters[counter_of(time)] += 1;
    }

    fn status(&self, step: Step) -> Option<StepStatus> {
        (self.succeeded + self.failed > 0).then(|| StepStatus {
            step,
            succeeded: self.succeeded,
            failed: self.failed,
            total_seconds: self.total.as_secs_f64(),
            p50_seconds: self.percentile(50),
            p90_seconds: self.percentile(90),
            p99_seconds: self.percentile(99),
            max_seconds: self.longest.as_secs_f64(),
            buckets: self.buckets(),
        })
    }

    /// The time that so many of a hundred calls did not exceed, in seconds.
    fn percentile(&self, percent: u64) -> f64 {
        let wanted = (u128::from(self.succeeded) * u128::from(percent)).div_ceil(100);
        let mut seen = 0_u128;
        let reached = self.counters.iter().position(|count| {
            seen += u128::from(*count);
            seen >= wanted
        });
        let bound = reached.map_or(Duration::ZERO, bound_of);
        bound.min(self.longest).as_secs_f64()
    }

    fn buckets(&self) -> Vec<StepBucket> {
        let bucket = |bits: u32| {
            let bound = Duration::from_micros(1 << bits);
            let below = self.counters.iter().take(counter_of(bound));
            StepBucket {
                below_seconds: bound.as_secs_f64(),
                count: below.sum(),
            }
        };
        SHOWN_BITS.map(bucket).collect()
    }
}

/// The counter of a time: short times by the microsecond, others by their highest bits.
fn counter_of(time: Duration) -> usize {
    let longest = (1_u64 << LONGEST_BITS) - 1;
    // In 64 bits, which are enough for what is counted at all.
    let micros = time.as_secs().saturating_mul(1_000_000);
    let micros = micros.saturating_add(time.subsec_micros().into());
    let micros = micros.min(longest);
    let shift = micros
        .checked_ilog2()
        .unwrap_or(0)
        .saturating_sub(DIVISION_BITS);
    // Below the first power that is divided, both terms are those of the time itself.
    shift as usize * DIVISIONS + (micros >> shift) as usize
}

/// What the times of a counter do not exceed.
fn bound_of(counter: usize) -> Duration {
    let power = (counter / DIVISIONS).saturating_sub(1);
    let division = (counter - power * DIVISIONS) as u64;
    Duration::from_micros((division + 1) << power)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn a_counter_holds_times_that_differ_by_a_sixteenth_at_most() {
        let mut last = 0;
        let powers =
            (0..LONGEST_BITS).flat_map(|bits| [1 << bits, (1 << bits) + 1, (2 << bits) - 1]);
        for time in (0..70_000).chain(powers) {
            let counter = counter_of(micros(time));
            assert!(counter < COUNTERS, "{time}");
            let bound = bound_of(counter).as_micros() as u64;
            assert!(time < bound, "{time} in {counter}, up to {bound}");
            assert!(
                bound - time <= time / 16 + 1,
                "{time} in {counter}, up to {bound}"
            );
        }
        for time in 0..70_000 {
            let counter = counter_of(micros(time));
            assert!(counter == last || counter == last + 1, "{time}");
            last = counter;
        }
        assert_eq!(counter_of(Duration::MAX), COUNTERS - 1);
    }

    #[test]
    fn percentiles_and_bounds_are_those_of_the_times() {
        let latencies = Latencies::default();
        assert_eq!(latencies.read(), []);
        for time in 1..=1000 {
            latencies.took(Step::Mount, micros(time * 1000));
        }
        latencies.failed(Step::Detach);
        // Not timed.
        latencies.failed(Step::Record);
        let [mount, detach] = latencies.read().try_into().unwrap();
        assert_eq!(
            (mount.step, mount.succeeded, mount.failed),
            (Step::Mount, 1000, 0)
        );
        assert_eq!(
            (detach.step, detach.succeeded, detach.failed),
            (Step::Detach, 0, 1)
        );
        for (found, exact) in [
            (mount.p50_seconds, 0.5),
            (mount.p90_seconds, 0.9),
            (mount.p99_seconds, 0.99),
        ] {
            assert!(
                (exact..=exact * 17.0 / 16.0 + 1e-6).contains(&found),
                "{found} for {exact}"
            );
        }
        assert_eq!((mount.max_seconds, mount.total_seconds), (1.0, 500.5));
        assert_eq!((detach.p99_seconds, detach.max_seconds), (0.0, 0.0));
        // Of 1 ms to 1000 ms, those below 65.536 ms are 65.
        let bucket = mount
            .buckets
            .iter()
            .find(|bucket| bucket.below_seconds == 0.065_536);
        assert_eq!(bucket.unwrap().count, 65);
        assert!(mount.buckets.is_sorted_by_key(|bucket| bucket.count));
        assert_eq!(mount.buckets.last().unwrap().count, 1000);
    }
}
