//! The baseline is what it is said to be: sequences and figures of the original.

use crate::four_way_split::{FourWaySplit, Refused, Region, class_of, size_of};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn allocate(device: &mut FourWaySplit, size: u64) -> (u64, usize) {
    let region = device.allocate(size).unwrap();
    (region.offset, region.class)
}

#[test]
fn a_sequence_of_every_class() {
    let mut device = FourWaySplit::new();
    let mut held = Vec::new();
    for (size, offset, class) in [
        (MIB, 0, 0),
        (5 * MIB, 16 * MIB, 2),
        (MIB, MIB, 0),
        (100 * MIB, 256 * MIB, 4),
        (GIB, GIB, 5),
        (2 * MIB, 4 * MIB, 1),
    ] {
        let region = device.allocate(size).unwrap();
        assert_eq!((region.offset, region.class), (offset, class), "{size}");
        held.push(region);
    }
    assert_eq!(device.allocate(GIB + 1), Err(Refused::NotEnoughSpace));
    for (size, offset, class) in [
        (900 * MIB, 2 * GIB, 5),
        (300 * MIB, 3 * GIB, 5),
        (4096, 2 * MIB, 0),
        (17 * MIB, 64 * MIB, 3),
    ] {
        let region = device.allocate(size).unwrap();
        assert_eq!((region.offset, region.class), (offset, class), "{size}");
        held.push(region);
    }
    for region in held.into_iter().rev() {
        device.release(region).unwrap();
    }
    assert_eq!(allocate(&mut device, 4 * GIB), (0, 6));
}

#[test]
fn capacities_by_size() {
    for (size, fit) in [
        (MIB, 4096),
        (MIB + 1, 1024),
        (5 * MIB, 256),
        (17 * MIB, 64),
        (65 * MIB, 16),
        (257 * MIB, 4),
        (GIB + 1, 1),
    ] {
        let mut device = FourWaySplit::new();
        let offsets: Vec<u64> = (0..)
            .map_while(|_| device.allocate(size).ok())
            .map(|region| region.offset)
            .collect();
        assert_eq!(offsets.len(), fit, "{size}");
        let step = size_of(class_of(size).unwrap()).unwrap();
        let expected: Vec<u64> = (0..fit as u64).map(|at| at * step).collect();
        assert_eq!(offsets, expected);
    }
}

#[test]
fn classes() {
    for (size, class) in [
        (1, 0),
        (MIB, 0),
        (MIB + 1, 1),
        (4 * MIB, 1),
        (4 * MIB + 1, 2),
        (6 * MIB, 2),
        (2 * GIB, 6),
        (4 * GIB, 6),
    ] {
        assert_eq!(class_of(size), Ok(class), "{size}");
    }
    assert_eq!((size_of(0), size_of(6)), (Ok(MIB), Ok(4 * GIB)));
    assert_eq!(size_of(7), Err(Refused::InvalidClass));
    for size in [0, 4 * GIB + 1, u64::MAX] {
        assert_eq!(class_of(size), Err(Refused::InvalidClass), "{size}");
        assert_eq!(
            FourWaySplit::new().allocate(size),
            Err(Refused::InvalidClass)
        );
    }
}

#[test]
fn the_lowest_free_region_is_next() {
    let mut device = FourWaySplit::new();
    let held: Vec<Region> = (0..8).map(|_| device.allocate(MIB).unwrap()).collect();
    device.release(held[5]).unwrap();
    device.release(held[2]).unwrap();
    let next = [MIB, MIB, 4 * MIB, MIB].map(|size| allocate(&mut device, size).0 / MIB);
    assert_eq!(next, [2, 5, 8, 12]);
}

#[test]
fn regions_that_are_not_a_whole_device() {
    let region = |class, offset| Region { class, offset };
    assert_eq!(
        FourWaySplit::of(&[]).allocate(MIB),
        Err(Refused::NotEnoughSpace)
    );
    let mut quarters = FourWaySplit::of(&[region(1, 0)]);
    quarters.split(1);
    assert_eq!(quarters.free_in(0), [0, MIB, 2 * MIB, 3 * MIB]);
    assert!(quarters.free_in(1).is_empty());
    let mut shifted = FourWaySplit::of(&[region(2, MIB)]);
    assert_eq!(allocate(&mut shifted, MIB), (MIB, 0));
    assert!(shifted.free_in(2).is_empty());
    assert_eq!(shifted.free_in(1).len(), 3);
}

#[test]
fn a_release_of_what_is_not_allocated_is_refused() {
    let mut device = FourWaySplit::new();
    let region = device.allocate(MIB).unwrap();
    let moved = Region {
        offset: region.offset + MIB,
        ..region
    };
    assert_eq!(device.release(moved), Err(Refused::NotAllocated));
    device.release(region).unwrap();
    assert_eq!(device.release(region), Err(Refused::NotAllocated));
}
