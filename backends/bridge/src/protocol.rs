//! The messages of our own protocol, and their bytes.
//!
//! A frame is a header of 12 bytes, little-endian, and a body in JSON:
//!
//! ```text
//! u32 size of the frame, header included (at most 1 MiB) | u64 id | body
//! ```
//!
//! A header of zeros is no frame and ends the connection, for lines that have no end of their own. An answer has the
//! id of its request. The first request of a connection is [`Hello`], which also tells the host's time; each later one is
//! a [`Request`].

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockmount::{BackendError, BindMount, DeviceLocator, MountOptions, Overlay, Presence, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::frames::{FrameError, Header, number};

/// The longest frame, header included, in bytes: an overlay of 250 layers with the longest paths fits.
pub const MAX_FRAME: usize = 1 << 20;

/// The size of a header, in bytes.
const HEADER_LEN: usize = 12;

/// The versions of the protocol that this crate speaks. A field of a request's options that is new needs no new
/// version: an agent refuses a field or a request that it does not know, by name. Version 2 has the requests to adopt, version 3 those
/// about the size of filesystems.
const VERSIONS: (u32, u32) = (1, 3);

/// The first version in which an agent can be asked what is there.
pub(crate) const ADOPTS: u32 = 2;
/// The first version in which an agent can be asked about the size of a filesystem.
pub(crate) const SIZES: u32 = 3;

/// This software, as it names itself to the other end.
pub(crate) const SOFTWARE: &str = concat!("blockmount ", env!("CARGO_PKG_VERSION"));

/// How many random bytes a host gives: what the kernel's generator is seeded with at most.
const ENTROPY: usize = 64;

/// How much of an error's text is sent when the whole error is too long, in characters.
const LONGEST_MESSAGE: usize = 4 << 10;

/// The header of a frame: its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(pub(crate) u64);

impl Header for Id {
    const LENGTH: usize = HEADER_LEN;
    const LONGEST: usize = MAX_FRAME;

    fn parse(bytes: &[u8]) -> (Self, u64) {
        let (size, id) = bytes.split_at(4);
        (Id(number(id)), number(size))
    }

    fn id(&self) -> u64 {
        self.0
    }
}

/// What the guest is asked for: a call of its contracts, as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub enum Request {
    /// [`Mounter::mount`](blockmount::Mounter::mount).
    Mount {
        /// The device.
        locator: DeviceLocator,
        /// Where to mount it.
        target: PathBuf,
        /// How to mount it.
        options: MountOptions,
    },
    /// [`Mounter::unmount`](blockmount::Mounter::unmount).
    Unmount {
        /// Where it is mounted.
        target: PathBuf,
    },
    /// [`LayerCombiner::combine`](blockmount::LayerCombiner::combine).
    Combine(Overlay),
    /// [`LayerCombiner::separate`](blockmount::LayerCombiner::separate).
    Separate {
        /// Where the overlay is.
        target: PathBuf,
    },
    /// [`Unplugger::unplug`](blockmount::Unplugger::unplug).
    Unplug {
        /// The device.
        locator: DeviceLocator,
    },
    /// [`Mounter::adopt`](blockmount::Mounter::adopt).
    AdoptMount {
        /// The device.
        locator: DeviceLocator,
        /// Where it was mounted.
        target: PathBuf,
        /// How it was mounted.
        options: MountOptions,
    },
    /// [`LayerCombiner::adopt`](blockmount::LayerCombiner::adopt).
    AdoptOverlay(Overlay),
    /// [`Mounter::usage`](blockmount::Mounter::usage).
    Usage {
        /// Where it is mounted.
        target: PathBuf,
    },
    /// [`Mounter::trim`](blockmount::Mounter::trim).
    Trim {
        /// Where it is mounted.
        target: PathBuf,
    },
    /// [`Mounter::grow`](blockmount::Mounter::grow).
    Grow {
        /// Where it is mounted.
        target: PathBuf,
        /// How large the disk is now.
        bytes: u64,
    },
    /// [`Binder::bind`](blockmount::Binder::bind).
    Bind(Box<BindMount>),
    /// [`Binder::unbind`](blockmount::Binder::unbind).
    Unbind {
        /// Where the view is.
        target: PathBuf,
    },
    /// [`Binder::adopt`](blockmount::Binder::adopt).
    AdoptView(Box<BindMount>),
}

