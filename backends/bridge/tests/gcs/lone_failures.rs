//! One call goes wrong; all others must not notice.

use crate::common;

use std::time::Duration;

use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{ErrorKind, MountOptions, Mounter};
use blockmount_bridge::gcs::messages::{ModificationRequest, Notification, Resource, ScsiDevice};
use blockmount_bridge::gcs::wire::MessageType;
use blockmount_bridge::gcs::{BridgeGuest, Deadlines, Hresult};
use common::{
    LONG, NULL, SHORT, ScsiVm, add_disk, bridged, documented, host_and_peer, peer_and_guest, result,
};

fn unplug(lun: u8) -> ModificationRequest {
    ModificationRequest::remove(Resource::ScsiDevice(ScsiDevice { controller: 0, lun }))
}

#[tokio::test]
async fn b3_a_notification_for_a_forgotten_container_harms_nobody() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let mut notifications = connection.notifications();
    let (outcome, ()) = tokio::join!(connection.modify(unplug(0)), async {
        let request = peer.receive().await;
        let body =
            r#"{"ContainerId":"forgotten","Type":"UnexpectedExit","Operation":"None","Result":0}"#;
        peer.send(MessageType::NOTIFICATION, 0, body).await;
        peer.send(MessageType::NOTIFICATION, 0, "no JSON").await;
        peer.send(MessageType::from_bits(0x3010_ff01), 0, "{}")
            .await;
        peer.succeed(&request).await;
    });
    outcome.unwrap();
    assert_eq!(
        notifications.recv().await.unwrap().container_id,
        "forgotten"
    );
    // Nobody has to listen either, and who listens late has missed the oldest.
    drop(notifications);
}

#[tokio::test]
async fn b3_a_guest_s_notification_waits_for_a_host() {
    let vm = ScsiVm(FakeVm::new());
    let (mut peer, server) = peer_and_guest(&vm).await;
    let notification = |container: &str| Notification {
        container_id: container.into(),
        ..Notification::default()
    };
    server.notify(notification("early")).unwrap();
    peer.negotiate().await;
    let frame = peer.receive().await;
    assert_eq!((frame.message, frame.id), (MessageType::NOTIFICATION, 0));
    assert!(String::from_utf8(frame.payload).unwrap().contains("early"));
    drop(peer);
    // Far more than anybody takes: the queue ends, the server does not.
    let kept = (0..1_000)
        .filter(|number| server.notify(notification(&number.to_string())).is_ok())
        .count();
    assert!((256..300).contains(&kept), "{kept}");
    let mut next = common::dial(&server);
    next.negotiate().await;
    assert_eq!(next.receive().await.message, MessageType::NOTIFICATION);
}

#[tokio::test]
async fn b3_a_refused_create_leaves_nothing_that_refuses_the_next() {
    let (mut peer, _server) = peer_and_guest(&ScsiVm(FakeVm::new())).await;
    peer.negotiate().await;
    let body = r#"{"ContainerId":"c1","ContainerConfig":"{}"}"#;
    let first = peer.ask(MessageType::CREATE, 1, body).await;
    assert_eq!(result(&first), Hresult::NOT_IMPLEMENTED.bits());
    assert_eq!(peer.ask(MessageType::CREATE, 2, body).await, first);
}

#[tokio::test(start_paused = true)]
async fn b4_a_mount_that_hangs_fails_by_its_own_deadline() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(2).await;
    let (mut peer, _server) = peer_and_guest(&vm).await;
    peer.negotiate().await;
    vm.0.gate_next(VmStep::Mount, 1, Gate::Never);
    peer.send(
        MessageType::MODIFY_SETTINGS,
        1,
        &common::settings(&add_disk("/hangs", 0)),
    )
    .await;
    vm.0.until_called(VmStep::Mount, 1).await;
    assert_eq!(peer.modify(2, add_disk("/works", 1)).await["Result"], 0);
    vm.0.open_gates();
    assert_eq!(
        peer.answer(MessageType::MODIFY_SETTINGS, 1).await["Result"],
        0
    );

    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (hangs, works, ()) = tokio::join!(
        connection.modify_within(unplug(0), SHORT),
        connection.modify_within(unplug(1), LONG),
        async {
            let (hangs, works) = (peer.receive().await, peer.receive().await);
            tokio::time::sleep(SHORT * 2).await;
            // Too late, and twice, and somebody else's: all ignored.
            peer.succeed(&hangs).await;
            peer.succeed(&hangs).await;
            peer.send(MessageType::MODIFY_SETTINGS.response(), 4_711, "{}")
                .await;
            peer.succeed(&works).await;
        }
    );
    let hangs = hangs.unwrap_err();
    assert_eq!(hangs.kind(), ErrorKind::Uncertain);
    assert!(hangs.to_string().contains("has not answered"), "{hangs}");
    works.unwrap();
}

#[tokio::test(start_paused = true)]
async fn b4_an_unmount_waits_for_the_mount_that_its_host_has_given_up_on() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(1).await;
    let server = blockmount_bridge::gcs::GuestServer::new(vm.clone());
    let deadlines = Deadlines {
        call: Duration::from_secs(10),
        ..Deadlines::default()
    };
    let stream = common::dial(&server).stream;
    let connection = blockmount_bridge::gcs::GuestConnection::connect_with(stream, deadlines)
        .await
        .unwrap();
    let guest = BridgeGuest::new(connection);
    vm.0.gate_next(VmStep::Mount, 1, Gate::Slow(Duration::from_secs(15)));
    let device = "scsi:0/0".parse().unwrap();
    let target = "/m".as_ref();
    let late = guest
        .mount(&device, target, &MountOptions::default())
        .await
        .unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Uncertain);
    // Comes while the mount is under way, and would find nothing to unmount yet.
    guest.unmount(target).await.unwrap();
    vm.0.check().unwrap();
    assert_eq!(vm.0.calls(VmStep::Unmount), 1);
    assert_eq!(vm.0.device_at("/m"), None);
}

