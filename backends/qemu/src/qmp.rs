//! QMP, the machine protocol of QEMU's monitor: commands, their answers, and events.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use blockmount_qemu::qmp::Qmp;
//! use serde_json::json;
//! use tokio::net::UnixStream;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let qmp = Qmp::connect(UnixStream::connect("/run/vm/qmp").await?).await?;
//! println!("QEMU {}", qmp.version());
//!
//! // Listen first, then ask: no event is lost.
//! let mut deleted = qmp.events("DEVICE_DELETED");
//! qmp.execute("device_del", json!({"id": "disk0"})).await?;
//! deleted.find(Duration::from_secs(10), |event| event.data["device"] == "disk0").await?;
//! # Ok(())
//! # }
//! ```
//!
//! | file | concern |
//! |---|---|
//! | `lines.rs` | the stream as lines of a bounded length |
//! | `message.rs` | what a line says |
//! | `link.rs` | which answer is whose |
//! | `descriptors.rs` | open files for QEMU |
//! | `events.rs` | who hears of which event |
//! | `health.rs` | what events say of the VM as a whole |
//! | `migration.rs` | the state of a VM in a file |
//! | `error.rs` | what can go wrong, and what that means for a backend |

mod descriptors;
mod error;
mod events;
mod health;
mod lines;
mod link;
mod message;
mod migration;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

pub(crate) use descriptors::{Kept, Passed};
use descriptors::{MonitorSocket, PendingDescriptors};
pub use error::QmpError;
use error::one_line;
pub use events::Events;
use events::Listeners;
pub use health::Health;
use lines::{Line, LineReader};
use link::Link;
pub use message::{Event, Version};

/// The longest command, in bytes: 1 MiB. QEMU would take 64 MiB (`MAX_TOKEN_SIZE` of its parser); no command
/// of ours has that much to say.
pub const MAX_COMMAND: usize = 1 << 20;

/// The longest line that is read, in bytes: 16 MiB. A longer one is skipped. The longest answer in use, that to
/// `query-named-block-nodes` with a thousand disks, has 2 MiB.
pub const MAX_LINE: usize = 16 << 20;

/// How long QEMU is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// For the answer to one command, from the moment it is given, or from QEMU's last answer while it is busy with commands that
    /// were given before. Default: 10 seconds.
    pub call: Duration,
    /// For the greeting, and then for the answer to `qmp_capabilities`. Default: 10 seconds.
    pub greeting: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            call: Duration::from_secs(10),
            greeting: Duration::from_secs(10),
        }
    }
}

/// A connection to the monitor of a QEMU, over any stream of bytes.
///
/// Any number of commands may be under way; QEMU does one after the other. A command that is answered with
/// garbage, too late or never fails alone; a late answer is ignored. When the stream ends, every call ends
/// with [`Gone`](QmpError::Gone) at once.
///
/// Cloning is cheap; clones are the same connection. The stream is closed when the last is dropped.
#[derive(Debug, Clone)]
pub struct Qmp(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    link: Link,
    listeners: Arc<Listeners>,
    deadlines: Deadlines,
    version: Version,
    /// None if the stream is no Unix socket.
    descriptors: Option<PendingDescriptors>,
    /// Of devices that may or may not have been added: the paths that QEMU was given, by the id.
    doubts: Mutex<HashMap<String, Vec<String>>>,
}

