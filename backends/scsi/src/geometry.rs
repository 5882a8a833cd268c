//! How many controllers a VM has, and how many disks fit on each.

use std::fmt;

use blockmount::slots::{MAX_GROUPS, MAX_PER_GROUP};
use thiserror::Error;

use crate::ScsiAddress;

/// How many SCSI controllers a VM has, and how many LUNs each of them takes.
///
/// ```
/// use blockmount_scsi::Geometry;
///
/// assert_eq!(Geometry::HYPER_V, Geometry::new(4, 64)?);
/// assert!(Geometry::new(0, 64).is_err());
/// # Ok::<(), blockmount_scsi::InvalidGeometry>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    controllers: u16,
    luns: u16,
}

impl Geometry {
    /// What a Hyper-V VM can have: 4 controllers with 64 disks each. (Source: the limits of a VM in
    /// Microsoft's "Plan for Hyper-V scalability in Windows Server".)
    pub const HYPER_V: Geometry = Geometry {
        controllers: 4,
        luns: 64,
    };

    /// A VM with so many controllers and so many LUNs on each.
    ///
    /// # Errors
    ///
    /// [`InvalidGeometry`] unless there are 1 to 64 controllers with 1 to 16,384 LUNs. The latter is
    /// what virtio-scsi can address in its 14 bits.
    pub const fn new(controllers: u16, luns: u16) -> Result<Self, InvalidGeometry> {
        let fits =
            controllers >= 1 && controllers <= MAX_GROUPS && luns >= 1 && luns <= MAX_PER_GROUP;
        if fits {
            Ok(Geometry { controllers, luns })
        } else {
            Err(InvalidGeometry { controllers, luns })
        }
    }

    /// How many controllers there are.
    pub const fn controllers(self) -> u16 {
        self.controllers
    }

    /// How many LUNs each of them takes.
    pub const fn luns(self) -> u16 {
        self.luns
    }

    /// How many disks fit in all.
    pub const fn capacity(self) -> usize {
        self.controllers as usize * self.luns as usize
    }

    /// Whether there is such an address in this VM.
    pub fn contains(self, address: ScsiAddress) -> bool {
        u16::from(address.controller.get()) < self.controllers && address.lun.get() < self.luns
    }
}

impl fmt::Display for Geometry {
    /// Controllers and LUNs: `4 x 64`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.controllers, self.luns)
    }
}

/// No VM has so few or so many controllers or LUNs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "a VM cannot have {controllers} SCSI controllers of {luns} LUNs; \
     it has 1 to {MAX_GROUPS} controllers of 1 to {MAX_PER_GROUP}"
)]
pub struct InvalidGeometry {
    controllers: u16,
    luns: u16,
}
