//! Images of formats that the kernel does not read, shown as raw files of this machine by QEMU's storage daemon.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use blockmount::{BackendError, Disk};
use rustix::mount::{UnmountFlags, unmount};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::process::Process;
use crate::qmp::{NONE, Qmp};
use crate::scsi::Image;

const PROGRAM: &str = "qemu-storage-daemon";
/// What shows a file whose content a process makes up.
const FUSE: &str = "/dev/fuse";
/// How long the daemon may take to end; it takes milliseconds.
const ENDING: Duration = Duration::from_secs(10);

/// Raw, read-only files with what is in images of other formats, for as long as this lives: loop devices can be made of them.
///
/// They are mounts (FUSE) of a process `qemu-storage-daemon`, which is given the open images and opens no other file. The
/// kernel kills it if we are killed; what is read of the files then is `EIO`.
#[derive(Debug)]
pub struct ShownImages {
    process: Process,
    qmp: Qmp,
    paths: Vec<PathBuf>,
}

impl ShownImages {
    /// Shows disks, in a directory that only root can write to. Each file has the name of its image, in a directory of its
    /// own. Differences to other images are shown only where that is allowed: such an image names the files that are read.
    ///
    /// # Errors
    ///
    /// As for an attachment of [`QemuScsi`](crate::QemuScsi): `Invalid` for an image that is not what its name says or that
    /// is the difference to another. `Unsuitable` if this machine has no storage daemon or no FUSE; the error says which.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future kills the daemon.
    pub async fn start(
        disks: &[Disk],
        directory: &Path,
        allows_backing: bool,
    ) -> Result<Self, BackendError> {
        if !Path::new(FUSE).exists() {
            return Err(BackendError::unsuitable(format!(
                "images of other formats are shown by FUSE, and this machine has no {FUSE}: load the module (modprobe fuse), \
                 or convert the image (qemu-img convert -O raw)"
            )));
        }
        let looked_at = disks.to_vec();
        let open = move || {
            let open = |disk: &Disk| {
                let id = blockmount_source::identify(disk)?;
                Image::inspect(disk, &id, allows_backing)
            };
            looked_at.iter().map(open).collect::<Result<Vec<_>, _>>()
        };
        let images = blockmount::blocking(open).await?;
        let inherited = images.iter().flat_map(Image::files);
        let inherited = inherited.map(|file| file.share());
        let inherited = inherited.collect::<Result<Vec<OwnedFd>, _>>()?;
        let numbers: Vec<String> = inherited
            .iter()
            .map(|file| format!("/proc/self/fd/{}", file.as_raw_fd()))
            .collect();
        let (process, qmp) = start_daemon(inherited).await?;
        let mut shown = ShownImages {
            process,
            qmp,
            paths: Vec::new(),
        };
        let mut numbers = numbers.as_slice();
        for (image, disk) in images.iter().zip(disks) {
            let (own, others) = numbers.split_at(image.files().len());
            numbers = others;
            if let Err(error) = shown.show(image, own, disk, directory).await {
                // What was shown before must not stay.
                let ended = shown.end().await;
                if let Err(stays) = ended {
                    tracing::warn!(%stays, "a file of the storage daemon stays");
                }
                return Err(error);
            }
        }
        Ok(shown)
    }

    async fn show(
        &mut self,
        image: &Image,
        opened: &[String],
        disk: &Disk,
        directory: &Path,
    ) -> Result<(), BackendError> {
        let tried = || format!("cannot show {disk} as a raw file");
        let number = self.paths.len();
        let path = make_file(directory, number, disk)
            .map_err(|error| BackendError::other(tried()).with_source(error))?;
        let name = format!("image{number}");
        let added = self.qmp.execute("blockdev-add", image.node(&name, opened));
        let added = added.await;
        added.map_err(|error| error.while_trying(tried()))?;
        let export = json!({
            "type": "fuse",
            "id": name,
            "node-name": name,
            "mountpoint": path,
            "writable": false,
            "allow-other": "off",
        });
        // From here on it may be a mount.
        self.paths.push(path);
        let exported = self.qmp.execute("block-export-add", export).await;
        exported.map_err(|error| error.while_trying(tried()))?;
        Ok(())
    }

    /// The files, in the order of the disks.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Waits until the daemon has ended, and says how: nothing can be read of the files any more. Cancel safe.
    pub async fn ended(&self) -> String {
        format!(
            "{PROGRAM}, which shows images, has ended: {}",
            self.process.ended().await
        )
    }

    /// Whether the daemon has ended already.
    pub fn has_ended(&self) -> bool {
        !self.process.is_running()
    }

    /// Ends the daemon, and proves that no file is a mount any more. Nothing may use the files.
    ///
    /// # Errors
    ///
    /// `Busy` if a file is in use, `Other` if it cannot be unmounted for another reason.
    pub async fn end(self) -> Result<(), BackendError> {
        // One that does not answer, or has ended, is killed.
        let asked = self.qmp.execute("quit", NONE).await;
        if asked.is_err() || timeout(ENDING, self.process.ended()).await.is_err() {
            self.process.kill();
            self.process.ended().await;
        }
        let paths = self.paths;
        blockmount::blocking(move || paths.iter().try_for_each(|path| unmount_dead(path))).await
    }
}

/// Starts the daemon, which can open what it inherits and is told by its monitor what to show.
async fn start_daemon(mut inherited: Vec<OwnedFd>) -> Result<(Process, Qmp), BackendError> {
    let cannot = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => BackendError::unsuitable(format!(
            "images of other formats are shown by {PROGRAM}, which this machine has not: install it (apt-get install \
             qemu-system-common), or convert the image (qemu-img convert -O raw)"
        )),
        _ => BackendError::other(format!("cannot start {PROGRAM}")).with_source(error),
    };
    let (ours, theirs) = StdUnixStream::pair().map_err(cannot)?;
    ours.set_nonblocking(true).map_err(cannot)?;
    let mut command = Command::new(PROGRAM);
    command.arg("--chardev");
    command.arg(format!("socket,id=monitor,fd={}", theirs.as_raw_fd()));
    command.args(["--monitor", "chardev=monitor"]);
    inherited.push(theirs.into());
    let process = Process::start(command, inherited, None)
        .await
        .map_err(cannot)?;
    let monitor = UnixStream::from_std(ours).map_err(cannot)?;
    match Qmp::connect(monitor).await {
        Ok(qmp) => Ok((process, qmp)),
        Err(error) => {
            process.kill();
            process.read_out().await;
            let said = process.complaints.last_words();
            Err(error.while_trying(format!("cannot start {PROGRAM} ({said})")))
        }
    }
}

/// The empty file that becomes the disk. Its name is that of the image, which errors and tables show.
fn make_file(directory: &Path, number: usize, disk: &Disk) -> io::Result<PathBuf> {
    let directory = directory.join(number.to_string());
    fs::create_dir(&directory)?;
    let name = disk.source().file_name().and_then(|name| name.to_str());
    let path = directory.join(name.unwrap_or("disk"));
    fs::File::create_new(&path)?;
    Ok(path)
}

/// Unmounts what a daemon has left that was killed. One that has ended in order has left nothing.
fn unmount_dead(path: &Path) -> Result<(), BackendError> {
    use rustix::io::Errno;
    match unmount(path, UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(errno) => {
            let what = format!("cannot unmount {}", path.display());
            let error = match errno {
                Errno::BUSY => BackendError::busy(what),
                _ => BackendError::other(what),
            };
            Err(error.with_source(io::Error::from(errno)))
        }
    }
}
