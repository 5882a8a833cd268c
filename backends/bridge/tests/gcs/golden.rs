//! The bytes and documents of the protocol, exactly as other peers write them.

use std::num::NonZeroU32;

use blockmount::{BackendError, DeviceLocator, MountOptions, Mounter, Overlay};
use blockmount_bridge::gcs::messages::{self, *};
use blockmount_bridge::gcs::wire::{Frame, MessageType};
use blockmount_bridge::gcs::{BridgeGuest, Hresult};

use crate::wire::{NULL, documented, host_and_peer_of, windows};

fn bytes(message: MessageType, id: u64, payload: Vec<u8>) -> Vec<u8> {
    let frame = Frame {
        message,
        id,
        payload,
    };
    frame.encode().unwrap()
}

fn hex(text: &str) -> Vec<u8> {
    let byte = |pair| u8::from_str_radix(pair, 16).unwrap();
    text.split_whitespace().map(byte).collect()
}

fn with_header(header: &str, body: &str) -> Vec<u8> {
    [&hex(header)[..], body.as_bytes()].concat()
}

#[test]
fn the_whole_exchange_byte_for_byte() {
    let negotiate = bytes(
        MessageType::NEGOTIATE,
        0,
        encode(&NegotiateRequest::default(), Writer::Host),
    );
    let expected = with_header(
        "01 0b 10 10 7d 00 00 00 00 00 00 00 00 00 00 00",
        "{\"ContainerId\":\"\",\"ActivityId\":\"00000000-0000-0000-0000-000000000000\",\"MinimumVersion\":4,\"MaximumVersion\":4}\n",
    );
    assert_eq!((negotiate.len(), negotiate), (125, expected));

    let response = NegotiateResponse {
        activity_id: NULL.into(),
        version: 4,
        capabilities: Capabilities {
            supported_schema_versions: vec![SchemaVersion { major: 2, minor: 1 }],
            runtime_os_type: "Linux".into(),
            guest_defined_capabilities: GuestCapabilities {
                namespace_add_request_supported: true,
                signal_process_supported: true,
                dump_stacks_supported: true,
                delete_container_state_supported: true,
            },
            ..Capabilities::default()
        },
        ..NegotiateResponse::default()
    };
    let sent = bytes(
        MessageType::NEGOTIATE.response(),
        0,
        encode(&response, Writer::Guest),
    );
    let body = r#"{"Result":0,"ActivityId":"00000000-0000-0000-0000-000000000000","Version":4,"Capabilities":{"SupportedSchemaVersions":[{"Major":2,"Minor":1}],"RuntimeOsType":"Linux","GuestDefinedCapabilities":{"NamespaceAddRequestSupported":true,"SignalProcessSupported":true,"DumpStacksSupported":true,"DeleteContainerStateSupported":true}}}"#;
    let expected = with_header("01 0b 10 20 56 01 00 00 00 00 00 00 00 00 00 00", body);
    assert_eq!((sent.len(), sent), (342, expected));
    assert_eq!(
        decode::<NegotiateResponse>(body.as_bytes()).unwrap(),
        response
    );

    let disk = MappedVirtualDisk {
        mount_path: "/run/mounts/scsi/m0".into(),
        lun: 1,
        read_only: true,
        options: vec!["ro".into()],
        ..MappedVirtualDisk::default()
    };
    let request = ModificationRequest::add(Resource::MappedVirtualDisk(disk));
    let sent = bytes(
        MessageType::MODIFY_SETTINGS,
        1,
        encode(&ModifySettings::from(request), Writer::Host),
    );
    let expected = with_header(
        "01 0a 10 10 16 01 00 00 01 00 00 00 00 00 00 00",
        "{\"ContainerId\":\"00000000-0000-0000-0000-000000000000\",\"ActivityId\":\"00000000-0000-0000-0000-000000000000\",\"Request\":{\"RequestType\":\"Add\",\"ResourceType\":\"MappedVirtualDisk\",\"Settings\":{\"MountPath\":\"/run/mounts/scsi/m0\",\"Lun\":1,\"ReadOnly\":true,\"Options\":[\"ro\"]}}}\n",
    );
    assert_eq!((sent.len(), sent), (278, expected));

    let response = ResponseBase {
        activity_id: NULL.into(),
        ..ResponseBase::default()
    };
    let sent = bytes(
        MessageType::MODIFY_SETTINGS.response(),
        1,
        encode(&response, Writer::Guest),
    );
    let expected = with_header(
        "01 0a 10 20 50 00 00 00 01 00 00 00 00 00 00 00",
        r#"{"Result":0,"ActivityId":"00000000-0000-0000-0000-000000000000"}"#,
    );
    assert_eq!((sent.len(), sent), (80, expected));
}

