//! A peer that is written frame by frame.

use blockmount_bridge::Request;
pub(crate) use blockmount_bridge::{
    BridgeGuest, GuestConnection, GuestServer, MAX_FRAME, RedialingChannel,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

use crate::harness::LONG;

/// The size of a header.
pub(crate) const HEADER: usize = 12;

/// The limit of a frame, as an error names it.
pub(crate) const LIMIT: &str = "1024 KiB";

/// Why the checks of adoptions are not run.
pub(crate) const NO_ADOPTIONS: Option<&str> = None;

/// Whether a guest can be asked for a view of a mount.
pub(crate) const HAS_VIEWS: bool = true;

/// Whether a guest can be asked for a filesystem of several devices.
pub(crate) const HAS_FURTHER_DEVICES: bool = true;

/// Answers that cannot be read.
pub(crate) const UNREADABLE: &[&str] = &[
    r#""Later""#,
    r#"{"Error":{"kind":"Later","message":""}}"#,
    r#"{"Error":{}}"#,
];

/// Bodies of requests that make no sense.
pub(crate) const GARBAGE: &[&str] = &[
    "{}",
    r#""Mount""#,
    r#"{"Mount":7}"#,
    r#"{"Mount":{},"Unmount":{}}"#,
    r#"{"Mount":{"locator":"none","target":"/m","options":{}}}"#,
    r#"{"Mount":{"locator":"scsi:0/0","target":"/m","options":{"read_only":true,"flags":["no"]}}}"#,
];

/// One end of a stream, in the hands of the test.
pub(crate) struct Peer {
    pub(crate) stream: DuplexStream,
}

/// A frame that a peer has received.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) id: u64,
    pub(crate) body: Value,
}

impl Frame {
    /// Whether it is an answer that says that all is well.
    pub(crate) fn is_ok(&self) -> bool {
        self.body == "Ok"
    }

    /// Whether it is an answer that says that the request cannot be done as it is.
    pub(crate) fn is_refused(&self) -> bool {
        let kind = self.body["Error"]["kind"].as_str();
        kind.is_some_and(|kind| ["Invalid", "Unsuitable"].contains(&kind))
    }
}

/// The header of a frame of this size.
pub(crate) fn header(size: usize, id: u64) -> Vec<u8> {
    let size = u32::try_from(size).unwrap();
    [&size.to_le_bytes()[..], &id.to_le_bytes()].concat()
}

/// A frame with this body.
pub(crate) fn frame(id: u64, body: &str) -> Vec<u8> {
    [&header(HEADER + body.len(), id)[..], body.as_bytes()].concat()
}

/// The header of an answer of this size.
pub(crate) fn answer_header(size: usize, request: &Frame) -> Vec<u8> {
    header(size, request.id)
}

impl Peer {
    pub(crate) fn new(stream: DuplexStream) -> Self {
        Peer { stream }
    }

    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn send(&mut self, id: u64, body: &str) {
        self.send_raw(&frame(id, body)).await;
    }

    /// The next frame; none at the end of the stream.
    pub(crate) async fn try_receive(&mut self) -> Option<Frame> {
        let receiving = async {
            let mut header = [0; HEADER];
            self.stream.read_exact(&mut header).await.ok()?;
            let (size, id) = header.split_at(4);
            let size = u32::from_le_bytes(size.try_into().unwrap()) as usize;
            let mut body = vec![0; size - HEADER];
            self.stream.read_exact(&mut body).await.ok()?;
            let id = u64::from_le_bytes(id.try_into().unwrap());
            let body = serde_json::from_slice(&body).unwrap();
            Some(Frame { id, body })
        };
        let received = timeout(LONG, receiving).await;
        received.expect("the peer says something")
    }

    pub(crate) async fn receive(&mut self) -> Frame {
        self.try_receive().await.expect("the connection lives")
    }

    /// As an agent: agrees on a version.
    pub(crate) async fn agree(&mut self) {
        let Frame { id, body } = self.receive().await;
        let max = &body["Hello"]["max"];
        let chosen = json!({"Chosen": {"version": max, "software": "a test"}});
        self.send(id, &chosen.to_string()).await;
    }

    /// As an agent: answers a request with these words.
    pub(crate) async fn reply(&mut self, request: &Frame, body: &str) {
        self.send(request.id, body).await;
    }

    /// As an agent: answers with success.
    pub(crate) async fn succeed(&mut self, request: &Frame) {
        self.reply(request, r#""Ok""#).await;
    }

    /// As an agent: answers that the device is in use.
    pub(crate) async fn is_busy(&mut self, request: &Frame) {
        let busy = r#"{"Error":{"kind":"Busy","message":"in use"}}"#;
        self.reply(request, busy).await;
    }

    /// As an agent that was started after the connection was made.
    pub(crate) async fn is_new(&mut self, request: &Frame) {
        self.reply(request, r#""HelloFirst""#).await;
    }

    /// As a host: asks, and takes the answer.
    pub(crate) async fn ask(&mut self, id: u64, body: &str) -> Frame {
        self.send(id, body).await;
        let answer = self.receive().await;
        assert_eq!(answer.id, id);
        answer
    }

    /// As a host: begins.
    pub(crate) async fn hello(&mut self) {
        let hello = r#"{"Hello":{"min":1,"max":1,"software":"a test"}}"#;
        let answer = self.ask(0, hello).await;
        assert_eq!(answer.body["Chosen"]["version"], 1, "{answer:?}");
    }
}

/// A request, as a host writes it.
pub(crate) fn written(request: &Request) -> String {
    serde_json::to_string(request).unwrap()
}
