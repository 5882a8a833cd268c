//! The agent of Hyper-V's Linux guests as it is since July 2026: it waits without end for devices, cannot be asked what is
//! mounted, and keeps a scratch mounted that is not where it expects it.

use std::time::Duration;

use blockmount::{
    BackendError, Disk, Encryption, ErrorKind, LayerCombiner, Manager, MountOptions, MountRequest,
    Mounter, Overlay, Overwrite, Presence, Unplugger,
};
use blockmount_bridge::Deadlines;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::harness::{SHORT, ScsiVm, bridged, device, host_and_peer, vm_with_disks};
use crate::wire::{BridgeGuest, NULL, Peer, documented, format, host_and_peer_of, options};

/// A guest whose requests are given up after a short time, and its agent.
async fn with_a_short_deadline() -> (BridgeGuest, Peer) {
    let deadlines = Deadlines {
        call: SHORT,
        ..Deadlines::default()
    };
    let (connection, peer) = host_and_peer(deadlines).await;
    (BridgeGuest::new(connection), peer)
}

/// What a call asks for, request by request, with these answers.
async fn asked<T>(
    peer: &mut Peer,
    answers: &[&str],
    call: impl Future<Output = Result<T, BackendError>>,
) -> (Vec<Value>, Result<T, BackendError>) {
    let (outcome, requests) = tokio::join!(call, async {
        let mut requests = Vec::new();
        for answer in answers {
            let request = peer.receive().await;
            requests.push(request.body["Request"].clone());
            let (result, said) = match *answer {
                "ok" => (0, ""),
                "silence" => continue,
                said => (-2_147_467_259_i64, said),
            };
            let body = json!({"Result": result, "ActivityId": NULL, "ErrorMessage": said});
            peer.reply(&request, &body.to_string()).await;
        }
        requests
    });
    (requests, outcome)
}

fn remove(resource: &str, settings: Value) -> Value {
    json!({"RequestType": "Remove", "ResourceType": resource, "Settings": settings})
}

/// What unmounts a path without its device.
fn unmount(path: &str) -> Value {
    remove("CombinedLayers", json!({"ContainerRootPath": path}))
}

fn encrypted() -> MountOptions {
    let xfs = format("xfs", Overwrite::Blank);
    options(|o| o.encryption(Encryption::Ephemeral).format(xfs))
}

#[tokio::test(start_paused = true)]
async fn f02_a_mount_in_doubt_is_unmounted_without_its_device() {
    let (guest, mut peer) = with_a_short_deadline().await;
    let target = "/m".as_ref();
    let plain = MountOptions::default();
    let device = device(1);
    let mount = guest.mount(&device, target, &plain);
    let (_, outcome) = asked(&mut peer, &["silence"], mount).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    let (requests, outcome) = asked(&mut peer, &["ok"], guest.unmount(target)).await;
    outcome.unwrap();
    assert_eq!(requests, [unmount("/m")]);
}

#[tokio::test(start_paused = true)]
async fn f02_an_unmount_without_an_answer_is_repeated_without_the_device() {
    let (guest, mut peer) = with_a_short_deadline().await;
    let target = "/m".as_ref();
    let plain = MountOptions::default();
    let device = device(1);
    let mount = guest.mount(&device, target, &plain);
    asked(&mut peer, &["ok"], mount).await.1.unwrap();
    // What is up is described, as that agent wants it; but it looks for the device first.
    let (requests, outcome) = asked(&mut peer, &["silence"], guest.unmount(target)).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    let described = json!({"MountPath": "/m", "Lun": 1});
    assert_eq!(requests, [remove("MappedVirtualDisk", described)]);
    let (requests, outcome) = asked(&mut peer, &["ok"], guest.unmount(target)).await;
    outcome.unwrap();
    assert_eq!(requests, [unmount("/m")]);
}

