//! Naming the features of a filesystem that not every kernel knows.

/// A set of feature bits in a superblock.
#[derive(Debug)]
pub(super) struct FeatureSet {
    /// What its own documentation calls the set, for bits without a name.
    pub(super) name: &'static str,
    /// Those that each kernel since Linux 4.19 knows, whatever it was configured for.
    pub(super) common: u64,
    /// Those that it may not know.
    pub(super) named: &'static [(u64, &'static str)],
}

impl FeatureSet {
    /// The features that a kernel may not know: by name, or by their bits if they are not known here either.
    pub(super) fn uncommon(&self, bits: u64) -> impl Iterator<Item = String> {
        let named = self.named.iter().filter(move |(bit, _)| bits & bit != 0);
        let known = self
            .named
            .iter()
            .fold(self.common, |all, (bit, _)| all | bit);
        let unknown = bits & !known;
        let unnamed = (unknown != 0).then(|| format!("{} {unknown:#x}", self.name));
        named.map(|(_, name)| (*name).to_owned()).chain(unnamed)
    }
}
