//! Checking a filesystem before it is mounted, which nobody has mounted meanwhile. Nothing is repaired unasked.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockmount::{BackendError, Check};

use crate::device::free;
use crate::device::number::DeviceNumber;
use crate::errno::{errno_error, retry_while_busy};
use crate::filesystem::mkfs::BUSY;
use crate::filesystem::probe::{Content, Superblock, probe};
use crate::filesystem::tool::{Ended, Tool};
use crate::mount::target::Target;
use crate::undo::ledger::Ledger;
use crate::undo::locks::Key;

/// What a tool answers when everything was right.
const CLEAN: i32 = 0;
/// What `e2fsck` answers when it has repaired something, and that a restart is advised, which is about root filesystems.
const REPAIRED: [i32; 3] = [1, 2, 3];
/// What `e2fsck` answers when something is wrong still, as a bit.
const LEFT_WRONG: i32 = 4;
/// What `xfs_repair -n` answers when something is wrong.
const XFS_WRONG: i32 = 1;

/// How long the tool may take, and the device may be in use before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) check: Duration,
    pub(crate) busy: Duration,
}

/// Checks the filesystem on a device, unless this guest has it mounted already.
///
/// # Errors
///
/// `Invalid` if it is damaged, with what the tool found; `Unsuitable` if it cannot be checked in this way; `Busy` if somebody
/// uses the device.
pub(crate) async fn check(
    ledger: &Arc<Ledger>,
    target: &Target,
    node: &Path,
    check: Check,
    timeouts: Timeouts,
) -> Result<(), BackendError> {
    let look = {
        let (ledger, target, node) = (ledger.clone(), target.clone(), node.to_owned());
        move || {
            let list = ledger.list(&target);
            let number = DeviceNumber::at(&node)?;
            let _held = list.hold(Key::Device(number))?;
            if !list.mounts_of(number).is_empty() {
                return Ok(None);
            }
            let mut open = free::prove_free(&node)?;
            let found = probe(&mut open)
                .map_err(|error| errno_error(format!("cannot read {}", node.display()), error))?;
            match found.content {
                Content::Filesystem(found) => Ok(Some(found)),
                // The mount says that there is none.
                _ => Ok(None),
            }
        }
    };
    let Some(found) = retry_while_busy(timeouts.busy, look).await? else {
        return Ok(());
    };
    let (tool, arguments) = tool(node, &found, check)?;
    let arguments = arguments.iter().map(Into::into).chain([node.into()]);
    let ended = tool.run(arguments, timeouts.check).await?;
    judge(node, &found, check, &tool, &ended)
}

/// The tool for a filesystem, and how it is told what to do.
fn tool(
    node: &Path,
    found: &Superblock,
    check: Check,
) -> Result<(Tool, &'static [&'static str]), BackendError> {
    let (node, name) = (node.display(), found.name);
    if check == Check::Verify && found.needs_recovery {
        return Err(BackendError::invalid(format!(
            "cannot check the {name} on {node} without writing to it: its journal was not replayed; mount it once, or ask \
             for a repair"
        )));
    }
    match (name, check) {
        ("ext2" | "ext3" | "ext4", Check::Verify) => {
            Ok((Tool::find("e2fsck", "e2fsprogs")?, &["-f", "-n"]))
        }
        ("ext2" | "ext3" | "ext4", Check::Repair) => {
            Ok((Tool::find("e2fsck", "e2fsprogs")?, &["-f", "-p"]))
        }
        ("xfs", Check::Verify) => Ok((Tool::find("xfs_repair", "xfsprogs")?, &["-n"])),
        ("xfs", Check::Repair) => Err(BackendError::unsuitable(format!(
            "the xfs on {node} is not repaired: a mount replays its log, and what is wrong after that is for people to decide \
             (xfs_repair)"
        ))),
        _ => Err(BackendError::unsuitable(format!(
            "there is no check of the {name} on {node} before it is mounted: only of ext and xfs"
        ))),
    }
}

/// What the end of a tool means.
fn judge(
    node: &Path,
    found: &Superblock,
    check: Check,
    tool: &Tool,
    ended: &Ended,
) -> Result<(), BackendError> {
    let (device, name) = (node.display(), found.name);
    let report = report(&ended.out);
    let damaged = |what: &str| {
        let message = format!("the {name} on {device} is damaged{what}: {report}");
        Err(BackendError::invalid(message))
    };
    match (ended.status, name) {
        (Some(CLEAN), _) => Ok(()),
        _ if BUSY.iter().any(|words| ended.said.contains(words)) => {
            Err(BackendError::busy(tool.failed(ended).message()))
        }
        (Some(XFS_WRONG), "xfs") => damaged(""),
        (Some(status), "ext2" | "ext3" | "ext4")
            if check == Check::Repair && REPAIRED.contains(&status) =>
        {
            tracing::warn!(%device, %report, "repaired a filesystem before it was mounted");
            Ok(())
        }
        (Some(status), "ext2" | "ext3" | "ext4") if status & LEFT_WRONG != 0 => match check {
            Check::Repair => damaged(", in a way that is not repaired unasked"),
            _ => damaged(""),
        },
        _ => Err(tool.failed(ended)),
    }
}

/// What a tool has found wrong, less what it was doing.
fn report(out: &str) -> String {
    let is_progress = |part: &&str| {
        ["Pass ", "Phase ", "e2fsck ", "- ", "*****"]
            .iter()
            .any(|start| part.starts_with(start))
    };
    let parts: Vec<&str> = out.split("; ").filter(|part| !is_progress(part)).collect();
    match parts.is_empty() {
        true => "the tool does not say how".to_owned(),
        false => {
            let report: String = parts.join("; ").chars().take(400).collect();
            report.trim_end_matches('.').to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_what_is_wrong() {
        let said = "Pass 1: Checking inodes, blocks, and sizes; Inode 12 has zero dtime.  Fix? no; Pass 2: Checking";
        assert_eq!(report(said), "Inode 12 has zero dtime.  Fix? no");
        assert_eq!(
            report("Phase 1 - find; - scan"),
            "the tool does not say how"
        );
    }
}
