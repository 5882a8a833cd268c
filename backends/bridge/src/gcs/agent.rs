//! The guest's end of GCS.

use blockmount::BackendError;
use serde::Serialize;
use tokio::sync::{Mutex, mpsc};
use tracing::{debug, warn};

use crate::codec::{AgentCodec, Step};
use crate::gcs::guest_work::{self, Refusal};
use crate::gcs::hresult::Hresult;
use crate::gcs::messages::{
    Capabilities, NegotiateRequest, NegotiateResponse, Notification, PROTOCOL_VERSION,
    ReceivedSettings, RequestBase, ResponseBase, SchemaVersion, Writer, decode, encode,
};
use crate::gcs::wire::{Frame, GcsHeader, MessageType, Role};
use crate::server::Server;
use crate::{Reply, Request};

/// How many notifications wait for a host.
const NOTIFICATIONS: usize = 256;

/// Serves a guest to its hosts over GCS.
pub type GuestServer = Server<GcsAgent>;

/// The guest's end of GCS.
#[derive(Debug)]
pub struct GcsAgent {
    notify: mpsc::Sender<Notification>,
    /// Locked by the connection that waits for the next.
    notifications: Mutex<mpsc::Receiver<Notification>>,
}

/// Too many notifications wait for a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the host has not taken the last {NOTIFICATIONS} notifications")]
pub struct NotificationsFull;

impl Default for GcsAgent {
    fn default() -> Self {
        let (notify, notifications) = mpsc::channel(NOTIFICATIONS);
        GcsAgent {
            notify,
            notifications: Mutex::new(notifications),
        }
    }
}

impl GuestServer {
    /// Tells the host something, on this connection or the next.
    ///
    /// # Errors
    ///
    /// [`NotificationsFull`] if 256 wait already; this one is not kept.
    pub fn notify(&self, notification: Notification) -> Result<(), NotificationsFull> {
        let sent = self.codec().notify.try_send(notification);
        sent.map_err(|_| NotificationsFull)
    }
}

impl AgentCodec for GcsAgent {
    type Header = GcsHeader;

    fn read(&self, header: GcsHeader, body: &[u8], agreed: bool) -> Step {
        match header.message {
            MessageType::NEGOTIATE if !agreed => negotiate(header, body),
            MessageType::MODIFY_SETTINGS if agreed => modify(header, body),
            message => {
                let activity = decode(body).map(|base: RequestBase| echo(base.activity_id));
                let why = format!(
                    "bridge: function not supported, header type: {}",
                    message.bits()
                );
                let refusal = Refusal::new(Hresult::NOT_IMPLEMENTED, why);
                refuse(header, activity.unwrap_or_default(), refusal)
            }
        }
    }

    fn refuse(&self, header: GcsHeader, why: String) -> Step {
        let refusal = Refusal::new(Hresult::INVALID_ARGUMENT, why);
        refuse(header, String::new(), refusal)
    }

    /// Takes notifications out of the queue as the host takes them.
    async fn send_unasked(&self, answers: mpsc::Sender<Vec<u8>>) {
        // The place first: a notification that was taken out would be lost if there were none.
        while let Ok(place) = answers.reserve().await {
            let next = self.notifications.lock().await.recv().await;
            let notification = next.expect("the sender lives as long as the receiver");
            if let Some(bytes) = framed(MessageType::NOTIFICATION, 0, &notification) {
                place.send(bytes);
            }
        }
    }
}

fn negotiate(header: GcsHeader, body: &[u8]) -> Step {
    let request = match decode::<NegotiateRequest>(body) {
        Ok(request) => request,
        Err(error) => return refuse(header, String::new(), unreadable(&error)),
    };
    let activity_id = echo(request.activity_id);
    let (lowest, highest) = (request.minimum_version, request.maximum_version);
    if highest < PROTOCOL_VERSION || lowest > PROTOCOL_VERSION {
        let why = format!(
            "the host speaks versions {lowest} to {highest} of the protocol, this guest only {PROTOCOL_VERSION}"
        );
        let result = Hresult::UNSUPPORTED_PROTOCOL_VERSION;
        let response = Refusal::new(result, why.clone()).into_response(activity_id);
        return respond(header, &response, |bytes| Step::Disagree(bytes, why));
    }
    let response = NegotiateResponse {
        activity_id,
        version: PROTOCOL_VERSION,
        capabilities: capabilities(),
        ..NegotiateResponse::default()
    };
    respond(header, &response, Step::Agree)
}

fn modify(header: GcsHeader, body: &[u8]) -> Step {
    let settings = match decode::<ReceivedSettings>(body) {
        Ok(settings) => settings,
        Err(error) => return refuse(header, String::new(), unreadable(&error)),
    };
    let activity_id = echo(settings.activity_id.clone());
    let request = match guest_work::read(settings) {
        Ok(request) => request,
        Err(refusal) => return refuse(header, activity_id, refusal),
    };
    let done = move |outcome: Result<Reply, BackendError>| match outcome {
        Ok(_) => ResponseBase {
            activity_id,
            ..ResponseBase::default()
        },
        Err(error) => Refusal::from(error).into_response(activity_id),
    };
    let GcsHeader { message, id } = header;
    match request {
        Some(request) => {
            // Hosts have overlays removed to unmount whatever is at a path.
            let otherwise = match &request {
                Request::Separate { target } => Some(Request::Unmount {
                    target: target.clone(),
                }),
                _ => None,
            };
            let write = move |outcome| framed(message.response(), id, &done(outcome));
            Step::Run {
                request,
                otherwise,
                write: Box::new(write),
            }
        }
        // There is nothing to do.
        None => respond(header, &done(Ok(Reply::Done)), Step::Reply),
    }
}

fn refuse(header: GcsHeader, activity: String, refusal: Refusal) -> Step {
    debug!(?header, ?refusal, "refused a request of the host");
    respond(header, &refusal.into_response(activity), Step::Reply)
}

/// Answers a request.
fn respond<B: Serialize>(header: GcsHeader, body: &B, step: impl FnOnce(Vec<u8>) -> Step) -> Step {
    let GcsHeader { message, id } = header;
    if matches!(message.role(), Role::Response | Role::Notification) {
        // An answer to an answer would go back and forth for ever.
        warn!(%message, id, "ignored what is not a request");
        return Step::Ignore;
    }
    framed(message.response(), id, body).map_or(Step::Ignore, step)
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
    Some(activity_id)
        .filter(|id| id.len() <= LONGEST)
        .unwrap_or_default()
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
