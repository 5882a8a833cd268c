//! Frames: a header of 16 bytes and a JSON body, as the bytes of a stream.

use std::fmt;
use std::io;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};

/// The size of a header: type, size and id, little-endian.
pub const HEADER_LEN: usize = 16;

/// The largest frame, header included: 64 KiB. Hosts end the connection on a larger one, and the agent
/// of Windows has a buffer of this size.
pub const MAX_FRAME: usize = 0x10000;

/// The largest frame that is skipped in place of ending the connection. One that claims more is
/// no frame.
const MAX_SKIP: usize = 16 << 20;

/// How much is read from the stream at once.
const CHUNK: usize = 8 << 10;

/// The type of a message: its role, its category, its number and its version, in 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MessageType(u32);

/// What a message is for, by the top four bits of its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The host asks the guest.
    Request,
    /// The guest answers.
    Response,
    /// The guest says something unasked.
    Notification,
    /// No peer has defined what this is.
    Unknown,
}

impl MessageType {
    /// Creates a container, or the VM's own part of the agent.
    pub const CREATE: Self = MessageType(0x1010_0101);
    /// Starts what was created.
    pub const START: Self = MessageType(0x1010_0201);
    /// Ends a container or the VM in an orderly way.
    pub const SHUTDOWN_GRACEFUL: Self = MessageType(0x1010_0301);
    /// Ends a container or the VM at once.
    pub const SHUTDOWN_FORCED: Self = MessageType(0x1010_0401);
    /// Runs a process.
    pub const EXECUTE_PROCESS: Self = MessageType(0x1010_0501);
    /// Waits for a process to end.
    pub const WAIT_FOR_PROCESS: Self = MessageType(0x1010_0601);
    /// Signals a process.
    pub const SIGNAL_PROCESS: Self = MessageType(0x1010_0701);
    /// Resizes the terminal of a process.
    pub const RESIZE_CONSOLE: Self = MessageType(0x1010_0801);
    /// Reads properties of a container or the VM.
    pub const GET_PROPERTIES: Self = MessageType(0x1010_0901);
    /// Changes the settings of a container or the VM: all that has to do with disks.
    pub const MODIFY_SETTINGS: Self = MessageType(0x1010_0a01);
    /// Agrees on the version of the protocol; the first message of a connection.
    pub const NEGOTIATE: Self = MessageType(0x1010_0b01);
    /// Reads the stacks of the agent.
    pub const DUMP_STACKS: Self = MessageType(0x1010_0c01);
    /// Forgets a container that has ended.
    pub const DELETE_CONTAINER_STATE: Self = MessageType(0x1010_0d01);
    /// Changes the limits of a container.
    pub const UPDATE_CONTAINER: Self = MessageType(0x1010_0e01);
    /// Tells of the life of the VM.
    pub const LIFECYCLE_NOTIFICATION: Self = MessageType(0x1010_0f01);
    /// Changes the settings of a service of the agent.
    pub const MODIFY_SERVICE_SETTINGS: Self = MessageType(0x1020_0101);
    /// Tells the host of the end of a container.
    pub const NOTIFICATION: Self = MessageType(0x3010_0101);

    /// A type from its bits, whatever they are.
    pub const fn from_bits(bits: u32) -> Self {
        MessageType(bits)
    }

    /// The bits as they are on the wire.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// What a message of this type is for.
    pub const fn role(self) -> Role {
        match self.0 >> 28 {
            1 => Role::Request,
            2 => Role::Response,
            3 => Role::Notification,
            _ => Role::Unknown,
        }
    }

    /// The type of the answer to a message of this type.
    #[must_use]
    pub const fn response(self) -> Self {
        MessageType((self.0 & 0x0fff_ffff) | 0x2000_0000)
    }
}

impl fmt::Display for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

impl fmt::Debug for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub message: MessageType,
    /// Ties an answer to its request; 0 for notifications.
    pub id: u64,
    /// The body, JSON.
    pub payload: Vec<u8>,
}

impl Frame {
    /// The bytes on the wire.
    ///
    /// # Errors
    ///
    /// [`FrameError::Oversize`] if there are more than [`MAX_FRAME`] of them.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let length = HEADER_LEN.saturating_add(self.payload.len());
        if length > MAX_FRAME {
            return Err(FrameError::Oversize {
                size: length as u64,
            });
        }
        let mut bytes = Vec::with_capacity(length);
        bytes.extend(self.message.bits().to_le_bytes());
        bytes.extend((length as u32).to_le_bytes());
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(&self.payload);
        Ok(bytes)
    }
}

/// What a [`Decoder`] finds in a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A message.
    Frame(Frame),
    /// The header of a message that is too large. Its body is skipped: the connection lives on, and
    /// whoever waits for this message can be told.
    Oversize {
        /// What it is.
        message: MessageType,
        /// Whose it is.
        id: u64,
        /// The size that the header claims.
        size: u32,
    },
}

