//! What all devices of a transport share.

use std::time::Duration;

/// The settings that all devices of a transport share.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) mark: Option<String>,
    pub(crate) busy_timeout: Duration,
}
