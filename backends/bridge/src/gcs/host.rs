//! The host's end of GCS.

use std::sync::Arc;
use std::time::Duration;

use blockmount::{BackendError, ErrorKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::broadcast;
use tracing::debug;

use crate::frames::{Found, FrameReader};
use crate::gcs::hresult::Hresult;
use crate::gcs::messages::{
    Capabilities, CreateRequest, ModificationRequest, ModifySettings, NULL_ID, NegotiateRequest,
    NegotiateResponse, Notification, PROTOCOL_VERSION, RequestBase, RequestType, ResponseBase,
    Writer, decode, encode,
};
use crate::gcs::wire::{Frame, GcsHeader, MessageType, Role};
use crate::line::{Deadlines, Failure, Line, Reconnect};
use crate::multiplexer::{Answers, Multiplexer};

/// How many notifications are kept for a listener that does not take them; then the oldest go.
const NOTIFICATIONS: usize = 256;

/// What every guest answers to a request for a change when no version was agreed on with it. It
/// has done nothing then: it is another process than the one that was connected to, on the same stream.
const UNKNOWN_PEER: &str = "bridge: function not supported";

/// The type of an answer, and its body or why that cannot be read.
type Answer = (MessageType, Result<Vec<u8>, String>);

/// A connection to the agent of a guest, over any stream of bytes.
///
/// Any number of requests are under way at once, and each is answered when the guest has done it. One
/// that is answered with garbage, too late or never fails alone. When the stream is lost, requests fail with
/// `Uncertain`, those under way and later ones, until [`reconnect`](Self::reconnect). A
/// [`RedialingChannel`](crate::RedialingChannel) reconnects by itself.
///
/// Cloning is cheap; clones are the same connection. The stream is closed when the last is dropped.
#[derive(Debug, Clone)]
pub struct GuestConnection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    deadlines: Deadlines,
    notifications: broadcast::Sender<Notification>,
    line: Line<Answer, Capabilities>,
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
            notifications: broadcast::Sender::new(NOTIFICATIONS),
            line: Line::new(),
        }));
        connection.reconnect(stream).await?;
        Ok(connection)
    }

    /// Negotiates over another stream to the same guest, and uses that from now on. The old one, if it
    /// still lives, is closed as if it were lost.
    ///
    /// # Errors
    ///
    /// `Uncertain` if the guest does not answer, `Unsuitable` if there is no common version. The connection is then as
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
        let Shared {
            deadlines,
            notifications,
            line,
        } = &*self.0;
        let (reader, writer) = tokio::io::split(stream);
        let reader = FrameReader::new(reader, deadlines.frame);
        let notifications = notifications.clone();
        let receive = |answers| receive(reader, answers, notifications);
        let link = Multiplexer::start(writer, line.ids.clone(), receive, |_| {});
        let capabilities = negotiate(&link, deadlines.negotiation).await?;
        line.replace(link, capabilities);
        Ok(())
    }

    /// Closes the connection; as if it were lost.
    pub fn close(&self) {
        self.0.line.close();
    }

    /// What the guest has said it can do.
    pub fn capabilities(&self) -> Arc<Capabilities> {
        self.0.line.agreed()
    }

    /// What the guest says unasked, from now on and over reconnections. A listener that takes none for long
    /// misses the oldest.
    pub fn notifications(&self) -> broadcast::Receiver<Notification> {
        self.0.notifications.subscribe()
    }

    /// Changes a setting of the VM, within the usual deadline.
    ///
    /// # Errors
    ///
    /// `Uncertain` if the guest may have done it: it has not answered in time, or with garbage, or there is no
    /// connection, or it has failed to [add](RequestType::Add) something and
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
        Ok(self.attempt(request, deadline).await?)
    }
}

impl Reconnect for GuestConnection {
    type Request = ModificationRequest;

    fn may_repeat(request: &ModificationRequest) -> bool {
        request.request_type == RequestType::Remove
    }

    fn deadlines(&self) -> Deadlines {
        self.0.deadlines
    }

    async fn attempt(
        &self,
        request: ModificationRequest,
        deadline: Duration,
    ) -> Result<(), Failure> {
        let adds = request.request_type == RequestType::Add;
        let what = format!(
            "{} of {}",
            request.request_type.name(),
            request.resource.name()
        );
        let link = self.0.line.link(&what)?;
        let body = ModifySettings::from(request);
        let message = MessageType::MODIFY_SETTINGS;
        let answer: ResponseBase = exchange(&link, &what, message, &body, deadline).await?;
        if answer.result.is_ok() {
            return Ok(());
        }
        if answer.result == Hresult::NOT_IMPLEMENTED
            && answer.error_message.starts_with(UNKNOWN_PEER)
        {
            let why = "the agent was started anew, and knows nothing of this connection";
            link.end(why);
            return Err(Failure::not_sent(&what, why));
        }
        Err(failure(&what, answer, adds).into())
    }

