//! Hostile and half images. Whole ones are probed with the kernel's own tools in the tests on
//! devices.

// The images of these tests are made here, with numbers that fit.
#![allow(clippy::arithmetic_side_effects)]

use std::io::{Cursor, SeekFrom};

use crc::{CRC_32_ISCSI, CRC_32_ISO_HDLC, Crc};
use proptest::prelude::*;

use super::*;

fn content_of(image: &[u8]) -> Content {
    probe(&mut Cursor::new(image)).unwrap().content
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// As little as makes each format count, in a megabyte.
fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let blank = || vec![0; 1 << 20];
    let mut ext2 = blank();
    put(&mut ext2, 1024, &16u32.to_le_bytes());
    put(&mut ext2, 1024 + 4, &512u32.to_le_bytes());
    put(&mut ext2, 1024 + 0x20, &8192u32.to_le_bytes());
    put(&mut ext2, 1024 + 0x28, &16u32.to_le_bytes());
    put(&mut ext2, 1024 + 0x38, &0xef53u16.to_le_bytes());
    let mut squashfs = blank();
    put(&mut squashfs, 0, b"hsqs");
    put(&mut squashfs, 12, &131_072u32.to_le_bytes());
    put(&mut squashfs, 22, &17u16.to_le_bytes());
    put(&mut squashfs, 28, &4u16.to_le_bytes());
    put(&mut squashfs, 40, &4096u64.to_le_bytes());
    let mut erofs = blank();
    put(&mut erofs, 1024, &0xe0f5_e1e2u32.to_le_bytes());
    put(&mut erofs, 1024 + 12, &[12]);
    put(&mut erofs, 1024 + 36, &3u32.to_le_bytes());
    let mut xfs = blank();
    put(&mut xfs, 0, b"XFSB");
    put(&mut xfs, 4, &4096u32.to_be_bytes());
    put(&mut xfs, 8, &256u64.to_be_bytes());
    put(&mut xfs, 88, &1u32.to_be_bytes());
    put(&mut xfs, 100, &[0, 4, 2, 0]);
    put(&mut xfs, 120, &[12]);
    let mut btrfs = blank();
    put(&mut btrfs, 65536 + 0x30, &65536u64.to_le_bytes());
    put(&mut btrfs, 65536 + 0x40, b"_BHRfS_M");
    put(&mut btrfs, 65536 + 0x90, &4096u32.to_le_bytes());
    let crc = Crc::<u32>::new(&CRC_32_ISCSI).checksum(&btrfs[65536 + 0x20..65536 + 4096]);
    put(&mut btrfs, 65536, &crc.to_le_bytes());
    let mut vfat = blank();
    put(&mut vfat, 11, &[0, 2, 4, 1, 0, 2, 0, 2, 0, 8, 0xf8, 1]);
    put(&mut vfat, 43, b"NO NAME    FAT16   ");
    put(&mut vfat, 510, b"\x55\xaa");
    let mut luks = blank();
    put(&mut luks, 0, b"LUKS\xba\xbe\0\x02");
    let mut swap = blank();
    put(&mut swap, 4086, b"SWAPSPACE2");
    let mut raid = blank();
    put(&mut raid, 4096, &[0xfc, 0x4e, 0x2b, 0xa9, 1]);
    let mut lvm = blank();
    put(&mut lvm, 512, b"LABELONE");
    put(&mut lvm, 512 + 24, b"LVM2 001");
    let mut qcow2 = blank();
    put(&mut qcow2, 0, b"QFI\xfb\0\0\0\x03");
    let mut vhd = blank();
    put(&mut vhd, (1 << 20) - 512, b"conectix");
    let mut vhdx = blank();
    put(&mut vhdx, 0, b"vhdxfile");
    let mut vmdk = blank();
    put(&mut vmdk, 0, b"KDMV\x01\0\0\0");
    let compressed = |start: &[u8]| {
        let mut file = vec![0xa5; 1 << 20];
        put(&mut file, 0, start);
        file
    };
    let mut exfat = blank();
    put(&mut exfat, 3, b"EXFAT   ");
    put(&mut exfat, 108, &[9, 3, 1]);
    put(&mut exfat, 510, b"\x55\xaa");
    let mut f2fs = blank();
    put(&mut f2fs, 1024, &0xf2f5_2010u32.to_le_bytes());
    for (at, value) in [(8, 9u32), (12, 3), (16, 12), (20, 9), (36, 256)] {
        put(&mut f2fs, 1024 + at, &value.to_le_bytes());
    }
    let mut iso9660 = blank();
    put(&mut iso9660, 32768, b"\x01CD001\x01");
    let mut udf = blank();
    put(&mut udf, 32768, b"\0BEA01\x01");
    put(&mut udf, 32768 + 2048, b"\0NSR03\x01");
    put(
        &mut udf,
        256 * 2048,
        &[2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    );
    let mut bcache = blank();
    put(&mut bcache, 4096 + 8, &8u64.to_le_bytes());
    let magic = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";
    put(&mut bcache, 4096 + 24, magic);
    vec![
        ("a qcow2 disk image", qcow2),
        ("a vhd disk image", vhd),
        ("a vhdx disk image", vhdx),
        ("a vmdk disk image", vmdk),
        ("a file compressed with gzip", compressed(b"\x1f\x8b\x08\0")),
        (
            "a file compressed with zstd",
            compressed(b"\x28\xb5\x2f\xfd"),
        ),
        ("a file compressed with xz", compressed(b"\xfd7zXZ\0")),
        ("a file compressed with bzip2", compressed(b"BZh9")),
        ("exfat", exfat),
        ("f2fs", f2fs),
        ("iso9660", iso9660),
        ("udf", udf),
        ("bcache", bcache),
        ("ext2", ext2),
        ("squashfs", squashfs),
        ("erofs", erofs),
        ("xfs", xfs),
        ("btrfs", btrfs),
        ("vfat", vfat),
        ("luks", luks),
        ("swap", swap),
        ("raid-member", raid),
        ("lvm2", lvm),
        ("a MBR partition table", mbr()),
        ("a GPT partition table", gpt(4)),
    ]
}

fn mbr() -> Vec<u8> {
    let mut image = vec![0; 1 << 20];
    let entry = |kind: u8, start: u32, sectors: u32| {
        let mut entry = vec![0, 0, 0, 0, kind, 0, 0, 0];
        entry.extend(start.to_le_bytes());
        entry.extend(sectors.to_le_bytes());
        entry
    };
    put(&mut image, 446, &entry(0x83, 64, 100));
    put(&mut image, 462, &entry(0x05, 200, 1000));
    put(&mut image, 510, b"\x55\xaa");
    // Two logical partitions, and a link back to the first: a ring.
    for (sector, next) in [(200, 300), (500, 0)] {
        put(&mut image, sector * 512 + 446, &entry(0x83, 10, 20));
        put(&mut image, sector * 512 + 462, &entry(0x05, next, 100));
        put(&mut image, sector * 512 + 510, b"\x55\xaa");
    }
    image
}

fn gpt(count: u32) -> Vec<u8> {
    gpt_with(count, 2000, (40, 49))
}

/// A table with a partition from one block to another; blocks from 34 to `last_usable` may be used.
fn gpt_with(count: u32, last_usable: u64, (first, last): (u64, u64)) -> Vec<u8> {
    let mut image = vec![0; 1 << 20];
    let crc = |bytes: &[u8]| Crc::<u32>::new(&CRC_32_ISO_HDLC).checksum(bytes);
    let table = 1024;
    put(&mut image, table + 128, &[7; 16]);
    put(&mut image, table + 128 + 32, &first.to_le_bytes());
    put(&mut image, table + 128 + 40, &last.to_le_bytes());
    // The last block before the first: no partition.
    put(&mut image, table + 256, &[7; 16]);
    put(&mut image, table + 256 + 32, &60u64.to_le_bytes());
    let entries = crc(&image[table..table + 128 * count as usize]);
    put(&mut image, 512, b"EFI PART\0\0\x01\0\x5c");
    put(&mut image, 512 + 24, &1u64.to_le_bytes());
    put(&mut image, 512 + 40, &34u64.min(first).to_le_bytes());
    put(&mut image, 512 + 48, &last_usable.to_le_bytes());
    put(&mut image, 512 + 72, &2u64.to_le_bytes());
    put(&mut image, 512 + 80, &count.to_le_bytes());
    put(&mut image, 512 + 84, &128u32.to_le_bytes());
    put(&mut image, 512 + 88, &entries.to_le_bytes());
    let header = crc(&image[512..512 + 92]);
    put(&mut image, 512 + 16, &header.to_le_bytes());
    image
}

#[test]
fn each_sample_is_what_it_is() {
    for (name, image) in samples() {
        assert_eq!(content_of(&image).to_string(), name);
    }
}

#[test]
fn logical_partitions_are_followed_and_a_ring_ends() {
    let Content::PartitionTable(table) = content_of(&mbr()) else {
        panic!("no table")
    };
    let places: Vec<_> = table
        .partitions
        .iter()
        .map(|p| (p.number, p.start / 512, p.size / 512))
        .collect();
    assert_eq!(
        places,
        [(1, 64, 100), (2, 200, 1000), (5, 210, 20), (6, 510, 20)]
    );
}

#[test]
fn a_gpt_entry_that_makes_no_sense_is_no_partition() {
    let Content::PartitionTable(table) = content_of(&gpt(4)) else {
        panic!("no table")
    };
    assert_eq!(table.partitions.len(), 1);
    let only = &table.partitions[0];
    assert_eq!(
        (only.number, only.start, only.size),
        (2, 40 * 512, 10 * 512)
    );
    assert_eq!(only.type_id, "07070707-0707-0707-0707-070707070707");
    let mut damaged = gpt(4);
    damaged[1024 + 128 + 33] = 1;
    assert_eq!(content_of(&damaged), Content::Unknown);
}

#[test]
fn x11_a_gpt_partition_whose_end_does_not_fit_in_64_bits_is_no_partition() {
    let most = u64::MAX / 512;
    for (first, last, expected) in [
        (0, u64::MAX, vec![]),
        (40, u64::MAX, vec![]),
        (u64::MAX, u64::MAX, vec![]),
        (1 << 55, (1 << 55) + 1, vec![]),
        (40, most, vec![]),
        (40, most - 1, vec![(40 * 512, (most - 40) * 512)]),
        (most - 1, most - 1, vec![((most - 1) * 512, 512)]),
    ] {
        let Content::PartitionTable(table) = content_of(&gpt_with(4, u64::MAX, (first, last)))
        else {
            panic!("no table with a partition from {first} to {last}")
        };
        let found: Vec<_> = table.partitions.iter().map(|p| (p.start, p.size)).collect();
        assert_eq!(found, expected, "from {first} to {last}");
    }
}

#[test]
fn x11_sizes_in_superblocks_do_not_overflow() {
    let largest = |name: &str, fields: &[(usize, usize)]| {
        let mut samples = samples().into_iter();
        let (_, mut image) = samples.find(|(sample, _)| *sample == name).unwrap();
        for (at, length) in fields {
            image[*at..at + length].fill(0xff);
        }
        let found = probe(&mut Cursor::new(&image)).unwrap();
        assert_eq!(found.content.to_string(), name);
        let needs = match found.content {
            Content::Filesystem(found) | Content::Volume(found) => found.size_bytes,
            other => panic!("{other}"),
        };
        needs.unwrap()
    };
    let blocks = u64::from(u32::MAX);
    assert_eq!(largest("ext2", &[(1028, 4)]), blocks * 1024);
    assert_eq!(largest("xfs", &[(8, 8)]), u64::MAX);
    assert_eq!(largest("squashfs", &[(40, 8)]), u64::MAX);
    assert_eq!(largest("erofs", &[(1024 + 36, 4)]), blocks * 4096);
    assert_eq!(largest("vfat", &[(19, 2)]), u64::from(u16::MAX) * 512);
    assert_eq!(largest("swap", &[(1024 + 4, 4)]), (blocks + 1) * 4096);
    let mut samples = samples().into_iter();
    let (_, mut image) = samples.find(|(sample, _)| *sample == "ext2").unwrap();
    // Revision 1, the feature "64bit", and all bits of the number of blocks.
    image[1024 + 0x4c] = 1;
    image[1024 + 0x60] |= 0x80;
    image[1024 + 4..][..4].fill(0xff);
    image[1024 + 0x150..][..4].fill(0xff);
    match probe(&mut Cursor::new(&image)).unwrap().content {
        Content::Filesystem(found) => assert_eq!(found.size_bytes, Some(u64::MAX)),
        other => panic!("{other}"),
    }
}

#[test]
fn x11_the_farthest_mbr_partitions_do_not_overflow() {
    let mut image = mbr();
    // The largest sizes, and a link as far away as there can be.
    for entry in [446, 462, 200 * 512 + 446, 200 * 512 + 462] {
        put(&mut image, entry + 12, &[0xff; 4]);
    }
    put(&mut image, 200 * 512 + 446 + 8, &[0xff; 4]);
    put(&mut image, 200 * 512 + 462 + 8, &[0xff; 4]);
    let Content::PartitionTable(table) = content_of(&image) else {
        panic!("no table")
    };
    let last = table.partitions.last().unwrap();
    let most = u64::from(u32::MAX) * 512;
    assert_eq!(
        (last.number, last.start, last.size),
        (5, 200 * 512 + most, most)
    );
}

#[test]
fn two_filesystems_are_ambiguous() {
    let sample = |wanted: &str| {
        let mut samples = samples().into_iter();
        samples.find(|(name, _)| *name == wanted).unwrap().1
    };
    let mut both = sample("ext2");
    put(&mut both, 0, &sample("squashfs")[..96]);
    assert_eq!(
        content_of(&both),
        Content::Ambiguous(vec!["ext2", "squashfs"])
    );
}

#[test]
fn blank_is_zeros_at_both_ends_and_nothing_less() {
    assert_eq!(content_of(&[]), Content::Unknown);
    assert_eq!(content_of(&[0]), Content::Blank);
    let mut image = vec![0; 3 << 20];
    assert_eq!(content_of(&image), Content::Blank);
    for at in [0, 511, 4096, 65600, (1 << 20) - 1, 2 << 20, (3 << 20) - 1] {
        image[at] = 1;
        assert_eq!(content_of(&image), Content::Unknown, "{at}");
        image[at] = 0;
    }
}

#[test]
fn a_copy_of_an_erased_superblock_is_not_blank() {
    let mut image = vec![0; 12 << 20];
    image[(8193 << 10) + 0x38] = 0x53;
    assert_eq!(content_of(&image), Content::Unknown);
}

/// An xfs with a log of 1,024 basic blocks in its second round, whose last record is at a block and says that the
/// filesystem was unmounted.
fn xfs_with_log(record: usize) -> Vec<u8> {
    const LOG: usize = 64 << 10;
    const BLOCKS: usize = 1024;
    let (_, mut image) = samples()
        .into_iter()
        .find(|(name, _)| *name == "xfs")
        .unwrap();
    put(&mut image, 48, &16u64.to_be_bytes());
    put(&mut image, 84, &256u32.to_be_bytes());
    put(&mut image, 96, &128u32.to_be_bytes());
    put(&mut image, 124, &[8]);
    let head = (record + 2) % BLOCKS;
    for block in 0..BLOCKS {
        let round: u32 = if block < head || head == 0 { 3 } else { 2 };
        put(&mut image, LOG + block * 512, &round.to_be_bytes());
    }
    let (header, data) = (LOG + record * 512, LOG + (record + 1) % BLOCKS * 512);
    let round: [u8; 4] = image[header..header + 4].try_into().unwrap();
    put(&mut image, header, &0xfeed_babe_u32.to_be_bytes());
    put(&mut image, header + 4, &round);
    for (at, value) in [(8, 2u32), (12, 512), (40, 1), (320, 32 << 10)] {
        put(&mut image, header + at, &value.to_be_bytes());
    }
    put(&mut image, data + 9, &[0x20]);
    image
}

fn needs_recovery(image: &[u8]) -> bool {
    match content_of(image) {
        Content::Filesystem(found) => found.needs_recovery,
        other => panic!("{other}"),
    }
}

#[test]
fn u01_the_log_of_an_xfs_is_clean_only_if_its_end_says_unmounted() {
    const LOG: usize = 64 << 10;
    // The last three end at the end of the ring, and go on at its start.
    for record in [0, 5, 700, 1021, 1022, 1023] {
        let clean = xfs_with_log(record);
        assert!(!needs_recovery(&clean), "{record}");
        let header = LOG + record * 512;
        let data = LOG + (record + 1) % 1024 * 512;
        for (at, byte) in [
            (data + 9, 0),
            (header + 43, 2),
            (header + 14, 4),
            (header, 0),
        ] {
            let mut dirty = clean.clone();
            dirty[at] = byte;
            assert!(needs_recovery(&dirty), "{record} {at}");
        }
        // One more block was written.
        let mut dirty = clean;
        let after = LOG + (record + 2) % 1024 * 512;
        dirty[after + 3] += 1;
        assert!(needs_recovery(&dirty), "{record}");
    }
}

#[test]
fn u01_a_log_that_nothing_was_written_to_is_clean_and_one_that_is_not_there_is_not() {
    let mut blank = xfs_with_log(5);
    blank[64 << 10..].fill(0);
    assert!(!needs_recovery(&blank));
    let mut beyond = xfs_with_log(5);
    put(&mut beyond, 48, &400u64.to_be_bytes());
    assert!(needs_recovery(&beyond));
}

/// A device whose superblock is torn in the first reads of it.
struct Torn {
    image: Cursor<Vec<u8>>,
    at: u64,
    reads_left: usize,
}

impl Read for Torn {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (start, read) = (self.image.position(), self.image.read(buffer)?);
        let torn = self.at.checked_sub(start).map(|at| at as usize);
        if let Some(byte) = torn.and_then(|at| buffer[..read].get_mut(at)) {
            if self.reads_left > 0 {
                *byte ^= 0xff;
            }
            self.reads_left = self.reads_left.saturating_sub(1);
        }
        Ok(read)
    }
}

