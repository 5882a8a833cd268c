//! What vouches for a layer: from the command line, and the image, to what a guest is told.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use blockmount::Verity;
use blockmount_linux::probe::{self, Content};
use blockmount_verity::{
    Metadata, Place, ReadAt, Superblock, VerityError, find, root_digest, verify,
};
use serde::Serialize;

use crate::failure::{Context, Failure};

/// What `--verity` names: a file beside the image, or what would be in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trusted {
    File(PathBuf),
    Given(Metadata),
}

/// `FILE`, or `root=DIGEST,offset=BYTES`. A file with such a name is meant by `./root=...`.
impl FromStr for Trusted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.starts_with("root=") {
            return Ok(Trusted::File(text.into()));
        }
        let form = || "it is a file, or root=DIGEST,offset=BYTES".to_owned();
        let (mut root, mut offset) = (None, None);
        for field in text.split(',') {
            let (name, value) = field.split_once('=').ok_or_else(form)?;
            let before = match name {
                "root" => root.replace(value.to_owned()).map(drop),
                "offset" => offset.replace(value.parse().map_err(|_| form())?).map(drop),
                _ => return Err(form()),
            };
            if before.is_some() {
                return Err(format!("{name} is given twice"));
            }
        }
        match (root, offset) {
            (Some(root_digest), Some(hash_offset)) => Ok(Trusted::Given(Metadata {
                root_digest,
                hash_offset,
            })),
            _ => Err(form()),
        }
    }
}

const ADVICE: &str = "make a hash tree and IMAGE.dmverity with \"blockmount seal IMAGE\", or see what there is with \"blockmount inspect --verity IMAGE\"";

/// What the guest is told of a layer that is to be checked, by a tree behind its data or in another image: the superblock is
/// read here, where the images are, and the guest reads none.
pub(crate) fn of_layer(
    image: &Path,
    partition: Option<NonZeroU32>,
    trusted: &Trusted,
    tree: Option<&Path>,
) -> Result<Verity, Failure> {
    let metadata = match trusted {
        Trusted::Given(metadata) => metadata.clone(),
        Trusted::File(path) => Metadata::read(path)
            .context(|| format!("cannot use --verity {}", path.display()))
            .map_err(|failure| failure.advise(ADVICE))?,
    };
    let what = || format!("cannot read the hash tree of {}", image.display());
    let mut file = File::open(image).context(what)?;
    let (start, size) = part(&mut file, partition).context(what)?;
    let (root, offset) = (&metadata.root_digest, metadata.hash_offset);
    let options = match tree {
        None => {
            let file = &file;
            let part = Part { file, start, size };
            let superblock = Superblock::read(&part, size, Place::Behind(offset));
            superblock.and_then(|found| found.options(root, offset))
        }
        Some(tree) => {
            let mut file =
                File::open(tree).context(|| format!("cannot open {}", tree.display()))?;
            let length = file.seek(SeekFrom::End(0)).context(what)?;
            let data_bytes = size;
            let superblock = Superblock::read(&file, length, Place::Apart { offset, data_bytes });
            superblock.and_then(|found| found.options_apart(root, offset))
        }
    };
    let options = options.context(what);
    options.map_err(|failure| failure.advise(ADVICE))
}

/// Where the layer is in its image, and how long it is, in bytes.
fn part(file: &mut File, partition: Option<NonZeroU32>) -> io::Result<(u64, u64)> {
    let found = probe::probe(file)?;
    let Some(number) = partition else {
        return Ok((0, found.device_bytes));
    };
    let partitions = match found.content {
        Content::PartitionTable(table) => table.partitions,
        _ => Vec::new(),
    };
    let mut partitions = partitions.into_iter();
    let partition = partitions.find(|partition| partition.number == number.get());
    partition
        .map(|partition| (partition.start, partition.size))
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no partition {number}"),
            )
        })
}

/// A part of a file, read as if it were one.
struct Part<'a> {
    file: &'a File,
    start: u64,
    size: u64,
}

impl ReadAt for Part<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.size.saturating_sub(offset);
        let length = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let at = self
            .start
            .checked_add(offset)
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.file.read_at(&mut buffer[..length], at)
    }
}

