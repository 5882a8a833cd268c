//! Calls for one key in the order in which they came, those for different keys at once.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::pin::Pin;

use parking_lot::Mutex;
use tokio::sync::oneshot::{self, error::TryRecvError};

use crate::{BackendError, blocking_call};

/// Keeps the order of calls for one key (a target, a device), for a backend whose callers may give up on a call and
/// make the next while the first is still under way.
///
/// ```
/// use std::path::Path;
///
/// use blockmount::Turns;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), blockmount::BackendError> {
/// let turns = Turns::default();
/// let mounted = turns.run(Path::new("/run/layer"), async { Ok("mounted") });
/// let unmounted = turns.run(Path::new("/run/layer"), async { Ok("unmounted") });
/// // The second begins when the first has ended, in whatever order the answers are awaited.
/// assert_eq!(unmounted.await?, "unmounted");
/// assert_eq!(mounted.await?, "mounted");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Turns<K>(Mutex<HashMap<K, oneshot::Receiver<()>>>);

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Turns(Mutex::default())
    }
}

impl<K: Eq + Hash> Turns<K> {
    /// Runs a call in a task of its own, once all earlier calls for the key have ended. The place in the order is taken
    /// at once, not when the answer is first polled.
    ///
    /// # Errors
    ///
    /// Those of the call; `Uncertain` if it panics.
    ///
    /// # Cancel safety
    ///
    /// Dropping the answer gives up the wait; the call runs to its end.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn run<T, F>(
        &self,
        key: K,
        call: F,
    ) -> impl Future<Output = Result<T, BackendError>> + Send + use<K, T, F>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, BackendError>> + Send + 'static,
    {
        let (done, before) = self.queue(key);
        let task = tokio::spawn(async move {
            if let Some(before) = before {
                let _ended = before.await;
            }
            let answer = call.await;
            drop(done);
            answer
        });
        async move {
            task.await
                .unwrap_or_else(|error| Err(cut_off().with_source(error)))
        }
    }

    /// As [`run`](Self::run), on a blocking thread ([`blocking_call`](crate::blocking_call)).
    ///
    /// # Errors
    ///
    /// Those of the call; `Uncertain` if it panics.
    ///
    /// # Cancel safety
    ///
    /// Dropping the answer gives up the wait; the call runs to its end.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn run_blocking<T, F>(
        &self,
        key: K,
        call: F,
    ) -> Pin<Box<dyn Future<Output = Result<T, BackendError>> + Send>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, BackendError>> + Send + 'static,
    {
        let (done, before) = self.queue(key);
        let call = async move {
            let answer = call.await;
            drop(done);
            answer
        };
        match before {
            None => Box::pin(blocking_call(call)),
            Some(before) => {
                let task = tokio::spawn(async move {
                    let _ended = before.await;
                    blocking_call(call).await
                });
                Box::pin(async move {
                    task.await
                        .unwrap_or_else(|error| Err(cut_off().with_source(error)))
                })
            }
        }
    }

    /// Takes a place in the order: what is dropped at the end of the call, and what ends with the call before, if there is
    /// one. Nothing is sent: it ends when the sender is dropped, also by a panic.
    fn queue(&self, key: K) -> (oneshot::Sender<()>, Option<oneshot::Receiver<()>>) {
        let (done, ended) = oneshot::channel();
        let mut last = self.0.lock();
        last.retain(|_, ended| ended.try_recv() == Err(TryRecvError::Empty));
        (done, last.insert(key, ended))
    }
}

fn cut_off() -> BackendError {
    BackendError::uncertain(
        "a panic or the end of the runtime cut off the call; what it has done is unknown",
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn i01_one_target_is_in_order_and_another_is_free() {
        let turns = Turns::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let (open, gate) = oneshot::channel::<()>();
        let log = |name: &'static str| {
            let order = order.clone();
            move || order.lock().push(name)
        };
        let (first, second, other) = (log("first"), log("second"), log("other"));
        // The caller gives up on the first.
        drop(turns.run("/a", async move {
            let _open = gate.await;
            first();
            Ok(())
        }));
        let second = turns.run("/a", async move {
            second();
            Ok(())
        });
        let other = turns.run("/b", async move {
            other();
            Ok(())
        });
        other.await.unwrap();
        open.send(()).unwrap();
        second.await.unwrap();
        assert_eq!(*order.lock(), ["other", "first", "second"]);
        turns.run("/c", async { Ok(()) }).await.unwrap();
        assert_eq!(turns.0.lock().len(), 1);
    }

    #[tokio::test]
    async fn i01_calls_on_blocking_threads_are_in_order_and_hold_up_no_other() {
        let turns = Turns::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let log = |name: &'static str| {
            let order = order.clone();
            move || {
                order.lock().push(name);
                Ok(())
            }
        };
        let (first, second, other) = (log("first"), log("second"), log("other"));
        // The caller gives up on the first, which holds its thread.
        drop(turns.run_blocking("/a", async move {
            let _open = gate.recv();
            first()
        }));
        let second = turns.run_blocking("/a", async move { second() });
        turns
            .run_blocking("/b", async move { other() })
            .await
            .unwrap();
        open.send(()).unwrap();
        second.await.unwrap();
        assert_eq!(*order.lock(), ["other", "first", "second"]);
        let panics = turns.run_blocking("/a", async { panic!("on purpose") });
        let after = turns.run_blocking("/a", async { Ok(()) });
        let error: Result<(), _> = panics.await;
        assert_eq!(error.unwrap_err().kind(), crate::ErrorKind::Uncertain);
        after.await.unwrap();
    }

    #[tokio::test]
    async fn i01_a_call_that_panics_is_uncertain_and_holds_up_no_other() {
        let turns = Turns::default();
        let panics = turns.run("/a", async { panic!("on purpose") });
        let after = turns.run("/a", async { Ok(()) });
        let error: Result<(), _> = panics.await;
        assert_eq!(error.unwrap_err().kind(), crate::ErrorKind::Uncertain);
        after.await.unwrap();
    }
}
