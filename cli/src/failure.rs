//! What the user is told when something went wrong: what, why, and what to do about it.

use std::error::Error as StdError;
use std::fmt;
use std::io;

pub(crate) use blockmount::printable;
use blockmount::{BackendError, ErrorKind, InvalidOptions, Step};
use rustix::io::Errno;

/// Why the program could not do what it was asked to.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    cause: Option<Box<dyn StdError + Send + Sync>>,
    advice: Option<String>,
    status: u8,
}

/// Exit status after a failure.
pub(crate) const FAILED: u8 = 1;
/// Exit status where the command line makes no sense; clap uses the same.
pub(crate) const USAGE: u8 = 2;
/// Exit status after a signal: what a shell reports for SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

impl Failure {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Failure {
            what: what.into(),
            cause: None,
            advice: None,
            status: FAILED,
        }
    }

    /// The command line made no sense.
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Failure {
            status: USAGE,
            ..Failure::new(what)
        }
    }

    /// A signal came before the work was done.
    pub(crate) fn interrupted(signal: &str) -> Self {
        Failure {
            status: INTERRUPTED,
            ..Failure::new(format!("interrupted by {signal}"))
        }
    }

    /// An error of the system that says itself what was tried.
    pub(crate) fn of_io(error: io::Error) -> Self {
        Failure::new(error.to_string()).because(error)
    }

    #[must_use]
    pub(crate) fn because(mut self, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    #[must_use]
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// The same, which is about one of several.
    #[must_use]
    pub(crate) fn of(mut self, one: impl fmt::Display) -> Self {
        self.what = format!("{one}: {}", self.what);
        self
    }

    /// Whether it is the failure of a step of the managers.
    pub(crate) fn is_of(&self, step: Step) -> bool {
        let cause = self.cause.as_deref();
        let error = cause.and_then(|cause| cause.downcast_ref::<blockmount::Error>());
        error.is_some_and(|error| error.step() == step)
    }

    /// All there is to tell but the advice.
    pub(crate) fn on_one_line(&self) -> String {
        let causes = self.causes().into_iter();
        causes.fold(self.what.clone(), |line, cause| format!("{line}: {cause}"))
    }

    pub(crate) fn status(&self) -> u8 {
        self.status
    }

    /// What each cause says, the nearest first; a cause that only repeats is left out.
    fn causes(&self) -> Vec<String> {
        let Some(cause) = self.cause.as_deref() else {
            return Vec::new();
        };
        let first = cause.to_string();
        // What the managers say of a step is what this says.
        let is_said = self.what.ends_with(&first) || cause.is::<blockmount::Error>();
        let first = (!is_said).then_some(first).into_iter();
        first.chain(blockmount_agent::causes(cause)).collect()
    }

    /// What to do about it: said by who knows best, or else by the kind of the cause.
    fn advice(&self) -> Option<String> {
        if self.advice.is_some() {
            return self.advice.clone();
        }
        let mut cause = self
            .cause
            .as_deref()
            .map(|cause| cause as &(dyn StdError + 'static));
        while let Some(error) = cause {
            if let Some(advice) = advice_on(error) {
                return Some(advice.to_owned());
            }
            cause = error.source();
        }
        None
    }
}

impl fmt::Display for Failure {
    /// All there is to tell, one thing a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", printable(&self.what))?;
        for cause in self.causes() {
            write!(f, "\n  because: {}", printable(cause))?;
        }
        match self.advice() {
            Some(advice) => write!(f, "\nadvice: {}", printable(advice)),
            None => Ok(()),
        }
    }
}

fn advice_on(error: &(dyn StdError + 'static)) -> Option<&'static str> {
    if error.downcast_ref::<InvalidOptions>().is_some() {
        return Some(
            "give each --option by itself, by its name in mount(8), and drop one of a contradiction",
        );
    }
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return advice_on_io(error.kind(), error.raw_os_error());
    }
    let kind = match error.downcast_ref::<blockmount::Error>() {
        Some(error) => {
            match advice_on_image(error).or(advice_on_step(error.step(), error.kind())) {
                Some(advice) => return Some(advice),
                None => error.kind(),
            }
        }
        None => error.downcast_ref::<BackendError>()?.kind(),
    };
    match kind {
        ErrorKind::Uncertain => {
            Some("it was torn down in case it had happened; run the command again")
        }
        ErrorKind::Gone => {
            Some("the guest is gone and took its mounts along; start it and run the command again")
        }
        ErrorKind::Busy => Some(
            "somebody uses it: find them with \"fuser -vm PATH\" or \"lsof PATH\", end them, and try again",
        ),
        // The cause of a full file system says it better.
        ErrorKind::Full if is_storage_full(error) => None,
        ErrorKind::Full => {
            Some("no slot is free: use fewer layers, or --transport auto in a virtual machine")
        }
        ErrorKind::Unsuitable => Some(
            "this kernel or transport cannot do it: load the module it needs, or use another filesystem",
        ),
        ErrorKind::NotFound => {
            Some("check the name, and see with \"blockmount inspect IMAGE\" what is in the image")
        }
        ErrorKind::Conflict => {
            Some("something else holds that disk or that path: release it, or choose another path")
        }
        ErrorKind::Invalid => Some("see \"blockmount mount --help\" for what can be asked for"),
        _ => None,
    }
}

fn is_storage_full(error: &(dyn StdError + 'static)) -> bool {
    std::iter::successors(error.source(), |&cause| cause.source())
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::StorageFull)
}

/// What is in an image says best what to do about it.
fn advice_on_image(error: &blockmount::Error) -> Option<&'static str> {
    let is_of_image = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Invalid);
    let disk = error
        .disk()
        .filter(|_| error.step() == Step::Mount && is_of_image)?;
    crate::content::advice_on(disk.source())
}

