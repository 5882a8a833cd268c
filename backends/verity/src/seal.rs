//! Sealing an image: appending a superblock and a tree.
//!
//! The data is never written to. First of all a mark with the length of the image is put where the superblock will be, so
//! that a seal that was killed at any moment is found by the next one, which cuts off what was appended; the superblock
//! replaces the mark when all else is on the medium.
//!
//! | killed | what the image is | what the next seal does |
//! |---|---|---|
//! | before the mark is written | the image | seals it |
//! | before the image has its full length | it ends with the mark | cuts it off, and seals |
//! | before the superblock is written | a tree behind a mark, not all of it there | the same |
//! | later | sealed | refuses |

use std::fs::{File, TryLockError};

use blockmount::HashAlgorithm;
use sha2::{Digest as _, Sha256};

use crate::error::VerityError;
use crate::storage::{ReadAt, read_exact_at, write_all_at};
use crate::superblock::{Place, SUPERBLOCK_SIZE, Superblock};
use crate::tree::{Parameters, Progress, Tree, format};

const SECTOR: usize = SUPERBLOCK_SIZE as usize;
/// What a mark starts with; the length of the image and a digest of both follow.
const MARK: &[u8; 16] = b"blockmount seal\0";
/// Images of virtual disks end with a footer of this length, in bytes.
const FOOTER: u64 = 512;

/// An image that has its tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// What vouches for the image: to be kept where nobody can change it.
    pub root_digest: String,
    /// Where the superblock is, in bytes.
    pub hash_offset: u64,
    /// What the superblock says.
    pub superblock: Superblock,
}

/// Appends a superblock and a tree to an image, which is open for reading and writing, and locks it meanwhile. An image that
/// ends inside of a block is filled up with zeros. The UUID follows from the root digest: equal images are sealed equally.
/// What an earlier seal has left that was killed is taken back first.
///
/// # Errors
///
/// [`VerityError::Sealed`] if it is sealed already, [`VerityError::Invalid`] for parameters that cannot be or an empty
/// image, [`VerityError::Locked`], [`VerityError::Stopped`], [`VerityError::Io`]. The image has its old length then.
pub fn seal(
    image: &File,
    parameters: &Parameters,
    progress: &Progress<'_>,
) -> Result<Sealed, VerityError> {
    parameters.check()?;
    match image.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(VerityError::Locked),
        Err(TryLockError::Error(source)) => return Err(VerityError::io("lock the image")(source)),
    }
    let sealed = seal_locked(image, parameters, progress);
    // The lock goes with the file otherwise.
    let _ = image.unlock();
    sealed
}

fn seal_locked(
    image: &File,
    parameters: &Parameters,
    progress: &Progress<'_>,
) -> Result<Sealed, VerityError> {
    let length = length_of(image)?;
    let cut_off = |length| {
        image
            .set_len(length)
            .map_err(VerityError::io("cut the image off"))
    };
    let length = match look(image, length)? {
        Some((offset, End::Sealed(_))) => return Err(VerityError::Sealed { offset }),
        Some((_, End::Marked(before))) => {
            cut_off(before)?;
            before
        }
        None => length,
    };
    if length == 0 {
        return Err(VerityError::invalid(
            "an empty image",
            "there is nothing to seal",
        ));
    }
    // Data ends where a block of either kind does.
    let offset = length.checked_next_multiple_of(parameters.alignment());
    let blocks = length.div_ceil(parameters.data_block_size.into());
    let tree = offset
        .and_then(|offset| Some((offset, Tree::behind_superblock(parameters, blocks, offset)?)));
    let Some((offset, tree)) = tree else {
        return Err(VerityError::invalid(
            format!("an image of {length} bytes"),
            "no disk is as large with its tree",
        ));
    };
    let appended = append(image, length, offset, &tree, progress);
    let root_digest = match appended {
        Ok(root_digest) => root_digest,
        Err(error) => {
            // The first error is what is reported; what is left has its mark.
            let _ = cut_off(length);
            return Err(error);
        }
    };
    let superblock = Superblock::new(parameters.clone(), blocks).with_uuid_of(&root_digest);
    put(image, &superblock.encode(), offset)?;
    Ok(Sealed {
        root_digest,
        hash_offset: offset,
        superblock,
    })
}

/// Appends all but the superblock.
fn append(
    image: &File,
    length: u64,
    offset: u64,
    tree: &Tree,
    progress: &Progress<'_>,
) -> Result<String, VerityError> {
    put(image, &mark(length), offset)?;
    image
        .set_len(tree.end())
        .map_err(VerityError::io("make space for the tree"))?;
    let root_digest = format(image, image, tree, progress)?;
    image
        .sync_data()
        .map_err(VerityError::io("write the tree"))?;
    Ok(root_digest)
}

