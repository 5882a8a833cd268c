//! Streams to programs in the guest, each over a virtio-serial port of its own.

use std::collections::BTreeSet;
use std::io;
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};

use super::error::VmError;
use crate::qmp::{Event, Events, NONE, Qmp, QmpError};

/// What begins the id of each port in QEMU.
const PORT: &str = "port";

/// How long taking a port out may take, in which QEMU asks nobody.
const REMOVAL: Duration = Duration::from_secs(10);

/// When a busy port is tried again: QEMU takes milliseconds.
const RETRY: Duration = Duration::from_millis(20);

/// How long one wait for the end of a port lasts; then comes the next. Any time will do.
const LISTENING: Duration = Duration::from_secs(3600);

/// A stream of bytes to a program in the guest.
///
/// It ends (reads nothing more) when the program closes its end or dies, and when the VM does. Dropping it takes
/// the port out of the VM, and with it all that was on its way: nothing of one stream ever reaches the next.
#[derive(Debug)]
pub struct GuestStream {
    stream: UnixStream,
    /// Its drop is what the watcher waits for.
    _dropped: oneshot::Sender<()>,
}

/// The ports of a VM.
#[derive(Debug)]
pub(super) struct Ports {
    qmp: Qmp,
    /// For the sockets between QEMU and us, which exist for the moment of connecting.
    directory: PathBuf,
    next: AtomicU64,
    /// The names of those that there are in QEMU, which has each name once.
    present: watch::Sender<BTreeSet<String>>,
    closing: watch::Sender<()>,
}

/// A port that is being set up or in use. The names of its two halves in QEMU are the same.
#[derive(Debug)]
struct Port {
    qmp: Qmp,
    id: String,
    /// What the guest knows it by.
    name: String,
    present: watch::Sender<BTreeSet<String>>,
    /// Changes when all ports are to be taken out.
    closing: watch::Receiver<()>,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.present
            .send_if_modified(|names| names.remove(&self.name));
    }
}

impl Ports {
    pub(super) fn new(qmp: Qmp, directory: &Path) -> Self {
        Ports {
            qmp,
            directory: directory.to_owned(),
            next: AtomicU64::new(0),
            present: watch::Sender::default(),
            closing: watch::Sender::default(),
        }
    }

    /// Waits until all ports are taken out whose streams were dropped or have ended.
    pub(super) async fn settled(&self) -> Result<(), VmError> {
        let mut present = self.present.subscribe();
        match timeout(REMOVAL, present.wait_for(BTreeSet::is_empty)).await {
            Ok(_) => Ok(()),
            Err(elapsed) => Err(VmError::new("a port stays in the VM").because(elapsed)),
        }
    }

    /// Ends all streams, and waits until their ports are taken out.
    pub(super) async fn close_all(&self) -> Result<(), VmError> {
        self.closing.send_replace(());
        self.settled().await
    }

    /// Takes out the ports of an earlier process.
    pub(super) async fn remove_earlier(&self) -> Result<(), VmError> {
        #[derive(Deserialize)]
        struct Chardev {
            label: String,
        }
        let chardevs: Result<Vec<Chardev>, _> = self.qmp.query("query-chardev", NONE).await;
        let what = |error| VmError::new("cannot list the ports of the VM").because(error);
        let labels = chardevs.map_err(what)?.into_iter();
        for id in labels.map(|chardev| chardev.label) {
            if id
                .strip_prefix(PORT)
                .is_some_and(|number| number.parse::<u64>().is_ok())
            {
                let port = Port {
                    qmp: self.qmp.clone(),
                    id,
                    name: String::new(),
                    present: self.present.clone(),
                    closing: self.closing.subscribe(),
                };
                port.remove().await;
            }
        }
        Ok(())
    }

    /// Takes a name, when the port that has it is taken out.
    async fn enter(&self, name: &str, deadline: Duration) -> Result<Port, VmError> {
        let mut present = self.present.subscribe();
        let entered = timeout(deadline, async {
            loop {
                let is_free = present.wait_for(|names| !names.contains(name)).await;
                drop(is_free.expect("the sender is ours"));
                // Another one may have come first.
                if self
                    .present
                    .send_if_modified(|names| names.insert(name.to_owned()))
                {
                    return;
                }
            }
        });
        let taken = |elapsed| {
            let message =
                format!("there is a stream to {name} in the guest already; drop it first");
            VmError::new(message).because(elapsed)
        };
        entered.await.map_err(taken)?;
        Ok(Port {
            qmp: self.qmp.clone(),
            id: format!("{PORT}{}", self.next.fetch_add(1, Ordering::Relaxed)),
            name: name.to_owned(),
            present: self.present.clone(),
            closing: self.closing.subscribe(),
        })
    }

