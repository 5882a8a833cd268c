//! The host's end of GCS.

use std::sync::Arc;

use blockmount::{BackendError, ErrorKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tracing::debug;

use crate::codec::{Ask, HostCodec};
use crate::connection::Connection;
use crate::gcs::hresult::Hresult;
use crate::gcs::messages::{
    Capabilities, CreateRequest, ModificationRequest, ModifySettings, NULL_ID, NegotiateRequest,
    NegotiateResponse, Notification, PROTOCOL_VERSION, RequestBase, RequestType, ResponseBase,
    Writer, decode, encode,
};
use crate::gcs::translator::{Translated, Translator};
use crate::gcs::wire::{Frame, GcsHeader, MessageType, Role};
use crate::link::{Failure, Link};
use crate::{Reply, Request};

/// How many notifications are kept for a listener that does not take them; then the oldest go.
const NOTIFICATIONS: usize = 256;

/// What every guest answers to a request for a change when no version was agreed on with it. It
/// has done nothing then: it is another process than the one that was connected to, on the same stream.
const UNKNOWN_PEER: &str = "bridge: function not supported";

/// How the agent of a Linux guest says EBUSY, for which it has no number.
const EBUSY: &str = "device or resource busy";

/// A host's connection to an agent that speaks GCS.
pub type GuestConnection = Connection<GcsHost>;

/// The host's end of GCS.
#[derive(Debug)]
pub struct GcsHost {
    translator: Translator,
    notifications: broadcast::Sender<Notification>,
}

impl Default for GcsHost {
    fn default() -> Self {
        GcsHost {
            translator: Translator::default(),
            notifications: broadcast::Sender::new(NOTIFICATIONS),
        }
    }
}

impl GuestConnection {
    /// What the guest has said it can do.
    pub fn capabilities(&self) -> Arc<Capabilities> {
        self.agreed()
    }

    /// What the guest says unasked, from now on and over reconnections. A listener that takes none for long
    /// misses the oldest.
    pub fn notifications(&self) -> broadcast::Receiver<Notification> {
        self.codec().notifications.subscribe()
    }

    /// Sends a request as it is, for the service that has the connection of a guest to itself.
    ///
    /// # Errors
    ///
    /// As for [`call`](Self::call).
    pub async fn modify(&self, request: ModificationRequest) -> Result<(), BackendError> {
        let (change, resource) = (request.request_type.name(), request.resource.name());
        let what = format!("{change} of {resource}");
        let deadline = self.deadlines().call;
        self.attempt(&what, request.into(), deadline).await?;
        Ok(())
    }
}

impl HostCodec for GcsHost {
    type Header = GcsHeader;
    type Message = Translated;
    type Agreed = Capabilities;

    async fn negotiate(&self, link: Link<'_, GcsHeader>) -> Result<Capabilities, BackendError> {
        let what = "negotiation";
        let request = NegotiateRequest::default();
        let answer: NegotiateResponse =
            exchange(link, what, MessageType::NEGOTIATE, &request).await?;
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
            start_up(link, "create", MessageType::CREATE, &request).await?;
            if capabilities.send_host_start_message {
                let request = RequestBase {
                    container_id: NULL_ID.into(),
                    activity_id: NULL_ID.into(),
                };
                start_up(link, "start", MessageType::START, &request).await?;
            }
        }
        Ok(capabilities)
    }

    fn translate(
        &self,
        request: Request,
        guest: &Capabilities,
    ) -> Result<Ask<Translated>, BackendError> {
        let translated = self.translator.translate(&request, guest)?;
        Ok(translated.map_or_else(Ask::Answer, Ask::Send))
    }

    async fn exchange(
        &self,
        link: Link<'_, GcsHeader>,
        what: &str,
        translated: Translated,
    ) -> Result<Reply, Failure> {
        let end = Instant::now() + link.deadline;
        let mut lost_writes = None;
        for request in translated.requests() {
            // All of them have one deadline.
            let deadline = end.saturating_duration_since(Instant::now());
            let adds = request.request_type == RequestType::Add;
            let body = ModifySettings::from(request.clone());
            let message = MessageType::MODIFY_SETTINGS;
            let link = Link { deadline, ..link };
            self.translator.begin(&translated);
            let answer = exchange(link, what, message, &body).await;
            if !matches!(
                answer,
                Err(Failure::Lost { sent: true, .. } | Failure::TimedOut(_))
            ) {
                self.translator.answered(&translated);
            }
            let answer: ResponseBase = answer?;
            if answer.result == Hresult::NOT_IMPLEMENTED
                && answer.error_message.starts_with(UNKNOWN_PEER)
            {
                return Err(link.restarted(what));
            }
            if answer.result.is_ok() {
                continue;
            }
            let error = failure(what, answer, adds);
            if !adds && error.kind() == ErrorKind::LostWrites {
                // It is torn down all the same, and so is the rest.
                lost_writes.get_or_insert(error);
            } else if !translated.is_done_anyway(request, &error) {
                return Err(error.into());
            }
        }
        lost_writes.map_or(Ok(Reply::Done), |lost| Err(lost.into()))
    }

    fn settle(&self, translated: &Translated, outcome: &Result<Reply, BackendError>) {
        self.translator.settle(translated, outcome);
    }

    fn take_unasked(&self, header: &GcsHeader, body: &Result<Vec<u8>, String>) -> bool {
        let GcsHeader { message, id } = header;
        match (message.role(), body) {
            (Role::Response, _) => return false,
            (Role::Notification, Ok(body)) => match decode::<Notification>(body) {
                // There may be no listener.
                Ok(notification) => drop(self.notifications.send(notification)),
                Err(error) => debug!(%error, "ignored a notification that cannot be read"),
            },
            (role, _) => debug!(%message, id, ?role, "ignored a message of the guest"),
        }
        true
    }
}

