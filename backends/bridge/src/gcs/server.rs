//! The guest's end of the bridge.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::{ErrorKind, LayerCombiner, Mounter, Unplugger};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tracing::{debug, warn};

use crate::gcs::Hresult;
use crate::gcs::guest_work::{Refusal, Work};
use crate::gcs::messages::{
    BLOCKMOUNT_VERSION, Capabilities, GuestCapabilities, NegotiateRequest, NegotiateResponse,
    Notification, PROTOCOL_VERSION, ReceivedSettings, RequestBase, ResponseBase, SchemaVersion,
    Writer, decode, encode,
};
use crate::gcs::wire::{Decoded, Frame, FrameError, FrameReader, MessageType, Role};
use crate::order::Order;

/// How many requests are under way at once, unless told otherwise: as many as there are disks on four
/// controllers of Hyper-V. More wait in the stream.
const REQUESTS: usize = 256;

/// How many answers wait for a host that reads slowly; more wait with their requests.
const ANSWERS: usize = 16;

/// How many notifications wait for a host.
const NOTIFICATIONS: usize = 256;

/// How long the rest of a message may take that was begun, unless told otherwise.
const FRAME: Duration = Duration::from_secs(30);

/// Serves a guest to its host: requests in, calls of the guest's contracts, answers out.
///
/// Requests are done at once and answered as they end; those for one target or device in the
/// order in which they came. No request stops the server, whatever is in it. When a connection ends, what
/// is under way goes on and its answers are dropped; a request over the next connection waits for it where it
/// must. So one server has to serve all connections of a guest.
///
/// Cloning is cheap; clones are the same server.
pub struct GuestServer<G>(Arc<Shared<G>>);

struct Shared<G> {
    guest: G,
    frame_deadline: Duration,
    permits: Arc<Semaphore>,
    order: Order<crate::gcs::guest_work::Key>,
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
pub async fn serve<S, G>(stream: S, guest: G) -> Result<(), FrameError>
where
    S: AsyncRead + AsyncWrite,
    G: Mounter + Unplugger + LayerCombiner,
{
    GuestServer::new(guest).serve(stream).await
}

impl<G> Clone for GuestServer<G> {
    fn clone(&self) -> Self {
        GuestServer(self.0.clone())
    }
}

impl<G> fmt::Debug for GuestServer<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestServer")
            .field("requests_free", &self.0.permits.available_permits())
            .finish_non_exhaustive()
    }
}

impl<G: Mounter + Unplugger + LayerCombiner> GuestServer<G> {
    /// A server with the default limits: 256 requests at once, 30 seconds for the rest of a message.
    pub fn new(guest: G) -> Self {
        Self::with_limits(guest, REQUESTS, FRAME)
    }

