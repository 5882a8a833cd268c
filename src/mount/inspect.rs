//! Looking at mounts.

use super::BlockMountManager;
use crate::inspect::MountStatus;

impl BlockMountManager {
    pub(crate) fn inspect(&self) -> Vec<MountStatus> {
        self.table.inspect(|key, up, lease| MountStatus {
            locator: key.device.to_string(),
            path: up.map(|up| up.point.path().to_string_lossy().into_owned()),
            read_only: key.options.is_read_only(),
            lease,
        })
    }
}
