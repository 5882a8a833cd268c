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
    /// What the call may do that is polled on this thread now, if there is one.
    static CALL: Cell<Option<Polled>> = const { Cell::new(None) };
}

/// How a call is polled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Polled {
    /// On a blocking thread, where it runs its blocking steps.
    Runs,
    /// There, and it waits for the work that was queued before it.
    LetsOthersPass,
    /// In a task of the runtime, since it has waited for something else.
    Waits,
    /// There, and it has a blocking step to run.
    Returns,
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

/// As [`blocking`], for a step of a [`blocking_call`], which does the work at once on its blocking thread, and goes back to one
/// first if it is elsewhere. For backends.
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
    loop {
        match CALL.get() {
            Some(Polled::Runs | Polled::LetsOthersPass) => return run(work),
            Some(Polled::Waits | Polled::Returns) => leave(Polled::Returns).await,
            None => return blocking(work).await,
        }
    }
}

/// Runs a call on a blocking thread for as long as it has nothing to wait for but its own [steps](blocking_step). For backends.
///
/// A call that waits for something else, such as an event or a timer, goes on in a task of the runtime until its next step. The
/// call is queued when this is called, not when the answer is first polled.
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
    let work = Box::pin(call);
    Call { work, tell }.submit();
    async move { told.await.unwrap_or_else(|_| Err(cut_off())) }
}

/// In a call that runs on a blocking thread, lets all work run first that is queued now: what many calls need can then be looked
/// up once for all of them. Elsewhere it does nothing. For backends.
pub async fn after_queued() {
    if CALL.get() == Some(Polled::Runs) {
        leave(Polled::LetsOthersPass).await;
    }
}

/// Ends the poll of this call, which is polled again as is asked here.
async fn leave(how: Polled) {
    let mut has_left = false;
    poll_fn(|context| {
        if has_left {
            return Poll::Ready(());
        }
        has_left = true;
        CALL.set(Some(how));
        // For what polls only those of its parts that were woken, such as `FuturesUnordered`.
        context.waker().wake_by_ref();
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

/// A call that is under way, and who waits for its answer.
struct Call<T, F> {
    /// Boxed, so that it moves as a pointer.
    work: Pin<Box<F>>,
    tell: Answer<T>,
}

impl<T, F> Call<T, F>
where
    T: Send + 'static,
    F: Future<Output = Result<T, BackendError>> + Send + 'static,
{
    fn submit(self) {
        pool::submit(Box::new(move || self.run()));
    }

    /// Polls it once. What it asked for comes back with it, if it is not over.
    fn poll(&mut self, how: Polled, waker: &Waker) -> (Poll<F::Output>, Option<Polled>) {
        let before = CALL.replace(Some(how));
        let work = self.work.as_mut();
        let poll = || work.poll(&mut Context::from_waker(waker));
        let polled = catch_unwind(AssertUnwindSafe(poll));
        let asked = CALL.replace(before);
        let polled = polled.unwrap_or_else(|_panic| Poll::Ready(Err(cut_off())));
        (polled, asked)
    }

    /// Goes on on this blocking thread.
    fn run(mut self) -> Outcome {
        // The waker of the task counts if it goes on there.
        match self.poll(Polled::Runs, Waker::noop()) {
            (Poll::Ready(answer), _) => {
                let Call { work, tell } = self;
                drop(work);
                Outcome::Done(Box::new(move || drop(tell.send(answer))))
            }
            (Poll::Pending, Some(Polled::LetsOthersPass)) => {
                Outcome::Again(Box::new(move || self.run()))
            }
            (Poll::Pending, _) => {
                Handle::current().spawn(self.wait());
                Outcome::Elsewhere
            }
        }
    }

    /// Goes on in a task until it has a step to run.
    async fn wait(mut self) {
        let next = poll_fn(|context| match self.poll(Polled::Waits, context.waker()) {
            (Poll::Ready(answer), _) => Poll::Ready(Some(answer)),
            (Poll::Pending, Some(Polled::Returns)) => Poll::Ready(None),
            (Poll::Pending, _) => Poll::Pending,
        });
        let Some(answer) = next.await else {
            return self.submit();
        };
        let Call { work, tell } = self;
        drop(work);
        drop(tell.send(answer));
    }
}

#[cfg(test)]
mod tests;