/// Sends one of the messages that a Windows guest waits for before all others.
async fn start_up<B: Serialize + Sync>(
    link: Link<'_, GcsHeader>,
    what: &str,
    message: MessageType,
    body: &B,
) -> Result<(), BackendError> {
    let answer: ResponseBase = exchange(link, what, message, body).await?;
    match answer.result {
        // Done on an earlier connection.
        Hresult::OK | Hresult::SYSTEM_ALREADY_EXISTS => Ok(()),
        _ => Err(failure(what, answer, false)),
    }
}

async fn exchange<B: Serialize + Sync, A: DeserializeOwned>(
    link: Link<'_, GcsHeader>,
    what: &str,
    message: MessageType,
    body: &B,
) -> Result<A, Failure> {
    let write = |id| {
        let payload = encode(body, Writer::Host);
        let frame = Frame {
            message,
            id,
            payload,
        };
        let too_long = |error| BackendError::invalid("it is too long").with_source(error);
        frame.encode().map_err(too_long)
    };
    let (GcsHeader { message: found, .. }, answer) = link.exchange(what, write).await?;
    let expected = message.response();
    if found != expected {
        let how = format!("is of type {found} in place of {expected}");
        return Err(Failure::garbled(what, &how));
    }
    decode(&answer).map_err(|error| Failure::garbled(what, &format!("cannot be read: {error}")))
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
    let kind = numbers.find_map(Hresult::kind);
    let messages = error_records.into_iter().map(|record| record.message);
    let mut said = std::iter::once(error_message).chain(messages);
    let said = said.find(|said| !said.is_empty());
    let said = said.unwrap_or_else(|| "it does not say why".to_owned());
    let kind = kind.unwrap_or(match adds {
        // A guest that only has a text for us may have left half of it behind.
        true => ErrorKind::Uncertain,
        false if said.contains(EBUSY) => ErrorKind::Busy,
        false => ErrorKind::Other,
    });
    BackendError::new(
        kind,
        format!("the guest refuses the {what}: {said} ({result})"),
    )
}
