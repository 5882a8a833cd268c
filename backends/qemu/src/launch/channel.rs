//! The way to the agent in the guest, as long as the VM lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blockmount::{BackendError, ErrorKind};
use blockmount_bridge::gcs::messages::{Capabilities, ModificationRequest};
use blockmount_bridge::gcs::{BridgeGuest, GuestChannel, GuestConnection};
use tokio::sync::Mutex;

use super::error::VmError;
use super::vm::Vm;
use crate::qmp::NONE;

/// How long an agent may take to open a port: one that was killed has to be started again first.
const OPENING: Duration = Duration::from_secs(10);

/// How long QEMU is given to show that it lives, after the connection to the agent was lost.
const DYING: Duration = Duration::from_millis(500);

/// The agent in the guest of a [`Vm`], over the bridge protocol.
///
/// When the agent dies and comes back, the next request is sent over a new connection. Only when the VM is gone
/// is the answer `Gone`, also to requests under way: an agent that has ended leaves its mounts in place, so
/// that nothing of them counts as undone.
#[derive(Debug)]
pub struct AgentChannel {
    vm: Vm,
    port: String,
    connection: GuestConnection,
    /// Locked while a connection is made; requests over one do not wait for it.
    connecting: Mutex<()>,
    /// Counts the connections.
    generation: AtomicU64,
}

impl AgentChannel {
    /// Connects to the agent that opens virtio-serial ports of this name.
    ///
    /// # Errors
    ///
    /// If no agent opens the port within ten seconds, or it does not speak the protocol.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left when the future is dropped.
    pub async fn connect(vm: &Vm, port: &str) -> Result<Self, VmError> {
        let stream = vm.connect(port, OPENING).await?;
        let connected = GuestConnection::connect(stream).await;
        let connection = connected.map_err(|error| {
            vm.with_last_words(
                VmError::new("the agent in the guest does not answer").because(error),
            )
        })?;
        Ok(AgentChannel {
            vm: vm.clone(),
            port: port.to_owned(),
            connection,
            connecting: Mutex::new(()),
            generation: AtomicU64::new(0),
        })
    }

    /// Makes a new connection in place of the one of a generation, unless somebody else has.
    async fn reconnect(&self, lost: u64) -> Result<(), BackendError> {
        let _one_at_a_time = self.connecting.lock().await;
        if self.generation.load(Ordering::Acquire) != lost {
            return Ok(());
        }
        let unreachable = |error: Box<dyn std::error::Error + Send + Sync>| {
            // Not `Gone`: the guest lives, and has its mounts.
            BackendError::other("the agent in the guest cannot be reached").with_source(error)
        };
        // Its port has to go before there can be another one of that name.
        self.connection.close();
        let stream = self.vm.connect(&self.port, OPENING).await;
        let stream = stream.map_err(|error| unreachable(error.into()))?;
        let connected = self.connection.reconnect(stream).await;
        connected.map_err(|error| unreachable(error.into()))?;
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// What an error means, now that the VM may be gone.
    async fn judge(&self, error: BackendError) -> BackendError {
        let kinds = [ErrorKind::Uncertain, ErrorKind::Gone, ErrorKind::Other];
        if !kinds.contains(&error.kind()) || self.is_alive().await {
            return error;
        }
        BackendError::gone("the VM is gone").with_source(error)
    }

    /// Whether QEMU answers. Of a dying one, the stream to the agent may end before anything else does.
    async fn is_alive(&self) -> bool {
        let asked = self
            .vm
            .qmp()
            .execute_within("query-status", NONE, DYING)
            .await;
        match asked {
            // A slow one lives.
            Err(error) if error.kind() == ErrorKind::Gone => false,
            _ => self.vm.is_running(),
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl GuestChannel for AgentChannel {
    fn capabilities(&self) -> Arc<Capabilities> {
        self.connection.capabilities()
    }

    async fn modify(&self, request: ModificationRequest) -> Result<(), BackendError> {
        let generation = self.generation.load(Ordering::Acquire);
        let mut outcome = self.connection.modify(request.clone()).await;
        let is_gone = |error: &BackendError| error.kind() == ErrorKind::Gone;
        // There was no connection, so it was not sent.
        if outcome.as_ref().is_err_and(is_gone) && self.vm.is_running() {
            outcome = match self.reconnect(generation).await {
                Ok(()) => self.connection.modify(request).await,
                Err(error) => Err(error),
            };
        }
        match outcome {
            Ok(()) => Ok(()),
            Err(error) => Err(self.judge(error).await),
        }
    }
}

impl Vm {
    /// The guest of this VM: its mounter, unplugger and combiner, over the agent that opens virtio-serial ports of
    /// this name.
    ///
    /// # Errors
    ///
    /// As for [`AgentChannel::connect`].
    pub async fn guest(&self, port: &str) -> Result<BridgeGuest<AgentChannel>, VmError> {
        Ok(BridgeGuest::new(AgentChannel::connect(self, port).await?))
    }
}
