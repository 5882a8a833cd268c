//! Bytes that are no frames, or too large, or never end.

use crate::common;

use std::time::Duration;

use blockmount::ErrorKind;
use blockmount::testing::FakeVm;
use blockmount_bridge::gcs::messages::{ModificationRequest, Resource, ScsiDevice};
use blockmount_bridge::gcs::wire::{
    Decoded, Decoder, Frame, FrameError, HEADER_LEN, MAX_FRAME, MessageType,
};
use blockmount_bridge::gcs::{Deadlines, GuestServer, Hresult, serve};
use common::{LONG, Peer, ScsiVm, add_disk, dial, documented, host_and_peer, result, settings};
use proptest::prelude::*;
use serde_json::json;
use tokio::io::{AsyncWriteExt, duplex};
use tokio::time::{Instant, timeout};

fn header(message: MessageType, size: u32, id: u64) -> Vec<u8> {
    [
        &message.bits().to_le_bytes()[..],
        &size.to_le_bytes(),
        &id.to_le_bytes(),
    ]
    .concat()
}

fn unplug() -> ModificationRequest {
    ModificationRequest::remove(Resource::ScsiDevice(ScsiDevice::default()))
}

#[tokio::test]
async fn b1_an_undersize_frame_ends_its_connection_and_nothing_else() {
    for size in [0, 1, 15] {
        let server = GuestServer::new(ScsiVm(FakeVm::new()));
        let (mut host_end, guest_end) = duplex(1 << 10);
        host_end
            .write_all(&header(MessageType::NEGOTIATE, size, 0))
            .await
            .unwrap();
        let ended = timeout(LONG, server.serve(guest_end)).await.unwrap();
        assert!(
            matches!(ended, Err(FrameError::Undersize { size: said }) if said == u64::from(size)),
            "{ended:?}"
        );
        dial(&server).negotiate().await;
    }

    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (outcome, ()) = tokio::join!(connection.modify(unplug()), async {
        let request = peer.receive().await;
        peer.send_raw(&header(request.message.response(), 3, request.id))
            .await;
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    assert_eq!(
        connection.modify(unplug()).await.unwrap_err().kind(),
        ErrorKind::Uncertain
    );
}

#[tokio::test]
async fn b2_an_oversize_answer_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
    let (large, other, ()) = tokio::join!(
        connection.modify(unplug()),
        connection.modify(unplug()),
        async {
            let (first, second) = (peer.receive().await, peer.receive().await);
            let size = MAX_FRAME + 1;
            peer.send_raw(&header(first.message.response(), size as u32, first.id))
                .await;
            peer.send_raw(&vec![b' '; size - HEADER_LEN]).await;
            peer.succeed(&second).await;
        }
    );
    let large = large.unwrap_err();
    assert_eq!(large.kind(), ErrorKind::Uncertain);
    assert!(large.to_string().contains("64 KiB"), "{large}");
    other.unwrap();
}

#[tokio::test]
async fn b2_an_oversize_request_is_refused_and_the_next_is_served() {
    let vm = ScsiVm(FakeVm::new());
    vm.attach_disks(1).await;
    let server = GuestServer::new(vm.clone());
    let mut peer = dial(&server);
    peer.negotiate().await;
    let message = MessageType::MODIFY_SETTINGS;
    for size in [MAX_FRAME + 1, 1 << 20] {
        peer.send_raw(&header(message, size as u32, 7)).await;
        peer.send_raw(&vec![b'x'; size - HEADER_LEN]).await;
        let answer = peer.answer(message, 7).await;
        assert_eq!(
            result(&answer),
            Hresult::INVALID_ARGUMENT.bits(),
            "{answer}"
        );
    }
    assert_eq!(peer.modify(8, add_disk("/m", 0)).await["Result"], 0);
    assert!(vm.0.device_at("/m").is_some());
}

#[tokio::test]
async fn b2_an_error_of_any_length_fits_in_an_answer() {
    let server = GuestServer::new(ScsiVm(FakeVm::new()));
    let mut peer = dial(&server);
    peer.negotiate().await;
    // Both the activity and the path would be repeated, and each '<' becomes six bytes.
    let path = format!("/{}", "<".repeat(20_000));
    let body =
        json!({"ContainerId": common::NULL, "ActivityId": path, "Request": add_disk(&path, 0)});
    let answer = peer
        .ask(MessageType::MODIFY_SETTINGS, 1, &body.to_string())
        .await;
    assert_ne!(answer["Result"], 0);
}

#[tokio::test(start_paused = true)]
async fn b8_a_frame_that_never_ends_ends_its_connection() {
    let timeout = Duration::from_secs(5);
    let server = GuestServer::with_limits(ScsiVm(FakeVm::new()), 4, timeout);
    let (mut host_end, guest_end) = duplex(1 << 10);
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve(guest_end).await }
    });
    // A byte now and then does not help: the frame has a deadline, not the byte.
    let begun = Instant::now();
    for byte in header(MessageType::NEGOTIATE, 100, 0) {
        if host_end.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(begun.elapsed() < timeout * 2, "{:?}", begun.elapsed());
    let ended = tokio::time::timeout(LONG, serving).await.unwrap().unwrap();
    assert!(
        matches!(ended, Err(FrameError::Stalled(said)) if said == timeout),
        "{ended:?}"
    );
    dial(&server).negotiate().await;
}

