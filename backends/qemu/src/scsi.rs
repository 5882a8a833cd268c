//! SCSI disks of a running QEMU, by its monitor.

mod fields;
mod image;
mod qcow2;
mod vhd;

use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use blockmount::placement::Occupant;
use blockmount::{BackendError, CacheMode, Disk, DiskId, DiskOption};
use blockmount_scsi::{Attacher, Geometry, ScsiAddress};

use crate::open_file;
use crate::plug::{self, Backend, Plug, Removal};
use crate::qmp::{Qmp, QmpError};
pub(crate) use image::Image;
use serde_json::{Value, json};

/// How many LUNs of a controller are used. A virtio-scsi controller takes 16,384, but Linux sees only the first
/// 256 under their own number: above, LUN n is n + 16,384 to it (the flat addressing of SAM).
pub const LUNS: u16 = 256;

/// What of [`DiskOptions`] a disk of QEMU can have.
const HONOURED: [DiskOption; 4] = [
    DiskOption::DirectIo,
    DiskOption::Cache,
    DiskOption::Discard,
    DiskOption::SectorSize,
];

/// Hot-plugs disks into the virtio-scsi controllers of a QEMU: the [`Attacher`] of its
/// [`ScsiTransport`](blockmount_scsi::ScsiTransport).
///
/// ```no_run
/// use blockmount::{Disk, Transport};
/// use blockmount_qemu::{Qmp, QemuScsi};
/// use blockmount_scsi::ScsiTransport;
/// use tokio::net::UnixStream;
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// // QEMU was started with `-device virtio-scsi-pci,id=scsi0 -device virtio-scsi-pci,id=scsi1`.
/// let qmp = Qmp::connect(UnixStream::connect("/run/vm/qmp").await?).await?;
/// let attacher = QemuScsi::new(qmp, ["scsi0", "scsi1"])?;
/// let geometry = attacher.geometry();
/// let scsi = ScsiTransport::new(attacher, geometry, &[])?;
/// let disk = Disk::virtual_disk("/images/base.erofs").read_only();
/// scsi.attach(&disk, &scsi.identify(&disk).await?).await?;
/// # Ok(())
/// # }
/// ```
///
/// # What a disk is in QEMU
///
/// The disk at controller 0, LUN 3 is a block node `bm-scsi-0-3` (on a node `bm-scsi-0-3-file`) and a device
/// `bm-scsi-0-3` of type `scsi-hd` with channel 0, target 0 and LUN 3. A guest sees the same name as the serial
/// number of the disk (VPD page 80h; Linux: `device/vpd_pg80`) and in its device identification (page 83h, of which
/// Linux makes no `wwid`), so it can prove that it has found the disk which the host means. Whatever in QEMU has
/// such a name is taken for one of this attacher: there must be only one for each VM.
///
/// - *Format*: an image whose name ends in `.qcow2`, `.vhd` or `.vhdx` is one ([`ImageFormat`](crate::ImageFormat)), and must
///   look like one; everything else is raw, whatever is in it. The format is never guessed from the content, which a guest
///   can write.
/// - *Other files*: a qcow2 image with a backing file or an external data file is refused, because whoever
///   made it could have the host open any file. [`allow_backing_files`](Self::allow_backing_files) lifts the
///   former for images that are trusted. A VHD or VHDX that is the difference to another is always refused: QEMU cannot read it.
/// - *Access*: a read-only disk is so in both nodes. QEMU locks what it opens, so one image may be read by many
///   VMs, or written by one, and the second writer is refused (`Conflict`, with who has it). Loop devices of `blockmount-loopback` have the same
///   locks. A block device that somebody has mounted or
///   claimed is refused for writing.
/// - *Options*: direct I/O, cache mode, discard and sector size are honoured, and others refused. By default a disk goes
///   through the page cache of the host and is flushed when the guest asks for it; what the guest discards is freed in
///   the image (`discard=unmap`).
/// - *Errors of the host's disk* reach the guest as I/O errors (`werror=report`), also where that is full: QEMU does not
///   stop the VM for them.
///
/// # Deadlines and doubt
///
/// Each command and each awaited event has the deadline of the connection for a call
/// ([`Deadlines`](crate::qmp::Deadlines)). An attachment that was not answered in time asks QEMU what it has: it is
/// then either done, or taken back, or, if QEMU does not answer that either, `Uncertain`. A detachment goes on from
/// wherever an earlier one has stopped, whoever it was that went half of the way.
///
/// # Which file it is
///
/// The image is opened here, and proven to be the one that was identified. Over a Unix socket QEMU is passed what is
/// open, and opens no path: a file that replaces the image meanwhile is never used. Over any other connection QEMU
/// opens the path, and the path is proven before and after to name the image.
#[derive(Debug, Clone)]
pub struct QemuScsi {
    qmp: Qmp,
    controllers: Box<[String]>,
    geometry: Geometry,
    backing: bool,
}

