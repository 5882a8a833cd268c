//! The checks that every backend must pass, as functions over `&dyn` contract.
//!
//! Each function takes a backend and a fixture (what there is to work on), works on it, and
//! leaves it as it was. It panics at the first check that does not hold, naming the check and what the
//! backend did; what was set up by then stays. The functions `try_...` return the check instead. If
//! all hold, [`Passed`] says how many times a check was held against the backend, and which checks
//! were not run because the fixture lacks what they need. A backend cannot pass by refusing
//! everything, nor by doing nothing: the checks require successes, and the [`Snapshot`] must show them.
//!
//! Two checks hold for every call of every suite: it ends within two minutes, and it does not panic.
//!
//! With [`Faults`], the suites look at the state after `Uncertain`, `Busy` and `Gone`, and at the order
//! of calls for one key after the caller gave one up. For that they drop a future of the backend half-way, as happens
//! when a runtime is shut down.
//!
//! The suites make one call at a time, except where a check says "at once" or gives a call up. Run
//! them on a tokio runtime with time enabled.

mod binder;
mod check;
mod combiner;
mod contracts;
mod faults;
mod fixture;
mod hostile;
mod mounter;
mod resolver;
mod run;
mod transport;
mod unplugger;

pub use binder::{binder, try_binder};
pub use check::{Broken, Check, Contract, Passed};
pub use combiner::{combiner, try_combiner};
pub use contracts::CONTRACTS;
pub use fixture::{Fault, Faults, GuestFixture, Snapshot, TransportFixture, WithoutGone};
pub use mounter::{mounter, try_mounter};
pub use resolver::{resolver, try_resolver};
pub use transport::{transport, try_transport};
pub use unplugger::{try_unplugger, unplugger};
