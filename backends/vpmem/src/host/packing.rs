//! Many disks on one device: which of its pages belong to which disk.
//!
//! # Which allocator, and why
//!
//! Five were run on the same 1,000 random sequences of container layers (median 4 MiB, one in ten over
//! 50 MiB, with footers and hash trees), on a device of 4 GiB until the first layer that did not
//! fit, once adding only and once with two releases in five additions. Beside them, the allocator in use
//! before: sizes are rounded up to powers of four, and regions split in four. "Pair" is an allocation and a release among 500 holes.
//!
//! | allocator | layers held | with releases | device unused at the end | pair |
//! |---|---|---|---|---|
//! | split in four (before) | 81 | 129 | 53 %, 55 % | 50 ns |
//! | `range-alloc` 0.1.5, best fit | 161 | 253 | 3.5 %, 8.3 % | 650 ns |
//! | `offset-allocator` 0.2.0, bins | 161 | 252 | 3.8 %, 9.1 % | 40 ns |
//! | `vm-allocator` 0.1.4, first fit | 161 | 252 | 3.5 %, 9.7 % | 640 ns |
//! | `rangemap` 1.8.0, best fit over its gaps | 161 | 253 | 3.5 %, 8.3 % | 1,080 ns |
//! | best fit over two B-trees, 20 lines | 161 | 253 | 3.5 %, 8.3 % | 260 ns |
//!
//! With page-granular ranges all of them hold twice as much as before, and no sequence held less. Best fit wastes
//! least; attaching takes tens of milliseconds, so that the nanoseconds do not count. Hence
//! `range-alloc`: best fit, kept, without dependencies, nothing to write ourselves. `offset-allocator` is
//! faster where that makes no difference, ends at 2^32 pages, and has had no release for two years.
//!
//! None of them knows who owns a range: releasing twice, or a range that has a new owner by now, panics or
//! frees what is in use. [`PackedRange`] prevents that.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use range_alloc::RangeAllocator;

use crate::{ByteRange, Geometry, PAGE};

/// The most ranges that disks can be mapped to on one device. (Source: the limit of Hyper-V.)
pub const MAX_MAPPINGS: usize = 1024;

/// The ranges of one device. Clones share them.
///
/// A range belongs to exactly one [`PackedRange`], which can be moved and not copied: it cannot be
/// released twice, nor after it has a new owner.
///
/// ```
/// use blockmount_vpmem::{Geometry, Packing};
///
/// let device = Packing::new(Geometry::default());
/// let layer = device.reserve((1 << 20) + 512).ok_or("the device is full")?;
/// assert_eq!(layer.range().size(), (1 << 20) + 4096); // whole pages, and not one more
/// layer.vacate();
/// assert!(device.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// ```compile_fail,E0382
/// # let device = blockmount_vpmem::Packing::new(blockmount_vpmem::Geometry::default());
/// let layer = device.reserve(4096).unwrap();
/// layer.vacate();
/// layer.vacate(); // does not compile: it was moved
/// ```
#[derive(Clone)]
pub struct Packing(Arc<Shared>);

struct Shared {
    device_size: u64,
    /// Held for one search, never while another lock is taken.
    ranges: Mutex<Ranges>,
}

struct Ranges {
    /// In pages.
    free: RangeAllocator<u64>,
    free_pages: u64,
    taken: usize,
}

impl Packing {
    /// A device of this geometry, with nothing on it.
    pub fn new(geometry: Geometry) -> Self {
        let device_size = geometry.device_size();
        let free_pages = device_size / PAGE;
        let ranges = Mutex::new(Ranges {
            free: RangeAllocator::new(0..free_pages),
            free_pages,
            taken: 0,
        });
        Packing(Arc::new(Shared {
            device_size,
            ranges,
        }))
    }

    /// Takes the smallest free range that holds so many bytes, rounded up to whole pages; the lowest of
    /// several. None if no free range is large enough, [`MAX_MAPPINGS`] are taken, or `size` is 0.
    pub fn reserve(&self, size: u64) -> Option<PackedRange> {
        let pages = size.div_ceil(PAGE);
        let mut ranges = self.ranges();
        // Most devices that are full are found to be so without a search.
        if pages == 0 || pages > ranges.free_pages || ranges.taken == MAX_MAPPINGS {
            return None;
        }
        let found = ranges.free.allocate_range(pages).ok()?;
        ranges.free_pages -= pages;
        ranges.taken += 1;
        Some(PackedRange {
            packing: self.clone(),
            range: bytes(&found),
        })
    }

    /// Takes this range, which an earlier process may have used. None if not all of it is free, or
    /// [`MAX_MAPPINGS`] are taken.
    pub fn reserve_at(&self, range: ByteRange) -> Option<PackedRange> {
        let (first, end) = (range.offset() / PAGE, range.end() / PAGE);
        let mut ranges = self.ranges();
        let is_apart = |taken: &Range<u64>| taken.end <= first || end <= taken.start;
        let mut taken: Vec<_> = ranges.free.allocated_ranges().collect();
        let total = ranges.free.initial_range().end;
        if end > total || ranges.taken == MAX_MAPPINGS || !taken.iter().all(is_apart) {
            return None;
        }
        taken.push(first..end);
        taken.sort_unstable_by_key(|taken| taken.start);
        // The allocator chooses its ranges, so this one is left over when all others have been given back.
        ranges.free.reset();
        ranges.free.allocate_range(total).ok()?;
        let mut free_from = 0;
        for taken in taken.iter().chain([&(total..total)]) {
            if free_from < taken.start {
                ranges.free.free_range(free_from..taken.start);
            }
            free_from = taken.end;
        }
        ranges.free_pages -= end - first;
        ranges.taken += 1;
        let packing = self.clone();
        Some(PackedRange { packing, range })
    }

    /// How many ranges are taken.
    pub fn len(&self) -> usize {
        self.ranges().taken
    }

    /// Whether no range is taken.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes are in no range, in one piece or not.
    pub fn free(&self) -> u64 {
        self.ranges().free_pages * PAGE
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        // Nothing panics with the lock held.
        self.0.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bytes(pages: &Range<u64>) -> ByteRange {
    ByteRange::new(pages.start * PAGE, (pages.end - pages.start) * PAGE)
        .expect("pages within a device are a range")
}

impl fmt::Debug for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packing")
            .field("device_size", &self.0.device_size)
            .field("taken", &self.len())
            .field("free", &self.free())
            .finish()
    }
}

/// A range of a device, owned by the holder of this.
///
/// Dropping it does not free the range, since it is not known to be empty: it is lost, which
/// costs less than a range with two disks in it.
#[must_use = "a range that is dropped is lost; vacate it when nothing is in it"]
pub struct PackedRange {
    packing: Packing,
    range: ByteRange,
}

impl PackedRange {
    /// Which range it is.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// Frees the range. Only call this when it is certain that nothing is in it.
    pub fn vacate(self) {
        let pages = self.range.offset() / PAGE..self.range.end() / PAGE;
        let mut ranges = self.packing.ranges();
        ranges.free_pages += pages.end - pages.start;
        ranges.taken -= 1;
        ranges.free.free_range(pages);
    }
}

impl fmt::Debug for PackedRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedRange({})", self.range)
    }
}