    /// Adds a port with a name, and waits until a program in the guest opens it.
    pub(super) async fn connect(
        &self,
        name: &str,
        deadline: Duration,
    ) -> Result<GuestStream, VmError> {
        let port = self.enter(name, deadline).await?;
        let socket = self.directory.join(&port.id);
        // In a task of its own, so that a caller who gives up leaves no port behind: the stream that nobody
        // takes is dropped.
        let connecting = tokio::spawn(async move {
            match port.connect(&socket, deadline).await {
                Ok((stream, changes)) => port.watch_over(stream, changes),
                Err(error) => {
                    port.remove().await;
                    Err(error)
                }
            }
        });
        let lost = |error| VmError::new("connecting to the guest was lost").because(error);
        connecting.await.map_err(lost)?
    }
}

impl Port {
    async fn connect(
        &self,
        socket: &Path,
        deadline: Duration,
    ) -> Result<(UnixStream, Events), VmError> {
        let name = &self.name;
        let what = || VmError::new(format!("cannot connect to {name} in the guest"));
        let ends = Instant::now() + deadline;
        let backend = json!({
            "type": "socket",
            "data": {
                "addr": { "type": "unix", "data": { "path": socket.to_string_lossy() } },
                "server": true,
                "wait": false,
            },
        });
        let chardev = json!({ "id": self.id, "backend": backend });
        let added = self.qmp.execute("chardev-add", chardev).await;
        added.map_err(|error| what().because(error))?;
        let connected = UnixStream::connect(socket).await;
        // QEMU removes the socket with its half, but a killed QEMU would not.
        let _ = tokio::fs::remove_file(socket).await;
        let stream = connected.map_err(|error| what().because(error))?;
        let mut changes = self.qmp.events("VSERPORT_CHANGE");
        let device = json!({
            "driver": "virtserialport",
            "bus": "serial.0",
            "id": self.id,
            "chardev": self.id,
            "name": name,
        });
        let added = self.qmp.execute("device_add", device).await;
        added.map_err(|error| what().because(error))?;
        let left = ends.saturating_duration_since(Instant::now());
        let is_ours = |event: &Event| event.data["id"] == *self.id;
        let opening = changes.find(left, |event| is_ours(event) && event.data["open"] == true);
        opening.await.map_err(|error| what().because(error))?;
        Ok((stream, changes))
    }

    /// Has a task end the stream when the port is closed, and take the port out when the stream is dropped.
    fn watch_over(self, stream: UnixStream, mut changes: Events) -> Result<GuestStream, VmError> {
        let what = |error| VmError::new("cannot watch over a port").because(error);
        let (dropped, is_dropped) = oneshot::channel();
        let stream = stream.into_std().map_err(what)?;
        let closer = stream.try_clone().map_err(what)?;
        let mut deletions = self.qmp.events("DEVICE_DELETED");
        tokio::spawn(async move {
            let closing = async {
                let is_ours = |event: &Event| event.data["id"] == *self.id;
                // Whatever changes now, the port was closed: QEMU tells at most one change a second, the last. An
                // error other than lateness means that nothing more is heard: the VM is gone, or this task
                // was too slow for the truth.
                while let Err(QmpError::TimedOut { .. }) = changes.find(LISTENING, is_ours).await {}
            };
            // A port that another client takes out is not closed, and QEMU leaves our end of it open.
            let removed = async {
                let is_ours = |event: &Event| event.data["device"] == *self.id;
                while let Err(QmpError::TimedOut { .. }) = deletions.find(LISTENING, is_ours).await
                {
                }
            };
            let mut all_closing = self.closing.clone();
            tokio::select! {
                () = closing => {}
                () = removed => {}
                _ = is_dropped => {}
                Ok(()) = all_closing.changed() => {}
            }
            // Ends the reading of whoever has the other handle, which QEMU itself would leave open.
            let _ = closer.shutdown(Shutdown::Both);
            self.remove().await;
        });
        Ok(GuestStream {
            stream: UnixStream::from_std(stream).map_err(what)?,
            _dropped: dropped,
        })
    }

    /// Takes both halves out. What is not there needs no removal, and of a VM that is gone nothing is there.
    async fn remove(&self) {
        let mut deleted = self.qmp.events("DEVICE_DELETED");
        let id = json!({ "id": self.id });
        if self.qmp.execute("device_del", id.clone()).await.is_ok() {
            let ours = |event: &Event| event.data["device"] == *self.id;
            let _ = deleted.find(REMOVAL, ours).await;
        }
        let removing = async {
            while let Err(error) = self.qmp.execute("chardev-remove", id.clone()).await {
                // The device of an earlier process may be about to go, which that process was told of and not this one.
                if !error.to_string().contains("is busy") {
                    return tracing::debug!(%error, port = self.id, "a port was not there to be removed");
                }
                sleep(RETRY).await;
            }
        };
        let _ = timeout(REMOVAL, removing).await;
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
