//! What a QMP peer may do wrong, and what that does to its callers.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::time::Duration;

use blockmount::ErrorKind;
use blockmount_qemu::qmp::{Deadlines, MAX_COMMAND, MAX_LINE, NONE, Qmp, QmpError, Version};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

const SECOND: Duration = Duration::from_secs(1);

/// What QEMU 7.2 says first.
const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;

/// The other end, played by the test.
struct Peer(BufReader<DuplexStream>);

impl Peer {
    async fn command(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        assert!(line.ends_with('\n'), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    async fn say(&mut self, line: impl ToString) {
        self.raw(format!("{}\r\n", line.to_string()).as_bytes())
            .await;
    }

    async fn raw(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).await.unwrap();
    }

    async fn answer(&mut self, command: &Value, answer: Value) {
        self.say(json!({"return": answer, "id": command["id"]}))
            .await;
    }
}

async fn connected() -> (Qmp, Peer) {
    let (ours, theirs) = duplex(4 << 10);
    let mut peer = Peer(BufReader::new(theirs));
    let (qmp, ()) = tokio::join!(Qmp::connect(ours), async {
        peer.say(GREETING).await;
        let command = peer.command().await;
        assert_eq!(command["execute"], "qmp_capabilities");
        assert_eq!(command.get("arguments"), None);
        peer.answer(&command, json!({})).await;
    });
    (qmp.unwrap(), peer)
}

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
            said.starts_with("QEMU refuses stop: no xxx") && said.ends_with(&format!("({class})")),
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

/// What a peer does with each command it reads.
#[derive(Debug, Clone)]
enum Trick {
    Answer,
    Refuse,
    Twice,
    Never,
    SomebodyElse,
    Garbage(Vec<u8>),
    Event(String),
    Close,
}

fn trick() -> impl Strategy<Value = Trick> {
    prop_oneof![
        4 => Just(Trick::Answer),
        2 => Just(Trick::Refuse),
        1 => Just(Trick::Twice),
        1 => Just(Trick::Never),
        1 => Just(Trick::SomebodyElse),
        2 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Trick::Garbage),
        1 => "[A-Z_]{0,10}".prop_map(Trick::Event),
        1 => Just(Trick::Close),
    ]
}

async fn play(mut peer: Peer, tricks: Vec<Trick>, piece: usize) {
    for trick in tricks {
        let mut line = String::new();
        if peer.0.read_line(&mut line).await.unwrap() == 0 {
            return;
        }
        let command: Value = serde_json::from_str(&line).unwrap();
        let id = &command["id"];
        let good = format!("{}\n", json!({"return": command["arguments"], "id": id}));
        let said = match trick {
            Trick::Answer => good.into_bytes(),
            Trick::Refuse => {
                let error = json!({"class": "GenericError", "desc": "no"});
                format!("{}\n", json!({"error": error, "id": id})).into_bytes()
            }
            Trick::Twice => [good.clone(), good].concat().into_bytes(),
            Trick::Never => Vec::new(),
            Trick::SomebodyElse => format!("{}\n", json!({"return": {}, "id": 1_000_000})).into(),
            Trick::Garbage(bytes) => [&bytes[..], b"\n", good.as_bytes()].concat(),
            Trick::Event(name) => [format!("{}\n", json!({ "event": name })), good]
                .concat()
                .into(),
            Trick::Close => return,
        };
        for piece in said.chunks(piece) {
            if peer.0.get_mut().write_all(piece).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
    // Stays, and says nothing more.
    std::future::pending().await
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a peer does, each call ends by its deadline, and an answer is that to its own question.
    #[test]
    fn any_peer_leaves_each_call_its_own_answer(
        tricks in prop::collection::vec(trick(), 0..30),
        piece in 1_usize..40,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (qmp, peer) = connected().await;
            let player = tokio::spawn(play(peer, tricks, piece));
            let mut calls = JoinSet::new();
            for n in 0..30_u64 {
                let qmp = qmp.clone();
                let argument = json!({"n": n});
                calls.spawn(async move { (n, qmp.execute_within("echo", argument, SECOND).await) });
            }
            let begun = Instant::now();
            for (n, outcome) in timeout(10 * SECOND, calls.join_all()).await.unwrap() {
                if let Ok(answer) = outcome {
                    assert_eq!(answer["n"], n);
                }
            }
            assert!(begun.elapsed() <= SECOND);
            player.abort();
        });
    }
}
