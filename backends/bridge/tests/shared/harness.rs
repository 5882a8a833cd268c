//! Both ends over a fake VM with SCSI disks, and a peer that the test writes frame by frame. How a frame looks is in
//! `wire.rs` of each protocol.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blockmount::testing::{AttachIdentified as _, FakeVm};
use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, Disk, DiskId, LayerCombiner, MountOptions,
    Mounter, Overlay, Presence, Transport, Unplugger, Usage,
};
use blockmount_bridge::{Deadlines, Dialer, Request};
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc;

use crate::wire::{BridgeGuest, GuestConnection, GuestServer, Peer, RedialingChannel};

/// Longer than anything here may take.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A deadline that a test waits for.
pub(crate) const SHORT: Duration = Duration::from_millis(100);

/// The locator of a LUN of controller 0.
pub(crate) fn device(lun: u64) -> DeviceLocator {
    DeviceLocator::new("scsi", format!("0/{lun}")).unwrap()
}

pub(crate) fn unplug(lun: u64) -> Request {
    let locator = device(lun);
    Request::Unplug { locator }
}

/// A host, and an agent that is written by the test.
pub(crate) async fn host_and_peer(deadlines: Deadlines) -> (GuestConnection, Peer) {
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let (connection, ()) = tokio::join!(
        GuestConnection::connect_with(host_end, deadlines),
        peer.agree()
    );
    (connection.unwrap(), peer)
}

/// Another connection to a server.
pub(crate) fn dial(server: &GuestServer) -> Peer {
    let (host_end, guest_end) = duplex(1 << 10);
    let server = server.clone();
    tokio::spawn(async move { server.serve(guest_end).await });
    Peer::new(host_end)
}

/// Both ends of ours, over a fake VM.
pub(crate) async fn bridged(vm: &ScsiVm) -> (BridgeGuest, GuestServer) {
    let server = GuestServer::new(vm.clone());
    let stream = dial(&server).stream;
    let connection = GuestConnection::connect(stream).await.unwrap();
    (BridgeGuest::new(connection), server)
}

/// A way to a guest that the test cuts and mends.
#[derive(Clone)]
pub(crate) struct Way {
    /// What is at the other end of the next stream.
    ends: mpsc::UnboundedSender<DuplexStream>,
    dials: Arc<AtomicUsize>,
    pub(crate) works: Arc<AtomicBool>,
    pub(crate) alive: Arc<AtomicBool>,
}

impl Way {
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<DuplexStream>) {
        let (ends, streams) = mpsc::unbounded_channel();
        let way = Way {
            ends,
            dials: Arc::default(),
            works: Arc::new(AtomicBool::new(true)),
            alive: Arc::new(AtomicBool::new(true)),
        };
        (way, streams)
    }

    pub(crate) fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Dialer for Way {
    type Stream = DuplexStream;

    async fn dial(&self) -> Result<DuplexStream, BackendError> {
        self.dials.fetch_add(1, Ordering::SeqCst);
        if !self.works.load(Ordering::SeqCst) {
            return Err(BackendError::gone("no agent listens"));
        }
        let (ours, theirs) = duplex(1 << 10);
        let sent = self.ends.send(theirs);
        sent.map_err(|_| BackendError::other("no agent"))?;
        Ok(ours)
    }

    async fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }
}

/// A channel that redials.
pub(crate) async fn redialing(way: &Way) -> RedialingChannel<Way> {
    let stream = way.dial().await.unwrap();
    let connection = GuestConnection::connect(stream).await.unwrap();
    RedialingChannel::over(way.clone(), connection)
}

/// A fake VM with so many disks attached, on LUN 0 and up.
pub(crate) async fn vm_with_disks(count: usize) -> ScsiVm {
    let vm = ScsiVm::default();
    for number in 0..count {
        let disk = Disk::virtual_disk(format!("/disks/{number}"));
        vm.attach_identified(&disk).await.unwrap();
    }
    vm
}

