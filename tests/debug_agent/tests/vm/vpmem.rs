//! Layers on persistent memory: packed on one device, and whole devices that come and go.

use blockmount::testing::AttachIdentified as _;
use std::path::Path;

use blockmount::{
    Disk, Encryption, ErrorKind, KeySource, LuksKey, MountOptions, MountRequest, Mounter,
    StackRequest, Transport, Unplugger,
};
use blockmount_vpmem::Mode;
use futures_util::future::join_all;
use serde_json::json;

use crate::rig::{KEYS, MEMORY_SIZE, Rig, read_only};
use blockmount_debug_agent::kit::{aes_xts, images, luks};

async fn subranges(rig: &Rig) -> usize {
    rig.tables().await["dm_devices"].as_array().unwrap().len()
}

/// A rig with one packed device, which stays, and nothing on it.
async fn packed() -> Rig {
    let mut rig = Rig::start_with_vpmem(Mode::Packed).await;
    let first = rig
        .manager
        .add(&rig.layer("first"), &read_only())
        .await
        .unwrap();
    first.release().await.unwrap();
    assert_eq!(subranges(&rig).await, 0);
    rig.begin_here().await;
    rig
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_8_layers_are_packed_on_one_device_and_read_back() {
    let rig = packed().await;
    let disks: Vec<Disk> = (0..8).map(|n| rig.layer(&format!("layer-{n}"))).collect();
    let request = read_only();
    let added = join_all(disks.iter().map(|disk| rig.manager.add(disk, &request))).await;
    let mounts: Vec<_> = added.into_iter().map(Result::unwrap).collect();
    for (n, mount) in mounts.iter().enumerate() {
        assert!(
            mount.locator().as_str().starts_with("vpmem:0@"),
            "{}",
            mount.locator()
        );
        rig.assert_content(&mount.path().join("id"), &format!("layer-{n}"))
            .await;
    }
    assert_eq!(subranges(&rig).await, 8);
    assert_eq!(
        rig.tables().await["pmem_devices"].as_array().unwrap().len(),
        1
    );
    for released in join_all(mounts.into_iter().map(|mount| mount.release())).await {
        released.unwrap();
    }
    assert_eq!(subranges(&rig).await, 0);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_packed_layers_are_removed_in_every_order() {
    let rig = packed().await;
    let disks: Vec<Disk> = (0..4).map(|n| rig.layer(&format!("layer-{n}"))).collect();
    let request = read_only();
    let orders = (0..4_usize.pow(4)).filter_map(|code| {
        let order: Vec<usize> = (0..4).map(|digit| code / 4_usize.pow(digit) % 4).collect();
        let distinct = (0..4).all(|n| order.contains(&n));
        distinct.then_some(order)
    });
    let mut seen = 0;
    for order in orders {
        let added = join_all(disks.iter().map(|disk| rig.manager.add(disk, &request))).await;
        let mut mounts: Vec<_> = added
            .into_iter()
            .map(|mount| Some(mount.unwrap()))
            .collect();
        for (gone, n) in order.iter().enumerate() {
            mounts[*n].take().unwrap().release().await.unwrap();
            assert_eq!(subranges(&rig).await, 3 - gone);
            for (left, mount) in mounts.iter().enumerate() {
                if let Some(mount) = mount {
                    let file = mount.path().join("id");
                    rig.assert_content(&file, &format!("layer-{left}")).await;
                }
            }
        }
        seen += 1;
    }
    assert_eq!(seen, 24);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_the_same_layer_128_times_is_one_device() {
    let rig = Rig::start_with_vpmem(Mode::WholeDevices).await;
    let (disk, request) = (rig.layer("same"), read_only());
    let added = join_all((0..128).map(|_| rig.manager.add(&disk, &request))).await;
    let mounts: Vec<_> = added.into_iter().map(Result::unwrap).collect();
    assert!(mounts.iter().all(|mount| mount.path() == mounts[0].path()));
    assert_eq!(
        rig.tables().await["pmem_devices"].as_array().unwrap().len(),
        1
    );
    for mount in mounts {
        mount.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_what_does_not_fit_on_vpmem_goes_to_scsi() {
    let rig = Rig::start_with_vpmem(Mode::WholeDevices).await;
    // One more than there are devices, one that is too large, and one to write to.
    let mut disks: Vec<Disk> = (0..5).map(|n| rig.layer(&format!("layer-{n}"))).collect();
    let large = rig.path("large");
    images::image("ext4", &large, &[("id", "large")]);
    std::fs::File::options()
        .append(true)
        .open(&large)
        .unwrap()
        .set_len(MEMORY_SIZE + 4096)
        .unwrap();
    disks.push(Disk::virtual_disk(&large).read_only());
    let mut mounts = Vec::new();
    for disk in &disks {
        mounts.push(rig.manager.add(disk, &read_only()).await.unwrap());
    }
    let writable = rig
        .manager
        .add(&rig.scratch("rw"), &MountRequest::default())
        .await
        .unwrap();
    let transports: Vec<&str> = mounts
        .iter()
        .map(|mount| mount.locator().transport())
        .collect();
    assert_eq!(
        transports,
        ["vpmem", "vpmem", "vpmem", "vpmem", "scsi", "scsi"]
    );
    assert_eq!(writable.locator().transport(), "scsi");
    rig.assert_content(&mounts[4].path().join("id"), "layer-4")
        .await;
    rig.assert_content(&mounts[5].path().join("id"), "large")
        .await;
    writable.release().await.unwrap();
    for mount in mounts {
        mount.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_container_has_layers_on_both() {
    let rig = packed().await;
    let image = rig.path("disk");
    images::partitioned(&image, &[("from-a-partition", "x")]);
    let partition = MountOptions::builder()
        .read_only()
        .partition(2.try_into().unwrap());
    let request = StackRequest::new("/run/containers/c/rootfs")
        .layer(rig.layer("top"), read_only())
        .layer(
            Disk::virtual_disk(&image).read_only(),
            MountRequest::new(partition.build().unwrap()),
        )
        .scratch(rig.scratch("scratch"), MountRequest::default());
    let stack = rig.manager.stack(&request).await.unwrap();
    let transports: Vec<&str> = stack
        .layers()
        .iter()
        .map(|layer| layer.locator().transport())
        .collect();
    assert_eq!(transports, ["vpmem", "vpmem"]);
    assert_eq!(stack.scratch().unwrap().locator().transport(), "scsi");
    rig.assert_content(&stack.target().join("id"), "top").await;
    rig.assert_content(&stack.target().join("from-a-partition"), "x")
        .await;
    rig.ask(json!({ "write": { "path": stack.target().join("new"), "content": "" } }))
        .await;
    stack.release().await.unwrap();
    rig.end().await;
}

/// What is encrypted in a range of a device is decrypted for readers, by its own sectors and not by those of the device.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_packed_layers_that_are_encrypted_are_read() {
    let rig = packed().await;
    let beside = rig.layer("beside");
    let mount = rig.manager.add(&beside, &read_only()).await.unwrap();
    let key: Vec<u8> = (100..164).collect();
    let write = async |name: &str, bytes: &[u8]| {
        let path = Path::new(KEYS).join(name);
        rig.ask(json!({ "write_key": { "path": path, "bytes": bytes } }))
            .await;
    };
    let source = |name: &str| KeySource::File(name.to_owned());
    let text = "of an encrypted layer";
    let plain = std::fs::read(rig.layer(text).source()).unwrap();
    let [keyed, volume] = ["keyed", "volume"].map(|name| rig.path(name));
    std::fs::write(&keyed, aes_xts::encrypted(&plain, &key, 4096)).unwrap();
    luks::volume_with(&volume, &plain);
    for (image, encryption, name, right, wrong) in [
        (&keyed, Encryption::Keyed(source("k")), "k", &*key, [7; 64]),
        (
            &volume,
            Encryption::Luks2(LuksKey::Passphrase(source("p"))),
            "p",
            luks::PASSPHRASE.as_bytes(),
            [b'x'; 64],
        ),
    ] {
        let disk = Disk::virtual_disk(image).read_only();
        let options = MountOptions::builder().read_only().encryption(encryption);
        let request = MountRequest::new(options.build().unwrap());
        write(name, &wrong).await;
        let error = rig.manager.add(&disk, &request).await.unwrap_err();
        let message = error.cause().message();
        let says = ["with another key", "does not open the volume"];
        assert!(says.iter().any(|said| message.contains(said)), "{message}");
        assert_eq!(subranges(&rig).await, 1, "only the range beside it");
        write(name, right).await;
        let encrypted = rig.manager.add(&disk, &request).await.unwrap();
        let locator = encrypted.locator().as_str();
        assert!(locator.starts_with("vpmem:0@"), "{locator}");
        rig.assert_content(&encrypted.path().join("id"), text).await;
        assert_eq!(subranges(&rig).await, 3);
        encrypted.release().await.unwrap();
        assert_eq!(subranges(&rig).await, 1);
    }
    mount.release().await.unwrap();
    assert_eq!(rig.ask(json!("keys")).await, json!({ "keys": [] }));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_30_hot_plugs_with_alternating_content_are_never_stale() {
    let rig = Rig::start_with_vpmem(Mode::WholeDevices).await;
    let disks = [rig.layer("even"), rig.layer("odd")];
    for round in 0..30 {
        let (disk, text) = match round % 2 {
            0 => (&disks[0], "even"),
            _ => (&disks[1], "odd"),
        };
        let mount = rig.manager.add(disk, &read_only()).await.unwrap();
        // The same device number each time.
        assert_eq!(mount.locator().as_str(), "vpmem:0");
        rig.assert_content(&mount.path().join("id"), text).await;
        mount.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_dax_is_on_when_it_was_asked_for_or_the_mount_fails() {
    let rig = Rig::start_with_vpmem(Mode::WholeDevices).await;
    let image = rig.path("dax.ext4");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    let content = rig.path("content");
    std::fs::create_dir(&content).unwrap();
    std::fs::write(content.join("file"), "x").unwrap();
    let format = std::process::Command::new("/usr/sbin/mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-d"])
        .args([&content, &image])
        .status();
    assert!(format.unwrap().success());
    let request = |option: &str| {
        let options = MountOptions::builder().read_only().options([option]);
        MountRequest::new(options.build().unwrap())
    };
    // Only files have it, not directories.
    let is_dax = |path: &Path| rig.ask(json!({ "dax": { "path": path.join("file") } }));
    let disk = Disk::virtual_disk(&image).read_only();
    let with = rig
        .manager
        .add(&disk, &request("dax=always"))
        .await
        .unwrap();
    assert_eq!(is_dax(with.path()).await, json!({ "dax": true }));
    with.release().await.unwrap();
    let without = rig.manager.add(&disk, &request("dax=never")).await.unwrap();
    assert_eq!(is_dax(without.path()).await, json!({ "dax": false }));
    without.release().await.unwrap();
    // A disk on SCSI has a page cache whatever is asked for.
    let locator = rig.scsi.attach_identified(&disk).await.unwrap();
    let target = Path::new("/run/containers/dax");
    let options = request("dax=always");
    let error = rig
        .guest
        .mount(&locator, target, options.options())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsuitable, "{error}");
    rig.guest.unplug(&locator).await.unwrap();
    rig.scsi.detach(&disk).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_agent_that_was_killed_takes_over_its_subranges() {
    let rig = packed().await;
    let mounts = [
        rig.manager
            .add(&rig.layer("one"), &read_only())
            .await
            .unwrap(),
        rig.manager
            .add(&rig.layer("two"), &read_only())
            .await
            .unwrap(),
    ];
    rig.ask(json!("kill_agent")).await;
    for (mount, text) in mounts.iter().zip(["one", "two"]) {
        rig.assert_content(&mount.path().join("id"), text).await;
    }
    assert_eq!(subranges(&rig).await, 2);
    for mount in mounts {
        mount.release().await.unwrap();
    }
    assert_eq!(subranges(&rig).await, 0);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_packed_layer_in_use_refuses_its_release_and_stays_usable() {
    let rig = packed().await;
    let mount = rig
        .manager
        .add(&rig.layer("used"), &read_only())
        .await
        .unwrap();
    let other = rig
        .manager
        .add(&rig.layer("other"), &read_only())
        .await
        .unwrap();
    let file = mount.path().join("id");
    rig.ask(json!({ "hold": { "path": file } })).await;
    let refused = mount.release().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    // One range of the device does not keep the others.
    other.release().await.unwrap();
    rig.assert_content(&file, "used").await;
    rig.ask(json!({ "release": { "path": file } })).await;
    refused.retry().await.unwrap();
    rig.end().await;
}
