//! Hash trees: where their blocks are, building them, and checking them.
//!
//! A tree is built from its leaves to its root, level by level. A piece of a level is some of its hash blocks; what they
//! digest is read in small parts, so that memory does not grow with the disk or with the blocks.

use blockmount::HashAlgorithm;

use crate::digest::{Hasher, from_hexadecimal, hexadecimal};
use crate::error::{Corrupt, VerityError};
use crate::parallel::for_each;
use crate::storage::{ReadAt, WriteAt, read_exact_at, write_all_at};

/// A thread reads so many bytes at once, unless a single block is larger: they stay in its cache while they are digested.
const READ: usize = 256 << 10;
/// A piece of work digests about so many bytes.
const PIECE: u64 = 1 << 20;
/// Block sizes, in bytes: from a sector to the largest page of any kernel.
const SMALLEST_BLOCK: u32 = 512;
const LARGEST_BLOCK: u32 = 64 << 10;
const LONGEST_SALT: usize = 256;

/// Is told now and then how many bytes of data have been digested, from several threads; answers whether to go on.
pub type Progress<'a> = dyn Fn(u64) -> bool + Sync + 'a;

/// How blocks are digested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// What digests a block.
    pub algorithm: HashAlgorithm,
    /// The size of a data block, in bytes: a power of two from 512 to 65,536. No kernel takes more than its page.
    pub data_block_size: u32,
    /// The size of a hash block, in bytes; as for data blocks.
    pub hash_block_size: u32,
    /// What is digested before each block: at most 256 bytes.
    pub salt: Vec<u8>,
}

impl Default for Parameters {
    /// SHA-256, blocks of 4,096 bytes, and a salt of 32 zero bytes, as containerd and hcsshim have it: equal images
    /// have equal root digests.
    fn default() -> Self {
        Parameters {
            algorithm: HashAlgorithm::Sha256,
            data_block_size: 4096,
            hash_block_size: 4096,
            salt: vec![0; 32],
        }
    }
}

impl Parameters {
    /// Whether a superblock could say so.
    pub(crate) fn check(&self) -> Result<(), VerityError> {
        for size in [self.data_block_size, self.hash_block_size] {
            if !size.is_power_of_two() || !(SMALLEST_BLOCK..=LARGEST_BLOCK).contains(&size) {
                let what = format!("a block size of {size} bytes");
                return Err(VerityError::invalid(
                    what,
                    "it is a power of two from 512 to 65536",
                ));
            }
        }
        if self.salt.len() > LONGEST_SALT {
            let what = format!("a salt of {} bytes", self.salt.len());
            return Err(VerityError::invalid(what, "it has at most 256"));
        }
        Ok(())
    }

    fn hasher(&self) -> Result<Hasher, VerityError> {
        Hasher::new(self.algorithm, &self.salt).ok_or_else(|| {
            VerityError::invalid(
                format!("algorithm {}", self.algorithm),
                "it is not built in",
            )
        })
    }

    /// Where the tree of a superblock starts at the earliest, and data may end, in bytes.
    pub(crate) fn alignment(&self) -> u64 {
        self.data_block_size.max(self.hash_block_size).into()
    }
}

/// Where the blocks of a tree are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    parameters: Parameters,
    data_blocks: u64,
    /// In bytes.
    start: u64,
    /// From the leaves to the root.
    levels: Vec<Level>,
    end: u64,
}

/// A level of a tree, whose blocks follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Level {
    /// In bytes.
    offset: u64,
    blocks: u64,
}

impl Tree {
    /// A tree that starts at a byte, which is one of a hash block; nothing if no disk is as large, or the parameters are
    /// none.
    pub fn new(parameters: &Parameters, data_blocks: u64, start: u64) -> Option<Tree> {
        parameters.check().ok()?;
        let block = u64::from(parameters.hash_block_size);
        let sizes = parameters
            .algorithm
            .levels(data_blocks, parameters.hash_block_size)?;
        if data_blocks == 0 || !start.is_multiple_of(block) {
            return None;
        }
        // The root is the first on the disk.
        let mut offset = start;
        let mut levels = Vec::new();
        for blocks in sizes.into_iter().rev() {
            levels.push(Level { offset, blocks });
            offset = offset.checked_add(blocks.checked_mul(block)?)?;
        }
        levels.reverse();
        // Offsets of files are signed.
        let is_file = i64::try_from(offset).is_ok();
        is_file.then(|| Tree {
            parameters: parameters.clone(),
            data_blocks,
            start,
            levels,
            end: offset,
        })
    }

