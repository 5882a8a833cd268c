//! Peers that say nonsense, nothing, or too much: none of them stops the agent or a debug agent.
// A panic in a test is its failure message, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use blockmount::Mounter;
use blockmount_debug_agent::kit::serving::Serving;
use blockmount_debug_agent::kit::{eventually, temp};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

const AGENT: &str = env!("CARGO_BIN_EXE_agent-under-test");
/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(300);

async fn still_serves(agent: &Serving) {
    let guest = timeout(LONG, agent.guest()).await.unwrap();
    guest
        .unmount(Path::new("/run/mounts/nothing"))
        .await
        .unwrap();
}

#[tokio::test]
async fn root_garbage_ends_a_connection_and_nothing_else() {
    let agent = Serving::agent(AGENT, temp());
    let huge = [1, 11, 16, 16, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0];
    for garbage in [
        &[0; 16][..],
        &huge,
        &[0xff; 4096],
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut stream = agent.connect().await;
        stream.write_all(garbage).await.unwrap();
        let mut answer = Vec::new();
        let ended = timeout(LONG, stream.read_to_end(&mut answer)).await;
        // An end or a reset, which is up to whether all of it was read.
        assert!(ended.is_ok(), "{garbage:?} keeps the connection");
        still_serves(&agent).await;
    }
}

#[tokio::test]
async fn root_requests_that_make_no_sense_are_answered_on_the_same_connection() {
    let agent = Serving::agent(AGENT, temp());
    let mut stream = agent.connect().await;
    let mut ask = async |body: &[u8]| {
        let size = u32::try_from(12 + body.len()).unwrap();
        let frame = [&size.to_le_bytes()[..], &9_u64.to_le_bytes(), body].concat();
        stream.write_all(&frame).await.unwrap();
        let mut header = [0; 12];
        timeout(LONG, stream.read_exact(&mut header))
            .await
            .unwrap()
            .unwrap();
        let size = u32::from_le_bytes(header[..4].try_into().unwrap());
        let mut body = vec![0; size as usize - 12];
        stream.read_exact(&mut body).await.unwrap();
        serde_json::from_slice::<serde_json::Value>(&body).unwrap()
    };
    let unmount = br#"{"Unmount":{"target":"/run/mounts/nothing"}}"#;
    assert_eq!(ask(unmount).await, "HelloFirst", "before the hello");
    let hello = br#"{"Hello":{"min":1,"max":1,"software":"a test"}}"#;
    assert_eq!(ask(hello).await["Chosen"]["version"], 1);
    for body in [
        &b""[..],
        b"{",
        b"null",
        br#"{"Mount":{"target":"/run/mounts/nothing"}}"#,
        br#"{"Fly":{"target":"/run/mounts/nothing"}}"#,
        b"\xff\xfe",
    ] {
        let answer = ask(body).await;
        assert!(answer["Error"]["kind"].is_string(), "{body:?}: {answer}");
    }
    assert_eq!(ask(unmount).await, "Ok");
    still_serves(&agent).await;
}

#[tokio::test]
async fn root_many_connections_come_and_go_and_no_descriptor_is_left() {
    let agent = Serving::agent(AGENT, temp());
    let open = || {
        fs::read_dir(format!("/proc/{}/fd", agent.pid()))
            .unwrap()
            .count()
    };
    still_serves(&agent).await;
    let before = open();
    for _ in 0..10 {
        let mut streams = Vec::new();
        for _ in 0..50 {
            streams.push(agent.connect().await);
        }
        // One in the middle speaks, while the others are silent.
        still_serves(&agent).await;
    }
    still_serves(&agent).await;
    eventually("closing what has ended", || open() <= before);
}

#[tokio::test]
async fn root_more_connections_than_are_served_at_once_wait_for_their_turn() {
    let agent = Serving::agent(AGENT, temp());
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(agent.connect().await);
    }
    let waiting = timeout(Duration::from_millis(300), agent.guest()).await;
    assert!(waiting.is_err(), "80 are more than are served at once");
    silent.truncate(60);
    still_serves(&agent).await;
}

#[tokio::test]
async fn root_a_signal_ends_an_agent_that_has_connections() {
    let agent = Serving::agent(AGENT, temp());
    let mut silent = agent.connect().await;
    let mut begun = agent.connect().await;
    begun.write_all(&[1, 11, 16]).await.unwrap();
    let _host = agent.guest().await;
    let ending = std::time::Instant::now();
    let (answer, dir) = agent.end(Signal::TERM);
    answer.says(0, &[]);
    assert!(
        ending.elapsed() < Duration::from_secs(10),
        "silent peers are not waited for"
    );
    assert!(!dir.path().join("socket").exists());
    assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
}
