//! Images that are not what they seem: refused with what is wrong, and nothing left behind.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::kit::{self, Image, KERNELS, Loop, TestDir, blank, guest, mount, on_linux, refused};
use blockmount::{ErrorKind, MountOptions, Mounter};
use blockmount_linux::probe::{Content, TableKind, probe};

fn probed(path: &Path) -> blockmount_linux::probe::ProbeResult {
    probe(&mut File::open(path).unwrap()).unwrap()
}

#[test]
fn root_each_image_is_what_it_is() {
    let dir = TestDir::new();
    for image in Image::FILESYSTEMS {
        let path = image.copy(dir.path());
        let found = probed(&path);
        let Content::Filesystem(superblock) = &found.content else {
            panic!("{image:?} is {}", found.content)
        };
        assert_eq!(superblock.name, image.name());
        assert_eq!(found.truncated(), None);
        assert!(superblock.size_bytes.unwrap() <= found.device_bytes);
        let label = match image {
            Image::Xfs => Some("xlabel"),
            Image::Erofs | Image::Squashfs => None,
            _ => Some("the label"),
        };
        assert_eq!(superblock.label.as_deref(), label);
        if let Some(uuid) = &superblock.uuid {
            assert_eq!(
                *uuid,
                kit::run(
                    "blkid",
                    &["-p", "-o", "value", "-s", "UUID", path.to_str().unwrap()]
                )
            );
        }
    }
    let swap = probed(&Image::Swap.copy(dir.path())).content;
    assert!(
        matches!(&swap, Content::Volume(found) if found.name == "swap" && found.size_bytes == Some(1 << 20))
    );
    for (image, kind) in [(Image::Gpt, TableKind::Gpt), (Image::Mbr, TableKind::Mbr)] {
        let Content::PartitionTable(table) = probed(&image.copy(dir.path())).content else {
            panic!("{image:?}")
        };
        assert_eq!(table.kind, kind);
        let places: Vec<_> = table
            .partitions
            .iter()
            .map(|p| (p.number, p.start >> 20, p.size >> 20))
            .collect();
        assert_eq!(places, [(1, 1, 2), (2, 3, 4), (3, 7, 1)]);
        assert_eq!(
            table.partitions[1].name.as_deref(),
            (kind == TableKind::Gpt).then_some("the second")
        );
    }
}

#[tokio::test]
async fn root_a_truncated_image_is_refused_by_size() {
    for image in Image::FILESYSTEMS {
        let mut dir = TestDir::new();
        let path = image.copy(dir.path());
        let needs = match probed(&path).content {
            Content::Filesystem(found) => found.size_bytes.unwrap(),
            other => panic!("{other}"),
        };
        let has = (needs / 2).next_multiple_of(4096).min(needs - 1) / 512 * 512;
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(has)
            .unwrap();
        let device = Loop::new(&path);
        dir.settle();
        let message = refused(
            mount(&guest(), &device, &dir.at("mnt"), &["ro"]).await,
            ErrorKind::Invalid,
        );
        let words = format!("truncated: the filesystem needs {needs} bytes, the device has {has}");
        assert!(message.contains(&words), "{message}");
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_what_holds_no_filesystem_is_not_found() {
    let mut dir = TestDir::new();
    blank(&dir.at("blank"), 1 << 20);
    fs::write(dir.at("garbage"), b"no filesystem at all ".repeat(50_000)).unwrap();
    fs::copy(Image::Swap.copy(dir.path()), dir.at("swap")).unwrap();
    dir.settle();
    for (name, words) in [
        ("blank", "nothing (blank)"),
        ("garbage", "unknown content"),
        ("swap", "holds swap"),
    ] {
        let device = Loop::new(&dir.at(name));
        let message = refused(
            mount(&guest(), &device, &dir.at("a/mnt"), &[]).await,
            ErrorKind::NotFound,
        );
        assert!(message.contains(words), "{message}");
        dir.assert_clean();
    }
    // What cannot be told here is for the kernel to judge, if it was named.
    for kernel in KERNELS {
        let device = Loop::new(&dir.at("garbage"));
        let named = MountOptions::builder().filesystem("ext4").build().unwrap();
        refused(
            on_linux(kernel)
                .mount(&device.locator(), &dir.at("a/mnt"), &named)
                .await,
            ErrorKind::Invalid,
        );
        dir.assert_clean();
    }
}

#[tokio::test]
async fn root_a_filesystem_that_the_kernel_does_not_know_is_unsuitable() {
    let mut dir = TestDir::new();
    fs::write(dir.at("garbage"), b"no filesystem at all ".repeat(50_000)).unwrap();
    dir.settle();
    for kernel in KERNELS {
        let device = Loop::new(&dir.at("garbage"));
        let named = MountOptions::builder()
            .filesystem("nosuchfs")
            .build()
            .unwrap();
        refused(
            on_linux(kernel)
                .mount(&device.locator(), &dir.at("a/mnt"), &named)
                .await,
            ErrorKind::Unsuitable,
        );
        dir.assert_clean();
    }
}

/// Beyond the superblock only the kernel can tell.
#[tokio::test]
async fn root_a_damaged_filesystem_leaves_nothing() {
    for kernel in KERNELS {
        for image in [Image::Ext4, Image::Squashfs, Image::Xfs] {
            let mut dir = TestDir::new();
            let path = image.copy(dir.path());
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            let range = match image {
                Image::Squashfs => 96..fs::metadata(&path).unwrap().len(),
                Image::Ext4 => 2048..(1 << 20),
                _ => 512..(64 << 20),
            };
            file.write_all_at(&vec![0xa5; (range.end - range.start) as usize], range.start)
                .unwrap();
            let device = Loop::new(&path);
            dir.settle();
            let error = mount(&on_linux(kernel), &device, &dir.at("a/mnt"), &["ro"])
                .await
                .unwrap_err();
            assert_ne!(error.kind(), ErrorKind::Uncertain);
            dir.assert_clean();
        }
    }
}
