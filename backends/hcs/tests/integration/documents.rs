//! The documents, exactly as other clients write them, and back again.
#![allow(clippy::unwrap_used)] // a panic is a test's failure message

use blockmount_scsi::testing::AttachIdentified as _;
use blockmount_vpmem::testing::AttachIdentified as _;
use std::path::Path;

use crate::common::{Answer, Images, Model, address};
use blockmount::{
    Disk, DiskOptions, Encryption, ErrorKind, Expose, Format, LayerCombiner, MountOptions, Mounter,
    Overlay, Unplugger,
};
use blockmount_bridge::gcs::messages::{CombinedLayers, ModificationRequest, Resource};
use blockmount_hcs::documents::*;
use blockmount_hcs::{GuestOs, HcsChannel, HcsGuest, ScsiAttacher, VpmemAttacher};
use blockmount_scsi::{Attacher as _, HYPER_V_CONTROLLERS};
use blockmount_vpmem::{Attacher as _, ByteRange, DeviceNumber};
use proptest::prelude::*;

fn device(number: u64) -> DeviceNumber {
    number.try_into().unwrap()
}

/// The document of a call, which the service refuses.
async fn document<T, E: std::fmt::Debug>(
    model: &Model,
    call: impl Future<Output = Result<T, E>>,
) -> String {
    model.next(Answer::Fail(blockmount_bridge::gcs::Hresult::FAIL));
    call.await.err().expect("the service was told to fail");
    let [document] = model.documents().try_into().expect("one document");
    let read = ModifySettingRequest::from_json(&document).unwrap();
    assert_eq!(read.to_json(), document, "it reads back");
    document
}

#[tokio::test]
async fn scsi_attachments_byte_for_byte() {
    let model = Model::linux().await;
    let scsi = ScsiAttacher::new(model.clone(), GuestOs::Linux);
    let images = Images::new();
    let pass_through = images.disk(r"physical\DRIVE2").source().to_owned();
    let cases = [
        (
            "0/0",
            images.disk(r"x\sandbox.vhdx"),
            r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/Attachments/0","RequestType":"Add","Settings":{"Type":"VirtualDisk","Path":"IMAGES\\x\\sandbox.vhdx"}}"#,
        ),
        (
            "1/63",
            images.disk(r"layers\1\layer.vhd").read_only(),
            r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/0110f83b-de10-5172-a266-78bca56bf50a/Attachments/63","RequestType":"Add","Settings":{"Type":"VirtualDisk","Path":"IMAGES\\layers\\1\\layer.vhd","ReadOnly":true}}"#,
        ),
        (
            "2/3",
            Disk::physical_disk(pass_through),
            r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/b5d2d8d4-3a75-51bf-945b-3444dc6b8579/Attachments/3","RequestType":"Add","Settings":{"Type":"PassThru","Path":"IMAGES\\physical\\DRIVE2"}}"#,
        ),
        (
            "3/1",
            Disk::extensible("myevd", "path/to/disk"),
            r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/305891a9-b251-5dfe-91a2-c25d9212275b/Attachments/1","RequestType":"Add","Settings":{"Type":"ExtensibleVirtualDisk","Path":"path/to/disk","ExtensibleVirtualDiskType":"myevd"}}"#,
        ),
    ];
    for (at, disk, expected) in cases {
        let attach = scsi.attach_identified(address(at), &disk);
        assert_eq!(document(&model, attach).await, images.insert(expected));
    }
    assert_eq!(
        document(&model, scsi.detach(address("0/0"))).await,
        r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/Attachments/0","RequestType":"Remove"}"#
    );
}

