//! What a guest boots: a kernel, and a first file system with programs and the modules that they need.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::cpio::Archive;
use super::error::VmError;
use super::kernel::GuestKernel;
use super::modules::{Module, Modules};
use super::program::{self, Program};

/// The modules for all that the Linux engine does, by name. Those that a kernel has built in cost nothing.
pub const MODULES: [&str; 22] = [
    "virtio_pci",
    "virtio_console",
    "virtio_scsi",
    "sd_mod",
    "nfit",
    "nd_pmem",
    "virtio_pmem",
    "dm_mod",
    "dm_verity",
    "dm_crypt",
    "dm_integrity",
    "authenc",
    "xts",
    "ecb",
    "aesni_intel",
    "sha512_generic",
    "ext4",
    "xfs",
    "erofs",
    "squashfs",
    "overlay",
    "vmw_vsock_virtio_transport",
];

/// Those of [`MODULES`] by which a guest checks the integrity of a disk.
pub const VERITY_MODULES: [&str; 2] = ["dm_verity", "sha512_generic"];

/// Those of [`MODULES`] by which a guest encrypts a disk.
pub const ENCRYPTION_MODULES: [&str; 6] = [
    "dm_crypt",
    "dm_integrity",
    "authenc",
    "xts",
    "ecb",
    "aesni_intel",
];

/// Those of further ciphers that authenticate what they encrypt, with their versions for some processors: for
/// [`modules_if_there`](GuestImageBuilder::modules_if_there).
pub const AEAD_MODULES: [&str; 7] = [
    "aegis128",
    "aegis128_aesni",
    "chacha20poly1305",
    "chacha_generic",
    "chacha_x86_64",
    "poly1305_generic",
    "poly1305_x86_64",
];

/// Where a guest's program finds which modules to load: a path a line, in the order to load them in.
pub const MODULE_LIST: &str = "/etc/blockmount/modules";

/// Where the modules themselves are.
const MODULE_DIRECTORY: &str = "/lib/modules";

/// Where the further programs of a guest are, each under the name of its file: [`GuestImageBuilder::add_program`].
pub const PROGRAMS: &str = "/programs";

/// What a guest boots. Made once, it serves any number of VMs; cloning is cheap.
///
/// Besides the kernel this is an initramfs: one cpio archive of the format "newc" (magic `070701`, no checksums, as `cpio -o -H newc` writes and
/// Linux unpacks), not compressed, in which all files are root's. It has the program as `/init`, with the loader and the libraries that
/// an ELF file names, the modules below `/lib/modules` and their order in [`MODULE_LIST`], and what the builder was given.
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
    init: Option<PathBuf>,
    programs: Vec<PathBuf>,
    modules: Vec<String>,
    /// Modules that are left out where the kernel has none of the name.
    if_there: Vec<String>,
    files: Vec<(String, Vec<u8>)>,
}

impl GuestImage {
    /// Starts with a kernel, the program that is running as the guest's `/init`, and [`MODULES`].
    pub fn builder(kernel: GuestKernel) -> GuestImageBuilder {
        GuestImageBuilder {
            kernel,
            init: None,
            programs: Vec::new(),
            modules: MODULES.map(str::to_owned).into(),
            if_there: Vec::new(),
            files: Vec::new(),
        }
    }

    /// The kernel that it boots.
    pub fn kernel(&self) -> &GuestKernel {
        &self.0.kernel
    }

    /// What it boots besides the kernel: an archive (cpio) for the option `-initrd` of QEMU.
    pub fn initramfs(&self) -> &[u8] {
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
        self.init = Some(program.into());
        self
    }

    /// Adds a further program, an ELF file of this machine, to the directory [`PROGRAMS`], under the name of its file.
    /// Whether it is started is up to `/init`.
    #[must_use]
    pub fn add_program(mut self, program: impl Into<PathBuf>) -> Self {
        self.programs.push(program.into());
        self
    }

    /// Leaves modules out that are loaded otherwise, such as [`VERITY_MODULES`] of a guest that checks no disk: it boots faster.
    #[must_use]
    pub fn without_modules(mut self, names: &[&str]) -> Self {
        self.modules.retain(|module| !names.contains(&&**module));
        self
    }

    /// Adds the tools by which a guest makes and checks filesystems, as far as this machine has them: `mke2fs`, `e2fsck`,
    /// `mkfs.xfs` and `xfs_repair`.
    #[must_use]
    pub fn filesystem_tools(self) -> Self {
        self.tools(&["mke2fs", "e2fsck", "mkfs.xfs", "xfs_repair"])
    }

    /// Adds the tool by which a guest opens volumes of LUKS2, if this machine has it: `cryptsetup`, with its libraries about
    /// 10 MB.
    #[must_use]
    pub fn encryption_tools(self) -> Self {
        self.tools(&["cryptsetup"])
    }

