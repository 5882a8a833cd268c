//! What comes before, beside and instead of the agreement on a version.

use blockmount::{ErrorKind, LayerCombiner, MountOptions, Mounter, Overlay, Presence};
use blockmount_bridge::{BridgeGuest, Deadlines, GuestConnection, GuestServer, ServeError};
use tokio::io::duplex;

use crate::harness::{ScsiVm, bridged, device, dial, host_and_peer, unplug, vm_with_disks};
use crate::wire::Peer;

const MOUNT: &str = r#"{"Mount":{"locator":"scsi:0/0","target":"/m","options":{}}}"#;

#[tokio::test]
async fn nothing_is_done_before_the_hello() {
    let vm = vm_with_disks(1).await;
    let server = GuestServer::new(vm.clone());
    let mut peer = dial(&server);
    assert_eq!(peer.ask(1, MOUNT).await.body, "HelloFirst");
    assert_eq!(vm.device_at("/m"), None);
    peer.hello().await;
    assert_eq!(peer.ask(2, MOUNT).await.body, "Ok");
    // Anew on each connection.
    assert_eq!(dial(&server).ask(3, MOUNT).await.body, "HelloFirst");
    // A second one is no request.
    let hello = r#"{"Hello":{"min":1,"max":1,"software":"a test"}}"#;
    let again = peer.ask(4, hello).await.body;
    assert_eq!(again["Error"]["kind"], "Unsuitable", "{again}");
}

