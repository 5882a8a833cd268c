//! The group that the files of a volume belong to.

use serde::{Deserialize, Serialize};

use super::InvalidOptions;

/// Gives the files of a volume to a group, as `fsGroup` of a pod does in Kubernetes: every file and directory belongs to the
/// group, who can read and write it; what is made in a directory belongs to the group as well (set-group-id).
///
/// Modes are only added to: `rw` of the group for all, `x` of the group and set-group-id for directories. A symbolic link
/// itself belongs to the group; what it leads to is not looked at. The group is as the filesystem has it, before an
/// [id map](super::MountOptions::id_map).
///
/// ```
/// use blockmount::{FsGroup, FsGroupPolicy, MountOptions};
///
/// let group = FsGroup::new(2000).policy(FsGroupPolicy::OnRootMismatch);
/// let options = MountOptions::builder().fs_group(group).build()?;
/// assert_eq!(options.fs_group(), Some(group));
/// assert!(MountOptions::builder().read_only().fs_group(group).build().is_err());
/// # Ok::<(), blockmount::InvalidOptions>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct FsGroup {
    /// The group, by its number.
    pub gid: u32,
    /// When it is given.
    #[serde(default, skip_serializing_if = "FsGroupPolicy::is_always")]
    pub policy: FsGroupPolicy,
}

/// When the files of a volume are given to a group: `fsGroupChangePolicy` of Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FsGroupPolicy {
    /// With each mount.
    #[default]
    Always,
    /// Only if the root of the volume does not belong to the group yet, or lacks a mode that it is given. The root is changed
    /// last, so that what was cut off is begun anew.
    OnRootMismatch,
}

impl FsGroup {
    /// This group, with each mount.
    pub fn new(gid: u32) -> Self {
        FsGroup {
            gid,
            policy: FsGroupPolicy::Always,
        }
    }

    /// The same by another policy.
    #[must_use]
    pub fn policy(mut self, policy: FsGroupPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// The last number means "as it is" to the kernel.
    pub(super) fn validate(self) -> Result<(), InvalidOptions> {
        match self.gid {
            u32::MAX => Err(InvalidOptions::Malformed(
                format!("fs_group {}", self.gid),
                "no group has this number",
            )),
            _ => Ok(()),
        }
    }
}

impl FsGroupPolicy {
    fn is_always(&self) -> bool {
        *self == FsGroupPolicy::Always
    }
}