/// What a guest answers to a [`Request`] when all went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reply {
    /// It is done.
    Done,
    /// What was asked about is there, or not.
    Presence(Presence),
    /// How much is used.
    Usage(Usage),
    /// How many bytes were trimmed.
    Trimmed(u64),
}

impl Reply {
    /// What is there; `Unknown` if the answer is to another question.
    pub(crate) fn presence(self) -> Presence {
        match self {
            Reply::Presence(presence) => presence,
            _ => Presence::Unknown,
        }
    }

    pub(crate) fn usage(self) -> Result<Usage, BackendError> {
        match self {
            Reply::Usage(usage) => Ok(usage),
            other => Err(other.misplaced()),
        }
    }

    pub(crate) fn trimmed(self) -> Result<u64, BackendError> {
        match self {
            Reply::Trimmed(bytes) => Ok(bytes),
            other => Err(other.misplaced()),
        }
    }

    fn misplaced(self) -> BackendError {
        BackendError::other(format!("the guest has answered another question: {self:?}"))
    }
}

/// What two requests must not touch at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Target(PathBuf),
    Device(DeviceLocator),
}

impl Request {
    const NAMES: [&str; 13] = [
        "Mount",
        "Unmount",
        "Combine",
        "Separate",
        "Unplug",
        "AdoptMount",
        "AdoptOverlay",
        "Usage",
        "Trim",
        "Grow",
        "Bind",
        "Unbind",
        "AdoptView",
    ];

    /// Whether an agent of this version of the protocol knows it.
    pub(crate) fn is_known_to(&self, version: u32) -> bool {
        use Request::{AdoptMount, AdoptOverlay, AdoptView, Grow, Trim, Usage};
        match self {
            AdoptMount { .. } | AdoptOverlay(_) | AdoptView(_) => version >= ADOPTS,
            Usage { .. } | Trim { .. } | Grow { .. } => version >= SIZES,
            _ => true,
        }
    }

    /// Whether it tears something down, so that it may be sent again.
    pub fn is_teardown(&self) -> bool {
        use Request::{Separate, Unbind, Unmount, Unplug};
        matches!(
            self,
            Unmount { .. } | Separate { .. } | Unbind { .. } | Unplug { .. }
        )
    }

    /// What it asks for, for errors: `unmount of /run/layer`.
    pub fn describe(&self) -> String {
        let at = |what: &str, path: &Path| format!("{what} {}", path.display());
        match self {
            Request::Mount {
                locator, target, ..
            } => at(&format!("mount of {locator} at"), target),
            Request::Unmount { target } => at("unmount of", target),
            Request::Combine(overlay) => at("overlay at", &overlay.target),
            Request::Separate { target } => at("separation of", target),
            Request::Unplug { locator } => format!("unplug of {locator}"),
            Request::AdoptMount { target, .. } => at("adoption of the mount at", target),
            Request::AdoptOverlay(overlay) => at("adoption of the overlay at", &overlay.target),
            Request::Usage { target } => at("usage of", target),
            Request::Trim { target } => at("trim of", target),
            Request::Grow { target, .. } => at("growth of", target),
            Request::Bind(bind) => at("view at", &bind.target),
            Request::Unbind { target } => at("removal of the view at", target),
            Request::AdoptView(bind) => at("adoption of the view at", &bind.target),
        }
    }

