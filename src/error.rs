//! Errors, sorted by what the caller can do next.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{DeviceLocator, Disk, printable};

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// It may or may not have happened (a time-out, a lost connection). The managers tear it down
    /// before they use the same key or slot again; the caller may simply ask again.
    Uncertain,
    /// The VM or the guest is gone. Tear-down counts as done; nothing can be set up any more.
    Gone,
    /// The tear-down is done, but something that was written before has not reached the disk. There is nothing to retry:
    /// the release reports it once.
    LostWrites,
    /// In use. A release may be retried once the device is no longer in use.
    Busy,
    /// No slot is free. Release something, or use another transport.
    Full,
    /// This transport or guest cannot do it, another one may.
    Unsuitable,
    /// What was named is not there.
    NotFound,
    /// It contradicts what is already there: the same disk with other access, a taken path.
    Conflict,
    /// The request itself is wrong and will never work.
    Invalid,
    /// None of the above; see the message and the source.
    Other,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::Uncertain => "uncertain",
            ErrorKind::Gone => "gone",
            ErrorKind::LostWrites => "lost writes",
            ErrorKind::Busy => "busy",
            ErrorKind::Full => "full",
            ErrorKind::Unsuitable => "unsuitable",
            ErrorKind::NotFound => "not found",
            ErrorKind::Conflict => "conflict",
            ErrorKind::Invalid => "invalid",
            ErrorKind::Other => "other",
        })
    }
}

/// The error of a backend.
///
/// The message says what was tried on what, in lower case and without a full stop. The source is
/// never repeated inside the message. The fields beside them are for programs.
///
/// It travels: serialised, it keeps its kind, message and fields, and its sources as their messages.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BackendError(
    /// Behind a pointer, so that the answers that are no errors stay small.
    Arc<Failure>,
);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Failure {
    kind: ErrorKind,
    message: Arc<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    operation: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    errno: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<Arc<Path>>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        with = "source_messages"
    )]
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl BackendError {
    /// An error of a kind, with a message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        BackendError(Arc::new(Failure {
            kind,
            message: message.into().into(),
            operation: None,
            errno: None,
            path: None,
            source: None,
        }))
    }

    fn with(mut self, change: impl FnOnce(&mut Failure)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// The same error with its cause. The number of a system call's error becomes its [`errno`](Self::errno), unless it
    /// has one.
    #[must_use]
    pub fn with_source(self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        let source = source.into();
        let errno = source
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error);
        self.with(|failure| {
            failure.errno = failure.errno.or(errno);
            failure.source = Some(source.into());
        })
    }

    /// The same error with the operation that failed, such as `fsconfig` or `device_add`.
    #[must_use]
    pub fn with_operation(self, operation: impl Into<Arc<str>>) -> Self {
        self.with(|failure| failure.operation = Some(operation.into()))
    }

    /// The same error with the number that the system gave it.
    #[must_use]
    pub fn with_errno(self, errno: i32) -> Self {
        self.with(|failure| failure.errno = Some(errno))
    }

    /// The same error with the path it is about.
    #[must_use]
    pub fn with_path(self, path: impl Into<Arc<Path>>) -> Self {
        self.with(|failure| failure.path = Some(path.into()))
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was tried on what.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The operation that failed, if the backend names one.
    pub fn operation(&self) -> Option<&str> {
        self.0.operation.as_deref()
    }

    /// The number of the error where it happened: `errno` of the host or of the guest.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }

    /// The path it is about, if the backend names one.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// A backend must not panic; if it does, what it has done is unknown.
    pub(crate) fn from_panic(panic: Box<dyn Any + Send>) -> Self {
        let said = match panic.downcast_ref::<&str>() {
            Some(text) => text,
            None => panic
                .downcast_ref::<String>()
                .map_or("no message", String::as_str),
        };
        BackendError::new(
            ErrorKind::Uncertain,
            format!("the backend panicked: {said}"),
        )
    }
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident = $kind:ident;)*) => {
        impl BackendError {
            $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self {
                Self::new(ErrorKind::$kind, message)
            })*
        }
    };
}

constructors! {
    /// An error of kind [`ErrorKind::Uncertain`].
    uncertain = Uncertain;
    /// An error of kind [`ErrorKind::Gone`].
    gone = Gone;
    /// An error of kind [`ErrorKind::LostWrites`].
    lost_writes = LostWrites;
    /// An error of kind [`ErrorKind::Busy`].
    busy = Busy;
    /// An error of kind [`ErrorKind::Full`].
    full = Full;
    /// An error of kind [`ErrorKind::Unsuitable`].
    unsuitable = Unsuitable;
    /// An error of kind [`ErrorKind::NotFound`].
    not_found = NotFound;
    /// An error of kind [`ErrorKind::Conflict`].
    conflict = Conflict;
    /// An error of kind [`ErrorKind::Invalid`].
    invalid = Invalid;
    /// An error of kind [`ErrorKind::Other`].
    other = Other;
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        printable(&self.0.message).fmt(f)
    }
}

