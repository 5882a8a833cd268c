//! The bytes of our own protocol: a change of the wire is seen here.

use std::num::NonZeroU32;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockmount::{
    BackendError, BindMount, Binder, DeviceLocator, DeviceRole, ExtraDevice, LayerCombiner,
    MountOptions, Mounter, Overlay, OverlayOptions, Presence, Unplugger, ViewOptions,
};
use blockmount_bridge::{BridgeGuest, Deadlines, GuestConnection, GuestServer, Request};
use serde_json::Value;
use tokio::io::{AsyncReadExt, duplex};

use crate::harness::{ScsiVm, device, dial, host_and_peer};
use crate::wire::{Frame, Peer, frame, written};

const SOFTWARE: &str = concat!("blockmount ", env!("CARGO_PKG_VERSION"));

#[tokio::test]
async fn the_first_exchange_byte_for_byte() {
    let chosen = format!(r#"{{"Chosen":{{"version":3,"software":"{SOFTWARE}"}}}}"#);
    let (host_end, guest_end) = duplex(1 << 10);
    let host = tokio::spawn(GuestConnection::connect(host_end));
    let mut peer = Peer::new(guest_end);
    let Frame { id: 0, body } = peer.receive().await else {
        panic!("the first id is 0");
    };
    let Value::Object(hello) = &body["Hello"] else {
        panic!("{body}");
    };
    let words: Vec<&str> = hello.keys().map(String::as_str).collect();
    assert_eq!(words, ["entropy", "max", "min", "software", "time"]);
    assert_eq!((&hello["min"], &hello["max"]), (&1.into(), &3.into()));
    assert_eq!(hello["software"], SOFTWARE);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let said = Duration::from_nanos(hello["time"].as_u64().unwrap());
    assert!(now.abs_diff(said) < Duration::from_secs(60), "{said:?}");
    assert_eq!(hello["entropy"].as_str().unwrap().len(), 128);
    peer.send(0, &chosen).await;
    assert_eq!(host.await.unwrap().unwrap().agent(), SOFTWARE);

    // A host of version 1 tells no time.
    let hello = format!(r#"{{"Hello":{{"min":1,"max":1,"software":"{SOFTWARE}"}}}}"#);
    let chosen = chosen.replacen("\"version\":3", "\"version\":1", 1);
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    peer.send_raw(&frame(0x0102_0304_0506_0708, &hello)).await;
    let mut bytes = vec![0; 12 + chosen.len()];
    peer.stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, frame(0x0102_0304_0506_0708, &chosen));
    assert_eq!(bytes[4..12], [8, 7, 6, 5, 4, 3, 2, 1]);
}

/// What a call of a contract sends, and what it returns for an answer.
async fn sent(
    answer: &str,
    call: impl AsyncFnOnce(&BridgeGuest) -> Result<(), BackendError>,
) -> (Value, Result<(), BackendError>) {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let guest = BridgeGuest::new(connection);
    let (outcome, body) = tokio::join!(call(&guest), async {
        let Frame { id, body } = peer.receive().await;
        assert_eq!(id, 1, "0 was the hello");
        peer.send(id, answer).await;
        body
    });
    (body, outcome)
}

#[tokio::test]
async fn each_call_has_one_document() {
    let device: DeviceLocator = "any-scheme:7@4096+8192".parse().unwrap();
    let target = Path::new("/run/layer");
    let options = MountOptions::builder()
        .read_only()
        .partition(NonZeroU32::MIN)
        .filesystem("ext4")
        .option("nodev")
        .build()
        .unwrap();
    let (body, outcome) = sent(r#""Ok""#, async |guest| {
        guest.mount(&device, target, &options).await
    })
    .await;
    outcome.unwrap();
    let mount = r#"{"Mount":{"locator":"any-scheme:7@4096+8192","options":{"filesystem":"ext4","options":["nodev","ro"],"partition":1},"target":"/run/layer"}}"#;
    assert_eq!(body.to_string(), mount);
    let (body, _) = sent(r#""Ok""#, async |guest| {
        let options = MountOptions::default();
        guest.mount(&device, target, &options).await
    })
    .await;
    let plain =
        r#"{"Mount":{"locator":"any-scheme:7@4096+8192","options":{},"target":"/run/layer"}}"#;
    assert_eq!(body.to_string(), plain);

    let (body, _) = sent(r#""Ok""#, async |guest| guest.unmount(target).await).await;
    assert_eq!(body.to_string(), r#"{"Unmount":{"target":"/run/layer"}}"#);
    let (body, _) = sent(r#""Ok""#, async |guest| guest.separate(target).await).await;
    assert_eq!(body.to_string(), r#"{"Separate":{"target":"/run/layer"}}"#);
    let (body, _) = sent(r#""Ok""#, async |guest| guest.unplug(&device).await).await;
    let unplug = r#"{"Unplug":{"locator":"any-scheme:7@4096+8192"}}"#;
    assert_eq!(body.to_string(), unplug);
    let overlay = Overlay::new(["/a", "/b"], "/t").with_scratch("/s");
    let (body, _) = sent(r#""Ok""#, async |guest| guest.combine(&overlay).await).await;
    let combine = r#"{"Combine":{"layers":["/a","/b"],"scratch":"/s","target":"/t"}}"#;
    assert_eq!(body.to_string(), combine);
    let options = OverlayOptions::new(["volatile", "index=off"]).unwrap();
    let optional = overlay.clone().with_options(options);
    let (body, _) = sent(r#""Ok""#, async |guest| guest.combine(&optional).await).await;
    let with_options = r#""options":["index=off","volatile"],"scratch""#;
    assert_eq!(
        body.to_string(),
        combine.replacen("\"scratch\"", with_options, 1)
    );

    let blob = ExtraDevice::new(DeviceRole::Data, "any-scheme:8".parse().unwrap());
    let log = ExtraDevice::new(DeviceRole::Log, "any-scheme:9".parse().unwrap());
    let options = MountOptions::builder().device(log).device(blob).build();
    let options = options.unwrap();
    let (body, _) = sent(r#""Ok""#, async |guest| {
        guest.mount(&device, target, &options).await
    })
    .await;
    let devices =
        r#"{"devices":[{"locator":"any-scheme:8"},{"locator":"any-scheme:9","role":"log"}]}"#;
    let several = plain.replace("\"options\":{}", &format!("\"options\":{devices}"));
    assert_eq!(body.to_string(), several);

    let options = ViewOptions::new(["ro", "noexec"]).unwrap();
    let options = options.with_subpath("a/b").unwrap();
    let options = options.with_id_map("u:0:1000:1".parse().unwrap());
    let bind = BindMount::new("/m", "/v", options);
    let (body, _) = sent(r#""Ok""#, async |guest| guest.bind(&bind).await).await;
    let bound = r#"{"Bind":{"options":{"id_map":{"users":[{"count":1,"shown":1000,"stored":0}]},"options":["ro","noexec"],"subpath":"a/b"},"source":"/m","target":"/v"}}"#;
    assert_eq!(body.to_string(), bound);
    let (body, _) = sent(r#""Ok""#, async |guest| guest.unbind(target).await).await;
    assert_eq!(body.to_string(), r#"{"Unbind":{"target":"/run/layer"}}"#);
    let (body, _) = sent(r#"{"Presence":"Absent"}"#, async |guest| {
        let found = Binder::adopt(guest, &bind).await;
        found.map(|found| assert_eq!(found, Presence::Absent))
    })
    .await;
    assert_eq!(body.to_string(), bound.replace("Bind", "AdoptView"));

    // What is there is asked for in the same words.
    let present = r#"{"Presence":"Present"}"#;
    let (body, outcome) = sent(present, async |guest| {
        let options = MountOptions::default();
        let found = Mounter::adopt(guest, &device, target, &options).await;
        found.map(|found| assert_eq!(found, Presence::Present(())))
    })
    .await;
    outcome.unwrap();
    assert_eq!(body.to_string(), plain.replace("Mount", "AdoptMount"));
    for (answer, presence) in [("Absent", Presence::Absent), ("Unknown", Presence::Unknown)] {
        let answer = format!(r#"{{"Presence":"{answer}"}}"#);
        let (body, outcome) = sent(&answer, async |guest| {
            let found = LayerCombiner::adopt(guest, &overlay).await;
            found.map(|found| assert_eq!(found, presence))
        })
        .await;
        outcome.unwrap();
        assert_eq!(body.to_string(), combine.replace("Combine", "AdoptOverlay"));
    }
}

#[tokio::test]
async fn an_error_crosses_whole() {
    let answer = r#"{"Error":{"kind":"Busy","message":"cannot unmount /a","operation":"umount2","errno":16,"path":"/a","source":["it is in use","by a shell"]}}"#;
    let (_, outcome) = sent(answer, async |guest| guest.unmount("/a".as_ref()).await).await;
    let error = outcome.unwrap_err();
    assert_eq!(error.errno(), Some(16));
    assert_eq!(error.operation(), Some("umount2"));
    let again = serde_json::to_value(&error).unwrap();
    let sent: Value = serde_json::from_str(answer).unwrap();
    assert_eq!(again, sent["Error"]);
}

#[tokio::test]
async fn an_agent_writes_the_same_answers() {
    let mut peer: Peer = dial(&GuestServer::new(ScsiVm::default()));
    let unmount = r#"{"Unmount":{"target":"/m"}}"#;
    assert_eq!(peer.ask(1, unmount).await.body, "HelloFirst");
    peer.hello().await;
    assert_eq!(peer.ask(2, unmount).await.body, "Ok");
    let mount = Request::Mount {
        locator: device(9),
        target: "/m".into(),
        options: MountOptions::default(),
    };
    let refused = peer.ask(3, &written(&mount)).await.body;
    assert_eq!(refused["Error"]["kind"], "NotFound", "{refused}");
}

#[test]
fn the_first_bytes_tell_the_protocol() {
    use blockmount_bridge::gcs::is_begun_by;
    use blockmount_bridge::gcs::wire::MessageType;
    assert!(is_begun_by(MessageType::NEGOTIATE.bits().to_le_bytes()));
    let longest = u32::try_from(blockmount_bridge::MAX_FRAME).unwrap();
    for size in [0, 12, longest, u32::MAX] {
        assert!(!is_begun_by(size.to_le_bytes()), "{size}");
    }
}
