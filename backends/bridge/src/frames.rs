//! Frames of bounded length in a stream of bytes: a header that gives the length, then a body.

use std::fmt::Debug;
use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};

/// The longest frame that is skipped in place of ending the connection, in bytes: 16 MiB. A header that gives more
/// is no header.
const MAX_SKIP: usize = 16 << 20;

/// How much is read from the stream at once, in bytes.
const CHUNK: usize = 8 << 10;

/// What a protocol puts before each body.
pub trait Header: Copy + Debug + Send + Sync + 'static {
    /// The length of a header, in bytes.
    const LENGTH: usize;
    /// The longest frame, header included, in bytes.
    const LONGEST: usize;

    /// Reads a header from [`LENGTH`](Self::LENGTH) bytes, with the length that it gives to the whole frame.
    fn parse(bytes: &[u8]) -> (Self, u64);

    /// The id of the request that the frame is, or answers.
    fn id(&self) -> u64;
}

/// What is wrong with a body of this size, which was skipped.
pub(crate) fn too_large<H: Header>(size: u64) -> String {
    let limit = H::LONGEST >> 10;
    format!("has {size} bytes, over the limit of {limit} KiB")
}

/// A number of up to eight bytes, little-endian.
pub(crate) fn number(bytes: &[u8]) -> u64 {
    let digits = bytes.iter().rev();
    digits.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// What is found in a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found<H> {
    /// A header and its body.
    Frame(H, Vec<u8>),
    /// The header of a frame that is too long. Its body is skipped, so the connection lives on and the caller of
    /// this request can be told.
    Oversize(H, u64),
}

/// Why a stream cannot be read as frames any further.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A header whose length does not even cover itself: where the next one begins is unknown.
    #[error("a frame claims a size of {size} bytes, less than its header has")]
    Undersize {
        /// The size that the header claims, in bytes.
        size: u64,
    },
    /// A frame far beyond the limit, which is no frame at all; or one of ours that cannot be sent.
    #[error("a frame of {size} bytes is over the limit of {limit} bytes")]
    Oversize {
        /// The size, in bytes.
        size: u64,
        /// The limit, in bytes.
        limit: usize,
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

/// Finds frames in bytes that come in pieces of any size. It never holds more than a frame and what was last pushed.
#[derive(Debug)]
pub(crate) struct Decoder<H> {
    buffer: Vec<u8>,
    /// How many bytes of an oversize frame are still to come.
    skip: usize,
    header: PhantomData<H>,
}

impl<H> Default for Decoder<H> {
    fn default() -> Self {
        Decoder {
            buffer: Vec::new(),
            skip: 0,
            header: PhantomData,
        }
    }
}

impl<H: Header> Decoder<H> {
    /// Adds bytes in the order in which they came. Take all frames out before adding more.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.buffer.extend_from_slice(&bytes[skipped..]);
    }

    /// Whether a frame was begun and is not complete.
    pub(crate) fn is_mid_frame(&self) -> bool {
        self.skip > 0 || !self.buffer.is_empty()
    }

    /// The next frame, if it is complete. After an error, asking again gives the same.
    pub(crate) fn next(&mut self) -> Result<Option<Found<H>>, FrameError> {
        let Some(header) = self.buffer.get(..H::LENGTH) else {
            return Ok(None);
        };
        let (header, claimed) = H::parse(header);
        let size = match usize::try_from(claimed) {
            Ok(size) if size < H::LENGTH => return Err(FrameError::Undersize { size: claimed }),
            Ok(size) if size <= MAX_SKIP => size,
            _ => {
                let limit = H::LONGEST;
                return Err(FrameError::Oversize {
                    size: claimed,
                    limit,
                });
            }
        };
        if size > H::LONGEST {
            let here = size.min(self.buffer.len());
            self.buffer.drain(..here);
            self.skip = size - here;
            return Ok(Some(Found::Oversize(header, claimed)));
        }
        if self.buffer.len() < size {
            return Ok(None);
        }
        let body = self.buffer[H::LENGTH..size].to_vec();
        self.buffer.drain(..size);
        Ok(Some(Found::Frame(header, body)))
    }
}

/// Reads frames from a stream.
pub(crate) struct FrameReader<R, H> {
    stream: R,
    decoder: Decoder<H>,
    chunk: Box<[u8]>,
    /// How long a frame that was begun may take.
    timeout: Duration,
    begun: Option<Instant>,
}

impl<R: AsyncRead + Unpin, H: Header> FrameReader<R, H> {
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
    pub(crate) async fn next(&mut self) -> Result<Option<Found<H>>, FrameError> {
        loop {
            if let Some(found) = self.decoder.next()? {
                self.begun = None;
                return Ok(Some(found));
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

    /// The next frame of a peer, or why there is none, as the end of a connection is reported.
    pub(crate) async fn next_or_reason(&mut self) -> Result<Found<H>, String> {
        match self.next().await {
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err("the guest has closed the connection".to_owned()),
            Err(FrameError::Io(error)) => Err(format!("the connection was lost: {error}")),
            Err(error) => Err(format!("the connection was lost: {error}")),
        }
    }
}
