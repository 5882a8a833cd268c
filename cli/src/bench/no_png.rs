//! In place of `png.rs` in a program that was built without it.

use std::convert::Infallible;
use std::path::Path;

use crate::failure::Failure;

/// There are none.
pub(crate) struct Letters(Infallible);

impl Letters {
    pub(crate) fn of_this_machine(file: &Path) -> Result<Self, Failure> {
        let what = format!("cannot draw {}", file.display());
        let advice = "name a file that ends in .svg, or build the program with its feature png";
        Err(Failure::usage(what)
            .because("this program was built without PNG")
            .advise(advice))
    }

    pub(crate) fn png(
        &self,
        _: &str,
        _: (u32, u32),
    ) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        match self.0 {}
    }
}
