//! A device of characters as a stream of bytes: a virtio port, or a serial line.

use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::edges::{Direction, Edges};

/// How much is looked at to see whether the other end is there, in bytes.
const LOOK: usize = 4 << 10;
/// How much of a broken conversation is thrown away before the next begins, in bytes.
const DISCARDED: usize = 1 << 20;

/// An open port. One conversation follows the other on the same descriptor: closing a virtio port throws
/// away what its host has sent already.
#[derive(Debug)]
pub(super) struct Port {
    file: File,
    edges: Edges,
    /// What was read before the conversation began.
    ahead: Vec<u8>,
    /// Whether the other end of this conversation was ever seen to be there. The driver of virtio ports hands
    /// out what the host has sent before it knows that the host is connected: until then an end of the
    /// input is none, and output has to wait.
    met: bool,
}

/// The state of the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OtherEnd {
    /// It is open.
    Connected,
    /// It is closed, for now.
    Absent,
    /// The port itself is gone.
    Removed,
}

impl Port {
    /// Opens a device, which must not become the terminal of this process. Must be called in a runtime that
    /// has I/O enabled.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Self::over(rustix::fs::open(path, flags, Mode::empty())?.into())
    }

    /// Takes over a descriptor that does not block.
    pub(super) fn over(file: File) -> io::Result<Self> {
        Ok(Port {
            edges: Edges::of(&file)?,
            file,
            ahead: Vec::new(),
            met: false,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Looks at the other end, for a new conversation. What it has sent is kept for that.
    pub(super) fn other_end(&mut self) -> io::Result<OtherEnd> {
        self.met = false;
        if !self.ahead.is_empty() {
            return Ok(OtherEnd::Connected);
        }
        let mut bytes = [0; LOOK];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.file, &mut bytes)) {
            Ok(0) => Ok(OtherEnd::Absent),
            Ok(length) => {
                self.ahead.extend_from_slice(&bytes[..length]);
                Ok(OtherEnd::Connected)
            }
            Err(Errno::AGAIN) => {
                self.met = true;
                Ok(OtherEnd::Connected)
            }
            Err(Errno::NODEV) => Ok(OtherEnd::Removed),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits until the other end is open; `false` when the port is gone. Cancel safe.
    pub(super) async fn connected(&mut self) -> io::Result<bool> {
        loop {
            match self.other_end()? {
                OtherEnd::Connected => return Ok(true),
                OtherEnd::Removed => return Ok(false),
                OtherEnd::Absent => poll_fn(|cx| self.edges.poll(Direction::Input, cx)).await?,
            }
        }
    }

    /// Throws away what is there of a conversation that makes no sense any more.
    pub(super) fn discard(&mut self) {
        self.ahead.clear();
        let mut bytes = [0; LOOK];
        for _ in 0..DISCARDED / LOOK {
            match rustix::io::read(&self.file, &mut bytes) {
                Ok(1..) | Err(Errno::INTR) => {}
                _ => break,
            }
        }
    }

    fn is_hung_up(&mut self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::IN | PollFlags::OUT)];
        let polled = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        let found = fds[0].revents();
        // What was found by asking is no edge any more.
        if found.contains(PollFlags::IN) {
            self.edges.tell(Direction::Input);
        }
        polled.is_ok() && found.contains(PollFlags::HUP)
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let port = self.get_mut();
        if !port.ahead.is_empty() {
            let length = port.ahead.len().min(buffer.remaining());
            buffer.put_slice(&port.ahead[..length]);
            port.ahead.drain(..length);
            return Poll::Ready(Ok(()));
        }
        loop {
            match rustix::io::read(&port.file, buffer.initialize_unfilled()) {
                Ok(0) if !port.met => ready!(port.edges.poll(Direction::Input, cx))?,
                Ok(length) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => {
                    port.met = true;
                    ready!(port.edges.poll(Direction::Input, cx))?;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let port = self.get_mut();
        loop {
            match rustix::io::write(&port.file, bytes) {
                Ok(length) => {
                    port.met = true;
                    return Poll::Ready(Ok(length));
                }
                // A port whose host end has gone takes nothing, and would say no more than that.
                Err(Errno::AGAIN) if port.met && port.is_hung_up() => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Err(Errno::AGAIN) => ready!(port.edges.poll(Direction::Output, cx))?,
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;

    /// A named pipe: like a port, it reads as ended while the other end is closed, and lives on.
    fn pipe() -> (tempfile::TempDir, Port) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let file = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        (dir, Port::over(file.into()).unwrap())
    }

    fn host(dir: &tempfile::TempDir) -> File {
        File::options()
            .write(true)
            .open(dir.path().join("pipe"))
            .unwrap()
    }

    #[tokio::test]
    async fn one_conversation_follows_the_other_on_one_descriptor() {
        let (dir, mut port) = pipe();
        for round in 0..3 {
            assert_eq!(port.other_end().unwrap(), OtherEnd::Absent);
            let mut host = host(&dir);
            assert!(port.connected().await.unwrap());
            host.write_all(format!("hello {round}").as_bytes()).unwrap();
            drop(host);
            let mut heard = String::new();
            port.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, format!("hello {round}"));
        }
    }

    #[tokio::test]
    async fn what_comes_before_the_host_is_announced_begins_the_conversation() {
        let (dir, mut port) = pipe();
        let mut early = host(&dir);
        early.write_all(b"early").unwrap();
        // As if it were not connected yet: the input reads as ended after what has come.
        drop(early);
        assert!(port.connected().await.unwrap());
        let mut bytes = [0; 5];
        port.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes, *b"early");
        let more = timeout(Duration::from_millis(100), port.read_u8()).await;
        assert!(more.is_err(), "no end before the host was there");
        let mut host = host(&dir);
        host.write_all(b"later").unwrap();
        drop(host);
        let mut rest = vec![0; 5];
        port.read_exact(&mut rest).await.unwrap();
        assert_eq!(rest, b"later");
    }

    #[tokio::test]
    async fn an_absent_host_is_waited_for_without_spinning() {
        let (dir, mut port) = pipe();
        drop(host(&dir));
        // From here on the pipe reports a hang-up whenever it is asked.
        let used = || {
            // The runtime of the test is this thread.
            let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::try_from(used).unwrap()
        };
        let before = used();
        let waited = timeout(Duration::from_millis(500), port.connected()).await;
        assert!(waited.is_err(), "the other end is closed");
        assert!(used() - before < Duration::from_millis(250));
        let opened = tokio::task::spawn_blocking(move || {
            let mut host = host(&dir);
            host.write_all(b"x").unwrap();
            (dir, host)
        });
        assert!(
            timeout(Duration::from_secs(10), port.connected())
                .await
                .unwrap()
                .unwrap()
        );
        opened.await.unwrap();
    }

    /// A port whose other end is a socket: both directions can be waited for.
    fn socket() -> (std::os::unix::net::UnixStream, Port) {
        let (host, guest) = std::os::unix::net::UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let guest = std::os::fd::OwnedFd::from(guest);
        (host, Port::over(guest.into()).unwrap())
    }

    #[tokio::test]
    async fn a_reader_and_a_writer_wait_for_one_port() {
        use std::io::Read;
        let (mut host, port) = socket();
        let (mut input, mut output) = tokio::io::split(port);
        let mut reader = tokio::spawn(async move { input.read_u8().await });
        let mut writer = tokio::spawn(async move {
            // More than a socket holds.
            output.write_all(&vec![1; 1 << 20]).await.map(|()| output)
        });
        let still = Duration::from_millis(100);
        assert!(timeout(still, &mut writer).await.is_err(), "it is full");
        assert!(timeout(still, &mut reader).await.is_err(), "it is empty");
        // What the reader waits for is no end of the writer's wait, and the other way round.
        host.write_all(&[7]).unwrap();
        let soon = Duration::from_secs(10);
        assert_eq!(timeout(soon, reader).await.unwrap().unwrap().unwrap(), 7);
        assert!(timeout(still, &mut writer).await.is_err(), "it is full");
        let mut bytes = vec![0; 1 << 20];
        let drained = tokio::task::spawn_blocking(move || host.read_exact(&mut bytes));
        assert!(timeout(soon, writer).await.unwrap().unwrap().is_ok());
        drained.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_edge_that_one_direction_has_taken_is_told_to_the_other() {
        let (mut host, mut port) = socket();
        // The first edge is about now: it can be written to.
        poll_fn(|cx| port.edges.poll(Direction::Output, cx))
            .await
            .unwrap();
        poll_fn(|cx| port.edges.poll(Direction::Input, cx))
            .await
            .unwrap();
        host.write_all(&[7]).unwrap();
        poll_fn(|cx| port.edges.poll(Direction::Output, cx))
            .await
            .unwrap();
        let told = poll_fn(|cx| port.edges.poll(Direction::Input, cx));
        timeout(Duration::from_secs(10), told)
            .await
            .unwrap()
            .unwrap();
        // And the two wait again.
        for direction in [Direction::Input, Direction::Output] {
            let more = poll_fn(|cx| port.edges.poll(direction, cx));
            let more = timeout(Duration::from_millis(100), more).await;
            assert!(more.is_err(), "{direction:?}");
        }
    }

    #[tokio::test]
    async fn what_was_sent_before_the_conversation_is_kept_and_can_be_discarded() {
        let (dir, mut port) = pipe();
        let mut host = host(&dir);
        host.write_all(&[7; 3 * LOOK]).unwrap();
        assert_eq!(port.other_end().unwrap(), OtherEnd::Connected);
        let mut bytes = [0; 3 * LOOK];
        port.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes, [7; 3 * LOOK]);
        host.write_all(&[8; 3 * LOOK]).unwrap();
        assert_eq!(port.other_end().unwrap(), OtherEnd::Connected);
        port.discard();
        host.write_all(b"9").unwrap();
        assert_eq!(port.read_u8().await.unwrap(), b'9');
    }
}
