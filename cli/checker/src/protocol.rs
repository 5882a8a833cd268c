//! What is asked of a checker and what it answers: JSON, each message after its length.
//!
//! A message is a length in four bytes, little-endian, and so many bytes of JSON, at most [`LONGEST`].
//! The host asks, the guest answers, one after the other.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::tree::Tree;

/// The longest message, in bytes without its length: the digests of half a million files.
pub const LONGEST: u32 = 64 << 20;
/// How long the rest of a message may take that was begun.
const REST: Duration = Duration::from_secs(60);

/// What a host asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Every name below a directory, and the digests of all files: [`Response::Tree`].
    Tree {
        /// The directory.
        path: PathBuf,
    },
    /// The names in a directory, sorted, and how many there are: [`Response::Names`].
    Names {
        /// The directory.
        path: PathBuf,
        /// As many as are told.
        most: usize,
    },
    /// Makes a file with this content, in place of the one that is there: [`Response::Done`].
    Write {
        /// The file.
        path: PathBuf,
        /// All that is in it afterwards.
        content: String,
    },
    /// Puts a key into a private file, in a private directory that is made if it is not there: [`Response::Done`].
    WriteKey {
        /// The file.
        path: PathBuf,
        /// The key.
        bytes: Vec<u8>,
    },
    /// Removes a file or an empty directory: [`Response::Done`].
    Remove {
        /// The file or directory.
        path: PathBuf,
    },
    /// What the kernel has: [`Response::Tables`].
    Tables,
    /// Mounts and unmounts without the agent: [`Response::BareMounts`], in the order asked for.
    BareMount {
        /// All at once.
        mounts: Vec<BareMount>,
    },
}

/// One device to mount and unmount as a naive program would. Several are done at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BareMount {
    /// A SCSI address of the guest (`0:0:0:3`), which is waited for, or the name of a node (`pmem0`), too.
    pub device: String,
    /// Its name for `mount(2)`.
    pub filesystem: String,
    /// A directory, which is made if it is not there and removed afterwards.
    pub target: PathBuf,
    /// Whether it is mounted read-only.
    pub read_only: bool,
    /// Options of the filesystem, as in `mount(2)`; may be empty.
    pub data: String,
    /// How often, from 1 to 10,000.
    pub count: u32,
}

/// What a bare mount cost, in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BareTimes {
    /// From the request until the device was there.
    pub found: u64,
    /// Each call of `mount(2)`.
    pub mount: Vec<u64>,
    /// From the request until each mount was there.
    pub mounted: Vec<u64>,
    /// Each call of `umount2(2)`.
    pub unmount: Vec<u64>,
}

/// What a checker answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// It was done.
    Done,
    /// What is below a directory.
    Tree(Tree),
    /// What is in a directory. Names that are no text are approximated.
    Names {
        /// The first of them.
        names: Vec<String>,
        /// How many there are.
        count: usize,
    },
    /// What the kernel has.
    Tables(Tables),
    /// What each bare mount cost.
    BareMounts(Vec<BareTimes>),
    /// It could not be done, and why.
    Failed(String),
}

/// What the kernel of a guest has, each list sorted: two of them are equal if nothing has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tables {
    /// In the kernel's order.
    pub mounts: Vec<MountLine>,
    /// In `/sys/block`.
    pub block_devices: Vec<BlockDevice>,
    /// `HOST:CHANNEL:TARGET:LUN` of each device in `/sys/bus/scsi/devices`, disk or not.
    pub scsi_devices: Vec<String>,
    /// Of the device mapper.
    pub dm_devices: Vec<DmDevice>,
    /// Disks on persistent memory.
    pub pmem_devices: Vec<PmemDevice>,
    /// Below the agent's roots, mounts left out.
    pub directories: Vec<String>,
}

