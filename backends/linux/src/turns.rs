//! Calls for one target, one after the other.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use blockmount::BackendError;
use tokio::sync::oneshot::{self, error::TryRecvError};

/// The last call for each target.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<PathBuf, oneshot::Receiver<()>>>);

impl Turns {
    /// Runs a call when all earlier ones for the target have ended. It runs to its end, also if nobody waits for it any
    /// more; its place is taken at once, and not when the answer is polled.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        target: &Path,
        call: impl Future<Output = Result<T, BackendError>> + Send + 'static,
    ) -> impl Future<Output = Result<T, BackendError>> {
        let (done, ended) = oneshot::channel();
        let before = {
            let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            last.retain(|_, ended| ended.try_recv() == Err(TryRecvError::Empty));
            last.insert(target.to_owned(), ended)
        };
        let task = tokio::spawn(async move {
            if let Some(before) = before {
                // Nothing is sent: it ends when the sender is dropped, also by a panic.
                let _ended = before.await;
            }
            let answer = call.await;
            drop(done);
            answer
        });
        async move {
            task.await.unwrap_or_else(|error| {
                let message = "the call was cut off by the end of the runtime or by a panic";
                Err(BackendError::uncertain(message).with_source(error))
            })
        }
    }
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
            move || order.lock().unwrap().push(name)
        };
        let (first, second, other) = (log("first"), log("second"), log("other"));
        // Nobody waits for the first.
        drop(turns.run(Path::new("/a"), async move {
            let _open = gate.await;
            first();
            Ok(())
        }));
        let second = turns.run(Path::new("/a"), async move {
            second();
            Ok(())
        });
        let other = turns.run(Path::new("/b"), async move {
            other();
            Ok(())
        });
        other.await.unwrap();
        open.send(()).unwrap();
        second.await.unwrap();
        assert_eq!(*order.lock().unwrap(), ["other", "first", "second"]);
        turns.run(Path::new("/c"), async { Ok(()) }).await.unwrap();
        assert_eq!(turns.0.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn i01_a_call_that_panics_is_uncertain_and_keeps_up_nobody() {
        let turns = Turns::default();
        let panics = turns.run(Path::new("/a"), async { panic!("on purpose") });
        let after = turns.run(Path::new("/a"), async { Ok(()) });
        let error: Result<(), _> = panics.await;
        assert_eq!(error.unwrap_err().kind(), blockmount::ErrorKind::Uncertain);
        after.await.unwrap();
    }
}
