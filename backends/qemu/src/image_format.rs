//! Which format an image is in: what its name says.

use std::fmt;
use std::path::Path;

/// The format of an image, by its name. What is in the file does not decide: a guest could write the header of another
/// format into its raw disk, and be given the file that it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The disk as it is: everything that has no other name.
    Raw,
    /// QEMU's own, named `.qcow2`.
    Qcow2,
    /// That of Virtual PC and Hyper-V, of fixed or growing size, named `.vhd`.
    Vhd,
    /// That of Hyper-V since 2012, of fixed or growing size, named `.vhdx`.
    Vhdx,
}

impl ImageFormat {
    /// The format that a name stands for, in upper or lower case.
    pub fn of(path: &Path) -> Self {
        let named = [Self::Qcow2, Self::Vhd, Self::Vhdx];
        let extension = path.extension().unwrap_or_default();
        let found = named.into_iter().find(|format| {
            let name = format.to_string();
            extension.eq_ignore_ascii_case(name)
        });
        found.unwrap_or(Self::Raw)
    }

    /// What QEMU calls the driver.
    pub(crate) fn driver(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vhd => "vpc",
            ImageFormat::Vhdx => "vhdx",
        }
    }
}

/// The ending of its names; `raw` for a raw one.
impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vhd => "vhd",
            ImageFormat::Vhdx => "vhdx",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides_about_the_format() {
        for (name, expected) in [
            ("/a.qcow2", ImageFormat::Qcow2),
            ("/a.QCOW2", ImageFormat::Qcow2),
            ("/a.vhd", ImageFormat::Vhd),
            ("/a.VhdX", ImageFormat::Vhdx),
            ("/a.img", ImageFormat::Raw),
            ("/a.raw", ImageFormat::Raw),
            ("/a.qcow2.img", ImageFormat::Raw),
            ("/qcow2", ImageFormat::Raw),
            ("/.qcow2", ImageFormat::Raw),
        ] {
            assert_eq!(ImageFormat::of(Path::new(name)), expected, "{name}");
        }
    }
}