impl Seek for Torn {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.image.seek(to)
    }
}

#[test]
fn u16_a_superblock_that_changes_while_it_is_read_is_read_again() {
    let (_, image) = samples()
        .into_iter()
        .find(|(name, _)| *name == "btrfs")
        .unwrap();
    let found_after = |reads_left| {
        let mut device = Torn {
            image: Cursor::new(image.clone()),
            // In its label, which only the checksum covers.
            at: 65536 + 0x12b,
            reads_left,
        };
        probe(&mut device).unwrap().content.to_string()
    };
    assert_eq!(found_after(0), "btrfs");
    assert_eq!(found_after(10), "btrfs");
    assert_eq!(found_after(1000), "unknown content");
}

/// A device with a byte that cannot be read.
struct Bad {
    image: Cursor<Vec<u8>>,
    at: u64,
}

impl Read for Bad {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let start = self.image.position();
        match (start..start + buffer.len() as u64).contains(&self.at) {
            true => Err(io::Error::other("a bad block")),
            false => self.image.read(buffer),
        }
    }
}

impl Seek for Bad {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.image.seek(to)
    }
}

#[test]
fn a_bad_block_beside_all_signatures_is_not_missed() {
    let mut samples = samples().into_iter();
    let (name, image) = samples.find(|(name, _)| *name == "erofs").unwrap();
    let at = 40_000;
    let image = Cursor::new(image);
    let found = probe(&mut Bad {
        image: image.clone(),
        at,
    })
    .unwrap();
    assert_eq!(found, probe(&mut image.clone()).unwrap(), "{name}");
    assert!(matches!(found.content, Content::Filesystem(_)), "{name}");
    // Where something is looked for, the error is told.
    let at = 1024 + 56;
    assert!(probe(&mut Bad { image, at }).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_makes_it_panic_and_no_remains_are_blank(
        sample in 0..21usize,
        damage in proptest::collection::vec((0..70_000usize, any::<u8>()), 0..40),
        superblock in proptest::collection::vec((0..1600usize, prop_oneof![Just(0u8), Just(0xff), any::<u8>()]), 0..40),
        length in prop_oneof![Just(1usize << 20), 0..3000usize, 0..(1usize << 20)],
    ) {
        let mut image = samples().swap_remove(sample).1;
        for (at, byte) in damage.into_iter().chain(superblock) {
            image[at] = byte;
        }
        image.truncate(length);
        let found = probe(&mut Cursor::new(&image)).unwrap();
        let _ = (found.truncated(), found.content.to_string());
        prop_assert_eq!(found.content == Content::Blank, !image.is_empty() && image.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn noise_is_never_a_filesystem(seed in any::<u64>(), length in 0..200_000usize) {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as u8
        };
        let image: Vec<u8> = (0..length).map(|_| next()).collect();
        let found = content_of(&image);
        prop_assert!(!matches!(found, Content::Filesystem(_) | Content::PartitionTable(_)), "{found}");
    }
}