/// An agent that never finds a device.
async fn finds_no_device(mut peer: Peer) {
    while let Some(request) = peer.try_receive().await {
        if request.body["Request"]["ResourceType"] != "MappedVirtualDisk" {
            peer.succeed(&request).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn f02_f05_nothing_waits_twice_for_a_device_that_is_not_there() {
    let deadlines = Deadlines {
        call: Duration::from_secs(30),
        ..Deadlines::default()
    };
    let (connection, peer) = host_and_peer(deadlines).await;
    let agent = tokio::spawn(finds_no_device(peer));
    let guest = BridgeGuest::new(connection);
    let vm = ScsiVm::default();
    let manager = Manager::builder()
        .transport(vm.clone())
        .unplugger(guest.clone())
        .mounter(guest)
        .build();
    let begun = Instant::now();
    let second = std::num::NonZeroU32::new(2).unwrap();
    let request = MountRequest::new(options(|o| o.partition(second)));
    let disk = Disk::virtual_disk("/a.img");
    let error = manager.add(&disk, &request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Uncertain, "{error}");
    assert!(manager.drain().await.is_clean());
    let took = begun.elapsed();
    assert!(took < deadlines.call + Duration::from_secs(5), "{took:?}");
    // The slot is free.
    vm.assert_empty();
    agent.abort();
}

#[tokio::test(start_paused = true)]
async fn f05_what_a_late_mount_may_do_is_undone_before_the_disk_is_removed() {
    let (guest, mut peer) = with_a_short_deadline().await;
    let target = "/m".as_ref();
    let plain = MountOptions::default();
    let (one, two) = (device(1), device(2));
    let mount = guest.mount(&one, target, &plain);
    asked(&mut peer, &["silence"], mount).await.1.unwrap_err();
    asked(&mut peer, &["ok"], guest.unmount(target))
        .await
        .1
        .unwrap();
    // The agent still waits, and would mount what appears at the LUN: another disk does not get the path.
    let error = guest.mount(&two, target, &plain).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    let unplugged = remove("SCSIDevice", json!({"Lun": 1}));
    for _ in 0..2 {
        let (requests, outcome) = asked(&mut peer, &["ok", "ok"], guest.unplug(&one)).await;
        outcome.unwrap();
        assert_eq!(requests, [unmount("/m"), unplugged.clone()]);
    }
    // A disk whose late mount cannot be undone is not removed.
    let busy = ["unmount failed: /m: device or resource busy"];
    let (_, outcome) = asked(&mut peer, &busy, guest.unplug(&one)).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Busy);
    // The same disk may be mounted there again.
    let mount = guest.mount(&one, target, &plain);
    asked(&mut peer, &["ok"], mount).await.1.unwrap();
    let (requests, outcome) = asked(&mut peer, &["ok"], guest.unplug(&two)).await;
    outcome.unwrap();
    assert_eq!(requests.len(), 1);
}

#[tokio::test]
async fn f03_a_scratch_that_the_agent_would_keep_mounted_is_refused() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    let target = "/run/gcs/c/abc/rootfs";
    for scratch in [
        "/run/mounts/scsi/m1",
        "/run/gcs/c/abc",
        "/run/gcs/c",
        "/run/gcs/c/abcd/scratch",
        "/run/gcs/c/abc/rootfs/scratch",
    ] {
        let overlay = Overlay::new(["/run/layers/p0"], target).with_scratch(scratch);
        let error = guest.combine(&overlay).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable, "{scratch}");
        let advice = "mount it at /run/gcs/c/abc/scratch";
        assert!(error.message().contains(advice), "{error}");
    }
    // Nothing was sent, and the target is free.
    let scratch = "/run/gcs/c/abc/scratch";
    let overlay = Overlay::new(["/run/layers/p0"], target).with_scratch(scratch);
    let (requests, outcome) = asked(&mut peer, &["ok"], guest.combine(&overlay)).await;
    outcome.unwrap();
    assert_eq!(requests[0]["Settings"]["ScratchPath"], scratch);
    assert_eq!(requests[0]["Settings"]["ContainerID"], "abc");
}

#[tokio::test]
async fn f04_what_the_agent_cannot_encrypt_is_refused() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    let key = Encryption::Ephemeral;
    for options in [
        options(|o| o.encryption(key.clone())),
        options(|o| {
            o.encryption(key.clone())
                .format(format("ext4", Overwrite::Blank))
        }),
        options(|o| {
            o.encryption(key.clone())
                .format(format("btrfs", Overwrite::Everything))
        }),
    ] {
        let refused = guest.mount(&device(0), "/m".as_ref(), &options).await;
        assert_eq!(
            refused.unwrap_err().kind(),
            ErrorKind::Unsuitable,
            "{options:?}"
        );
    }
    drop(guest);
    assert!(peer.try_receive().await.is_none(), "nothing was sent");
}

