//! A monitor between our client and QEMU that loses what it is told to lose.

use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex, split};
use tokio::net::UnixStream;

/// What is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The next answer to this command, which QEMU does.
    Answer(&'static str),
    /// The next event of this name.
    Event(&'static str),
    /// Every answer, from the one to this command on.
    AnswersFrom(&'static str),
}

/// Which loss is next; none after it came.
pub type Next = Arc<Mutex<Option<Loss>>>;

/// Passes everything on to QEMU, and back what is not lost.
pub fn lossy(qemu: UnixStream) -> (DuplexStream, Next) {
    let (ours, theirs) = duplex(64 << 10);
    let next = Next::default();
    let (from_client, mut to_client) = split(theirs);
    let (from_qemu, mut to_qemu) = split(qemu);
    let commands = Arc::new(Mutex::new(std::collections::HashMap::new()));
    let asked = commands.clone();
    tokio::spawn(async move {
        let mut lines = BufReader::new(from_client).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let command: Value = serde_json::from_str(&line).unwrap();
            let name = command["execute"].as_str().unwrap().to_owned();
            asked.lock().unwrap().insert(command["id"].as_u64(), name);
            let line = format!("{line}\n");
            if to_qemu.write_all(line.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    let losses = next.clone();
    tokio::spawn(async move {
        let mut lines = BufReader::new(from_qemu).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let said: Value = serde_json::from_str(&line).unwrap();
            let answered = commands.lock().unwrap().remove(&said["id"].as_u64());
            if is_lost(&mut losses.lock().unwrap(), &said, answered.as_deref()) {
                continue;
            }
            let line = format!("{line}\n");
            if to_client.write_all(line.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    (ours, next)
}

fn is_lost(next: &mut Option<Loss>, said: &Value, answered: Option<&str>) -> bool {
    match *next {
        Some(Loss::AnswersFrom("")) => answered.is_some(),
        Some(Loss::AnswersFrom(command)) if answered == Some(command) => {
            *next = Some(Loss::AnswersFrom(""));
            true
        }
        Some(Loss::Answer(command)) if answered == Some(command) => next.take().is_some(),
        Some(Loss::Event(name)) if said["event"] == name => next.take().is_some(),
        _ => false,
    }
}
