//! Passing open files to QEMU, so that it opens no path itself: `SCM_RIGHTS` beside the command `add-fd`.

use std::any::Any;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use blockmount::DiskId;
use blockmount_source::id_of;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use super::{NONE, Qmp, QmpError};

/// A file that QEMU was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct Passed {
    /// The set of descriptors that it is in: block nodes open `/dev/fdset/<set>`.
    #[serde(rename = "fdset-id")]
    pub(crate) set: u64,
    /// The number of the descriptor in QEMU, for what opens only paths: `/proc/self/fd/<number>`.
    #[serde(rename = "fd")]
    pub(crate) number: u64,
}

#[derive(Deserialize)]
struct Set {
    #[serde(rename = "fdset-id")]
    id: u64,
    fds: Vec<Member>,
}

#[derive(Deserialize)]
struct Member {
    #[serde(rename = "fd")]
    number: u64,
    #[serde(default)]
    opaque: String,
}

/// A file that QEMU keeps, whichever process has passed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    /// The number of the descriptor in QEMU.
    number: u64,
    /// Grows with each file that is passed: a QEMU that is stopped shows files that were taken back, too.
    pub(crate) order: u64,
    /// Which disk it was passed as.
    pub(crate) id: DiskId,
}

impl Qmp {
    /// Passes QEMU an open file on behalf of `owner`; none if this connection carries no descriptors. For as long as QEMU keeps
    /// it, the file shows the `id` of the disk, if it has one.
    pub(crate) async fn pass(
        &self,
        file: OwnedFd,
        owner: &str,
        id: Option<&DiskId>,
    ) -> Result<Option<Passed>, QmpError> {
        let Some(pending) = self.pending_descriptors() else {
            return Ok(None);
        };
        let pending = pending.add(file, owner, id);
        let arguments = json!({"opaque": pending.name});
        match self.query("add-fd", arguments).await {
            Ok(passed) => Ok(Some(passed)),
            // Something between here and QEMU passes on the bytes only, or QEMU has no such command.
            Err(QmpError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has QEMU close a file that it was passed; what it has opened by means of it stays open.
    pub(crate) async fn close_passed(&self, passed: &[Passed]) -> Result<(), QmpError> {
        for Passed { set, .. } in passed {
            self.remove_set(*set).await?;
        }
        Ok(())
    }

    /// Has QEMU close all files that it was passed on behalf of `owner`.
    pub(crate) async fn close_passed_for(&self, owner: &str) -> Result<(), QmpError> {
        if self.pending_descriptors().is_none() {
            return Ok(());
        }
        let sets: Vec<Set> = self.query("query-fdsets", NONE).await?;
        let is_owners = |member: &Member| {
            let name = member.opaque.split_once(SEPARATOR);
            name.is_some_and(|(name, _)| name == owner)
        };
        for set in sets.iter().filter(|set| set.fds.iter().any(is_owners)) {
            self.remove_set(set.id).await?;
        }
        Ok(())
    }

    /// The files that QEMU keeps and that were passed with the id of a disk, by their owners; of several of an owner, the last.
    pub(crate) async fn kept(&self) -> Result<HashMap<String, Kept>, QmpError> {
        let mut kept = HashMap::<String, Kept>::new();
        if self.pending_descriptors().is_none() {
            return Ok(kept);
        }
        let sets: Vec<Set> = self.query("query-fdsets", NONE).await?;
        for member in sets.iter().flat_map(|set| &set.fds) {
            let Some((owner, found)) = parse_kept(member) else {
                continue;
            };
            match kept.get(owner) {
                Some(other) if other.order > found.order => {}
                _ => drop(kept.insert(owner.to_owned(), found)),
            }
        }
        Ok(kept)
    }

    /// Opens a file once more that QEMU keeps, for reading and writing, and proves that it is the one that was passed. Blocks.
    ///
    /// # Errors
    ///
    /// If the process of QEMU cannot be seen from here, or its files not be opened.
    pub(crate) fn reopen(&self, kept: &Kept) -> io::Result<File> {
        let peer = self.pending_descriptors().and_then(|pending| pending.peer);
        let peer = peer.ok_or_else(|| io::Error::other("the process of QEMU is not known"))?;
        let path = format!("/proc/{peer}/fd/{}", kept.number);
        let prove = |metadata: &std::fs::Metadata| match id_of(metadata) == kept.id {
            true => Ok(()),
            false => Err(io::Error::other(format!("{path} is another file"))),
        };
        // Before it is opened: what is no such file may do anything when it is.
        prove(&std::fs::metadata(&path)?)?;
        let file = File::options().read(true).write(true).open(&path)?;
        prove(&file.metadata()?)?;
        Ok(file)
    }

    async fn remove_set(&self, set: u64) -> Result<(), QmpError> {
        match self.execute("remove-fd", json!({"fdset-id": set})).await {
            // It is gone already.
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Reads what [`PendingDescriptors::add`] has written.
fn parse_kept(member: &Member) -> Option<(&str, Kept)> {
    let (owner, rest) = member.opaque.split_once(SEPARATOR)?;
    let (order, id) = rest.split_once(' ')?;
    let kept = Kept {
        number: member.number,
        order: order.parse().ok()?,
        id: parse_id(id),
    };
    Some((owner, kept))
}

/// Reads what [`DiskId`] displays.
fn parse_id(text: &str) -> DiskId {
    let inode = text.strip_prefix("inode ");
    let numbers = inode.and_then(|text| text.split_once(" of device "));
    let parsed =
        numbers.and_then(|(inode, device)| Some((inode.parse().ok()?, device.parse().ok()?)));
    match parsed {
        Some((inode, device)) => DiskId::inode(device, inode),
        None => DiskId::name(text),
    }
}

/// Between the owner of a descriptor and its number.
const SEPARATOR: char = '#';

/// The descriptors whose commands are not written yet.
#[derive(Debug, Clone, Default)]
pub(super) struct PendingDescriptors {
    named: Arc<Mutex<Vec<Named>>>,
    /// The process at the other end, if it can be seen from here.
    peer: Option<i32>,
}

/// A descriptor, and the name by which its command is recognised.
type Named = (Arc<str>, OwnedFd);

impl PendingDescriptors {
    fn add(&self, file: OwnedFd, owner: &str, id: Option<&DiskId>) -> Pending<'_> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let now = u64::try_from(since.as_nanos()).unwrap_or_default();
        // Also greater than those of an earlier process.
        let next = |last: u64| now.max(last + 1);
        let number = next(
            LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| {
                Some(next(last))
            })
            .unwrap_or_default(),
        );
        let id = id.map_or(String::new(), |id| format!(" {id}"));
        let name: Arc<str> = format!("{owner}{SEPARATOR}{number}{id}").into();
        self.lock().push((name.clone(), file));
        Pending { all: self, name }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Named>> {
        // Entries are added and removed; a panic between leaves entries.
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A descriptor on its way; dropped, it is passed no more.
struct Pending<'a> {
    all: &'a PendingDescriptors,
    name: Arc<str>,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.all.lock().retain(|(name, _)| *name != self.name);
    }
}

/// The Unix socket of a monitor. A descriptor goes out with the line that has its name.
#[derive(Debug)]
pub(super) struct MonitorSocket {
    stream: UnixStream,
    pending: PendingDescriptors,
}

impl MonitorSocket {
    /// Takes a stream that is a Unix socket; gives any other back.
    pub(super) fn of<S: Send + 'static>(stream: S) -> Result<(Self, PendingDescriptors), S> {
        let mut stream = Some(stream);
        let unix = (&mut stream as &mut dyn Any).downcast_mut::<Option<UnixStream>>();
        if let Some(stream) = unix.and_then(Option::take) {
            let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
            let named = Arc::default();
            let pending = PendingDescriptors { named, peer };
            let socket = MonitorSocket {
                stream,
                pending: pending.clone(),
            };
            return Ok((socket, pending));
        }
        Err(stream.expect("only a Unix socket was taken out"))
    }
}

/// Where in a text the first line begins that names a descriptor, and which one that is.
fn first_named(text: &[u8], pending: &[Named]) -> Option<(usize, usize)> {
    let begins = |name: &str| {
        let quoted = format!("\"{name}\"");
        let mut windows = text.windows(quoted.len());
        let at = windows.position(|window| window == quoted.as_bytes())?;
        let line = text[..at].iter().rposition(|byte| *byte == b'\n');
        Some(line.map_or(0, |end| end + 1))
    };
    let named = pending.iter().enumerate();
    let named = named.filter_map(|(index, (name, _))| Some((begins(name)?, index)));
    named.min()
}

impl AsyncWrite for MonitorSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let all = self.pending.clone();
        let mut pending = all.lock();
        let bytes = match first_named(bytes, &pending) {
            None => bytes,
            // The lines before it go alone.
            Some((line @ 1.., _)) => &bytes[..line],
            Some((0, index)) => {
                let stream = &self.stream;
                loop {
                    ready!(stream.poll_write_ready(context))?;
                    let send = || send(stream, bytes, &pending[index].1);
                    match stream.try_io(Interest::WRITABLE, send) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Poll::Ready(Err(error)),
                        Ok(sent) => {
                            pending.swap_remove(index);
                            return Poll::Ready(Ok(sent));
                        }
                    }
                }
            }
        };
        drop(pending);
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl AsyncRead for MonitorSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

fn send(stream: &UnixStream, bytes: &[u8], descriptor: &OwnedFd) -> io::Result<usize> {
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let bytes = [IoSlice::new(bytes)];
    Ok(sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?)
}
