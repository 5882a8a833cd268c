//! What comes before, beside and instead of the negotiation.

use crate::common;

use blockmount::ErrorKind;
use blockmount::testing::FakeVm;
use blockmount_bridge::gcs::messages::Capabilities;
use blockmount_bridge::gcs::wire::MessageType;
use blockmount_bridge::gcs::{Deadlines, GuestConnection, Hresult};
use common::{
    NULL, Peer, ScsiVm, add_disk, dial, host_and_peer, peer_and_guest, result, settings, windows,
};
use tokio::io::duplex;

#[tokio::test]
async fn b6_nothing_is_done_before_the_negotiation() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(1).await;
    let (mut peer, server) = peer_and_guest(&vm).await;
    let early = peer.modify(0, add_disk("/m", 0)).await;
    assert_eq!(result(&early), Hresult::NOT_IMPLEMENTED.bits());
    assert_eq!(early["ActivityId"], NULL);
    let said = "bridge: function not supported, header type: 269486593";
    assert_eq!(early["ErrorMessage"], said);
    assert_eq!(vm.0.device_at("/m"), None);

    // Pipelined: what is read after the negotiation is done, in whatever order the tasks run.
    let negotiation = r#"{"MinimumVersion":4,"MaximumVersion":4}"#;
    peer.send(
        MessageType::MODIFY_SETTINGS,
        1,
        &settings(&add_disk("/before", 0)),
    )
    .await;
    peer.send(MessageType::NEGOTIATE, 2, negotiation).await;
    peer.send(
        MessageType::MODIFY_SETTINGS,
        3,
        &settings(&add_disk("/after", 0)),
    )
    .await;
    let before = peer.answer(MessageType::MODIFY_SETTINGS, 1).await;
    assert_eq!(result(&before), Hresult::NOT_IMPLEMENTED.bits());
    assert_eq!(peer.answer(MessageType::NEGOTIATE, 2).await["Version"], 4);
    assert_eq!(
        peer.answer(MessageType::MODIFY_SETTINGS, 3).await["Result"],
        0
    );
    assert!(vm.0.device_at("/after").is_some() && vm.0.device_at("/before").is_none());

    // Anew on each connection.
    let refused = dial(&server).modify(0, add_disk("/m", 0)).await;
    assert_eq!(result(&refused), Hresult::NOT_IMPLEMENTED.bits());
}

#[tokio::test]
async fn a_second_negotiation_is_refused_and_changes_nothing() {
    let (mut peer, _server) = peer_and_guest(&ScsiVm(FakeVm::new())).await;
    peer.negotiate().await;
    let again = peer
        .ask(
            MessageType::NEGOTIATE,
            1,
            r#"{"MinimumVersion":4,"MaximumVersion":4}"#,
        )
        .await;
    assert_eq!(result(&again), Hresult::NOT_IMPLEMENTED.bits());
    let request =
        serde_json::json!({"RequestType": "Remove", "ResourceType": "SCSIDevice", "Settings": {}});
    assert_eq!(peer.modify(2, request).await["Result"], 0);
}