    pub(crate) fn key(&self) -> Key {
        match self {
            Request::Mount { target, .. }
            | Request::AdoptMount { target, .. }
            | Request::Unmount { target }
            | Request::Usage { target }
            | Request::Trim { target }
            | Request::Grow { target, .. }
            | Request::Separate { target }
            | Request::Unbind { target } => Key::Target(target.clone()),
            Request::Combine(overlay) | Request::AdoptOverlay(overlay) => {
                Key::Target(overlay.target.clone())
            }
            Request::Bind(bind) | Request::AdoptView(bind) => Key::Target(bind.target.clone()),
            Request::Unplug { locator } => Key::Device(locator.clone()),
        }
    }

    /// Reads the body of a request.
    ///
    /// # Errors
    ///
    /// `Unsuitable` if this agent does not know the request or a field of it, which the error names; `Invalid` if it
    /// is no request at all.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, BackendError> {
        let no_request = |why: String| BackendError::invalid(format!("not a request: {why}"));
        let value: Value =
            serde_json::from_slice(body).map_err(|error| no_request(error.to_string()))?;
        let object = value.as_object().filter(|object| object.len() == 1);
        let name = object.and_then(|object| object.keys().next()).cloned();
        let name = name.ok_or_else(|| no_request("it has no name".to_owned()))?;
        if !Self::NAMES.contains(&name.as_str()) {
            let message = format!(
                "this agent ({SOFTWARE}) does not know the request {:?}, update it",
                short_line(&name)
            );
            return Err(BackendError::unsuitable(message));
        }
        serde_json::from_value(value).map_err(|error| {
            let why = short_line(&error.to_string());
            let message = format!("this agent ({SOFTWARE}) cannot do the {name} as asked: {why}");
            BackendError::unsuitable(message)
        })
    }
}

/// The first request of a connection: the versions of the protocol that a host speaks. An agent that has none of
/// them answers with its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) min: u32,
    pub(crate) max: u32,
    /// The name and version of the software.
    pub(crate) software: String,
    /// The host's clock, in nanoseconds since 1970 (UTC).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) time: Option<u64>,
    /// Random bytes of the host, as hexadecimal digits.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) entropy: String,
}

/// What a host tells its guest when it connects, for a guest that was restored from a saved state: its clock stands where
/// it was saved, and all guests of one state would draw the same random numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Greeting {
    /// The host's clock; none if the host does not tell.
    pub time: Option<SystemTime>,
    /// Random bytes, at most 64.
    pub entropy: Vec<u8>,
}

/// The body of the first request.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum First {
    Hello(Hello),
}

/// The answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum HelloAnswer {
    /// The version that both speak from now on.
    Chosen { version: u32, software: String },
    /// There is none; these are the agent's.
    Incompatible(Hello),
}

impl Hello {
    /// What this software says.
    pub(crate) fn ours() -> Self {
        let (min, max) = VERSIONS;
        Hello {
            min,
            max,
            software: SOFTWARE.to_owned(),
            time: None,
            entropy: String::new(),
        }
    }