#[tokio::test]
async fn vpmem_devices_and_mappings_byte_for_byte() {
    let model = Model::linux().await;
    let vpmem = VpmemAttacher::new(model.clone(), GuestOs::Linux);
    let images = Images::new();
    let disk = images.disk(r"l\layer.vhd").read_only();
    let range = ByteRange::new(4_194_304, 1_052_672).unwrap();
    assert_eq!(
        document(&model, vpmem.attach_identified(device(0), &disk)).await,
        images.insert(
            r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/0","RequestType":"Add","Settings":{"HostPath":"IMAGES\\l\\layer.vhd","ReadOnly":true,"ImageFormat":"Vhd1"}}"#
        )
    );
    assert_eq!(
        document(&model, vpmem.detach(device(0))).await,
        r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/0","RequestType":"Remove"}"#
    );
    assert_eq!(
        document(&model, vpmem.map_identified(device(0), range, &disk)).await,
        images.insert(
            r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/0/Mappings/4194304","RequestType":"Add","Settings":{"HostPath":"IMAGES\\l\\layer.vhd","ImageFormat":"Vhd1"}}"#
        )
    );
    assert_eq!(
        document(&model, vpmem.unmap(device(0), range)).await,
        r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/0/Mappings/4194304","RequestType":"Remove"}"#
    );
}

#[test]
fn the_document_that_makes_a_vm_byte_for_byte() {
    let root = Disk::virtual_disk(r"C:\rootfs.vhd").read_only();
    let devices = Devices::default().scsi_controllers(2).unwrap();
    let devices = devices.scsi_disk(address("0/0"), &root).unwrap();
    let scsi = r#""Scsi":{"0110f83b-de10-5172-a266-78bca56bf50a":{},"df6d0690-79e5-55b6-a5ec-c1e2f77f580a":{"Attachments":{"0":{"Type":"VirtualDisk","Path":"C:\\rootfs.vhd","ReadOnly":true}}}}"#;
    assert_eq!(devices.to_json(), format!("{{{scsi}}}"));
    let devices = devices.vpmem(64, 4 << 30).unwrap();
    let devices = devices.vpmem_disk(device(0), &root).unwrap();
    let vpmem = r#""VirtualPMem":{"Devices":{"0":{"HostPath":"C:\\rootfs.vhd","ReadOnly":true,"ImageFormat":"Vhd1"}},"MaximumCount":64,"MaximumSizeBytes":4294967296}"#;
    assert_eq!(devices.to_json(), format!("{{{scsi},{vpmem}}}"));
    assert_eq!(
        serde_json::from_str::<Devices>(&devices.to_json()).unwrap(),
        devices
    );

    let more = devices.clone().scsi_disk(address("1/10"), &root).unwrap();
    let more = more.scsi_disk(address("0/2"), &root).unwrap();
    let more = more.vpmem_disk(device(10), &root).unwrap();
    let more = more.vpmem_disk(device(9), &root).unwrap();
    assert_eq!(more.reserved_scsi(), ["0/0", "0/2", "1/10"].map(address));
    assert_eq!(more.reserved_vpmem(), [0, 9, 10].map(device));

    let taken = devices.clone().scsi_disk(address("0/0"), &root);
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::Conflict);
    let taken = devices.clone().vpmem_disk(device(0), &root);
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::Conflict);
    for wrong in [
        devices.clone().scsi_controllers(5),
        devices.clone().scsi_disk(address("4/0"), &root),
        devices.clone().scsi_disk(address("0/64"), &root),
        devices.clone().vpmem(129, 4096),
        devices.clone().vpmem(1, 4095),
        devices.clone().vpmem(1, 0),
        devices
            .clone()
            .vpmem_disk(device(1), &Disk::virtual_disk("rw.vhd")),
    ] {
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Unsuitable);
    }
}