/// The size of the blocks of the filesystem in an image, if the kernel could not mount it on larger ones.
pub(crate) fn small_blocks(image: &Path) -> Result<Option<u32>, Failure> {
    let what = || format!("cannot look at {}", image.display());
    let mut file = File::open(image).context(what)?;
    Ok(match probe::probe(&mut file).context(what)?.content {
        Content::Filesystem(found) => found.block_size.filter(|size| *size < 4096),
        _ => None,
    })
}

/// The hash tree at the end of an image. Its JSON form is this structure, field by field.
#[derive(Debug, Serialize)]
pub(crate) struct Found {
    /// As the tree has it: what is to be trusted comes from elsewhere.
    root_digest: String,
    /// Where the superblock is, in bytes.
    hash_offset: u64,
    algorithm: &'static str,
    data_block_size: u32,
    hash_block_size: u32,
    data_blocks: u64,
    /// As hexadecimal digits.
    salt: String,
    uuid: String,
    /// Why data or tree are not what they were, if so: a corrupt block, or another digest in the file beside the image.
    corrupt: Option<String>,
}

impl Found {
    pub(crate) fn corrupt(&self) -> Option<&str> {
        self.corrupt.as_deref()
    }

    /// As one line of a table.
    pub(crate) fn row(&self, image: String) -> [String; 7] {
        [
            image,
            self.algorithm.to_owned(),
            format!("{} x {}", self.data_blocks, self.data_block_size),
            self.hash_block_size.to_string(),
            self.hash_offset.to_string(),
            self.corrupt.clone().unwrap_or_else(|| "intact".to_owned()),
            self.root_digest.clone(),
        ]
    }
}

/// What the columns of [`Found::row`] are.
pub(crate) const COLUMNS: [&str; 7] = [
    "image",
    "algorithm",
    "data blocks",
    "hash block size",
    "hash offset",
    "state",
    "root digest",
];

/// Looks for a hash tree at the end of an image, and checks all of it. Where there is a file beside the image, its digest is
/// the one that counts. Blocks.
pub(crate) fn inspect(image: &Path) -> Result<Found, Failure> {
    let what = || format!("cannot check {}", image.display());
    let mut file = File::open(image).context(what)?;
    let size = file.seek(SeekFrom::End(0)).context(what)?;
    let beside = Metadata::path_of(image);
    let metadata = match beside.symlink_metadata() {
        Ok(_) => Some(Metadata::read(&beside).context(what)?),
        Err(_) => None,
    };
    let found = match &metadata {
        Some(metadata) => {
            let place = Place::Behind(metadata.hash_offset);
            let superblock = Superblock::read(&file, size, place).context(what)?;
            Some((metadata.hash_offset, superblock))
        }
        None => find(&file, size).context(what)?,
    };
    let (hash_offset, superblock) =
        found.ok_or_else(|| Failure::new(what()).because("it has no hash tree at its end"))?;
    let tree = superblock
        .tree(hash_offset)
        .ok_or_else(|| Failure::new(what()).because("its hash tree is larger than a disk"))?;
    let root = root_digest(&file, &file, &tree).context(what)?;
    let trusted = metadata.map_or_else(|| root.clone(), |metadata| metadata.root_digest);
    let corrupt = match verify(&file, &file, &tree, &trusted, &|_| true) {
        Ok(()) => None,
        Err(VerityError::Corrupt(corrupt)) => Some(corrupt.to_string()),
        Err(error) => return Err(error).context(what),
    };
    let parameters = &superblock.parameters;
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let uuid = hex(&superblock.uuid);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| uuid[part].to_owned());
    Ok(Found {
        root_digest: root,
        hash_offset,
        algorithm: parameters.algorithm.name(),
        data_block_size: parameters.data_block_size,
        hash_block_size: parameters.hash_block_size,
        data_blocks: superblock.data_blocks,
        salt: hex(&parameters.salt),
        uuid: parts.join("-"),
        corrupt,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_in_a_file_or_given() {
        let file = Trusted::File("a,b=c.dmverity".into());
        assert_eq!("a,b=c.dmverity".parse(), Ok(file));
        let given = Trusted::Given(Metadata {
            root_digest: "ab".into(),
            hash_offset: 4096,
        });
        assert_eq!("root=ab,offset=4096".parse(), Ok(given));
        for text in [
            "root=ab",
            "root=ab,offset=x",
            "root=ab,offset=1,offset=2",
            "root=ab,offset=1,salt=00",
            "root=ab,offset=1,",
        ] {
            assert!(text.parse::<Trusted>().is_err(), "{text}");
        }
    }
}