/// Why a stream cannot be read as frames any further.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A header whose size does not even cover itself: where the next one begins is unknown.
    #[error("a frame claims a size of {size} bytes, and its header alone has 16")]
    Undersize {
        /// The size that the header claims.
        size: u32,
    },
    /// A frame far beyond the limit, which is no frame at all; or one of ours that cannot be sent.
    #[error("a frame of {size} bytes is over the limit of 64 KiB")]
    Oversize {
        /// The size.
        size: u64,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// A frame was begun and not finished.
    #[error("a frame was begun and not finished within {0:?}")]
    Stalled(Duration),
    /// The stream failed.
    #[error("the stream failed")]
    Io(#[from] io::Error),
}

/// Finds frames in bytes that come in pieces of any size.
///
/// It never holds more than a frame and what was last pushed, whatever the bytes say.
///
/// ```
/// use blockmount_bridge::gcs::wire::{Decoded, Decoder, Frame, MessageType};
///
/// let frame = Frame { message: MessageType::NEGOTIATE, id: 7, payload: b"{}".to_vec() };
/// let mut decoder = Decoder::default();
/// for byte in frame.encode()? {
///     assert_eq!(decoder.next()?, None);
///     decoder.push(&[byte]);
/// }
/// assert_eq!(decoder.next()?, Some(Decoded::Frame(frame)));
/// # Ok::<(), blockmount_bridge::gcs::wire::FrameError>(())
/// ```
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// How many bytes of an oversize frame are still to come.
    skip: usize,
}

impl Decoder {
    /// Adds bytes in the order in which they came. Take all frames out before adding more.
    pub fn push(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.buffer.extend_from_slice(&bytes[skipped..]);
    }

    /// Whether a frame was begun and is not complete.
    pub fn is_mid_frame(&self) -> bool {
        self.skip > 0 || !self.buffer.is_empty()
    }

    /// The next frame, if it is complete.
    ///
    /// # Errors
    ///
    /// [`FrameError::Undersize`] or [`FrameError::Oversize`] (beyond 16 MiB) when frames cannot be told
    /// apart any more; asking again gives the same.
    #[expect(clippy::should_implement_trait, reason = "more may come after none")]
    pub fn next(&mut self) -> Result<Option<Decoded>, FrameError> {
        let Some((header, _)) = self.buffer.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let [t0, t1, t2, t3, s0, s1, s2, s3, id @ ..] = *header;
        let message = MessageType::from_bits(u32::from_le_bytes([t0, t1, t2, t3]));
        let claimed = u32::from_le_bytes([s0, s1, s2, s3]);
        let id = u64::from_le_bytes(id);
        let size = claimed as usize;
        if size < HEADER_LEN {
            return Err(FrameError::Undersize { size: claimed });
        }
        if size > MAX_SKIP {
            let size = claimed.into();
            return Err(FrameError::Oversize { size });
        }
        if size > MAX_FRAME {
            let here = size.min(self.buffer.len());
            self.buffer.drain(..here);
            self.skip = size - here;
            return Ok(Some(Decoded::Oversize {
                message,
                id,
                size: claimed,
            }));
        }
        if self.buffer.len() < size {
            return Ok(None);
        }
        let payload = self.buffer[HEADER_LEN..size].to_vec();
        self.buffer.drain(..size);
        Ok(Some(Decoded::Frame(Frame {
            message,
            id,
            payload,
        })))
    }
}

/// Reads frames from a stream.
pub(crate) struct FrameReader<R> {
    stream: R,
    decoder: Decoder,
    chunk: Box<[u8]>,
    /// How long a frame that was begun may take.
    timeout: Duration,
    begun: Option<Instant>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(stream: R, timeout: Duration) -> Self {
        FrameReader {
            stream,
            decoder: Decoder::default(),
            chunk: vec![0; CHUNK].into(),
            timeout,
            begun: None,
        }
    }

    /// The next frame; none when the stream ends between two frames. A peer may be silent between
    /// frames for as long as it likes, but not inside of one.
    pub(crate) async fn next(&mut self) -> Result<Option<Decoded>, FrameError> {
        loop {
            if let Some(decoded) = self.decoder.next()? {
                self.begun = None;
                return Ok(Some(decoded));
            }
            let read = self.stream.read(&mut self.chunk);
            let length = if self.decoder.is_mid_frame() {
                let deadline = *self.begun.get_or_insert_with(Instant::now) + self.timeout;
                let in_time = timeout_at(deadline, read).await;
                in_time.map_err(|_| FrameError::Stalled(self.timeout))??
            } else {
                self.begun = None;
                read.await?
            };
            match length {
                0 if self.decoder.is_mid_frame() => return Err(FrameError::Truncated),
                0 => return Ok(None),
                _ => self.decoder.push(&self.chunk[..length]),
            }
        }
    }
}
