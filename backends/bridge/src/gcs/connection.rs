//! The host's end of the bridge.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::broadcast;

use crate::gcs::Hresult;
use crate::gcs::link::Link;
use crate::gcs::messages::{
    Capabilities, CreateRequest, ErrorRecord, ModificationRequest, ModifySettings, NULL_ID,
    NegotiateRequest, NegotiateResponse, Notification, PROTOCOL_VERSION, RequestBase, RequestType,
    ResponseBase, Writer, decode, encode,
};
use crate::gcs::wire::{Frame, MessageType};

/// How many notifications are kept for a listener that does not take them; then the oldest go.
const NOTIFICATIONS: usize = 256;

/// What a guest answers, whoever has made it, to a request for a change when no version was agreed on with it. It
/// has done nothing then: it is another process than the one that was connected to, on the same stream.
const UNKNOWN_PEER: &str = "bridge: function not supported";

/// How long the host waits for its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// For the answer to one request, from the moment it is made. When it has passed only this call
    /// fails, with `Uncertain`. Default: 90 seconds, which is longer than a guest of ours takes to give up.
    pub call: Duration,
    /// For each step of the negotiation. Default: 10 seconds.
    pub negotiation: Duration,
    /// For the rest of a message that was begun; then the connection is lost. Default: 30 seconds.
    pub frame: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            call: Duration::from_secs(90),
            negotiation: Duration::from_secs(10),
            frame: Duration::from_secs(30),
        }
    }
}

/// A connection to the agent of a guest, over any stream of bytes.
///
/// Any number of requests are under way at once, and each is answered when the guest has done it. One
/// that is answered with garbage, too late or never fails alone. When the stream is lost, requests that
/// were sent fail with `Uncertain`, and everything later with `Gone` at once until
/// [`reconnect`](Self::reconnect).
///
/// Cloning is cheap; clones are the same connection. The stream is closed when the last is dropped.
#[derive(Debug, Clone)]
pub struct GuestConnection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    deadlines: Deadlines,
    /// Counts on over reconnections: an answer to an old request is never one to a new.
    next_id: AtomicU64,
    notifications: broadcast::Sender<Notification>,
    /// Locked to be copied or replaced, never across I/O.
    current: Mutex<Current>,
}

#[derive(Debug, Default)]
struct Current {
    link: Option<Arc<Link>>,
    capabilities: Arc<Capabilities>,
}