/// Mounts and so on in a guest that fails, each as the request inlined in its document.
#[tokio::test]
async fn requests_for_a_linux_guest_byte_for_byte() {
    let model = Model::linux().await;
    let guest = HcsGuest::new(
        HcsChannel::open(model.clone(), GuestOs::Linux)
            .await
            .unwrap(),
    );
    let inlined = |request: &str| format!(r#"{{"GuestRequest":{request}}}"#);
    let locator = |text: &str| text.parse().unwrap();
    let built = |options: blockmount::MountOptionsBuilder| options.build().unwrap();
    let formatted = Format::new("xfs");
    let mounts = [
        (
            "scsi:0/0",
            "/run/mounts/scsi/m0",
            MountOptions::default(),
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m0"}}"#,
        ),
        (
            "scsi:1/2",
            "/run/mounts/scsi/m1",
            built(
                MountOptions::builder()
                    .read_only()
                    .partition(3.try_into().unwrap()),
            ),
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m1","Lun":2,"Controller":1,"Partition":3,"ReadOnly":true,"Options":["ro"]}}"#,
        ),
        (
            "scsi:0/3",
            "/run/gcs/c/abc",
            built(
                MountOptions::builder()
                    .encryption(Encryption::Ephemeral)
                    .format(formatted),
            ),
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/gcs/c/abc","Lun":3,"Encrypted":true,"EnsureFilesystem":true,"Filesystem":"xfs"}}"#,
        ),
        (
            "scsi:0/4",
            "/run/mounts/scsi/m4",
            built(
                MountOptions::builder()
                    .options(["rshared"])
                    .expose(Expose::BlockDevice),
            ),
            r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m4","Lun":4,"Options":["rshared"],"BlockDev":true}}"#,
        ),
        (
            "vpmem:0",
            "/run/layers/p0",
            MountOptions::read_only(),
            r#"{"RequestType":"Add","ResourceType":"VPMemDevice","Settings":{"MountPath":"/run/layers/p0"}}"#,
        ),
        (
            "vpmem:0@0+1052672",
            "/run/layers/p0-0-1052672",
            MountOptions::read_only(),
            r#"{"RequestType":"Add","ResourceType":"VPMemDevice","Settings":{"MountPath":"/run/layers/p0-0-1052672","MappingInfo":{"DeviceSizeInBytes":1052672}}}"#,
        ),
        (
            "vpmem:1@4194304+1052672",
            "/run/layers/p1-4194304-1052672",
            MountOptions::read_only(),
            r#"{"RequestType":"Add","ResourceType":"VPMemDevice","Settings":{"DeviceNumber":1,"MountPath":"/run/layers/p1-4194304-1052672","MappingInfo":{"DeviceOffsetInBytes":4194304,"DeviceSizeInBytes":1052672}}}"#,
        ),
    ];
    for (device, target, options, expected) in mounts {
        let device = locator(device);
        let mount = guest.mount(&device, Path::new(target), &options);
        assert_eq!(document(&model, mount).await, inlined(expected));
    }
    // What may be mounted is unmounted by its path alone.
    let undone = document(&model, guest.unmount(Path::new("/run/mounts/scsi/m1"))).await;
    assert_eq!(
        undone,
        inlined(
            r#"{"RequestType":"Remove","ResourceType":"CombinedLayers","Settings":{"ContainerRootPath":"/run/mounts/scsi/m1"}}"#
        )
    );
    let third = built(
        MountOptions::builder()
            .read_only()
            .partition(3.try_into().unwrap()),
    );
    let target = Path::new("/run/mounts/scsi/m5");
    let (scsi, images) = (
        ScsiAttacher::new(model.clone(), GuestOs::Linux),
        Images::new(),
    );
    let disk = images.disk("a.vhdx").read_only();
    scsi.attach_identified(address("1/5"), &disk).await.unwrap();
    guest
        .mount(&locator("scsi:1/5"), target, &third)
        .await
        .unwrap();
    model.documents();
    let undone = document(&model, guest.unmount(target)).await;
    assert_eq!(
        undone,
        inlined(
            r#"{"RequestType":"Remove","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/run/mounts/scsi/m5","Lun":5,"Controller":1,"Partition":3,"ReadOnly":true}}"#
        )
    );
    for (device, settings) in [
        ("scsi:0/0", "{}"),
        ("scsi:1/2", r#"{"Controller":1,"Lun":2}"#),
    ] {
        let request = format!(
            r#"{{"RequestType":"Remove","ResourceType":"SCSIDevice","Settings":{settings}}}"#
        );
        let unplug = document(&model, guest.unplug(&locator(device))).await;
        assert_eq!(unplug, inlined(&request));
    }
    let overlay = Overlay::new(
        ["/run/layers/p0", "/run/mounts/scsi/m1"],
        "/run/gcs/c/abc/rootfs",
    )
    .with_scratch("/run/gcs/c/abc/scratch/abc");
    assert_eq!(
        document(&model, guest.combine(&overlay)).await,
        inlined(
            r#"{"RequestType":"Add","ResourceType":"CombinedLayers","Settings":{"ContainerID":"abc","ContainerRootPath":"/run/gcs/c/abc/rootfs","Layers":[{"Path":"/run/layers/p0"},{"Path":"/run/mounts/scsi/m1"}],"ScratchPath":"/run/gcs/c/abc/scratch/abc"}}"#
        )
    );
    assert_eq!(
        document(&model, guest.separate(&overlay.target)).await,
        inlined(
            r#"{"RequestType":"Remove","ResourceType":"CombinedLayers","Settings":{"ContainerRootPath":"/run/gcs/c/abc/rootfs"}}"#
        )
    );
}

/// What other clients send and this one does not.
#[test]
fn documents_of_other_clients_read_back() {
    for request in [
        r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"MountPath":"/m","Lun":1,"ReadOnly":true,"VerityInfo":{"Ext4SizeInBytes":1048576,"Version":1,"Algorithm":"sha256","SuperBlock":true,"RootDigest":"ab","Salt":"00","BlockSize":4096}}}"#,
        r#"{"RequestType":"Add","ResourceType":"CombinedLayers","Settings":{"ContainerID":"abc","ContainerRootPath":"/run/gcs/c/abc/rootfs","Layers":[{"Path":"/run/layers/p0"},{"Path":"/run/mounts/scsi/m1"}],"ScratchPath":"/run/gcs/c/abc/scratch/abc"}}"#,
        r#"{"RequestType":"Add","ResourceType":"MappedVirtualDisk","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m0","Lun":1}}"#,
        r#"{"RequestType":"Add","ResourceType":"MappedVirtualDiskForContainerScratch","Settings":{"ContainerPath":"c:\\mounts\\scsi\\m1","Lun":2}}"#,
    ] {
        let document = format!(r#"{{"GuestRequest":{request}}}"#);
        let read = ModifySettingRequest::from_json(&document).unwrap();
        assert_eq!(read.to_json(), document);
    }
    let all = Attachment {
        kind: "VirtualDisk".into(),
        path: "p".into(),
        ignore_flushes: true,
        caching_mode: "Cached".into(),
        no_write_hardening: true,
        disable_expansion_optimization: true,
        ignore_relative_locator: true,
        capture_io_attribution_context: true,
        read_only: true,
        support_compressed_volumes: true,
        always_allow_sparse_files: true,
        extensible_virtual_disk_type: "e".into(),
    };
    let text = r#"{"Type":"VirtualDisk","Path":"p","IgnoreFlushes":true,"CachingMode":"Cached","NoWriteHardening":true,"DisableExpansionOptimization":true,"IgnoreRelativeLocator":true,"CaptureIoAttributionContext":true,"ReadOnly":true,"SupportCompressedVolumes":true,"AlwaysAllowSparseFiles":true,"ExtensibleVirtualDiskType":"e"}"#;
    assert_eq!(serde_json::to_string(&all).unwrap(), text);
    assert_eq!(serde_json::from_str::<Attachment>(text).unwrap(), all);
    let controller = VirtualPMemController {
        backing: "Physical".into(),
        ..VirtualPMemController::default()
    };
    assert_eq!(
        serde_json::to_string(&controller).unwrap(),
        r#"{"Backing":"Physical"}"#
    );
    assert_eq!(PropertyQuery::basic().to_json(), r#"{"PropertyTypes":[]}"#);
    assert_eq!(
        PropertyQuery::guest_connection().to_json(),
        r#"{"PropertyTypes":["GuestConnection"]}"#
    );
}

#[test]
fn controllers_have_the_names_that_guests_look_for() {
    let namespace = uuid::uuid!("d422512d-2bf2-4752-809d-7b82b5fcb1b4");
    let name =
        |number: usize| uuid::Uuid::new_v5(&namespace, number.to_string().as_bytes()).to_string();
    for (number, guid) in HYPER_V_CONTROLLERS.iter().enumerate() {
        assert_eq!(*guid, name(number));
    }
    assert_eq!(name(4), "fef0a2b8-6d40-5828-84ae-ad703023977c");
    assert_eq!(name(5), "36f59d7a-4036-5b5c-b388-f9395ecd9d1a");
}

#[test]
fn what_is_no_document_is_refused() {
    for document in [
        "",
        "null",
        "[]",
        "{",
        r#"{"ResourcePath":7}"#,
        r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/0/Attachments/0"}"#,
        r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/Attachments/64"}"#,
        r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/df6d0690-79e5-55b6-a5ec-c1e2f77f580a/Attachments/00"}"#,
        r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/128"}"#,
        r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/1/Mappings/-1"}"#,
        r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/1","RequestType":"Replace"}"#,
        r#"{"ResourcePath":"VirtualMachine/Devices/VirtualPMem/Devices/1","Settings":{"ReadOnly":1}}"#,
        r#"{"GuestRequest":{"ResourceType":"Bogus","Settings":{}}}"#,
        r#"{"GuestRequest":{"ResourceType":"SCSIDevice"}}"#,
        r#"{"GuestRequest":[]}"#,
    ] {
        assert!(
            ModifySettingRequest::from_json(document).is_err(),
            "{document}"
        );
    }
    let odd = r#"{"resourcepath":"VirtualMachine/Devices/VirtualPMem/Devices/1","x":1,"REQUESTTYPE":"Remove"}"#;
    let path = ResourcePath::try_from(DiskAddress::VpmemDevice(device(1))).unwrap();
    assert_eq!(
        ModifySettingRequest::from_json(odd).unwrap(),
        ModifySettingRequest::remove(path)
    );
}

#[tokio::test]
async fn disk_options_are_refused() {
    let model = Model::linux().await;
    let scsi = ScsiAttacher::new(model.clone(), GuestOs::Linux);
    let vpmem = VpmemAttacher::new(model.clone(), GuestOs::Linux);
    let options = DiskOptions::default().direct_io(true);
    let images = Images::new();
    let disk = images.disk("a.vhd").read_only().with_options(options);
    let range = ByteRange::new(0, 4096).unwrap();
    for refused in [
        scsi.attach_identified(address("0/0"), &disk).await,
        vpmem.attach_identified(device(0), &disk).await,
        vpmem.map_identified(device(0), range, &disk).await,
        Devices::default()
            .scsi_disk(address("0/0"), &disk)
            .map(drop),
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
        assert!(error.message().contains("direct I/O"), "{error}");
    }
    assert_eq!(model.documents(), [""; 0]);
}

#[tokio::test]
async fn a_file_that_was_replaced_is_not_attached() {
    let model = Model::linux().await;
    let scsi = ScsiAttacher::new(model.clone(), GuestOs::Linux);
    let vpmem = VpmemAttacher::new(model.clone(), GuestOs::Linux);
    let images = Images::new();
    let disk = images.disk("a.vhd").read_only();
    let id = scsi.identify(&disk).await.unwrap();
    images.disk("b.vhd");
    std::fs::rename(images.path("b.vhd"), images.path("a.vhd")).unwrap();
    let range = ByteRange::new(0, 4096).unwrap();
    for refused in [
        scsi.attach(address("0/0"), &disk, &id).await,
        vpmem.attach(device(0), &disk, &id).await,
        vpmem.map(device(0), range, &disk, &id).await,
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    }
    assert_eq!(model.documents(), [""; 0]);
}

#[tokio::test]
async fn paths_are_escaped_or_refused() {
    let model = Model::linux().await;
    let scsi = ScsiAttacher::new(model.clone(), GuestOs::Linux);
    let vpmem = VpmemAttacher::new(model.clone(), GuestOs::Linux);
    let images = Images::new();
    let disk = images.disk(NASTY_NAME).read_only();
    // The path of a provider's disk is no file's, so it can have all of the characters on Windows too.
    let provided = Disk::extensible("a\"b", NASTY);
    for (disk, sent) in [
        (
            &disk,
            document(&model, scsi.attach_identified(address("0/0"), &disk)).await,
        ),
        (
            &disk,
            document(&model, vpmem.attach_identified(device(0), &disk)).await,
        ),
        (
            &provided,
            document(&model, scsi.attach_identified(address("0/0"), &provided)).await,
        ),
    ] {
        let value: serde_json::Value = serde_json::from_str(&sent).unwrap();
        let settings = &value["Settings"];
        let path = settings.get("Path").or(settings.get("HostPath")).unwrap();
        assert_eq!(path.as_str(), disk.source().to_str());
        assert_eq!(value.as_object().unwrap().len(), 3, "{sent}");
        let provider = sent.contains(r#""ExtensibleVirtualDiskType":"a\"b""#);
        assert_eq!(provider, *disk == provided, "{sent}");
    }
    let empty_provider = Disk::extensible("", "x");
    for disk in [
        Disk::virtual_disk(""),
        Disk::virtual_disk("a\0b"),
        no_unicode(),
        empty_provider,
    ] {
        let error = scsi
            .attach_identified(address("0/0"), &disk)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().len() < 300, "{error}");
        if *disk.kind() == blockmount::DiskKind::VirtualDisk {
            let error = vpmem
                .attach_identified(device(0), &disk.clone().read_only())
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            let error = scsi.identify(&disk).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
    }
    assert_eq!(model.documents(), [""; 0]);
}

/// What a document must escape, and what it must leave as it is.
const NASTY: &str = "C:\\a\"b\\\"}\u{7}\n<&>\u{2028}\u{202e}\u{1f4be}\u{fc}.vhd";

/// As much of it as the name of a file can have.
const NASTY_NAME: &str = if cfg!(windows) {
    "a'b'}&\u{2028}\u{202e}\u{1f4be}\u{fc}.vhd"
} else {
    NASTY
};

#[cfg(unix)]
fn no_unicode() -> Disk {
    use std::os::unix::ffi::OsStrExt;
    Disk::virtual_disk(std::ffi::OsStr::from_bytes(b"/a\xff.vhd"))
}

#[cfg(windows)]
fn no_unicode() -> Disk {
    use std::os::windows::ffi::OsStringExt;
    // Half of a surrogate pair.
    Disk::virtual_disk(std::ffi::OsString::from_wide(&[0x43, 0x3a, 0x5c, 0xd800]))
}

proptest! {
    #[test]
    fn any_path_reads_back(path in "\\PC{1,64}|[\"\\\\{}\u{0}-\u{1f}]{1,16}", lun in 0u64..64) {
        let lun = lun.try_into().unwrap();
        let address = DiskAddress::Scsi(blockmount_scsi::ScsiAddress::new(3u64.try_into().unwrap(), lun));
        let attachment = Attachment { path: path.clone(), ..Attachment::default() };
        let at = ResourcePath::try_from(address).unwrap();
        let request = ModifySettingRequest::add(at, Settings::Attachment(attachment));
        let document = request.to_json();
        prop_assert!(!document.contains(['\n', '\0']));
        prop_assert_eq!(&ModifySettingRequest::from_json(&document).unwrap(), &request);
        let layers = CombinedLayers { container_root_path: path, ..CombinedLayers::default() };
        let guest = ModificationRequest::add(Resource::CombinedLayers(layers));
        let request = ModifySettingRequest::guest(guest);
        prop_assert_eq!(&ModifySettingRequest::from_json(&request.to_json()).unwrap(), &request);
    }

    #[test]
    fn no_document_panics(text in "\\PC*", value in any::<u64>()) {
        let _ = ModifySettingRequest::from_json(&text);
        let _ = Properties::from_json(&text);
        let _ = text.parse::<ResourcePath>();
        let path = format!("VirtualMachine/Devices/VirtualPMem/Devices/{value}/Mappings/{text}");
        let _ = path.parse::<ResourcePath>();
    }
}
