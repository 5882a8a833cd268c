//! How a disk is attached: what its users tune, and which of it a backend honours.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::BackendError;

/// How a disk is attached, apart from its access. What is not set is up to the backend.
///
/// A backend honours an option or refuses the disk as `Unsuitable`; none is ignored. Two requests for one
/// disk with different options are a `Conflict`.
///
/// ```
/// use blockmount::{CacheMode, Disk, DiskOptions};
///
/// let options = DiskOptions::default().direct_io(true).cache(CacheMode::WriteBack);
/// let disk = Disk::virtual_disk("/run/scratch.img").with_options(options);
/// assert_eq!(disk.options().is_direct_io(), Some(true));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskOptions {
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_io: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheMode>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_second: Option<NonZeroU64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    operations_per_second: Option<NonZeroU64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queues: Option<NonZeroU16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    discard: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sector_size: Option<SectorSize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<Serial>,
}

/// When a write of the guest counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CacheMode {
    /// When the host has it; the guest is told of a cache and flushes it.
    WriteBack,
    /// When it is on the host's disk.
    WriteThrough,
    /// When the host has it, and flushes are ignored: for content that a crash may take.
    Unsafe,
}

/// The size of a logical sector, the smallest unit that the guest reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum SectorSize {
    /// 512 bytes.
    B512,
    /// 4,096 bytes.
    B4096,
}

impl SectorSize {
    /// The size in bytes.
    pub fn bytes(self) -> u32 {
        match self {
            SectorSize::B512 => 512,
            SectorSize::B4096 => 4096,
        }
    }
}

/// A serial number that a disk shows to its guest.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Serial(Arc<str>);

/// An option of [`DiskOptions`], by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DiskOption {
    /// [`DiskOptions::direct_io`].
    DirectIo,
    /// [`DiskOptions::cache`].
    Cache,
    /// [`DiskOptions::bytes_per_second`].
    BytesPerSecond,
    /// [`DiskOptions::operations_per_second`].
    OperationsPerSecond,
    /// [`DiskOptions::queues`].
    Queues,
    /// [`DiskOptions::discard`].
    Discard,
    /// [`DiskOptions::sector_size`].
    SectorSize,
    /// [`DiskOptions::serial`].
    Serial,
}

impl DiskOptions {
    /// The longest serial number, in bytes: that of a SCSI disk in QEMU. Other disks have shorter ones
    /// (virtio-blk: 20).
    pub const MAX_SERIAL_LEN: usize = 36;

    pub(super) const NONE: DiskOptions = DiskOptions {
        direct_io: None,
        cache: None,
        bytes_per_second: None,
        operations_per_second: None,
        queues: None,
        discard: None,
        sector_size: None,
        serial: None,
    };

    /// Whether the host's page cache is bypassed.
    #[must_use]
    pub fn direct_io(mut self, wanted: bool) -> Self {
        self.direct_io = Some(wanted);
        self
    }

    /// When a write of the guest counts as done.
    #[must_use]
    pub fn cache(mut self, mode: CacheMode) -> Self {
        self.cache = Some(mode);
        self
    }

    /// The most bytes that are read and written in a second, together.
    #[must_use]
    pub fn bytes_per_second(mut self, limit: NonZeroU64) -> Self {
        self.bytes_per_second = Some(limit);
        self
    }

    /// The most reads and writes in a second, together.
    #[must_use]
    pub fn operations_per_second(mut self, limit: NonZeroU64) -> Self {
        self.operations_per_second = Some(limit);
        self
    }

    /// How many queues the guest can put requests in.
    #[must_use]
    pub fn queues(mut self, count: NonZeroU16) -> Self {
        self.queues = Some(count);
        self
    }

    /// Whether a discard (TRIM) of the guest gives space back to the host.
    #[must_use]
    pub fn discard(mut self, wanted: bool) -> Self {
        self.discard = Some(wanted);
        self
    }

    /// The size of a logical sector.
    #[must_use]
    pub fn sector_size(mut self, size: SectorSize) -> Self {
        self.sector_size = Some(size);
        self
    }

