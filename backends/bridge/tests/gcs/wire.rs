//! A peer that is written frame by frame, and a guest with SCSI disks in memory.
#![allow(clippy::unwrap_used)] // a panic is a failure message

pub(crate) mod recorder;

use blockmount::testing::AttachIdentified as _;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use blockmount::testing::FakeVm;
use blockmount::{
    BackendError, DeviceLocator, Disk, DiskId, LayerCombiner, MountOptions, Mounter, Overlay,
    Presence, Transport, Unplugger,
};
use blockmount_bridge::gcs::messages::{
    Capabilities, GuestCapabilities, NegotiateResponse, Writer, encode,
};
use blockmount_bridge::gcs::wire::{Decoded, Decoder, Frame, MessageType};
use blockmount_bridge::gcs::{BridgeGuest, Deadlines, GuestConnection, GuestServer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

/// Longer than anything here may take.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A deadline that a test waits for.
pub(crate) const SHORT: Duration = Duration::from_millis(100);

pub(crate) const NULL: &str = "00000000-0000-0000-0000-000000000000";

/// One end of a stream, in the hands of the test.
pub(crate) struct Peer {
    pub(crate) stream: DuplexStream,
    decoder: Decoder,
}

impl Peer {
    pub(crate) fn new(stream: DuplexStream) -> Self {
        Peer {
            stream,
            decoder: Decoder::default(),
        }
    }

    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn send(&mut self, message: MessageType, id: u64, body: &str) {
        let payload = body.as_bytes().to_vec();
        let frame = Frame {
            message,
            id,
            payload,
        };
        self.send_raw(&frame.encode().unwrap()).await;
    }

    /// The next frame; none at the end of the stream.
    pub(crate) async fn try_receive(&mut self) -> Option<Frame> {
        loop {
            match self.decoder.next().unwrap() {
                Some(Decoded::Frame(frame)) => return Some(frame),
                Some(other) => panic!("{other:?}"),
                None => {}
            }
            let mut bytes = [0; 4096];
            let read = tokio::time::timeout(LONG, self.stream.read(&mut bytes));
            match read.await.expect("the peer says something") {
                Ok(0) | Err(_) => return None,
                Ok(length) => self.decoder.push(&bytes[..length]),
            }
        }
    }

    pub(crate) async fn receive(&mut self) -> Frame {
        self.try_receive().await.expect("the connection lives")
    }

    /// As a guest: answers with success.
    pub(crate) async fn succeed(&mut self, request: &Frame) {
        let body = format!(r#"{{"Result":0,"ActivityId":"{NULL}"}}"#);
        self.send(request.message.response(), request.id, &body)
            .await;
    }

    /// As a guest: answers the negotiation.
    pub(crate) async fn negotiated(&mut self, capabilities: Capabilities) {
        let request = self.receive().await;
        assert_eq!(request.message, MessageType::NEGOTIATE);
        let response = NegotiateResponse {
            version: 4,
            capabilities,
            ..NegotiateResponse::default()
        };
        let payload = encode(&response, Writer::Guest);
        let frame = Frame {
            message: request.message.response(),
            id: request.id,
            payload,
        };
        self.send_raw(&frame.encode().unwrap()).await;
    }

    /// As a host: asks, and waits for the answer.
    pub(crate) async fn ask(&mut self, message: MessageType, id: u64, body: &str) -> Value {
        self.send(message, id, body).await;
        self.answer(message, id).await
    }

    pub(crate) async fn answer(&mut self, message: MessageType, id: u64) -> Value {
        let answer = self.receive().await;
        assert_eq!((answer.message, answer.id), (message.response(), id));
        serde_json::from_slice(&answer.payload).unwrap()
    }

    /// As a host: begins.
    pub(crate) async fn negotiate(&mut self) {
        let body = r#"{"MinimumVersion":4,"MaximumVersion":4}"#;
        let answer = self.ask(MessageType::NEGOTIATE, 0, body).await;
        assert_eq!(answer["Result"], 0, "{answer}");
    }

    /// As a host: changes a setting.
    pub(crate) async fn modify(&mut self, id: u64, request: Value) -> Value {
        self.ask(MessageType::MODIFY_SETTINGS, id, &settings(&request))
            .await
    }
}

/// The body of a ModifySettings for the VM.
pub(crate) fn settings(request: &Value) -> String {
    json!({"ContainerId": NULL, "ActivityId": NULL, "Request": request}).to_string()
}

pub(crate) fn add_disk(path: &str, lun: u64) -> Value {
    json!({"RequestType": "Add", "ResourceType": "MappedVirtualDisk",
           "Settings": {"MountPath": path, "Lun": lun}})
}

/// The number of an error in an answer.
pub(crate) fn result(answer: &Value) -> u32 {
    answer["Result"].as_i64().unwrap() as i32 as u32
}

/// A Linux guest that knows only the protocol.
pub(crate) fn documented() -> Capabilities {
    Capabilities {
        runtime_os_type: "Linux".to_owned(),
        guest_defined_capabilities: GuestCapabilities {
            signal_process_supported: true,
            ..GuestCapabilities::default()
        },
        ..Capabilities::default()
    }
}

pub(crate) fn windows() -> Capabilities {
    Capabilities {
        runtime_os_type: "Windows".to_owned(),
        ..Capabilities::default()
    }
}

/// A host, and a guest that is written by the test.
pub(crate) async fn host_and_peer(
    capabilities: Capabilities,
    deadlines: Deadlines,
) -> (GuestConnection, Peer) {
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let (connection, ()) = tokio::join!(
        GuestConnection::connect_with(host_end, deadlines),
        peer.negotiated(capabilities)
    );
    (connection.unwrap(), peer)
}

/// A host that is written by the test, and a guest over a fake VM.
pub(crate) async fn peer_and_guest(vm: &ScsiVm) -> (Peer, GuestServer) {
    let server = GuestServer::new(vm.clone());
    let peer = dial(&server);
    (peer, server)
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

/// A fake VM whose devices are on SCSI controllers with 64 LUNs each.
#[derive(Clone, Debug, Default)]
pub(crate) struct ScsiVm(pub(crate) FakeVm);

impl ScsiVm {
    /// `fake:67` is `scsi:1/3`.
    pub(crate) fn scsi(fake: &DeviceLocator) -> DeviceLocator {
        let slot: u32 = fake.address().parse().unwrap();
        DeviceLocator::new("scsi", format!("{}/{}", slot / 64, slot % 64)).unwrap()
    }

    pub(crate) fn fake(scsi: &DeviceLocator) -> DeviceLocator {
        let address = blockmount_scsi::ScsiAddress::try_from(scsi).expect("a SCSI locator");
        let slot = u32::from(address.controller.get()) * 64 + u32::from(address.lun.get());
        DeviceLocator::new("fake", slot).unwrap()
    }

    /// Attaches so many disks, on LUN 0 and up.
    pub(crate) async fn attach_disks(&self, count: usize) {
        for number in 0..count {
            self.attach_identified(&Disk::virtual_disk(format!("/disks/{number}")))
                .await
                .unwrap();
        }
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

    async fn adopt(
        &self,
        _: &Disk,
        _: &DiskId,
        _: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        Ok(Presence::Unknown)
    }
}

#[async_trait]
impl Unplugger for ScsiVm {
    async fn unplug(&self, device: &DeviceLocator) -> Result<(), BackendError> {
        self.0.unplug(&Self::fake(device)).await
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
        self.0.mount(&Self::fake(device), target, options).await
    }

    async fn unmount(&self, target: &Path) -> Result<(), BackendError> {
        self.0.unmount(target).await
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
