//! Filesystems of several devices, which come with the request.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::kit::{self, Loop, TestDir, blank, builder, guest, on_linux, refused, run};
use crate::merged_erofs::{self, Merged};
use blockmount::{
    BackendError, DeviceRole, ErrorKind, ExtraDevice, MountOptions, Mounter, Presence,
};
use blockmount_linux::LinuxGuest;

const OLD_AND_NEW: [(u32, u32); 2] = [(4, 19), (u32::MAX, 0)];

const DATA: DeviceRole = DeviceRole::Data;

/// Further devices of a mount.
type Devices<'a> = &'a [(DeviceRole, &'a Loop)];

fn with(names: &[&str], devices: Devices<'_>) -> MountOptions {
    let devices = devices
        .iter()
        .map(|(role, device)| ExtraDevice::new(*role, device.locator()));
    let options = MountOptions::builder().options(names.iter().copied());
    devices
        .fold(options, |options, device| options.device(device))
        .build()
        .unwrap()
}

async fn mount(
    guest: &LinuxGuest,
    device: &Loop,
    target: &Path,
    options: &MountOptions,
) -> Result<(), BackendError> {
    guest.mount(&device.locator(), target, options).await
}

fn content(seed: u8) -> Vec<u8> {
    let mut content = kit::noise(3 * 4096);
    content.iter_mut().for_each(|byte| *byte ^= seed);
    content
}

/// Two images with a file each, and one that has both files and no data.
struct Images {
    one: PathBuf,
    two: PathBuf,
    merged: PathBuf,
}

fn images(dir: &Path, tagged: bool) -> Images {
    let image = |name: &str, seed: u8| {
        let (tree, image) = (dir.join(format!("{name}.d")), dir.join(name));
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join(name), content(seed)).unwrap();
        run(
            "mkfs.erofs",
            &["--quiet", image.to_str().unwrap(), tree.to_str().unwrap()],
        );
        image
    };
    let (one, two, merged) = (image("one", 1), image("two", 2), dir.join("merged"));
    let [first, second] = [content(1), content(2)];
    let files = [
        Merged {
            name: "first",
            image: 0,
            content: &first,
        },
        Merged {
            name: "second",
            image: 1,
            content: &second,
        },
    ];
    merged_erofs::write(&merged, &[&one, &two], &files, tagged);
    Images { one, two, merged }
}

#[tokio::test]
async fn root_u04_merged_metadata_shows_the_files_of_its_blobs() {
    for kernel in OLD_AND_NEW {
        let mut dir = TestDir::new();
        let images = images(dir.path(), true);
        let [merged, one, two] =
            [&images.merged, &images.one, &images.two].map(|i| Loop::read_only(i));
        dir.settle();
        let guest = on_linux(kernel);
        let options = with(&["ro"], &[(DATA, &one), (DATA, &two)]);
        let target = dir.at("mnt");
        mount(&guest, &merged, &target, &options).await.unwrap();
        assert!(fs::read(target.join("first")).unwrap() == content(1));
        assert!(fs::read(target.join("second")).unwrap() == content(2));
        let is = async |options: &MountOptions| {
            let found = Mounter::adopt(&guest, &merged.locator(), &target, options).await;
            found.unwrap()
        };
        assert_eq!(is(&options).await, Presence::Present(()));
        let other = with(&["ro"], &[(DATA, &two), (DATA, &one)]);
        assert_eq!(is(&other).await, Presence::Absent);
        guest.unmount(&target).await.unwrap();
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_u04_a_device_that_is_missing_wrong_or_too_many_is_refused_with_its_number() {
    let mut dir = TestDir::new();
    let tagged = images(dir.path(), true);
    fs::create_dir(dir.at("untagged")).unwrap();
    let untagged = images(&dir.at("untagged"), false);
    blank(&dir.at("short"), 4096);
    let open = |path: &Path| Loop::read_only(path);
    let (merged, untagged) = (open(&tagged.merged), open(&untagged.merged));
    let (one, two, short) = (open(&tagged.one), open(&tagged.two), open(&dir.at("short")));
    dir.settle();
    let (all, log) = (
        [(DATA, &one), (DATA, &two)],
        [(DeviceRole::Log, &one), (DATA, &two)],
    );
    let cases: [(&Loop, Devices<'_>, &str); 7] = [
        (&merged, &[], "needs 2 more devices"),
        (
            &merged,
            &[(DATA, &one)],
            "number 2 is not part of the request",
        ),
        (&merged, &[(DATA, &two), (DATA, &one)], "further device 1, "),
        (
            &merged,
            &[(DATA, &one), (DATA, &short)],
            "further device 2, ",
        ),
        (
            &merged,
            &[(DATA, &one), (DATA, &two), (DATA, &short)],
            "has 2 further devices, and the request 3",
        ),
        (&merged, &log, "has no further device for log"),
        (
            &untagged,
            &[(DATA, &short), (DATA, &two)],
            "it has 4096 bytes",
        ),
    ];
    for kernel in OLD_AND_NEW {
        for (device, devices, words) in cases {
            let options = with(&["ro"], devices);
            let tried = mount(&on_linux(kernel), device, &dir.at("mnt"), &options).await;
            let message = refused(tried, ErrorKind::Invalid);
            assert!(message.contains(words), "{message}");
            dir.assert_clean();
        }
    }
    // One that has none refuses what it is given.
    let options = with(&["ro"], &all[1..]);
    let tried = mount(&guest(), &one, &dir.at("mnt"), &options).await;
    let message = refused(tried, ErrorKind::Invalid);
    assert!(message.contains("has 0 further devices"), "{message}");
    // One that is not there is named, and nothing is begun.
    let gone = ExtraDevice::new(DATA, "test:/dev/loop-gone".parse().unwrap());
    let options = MountOptions::builder().read_only().device(gone).build();
    let tried = mount(&guest(), &merged, &dir.at("mnt"), &options.unwrap()).await;
    let message = refused(tried, ErrorKind::NotFound);
    assert!(message.contains("loop-gone"), "{message}");
    dir.assert_clean();
}

#[tokio::test]
async fn root_u04_a_log_on_another_device_is_used_and_freed() {
    let mut dir = TestDir::new();
    for (name, size) in [("xfs", 320u64), ("log", 128), ("ext4", 64), ("journal", 16)] {
        blank(&dir.at(name), size << 20);
    }
    let [xfs, log, ext4, journal] =
        ["xfs", "log", "ext4", "journal"].map(|name| Loop::new(&dir.at(name)));
    let node = |device: &Loop| device.node().to_str().unwrap().to_owned();
    let log_option = format!("logdev={},size=64m", node(&log));
    run("mkfs.xfs", &["-q", "-f", "-l", &log_option, &node(&xfs)]);
    let make = ["-q", "-F", "-b", "4096"];
    run(
        "mke2fs",
        &[&make[..], &["-O", "journal_dev", &node(&journal)]].concat(),
    );
    let option = format!("device={}", node(&journal));
    run(
        "mke2fs",
        &[&make[..], &["-t", "ext4", "-J", &option, &node(&ext4)]].concat(),
    );
    dir.settle();
    for kernel in OLD_AND_NEW {
        let guest = on_linux(kernel);
        for (device, extra) in [(&xfs, &log), (&ext4, &journal)] {
            let options = with(&[], &[(DeviceRole::Log, extra)]);
            for round in 0..2 {
                mount(&guest, device, &dir.at("mnt"), &options)
                    .await
                    .unwrap();
                fs::write(dir.at("mnt/file"), round.to_string()).unwrap();
                guest.unmount(&dir.at("mnt")).await.unwrap();
            }
            // What the engine does not see, the kernel refuses in its own words.
            let data = with(&[], &[(DATA, extra)]);
            let tried = mount(&guest, device, &dir.at("mnt"), &data).await;
            refused(tried, ErrorKind::Invalid);
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_u04_the_devices_of_a_btrfs_are_mounted_in_any_order() {
    let mut dir = TestDir::new();
    for name in ["one", "two", "other"] {
        blank(&dir.at(name), 128 << 20);
    }
    let [one, two, other] = ["one", "two", "other"].map(|name| Loop::new(&dir.at(name)));
    let node = |device: &Loop| device.node().to_str().unwrap().to_owned();
    run("mkfs.btrfs", &["-q", "-f", &node(&one), &node(&two)]);
    run("mkfs.btrfs", &["-q", "-f", &node(&other)]);
    dir.settle();
    for kernel in OLD_AND_NEW {
        for (device, extra) in [(&one, &two), (&two, &one)] {
            let guest = on_linux(kernel);
            let options = with(&[], &[(DATA, extra)]);
            mount(&guest, device, &dir.at("mnt"), &options)
                .await
                .unwrap();
            fs::write(dir.at("mnt/file"), "x").unwrap();
            guest.unmount(&dir.at("mnt")).await.unwrap();
            let options = with(&[], &[(DATA, &other)]);
            let tried = mount(&guest, device, &dir.at("mnt"), &options).await;
            let message = refused(tried, ErrorKind::Invalid);
            assert!(message.contains("further device 1, "), "{message}");
            dir.assert_clean();
        }
    }
}

#[tokio::test]
async fn root_u04_a_killed_engine_takes_over_a_mount_of_several_devices() {
    let mut dir = TestDir::new();
    let images = images(dir.path(), true);
    let [merged, one, two] = [&images.merged, &images.one, &images.two].map(|i| Loop::read_only(i));
    let journal = dir.at("journal");
    fs::create_dir(&journal).unwrap();
    fs::set_permissions(
        &journal,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    dir.settle();
    let options = with(&["ro"], &[(DATA, &one), (DATA, &two)]);
    let first = builder().journal(&journal).await.unwrap();
    mount(&first, &merged, &dir.at("mnt"), &options)
        .await
        .unwrap();
    drop(first);
    let second = builder().journal(&journal).await.unwrap();
    let found = Mounter::adopt(&second, &merged.locator(), &dir.at("mnt"), &options).await;
    assert_eq!(found.unwrap(), Presence::Present(()));
    second.unmount(&dir.at("mnt")).await.unwrap();
    dir.assert_clean();
}
