//! The settings of a [`LoopTransport`].

use std::time::Duration;

use blockmount::BackendError;
use blockmount::slots::{Policy, Slots};

use crate::device::MARK_MAX;
use crate::settings::Settings;
use crate::transport::LoopTransport;

/// Makes a [`LoopTransport`] with other settings than the defaults.
#[derive(Debug, Clone)]
pub struct LoopTransportBuilder {
    max_devices: u16,
    settings: Settings,
}

impl LoopTransport {
    /// Starts from the defaults: 256 devices (as many as Hyper-V's SCSI has), no mark, direct I/O where possible,
    /// 5 seconds for a detach.
    pub fn builder() -> LoopTransportBuilder {
        LoopTransportBuilder::default()
    }
}

impl Default for LoopTransportBuilder {
    /// As [`LoopTransport::builder`].
    fn default() -> Self {
        LoopTransportBuilder {
            max_devices: 256,
            settings: Settings {
                mark: None,
                busy_timeout: Duration::from_secs(5),
            },
        }
    }
}

impl LoopTransportBuilder {
    /// The most devices at once, from 1 to 16,384; 256 by default.
    #[must_use]
    pub fn max_devices(mut self, count: u16) -> Self {
        self.max_devices = count;
        self
    }

    /// A text that the kernel keeps with each device (`lo_file_name`), at most 63 bytes, by which
    /// [`bound_loops`](crate::bound_loops) finds it. Without one, the kernel keeps the source's path.
    #[must_use]
    pub fn mark(mut self, mark: impl Into<String>) -> Self {
        self.settings.mark = Some(mark.into());
        self
    }

    /// How long a detach waits for other users to close the device before it answers `Busy`; 5 seconds by default.
    #[must_use]
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        self.settings.busy_timeout = timeout;
        self
    }

    /// Makes the transport. Touches no device.
    ///
    /// # Errors
    ///
    /// `Invalid` if the number of devices or the mark is out of range.
    pub fn build(self) -> Result<LoopTransport, BackendError> {
        let fits = |mark: &str| (1..=MARK_MAX).contains(&mark.len()) && !mark.contains('\0');
        if let Some(mark) = self.settings.mark.as_deref().filter(|mark| !fits(mark)) {
            return Err(BackendError::invalid(format!(
                "{mark:?} cannot mark a loop device; a mark has 1 to {MARK_MAX} bytes and no zero"
            )));
        }
        let slots = Slots::new(1, self.max_devices, Policy::LowestFirst).map_err(|error| {
            let count = self.max_devices;
            BackendError::invalid(format!("cannot have {count} loop devices")).with_source(error)
        })?;
        Ok(LoopTransport::new(slots, self.settings))
    }
}
