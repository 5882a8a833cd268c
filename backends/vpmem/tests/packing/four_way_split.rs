//! The baseline: the allocator for packed VPMEM that Hyper-V's shim for Linux containers uses, written
//! from its description.
//!
//! Sizes are rounded up to one of seven classes, each four times the one before: 1 MiB, 4 MiB, ... 4 GiB. An
//! allocation takes the lowest region of the smallest class that has one, split in four as often as it
//! takes. A release puts four neighbours that are free together again.

use std::collections::BTreeSet;

const CLASSES: usize = 7;
const SMALLEST: u64 = 1 << 20;

/// How large the regions of a class are, in bytes.
pub(crate) fn size_of(class: usize) -> Result<u64, Refused> {
    if class < CLASSES {
        return Ok(SMALLEST << (2 * class));
    }
    Err(Refused::InvalidClass)
}

/// The smallest class whose regions hold so many bytes.
pub(crate) fn class_of(size: u64) -> Result<usize, Refused> {
    let holds = |class: &usize| size_of(*class).is_ok_and(|holds| holds >= size);
    let class = (0..CLASSES).find(holds).ok_or(Refused::InvalidClass)?;
    if size > 0 {
        Ok(class)
    } else {
        Err(Refused::InvalidClass)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    InvalidClass,
    NotEnoughSpace,
    NotAllocated,
}

/// A region that was allocated. It can be copied and released twice, as in the original.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Region {
    pub(crate) class: usize,
    pub(crate) offset: u64,
}

pub(crate) struct FourWaySplit {
    free: [BTreeSet<u64>; CLASSES],
    taken: BTreeSet<Region>,
}

impl FourWaySplit {
    /// A device of 4 GiB.
    pub(crate) fn new() -> Self {
        Self::of(&[Region {
            class: CLASSES - 1,
            offset: 0,
        }])
    }

    /// Whatever these regions make up.
    pub(crate) fn of(regions: &[Region]) -> Self {
        let mut free: [BTreeSet<u64>; CLASSES] = Default::default();
        for region in regions {
            free[region.class].insert(region.offset);
        }
        FourWaySplit {
            free,
            taken: BTreeSet::new(),
        }
    }

    pub(crate) fn allocate(&mut self, size: u64) -> Result<Region, Refused> {
        let class = class_of(size)?;
        let has_one = |class: &usize| !self.free[*class].is_empty();
        let from = (class..CLASSES)
            .find(has_one)
            .ok_or(Refused::NotEnoughSpace)?;
        for larger in (class + 1..=from).rev() {
            self.split(larger);
        }
        let offset = self.free[class]
            .pop_first()
            .ok_or(Refused::NotEnoughSpace)?;
        let region = Region { class, offset };
        self.taken.insert(region);
        Ok(region)
    }

    /// Makes four of the lowest free region of a class.
    pub(crate) fn split(&mut self, class: usize) {
        if let (Some(offset), Ok(quarter)) = (self.free[class].pop_first(), size_of(class - 1)) {
            self.free[class - 1].extend((0..4).map(|part| offset + part * quarter));
        }
    }

    pub(crate) fn release(&mut self, region: Region) -> Result<(), Refused> {
        if !self.taken.remove(&region) {
            return Err(Refused::NotAllocated);
        }
        let Region { class, offset } = region;
        self.free[class].insert(offset);
        self.merge(class, offset)
    }

    fn merge(&mut self, class: usize, offset: u64) -> Result<(), Refused> {
        if class + 1 == CLASSES {
            return Ok(());
        }
        let whole = size_of(class + 1)?;
        let start = offset - offset % whole;
        let parts: Vec<u64> = (0..4).map(|part| start + part * (whole / 4)).collect();
        if parts.iter().all(|part| self.free[class].contains(part)) {
            for part in parts {
                self.free[class].remove(&part);
            }
            self.free[class + 1].insert(start);
            self.merge(class + 1, start)?;
        }
        Ok(())
    }

    pub(crate) fn free_in(&self, class: usize) -> Vec<u64> {
        self.free[class].iter().copied().collect()
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.len()
    }
}
