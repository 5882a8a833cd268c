//! Blocking work away from the runtime's own threads.
//!
//! A call of a backend is a dozen system calls of some microseconds each. To hand each of them to a thread that sleeps, and to
//! wake the runtime for each answer, costs more than the work. So the work of a runtime is queued for a few threads, which go
//! on until the queue is empty ([`pool`]), and a whole call can run on one of them ([`blocking_call`]).

mod pool;

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::BackendError;
use pool::Outcome;

thread_local! {
    /// What the call may do that is polled on this blocking thread now, if there is one.
    static CALL: Cell<Option<Polled>> = const { Cell::new(None) };
}

/// How a call is polled on a blocking thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Polled {
    /// It runs its blocking steps.
    Runs,
    /// It waits for the work that was queued before it.
    LetsOthersPass,
}

/// Runs blocking system calls on the blocking threads of tokio. For backends.
///
/// Work that is queued while two threads for each processor of the machine are busy waits for one of them; where one piece of
/// work takes longer than some milliseconds, a further thread takes its place. Answers of short pieces of work come together.
///
/// Must be called in a runtime of tokio.
///
/// # Errors
///
/// The error of the work; `Uncertain` if a panic or the end of the runtime cut the work off.
///
/// # Cancel safety
///
/// A call that is dropped does not stop the work, which runs to its end.
pub async fn blocking<T, F>(work: F) -> Result<T, BackendError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, BackendError> + Send + 'static,
{
    let (tell, told) = oneshot::channel();
    pool::submit(Box::new(move || {
        let done = run(work);
        Outcome::Done(Box::new(move || drop(tell.send(done))))
    }));
    told.await.unwrap_or_else(|_| Err(cut_off()))
}

/// As [`blocking`], for a step of a call that may run on a blocking thread already ([`blocking_call`]), where the work is done at
/// once. For backends.
///
/// A deadline of the caller cannot cut such a step off: it is for work that ends by itself, or whose caller has no deadline.
///
/// # Errors
///
/// As for [`blocking`].
///
/// # Cancel safety
///
/// As for [`blocking`].
pub async fn blocking_step<T, F>(work: F) -> Result<T, BackendError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, BackendError> + Send + 'static,
{
    match CALL.get() {
        Some(_) => run(work),
        None => blocking(work).await,
    }
}

/// Runs a call on a blocking thread for as long as it has nothing to wait for but its own [steps](blocking_step). For backends.
///
/// A call that waits for something else, such as an event or a timer, goes on in a task of the runtime. The call is queued
/// when this is called, not when the answer is first polled.
///
/// # Errors
///
/// The error of the call; `Uncertain` if a panic or the end of the runtime cut it off.
///
/// # Cancel safety
///
/// Dropping the answer gives up the wait; the call runs to its end.
///
/// # Panics
///
/// Outside of a tokio runtime.
pub fn blocking_call<T, F>(
    call: F,
) -> impl Future<Output = Result<T, BackendError>> + Send + use<T, F>
where
    T: Send + 'static,
    F: Future<Output = Result<T, BackendError>> + Send + 'static,
{
    let (tell, told) = oneshot::channel();
    let call = Box::pin(call);
    pool::submit(Box::new(move || go_on(call, tell)));
    async move { told.await.unwrap_or_else(|_| Err(cut_off())) }
}

/// In a call that runs on a blocking thread, lets all work run first that is queued now: what many calls need can then be looked
/// up once for all of them. Elsewhere it does nothing. For backends.
pub async fn after_queued() {
    let mut has_waited = CALL.get().is_none();
    poll_fn(|_| {
        if has_waited {
            return Poll::Ready(());
        }
        has_waited = true;
        CALL.set(CALL.get().map(|_| Polled::LetsOthersPass));
        Poll::Pending
    })
    .await
}

fn run<T>(work: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
    // The work owns what it uses, and is gone after a panic.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(cut_off()))
}

fn cut_off() -> BackendError {
    BackendError::uncertain("a panic or the end of the runtime cut off the work")
}

type Answer<T> = oneshot::Sender<Result<T, BackendError>>;

/// Polls a call on this thread.
fn go_on<T, F>(mut call: Pin<Box<F>>, tell: Answer<T>) -> Outcome
where
    T: Send + 'static,
    F: Future<Output = Result<T, BackendError>> + Send + 'static,
{
    let before = CALL.replace(Some(Polled::Runs));
    // The waker of the task counts if it goes on there.
    let mut context = Context::from_waker(Waker::noop());
    let polled = catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(&mut context)));
    let how = CALL.replace(before);
    let answer = match polled {
        Ok(Poll::Pending) if how == Some(Polled::LetsOthersPass) => {
            return Outcome::Again(Box::new(move || go_on(call, tell)));
        }
        Ok(Poll::Pending) => {
            Handle::current().spawn(async move { drop(tell.send(call.await)) });
            return Outcome::Elsewhere;
        }
        Ok(Poll::Ready(answer)) => answer,
        Err(_panic) => Err(cut_off()),
    };
    drop(call);
    Outcome::Done(Box::new(move || drop(tell.send(answer))))
}

#[cfg(test)]
mod tests;
