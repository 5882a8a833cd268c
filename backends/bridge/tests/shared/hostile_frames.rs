//! Bytes that are no frames, or too large, or never end.

use std::time::Duration;

use blockmount::{ErrorKind, Overlay};
use blockmount_bridge::{Deadlines, FrameError, Request, ServeError};
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, duplex};
use tokio::time::{Instant, timeout};

use crate::harness::{LONG, ScsiVm, dial, host_and_peer, unplug};
use crate::wire::{
    GARBAGE, GuestServer, HEADER, LIMIT, MAX_FRAME, answer_header, frame, header, written,
};

fn unmount() -> String {
    written(&Request::Unmount {
        target: "/m".into(),
    })
}

async fn served(bytes: &[u8]) -> Result<(), ServeError> {
    let (mut host_end, guest_end) = duplex(1 << 10);
    host_end.write_all(bytes).await.unwrap();
    let server = GuestServer::new(ScsiVm::default());
    let ended = timeout(LONG, server.serve(guest_end)).await.unwrap();
    dial(&server).hello().await;
    ended
}

#[tokio::test]
async fn b1_an_undersize_frame_ends_its_connection_and_nothing_else() {
    for size in [0, 1, HEADER - 1] {
        let ended = served(&header(size, 0)).await;
        let Err(ServeError::Frame(FrameError::Undersize { size: said })) = ended else {
            panic!("{ended:?}");
        };
        assert_eq!(said, size as u64);
    }
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let request = peer.receive().await;
        peer.send_raw(&answer_header(3, &request)).await;
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    let later = connection.call(unplug(0)).await.unwrap_err();
    assert_eq!(later.kind(), ErrorKind::Uncertain);
}

#[tokio::test]
async fn sixteen_zeros_end_a_conversation_on_a_line_without_ends() {
    let ended = served(&[0; 16]).await;
    assert!(
        matches!(
            ended,
            Err(ServeError::Frame(FrameError::Undersize { size: 0 }))
        ),
        "{ended:?}"
    );
}

#[tokio::test]
async fn b8_what_is_far_beyond_the_limit_is_no_frame() {
    let ended = served(&header(u32::MAX as usize, 0)).await;
    assert!(
        matches!(ended, Err(ServeError::Frame(FrameError::Oversize { .. }))),
        "{ended:?}"
    );
}

#[tokio::test]
async fn b2_an_oversize_answer_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (large, other, ()) = tokio::join!(
        connection.call(unplug(0)),
        connection.call(unplug(1)),
        async {
            let (first, second) = (peer.receive().await, peer.receive().await);
            let size = MAX_FRAME + 1;
            peer.send_raw(&answer_header(size, &first)).await;
            peer.send_raw(&vec![b' '; size - HEADER]).await;
            peer.succeed(&second).await;
        }
    );
    let large = large.unwrap_err();
    assert_eq!(large.kind(), ErrorKind::Uncertain);
    assert!(large.to_string().contains(LIMIT), "{large}");
    other.unwrap();
}

#[tokio::test]
async fn b2_an_oversize_request_is_refused_and_the_next_is_served() {
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    peer.hello().await;
    for size in [MAX_FRAME + 1, 4 << 20] {
        peer.send_raw(&header(size, 7)).await;
        peer.send_raw(&vec![b'x'; size - HEADER]).await;
        let answer = peer.receive().await;
        assert!(answer.id == 7 && answer.is_refused(), "{answer:?}");
        assert!(format!("{answer:?}").contains(LIMIT), "{answer:?}");
    }
    assert!(peer.ask(8, &unmount()).await.is_ok());
}

#[tokio::test]
async fn a_request_over_the_limit_is_not_sent() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let layer = format!("/{}", "x".repeat(4_000));
    let layers = std::iter::repeat_n(layer, MAX_FRAME / 4_000 + 1);
    let request = Request::Combine(Overlay::new(layers, "/t"));
    let error = connection.call(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    drop(connection);
    assert!(peer.try_receive().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn b8_a_frame_that_never_ends_ends_its_connection() {
    let limit = Duration::from_secs(5);
    let server = GuestServer::with_limits(ScsiVm::default(), 4, limit);
    let (mut host_end, guest_end) = duplex(1 << 10);
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve(guest_end).await }
    });
    // A byte now and then does not help: the frame has a deadline, not the byte.
    let begun = Instant::now();
    for byte in header(100, 0) {
        if host_end.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(begun.elapsed() < limit * 2, "{:?}", begun.elapsed());
    let ended = timeout(LONG, serving).await.unwrap().unwrap();
    assert!(
        matches!(ended, Err(ServeError::Frame(FrameError::Stalled(said))) if said == limit),
        "{ended:?}"
    );
    dial(&server).hello().await;
}

#[tokio::test(start_paused = true)]
async fn b8_silence_between_frames_is_no_reason_to_end() {
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    peer.hello().await;
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    assert!(peer.ask(1, &unmount()).await.is_ok());
}

#[tokio::test]
async fn a_stream_that_ends_inside_a_frame_is_truncated() {
    let (mut host_end, guest_end) = duplex(1 << 10);
    host_end.write_all(&header(100, 0)[..9]).await.unwrap();
    drop(host_end);
    let ended = GuestServer::new(ScsiVm::default()).serve(guest_end).await;
    assert!(
        matches!(ended, Err(ServeError::Frame(FrameError::Truncated))),
        "{ended:?}"
    );
}

#[tokio::test]
async fn garbage_in_a_request_is_answered() {
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    peer.hello().await;
    let deep = "[".repeat(1_000);
    let bodies = ["", "{", "null", "7", "[]", "\u{0}", &deep];
    for body in bodies.iter().chain(GARBAGE) {
        let answer = peer.ask(3, body).await;
        assert!(answer.is_refused(), "{body:?}: {answer:?}");
    }
    assert!(peer.ask(4, &unmount()).await.is_ok());
}

proptest! {
    #[test]
    fn no_bytes_stop_an_agent_or_hang_a_host(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        body in "\\PC{0,80}",
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let server = GuestServer::new(ScsiVm::default());
            let mut peer = dial(&server);
            // Neither of these has to be answered, or even taken.
            let _ = peer.stream.write_all(&frame(9, &body)).await;
            let _ = peer.stream.write_all(&bytes).await;
            drop(peer);
            dial(&server).hello().await;

            let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
            let guest = async {
                let request = peer.receive().await;
                let _ = peer.stream.write_all(&bytes).await;
                let answer = answer_header(HEADER + body.len(), &request);
                let _ = peer.stream.write_all(&answer).await;
                let _ = peer.stream.write_all(body.as_bytes()).await;
                peer.succeed(&request).await;
                peer
            };
            let call = connection.call(unplug(0));
            let (outcome, _peer) = tokio::join!(timeout(LONG * 10, call), async { timeout(LONG, guest).await });
            outcome.expect("a call ends by its deadline").ok();
        });
    }
}