fn put(image: &File, sector: &[u8; SECTOR], offset: u64) -> Result<(), VerityError> {
    let written = write_all_at(image, sector, offset).and_then(|()| image.sync_data());
    written.map_err(VerityError::io("write behind the data"))
}

fn length_of(image: &File) -> Result<u64, VerityError> {
    let about = image
        .metadata()
        .map_err(VerityError::io("ask for the length of the image"));
    Ok(about?.len())
}

/// Finds the superblock of a tree at the end of an image of `size` bytes, or before a footer of 512 bytes. It is for
/// people who ask what is in an image: what is mounted is what a client names.
///
/// # Errors
///
/// [`VerityError::Io`].
pub fn find(
    image: &(impl ReadAt + ?Sized),
    size: u64,
) -> Result<Option<(u64, Superblock)>, VerityError> {
    for size in [Some(size), size.checked_sub(FOOTER)].into_iter().flatten() {
        if let Some((offset, End::Sealed(superblock))) = look(image, size)? {
            return Ok(Some((offset, *superblock)));
        }
    }
    Ok(None)
}

/// How an image ends.
enum End {
    Sealed(Box<Superblock>),
    /// With what a seal has left that was killed. The length of the image before, in bytes.
    Marked(u64),
}

/// Looks where a superblock would be if the image ended with its tree, for each kind of tree, and where a mark would be.
fn look(image: &(impl ReadAt + ?Sized), size: u64) -> Result<Option<(u64, End)>, VerityError> {
    let last = size.checked_sub(SUPERBLOCK_SIZE);
    let mut offsets: Vec<u64> = kinds()
        .filter_map(|kind| offset_before_end(&kind, size))
        .collect();
    offsets.extend(last.filter(|last| last.is_multiple_of(SUPERBLOCK_SIZE)));
    offsets.sort_unstable();
    offsets.dedup();
    for offset in offsets {
        let mut sector = [0; SECTOR];
        read_exact_at(image, &mut sector, offset).map_err(VerityError::io("read the image"))?;
        if let Some(before) = length_in(&sector).filter(|before| *before <= offset) {
            return Ok(Some((offset, End::Marked(before))));
        }
        let read = Superblock::read(image, size, Place::Behind(offset));
        // Only one of a tree that ends with the image is its own.
        if let Ok(superblock) = read
            && superblock
                .tree(offset)
                .is_some_and(|tree| tree.end() == size)
        {
            return Ok(Some((offset, End::Sealed(superblock.into()))));
        }
    }
    Ok(None)
}

/// Parameters of every kind of tree that takes another space: the salt does not matter, nor which algorithm of a size.
fn kinds() -> impl Iterator<Item = Parameters> {
    let sizes = (9..=16).map(|exponent| 1u32 << exponent);
    let pairs = sizes
        .clone()
        .flat_map(move |data| sizes.clone().map(move |hash| (data, hash)));
    pairs.flat_map(|(data_block_size, hash_block_size)| {
        [HashAlgorithm::Sha256, HashAlgorithm::Sha512].map(|algorithm| Parameters {
            algorithm,
            data_block_size,
            hash_block_size,
            salt: Vec::new(),
        })
    })
}

/// Where the superblock of a tree of this kind is that ends at `size`: the space grows with the number of blocks, so that
/// there is one place at most.
fn offset_before_end(kind: &Parameters, size: u64) -> Option<u64> {
    let block = u64::from(kind.data_block_size);
    let place = |blocks: u64| {
        let offset = (blocks * block).checked_next_multiple_of(kind.hash_block_size.into())?;
        let end = Tree::behind_superblock(kind, blocks, offset)?.end();
        Some((offset, end))
    };
    let (mut low, mut high) = (1, size / block);
    while low < high {
        let middle = low + (high - low) / 2;
        match place(middle) {
            Some((_, end)) if end < size => low = middle + 1,
            _ => high = middle,
        }
    }
    let (offset, end) = place(low)?;
    (end == size).then_some(offset)
}

fn mark(length: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[..16].copy_from_slice(MARK);
    sector[16..24].copy_from_slice(&length.to_le_bytes());
    let digest = Sha256::digest(&sector[..24]);
    sector[24..56].copy_from_slice(&digest);
    sector
}

/// The length of the image that a mark tells.
fn length_in(sector: &[u8; SECTOR]) -> Option<u64> {
    let length = u64::from_le_bytes(*sector[16..].first_chunk()?);
    (*sector == mark(length)).then_some(length)
}