    /// Where it starts, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Where it ends, in bytes.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The number of data blocks.
    pub fn data_blocks(&self) -> u64 {
        self.data_blocks
    }

    /// What the hash blocks of a level digest: data, or the level below.
    fn below(&self, level: usize) -> Source {
        let Parameters {
            data_block_size,
            hash_block_size,
            ..
        } = self.parameters;
        match level.checked_sub(1).map(|below| self.levels[below]) {
            None => Source {
                offset: 0,
                blocks: self.data_blocks,
                block_size: data_block_size,
                is_data: true,
            },
            Some(below) => Source {
                offset: below.offset,
                blocks: below.blocks,
                block_size: hash_block_size,
                is_data: false,
            },
        }
    }
}

/// Blocks that are digested.
#[derive(Debug, Clone, Copy)]
struct Source {
    /// In bytes.
    offset: u64,
    blocks: u64,
    block_size: u32,
    is_data: bool,
}

impl Source {
    fn at(&self, block: u64) -> u64 {
        self.offset + block * u64::from(self.block_size)
    }

    fn corrupt(&self, block: u64) -> VerityError {
        let corrupt = match self.is_data {
            true => Corrupt::DataBlock { number: block },
            false => Corrupt::HashBlock {
                offset: self.at(block),
            },
        };
        corrupt.into()
    }
}

/// Builds a tree, on all cores, and answers the root digest. The superblock, if there is to be one, is the caller's.
///
/// # Errors
///
/// [`VerityError::Io`], also if there is less data than the tree is about; [`VerityError::Stopped`].
pub fn format(
    data: &(impl ReadAt + ?Sized),
    file: &(impl WriteAt + ?Sized),
    tree: &Tree,
    progress: &Progress<'_>,
) -> Result<String, VerityError> {
    for level in 0..tree.levels.len() {
        each_hash_block(tree, level, progress, &|buffers, block| {
            match level {
                0 => digest_all(tree, data, buffers, level, block)?,
                _ => digest_all(tree, file, buffers, level, block)?,
            }
            let at = tree.levels[level].offset + block * buffers.digests.len() as u64;
            write_all_at(file, &buffers.digests, at).map_err(VerityError::io("write a hash tree"))
        })?;
    }
    root_digest(data, file, tree)
}

/// Checks all data and all of a tree against the root digest that is trusted, from the root down, on all cores.
///
/// # Errors
///
/// [`VerityError::Corrupt`] with the first block that is not as it was; [`VerityError::Invalid`] if the digest is none of
/// the algorithm; otherwise as for [`format`](format()).
pub fn verify(
    data: &(impl ReadAt + ?Sized),
    file: &(impl ReadAt + ?Sized),
    tree: &Tree,
    trusted: &str,
    progress: &Progress<'_>,
) -> Result<(), VerityError> {
    check_root(&tree.parameters, trusted)?;
    if !root_digest(data, file, tree)?.eq_ignore_ascii_case(trusted) {
        return Err(Corrupt::Root.into());
    }
    for level in (0..tree.levels.len()).rev() {
        each_hash_block(tree, level, progress, &|buffers, block| {
            match level {
                0 => digest_all(tree, data, buffers, level, block)?,
                _ => digest_all(tree, file, buffers, level, block)?,
            }
            compare(tree, file, buffers, level, block)
        })?;
    }
    Ok(())
}

/// The digest of the root block: what has to be trusted, and is worth nothing if it comes from the disk itself.
///
/// # Errors
///
/// [`VerityError::Io`].
pub fn root_digest(
    data: &(impl ReadAt + ?Sized),
    file: &(impl ReadAt + ?Sized),
    tree: &Tree,
) -> Result<String, VerityError> {
    let hasher = tree.parameters.hasher()?;
    let size = tree.parameters.algorithm.digest_size();
    let mut digest = vec![0; size];
    let (block, read) = match tree.levels.last() {
        // The root of a single block is the block's digest.
        None => {
            let mut block = vec![0; tree.parameters.data_block_size as usize];
            let read = read_exact_at(data, &mut block, 0);
            (block, read)
        }
        Some(root) => {
            let mut block = vec![0; tree.parameters.hash_block_size as usize];
            let read = read_exact_at(file, &mut block, root.offset);
            (block, read)
        }
    };
    read.map_err(VerityError::io("read the root of a hash tree"))?;
    hasher.digest(&block, &mut digest);
    Ok(hexadecimal(&digest))
}

