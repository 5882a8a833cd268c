//! The guest's end of GCS.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, warn};

use crate::frames::{Found, FrameError, FrameReader};
use crate::gcs::guest_work::{self, Refusal};
use crate::gcs::hresult::Hresult;
use crate::gcs::messages::{
    Capabilities, NegotiateRequest, NegotiateResponse, Notification, PROTOCOL_VERSION,
    ReceivedSettings, RequestBase, ResponseBase, SchemaVersion, Writer, decode, encode,
};
use crate::gcs::wire::{Frame, GcsHeader, MessageType, Role};
use crate::work::{FRAME, Guest, REQUESTS, Session, Worker, send};

/// How many notifications wait for a host.
const NOTIFICATIONS: usize = 256;

/// Serves a guest to its hosts over GCS, as [`blockmount_bridge::GuestServer`](crate::GuestServer) does over our own
/// protocol, and with the same limits and order.
///
/// Cloning is cheap; clones are the same server.
#[derive(Debug, Clone)]
pub struct GuestServer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    worker: Worker,
    requests: usize,
    frame_timeout: Duration,
    notifications: Mutex<VecDeque<Notification>>,
    notified: Notify,
}

/// Too many notifications wait for a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the host has not taken the last {NOTIFICATIONS} notifications")]
pub struct NotificationsFull;

/// Serves a guest over one stream. As [`GuestServer::serve`], for a guest that is never reconnected.
///
/// # Errors
///
/// As for [`GuestServer::serve`].
pub async fn serve<S>(stream: S, guest: impl Guest) -> Result<(), FrameError>
where
    S: AsyncRead + AsyncWrite,
{
    GuestServer::new(guest).serve(stream).await
}

impl GuestServer {
    /// A server with the default limits: 256 requests of each connection at once, 30 seconds for the rest of a
    /// message.
    pub fn new(guest: impl Guest) -> Self {
        Self::with_limits(guest, REQUESTS, FRAME)
    }

    /// A server that has at most so many requests of one connection under way (at least one), and waits so long for
    /// the rest of a message that was begun.
    pub fn with_limits(guest: impl Guest, requests: usize, frame_timeout: Duration) -> Self {
        GuestServer(Arc::new(Shared {
            worker: Worker::new(guest),
            requests,
            frame_timeout,
            notifications: Mutex::default(),
            notified: Notify::new(),
        }))
    }

    /// Tells the host something, on this connection or the next.
    ///
    /// # Errors
    ///
    /// [`NotificationsFull`] if 256 wait already; this one is not kept.
    pub fn notify(&self, notification: Notification) -> Result<(), NotificationsFull> {
        let mut waiting = self.notifications();
        if waiting.len() >= NOTIFICATIONS {
            return Err(NotificationsFull);
        }
        waiting.push_back(notification);
        drop(waiting);
        self.0.notified.notify_one();
        Ok(())
    }

    /// Serves one connection until its host ends it.
    ///
    /// # Errors
    ///
    /// [`FrameError`] if the stream fails or is not made of frames any more. The next connection can be served in
    /// any case.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection; what is under way goes on.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub async fn serve<S>(&self, stream: S) -> Result<(), FrameError>
    where
        S: AsyncRead + AsyncWrite,
    {
        let (reader, writer) = tokio::io::split(stream);
        let (session, outgoing) = self.0.worker.session(self.0.requests);
        let (negotiated, is_negotiated) = watch::channel(false);
        let reader = FrameReader::new(reader, self.0.frame_timeout);
        let answers = session.answers.clone();
        let connection = Connection {
            session,
            negotiated,
        };
        tokio::select! {
            outcome = connection.receive(reader) => outcome,
            outcome = send(writer, outgoing) => Ok(outcome?),
            () = self.send_notifications(answers, is_negotiated) => Ok(()),
        }
    }

    /// Takes notifications out of the queue as the host takes them.
    async fn send_notifications(
        &self,
        answers: mpsc::Sender<Vec<u8>>,
        mut is_negotiated: watch::Receiver<bool>,
    ) {
        if is_negotiated
            .wait_for(|negotiated| *negotiated)
            .await
            .is_err()
        {
            return;
        }
        loop {
            while !self.notifications().is_empty() {
                // The place first: a notification that was taken out would be lost if there were none.
                let Ok(place) = answers.reserve().await else {
                    return;
                };
                let Some(notification) = self.notifications().pop_front() else {
                    break;
                };
                if let Some(bytes) = framed(MessageType::NOTIFICATION, 0, &notification) {
                    place.send(bytes);
                }
            }
            self.0.notified.notified().await;
        }
    }

    fn notifications(&self) -> MutexGuard<'_, VecDeque<Notification>> {
        // Nothing under the lock panics half-way through a change.
        self.0
            .notifications
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reading side of one connection.
struct Connection {
    session: Session,
    /// Whether a version was agreed on; anew on each connection.
    negotiated: watch::Sender<bool>,
}

impl Connection {
    async fn receive<R: AsyncRead + Unpin>(
        &self,
        mut reader: FrameReader<R, GcsHeader>,
    ) -> Result<(), FrameError> {
        while let Some(found) = reader.next().await? {
            match found {
                Found::Frame(header, payload) => self.take(header, &payload).await,
                Found::Oversize(GcsHeader { message, id }, size) => {
                    let why = format!("the request has {size} bytes, over the limit of 64 KiB");
                    let refusal = Refusal::new(Hresult::INVALID_ARGUMENT, why);
                    self.refuse(message, id, String::new(), refusal).await;
                }
            }
        }
        Ok(())
    }

