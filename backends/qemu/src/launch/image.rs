//! What a guest boots: a kernel, and a first file system with one program and the modules it needs.

use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::cpio::Archive;
use super::error::VmError;
use super::kernel::GuestKernel;
use super::modules::Modules;
use super::program::{self, Program};

/// The modules for all that the Linux engine does, by name. Those that a kernel has built in cost nothing.
pub const MODULES: [&str; 14] = [
    "virtio_pci",
    "virtio_console",
    "virtio_scsi",
    "sd_mod",
    "nfit",
    "nd_pmem",
    "virtio_pmem",
    "dm_mod",
    "ext4",
    "xfs",
    "erofs",
    "squashfs",
    "overlay",
    "vmw_vsock_virtio_transport",
];

/// Where a guest's program finds which modules to load: a path a line, in the order to load them in.
pub const MODULE_LIST: &str = "/etc/blockmount/modules";

/// Where the modules themselves are.
const MODULE_DIRECTORY: &str = "/lib/modules";

/// What a guest boots. Made once, it serves any number of VMs; cloning is cheap.
#[derive(Debug, Clone)]
pub struct GuestImage(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kernel: GuestKernel,
    initramfs: Vec<u8>,
    digest: String,
}

/// Puts a [`GuestImage`] together.
#[derive(Debug)]
pub struct GuestImageBuilder {
    kernel: GuestKernel,
    program: Option<PathBuf>,
    modules: Vec<String>,
    files: Vec<(String, Vec<u8>)>,
}

impl GuestImage {
    /// Starts with a kernel, the program that is running as the guest's `/init`, and [`MODULES`].
    pub fn builder(kernel: GuestKernel) -> GuestImageBuilder {
        GuestImageBuilder {
            kernel,
            program: None,
            modules: MODULES.map(str::to_owned).into(),
            files: Vec::new(),
        }
    }

    /// The kernel that it boots.
    pub fn kernel(&self) -> &GuestKernel {
        &self.0.kernel
    }

    pub(super) fn initramfs(&self) -> &[u8] {
        &self.0.initramfs
    }

    /// The same for the same kernel and the same files: SHA-256, in hexadecimal.
    pub(super) fn digest(&self) -> &str {
        &self.0.digest
    }
}

impl GuestImageBuilder {
    /// The program that the guest runs as `/init`: an ELF file of this machine, static or not. By default
    /// the program that is running.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// The modules that are loaded, besides those that they need, in place of [`MODULES`].
    #[must_use]
    pub fn modules<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.modules = names.into_iter().map(Into::into).collect();
        self
    }

    /// Adds a file, at an absolute path.
    #[must_use]
    pub fn file(mut self, path: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.into(), content.into()));
        self
    }

    /// Reads everything, and packs it.
    ///
    /// # Errors
    ///
    /// If the kernel, a module or the program cannot be read, or a file cannot be in an archive.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped.
    pub async fn build(self) -> Result<GuestImage, VmError> {
        let program = match self.program {
            Some(program) => program,
            None => program::running()?,
        };
        let program = Program::read(&program).await?;
        let (kernel, names, files) = (self.kernel, self.modules, self.files);
        let pack = move || {
            let initramfs = pack(&kernel, &program, &names, &files)?;
            let image = std::fs::read(kernel.image()).map_err(|error| {
                let path = kernel.image().display();
                VmError::new(format!("cannot read the guest's kernel {path}")).because(error)
            })?;
            let digest = Sha256::new().chain_update(image).chain_update(&initramfs);
            Ok(GuestImage(Arc::new(Inner {
                kernel,
                digest: hexadecimal(&digest.finalize()),
                initramfs,
            })))
        };
        tokio::task::spawn_blocking(pack)
            .await
            .map_err(|error| VmError::new("cannot pack a guest's files").because(error))?
    }
}

fn pack(
    kernel: &GuestKernel,
    program: &Program,
    names: &[String],
    files: &[(String, Vec<u8>)],
) -> Result<Vec<u8>, VmError> {
    let unfit = |error| VmError::new("cannot pack a guest's files").because(error);
    let mut archive = Archive::default();
    for directory in ["/dev", "/proc", "/sys", "/run", "/tmp"] {
        archive.directory(directory).map_err(unfit)?;
    }
    archive
        .file("/init", &program.executable, true)
        .map_err(unfit)?;
    for (path, content) in &program.libraries {
        archive.file(path, content, true).map_err(unfit)?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut list = String::new();
    for module in Modules::in_directory(kernel.modules())?.in_order(&names)? {
        let path = format!("{MODULE_DIRECTORY}/{}.ko", module.name);
        archive.file(&path, &module.content, false).map_err(unfit)?;
        list += &path;
        list.push('\n');
    }
    archive
        .file(MODULE_LIST, list.as_bytes(), false)
        .map_err(unfit)?;
    for (path, content) in files {
        archive.file(path, content, false).map_err(unfit)?;
    }
    Ok(archive.finish())
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_files_are_the_same_image() {
        let build = |text: &str| {
            let kernel = GuestKernel::find().expect("tests/setup.sh fetches a kernel");
            GuestImage::builder(kernel).file("/etc/x", text).build()
        };
        let (one, two, other) = tokio::join!(build("1"), build("1"), build("2"));
        let (one, two, other) = (one.unwrap(), two.unwrap(), other.unwrap());
        assert_eq!(one.digest(), two.digest());
        assert_ne!(one.digest(), other.digest());
        assert_eq!(one.initramfs(), two.initramfs());
    }
}
