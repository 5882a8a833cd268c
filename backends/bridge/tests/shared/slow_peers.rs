//! Peers that stop reading or answering: no other request waits for them, and memory stays bounded.

use std::time::Duration;

use blockmount::testing::{Gate, VmStep};
use blockmount::{ErrorKind, MountOptions};
use blockmount_bridge::{Deadlines, Request};
use tokio::io::{AsyncWriteExt, duplex};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::harness::{LONG, ScsiVm, device, dial, host_and_peer, unplug, vm_with_disks};
use crate::wire::{GuestServer, Peer, written};

/// A request to mount, as a host writes it.
fn mount(lun: u64, target: &str) -> String {
    written(&Request::Mount {
        locator: device(lun),
        target: target.into(),
        options: MountOptions::default(),
    })
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_reading_blocks_no_call_beyond_its_deadline() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (deadline, begun) = (Duration::from_secs(2), Instant::now());
    let mut calls = JoinSet::new();
    for _ in 0..1_000 {
        let connection = connection.clone();
        calls.spawn(async move {
            let outcome = connection.call_within(unplug(0), deadline).await;
            outcome.unwrap_err().kind()
        });
    }
    let kinds = calls.join_all().await;
    assert_eq!(begun.elapsed(), deadline);
    // A few fit in the stream and may have been seen; the rest were never sent, and that is certain.
    let count = |of| kinds.iter().filter(|kind| **kind == of).count();
    let sent = count(ErrorKind::Uncertain);
    assert!((1..40).contains(&sent), "{sent}");
    assert_eq!(count(ErrorKind::Busy), 1_000 - sent);

    // It reads again: it sees what was sent and nothing that was given up.
    let (outcome, seen) = tokio::join!(connection.call(unplug(0)), async {
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
async fn x05_a_host_that_stops_reading_stops_only_itself() {
    let vm = vm_with_disks(1).await;
    let server = GuestServer::with_limits(vm, 8, LONG);
    let mut deaf = dial(&server);
    deaf.hello().await;
    let unmount = written(&Request::Unmount {
        target: "/x".into(),
    });
    // It asks and asks, and takes no answer: at some point the agent does not take any more either.
    let asking = async {
        for id in 0.. {
            deaf.send(id, &unmount).await;
        }
    };
    let outcome = timeout(LONG, asking).await;
    outcome.expect_err("an agent takes a bounded number of requests");
    // Another host is served while the first still has its connection.
    let mut next = dial(&server);
    next.hello().await;
    assert!(next.ask(1, &mount(0, "/m")).await.is_ok());
    drop(deaf);
}

#[tokio::test]
async fn an_agent_has_no_more_requests_under_way_than_its_limit() {
    let vm = vm_with_disks(16).await;
    let server = GuestServer::with_limits(vm.clone(), 3, LONG);
    let (host_end, guest_end) = duplex(1 << 20);
    tokio::spawn(async move { server.serve(guest_end).await });
    let mut peer = Peer::new(host_end);
    peer.hello().await;
    vm.gate_always(VmStep::Mount, Gate::Never);
    for slot in 0..16 {
        peer.send(slot, &mount(slot, &format!("/m{slot}"))).await;
    }
    vm.until_called(VmStep::Mount, 3).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(vm.calls(VmStep::Mount), 3);
    vm.open_gates();
    for _ in 0..16 {
        peer.receive().await;
    }
    assert_eq!(vm.calls(VmStep::Mount), 16);
}

#[tokio::test]
async fn requests_are_answered_as_they_end() {
    let vm = vm_with_disks(2).await;
    let mut peer = dial(&GuestServer::new(vm.clone()));
    peer.hello().await;
    vm.gate_next(VmStep::Mount, 1, Gate::Never);
    peer.send(1, &mount(0, "/slow")).await;
    vm.until_called(VmStep::Mount, 1).await;
    peer.send(2, &mount(1, "/quick")).await;
    assert_eq!(peer.receive().await.id, 2);
    vm.open_gates();
    assert_eq!(peer.receive().await.id, 1);
}

#[tokio::test]
async fn a_stream_that_ends_between_frames_is_no_error() {
    let server = GuestServer::new(ScsiVm::default());
    let (mut host_end, guest_end) = duplex(64);
    host_end.shutdown().await.unwrap();
    drop(host_end);
    server.serve(guest_end).await.unwrap();
}
