//! Tests of the crate from outside. They are one program, since each takes seconds to compile and link.

mod common;

mod addresses;
mod capacity;
mod conformance;
mod foreign;
mod in_doubt;
mod reserved;
mod teardown;
