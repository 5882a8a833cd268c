//! The host's end of a witness.
#![allow(
    dead_code,
    reason = "who asks all of it is a host that starts its guests, and the tests ask only some"
)]

use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::protocol::{BareMount, BareTimes, Request, Response, Tables, parse, receive, send};
use crate::failure::{Context, Failure};
use crate::tree::Tree;

/// How long an answer may take, unless told otherwise.
const DEADLINE: Duration = Duration::from_secs(30);

/// Asks the witness of a guest, one question at a time.
///
/// Not cancel safe: after an answer that was not waited for, or that did not come in time, the stream makes no
/// sense any more, and every further question is refused at once. Ask over a fresh stream then.
#[derive(Debug)]
pub(crate) struct Witness<S> {
    stream: S,
    deadline: Duration,
    broken: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Witness<S> {
    /// Asks over a stream, and waits half a minute for each answer.
    pub(crate) fn new(stream: S) -> Self {
        Witness {
            stream,
            deadline: DEADLINE,
            broken: false,
        }
    }

    /// Waits so long for each answer.
    #[must_use]
    pub(crate) fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
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

    /// Keeps a file or directory in use, also after this connection.
    pub(crate) async fn hold(&mut self, path: impl Into<PathBuf>) -> Result<(), Failure> {
        self.done(&Request::Hold { path: path.into() }).await
    }

    /// Ends a [`hold`](Self::hold).
    pub(crate) async fn let_go(&mut self, path: impl Into<PathBuf>) -> Result<(), Failure> {
        self.done(&Request::LetGo { path: path.into() }).await
    }

    /// Which process the agent is; none while it is being restarted.
    pub(crate) async fn agent_pid(&mut self) -> Result<Option<u32>, Failure> {
        self.pid(&Request::AgentPid).await
    }

    /// Kills the agent, and says which process it was.
    pub(crate) async fn kill_agent(&mut self) -> Result<Option<u32>, Failure> {
        self.pid(&Request::KillAgent).await
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

    /// Whether a file is read past the page cache.
    pub(crate) async fn dax(&mut self, path: impl Into<PathBuf>) -> Result<bool, Failure> {
        match self.ask(&Request::Dax { path: path.into() }).await? {
            Response::Dax(dax) => Ok(dax),
            other => Err(self.misunderstood(&other)),
        }
    }

    /// Turns the guest off. It may be off before it has answered.
    pub(crate) async fn power_off(mut self) -> Result<(), Failure> {
        let send = send(&mut self.stream, &Request::PowerOff);
        let sent = timeout(self.deadline, send).await;
        sent.context(|| "the witness did not listen".to_owned())?
            .context(|| "cannot ask the witness".to_owned())?;
        match timeout(self.deadline, receive(&mut self.stream)).await {
            Ok(Ok(Some(answer))) => match parse(&answer) {
                Ok(Response::Done) => Ok(()),
                Ok(Response::Failed(why)) => {
                    Err(Failure::new("cannot turn the guest off").because(why))
                }
                Ok(other) => Err(self.misunderstood(&other)),
                Err(error) => Err(Failure::new("the witness answered garbage").because(error)),
            },
            Ok(Ok(None) | Err(_)) => Ok(()),
            Err(elapsed) => {
                Err(Failure::new("the guest does not turn itself off").because(elapsed))
            }
        }
    }

    async fn done(&mut self, request: &Request) -> Result<(), Failure> {
        match self.ask(request).await? {
            Response::Done => Ok(()),
            other => Err(self.misunderstood(&other)),
        }
    }

    async fn pid(&mut self, request: &Request) -> Result<Option<u32>, Failure> {
        match self.ask(request).await? {
            Response::Pid(pid) => Ok(pid),
            other => Err(self.misunderstood(&other)),
        }
    }

    async fn ask(&mut self, request: &Request) -> Result<Response, Failure> {
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
        let answer = timeout(self.deadline, exchange)
            .await
            .context(|| format!("the witness did not answer within {:?}", self.deadline))?
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
