//! The primitives under the lease table.
//!
//! The unit tests of this crate replace them with shuttle's, which decides which task runs when and so walks
//! through the interleavings (`src/lease/interleavings.rs`). Everything else, the integration tests too,
//! runs on the real ones.

pub(crate) use primitives::*;

#[cfg(not(test))]
mod primitives {
    pub(crate) use parking_lot::{Mutex, MutexGuard};
    pub(crate) use tokio::runtime::Handle;
    pub(crate) use tokio::sync::oneshot;
    pub(crate) use tokio::time::{Instant, sleep_until, timeout};

    /// Locks for a few instructions.
    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock()
    }

    /// Whether a destructor may not wait for a lock: only in shuttle's executions.
    pub(crate) const fn is_over() -> bool {
        false
    }
}

#[cfg(test)]
mod primitives {
    pub(crate) use shuttle::sync::{Mutex, MutexGuard};
    pub(crate) use shuttle_tokio_impl::runtime::Handle;
    pub(crate) use shuttle_tokio_impl::sync::oneshot;
    pub(crate) use shuttle_tokio_impl::time::{Instant, sleep_until, timeout};

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex
            .lock()
            .expect("shuttle ends the test at the first panic")
    }

    /// At the end of an execution shuttle unwinds the tasks that are left, one of which may have been stopped with a lock held.
    pub(crate) fn is_over() -> bool {
        std::thread::panicking()
    }
}