impl Qmp {
    /// Connects with the default [`Deadlines`].
    ///
    /// # Errors
    ///
    /// As for [`connect_with`](Self::connect_with).
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn connect<S>(stream: S) -> Result<Self, QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::connect_with(stream, Deadlines::default()).await
    }

    /// Takes QEMU's greeting, and enables its commands. Over a [`UnixStream`](tokio::net::UnixStream), the attachers pass
    /// QEMU open files; over any other stream they can only pass paths.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](QmpError::TimedOut) if there is no greeting: a monitor greets one client at a time, so another
    /// one may have it. [`Invalid`](QmpError::Invalid) if it is no QEMU that greets, and
    /// [`Gone`](QmpError::Gone) if the stream ends.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the stream.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn connect_with<S>(stream: S, deadlines: Deadlines) -> Result<Self, QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        match MonitorSocket::of(stream) {
            Ok((socket, pending)) => Self::take(socket, Some(pending), deadlines).await,
            Err(stream) => Self::take(stream, None, deadlines).await,
        }
    }

    async fn take<S>(
        stream: S,
        descriptors: Option<PendingDescriptors>,
        deadlines: Deadlines,
    ) -> Result<Self, QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        let mut reader = LineReader::new(reader, MAX_LINE);
        let deadline = deadlines.greeting;
        let version = timeout(deadline, greeting(&mut reader)).await;
        let version = version.unwrap_or_else(|_| {
            Err(QmpError::TimedOut {
                command: GREETING.to_owned(),
                deadline,
                sent: true,
            })
        })?;
        let listeners = Arc::new(Listeners::default());
        let link = Link::start(reader, writer, listeners.clone());
        let qmp = Qmp(Arc::new(Shared {
            link,
            listeners,
            deadlines,
            version,
            descriptors,
            doubts: Mutex::default(),
        }));
        qmp.execute_within("qmp_capabilities", NONE, deadline)
            .await?;
        Ok(qmp)
    }

    /// The version that QEMU greeted with.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// Has QEMU do a command, within the usual deadline, and returns its answer. Commands and their arguments are
    /// documented in QEMU's `qapi/*.json`; one without arguments takes [`NONE`].
    ///
    /// # Errors
    ///
    /// [`QmpError`] says what is known of the command then; after [`TimedOut`](QmpError::TimedOut) with `sent`,
    /// nothing is.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; a command that was sent is done, one that was not never will be.
    pub async fn execute(
        &self,
        command: &str,
        arguments: impl Serialize,
    ) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, self.0.deadlines.call)
            .await
    }

    /// As [`execute`](Self::execute), with a deadline of its own.
    ///
    /// # Errors
    ///
    /// As for [`execute`](Self::execute).
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: impl Serialize,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let line = |id| encode(command, &arguments, id);
        self.0.link.ask(command, deadline, line).await
    }

    /// Has QEMU do a command, within the usual deadline, and reads the parts of its answer that are wanted.
    ///
    /// # Errors
    ///
    /// As for [`execute`](Self::execute), and [`Invalid`](QmpError::Invalid) if the answer does not have them.
    pub async fn query<A: DeserializeOwned>(
        &self,
        command: &str,
        arguments: impl Serialize,
    ) -> Result<A, QmpError> {
        let answer = self.execute(command, arguments).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::Invalid {
            command: command.to_owned(),
            reason: one_line(&error),
        })
    }

    /// The events of a name, from now on: of what is asked for after this, none is lost.
    pub fn events(&self, name: &str) -> Events {
        self.0.listeners.listen(name)
    }

    /// Remembers that a device may have been added from these paths, or that there is no doubt.
    pub(crate) fn note_doubt(&self, id: &str, paths: Option<Vec<String>>) {
        // A map is whole after a panic.
        let mut doubts = self.0.doubts.lock().unwrap_or_else(PoisonError::into_inner);
        match paths {
            Some(paths) => drop(doubts.insert(id.to_owned(), paths)),
            None => drop(doubts.remove(id)),
        }
    }

    pub(crate) fn doubt(&self, id: &str) -> Option<Vec<String>> {
        let doubts = self.0.doubts.lock().unwrap_or_else(PoisonError::into_inner);
        doubts.get(id).cloned()
    }

    fn pending_descriptors(&self) -> Option<&PendingDescriptors> {
        self.0.descriptors.as_ref()
    }

    /// Waits for the end of the connection, which is that of QEMU, and says how it came.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost when the future is dropped.
    pub async fn closed(&self) -> Arc<str> {
        self.0.link.closed().await
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.0.link.is_closed()
    }

    /// How long each command is waited for if nothing else is said.
    pub fn deadlines(&self) -> Deadlines {
        self.0.deadlines
    }
}

/// The arguments of a command that has none.
pub const NONE: Option<()> = None;

/// What is waited for at first, in errors.
const GREETING: &str = "the greeting";

async fn greeting<R: AsyncRead + Unpin>(reader: &mut LineReader<R>) -> Result<Version, QmpError> {
    let command = GREETING.to_owned();
    let gone = |reason: String| QmpError::Gone {
        command: GREETING.to_owned(),
        reason: reason.into(),
    };
    let reason = match reader.next().await {
        Ok(Some(Line::Whole(line))) => match message::greeting(line) {
            Ok(version) => return Ok(version),
            Err(reason) => reason,
        },
        Ok(Some(Line::TooLong { bytes })) => format!("the first line has {bytes} bytes"),
        Ok(None) => return Err(gone("QEMU has closed the connection".to_owned())),
        Err(error) => return Err(gone(format!("the connection to QEMU was lost: {error}"))),
    };
    Err(QmpError::Invalid { command, reason })
}

/// The line of a command.
fn encode(command: &str, arguments: &impl Serialize, id: u64) -> Result<Vec<u8>, QmpError> {
    #[derive(Serialize)]
    struct Command<'a> {
        execute: &'a str,
        #[serde(skip_serializing_if = "Value::is_null")]
        arguments: Value,
        id: u64,
    }
    let unfit = |reason: String| QmpError::Unfit {
        command: command.to_owned(),
        reason,
    };
    let no_json = |error| unfit(format!("its arguments are no JSON: {error}"));
    let arguments = serde_json::to_value(arguments).map_err(no_json)?;
    let whole = Command {
        execute: command,
        arguments,
        id,
    };
    let mut line = serde_json::to_vec(&whole).map_err(no_json)?;
    line.push(b'\n');
    if line.len() > MAX_COMMAND {
        return Err(unfit(format!("it would have {} bytes", line.len())));
    }
    Ok(line)
}