    async fn take(&self, GcsHeader { message, id }: GcsHeader, payload: &[u8]) {
        let negotiated = *self.negotiated.borrow();
        match message {
            MessageType::NEGOTIATE if !negotiated => self.negotiate(id, payload).await,
            MessageType::MODIFY_SETTINGS if negotiated => self.modify(id, payload).await,
            _ => {
                let activity = decode(payload).map(|base: RequestBase| echo(base.activity_id));
                let why = format!(
                    "bridge: function not supported, header type: {}",
                    message.bits()
                );
                let refusal = Refusal::new(Hresult::NOT_IMPLEMENTED, why);
                self.refuse(message, id, activity.unwrap_or_default(), refusal)
                    .await;
            }
        }
    }

    async fn negotiate(&self, id: u64, payload: &[u8]) {
        let message = MessageType::NEGOTIATE;
        let request = match decode::<NegotiateRequest>(payload) {
            Ok(request) => request,
            Err(error) => {
                return self
                    .refuse(message, id, String::new(), unreadable(&error))
                    .await;
            }
        };
        let activity = echo(request.activity_id);
        let (lowest, highest) = (request.minimum_version, request.maximum_version);
        if highest < PROTOCOL_VERSION || lowest > PROTOCOL_VERSION {
            let why = format!(
                "the host speaks versions {lowest} to {highest} of the protocol, this guest only {PROTOCOL_VERSION}"
            );
            let result = Hresult::UNSUPPORTED_PROTOCOL_VERSION;
            let refusal = Refusal::new(result, why);
            return self.refuse(message, id, activity, refusal).await;
        }
        let response = NegotiateResponse {
            activity_id: activity,
            version: PROTOCOL_VERSION,
            capabilities: capabilities(),
            ..NegotiateResponse::default()
        };
        // The answer first: a notification must not overtake it.
        self.answer(message, id, &response).await;
        self.negotiated.send_replace(true);
    }

    async fn modify(&self, id: u64, payload: &[u8]) {
        let message = MessageType::MODIFY_SETTINGS;
        let settings = match decode::<ReceivedSettings>(payload) {
            Ok(settings) => settings,
            Err(error) => {
                return self
                    .refuse(message, id, String::new(), unreadable(&error))
                    .await;
            }
        };
        let activity = echo(settings.activity_id.clone());
        let respond = move |refusal: Option<Refusal>| match refusal {
            None => ResponseBase {
                activity_id: activity,
                ..ResponseBase::default()
            },
            Some(refusal) => refusal.into_response(activity),
        };
        match guest_work::read(settings) {
            Ok(Some(request)) => {
                let answer = move |outcome: Result<(), _>| {
                    let refusal = outcome.err().map(Refusal::from);
                    framed(message.response(), id, &respond(refusal))
                };
                self.session.start(request, answer).await;
            }
            // There is nothing to do.
            Ok(None) => self.answer(message, id, &respond(None)).await,
            Err(refusal) => {
                debug!(id, ?refusal, "refused a request of the host");
                self.answer(message, id, &respond(Some(refusal))).await;
            }
        }
    }

    async fn refuse(&self, message: MessageType, id: u64, activity: String, refusal: Refusal) {
        debug!(%message, id, ?refusal, "refused a request of the host");
        self.answer(message, id, &refusal.into_response(activity))
            .await;
    }

    async fn answer<B: Serialize>(&self, message: MessageType, id: u64, body: &B) {
        if matches!(message.role(), Role::Response | Role::Notification) {
            // An answer to an answer would go back and forth for ever.
            return warn!(%message, id, "ignored what is not a request");
        }
        if let Some(bytes) = framed(message.response(), id, body) {
            let _ = self.session.answers.send(bytes).await;
        }
    }
}

/// The bytes of a message; none if it is over the limit, as a notification may be.
fn framed<B: Serialize>(message: MessageType, id: u64, body: &B) -> Option<Vec<u8>> {
    let frame = Frame {
        message,
        id,
        payload: encode(body, Writer::Guest),
    };
    frame
        .encode()
        .inspect_err(|error| warn!(%message, id, %error, "a message is not sent"))
        .ok()
}

/// The activity that an answer repeats; not one so long that the answer would be over the limit.
fn echo(activity_id: String) -> String {
    const LONGEST: usize = 256;
    if activity_id.len() <= LONGEST {
        activity_id
    } else {
        String::new()
    }
}

fn unreadable(error: &serde_json::Error) -> Refusal {
    let why = format!("the request cannot be read: {error}");
    Refusal::new(Hresult::INVALID_JSON, why)
}

/// What this guest can do, which is disks and layers.
fn capabilities() -> Capabilities {
    Capabilities {
        supported_schema_versions: vec![SchemaVersion { major: 2, minor: 1 }],
        runtime_os_type: "Linux".to_owned(),
        ..Capabilities::default()
    }
}
