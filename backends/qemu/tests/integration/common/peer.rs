//! A QMP peer that is played by the test.

use blockmount_qemu::qmp::Qmp;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};

/// What QEMU 7.2 says first.
pub const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "#,
    r#""capabilities": ["oob"]}}"#,
);

/// The other end, played by the test.
pub struct Peer(pub BufReader<DuplexStream>);

impl Peer {
    pub async fn command(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        assert!(line.ends_with('\n'), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    pub async fn say(&mut self, line: impl ToString) {
        self.raw(format!("{}\r\n", line.to_string()).as_bytes())
            .await;
    }

    pub async fn raw(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).await.unwrap();
    }

    pub async fn answer(&mut self, command: &Value, answer: Value) {
        self.say(json!({"return": answer, "id": command["id"]}))
            .await;
    }
}

pub async fn connected() -> (Qmp, Peer) {
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