impl GuestConnection {
    /// Connects with the default [`Deadlines`].
    ///
    /// # Errors
    ///
    /// As for [`reconnect`](Self::reconnect).
    pub async fn connect<S>(stream: S) -> Result<Self, BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::connect_with(stream, Deadlines::default()).await
    }

    /// Negotiates over a stream; nothing else is sent before.
    ///
    /// # Errors
    ///
    /// As for [`reconnect`](Self::reconnect).
    pub async fn connect_with<S>(stream: S, deadlines: Deadlines) -> Result<Self, BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let connection = GuestConnection(Arc::new(Shared {
            deadlines,
            next_id: AtomicU64::new(0),
            notifications: broadcast::Sender::new(NOTIFICATIONS),
            current: Mutex::default(),
        }));
        connection.reconnect(stream).await?;
        Ok(connection)
    }

    /// Negotiates over another stream to the same guest, and uses that from now on. The old one, if it
    /// still lives, is closed as if it were lost.
    ///
    /// # Errors
    ///
    /// `Gone` if the guest does not answer, `Unsuitable` if there is no common version. The connection is then as
    /// it was.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the new stream and leaves the connection as it was.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn reconnect<S>(&self, stream: S) -> Result<(), BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let notifications = self.0.notifications.clone();
        let link = Link::start(stream, self.0.deadlines.frame, notifications);
        let capabilities = self
            .negotiate(&link)
            .await
            .map_err(|error| match error.kind() {
                // Negotiating changes nothing, so there is nothing to be uncertain about.
                ErrorKind::Uncertain | ErrorKind::Busy => {
                    BackendError::gone("the guest cannot be negotiated with").with_source(error)
                }
                _ => error,
            })?;
        let (link, capabilities) = (Some(Arc::new(link)), Arc::new(capabilities));
        let old = std::mem::replace(&mut *self.current(), Current { link, capabilities });
        if let Some(old) = old.link {
            old.end("another connection has taken its place");
        }
        Ok(())
    }

    /// Closes the connection; as if it were lost.
    pub fn close(&self) {
        let link = self.current().link.take();
        if let Some(link) = link {
            link.end("the connection was closed");
        }
    }

    /// What the guest has said it can do.
    pub fn capabilities(&self) -> Arc<Capabilities> {
        self.current().capabilities.clone()
    }

    /// What the guest says unasked, from now on and over reconnections. Who does not listen for long
    /// misses the oldest.
    pub fn notifications(&self) -> broadcast::Receiver<Notification> {
        self.0.notifications.subscribe()
    }

    /// Changes a setting of the VM, within the usual deadline.
    ///
    /// # Errors
    ///
    /// `Gone` if there is no connection, or no longer to the agent that it was made to. `Uncertain` if the guest may have done it: it has not answered in
    /// time, or with garbage, or the connection was lost, or it has failed to [add](RequestType::Add) something and
    /// not said what is left of it. `Busy` if it does not even read requests; this one was not sent then. `Invalid` if
    /// the request does not fit in 64 KiB. Otherwise what the guest says.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait, not the request.
    pub async fn modify(&self, request: ModificationRequest) -> Result<(), BackendError> {
        self.modify_within(request, self.0.deadlines.call).await
    }

    /// As [`modify`](Self::modify), with a deadline of its own.
    ///
    /// # Errors
    ///
    /// As for [`modify`](Self::modify).
    pub async fn modify_within(
        &self,
        request: ModificationRequest,
        deadline: Duration,
    ) -> Result<(), BackendError> {
        let adds = request.request_type == RequestType::Add;
        let what = format!(
            "{} of {}",
            request.request_type.name(),
            request.resource.name()
        );
        let link = self.current().link.clone();
        let link = link.ok_or_else(|| {
            BackendError::gone(format!(
                "cannot ask the guest for {what}: there is no connection"
            ))
        })?;
        let body = ModifySettings::from(request);
        let answer: ResponseBase = self
            .exchange(&link, &what, MessageType::MODIFY_SETTINGS, &body, deadline)
            .await?;
        if answer.result.is_ok() {
            return Ok(());
        }
        if answer.result == Hresult::NOT_IMPLEMENTED
            && answer.error_message.starts_with(UNKNOWN_PEER)
        {
            let why = "the agent was started anew, and knows nothing of this connection";
            link.end(why);
            return Err(BackendError::gone(format!(
                "cannot ask the guest for {what}: {why}"
            )));
        }
        Err(failure(&what, answer, adds))
    }

    async fn negotiate(&self, link: &Link) -> Result<Capabilities, BackendError> {
        let deadline = self.0.deadlines.negotiation;
        let what = "negotiation";
        let request = NegotiateRequest::default();
        let answer: NegotiateResponse = self
            .exchange(link, what, MessageType::NEGOTIATE, &request, deadline)
            .await?;
        if !answer.result.is_ok() {
            let NegotiateResponse {
                result,
                error_message,
                error_records,
                ..
            } = answer;
            let answer = ResponseBase {
                result,
                error_message,
                error_records,
                ..ResponseBase::default()
            };
            return Err(failure(what, answer, false));
        }
        if answer.version != PROTOCOL_VERSION {
            let message = format!(
                "the guest speaks version {} of the protocol, this host only {PROTOCOL_VERSION}",
                answer.version
            );
            return Err(BackendError::unsuitable(message));
        }
        let capabilities = answer.capabilities;
        if capabilities.send_host_create_message {
            let request = CreateRequest::for_vm();
            self.start_up(link, "create", MessageType::CREATE, &request)
                .await?;
            if capabilities.send_host_start_message {
                let request = RequestBase {
                    container_id: NULL_ID.into(),
                    activity_id: NULL_ID.into(),
                };
                self.start_up(link, "start", MessageType::START, &request)
                    .await?;
            }
        }
        Ok(capabilities)
    }

    /// Sends one of the messages that a Windows guest waits for before all others.
    async fn start_up<B: Serialize>(
        &self,
        link: &Link,
        what: &str,
        message: MessageType,
        body: &B,
    ) -> Result<(), BackendError> {
        let deadline = self.0.deadlines.negotiation;
        let answer: ResponseBase = self.exchange(link, what, message, body, deadline).await?;
        match answer.result {
            // Done on an earlier connection.
            Hresult::OK | Hresult::SYSTEM_ALREADY_EXISTS => Ok(()),
            _ => Err(failure(what, answer, false)),
        }
    }

    async fn exchange<B: Serialize, A: DeserializeOwned>(
        &self,
        link: &Link,
        what: &str,
        message: MessageType,
        body: &B,
        deadline: Duration,
    ) -> Result<A, BackendError> {
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let frame = Frame {
            message,
            id,
            payload: encode(body, Writer::Host),
        };
        let answer = link.ask(what, frame, deadline).await?;
        decode(&answer).map_err(|error| {
            let message = format!("the guest's answer to {what} cannot be read");
            BackendError::uncertain(message).with_source(error)
        })
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        // Nothing under the lock panics.
        self.0
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an answer that is not success means.
fn failure(what: &str, answer: ResponseBase, adds: bool) -> BackendError {
    let ResponseBase {
        result,
        error_message,
        error_records,
        ..
    } = answer;
    let named = error_records.iter().find_map(ErrorRecord::kind);
    let numbers = std::iter::once(result).chain(error_records.iter().map(|record| record.result));
    let kind = named
        .or_else(|| numbers.into_iter().find_map(Hresult::kind))
        .unwrap_or(
            // A guest that only has a text for us may have left half of it behind.
            if adds {
                ErrorKind::Uncertain
            } else {
                ErrorKind::Other
            },
        );
    let said = error_records
        .into_iter()
        .map(|record| record.message)
        .find(|said| !said.is_empty());
    let said = Some(error_message).filter(|said| !said.is_empty()).or(said);
    let said = said.unwrap_or_else(|| "it does not say why".to_owned());
    BackendError::new(kind, format!("the guest refuses {what}: {said} ({result})"))
}
