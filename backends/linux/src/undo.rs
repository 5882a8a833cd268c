//! What there is to undo, in memory and in the journal; undoing it, also after a restart.
//!
//! Each target has one list of steps, in the order in which they were made. A step is put on the list, and the list
//! into the journal, before it is made. A step that is busy stays on its list and is reported. Nothing is undone when a
//! value is dropped.

pub(crate) mod journal;
pub(crate) mod ledger;
pub(crate) mod locks;
pub(crate) mod record;
pub(crate) mod recovery;
pub(crate) mod step;
pub(crate) mod teardown;