#[tokio::test]
async fn versions_are_compared_as_every_guest_does() {
    for (lowest, highest, agreed) in [
        (4, 4, true),
        (1, 9, true),
        (0, 4, true),
        (5, 9, false),
        (1, 3, false),
        (0, 0, false),
    ] {
        let (mut peer, _server) = peer_and_guest(&ScsiVm(FakeVm::new())).await;
        let body = format!(r#"{{"minimumversion":{lowest},"maximumversion":{highest}}}"#);
        let answer = peer.ask(MessageType::NEGOTIATE, 0, &body).await;
        if agreed {
            assert_eq!(
                (&answer["Result"], &answer["Version"]),
                (&0.into(), &4.into())
            );
            assert_eq!(answer["Capabilities"]["RuntimeOsType"], "Linux");
        } else {
            assert_eq!(
                result(&answer),
                Hresult::UNSUPPORTED_PROTOCOL_VERSION.bits()
            );
            // A host that has learnt may try again.
            peer.negotiate().await;
        }
    }
}

#[tokio::test]
async fn a_host_refuses_what_it_cannot_speak() {
    for (answer, kind) in [
        (
            r#"{"Result":0,"Version":5,"Capabilities":{}}"#,
            ErrorKind::Unsuitable,
        ),
        (r#"{"Result":0,"Capabilities":{}}"#, ErrorKind::Unsuitable),
        (
            r#"{"Result":-2147467259,"ErrorMessage":"no"}"#,
            ErrorKind::Other,
        ),
        (
            r#"{"Result":3224830220,"ErrorMessage":"no common version"}"#,
            ErrorKind::Unsuitable,
        ),
        ("garbage", ErrorKind::Uncertain),
    ] {
        let (host_end, guest_end) = duplex(1 << 10);
        let mut peer = Peer::new(guest_end);
        let (connection, ()) = tokio::join!(GuestConnection::connect(host_end), async {
            let request = peer.receive().await;
            peer.send(request.message.response(), request.id, answer)
                .await;
        });
        assert_eq!(connection.unwrap_err().kind(), kind, "{answer}");
        assert!(peer.try_receive().await.is_none(), "the stream is closed");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_negotiates_is_given_up_in_time() {
    let (host_end, _guest_end) = duplex(1 << 10);
    let error = GuestConnection::connect(host_end).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
}

#[tokio::test]
async fn a_windows_guest_is_created_and_started_first() {
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let capabilities = Capabilities {
        send_host_create_message: true,
        send_host_start_message: true,
        ..windows()
    };
    let (connection, ()) = tokio::join!(GuestConnection::connect(host_end), async {
        peer.negotiated(capabilities).await;
        let create = peer.receive().await;
        assert_eq!((create.message, create.id), (MessageType::CREATE, 1));
        let body = String::from_utf8(create.payload.clone()).unwrap();
        assert!(
            body.contains(
                r#""ContainerConfig":"{\"SystemType\":\"Container\",\"TimeZoneInformation\":null}""#
            ),
            "{body}"
        );
        peer.succeed(&create).await;
        let start = peer.receive().await;
        assert_eq!((start.message, start.id), (MessageType::START, 2));
        peer.succeed(&start).await;
    });
    assert!(connection.unwrap().capabilities().is_windows());
}

#[tokio::test]
async fn unknown_messages_are_answered_and_answers_are_not() {
    let (mut peer, _server) = peer_and_guest(&ScsiVm(FakeVm::new())).await;
    peer.negotiate().await;
    for bits in [
        0x1010_0501,
        0x1010_ff01,
        0x1030_0101,
        0x1020_0101,
        0x0,
        0x4010_0101,
    ] {
        let message = MessageType::from_bits(bits);
        let answer = peer.ask(message, 5, "{}").await;
        assert_eq!(
            result(&answer),
            Hresult::NOT_IMPLEMENTED.bits(),
            "{message}"
        );
    }
    for bits in [0x2010_0a01, 0x3010_0101] {
        peer.send(MessageType::from_bits(bits), 6, "{}").await;
    }
    // The next answer is that to the next request.
    peer.ask(MessageType::DUMP_STACKS, 7, "no JSON").await;
}

#[tokio::test]
async fn ids_count_from_zero() {
    let (connection, mut peer) = host_and_peer(common::documented(), Deadlines::default()).await;
    for id in 1..4 {
        let request = blockmount_bridge::gcs::messages::ModificationRequest::remove(
            blockmount_bridge::gcs::messages::Resource::ScsiDevice(Default::default()),
        );
        let (outcome, ()) = tokio::join!(connection.modify(request), async {
            let request = peer.receive().await;
            assert_eq!(request.id, id);
            peer.succeed(&request).await;
        });
        outcome.unwrap();
    }
}
