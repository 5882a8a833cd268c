//! Hosts that know only the documented protocol, and ask for strange things.

use blockmount::{Encryption, MountOptions, Overlay, Overwrite};
use blockmount_bridge::gcs::{GuestServer, Hresult};
use serde_json::{Value, json};
use tokio::io::duplex;

use crate::recorder::{Asked, Recorder};
use crate::wire::{Frame, NULL, Peer, format, options, verity};

/// Asks a guest of ours as a foreign host would.
async fn asked(requests: &[Value]) -> (Vec<Frame>, Vec<Asked>) {
    let recorder = Recorder::default();
    let (host_end, guest_end) = duplex(1 << 10);
    let server = GuestServer::new(recorder.clone());
    tokio::spawn(async move { server.serve(guest_end).await });
    let mut peer = Peer::new(host_end);
    peer.hello().await;
    let mut answers = Vec::new();
    for (id, request) in (1..).zip(requests) {
        answers.push(peer.modify(id, request.clone()).await);
    }
    (answers, recorder.take())
}

#[tokio::test]
async fn a_foreign_host_is_understood() {
    let disk = |settings: Value| json!({"RequestType": "Add", "ResourceType": "MappedVirtualDisk", "Settings": settings});
    let info = json!({"Ext4SizeInBytes": 1_048_576, "Version": 1, "Algorithm": "sha256", "SuperBlock": true,
                      "RootDigest": "ab".repeat(32), "Salt": "00", "BlockSize": 4096});
    let (answers, done) = asked(&[
        // No type means Add; keys in any case; unknown ones and nulls are skipped.
        json!({"resourcetype": "MappedVirtualDisk", "SETTINGS": {"mountpath": "/a", "lun": 7, "Bogus": {}, "Options": null}}),
        disk(json!({"MountPath": "/b", "Lun": 1, "ReadOnly": true, "Options": ["ro"]})),
        disk(json!({"MountPath": "/c", "Encrypted": true, "EnsureFilesystem": true, "Filesystem": "xfs"})),
        disk(json!({"MountPath": "/d", "ReadOnly": true, "VerityInfo": info})),
        // Only attached: nothing to mount.
        disk(json!({})),
        json!({"RequestType": "Remove", "ResourceType": "MappedVirtualDisk", "Settings": {"MountPath": "/a", "Lun": 7}}),
        json!({"RequestType": "Remove", "ResourceType": "SCSIDevice", "Settings": {}}),
        json!({"RequestType": "Add", "ResourceType": "VPMemDevice", "Settings": {"DeviceNumber": 1, "MountPath": "/p",
               "MappingInfo": {"DeviceOffsetInBytes": 4096, "DeviceSizeInBytes": 8192}}}),
        json!({"RequestType": "Remove", "ResourceType": "VPMemDevice", "Settings": {"DeviceNumber": 1, "MountPath": "/p"}}),
        json!({"RequestType": "Add", "ResourceType": "CombinedLayers", "Settings": {"ContainerID": "abc",
               "ContainerRootPath": "/r", "Layers": [{"Path": "/a"}, {"Path": "/b"}], "ScratchPath": "/s"}}),
        json!({"RequestType": "Remove", "ResourceType": "CombinedLayers", "Settings": {"ContainerRootPath": "/r"}}),
    ]).await;
    for answer in answers {
        assert_eq!(answer.body, json!({"Result": 0, "ActivityId": NULL}));
    }
    let mount =
        |device: &str, target: &str, options| Asked::Mount(device.into(), target.into(), options);
    let blank = format("xfs", Overwrite::Blank);
    let expected = [
        mount("scsi:0/7", "/a", MountOptions::default()),
        mount("scsi:0/1", "/b", MountOptions::read_only()),
        mount(
            "scsi:0/0",
            "/c",
            options(|o| o.encryption(Encryption::Ephemeral).format(blank)),
        ),
        mount(
            "scsi:0/0",
            "/d",
            options(|o| o.read_only().verity(verity())),
        ),
        Asked::Unmount("/a".into()),
        Asked::Unplug("scsi:0/0".into()),
        mount("vpmem:1@4096+8192", "/p", MountOptions::read_only()),
        Asked::Unmount("/p".into()),
        Asked::Combine(Overlay::new(["/a", "/b"], "/r").with_scratch("/s")),
        Asked::Separate("/r".into()),
    ];
    assert_eq!(done, expected);
}

