//! The further devices of a filesystem, which nearly none has.

use std::ops::{Deref, DerefMut};

/// Something for each further device, in an order of its own. Empty, it is one word, and has no memory elsewhere.
#[allow(
    clippy::box_collection,
    reason = "a vector is three words, in each of very many mounts"
)]
pub(crate) struct Further<T>(Option<Box<Vec<T>>>);

impl<T> Default for Further<T> {
    fn default() -> Self {
        Further(None)
    }
}

impl<T: PartialEq> PartialEq for Further<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T> Deref for Further<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.0.as_deref().map_or(&[], Vec::as_slice)
    }
}

impl<T> DerefMut for Further<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.0.as_deref_mut().map_or(&mut [], Vec::as_mut_slice)
    }
}

impl<T> FromIterator<T> for Further<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let all: Vec<T> = items.into_iter().collect();
        Further((!all.is_empty()).then(|| Box::new(all)))
    }
}

impl<T> IntoIterator for Further<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.map_or_else(Vec::new, |all| *all).into_iter()
    }
}
