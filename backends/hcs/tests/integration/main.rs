//! Tests of the crate from outside. They are one program, since each takes seconds to compile and link.

mod common;

mod conformance;
mod documents;
mod guests;
mod in_doubt;
#[cfg(windows)]
mod windows_calls;
