//! The tools that make filesystems, and what they are told.
//!
//! The features are fixed: those that each kernel since Linux 4.19 mounts, whatever newer tools or the configuration of this
//! machine would choose. The device is taken for fresh: nothing is discarded, and tables of inodes are written by the
//! kernel later.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use blockmount::{BackendError, Format, Overwrite};

use crate::filesystem::tool::Tool;

/// The longest label of an xfs, in bytes.
const LONGEST_XFS_LABEL: usize = 12;
/// How long a tool may take to tell its version; it takes milliseconds.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

const EXT4_FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                             large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Options of `mkfs.xfs` that choose features, and the version that knew them first. Those of later kernels are off.
const XFS_FEATURES: [(u32, u32, &str, &str); 6] = [
    (3, 2, "-m", "crc=1,finobt=1"),
    (4, 9, "-m", "rmapbt=0,reflink=1"),
    (5, 10, "-m", "bigtime=0,inobtcount=0"),
    (5, 19, "-i", "nrext64=0"),
    (6, 10, "-i", "exchange=0"),
    (6, 10, "-n", "parent=0"),
];

/// Refuses a filesystem that is not made here, before anything is touched.
///
/// # Errors
///
/// `Unsuitable` with the reason, `Invalid` for a label that the filesystem cannot have.
pub(crate) fn validate(format: &Format) -> Result<(), BackendError> {
    let reason = match &*format.filesystem {
        "ext4" => return Ok(()),
        "xfs" => {
            let longest = format.label.as_ref().map_or(0, String::len);
            if longest <= LONGEST_XFS_LABEL
                && !format.label.as_ref().is_some_and(|l| l.contains(' '))
            {
                return Ok(());
            }
            let message = "the label of an xfs has at most 12 bytes, and no spaces";
            return Err(BackendError::invalid(message));
        }
        "erofs" | "squashfs" => "it cannot be written to, and is made with its files",
        "btrfs" => "it is made of several devices and profiles that a request cannot name",
        _ => "only ext4 and xfs are made",
    };
    Err(BackendError::unsuitable(format!(
        "cannot make a filesystem of type {}: {reason}",
        format.filesystem
    )))
}

/// What [`ext4_arguments`] are for: run it with `MKE2FS_CONFIG=/dev/null`.
pub const EXT4_TOOL: &str = "mke2fs";

/// The arguments by which `mke2fs` makes an ext4 on a fresh device or file. It must be run with
/// `MKE2FS_CONFIG=/dev/null`, so that the configuration of the machine does not decide.
pub fn ext4_arguments(device: &Path) -> Vec<OsString> {
    ext4(device, None, None, true)
}

fn ext4(device: &Path, label: Option<&str>, uuid: Option<&str>, is_fresh: bool) -> Vec<OsString> {
    let extended = match is_fresh {
        true => "nodiscard,lazy_itable_init=1,lazy_journal_init=1",
        // What an old journal has at the place of the new one must not be taken for the new one's.
        false => "lazy_itable_init=1,lazy_journal_init=0",
    };
    let fixed = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-I",
        "256",
        "-i",
        "16384",
        "-m",
        "0",
        "-O",
        EXT4_FEATURES,
        "-E",
        extended,
    ];
    let mut arguments: Vec<OsString> = fixed.into_iter().map(OsString::from).collect();
    for (flag, value) in [("-L", label), ("-U", uuid)] {
        arguments.extend(
            value
                .into_iter()
                .flat_map(|value| [flag.into(), value.into()]),
        );
    }
    arguments.push(device.into());
    arguments
}

fn xfs(device: &Path, format: &Format, looks: bool, version: (u32, u32)) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["-q".into()];
    let overwrites = format.overwrite == Overwrite::Everything;
    if overwrites || !looks {
        arguments.push("-f".into());
    }
    if !overwrites {
        arguments.push("-K".into());
    }
    for (major, minor, flag, value) in XFS_FEATURES {
        if version >= (major, minor) {
            arguments.extend([flag.into(), value.into()]);
        }
    }
    if let Some(label) = &format.label {
        arguments.extend(["-L".into(), label.into()]);
    }
    if let Some(uuid) = &format.uuid {
        arguments.extend(["-m".into(), format!("uuid={uuid}").into()]);
    }
    arguments.push(device.into());
    arguments
}

/// The version in what `mkfs.xfs -V` says: `mkfs.xfs version 6.1.0`.
fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.rsplit(' ').next()?.split('.');
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.chars().take_while(char::is_ascii_digit);
    Some((major, minor.collect::<String>().parse().ok()?))
}

/// Makes the filesystem on a device, which must be free: the tool holds it exclusively. Whether it looks for content that was
/// overlooked is up to `looks`.
///
/// # Errors
///
/// In the words of the tool; `Busy` if it found the device in use, and has done nothing; `Unsuitable` if it is not
/// installed.
pub(crate) async fn make(
    device: &Path,
    format: &Format,
    looks: bool,
    timeout: Duration,
) -> Result<(), BackendError> {
    let (tool, arguments) = match &*format.filesystem {
        "xfs" => {
            let tool = Tool::find("mkfs.xfs", "xfsprogs")?;
            let said = tool.run(["-V".into()], VERSION_TIMEOUT).await?.said;
            // One that does not tell takes what the oldest took.
            let version = version(&said).unwrap_or((0, 0));
            (tool, xfs(device, format, looks, version))
        }
        _ => {
            let is_fresh = format.overwrite == Overwrite::Blank;
            let (label, uuid) = (format.label.as_deref(), format.uuid.as_deref());
            let tool = Tool::find(EXT4_TOOL, "e2fsprogs")?;
            (tool, ext4(device, label, uuid, is_fresh))
        }
    };
    let ended = tool.run(arguments, timeout).await?;
    match ended.status {
        Some(0) => Ok(()),
        _ if BUSY.iter().any(|words| ended.said.contains(words)) => {
            Err(BackendError::busy(tool.failed(&ended).message()))
        }
        _ => Err(tool.failed(&ended)),
    }
}

/// How the tools say that somebody else holds the device exclusively.
pub(crate) const BUSY: [&str; 2] = ["in use by the system", "Device or resource busy"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version("mkfs.xfs version 6.1.0"), Some((6, 1)));
        assert_eq!(version("mkfs.xfs version 5.10.0-rc1"), Some((5, 10)));
        assert_eq!(version("mkfs.xfs version 6.10-rc1"), Some((6, 10)));
        for unknown in ["", "version", "mkfs.xfs version x.y", "mkfs.xfs version 7"] {
            assert_eq!(version(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn older_tools_are_not_given_what_they_do_not_know() {
        let format = Format::new("xfs").label("x");
        let text = |version| format!("{:?}", xfs(Path::new("/dev/x"), &format, true, version));
        assert!(!text((5, 9)).contains("bigtime") && text((5, 10)).contains("bigtime=0"));
        assert!(!text((6, 9)).contains("parent") && text((6, 10)).contains("parent=0"));
    }

    #[test]
    fn what_is_not_made_is_refused_with_the_reason() {
        for (format, reason) in [
            (Format::new("btrfs"), "several devices"),
            (Format::new("erofs"), "cannot be written to"),
            (Format::new("ntfs"), "only ext4 and xfs"),
            (
                Format::new("xfs").label("thirteen-byte"),
                "at most 12 bytes",
            ),
        ] {
            let error = validate(&format).unwrap_err();
            assert!(error.message().contains(reason), "{error}");
        }
        validate(&Format::new("ext4").label("sixteen-bytes-xx")).unwrap();
    }
}
