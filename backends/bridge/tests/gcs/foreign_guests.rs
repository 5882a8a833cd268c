//! What crosses between our ends of GCS, and what guests are not asked for.

use std::num::NonZeroU32;

use blockmount::{
    DeviceLocator, Encryption, ErrorKind, Expose, LayerCombiner, MountOptions, Mounter, Overlay,
    Overwrite, Unplugger,
};
use blockmount_bridge::gcs::{BridgeGuest, GuestConnection, GuestServer};
use serde_json::json;
use tokio::io::duplex;

use crate::recorder::{Asked, Recorder};
use crate::wire::{documented, format, host_and_peer_of, options, verity, windows};

#[tokio::test]
async fn every_option_crosses_the_bridge_between_our_ends() {
    let recorder = Recorder::default();
    let (host_end, guest_end) = duplex(1 << 10);
    let server = GuestServer::new(recorder.clone());
    tokio::spawn(async move { server.serve(guest_end).await });
    let guest = BridgeGuest::new(GuestConnection::connect(host_end).await.unwrap());
    let disk = "scsi:3/255";
    let cases = [
        (disk, MountOptions::default()),
        (disk, MountOptions::read_only()),
        (
            disk,
            options(|o| {
                o.partition(NonZeroU32::MAX)
                    .filesystem("xfs")
                    .option("rslave")
            }),
        ),
        (
            disk,
            options(|o| {
                o.encryption(Encryption::Ephemeral)
                    .format(format("xfs", Overwrite::Blank))
            }),
        ),
        (disk, options(|o| o.expose(Expose::BlockDevice).read_only())),
        ("vpmem:3", MountOptions::read_only()),
        ("vpmem:3@4096+8192", MountOptions::read_only()),
    ];
    for (device, options) in cases {
        guest
            .mount(&device.parse().unwrap(), "/m".as_ref(), &options)
            .await
            .unwrap();
        guest.unmount("/m".as_ref()).await.unwrap();
        let asked = [
            Asked::Mount(device.into(), "/m".into(), options),
            Asked::Unmount("/m".into()),
        ];
        assert_eq!(recorder.take(), asked);
    }
    guest.unplug(&disk.parse().unwrap()).await.unwrap();
    assert_eq!(recorder.take(), [Asked::Unplug(disk.into())]);
    let overlay = Overlay::new(["/a b", "/<&>"], "/t").with_scratch("/s");
    guest.combine(&overlay).await.unwrap();
    assert_eq!(
        guest.unmount("/t".as_ref()).await.unwrap_err().kind(),
        ErrorKind::Conflict
    );
    guest.separate("/t".as_ref()).await.unwrap();
    assert_eq!(
        recorder.take(),
        [Asked::Combine(overlay), Asked::Separate("/t".into())]
    );
}

#[tokio::test]
async fn a_guest_is_not_asked_for_what_it_would_not_do() {
    let linux = documented;
    let plain = MountOptions::default;
    let ro = MountOptions::read_only;
    let everything =
        |filesystem: &str| options(|o| o.format(format(filesystem, Overwrite::Everything)));
    let cases = [
        // A flag, an option or a check that the guest would ignore.
        (linux(), "scsi:0/0", options(|o| o.option("nodev"))),
        (linux(), "scsi:0/0", options(|o| o.option("discard"))),
        (
            linux(),
            "scsi:0/0",
            options(|o| o.read_only().verity(verity())),
        ),
        // It formats over whatever it does not know.
        (
            linux(),
            "scsi:0/0",
            options(|o| o.format(format("ext4", Overwrite::Blank))),
        ),
        // It has a table of four controllers, and does not look at its length.
        (linux(), "scsi:4/0", plain()),
        (
            linux(),
            "vpmem:0",
            options(|o| o.read_only().filesystem("erofs")),
        ),
        (
            linux(),
            "vpmem:0",
            options(|o| o.read_only().option("rshared")),
        ),
        (linux(), "scsi:0/256", plain()),
        (linux(), "vpmem:0", plain()),
        (
            linux(),
            "vpmem:0",
            options(|o| o.read_only().partition(NonZeroU32::MIN)),
        ),
        (linux(), "loop:0", plain()),
        (windows(), "scsi:1/0", plain()),
        (windows(), "vpmem:0", ro()),
        (
            windows(),
            "scsi:0/0",
            options(|o| o.partition(NonZeroU32::MIN)),
        ),
        (windows(), "scsi:0/0", options(|o| o.filesystem("ntfs"))),
        (windows(), "scsi:0/0", options(|o| o.option("nodev"))),
        (windows(), "scsi:0/0", options(|o| o.option("rshared"))),
        (
            windows(),
            "scsi:0/0",
            options(|o| o.encryption(Encryption::Ephemeral)),
        ),
        (
            windows(),
            "scsi:0/0",
            options(|o| o.read_only().verity(verity())),
        ),
        (
            windows(),
            "scsi:0/0",
            options(|o| o.expose(Expose::BlockDevice)),
        ),
        (windows(), "scsi:0/0", everything("ntfs")),
        (
            windows(),
            "scsi:0/0",
            options(|o| o.format(format("refs", Overwrite::Blank))),
        ),
    ];
    for (capabilities, device, options) in cases {
        let target = if capabilities.is_windows() {
            r"c:\mounts\m"
        } else {
            "/m"
        };
        let (connection, mut peer) = host_and_peer_of(capabilities).await;
        let guest = BridgeGuest::new(connection);
        let refused = guest
            .mount(&device.parse().unwrap(), target.as_ref(), &options)
            .await
            .unwrap_err();
        assert_eq!(
            refused.kind(),
            ErrorKind::Unsuitable,
            "{device} {options:?}: {refused}"
        );
        drop(guest);
        assert!(peer.try_receive().await.is_none(), "nothing was sent");
    }
}

