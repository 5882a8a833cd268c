//! Why an agent cannot go on.

use std::error::Error;

use blockmount_linux::printable;

/// What an agent could not do, and why: the cause is its `source()`.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct AgentError {
    what: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl AgentError {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        AgentError {
            what: what.into(),
            source: None,
        }
    }
}

/// Adds what was tried to an error.
pub(crate) trait Context<T> {
    /// Says what was tried, in lower case.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, AgentError>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, AgentError> {
        self.map_err(|error| AgentError {
            what: what(),
            source: Some(error.into()),
        })
    }
}

/// An error with all its causes, on one line, with control characters escaped.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    printable(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_on_one_line_without_control_characters() {
        let cause: Result<(), _> = Err(std::io::Error::other("no\nroom"));
        let error = cause.context(|| "cannot listen".to_owned()).unwrap_err();
        assert_eq!(one_line(&error), "cannot listen: no\\nroom");
    }
}
