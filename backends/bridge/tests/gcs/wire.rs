//! A peer that is written frame by frame.

use blockmount::{Format, MountOptions, MountOptionsBuilder, Overwrite, Verity};
use blockmount_bridge::Deadlines;
use blockmount_bridge::Request;
use blockmount_bridge::gcs::messages::{
    Capabilities, GuestCapabilities, NegotiateResponse, Writer, encode,
};
use blockmount_bridge::gcs::wire::{Decoded, Decoder, Frame as Sent, MessageType};
pub(crate) use blockmount_bridge::gcs::wire::{HEADER_LEN as HEADER, MAX_FRAME};
pub(crate) use blockmount_bridge::gcs::{BridgeGuest, GuestConnection, GuestServer};
use blockmount_bridge::gcs::{GcsHost, Hresult, Translator};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use crate::harness::LONG;

pub(crate) type RedialingChannel<D> = blockmount_bridge::RedialingChannel<D, GcsHost>;

/// The limit of a frame, as an error names it.
pub(crate) const LIMIT: &str = "64 KiB";

/// Why the checks of adoptions are not run.
pub(crate) const NO_ADOPTIONS: Option<&str> =
    Some("GCS has no question for what is mounted: an adoption is answered with `Unknown`");

/// Whether a guest can be asked for a view of a mount.
pub(crate) const HAS_VIEWS: bool = false;

/// Whether a guest can be asked for a filesystem of several devices.
pub(crate) const HAS_FURTHER_DEVICES: bool = false;