impl QemuScsi {
    /// An attacher for the controllers with these ids, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// `Invalid` if there are none or more than 64 of them, if one is named twice, or is no id of QEMU's (a letter,
    /// then letters, digits, and any of `-._`).
    pub fn new(
        qmp: Qmp,
        controllers: impl IntoIterator<Item: Into<String>>,
    ) -> Result<Self, BackendError> {
        let controllers: Box<[String]> = controllers.into_iter().map(Into::into).collect();
        plug::ensure_ids(&controllers, "controller")?;
        let number = u16::try_from(controllers.len()).unwrap_or(u16::MAX);
        let geometry = Geometry::new(number, LUNS)
            .map_err(|error| BackendError::invalid(error.to_string()))?;
        Ok(QemuScsi {
            qmp,
            controllers,
            geometry,
            backing: false,
        })
    }

    /// Also takes qcow2 images that are differences to others. Only for images whose headers are trusted: QEMU opens
    /// whatever file they name, in whatever format they name.
    #[must_use]
    pub fn allow_backing_files(mut self) -> Self {
        self.backing = true;
        self
    }

    /// The controllers that it was given, with 256 LUNs each.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What the disk at an address is called in QEMU, and by its serial number in the guest: `bm-scsi-0-3`. Never
    /// longer than 20 characters, where some drivers cut a serial number.
    pub fn name(address: ScsiAddress) -> String {
        address.serial()
    }

    /// What of ours QEMU has: `device bm-scsi-0-3`, `node bm-scsi-0-3` and so on, in order. None after the
    /// last detachment.
    ///
    /// # Errors
    ///
    /// `Gone` without a QEMU, `Uncertain` if it does not answer.
    ///
    /// # Cancel safety
    ///
    /// It changes nothing.
    pub async fn left(&self) -> Result<Vec<String>, BackendError> {
        plug::left(&self.qmp, Backend::Node, ScsiAddress::SERIAL_PREFIX).await
    }

