//! Errors by the codes of gRPC, as containerd sorts them.

use std::error::Error;

use blockmount::{BackendError, ErrorKind};
use tonic::{Code, Status};

use crate::{InvalidMount, PerformError, Unreleased};

/// The longest message, in characters: it travels in the trailers, where clients take 8 KiB, and each byte may be spelled as three.
const LONGEST: usize = 1024;

pub(super) fn of_invalid(error: &InvalidMount) -> Status {
    status(Code::InvalidArgument, error)
}

pub(super) fn of_perform(error: &PerformError) -> Status {
    match error {
        PerformError::Invalid(error) => of_invalid(error),
        PerformError::Failed { error_kind, .. } => status(code(*error_kind), error),
    }
}

pub(super) fn of_release(error: &Unreleased) -> Status {
    status(code(error.kind()), error)
}

pub(super) fn of_backend(error: &BackendError) -> Status {
    status(code(error.kind()), error)
}

/// `UNIMPLEMENTED` is none of them: by that a client knows that nothing in a list is ours, and mounts it by itself.
fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Full => Code::ResourceExhausted,
        ErrorKind::LostWrites => Code::DataLoss,
        ErrorKind::Gone | ErrorKind::Uncertain => Code::Unavailable,
        ErrorKind::Busy | ErrorKind::Conflict | ErrorKind::NotFound | ErrorKind::Unsuitable => {
            Code::FailedPrecondition
        }
        _ => Code::Unknown,
    }
}

/// An error with its sources, in one line.
fn status(code: Code, error: &dyn Error) -> Status {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    Status::new(code, shortened(&message))
}

/// The message without what would end its line, and without its middle if it is too long.
fn shortened(message: &str) -> String {
    let length = message.chars().count();
    if length <= LONGEST {
        return blockmount::printable(message).to_string();
    }
    let start: String = message.chars().take(LONGEST / 2).collect();
    let end: String = message.chars().skip(length - LONGEST / 2).collect();
    let (start, end) = (blockmount::printable(start), blockmount::printable(end));
    format!("{start} ... {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_keeps_its_beginning_and_its_end() {
        let long = format!("mount 7: {}: no such file", "ä\n".repeat(1 << 20));
        let message = shortened(&long);
        assert!(message.len() < 8 << 10, "{}", message.len());
        assert!(message.starts_with("mount 7: ") && message.ends_with(": no such file"));
        assert!(!message.contains('\n'));
    }
}
