//! Layers whose integrity is checked: on SCSI and on VPMEM, whole disks, partitions and ranges; and what is corrupt.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blockmount::testing::AttachIdentified as _;
use blockmount::{
    BackendError, DeviceLocator, DeviceRole, Disk, ErrorCorrection, ErrorKind, Expose,
    HashAlgorithm, MountOptions, MountRequest, Mounter, OnCorruption, Transport, Unplugger, Verity,
};
use blockmount_debug_agent::kit::images;
use blockmount_debug_agent::trial::Trial;
use blockmount_verity::{Parameters, Sealed, Superblock, format, seal};
use blockmount_vpmem::Mode;
use serde_json::{Value, json};

use crate::exercise::Tried;
use crate::rig::{Rig, read_only};

/// Longer than a few blocks, and nowhere else in an image.
fn text() -> String {
    (0..20_000).map(|n| format!("{n:06}\n")).collect()
}

/// An erofs with two files, `id` and `large`.
fn image(rig: &Rig, name: &str) -> PathBuf {
    let path = rig.path(&format!("{name}.erofs"));
    images::image("erofs", &path, &[("id", name), ("large", &text())]);
    path
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// A sealed layer, with what a guest is told of it.
fn sealed(rig: &Rig, name: &str) -> (PathBuf, Verity) {
    let path = image(rig, name);
    let made = seal(&open(&path), &Parameters::default(), &|_| true).unwrap();
    (path, options_of(&made))
}

fn options_of(sealed: &Sealed) -> Verity {
    let options = sealed
        .superblock
        .options(&sealed.root_digest, sealed.hash_offset);
    options.unwrap()
}

fn request(verity: &Verity) -> MountRequest {
    let options = MountOptions::builder().read_only().verity(verity.clone());
    MountRequest::new(options.build().unwrap())
}

fn disk(path: &Path) -> Disk {
    Disk::virtual_disk(path).read_only()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

async fn mapped(rig: &Rig) -> usize {
    rig.tables().await["dm_devices"].as_array().unwrap().len()
}

/// What the guest says to a mount of a disk, which is taken out again.
async fn refusal(rig: &Rig, path: &Path, verity: &Verity) -> BackendError {
    let locator: DeviceLocator = rig.scsi.attach_identified(&disk(path)).await.unwrap();
    let target = Path::new("/run/containers/refused");
    let request = request(verity);
    let mounted = rig.guest.mount(&locator, target, request.options()).await;
    let error = mounted.unwrap_err();
    assert_eq!(mapped(rig).await, 0, "{error}");
    rig.guest.unplug(&locator).await.unwrap();
    rig.scsi.detach(&disk(path)).await.unwrap();
    error
}

/// Whether all of a tree can be read.
async fn read(rig: &Rig, path: &Path) -> Value {
    rig.ask_and_see(json!({ "tree": { "path": path } })).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_g07_g13_a_checked_layer_is_one_device_for_all_who_mount_it_and_goes_with_the_last() {
    let rig = Rig::start().await;
    let (path, verity) = sealed(&rig, "layer");
    let request = request(&verity);
    let mount = rig.manager.add(&disk(&path), &request).await.unwrap();
    rig.assert_content(&mount.path().join("id"), "layer").await;
    rig.assert_content(&mount.path().join("large"), &text())
        .await;
    let tables = rig.tables().await;
    let device = &tables["dm_devices"][0];
    let name = device["name"].as_str().unwrap();
    assert!(name.starts_with("blockmount-verity-8."), "{device}");
    assert!(name.ends_with(&verity.root_digest[..32]), "{device}");
    // Another target in the guest has the same device; one with another policy cannot.
    let (again, other) = (
        Path::new("/run/containers/a"),
        Path::new("/run/containers/b"),
    );
    let guest = &rig.guest;
    guest
        .mount(mount.locator(), again, request.options())
        .await
        .unwrap();
    assert_eq!(mapped(&rig).await, 1);
    let mut ignoring = verity.clone();
    ignoring.on_corruption = OnCorruption::Ignore;
    let options = self::request(&ignoring);
    let refused = guest.mount(mount.locator(), other, options.options()).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Conflict);
    let refused = mount.release().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    // It could be retried, and keeps the VM for that.
    drop(refused);
    guest.unmount(again).await.unwrap();
    assert!(rig.manager.drain().await.is_clean());
    // Exposed, it goes by its target alone as well.
    let locator = rig.scsi.attach_identified(&disk(&path)).await.unwrap();
    let exposed = MountOptions::builder()
        .read_only()
        .verity(verity.clone())
        .expose(Expose::BlockDevice);
    let exposed = exposed.build().unwrap();
    guest.mount(&locator, again, &exposed).await.unwrap();
    assert_eq!(mapped(&rig).await, 1);
    // Somebody else, who would make a device of the same name, is told at once that there is one.
    let trial = Trial {
        disk: Tried::address_of(&locator).into(),
        range: None,
        options: request.options().clone(),
        directory: "/run/trial".into(),
        keys: None,
    };
    let began = Instant::now();
    let answer = rig.ask(json!({ "try": trial })).await;
    let refused = answer["refused"].as_str().unwrap();
    assert!(refused.contains("there is one already"), "{refused}");
    assert!(began.elapsed() < Duration::from_secs(20), "{answer}");
    guest.unmount(again).await.unwrap();
    assert_eq!(mapped(&rig).await, 0);
    guest.unplug(&locator).await.unwrap();
    rig.scsi.detach(&disk(&path)).await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_every_algorithm_and_block_size_is_mounted() {
    let rig = Rig::start().await;
    for (algorithm, data_block_size, hash_block_size) in [
        (HashAlgorithm::Sha256, 512, 4096),
        (HashAlgorithm::Sha384, 1024, 512),
        (HashAlgorithm::Sha512, 4096, 1024),
    ] {
        let path = image(&rig, "layer");
        let parameters = Parameters {
            algorithm,
            data_block_size,
            hash_block_size,
            salt: vec![1, 2, 3],
        };
        let made = seal(&open(&path), &parameters, &|_| true).unwrap();
        let mut verity = options_of(&made);
        (verity.check_at_most_once, verity.try_verify_in_tasklet) = (true, true);
        let mount = rig.manager.add(&disk(&path), &request(&verity)).await;
        let mount =
            mount.unwrap_or_else(|error| panic!("{parameters:?}: {error}: {}", error.cause()));
        rig.assert_content(&mount.path().join("large"), &text())
            .await;
        mount.release().await.unwrap();
        fs::remove_file(path).unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_partition_and_a_range_are_checked() {
    let rig = Rig::start_with_vpmem(Mode::Packed).await;
    // On a packed device: a range, and what checks it.
    let (path, verity) = sealed(&rig, "packed");
    let mount = rig
        .manager
        .add(&disk(&path), &request(&verity))
        .await
        .unwrap();
    assert!(mount.locator().as_str().starts_with("vpmem:0@"));
    rig.assert_content(&mount.path().join("large"), &text())
        .await;
    assert_eq!(mapped(&rig).await, 2);
    mount.release().await.unwrap();
    assert_eq!(mapped(&rig).await, 0);
    // A partition that has data and tree: an ext4 of 8 MiB with blocks of 1 KiB.
    let whole = rig.path("partitioned");
    images::partitioned(&whole, &[("id", "partition")]);
    let part = rig.path("part");
    let bytes = fs::read(&whole).unwrap();
    fs::write(&part, &bytes[2 << 20..10 << 20]).unwrap();
    let parameters = Parameters {
        data_block_size: 1024,
        ..Parameters::default()
    };
    let made = seal(&open(&part), &parameters, &|_| true).unwrap();
    let grown = fs::read(&part).unwrap();
    fs::write(&whole, vec![0; (4 << 20) + grown.len()]).unwrap();
    let table = format!("label: gpt\nstart=2048,size={}\n", grown.len() / 512);
    let mut sfdisk = images::tool("sfdisk");
    let mut sfdisk = sfdisk
        .arg("-q")
        .arg(&whole)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut sfdisk.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    std::os::unix::fs::FileExt::write_all_at(&open(&whole), &grown, 1 << 20).unwrap();
    let locator = rig.scsi.attach_identified(&disk(&whole)).await.unwrap();
    let options = MountOptions::builder()
        .read_only()
        .partition(1.try_into().unwrap());
    let options = options.verity(options_of(&made)).build().unwrap();
    let target = Path::new("/run/containers/partition");
    rig.guest.mount(&locator, target, &options).await.unwrap();
    rig.assert_content(&target.join("id"), "partition").await;
    assert_eq!(mapped(&rig).await, 1);
    rig.guest.unmount(target).await.unwrap();
    assert_eq!(mapped(&rig).await, 0);
    rig.guest.unplug(&locator).await.unwrap();
    rig.scsi.detach(&disk(&whole)).await.unwrap();
    assert!(rig.manager.drain().await.is_clean());
    rig.end_as_it_is().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_g20_one_flipped_bit_is_an_error_that_names_the_disk_which_is_unmounted_all_the_same() {
    let rig = Rig::start().await;
    let (good, verity) = sealed(&rig, "good");
    let bytes = fs::read(&good).unwrap();
    let content = text();
    let middle = &content.as_bytes()[70_000..70_032];
    let found = bytes
        .windows(middle.len())
        .position(|window| window == middle);
    let in_file = found.unwrap();
    let root = usize::try_from(verity.hash_start_block).unwrap() * 4096;
    // The superblock of the filesystem, and the root of the tree.
    for at in [1024 + 50, root + 5] {
        let path = rig.path("bad");
        fs::copy(&good, &path).unwrap();
        flip(&path, at);
        let error = refusal(&rig, &path, &verity).await;
        assert_eq!(error.kind(), ErrorKind::Invalid, "{at}: {error}");
        let message = error.message();
        let names_it = message.contains("/dev/sd") && message.contains(&verity.root_digest);
        assert!(names_it && message.contains("root digest"), "{at}: {error}");
    }
    // A wrong root: of another image, and of none.
    let (_, mut other) = sealed(&rig, "other");
    other.data_blocks = verity.data_blocks;
    other.hash_start_block = verity.hash_start_block;
    let error = refusal(&rig, &good, &other).await;
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    // In a file: the mount is good, reading that file is not, and reading another one is.
    let path = rig.path("bad-file");
    fs::copy(&good, &path).unwrap();
    flip(&path, in_file);
    let mount = rig
        .manager
        .add(&disk(&path), &request(&verity))
        .await
        .unwrap();
    let answer = read(&rig, mount.path()).await;
    let failed = answer["failed"].to_string();
    assert!(
        failed.contains("large") && failed.contains("os error 5"),
        "{answer}"
    );
    // Without its superblocks and the root of its tree it could not be mounted, and is unmounted.
    let image = fs::read(&path).unwrap();
    let superblocks = [1024..1024 + 64, root - 4096..root + 4096];
    for range in superblocks {
        let start = range.start as u64;
        let noise = vec![0xff; range.len()];
        std::os::unix::fs::FileExt::write_all_at(&open(&path), &noise, start).unwrap();
    }
    rig.ask(json!("drop_caches")).await;
    mount.release().await.unwrap();
    assert_eq!(mapped(&rig).await, 0);
    fs::write(&path, image).unwrap();
    // Whoever asks for it gets what is there.
    let mut ignoring = verity.clone();
    ignoring.on_corruption = OnCorruption::Ignore;
    let mount = rig
        .manager
        .add(&disk(&path), &request(&ignoring))
        .await
        .unwrap();
    assert!(read(&rig, mount.path()).await.get("failed").is_none());
    mount.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_what_a_device_or_a_kernel_cannot_have_is_said() {
    let rig = Rig::start().await;
    let (path, verity) = sealed(&rig, "layer");
    type Change = fn(&mut Verity);
    let cases: [(Change, ErrorKind, &str); 5] = [
        (
            |verity| verity.data_block_size = 8192,
            ErrorKind::Invalid,
            "larger than a page",
        ),
        (
            |verity| verity.hash_start_block += 1 << 20,
            ErrorKind::Invalid,
            "no whole hash tree",
        ),
        (
            |verity| {
                verity.data_blocks += 1 << 20;
                verity.hash_start_block += 1 << 20;
            },
            ErrorKind::Invalid,
            "data blocks",
        ),
        (
            |verity| verity.signature_key = Some("blockmount:none".into()),
            ErrorKind::Invalid,
            "signature",
        ),
        (
            |verity| {
                let covered = verity.data_blocks + 1000;
                verity.error_correction = Some(ErrorCorrection::new(2, covered, 1 << 30));
            },
            ErrorKind::Invalid,
            "no parity",
        ),
    ];
    for (change, kind, why) in cases {
        let mut changed = verity.clone();
        change(&mut changed);
        if changed.data_block_size == 8192 {
            // Of the right length still.
            changed.data_blocks /= 2;
        }
        let error = refusal(&rig, &path, &changed).await;
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(why), "{why}: {error}");
    }
    // A filesystem with smaller blocks than those that are checked.
    let small = rig.path("small.ext4");
    images::image("ext4", &small, &[("id", "small")]);
    let made = seal(&open(&small), &Parameters::default(), &|_| true).unwrap();
    let error = refusal(&rig, &small, &options_of(&made)).await;
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.message().contains("blocks of 1024 bytes"), "{error}");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_image_of_veritysetup_is_repaired_by_its_parity() {
    let rig = Rig::start().await;
    let path = image(&rig, "layer");
    let length = fs::metadata(&path).unwrap().len();
    let blocks = length.div_ceil(4096);
    open(&path).set_len(blocks * 4096).unwrap();
    // The superblock takes a block; the parity is behind the tree.
    let levels = HashAlgorithm::Sha256.levels(blocks, 4096).unwrap();
    let parity = blocks + 1 + levels.iter().sum::<u64>();
    let mut format = Command::new("/usr/sbin/veritysetup");
    format.arg(format!("--hash-offset={}", blocks * 4096));
    format.arg(format!("--data-blocks={blocks}"));
    format
        .arg(format!("--fec-offset={}", parity * 4096))
        .arg("--fec-roots=2");
    format
        .arg("--fec-device")
        .arg(&path)
        .arg("format")
        .args([&path, &path]);
    let said = format.output().unwrap();
    assert!(said.status.success(), "{said:?}");
    let said = String::from_utf8(said.stdout).unwrap();
    let mut verity = Verity::new(field(&said, "Root hash:"), blocks);
    verity.salt = field(&said, "Salt:");
    verity.hash_start_block = blocks + 1;
    let in_file = fs::read(&path).unwrap();
    let middle = &text().as_bytes()[70_000..70_032].to_vec();
    let in_file = in_file
        .windows(32)
        .position(|window| window == middle)
        .unwrap();
    flip(&path, in_file);
    let mount = rig
        .manager
        .add(&disk(&path), &request(&verity))
        .await
        .unwrap();
    assert!(read(&rig, mount.path()).await.get("failed").is_some());
    mount.release().await.unwrap();
    verity.error_correction = Some(ErrorCorrection::new(2, parity - 1, parity));
    let mount = rig
        .manager
        .add(&disk(&path), &request(&verity))
        .await
        .unwrap();
    rig.assert_content(&mount.path().join("large"), &text())
        .await;
    mount.release().await.unwrap();
    rig.end().await;
}

/// The tree of an image on a disk of its own, by our own builder, with what a guest is told of both.
pub fn sealed_apart(image: &Path, tree: &Path) -> Verity {
    let parameters = Parameters::default();
    let data = File::open(image).unwrap();
    let blocks = data.metadata().unwrap().len() / 4096;
    let superblock = Superblock::new(parameters, blocks);
    let layout = superblock.tree(0).unwrap();
    let file = File::create_new(tree).unwrap();
    let root = format(&data, &file, &layout, &|_| true).unwrap();
    superblock.write(&file, 0).unwrap();
    superblock.options_apart(&root, 0).unwrap()
}

fn request_apart(verity: &Verity, tree: &Path) -> MountRequest {
    request(verity).with_device_as(DeviceRole::HashTree, disk(tree))
}

/// The lines that `veritysetup format` prints, by their names.
fn field(said: &str, name: &str) -> String {
    let line = said.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_tree_on_another_disk_is_that_of_veritysetup_or_ours() {
    let rig = Rig::start_with_vpmem(Mode::Packed).await;
    let path = rig.path("layer.erofs");
    images::image("erofs", &path, &[("id", "apart"), ("large", &text())]);
    let length = fs::metadata(&path).unwrap().len();
    let blocks = length.div_ceil(4096);
    open(&path).set_len(blocks * 4096).unwrap();
    // On a packed device both are ranges.
    let ours = rig.path("ours");
    let verity = sealed_apart(&path, &ours);
    let apart = request_apart(&verity, &ours);
    let mount = rig.manager.add(&disk(&path), &apart).await.unwrap();
    rig.assert_content(&mount.path().join("large"), &text())
        .await;
    assert_eq!(mapped(&rig).await, 3);
    mount.release().await.unwrap();
    // With its parity behind the tree, and a flipped bit in the data.
    let theirs = rig.path("theirs");
    let levels = HashAlgorithm::Sha256.levels(blocks, 4096).unwrap();
    let parity = 1 + levels.iter().sum::<u64>();
    File::create(&theirs).unwrap();
    let mut veritysetup = Command::new("/usr/sbin/veritysetup");
    veritysetup
        .arg("format")
        .args([&path, &theirs])
        .arg("--fec-device")
        .arg(&theirs)
        .arg(format!("--fec-offset={}", parity * 4096))
        .arg("--fec-roots=2");
    let said = veritysetup.output().unwrap();
    assert!(said.status.success(), "{said:?}");
    let said = String::from_utf8(said.stdout).unwrap();
    let mut theirs_says = Verity::new(field(&said, "Root hash:"), blocks).with_separate_tree(1);
    theirs_says.salt = field(&said, "Salt:");
    let bytes = fs::read(&path).unwrap();
    let middle = &text().as_bytes()[70_000..70_032].to_vec();
    let mut windows = bytes.windows(32);
    let in_file = windows.position(|window| window == middle).unwrap();
    flip(&path, in_file);
    for is_repaired in [false, true] {
        if is_repaired {
            let covered = blocks + parity - 1;
            theirs_says.error_correction = Some(ErrorCorrection::new(2, covered, parity));
        }
        let apart = request_apart(&theirs_says, &theirs);
        let mount = rig.manager.add(&disk(&path), &apart).await.unwrap();
        let answer = read(&rig, mount.path()).await;
        assert_eq!(answer.get("failed").is_none(), is_repaired, "{answer}");
        mount.release().await.unwrap();
    }
    flip(&path, in_file);
    // A tree that was changed, one that is too short, one of another image, and none.
    let changed = rig.path("changed");
    fs::copy(&ours, &changed).unwrap();
    flip(&changed, 4096 + 5);
    let short = rig.path("short");
    fs::copy(&ours, &short).unwrap();
    open(&short).set_len(4096).unwrap();
    let other = rig.path("other");
    let other_image = image(&rig, "other-image");
    sealed_apart(&other_image, &other);
    for (tree, why) in [
        (Some(&changed), "root digest"),
        (Some(&short), "no whole hash tree"),
        (Some(&other), "hash tree"),
        (None, "not part of the request"),
    ] {
        let request = match tree {
            Some(tree) => request_apart(&verity, tree),
            None => request(&verity),
        };
        let error = rig.manager.add(&disk(&path), &request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{why}: {}", error.cause());
        let message = error.cause().message();
        assert!(message.contains(why), "{why}: {message}");
        assert_eq!(mapped(&rig).await, 0);
    }
    assert!(rig.manager.drain().await.is_clean());
    rig.end_as_it_is().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_agent_that_is_killed_leaves_no_checked_device() {
    let rig = Rig::start().await;
    let (path, tree) = (image(&rig, "held"), rig.path("held.tree"));
    let length = fs::metadata(&path).unwrap().len();
    open(&path).set_len(length.next_multiple_of(4096)).unwrap();
    let verity = sealed_apart(&path, &tree);
    // What is mounted is taken over, and undone, with the disk of its tree.
    let mount = rig
        .manager
        .add(&disk(&path), &request_apart(&verity, &tree))
        .await
        .unwrap();
    rig.ask(json!("kill_agent")).await;
    rig.assert_content(&mount.path().join("id"), "held").await;
    match mount.release().await {
        Err(doubtful) if doubtful.kind() == ErrorKind::Uncertain => doubtful.retry().await.unwrap(),
        released => released.unwrap(),
    }
    rig.assert_as_at_first().await;
    // At any moment of its work.
    let layers: Vec<_> = (0..8)
        .map(|n| sealed(&rig, &format!("layer-{n}")))
        .collect();
    for round in 0..6 {
        let adding = layers
            .iter()
            .map(async |(path, verity)| rig.manager.add(&disk(path), &request(verity)).await);
        let adding = futures_util::future::join_all(adding);
        let killing = async {
            tokio::time::sleep(Duration::from_millis(40 * round)).await;
            rig.ask(json!("kill_agent")).await
        };
        let (added, _) = tokio::join!(adding, killing);
        rig.settle(added).await;
    }
    let mount = rig.manager.add(&disk(&path), &read_only()).await.unwrap();
    mount.release().await.unwrap();
    rig.end().await;
}
