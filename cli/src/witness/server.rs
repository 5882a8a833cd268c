//! The guest's end of a witness.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, statx};
use rustix::system::{RebootCommand, reboot};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::protocol::{Request, Response, parse, receive, send};
use super::{agent_process, bare_mount, tables};
use crate::failure::{Context, Failure};
use crate::interrupt::{Interrupt, Stop};
use crate::tree::Tree;
use blockmount_agent::{Service, ServiceError};

/// How long a host may take to read an answer.
const SLOW: Duration = Duration::from_secs(60);

/// Answers whoever asks. Clones are the same witness.
#[derive(Debug, Clone)]
pub(super) struct Server(Arc<State>);

#[derive(Debug)]
struct State {
    roots: Vec<PathBuf>,
    held: Mutex<HashMap<PathBuf, File>>,
    interrupt: Interrupt,
}

impl Service for Server {
    async fn serve<S>(&self, mut stream: S) -> Result<(), ServiceError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        while let Some(message) = receive(&mut stream).await? {
            let request = parse::<Request>(&message);
            let powers_off = matches!(request, Ok(Request::PowerOff));
            let response = match request {
                Ok(request) => self.answer(request).await,
                Err(error) => Err(Failure::new("the request makes no sense").because(error)),
            };
            let is_done = response.is_ok();
            let response = response.unwrap_or_else(|failure| Response::Failed(failure.summary()));
            timeout(SLOW, send(&mut stream, &response)).await??;
            if powers_off && is_done {
                rustix::fs::sync();
                reboot(RebootCommand::PowerOff)?;
            }
        }
        Ok(())
    }
}

impl Server {
    pub(super) fn new(roots: Vec<PathBuf>, interrupt: Interrupt) -> Self {
        Server(Arc::new(State {
            roots,
            held: Mutex::default(),
            interrupt,
        }))
    }

    async fn answer(&self, request: Request) -> Result<Response, Failure> {
        match request {
            Request::BareMount { mounts } => {
                bare_mount::run_all(mounts).await.map(Response::BareMounts)
            }
            Request::KillAgent => agent_process::kill().await.map(Response::Pid),
            request => {
                let server = self.clone();
                let work = move |stop: &Stop| server.0.answer(request, stop);
                self.0.interrupt.blocking(work).await
            }
        }
    }
}

