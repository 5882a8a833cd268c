//! Backends whose calls are timed.

use std::ops::Deref;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::Span;

use super::Latencies;
use crate::call::{Answer, call};
use crate::{Error, ErrorKind, Step};

/// A backend, and how long its calls take. What is called on it directly is not timed.
pub(crate) struct Timed<B: ?Sized> {
    backend: Box<B>,
    latencies: Arc<Latencies>,
}

impl<B: ?Sized> Timed<B> {
    pub(crate) fn new(backend: Box<B>, latencies: &Arc<Latencies>) -> Self {
        let latencies = Arc::clone(latencies);
        Timed { backend, latencies }
    }

    /// Runs one call of the backend, as [`call`] does, and takes the time.
    pub(crate) async fn call<'a, T>(
        &'a self,
        step: Step,
        span: &Span,
        backend: impl FnOnce(&'a B) -> Answer<'a, T>,
    ) -> Result<T, Error> {
        let since = Instant::now();
        let outcome = call(step, span, || backend(&self.backend)).await;
        match &outcome {
            Ok(_) => self.latencies.took(step, since.elapsed()),
            Err(_) => self.latencies.failed(step),
        }
        outcome
    }

    /// The same for tear-down: when the VM is gone, so is what was to be torn down.
    pub(crate) async fn call_down<'a>(
        &'a self,
        step: Step,
        span: &Span,
        backend: impl FnOnce(&'a B) -> Answer<'a, ()>,
    ) -> Result<(), Error> {
        match self.call(step, span, backend).await {
            Err(error) if error.kind() == ErrorKind::Gone => Ok(()),
            outcome => outcome,
        }
    }
}

impl<B: ?Sized> Deref for Timed<B> {
    type Target = B;

    fn deref(&self) -> &B {
        &self.backend
    }
}