#[tokio::test]
async fn b5_an_error_says_what_can_be_done_about_it() {
    use ErrorKind::*;
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    let device = "scsi:0/0".parse().unwrap();
    // The protocol has no number for the last two.
    for (kind, arrives) in [
        (Uncertain, Uncertain),
        (Busy, Busy),
        (Unsuitable, Unsuitable),
        (NotFound, NotFound),
        (Conflict, Conflict),
        (Invalid, Invalid),
        (Full, Uncertain),
        (Other, Uncertain),
    ] {
        vm.0.gate_next(VmStep::Mount, 1, Gate::Err(kind));
        let error = guest
            .mount(&device, "/m".as_ref(), &MountOptions::default())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), arrives, "{error}");
        assert!(
            error.to_string().starts_with("the guest refuses"),
            "{error}"
        );
        guest.unmount("/m".as_ref()).await.unwrap();
    }
}

#[tokio::test]
async fn b5_an_error_without_a_kind_may_have_left_something() {
    let add = ModificationRequest::add(Resource::ScsiDevice(ScsiDevice::default()));
    for (request, number, kind) in [
        (add.clone(), -2_147_467_259_i64, ErrorKind::Uncertain),
        (unplug(0), -2_147_467_259, ErrorKind::Other),
        // The same number with its sign, without, and widened.
        (add.clone(), -2_147_023_728, ErrorKind::NotFound),
        (add.clone(), 2_147_943_568, ErrorKind::NotFound),
        (add.clone(), -1_071_382_263, ErrorKind::Uncertain),
        (add, -2_147_467_263, ErrorKind::Unsuitable),
    ] {
        let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
        let (outcome, ()) = tokio::join!(connection.modify(request), async {
            let request = peer.receive().await;
            let body = format!(
                r#"{{"Result":{number},"ActivityId":"{NULL}","ErrorMessage":"it broke","ErrorRecords":[{{"Result":{number},"Message":"it broke","ModuleName":"gcs","FileName":"","Line":4294967295}}]}}"#
            );
            peer.send(request.message.response(), request.id, &body)
                .await;
        });
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("it broke"), "{error}");
    }
}

#[tokio::test]
async fn b5_a_panic_of_the_backend_is_uncertain_and_the_guest_serves_on() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    vm.0.gate_next(VmStep::Mount, 1, Gate::Panic { happened: true });
    let device = "scsi:0/0".parse().unwrap();
    let target = "/m".as_ref();
    let error = guest
        .mount(&device, target, &MountOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    guest.unmount(target).await.unwrap();
    guest
        .mount(&device, target, &MountOptions::default())
        .await
        .unwrap();
    vm.0.check().unwrap();
}

#[tokio::test]
async fn b7_a_malformed_answer_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    for body in [
        "no JSON",
        "",
        "[]",
        "null",
        r#"{"Result":"no number"}"#,
        r#"{"Result":99999999999}"#,
    ] {
        let (broken, other, ()) = tokio::join!(
            connection.modify(unplug(0)),
            connection.modify(unplug(1)),
            async {
                let (first, second) = (peer.receive().await, peer.receive().await);
                peer.send(first.message.response(), first.id, body).await;
                peer.succeed(&second).await;
            }
        );
        assert_eq!(broken.unwrap_err().kind(), ErrorKind::Uncertain, "{body}");
        other.unwrap();
    }
}

#[tokio::test]
async fn b7_an_answer_of_another_type_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (broken, other, ()) = tokio::join!(
        connection.modify(unplug(0)),
        connection.modify(unplug(1)),
        async {
            let (first, second) = (peer.receive().await, peer.receive().await);
            // What no peer has defined, and a request to the host.
            peer.send(MessageType::from_bits(0x7fff_ffff), second.id, "{}")
                .await;
            peer.send(MessageType::MODIFY_SETTINGS, second.id, "{}")
                .await;
            peer.send(MessageType::CREATE.response(), first.id, r#"{"Result":0}"#)
                .await;
            peer.succeed(&second).await;
        }
    );
    assert_eq!(broken.unwrap_err().kind(), ErrorKind::Uncertain);
    other.unwrap();
}

#[tokio::test]
async fn answers_out_of_order_find_their_callers() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (first, second, third, ()) = tokio::join!(
        connection.modify(unplug(1)),
        connection.modify(unplug(2)),
        connection.modify(unplug(3)),
        async {
            let requests = [
                peer.receive().await,
                peer.receive().await,
                peer.receive().await,
            ];
            for request in requests.iter().rev() {
                let text = String::from_utf8(request.payload.clone()).unwrap();
                let body = match text.contains(r#""Lun":2"#) {
                    true => r#"{"Result":-2147024726}"#,
                    false => r#"{"Result":0}"#,
                };
                peer.send(request.message.response(), request.id, body)
                    .await;
            }
        }
    );
    first.unwrap();
    assert_eq!(second.unwrap_err().kind(), ErrorKind::Busy);
    third.unwrap();
}
