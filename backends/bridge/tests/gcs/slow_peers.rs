//! Peers that stop reading or answering: nobody else waits for them, and memory stays bounded.

use crate::common;

use std::time::Duration;

use blockmount::ErrorKind;
use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount_bridge::gcs::messages::{ModificationRequest, Resource, ScsiDevice};
use blockmount_bridge::gcs::wire::MessageType;
use blockmount_bridge::gcs::{Deadlines, GuestServer};
use common::{LONG, ScsiVm, add_disk, dial, documented, host_and_peer, settings};
use tokio::io::{AsyncWriteExt, duplex};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

fn unplug() -> ModificationRequest {
    ModificationRequest::remove(Resource::ScsiDevice(ScsiDevice::default()))
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_stops_reading_blocks_no_call_beyond_its_deadline() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (deadline, begun) = (Duration::from_secs(2), Instant::now());
    let mut calls = JoinSet::new();
    for _ in 0..1_000 {
        let connection = connection.clone();
        calls.spawn(async move {
            connection
                .modify_within(unplug(), deadline)
                .await
                .unwrap_err()
                .kind()
        });
    }
    let kinds = calls.join_all().await;
    assert_eq!(begun.elapsed(), deadline);
    // A few fit in the stream and may have been seen; the rest were never sent, and that is certain.
    let sent = kinds
        .iter()
        .filter(|kind| **kind == ErrorKind::Uncertain)
        .count();
    assert!((1..20).contains(&sent), "{sent}");
    assert_eq!(
        kinds
            .iter()
            .filter(|kind| **kind == ErrorKind::Busy)
            .count(),
        1_000 - sent
    );

    // The guest reads again: it sees what was sent and nothing that was given up.
    let (outcome, seen) = tokio::join!(connection.modify(unplug()), async {
        let mut seen = 0;
        loop {
            let request = peer.receive().await;
            seen += 1;
            peer.succeed(&request).await;
            if request.id > 1_000 {
                return seen;
            }
        }
    });
    outcome.unwrap();
    assert_eq!(seen, sent + 1);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_stops_reading_stops_only_itself() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(1).await;
    let server = GuestServer::with_limits(vm.clone(), 8, LONG);
    let mut deaf = dial(&server);
    deaf.negotiate().await;
    // It asks and asks, and takes no answer: at some point the guest does not take any more either.
    let asking = async {
        for id in 0.. {
            deaf.send(
                MessageType::MODIFY_SETTINGS,
                id,
                &settings(&add_disk("", 0)),
            )
            .await;
        }
    };
    timeout(LONG, asking)
        .await
        .expect_err("a guest takes a bounded number of requests");
    drop(deaf);
    // Its answers are dropped with it.
    let mut next = dial(&server);
    next.negotiate().await;
    assert_eq!(next.modify(1, add_disk("/m", 0)).await["Result"], 0);
}

#[tokio::test]
async fn a_guest_has_no_more_requests_under_way_than_its_limit() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(16).await;
    let server = GuestServer::with_limits(vm.clone(), 3, LONG);
    let (host_end, guest_end) = duplex(1 << 20);
    tokio::spawn(async move { server.serve(guest_end).await });
    let mut peer = common::Peer::new(host_end);
    peer.negotiate().await;
    vm.0.gate_always(VmStep::Mount, Gate::Never);
    for lun in 0..16 {
        let body = settings(&add_disk(&format!("/m{lun}"), lun));
        peer.send(MessageType::MODIFY_SETTINGS, lun, &body).await;
    }
    vm.0.until_called(VmStep::Mount, 3).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(vm.0.calls(VmStep::Mount), 3);
    vm.0.open_gates();
    for _ in 0..16 {
        peer.receive().await;
    }
    assert_eq!(vm.0.calls(VmStep::Mount), 16);
}

#[tokio::test]
async fn requests_are_answered_as_they_end() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(2).await;
    let mut peer = dial(&GuestServer::new(vm.clone()));
    peer.negotiate().await;
    vm.0.gate_next(VmStep::Mount, 1, Gate::Never);
    peer.send(
        MessageType::MODIFY_SETTINGS,
        1,
        &settings(&add_disk("/slow", 0)),
    )
    .await;
    vm.0.until_called(VmStep::Mount, 1).await;
    peer.send(
        MessageType::MODIFY_SETTINGS,
        2,
        &settings(&add_disk("/quick", 1)),
    )
    .await;
    assert_eq!(peer.receive().await.id, 2);
    vm.0.open_gates();
    assert_eq!(peer.receive().await.id, 1);
}

#[tokio::test]
async fn a_stream_that_ends_between_frames_is_no_error() {
    let server = GuestServer::new(ScsiVm(FakeVm::new()));
    let (mut host_end, guest_end) = duplex(64);
    host_end.shutdown().await.unwrap();
    drop(host_end);
    server.serve(guest_end).await.unwrap();
}