#[tokio::test]
async fn both_ends_say_which_is_too_old() {
    for (min, max, older) in [(4, 9, "agent"), (0, 0, "host")] {
        let (host_end, guest_end) = duplex(1 << 10);
        let server = GuestServer::new(ScsiVm::default());
        let serving = tokio::spawn(async move { server.serve(guest_end).await });
        let mut peer = Peer::new(host_end);
        let hello =
            format!(r#"{{"Hello":{{"min":{min},"max":{max},"software":"next 9.1","later":0}}}}"#);
        let answer = peer.ask(0, &hello).await.body;
        assert_eq!(answer["Incompatible"]["min"], 1, "{answer}");
        drop(peer);
        let error = serving.await.unwrap().unwrap_err();
        assert!(matches!(error, ServeError::Incompatible(_)), "{error}");
        let text = error.to_string();
        let agent = concat!(
            "the agent (blockmount ",
            env!("CARGO_PKG_VERSION"),
            ") speaks 1 to 3"
        );
        assert!(text.contains(agent), "{text}");
        assert!(
            text.contains(&format!("the host (next 9.1) speaks {min} to {max}")),
            "{text}"
        );
        assert!(text.ends_with(&format!("update the {older}")), "{text}");
    }
    for (min, max, older) in [(4, 9, "host"), (0, 0, "agent")] {
        let (host_end, guest_end) = duplex(1 << 10);
        let mut peer = Peer::new(guest_end);
        let (connected, ()) = tokio::join!(GuestConnection::connect(host_end), async {
            let id = peer.receive().await.id;
            let answer =
                format!(r#"{{"Incompatible":{{"min":{min},"max":{max},"software":"x"}}}}"#);
            peer.send(id, &answer).await;
        });
        let error = connected.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable);
        assert!(
            error.message().ends_with(&format!("update the {older}")),
            "{error}"
        );
        assert!(peer.try_receive().await.is_none(), "the stream is closed");
    }
}

#[tokio::test]
async fn an_agent_of_one_version_serves_a_host_of_more() {
    let mut peer = dial(&GuestServer::new(ScsiVm::default()));
    let hello = r#"{"Hello":{"min":1,"max":7,"software":"next"}}"#;
    assert_eq!(peer.ask(0, hello).await.body["Chosen"]["version"], 3);
    assert_eq!(
        peer.ask(1, r#"{"Unmount":{"target":"/m"}}"#).await.body,
        "Ok"
    );
}

#[tokio::test]
async fn what_an_older_agent_does_not_know_is_refused_by_name() {
    let vm = vm_with_disks(1).await;
    let mut peer = dial(&GuestServer::new(vm.clone()));
    peer.hello().await;
    for (body, name) in [
        (r#"{"Rename":{"target":"/m"}}"#, "Rename"),
        (r#"{"Unmount":{"target":"/m","lazily":true}}"#, "lazily"),
        (
            r#"{"Mount":{"locator":"scsi:0/0","target":"/m","options":{"quota":1}}}"#,
            "quota",
        ),
        (
            r#"{"Combine":{"layers":["/a"],"scratch":null,"target":"/m","index":"off"}}"#,
            "index",
        ),
    ] {
        let answer = peer.ask(1, body).await.body;
        assert_eq!(answer["Error"]["kind"], "Unsuitable", "{answer}");
        let message = answer["Error"]["message"].as_str().unwrap();
        assert!(
            message.contains(name) && message.contains("blockmount "),
            "{message}"
        );
    }
    assert_eq!(vm.device_at("/m"), None);
}

/// What an agent of version 2 does not know is not sent: it would be an error of another kind.
#[tokio::test]
async fn an_older_agent_is_not_asked_about_sizes() {
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let (connected, ()) = tokio::join!(GuestConnection::connect(host_end), async {
        let id = peer.receive().await.id;
        peer.send(id, r#"{"Chosen":{"version":2,"software":"old"}}"#)
            .await;
    });
    let guest = BridgeGuest::new(connected.unwrap());
    let error = guest.usage("/m".as_ref()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable);
    assert!(error.message().contains("(old) is too old"), "{error}");
    drop(guest);
    assert!(peer.try_receive().await.is_none(), "nothing was sent");
}

#[tokio::test]
async fn a_host_refuses_an_agent_that_makes_no_sense() {
    for (answer, kind) in [
        (
            r#"{"Chosen":{"version":4,"software":"x"}}"#,
            ErrorKind::Unsuitable,
        ),
        (
            r#"{"Chosen":{"version":0,"software":"x"}}"#,
            ErrorKind::Unsuitable,
        ),
        (r#""Ok""#, ErrorKind::Uncertain),
        ("garbage", ErrorKind::Uncertain),
    ] {
        let (host_end, guest_end) = duplex(1 << 10);
        let mut peer = Peer::new(guest_end);
        let (connected, ()) = tokio::join!(GuestConnection::connect(host_end), async {
            let id = peer.receive().await.id;
            peer.send(id, answer).await;
        });
        assert_eq!(connected.unwrap_err().kind(), kind, "{answer}");
        assert!(peer.try_receive().await.is_none(), "the stream is closed");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_never_answers_is_given_up_in_time() {
    let (host_end, _guest_end) = duplex(1 << 10);
    let error = GuestConnection::connect(host_end).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
}

#[tokio::test]
async fn an_agent_that_was_started_anew_on_the_same_stream_has_done_nothing() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let id = peer.receive().await.id;
        peer.send(id, r#""HelloFirst""#).await;
    });
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain);
    assert!(error.message().contains("started anew"), "{error}");
    assert!(peer.try_receive().await.is_none(), "the stream is closed");
}

#[tokio::test]
async fn an_agent_that_cannot_be_asked_what_is_there_leaves_it_unknown() {
    let (host_end, guest_end) = duplex(1 << 10);
    let mut peer = Peer::new(guest_end);
    let (connected, ()) = tokio::join!(GuestConnection::connect(host_end), async {
        let id = peer.receive().await.id;
        let chosen = r#"{"Chosen":{"version":1,"software":"old"}}"#;
        peer.send(id, chosen).await;
    });
    let guest = BridgeGuest::new(connected.unwrap());
    let (options, overlay) = (MountOptions::default(), Overlay::new(["/a"], "/t"));
    let mount = Mounter::adopt(&guest, &device(0), "/m".as_ref(), &options).await;
    assert_eq!(mount.unwrap(), Presence::Unknown);
    let stack = LayerCombiner::adopt(&guest, &overlay).await;
    assert_eq!(stack.unwrap(), Presence::Unknown);
    drop(guest);
    assert!(peer.try_receive().await.is_none(), "nothing was sent");
}

#[tokio::test]
async fn an_agent_answers_what_is_there() {
    let vm = vm_with_disks(2).await;
    let (guest, _server) = bridged(&vm).await;
    let options = MountOptions::default();
    let target = "/m".as_ref();
    guest.mount(&device(0), target, &options).await.unwrap();
    // Another runtime, after the first has ended.
    let vm = vm.restarted();
    let (guest, _server) = bridged(&vm).await;
    let found = Mounter::adopt(&guest, &device(0), target, &options).await;
    assert_eq!(found.unwrap(), Presence::Present(()));
    let absent = Mounter::adopt(&guest, &device(1), "/n".as_ref(), &options).await;
    assert_eq!(absent.unwrap(), Presence::Absent);
    guest.unmount(target).await.unwrap();
    assert_eq!(vm.device_at("/m"), None);
}
