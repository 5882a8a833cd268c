//! What the files of disks are to QEMU: open ones that it is given, and work on them within a deadline.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use blockmount_source::{id_of, image_lock};

/// Does blocking work within a deadline. After that, or when this future is dropped, the work is told by its argument that
/// nobody waits for it, and goes on until it notices.
///
/// # Errors
///
/// The error of the work; `Uncertain` if it was not done in time, or was cut off.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &str,
    deadline: Duration,
    work: impl FnOnce(&AtomicBool) -> Result<T, BackendError> + Send + 'static,
) -> Result<T, BackendError> {
    let given_up = Arc::new(AtomicBool::new(false));
    let _at_the_end = GiveUp(given_up.clone());
    let working = blockmount::blocking(move || work(&given_up));
    let done = tokio::time::timeout(deadline, working).await;
    done.unwrap_or_else(|_| {
        Err(BackendError::uncertain(format!(
            "work on {what} has not ended within {deadline:?}; is its filesystem there?"
        )))
    })
}

/// Tells work that it was given up, when this is dropped.
struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The error of work that changes nothing which anybody else sees, so that nothing is in doubt.
pub(crate) fn nothing_done(error: BackendError) -> BackendError {
    match error.kind() {
        ErrorKind::Uncertain => BackendError::other(error.message()),
        _ => error,
    }
}

/// A file for QEMU to open, kept open until it has.
#[derive(Debug)]
pub(crate) struct OpenFile {
    file: Arc<File>,
    path: String,
}

impl OpenFile {
    /// # Errors
    ///
    /// `Invalid` if the path is not UTF-8.
    pub(crate) fn new(file: File, path: &Path) -> Result<Self, BackendError> {
        let (file, path) = (Arc::new(file), absolute(path)?);
        Ok(OpenFile { file, path })
    }

    /// Absolute: QEMU may run in another directory.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Another descriptor of the open file.
    pub(crate) fn share(&self) -> Result<OwnedFd, BackendError> {
        let shared = self.file.try_clone();
        let shared = shared.map_err(|error| self.cannot("share", error))?;
        Ok(shared.into())
    }

    /// Proves that the path still names the open file. A path that is replaced and put back meanwhile is not noticed:
    /// what has to be proof against that is passed as a descriptor.
    pub(crate) async fn is_still_at_its_path(&self, timeout: Duration) -> Result<(), BackendError> {
        let (file, path) = (self.file.clone(), self.path.clone());
        let look = move |_: &_| Ok((file.metadata(), std::fs::metadata(path)));
        let looked = blocking(&self.path, timeout, look).await;
        let (opened, named) = looked.map_err(nothing_done)?;
        let opened = opened.map_err(|error| self.cannot("look at", error))?;
        match named.is_ok_and(|named| id_of(&named) == id_of(&opened)) {
            true => Ok(()),
            false => Err(BackendError::conflict(format!(
                "{} was replaced while QEMU opened it",
                self.path
            ))),
        }
    }

    /// The error for files of which QEMU could not lock one, with who has it.
    pub(crate) async fn in_use(files: &[Self], timeout: Duration) -> Option<BackendError> {
        let files: Vec<_> = files
            .iter()
            .map(|file| (file.file.clone(), file.path.clone()))
            .collect();
        let (_, first) = files.first()?.clone();
        let look = move |_: &_| {
            let look = |(file, path): (Arc<File>, String)| {
                let holders = image_lock::holders(&file, Path::new(&path));
                (!holders.is_empty()).then_some((path, holders))
            };
            Ok(files.into_iter().find_map(look))
        };
        let found = blocking(&first, timeout, look).await.ok().flatten();
        let (path, holders) = found.unwrap_or((first, Vec::new()));
        Some(image_lock::in_use(Path::new(&path), &holders))
    }

    fn cannot(&self, verb: &str, error: io::Error) -> BackendError {
        BackendError::other(format!("cannot {verb} {}", self.path)).with_source(error)
    }
}

/// A path as QEMU is given it, which may run in another directory.
///
/// # Errors
///
/// `Invalid` if it is not UTF-8.
fn absolute(path: &Path) -> Result<String, BackendError> {
    let absolute = std::path::absolute(path).map_err(|error| {
        BackendError::other(format!("cannot find out where {} is", path.display()))
            .with_source(error)
    })?;
    absolute.into_os_string().into_string().map_err(|path| {
        let path = path.display();
        BackendError::invalid(format!(
            "{path} cannot be given to QEMU, whose file names are UTF-8; rename it"
        ))
    })
}
