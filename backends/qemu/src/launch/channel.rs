//! The agent in the guest of a VM, reached again when the line to it is lost.

use std::time::Duration;

use async_trait::async_trait;
use blockmount::{BackendError, ErrorKind};
use blockmount_bridge::{
    BridgeGuest, Deadlines, Dialer, GuestChannel, GuestConnection, RedialingChannel, Reply, Request,
};

use super::error::VmError;
use super::port::GuestStream;
use super::vm::Vm;
use crate::qmp::{NONE, Qmp};

/// How long QEMU is given to show that it lives, after the connection to the agent was lost.
const DYING: Duration = Duration::from_millis(500);

/// The agent in the guest of a VM, over the bridge: by default that of a [`Vm`], which is reached by a port.
///
/// When the agent dies and comes back, the next request is sent over a new connection. Only when the VM has ended
/// is the answer `Gone`, also to requests under way: an agent that has ended leaves its mounts in place, so
/// that nothing of them counts as undone. A VM that stands still for two seconds ends a request as `Uncertain`. Errors say
/// what is wrong with the VM, if anything is.
#[derive(Debug)]
pub struct AgentChannel<D: Dialer = AgentPort> {
    channel: RedialingChannel<D>,
    qmp: Qmp,
}

impl<D: Dialer> AgentChannel<D> {
    /// The agent behind a channel, in the guest of the VM with this monitor.
    pub fn new(channel: RedialingChannel<D>, qmp: Qmp) -> Self {
        AgentChannel { channel, qmp }
    }

    /// Waits until the agent has closed its port and does not open it again within ten seconds, and says why; `Gone` if
    /// the VM has ended. For a program that holds what is in the guest and has nothing to ask it for. An agent that
    /// comes back is connected to at once.
    ///
    /// # Cancel safety
    ///
    /// The next request, or the next call of this, dials in its place.
    pub async fn lost(&self) -> BackendError {
        self.channel.lost().await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<D: Dialer> GuestChannel for AgentChannel<D> {
    async fn call(&self, request: Request) -> Result<Reply, BackendError> {
        let failed = tokio::select! {
            called = self.channel.call(request) => match called {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            },
            _ = self.qmp.stands_still(STANDING) => {
                BackendError::uncertain("the guest cannot answer")
            }
        };
        let health = self.qmp.health().borrow().clone();
        match health.is_good() {
            true => Err(failed),
            false => Err(BackendError::new(failed.kind(), health.to_string()).with_source(failed)),
        }
    }
}

/// How long a VM stands still before nobody waits for its guest any more; snapshots and migrations are shorter.
const STANDING: Duration = Duration::from_secs(2);
/// How long an agent may take to open its first port: it may be starting still, in a guest that a busy machine emulates.
const FIRST_OPENING: Duration = Duration::from_secs(60);

/// The virtio-serial ports of this name, which the agent opens.
#[derive(Debug)]
pub struct AgentPort {
    vm: Vm,
    name: String,
    /// How long an agent may take to open a port: one that was killed has to be started again first.
    opening: Duration,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Dialer for AgentPort {
    type Stream = GuestStream;

    async fn dial(&self) -> Result<GuestStream, BackendError> {
        let stream = self.vm.connect(&self.name, self.opening).await;
        stream.map_err(|error| {
            BackendError::other("the agent in the guest cannot be reached").with_source(error)
        })
    }

    /// Whether QEMU answers. Of a dying one, the stream to the agent may end before anything else does.
    async fn is_alive(&self) -> bool {
        let qmp = self.vm.qmp();
        match qmp.execute_within("query-status", NONE, DYING).await {
            // A slow one lives.
            Err(error) if error.kind() == ErrorKind::Gone => false,
            _ => self.vm.is_running(),
        }
    }
}

impl Vm {
    /// The guest of this VM: its mounter, unplugger and combiner, over the agent that opens virtio-serial ports of
    /// this name.
    ///
    /// # Errors
    ///
    /// If no agent opens the port within a minute, or it does not speak the protocol. One that is lost later has ten
    /// seconds to open the next.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped.
    pub async fn guest(&self, port: &str) -> Result<BridgeGuest<AgentChannel>, VmError> {
        self.guest_after(FIRST_OPENING, port, Deadlines::default())
            .await
    }

    /// The same with other deadlines; the one of the negotiation is also that of opening the port.
    ///
    /// # Errors
    ///
    /// As for [`guest`](Self::guest).
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped.
    pub async fn guest_within(
        &self,
        port: &str,
        deadlines: Deadlines,
    ) -> Result<BridgeGuest<AgentChannel>, VmError> {
        self.guest_after(deadlines.negotiation, port, deadlines)
            .await
    }

    async fn guest_after(
        &self,
        first_opening: Duration,
        port: &str,
        deadlines: Deadlines,
    ) -> Result<BridgeGuest<AgentChannel>, VmError> {
        let stream = self.connect(port, first_opening).await?;
        let connected = GuestConnection::connect_with(stream, deadlines).await;
        let connection = connected.map_err(|error| {
            let error = VmError::new("the agent in the guest does not answer").because(error);
            self.with_last_words(error)
        })?;
        let port = AgentPort {
            vm: self.clone(),
            name: port.to_owned(),
            opening: deadlines.negotiation,
        };
        let channel = RedialingChannel::over(port, connection);
        Ok(BridgeGuest::new(AgentChannel::new(
            channel,
            self.qmp().clone(),
        )))
    }
}