    /// What a host of this version says, which tells the time too.
    pub(crate) fn of_host() -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        let mut bytes = [0; ENTROPY];
        // A host without randomness has none to give.
        let entropy = match getrandom::fill(&mut bytes) {
            Ok(()) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
            Err(_) => String::new(),
        };
        Hello {
            time: time.and_then(|time| time.as_nanos().try_into().ok()),
            entropy,
            ..Hello::ours()
        }
    }

    /// What the host has told beside the versions.
    pub(crate) fn greeting(&self) -> Greeting {
        let digits = self.entropy.as_bytes().chunks_exact(2).take(ENTROPY);
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        Greeting {
            time: self
                .time
                .map(|time| UNIX_EPOCH + Duration::from_nanos(time)),
            entropy: digits.filter_map(byte).collect(),
        }
    }

    /// The highest version that both speak.
    pub(crate) fn common(&self, other: &Hello) -> Option<u32> {
        let (min, max) = (self.min.max(other.min), self.max.min(other.max));
        (min <= max).then_some(max)
    }

    /// What to say, at either end, where there is none.
    pub(crate) fn disagreement(host: &Hello, agent: &Hello) -> String {
        let speaks = |hello: &Hello| {
            let (min, max) = (hello.min, hello.max);
            format!("({}) speaks {min} to {max}", short_line(&hello.software))
        };
        let (older, than) = match host.max < agent.min {
            true => ("host", "agent"),
            false => ("agent", "host"),
        };
        format!(
            "no common version of the protocol: the host {}, the agent {}; \
             the {older} is older than the {than}, update the {older}",
            speaks(host),
            speaks(agent)
        )
    }
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// It is done.
    Ok,
    /// What was asked about is there, or not.
    Presence(Found),
    /// How much is used.
    Usage(Usage),
    /// How many bytes were trimmed.
    Trimmed(u64),
    /// It is not done, and why.
    Error(BackendError),
    /// No version was agreed on, and nothing is done: this agent was started after the connection was made.
    HelloFirst,
}

impl Answer {
    /// The frame of an answer, whatever the error has in it.
    pub(crate) fn frame(&self, id: u64) -> Vec<u8> {
        let shorter = |error: &BackendError| {
            // A path that is not UTF-8, or a text that is too long: what matters most still arrives.
            let message: String = error.message().chars().take(LONGEST_MESSAGE).collect();
            frame(id, &Answer::Error(BackendError::new(error.kind(), message)))
        };
        let whole = frame(id, self);
        match self {
            Answer::Error(error) => whole.or_else(|_| shorter(error)),
            _ => whole,
        }
        .expect("a short text fits in a frame")
    }
}

/// [`Presence`], as it is written.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Found {
    Present,
    Absent,
    Unknown,
}

impl From<Found> for Reply {
    fn from(found: Found) -> Self {
        Reply::Presence(match found {
            Found::Present => Presence::Present(()),
            Found::Absent => Presence::Absent,
            Found::Unknown => Presence::Unknown,
        })
    }
}

impl From<Result<Reply, BackendError>> for Answer {
    fn from(outcome: Result<Reply, BackendError>) -> Self {
        match outcome {
            Ok(Reply::Done) => Answer::Ok,
            Ok(Reply::Presence(Presence::Present(()))) => Answer::Presence(Found::Present),
            Ok(Reply::Presence(Presence::Absent)) => Answer::Presence(Found::Absent),
            Ok(Reply::Presence(_)) => Answer::Presence(Found::Unknown),
            Ok(Reply::Usage(usage)) => Answer::Usage(usage),
            Ok(Reply::Trimmed(bytes)) => Answer::Trimmed(bytes),
            Err(error) => Answer::Error(error),
        }
    }
}

/// The bytes of a message.
///
/// # Errors
///
/// `Invalid` if it has no form in JSON, as a path that is not UTF-8, or is over [`MAX_FRAME`].
pub(crate) fn frame<B: Serialize>(id: u64, body: &B) -> Result<Vec<u8>, BackendError> {
    let mut bytes = vec![0; HEADER_LEN];
    serde_json::to_writer(&mut bytes, body).map_err(|error| {
        BackendError::invalid("it cannot be written as JSON").with_source(error)
    })?;
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if bytes.len() > MAX_FRAME {
        let (size, limit) = (size.into(), MAX_FRAME);
        let error = FrameError::Oversize { size, limit };
        return Err(BackendError::invalid("it is too long").with_source(error));
    }
    bytes[..4].copy_from_slice(&size.to_le_bytes());
    bytes[4..HEADER_LEN].copy_from_slice(&id.to_le_bytes());
    Ok(bytes)
}

/// A text of the other end, as one short line.
pub(crate) fn short_line(text: &str) -> String {
    blockmount::printable(text).shortened(256).to_string()
}
