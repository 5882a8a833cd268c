//! The socket in the directory of a run, over which it says how it is doing: whoever connects is sent one object of JSON.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::tree::{Source, Status};

/// How long the other end may take.
const ANSWERING: Duration = Duration::from_secs(5);
/// How many ask at once; others wait.
const MOST: usize = 8;
/// A tree is shorter: a thousand disks have half a megabyte.
const LONGEST: u64 = 64 << 20;

/// A run that answers, until this is dropped.
#[derive(Debug)]
pub(crate) struct Offered(JoinHandle<()>);

impl Drop for Offered {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Answers at a socket, which is in a directory that only this user can use. One that an earlier program of the run has left is
/// replaced.
pub(crate) fn offer(path: &Path, source: Source) -> io::Result<Offered> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    Ok(Offered(tokio::spawn(answer_all(listener, source))))
}

async fn answer_all(listener: UnixListener, source: Source) {
    let slots = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let source = source.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, &source).await {
                        tracing::debug!(%error, "a status was not read to its end");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "nobody can ask for the status any more");
                return;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, source: &Source) -> io::Result<()> {
    let text = serde_json::to_vec(&source.read())?;
    timeout(ANSWERING, stream.write_all(&text)).await?
}

/// Asks a run; none if nobody answers there.
pub(crate) async fn ask(path: &Path) -> io::Result<Option<Status>> {
    let asking = async {
        let stream = match UnixStream::connect(path).await {
            Err(error) if is_nobody(&error) => return Ok(None),
            stream => stream?,
        };
        let mut text = Vec::new();
        stream.take(LONGEST).read_to_end(&mut text).await?;
        Ok(Some(serde_json::from_slice(&text)?))
    };
    timeout(ANSWERING, asking).await?
}

fn is_nobody(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
    kinds.contains(&error.kind())
}
