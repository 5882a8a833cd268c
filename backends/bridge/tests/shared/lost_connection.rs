//! The stream is lost, with and without a request under way, and comes back.

use std::sync::atomic::Ordering;
use std::time::Duration;

use blockmount::testing::{Gate, VmStep};
use blockmount::{Disk, ErrorKind, Manager, MountOptions, MountRequest, Mounter, Unplugger};
use blockmount_bridge::{Deadlines, GuestChannel as _};
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use crate::harness::{
    LONG, ScsiVm, Way, bridged, device, dial, host_and_peer, redialing, unplug, vm_with_disks,
};
use crate::wire::{BridgeGuest, GuestConnection, GuestServer, Peer, RedialingChannel};

/// A channel to an agent that is written by the test, and its first stream.
async fn channel_and_peer() -> (
    RedialingChannel<Way>,
    Way,
    mpsc::UnboundedReceiver<DuplexStream>,
    Peer,
) {
    let (way, mut streams) = Way::new();
    let (channel, peer) = tokio::join!(redialing(&way), async {
        let mut peer = Peer::new(streams.recv().await.unwrap());
        peer.agree().await;
        peer
    });
    (channel, way, streams, peer)
}

/// A channel to a fake VM. The sender of handles ends the present stream.
async fn channel_to(
    vm: &ScsiVm,
) -> (
    BridgeGuest<RedialingChannel<Way>>,
    Way,
    mpsc::UnboundedReceiver<AbortHandle>,
) {
    let (way, mut streams) = Way::new();
    let (handles, serving) = mpsc::unbounded_channel();
    let server = GuestServer::new(vm.clone());
    tokio::spawn(async move {
        while let Some(stream) = streams.recv().await {
            let server = server.clone();
            let task = tokio::spawn(async move { server.serve(stream).await });
            let _ = handles.send(task.abort_handle());
        }
    });
    let channel = redialing(&way).await;
    (BridgeGuest::new(channel), way, serving)
}

#[tokio::test]
async fn f01_a_lost_connection_is_uncertain_now_and_later() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        peer.receive().await;
        drop(peer);
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    let begun = Instant::now();
    let later = connection.call(unplug(0)).await.unwrap_err();
    assert_eq!(later.kind(), ErrorKind::Uncertain, "{later}");
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn f01_a_release_over_a_lost_line_keeps_the_disk_attached() {
    let vm = ScsiVm::default();
    let (guest, way, mut serving) = channel_to(&vm).await;
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(guest.clone())
        .mounter(guest)
        .build();
    let request = MountRequest::new(MountOptions::default());
    let disk = Disk::virtual_disk("/a.img");
    let mount = manager.add(&disk, &request).await.unwrap();
    way.works.store(false, Ordering::SeqCst);
    serving.recv().await.unwrap().abort();
    let error = mount.release().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    assert!(!manager.drain().await.is_clean());
    assert_eq!(vm.calls(VmStep::Detach), 0, "it is mounted in the guest");
    // The agent is there again: the same tear-down ends.
    way.works.store(true, Ordering::SeqCst);
    assert!(manager.drain().await.is_clean());
    vm.check().unwrap();
    vm.assert_empty();
}

