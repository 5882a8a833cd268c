//! Many disks, and disks of all kinds.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use blockmount::{
    CacheMode, Disk, DiskKind, DiskOptions, ErrorKind, Manager, MountOptions, MountRequest,
    SectorSize, StackRequest,
};
use blockmount_qemu::qmp::NONE;
use blockmount_scsi::{Geometry, ScsiAddress, ScsiTransport};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::rig::{MOUNTS, Rig, read_only};
use blockmount_debug_agent::kit::images;

/// Adds so many layers at once, and asserts that each is at a place of its own with its own content.
async fn add_many(rig: &Rig, number: usize) -> Vec<blockmount::Mount> {
    let disks: Vec<Disk> = (0..number)
        .map(|n| rig.layer(&format!("layer-{n}")))
        .collect();
    let request = read_only();
    let added = join_all(disks.iter().map(|disk| rig.manager.add(disk, &request))).await;
    let mounts: Vec<_> = added.into_iter().map(Result::unwrap).collect();
    let places: BTreeSet<_> = mounts.iter().map(|mount| mount.locator().clone()).collect();
    assert_eq!(places.len(), number);
    for (n, mount) in mounts.iter().enumerate() {
        let file = mount.path().join("id");
        rig.assert_content(&file, &format!("layer-{n}")).await;
    }
    mounts
}