impl State {
    /// Answers what takes no waiting. Blocks.
    fn answer(&self, request: Request, stop: &Stop) -> Result<Response, Failure> {
        match request {
            Request::Tree { path } => Tree::read(&path, stop, || ()).map(Response::Tree),
            Request::Write { path, content } => {
                std::fs::write(&path, content)
                    .context(|| format!("cannot write {}", path.display()))?;
                Ok(Response::Done)
            }
            Request::Remove { path } => {
                remove(&path).context(|| format!("cannot remove {}", path.display()))?;
                Ok(Response::Done)
            }
            Request::Tables => tables::read(&self.roots).map(Response::Tables),
            Request::Hold { path } => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                let file = rustix::fs::open(&path, flags, Mode::empty())
                    .context(|| format!("cannot open {}", path.display()))?;
                self.held().insert(path, file.into());
                Ok(Response::Done)
            }
            Request::LetGo { path } => {
                let file = self.held().remove(&path);
                drop(file);
                Ok(Response::Done)
            }
            Request::AgentPid => agent_process::find().map(Response::Pid),
            Request::Dax { path } => is_dax(&path)
                .context(|| format!("cannot look at {}", path.display()))
                .map(Response::Dax),
            // What is done about it comes after the answer.
            Request::PowerOff => agent_process::is_our_machine().map(|()| Response::Done),
            Request::BareMount { .. } | Request::KillAgent => {
                unreachable!("these wait, and are answered elsewhere")
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<PathBuf, File>> {
        // Never held while a file is opened or closed, which may block.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => std::fs::remove_dir(path),
        false => std::fs::remove_file(path),
    }
}

fn is_dax(path: &Path) -> io::Result<bool> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let found = statx(CWD, path, flags, StatxFlags::BASIC_STATS)?;
    Ok(found.stx_attributes.contains(StatxAttributes::DAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::witness::client::Witness;

    async fn witness() -> Witness<tokio::io::DuplexStream> {
        let server = Server::new(Vec::new(), Interrupt::listen().unwrap());
        let (host, guest) = tokio::io::duplex(1 << 10);
        tokio::spawn(async move { server.serve(guest).await });
        Witness::new(host)
    }

    #[tokio::test]
    async fn files_are_written_digested_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut witness = witness().await;
        let path = dir.path().join("a");
        witness.write(&path, "content".repeat(1000)).await.unwrap();
        let tree = witness.tree(dir.path()).await.unwrap();
        let digest = crate::tree::digest_bytes("content".repeat(1000).as_bytes());
        let files: Vec<_> = tree.files().collect();
        assert_eq!(files, [(Path::new("a"), &digest)]);
        witness.remove(&path).await.unwrap();
        assert!(!path.exists());
        let error = witness.remove(&path).await.unwrap_err().to_string();
        assert!(
            error.contains("cannot remove") && error.contains("No such file"),
            "{error}"
        );
        std::fs::create_dir_all(dir.path().join("d/e")).unwrap();
        assert!(witness.remove(dir.path().join("d")).await.is_err());
        let path = dir.path().to_owned();
        let dax = witness.ask(&Request::Dax { path }).await.unwrap();
        assert_eq!(dax, Response::Dax(false));
    }

    #[tokio::test]
    async fn what_is_held_is_open_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("held");
        std::fs::write(&path, "").unwrap();
        let is_open = || {
            let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            open.filter_map(|fd| std::fs::read_link(fd.path()).ok())
                .any(|to| to == path)
        };
        let mut witness = witness().await;
        let hold = |path: &Path| Request::Hold { path: path.into() };
        let let_go = Request::LetGo { path: path.clone() };
        assert_eq!(witness.ask(&hold(&path)).await.unwrap(), Response::Done);
        assert!(is_open());
        assert_eq!(witness.ask(&let_go).await.unwrap(), Response::Done);
        assert!(!is_open());
        assert_eq!(witness.ask(&let_go).await.unwrap(), Response::Done);
        assert!(
            witness
                .ask(&hold(&dir.path().join("absent")))
                .await
                .is_err()
        );
    }

    #[tokio::test]
    async fn a_request_that_makes_no_sense_is_answered_and_the_next_is_done() {
        let server = Server::new(Vec::new(), Interrupt::listen().unwrap());
        let (mut host, guest) = tokio::io::duplex(1 << 10);
        tokio::spawn(async move { server.serve(guest).await });
        for nonsense in [&b"{}"[..], b"", b"\"fly\"", b"{\"tree\":{}}", b"\xff"] {
            use tokio::io::AsyncWriteExt;
            let length = u32::try_from(nonsense.len()).unwrap();
            host.write_all(&length.to_le_bytes()).await.unwrap();
            host.write_all(nonsense).await.unwrap();
            let answer = receive(&mut host).await.unwrap().unwrap();
            let answer = parse::<Response>(&answer).unwrap();
            assert!(matches!(answer, Response::Failed(_)), "{answer:?}");
        }
        assert!(Witness::new(host).tables().await.is_ok());
    }

    #[tokio::test]
    async fn a_machine_that_is_not_ours_is_not_turned_off() {
        let asked = witness().await.ask(&Request::PowerOff).await;
        let error = asked.unwrap_err();
        assert!(error.to_string().contains("pid 1"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_witness_that_does_not_answer_is_given_up() {
        let (host, _guest) = tokio::io::duplex(1 << 10);
        let mut witness = Witness::new(host);
        let error = witness.tables().await.unwrap_err().to_string();
        assert!(error.contains("within 30s"), "{error}");
        let error = witness.tables().await.unwrap_err().to_string();
        assert!(error.contains("new connection"), "{error}");
    }
}
