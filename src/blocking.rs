//! Blocking work away from the runtime's own threads.

use crate::BackendError;

/// Runs blocking system calls on the blocking threads of tokio. For backends.
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
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => {
            let message = "a panic or the end of the runtime cut off the work";
            Err(BackendError::uncertain(message).with_source(error))
        }
    }
}
