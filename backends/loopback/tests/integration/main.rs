//! Tests of the crate from outside. They are one program, since each takes seconds to compile and link.

mod common;

mod root_adopt;
mod root_attach;
mod root_conformance;
mod root_lingering;
mod root_many;
mod root_teardown;
