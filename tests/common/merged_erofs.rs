//! An erofs with nothing but metadata: its files are in other images, as in those that newer tools merge.
//!
//! Layout: `fs/erofs/erofs_fs.h` of Linux; chunk-based files with indexes, and a table of devices.

// Helpers of tests unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::path::Path;

const BLOCK: usize = 4096;
const DIRECTORY: u16 = 0o040_755;
const FILE: u16 = 0o100_644;

/// A file whose content is in an image. Its length is a multiple of 4,096 bytes.
pub(crate) struct Merged<'a> {
    pub(crate) name: &'a str,
    /// Which image it is in, from 0.
    pub(crate) image: usize,
    pub(crate) content: &'a [u8],
}

/// Writes the image that merges `files` of `images`, which are given in the order in which they are devices. The names
/// are sorted. With `tagged`, the table of devices has the UUIDs of the images.
pub(crate) fn write(to: &Path, images: &[&Path], files: &[Merged<'_>], tagged: bool) {
    let images: Vec<Vec<u8>> = images
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let mut image = vec![0; 3 * BLOCK];
    superblock(&mut image, images.len());
    for (number, content) in images.iter().enumerate() {
        let entry = &mut image[BLOCK / 2 + number * 128..][..128];
        if tagged {
            let digits: String = content[1024 + 48..1024 + 64]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            entry[..32].copy_from_slice(digits.as_bytes());
        }
        put(
            entry,
            64,
            &u32::try_from(content.len() / BLOCK).unwrap().to_le_bytes(),
        );
    }
    // The root, and each file with its indexes behind it, in slots of 32 bytes of the second block.
    let (mut next, mut entries) = (1, vec![(".", 0, 2u8), ("..", 0, 2)]);
    inode(&mut image, 0, DIRECTORY, 0, BLOCK, &2u32.to_le_bytes());
    for file in files {
        let (slot, blocks) = (next, file.content.len() / BLOCK);
        let found = images[file.image]
            .chunks(BLOCK)
            .collect::<Vec<_>>()
            .windows(blocks)
            .position(|window| window.concat() == file.content);
        let found = found.expect("the image has the file in whole blocks");
        // One block for each chunk, with indexes.
        inode(
            &mut image,
            slot,
            FILE,
            4,
            file.content.len(),
            &0x20u32.to_le_bytes(),
        );
        for block in 0..blocks {
            let index = &mut image[BLOCK + (slot + 1) * 32 + block * 8..][..8];
            put(
                index,
                2,
                &u16::try_from(file.image + 1).unwrap().to_le_bytes(),
            );
            put(
                index,
                4,
                &u32::try_from(found + block).unwrap().to_le_bytes(),
            );
        }
        entries.push((file.name, slot as u64, 1));
        next = slot + 1 + (blocks * 8).div_ceil(32);
    }
    entries.sort();
    directory(&mut image[2 * BLOCK..], &entries);
    std::fs::write(to, image).unwrap();
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

fn superblock(image: &mut [u8], devices: usize) {
    let block = &mut image[1024..1152];
    put(block, 0, &0xe0f5_e1e2u32.to_le_bytes());
    block[12] = 12;
    put(block, 16, &4u64.to_le_bytes());
    put(block, 36, &3u32.to_le_bytes());
    // Where the inodes are.
    put(block, 40, &1u32.to_le_bytes());
    block[48..64].fill(7);
    // Chunk-based files, and a table of devices in slots of 128 bytes.
    put(block, 80, &0xcu32.to_le_bytes());
    put(block, 86, &u16::try_from(devices).unwrap().to_le_bytes());
    put(
        block,
        88,
        &u16::try_from(BLOCK / 2 / 128).unwrap().to_le_bytes(),
    );
}

fn inode(image: &mut [u8], slot: usize, mode: u16, layout: u16, size: usize, place: &[u8; 4]) {
    let inode = &mut image[BLOCK + slot * 32..][..32];
    put(inode, 0, &(layout << 1).to_le_bytes());
    put(inode, 4, &mode.to_le_bytes());
    put(
        inode,
        6,
        &(if mode == DIRECTORY { 2u16 } else { 1 }).to_le_bytes(),
    );
    put(inode, 8, &u32::try_from(size).unwrap().to_le_bytes());
    put(inode, 16, place);
    put(inode, 20, &u32::try_from(slot + 1).unwrap().to_le_bytes());
}

fn directory(block: &mut [u8], entries: &[(&str, u64, u8)]) {
    let mut name_at = entries.len() * 12;
    for (index, (name, slot, kind)) in entries.iter().enumerate() {
        let entry = &mut block[index * 12..];
        put(entry, 0, &slot.to_le_bytes());
        put(entry, 8, &u16::try_from(name_at).unwrap().to_le_bytes());
        entry[10] = *kind;
        put(block, name_at, name.as_bytes());
        name_at += name.len();
    }
}
