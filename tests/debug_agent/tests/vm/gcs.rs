//! A host of Hyper-V on our agent: what hcsshim's host sends for a container with a scratch, byte for byte.

use std::fs::File;
use std::time::Duration;

use blockmount::testing::AttachIdentified as _;
use blockmount::{Disk, Transport};
use blockmount_debug_agent::kit::images;
use blockmount_qemu::GuestStream;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::rig::Rig;

const NEGOTIATE: u32 = 0x1010_0b01;
const MODIFY: u32 = 0x1010_0a01;
/// No request takes longer, even on a busy machine.
const LONGEST: Duration = Duration::from_secs(240);

/// A host, as it writes: Go's encoder ends each message with a line feed.
struct Host {
    stream: GuestStream,
    id: u64,
}

impl Host {
    async fn send(&mut self, message: u32, body: &str) -> Value {
        let body = format!("{body}\n");
        let size = 16 + u32::try_from(body.len()).unwrap();
        let header = [
            &message.to_le_bytes()[..],
            &size.to_le_bytes(),
            &self.id.to_le_bytes(),
        ];
        let frame = [&header.concat(), body.as_bytes()].concat();
        self.stream.write_all(&frame).await.unwrap();
        let answer = timeout(LONGEST, self.answer(message)).await;
        answer.unwrap_or_else(|_| panic!("no answer to {body}"))
    }

    async fn answer(&mut self, message: u32) -> Value {
        // The response to a request has its type with another first digit, and its number.
        assert_eq!(
            self.stream.read_u32_le().await.unwrap(),
            message + 0x1000_0000
        );
        let size = self.stream.read_u32_le().await.unwrap();
        assert_eq!(self.stream.read_u64_le().await.unwrap(), self.id);
        assert!(size <= 0x1_0000, "hcsshim's host takes no longer message");
        self.id += 1;
        let mut body = vec![0; size as usize - 16];
        self.stream.read_exact(&mut body).await.unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    /// A change of the VM's settings, which must be made.
    async fn modify(&mut self, request: &str) {
        let answer = self.ask(request).await;
        assert_eq!(answer["Result"], 0, "{request}: {answer}");
    }

    async fn ask(&mut self, request: &str) -> Value {
        let null = "00000000-0000-0000-0000-000000000000";
        let body =
            format!(r#"{{"ContainerId":"{null}","ActivityId":"{null}","Request":{request}}}"#);
        self.send(MODIFY, &body).await
    }
}

async fn host(rig: &Rig) -> Host {
    let stream = rig.vm.connect("blockmount.agent.gcs", LONGEST).await;
    let mut host = Host {
        stream: stream.unwrap(),
        id: 0,
    };
    let negotiate = r#"{"ContainerId":"","ActivityId":"00000000-0000-0000-0000-000000000000","MinimumVersion":4,"MaximumVersion":4}"#;
    // 125 bytes with the header and the line feed, as hcsshim writes them.
    assert_eq!(16 + negotiate.len() + 1, 125);
    let answer = host.send(NEGOTIATE, negotiate).await;
    assert_eq!(
        (&answer["Result"], &answer["Version"]),
        (&json!(0), &json!(4))
    );
    host
}

/// The fields of `Settings` that name where a disk is; hcsshim leaves out what is zero.
async fn attach(rig: &Rig, disk: &Disk) -> String {
    let locator = rig.scsi.attach_identified(disk).await.unwrap();
    let (controller, lun) = locator.address().split_once('/').unwrap();
    let field = |name: &str, value: &str| match value {
        "0" => String::new(),
        value => format!(r#","{name}":{value}"#),
    };
    field("Lun", lun) + &field("Controller", controller)
}

/// Only the address, as the fields of a message of its own.
fn only(fields: &str) -> &str {
    fields.strip_prefix(',').unwrap_or(fields)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_f06_g09_a_host_of_hyper_v_runs_a_container_with_a_scratch_on_our_agent() {
    let rig = Rig::start().await;
    let mut host = host(&rig).await;
    let layer = rig.path("layer");
    images::image("ext4", &layer, &[("below", "of the layer")]);
    let layer = Disk::virtual_disk(layer).read_only();
    for (id, how, mebibytes) in [
        ("c1", r#""EnsureFilesystem":true,"Filesystem":"ext4""#, 64),
        (
            "c2",
            r#""Encrypted":true,"EnsureFilesystem":true,"Filesystem":"xfs""#,
            320,
        ),
    ] {
        let image = rig.path(id);
        File::create(&image)
            .unwrap()
            .set_len(mebibytes << 20)
            .unwrap();
        let scratch = Disk::virtual_disk(image);
        let (of_layer, of_scratch) = (attach(&rig, &layer).await, attach(&rig, &scratch).await);
        let root = format!("/run/gcs/c/{id}");
        host.modify(&format!(
            r#"{{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{{"MountPath":"/run/mounts/scsi/m0"{of_layer},"ReadOnly":true,"Options":["ro"]}}}}"#
        ))
        .await;
        host.modify(&format!(
            r#"{{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{{"MountPath":"{root}"{of_scratch},{how}}}}}"#
        ))
        .await;
        host.modify(&format!(
            r#"{{"RequestType":"Add","ResourceType":"CombinedLayers","Settings":{{"ContainerID":"{id}","ContainerRootPath":"{root}/rootfs","Layers":[{{"Path":"/run/mounts/scsi/m0"}}],"ScratchPath":"{root}/scratch/{id}"}}}}"#
        ))
        .await;
        let rootfs = std::path::PathBuf::from(format!("{root}/rootfs"));
        rig.assert_content(&rootfs.join("below"), "of the layer")
            .await;
        let written = rootfs.join("written");
        rig.ask(json!({ "write": { "path": written, "content": id } }))
            .await;
        rig.assert_content(&written, id).await;
        let upper = format!("{root}/scratch/{id}/upper/written");
        rig.assert_content(upper.as_ref(), id).await;
        // What is below the overlay is in use as long as that is there.
        let removal = format!(
            r#"{{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":{{"MountPath":"{root}"{of_scratch}}}}}"#
        );
        let busy = host.ask(&removal).await;
        assert_ne!(busy["Result"], 0, "{busy}");
        host.modify(&format!(
            r#"{{"RequestType":"Remove","ResourceType":"CombinedLayers","Settings":{{"ContainerRootPath":"{root}/rootfs"}}}}"#
        ))
        .await;
        // It does not say that the disk is encrypted, and the device that decrypts it goes all the same.
        let mapped = async || rig.tables().await["dm_devices"].as_array().unwrap().len();
        assert_eq!(mapped().await, usize::from(id == "c2"));
        host.modify(&removal).await;
        assert_eq!(mapped().await, 0);
        host.modify(&format!(
            r#"{{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":{{"MountPath":"/run/mounts/scsi/m0"{of_layer},"ReadOnly":true}}}}"#
        ))
        .await;
        for (disk, fields) in [(&layer, &of_layer), (&scratch, &of_scratch)] {
            let address = only(fields);
            host.modify(&format!(
                r#"{{"RequestType":"Remove","ResourceType":"SCSIDevice","Settings":{{{address}}}}}"#
            ))
            .await;
            rig.scsi.detach(disk).await.unwrap();
        }
    }
    drop(host);
    rig.end().await;
}
