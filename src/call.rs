//! Calling a backend: one place that knows that a backend may panic, and which step it was.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tracing::{Instrument, Span, debug};

use crate::{BackendError, Error, ErrorKind, Step};

/// Runs one call of a backend inside `span`. A panic counts as an error of kind `Uncertain`.
pub(crate) async fn call<T>(
    step: Step,
    span: Span,
    backend: impl Future<Output = Result<T, BackendError>>,
) -> Result<T, Error> {
    let outcome = catch_panic(backend).instrument(span.clone()).await;
    span.in_scope(|| match &outcome {
        Ok(_) => debug!("done"),
        Err(error) => debug!(kind = %error.kind(), %error, "failed"),
    });
    outcome.map_err(|error| Error::new(step, error))
}

/// As [`call`], for tear-down: when the VM is gone, so is what was to be torn down.
pub(crate) async fn call_down(
    step: Step,
    span: Span,
    backend: impl Future<Output = Result<(), BackendError>>,
) -> Result<(), Error> {
    match call(step, span, backend).await {
        Err(error) if error.kind() == ErrorKind::Gone => Ok(()),
        outcome => outcome,
    }
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

/// Waits at most that long. What is ready at once, as most answers are, costs no timer.
pub(crate) async fn within<T>(timeout: Duration, answer: impl Future<Output = T>) -> Option<T> {
    let mut answer = pin!(answer);
    let at_once = poll_fn(|context| Poll::Ready(answer.as_mut().poll(context)));
    match at_once.await {
        Poll::Ready(answer) => Some(answer),
        Poll::Pending => crate::sync::timeout(timeout, answer).await.ok(),
    }
}

/// Makes an error of a panic.
pub(crate) async fn catch_panic<T>(
    backend: impl Future<Output = Result<T, BackendError>>,
) -> Result<T, BackendError> {
    let mut backend = pin!(backend);
    poll_fn(|context| {
        // A future that panicked is not polled again, so whatever it broke is not seen.
        catch_unwind(AssertUnwindSafe(|| backend.as_mut().poll(context)))
            .unwrap_or_else(|panic| Poll::Ready(Err(BackendError::from_panic(panic))))
    })
    .await
}