impl fmt::Debug for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for BackendError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// A step on the way of a disk into a guest and out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Step {
    /// Finding out which disk is meant.
    Identify,
    /// Making a disk visible to the VM.
    Attach,
    /// Mounting a visible device in the guest.
    Mount,
    /// Stacking mounted layers as an overlay.
    Combine,
    /// Taking an overlay apart.
    Separate,
    /// Showing a mount at a further place.
    Bind,
    /// Removing a view of a mount.
    Unbind,
    /// Unmounting a device in the guest.
    Unmount,
    /// Removing a device from the guest.
    Unplug,
    /// Taking a disk out of the VM.
    Detach,
    /// Writing to the journal what was done or is about to be done.
    Record,
    /// Reading the journal after a restart.
    Recover,
    /// Finding out what a restart has left.
    Adopt,
    /// Making a disk larger.
    Resize,
    /// Making what is mounted as large as its disk.
    Grow,
    /// Asking how full a filesystem is.
    Usage,
    /// Telling a disk which of its blocks are not used.
    Trim,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Identify => "identify",
            Step::Attach => "attach",
            Step::Mount => "mount",
            Step::Combine => "combine",
            Step::Separate => "separate",
            Step::Bind => "bind",
            Step::Unbind => "unbind",
            Step::Unmount => "unmount",
            Step::Unplug => "unplug",
            Step::Detach => "detach",
            Step::Record => "record",
            Step::Recover => "recover",
            Step::Adopt => "adopt",
            Step::Resize => "resize",
            Step::Grow => "grow",
            Step::Usage => "usage",
            Step::Trim => "trim",
        })
    }
}

/// What a manager answers: the step that failed, on which disk, device and path, and why.
///
/// `Display` is one line; the cause is its [`source`](StdError::source). Cloning is cheap: all
/// callers that waited for one attempt get its outcome.
#[derive(Debug, Clone)]
pub struct Error(Arc<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    step: Step,
    disk: Option<Disk>,
    locator: Option<DeviceLocator>,
    path: Option<PathBuf>,
    cause: BackendError,
}

impl Error {
    pub(crate) fn new(step: Step, cause: BackendError) -> Self {
        Error(Arc::new(Inner {
            step,
            disk: None,
            locator: None,
            path: None,
            cause,
        }))
    }

    pub(crate) fn on_disk(self, disk: &Disk) -> Self {
        self.with(|inner| inner.disk = Some(disk.clone()))
    }

    pub(crate) fn on_device(self, locator: &DeviceLocator) -> Self {
        self.with(|inner| inner.locator = Some(locator.clone()))
    }

    pub(crate) fn on_path(self, path: &Path) -> Self {
        self.with(|inner| inner.path = Some(path.to_owned()))
    }

    fn with(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.cause.kind()
    }

    /// The step that failed.
    pub fn step(&self) -> Step {
        self.0.step
    }

    /// The disk it was about, if one is known.
    pub fn disk(&self) -> Option<&Disk> {
        self.0.disk.as_ref()
    }

    /// The device it was about, if it had got that far.
    pub fn locator(&self) -> Option<&DeviceLocator> {
        self.0.locator.as_ref()
    }

    /// The path in the guest it was about, if one was involved.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// What the backend said.
    pub fn cause(&self) -> &BackendError {
        &self.0.cause
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            step,
            disk,
            locator,
            path,
            ..
        } = &*self.0;
        write!(f, "cannot {step}")?;
        if let Some(disk) = disk {
            write!(f, " disk {}", printable(disk))?;
        }
        if let Some(locator) = locator {
            write!(
                f,
                " {} {locator}",
                if disk.is_some() { "as" } else { "device" }
            )?;
        }
        if let Some(path) = path {
            write!(f, " at {}", printable(path.display()))?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.0.cause)
    }
}

/// The sources of an error as their messages, outermost first.
mod source_messages {
    use std::error::Error as StdError;
    use std::fmt;
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// As many sources as are carried. A chain is rarely longer than three.
    const LONGEST_CHAIN: usize = 16;

    type Source = Option<Arc<dyn StdError + Send + Sync>>;

    /// A source that has crossed a line: only its message is left.
    #[derive(Debug)]
    struct Message {
        text: String,
        source: Option<Box<Message>>,
    }

    impl fmt::Display for Message {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            crate::printable(&self.text).fmt(f)
        }
    }

    impl StdError for Message {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            self.source.as_deref().map(|source| source as _)
        }
    }

    pub(super) fn serialize<S: Serializer>(source: &Source, to: S) -> Result<S::Ok, S::Error> {
        let first = source.as_deref().map(|source| source as &dyn StdError);
        let chain = std::iter::successors(first, |error: &&dyn StdError| (*error).source());
        let messages: Vec<String> = chain.take(LONGEST_CHAIN).map(ToString::to_string).collect();
        messages.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Source, D::Error> {
        let messages = Vec::<String>::deserialize(from)?;
        let chain = messages.into_iter().take(LONGEST_CHAIN).rev();
        let outermost = chain.fold(None, |source, text| {
            Some(Box::new(Message { text, source }))
        });
        Ok(outermost.map(|message| Arc::from(message as Box<dyn StdError + Send + Sync>)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_error_travels() {
        let cause = io::Error::from_raw_os_error(16);
        let sent = BackendError::busy("cannot unmount /a")
            .with_source(cause)
            .with_operation("umount2")
            .with_path(Path::new("/a"));
        let text = serde_json::to_string(&sent).unwrap();
        let came: BackendError = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (came.kind(), came.message(), came.errno()),
            (ErrorKind::Busy, "cannot unmount /a", Some(16))
        );
        assert_eq!(
            (came.operation(), came.path()),
            (Some("umount2"), Some(Path::new("/a")))
        );
        let (sent, came) = (sent.source().unwrap(), came.source().unwrap());
        assert_eq!(sent.to_string(), came.to_string());
        let bare: BackendError =
            serde_json::from_str(r#"{"kind":"Gone","message":"m","later":1}"#).unwrap();
        assert!(bare.source().is_none() && bare.errno().is_none());
    }
}
