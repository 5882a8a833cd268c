//! Random sequences of container layers, and how many of them a device holds.
//!
//! There is no published trace of layer sizes to replay. What is known of registries is their shape: most
//! layers are a configuration file or a package or two, and few are hundreds of megabytes. So: log-normal
//! with a median of 4 MiB; one in seven is below half a MiB, one in ten above 50 MiB, one in a hundred above
//! 400 MiB, none above 1 GiB.

use std::f64::consts::TAU;

use blockmount::testing::Seed;
use blockmount_vpmem::{Geometry, MAX_MAPPINGS, PackedRange, Packing};

use crate::four_way_split::{FourWaySplit, Region};

const BLOCK: u64 = 4096;

/// The size of an image with one layer, in bytes.
pub(crate) fn layer(seed: &mut Seed) -> u64 {
    let normal = (-2.0 * unit(seed).ln()).sqrt() * (TAU * unit(seed)).cos();
    let content = (f64::from(4 << 20) * (2.0 * normal).exp()).min(f64::from(1 << 30)) as u64;
    let blocks = content.div_ceil(BLOCK).max(1);
    let hash_tree = blocks.div_ceil(128);
    match seed.below(3) {
        // A filesystem and the footer of a fixed VHD.
        0 => blocks * BLOCK + 512,
        // A filesystem and a block of metadata.
        1 => (blocks + 1) * BLOCK,
        // A filesystem, its dm-verity hashes with a superblock, and a footer.
        _ => (blocks + hash_tree + 1) * BLOCK + 512,
    }
}

/// Between 0 and 1, and neither.
fn unit(seed: &mut Seed) -> f64 {
    ((seed.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
}

/// A device of 4 GiB with at most 1,024 ranges.
pub(crate) trait Device {
    type Range;
    fn new() -> Self;
    fn take(&mut self, size: u64) -> Option<Self::Range>;
    fn give_back(&mut self, range: Self::Range);
}

impl Device for Packing {
    type Range = PackedRange;

    fn new() -> Self {
        Packing::new(Geometry::default())
    }

    fn take(&mut self, size: u64) -> Option<PackedRange> {
        self.reserve(size)
    }

    fn give_back(&mut self, range: PackedRange) {
        range.vacate();
    }
}

impl Device for FourWaySplit {
    type Range = Region;

    fn new() -> Self {
        FourWaySplit::new()
    }

    fn take(&mut self, size: u64) -> Option<Region> {
        let fits = self.taken() < MAX_MAPPINGS;
        fits.then(|| self.allocate(size).ok()).flatten()
    }

    fn give_back(&mut self, range: Region) {
        self.release(range).expect("it was allocated");
    }
}

/// Whether layers also leave while the device fills up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaving {
    No,
    /// Before two layers in five, one that is chosen at random leaves.
    TwoInFive,
}

/// A device at the first layer that it did not take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filled {
    /// How many layers it took before.
    pub(crate) layers: usize,
    /// The share of it that is not in a layer at the end.
    pub(crate) unused: f64,
}

/// Puts layers on a device until one does not fit. The sequence depends on the seed alone.
pub(crate) fn fill<D: Device>(seed: u64, leaving: Leaving) -> Filled {
    let mut seed = Seed::new(seed);
    let mut device = D::new();
    let mut held: Vec<(D::Range, u64)> = Vec::new();
    let mut layers = 0;
    loop {
        if leaving == Leaving::TwoInFive && seed.percent(40) && !held.is_empty() {
            let leaves = seed.below(held.len() as u64) as usize;
            device.give_back(held.swap_remove(leaves).0);
        }
        let size = layer(&mut seed);
        let Some(range) = device.take(size) else {
            let used: u64 = held.iter().map(|(_, size)| size).sum();
            let unused = 1.0 - used as f64 / Geometry::default().device_size() as f64;
            return Filled { layers, unused };
        };
        held.push((range, size));
        layers += 1;
    }
}

/// Many sequences on two allocators.
pub(crate) struct Comparison {
    /// The medians of the layers held.
    pub(crate) ours: usize,
    pub(crate) baseline: usize,
    /// The median of the ratios, and the lowest.
    pub(crate) ratio: f64,
    pub(crate) lowest_ratio: f64,
    /// The means of the shares that are unused.
    pub(crate) unused: f64,
    pub(crate) baseline_unused: f64,
}

pub(crate) fn compare(sequences: u64, leaving: Leaving) -> Comparison {
    let run = |seed| {
        (
            fill::<Packing>(seed, leaving),
            fill::<FourWaySplit>(seed, leaving),
        )
    };
    let runs: Vec<(Filled, Filled)> = (0..sequences).map(run).collect();
    let ratio =
        |(ours, baseline): &(Filled, Filled)| ours.layers as f64 / baseline.layers.max(1) as f64;
    let mean = |unused: fn(&(Filled, Filled)) -> f64| {
        runs.iter().map(unused).sum::<f64>() / sequences as f64
    };
    let mut ratios: Vec<f64> = runs.iter().map(ratio).collect();
    ratios.sort_by(f64::total_cmp);
    Comparison {
        ours: median(runs.iter().map(|(ours, _)| ours.layers)),
        baseline: median(runs.iter().map(|(_, baseline)| baseline.layers)),
        ratio: ratios[ratios.len() / 2],
        lowest_ratio: ratios[0],
        unused: mean(|(ours, _)| ours.unused),
        baseline_unused: mean(|(_, baseline)| baseline.unused),
    }
}

fn median(values: impl Iterator<Item = usize>) -> usize {
    let mut values: Vec<usize> = values.collect();
    values.sort_unstable();
    values[values.len() / 2]
}
