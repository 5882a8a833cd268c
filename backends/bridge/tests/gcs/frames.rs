//! The frames of this protocol, in any pieces and of any type.

use blockmount_bridge::Deadlines;
use blockmount_bridge::gcs::wire::{Decoded, Decoder, Frame, HEADER_LEN, MAX_FRAME, MessageType};
use proptest::prelude::*;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use crate::harness::{LONG, ScsiVm, dial, host_and_peer, unplug};
use crate::wire::{GuestServer, NULL, add_disk};

#[tokio::test]
async fn b2_an_error_of_any_length_fits_in_an_answer() {
    let server = GuestServer::new(ScsiVm::default());
    let mut peer = dial(&server);
    peer.hello().await;
    // Both the activity and the path would be repeated, and each '<' becomes six bytes.
    let path = format!("/{}", "<".repeat(20_000));
    let body = json!({"ContainerId": NULL, "ActivityId": path, "Request": add_disk(&path, 0)});
    let answer = peer.ask(1, &body.to_string()).await;
    assert!(!answer.is_ok());
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
            let server = GuestServer::new(ScsiVm::default());
            let mut peer = dial(&server);
            // Neither of these has to be answered, or even taken.
            let message = MessageType::from_bits(bits);
            let frame = Frame { message, id: 9, payload: body.into_bytes() };
            let _ = peer.stream.write_all(&frame.encode().unwrap()).await;
            let _ = peer.stream.write_all(&bytes).await;
            drop(peer);
            let mut next = dial(&server);
            next.hello().await;

            let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
            let guest = async {
                let request = peer.receive().await;
                let _ = peer.stream.write_all(&bytes).await;
                let _ = peer.stream.write_all(&frame.encode().unwrap()).await;
                peer.succeed(&request).await;
                peer
            };
            let call = connection.call(unplug(0));
            let (outcome, _peer) = tokio::join!(timeout(LONG * 10, call), async { timeout(LONG, guest).await });
            outcome.expect("a call ends by its deadline").ok();
        });
    }
}
