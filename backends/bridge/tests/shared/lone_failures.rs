//! One call goes wrong; all others must not notice.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use blockmount::testing::{FakeVm, Gate, VmStep};
use blockmount::{BackendError, ErrorKind, MountOptions, Mounter, Presence, Unplugger};
use blockmount_bridge::{BridgeGuest, Deadlines, GuestConnection, GuestServer};

use crate::common::{LONG, SHORT, bridged, dial, host_and_peer, unplug, vm_with_disks};

#[tokio::test(start_paused = true)]
async fn a_request_that_hangs_fails_by_its_own_deadline() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (hangs, works, ()) = tokio::join!(
        connection.call_within(unplug(0), SHORT),
        connection.call_within(unplug(1), LONG),
        async {
            let ((hangs, _), (works, _)) = (peer.receive().await, peer.receive().await);
            tokio::time::sleep(SHORT * 2).await;
            // Too late, twice, and for no request at all: ignored.
            peer.succeed(hangs).await;
            peer.succeed(hangs).await;
            peer.succeed(4_711).await;
            peer.succeed(works).await;
        }
    );
    let hangs = hangs.unwrap_err();
    assert_eq!(hangs.kind(), ErrorKind::Uncertain);
    assert!(hangs.to_string().contains("has not answered"), "{hangs}");
    works.unwrap();
}

