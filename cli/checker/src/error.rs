//! Errors that say what was tried.

use std::io;

/// What was tried, with the system's error as its `source()`.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
struct Attempt {
    what: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Adds what was tried to an error, and keeps its kind.
pub trait Context<T> {
    /// Says what was tried, in lower case.
    ///
    /// # Errors
    ///
    /// The error that was there, with these words before it.
    fn context(self, what: impl FnOnce() -> String) -> io::Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> io::Result<T> {
        self.map_err(|error| {
            let source: io::Error = error.into();
            let (kind, what) = (source.kind(), what());
            let source = source.into();
            io::Error::new(kind, Attempt { what, source })
        })
    }
}