    fn plug(&self, address: ScsiAddress) -> Plug<'_> {
        Plug {
            qmp: &self.qmp,
            id: Self::name(address),
            what: format!("a disk at SCSI address {address}"),
            backend: Backend::Node,
            removal: Removal::Host,
        }
    }

    /// The arguments of `device_add`; none if the VM has no such address. As of a [node](Image::node), QEMU's defaults are left
    /// out: the channel, that errors of reads are reported, and that the serial number is the `device_id` as well.
    fn device(&self, address: ScsiAddress, disk: &Disk) -> Option<Value> {
        let options = disk.options();
        let controller = usize::from(address.controller.get());
        let controller = self.controllers.get(controller)?;
        let id = Self::name(address);
        self.geometry.contains(address).then(|| {
            let mut device = json!({
                "driver": "scsi-hd",
                "id": id,
                "bus": format!("{controller}.0"),
                "scsi-id": 0,
                "lun": address.lun.get(),
                "drive": id,
                "serial": id,
            });
            if !disk.is_read_only() {
                // By default the VM stops when the host's disk is full.
                device["werror"] = json!("report");
            }
            if let Some(mode) = options.cache_mode() {
                let writes_through = mode == CacheMode::WriteThrough;
                device["write-cache"] = json!(if writes_through { "off" } else { "on" });
            }
            if let Some(size) = options.logical_sector_size() {
                device["logical_block_size"] = json!(size.bytes());
                device["physical_block_size"] = json!(size.bytes());
            }
            if options.is_discard() == Some(false) {
                // Of a disk without a granularity the guest knows that it has no discard.
                device["discard_granularity"] = json!(0);
            }
            device
        })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Attacher for QemuScsi {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        let looked_at = disk.clone();
        self.blocking(disk, move |_: &_| blockmount_source::identify(&looked_at))
            .await
    }

    async fn attach(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        id: &DiskId,
    ) -> Result<(), BackendError> {
        disk.options().require_only(&HONOURED)?;
        let device = self.device(address, disk).ok_or_else(|| {
            let geometry = self.geometry;
            BackendError::invalid(format!(
                "the VM has no SCSI address {address}, but {geometry} controllers and LUNs"
            ))
        })?;
        let (inspected, opened, backing) = (disk.clone(), id.clone(), self.backing);
        let image = self
            .blocking(disk, move |_: &_| {
                Image::inspect(&inspected, &opened, backing)
            })
            .await?;
        let name = Self::name(address);
        let node = |paths: &[String]| image.node(&name, paths);
        let plug = self.plug(address);
        plug.attach(image.files(), Some(id), node, device).await
    }

    async fn detach(&self, address: ScsiAddress) -> Result<(), BackendError> {
        // Where the VM has no such address, nothing was ever there.
        match self.geometry.contains(address) {
            true => self.plug(address).detach().await,
            false => Ok(()),
        }
    }

    /// QEMU makes an image file longer itself, and tells the guest.
    async fn resize(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        bytes: u64,
    ) -> Result<(), BackendError> {
        blockmount_source::ensure_can_grow(disk, bytes)?;
        let name = Self::name(address);
        let trouble = |error: QmpError| error.while_trying(format!("cannot grow disk {disk}"));
        let size = plug::size_of_node(&self.qmp, &name)
            .await
            .map_err(trouble)?;
        let Some(size) = size else {
            let message = format!("QEMU has no disk {disk} at SCSI address {address}");
            return Err(BackendError::not_found(message));
        };
        blockmount_source::ensure_larger(disk, size, bytes)?;
        if size < bytes {
            let resize = json!({"node-name": name, "size": bytes});
            let resized = self.qmp.execute("block_resize", resize).await;
            resized.map_err(trouble)?;
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Occupant<ScsiAddress>>, BackendError> {
        let found = plug::find(&self.qmp, Backend::Node, ScsiAddress::SERIAL_PREFIX).await?;
        let occupant = |(name, there): (&String, &plug::Presence)| {
            let address = ScsiAddress::from_serial(name)?;
            let occupant = Occupant::new(address, found.disk(name));
            Some(match there.device {
                true => occupant,
                false => occupant.half_done(),
            })
        };
        let mut occupants: Vec<_> = found.ours.iter().filter_map(occupant).collect();
        for (device, bus) in found.others {
            let on_it = |id: &String| bus.ends_with(&format!("/{id}.0"));
            if let Some(controller) = self.controllers.iter().position(on_it)
                && let Some(address) = self.address_of(controller, &device).await?
            {
                occupants.push(Occupant::new(address, None));
            }
        }
        Ok(occupants)
    }
}

impl QemuScsi {
    /// Where a device of another name is on a controller; none where no disk of ours could be.
    async fn address_of(
        &self,
        controller: usize,
        device: &str,
    ) -> Result<Option<ScsiAddress>, BackendError> {
        let lun = plug::property(&self.qmp, device, "lun").await;
        let lun = lun.map_err(|error| error.while_trying("cannot list the disks of the VM"))?;
        let address = || {
            let controller = u64::try_from(controller).ok()?.try_into().ok()?;
            let lun = lun?.as_u64()?.try_into().ok()?;
            Some(ScsiAddress::new(controller, lun))
        };
        Ok(address().filter(|address| self.geometry.contains(*address)))
    }

    /// Looks at a disk, which changes nothing.
    async fn blocking<T: Send + 'static>(
        &self,
        disk: &Disk,
        work: impl FnOnce(&AtomicBool) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let deadline = self.qmp.deadlines().call;
        let done = open_file::blocking(&disk.to_string(), deadline, work).await;
        done.map_err(open_file::nothing_done)
    }
}

/// Reads bytes as the headers of an image, of each format.
#[cfg(feature = "fuzzing")]
pub fn fuzz_qcow2(bytes: &[u8]) {
    let _ = format!("{:?}", qcow2::parse(bytes));
    vhd::fuzz(bytes);
}
