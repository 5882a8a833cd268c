//! The superblock before a hash tree, and what it means for the disk that it is on.

use blockmount::{HashAlgorithm, MountOptions, Verity};
use sha2::{Digest as _, Sha256};

use crate::digest::{from_hexadecimal, hexadecimal};
use crate::error::VerityError;
use crate::storage::{ReadAt, WriteAt, read_exact_at, write_all_at};
use crate::tree::{Parameters, Tree, check_root};

/// The length of a superblock, in bytes. The tree starts at the next whole hash block.
pub const SUPERBLOCK_SIZE: u64 = 512;

const MAGIC: &[u8; 8] = b"verity\0\0";
const VERSION: u32 = 1;
/// The salt is before each block, and digests are padded to powers of two.
const HASH_TYPE: u32 = 1;

/// Where the fields are. (Source: cryptsetup, `struct verity_sb`)
const AT_VERSION: usize = 8;
const AT_HASH_TYPE: usize = 12;
const AT_UUID: usize = 16;
const AT_ALGORITHM: usize = 32;
const AT_DATA_BLOCK_SIZE: usize = 64;
const AT_HASH_BLOCK_SIZE: usize = 68;
const AT_DATA_BLOCKS: usize = 72;
const AT_SALT_SIZE: usize = 80;
const AT_SALT: usize = 88;
const LONGEST_SALT: usize = 256;
const LONGEST_NAME: usize = 32;

/// Where a superblock and its tree are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On the disk with the data, which is before this offset, in bytes.
    Behind(u64),
    /// On a disk of its own from this offset on; the data is on another one.
    Apart {
        /// Where the superblock is, in bytes.
        offset: u64,
        /// The size of the disk with the data, in bytes.
        data_bytes: u64,
    },
}

impl Place {
    fn offset(self) -> u64 {
        match self {
            Place::Behind(offset) | Place::Apart { offset, .. } => offset,
        }
    }
}

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The UUID of the tree: any bytes.
    pub uuid: [u8; 16],
    /// How blocks are digested.
    pub parameters: Parameters,
    /// The number of data blocks.
    pub data_blocks: u64,
}

impl Superblock {
    /// One without a UUID.
    pub fn new(parameters: Parameters, data_blocks: u64) -> Self {
        Superblock {
            uuid: [0; 16],
            parameters,
            data_blocks,
        }
    }

    /// The same with a UUID that follows from the root digest, so that equal data gives equal superblocks. It is one of
    /// version 8, whose bits mean nothing to others.
    #[must_use]
    pub fn with_uuid_of(mut self, root_digest: &str) -> Self {
        let digest = Sha256::digest(from_hexadecimal(root_digest).unwrap_or_default());
        self.uuid.copy_from_slice(&digest[..16]);
        self.uuid[6] = 0x80 | (self.uuid[6] & 0x0f);
        self.uuid[8] = 0x80 | (self.uuid[8] & 0x3f);
        self
    }

    /// Writes the superblock at an offset, in bytes.
    ///
    /// # Errors
    ///
    /// [`VerityError::Invalid`] if the parameters cannot be; [`VerityError::Io`].
    pub fn write(&self, to: &(impl WriteAt + ?Sized), offset: u64) -> Result<(), VerityError> {
        self.parameters.check()?;
        let written = write_all_at(to, &self.encode(), offset);
        written.map_err(VerityError::io("write a superblock"))
    }