/// A fake VM whose devices are on SCSI controllers with 64 LUNs each.
#[derive(Clone, Debug, Default)]
pub(crate) struct ScsiVm(FakeVm);

impl Deref for ScsiVm {
    type Target = FakeVm;

    fn deref(&self) -> &FakeVm {
        &self.0
    }
}

impl ScsiVm {
    /// The same VM, as a process finds it that knows nothing of an earlier one's calls.
    pub(crate) fn restarted(&self) -> Self {
        ScsiVm(self.0.restart())
    }

    /// `fake:67` is `scsi:1/3`.
    fn scsi(fake: &DeviceLocator) -> DeviceLocator {
        let slot: u32 = fake.address().parse().unwrap();
        DeviceLocator::new("scsi", format!("{}/{}", slot / 64, slot % 64)).unwrap()
    }

    fn fake(scsi: &DeviceLocator) -> Result<DeviceLocator, BackendError> {
        let address = blockmount_scsi::ScsiAddress::try_from(scsi)?;
        let slot = u32::from(address.controller.get()) * 64 + u32::from(address.lun.get());
        Ok(DeviceLocator::new("fake", slot).unwrap())
    }

    /// The same options, with the further devices as the fake VM knows them.
    fn fake_options(options: &MountOptions) -> Result<MountOptions, BackendError> {
        let mut fields = serde_json::to_value(options).unwrap();
        for (index, further) in options.devices().iter().enumerate() {
            let fake = Self::fake(&further.locator)?;
            fields["devices"][index]["locator"] = serde_json::to_value(fake).unwrap();
        }
        Ok(serde_json::from_value(fields).unwrap())
    }
}

#[async_trait]
impl Transport for ScsiVm {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        self.0.identify(disk).await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.0.attach(disk, id).await.map(|fake| Self::scsi(&fake))
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        self.0.detach(disk).await
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        self.0.resize(disk, bytes).await
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let fake = locator.map(Self::fake).transpose()?;
        Ok(
            match Transport::adopt(&self.0, disk, id, fake.as_ref()).await? {
                Presence::Present(fake) => Presence::Present(Self::scsi(&fake)),
                other => other,
            },
        )
    }
}

#[async_trait]
impl Unplugger for ScsiVm {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.0.unplug(&Self::fake(device)?).await
    }
}

#[async_trait]
impl Mounter for ScsiVm {
    async fn mount(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<(), BackendError> {
        let options = Self::fake_options(options)?;
        self.0.mount(&Self::fake(device)?, target, &options).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.0.unmount(target).await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, BackendError> {
        self.0.usage(target).await
    }

    async fn trim(&self, target: &Path) -> Result<u64, BackendError> {
        self.0.trim(target).await
    }

    async fn grow(&self, target: &Path, bytes: u64) -> Result<(), BackendError> {
        self.0.grow(target, bytes).await
    }

    async fn adopt(
        &self,
        device: &DeviceLocator,
        target: &Path,
        options: &MountOptions,
    ) -> Result<Presence, BackendError> {
        let options = Self::fake_options(options)?;
        Mounter::adopt(&self.0, &Self::fake(device)?, target, &options).await
    }
}

#[async_trait]
impl LayerCombiner for ScsiVm {
    async fn combine(&self, overlay: &Overlay) -> Result<(), BackendError> {
        self.0.combine(overlay).await
    }

    async fn separate(&self, target: &Path) -> Result<(), BackendError> {
        self.0.separate(target).await
    }

    async fn adopt(&self, overlay: &Overlay) -> Result<Presence, BackendError> {
        LayerCombiner::adopt(&self.0, overlay).await
    }
}

#[async_trait]
impl Binder for ScsiVm {
    async fn bind(&self, bind: &BindMount) -> Result<(), BackendError> {
        self.0.bind(bind).await
    }

    async fn unbind(&self, target: &Path) -> Result<(), BackendError> {
        self.0.unbind(target).await
    }

    async fn adopt(&self, bind: &BindMount) -> Result<Presence, BackendError> {
        Binder::adopt(&self.0, bind).await
    }
}
