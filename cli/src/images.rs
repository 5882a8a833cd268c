//! Making disk images with the mkfs tools of this machine.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use blockmount::{Disk, Manager, MountOptions, MountRequest};
use blockmount_linux::mkfs;
use gpt::disk::LogicalBlockSize;
use tokio::process::Command;
use walkdir::WalkDir;

use crate::child;
use crate::failure::{Context, Failure};
use crate::image_sources::{self, Limits};
use crate::interrupt::{Interrupt, Stop};
use crate::run::is_root;

/// The filesystems of which images can be made, and the tool that does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Maker {
    Erofs,
    Squashfs,
    Ext4,
    Xfs,
}

impl Maker {
    pub(crate) const ALL: [Maker; 4] = [Maker::Erofs, Maker::Squashfs, Maker::Ext4, Maker::Xfs];

    /// The kernel's name of the filesystem.
    pub(crate) fn filesystem(self) -> &'static str {
        match self {
            Maker::Erofs => "erofs",
            Maker::Squashfs => "squashfs",
            Maker::Ext4 => "ext4",
            Maker::Xfs => "xfs",
        }
    }

    /// The tool's name, and the Debian package that has it.
    pub(crate) fn tool(self) -> (&'static str, &'static str) {
        match self {
            Maker::Erofs => ("mkfs.erofs", "erofs-utils"),
            Maker::Squashfs => ("mksquashfs", "squashfs-tools"),
            Maker::Ext4 => ("mkfs.ext4", "e2fsprogs"),
            Maker::Xfs => ("mkfs.xfs", "xfsprogs"),
        }
    }

    /// Where the tool is, or why there is none.
    fn program(self) -> Result<PathBuf, Failure> {
        let (tool, package) = self.tool();
        found(tool, package)
    }

    /// Makes an image with the content of a directory.
    ///
    /// Nothing is written into an xfs without mounting it, which `manager` does.
    pub(crate) async fn make(
        self,
        image: &Path,
        content: &Path,
        manager: &Manager,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        let program = self.program()?;
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let (image_word, content_word) = (image.as_os_str().into(), content.as_os_str().into());
        match self {
            Maker::Erofs => child::run(interrupt, &program, [image_word, content_word]).await,
            Maker::Squashfs => {
                let options = words(&["-noappend", "-no-progress", "-quiet"]);
                child::run(
                    interrupt,
                    &program,
                    [content_word, image_word].into_iter().chain(options),
                )
                .await
            }
            Maker::Ext4 => {
                let (bytes, names) = extent(content);
                sparse(image, bytes + bytes / 4 + (24 << 20))?;
                let mut arguments = words(&["-q", "-F", "-m", "0", "-N"]);
                arguments.extend([(names + 1_000).to_string().into(), "-d".into()]);
                arguments.extend([content_word, image_word]);
                child::run(interrupt, &program, arguments).await
            }
            Maker::Xfs => {
                sparse(image, extent(content).0 + XFS_SIZE)?;
                let arguments = words(&["-q", "-f"]).into_iter().chain([image_word]);
                child::run(interrupt, &program, arguments).await?;
                fill(image, content, manager, interrupt).await
            }
        }
    }
}

/// mkfs.xfs refuses less than 300 MiB since xfsprogs 5.19. The file is sparse.
const XFS_SIZE: u64 = 320 << 20;

/// The makers whose tool is installed and whose filesystem this kernel knows, and for the others what is
/// missing.
pub(crate) async fn available(interrupt: &Interrupt) -> Result<(Vec<Maker>, Vec<String>), Failure> {
    let (mut makers, mut missing) = (Vec::new(), Vec::new());
    for maker in Maker::ALL {
        let (tool, package) = maker.tool();
        if maker == Maker::Xfs && !is_root() {
            missing.push("no xfs: only root can mount one to fill it".to_owned());
        } else if child::find(tool).is_none() {
            missing.push(format!("no {tool}: apt-get install {package}"));
        } else if !is_known_to_kernel(maker.filesystem(), interrupt).await? {
            missing.push(format!("this kernel has no {}", maker.filesystem()));
        } else {
            makers.push(maker);
        }
    }
    Ok((makers, missing))
}

/// Whether the kernel can mount a filesystem, with the module for it loaded if there is one.
async fn is_known_to_kernel(filesystem: &str, interrupt: &Interrupt) -> Result<bool, Failure> {
    let listed = || -> Result<bool, Failure> {
        let table = fs::read_to_string("/proc/filesystems")
            .context(|| "cannot read /proc/filesystems".to_owned())?;
        Ok(table
            .lines()
            .any(|line| line.split_whitespace().next_back() == Some(filesystem)))
    };
    if listed()? {
        return Ok(true);
    }
    // What a mount would have the kernel do; here a failure only means that there is no module.
    if let Some(modprobe) = child::find("modprobe") {
        let loaded = child::run(interrupt, &modprobe, ["-q", filesystem]).await;
        tracing::debug!(filesystem, loaded = loaded.is_ok(), "asked for a module");
    }
    listed()
}