#[tokio::test]
async fn f01_only_the_owner_of_the_vm_says_that_it_is_gone() {
    let vm = ScsiVm::default();
    let (guest, way, mut serving) = channel_to(&vm).await;
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(guest.clone())
        .mounter(guest)
        .build();
    let request = MountRequest::new(MountOptions::default());
    let disk = Disk::virtual_disk("/a.img");
    let mount = manager.add(&disk, &request).await.unwrap();
    way.works.store(false, Ordering::SeqCst);
    way.alive.store(false, Ordering::SeqCst);
    serving.recv().await.unwrap().abort();
    vm.kill_guest();
    mount.release().await.unwrap();
    let other = Disk::virtual_disk("/b.img");
    let error = manager.add(&other, &request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(manager.drain().await.is_clean());
    vm.assert_empty();
}

#[tokio::test]
async fn i09_a_teardown_that_was_cut_off_is_sent_again_once() {
    let (channel, way, mut streams, mut peer) = channel_and_peer().await;
    let guest = BridgeGuest::new(channel);
    let device = device(0);
    let (outcome, last) = tokio::join!(guest.unplug(&device), async {
        let first = peer.receive().await;
        drop(peer);
        let mut next = Peer::new(streams.recv().await.unwrap());
        next.agree().await;
        let again = next.receive().await;
        assert_eq!(first.body, again.body);
        next.succeed(&again).await;
        next
    });
    outcome.unwrap();
    assert_eq!(way.dials(), 2);

    // A second loss in one call is not a third try.
    let mut peer = last;
    let (outcome, _peer) = tokio::join!(guest.unplug(&device), async {
        peer.receive().await;
        drop(peer);
        let mut next = Peer::new(streams.recv().await.unwrap());
        next.agree().await;
        next.receive().await;
        drop(next);
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    assert_eq!(way.dials(), 3);
}

#[tokio::test]
async fn i09_a_setup_that_was_cut_off_is_not_sent_again() {
    let (channel, way, mut streams, mut peer) = channel_and_peer().await;
    let guest = BridgeGuest::new(channel);
    let (device, target) = (device(0), "/m".as_ref());
    let options = MountOptions::default();
    let (outcome, mount) = tokio::join!(guest.mount(&device, target, &options), async {
        let mount = peer.receive().await;
        drop(peer);
        mount
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    assert_eq!(way.dials(), 1);
    // The next request goes over a new stream, and is the unmount.
    let (outcome, _peer) = tokio::join!(guest.unmount(target), async {
        let mut next = Peer::new(streams.recv().await.unwrap());
        next.agree().await;
        let request = next.receive().await;
        assert_ne!(request.body, mount.body);
        next.succeed(&request).await;
        next
    });
    outcome.unwrap();
}

#[tokio::test(start_paused = true)]
async fn i09_sending_again_takes_no_second_deadline() {
    let (channel, _way, mut streams, mut peer) = channel_and_peer().await;
    let guest = BridgeGuest::new(channel);
    let device = device(0);
    let (begun, deadline) = (Instant::now(), Deadlines::default().call);
    let (outcome, _peer) = tokio::join!(guest.unplug(&device), async {
        peer.receive().await;
        tokio::time::sleep(deadline * 3 / 4).await;
        drop(peer);
        let mut next = Peer::new(streams.recv().await.unwrap());
        next.agree().await;
        // It never answers.
        next
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    let took = begun.elapsed();
    assert!(took <= deadline + Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn an_agent_that_was_started_anew_on_its_stream_is_asked_again_over_a_new_one() {
    let (channel, _way, mut streams, mut peer) = channel_and_peer().await;
    let guest = BridgeGuest::new(channel);
    let (device, target) = (device(0), "/m".as_ref());
    let options = MountOptions::default();
    // Also a set-up: nothing of it was done.
    let (outcome, _peers) = tokio::join!(guest.mount(&device, target, &options), async {
        let request = peer.receive().await;
        peer.is_new(&request).await;
        let mut next = Peer::new(streams.recv().await.unwrap());
        next.agree().await;
        let again = next.receive().await;
        assert_eq!(request.body, again.body);
        next.succeed(&again).await;
        (peer, next)
    });
    outcome.unwrap();
}

#[tokio::test]
async fn many_callers_dial_once() {
    let vm = vm_with_disks(32).await;
    let (guest, way, mut serving) = channel_to(&vm).await;
    serving.recv().await.unwrap().abort();
    tokio::task::yield_now().await;
    let mut calls = tokio::task::JoinSet::new();
    for slot in 0..32 {
        let guest = guest.clone();
        calls.spawn(async move {
            let (target, options) = (format!("/m{slot}"), MountOptions::default());
            guest.mount(&device(slot), target.as_ref(), &options).await
        });
    }
    for outcome in calls.join_all().await {
        outcome.unwrap();
    }
    assert_eq!(way.dials(), 2);
    vm.check().unwrap();
}

#[tokio::test]
async fn b9_a_mount_in_doubt_is_taken_back_over_the_next_connection() {
    let vm = vm_with_disks(1).await;
    let (guest, _way, mut serving) = channel_to(&vm).await;
    vm.gate_next(VmStep::Mount, 1, Gate::Never);
    let (device, target) = (device(0), "/m".as_ref());
    let options = MountOptions::default();
    let (outcome, ()) = tokio::join!(guest.mount(&device, target, &options), async {
        vm.until_called(VmStep::Mount, 1).await;
        serving.recv().await.unwrap().abort();
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    // The mount is still under way in the guest: the unmount waits for it, whatever the connection.
    let (unmounted, ()) = tokio::join!(guest.unmount(target), async {
        tokio::task::yield_now().await;
        assert_eq!(vm.calls(VmStep::Unmount), 0);
        vm.open_gates();
    });
    unmounted.unwrap();
    assert_eq!(vm.device_at("/m"), None);
    guest.mount(&device, target, &options).await.unwrap();
    guest.unmount(target).await.unwrap();
    vm.check().unwrap();
}

#[tokio::test]
async fn a_reconnection_agrees_again_and_counts_on() {
    let (connection, peer) = host_and_peer(Deadlines::default()).await;
    drop(peer);
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let clone = connection.clone();
    let (outcome, ()) = tokio::join!(clone.reconnect(host_end), peer.agree());
    outcome.unwrap();
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let request = peer.receive().await;
        assert_eq!(request.id, 2, "0 and 1 were for the agreements");
        peer.succeed(&request).await;
    });
    outcome.unwrap();
}

#[tokio::test]
async fn a_failed_reconnection_leaves_the_connection_as_it_was() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (host_end, guest_end) = duplex(1 << 10);
    drop(guest_end);
    connection.reconnect(host_end).await.unwrap_err();
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let request = peer.receive().await;
        peer.succeed(&request).await;
    });
    outcome.unwrap();
}

#[tokio::test]
async fn a_replaced_connection_returns_its_callers() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (host_end, guest_end) = duplex(1 << 10);
    let mut next = Peer::new(guest_end);
    let (outcome, ()) = tokio::join!(timeout(LONG, connection.call(unplug(0))), async {
        peer.receive().await;
        let (reconnected, ()) = tokio::join!(connection.reconnect(host_end), next.agree());
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
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let clone = connection.clone();
    drop(connection);
    clone.close();
    let error = clone.call(unplug(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain);
    assert!(peer.try_receive().await.is_none());
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    drop(connection);
    assert!(peer.try_receive().await.is_none());
}

#[tokio::test]
async fn what_an_agent_has_said_before_it_closed_its_end_is_an_answer() {
    let vm = vm_with_disks(1).await;
    let (guest, server) = bridged(&vm).await;
    let connection = GuestConnection::connect(dial(&server).stream)
        .await
        .unwrap();
    drop(guest);
    connection.call(unplug(0)).await.unwrap();
}

#[tokio::test]
async fn f01_a_manager_redials_and_is_clean_after_its_vm_has_ended() {
    let vm = ScsiVm::default();
    let (guest, way, _serving) = channel_to(&vm).await;
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(guest.clone())
        .mounter(guest.clone())
        .build();
    let request = MountRequest::new(MountOptions::default());
    let disk = Disk::virtual_disk("/a.img");
    let mount = manager.add(&disk, &request).await.unwrap();
    guest.channel().connection().close();
    mount.release().await.unwrap();
    vm.check().unwrap();
    let mount = manager.add(&disk, &request).await.unwrap();
    guest.channel().connection().close();
    way.works.store(false, Ordering::SeqCst);
    way.alive.store(false, Ordering::SeqCst);
    vm.kill_guest();
    mount.release().await.unwrap();
    let other = Disk::virtual_disk("/b.img");
    let error = manager.add(&other, &request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert!(manager.drain().await.is_clean());
    vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn u06_a_guest_that_does_not_come_back_is_noticed_without_a_request() {
    let vm = vm_with_disks(1).await;
    let server = GuestServer::new(vm.clone());
    let (way, mut ends) = Way::new();
    let agent = tokio::spawn(async move {
        while let Some(stream) = ends.recv().await {
            let server = server.clone();
            tokio::spawn(async move { server.serve(stream).await });
        }
    });
    let channel = redialing(&way).await;
    // One that comes back is connected to at once.
    let lost = channel.lost();
    tokio::pin!(lost);
    for dials in 2..5 {
        channel.connection().close();
        let no_end = tokio::time::timeout(LONG, &mut lost).await;
        assert!(no_end.is_err());
        assert_eq!(way.dials(), dials);
    }
    channel.call(unplug(0)).await.unwrap();
    assert_eq!(way.dials(), 4);

    way.works.store(false, Ordering::SeqCst);
    channel.connection().close();
    let error = tokio::time::timeout(LONG, &mut lost).await.unwrap();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    way.alive.store(false, Ordering::SeqCst);
    assert_eq!(channel.lost().await.kind(), ErrorKind::Gone);
    agent.abort();
}