    /// Reads a superblock from a disk of `size` bytes, and checks all of it: what it says is bytes of a disk, which may be
    /// anybody's. Whether it belongs to the data only the root digest tells, which no superblock has.
    ///
    /// # Errors
    ///
    /// [`VerityError::NoSuperblock`] if there is none, or a shorter disk; [`VerityError::Invalid`] if it names an
    /// algorithm, sizes or a salt that cannot be, or if data or tree are not inside of their disks.
    pub fn read(
        disk: &(impl ReadAt + ?Sized),
        size: u64,
        place: Place,
    ) -> Result<Self, VerityError> {
        let offset = place.offset();
        if !offset.is_multiple_of(SUPERBLOCK_SIZE) {
            let what = format!("a superblock at byte {offset}");
            return Err(VerityError::invalid(what, "it is at a multiple of 512"));
        }
        let fits = offset
            .checked_add(SUPERBLOCK_SIZE)
            .is_some_and(|end| end <= size);
        if !fits {
            return Err(VerityError::NoSuperblock { offset });
        }
        let mut bytes = [0; SUPERBLOCK_SIZE as usize];
        read_exact_at(disk, &mut bytes, offset).map_err(VerityError::io("read a superblock"))?;
        let superblock = Self::decode(&bytes).ok_or(VerityError::NoSuperblock { offset })??;
        superblock.check_place(size, place)?;
        Ok(superblock)
    }

    /// Nothing if the bytes are no superblock at all.
    pub(crate) fn decode(
        bytes: &[u8; SUPERBLOCK_SIZE as usize],
    ) -> Option<Result<Self, VerityError>> {
        bytes.starts_with(MAGIC).then(|| Self::decode_fields(bytes))
    }

    fn decode_fields(bytes: &[u8; SUPERBLOCK_SIZE as usize]) -> Result<Self, VerityError> {
        let invalid = |what: String, why| Err(VerityError::invalid(what, why));
        let version = u32_at(bytes, AT_VERSION);
        if version != VERSION {
            return invalid(format!("a superblock of version {version}"), "1 is known");
        }
        let hash_type = u32_at(bytes, AT_HASH_TYPE);
        if hash_type != HASH_TYPE {
            return invalid(format!("hash type {hash_type}"), "1 is known");
        }
        let name = &bytes[AT_ALGORITHM..][..LONGEST_NAME];
        let (name, rest) = match name.iter().position(|byte| *byte == 0) {
            Some(end) => name.split_at(end),
            None => return invalid("the name of an algorithm".to_owned(), "it ends with a zero"),
        };
        let known = HashAlgorithm::ALL.into_iter();
        let mut known = known.filter(|known| known.name().as_bytes() == name);
        let Some(algorithm) = known.next().filter(|_| rest.iter().all(|byte| *byte == 0)) else {
            let what = format!("algorithm {:?}", String::from_utf8_lossy(name));
            return invalid(what, "sha256, sha384 and sha512 are known");
        };
        let salt_size = u16::from_le_bytes(array(bytes, AT_SALT_SIZE)).into();
        if salt_size > LONGEST_SALT {
            return invalid(format!("a salt of {salt_size} bytes"), "it has at most 256");
        }
        let parameters = Parameters {
            algorithm,
            data_block_size: u32_at(bytes, AT_DATA_BLOCK_SIZE),
            hash_block_size: u32_at(bytes, AT_HASH_BLOCK_SIZE),
            salt: bytes[AT_SALT..][..salt_size].to_owned(),
        };
        parameters.check()?;
        Ok(Superblock {
            uuid: array(bytes, AT_UUID),
            parameters,
            data_blocks: u64::from_le_bytes(array(bytes, AT_DATA_BLOCKS)),
        })
    }

    /// Whether data and tree are inside of their disks.
    fn check_place(&self, size: u64, place: Place) -> Result<(), VerityError> {
        let blocks = self.data_blocks;
        let block_size = u64::from(self.parameters.data_block_size);
        let room = match place {
            Place::Behind(offset) => offset,
            Place::Apart { data_bytes, .. } => data_bytes,
        };
        let data = blocks.checked_mul(block_size);
        if blocks == 0 || data.is_none_or(|data| data > room) {
            let what = format!("{blocks} data blocks of {block_size} bytes");
            return Err(VerityError::invalid(
                what,
                "the disk has no such blocks before the tree",
            ));
        }
        match self.tree(place.offset()) {
            Some(tree) if tree.end() <= size => Ok(()),
            _ => {
                let what = format!("a hash tree for {blocks} data blocks");
                Err(VerityError::invalid(
                    what,
                    "it does not end before the disk does",
                ))
            }
        }
    }

