//! Repeatable randomness: the same seed, the same schedule.

use std::time::Duration;

use super::{Call, Gate};
use crate::ErrorKind;

/// A repeatable source of random numbers for schedules, not for secrets.
///
/// The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014): eight bytes of state, every seed as good as any other, so that the seeds
/// 0, 1, 2, ... make independent schedules.
///
/// ```
/// use blockmount::testing::Seed;
///
/// let (mut one, mut other) = (Seed::new(7), Seed::new(7));
/// assert_eq!(one.next(), other.next());
/// assert!(one.below(10) < 10);
/// ```
#[derive(Debug, Clone)]
pub struct Seed(u64);

impl Seed {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Self {
        Seed(seed)
    }

    /// The next 64 random bits.
    #[expect(
        clippy::should_implement_trait,
        reason = "an endless source is no iterator to loop over"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number from 0 to `end - 1`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        // The high half of the product; its bias is below 2^-40 for the small ends used here.
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// Whether an event of that many percent happens.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    /// One of the items.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }
}

/// The output function of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What is random about one call: its step and number, not the moment at which it comes. So a fault
/// does not move when the interleaving around it changes.
fn of_call(seed: u64, call: &Call<'_>) -> Seed {
    Seed(mix(mix(seed)
        ^ ((call.step as u64) << 32)
        ^ call.nth as u64))
}

/// A plan for [`FakeVm::gate_by`](super::FakeVm::gate_by) in which so many percent of all calls
/// fail: with `Busy` or `Other`, with an uncertain outcome, or with a panic, each with or without
/// effect. The VM stays alive and every call ends.
pub fn random_faults(seed: u64, percent: u64) -> impl Fn(&Call<'_>) -> Gate + Send + Sync {
    move |call| {
        let mut seed = of_call(seed, call);
        if !seed.percent(percent) {
            return Gate::Ok;
        }
        *seed.pick(&[
            Gate::Err(ErrorKind::Other),
            Gate::Err(ErrorKind::Busy),
            Gate::Uncertain { happened: false },
            Gate::Uncertain { happened: true },
            Gate::Panic { happened: false },
            Gate::Panic { happened: true },
        ])
    }
}

/// A plan for [`FakeVm::delay_by`](super::FakeVm::delay_by) in which each call takes a random time of
/// whole microseconds, up to and including `longest`; one call in four takes none.
pub fn random_delays(seed: u64, longest: Duration) -> impl Fn(&Call<'_>) -> Duration + Send + Sync {
    let longest = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX - 1);
    move |call| {
        let mut seed = of_call(!seed, call);
        if seed.percent(25) {
            return Duration::ZERO;
        }
        Duration::from_micros(seed.below(longest + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Key, VmStep};
    use super::*;
    use crate::DiskId;

    #[test]
    fn is_splitmix64() {
        // The first outputs for seed 1234567 in the generator's published reference run.
        let mut seed = Seed::new(1_234_567);
        assert_eq!(seed.next(), 6_457_827_717_110_365_317);
        assert_eq!(seed.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn a_plan_has_the_faults_it_promises_and_repeats_itself() {
        let key = Key::Disk(DiskId::name("/a"));
        let faults = |seed| {
            let plan = random_faults(seed, 20);
            let call = |nth| Call {
                step: VmStep::Mount,
                key: &key,
                nth,
            };
            (1..=10_000).map(|nth| plan(&call(nth))).collect::<Vec<_>>()
        };
        let (one, same, other) = (faults(1), faults(1), faults(2));
        assert!(one == same && one != other);
        let failing = one.iter().filter(|gate| **gate != Gate::Ok).count();
        assert!(
            (1_800..2_200).contains(&failing),
            "{failing} of 10000 calls fail"
        );
    }
}
