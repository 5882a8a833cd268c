//! Filesystems of which a part is missing: changes that only their journal has, and other devices.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::kit::{
    self, Image, Loop, TestDir, blank, guest, mount, mount_at, on_linux, refused, run, short_wait,
    umount,
};
use blockmount::{ErrorKind, Mounter};

const OLD_AND_NEW: [(u32, u32); 2] = [(4, 19), (u32::MAX, 0)];

/// A copy of a filesystem while it is mounted and has a new file: as after a crash, or of another VM that still writes.
async fn dirty_copy(image: Image, dir: &TestDir) -> PathBuf {
    let original = Loop::new(&image.copy(dir.path()));
    let guest = guest();
    mount(&guest, &original, &dir.at("live"), &[])
        .await
        .unwrap();
    fs::write(dir.at("live/new"), "x").unwrap();
    fs::File::open(dir.at("live/new"))
        .unwrap()
        .sync_all()
        .unwrap();
    let dirty = dir.at("dirty");
    let [from, to] = [original.node(), &dirty].map(|path| path.to_str().unwrap());
    run("cp", &["--sparse=always", from, to]);
    guest.unmount(&dir.at("live")).await.unwrap();
    dirty
}

#[tokio::test]
async fn root_u01_g05_a_journal_that_was_not_replayed_is_refused_read_only() {
    for (image, word, option) in [
        (Image::Ext3, "journal", "noload"),
        (Image::Ext4, "journal", "noload"),
        (Image::Xfs, "log", "norecovery"),
        (Image::Btrfs, "log tree", "rescue=nologreplay"),
    ] {
        for kernel in OLD_AND_NEW {
            let mut dir = TestDir::new();
            let dirty = dirty_copy(image, &dir).await;
            dir.settle();
            let before = fs::read(&dirty).unwrap();
            let guest = on_linux(kernel);
            for open in [Loop::new, Loop::read_only] {
                let device = open(&dirty);
                let tried = mount(&guest, &device, &dir.at("mnt"), &["ro"]).await;
                let message = refused(tried, ErrorKind::Invalid);
                let expected = format!("the {word} of the {} filesystem", image.name());
                assert!(message.contains(&expected), "{message}");
                dir.assert_clean();
                mount(&guest, &device, &dir.at("mnt"), &["ro", option])
                    .await
                    .unwrap();
                guest.unmount(&dir.at("mnt")).await.unwrap();
            }
            assert!(
                fs::read(&dirty).unwrap() == before,
                "{image:?} was written to by a read-only mount"
            );
            // A writable mount replays it, and then it is whole.
            let device = Loop::new(&dirty);
            mount(&guest, &device, &dir.at("mnt"), &[]).await.unwrap();
            guest.unmount(&dir.at("mnt")).await.unwrap();
            mount(&guest, &device, &dir.at("mnt"), &["ro"])
                .await
                .unwrap();
            assert_eq!(fs::read_to_string(dir.at("mnt/new")).unwrap(), "x");
            guest.unmount(&dir.at("mnt")).await.unwrap();
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_u01_a_filesystem_that_is_mounted_writable_elsewhere_is_busy() {
    for image in [Image::Ext4, Image::Xfs] {
        let mut dir = TestDir::new();
        let device = Loop::new(&image.copy(dir.path()));
        fs::create_dir(dir.at("theirs")).unwrap();
        dir.settle();
        let theirs = dir.at("theirs");
        run(
            "mount",
            &[device.node().to_str().unwrap(), theirs.to_str().unwrap()],
        );
        fs::write(theirs.join("new"), "x").unwrap();
        run("sync", &["-f", theirs.to_str().unwrap()]);
        let tried = mount(&short_wait().build(), &device, &dir.at("mnt"), &["ro"]).await;
        umount(&theirs);
        fs::remove_file(theirs.join("new")).ok();
        let message = refused(tried, ErrorKind::Busy);
        assert!(message.contains("theirs"), "{message}");
        dir.assert_clean();
    }
}

/// Where the log of an xfs ends, in its basic blocks, as its own tools find it.
fn head_of_log(device: &Loop) -> u64 {
    let text = run("xfs_logprint", &["-t", device.node().to_str().unwrap()]);
    let (_, rest) = text.split_once("head: ").unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

/// An xfs whose log has begun again at its start is as clean as others.
#[tokio::test]
async fn root_u01_a_log_that_has_wrapped_is_clean_after_an_unmount() {
    let mut dir = TestDir::new();
    let device = Loop::new(&Image::Xfs.copy(dir.path()));
    dir.settle();
    let guest = guest();
    let (mut last, mut wrapped) = (0, false);
    for round in 0..40 {
        mount(&guest, &device, &dir.at("mnt"), &[]).await.unwrap();
        let directories = || (0..600).map(|n| dir.at(format!("mnt/{n}")));
        let sync = || run("sync", &["-f", dir.at("mnt").to_str().unwrap()]);
        for _ in 0..25 {
            directories().for_each(|new| fs::create_dir(new).unwrap());
            sync();
            directories().for_each(|old| fs::remove_dir(old).unwrap());
            sync();
        }
        guest.unmount(&dir.at("mnt")).await.unwrap();
        mount(&guest, &device, &dir.at("mnt"), &["ro"])
            .await
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        guest.unmount(&dir.at("mnt")).await.unwrap();
        let head = head_of_log(&device);
        if wrapped {
            break;
        }
        wrapped = head < last;
        last = head;
    }
    assert!(wrapped, "the log did not wrap");
    dir.assert_clean();
}

#[tokio::test]
async fn root_u09_clones_of_an_xfs_are_mounted_at_once() {
    for kernel in OLD_AND_NEW {
        let mut dir = TestDir::new();
        let image = Image::Xfs.copy(dir.path());
        run(
            "cp",
            &[
                "--sparse=always",
                image.to_str().unwrap(),
                dir.at("clone").to_str().unwrap(),
            ],
        );
        let devices = [Loop::read_only(&image), Loop::new(&dir.at("clone"))];
        dir.settle();
        let guest = on_linux(kernel);
        for (n, device) in devices.iter().enumerate() {
            mount(&guest, device, &dir.at(format!("mnt{n}")), &["ro"])
                .await
                .unwrap();
            assert_eq!(mount_at(&dir.at(format!("mnt{n}"))).filesystem, "xfs");
        }
        for n in 0..2 {
            guest.unmount(&dir.at(format!("mnt{n}"))).await.unwrap();
        }
        dir.assert_clean();
    }
}

async fn is_refused(dir: &TestDir, device: &Loop, words: &str) {
    for kernel in OLD_AND_NEW {
        for access in ["ro", "rw"] {
            let tried = mount(&on_linux(kernel), device, &dir.at("mnt"), &[access]).await;
            let message = refused(tried, ErrorKind::Invalid);
            assert!(message.contains(words), "{message}");
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_u04_an_erofs_with_its_data_elsewhere_is_refused() {
    let mut dir = TestDir::new();
    let tree = dir.at("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("big"), kit::noise(100_000)).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (image, blob) = (dir.at("x.img"), dir.at("blob"));
    let blobdev = format!("--blobdev={}", path(&blob));
    run(
        "mkfs.erofs",
        &[
            "--quiet",
            "--chunksize=4096",
            &blobdev,
            &path(&image),
            &path(&tree),
        ],
    );
    let (device, other) = (Loop::read_only(&image), Loop::read_only(&blob));
    dir.settle();
    is_refused(&dir, &device, "needs 1 more device").await;
    // The client that names it gets its bytes.
    let option = format!("device={}", other.node().display());
    let guest = guest();
    mount(&guest, &device, &dir.at("mnt"), &["ro", &option])
        .await
        .unwrap();
    assert!(fs::read(dir.at("mnt/big")).unwrap() == kit::noise(100_000));
    guest.unmount(&dir.at("mnt")).await.unwrap();
    dir.assert_clean();
}

#[tokio::test]
async fn root_u04_an_external_log_or_journal_that_is_not_named_is_refused() {
    let mut dir = TestDir::new();
    for (name, size) in [("xfs", 320u64), ("log", 128), ("ext4", 64), ("journal", 16)] {
        blank(&dir.at(name), size << 20);
    }
    let device = |name: &str| Loop::new(&dir.at(name));
    let (xfs, log, ext4, journal) = (
        device("xfs"),
        device("log"),
        device("ext4"),
        device("journal"),
    );
    let node = |device: &Loop| device.node().to_str().unwrap().to_owned();
    let log_option = format!("logdev={},size=64m", node(&log));
    run("mkfs.xfs", &["-q", "-f", "-l", &log_option, &node(&xfs)]);
    run(
        "mke2fs",
        &[
            "-q",
            "-F",
            "-b",
            "4096",
            "-O",
            "journal_dev",
            &node(&journal),
        ],
    );
    let journal_option = format!("device={}", node(&journal));
    run(
        "mke2fs",
        &[
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-J",
            &journal_option,
            &node(&ext4),
        ],
    );
    dir.settle();
    is_refused(&dir, &xfs, "needs 1 more device").await;
    is_refused(&dir, &ext4, "needs 1 more device").await;
    let guest = guest();
    for (device, option) in [
        (&xfs, format!("logdev={}", node(&log))),
        (&ext4, format!("journal_path={}", node(&journal))),
    ] {
        mount(&guest, device, &dir.at("mnt"), &[&option])
            .await
            .unwrap();
        guest.unmount(&dir.at("mnt")).await.unwrap();
    }
    dir.assert_clean();
}

#[tokio::test]
async fn root_u04_one_of_several_btrfs_devices_is_refused() {
    let mut dir = TestDir::new();
    for name in ["one", "two", "three"] {
        blank(&dir.at(name), 128 << 20);
    }
    let devices = ["one", "two", "three"].map(|name| Loop::new(&dir.at(name)));
    let nodes = devices
        .each_ref()
        .map(|device| device.node().to_str().unwrap());
    run("mkfs.btrfs", &[&["-q", "-f"][..], &nodes].concat());
    dir.settle();
    is_refused(&dir, &devices[0], "needs 2 more devices").await;
}
