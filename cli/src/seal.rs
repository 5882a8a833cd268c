//! `blockmount seal`: giving an image a hash tree, and saying what vouches for it.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::path::Path;

use blockmount_verity::{
    Metadata, Parameters, Progress, Sealed, Superblock, Tree, VerityError, format, seal,
};
use serde::Serialize;

use crate::args::SealArgs;
use crate::failure::{Context, Failure, printable};
use crate::interrupt::{Interrupt, Stop};
use crate::terminal::{self, note, print, print_json};
use crate::verity::small_blocks;

/// What was made. Its JSON form is this structure, field by field.
#[derive(Debug, Serialize)]
struct Report {
    image: String,
    root_digest: String,
    /// The file with the tree, if it is not in the image.
    tree: Option<String>,
    /// The file that vouches for the image.
    metadata: Option<String>,
    /// Where the superblock is, in bytes.
    hash_offset: u64,
    algorithm: &'static str,
    data_block_size: u32,
    hash_block_size: u32,
    data_blocks: u64,
}

/// Seals an image. `Ok` is the exit status.
pub(crate) async fn run(args: SealArgs, interrupt: Interrupt) -> Result<u8, Failure> {
    let json = args.json;
    let report = interrupt.blocking(move |stop| make(&args, stop)).await?;
    match json {
        true => print_json(&report)?,
        false => {
            let beside = report.tree.iter().chain(&report.metadata);
            for file in beside {
                note(format_args!("wrote {}", printable(file)));
            }
            print(&report.root_digest)?;
        }
    }
    Ok(0)
}

fn make(args: &SealArgs, stop: &Stop) -> Result<Report, Failure> {
    let image = &args.image;
    refuse_containers(image)?;
    let mut parameters = args.parameters();
    match (args.block_size, small_blocks(image)?) {
        (None, Some(size)) => {
            tracing::info!(size, "the filesystem has small blocks, and so has the tree");
            parameters.data_block_size = size;
        }
        (Some(size), _) => parameters.data_block_size = size,
        _ => {}
    }
    let bar = terminal::Progress::new();
    bar.stage("building the hash tree of so many MiB:");
    let done = std::sync::atomic::AtomicU64::new(0);
    let progress = |bytes: u64| {
        use std::sync::atomic::Ordering;
        let before = done.fetch_add(bytes, Ordering::Relaxed);
        (before >> 20..(before + bytes) >> 20).for_each(|_| bar.step());
        stop.check().is_ok()
    };
    let made = match &args.tree {
        None => append(image, &parameters, &progress),
        Some(tree) => beside(image, tree, &parameters, &progress),
    };
    bar.done();
    let (sealed, metadata) = made.map_err(|failure| stop.check().err().unwrap_or(failure))?;
    let Superblock {
        parameters,
        data_blocks,
        ..
    } = sealed.superblock;
    Ok(Report {
        image: image.display().to_string(),
        root_digest: sealed.root_digest,
        tree: args.tree.as_ref().map(|tree| tree.display().to_string()),
        metadata,
        hash_offset: sealed.hash_offset,
        algorithm: parameters.algorithm.name(),
        data_block_size: parameters.data_block_size,
        hash_block_size: parameters.hash_block_size,
        data_blocks,
    })
}

/// A tree behind the blocks of a container would not be in the disk that it holds.
fn refuse_containers(image: &Path) -> Result<(), Failure> {
    let mut start = [0; 8];
    let read = File::open(image).and_then(|mut file| std::io::Read::read(&mut file, &mut start));
    read.context(|| format!("cannot read {}", image.display()))?;
    let kind = match &start {
        [b'Q', b'F', b'I', 0xfb, ..] => "qcow2",
        b"vhdxfile" => "VHDX",
        [b'K', b'D', b'M', b'V', ..] => "VMDK",
        _ => return Ok(()),
    };
    let what = format!(
        "{} is a {kind} file, and only raw images can be sealed",
        image.display()
    );
    Err(Failure::new(what).advise("convert it first: qemu-img convert -O raw IMAGE RAW"))
}

type Made = Result<(Sealed, Option<String>), Failure>;

/// Appends the tree to the image, and writes the file that vouches for it.
fn append(image: &Path, parameters: &Parameters, progress: &Progress<'_>) -> Made {
    let what = || format!("cannot seal {}", image.display());
    let path = Metadata::path_of(image);
    let sealed_before = || {
        Failure::new(what()).advise(format!(
            "see what its tree is with: blockmount inspect --verity {}",
            printable(image.display())
        ))
    };
    if path.symlink_metadata().is_ok() {
        let why = format!("there is a file {} already", path.display());
        return Err(sealed_before().because(why));
    }
    let file = File::options()
        .read(true)
        .write(true)
        .open(image)
        .context(what)?;
    if !file.metadata().context(what)?.is_file() {
        let advice = "write the tree of a block device to a file of its own, with --tree FILE";
        let failure = Failure::new(what()).because("it is no regular file, which could grow");
        return Err(failure.advise(advice));
    }
    let sealed = match seal(&file, parameters, progress) {
        Err(error @ VerityError::Sealed { .. }) => return Err(sealed_before().because(error)),
        done => done.context(what)?,
    };
    let metadata = Metadata {
        root_digest: sealed.root_digest.clone(),
        hash_offset: sealed.hash_offset,
    };
    let root = &sealed.root_digest;
    metadata.write_new(&path).context(|| {
        format!("the image is sealed with root digest {root}, but its file is not written")
    })?;
    Ok((sealed, Some(path.display().to_string())))
}

/// Writes superblock and tree to a file of its own.
fn beside(image: &Path, tree: &Path, parameters: &Parameters, progress: &Progress<'_>) -> Made {
    let what = || format!("cannot make the hash tree {}", tree.display());
    let mut data = File::open(image).context(what)?;
    let size = data.seek(SeekFrom::End(0)).context(what)?;
    let block = u64::from(parameters.data_block_size);
    if size == 0 || !size.is_multiple_of(block) {
        let why = format!("the image has {size} bytes, which are not whole blocks of {block}");
        let advice = format!("fill it up: truncate --size=%{block} IMAGE");
        return Err(Failure::new(what()).because(why).advise(advice));
    }
    let superblock = Superblock::new(parameters.clone(), size / block);
    let layout = superblock.tree(0).ok_or_else(|| Failure::new(what()))?;
    let open = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(tree);
    let file = open.context(what)?;
    let made = write_tree(&data, &file, &layout, superblock, progress);
    let made = made.inspect_err(|_| drop(fs::remove_file(tree)));
    Ok((made.context(what)?, None))
}

fn write_tree(
    data: &File,
    file: &File,
    layout: &Tree,
    superblock: Superblock,
    progress: &Progress<'_>,
) -> Result<Sealed, VerityError> {
    let root_digest = format(data, file, layout, progress)?;
    let superblock = superblock.with_uuid_of(&root_digest);
    superblock.write(file, 0)?;
    // A single block needs no tree; whoever reads the superblock expects where it would be.
    let whole = file.set_len(layout.end()).and_then(|()| file.sync_all());
    whole.map_err(|source| VerityError::Io {
        doing: "write a hash tree",
        source,
    })?;
    Ok(Sealed {
        root_digest,
        hash_offset: 0,
        superblock,
    })
}