#[tokio::test]
async fn an_answer_to_a_request_that_was_not_sent_yet_is_ignored() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    peer.send(1, r#"{"Error":{"kind":"Busy","message":"guessed"}}"#)
        .await;
    tokio::task::yield_now().await;
    let (outcome, ()) = tokio::join!(connection.call(unplug(0)), async {
        let (id, _) = peer.receive().await;
        peer.succeed(id).await;
    });
    outcome.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_unmount_waits_for_the_mount_that_its_host_has_given_up_on() {
    let vm = vm_with_disks(1).await;
    let server = GuestServer::new(vm.clone());
    let call = Duration::from_secs(10);
    let deadlines = Deadlines {
        call,
        ..Deadlines::default()
    };
    let connection = GuestConnection::connect_with(dial(&server).0, deadlines);
    let guest = BridgeGuest::new(connection.await.unwrap());
    vm.gate_next(VmStep::Mount, 1, Gate::Slow(Duration::from_secs(15)));
    let (device, target) = ("fake:0".parse().unwrap(), "/m".as_ref());
    let late = guest.mount(&device, target, &MountOptions::default()).await;
    assert_eq!(late.unwrap_err().kind(), ErrorKind::Uncertain);
    // Comes while the mount is under way, and would find nothing to unmount yet.
    guest.unmount(target).await.unwrap();
    vm.check().unwrap();
    assert_eq!(vm.calls(VmStep::Unmount), 1);
    assert_eq!(vm.device_at("/m"), None);
}

#[tokio::test]
async fn an_error_crosses_with_its_kind_and_the_guest_never_says_gone() {
    use ErrorKind::*;
    let vm = vm_with_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    let device = "fake:0".parse().unwrap();
    for kind in [
        Uncertain, Busy, Full, Unsuitable, NotFound, Conflict, Invalid, Other,
    ] {
        vm.gate_next(VmStep::Mount, 1, Gate::Err(kind));
        let options = MountOptions::default();
        let outcome = guest.mount(&device, "/m".as_ref(), &options).await;
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        guest.unmount("/m".as_ref()).await.unwrap();
    }
    // What answers is not gone.
    vm.gate_next(VmStep::Mount, 1, Gate::Err(Gone));
    let options = MountOptions::default();
    let outcome = guest.mount(&device, "/m".as_ref(), &options).await;
    assert_eq!(outcome.unwrap_err().kind(), Uncertain);
}

#[tokio::test]
async fn a_panic_of_the_backend_is_uncertain_and_the_guest_serves_on() {
    let vm = vm_with_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    vm.gate_next(VmStep::Mount, 1, Gate::Panic { happened: true });
    let (device, target) = ("fake:0".parse().unwrap(), "/m".as_ref());
    let options = MountOptions::default();
    let error = guest.mount(&device, target, &options).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    guest.unmount(target).await.unwrap();
    guest.mount(&device, target, &options).await.unwrap();
    vm.check().unwrap();
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_fails_its_own_call_only() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    for body in [
        "no JSON",
        "",
        "[]",
        "null",
        r#""Later""#,
        r#"{"Error":{"kind":"Later","message":""}}"#,
        r#"{"Error":{}}"#,
    ] {
        let (broken, other, ()) = tokio::join!(
            connection.call(unplug(0)),
            connection.call(unplug(1)),
            async {
                let ((first, _), (second, _)) = (peer.receive().await, peer.receive().await);
                peer.send(first, body).await;
                peer.succeed(second).await;
            }
        );
        assert_eq!(broken.unwrap_err().kind(), ErrorKind::Uncertain, "{body}");
        other.unwrap();
    }
}

#[tokio::test]
async fn answers_out_of_order_find_their_callers() {
    let (connection, mut peer) = host_and_peer(Deadlines::default()).await;
    let (first, second, third, ()) = tokio::join!(
        connection.call(unplug(1)),
        connection.call(unplug(2)),
        connection.call(unplug(3)),
        async {
            let requests = [
                peer.receive().await,
                peer.receive().await,
                peer.receive().await,
            ];
            for (id, request) in requests.iter().rev() {
                let is_second = request["Unplug"]["locator"] == "fake:2";
                let busy = r#"{"Error":{"kind":"Busy","message":"in use"}}"#;
                let body = if is_second { busy } else { r#""Ok""# };
                peer.send(*id, body).await;
            }
        }
    );
    first.unwrap();
    assert_eq!(second.unwrap_err().kind(), ErrorKind::Busy);
    third.unwrap();
}

#[tokio::test]
async fn a_path_that_is_not_utf8_is_refused_before_it_is_sent() {
    let vm = FakeVm::new();
    let (guest, _server) = bridged(&vm).await;
    let target = Path::new(OsStr::from_bytes(b"/m\xff"));
    let error = guest.unmount(target).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    guest.unplug(&"fake:0".parse().unwrap()).await.unwrap();
}

/// A guest whose errors cannot be written as they are.
struct Unwritable(BackendError);

#[async_trait::async_trait]
impl Mounter for Unwritable {
    async fn mount(
        &self,
        _: &blockmount::DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<(), BackendError> {
        Err(self.0.clone())
    }
    async fn unmount(&self, _: &Path) -> Result<(), BackendError> {
        Err(self.0.clone())
    }

    async fn adopt(
        &self,
        _: &blockmount::DeviceLocator,
        _: &Path,
        _: &MountOptions,
    ) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}

#[async_trait::async_trait]
impl Unplugger for Unwritable {
    async fn unplug(&self, _: &blockmount::DeviceLocator) -> Result<(), BackendError> {
        Err(self.0.clone())
    }
}

#[async_trait::async_trait]
impl blockmount::LayerCombiner for Unwritable {
    async fn combine(&self, _: &blockmount::Overlay) -> Result<(), BackendError> {
        Err(self.0.clone())
    }
    async fn separate(&self, _: &Path) -> Result<(), BackendError> {
        Err(self.0.clone())
    }

    async fn adopt(&self, _: &blockmount::Overlay) -> Result<Presence, BackendError> {
        Ok(Presence::Unknown)
    }
}

#[tokio::test]
async fn an_error_of_any_content_arrives() {
    let path = Path::new(OsStr::from_bytes(b"/m\xff"));
    for error in [
        BackendError::busy("in use").with_path(path),
        BackendError::busy("\u{1}".repeat(1 << 20)),
    ] {
        let server = GuestServer::new(Unwritable(error.clone()));
        let connection = GuestConnection::connect(dial(&server).0).await.unwrap();
        let guest = BridgeGuest::new(connection);
        let said = guest.unmount("/m".as_ref()).await.unwrap_err();
        assert_eq!(said.kind(), ErrorKind::Busy);
        assert!(error.message().starts_with(said.message()));
        assert!(!said.message().is_empty());
    }
}
