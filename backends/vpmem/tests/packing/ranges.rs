//! Ranges of a device: none overlap, all are inside, and all come back.

use blockmount_vpmem::{ByteRange, Geometry, MAX_MAPPINGS, PAGE, PackedRange, Packing};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn device(pages: u64) -> Packing {
    Packing::new(Geometry::new(1, pages * PAGE).unwrap())
}

fn bounds(range: &PackedRange) -> (u64, u64) {
    (range.range().offset(), range.range().end())
}

#[test]
fn the_smallest_hole_that_fits_is_filled() {
    let device = device(100);
    let mut held: Vec<_> = (0..10)
        .map(|_| device.reserve(10 * PAGE).unwrap())
        .collect();
    assert!(device.reserve(1).is_none());
    // Holes of 20 pages at 20, and of 10 at 70.
    held.remove(7).vacate();
    held.remove(3).vacate();
    held.remove(2).vacate();
    assert_eq!(device.free(), 30 * PAGE);
    assert!(device.reserve(21 * PAGE).is_none());
    let small = device.reserve(9 * PAGE).unwrap();
    assert_eq!(bounds(&small), (70 * PAGE, 79 * PAGE));
    let large = device.reserve(11 * PAGE).unwrap();
    assert_eq!(bounds(&large), (20 * PAGE, 31 * PAGE));
}

#[test]
fn sizes_that_fit_no_device_are_refused() {
    let device = device(4);
    for size in [0, 4 * PAGE + 1, 5 * PAGE, u64::MAX] {
        assert!(device.reserve(size).is_none(), "{size}");
    }
    assert!(device.is_empty());
    let all = device.reserve(4 * PAGE).unwrap();
    assert_eq!((bounds(&all), device.free()), ((0, 4 * PAGE), 0));
}

#[test]
fn a_lost_range_is_not_handed_out_again() {
    let device = device(2);
    drop(device.reserve(1));
    assert_eq!(device.reserve(1).unwrap().range().offset(), PAGE);
    assert!(device.reserve(1).is_none());
}

#[test]
fn v09_a_layer_costs_its_pages_and_not_the_next_power_of_four() {
    let layer = Packing::new(Geometry::default())
        .reserve(MIB + 512)
        .unwrap();
    assert_eq!(layer.range().size(), MIB + PAGE);
    // As many as fit on a device, beside what the four-way split held of them.
    for (size, fit, before) in [
        (MIB + 512, 1024, 1024),
        (5 * MIB, 819, 256),
        (17 * MIB, 240, 64),
        (65 * MIB, 63, 16),
        (257 * MIB, 15, 4),
        (GIB + 1, 3, 1),
        (2 * GIB, 2, 1),
    ] {
        let device = Packing::new(Geometry::default());
        let held: Vec<_> = (0..).map_while(|_| device.reserve(size)).collect();
        assert_eq!(held.len(), fit, "{size}");
        assert!(fit >= before);
    }
}

#[test]
fn v06_a_stale_release_cannot_be_written() {
    // That a range cannot be vacated twice is in the documentation of `Packing`, as code that does not
    // compile. Here: whoever holds a range keeps it whatever others release, in their order.
    let device = device(8);
    let [a, b, c] = [1, 2, 3].map(|pages| device.reserve(pages * PAGE).unwrap());
    let kept = bounds(&b);
    a.vacate();
    c.vacate();
    let again = [1, 5].map(|pages| device.reserve(pages * PAGE).unwrap());
    assert!(device.reserve(1).is_none());
    for range in again {
        let (start, end) = bounds(&range);
        assert!(end <= kept.0 || start >= kept.1);
        range.vacate();
    }
    b.vacate();
    assert!(device.is_empty());
}

#[test]
fn v10_the_1025th_range_is_refused_and_the_1024th_is_at_its_place() {
    let device = Packing::new(Geometry::default());
    let held: Vec<_> = (0..MAX_MAPPINGS)
        .map(|_| device.reserve(MIB).unwrap())
        .collect();
    assert_eq!(
        held.last().unwrap().range().to_string(),
        "1072693248+1048576"
    );
    assert!(device.reserve(1).is_none());
    assert_eq!(device.free(), 3 * GIB);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Small devices, so that they fill up and come apart.
    #[test]
    fn any_sequence_keeps_ranges_apart_and_gives_everything_back(
        pages in 1_u64..64,
        steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>(), 0_u64..20 * PAGE), 0..100),
    ) {
        let device = device(pages);
        let mut held: Vec<PackedRange> = Vec::new();
        for (release, which, size) in steps {
            if release && !held.is_empty() {
                held.swap_remove(which.index(held.len())).vacate();
            } else {
                let before = device.free();
                match device.reserve(size) {
                    Some(range) => {
                        prop_assert_eq!(range.range().size(), size.next_multiple_of(PAGE));
                        held.push(range);
                    }
                    None => prop_assert!(size == 0 || !has_hole(&held, pages, size)),
                }
                prop_assert!(device.free() <= before);
            }
            let mut taken: Vec<_> = held.iter().map(bounds).collect();
            taken.sort_unstable();
            prop_assert!(taken.iter().all(|(_, end)| *end <= pages * PAGE));
            prop_assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{:?}", taken);
            let used: u64 = taken.iter().map(|(start, end)| end - start).sum();
            prop_assert_eq!((device.free(), device.len()), (pages * PAGE - used, held.len()));
        }
        held.into_iter().for_each(PackedRange::vacate);
        prop_assert!(device.is_empty());
        let all = device.reserve(pages * PAGE);
        prop_assert!(all.is_some(), "all is one piece again");
    }
}

/// Whether a free piece between the ranges is long enough.
fn has_hole(held: &[PackedRange], pages: u64, size: u64) -> bool {
    let mut taken: Vec<_> = held.iter().map(bounds).collect();
    taken.push((pages * PAGE, pages * PAGE));
    taken.sort_unstable();
    let mut free_from = 0;
    taken.into_iter().any(|(start, end)| {
        let hole = start - free_from;
        free_from = end;
        hole >= size
    })
}

#[test]
fn a_range_of_an_earlier_process_is_taken_where_it_was() {
    let packing = Packing::new(Geometry::new(1, 16 * PAGE).unwrap());
    let range = |first: u64, pages: u64| ByteRange::new(first * PAGE, pages * PAGE).unwrap();
    let taken = [range(4, 2), range(0, 1), range(6, 1), range(15, 1)];
    let held: Vec<_> = taken.map(|range| packing.reserve_at(range).unwrap()).into();
    assert_eq!((packing.len(), packing.free()), (4, 11 * PAGE));
    for (first, pages) in [(4, 2), (5, 1), (3, 2), (0, 16), (15, 2), (16, 1)] {
        assert!(
            packing.reserve_at(range(first, pages)).is_none(),
            "{first}+{pages}"
        );
    }
    // What is free goes on being packed: 3 pages from 1, and 8 from 7.
    assert_eq!(packing.reserve(3 * PAGE).unwrap().range(), range(1, 3));
    assert_eq!(packing.reserve(8 * PAGE).unwrap().range(), range(7, 8));
    assert_eq!(packing.free(), 0);
    held.into_iter().for_each(|held| held.vacate());
    assert_eq!((packing.len(), packing.free()), (2, 5 * PAGE));
    assert_eq!(packing.reserve(3 * PAGE).unwrap().range(), range(4, 3));
}
