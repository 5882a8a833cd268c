//! One call goes wrong; all others must not notice.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use blockmount::testing::{Gate, VmStep};
use blockmount::{ErrorKind, MountOptions, Mounter, Unplugger};
use blockmount_bridge::Deadlines;

use crate::harness::{
    LONG, SHORT, ScsiVm, bridged, device, dial, host_and_peer, unplug, vm_with_disks,
};
use crate::wire::{BridgeGuest, Frame, GuestConnection, GuestServer, UNREADABLE};

#[tokio::test(start_paused = true)]
async fn b4_a_request_that_hangs_fails_by_its_own_deadline() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (hangs, works, ()) = tokio::join!(
        connection.call_within(unplug(0), SHORT),
        connection.call_within(unplug(1), LONG),
        async {
            let (hangs, works) = (peer.receive().await, peer.receive().await);
            tokio::time::sleep(SHORT * 2).await;
            // Too late, twice, and for no request at all: ignored.
            peer.succeed(&hangs).await;
            peer.succeed(&hangs).await;
            let guessed = Frame {
                id: 4_711,
                ..works.clone()
            };
            peer.succeed(&guessed).await;
            peer.succeed(&works).await;
        }
    );
    let hangs = hangs.unwrap_err();
    assert_eq!(hangs.kind(), ErrorKind::Uncertain);
    assert!(hangs.to_string().contains("has not answered"), "{hangs}");
    works.unwrap();
}

#[tokio::test]
async fn an_answer_to_a_request_that_was_not_sent_yet_is_ignored() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (outcome, first) = tokio::join!(connection.call(unplug(0)), async {
        let request = peer.receive().await;
        peer.succeed(&request).await;
        request
    });
    outcome.unwrap();
    let id = first.id + 1;
    peer.is_busy(&Frame { id, ..first }).await;
    tokio::task::yield_now().await;
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let request = peer.receive().await;
        assert_eq!(request.id, id);
        peer.succeed(&request).await;
    });
    outcome.unwrap();
}

#[tokio::test(start_paused = true)]
async fn b4_an_unmount_waits_for_the_mount_that_its_host_has_given_up_on() {
    let vm = vm_with_disks(1).await;
    let server = GuestServer::new(vm.clone());
    let call = Duration::from_secs(10);
    let deadlines = Deadlines {
        call,
        ..Deadlines::default()
    };
    let connection = GuestConnection::connect_with(dial(&server).stream, deadlines);
    let guest = BridgeGuest::new(connection.await.unwrap());
    vm.gate_next(VmStep::Mount, 1, Gate::Slow(Duration::from_secs(15)));
    let (device, target) = (device(0), "/m".as_ref());
    let late = guest.mount(&device, target, &MountOptions::default()).await;
    assert_eq!(late.unwrap_err().kind(), ErrorKind::Uncertain);
    // Comes while the mount is under way, and would find nothing to unmount yet.
    guest.unmount(target).await.unwrap();
    vm.check().unwrap();
    assert_eq!(vm.calls(VmStep::Unmount), 1);
    assert_eq!(vm.device_at("/m"), None);
}

#[tokio::test]
async fn b5_a_panic_of_the_backend_is_uncertain_and_the_guest_serves_on() {
    let vm = vm_with_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    vm.gate_next(VmStep::Mount, 1, Gate::Panic { happened: true });
    let (device, target) = (device(0), "/m".as_ref());
    let options = MountOptions::default();
    let error = guest.mount(&device, target, &options).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    guest.unmount(target).await.unwrap();
    guest.mount(&device, target, &options).await.unwrap();
    vm.check().unwrap();
}

#[tokio::test]
async fn b7_an_answer_that_cannot_be_read_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    for body in ["no JSON", "", "[]", "null"].iter().chain(UNREADABLE) {
        let (broken, other, ()) = tokio::join!(
            connection.call(unplug(0)),
            connection.call(unplug(1)),
            async {
                let (first, second) = (peer.receive().await, peer.receive().await);
                peer.reply(&first, body).await;
                peer.succeed(&second).await;
            }
        );
        assert_eq!(broken.unwrap_err().kind(), ErrorKind::Uncertain, "{body}");
        other.unwrap();
    }
}

#[tokio::test]
async fn answers_out_of_order_find_their_callers() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (first, second, third, ()) = tokio::join!(
        connection.call(unplug(1)),
        connection.call(unplug(2)),
        connection.call(unplug(3)),
        async {
            let requests = [
                peer.receive().await,
                peer.receive().await,
                peer.receive().await,
            ];
            for (number, request) in requests.iter().enumerate().rev() {
                match number {
                    1 => peer.is_busy(request).await,
                    _ => peer.succeed(request).await,
                }
            }
        }
    );
    first.unwrap();
    assert_eq!(second.unwrap_err().kind(), ErrorKind::Busy);
    third.unwrap();
}

#[tokio::test]
async fn a_path_that_is_not_utf8_is_refused_before_it_is_sent() {
    let vm = ScsiVm::default();
    let (guest, _server) = bridged(&vm).await;
    let target = Path::new(OsStr::from_bytes(b"/m\xff"));
    let options = MountOptions::default();
    let error = guest.mount(&device(0), target, &options).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    guest.unplug(&device(0)).await.unwrap();
}

#[tokio::test]
async fn x07_a_tear_down_that_lost_writes_says_so_and_is_done() {
    let vm = vm_with_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    let (target, options) = (Path::new("/m"), MountOptions::default());
    guest.mount(&device(0), target, &options).await.unwrap();
    let lost = Gate::Err(ErrorKind::LostWrites);
    vm.gate_next(VmStep::Unmount, 1, lost);
    let error = guest.unmount(target).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LostWrites, "{error}");
    // There is nothing to undo any more, and the target is free.
    guest.mount(&device(0), target, &options).await.unwrap();
    guest.unmount(target).await.unwrap();
    vm.gate_next(VmStep::Unplug, 1, lost);
    let error = guest.unplug(&device(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LostWrites, "{error}");
    vm.check().unwrap();
}
