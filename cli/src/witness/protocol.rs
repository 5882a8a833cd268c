//! What is asked of a witness and what it answers: JSON, each message after its length.
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
pub(crate) const LONGEST: u32 = 64 << 20;
/// How long the rest of a message may take that was begun.
const REST: Duration = Duration::from_secs(60);

/// What a host asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Every name below a directory, and the digests of all files: [`Response::Tree`].
    Tree { path: PathBuf },
    /// Makes a file with this content, in place of the one that is there: [`Response::Done`].
    Write { path: PathBuf, content: String },
    /// Removes a file or an empty directory: [`Response::Done`].
    Remove { path: PathBuf },
    /// What the kernel has: [`Response::Tables`].
    Tables,
    /// Opens a file or directory and keeps it open, so that it is in use: [`Response::Done`].
    Hold { path: PathBuf },
    /// Closes what `hold` opened; done as well if it did not: [`Response::Done`].
    LetGo { path: PathBuf },
    /// Which process the agent is: [`Response::Pid`], `None` while there is none.
    AgentPid,
    /// Kills the agent, and answers when it has ended: [`Response::Pid`], the one that ended.
    KillAgent,
    /// Mounts and unmounts without the agent: [`Response::BareMounts`], in the order asked for.
    BareMount { mounts: Vec<BareMount> },
    /// Whether a file is read past the page cache: [`Response::Dax`].
    Dax { path: PathBuf },
    /// Turns the machine off: [`Response::Done`], if there is still time for it.
    PowerOff,
}

/// One device to mount and unmount as a naive program would. Several are done at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BareMount {
    /// A SCSI address of the guest (`0:0:0:3`), which is waited for, or the name of a node (`pmem0`), too.
    pub(crate) device: String,
    pub(crate) filesystem: String,
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
    /// Options of the filesystem, as in `mount(2)`; may be empty.
    pub(crate) data: String,
    /// How often, from 1 to 10,000.
    pub(crate) count: u32,
}

/// What a bare mount cost, in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BareTimes {
    /// From the request until the device was there.
    pub(crate) found: u64,
    /// Each call of `mount(2)`.
    pub(crate) mount: Vec<u64>,
    /// From the request until each mount was there.
    pub(crate) mounted: Vec<u64>,
    /// Each call of `umount2(2)`.
    pub(crate) unmount: Vec<u64>,
}

/// What a witness answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Response {
    Done,
    Tree(Tree),
    Tables(Tables),
    Pid(Option<u32>),
    BareMounts(Vec<BareTimes>),
    Dax(bool),
    /// It could not be done, and why.
    Failed(String),
}

/// What the kernel of a guest has, each list sorted: two of them are equal if nothing has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tables {
    /// In the kernel's order.
    pub(crate) mounts: Vec<MountLine>,
    pub(crate) block_devices: Vec<BlockDevice>,
    /// `HOST:CHANNEL:TARGET:LUN` of each device in `/sys/bus/scsi/devices`, disk or not.
    pub(crate) scsi_devices: Vec<String>,
    pub(crate) dm_devices: Vec<DmDevice>,
    pub(crate) pmem_devices: Vec<PmemDevice>,
    /// Below the agent's roots, mounts left out.
    pub(crate) directories: Vec<String>,
}

/// A mount. Names that are no text are approximated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountLine {
    pub(crate) mount_point: String,
    pub(crate) filesystem: String,
    pub(crate) source: String,
    /// `MAJOR:MINOR`.
    pub(crate) device: String,
    /// Options of the mount, then those of the filesystem.
    pub(crate) options: String,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct BlockDevice {
    pub(crate) name: String,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// `HOST:CHANNEL:TARGET:LUN`, of a SCSI disk.
    pub(crate) scsi_address: Option<String>,
}

/// A device of the device mapper.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct DmDevice {
    /// Of its node: `dm-0`.
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) uuid: String,
}

/// A persistent memory disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct PmemDevice {
    pub(crate) name: String,
    /// The guest address of its region, as sysfs writes it; unknown for some.
    pub(crate) resource: Option<String>,
}

/// Writes one message. Not cancel safe: the stream makes no sense after half a message.
pub(crate) async fn send<W: AsyncWrite + Unpin>(
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
pub(crate) async fn receive<R: AsyncRead + Unpin>(stream: &mut R) -> io::Result<Option<Vec<u8>>> {
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
pub(crate) fn parse<T: DeserializeOwned>(message: &[u8]) -> io::Result<T> {
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
