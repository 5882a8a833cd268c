//! The host's end of a witness.

use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::protocol::{BareMount, BareTimes, Request, Response, Tables, parse, receive, send};
use crate::failure::{Context, Failure};
use crate::tree::Tree;

/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// Asks the witness of a guest, one question at a time.
///
/// Not cancel safe: after an answer that was not waited for, or that did not come in time, the stream makes no
/// sense any more, and every further question is refused at once. Ask over a fresh stream then.
#[derive(Debug)]
pub(crate) struct Witness<S> {
    stream: S,
    broken: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Witness<S> {
    /// Asks over a stream, and waits half a minute for each answer.
    pub(crate) fn new(stream: S) -> Self {
        Witness {
            stream,
            broken: false,
        }
    }

    /// Every name below a directory, with the digests of all files.
    pub(crate) async fn tree(&mut self, path: impl Into<PathBuf>) -> Result<Tree, Failure> {
        match self.ask(&Request::Tree { path: path.into() }).await? {
            Response::Tree(tree) => Ok(tree),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// Makes or replaces a file.
    pub(crate) async fn write(
        &mut self,
        path: impl Into<PathBuf>,
        content: impl Into<String>,
    ) -> Result<(), Failure> {
        let (path, content) = (path.into(), content.into());
        self.done(&Request::Write { path, content }).await
    }

    /// Removes a file or an empty directory.
    pub(crate) async fn remove(&mut self, path: impl Into<PathBuf>) -> Result<(), Failure> {
        self.done(&Request::Remove { path: path.into() }).await
    }

    /// What the guest's kernel has.
    pub(crate) async fn tables(&mut self) -> Result<Tables, Failure> {
        match self.ask(&Request::Tables).await? {
            Response::Tables(tables) => Ok(tables),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// Mounts and unmounts all of these at once, without the agent.
    pub(crate) async fn bare_mount(
        &mut self,
        mounts: Vec<BareMount>,
    ) -> Result<Vec<BareTimes>, Failure> {
        let asked = mounts.len();
        match self.ask(&Request::BareMount { mounts }).await? {
            Response::BareMounts(times) if times.len() == asked => Ok(times),
            other => Err(self.misunderstood(&other)),
        }
    }

    async fn done(&mut self, request: &Request) -> Result<(), Failure> {
        match self.ask(request).await? {
            Response::Done => Ok(()),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// Asks whatever can be asked.
    pub(crate) async fn ask(&mut self, request: &Request) -> Result<Response, Failure> {
        if self.broken {
            let failure = Failure::new("an earlier question to the witness was not answered");
            return Err(failure.advise("ask over a new connection"));
        }
        // Until the answer is here: the caller may give up at any moment.
        self.broken = true;
        let stream = &mut self.stream;
        let exchange = async {
            send(stream, request).await?;
            receive(stream).await
        };
        let answer = timeout(DEADLINE, exchange)
            .await
            .context(|| format!("the witness did not answer within {DEADLINE:?}"))?
            .context(|| "the witness cannot be asked".to_owned())?
            .ok_or_else(|| Failure::new("the witness ended the connection"))?;
        let answer = parse(&answer).context(|| "the witness answered garbage".to_owned())?;
        self.broken = false;
        match answer {
            Response::Failed(why) => Err(Failure::new(why)),
            answer => Ok(answer),
        }
    }

    fn misunderstood(&mut self, answer: &Response) -> Failure {
        self.broken = true;
        let text: String = format!("{answer:?}").chars().take(100).collect();
        Failure::new(format!("the witness answered something else: {text}"))
    }
}
