//! Why an agent cannot go on.

use std::error::Error;

use blockmount::printable;

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

/// What each cause of an error says, the nearest first. One that only repeats what is said before it is left out.
pub fn causes(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut said = error.to_string();
    let mut causes = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !said.ends_with(&text) {
            causes.push(text.clone());
        }
        said = text;
        cause = error.source();
    }
    causes
}

/// An error with all its causes, on one line, with control characters escaped.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let said = std::iter::once(error.to_string()).chain(causes(error));
    printable(said.collect::<Vec<_>>().join(": ")).to_string()
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

    #[test]
    fn a_cause_that_was_said_already_is_left_out() {
        let cause: Result<(), _> = Err(std::io::Error::other("no room"));
        let again = cause.context(|| "no room".to_owned());
        let error = again.context(|| "cannot listen: no room".to_owned());
        assert_eq!(causes(&error.unwrap_err()), Vec::<String>::new());
    }
}
