//! What a protocol has to say for itself. Connections, reconnections, deadlines, limits and order are the same for all.

use std::fmt::Debug;
use std::future::Future;

use blockmount::BackendError;
use tokio::sync::mpsc;

use crate::frames::Header;
use crate::link::{Failure, Link};
use crate::protocol::{Reply, Request};

/// A host's end of a protocol: how a call of the guest's contracts is asked for, and what an answer means.
///
/// One value for each connection, which it outlives: it is the same after a reconnection.
pub trait HostCodec: Debug + Default + Send + Sync + 'static {
    /// The header of a frame.
    type Header: Header;
    /// A request as the protocol has it.
    type Message: Clone + Send + Sync;
    /// What is agreed on when a connection is made.
    type Agreed: Debug + Default + Send + Sync + 'static;

    /// Agrees on a version over a new stream.
    fn negotiate(
        &self,
        link: Link<'_, Self::Header>,
    ) -> impl Future<Output = Result<Self::Agreed, BackendError>> + Send;

    /// Translates a request, once for each call. Each message is [settled](Self::settle), unless its caller gives up.
    fn translate(
        &self,
        request: Request,
        agreed: &Self::Agreed,
    ) -> Result<Ask<Self::Message>, BackendError>;

    /// Sends a message, and says what the answer means.
    fn exchange(
        &self,
        link: Link<'_, Self::Header>,
        what: &str,
        message: Self::Message,
    ) -> impl Future<Output = Result<Reply, Failure>> + Send;

    /// Learns how a call has ended.
    fn settle(&self, message: &Self::Message, outcome: &Result<Reply, BackendError>);

    /// Takes a frame that is no answer. `false` if it is one.
    fn take_unasked(&self, header: &Self::Header, body: &Result<Vec<u8>, String>) -> bool;
}

/// What a request comes to.
#[derive(Debug)]
pub enum Ask<M> {
    /// The guest is sent this.
    Send(M),
    /// The guest need not be asked, or cannot.
    Answer(Reply),
}

/// What an agent does about a frame of its host.
#[expect(missing_debug_implementations, reason = "a closure has none")]
pub enum Step {
    /// Nothing.
    Ignore,
    /// It sends these bytes.
    Reply(Vec<u8>),
    /// It sends these bytes, and from now on host and agent have agreed on a version.
    Agree(Vec<u8>),
    /// It sends these bytes, because there is no common version; why is said if the host does not try again.
    Disagree(Vec<u8>, String),
    /// It does something, and then sends the bytes that are made of the outcome.
    Run {
        /// What it does.
        request: Request,
        /// What it does if that is a conflict.
        otherwise: Option<Request>,
        /// Makes the answer.
        write: WriteAnswer,
    },
}

/// Makes the bytes of an answer; none are sent where it makes none.
pub(crate) type WriteAnswer =
    Box<dyn FnOnce(Result<Reply, BackendError>) -> Option<Vec<u8>> + Send>;

/// An agent's end of a protocol.
///
/// One value for all connections of an agent.
pub trait AgentCodec: Debug + Default + Send + Sync + 'static {
    /// The header of a frame.
    type Header: Header;

    /// Reads a frame. `agreed` if a version was agreed on over this connection.
    fn read(&self, header: Self::Header, body: &[u8], agreed: bool) -> Step;

    /// Refuses a frame as invalid.
    fn refuse(&self, header: Self::Header, why: String) -> Step;

    /// Sends what no host has asked for, from the agreement on a version to the end of the connection.
    fn send_unasked(&self, answers: mpsc::Sender<Vec<u8>>) -> impl Future<Output = ()> + Send;
}