    /// The serial number that the guest sees.
    ///
    /// # Errors
    ///
    /// `Invalid` unless it has 1 to [`MAX_SERIAL_LEN`](Self::MAX_SERIAL_LEN) visible ASCII characters.
    pub fn serial(mut self, serial: impl Into<String>) -> Result<Self, BackendError> {
        let serial = Serial::try_from(serial.into()).map_err(BackendError::invalid)?;
        self.serial = Some(serial);
        Ok(self)
    }

    /// Whether the host's page cache is bypassed, if set.
    pub fn is_direct_io(&self) -> Option<bool> {
        self.direct_io
    }

    /// When a write counts as done, if set.
    pub fn cache_mode(&self) -> Option<CacheMode> {
        self.cache
    }

    /// The most bytes in a second, if set.
    pub fn max_bytes_per_second(&self) -> Option<NonZeroU64> {
        self.bytes_per_second
    }

    /// The most reads and writes in a second, if set.
    pub fn max_operations_per_second(&self) -> Option<NonZeroU64> {
        self.operations_per_second
    }

    /// The number of queues, if set.
    pub fn queue_count(&self) -> Option<NonZeroU16> {
        self.queues
    }

    /// Whether discards reach the host, if set.
    pub fn is_discard(&self) -> Option<bool> {
        self.discard
    }

    /// The size of a logical sector, if set.
    pub fn logical_sector_size(&self) -> Option<SectorSize> {
        self.sector_size
    }

    /// The serial number, if set.
    pub fn serial_number(&self) -> Option<&str> {
        self.serial.as_ref().map(|serial| &*serial.0)
    }

    /// The options that are set.
    pub fn set(&self) -> impl Iterator<Item = DiskOption> {
        // Without `..`, so that an option which is missing below does not compile.
        let DiskOptions {
            direct_io,
            cache,
            bytes_per_second,
            operations_per_second,
            queues,
            discard,
            sector_size,
            serial,
        } = self;
        let options = [
            direct_io.map(|_| DiskOption::DirectIo),
            cache.map(|_| DiskOption::Cache),
            bytes_per_second.map(|_| DiskOption::BytesPerSecond),
            operations_per_second.map(|_| DiskOption::OperationsPerSecond),
            queues.map(|_| DiskOption::Queues),
            discard.map(|_| DiskOption::Discard),
            sector_size.map(|_| DiskOption::SectorSize),
            serial.as_ref().map(|_| DiskOption::Serial),
        ];
        options.into_iter().flatten()
    }

    /// Refuses what a backend does not honour. Each backend calls this first in its attach.
    ///
    /// # Errors
    ///
    /// `Unsuitable`, with the names of the options that are set and not among the `honoured`.
    pub fn require_only(&self, honoured: &[DiskOption]) -> Result<(), BackendError> {
        let others: Vec<String> = self
            .set()
            .filter(|option| !honoured.contains(option))
            .map(|option| option.to_string())
            .collect();
        if others.is_empty() {
            return Ok(());
        }
        let others = others.join(", ");
        Err(BackendError::unsuitable(format!(
            "disk options that cannot be honoured here: {others}; leave them out or use another transport"
        )))
    }

    pub(super) fn is_default(&self) -> bool {
        self.set().next().is_none()
    }
}

impl fmt::Display for DiskOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DiskOption::DirectIo => "direct I/O",
            DiskOption::Cache => "cache mode",
            DiskOption::BytesPerSecond => "bytes per second",
            DiskOption::OperationsPerSecond => "operations per second",
            DiskOption::Queues => "queues",
            DiskOption::Discard => "discard",
            DiskOption::SectorSize => "sector size",
            DiskOption::Serial => "serial number",
        })
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl TryFrom<String> for Serial {
    type Error = String;

    fn try_from(serial: String) -> Result<Self, String> {
        let fits = (1..=DiskOptions::MAX_SERIAL_LEN).contains(&serial.len());
        if fits && serial.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(Serial(serial.into()));
        }
        let shown: String = serial.chars().take(64).collect();
        Err(format!(
            "{shown:?} is not a serial number: it has 1 to 36 visible ASCII characters"
        ))
    }
}

impl From<Serial> for String {
    fn from(serial: Serial) -> String {
        serial.0.as_ref().to_owned()
    }
}