/// A mount. Names that are no text are approximated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountLine {
    /// Where.
    pub mount_point: String,
    /// Its type.
    pub filesystem: String,
    /// As the filesystem calls it: mostly the node of a device.
    pub source: String,
    /// `MAJOR:MINOR`.
    pub device: String,
    /// Options of the mount, then those of the filesystem.
    pub options: String,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockDevice {
    /// Of its node.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// `HOST:CHANNEL:TARGET:LUN`, of a SCSI disk.
    pub scsi_address: Option<String>,
}

/// A device of the device mapper.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DmDevice {
    /// Of its node: `dm-0`.
    pub node: String,
    /// As the mapper calls it.
    pub name: String,
    /// As who made it has set it.
    pub uuid: String,
}

/// A persistent memory disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PmemDevice {
    /// Of its node.
    pub name: String,
    /// The guest address of its region, as sysfs writes it; unknown for some.
    pub resource: Option<String>,
}

/// Writes one message. Not cancel safe: the stream makes no sense after half a message.
///
/// # Errors
///
/// Those of the stream.
pub async fn send<W: AsyncWrite + Unpin>(
    stream: &mut W,
    message: &impl Serialize,
) -> io::Result<()> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).ok();
    let Some(length) = length.filter(|length| *length <= LONGEST) else {
        let message = format!("a message of {} bytes is over 64 MiB", bytes.len() - 4);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    };
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Reads one message; `None` at an end between two. Not cancel safe, as [`send`].
///
/// # Errors
///
/// `InvalidData` for one that is too long, `TimedOut` for one that was begun and not finished within a minute;
/// the stream makes no sense after either.
pub async fn receive<R: AsyncRead + Unpin>(stream: &mut R) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    // The next message may come at any time; one that has begun has to end.
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    let message = timeout(REST, receive_rest(stream, length)).await;
    message
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        .map(Some)
}

async fn receive_rest<R: AsyncRead + Unpin>(
    stream: &mut R,
    mut length: [u8; 4],
) -> io::Result<Vec<u8>> {
    stream.read_exact(&mut length[1..]).await?;
    let length = u32::from_le_bytes(length);
    if length > LONGEST {
        let message = format!("a message claims {length} bytes, over 64 MiB");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut message = Vec::new();
    // Memory grows with what comes, not with what is claimed.
    stream
        .take(u64::from(length))
        .read_to_end(&mut message)
        .await?;
    match message.len() == length as usize {
        true => Ok(message),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Reads what a message says.
///
/// # Errors
///
/// Why it is no such message.
pub fn parse<T: DeserializeOwned>(message: &[u8]) -> io::Result<T> {
    Ok(serde_json::from_slice(message)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_come_back_and_the_wire_is_plain() {
        let mut wire = Vec::new();
        send(&mut wire, &Request::Tables).await.unwrap();
        let tree = Request::Tree { path: "/x".into() };
        send(&mut wire, &tree).await.unwrap();
        assert_eq!(wire[..12], *b"\x08\0\0\0\"tables\"");
        let mut reader = &wire[..];
        let first = receive(&mut reader).await.unwrap().unwrap();
        assert_eq!(parse::<Request>(&first).unwrap(), Request::Tables);
        let second = receive(&mut reader).await.unwrap().unwrap();
        assert_eq!(second, br#"{"tree":{"path":"/x"}}"#);
        assert_eq!(parse::<Request>(&second).unwrap(), tree);
        assert!(receive(&mut reader).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_cut_short_or_too_long_is_an_error() {
        for bytes in [
            &b"\x01"[..],
            b"\x02\0\0\0x",
            b"\x01\0\0\x04x",
            b"\xff\xff\xff\xff",
        ] {
            assert!(receive(&mut &bytes[..]).await.is_err(), "{bytes:?}");
        }
        let too_long = Request::Write {
            path: "/x".into(),
            content: "x".repeat(LONGEST as usize),
        };
        assert!(send(&mut Vec::new(), &too_long).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_was_begun_has_to_end() {
        let (mut host, mut guest) = tokio::io::duplex(16);
        host.write_all(b"\x08\0\0\0\"tab").await.unwrap();
        let error = receive(&mut guest).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse::<Request>(&bytes);
            let _ = parse::<Response>(&bytes);
        }
    }
}