#[test]
fn errors_and_notifications() {
    let said = "mounting /m: HRESULT 0x80070490: no <such> device";
    let mut record = ErrorRecord::new(Hresult::NOT_FOUND, said);
    record.stack_trace = "\nmain.main\n\t…".into();
    record.file_name = "main.go".into();
    record.line = 93;
    record.function_name = "main".into();
    let failed = |result, message: &str, record| ResponseBase {
        result,
        activity_id: NULL.into(),
        error_message: message.into(),
        error_records: vec![record],
    };
    let plain = ErrorRecord::new(Hresult::FAIL, "plain");
    for (response, expected) in [
        (
            failed(Hresult::NOT_FOUND, said, record),
            r#"{"Result":-2147023728,"ActivityId":"00000000-0000-0000-0000-000000000000","ErrorMessage":"mounting /m: HRESULT 0x80070490: no \u003csuch\u003e device","ErrorRecords":[{"Result":-2147023728,"Message":"mounting /m: HRESULT 0x80070490: no \u003csuch\u003e device","StackTrace":"\nmain.main\n\t…","ModuleName":"gcs","FileName":"main.go","Line":93,"FunctionName":"main"}]}"#,
        ),
        (
            failed(Hresult::FAIL, "plain", plain),
            r#"{"Result":-2147467259,"ActivityId":"00000000-0000-0000-0000-000000000000","ErrorMessage":"plain","ErrorRecords":[{"Result":-2147467259,"Message":"plain","ModuleName":"gcs","FileName":"","Line":4294967295}]}"#,
        ),
    ] {
        assert_eq!(
            String::from_utf8(encode(&response, Writer::Guest)).unwrap(),
            expected
        );
        assert_eq!(
            decode::<ResponseBase>(expected.as_bytes()).unwrap(),
            response
        );
    }

    let notification = Notification {
        container_id: "c1".into(),
        activity_id: NULL.into(),
        event: "UnexpectedExit".into(),
        operation: "None".into(),
        result: Hresult::OK,
    };
    let expected = r#"{"ContainerId":"c1","ActivityId":"00000000-0000-0000-0000-000000000000","Type":"UnexpectedExit","Operation":"None","Result":0}"#;
    assert_eq!(encode(&notification, Writer::Guest), expected.as_bytes());

    let expected = concat!(
        r#"{"ContainerId":"00000000-0000-0000-0000-000000000000","ActivityId":"00000000-0000-0000-0000-000000000000","ContainerConfig":"{\"SystemType\":\"Container\",\"TimeZoneInformation\":null}"}"#,
        "\n"
    );
    assert_eq!(
        encode(&CreateRequest::for_vm(), Writer::Host),
        expected.as_bytes()
    );
}

