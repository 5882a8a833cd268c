//! A stream as lines of a bounded length.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is read from the stream at once.
const CHUNK: usize = 16 << 10;

/// How much memory a reader keeps between lines.
const KEPT: usize = 64 << 10;

/// One line, without its end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    Whole(&'a [u8]),
    /// It was longer than the limit, and skipped.
    TooLong {
        bytes: usize,
    },
}

/// Reads lines; never holds more of one than the limit and a chunk.
#[derive(Debug)]
pub(super) struct LineReader<R> {
    stream: R,
    limit: usize,
    buffer: Vec<u8>,
    /// The start of what was not yet given out.
    start: usize,
    /// How much of what was not yet given out is known to have no end of a line in it.
    scanned: usize,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    pub(super) fn new(stream: R, limit: usize) -> Self {
        LineReader {
            stream,
            limit,
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
        }
    }

    /// The next line; none at the end of the stream. A last line that has no end was cut off, and is no line.
    pub(super) async fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        let mut skipped = 0;
        loop {
            let pending = &self.buffer[self.start..];
            let end = pending[self.scanned..]
                .iter()
                .position(|byte| *byte == b'\n')
                .map(|at| self.scanned + at);
            if let Some(length) = end {
                let begin = self.start;
                self.start += length + 1;
                self.scanned = 0;
                if skipped + length > self.limit {
                    let bytes = skipped + length;
                    return Ok(Some(Line::TooLong { bytes }));
                }
                return Ok(Some(Line::Whole(&self.buffer[begin..begin + length])));
            }
            if skipped + pending.len() > self.limit {
                skipped += pending.len();
                self.start = self.buffer.len();
            }
            self.scanned = self.buffer.len() - self.start;
            if self.fill().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Reads a chunk behind what is there, after making room for it.
    async fn fill(&mut self) -> io::Result<usize> {
        self.buffer.drain(..self.start);
        self.start = 0;
        if self.buffer.is_empty() {
            self.buffer.shrink_to(KEPT);
        }
        self.buffer.reserve(CHUNK);
        self.stream.read_buf(&mut self.buffer).await
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::*;

    const LIMIT: usize = 20;

    /// Everything a reader says about a stream that comes in pieces.
    async fn read(bytes: &[u8], piece: usize) -> Vec<Result<Vec<u8>, usize>> {
        let (mut sender, receiver) = tokio::io::duplex(piece);
        let bytes = bytes.to_vec();
        let writing = tokio::spawn(async move { sender.write_all(&bytes).await });
        let (mut reader, mut lines) = (LineReader::new(receiver, LIMIT), Vec::new());
        while let Some(line) = reader.next().await.unwrap() {
            lines.push(match line {
                Line::Whole(line) => Ok(line.to_vec()),
                Line::TooLong { bytes } => Err(bytes),
            });
        }
        writing.await.unwrap().unwrap();
        lines
    }

    proptest! {
        #[test]
        fn any_stream_in_any_pieces_is_its_lines(
            lines in prop::collection::vec(prop::collection::vec(0_u8..=255, 0..50), 0..20),
            rest in "[a-z]{0,50}",
            piece in 1_usize..100,
        ) {
            let unbroken = |line: Vec<u8>| line.into_iter().filter(|byte| *byte != b'\n').collect();
            let lines: Vec<Vec<u8>> = lines.into_iter().map(unbroken).collect();
            let mut bytes: Vec<u8> = lines.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
            bytes.extend(rest.bytes());
            let expected: Vec<_> = lines
                .into_iter()
                .map(|line| if line.len() > LIMIT { Err(line.len()) } else { Ok(line) })
                .collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            prop_assert_eq!(runtime.block_on(read(&bytes, piece)), expected);
        }
    }

    #[tokio::test]
    async fn a_line_without_end_takes_no_memory() {
        let (mut sender, receiver) = tokio::io::duplex(1 << 16);
        let mut reader = LineReader::new(receiver, 1 << 16);
        let writing = async move {
            for _ in 0..1_000 {
                sender.write_all(&[b'x'; 1 << 16]).await.unwrap();
            }
        };
        let (end, ()) = tokio::join!(reader.next(), writing);
        assert_eq!(end.unwrap(), None);
        let held = reader.buffer.capacity();
        assert!(held <= 4 << 16, "{held}");
    }
}
