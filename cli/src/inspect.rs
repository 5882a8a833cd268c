//! Saying what is in an image.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use blockmount_linux::probe::{self, Content};
use serde::Serialize;

use crate::args::InspectArgs;
use crate::content::{self, Found, describe, past_the_end};
use crate::failure::{Context, FAILED, Failure, printable};
use crate::report::table;
use crate::terminal::{complain, print, print_json};
use crate::verity;

/// What is in an image. Its JSON form is this structure, field by field.
#[derive(Debug, Serialize)]
struct Image {
    image: String,
    /// Of the file or device, in bytes.
    size: u64,
    content: Found,
    partitions: Vec<PartitionFound>,
    /// The hash tree at the end, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    verity: Option<verity::Found>,
}

#[derive(Debug, Serialize)]
struct PartitionFound {
    number: u32,
    /// Where it starts, in bytes.
    start: u64,
    /// In bytes.
    size: u64,
    type_id: String,
    name: Option<String>,
    content: Found,
}

/// Inspects each image; one that cannot be read does not keep the others from being shown. `Ok` is the
/// exit status. Blocks.
pub(crate) fn run(args: InspectArgs) -> Result<u8, Failure> {
    let mut found = Vec::new();
    let mut status = 0;
    for image in &args.images {
        match inspect(image, args.verity) {
            Ok(image) => {
                if let Some(why) = image.verity.as_ref().and_then(verity::Found::corrupt) {
                    let what = format!("{} is corrupt", image.image);
                    complain(&Failure::new(what).because(why.to_owned()));
                    status = FAILED;
                }
                if let Some(why) = image.content.unusable() {
                    let what = format!("{}: {}", image.image, image.content.description);
                    complain(&Failure::new(what).advise(why));
                    status = FAILED;
                }
                found.push(image);
            }
            Err(failure) => {
                complain(&failure);
                status = FAILED;
            }
        }
    }
    match args.json {
        true => print_json(&found)?,
        false if found.is_empty() => {}
        false => print(&to_text(&found))?,
    }
    Ok(status)
}

fn inspect(image: &Path, with_verity: bool) -> Result<Image, Failure> {
    let what = || format!("cannot inspect {}", image.display());
    let mut file = content::open(image).context(what)?;
    let kind = file.metadata().context(what)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let why = "it is neither a file nor a block device";
        return Err(Failure::new(what())
            .because(why)
            .advise("name an image file or a block device"));
    }
    let size = file.seek(SeekFrom::End(0)).context(what)?;
    let answer = probe::probe(&mut file).context(what)?;
    let mut partitions = Vec::new();
    if let Content::PartitionTable(table) = &answer.content {
        for partition in &table.partitions {
            let mut window = Window::new(&mut file, partition.start, partition.size, size);
            partitions.push(PartitionFound {
                number: partition.number,
                start: partition.start,
                size: partition.size,
                type_id: partition.type_id.clone(),
                name: partition.name.clone(),
                content: match window.size == partition.size {
                    true => describe(&probe::probe(&mut window).context(what)?),
                    false => past_the_end(),
                },
            });
        }
    }
    let content = describe(&answer);
    let verity = with_verity.then(|| verity::inspect(image)).transpose()?;
    Ok(Image {
        image: image.display().to_string(),
        size,
        content,
        partitions,
        verity,
    })
}

fn to_text(images: &[Image]) -> String {
    let mut table = table(&[
        "image",
        "partition",
        "content",
        "size",
        "filesystem size",
        "block size",
        "label",
        "uuid",
    ]);
    for image in images {
        let name = printable(&image.image).to_string();
        table.add_row(row(name, String::new(), image.size, &image.content, None));
        for partition in &image.partitions {
            let number = partition.number.to_string();
            let found = &partition.content;
            table.add_row(row(
                String::new(),
                number,
                partition.size,
                found,
                partition.name.as_deref(),
            ));
        }
    }
    let mut trees = crate::report::table(&verity::COLUMNS);
    for image in images {
        if let Some(found) = &image.verity {
            trees.add_row(found.row(printable(&image.image).to_string()));
        }
    }
    match trees.is_empty() {
        true => table.to_string(),
        false => format!("{table}\n\n{trees}"),
    }
}

fn row(
    name: String,
    part: String,
    size: u64,
    found: &Found,
    part_name: Option<&str>,
) -> [String; 8] {
    let label = found.label.as_deref().or(part_name).unwrap_or_default();
    [
        name,
        part,
        found.description.clone(),
        bytes(size),
        found.filesystem_size.map_or(String::new(), bytes),
        found
            .block_size
            .map_or(String::new(), |size| size.to_string()),
        printable(label).to_string(),
        found.uuid.clone().unwrap_or_default(),
    ]
}

/// A size for people: exact where it is a round one, else to a tenth.
fn bytes(size: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..UNITS.len())
        .rev()
        .find(|unit| size >= 1 << (10 * unit))
        .unwrap_or(0);
    let one = 1u64 << (10 * unit);
    match size % one {
        0 => format!("{} {}", size / one, UNITS[unit]),
        _ => format!("{:.1} {}", size as f64 / one as f64, UNITS[unit]),
    }
}

/// A part of a file that looks like a whole one.
struct Window<'a> {
    file: &'a mut File,
    start: u64,
    size: u64,
    position: u64,
}

impl<'a> Window<'a> {
    /// The part from `start` with at most `size` bytes, cut off where a file of `of` bytes ends.
    fn new(file: &'a mut File, start: u64, size: u64, of: u64) -> Self {
        let size = size.min(of.saturating_sub(start));
        Window {
            file,
            start,
            size,
            position: 0,
        }
    }
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(self.position);
        let length = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        self.file
            .seek(SeekFrom::Start(self.start + self.position.min(self.size)))?;
        let read = self.file.read(&mut buffer[..length])?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for Window<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.size.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_ends_where_its_part_or_the_file_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        std::fs::write(&path, b"0123456789").unwrap();
        let mut file = File::open(&path).unwrap();
        let mut read = |start, size, to| {
            let mut window = Window::new(&mut file, start, size, 10);
            let at = window.seek(to).unwrap();
            let mut text = String::new();
            window.read_to_string(&mut text).unwrap();
            (at, text)
        };
        assert_eq!(read(2, 3, SeekFrom::Start(0)), (0, "234".into()));
        assert_eq!(read(8, 9, SeekFrom::End(-1)), (1, "9".into()));
        assert_eq!(read(20, 9, SeekFrom::Start(0)), (0, String::new()));
        assert_eq!(
            read(0, 9, SeekFrom::Start(1 << 60)),
            (1 << 60, String::new())
        );
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(4096), "4 KiB");
        assert_eq!(bytes(1_500_000), "1.4 MiB");
    }
}