    async fn open<S>(&self, stream: S) -> Result<(), BackendError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        self.reconnect(stream).await
    }

    fn hang_up(&self) {
        self.close();
    }
}

/// Delivers answers and notifications until the stream ends, and returns the reason.
async fn receive<R: AsyncRead + Unpin>(
    mut reader: FrameReader<R, GcsHeader>,
    answers: Answers<Answer>,
    notifications: broadcast::Sender<Notification>,
) -> String {
    loop {
        let (GcsHeader { message, id }, body) = match reader.next_or_reason().await {
            Ok(Found::Frame(header, body)) => (header, Ok(body)),
            Ok(Found::Oversize(header, size)) => (
                header,
                Err(format!("has {size} bytes, over the limit of 64 KiB")),
            ),
            Err(reason) => return reason,
        };
        match (message.role(), body) {
            (Role::Response, body) => answers.deliver(id, (message, body)),
            (Role::Notification, Ok(body)) => notify(&body, &notifications),
            (role, _) => debug!(%message, id, ?role, "ignored a message of the guest"),
        }
    }
}

fn notify(body: &[u8], notifications: &broadcast::Sender<Notification>) {
    match decode::<Notification>(body) {
        // There may be no listener.
        Ok(notification) => drop(notifications.send(notification)),
        Err(error) => debug!(%error, "ignored a notification that cannot be read"),
    }
}

async fn negotiate(
    link: &Multiplexer<Answer>,
    deadline: Duration,
) -> Result<Capabilities, BackendError> {
    let what = "negotiation";
    let request = NegotiateRequest::default();
    let answer: NegotiateResponse =
        exchange(link, what, MessageType::NEGOTIATE, &request, deadline).await?;
    if !answer.result.is_ok() {
        let answer = ResponseBase {
            result: answer.result,
            error_message: answer.error_message,
            error_records: answer.error_records,
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
        start_up(link, "create", MessageType::CREATE, &request, deadline).await?;
        if capabilities.send_host_start_message {
            let request = RequestBase {
                container_id: NULL_ID.into(),
                activity_id: NULL_ID.into(),
            };
            start_up(link, "start", MessageType::START, &request, deadline).await?;
        }
    }
    Ok(capabilities)
}

/// Sends one of the messages that a Windows guest waits for before all others.
async fn start_up<B: Serialize>(
    link: &Multiplexer<Answer>,
    what: &str,
    message: MessageType,
    body: &B,
    deadline: Duration,
) -> Result<(), BackendError> {
    let answer: ResponseBase = exchange(link, what, message, body, deadline).await?;
    match answer.result {
        // Done on an earlier connection.
        Hresult::OK | Hresult::SYSTEM_ALREADY_EXISTS => Ok(()),
        _ => Err(failure(what, answer, false)),
    }
}

async fn exchange<B: Serialize, A: DeserializeOwned>(
    link: &Multiplexer<Answer>,
    what: &str,
    message: MessageType,
    body: &B,
    deadline: Duration,
) -> Result<A, Failure> {
    let unanswered = |why| Failure::unanswered(what, deadline, why);
    let call = link.begin().map_err(unanswered)?;
    let frame = Frame {
        message,
        id: call.id(),
        payload: encode(body, Writer::Host),
    };
    let bytes = frame.encode().map_err(|error| {
        let message = format!("cannot ask the guest for the {what}: the request is too long");
        BackendError::invalid(message).with_source(error)
    })?;
    let (kind, answer) = call.exchange(bytes, deadline).await.map_err(unanswered)?;
    let garbled = |how: String| {
        let message = format!("the guest's answer to the {what} {how}");
        Failure::Failed(BackendError::uncertain(message))
    };
    let expected = message.response();
    if kind != expected {
        return Err(garbled(format!("is of type {kind} in place of {expected}")));
    }
    let answer = answer.map_err(garbled)?;
    decode(&answer).map_err(|error| garbled(format!("cannot be read: {error}")))
}

/// What an answer that is not success means.
fn failure(what: &str, answer: ResponseBase, adds: bool) -> BackendError {
    let ResponseBase {
        result,
        error_message,
        error_records,
        ..
    } = answer;
    let mut numbers =
        std::iter::once(result).chain(error_records.iter().map(|record| record.result));
    let kind = numbers.find_map(Hresult::kind).unwrap_or(
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
