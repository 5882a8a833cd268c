//! The stream is lost, with and without a request under way, and comes back.

use crate::common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{
    BackendError, Disk, ErrorKind, Manager, MountOptions, MountRequest, Mounter, Unplugger,
};
use blockmount_bridge::gcs::messages::{ModificationRequest, Resource, ScsiDevice};
use blockmount_bridge::gcs::{BridgeGuest, Deadlines, GuestConnection, GuestServer};
use blockmount_bridge::{Dialer, RedialingChannel};
use common::{LONG, Peer, ScsiVm, bridged, dial, documented, host_and_peer};
use tokio::io::{DuplexStream, duplex};
use tokio::time::{Instant, timeout};

fn unplug() -> ModificationRequest {
    ModificationRequest::remove(Resource::ScsiDevice(ScsiDevice::default()))
}

#[tokio::test]
async fn b9_a_request_in_flight_is_uncertain_and_so_are_later_ones() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (outcome, ()) = tokio::join!(connection.modify(unplug()), async {
        peer.receive().await;
        drop(peer);
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    let begun = Instant::now();
    let later = connection.modify(unplug()).await.unwrap_err();
    assert_eq!(later.kind(), ErrorKind::Uncertain, "{later}");
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn b9_a_mount_in_doubt_is_taken_back_over_the_next_connection() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(1).await;
    let server = GuestServer::new(vm.clone());
    let (host_end, guest_end) = duplex(1 << 10);
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve(guest_end).await }
    });
    let guest = BridgeGuest::new(GuestConnection::connect(host_end).await.unwrap());
    vm.0.gate_next(VmStep::Mount, 1, Gate::Never);
    let (device, target) = ("scsi:0/0".parse().unwrap(), "/m".as_ref());
    let options = MountOptions::default();
    let (outcome, ()) = tokio::join!(guest.mount(&device, target, &options), async {
        vm.0.until_called(VmStep::Mount, 1).await;
        serving.abort();
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    assert_eq!(
        guest.unplug(&device).await.unwrap_err().kind(),
        ErrorKind::Uncertain
    );

    guest
        .channel()
        .reconnect(dial(&server).stream)
        .await
        .unwrap();
    // The mount is still under way in the guest: the unmount waits for it, whatever the connection.
    let (unmounted, ()) = tokio::join!(guest.unmount(target), async {
        tokio::task::yield_now().await;
        assert_eq!(vm.0.calls(VmStep::Unmount), 0);
        vm.0.open_gates();
    });
    unmounted.unwrap();
    assert_eq!(vm.0.device_at("/m"), None);
    guest.mount(&device, target, &options).await.unwrap();
    guest.unmount(target).await.unwrap();
    vm.0.check().unwrap();
}

#[tokio::test]
async fn a_reconnection_negotiates_again_and_counts_on() {
    let (connection, peer) = host_and_peer(documented(), Deadlines::default()).await;
    drop(peer);
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let clone = connection.clone();
    let (outcome, ()) = tokio::join!(clone.reconnect(host_end), peer.negotiated(documented()));
    outcome.unwrap();
    let (outcome, ()) = tokio::join!(connection.modify(unplug()), async {
        let request = peer.receive().await;
        // 0 and 1 were the negotiations.
        assert_eq!(request.id, 2);
        peer.succeed(&request).await;
    });
    outcome.unwrap();
}

#[tokio::test]
async fn a_failed_reconnection_leaves_the_connection_as_it_was() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (host_end, guest_end) = duplex(1 << 10);
    drop(guest_end);
    assert_eq!(
        connection.reconnect(host_end).await.unwrap_err().kind(),
        ErrorKind::Uncertain
    );
    let (outcome, ()) = tokio::join!(connection.modify(unplug()), async {
        let request = peer.receive().await;
        peer.succeed(&request).await;
    });
    outcome.unwrap();
}

#[tokio::test]
async fn a_replaced_connection_frees_its_callers() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (host_end, guest_end) = duplex(1 << 10);
    let mut next = Peer::new(guest_end);
    let (outcome, ()) = tokio::join!(timeout(LONG, connection.modify(unplug())), async {
        peer.receive().await;
        let (reconnected, ()) = tokio::join!(
            connection.reconnect(host_end),
            next.negotiated(documented())
        );
        reconnected.unwrap();
    });
    assert_eq!(outcome.unwrap().unwrap_err().kind(), ErrorKind::Uncertain);
    assert!(
        peer.try_receive().await.is_none(),
        "the old stream is closed"
    );
}

#[tokio::test]
async fn the_last_owner_closes_the_stream() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let clone = connection.clone();
    drop(connection);
    clone.close();
    assert_eq!(
        clone.modify(unplug()).await.unwrap_err().kind(),
        ErrorKind::Uncertain
    );
    assert!(peer.try_receive().await.is_none());
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    drop(connection);
    assert!(peer.try_receive().await.is_none());
}

#[tokio::test]
async fn f01_what_could_not_be_undone_without_a_connection_keeps_its_target() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(2).await;
    let (guest, server) = bridged(&vm).await;
    let devices = ["scsi:0/0", "scsi:0/1"].map(|text| text.parse().unwrap());
    let (target, options) = ("/m".as_ref(), MountOptions::read_only());
    guest.mount(&devices[0], target, &options).await.unwrap();
    guest.channel().close();
    let error = guest.unmount(target).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain);
    // Still no connection: nothing is forgotten.
    let error = guest.mount(&devices[1], target, &options).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Conflict);
    let stream = dial(&server).stream;
    guest.channel().reconnect(stream).await.unwrap();
    guest.unmount(target).await.unwrap();
    guest.mount(&devices[1], target, &options).await.unwrap();
    assert_eq!(vm.0.device_at("/m").unwrap().as_str(), "fake:1");
    guest.unmount(target).await.unwrap();
    vm.0.check().unwrap();
    assert_eq!(vm.0.device_at("/m"), None);
}

/// Dials a server, until the VM ends.
struct Way(GuestServer, Arc<AtomicBool>);

#[async_trait]
impl Dialer for Way {
    type Stream = DuplexStream;

    async fn dial(&self) -> Result<DuplexStream, BackendError> {
        match self.is_alive().await {
            true => Ok(dial(&self.0).stream),
            false => Err(BackendError::other("connection refused")),
        }
    }

    async fn is_alive(&self) -> bool {
        self.1.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn f01_a_manager_is_clean_after_its_vm_has_ended_and_redials_before() {
    let vm = ScsiVm(FakeVm::new());
    let alive = Arc::new(AtomicBool::new(true));
    let way = Way(GuestServer::new(vm.clone()), alive.clone());
    let connection = GuestConnection::connect(way.dial().await.unwrap());
    let connection = connection.await.unwrap();
    let guest = BridgeGuest::new(RedialingChannel::over(way, connection.clone()));
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(guest.clone())
        .mounter(guest)
        .build();
    let request = MountRequest::new(MountOptions::default());
    let mount = manager
        .add(&Disk::virtual_disk("/a.img"), &request)
        .await
        .unwrap();
    connection.close();
    mount.release().await.unwrap();
    vm.0.check().unwrap();
    let mount = manager
        .add(&Disk::virtual_disk("/a.img"), &request)
        .await
        .unwrap();
    connection.close();
    alive.store(false, Ordering::SeqCst);
    vm.0.kill_guest();
    mount.release().await.unwrap();
    let error = manager
        .add(&Disk::virtual_disk("/b.img"), &request)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(manager.drain().await.is_clean());
    vm.0.assert_empty();
}
