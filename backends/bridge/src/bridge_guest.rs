//! The guest's contracts, kept by asking over a bridge.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, LayerCombiner, MountOptions, Mounter, Overlay,
    Presence, Unplugger, Usage,
};

use crate::codec::HostCodec;
use crate::connection::Connection;
use crate::native::GuestConnection;
use crate::protocol::{Reply, Request};

/// What carries requests to the agent of a guest: a [`GuestConnection`], one that reconnects, or a hypervisor that has
/// the connection to itself.
///
/// The implementor must bound its waits and never panic. It must answer `Uncertain` whenever the guest may have done
/// it, also when the connection is lost. Only the owner of the VM may answer `Gone`, when the VM has ended.
#[async_trait]
pub trait GuestChannel: Send + Sync + 'static {
    /// Has the guest do something, and returns when it has. To a question of what is there it answers
    /// [`Reply::Presence`], to those about sizes [`Reply::Usage`] and [`Reply::Trimmed`], to everything else [`Reply::Done`].
    ///
    /// # Errors
    ///
    /// What the guest answers, or why it is not known what the guest has done.
    async fn call(&self, request: Request) -> Result<Reply, BackendError>;
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<C: HostCodec> GuestChannel for Connection<C> {
    async fn call(&self, request: Request) -> Result<Reply, BackendError> {
        Connection::call(self, request).await
    }
}

/// A guest at the other end of a [`GuestChannel`], as [`Mounter`], [`Unplugger`], [`LayerCombiner`] and [`Binder`].
///
/// Over our own protocol locators, options and overlays are sent as they are, and the guest decides; for others see
/// [`gcs`](crate::gcs). Clones share the channel.
#[derive(Debug)]
pub struct BridgeGuest<C = GuestConnection>(Arc<C>);

impl<C> Clone for BridgeGuest<C> {
    fn clone(&self) -> Self {
        BridgeGuest(self.0.clone())
    }
}

impl<C: GuestChannel> BridgeGuest<C> {
    /// The guest at the other end of a channel.
    pub fn new(channel: C) -> Self {
        BridgeGuest(Arc::new(channel))
    }

    /// The channel.
    pub fn channel(&self) -> &C {
        &self.0
    }

    async fn done(&self, request: Request) -> Result<(), BackendError> {
        self.0.call(request).await.map(drop)
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
        let request = Request::Mount {
            locator: device.clone(),
            target: target.to_owned(),
            options: options.clone(),
        };
        self.done(request).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        let target = target.to_owned();
        self.done(Request::Unmount { target }).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        let target = target.to_owned();
        self.0.call(Request::Usage { target }).await?.usage()
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        let target = target.to_owned();
        self.0.call(Request::Trim { target }).await?.trimmed()
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        let target = target.to_owned();
        self.done(Request::Grow { target, bytes }).await
    }

    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        let request = Request::AdoptMount {
            locator: device.clone(),
            target: target.to_owned(),
            options: options.clone(),
        };
        Ok(self.0.call(request).await?.presence())
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<C: GuestChannel> Unplugger for BridgeGuest<C> {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        let locator = device.clone();
        self.done(Request::Unplug { locator }).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<C: GuestChannel> LayerCombiner for BridgeGuest<C> {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.done(Request::Combine(overlay.clone())).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        let target = target.to_owned();
        self.done(Request::Separate { target }).await
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        let request = Request::AdoptOverlay(overlay.clone());
        Ok(self.0.call(request).await?.presence())
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<C: GuestChannel> Binder for BridgeGuest<C> {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        self.done(Request::Bind(Box::new(bind.clone()))).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        let target = target.to_owned();
        self.done(Request::Unbind { target }).await
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        let request = Request::AdoptView(Box::new(bind.clone()));
        Ok(self.0.call(request).await?.presence())
    }
}
