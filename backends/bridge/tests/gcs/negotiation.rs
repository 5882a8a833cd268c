//! What comes before, beside and instead of the negotiation.

use blockmount::ErrorKind;
use blockmount_bridge::Deadlines;
use blockmount_bridge::gcs::Hresult;
use blockmount_bridge::gcs::messages::Capabilities;
use blockmount_bridge::gcs::wire::MessageType;
use tokio::io::duplex;

use crate::harness::{ScsiVm, dial, host_and_peer, unplug, vm_with_disks};
use crate::wire::{GuestConnection, GuestServer, NULL, Peer, add_disk, settings, windows};

#[tokio::test]
async fn b6_nothing_is_done_before_the_negotiation() {
    let vm = vm_with_disks(1).await;
    let server = GuestServer::new(vm.clone());
    let mut peer = dial(&server);
    let early = peer.modify(0, add_disk("/m", 0)).await;
    assert_eq!(early.result(), Hresult::NOT_IMPLEMENTED.bits());
    assert_eq!(early.body["ActivityId"], NULL);
    let said = "bridge: function not supported, header type: 269486593";
    assert_eq!(early.body["ErrorMessage"], said);
    assert_eq!(vm.device_at("/m"), None);

    // Pipelined: what is read after the negotiation is done, in whatever order the tasks run.
    let negotiation = r#"{"MinimumVersion":4,"MaximumVersion":4}"#;
    peer.send(1, &settings(&add_disk("/before", 0))).await;
    peer.send_as(MessageType::NEGOTIATE, 2, negotiation).await;
    peer.send(3, &settings(&add_disk("/after", 0))).await;
    let before = peer.answer(MessageType::MODIFY_SETTINGS, 1).await;
    assert_eq!(before.result(), Hresult::NOT_IMPLEMENTED.bits());
    assert_eq!(
        peer.answer(MessageType::NEGOTIATE, 2).await.body["Version"],
        4
    );
    assert_eq!(
        peer.answer(MessageType::MODIFY_SETTINGS, 3).await.body["Result"],
        0
    );
    assert!(vm.device_at("/after").is_some() && vm.device_at("/before").is_none());

    // Anew on each connection.
    let refused = dial(&server).modify(0, add_disk("/m", 0)).await;
    assert_eq!(refused.result(), Hresult::NOT_IMPLEMENTED.bits());
}

#[tokio::test]
async fn a_second_negotiation_is_refused_and_changes_nothing() {
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    peer.hello().await;
    let again = peer
        .ask_as(
            MessageType::NEGOTIATE,
            1,
            r#"{"MinimumVersion":4,"MaximumVersion":4}"#,
        )
        .await;
    assert_eq!(again.result(), Hresult::NOT_IMPLEMENTED.bits());
    let request =
        serde_json::json!({"RequestType": "Remove", "ResourceType": "SCSIDevice", "Settings": {}});
    assert_eq!(peer.modify(2, request).await.body["Result"], 0);
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
        let mut peer = dial(&GuestServer::new(ScsiVm::default()));
        let body = format!(r#"{{"minimumversion":{lowest},"maximumversion":{highest}}}"#);
        let answer = peer.ask_as(MessageType::NEGOTIATE, 0, &body).await;
        if agreed {
            assert_eq!(
                (&answer.body["Result"], &answer.body["Version"]),
                (&0.into(), &4.into())
            );
            assert_eq!(answer.body["Capabilities"]["RuntimeOsType"], "Linux");
        } else {
            assert_eq!(
                answer.result(),
                Hresult::UNSUPPORTED_PROTOCOL_VERSION.bits()
            );
            // A host that has learnt may try again.
            peer.hello().await;
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
            peer.reply(&request, answer).await;
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
        peer.agree_with(capabilities).await;
        let create = peer.receive().await;
        assert_eq!((create.message, create.id), (MessageType::CREATE, 1));
        assert_eq!(
            create.body["ContainerConfig"],
            r#"{"SystemType":"Container","TimeZoneInformation":null}"#
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
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    peer.hello().await;
    for bits in [
        0x1010_0501,
        0x1010_ff01,
        0x1030_0101,
        0x1020_0101,
        0x0,
        0x4010_0101,
    ] {
        let message = MessageType::from_bits(bits);
        let answer = peer.ask_as(message, 5, "{}").await;
        assert_eq!(
            answer.result(),
            Hresult::NOT_IMPLEMENTED.bits(),
            "{message}"
        );
    }
    for bits in [0x2010_0a01, 0x3010_0101] {
        peer.send_as(MessageType::from_bits(bits), 6, "{}").await;
    }
    // The next answer is that to the next request.
    peer.ask_as(MessageType::DUMP_STACKS, 7, "no JSON").await;
}

#[tokio::test]
async fn ids_count_from_zero() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    for id in 1..4 {
        let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
            let request = peer.receive().await;
            assert_eq!(request.id, id);
            peer.succeed(&request).await;
        });
        outcome.unwrap();
    }
}
