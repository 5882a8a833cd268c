//! Looking at attachments.

use super::AttachManager;
use crate::inspect::AttachmentStatus;

impl AttachManager {
    pub(crate) fn inspect(&self) -> Vec<AttachmentStatus> {
        self.table.inspect(|id, up, lease| AttachmentStatus {
            id: id.to_string(),
            disk: up.map(|up| up.disk.source().to_string_lossy().into_owned()),
            read_only: up.is_some_and(|up| up.disk.is_read_only()),
            locator: up.map(|up| up.locator.to_string()),
            lease,
        })
    }
}
