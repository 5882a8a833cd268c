//! The guest's end of a checker.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockmount_agent::{Service, ServiceError, one_line};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::private::write_private;
use crate::protocol::{Request, Response, parse, receive, send};
use crate::tree::Tree;
use crate::{Context, bare_mount, tables};

/// How long a host may take to read an answer.
const SLOW: Duration = Duration::from_secs(60);

/// Answers whoever asks. Clones are the same checker.
#[derive(Debug, Clone)]
pub struct CheckerServer {
    roots: Arc<[PathBuf]>,
}

impl CheckerServer {
    /// One that lists the directories below these, where the agent mounts.
    pub fn new(roots: Vec<PathBuf>) -> Self {
        CheckerServer {
            roots: roots.into(),
        }
    }

    /// Answers one request.
    ///
    /// # Errors
    ///
    /// If it could not be done; nothing stays half done but a file that was being written.
    pub async fn answer(&self, request: Request) -> io::Result<Response> {
        if let Request::BareMount { mounts } = request {
            return bare_mount::run_all(mounts).await.map(Response::BareMounts);
        }
        let server = self.clone();
        tokio::task::spawn_blocking(move || server.answer_at_once(request)).await?
    }

    /// Answers what takes no waiting. Blocks.
    fn answer_at_once(&self, request: Request) -> io::Result<Response> {
        match request {
            Request::Tree { path } => Tree::read(&path, &|| false, || ()).map(Response::Tree),
            Request::Names { path, most } => {
                names(&path, most).context(|| format!("cannot read {}", path.display()))
            }
            Request::Write { path, content } => {
                std::fs::write(&path, content)
                    .context(|| format!("cannot write {}", path.display()))?;
                Ok(Response::Done)
            }
            Request::WriteKey { path, bytes } => {
                write_private(&path, &bytes)
                    .context(|| format!("cannot write {}", path.display()))?;
                Ok(Response::Done)
            }
            Request::Remove { path } => {
                remove(&path).context(|| format!("cannot remove {}", path.display()))?;
                Ok(Response::Done)
            }
            Request::Tables => tables::read(&self.roots).map(Response::Tables),
            Request::BareMount { .. } => unreachable!("these wait, and are answered elsewhere"),
        }
    }
}

impl Service for CheckerServer {
    async fn serve<S>(&self, mut stream: S) -> Result<(), ServiceError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        while let Some(request) = next(&mut stream).await? {
            let answer = match request {
                Ok(request) => self.answer(request).await,
                Err(error) => Err(error),
            };
            respond(&mut stream, answer).await?;
        }
        Ok(())
    }
}

/// The next request of a host: `None` at the end of the connection, an error inside for one that makes no sense.
///
/// # Errors
///
/// If the connection cannot go on.
pub async fn next<Q: DeserializeOwned, S: AsyncRead + Unpin>(
    stream: &mut S,
) -> io::Result<Option<io::Result<Q>>> {
    let message = receive(stream).await?;
    let request =
        |bytes: Vec<u8>| parse(&bytes).context(|| "the request makes no sense".to_owned());
    Ok(message.map(request))
}

/// Answers a request, or says why it could not be done.
///
/// # Errors
///
/// If the connection cannot go on.
pub async fn respond<A: Serialize + From<Response>, S: AsyncWrite + Unpin>(
    stream: &mut S,
    answer: io::Result<A>,
) -> io::Result<()> {
    let answer = answer.unwrap_or_else(|error| Response::Failed(one_line(&error)).into());
    timeout(SLOW, send(stream, &answer)).await?
}

fn names(path: &Path, most: usize) -> io::Result<Response> {
    let entries = std::fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
    let names = entries
        .iter()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    names.truncate(most);
    let count = entries.len();
    Ok(Response::Names { names, count })
}

fn remove(path: &Path) -> io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => std::fs::remove_dir(path),
        false => std::fs::remove_file(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checker;
    use crate::tree::digest_bytes;

    async fn checker() -> Checker<tokio::io::DuplexStream> {
        let server = CheckerServer::new(Vec::new());
        let (host, guest) = tokio::io::duplex(1 << 10);
        tokio::spawn(async move { server.serve(guest).await });
        Checker::new(host)
    }

    #[tokio::test]
    async fn files_are_written_digested_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut checker = checker().await;
        let path = dir.path().join("a");
        checker.write(&path, "content".repeat(1000)).await.unwrap();
        let tree = checker.tree(dir.path()).await.unwrap();
        let digest = digest_bytes("content".repeat(1000).as_bytes());
        let files: Vec<_> = tree.files().collect();
        assert_eq!(files, [(Path::new("a"), &digest)]);
        let names = checker.names(dir.path(), 1).await.unwrap();
        assert_eq!(names, (vec!["a".to_owned()], 1));
        let names = checker.names(dir.path(), 0).await.unwrap();
        assert_eq!(names, (Vec::new(), 1));
        checker.remove(&path).await.unwrap();
        assert!(!path.exists());
        let key = dir.path().join("keys/key");
        for bytes in [&b"\xff\0first"[..], b"second"] {
            checker.write_key(&key, bytes).await.unwrap();
            assert_eq!(std::fs::read(&key).unwrap(), bytes);
        }
        use std::os::unix::fs::PermissionsExt as _;
        for (path, mode) in [(&*key, 0o600), (key.parent().unwrap(), 0o700)] {
            let found = path.metadata().unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{path:?}");
        }
        checker.remove(&key).await.unwrap();
        checker.remove(dir.path().join("keys")).await.unwrap();
        let error = checker.remove(&path).await.unwrap_err().to_string();
        assert!(
            error.contains("cannot remove") && error.contains("No such file"),
            "{error}"
        );
        std::fs::create_dir_all(dir.path().join("d/e")).unwrap();
        assert!(checker.remove(dir.path().join("d")).await.is_err());
    }

    #[tokio::test]
    async fn a_request_that_makes_no_sense_is_answered_and_the_next_is_done() {
        let server = CheckerServer::new(Vec::new());
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
        assert!(Checker::new(host).tables().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_checker_that_does_not_answer_is_given_up() {
        let (host, _guest) = tokio::io::duplex(1 << 10);
        let mut checker = Checker::new(host);
        let error = checker.tables().await.unwrap_err();
        assert!(one_line(&error).contains("within 30s"), "{error}");
        let error = checker.tables().await.unwrap_err();
        assert!(one_line(&error).contains("new connection"), "{error}");
    }
}
