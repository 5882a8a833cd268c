//! Validating a request by what is on the device, and an error by what else is known.

use std::path::Path;

use blockmount::{BackendError, ErrorKind, Expose, MountOptions};

use crate::errno::DAMAGED;
use crate::filesystem::probe::{Content, ProbeResult};
use crate::mount::users;

/// Refuses what this engine does not do, before anything is touched.
pub(crate) fn refuse_unsupported(options: &MountOptions) -> Result<(), BackendError> {
    let unsupported = [
        (
            options.verity().is_some(),
            "lay an integrity check over a device",
        ),
        (options.encryption().is_some(), "encrypt a device"),
        (options.format().is_some(), "make a filesystem"),
        (
            options.expose() != Expose::Filesystem,
            "expose a block device at a path",
        ),
    ];
    match unsupported.iter().find(|(asked, _)| *asked) {
        Some((_, what)) => Err(BackendError::unsuitable(format!(
            "this guest cannot {what} yet"
        ))),
        None => Ok(()),
    }
}

/// The filesystem to mount, by what is on the device and what was asked for.
pub(crate) fn choose_filesystem(
    node: &Path,
    found: &ProbeResult,
    asked: Option<&str>,
) -> Result<String, BackendError> {
    let node = node.display();
    let absent = |what: String| {
        Err(BackendError::not_found(format!(
            "there is no filesystem on {node}: {what}"
        )))
    };
    if let Some(needs) = found.truncated() {
        return Err(BackendError::invalid(format!(
            "{node} is truncated: the filesystem needs {needs} bytes, the device has {}",
            found.device_bytes,
        )));
    }
    match (&found.content, asked) {
        (Content::Filesystem(has), None) => Ok(has.name.to_owned()),
        (Content::Filesystem(has), Some(asked)) if is_same_driver(has.name, asked) => {
            Ok(asked.to_owned())
        }
        // The kernel decides about a filesystem that was asked for by name and is not known here.
        (Content::Unknown | Content::Ambiguous(_), Some(asked)) if found.device_bytes > 0 => {
            Ok(asked.to_owned())
        }
        (Content::Filesystem(has), Some(asked)) => {
            absent(format!("{asked} was asked for, but it holds {}", has.name))
        }
        (Content::PartitionTable(table), _) => {
            let numbers: Vec<String> = table
                .partitions
                .iter()
                .map(|p| p.number.to_string())
                .collect();
            absent(format!(
                "it holds a {} partition table, name one of its partitions: {}",
                table.kind,
                numbers.join(", ")
            ))
        }
        (Content::Ambiguous(_), None) => Err(BackendError::invalid(format!(
            "{node} has {}: name the filesystem to mount",
            found.content
        ))),
        (_, _) if found.device_bytes == 0 => absent("it has no bytes".to_owned()),
        (other, _) => absent(format!("it holds {other}")),
    }
}

/// Names under which one filesystem may be asked for.
fn is_same_driver(found: &str, asked: &str) -> bool {
    let is_ext = |name: &str| matches!(name, "ext2" | "ext3" | "ext4");
    let is_fat = |name: &str| matches!(name, "vfat" | "msdos");
    found == asked || (is_ext(found) && is_ext(asked)) || (is_fat(found) && is_fat(asked))
}

/// Says more where the kernel's number alone says little.
pub(crate) fn explained(error: BackendError, node: &Path) -> BackendError {
    let errno = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .and_then(rustix::io::Errno::from_io_error);
    if errno.is_some_and(|errno| DAMAGED.contains(&errno)) {
        return explain(error, ErrorKind::Invalid, || {
            format!("the filesystem on {} is damaged", node.display())
        });
    }
    if errno == Some(rustix::io::Errno::BUSY) {
        return explain(error, ErrorKind::Busy, || {
            let by = users::listed(&users::of_device_at(node));
            format!("device {} is in use by {by}", node.display())
        });
    }
    explain(error, ErrorKind::Conflict, || {
        format!("device {} is read-only; mount it with ro", node.display())
    })
}

/// Adds to an error of mounting what else is known, without a change of its kind.
fn explain(error: BackendError, kind: ErrorKind, more: impl FnOnce() -> String) -> BackendError {
    if error.kind() != kind {
        return error;
    }
    BackendError::new(kind, format!("{}: {}", error.message(), more())).with_source(error)
}
