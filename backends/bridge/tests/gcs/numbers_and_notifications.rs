//! What only this protocol has: numbers of errors, types of messages, and notifications.

use blockmount::testing::{Gate, VmStep};
use blockmount::{ErrorKind, MountOptions, Mounter};
use blockmount_bridge::gcs::Hresult;
use blockmount_bridge::gcs::messages::Notification;
use blockmount_bridge::gcs::wire::MessageType;
use blockmount_bridge::{Deadlines, Request};

use crate::harness::{ScsiVm, bridged, device, dial, host_and_peer, unplug, vm_with_disks};
use crate::wire::{GuestServer, NULL};

#[tokio::test]
async fn b3_a_notification_for_a_forgotten_container_harms_nobody() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let mut notifications = connection.notifications();
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let request = peer.receive().await;
        let body =
            r#"{"ContainerId":"forgotten","Type":"UnexpectedExit","Operation":"None","Result":0}"#;
        peer.send_as(MessageType::NOTIFICATION, 0, body).await;
        peer.send_as(MessageType::NOTIFICATION, 0, "no JSON").await;
        peer.send_as(MessageType::from_bits(0x3010_ff01), 0, "{}")
            .await;
        peer.succeed(&request).await;
    });
    outcome.unwrap();
    assert_eq!(
        notifications.recv().await.unwrap().container_id,
        "forgotten"
    );
}

#[tokio::test]
async fn b3_a_guest_s_notification_waits_for_a_host() {
    let vm = ScsiVm::default();
    let server = GuestServer::new(vm);
    let mut peer = dial(&server);
    let notification = |container: &str| Notification {
        container_id: container.into(),
        ..Notification::default()
    };
    server.notify(notification("early")).unwrap();
    peer.hello().await;
    let frame = peer.receive().await;
    assert_eq!((frame.message, frame.id), (MessageType::NOTIFICATION, 0));
    assert_eq!(frame.body["ContainerId"], "early");
    drop(peer);
    // Far more than anybody takes: the queue ends, the server does not.
    let kept = (0..1_000)
        .filter(|number| server.notify(notification(&number.to_string())).is_ok())
        .count();
    assert!((256..300).contains(&kept), "{kept}");
    let mut next = dial(&server);
    next.hello().await;
    assert_eq!(next.receive().await.message, MessageType::NOTIFICATION);
}

#[tokio::test]
async fn b3_a_refused_create_leaves_nothing_that_refuses_the_next() {
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    peer.hello().await;
    let body = r#"{"ContainerId":"c1","ContainerConfig":"{}"}"#;
    let first = peer.ask_as(MessageType::CREATE, 1, body).await;
    assert_eq!(first.result(), Hresult::NOT_IMPLEMENTED.bits());
    let second = peer.ask_as(MessageType::CREATE, 2, body).await;
    assert_eq!(second.body, first.body);
}

#[tokio::test]
async fn b5_an_error_says_what_can_be_done_about_it() {
    use ErrorKind::*;
    let vm = vm_with_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    let device = device(0);
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
        vm.gate_next(VmStep::Mount, 1, Gate::Err(kind));
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
    let add = Request::Mount {
        locator: device(0),
        target: "/m".into(),
        options: MountOptions::default(),
    };
    for (request, number, kind) in [
        (add.clone(), -2_147_467_259_i64, ErrorKind::Uncertain),
        (unplug(0), -2_147_467_259, ErrorKind::Other),
        // The same number with its sign, without, and widened.
        (add.clone(), -2_147_023_728, ErrorKind::NotFound),
        (add.clone(), 2_147_943_568, ErrorKind::NotFound),
        (add.clone(), -1_071_382_263, ErrorKind::Uncertain),
        (add, -2_147_467_263, ErrorKind::Unsuitable),
    ] {
        let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
        let (outcome, ()) = tokio::join!(connection.call(request), async {
            let request = peer.receive().await;
            let body = format!(
                r#"{{"Result":{number},"ActivityId":"{NULL}","ErrorMessage":"it broke","ErrorRecords":[{{"Result":{number},"Message":"it broke","ModuleName":"gcs","FileName":"","Line":4294967295}}]}}"#
            );
            peer.reply(&request, &body).await;
        });
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("it broke"), "{error}");
    }
}

#[tokio::test]
async fn b7_an_answer_of_another_type_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (broken, other, ()) = tokio::join!(
        connection.call(unplug(0)),
        connection.call(unplug(1)),
        async {
            let (first, second) = (peer.receive().await, peer.receive().await);
            // What no peer has defined, and a request to the host.
            peer.send_as(MessageType::from_bits(0x7fff_ffff), second.id, "{}")
                .await;
            peer.send_as(MessageType::MODIFY_SETTINGS, second.id, "{}")
                .await;
            peer.send_as(MessageType::CREATE.response(), first.id, r#"{"Result":0}"#)
                .await;
            peer.succeed(&second).await;
        }
    );
    assert_eq!(broken.unwrap_err().kind(), ErrorKind::Uncertain);
    other.unwrap();
}