/// Whether it is a digest of the algorithm.
pub(crate) fn check_root(parameters: &Parameters, digest: &str) -> Result<(), VerityError> {
    let bytes = from_hexadecimal(digest);
    let is_one = bytes.is_some_and(|bytes| bytes.len() == parameters.algorithm.digest_size());
    let what = || format!("root digest {digest:?}");
    match is_one {
        true => Ok(()),
        false => Err(VerityError::invalid(
            what(),
            "it is no digest of the algorithm",
        )),
    }
}

/// What a thread works with.
struct Buffers {
    hasher: Hasher,
    /// Blocks that are digested.
    blocks: Vec<u8>,
    /// The hash block that they make.
    digests: Vec<u8>,
    /// The hash block that there is.
    found: Vec<u8>,
}

/// Calls a function for each hash block of a level, on all cores.
fn each_hash_block(
    tree: &Tree,
    level: usize,
    progress: &Progress<'_>,
    work: &(dyn Fn(&mut Buffers, u64) -> Result<(), VerityError> + Sync),
) -> Result<(), VerityError> {
    let hasher = tree.parameters.hasher()?;
    let source = tree.below(level);
    let hash_block = tree.parameters.hash_block_size as usize;
    let fan_out = (hash_block / tree.parameters.algorithm.slot_size()) as u64;
    let digested = fan_out * u64::from(source.block_size);
    let in_piece = (PIECE / digested).max(1);
    let blocks = tree.levels[level].blocks;
    let buffers = || Buffers {
        hasher: hasher.clone(),
        blocks: vec![0; READ.max(source.block_size as usize)],
        digests: vec![0; hash_block],
        found: vec![0; hash_block],
    };
    for_each(blocks.div_ceil(in_piece), buffers, |buffers, piece| {
        let first = piece * in_piece;
        let last = (first + in_piece).min(blocks);
        for block in first..last {
            work(buffers, block)?;
        }
        let read = (last * fan_out).min(source.blocks) - first * fan_out;
        match !source.is_data || progress(read * u64::from(source.block_size)) {
            true => Ok(()),
            false => Err(VerityError::Stopped),
        }
    })
}

/// Digests all that a hash block is about.
fn digest_all(
    tree: &Tree,
    from: &(impl ReadAt + ?Sized),
    buffers: &mut Buffers,
    level: usize,
    block: u64,
) -> Result<(), VerityError> {
    let Buffers {
        hasher,
        blocks,
        digests,
        ..
    } = buffers;
    let source = tree.below(level);
    let slot = tree.parameters.algorithm.slot_size();
    let fan_out = (digests.len() / slot) as u64;
    let block_size = source.block_size as usize;
    digests.fill(0);
    let mut slots = digests.chunks_exact_mut(slot);
    let mut next = block * fan_out;
    let last = (next + fan_out).min(source.blocks);
    while next < last {
        let count = (last - next).min((blocks.len() / block_size) as u64);
        let part = &mut blocks[..count as usize * block_size];
        let what = match source.is_data {
            true => "read the data of a hash tree",
            false => "read a hash tree",
        };
        read_exact_at(from, part, source.at(next)).map_err(VerityError::io(what))?;
        for (block, slot) in part.chunks_exact(block_size).zip(&mut slots) {
            hasher.digest(block, slot);
        }
        next += count;
    }
    Ok(())
}

/// Compares a hash block that was computed with the one that there is.
fn compare(
    tree: &Tree,
    file: &(impl ReadAt + ?Sized),
    buffers: &mut Buffers,
    level: usize,
    block: u64,
) -> Result<(), VerityError> {
    let Buffers { digests, found, .. } = buffers;
    let slot = tree.parameters.algorithm.slot_size();
    let here = Level {
        offset: tree.levels[level].offset + block * found.len() as u64,
        blocks: 1,
    };
    read_exact_at(file, found, here.offset).map_err(VerityError::io("read a hash tree"))?;
    let pairs = digests.chunks_exact(slot).zip(found.chunks_exact(slot));
    let Some(differs) = pairs.into_iter().position(|(one, other)| one != other) else {
        return Ok(());
    };
    let source = tree.below(level);
    let number = block * (found.len() / slot) as u64 + differs as u64;
    match number < source.blocks {
        true => Err(source.corrupt(number)),
        // Behind the last digest there are zeros. The level above vouches for the block, but for who has built it.
        false => Err(Corrupt::HashBlock {
            offset: here.offset,
        }
        .into()),
    }
}