/// What is wrong with a request depends on how far it came.
fn advice_on_step(step: Step, kind: ErrorKind) -> Option<&'static str> {
    match (step, kind) {
        (Step::Identify | Step::Attach, ErrorKind::NotFound) => {
            Some("check the name of the image, and that it is there")
        }
        (Step::Identify | Step::Attach, ErrorKind::Invalid) => Some(
            "give a file with a whole image in it; \"blockmount inspect IMAGE\" says what is there; a qcow2 image that names other files needs --allow-backing",
        ),
        (Step::Mount, ErrorKind::NotFound | ErrorKind::Invalid) => Some(
            "see with \"blockmount inspect IMAGE\" what is in the image and which --partition or --fs is meant, and in mount(8) which --option its filesystem takes",
        ),
        (Step::Combine, ErrorKind::NotFound | ErrorKind::Invalid | ErrorKind::Conflict) => {
            Some("name an empty directory of your own for the tree, or one that is not there yet")
        }
        _ => None,
    }
}

fn advice_on_io(kind: io::ErrorKind, errno: Option<i32>) -> Option<&'static str> {
    match kind {
        io::ErrorKind::NotFound => Some("check the name"),
        io::ErrorKind::PermissionDenied => Some("run it as a user who may read it, or with sudo"),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Some("free some space, most of all below /var/tmp and /run")
        }
        io::ErrorKind::ReadOnlyFilesystem => Some("it has to be writable"),
        io::ErrorKind::FileTooLarge => {
            Some("raise the limit of the size of files: ulimit -f unlimited")
        }
        _ if errno == Some(Errno::MFILE.raw_os_error()) => {
            Some("raise the limit of open files: ulimit -n 65536")
        }
        _ => None,
    }
}

impl From<blockmount::Error> for Failure {
    fn from(error: blockmount::Error) -> Self {
        Failure::new(what_failed(&error)).because(error)
    }
}

/// What could not be done, as the user has asked for it: where a layer is mounted and by which locator is no matter of theirs.
fn what_failed(error: &blockmount::Error) -> String {
    let source = error.disk().map(|disk| disk.source().display());
    match (error.step(), source, error.path()) {
        (Step::Identify | Step::Attach, Some(source), _) => format!("cannot attach {source}"),
        (Step::Mount, Some(source), _) => format!("cannot mount {source}"),
        (Step::Combine, _, Some(path)) => {
            format!("cannot stack the layers at {}", path.display())
        }
        _ => error.to_string(),
    }
}

impl From<blockmount_agent::AgentError> for Failure {
    fn from(error: blockmount_agent::AgentError) -> Self {
        Failure::new(error.to_string()).because(error)
    }
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        Failure::new(error.to_string()).because(error)
    }
}

/// Adds what was tried to an error of the system.
pub(crate) trait Context<T> {
    /// Says what was tried, in lower case.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(what()).because(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_a_line_and_nothing_twice() {
        let cause = BackendError::busy("umount of /x").with_source(io::Error::other("EBUSY"));
        let text = Failure::from(cause).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..2], ["error: umount of /x", "  because: EBUSY"]);
        assert!(lines[2].starts_with("advice: somebody uses it"), "{text}");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn a_full_file_system_is_no_lack_of_slots() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let text = Failure::from(BackendError::full("cannot write x").with_source(full));
        assert!(text.to_string().contains("free some space"), "{text}");
        let text = Failure::from(BackendError::full("all slots are taken"));
        assert!(text.to_string().contains("no slot is free"), "{text}");
    }

    #[test]
    fn the_advice_of_who_knows_best_wins() {
        let failure = Failure::from(BackendError::conflict("taken")).advise("look there");
        assert!(failure.to_string().ends_with("\nadvice: look there"));
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let text = Failure::new("no file a\nerror: b\u{1b}[2J").to_string();
        assert_eq!(text, "error: no file a\\nerror: b\\u{1b}[2J");
    }
}
