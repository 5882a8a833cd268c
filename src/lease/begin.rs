//! Work that begins in its caller.
//!
//! A set-up or tear-down is polled once where it is asked for. What is over by then, as with a backend that has nothing to
//! wait for, costs no task, no channel and no wake-up. What has to wait moves to a task of its own at once: a caller may stop
//! polling without giving up, and half of a call must not stay behind in it, with the entry and perhaps a lock of the backend
//! held.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tracing::Instrument;

use crate::sync::Handle;

/// Work that can move to a task.
pub(super) type Work<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What has become of work that was begun.
pub(super) enum Begun<T> {
    Over(T),
    Waits(Work<T>),
}

/// Polls work for the first time. It is to move to a task if it waits; the waker of that is the first one that counts.
pub(super) fn begin<T>(mut work: Work<T>) -> Begun<T> {
    match work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => Begun::Over(outcome),
        Poll::Pending => Begun::Waits(work),
    }
}

/// Goes on with work in a task, in the span of its caller.
pub(super) fn go_on(runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) {
    drop(runtime.spawn(work.in_current_span()));
}
