//! Our own protocol, at both ends: requests are sent as they are.

use std::fmt;

use blockmount::{BackendError, ErrorKind, Presence};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tracing::debug;

use crate::codec::{AgentCodec, Ask, HostCodec, Step};
use crate::connection::Connection;
use crate::link::{Failure, Link};
use crate::protocol::{
    Answer, First, Greeting, Hello, HelloAnswer, Id, Reply, Request, SOFTWARE, frame, short_line,
};
use crate::server::{Guest, Server};

/// A host's connection to an agent of ours.
pub type GuestConnection = Connection<NativeHost>;

/// Serves a guest to its hosts over our own protocol.
pub type GuestServer = Server<NativeAgent>;

/// The host's end of our own protocol.
#[derive(Debug, Default)]
pub struct NativeHost(());

/// What a host knows of an agent.
#[derive(Debug, Default)]
pub struct Agreement {
    version: u32,
    /// The name and version of the agent's software.
    software: String,
}

impl GuestConnection {
    /// The name and version of the agent's software, as it says.
    pub fn agent(&self) -> String {
        self.agreed().software.clone()
    }
}

impl HostCodec for NativeHost {
    type Header = Id;
    type Message = Request;
    type Agreed = Agreement;

    async fn negotiate(&self, link: Link<'_, Id>) -> Result<Agreement, BackendError> {
        let host = Hello::of_host();
        match exchange(link, "negotiation", &First::Hello(host.clone())).await? {
            HelloAnswer::Chosen { version, software } => {
                let software = short_line(&software);
                if (host.min..=host.max).contains(&version) {
                    return Ok(Agreement { version, software });
                }
                let message = format!(
                    "the agent ({software}) has chosen version {version} of the protocol, which this host did not offer"
                );
                Err(BackendError::unsuitable(message))
            }
            HelloAnswer::Incompatible(agent) => {
                Err(BackendError::unsuitable(Hello::disagreement(&host, &agent)))
            }
        }
    }

    fn translate(
        &self,
        request: Request,
        agreed: &Agreement,
    ) -> Result<Ask<Request>, BackendError> {
        Ok(match request {
            // An older agent cannot be asked.
            request if request.is_known_to(agreed.version) => Ask::Send(request),
            Request::AdoptMount { .. } | Request::AdoptOverlay(_) | Request::AdoptView(_) => {
                Ask::Answer(Reply::Presence(Presence::Unknown))
            }
            request => {
                let (what, agent) = (request.describe(), &agreed.software);
                let message = format!("the agent ({agent}) is too old for the {what}, update it");
                return Err(BackendError::unsuitable(message));
            }
        })
    }

    async fn exchange(
        &self,
        link: Link<'_, Id>,
        what: &str,
        request: Request,
    ) -> Result<Reply, Failure> {
        match exchange(link, what, &request).await? {
            Answer::Ok => Ok(Reply::Done),
            Answer::Presence(found) => Ok(found.into()),
            Answer::Usage(usage) => Ok(Reply::Usage(usage)),
            Answer::Trimmed(bytes) => Ok(Reply::Trimmed(bytes)),
            Answer::Error(error) if error.kind() == ErrorKind::Gone => {
                let message = format!("the guest says of the {what} that it is gone");
                Err(BackendError::uncertain(message).with_source(error).into())
            }
            Answer::Error(error) => Err(error.into()),
            Answer::HelloFirst => Err(link.restarted(what)),
        }
    }

    fn settle(&self, _: &Request, _: &Result<Reply, BackendError>) {}

    fn take_unasked(&self, _: &Id, _: &Result<Vec<u8>, String>) -> bool {
        false
    }
}

async fn exchange<B: Serialize + Sync, A: DeserializeOwned>(
    link: Link<'_, Id>,
    what: &str,
    body: &B,
) -> Result<A, Failure> {
    let (_, answer) = link.exchange(what, |id| frame(id, body)).await?;
    serde_json::from_slice(&answer)
        .map_err(|error| Failure::garbled(what, &format!("cannot be read: {error}")))
}

/// The agent's end of our own protocol.
#[derive(Default)]
pub struct NativeAgent {
    /// Learns what each host tells when it connects.
    learn: Option<Box<dyn Fn(Greeting) + Send + Sync>>,
}

impl fmt::Debug for NativeAgent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NativeAgent").finish_non_exhaustive()
    }
}

impl GuestServer {
    /// A server with the default limits, that has `learn` know what each host tells when it connects. It must not wait.
    pub fn with_greeting(
        guest: impl Guest,
        learn: impl Fn(Greeting) + Send + Sync + 'static,
    ) -> Self {
        let learn: Box<dyn Fn(Greeting) + Send + Sync> = Box::new(learn);
        Self::with_codec(NativeAgent { learn: Some(learn) }, guest)
    }
}

impl AgentCodec for NativeAgent {
    type Header = Id;

    fn read(&self, Id(id): Id, body: &[u8], agreed: bool) -> Step {
        if agreed {
            return match Request::parse(body) {
                Ok(request) => Step::Run {
                    request,
                    otherwise: None,
                    write: Box::new(move |outcome| Some(Answer::from(outcome).frame(id))),
                },
                Err(error) => refuse(id, error),
            };
        }
        match serde_json::from_slice(body) {
            Ok(First::Hello(host)) => {
                let step = agree(id, &host);
                if let (Step::Agree(_), Some(learn)) = (&step, &self.learn) {
                    learn(host.greeting());
                }
                step
            }
            Err(_) => Step::Reply(Answer::HelloFirst.frame(id)),
        }
    }

    fn refuse(&self, Id(id): Id, why: String) -> Step {
        refuse(id, BackendError::invalid(why))
    }

    /// An agent of ours says nothing unasked.
    async fn send_unasked(&self, _: mpsc::Sender<Vec<u8>>) {
        std::future::pending().await
    }
}

/// Chooses a version, or says why there is none.
fn agree(id: u64, host: &Hello) -> Step {
    let ours = Hello::ours();
    let write = |answer: &HelloAnswer| frame(id, answer).expect("a short text fits in a frame");
    match ours.common(host) {
        Some(version) => {
            let software = SOFTWARE.to_owned();
            Step::Agree(write(&HelloAnswer::Chosen { version, software }))
        }
        None => {
            let why = Hello::disagreement(host, &ours);
            Step::Disagree(write(&HelloAnswer::Incompatible(ours)), why)
        }
    }
}

fn refuse(id: u64, error: BackendError) -> Step {
    debug!(id, %error, "refused a request of the host");
    Step::Reply(Answer::Error(error).frame(id))
}
