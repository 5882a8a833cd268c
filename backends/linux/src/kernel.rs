//! What kernels learned one after the other, and what we do without.

/// The newer abilities of the kernel that may be used. All of them by default: what a kernel lacks
/// is noticed when it refuses. Tests take some away, so that the old ways run on new kernels too.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    /// `fsopen`, `fsmount`, `move_mount`: Linux 5.2.
    pub(crate) contexts: bool,
    /// `mount_setattr`: Linux 5.12.
    pub(crate) set_attributes: bool,
    /// `FSCONFIG_CMD_CREATE_EXCL`: Linux 6.6.
    pub(crate) exclusive: bool,
    /// The option `lowerdir+` of overlay: Linux 6.8.
    pub(crate) lower_by_string: bool,
    /// Mount ids that are never given again: Linux 6.8.
    pub(crate) unique_ids: bool,
    /// Layers of an overlay by file descriptor: Linux 6.13.
    pub(crate) lower_by_fd: bool,
}

impl Kernel {
    /// The abilities of a version of Linux.
    pub(crate) fn version(major: u32, minor: u32) -> Self {
        let since = |version: (u32, u32)| (major, minor) >= version;
        Kernel {
            contexts: since((5, 2)),
            set_attributes: since((5, 12)),
            exclusive: since((6, 6)),
            lower_by_string: since((6, 8)),
            unique_ids: since((6, 8)),
            lower_by_fd: since((6, 13)),
        }
    }
}

impl Default for Kernel {
    fn default() -> Self {
        Kernel::version(u32::MAX, 0)
    }
}
