//! The kernel that a guest runs.

use std::path::{Path, PathBuf};

use super::error::VmError;

/// A kernel and its modules, as files of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestKernel {
    image: PathBuf,
    modules: PathBuf,
}

impl GuestKernel {
    /// Where [`find`](Self::find) looks for `vmlinuz` and the directory `modules`: a kernel for guests, which has
    /// nothing to do with the one that this machine runs.
    pub const DIRECTORY: &str = "/var/lib/blockmount/kernel";

    /// A kernel image (`bzImage` or an uncompressed `vmlinux`) and the directory of its modules. The modules may
    /// not be compressed.
    pub fn new(image: impl Into<PathBuf>, modules: impl Into<PathBuf>) -> Self {
        GuestKernel {
            image: image.into(),
            modules: modules.into(),
        }
    }

    /// The kernel in [`DIRECTORY`](Self::DIRECTORY). Blocks.
    ///
    /// # Errors
    ///
    /// If there is none; the error says what is missing.
    pub fn find() -> Result<Self, VmError> {
        let directory = Path::new(Self::DIRECTORY);
        let kernel = Self::new(directory.join("vmlinuz"), directory.join("modules"));
        match kernel.image.is_file() && kernel.modules.is_dir() {
            true => Ok(kernel),
            false => Err(VmError::new(format!(
                "there is no kernel for a guest in {}: it needs a file vmlinuz and a directory modules there",
                directory.display()
            ))),
        }
    }

    /// The image.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The directory of the modules.
    pub fn modules(&self) -> &Path {
        &self.modules
    }
}
