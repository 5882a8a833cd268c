//! The host's end of a checker.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::Context;
use crate::protocol::{BareMount, BareTimes, Request, Response, Tables, parse, receive, send};
use crate::tree::Tree;

/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long the digests of all files of a tree may take: half a GiB under emulation, on a busy machine.
const TREE_DEADLINE: Duration = Duration::from_secs(600);

/// Asks the checker of a guest, one question at a time.
///
/// Not cancel safe: after an answer that was not waited for, or that did not come in time, the stream makes no
/// sense any more, and every further question is refused at once. Ask over a fresh stream then.
#[derive(Debug)]
pub struct Checker<S> {
    stream: S,
    broken: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Checker<S> {
    /// Asks over a stream, and waits half a minute for each answer, and ten minutes for a tree.
    pub fn new(stream: S) -> Self {
        Checker {
            stream,
            broken: false,
        }
    }

    /// Every name below a directory, with the digests of all files.
    ///
    /// # Errors
    ///
    /// What the guest answered, or why it did not.
    pub async fn tree(&mut self, path: impl Into<PathBuf>) -> io::Result<Tree> {
        match self.ask(&Request::Tree { path: path.into() }).await? {
            Response::Tree(tree) => Ok(tree),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// The first names in a directory, at most so many, and how many there are.
    ///
    /// # Errors
    ///
    /// What the guest answered, or why it did not.
    pub async fn names(
        &mut self,
        path: impl Into<PathBuf>,
        most: usize,
    ) -> io::Result<(Vec<String>, usize)> {
        let path = path.into();
        match self.ask(&Request::Names { path, most }).await? {
            Response::Names { names, count } => Ok((names, count)),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// Makes or replaces a file.
    ///
    /// # Errors
    ///
    /// What the guest answered, or why it did not.
    pub async fn write(
        &mut self,
        path: impl Into<PathBuf>,
        content: impl Into<String>,
    ) -> io::Result<()> {
        let (path, content) = (path.into(), content.into());
        self.done(&Request::Write { path, content }).await
    }

    /// Puts a key into a private file.
    ///
    /// # Errors
    ///
    /// What the guest answered, or why it did not.
    pub async fn write_key(
        &mut self,
        path: impl Into<PathBuf>,
        bytes: impl Into<Vec<u8>>,
    ) -> io::Result<()> {
        let (path, bytes) = (path.into(), bytes.into());
        self.done(&Request::WriteKey { path, bytes }).await
    }

    /// Removes a file or an empty directory.
    ///
    /// # Errors
    ///
    /// What the guest answered, or why it did not.
    pub async fn remove(&mut self, path: impl Into<PathBuf>) -> io::Result<()> {
        self.done(&Request::Remove { path: path.into() }).await
    }

    /// What the guest's kernel has.
    ///
    /// # Errors
    ///
    /// What the guest answered, or why it did not.
    pub async fn tables(&mut self) -> io::Result<Tables> {
        match self.ask(&Request::Tables).await? {
            Response::Tables(tables) => Ok(tables),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// Mounts and unmounts all of these at once, without the agent.
    ///
    /// # Errors
    ///
    /// What the guest answered, or why it did not.
    pub async fn bare_mount(&mut self, mounts: Vec<BareMount>) -> io::Result<Vec<BareTimes>> {
        let asked = mounts.len();
        match self.ask(&Request::BareMount { mounts }).await? {
            Response::BareMounts(times) if times.len() == asked => Ok(times),
            other => Err(self.misunderstood(&other)),
        }
    }

    async fn done(&mut self, request: &Request) -> io::Result<()> {
        match self.ask(request).await? {
            Response::Done => Ok(()),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// Asks whatever can be asked.
    async fn ask(&mut self, request: &Request) -> io::Result<Response> {
        if self.broken {
            return Err(io::Error::other(
                "an earlier question to the checker was not answered; ask over a new connection",
            ));
        }
        // Until the answer is here: the caller may give up at any moment.
        self.broken = true;
        let stream = &mut self.stream;
        let exchange = async {
            send(stream, request).await?;
            receive(stream).await
        };
        let deadline = match request {
            Request::Tree { .. } => TREE_DEADLINE,
            _ => DEADLINE,
        };
        let answer = timeout(deadline, exchange)
            .await
            .context(|| format!("the checker did not answer within {deadline:?}"))?
            .context(|| "the checker cannot be asked".to_owned())?
            .ok_or_else(|| io::Error::other("the checker ended the connection"))?;
        let answer = parse(&answer).context(|| "the checker answered garbage".to_owned())?;
        self.broken = false;
        match answer {
            Response::Failed(why) => Err(io::Error::other(why)),
            answer => Ok(answer),
        }
    }

    fn misunderstood(&mut self, answer: &Response) -> io::Error {
        self.broken = true;
        let text: String = format!("{answer:?}").chars().take(100).collect();
        io::Error::other(format!("the checker answered something else: {text}"))
    }
}