/// Every document of the protocol about disks, and what it is here.
fn documents() -> Vec<(&'static str, ModificationRequest)> {
    use Resource::*;
    let add = ModificationRequest::add;
    let remove = ModificationRequest::remove;
    let disk = |mount_path: &str, lun, controller| {
        Resource::MappedVirtualDisk(messages::MappedVirtualDisk {
            mount_path: mount_path.into(),
            lun,
            controller,
            ..Default::default()
        })
    };
    let change = |resource: Resource, change: &dyn Fn(&mut messages::MappedVirtualDisk)| {
        let Resource::MappedVirtualDisk(mut disk) = resource else {
            unreachable!()
        };
        change(&mut disk);
        Resource::MappedVirtualDisk(disk)
    };
    let pmem = |device_number, mount_path: &str, mapping| {
        VpmemDevice(messages::VpmemDevice {
            device_number,
            mount_path: mount_path.into(),
            mapping_info: mapping,
            ..Default::default()
        })
    };
    let range = |device_offset_in_bytes, device_size_in_bytes| {
        Some(MappingInfo {
            device_offset_in_bytes,
            device_size_in_bytes,
        })
    };
    let layer = |path: &str| Layer {
        path: path.into(),
        ..Layer::default()
    };
    vec![
        (
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m0"}}"#,
            add(disk("/run/mounts/scsi/m0", 0, 0)),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m1","Lun":2,"Controller":1,"Partition":3,"ReadOnly":true,"Options":["ro"]}}"#,
            add(change(disk("/run/mounts/scsi/m1", 2, 1), &|disk| {
                disk.partition = 3;
                disk.read_only = true;
                disk.options = vec!["ro".into()];
            })),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/gcs/c/abc","Lun":3,"Encrypted":true,"EnsureFilesystem":true,"Filesystem":"xfs"}}"#,
            add(change(disk("/run/gcs/c/abc", 3, 0), &|disk| {
                disk.encrypted = true;
                disk.ensure_filesystem = true;
                disk.filesystem = "xfs".into();
            })),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m4","Lun":4,"Options":["rshared"],"BlockDev":true}}"#,
            add(change(disk("/run/mounts/scsi/m4", 4, 0), &|disk| {
                disk.options = vec!["rshared".into()];
                disk.block_dev = true;
            })),
        ),
        (
            r#"{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m1","Lun":2,"Controller":1,"Partition":3,"ReadOnly":true}}"#,
            remove(change(disk("/run/mounts/scsi/m1", 2, 1), &|disk| {
                disk.partition = 3;
                disk.read_only = true;
            })),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/m","Lun":1,"ReadOnly":true,"VerityInfo":{"Ext4SizeInBytes":1048576,"Version":1,"Algorithm":"sha256","SuperBlock":true,"RootDigest":"ab","Salt":"00","BlockSize":4096}}}"#,
            add(change(disk("/m", 1, 0), &|disk| {
                disk.read_only = true;
                disk.verity_info = Some(VerityInfo {
                    ext4_size_in_bytes: 1_048_576,
                    version: 1,
                    algorithm: "sha256".into(),
                    super_block: true,
                    root_digest: "ab".into(),
                    salt: "00".into(),
                    block_size: 4096,
                });
            })),
        ),
        (
            r#"{"RequestType":"Remove","ResourceType":"SCSIDevice","Settings":{}}"#,
            remove(ScsiDevice(messages::ScsiDevice::default())),
        ),
        (
            r#"{"RequestType":"Remove","ResourceType":"SCSIDevice","Settings":{"Controller":1,"Lun":2}}"#,
            remove(ScsiDevice(messages::ScsiDevice {
                controller: 1,
                lun: 2,
            })),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"VPMemDevice","Settings":{"MountPath":"/run/layers/p0"}}"#,
            add(pmem(0, "/run/layers/p0", None)),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"VPMemDevice","Settings":{"MountPath":"/run/layers/p0-0-1052672","MappingInfo":{"DeviceSizeInBytes":1052672}}}"#,
            add(pmem(0, "/run/layers/p0-0-1052672", range(0, 1_052_672))),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"VPMemDevice","Settings":{"DeviceNumber":1,"MountPath":"/run/layers/p1-4194304-1052672","MappingInfo":{"DeviceOffsetInBytes":4194304,"DeviceSizeInBytes":1052672}}}"#,
            add(pmem(
                1,
                "/run/layers/p1-4194304-1052672",
                range(4_194_304, 1_052_672),
            )),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"CombinedLayers","Settings":{"ContainerID":"abc","ContainerRootPath":"/run/gcs/c/abc/rootfs","Layers":[{"Path":"/run/layers/p0"},{"Path":"/run/mounts/scsi/m1"}],"ScratchPath":"/run/gcs/c/abc/scratch/abc"}}"#,
            add(CombinedLayers(messages::CombinedLayers {
                container_id: "abc".into(),
                container_root_path: "/run/gcs/c/abc/rootfs".into(),
                layers: vec![layer("/run/layers/p0"), layer("/run/mounts/scsi/m1")],
                scratch_path: "/run/gcs/c/abc/scratch/abc".into(),
            })),
        ),
        (
            r#"{"RequestType":"Remove","ResourceType":"CombinedLayers","Settings":{"ContainerRootPath":"/run/gcs/c/abc/rootfs"}}"#,
            remove(CombinedLayers(messages::CombinedLayers {
                container_root_path: "/run/gcs/c/abc/rootfs".into(),
                ..Default::default()
            })),
        ),
    ]
}

#[test]
fn every_document_is_written_and_read() {
    for (document, request) in documents() {
        assert_eq!(serde_json::to_string(&request).unwrap(), document);
        let value = serde_json::from_str(document).unwrap();
        assert_eq!(ModificationRequest::from_value(value).unwrap(), request);
    }
    // A Linux guest is never sent these, so they are only written.
    let disk = |container_path: &str, lun| WindowsDisk {
        container_path: container_path.into(),
        lun,
    };
    for (document, resource) in [
        (
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m0","Lun":1}}"#,
            Resource::WindowsDisk(disk("c:\\mounts\\scsi\\m0", 1)),
        ),
        (
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDiskForContainerScratch","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m1","Lun":2}}"#,
            Resource::WindowsScratch(disk("c:\\mounts\\scsi\\m1", 2)),
        ),
    ] {
        assert_eq!(
            serde_json::to_string(&ModificationRequest::add(resource)).unwrap(),
            document
        );
    }
}

