//! What there is to undo: in memory, in the journal, and after a restart.

pub(crate) mod journal;
pub(crate) mod ledger;
pub(crate) mod recovery;
