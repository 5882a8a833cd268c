//! What the probe finds is what `blkid` finds, on images by the tools of each format.
#![allow(
    clippy::unwrap_used,
    reason = "a panic is the failure message of a test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::kit::{Image, Loop, TestDir, blank, run};
use blockmount_linux::probe::{Content, TableKind, probe};

/// What `blkid` says of an image, by the names of its fields; nothing if it finds nothing.
fn blkid(image: &Path) -> BTreeMap<String, String> {
    let output = Command::new("blkid")
        .args(["-p", "-o", "export"])
        .arg(image)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let fields = text.lines().filter_map(|line| line.split_once('='));
    // It escapes what a shell would read.
    fields
        .map(|(name, value)| (name.to_owned(), value.replace('\\', "")))
        .collect()
}

/// What is known under another name there.
fn type_of_blkid(name: &str) -> &str {
    match name {
        "luks" => "crypto_LUKS",
        "lvm2" => "LVM2_member",
        "raid-member" => "linux_raid_member",
        "verity-hash" => "DM_verity_hash",
        other => other,
    }
}

fn assert_same(image: &Path, what: &str) {
    let found = probe(&mut fs::File::open(image).unwrap()).unwrap().content;
    let theirs = blkid(image);
    let field = |name: &str| theirs.get(name).cloned();
    match found {
        Content::Filesystem(found) | Content::Volume(found) => {
            assert_eq!(
                Some(type_of_blkid(found.name).to_owned()),
                field("TYPE"),
                "{what}"
            );
            assert_eq!(found.label, field("LABEL"), "{what}");
            assert!(!found.needs_recovery && found.more_devices == 0, "{what}");
            // What UDF has for one is made up by each tool from other fields.
            if found.name != "udf" {
                assert_eq!(found.uuid, field("UUID"), "{what}");
            }
        }
        Content::PartitionTable(table) => {
            let kind = match table.kind {
                TableKind::Gpt => "gpt",
                _ => "dos",
            };
            assert_eq!(Some(kind.to_owned()), field("PTTYPE"), "{what}");
        }
        Content::Blank => assert!(theirs.is_empty(), "{what}: {theirs:?}"),
        other => panic!("{what}: {other}, and blkid says {theirs:?}"),
    }
}

/// An image of a size, with a tool run on it: `@` stands for its path.
fn made(dir: &TestDir, mebibytes: u64, command: &str) -> PathBuf {
    let name: String = command
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let image = dir.at(name);
    blank(&image, mebibytes << 20);
    let path = image.to_str().unwrap();
    let words: Vec<&str> = command
        .split(' ')
        .map(|word| if word == "@" { path } else { word })
        .collect();
    run(words[0], &words[1..]);
    image
}

/// Tools that write to a file. Those that are not installed are left out, and at least so many must be there.
const TOOLS: [(u64, &str); 23] = [
    (16, "mke2fs -q -F -t ext2 -L two @"),
    (16, "mke2fs -q -F -t ext3 -L three @"),
    (16, "mke2fs -q -F -t ext4 -L four @"),
    (
        16,
        "mke2fs -q -F -t ext4 -O 64bit,metadata_csum,casefold,inline_data @",
    ),
    (16, "mke2fs -q -F -b 4096 -O journal_dev @"),
    (320, "mkfs.xfs -q -L axfs @"),
    (320, "mkfs.xfs -q -m crc=0 @"),
    (128, "mkfs.btrfs -q -L abtrfs @"),
    (128, "mkfs.btrfs -q --csum xxhash @"),
    (64, "mkfs.f2fs -q -l af2fs @"),
    (
        64,
        "mkfs.f2fs -q -O extra_attr,inode_checksum,sb_checksum @",
    ),
    (8, "mkfs.vfat -F 12 -n TWELVE @"),
    (32, "mkfs.vfat -F 16 -n SIXTEEN @"),
    (64, "mkfs.vfat -F 32 -n THIRTYTWO @"),
    (16, "mkfs.exfat -L anexfat @"),
    (16, "mkudffs --label=anudf @"),
    (16, "mkudffs --blocksize=512 --media-type=hd @"),
    (8, "mkswap -q -L aswap @"),
    (8, "mkswap -q -p 65536 @"),
    (
        32,
        "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 --key-file /etc/hostname @",
    ),
    (
        32,
        "cryptsetup -q luksFormat --type luks2 --label aluks --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /etc/hostname @",
    ),
    (16, "truncate -s 16M @"),
    (320, "mkfs.xfs -q -b size=65536 @"),
];
const FEWEST: usize = 12;

