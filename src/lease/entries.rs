//! All entries of a table, by the key that each has itself.

use std::hash::{BuildHasher, Hash};

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use parking_lot::RwLock;

use super::Driver;
use super::entry::EntryRef;

/// How many parts there are, each with a lock of its own; a power of two. More than processors that work here at once.
const SHARDS: usize = 32;

/// A map whose keys are in its values: with a copy beside each, a million mounts would have a million keys twice.
pub(super) struct Entries<D: Driver> {
    /// Without random state, so that a test's seed replays its schedule; no key comes from outside the host.
    hasher: FixedState,
    /// Each lock is held for one look-up or change. What reads an entry under it may look into the tables above, never below.
    shards: Box<[RwLock<Shard<D>>]>,
}

type Shard<D> = HashTable<EntryRef<D>>;

impl<D: Driver> Default for Entries<D> {
    fn default() -> Self {
        Entries {
            hasher: FixedState::default(),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
        }
    }
}

impl<D: Driver> Entries<D> {
    /// The part that a key is in, and its hash there. The table goes by the lowest and the highest bits of a hash.
    fn place(&self, key: &impl Hash) -> (&RwLock<Shard<D>>, u64) {
        let hash = self.hasher.hash_one(key);
        let shard = (hash >> 32) as usize % SHARDS;
        (&self.shards[shard], hash)
    }

    /// Reads an entry in its place. A key may be given by its parts, if it has the same hash.
    pub(super) fn read<T, K: Hash + PartialEq<D::Key>>(
        &self,
        key: &K,
        read: impl FnOnce(&EntryRef<D>) -> T,
    ) -> Option<T> {
        let (shard, hash) = self.place(key);
        let shard = shard.read();
        shard.find(hash, |entry| *key == entry.key).map(read)
    }

    /// The entry under a key, a fresh one if there is none.
    pub(super) fn get_or_insert(
        &self,
        key: &D::Key,
        fresh: impl FnOnce() -> EntryRef<D>,
    ) -> EntryRef<D> {
        let (shard, hash) = self.place(key);
        let mut shard = shard.write();
        let is_it = |entry: &EntryRef<D>| entry.key == *key;
        let hash_of = |entry: &EntryRef<D>| self.hasher.hash_one(&entry.key);
        let entry = shard.entry(hash, is_it, hash_of).or_insert_with(fresh);
        EntryRef::clone(entry.get())
    }

    /// Takes an entry out, if it is there.
    pub(super) fn remove(&self, entry: &EntryRef<D>) {
        let (shard, hash) = self.place(&entry.key);
        let is_it = |listed: &EntryRef<D>| EntryRef::ptr_eq(listed, entry);
        if let Ok(found) = shard.write().find_entry(hash, is_it) {
            found.remove();
        }
    }

    /// The entries as they are now, so that no lock is held while they are looked at.
    pub(super) fn snapshot(&self) -> Vec<EntryRef<D>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(shard.read().iter().map(EntryRef::clone));
        }
        all
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| shard.read().is_empty())
    }
}
