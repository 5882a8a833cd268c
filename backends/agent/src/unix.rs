//! Unix sockets that are there exactly as long as somebody listens.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use tokio::net::UnixListener;

use crate::AgentError;
use crate::connections::serve_all;
use crate::error::Context;
use crate::service::Service;

/// A socket that is listened on; dropping it removes it from the disk.
#[derive(Debug)]
pub(super) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: what was put in its place by somebody else is not ours to remove.
    id: (u64, u64),
}

impl Socket {
    /// Listens at a path. A socket without a listener is replaced.
    pub(super) fn bind(path: &Path) -> Result<Self, AgentError> {
        let what = || format!("cannot listen on {}", path.display());
        let listener = match bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_deserted(path) => {
                std::fs::remove_file(path).and_then(|()| bind(path))
            }
            bound => bound,
        };
        let listener = listener.context(what)?;
        let metadata = path.symlink_metadata().context(what)?;
        Ok(Socket {
            listener,
            path: path.to_owned(),
            id: (metadata.dev(), metadata.ino()),
        })
    }
}

/// A peer that may connect may mount: only this user may, from the first moment on.
fn bind(path: &Path) -> io::Result<UnixListener> {
    // The mask is the whole process's. No other file is being made yet: all sockets are bound before
    // anything is served.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    bound
}

/// Whether it is a socket without a listener.
fn is_deserted(path: &Path) -> bool {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && std::os::unix::net::UnixStream::connect(path).is_err_and(refused)
}

impl Drop for Socket {
    fn drop(&mut self) {
        let found = self.path.symlink_metadata();
        if found.is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.id)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %blockmount::printable(self.path.display()), %error, "cannot remove the socket");
        }
    }
}

/// Serves who connects, for ever.
pub(super) async fn serve<S: Service>(socket: Socket, service: S) -> Result<(), AgentError> {
    let accept = async || Ok(socket.listener.accept().await?.0);
    serve_all(socket.path.display(), service, accept).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_and_there_as_long_as_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let socket = Socket::bind(&path).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(Socket::bind(&path).is_err(), "somebody listens");
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_is_deserted_is_replaced_and_what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = Socket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "theirs").unwrap();
        drop(socket);
        assert!(Socket::bind(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
    }
}