#[tokio::test(start_paused = true)]
async fn b8_silence_between_frames_is_no_reason_to_end() {
    let server = GuestServer::new(ScsiVm(FakeVm::new()));
    let mut peer = dial(&server);
    peer.negotiate().await;
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    assert_eq!(
        peer.modify(
            1,
            json!({"RequestType": "Remove", "ResourceType": "SCSIDevice", "Settings": {}})
        )
        .await["Result"],
        0
    );
}

#[tokio::test]
async fn b8_what_is_far_beyond_the_limit_is_no_frame() {
    let (mut host_end, guest_end) = duplex(1 << 10);
    host_end
        .write_all(&header(MessageType::NEGOTIATE, u32::MAX, 0))
        .await
        .unwrap();
    let ended = timeout(LONG, serve(guest_end, ScsiVm(FakeVm::new())))
        .await
        .unwrap();
    assert!(
        matches!(ended, Err(FrameError::Oversize { .. })),
        "{ended:?}"
    );
}

#[tokio::test]
async fn a_stream_that_ends_inside_a_frame_is_truncated() {
    let (mut host_end, guest_end) = duplex(1 << 10);
    host_end
        .write_all(&header(MessageType::NEGOTIATE, 100, 0)[..9])
        .await
        .unwrap();
    drop(host_end);
    let ended = serve(guest_end, ScsiVm(FakeVm::new())).await;
    assert!(matches!(ended, Err(FrameError::Truncated)), "{ended:?}");
}

#[test]
fn a_frame_over_the_limit_is_not_sent() {
    let frame = |length| Frame {
        message: MessageType::NEGOTIATE,
        id: 0,
        payload: vec![b' '; length],
    };
    assert_eq!(
        frame(MAX_FRAME - HEADER_LEN).encode().unwrap().len(),
        MAX_FRAME
    );
    assert!(frame(MAX_FRAME - HEADER_LEN + 1).encode().is_err());
}

/// Everything that a decoder finds, with the bytes pushed in pieces of these lengths.
fn decoded(bytes: &[u8], pieces: &[usize]) -> (Vec<Decoded>, bool) {
    let (mut decoder, mut found, mut rest) = (Decoder::default(), Vec::new(), bytes);
    for length in pieces.iter().cycle() {
        let (piece, after) = rest.split_at((*length).min(rest.len()));
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(Some(item)) => found.push(item),
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
        if after.is_empty() {
            return (found, false);
        }
        rest = after;
    }
    (found, false)
}

fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let frame = (
        any::<u32>(),
        any::<u64>(),
        prop::collection::vec(any::<u8>(), 0..200),
    );
    let frame = frame.prop_map(|(bits, id, payload)| Frame {
        message: MessageType::from_bits(bits),
        id,
        payload,
    });
    prop::collection::vec(frame, 0..8)
}

proptest! {
    #[test]
    fn any_frames_in_any_pieces_are_found(frames in frames(), pieces in prop::collection::vec(1_usize..64, 1..8)) {
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().unwrap()).collect();
        let (found, failed) = decoded(&bytes, &pieces);
        prop_assert!(!failed);
        prop_assert_eq!(found, frames.into_iter().map(Decoded::Frame).collect::<Vec<_>>());
    }

    #[test]
    fn hostile_bytes_mean_the_same_in_any_pieces(
        bytes in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), Just(16), any::<u8>()], 0..2_000),
        pieces in prop::collection::vec(1_usize..300, 1..8),
    ) {
        prop_assert_eq!(decoded(&bytes, &pieces), decoded(&bytes, &[bytes.len().max(1)]));
    }

    #[test]
    fn no_bytes_stop_a_guest_or_hang_a_host(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        body in "\\PC{0,80}",
        bits in prop_oneof![Just(0x1010_0b01_u32), Just(0x1010_0a01), any::<u32>()],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let server = GuestServer::new(ScsiVm(FakeVm::new()));
            let mut peer = dial(&server);
            // Neither of these has to be answered, or even taken.
            let message = MessageType::from_bits(bits);
            let frame = Frame { message, id: 9, payload: body.into_bytes() };
            let _ = peer.stream.write_all(&frame.encode().unwrap()).await;
            let _ = peer.stream.write_all(&bytes).await;
            drop(peer);
            let mut next = dial(&server);
            next.negotiate().await;

            let (connection, mut peer) = host_and_peer(documented(), Deadlines::default()).await;
            let guest = async {
                let request = peer.receive().await;
                let _ = peer.stream.write_all(&bytes).await;
                let _ = peer.stream.write_all(&frame.encode().unwrap()).await;
                peer.succeed(&request).await;
                peer
            };
            let call = connection.modify(unplug());
            let (outcome, _peer) = tokio::join!(timeout(LONG * 10, call), async { timeout(LONG, guest).await });
            outcome.expect("a call ends by its deadline").ok();
        });
    }
}

#[tokio::test]
async fn garbage_in_a_request_is_answered() {
    let server = GuestServer::new(ScsiVm(FakeVm::new()));
    let mut peer: Peer = dial(&server);
    peer.negotiate().await;
    for body in [
        "",
        "{",
        "null",
        "7",
        "[]",
        r#"{"Request":7}"#,
        "\u{0}",
        &"[".repeat(1_000),
    ] {
        let answer = peer.ask(MessageType::MODIFY_SETTINGS, 3, body).await;
        assert_ne!(answer["Result"], 0, "{body:?}: {answer}");
    }
    let body =
        settings(&json!({"ResourceType": "SCSIDevice", "RequestType": "Remove", "Settings": {}}));
    assert_eq!(
        peer.ask(MessageType::MODIFY_SETTINGS, 4, &body).await["Result"],
        0
    );
}