    /// A server that has at most so many requests under way (at least one), and waits so long for the rest of
    /// a message that was begun.
    pub fn with_limits(guest: G, requests: usize, frame_deadline: Duration) -> Self {
        GuestServer(Arc::new(Shared {
            guest,
            frame_deadline,
            permits: Arc::new(Semaphore::new(requests.clamp(1, Semaphore::MAX_PERMITS))),
            order: Order::default(),
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
        let (answers, outgoing) = mpsc::channel(ANSWERS);
        let (negotiated, is_negotiated) = watch::channel(false);
        let reader = FrameReader::new(reader, self.0.frame_deadline);
        let connection = Connection {
            server: self.clone(),
            answers: answers.clone(),
            negotiated,
        };
        tokio::select! {
            outcome = connection.receive(reader) => outcome,
            outcome = send(writer, outgoing) => outcome,
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
struct Connection<G> {
    server: GuestServer<G>,
    answers: mpsc::Sender<Vec<u8>>,
    /// Whether a version was agreed on; anew on each connection.
    negotiated: watch::Sender<bool>,
}

impl<G: Mounter + Unplugger + LayerCombiner> Connection<G> {
    async fn receive<R: AsyncRead + Unpin>(
        &self,
        mut reader: FrameReader<R>,
    ) -> Result<(), FrameError> {
        while let Some(decoded) = reader.next().await? {
            match decoded {
                Decoded::Frame(frame) => self.take(frame).await,
                Decoded::Oversize { message, id, size } => {
                    let why = format!("the request has {size} bytes, over the limit of 64 KiB");
                    let refusal = Refusal::new(Hresult::INVALID_ARGUMENT, ErrorKind::Invalid, why);
                    self.refuse(message, id, String::new(), refusal).await;
                }
            }
        }
        Ok(())
    }

    async fn take(&self, frame: Frame) {
        let Frame {
            message,
            id,
            payload,
        } = frame;
        let negotiated = *self.negotiated.borrow();
        match message {
            MessageType::NEGOTIATE if !negotiated => self.negotiate(id, &payload).await,
            MessageType::MODIFY_SETTINGS if negotiated => self.modify(id, &payload).await,
            _ => {
                let activity = decode(&payload).map(|base: RequestBase| echo(base.activity_id));
                let why = format!(
                    "bridge: function not supported, header type: {}",
                    message.bits()
                );
                let refusal = Refusal::new(Hresult::NOT_IMPLEMENTED, ErrorKind::Unsuitable, why);
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
            let refusal = Refusal::new(result, ErrorKind::Unsuitable, why);
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
        let work = match Work::read(settings) {
            Ok(work) => work,
            Err(refusal) => return self.refuse(message, id, activity, refusal).await,
        };
        // While none is free nothing is read: the host's requests wait in the stream.
        let permit = self.server.0.permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        self.start(id, activity, work, permit);
    }

    /// Does the work in a task of its own, which nothing ends half-way.
    fn start(&self, id: u64, activity: String, work: Work, permit: OwnedSemaphorePermit) {
        let shared = self.server.0.clone();
        let answers = self.answers.clone();
        // Here and not in the task: tasks may start in another order.
        let mut turn = work.key().map(|key| shared.order.queue(key));
        tokio::spawn(async move {
            let done = tokio::spawn(async move {
                if let Some(turn) = &mut turn {
                    turn.come().await;
                }
                work.run(&shared.guest).await
            });
            let refusal = match done.await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.into()),
                Err(_) => {
                    let why = "the guest's backend panicked; nobody knows what it has done";
                    Some(Refusal::new(Hresult::FAIL, ErrorKind::Uncertain, why))
                }
            };
            let response = match refusal {
                None => ResponseBase {
                    activity_id: activity,
                    ..ResponseBase::default()
                },
                Some(refusal) => {
                    debug!(id, ?refusal, "a request of the host has failed");
                    refusal.into_response(activity)
                }
            };
            if let Some(bytes) = framed(MessageType::MODIFY_SETTINGS.response(), id, &response) {
                // Nobody waits for it if the connection has ended.
                let _ = answers.send(bytes).await;
            }
            drop(permit);
        });
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
            let _ = self.answers.send(bytes).await;
        }
    }
}

async fn send<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut outgoing: mpsc::Receiver<Vec<u8>>,
) -> Result<(), FrameError> {
    while let Some(bytes) = outgoing.recv().await {
        writer.write_all(&bytes).await?;
        writer.flush().await?;
    }
    Ok(())
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
    Refusal::new(Hresult::INVALID_JSON, ErrorKind::Invalid, why)
}

/// What this guest can do, which is disks and layers.
fn capabilities() -> Capabilities {
    Capabilities {
        supported_schema_versions: vec![SchemaVersion { major: 2, minor: 1 }],
        runtime_os_type: "Linux".to_owned(),
        guest_defined_capabilities: GuestCapabilities {
            blockmount_version: BLOCKMOUNT_VERSION,
            ..GuestCapabilities::default()
        },
        ..Capabilities::default()
    }
}