/// What a call of a contract sends to a guest that knows only the protocol.
async fn sent(
    capabilities: Capabilities,
    call: impl AsyncFnOnce(&BridgeGuest) -> Result<(), BackendError>,
) -> String {
    let (connection, mut peer) = host_and_peer_of(capabilities).await;
    let guest = BridgeGuest::new(connection);
    let (outcome, body) = tokio::join!(call(&guest), async {
        let request = peer.receive().await;
        peer.succeed(&request).await;
        request.text
    });
    outcome.unwrap();
    let rest = body
        .strip_suffix("}\n")
        .expect("a host ends its bodies with a line feed");
    rest.split_once("\"Request\":").unwrap().1.to_owned()
}

#[tokio::test]
async fn the_contracts_send_the_documents() {
    use blockmount::{Encryption, Expose, Format, LayerCombiner, Unplugger};
    let documents: Vec<&str> = documents()
        .into_iter()
        .map(|(document, _)| document)
        .collect();
    let options = |builder: blockmount::MountOptionsBuilder| builder.build().unwrap();
    let builder = MountOptions::builder;
    let xfs = Format::new("xfs");
    for (document, device, target, options) in [
        (
            documents[0],
            "scsi:0/0",
            "/run/mounts/scsi/m0",
            MountOptions::default(),
        ),
        (
            documents[1],
            "scsi:1/2",
            "/run/mounts/scsi/m1",
            options(builder().read_only().partition(NonZeroU32::new(3).unwrap())),
        ),
        (
            documents[2],
            "scsi:0/3",
            "/run/gcs/c/abc",
            options(builder().encryption(Encryption::Ephemeral).format(xfs)),
        ),
        (
            documents[3],
            "scsi:0/4",
            "/run/mounts/scsi/m4",
            options(builder().option("rshared").expose(Expose::BlockDevice)),
        ),
        (
            documents[8],
            "vpmem:0",
            "/run/layers/p0",
            MountOptions::read_only(),
        ),
        (
            documents[9],
            "vpmem:0@0+1052672",
            "/run/layers/p0-0-1052672",
            MountOptions::read_only(),
        ),
        (
            documents[10],
            "vpmem:1@4194304+1052672",
            "/run/layers/p1-4194304-1052672",
            MountOptions::read_only(),
        ),
    ] {
        let device: DeviceLocator = device.parse().unwrap();
        let body = sent(documented(), async |guest| {
            guest.mount(&device, target.as_ref(), &options).await
        })
        .await;
        assert_eq!(body, document);
    }
    let body = sent(documented(), async |guest| {
        guest.unplug(&"scsi:1/2".parse().unwrap()).await
    })
    .await;
    assert_eq!(body, documents[7]);
    let overlay = Overlay::new(
        ["/run/layers/p0", "/run/mounts/scsi/m1"],
        "/run/gcs/c/abc/rootfs",
    )
    .with_scratch("/run/gcs/c/abc/scratch/abc");
    let body = sent(documented(), async |guest| guest.combine(&overlay).await).await;
    assert_eq!(body, documents[11]);
    let device: DeviceLocator = "scsi:0/1".parse().unwrap();
    let path = "c:\\mounts\\scsi\\m0".as_ref();
    let body = sent(windows(), async |guest| {
        guest.mount(&device, path, &MountOptions::default()).await
    })
    .await;
    assert_eq!(
        body,
        r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m0","Lun":1}}"#
    );
}

#[test]
fn message_types_are_those_of_the_protocol() {
    let numbers = [
        MessageType::CREATE,
        MessageType::START,
        MessageType::SHUTDOWN_GRACEFUL,
        MessageType::SHUTDOWN_FORCED,
        MessageType::EXECUTE_PROCESS,
        MessageType::WAIT_FOR_PROCESS,
        MessageType::SIGNAL_PROCESS,
        MessageType::RESIZE_CONSOLE,
        MessageType::GET_PROPERTIES,
        MessageType::MODIFY_SETTINGS,
        MessageType::NEGOTIATE,
        MessageType::DUMP_STACKS,
        MessageType::DELETE_CONTAINER_STATE,
        MessageType::UPDATE_CONTAINER,
        MessageType::LIFECYCLE_NOTIFICATION,
    ];
    for (number, message) in (1..).zip(numbers) {
        assert_eq!(message.bits(), 0x1010_0001 | number << 8);
        assert_eq!(message.response().bits(), 0x2010_0001 | number << 8);
    }
    assert_eq!(
        MessageType::MODIFY_SERVICE_SETTINGS.response().bits(),
        0x2020_0101
    );
    assert_eq!(MessageType::NOTIFICATION.bits(), 0x3010_0101);
}