/// Where a tool is, or which package has it.
fn found(tool: &str, package: &str) -> Result<PathBuf, Failure> {
    child::find(tool).ok_or_else(|| {
        Failure::new(format!("there is no {tool} on this machine"))
            .advise(format!("install it: apt-get install {package}"))
    })
}

/// An image without anything on it.
pub(crate) fn blank(image: &Path, size: u64) -> Result<(), Failure> {
    sparse(image, size)
}

/// An empty image that can be written to.
pub(crate) async fn scratch(image: &Path, size: u64, interrupt: &Interrupt) -> Result<(), Failure> {
    let program = found(mkfs::EXT4_TOOL, "e2fsprogs")?;
    sparse(image, size)?;
    let mut command = Command::new(&program);
    // What this machine has configured for its own filesystems may be more than the guest's kernel knows.
    command
        .args(mkfs::ext4_arguments(image))
        .env("MKE2FS_CONFIG", "/dev/null");
    child::run_command(interrupt, &program, command).await
}

/// A new file of a size, without content.
fn sparse(image: &Path, size: u64) -> Result<(), Failure> {
    File::create_new(image)
        .and_then(|file| file.set_len(size))
        .context(|| format!("cannot make {} with {size} bytes", image.display()))
}

/// How many bytes the files of a directory take on a filesystem with blocks of 4 KiB, and how many names
/// there are.
fn extent(directory: &Path) -> (u64, u64) {
    let sizes = WalkDir::new(directory).into_iter().flatten().map(|entry| {
        entry
            .metadata()
            .map_or(0, |metadata| metadata.len())
            .next_multiple_of(4_096)
    });
    sizes.fold((0, 0), |(bytes, names), size| (bytes + size, names + 1))
}

/// Writes the content into an image by mounting it.
async fn fill(
    image: &Path,
    content: &Path,
    manager: &Manager,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let request = MountRequest::new(MountOptions::default());
    let mount = manager.add(&Disk::virtual_disk(image), &request).await?;
    let (from, to) = (content.to_owned(), mount.path().to_owned());
    let copied = interrupt
        .blocking(move |stop| image_sources::copy(&from, &to, Path::new(""), Limits::NONE, stop))
        .await;
    mount
        .release()
        .await
        .context(|| format!("cannot release {}", image.display()))?;
    copied.map(|_| ())
}

/// Where the partitions of an image start, as every tool aligns them, and how large the first is.
const MIB: u64 = 1 << 20;

/// Wraps an image of a filesystem: a GPT with a small partition 1, and the filesystem on partition 2.
pub(crate) fn partitioned(filesystem: &Path, image: &Path, stop: &Stop) -> Result<(), Failure> {
    let what = || format!("cannot make the partitioned image {}", image.display());
    stop.check()?;
    let mut content = File::open(filesystem).context(what)?;
    let size = content
        .metadata()
        .context(what)?
        .len()
        .next_multiple_of(MIB);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(image)
        .context(what)?;
    // One MiB before the first partition and one for the table's copy at the end.
    file.set_len(3 * MIB + size).context(what)?;
    let start = write_table(&mut file, size).context(what)?;
    file.seek(SeekFrom::Start(start)).context(what)?;
    io::copy(&mut content, &mut file).context(what)?;
    Ok(())
}

/// Writes the table, and says where partition 2 starts, in bytes.
fn write_table(file: &mut File, size: u64) -> Result<u64, gpt::GptError> {
    let block = LogicalBlockSize::Lb512;
    let blocks = file.metadata()?.len() / block.as_u64() - 1;
    gpt::mbr::ProtectiveMBR::with_lb_size(u32::try_from(blocks).unwrap_or(u32::MAX))
        .overwrite_lba0(file)
        .map_err(io::Error::other)?;
    let config = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(block);
    let mut table = config.create_from_device(file, None)?;
    table.update_partitions(BTreeMap::new())?;
    let align = Some(MIB / block.as_u64());
    table.add_partition("first", MIB, gpt::partition_types::LINUX_FS, 0, align)?;
    let second = table.add_partition("layer", size, gpt::partition_types::LINUX_FS, 0, align)?;
    let start = table.partitions()[&second].bytes_start(block)?;
    table.write()?;
    Ok(start)
}
