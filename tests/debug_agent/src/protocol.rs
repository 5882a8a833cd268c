//! What is asked of a debug agent and what it answers, in the frames of a checker.

use std::path::PathBuf;

use blockmount_checker::protocol::{Request, Response};
use serde::{Deserialize, Serialize};

use crate::exercise::Exercise;
use crate::run::{Ended, Run};
use crate::trial::Trial;

/// What a host asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum DebugRequest {
    /// What only a debug agent does.
    Own(OwnRequest),
    /// What a checker does.
    Checker(Request),
}

/// What only a debug agent does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OwnRequest {
    /// Opens a file or directory and keeps it open, so that it is in use: [`Response::Done`].
    Hold {
        /// What is opened.
        path: PathBuf,
    },
    /// Closes what `hold` opened; done as well if it did not: [`Response::Done`].
    Release {
        /// What was opened.
        path: PathBuf,
    },
    /// Which process the agent is: [`OwnResponse::Pid`], `None` while there is none.
    AgentPid,
    /// Kills the agent, and answers when it has ended: [`OwnResponse::Pid`], the one that ended.
    KillAgent,
    /// Whether a file is read past the page cache: [`OwnResponse::Dax`].
    Dax {
        /// The file.
        path: PathBuf,
    },
    /// Whose a file is, a link itself: [`OwnResponse::Owner`].
    Owner {
        /// The file.
        path: PathBuf,
    },
    /// What time it is in the guest: [`OwnResponse::Clock`].
    Clock,
    /// Writes everything back and forgets what can be read again: [`Response::Done`].
    DropCaches,
    /// How all mapped devices are made: [`OwnResponse::MappedTables`].
    MappedTables,
    /// Which keys of ours the kernel has: [`OwnResponse::Keys`].
    Keys,
    /// Has the kernel keep a key in the keyring of root: [`Response::Done`].
    AddKey {
        /// Its type, such as `logon`.
        kind: String,
        /// Its description.
        description: String,
        /// The key.
        bytes: Vec<u8>,
    },
    /// Has the kernel forget such a key: [`Response::Done`].
    RemoveKey {
        /// Its type.
        kind: String,
        /// Its description.
        description: String,
    },
    /// Which files below a directory have these bytes in them: [`OwnResponse::Files`].
    FilesWith {
        /// The bytes.
        bytes: Vec<u8>,
        /// The directory.
        below: PathBuf,
    },
    /// Has the kernel unload a module; done as well if it is not loaded: [`Response::Done`].
    Unload {
        /// Its name.
        module: String,
    },
    /// Does an exercise: [`OwnResponse::Steps`].
    Exercise(Box<Exercise>),
    /// Tries a mount: [`OwnResponse::Refused`].
    Try(Box<Trial>),
    /// Runs a program in a root to its end: [`OwnResponse::Ended`].
    Run(Run),
    /// Turns the machine off: [`Response::Done`], if there is still time for it.
    PowerOff,
}

/// What a debug agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum DebugResponse {
    /// To what only a debug agent does.
    Own(OwnResponse),
    /// To everything else, and failures.
    Checker(Response),
}

/// What only a debug agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnResponse {
    /// A process.
    Pid(Option<u32>),
    /// Whether a file is read past the page cache.
    Dax(bool),
    /// The user, the group, and the mode.
    Owner(u32, u32, u32),
    /// Milliseconds since 1970.
    Clock(u64),
    /// One line for each, as `dmsetup table` prints it.
    MappedTables(Vec<String>),
    /// The lines of `/proc/keys`.
    Keys(Vec<String>),
    /// Files.
    Files(Vec<PathBuf>),
    /// How many steps there were.
    Steps(u32),
    /// Why there can be no such mount; nothing if there can.
    Refused(Option<String>),
    /// How a program has ended.
    Ended(Ended),
}

impl From<Response> for DebugResponse {
    fn from(response: Response) -> Self {
        DebugResponse::Checker(response)
    }
}

impl From<OwnResponse> for DebugResponse {
    fn from(response: OwnResponse) -> Self {
        DebugResponse::Own(response)
    }
}
