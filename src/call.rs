//! Calling a backend: one place that knows that a backend may panic, and which step it was.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};
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

/// Runs one call of a backend that may be given up, and waits at most that long: none if it is not over by then. What is
/// ready at once, as most answers are, costs no timer.
pub(crate) async fn call_within<'a, T>(
    timeout: Duration,
    backend: impl FnOnce() -> Answer<'a, T>,
) -> Option<Result<T, BackendError>> {
    let mut answer = match catch(backend) {
        Ok(answer) => answer,
        Err(panicked) => return Some(Err(panicked)),
    };
    let at_once = poll_fn(|context| Poll::Ready(poll(&mut answer, context)));
    match at_once.await {
        Poll::Ready(outcome) => Some(outcome),
        Poll::Pending => {
            let rest = poll_fn(|context| poll(&mut answer, context));
            // Boxed, since few come to it.
            Box::pin(crate::sync::timeout(timeout, rest)).await.ok()
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
