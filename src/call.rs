//! Calling a backend: one place that knows that a backend may panic, and which step it was.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tracing::{Span, debug};

use crate::{BackendError, Error, ErrorKind, Step};

/// What `async_trait` makes of a call of a backend.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, BackendError>> + Send + 'a>>;

/// Runs one call of a backend inside `span`. A panic counts as an error of kind `Uncertain`.
pub(crate) async fn call<'a, T>(
    step: Step,
    span: &Span,
    backend: impl FnOnce() -> Answer<'a, T>,
) -> Result<T, Error> {
    let outcome = match span.in_scope(|| catch(backend)) {
        Ok(mut answer) => poll_fn(|context| span.in_scope(|| poll(&mut answer, context))).await,
        Err(panicked) => Err(panicked),
    };
    span.in_scope(|| match &outcome {
        Ok(_) => debug!("done"),
        Err(error) => debug!(kind = %error.kind(), %error, "failed"),
    });
    outcome.map_err(|error| Error::new(step, error))
}

/// The steps of one tear-down that are done.
#[derive(Default)]
pub(crate) struct Teardown {
    /// The first error of a step that is done and has lost writes, until whoever releases is told.
    lost: Option<Error>,
}

impl Teardown {
    /// The step is done, unless this is another error than `LostWrites`.
    pub(crate) fn step(&mut self, outcome: Result<(), Error>) -> Result<(), Error> {
        match outcome {
            Err(lost) if lost.kind() == ErrorKind::LostWrites => {
                self.lost.get_or_insert(lost);
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Ends a tear-down whose steps are all done.
    pub(crate) fn end(&mut self) -> Result<(), Error> {
        self.lost.take().map_or(Ok(()), Err)
    }
}

/// A call of a backend that may be given up. What is over at once, as most calls are, costs no future and no timer.
pub(crate) enum Asked<'a, T> {
    Over(Result<T, BackendError>),
    Waits(Answer<'a, T>),
}

/// Begins such a call: its answer is polled once. If it has to wait, the waker that it is polled with next counts.
pub(crate) fn ask<'a, T>(backend: impl FnOnce() -> Answer<'a, T>) -> Asked<'a, T> {
    let mut answer = match catch(backend) {
        Ok(answer) => answer,
        Err(panicked) => return Asked::Over(Err(panicked)),
    };
    match poll(&mut answer, &mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => Asked::Over(outcome),
        Poll::Pending => Asked::Waits(answer),
    }
}

impl<T> Asked<'_, T> {
    /// Waits at most that long: none if it is not over by then.
    pub(crate) async fn within(self, timeout: Duration) -> Option<Result<T, BackendError>> {
        match self {
            Asked::Over(outcome) => Some(outcome),
            Asked::Waits(mut answer) => {
                let rest = poll_fn(|context| poll(&mut answer, context));
                // Boxed, since few come to it.
                Box::pin(crate::sync::timeout(timeout, rest)).await.ok()
            }
        }
    }
}

/// A future that panicked is not polled again, so whatever it broke is not seen.
fn poll<T>(answer: &mut Answer<'_, T>, context: &mut Context<'_>) -> Poll<Result<T, BackendError>> {
    catch(|| answer.as_mut().poll(context)).unwrap_or_else(|panicked| Poll::Ready(Err(panicked)))
}

fn catch<T>(backend: impl FnOnce() -> T) -> Result<T, BackendError> {
    catch_unwind(AssertUnwindSafe(backend)).map_err(BackendError::from_panic)
}