/// Answers that cannot be read.
pub(crate) const UNREADABLE: &[&str] = &[r#"{"Result":"no number"}"#, r#"{"Result":99999999999}"#];

/// Bodies of requests that make no sense.
pub(crate) const GARBAGE: &[&str] = &[r#"{"Request":7}"#];

pub(crate) const NULL: &str = "00000000-0000-0000-0000-000000000000";

/// One end of a stream, in the hands of the test.
pub(crate) struct Peer {
    pub(crate) stream: DuplexStream,
    decoder: Decoder,
}

/// A frame that a peer has received.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) message: MessageType,
    pub(crate) id: u64,
    pub(crate) body: Value,
    /// The body as it was written.
    pub(crate) text: String,
}

impl Frame {
    /// Whether it is an answer that says that all is well.
    pub(crate) fn is_ok(&self) -> bool {
        self.body["Result"] == 0
    }

    /// Whether it is an answer that says that the request cannot be done as it is.
    pub(crate) fn is_refused(&self) -> bool {
        let numbers = [
            Hresult::INVALID_ARGUMENT,
            Hresult::INVALID_JSON,
            Hresult::SYSTEM_NOT_FOUND,
        ];
        numbers.map(Hresult::bits).contains(&self.result())
    }

    /// The number of an error.
    pub(crate) fn result(&self) -> u32 {
        self.body["Result"].as_i64().unwrap() as i32 as u32
    }
}

/// The header of a frame of this size, with an id.
pub(crate) fn header_of(message: MessageType, size: usize, id: u64) -> Vec<u8> {
    let size = u32::try_from(size).unwrap();
    [
        &message.bits().to_le_bytes()[..],
        &size.to_le_bytes(),
        &id.to_le_bytes(),
    ]
    .concat()
}

/// The header of a request of this size.
pub(crate) fn header(size: usize, id: u64) -> Vec<u8> {
    header_of(MessageType::MODIFY_SETTINGS, size, id)
}

/// The header of an answer of this size.
pub(crate) fn answer_header(size: usize, request: &Frame) -> Vec<u8> {
    header_of(request.message.response(), size, request.id)
}

/// A request with this body.
pub(crate) fn frame(id: u64, body: &str) -> Vec<u8> {
    [&header(HEADER + body.len(), id)[..], body.as_bytes()].concat()
}

impl Peer {
    pub(crate) fn new(stream: DuplexStream) -> Self {
        Peer {
            stream,
            decoder: Decoder::default(),
        }
    }

    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn send_as(&mut self, message: MessageType, id: u64, body: &str) {
        let payload = body.as_bytes().to_vec();
        let frame = Sent {
            message,
            id,
            payload,
        };
        self.send_raw(&frame.encode().unwrap()).await;
    }

    /// As a host: asks for a change.
    pub(crate) async fn send(&mut self, id: u64, body: &str) {
        self.send_as(MessageType::MODIFY_SETTINGS, id, body).await;
    }

    /// The next frame; none at the end of the stream.
    pub(crate) async fn try_receive(&mut self) -> Option<Frame> {
        loop {
            match self.decoder.next().unwrap() {
                Some(Decoded::Frame(Sent {
                    message,
                    id,
                    payload,
                })) => {
                    let text = String::from_utf8(payload).unwrap();
                    return Some(Frame {
                        message,
                        id,
                        body: serde_json::from_str(&text).unwrap(),
                        text,
                    });
                }
                Some(other) => panic!("{other:?}"),
                None => {}
            }
            let mut bytes = [0; 4096];
            let read = tokio::time::timeout(LONG, self.stream.read(&mut bytes));
            match read.await.expect("the peer says something") {
                Ok(0) | Err(_) => return None,
                Ok(length) => self.decoder.push(&bytes[..length]),
            }
        }
    }

    pub(crate) async fn receive(&mut self) -> Frame {
        self.try_receive().await.expect("the connection lives")
    }

    /// As a guest: answers the negotiation of a host.
    pub(crate) async fn agree(&mut self) {
        self.agree_with(documented()).await;
    }

    pub(crate) async fn agree_with(&mut self, capabilities: Capabilities) {
        let request = self.receive().await;
        assert_eq!(request.message, MessageType::NEGOTIATE);
        let response = NegotiateResponse {
            version: 4,
            capabilities,
            ..NegotiateResponse::default()
        };
        let body = String::from_utf8(encode(&response, Writer::Guest)).unwrap();
        self.reply(&request, &body).await;
    }

    /// As a guest: answers a request with these words.
    pub(crate) async fn reply(&mut self, request: &Frame, body: &str) {
        self.send_as(request.message.response(), request.id, body)
            .await;
    }

    /// As a guest: answers with success.
    pub(crate) async fn succeed(&mut self, request: &Frame) {
        let body = json!({"Result": 0, "ActivityId": NULL}).to_string();
        self.reply(request, &body).await;
    }

    /// As a guest: answers that the device is in use.
    pub(crate) async fn is_busy(&mut self, request: &Frame) {
        self.reply(request, r#"{"Result":-2147024726}"#).await;
    }

    /// As a guest whose agent was started after the connection was made.
    pub(crate) async fn is_new(&mut self, request: &Frame) {
        let said = "bridge: function not supported, header type: 269486593";
        let body = json!({"Result": -2_147_467_263_i64, "ErrorMessage": said}).to_string();
        self.reply(request, &body).await;
    }

    /// As a host: asks, and takes the answer.
    pub(crate) async fn ask_as(&mut self, message: MessageType, id: u64, body: &str) -> Frame {
        self.send_as(message, id, body).await;
        self.answer(message, id).await
    }

    /// As a host: asks for a change, and takes the answer.
    pub(crate) async fn ask(&mut self, id: u64, body: &str) -> Frame {
        self.ask_as(MessageType::MODIFY_SETTINGS, id, body).await
    }

    pub(crate) async fn answer(&mut self, message: MessageType, id: u64) -> Frame {
        let answer = self.receive().await;
        assert_eq!((answer.message, answer.id), (message.response(), id));
        answer
    }

    /// As a host: begins.
    pub(crate) async fn hello(&mut self) {
        let body = r#"{"MinimumVersion":4,"MaximumVersion":4}"#;
        let answer = self.ask_as(MessageType::NEGOTIATE, 0, body).await;
        assert!(answer.is_ok(), "{answer:?}");
    }

    /// As a host: changes a setting.
    pub(crate) async fn modify(&mut self, id: u64, request: Value) -> Frame {
        self.ask(id, &settings(&request)).await
    }
}

/// The body of a ModifySettings for the VM.
pub(crate) fn settings(request: &Value) -> String {
    json!({"ContainerId": NULL, "ActivityId": NULL, "Request": request}).to_string()
}

/// A request, as a host writes it.
pub(crate) fn written(request: &Request) -> String {
    let translator = Translator::default();
    if let Request::Unmount { target } = request {
        let settings = json!({"MountPath": target});
        return self::settings(
            &json!({"RequestType": "Remove", "ResourceType": "MappedVirtualDisk", "Settings": settings}),
        );
    }
    let translated = translator.translate(request, &documented()).unwrap();
    let translated = translated.expect("the guest has to be asked");
    settings(&serde_json::to_value(&translated.requests()[0]).unwrap())
}

pub(crate) fn add_disk(path: &str, lun: u64) -> Value {
    json!({"RequestType": "Add", "ResourceType": "MappedVirtualDisk",
           "Settings": {"MountPath": path, "Lun": lun}})
}

/// A Linux guest that knows only the protocol.
pub(crate) fn documented() -> Capabilities {
    Capabilities {
        runtime_os_type: "Linux".to_owned(),
        guest_defined_capabilities: GuestCapabilities {
            signal_process_supported: true,
            ..GuestCapabilities::default()
        },
        ..Capabilities::default()
    }
}

pub(crate) fn windows() -> Capabilities {
    Capabilities {
        runtime_os_type: "Windows".to_owned(),
        ..Capabilities::default()
    }
}

/// A host, and a guest of some kind that is written by the test.
pub(crate) async fn host_and_peer_of(capabilities: Capabilities) -> (GuestConnection, Peer) {
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let (connection, ()) = tokio::join!(
        GuestConnection::connect_with(host_end, Deadlines::default()),
        peer.agree_with(capabilities)
    );
    (connection.unwrap(), peer)
}

pub(crate) fn options(
    change: impl FnOnce(MountOptionsBuilder) -> MountOptionsBuilder,
) -> MountOptions {
    change(MountOptions::builder()).build().unwrap()
}

pub(crate) fn verity() -> Verity {
    let mut verity = Verity::new("ab".repeat(32), 256);
    verity.salt = "00".into();
    verity.hash_start_block = 257;
    verity
}

pub(crate) fn format(filesystem: &str, overwrite: Overwrite) -> Format {
    let mut format = Format::new(filesystem);
    format.overwrite = overwrite;
    format
}