    pub(crate) fn encode(&self) -> [u8; SUPERBLOCK_SIZE as usize] {
        let mut bytes = [0; SUPERBLOCK_SIZE as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..][..field.len()].copy_from_slice(field);
        let parameters = &self.parameters;
        put(0, MAGIC);
        put(AT_VERSION, &VERSION.to_le_bytes());
        put(AT_HASH_TYPE, &HASH_TYPE.to_le_bytes());
        put(AT_UUID, &self.uuid);
        put(AT_ALGORITHM, parameters.algorithm.name().as_bytes());
        put(
            AT_DATA_BLOCK_SIZE,
            &parameters.data_block_size.to_le_bytes(),
        );
        put(
            AT_HASH_BLOCK_SIZE,
            &parameters.hash_block_size.to_le_bytes(),
        );
        put(AT_DATA_BLOCKS, &self.data_blocks.to_le_bytes());
        put(AT_SALT_SIZE, &(parameters.salt.len() as u16).to_le_bytes());
        put(AT_SALT, &parameters.salt);
        bytes
    }

    /// The tree that follows a superblock at this offset, in bytes; nothing if no disk is as large.
    pub fn tree(&self, offset: u64) -> Option<Tree> {
        Tree::behind_superblock(&self.parameters, self.data_blocks, offset)
    }

    /// What a guest is told to mount a disk with its tree behind the data: all that the kernel needs to know. The superblock
    /// itself is at `offset`, in bytes; the digest is whatever the caller trusts.
    ///
    /// # Errors
    ///
    /// [`VerityError::Invalid`] if the digest is none of the algorithm, or no kernel could be given the rest.
    pub fn options(&self, root_digest: &str, offset: u64) -> Result<Verity, VerityError> {
        self.options_with(root_digest, offset, false)
    }

    /// The same for a disk whose superblock and tree are on another one, from `offset` of that on.
    ///
    /// # Errors
    ///
    /// As for [`options`](Self::options).
    pub fn options_apart(&self, root_digest: &str, offset: u64) -> Result<Verity, VerityError> {
        self.options_with(root_digest, offset, true)
    }

    fn options_with(
        &self,
        root_digest: &str,
        offset: u64,
        is_apart: bool,
    ) -> Result<Verity, VerityError> {
        let refused = |why| VerityError::invalid(format!("root digest {root_digest:?}"), why);
        check_root(&self.parameters, root_digest)?;
        let tree = self
            .tree(offset)
            .ok_or_else(|| refused("no disk has such a tree"))?;
        let mut verity = Verity::new(root_digest, self.data_blocks);
        verity.salt = hexadecimal(&self.parameters.salt);
        verity.algorithm = self.parameters.algorithm;
        verity.data_block_size = self.parameters.data_block_size;
        verity.hash_block_size = self.parameters.hash_block_size;
        verity.hash_start_block = tree.start() / u64::from(self.parameters.hash_block_size);
        verity.separate_tree = is_apart;
        // The options of a mount are checked as a whole.
        let built = MountOptions::builder().read_only().verity(verity).build();
        let built = built.map_err(|_| refused("the tree is not behind the data"))?;
        built
            .verity()
            .cloned()
            .ok_or_else(|| refused("it was left out"))
    }
}

impl Tree {
    /// A tree behind a superblock at this offset, in bytes.
    pub fn behind_superblock(
        parameters: &Parameters,
        data_blocks: u64,
        offset: u64,
    ) -> Option<Tree> {
        let block = u64::from(parameters.hash_block_size);
        let start = offset
            .checked_add(SUPERBLOCK_SIZE)?
            .checked_next_multiple_of(block)?;
        Tree::new(parameters, data_blocks, start)
    }
}

fn array<const N: usize>(bytes: &[u8; SUPERBLOCK_SIZE as usize], at: usize) -> [u8; N] {
    let field = bytes[at..].first_chunk();
    *field.expect("all fields are inside of a superblock")
}

fn u32_at(bytes: &[u8; SUPERBLOCK_SIZE as usize], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}
