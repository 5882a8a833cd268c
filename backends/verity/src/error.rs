//! Why a tree cannot be read, built or trusted.

use std::io;

use thiserror::Error;

/// Why something about a hash tree failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerityError {
    /// The system could not read or write.
    #[error("cannot {doing}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// There is no superblock where one was looked for.
    #[error("there is no superblock of dm-verity at byte {offset}")]
    NoSuperblock {
        /// Where it was looked for, in bytes.
        offset: u64,
    },
    /// A superblock, or what was asked for, is nothing that a kernel could be given.
    #[error("{what}: {why}")]
    Invalid {
        /// What is wrong, such as `a salt of 300 bytes`.
        what: String,
        /// What there could be.
        why: &'static str,
    },
    /// There is a superblock at the end of the image already.
    #[error("the image is sealed already, with a superblock at byte {offset}")]
    Sealed {
        /// Where the superblock is, in bytes.
        offset: u64,
    },
    /// Another process has locked the image, such as one that seals it.
    #[error("another process has locked the image")]
    Locked,
    /// Data or tree are not what the root digest says.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The callback that is told of the progress has asked for it.
    #[error("stopped before the end")]
    Stopped,
}

/// What is not as the root digest says: the first such thing on the way from the root to the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Corrupt {
    /// The root block is another one, or the digest is that of another image.
    #[error("the root of the tree does not have the given digest")]
    Root,
    /// A block of the tree.
    #[error("the hash block at byte {offset} is corrupt")]
    HashBlock {
        /// Where it is, in bytes.
        offset: u64,
    },
    /// A block of the data.
    #[error("data block {number} is corrupt")]
    DataBlock {
        /// Its number, from 0.
        number: u64,
    },
}

impl VerityError {
    pub(crate) fn io(doing: &'static str) -> impl Fn(io::Error) -> VerityError {
        move |source| VerityError::Io { doing, source }
    }

    pub(crate) fn invalid(what: impl Into<String>, why: &'static str) -> Self {
        VerityError::Invalid {
            what: what.into(),
            why,
        }
    }
}
