//! Bytes that are no frames, or too large, or never end.

use std::time::Duration;

use blockmount::ErrorKind;
use blockmount::testing::FakeVm;
use blockmount_bridge::{Deadlines, FrameError, GuestServer, MAX_FRAME, ServeError, serve};
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, duplex};
use tokio::time::{Instant, timeout};

use crate::common::{LONG, dial, frame, header, host_and_peer, mount, unplug, vm_with_disks};

async fn served(bytes: &[u8]) -> Result<(), ServeError> {
    let (mut host_end, guest_end) = duplex(1 << 10);
    host_end.write_all(bytes).await.unwrap();
    let server = GuestServer::new(FakeVm::new());
    let ended = timeout(LONG, server.serve(guest_end)).await.unwrap();
    dial(&server).hello().await;
    ended
}

#[tokio::test]
async fn an_undersize_frame_ends_its_connection_and_nothing_else() {
    for size in [0, 1, 11] {
        let ended = served(&header(size, 0)).await;
        let Err(ServeError::Frame(FrameError::Undersize { size: said })) = ended else {
            panic!("{ended:?}");
        };
        assert_eq!(said, u64::from(size));
    }
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let (id, _) = peer.receive().await;
        peer.send_raw(&header(3, id)).await;
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
async fn what_is_far_beyond_the_limit_is_no_frame() {
    let ended = served(&header(u32::MAX, 0)).await;
    assert!(
        matches!(ended, Err(ServeError::Frame(FrameError::Oversize { .. }))),
        "{ended:?}"
    );
}

#[tokio::test]
async fn an_oversize_answer_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (large, other, ()) = tokio::join!(
        connection.call(unplug(0)),
        connection.call(unplug(1)),
        async {
            let ((first, _), (second, _)) = (peer.receive().await, peer.receive().await);
            let size = MAX_FRAME + 1;
            peer.send_raw(&header(size as u32, first)).await;
            peer.send_raw(&vec![b' '; size - 12]).await;
            peer.succeed(second).await;
        }
    );
    let large = large.unwrap_err();
    assert_eq!(large.kind(), ErrorKind::Uncertain);
    assert!(large.to_string().contains("1 MiB"), "{large}");
    other.unwrap();
}

#[tokio::test]
async fn an_oversize_request_is_refused_and_the_next_is_served() {
    let vm = vm_with_disks(1).await;
    let mut peer = dial(&GuestServer::new(vm.clone()));
    peer.hello().await;
    for size in [MAX_FRAME + 1, 4 << 20] {
        peer.send_raw(&header(size as u32, 7)).await;
        peer.send_raw(&vec![b'x'; size - 12]).await;
        let (id, answer) = peer.receive().await;
        assert_eq!((id, &answer["Error"]["kind"]), (7, &"Invalid".into()));
    }
    assert_eq!(peer.ask(8, &mount(0, "/m")).await, "Ok");
    assert!(vm.device_at("/m").is_some());
}

#[tokio::test]
async fn a_request_over_the_limit_is_not_sent() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let target = format!("/{}", "x".repeat(MAX_FRAME)).into();
    let request = blockmount_bridge::Request::Unmount { target };
    let error = connection.call(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    drop(connection);
    assert!(peer.try_receive().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_never_ends_ends_its_connection() {
    let limit = Duration::from_secs(5);
    let server = GuestServer::with_limits(FakeVm::new(), 4, limit);
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
async fn silence_between_frames_is_no_reason_to_end() {
    let mut peer = dial(&GuestServer::new(FakeVm::new()));
    peer.hello().await;
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    assert_eq!(peer.ask(1, r#"{"Unmount":{"target":"/m"}}"#).await, "Ok");
}

#[tokio::test]
async fn a_stream_that_ends_inside_a_frame_is_truncated() {
    let (mut host_end, guest_end) = duplex(1 << 10);
    host_end.write_all(&header(100, 0)[..9]).await.unwrap();
    drop(host_end);
    let ended = serve(guest_end, FakeVm::new()).await;
    assert!(
        matches!(ended, Err(ServeError::Frame(FrameError::Truncated))),
        "{ended:?}"
    );
}

#[tokio::test]
async fn garbage_in_a_request_is_answered() {
    let mut peer = dial(&GuestServer::new(FakeVm::new()));
    peer.hello().await;
    for body in [
        "",
        "{",
        "null",
        "7",
        "[]",
        "{}",
        r#""Mount""#,
        r#"{"Mount":7}"#,
        r#"{"Mount":{},"Unmount":{}}"#,
        r#"{"Mount":{"locator":"none","target":"/m","options":{}}}"#,
        r#"{"Mount":{"locator":"fake:0","target":"/m","options":{"read_only":true,"flags":["no"]}}}"#,
        "\u{0}",
        &"[".repeat(1_000),
    ] {
        let answer = peer.ask(3, body).await;
        let kind = answer["Error"]["kind"].as_str().unwrap();
        assert!(
            ["Invalid", "Unsuitable"].contains(&kind),
            "{body:?}: {answer}"
        );
    }
    assert_eq!(peer.ask(4, r#"{"Unmount":{"target":"/m"}}"#).await, "Ok");
}

proptest! {
    #[test]
    fn no_bytes_stop_an_agent_or_hang_a_host(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        body in "\\PC{0,80}",
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let server = GuestServer::new(FakeVm::new());
            let mut peer = dial(&server);
            // Neither of these has to be answered, or even taken.
            let _ = peer.0.write_all(&frame(9, body.as_bytes())).await;
            let _ = peer.0.write_all(&bytes).await;
            drop(peer);
            dial(&server).hello().await;

            let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
            let guest = async {
                let (id, _) = peer.receive().await;
                let _ = peer.0.write_all(&bytes).await;
                let _ = peer.0.write_all(&frame(id, body.as_bytes())).await;
                peer.succeed(id).await;
                peer
            };
            let call = connection.call(unplug(0));
            let (outcome, _peer) = tokio::join!(timeout(LONG * 10, call), async { timeout(LONG, guest).await });
            outcome.expect("a call ends by its deadline").ok();
        });
    }
}
