//! QMP peers that are late, and callers that are.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::time::Duration;

use crate::common::peer::connected;
use blockmount::ErrorKind;
use blockmount_qemu::qmp::{Deadlines, NONE, QmpError};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn g11_waits_for_qemu_are_bounded() {
    let (qmp, mut peer) = connected().await;
    let begun = Instant::now();
    let error = qmp.execute("device_del", NONE).await.unwrap_err();
    assert_eq!(begun.elapsed(), Deadlines::default().call);
    assert_eq!(error.kind(), ErrorKind::Uncertain);
    assert_eq!(
        error.to_string(),
        "QEMU has not answered device_del within 10s"
    );

    // The answer comes after all: it is nobody's, least of all the next call's.
    let late = peer.command().await;
    peer.answer(&late, json!("late")).await;
    let (outcome, ()) = tokio::join!(qmp.execute("next", NONE), async {
        let next = peer.command().await;
        assert_ne!(next["id"], late["id"]);
        peer.answer(&late, json!("late")).await;
        peer.answer(&next, json!("next")).await;
    });
    assert_eq!(outcome.unwrap(), "next");

    let error = qmp.events("STOP").next(SECOND).await.unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
    assert_eq!(begun.elapsed(), Deadlines::default().call + SECOND);
    // No deadline is so long that its end cannot be told.
    let endless = qmp.events("STOP").next(Duration::MAX).await;
    assert!(matches!(endless, Err(QmpError::TimedOut { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stops_reading_blocks_no_call_beyond_its_deadline() {
    let (qmp, mut peer) = connected().await;
    let begun = Instant::now();
    let mut calls = JoinSet::new();
    for _ in 0..1_000 {
        let qmp = qmp.clone();
        let argument = "x".repeat(1_000);
        calls.spawn(async move {
            let asked = qmp.execute_within("noop", json!([argument]), 2 * SECOND);
            asked.await.unwrap_err().kind()
        });
    }
    let kinds = calls.join_all().await;
    assert_eq!(begun.elapsed(), 2 * SECOND);
    // A few fit in the stream and may have been seen; the rest were never sent, and that is certain.
    let count = |wanted| kinds.iter().filter(|kind| **kind == wanted).count();
    let sent = count(ErrorKind::Uncertain);
    assert!((1..20).contains(&sent), "{sent}");
    assert_eq!(count(ErrorKind::Busy), 1_000 - sent);

    // It reads again: it sees what was sent, and nothing that was given up.
    let (outcome, seen) = tokio::join!(qmp.execute("last", NONE), async {
        let mut seen = 0;
        loop {
            let command = peer.command().await;
            peer.answer(&command, json!({})).await;
            if command["execute"] == "last" {
                return seen;
            }
            seen += 1;
        }
    });
    outcome.unwrap();
    assert_eq!(seen, sent);
}

#[tokio::test(start_paused = true)]
async fn g11_a_command_is_not_late_while_qemu_answers_those_before_it() {
    let (qmp, mut peer) = connected().await;
    let begun = Instant::now();
    let mut calls = JoinSet::new();
    for _ in 0..64 {
        let qmp = qmp.clone();
        calls.spawn(async move { qmp.execute_within("device_add", NONE, 2 * SECOND).await });
    }
    for _ in 0..32 {
        let command = peer.command().await;
        tokio::time::sleep(SECOND).await;
        peer.answer(&command, json!({})).await;
    }
    // From here on QEMU hangs: the others are given up one deadline after its last answer.
    let answers = calls.join_all().await;
    assert_eq!(begun.elapsed(), 32 * SECOND + 2 * SECOND);
    let done = answers.iter().filter(|answer| answer.is_ok()).count();
    assert_eq!(done, 32);
}

#[tokio::test(start_paused = true)]
async fn g11_a_command_that_is_never_answered_ends_though_later_ones_are_answered() {
    let (qmp, mut peer) = connected().await;
    let begun = Instant::now();
    let ahead = qmp.execute_within("ahead", NONE, 2 * SECOND);
    let forgotten = async {
        let forgotten = qmp.execute_within("forgotten", NONE, 2 * SECOND).await;
        (forgotten.unwrap_err(), begun.elapsed())
    };
    let (ahead, (error, took), ()) = tokio::join!(ahead, forgotten, async {
        let first = peer.command().await;
        peer.command().await;
        peer.answer(&first, json!({})).await;
        for _ in 0..10 {
            let (later, ()) = tokio::join!(qmp.execute_within("later", NONE, 2 * SECOND), async {
                let later = peer.command().await;
                tokio::time::sleep(SECOND).await;
                peer.answer(&later, json!({})).await;
            });
            later.unwrap();
        }
    });
    ahead.unwrap();
    assert!(
        matches!(error, QmpError::TimedOut { sent: true, .. }),
        "{error}"
    );
    // One command was ahead of it, so its deadline began again once.
    assert!((2 * SECOND..=4 * SECOND).contains(&took), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn nobody_can_answer_what_was_not_asked() {
    let (qmp, mut peer) = connected().await;
    let long = json!(["x".repeat(8 << 10)]);
    let (filling, queued, ()) = tokio::join!(
        qmp.execute_within("filling", long, SECOND),
        qmp.execute_within("queued", NONE, SECOND),
        async {
            // The numbers are guessed; the second command waits for the first to be read.
            for id in 0..10 {
                peer.say(json!({"return": "guessed", "id": id + 2})).await;
            }
        }
    );
    assert!(matches!(
        filling,
        Err(QmpError::TimedOut { sent: true, .. })
    ));
    assert!(matches!(
        queued,
        Err(QmpError::TimedOut { sent: false, .. })
    ));
}

#[tokio::test]
async fn a_dropped_call_is_forgotten() {
    let (qmp, mut peer) = connected().await;
    let mut call = Box::pin(qmp.execute("dropped", NONE));
    let dropped = tokio::select! {
        _ = &mut call => panic!("nobody has answered"),
        command = peer.command() => command,
    };
    drop(call);
    peer.answer(&dropped, json!("nobody's")).await;
    let (outcome, ()) = tokio::join!(qmp.execute("next", NONE), async {
        let next = peer.command().await;
        peer.answer(&next, json!("next")).await;
    });
    assert_eq!(outcome.unwrap(), "next");
}

#[tokio::test(start_paused = true)]
async fn a_slow_listener_learns_that_it_is_late_and_nobody_else_does() {
    let (qmp, mut peer) = connected().await;
    let (mut quick, mut slow) = (qmp.events("TICK"), qmp.events("TICK"));
    let mut other = qmp.events("TOCK");
    let deaf = tokio::spawn({
        let qmp = qmp.clone();
        async move { qmp.execute("ask", NONE).await }
    });
    let command = peer.command().await;
    for n in 0..1_000 {
        peer.say(json!({"event": "TICK", "data": {"n": n}})).await;
        assert_eq!(quick.next(SECOND).await.unwrap().data["n"], n);
    }
    peer.say(json!({"event": "TOCK"})).await;
    peer.answer(&command, json!({})).await;
    deaf.await.unwrap().unwrap();
    other.next(SECOND).await.unwrap();
    let missed = match slow.next(SECOND).await.unwrap_err() {
        QmpError::Lagged { missed, .. } => missed,
        error => panic!("{error}"),
    };
    assert_eq!(slow.next(SECOND).await.unwrap().data["n"], missed);
    let found = slow
        .find(SECOND, |event| event.data["n"] == 999)
        .await
        .unwrap();
    assert_eq!(found.data["n"], 999);
    assert_eq!(missed, 1_000 - 256);
}
