//! The guest's contracts, kept by asking over the bridge.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blockmount::{
    BackendError, DeviceLocator, ErrorKind, LayerCombiner, MountOptions, Mounter, Overlay,
    Presence, Unplugger,
};

use crate::gcs::connection::GuestConnection;
use crate::gcs::device::Device;
use crate::gcs::host_requests::{self, guest_path};
use crate::gcs::messages::{Capabilities, ModificationRequest, Resource};
use crate::{Dialer, RedialingChannel};

/// What carries requests to the agent of a guest: a [`GuestConnection`] of our own, one that reconnects, or a hypervisor
/// that has the connection to itself.
///
/// The implementor must bound its waits and never panic. It must answer `Uncertain` whenever the guest
/// may have done it, because after any other error of an [`Add`](crate::gcs::messages::RequestType::Add) the target is used
/// again at once. `Gone` means that the VM has ended; a line that is lost is `Uncertain`.
#[async_trait]
pub trait GuestChannel: Send + Sync + 'static {
    /// What the guest has said it can do. Asked before each request, so it must be at hand.
    fn capabilities(&self) -> Arc<Capabilities>;

    /// Changes a setting of the VM, and returns when the guest has done it.
    ///
    /// # Errors
    ///
    /// What the guest says, by kind, or why it is not known what it has done.
    async fn modify(&self, request: ModificationRequest) -> Result<(), BackendError>;
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<D: Dialer> GuestChannel for RedialingChannel<D, GuestConnection> {
    fn capabilities(&self) -> Arc<Capabilities> {
        self.connection().capabilities()
    }

    async fn modify(&self, request: ModificationRequest) -> Result<(), BackendError> {
        self.request(request).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl GuestChannel for GuestConnection {
    fn capabilities(&self) -> Arc<Capabilities> {
        GuestConnection::capabilities(self)
    }

    async fn modify(&self, request: ModificationRequest) -> Result<(), BackendError> {
        GuestConnection::modify(self, request).await
    }
}

/// A guest at the other end of a [`GuestChannel`], as [`Mounter`], [`Unplugger`] and
/// [`LayerCombiner`]. The channel is a [`GuestConnection`] unless said otherwise.
///
/// | | Linux guest | Windows guest |
/// |---|---|---|
/// | SCSI disks | controllers 0 to 3, LUNs 0 to 255 | controller 0 |
/// | VPMEM devices | read-only, ext4, no options | no |
/// | access, filesystem, partition, encryption, block device | yes | access only, and that is the disk's |
/// | propagation | yes | no |
/// | mount flags, options of the filesystem, verity | no | no |
/// | format | over everything, or encrypted | ReFS over everything |
/// | overlays | yes | no |
///
/// What a guest cannot do, or would silently not do, is `Unsuitable` before anything is sent.
///
/// The protocol wants a mount described again to undo it, so a ledger keeps what was sent until it is
/// undone, or the VM has ended. Clones share the ledger and the channel.
#[derive(Debug)]
pub struct BridgeGuest<C = GuestConnection> {
    channel: Arc<C>,
    ledger: Arc<Ledger>,
}

/// Whatever the channel is, a clone shares it.
impl<C> Clone for BridgeGuest<C> {
    fn clone(&self) -> Self {
        BridgeGuest {
            channel: self.channel.clone(),
            ledger: self.ledger.clone(),
        }
    }
}

/// What undoes the mount or overlay at a target. Never locked across an await.
#[derive(Debug, Default)]
struct Ledger(Mutex<HashMap<PathBuf, Resource>>);

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, HashMap<PathBuf, Resource>> {
        // Nothing under the lock panics half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Books a target before the guest is asked: whatever happens then can be undone. Fails where
    /// something is set up already.
    fn book(&self, target: &Path, undo: Resource) -> Result<(), BackendError> {
        let mut entries = self.entries();
        if entries.contains_key(target) {
            let message = format!(
                "something is mounted at {} in the guest already",
                target.display()
            );
            return Err(BackendError::conflict(message));
        }
        entries.insert(target.to_owned(), undo);
        Ok(())
    }

    fn get(&self, target: &Path) -> Option<Resource> {
        self.entries().get(target).cloned()
    }

    fn strike(&self, target: &Path) {
        self.entries().remove(target);
    }
}

fn is_overlay(resource: &Resource) -> bool {
    matches!(resource, Resource::CombinedLayers(_))
}

impl<C: GuestChannel> BridgeGuest<C> {
    /// The guest at the other end of a channel.
    pub fn new(channel: C) -> Self {
        BridgeGuest {
            channel: Arc::new(channel),
            ledger: Arc::default(),
        }
    }

    /// The channel.
    pub fn channel(&self) -> &C {
        &self.channel
    }

    async fn set_up(
        &self,
        target: &Path,
        add: Resource,
        undo: Resource,
    ) -> Result<(), BackendError> {
        self.ledger.book(target, undo)?;
        let outcome = self.channel.modify(ModificationRequest::add(add)).await;
        if let Err(error) = &outcome
            && error.kind() != ErrorKind::Uncertain
        {
            self.ledger.strike(target);
        }
        outcome
    }

    async fn tear_down(&self, target: &Path, undo: Resource) -> Result<(), BackendError> {
        let outcome = self.channel.modify(ModificationRequest::remove(undo)).await;
        let ended = |error: &BackendError| error.kind() == ErrorKind::Gone;
        if outcome.as_ref().err().is_none_or(ended) {
            self.ledger.strike(target);
        }
        outcome
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<C: GuestChannel> Mounter for BridgeGuest<C> {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let guest = self.channel.capabilities();
        let path = guest_path(target, &guest)?;
        let (add, undo) = host_requests::mount(Device::try_from(device)?, path, options, &guest)?;
        self.set_up(target, add, undo).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        let undo = match self.ledger.get(target) {
            Some(undo) if is_overlay(&undo) => {
                let message = format!(
                    "{} is an overlay, not the mount of a device",
                    target.display()
                );
                return Err(BackendError::conflict(message));
            }
            Some(undo) => undo,
            None => return Ok(()),
        };
        self.tear_down(target, undo).await
    }

    async fn adopt(
        &self,
        _: &DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<C: GuestChannel> Unplugger for BridgeGuest<C> {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let guest = self.channel.capabilities();
        match host_requests::unplug(Device::try_from(device)?, &guest)? {
            Some(device) => {
                self.channel
                    .modify(ModificationRequest::remove(device))
                    .await
            }
            None => Ok(()),
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<C: GuestChannel> LayerCombiner for BridgeGuest<C> {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        let (add, undo) = host_requests::combine(overlay, &self.channel.capabilities())?;
        self.set_up(&overlay.target, add, undo).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        let undo = match self.ledger.get(target) {
            Some(undo) if !is_overlay(&undo) => {
                let message = format!("{} is the mount of a device, no overlay", target.display());
                return Err(BackendError::conflict(message));
            }
            Some(undo) => undo,
            None => return Ok(()),
        };
        self.tear_down(target, undo).await
    }

    async fn adopt(&self, _: &Overlay) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}