#[test]
fn root_each_tools_images_are_what_blkid_says() {
    let mut compared = 0;
    for (mebibytes, command) in TOOLS {
        let tool = command.split(' ').next().unwrap();
        let dir = TestDir::new();
        let is_there = Command::new("sh")
            .args(["-c", "command -v \"$0\"", tool])
            .stdout(Stdio::null())
            .status();
        if is_there.unwrap().success() {
            assert_same(&made(&dir, mebibytes, command), command);
            compared += 1;
        }
    }
    for image in
        Image::FILESYSTEMS
            .into_iter()
            .chain([Image::Gpt, Image::Mbr, Image::Swap, Image::Btrfs])
    {
        let dir = TestDir::new();
        assert_same(&image.copy(dir.path()), image.name());
    }
    assert!(compared >= FEWEST, "only {compared} tools are installed");
}

/// Tools that want a device.
#[test]
fn root_volumes_on_devices_are_what_blkid_says() {
    let dir = TestDir::new();
    for (tool, command) in [
        (
            "pvcreate",
            "pvcreate -q -ff -y --config devices{use_devicesfile=0} @",
        ),
        ("make-bcache", "make-bcache -B @"),
    ] {
        let is_there = Command::new("sh")
            .args(["-c", "command -v \"$0\"", tool])
            .stdout(Stdio::null())
            .status();
        if !is_there.unwrap().success() {
            continue;
        }
        let image = dir.at(tool);
        blank(&image, 32 << 20);
        let device = Loop::new(&image);
        let node = device.node().to_str().unwrap();
        let words: Vec<&str> = command
            .split(' ')
            .map(|word| if word == "@" { node } else { word })
            .collect();
        run(words[0], &words[1..]);
        assert_same(&image, tool);
    }
}

#[test]
fn u20_images_of_disks_are_named_by_their_format() {
    let dir = TestDir::new();
    blank(&dir.at("raw"), 8 << 20);
    for (format, more, expected) in [
        ("qcow2", "compat=1.1", "a qcow2 disk image"),
        ("qcow2", "compat=0.10", "a qcow2 disk image"),
        ("vpc", "subformat=dynamic", "a vhd disk image"),
        ("vpc", "subformat=fixed", "a vhd disk image"),
        ("vhdx", "subformat=dynamic", "a vhdx disk image"),
        ("vmdk", "subformat=monolithicSparse", "a vmdk disk image"),
        ("vmdk", "subformat=monolithicFlat", "a vmdk disk image"),
    ] {
        let image = dir.at(format!("{format}-{more}"));
        let (raw, to) = (dir.at("raw"), image.to_str().unwrap().to_owned());
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                format,
                "-o",
                more,
                raw.to_str().unwrap(),
                &to,
            ],
        );
        let found = probe(&mut fs::File::open(&image).unwrap()).unwrap();
        assert_eq!(found.content.to_string(), expected, "{format} {more}");
    }
    // One of a fixed size is the disk itself, with a footer.
    let ext4 = Image::Ext4.copy(dir.path());
    let fixed = dir.at("fixed.vhd");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "vpc",
            "-o",
            "subformat=fixed,force_size=on",
            ext4.to_str().unwrap(),
            fixed.to_str().unwrap(),
        ],
    );
    let found = probe(&mut fs::File::open(&fixed).unwrap()).unwrap();
    assert_eq!(found.content.to_string(), "ext4");
}

/// Each superblock with each of its bytes damaged: nothing panics, and nothing becomes blank.
#[test]
fn root_no_damage_to_a_real_superblock_makes_it_panic_or_blank() {
    for (mebibytes, command) in TOOLS {
        let tool = command.split(' ').next().unwrap();
        if matches!(tool, "truncate" | "cryptsetup") || !Path::new("/usr/sbin").join(tool).exists()
        {
            continue;
        }
        let dir = TestDir::new();
        let mut file = fs::File::open(made(&dir, mebibytes, command)).unwrap();
        // As much as the signatures of all are in.
        let size = file.seek(SeekFrom::End(0)).unwrap().min(1 << 20);
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut image = vec![0; usize::try_from(size).unwrap()];
        std::io::Read::read_exact(&mut file, &mut image).unwrap();
        let used: Vec<usize> = (0..image.len())
            .filter(|at| image[*at] != 0)
            .take(1500)
            .collect();
        for at in used {
            for byte in [0xff, 0x80] {
                let before = image[at];
                image[at] ^= byte;
                let found = probe(&mut Cursor::new(&image)).unwrap().content;
                assert!(found != Content::Blank, "{command} {at}");
                image[at] = before;
            }
        }
    }
}