#[tokio::test]
async fn a_bad_request_is_refused_by_its_number() {
    let disk = |settings: Value| json!({"RequestType": "Add", "ResourceType": "MappedVirtualDisk", "Settings": settings});
    let cases = [
        (
            json!({"ResourceType": "Bogus", "Settings": {}}),
            Hresult::FAIL,
            "invalid ResourceType 'Bogus'",
        ),
        (
            json!({"ResourceType": "Network", "Settings": {}}),
            Hresult::FAIL,
            "invalid ResourceType 'Network'",
        ),
        (
            json!({"ResourceType": "MappedVirtualDisk"}),
            Hresult::INVALID_JSON,
            "unexpected end of JSON input",
        ),
        (
            json!({"ResourceType": "SCSIDevice", "Settings": null}),
            Hresult::INVALID_JSON,
            "unexpected end of JSON input",
        ),
        (
            disk(json!({"MountPath": "/m", "Lun": 256})),
            Hresult::INVALID_JSON,
            "256",
        ),
        (
            disk(json!({"MountPath": "/m", "Controller": 64})),
            Hresult::INVALID_ARGUMENT,
            "controller 64",
        ),
        (
            disk(json!({"MountPath": "/m", "Partition": u64::MAX})),
            Hresult::NOT_FOUND,
            "partition",
        ),
        // A format of what must not be written to, and one with nothing.
        (
            disk(
                json!({"MountPath": "/m", "ReadOnly": true, "EnsureFilesystem": true, "Filesystem": "ext4"}),
            ),
            Hresult::INVALID_ARGUMENT,
            "contradicts",
        ),
        (
            disk(json!({"MountPath": "/m", "EnsureFilesystem": true})),
            Hresult::INVALID_ARGUMENT,
            "no filesystem",
        ),
        (
            disk(json!({"MountPath": "/m", "Options": ["ro", "rw"]})),
            Hresult::INVALID_ARGUMENT,
            "contradicts",
        ),
        (
            disk(json!({"MountPath": "/m", "ReadOnly": true, "VerityInfo": {"Version": 1}})),
            Hresult::INVALID_ARGUMENT,
            "verity",
        ),
        (
            json!({"RequestType": "Update", "ResourceType": "MappedVirtualDisk", "Settings": {"MountPath": "/m"}}),
            Hresult::INVALID_ARGUMENT,
            "Update",
        ),
        (
            json!({"RequestType": "Add", "ResourceType": "SCSIDevice", "Settings": {}}),
            Hresult::INVALID_ARGUMENT,
            "Add",
        ),
        (
            json!({"RequestType": "Explode", "ResourceType": "SCSIDevice", "Settings": {}}),
            Hresult::FAIL,
            "Explode",
        ),
        (
            json!({"RequestType": "Remove", "ResourceType": "CombinedLayers", "Settings": {}}),
            Hresult::INVALID_ARGUMENT,
            "no path",
        ),
        (
            json!({"ResourceType": "VPMemDevice", "Settings": {}}),
            Hresult::INVALID_ARGUMENT,
            "no path",
        ),
    ];
    let requests: Vec<Value> = cases.iter().map(|(request, ..)| request.clone()).collect();
    let (answers, done) = asked(&requests).await;
    assert_eq!(done, [], "nothing of it was done");
    for ((request, number, said), answer) in cases.iter().zip(answers) {
        assert_eq!(answer.result(), number.bits(), "{request}: {answer:?}");
        assert!(
            answer.body["ErrorMessage"].as_str().unwrap().contains(said),
            "{request}: {answer:?}"
        );
        assert_eq!(answer.body["ErrorRecords"][0]["ModuleName"], "gcs");
    }
}

#[tokio::test]
async fn a_container_is_not_the_vm() {
    let (host_end, guest_end) = duplex(1 << 10);
    let server = GuestServer::new(Recorder::default());
    tokio::spawn(async move { server.serve(guest_end).await });
    let mut peer = Peer::new(host_end);
    peer.hello().await;
    for container in ["", "abc"] {
        let body = json!({"ContainerId": container, "Request": {"ResourceType": "MappedVirtualDisk", "Settings": {}}});
        let answer = peer.ask(1, &body.to_string()).await;
        assert_eq!(
            answer.result(),
            Hresult::SYSTEM_NOT_FOUND.bits(),
            "{answer:?}"
        );
    }
}
