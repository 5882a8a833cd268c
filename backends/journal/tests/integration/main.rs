//! Tests of the crate from outside. They are one program, since each takes seconds to compile and link.

mod damage;
mod restart;