    fn tools(self, names: &[&str]) -> Self {
        let directories = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"];
        let find = |name: &&str| {
            let mut candidates = directories.iter().map(|at| Path::new(at).join(name));
            candidates.find(|path| path.is_file())
        };
        let tools = names.iter().filter_map(find);
        tools.fold(self, GuestImageBuilder::add_program)
    }

    /// The modules that are loaded, besides those that they need, in place of [`MODULES`].
    #[must_use]
    pub fn modules<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.modules = names.into_iter().map(Into::into).collect();
        self
    }

    /// Adds modules, such as [`AEAD_MODULES`], as far as the kernel has any of these names: not every version has the same.
    #[must_use]
    pub fn modules_if_there(mut self, names: &[&str]) -> Self {
        self.if_there
            .extend(names.iter().copied().map(str::to_owned));
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
        let init = match self.init {
            Some(init) => init,
            None => program::running()?,
        };
        let mut programs = vec![("/init".to_owned(), Program::read(&init).await?)];
        for path in self.programs {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            programs.push((format!("{PROGRAMS}/{name}"), Program::read(&path).await?));
        }
        let (kernel, names, files) = (self.kernel, self.modules, self.files);
        let if_there = self.if_there;
        let pack = move || {
            let modules = Modules::in_directory(kernel.modules())?;
            let more = if_there.iter().filter(|name| modules.has(name));
            let names: Vec<&str> = names.iter().chain(more).map(String::as_str).collect();
            let initramfs = pack(&modules.in_order(&names)?, &programs, &files)?;
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
    modules: &[Module],
    programs: &[(String, Program)],
    files: &[(String, Vec<u8>)],
) -> Result<Vec<u8>, VmError> {
    let unfit = |error| VmError::new("cannot pack a guest's files").because(error);
    let mut archive = Archive::default();
    for directory in ["/dev", "/proc", "/sys", "/run", "/tmp"] {
        archive.directory(directory).map_err(unfit)?;
    }
    let mut libraries = BTreeMap::new();
    for (path, program) in programs {
        archive
            .file(path, &program.executable, true)
            .map_err(unfit)?;
        // Programs share most of them.
        libraries.extend(
            program
                .libraries
                .iter()
                .map(|(path, content)| (path, content)),
        );
    }
    for (path, content) in libraries {
        archive.file(path, content, true).map_err(unfit)?;
    }
    let mut list = String::new();
    for module in modules {
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

    #[test]
    fn what_is_left_out_is_among_what_there_is() {
        let kernel = GuestKernel::find().expect("tests/setup.sh fetches a kernel");
        let all = [&VERITY_MODULES[..], &ENCRYPTION_MODULES].concat();
        let small = GuestImage::builder(kernel).without_modules(&all);
        assert_eq!(small.modules.len(), MODULES.len() - all.len());
    }

    #[tokio::test]
    async fn modules_that_a_kernel_does_not_have_are_left_out_where_that_was_asked_for() {
        let kernel = || GuestKernel::find().expect("tests/setup.sh fetches a kernel");
        let names = ["no_such_module", "aegis128"];
        // Not this program, which has the names in it.
        let image = GuestImage::builder(kernel()).program("/bin/true");
        let image = image.modules(["erofs"]).modules_if_there(&names);
        let image = image.build().await.unwrap();
        let holds = |text: &str| {
            let mut windows = image.initramfs().windows(text.len());
            windows.any(|part| part == text.as_bytes())
        };
        assert!(holds("/lib/modules/aegis128.ko\n") && !holds("no_such_module"));
        let asked = GuestImage::builder(kernel()).modules(names).build();
        let error = asked.await.unwrap_err().to_string();
        assert!(error.contains("no module no_such_module"), "{error}");
    }

    #[tokio::test]
    async fn further_programs_are_in_a_directory_of_their_own_and_share_libraries() {
        let kernel = || GuestKernel::find().expect("tests/setup.sh fetches a kernel");
        let one = GuestImage::builder(kernel()).program("/bin/true").build();
        let two = GuestImage::builder(kernel())
            .program("/bin/true")
            .add_program("/bin/false")
            .build();
        let (one, two) = tokio::join!(one, two);
        let (one, two) = (one.unwrap(), two.unwrap());
        let count = |image: &GuestImage, text: &str| {
            let bytes = image.initramfs();
            let found = bytes
                .windows(text.len())
                .filter(|part| *part == text.as_bytes());
            found.count()
        };
        assert_eq!(count(&one, "programs/false\0"), 0);
        assert_eq!(count(&two, "programs/false\0"), 1);
        assert_eq!(count(&one, "/libc.so.6\0"), count(&two, "/libc.so.6\0"));
    }
}