#[tokio::test]
async fn a_linux_guest_is_not_asked_to_unplug_persistent_memory() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    let device: DeviceLocator = "vpmem:1@4096+8192".parse().unwrap();
    guest.unplug(&device).await.unwrap();
    drop(guest);
    assert!(
        peer.try_receive().await.is_none(),
        "the protocol has no message for it"
    );
}

#[tokio::test]
async fn a_windows_guest_gets_its_own_words_and_no_more() {
    let (connection, mut peer) = host_and_peer_of(windows()).await;
    let guest = BridgeGuest::new(connection);
    let device: DeviceLocator = "scsi:0/5".parse().unwrap();
    let target = r"c:\mounts\scsi\m0".as_ref();
    let refs = options(|o| o.format(format("ReFS", Overwrite::Everything)));
    for (options, resource) in [
        (MountOptions::read_only(), "MappedVirtualDisk"),
        (refs, "MappedVirtualDiskForContainerScratch"),
    ] {
        for (step, request_type, resource) in [
            ("mount", "Add", resource),
            ("unmount", "Remove", "MappedVirtualDisk"),
        ] {
            let call = async {
                match step {
                    "mount" => guest.mount(&device, target, &options).await,
                    _ => guest.unmount(target).await,
                }
            };
            let (outcome, body) = tokio::join!(call, async {
                let request = peer.receive().await;
                peer.succeed(&request).await;
                request.body
            });
            outcome.unwrap();
            let settings = json!({"ContainerPath": r"c:\mounts\scsi\m0", "Lun": 5});
            assert_eq!(
                body["Request"],
                json!({"RequestType": request_type, "ResourceType": resource, "Settings": settings})
            );
        }
    }
    // It notices by itself, and is not asked.
    guest.unplug(&device).await.unwrap();
    let overlay = Overlay::new([r"c:\a"], r"c:\t");
    assert_eq!(
        guest.combine(&overlay).await.unwrap_err().kind(),
        ErrorKind::Unsuitable
    );
    for target in ["/m", "c:", r"c:\", "m", r"c:\a\..\b", ""] {
        let error = guest
            .mount(&device, target.as_ref(), &MountOptions::default())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{target}");
    }
    drop(guest);
    assert!(peer.try_receive().await.is_none());
}

#[tokio::test]
async fn a_layer_that_would_be_misread_is_not_sent() {
    let (connection, mut peer) = host_and_peer_of(documented()).await;
    let guest = BridgeGuest::new(connection);
    for layer in ["/a:b", "/a,b"] {
        let overlay = Overlay::new([layer], "/t");
        assert_eq!(
            guest.combine(&overlay).await.unwrap_err().kind(),
            ErrorKind::Unsuitable
        );
    }
    // What this host has not set up, it does not take apart where the guest would delete it.
    guest.separate("/t".as_ref()).await.unwrap();
    guest.unmount("/t".as_ref()).await.unwrap();
    drop(guest);
    assert!(peer.try_receive().await.is_none());
}
