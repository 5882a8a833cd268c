//! A peer that is written frame by frame, and both ends over a fake VM.

use std::time::Duration;

use blockmount::testing::{AttachIdentified as _, FakeVm};
use blockmount::{DeviceLocator, Disk};
use blockmount_bridge::{BridgeGuest, Deadlines, GuestConnection, GuestServer, Request};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::timeout;

/// Longer than anything here may take.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A deadline that a test waits for.
pub(crate) const SHORT: Duration = Duration::from_millis(100);

/// One end of a stream, in the hands of the test.
pub(crate) struct Peer(pub(crate) DuplexStream);

/// The header of a frame of this size.
pub(crate) fn header(size: u32, id: u64) -> Vec<u8> {
    [&size.to_le_bytes()[..], &id.to_le_bytes()].concat()
}

/// A frame with this body.
pub(crate) fn frame(id: u64, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(12 + body.len()).unwrap();
    [&header(size, id)[..], body].concat()
}

impl Peer {
    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn send(&mut self, id: u64, body: &str) {
        self.send_raw(&frame(id, body.as_bytes())).await;
    }

    /// The next frame; none at the end of the stream.
    pub(crate) async fn try_receive(&mut self) -> Option<(u64, Value)> {
        let receiving = async {
            let mut header = [0; 12];
            self.0.read_exact(&mut header).await.ok()?;
            let (size, id) = header.split_at(4);
            let size = u32::from_le_bytes(size.try_into().unwrap()) as usize;
            let mut body = vec![0; size - 12];
            self.0.read_exact(&mut body).await.ok()?;
            let id = u64::from_le_bytes(id.try_into().unwrap());
            Some((id, serde_json::from_slice(&body).unwrap()))
        };
        timeout(LONG, receiving)
            .await
            .expect("the peer says something")
    }

    pub(crate) async fn receive(&mut self) -> (u64, Value) {
        self.try_receive().await.expect("the connection lives")
    }

    /// As an agent: agrees on version 1.
    pub(crate) async fn agree(&mut self) {
        let (id, hello) = self.receive().await;
        assert_eq!(hello["Hello"]["max"], 1, "{hello}");
        self.send(id, r#"{"Chosen":{"version":1,"software":"a test"}}"#)
            .await;
    }

    /// As an agent: answers with success.
    pub(crate) async fn succeed(&mut self, id: u64) {
        self.send(id, r#""Ok""#).await;
    }

    /// As a host: asks, and takes the answer.
    pub(crate) async fn ask(&mut self, id: u64, body: &str) -> Value {
        self.send(id, body).await;
        let (answered, answer) = self.receive().await;
        assert_eq!(answered, id);
        answer
    }

    /// As a host: begins.
    pub(crate) async fn hello(&mut self) {
        let answer = self
            .ask(0, r#"{"Hello":{"min":1,"max":1,"software":"a test"}}"#)
            .await;
        assert_eq!(answer["Chosen"]["version"], 1, "{answer}");
    }
}

pub(crate) fn mount(slot: u64, target: &str) -> String {
    json!({"Mount": {"locator": format!("fake:{slot}"), "target": target, "options": {}}})
        .to_string()
}

pub(crate) fn unplug(slot: u64) -> Request {
    let locator = DeviceLocator::new("fake", slot).unwrap();
    Request::Unplug { locator }
}

/// A host, and an agent that is written by the test.
pub(crate) async fn host_and_peer(deadlines: Deadlines) -> (GuestConnection, Peer) {
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer(guest_end);
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
    Peer(host_end)
}

/// A fake VM with so many disks attached, `fake:0` and up.
pub(crate) async fn vm_with_disks(count: usize) -> FakeVm {
    let vm = FakeVm::new();
    for number in 0..count {
        let disk = Disk::virtual_disk(format!("/disks/{number}"));
        vm.attach_identified(&disk).await.unwrap();
    }
    vm
}

/// Both ends of ours, over a fake VM.
pub(crate) async fn bridged(vm: &FakeVm) -> (BridgeGuest, GuestServer) {
    let server = GuestServer::new(vm.clone());
    let connection = GuestConnection::connect(dial(&server).0).await.unwrap();
    (BridgeGuest::new(connection), server)
}
