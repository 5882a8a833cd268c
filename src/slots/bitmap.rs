//! A set of small numbers whose lowest member is three steps away.

use super::MAX_PER_GROUP;

const BITS: usize = u64::BITS as usize;
/// Words of the middle level: one bit for each of at most 256 leaf words.
const MIDDLE: usize = MAX_PER_GROUP as usize / BITS / BITS;

/// The free slots of one group: a bit for each, and two levels of summary above, in which a bit
/// says that the word below has any. The widths multiply to [`MAX_PER_GROUP`].
#[derive(Debug)]
pub(super) struct Bitmap {
    top: u64,
    middle: [u64; MIDDLE],
    leaves: Box<[u64]>,
}

impl Bitmap {
    /// The set of all numbers below `len`, which is at most [`MAX_PER_GROUP`].
    pub(super) fn full(len: u16) -> Self {
        let leaves = vec![0; usize::from(len).div_ceil(BITS)].into();
        let mut bitmap = Bitmap {
            top: 0,
            middle: [0; MIDDLE],
            leaves,
        };
        for number in 0..len {
            bitmap.insert(number);
        }
        bitmap
    }

    pub(super) fn is_empty(&self) -> bool {
        self.top == 0
    }

    /// The lowest member. The set must not be empty.
    pub(super) fn lowest(&self) -> u16 {
        let middle = self.top.trailing_zeros() as usize;
        let leaf = middle * BITS + self.middle[middle].trailing_zeros() as usize;
        let number = leaf * BITS + self.leaves[leaf].trailing_zeros() as usize;
        number as u16
    }

    pub(super) fn insert(&mut self, number: u16) {
        let [middle, leaf, number] = path(number);
        // What is already true is not written again: other cores keep their copy of that line.
        if self.leaves[leaf] == 0 {
            self.middle[middle] |= bit(leaf);
            self.top |= bit(middle);
        }
        self.leaves[leaf] |= bit(number);
    }

    pub(super) fn remove(&mut self, number: u16) {
        let [middle, leaf, number] = path(number);
        self.leaves[leaf] &= !bit(number);
        if self.leaves[leaf] == 0 {
            self.middle[middle] &= !bit(leaf);
            if self.middle[middle] == 0 {
                self.top &= !bit(middle);
            }
        }
    }
}

/// The words on the way to a number, and the number.
fn path(number: u16) -> [usize; 3] {
    let number = usize::from(number);
    [number / BITS / BITS, number / BITS, number]
}

/// The bit that stands for `index` in its word.
fn bit(index: usize) -> u64 {
    1 << (index % BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_every_number_in_order_at_every_edge_of_a_word() {
        for len in [1, 63, 64, 65, 4_095, 4_096, 4_097, MAX_PER_GROUP] {
            let mut bitmap = Bitmap::full(len);
            for number in 0..len {
                assert_eq!(bitmap.lowest(), number);
                bitmap.remove(number);
            }
            assert!(bitmap.is_empty());
            bitmap.insert(len - 1);
            assert_eq!(bitmap.lowest(), len - 1);
        }
    }
}
