//! What a QMP peer may do wrong, and what that does to its callers.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::time::Duration;

use crate::common::peer::{GREETING, connected};
use blockmount::ErrorKind;
use blockmount_qemu::qmp::{Deadlines, MAX_COMMAND, MAX_LINE, NONE, Qmp, QmpError, Version};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, duplex};
use tokio::task::JoinSet;
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_connection_knows_who_greeted() {
    let (qmp, _peer) = connected().await;
    let expected = Version {
        major: 7,
        minor: 2,
        micro: 22,
    };
    assert_eq!((qmp.version(), qmp.is_closed()), (expected, false));
    assert_eq!(qmp.version().to_string(), "7.2.22");
}

#[tokio::test(start_paused = true)]
async fn whoever_does_not_greet_as_qemu_does_is_refused_in_time() {
    let first_lines: [&[u8]; 4] = [
        b"\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"{\"return\": {}}\n",
        b"\xff\n",
    ];
    for line in first_lines {
        let (ours, mut theirs) = duplex(1 << 10);
        theirs.write_all(line).await.unwrap();
        let error = Qmp::connect(ours).await.unwrap_err();
        assert!(matches!(error, QmpError::Invalid { .. }), "{error}");
    }

    let (ours, theirs) = duplex(1 << 10);
    drop(theirs);
    let error = Qmp::connect(ours).await.unwrap_err();
    assert!(matches!(error, QmpError::Gone { .. }), "{error}");

    let deadlines = Deadlines {
        greeting: 3 * SECOND,
        ..Deadlines::default()
    };
    for said in ["", GREETING] {
        let (ours, mut theirs) = duplex(1 << 10);
        theirs
            .write_all(format!("{said}\n").trim_start().as_bytes())
            .await
            .unwrap();
        let begun = Instant::now();
        let error = Qmp::connect_with(ours, deadlines).await.unwrap_err();
        assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
        assert_eq!(begun.elapsed(), 3 * SECOND);
    }
}

#[tokio::test]
async fn answers_find_their_callers_in_any_order() {
    let (qmp, mut peer) = connected().await;
    let mut calls = JoinSet::new();
    for n in 0..100 {
        let qmp = qmp.clone();
        calls.spawn(async move { (n, qmp.execute("echo", json!({"n": n})).await.unwrap()) });
    }
    let mut commands = Vec::new();
    for _ in 0..100 {
        commands.push(peer.command().await);
    }
    for command in commands.iter().rev() {
        peer.answer(command, command["arguments"]["n"].clone())
            .await;
    }
    for (n, answer) in calls.join_all().await {
        assert_eq!(answer, n);
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_qemus_words_on_one_line() {
    let (qmp, mut peer) = connected().await;
    let classes = [
        ("CommandNotFound", ErrorKind::Unsuitable),
        ("DeviceNotFound", ErrorKind::NotFound),
        ("GenericError", ErrorKind::Other),
        ("Unheard-of", ErrorKind::Other),
    ];
    for (class, kind) in classes {
        let desc = format!("no\n{}", "x".repeat(5_000));
        let (outcome, ()) = tokio::join!(qmp.execute("stop", NONE), async {
            let id = peer.command().await["id"].clone();
            peer.say(json!({"id": id, "error": {"class": class, "desc": desc}}))
                .await;
        });
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let said = error.to_string();
        assert!(
            said.starts_with("QEMU refuses stop: no\\nxxx")
                && said.ends_with(&format!("({class})")),
            "{said}"
        );
        assert!(said.len() < 1_100 && !said.contains('\n'), "{said}");
    }
}

#[tokio::test(start_paused = true)]
async fn garbage_fails_nobody_but_its_own_call() {
    let (qmp, mut peer) = connected().await;
    let (lost, kept, ()) = tokio::join!(
        qmp.execute_within("lost", NONE, SECOND),
        qmp.execute("kept", NONE),
        async {
            let (lost, kept) = (peer.command().await, peer.command().await);
            for garbage in [
                "",
                "}",
                "null",
                "{\"return\": {}}",
                "{\"return\": {}, \"id\": 18446744073709551615}",
                "{\"event\": 7}",
            ] {
                peer.say(garbage).await;
            }
            // Half of an answer, which swallows the next line.
            peer.raw(b"{\"return\": \xff").await;
            peer.answer(&lost, json!(1)).await;
            peer.answer(&kept, json!(2)).await;
            peer.answer(&kept, json!(3)).await;
        }
    );
    let lost = lost.unwrap_err();
    assert!(
        matches!(lost, QmpError::TimedOut { sent: true, .. }),
        "{lost}"
    );
    assert_eq!(lost.kind(), ErrorKind::Uncertain);
    assert_eq!(kept.unwrap(), json!(2));
    assert!(!qmp.is_closed());
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_another_shape_is_told_as_such() {
    let (qmp, mut peer) = connected().await;
    let (outcome, ()) = tokio::join!(qmp.query::<Vec<String>>("list", NONE), async {
        let command = peer.command().await;
        peer.answer(&command, json!({"not": "a list"})).await;
    });
    let error = outcome.unwrap_err();
    assert!(matches!(error, QmpError::Invalid { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_endless_line_is_skipped_and_the_next_one_read() {
    let (qmp, mut peer) = connected().await;
    let (long, next, ()) = tokio::join!(
        qmp.execute_within("long", NONE, SECOND),
        qmp.execute("next", NONE),
        async {
            let (long, next) = (peer.command().await, peer.command().await);
            peer.raw(b"{\"return\": \"").await;
            for _ in 0..=MAX_LINE >> 16 {
                peer.raw(&[b'x'; 1 << 16]).await;
            }
            peer.raw(format!("\", \"id\": {}}}\n", long["id"]).as_bytes())
                .await;
            peer.answer(&next, json!("read")).await;
        }
    );
    assert!(matches!(long, Err(QmpError::TimedOut { sent: true, .. })));
    assert_eq!(next.unwrap(), "read");
}

#[tokio::test]
async fn what_was_answered_before_the_end_is_answered() {
    for _ in 0..50 {
        let (qmp, mut peer) = connected().await;
        let asking = qmp.clone();
        let first = tokio::spawn(async move { asking.execute("first", NONE).await });
        let command = peer.command().await;
        peer.answer(&command, json!("last words")).await;
        drop(peer);
        // This one finds the stream closed for writing while the answer is still to be read.
        let second = qmp.execute("second", NONE).await.unwrap_err();
        assert_eq!(second.kind(), ErrorKind::Gone, "{second}");
        assert_eq!(first.await.unwrap().unwrap(), "last words");
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_stream_ends_every_call_at_once() {
    let (qmp, mut peer) = connected().await;
    let begun = Instant::now();
    let mut calls = JoinSet::new();
    for _ in 0..50 {
        let qmp = qmp.clone();
        calls.spawn(async move { qmp.execute("noop", NONE).await.unwrap_err() });
    }
    let (mut stop, waiting) = (qmp.events("STOP"), qmp.clone());
    let closed = tokio::spawn(async move { waiting.closed().await });
    for _ in 0..5 {
        peer.command().await;
    }
    peer.say(json!({"event": "STOP"})).await;
    peer.raw(b"{\"return\"").await;
    drop(peer);
    for error in calls.join_all().await {
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    }
    // What had come before the end is still there.
    assert_eq!(stop.next(SECOND).await.unwrap().name, "STOP");
    let error = stop.next(SECOND).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    let later = qmp.execute("noop", NONE).await.unwrap_err();
    assert_eq!(later.kind(), ErrorKind::Gone, "{later}");
    let error = qmp.events("STOP").next(SECOND).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    assert_eq!(&*closed.await.unwrap(), "QEMU has closed the connection");
    assert!(qmp.is_closed());
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn the_stream_is_closed_when_the_last_caller_lets_go() {
    let (qmp, mut peer) = connected().await;
    let clone = qmp.clone();
    let mut events = qmp.events("STOP");
    drop((qmp, clone));
    let mut rest = String::new();
    assert_eq!(peer.0.read_line(&mut rest).await.unwrap(), 0);
    let error = events.next(SECOND).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
}

#[tokio::test]
async fn a_command_over_the_limit_is_not_sent() {
    let (qmp, mut peer) = connected().await;
    let error = qmp
        .execute("big", json!(["x".repeat(MAX_COMMAND)]))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let (outcome, ()) = tokio::join!(qmp.execute("next", NONE), async {
        let command = peer.command().await;
        assert_eq!(command["execute"], "next");
        peer.answer(&command, json!({})).await;
    });
    outcome.unwrap();
}