async fn release_all(mounts: Vec<blockmount::Mount>) {
    for released in join_all(mounts.into_iter().map(|mount| mount.release())).await {
        released.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_64_disks_at_once_each_have_their_own_content() {
    let rig = Rig::start().await;
    let mounts = add_many(&rig, 64).await;
    // Spread over the controllers, and each at the address that its locator says.
    let tables = rig.tables().await;
    let seen = tables["scsi_devices"].as_array().unwrap().len();
    assert_eq!(seen, 64);
    for controller in 0..4 {
        let on_it = mounts.iter().filter(|mount| {
            let prefix = format!("scsi:{controller}/");
            mount.locator().as_str().starts_with(&prefix)
        });
        assert_eq!(on_it.count(), 16);
    }
    release_all(mounts).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_256_disks_fit_on_a_bus_of_64_each_and_the_next_is_refused() {
    let mut rig = Rig::start().await;
    // As many as Hyper-V has, so that the bus is full before the images are made.
    let scsi = ScsiTransport::new(rig.vm.scsi(), Geometry::HYPER_V, &[]).unwrap();
    rig.manager = Manager::builder()
        .transport(scsi)
        .unplugger(rig.guest.clone())
        .mounter(rig.guest.clone())
        .combiner(rig.guest.clone())
        .mount_root(MOUNTS)
        .build();
    let mounts = add_many(&rig, 256).await;
    let full = rig.state().await;
    let one_more = rig.layer("one-more");
    let error = rig.manager.add(&one_more, &read_only()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert_eq!(rig.state().await, full);
    release_all(mounts).await;
    rig.end().await;
}

/// Makes a disk with a partition for each number, on which is an erofs with a file of the number's name, and one of a common name.
fn partition_for_each(path: &Path, numbers: &[usize]) {
    const FIRST: usize = 2048;
    let erofs = path.with_extension("erofs");
    let (mut table, mut content) = ("label: gpt\n".to_owned(), Vec::new());
    for number in numbers {
        let (own, text) = (format!("layer-{number}"), number.to_string());
        images::image("erofs", &erofs, &[(&own, &text), ("common", &text)]);
        let bytes = std::fs::read(&erofs).unwrap();
        let (start, size) = (FIRST + content.len() / 512, bytes.len() / 512);
        table += &format!("start={start},size={size}\n");
        content.extend(bytes);
    }
    let disk = std::fs::File::create(path).unwrap();
    // The table is at the end too.
    let length = 2 * FIRST * 512 + content.len();
    disk.set_len(length as u64).unwrap();
    let script = path.with_extension("script");
    std::fs::write(&script, table).unwrap();
    let mut sfdisk = images::tool("sfdisk");
    let script = std::fs::File::open(script).unwrap();
    sfdisk.arg("-q").arg(path).stdin(script);
    images::run_tool(sfdisk);
    let at = (FIRST * 512) as u64;
    std::os::unix::fs::FileExt::write_all_at(&disk, &content, at).unwrap();
}

/// There are not so many disks: each has 125 of the layers. Under emulation 500 of them take minutes, so that they are for by hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_hundreds_of_layers_are_one_tree() {
    use sha2::{Digest, Sha256};
    let count = std::env::var("BLOCKMOUNT_LAYERS").map_or(100, |count| count.parse().unwrap());
    let rig = Rig::start().await;
    let mut request = StackRequest::new("/run/containers/many/rootfs");
    let numbers: Vec<usize> = (0..count).collect();
    for numbers in numbers.chunks(125) {
        let image = rig.path(&format!("from-{}", numbers[0]));
        partition_for_each(&image, numbers);
        let disk = Disk::virtual_disk(&image).read_only();
        for number in 1..=numbers.len() as u32 {
            let options = MountOptions::builder().read_only();
            let options = options.partition(number.try_into().unwrap()).build();
            request = request.layer(disk.clone(), MountRequest::new(options.unwrap()));
        }
    }
    let began = std::time::Instant::now();
    let stack = rig.manager.stack(&request).await;
    let stack = stack.unwrap_or_else(|error| panic!("{error}: {}", error.cause()));
    println!("{count} layers were stacked in {:?}", began.elapsed());
    let tree = rig.tree(stack.target()).await;
    println!("and read after {:?}", began.elapsed());
    assert_eq!(tree.len(), count + 1);
    let file = |text: String| {
        let digest = Sha256::digest(text);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({ "file": digest })
    };
    for number in numbers {
        let name = format!("layer-{number}");
        assert_eq!(tree[&name], file(number.to_string()), "{name}");
    }
    assert_eq!(tree["common"], file("0".to_owned()), "the topmost has it");
    stack.release().await.unwrap();
    println!("and released after {:?}", began.elapsed());
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_every_filesystem_read_only_and_ext4_and_xfs_for_writing() {
    let rig = Rig::start().await;
    for filesystem in ["ext4", "erofs", "squashfs"] {
        let path = rig.path(filesystem);
        images::image(filesystem, &path, &[("d/file", filesystem)]);
        let disk = Disk::virtual_disk(&path).read_only();
        let mount = rig.manager.add(&disk, &read_only()).await.unwrap();
        rig.assert_content(&mount.path().join("d/file"), filesystem)
            .await;
        let write = json!({ "write": { "path": mount.path().join("x"), "content": "" } });
        assert!(rig.ask_and_see(write).await["failed"].is_string());
        mount.release().await.unwrap();
    }
    let xfs = rig.path("xfs");
    std::fs::File::create(&xfs)
        .unwrap()
        .set_len(320 << 20)
        .unwrap();
    assert!(
        Command::new("/usr/sbin/mkfs.xfs")
            .arg("-q")
            .arg(&xfs)
            .status()
            .unwrap()
            .success()
    );
    for (kind, image) in [
        ("ext4", rig.scratch("rw").source().to_owned()),
        ("xfs", xfs),
    ] {
        // What was written by one mount is there for the next, which is a read-only one.
        let written = rig
            .manager
            .add(&Disk::virtual_disk(&image), &MountRequest::default())
            .await
            .unwrap();
        let write = json!({ "write": { "path": written.path().join("file"), "content": kind } });
        rig.ask(write).await;
        written.release().await.unwrap();
        let disk = Disk::virtual_disk(&image).read_only();
        let read = rig.manager.add(&disk, &read_only()).await.unwrap();
        rig.assert_content(&read.path().join("file"), kind).await;
        read.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_partitions_are_found_by_their_numbers() {
    let rig = Rig::start().await;
    let image = rig.path("disk");
    images::partitioned(&image, &[("file", "on partition 2")]);
    let disk = Disk::virtual_disk(&image).read_only();
    let partition = |number| {
        let options = MountOptions::builder().read_only().partition(number);
        MountRequest::new(options.build().unwrap())
    };
    let two = partition(2.try_into().unwrap());
    let mount = rig.manager.add(&disk, &two).await.unwrap();
    rig.assert_content(&mount.path().join("file"), "on partition 2")
        .await;
    let three = partition(3.try_into().unwrap());
    let error = rig.manager.add(&disk, &three).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::NotFound,
        "{error}: {}",
        error.cause()
    );
    assert!(
        error.cause().message().contains("1, 2"),
        "{}",
        error.cause()
    );
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_qcow2_and_evd_are_what_they_are() {
    let rig = Rig::start().await;
    let (raw, qcow2) = (rig.path("raw"), rig.path("disk.qcow2"));
    images::image("erofs", &raw, &[("file", "in qcow2")]);
    // An image tool rounds up to sectors, which an erofs is anyway.
    let convert = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status();
    assert!(convert.unwrap().success());
    let disk = Disk::virtual_disk(&qcow2).read_only();
    let mount = rig.manager.add(&disk, &read_only()).await.unwrap();
    rig.assert_content(&mount.path().join("file"), "in qcow2")
        .await;
    mount.release().await.unwrap();
    let evd = Disk::extensible("provider", "x").read_only();
    assert!(matches!(evd.kind(), DiskKind::Extensible { .. }));
    let error = rig.manager.add(&evd, &read_only()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_overlay_of_40_layers_and_a_scratch() {
    let rig = Rig::start().await;
    let mut request = StackRequest::new("/run/containers/c1/rootfs");
    for n in 0..40 {
        let path = rig.path(&format!("{n}.erofs"));
        let own = format!("only-in-{n}");
        images::image("erofs", &path, &[("id", &own), (&own, "x")]);
        request = request.layer(Disk::virtual_disk(path).read_only(), read_only());
    }
    let request = request.scratch(rig.scratch("scratch"), MountRequest::default());
    let stack = rig.manager.stack(&request).await.unwrap();
    let root = stack.target().to_owned();
    // The topmost layer comes first.
    rig.assert_content(&root.join("id"), "only-in-0").await;
    let tree = rig.tree(&root).await;
    assert!((0..40).all(|n| tree.contains_key(&format!("only-in-{n}"))));
    rig.ask(json!({ "write": { "path": root.join("new"), "content": "new" } }))
        .await;
    rig.ask(json!({ "remove": { "path": root.join("only-in-39") } }))
        .await;
    let tree = rig.tree(&root).await;
    assert!(tree.contains_key("new") && !tree.contains_key("only-in-39"));
    stack.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_i04_the_guest_sees_the_options_of_a_disk() {
    let rig = Rig::start().await;
    let default = DiskOptions::default();
    let tuned = default.clone().cache(CacheMode::WriteThrough);
    let tuned = tuned.sector_size(SectorSize::B4096).discard(false);
    let other = default.clone().cache(CacheMode::Unsafe).direct_io(true);
    let other = other.sector_size(SectorSize::B512).discard(true);
    let cases = [
        (default, ["512", "512", "write back"], false),
        (tuned, ["4096", "4096", "write through"], true),
        (other, ["512", "512", "write back"], false),
    ];
    for (number, (options, seen, no_discard)) in cases.into_iter().enumerate() {
        let disk = rig
            .scratch(&format!("image-{number}"))
            .with_options(options);
        let attached = rig.manager.attach(&disk).await.unwrap();
        let address = ScsiAddress::try_from(attached.locator()).unwrap();
        let block = format!(
            "/sys/class/scsi_device/{}:0:0:0/device/block",
            address.controller
        );
        let name = scsi_disk(&rig).await;
        let queue = Path::new(&block).join(name).join("queue");
        let attributes = ["logical_block_size", "physical_block_size", "write_cache"];
        for (attribute, value) in attributes.into_iter().zip(seen) {
            let file = queue.join(attribute);
            rig.assert_content(&file, &format!("{value}\n")).await;
        }
        let digests = rig.tree(&queue).await;
        let none = rig.tree(&queue).await["discard_zeroes_data"].clone();
        assert_eq!(
            digests["discard_max_bytes"] == none,
            no_discard,
            "{digests:?}"
        );
        attached.release().await.unwrap();
    }
    let queues = DiskOptions::default().queues(4.try_into().unwrap());
    let disk = rig.scratch("refused").with_options(queues);
    let error = rig.manager.attach(&disk).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
    assert!(
        error.cause().message().contains("queues"),
        "{}",
        error.cause()
    );
    rig.end().await;
}

/// The name of the only SCSI disk, once the guest has found it.
async fn scsi_disk(rig: &Rig) -> String {
    for _ in 0..200 {
        let tables = rig.tables().await;
        let names = tables["block_devices"].as_array().unwrap().iter();
        let mut names = names.filter_map(|disk| disk["name"].as_str());
        if let Some(name) = names.find(|name| name.starts_with("sd")) {
            return name.to_owned();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the guest has no SCSI disk");
}

/// Of a burst of hot-plugs on one controller, all but eight can be lost on their way to a guest that is slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_bare_mount_finds_a_disk_that_was_not_announced() {
    let rig = Rig::start().await;
    let attached = rig.manager.attach(&rig.layer("lost")).await.unwrap();
    let address = ScsiAddress::try_from(attached.locator()).unwrap();
    let address = format!("{}:0:0:{}", address.controller, address.lun);
    scsi_disk(&rig).await;
    let delete = format!("/sys/bus/scsi/devices/{address}/delete");
    rig.ask(json!({ "write": { "path": delete, "content": "1" } }))
        .await;
    assert_eq!(rig.tables().await["scsi_devices"], json!([]));
    let mount = json!({ "device": address, "filesystem": "erofs", "target": "/run/found", "read_only": true,
        "data": "", "count": 1 });
    let times = rig
        .ask(json!({ "bare_mount": { "mounts": [mount] } }))
        .await;
    assert_eq!(times["bare_mounts"].as_array().unwrap().len(), 1, "{times}");
    attached.release().await.unwrap();
    rig.end().await;
}

/// Plugs a disk by bare commands: the guest's kernel finds it, and nobody asks the agent for it.
async fn plug(rig: &Rig, id: &str, lun: u16, file: Value) {
    let qmp = rig.vm.qmp();
    let node = json!({ "driver": "raw", "node-name": id, "read-only": true, "file": file });
    qmp.execute("blockdev-add", node).await.unwrap();
    let device = json!({ "driver": "scsi-hd", "id": id, "bus": "scsi0.0", "channel": 0, "scsi-id": 0,
        "lun": lun, "drive": id });
    qmp.execute("device_add", device).await.unwrap();
}

async fn take_out(rig: &Rig, id: &str) {
    let qmp = rig.vm.qmp();
    qmp.execute("device_del", json!({ "id": id }))
        .await
        .unwrap();
    // QEMU refuses it for as long as the device has not gone.
    let node = json!({ "node-name": id });
    soon(async || qmp.execute("blockdev-del", node.clone()).await.is_ok()).await;
}

/// Waits until something is so, of which QEMU sends no event.
async fn soon(is_so: impl AsyncFn() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    waited.expect("it is not so for a minute");
}

/// The kernel keeps what it knows of a disk if it misses that another has taken its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_disk_in_the_place_of_one_whose_end_was_lost_is_measured() {
    let mut rig = Rig::start().await;
    let at_zero = ScsiAddress::new(0.try_into().unwrap(), 0.try_into().unwrap());
    let geometry = Geometry::new(1, 2).unwrap();
    let scsi = ScsiTransport::new(rig.vm.scsi(), geometry, &[at_zero]).unwrap();
    rig.manager = Manager::builder()
        .transport(scsi)
        .unplugger(rig.guest.clone())
        .mounter(rig.guest.clone())
        .mount_root(MOUNTS)
        .build();
    let small = rig.layer("small");
    let mount = rig.manager.add(&small, &read_only()).await.unwrap();
    mount.release().await.unwrap();
    // As if the kernel had found it anew before it was out.
    let file = json!({ "driver": "file", "filename": small.source(), "read-only": true });
    plug(&rig, "missed", 1, file).await;
    scsi_disk(&rig).await;
    rig.vm.qmp().execute("stop", NONE).await.unwrap();
    // More events than QEMU has room for in the guest's memory.
    let fillers: Vec<String> = (0..10).map(|n| format!("filler-{n}")).collect();
    for (filler, lun) in fillers.iter().zip(100..) {
        let empty = json!({ "driver": "null-co", "size": 1 << 20, "read-only": true });
        plug(&rig, filler, lun, empty).await;
    }
    take_out(&rig, "missed").await;
    for filler in &fillers {
        take_out(&rig, filler).await;
    }
    let large = rig.path("large.ext4");
    images::image("ext4", &large, &[("id", "large")]);
    let large = Disk::virtual_disk(large).read_only();
    let request = read_only();
    let add = rig.manager.add(&large, &request);
    let go_on = async {
        soon(async || {
            let disks = rig.vm.qmp().execute("query-block", NONE).await.unwrap();
            !disks.as_array().unwrap().is_empty()
        })
        .await;
        rig.vm.qmp().execute("cont", NONE).await.unwrap();
    };
    let (mount, ()) = tokio::join!(add, go_on);
    let mount = mount.unwrap();
    rig.assert_content(&mount.path().join("id"), "large").await;
    mount.release().await.unwrap();
    rig.end().await;
}
