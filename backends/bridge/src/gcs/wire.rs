//! Frames: a header of 16 bytes and a JSON body, as the bytes of a stream.

use std::fmt;

pub use crate::frames::FrameError;
use crate::frames::{self, Found, Header, number};

/// The size of a header: type, size and id, little-endian.
pub const HEADER_LEN: usize = 16;

/// The largest frame, header included: 64 KiB. Hosts end the connection on a larger one, and the agent
/// of Windows has a buffer of this size.
pub const MAX_FRAME: usize = 0x10000;

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
                limit: MAX_FRAME,
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

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GcsHeader {
    pub(crate) message: MessageType,
    pub(crate) id: u64,
}

impl Header for GcsHeader {
    const LENGTH: usize = HEADER_LEN;
    const LONGEST: usize = MAX_FRAME;

    fn parse(bytes: &[u8]) -> (Self, u64) {
        let message = MessageType::from_bits(number(&bytes[..4]) as u32);
        let id = number(&bytes[8..]);
        (GcsHeader { message, id }, number(&bytes[4..8]))
    }

    fn id(&self) -> u64 {
        self.id
    }
}

/// What a [`Decoder`] finds in a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A message.
    Frame(Frame),
    /// The header of a message that is too large. Its body is skipped: the connection lives on, and
    /// the caller that waits for this message can be told.
    Oversize {
        /// What it is.
        message: MessageType,
        /// Its id.
        id: u64,
        /// The size that the header claims, in bytes.
        size: u64,
    },
}

impl From<Found<GcsHeader>> for Decoded {
    fn from(found: Found<GcsHeader>) -> Self {
        match found {
            Found::Frame(GcsHeader { message, id }, payload) => Decoded::Frame(Frame {
                message,
                id,
                payload,
            }),
            Found::Oversize(GcsHeader { message, id }, size) => {
                Decoded::Oversize { message, id, size }
            }
        }
    }
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
/// # Ok::<(), blockmount_bridge::FrameError>(())
/// ```
#[derive(Debug, Default)]
pub struct Decoder(frames::Decoder<GcsHeader>);

impl Decoder {
    /// Adds bytes in the order in which they came. Take all frames out before adding more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.push(bytes);
    }

    /// The next frame, if it is complete.
    ///
    /// # Errors
    ///
    /// [`FrameError::Undersize`] or [`FrameError::Oversize`] (beyond 16 MiB) when frames cannot be told
    /// apart any more; asking again gives the same.
    #[expect(clippy::should_implement_trait, reason = "more may come after none")]
    pub fn next(&mut self) -> Result<Option<Decoded>, FrameError> {
        Ok(self.0.next()?.map(Decoded::from))
    }
}
