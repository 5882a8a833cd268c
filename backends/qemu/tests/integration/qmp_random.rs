//! Random QMP peers.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use std::time::Duration;

use crate::common::peer::{Peer, connected};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

const SECOND: Duration = Duration::from_secs(1);

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