#[tokio::test]
async fn f04_a_failed_encrypted_mount_is_torn_down() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    let target = "/m".as_ref();
    let (device, options) = (device(1), encrypted());
    let mount = guest.mount(&device, target, &options);
    let failed = ["failed to mount encrypted device: /dev/sdb"];
    let (_, outcome) = asked(&mut peer, &failed, mount).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Uncertain);
    let close = remove(
        "MappedVirtualDisk",
        json!({"MountPath": "/m", "Lun": 1, "Encrypted": true}),
    );
    // One that is still open is no success.
    let answers = [
        "ok",
        "failed to cleanup dm-crypt state: device or resource busy",
    ];
    let (requests, outcome) = asked(&mut peer, &answers, guest.unmount(target)).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(requests, [unmount("/m"), close.clone()]);
    // One that was never opened is.
    let answers = ["ok", "Device dm-crypt-scsi-contr0-lun1-p0 is not active."];
    let (requests, outcome) = asked(&mut peer, &answers, guest.unmount(target)).await;
    outcome.unwrap();
    assert_eq!(requests, [unmount("/m"), close]);
    let mount = guest.mount(&device, target, &options);
    asked(&mut peer, &["ok"], mount).await.1.unwrap();
    // What is up is closed for sure.
    let answers = ["Device dm-crypt-scsi-contr0-lun1-p0 is not active."];
    let (_, outcome) = asked(&mut peer, &answers, guest.unmount(target)).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Other);
}

#[tokio::test]
async fn f07_what_the_agent_cannot_mount_read_only_is_refused() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    for filesystem in ["xfs", "erofs", "squashfs", "btrfs"] {
        let options = options(|o| o.read_only().filesystem(filesystem));
        let refused = guest.mount(&device(0), "/m".as_ref(), &options).await;
        assert_eq!(
            refused.unwrap_err().kind(),
            ErrorKind::Unsuitable,
            "{filesystem}"
        );
    }
    let ext4 = options(|o| o.read_only().filesystem("ext4"));
    let device = device(0);
    let mount = guest.mount(&device, "/m".as_ref(), &ext4);
    asked(&mut peer, &["ok"], mount).await.1.unwrap();
}

#[tokio::test]
async fn f07_a_mount_in_use_is_busy_and_stays() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    let (device, target) = (device(0), "/m".as_ref());
    let plain = MountOptions::default();
    let mount = guest.mount(&device, target, &plain);
    asked(&mut peer, &["ok"], mount).await.1.unwrap();
    let busy = ["unmount failed: /m: device or resource busy"];
    let (_, outcome) = asked(&mut peer, &busy, guest.unmount(target)).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Busy);
    let (requests, outcome) = asked(&mut peer, &["ok"], guest.unmount(target)).await;
    outcome.unwrap();
    assert_eq!(requests[0]["ResourceType"], "MappedVirtualDisk");
}

#[tokio::test]
async fn what_an_earlier_process_has_mounted_is_unmounted_by_its_description() {
    let vm = vm_with_disks(1).await;
    let (guest, _server) = bridged(&vm).await;
    let (device, target) = (device(0), "/m".as_ref());
    let plain = MountOptions::default();
    guest.mount(&device, target, &plain).await.unwrap();
    let vm = vm.restarted();
    let (guest, _server) = bridged(&vm).await;
    let found = Mounter::adopt(&guest, &device, target, &plain).await;
    assert_eq!(found.unwrap(), Presence::Unknown);
    guest.unmount(target).await.unwrap();
    assert_eq!(vm.device_at("/m"), None);
}

#[tokio::test]
async fn what_an_earlier_process_may_may_have_mounted_is_unmounted_and_not_assumed() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    let (device, target) = (device(3), "/m".as_ref());
    let plain = MountOptions::default();
    let found = Mounter::adopt(&guest, &device, target, &plain).await;
    assert_eq!(found.unwrap(), Presence::Unknown);
    let overlay = Overlay::new(["/m"], "/t");
    let found = LayerCombiner::adopt(&guest, &overlay).await;
    assert_eq!(found.unwrap(), Presence::Unknown);
    for (path, answers) in [("/t", ["ok"]), ("/m", ["ok"])] {
        let call = async {
            match path {
                "/t" => guest.separate(path.as_ref()).await,
                _ => guest.unmount(path.as_ref()).await,
            }
        };
        let (requests, outcome) = asked(&mut peer, &answers, call).await;
        outcome.unwrap();
        assert_eq!(requests, [unmount(path)]);
    }
}
