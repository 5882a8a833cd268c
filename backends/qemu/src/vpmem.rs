//! VPMEM devices of a running QEMU, by its monitor: whole disks, and many disks packed on one device.

mod attacher;
mod backing;
mod kept;
mod packed;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockmount::{BackendError, DiskId};
use blockmount_vpmem::{DeviceNumber, Geometry, VpmemAddress};
use serde_json::json;

use crate::open_file::{self, OpenFile};
use crate::plug::{self, Backend, Plug, Removal};
use crate::qmp::Qmp;
use backing::{Image, Private};

/// What the size and the alignment of a device are multiples of, in bytes: 2 MiB, below which Linux makes no
/// block device of a region (`SUBSECTION_SIZE` of its memory model).
pub const ALIGNMENT: u64 = 2 << 20;

/// What begins the names of everything that is ours in a QEMU.
const PREFIX: &str = "bm-vpmem-";

/// The slowest disk that is waited for while an image is copied, in bytes per second.
const SLOWEST_COPY: u64 = 16 << 20;

/// Hot-plugs VPMEM devices into a QEMU: the [`Attacher`](blockmount_vpmem::Attacher) of its
/// [`VpmemTransport`](blockmount_vpmem::VpmemTransport).
///
/// ```no_run
/// use blockmount::{Disk, Transport};
/// use blockmount_qemu::{Qmp, QemuVpmem};
/// use blockmount_vpmem::{Mode, VpmemTransport};
/// use tokio::net::UnixStream;
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// // QEMU was started with `-m 2G,maxmem=64G` and `-device pcie-root-port,id=rp0,chassis=1,slot=1` (and rp1).
/// let qmp = Qmp::connect(UnixStream::connect("/run/vm/qmp").await?).await?;
/// let attacher = QemuVpmem::virtio(qmp, ["rp0", "rp1"], 4 << 30, "/var/lib/images")?;
/// let geometry = attacher.geometry();
/// let vpmem = VpmemTransport::new(attacher, geometry, Mode::Packed, &[])?;
/// let disk = Disk::virtual_disk("/var/lib/images/base.erofs").read_only();
/// vpmem.attach(&disk, &vpmem.identify(&disk).await?).await?;
/// # Ok(())
/// # }
/// ```
///
/// # What a device is in QEMU
///
/// Device 3 is a `memory-backend-file` and a device on it, both called `bm-vpmem-3`; whatever in QEMU has such a
/// name is taken for one of this attacher: there must be only one for each VM. The file is opened read-only and
/// shared, so that the guest cannot change it, and VMs with one image share its pages.
///
/// | | [`virtio`](Self::virtio) | [`nvdimm`](Self::nvdimm) |
/// |---|---|---|
/// | device | `virtio-pmem-pci` on the root port with that number | `nvdimm` in the slot with that number |
/// | QEMU needs | `maxmem`, a `pcie-root-port` for each device | `nvdimm=on`, `maxmem`, `slots` |
/// | the guest finds it | by the PCI address of the port | by its NFIT handle: its number plus 1 |
/// | is taken out | when the guest has ejected it | never: `detach` is `Unsuitable`, and it is retained |
///
/// - *Whole devices* are the image itself if it has whole multiples of 2 MiB, and else a copy that does: pad images
///   (`truncate --size=%2M`) to have neither the copy nor its pages twice.
/// - *Packed devices* are a sparse file of ours, as long as a device. A disk that is mapped is copied to its
///   range, by sharing the blocks where the filesystem can; a range that is unmapped is a hole again. The device itself
///   stays until QEMU ends. QEMU keeps an image open for as long as it is mapped.
/// - *Locks*: QEMU locks no memory, so an image has the locks of a reader from us, as a SCSI disk has them from QEMU. They end
///   with the disk; while the VM is stopped, QEMU keeps them.
/// - *Files of ours* are made in a directory of the caller's choice, best on the filesystem of the images, and
///   lose their name as soon as QEMU has them open: none is left, whoever is killed.
///
/// QEMU 7.2 keeps the file of a device that was ejected mapped until it ends. The space of a copy is freed
/// nevertheless, unless an earlier process has made it; an image that is deleted meanwhile keeps its space.
///
/// # After a restart
///
/// A new process finds out from QEMU which disk is which device and which is mapped to which range, by the files that QEMU was
/// passed and keeps ([`VpmemTransport::adopt`](blockmount_vpmem::VpmemTransport)). It goes on with the packed devices that are
/// there if it can see QEMU's process and open its files (`/proc/PID/fd`: both as root, or both as one user).
///
/// For that the monitor must be a Unix socket to QEMU itself, and QEMU must have another monitor: with the last client of all
/// monitors it closes what it was passed. One that nobody ever leaves is `-chardev ringbuf,id=last -mon
/// chardev=last,mode=control`, which a detached VM of this crate has. Without it the disks of an earlier process
/// are neither adopted nor touched, and what was mapped by it cannot be unmapped.
///
/// # Deadlines and doubt
///
/// As for [`QemuScsi`](crate::QemuScsi). A copy may take as long as a disk of 16 MiB a second needs for it; one
/// that takes longer, or that nobody waits for any more, stops at the next 8 MiB, and its range is not cleared before.
#[derive(Clone)]
pub struct QemuVpmem(Arc<Inner>);

struct Inner {
    qmp: Qmp,
    kind: Kind,
    geometry: Geometry,
    directory: PathBuf,
    /// By number. Locked while a device comes or goes, so that of many first mappings one makes it.
    devices: Box<[tokio::sync::Mutex<Contents>]>,
    /// Ranges that are being written to, or were. A copy keeps its own locked to its very end, even when
    /// nobody waits for it any more.
    ranges: Mutex<HashMap<VpmemAddress, Arc<tokio::sync::Mutex<()>>>>,
    /// Whether a disk was ever attached as a whole device.
    whole_devices: AtomicBool,
}

enum Kind {
    VirtioPmem { ports: Box<[String]> },
    Nvdimm,
}

/// What is behind a device.
#[derive(Debug, Default)]
enum Contents {
    #[default]
    Nothing,
    Disk(Image),
    Ranges {
        file: Private,
        /// Whether QEMU is known to have it.
        plugged: bool,
    },
}

impl Contents {
    /// QEMU has the file open.
    fn opened(&mut self) {
        if let Contents::Disk(image) = self {
            image.opened();
        }
    }
}

impl QemuVpmem {
    /// Devices that the guest can eject, one on each of these PCIe root ports, in the order of their numbers.
    ///
    /// `device_size` is how long an image may be, and how long a packed device is, in bytes. `directory` is
    /// where files of ours are made.
    ///
    /// # Errors
    ///
    /// `Invalid` if there are none or more than 128 ports, if one is named twice or is no id of QEMU's, or if
    /// the size is not a multiple of [`ALIGNMENT`].
    pub fn virtio(
        qmp: Qmp,
        ports: impl IntoIterator<Item: Into<String>>,
        device_size: u64,
        directory: impl Into<PathBuf>,
    ) -> Result<Self, BackendError> {
        let ports: Box<[String]> = ports.into_iter().map(Into::into).collect();
        plug::ensure_ids(&ports, "root port")?;
        let devices = u16::try_from(ports.len()).unwrap_or(u16::MAX);
        let kind = Kind::VirtioPmem { ports };
        Self::new(qmp, kind, devices, device_size, directory.into())
    }

    /// Devices that can never be taken out, one in each memory slot from 0.
    ///
    /// # Errors
    ///
    /// As for [`virtio`](Self::virtio).
    pub fn nvdimm(
        qmp: Qmp,
        slots: u16,
        device_size: u64,
        directory: impl Into<PathBuf>,
    ) -> Result<Self, BackendError> {
        Self::new(qmp, Kind::Nvdimm, slots, device_size, directory.into())
    }

    fn new(
        qmp: Qmp,
        kind: Kind,
        devices: u16,
        device_size: u64,
        directory: PathBuf,
    ) -> Result<Self, BackendError> {
        if !device_size.is_multiple_of(ALIGNMENT) {
            return Err(BackendError::invalid(format!(
                "a device of {device_size} bytes cannot be: its size is a multiple of {ALIGNMENT}"
            )));
        }
        let geometry = Geometry::new(devices, device_size)
            .map_err(|error| BackendError::invalid(error.to_string()))?;
        let nothing = || tokio::sync::Mutex::new(Contents::Nothing);
        Ok(QemuVpmem(Arc::new(Inner {
            qmp,
            kind,
            geometry,
            directory,
            devices: (0..devices).map(|_| nothing()).collect(),
            ranges: Mutex::default(),
            whole_devices: AtomicBool::new(false),
        })))
    }

    /// How many devices it was given, and how large they are.
    pub fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    /// What a device is called in QEMU: `bm-vpmem-3`.
    pub fn name(device: DeviceNumber) -> String {
        format!("{PREFIX}{device}")
    }

    /// What of ours QEMU has: `device bm-vpmem-3`, `memory bm-vpmem-3` and so on, in order.
    ///
    /// # Errors
    ///
    /// `Gone` without a QEMU, `Uncertain` if it does not answer.
    pub async fn left(&self) -> Result<Vec<String>, BackendError> {
        plug::left(&self.0.qmp, Backend::Memory, PREFIX).await
    }

    /// Whether a packed device without disks is in the way.
    fn uses_whole_devices(&self) -> bool {
        self.0.whole_devices.load(Ordering::Relaxed)
    }

    fn plug(&self, device: DeviceNumber) -> Plug<'_> {
        Plug {
            qmp: &self.0.qmp,
            id: Self::name(device),
            what: format!("VPMEM device {device}"),
            backend: Backend::Memory,
            removal: match self.0.kind {
                Kind::VirtioPmem { .. } => Removal::Guest,
                Kind::Nvdimm => Removal::Never,
            },
        }
    }

    /// Plugs a file as a device of so many bytes, which the guest can only read.
    async fn plug_in(
        &self,
        device: DeviceNumber,
        file: &OpenFile,
        disk: Option<&DiskId>,
        size: u64,
    ) -> Result<(), BackendError> {
        let id = Self::name(device);
        let memory = |paths: &[String]| {
            json!({
                "qom-type": "memory-backend-file",
                "id": id,
                "mem-path": paths[0],
                "size": size,
                "align": ALIGNMENT,
                "share": true,
                "readonly": true,
            })
        };
        let arguments = match &self.0.kind {
            Kind::VirtioPmem { ports } => json!({
                "driver": "virtio-pmem-pci",
                "id": id,
                "memdev": id,
                "bus": ports[usize::from(device.get())],
            }),
            // Unarmed is what makes the guest's device read-only.
            Kind::Nvdimm => json!({
                "driver": "nvdimm",
                "id": id,
                "memdev": id,
                "slot": device.get(),
                "unarmed": true,
            }),
        };
        let plug = self.plug(device);
        plug.attach(std::slice::from_ref(file), disk, memory, arguments)
            .await
    }

    /// None if the VM has no such device.
    async fn contents(
        &self,
        device: DeviceNumber,
    ) -> Option<tokio::sync::MutexGuard<'_, Contents>> {
        let contents = self.0.devices.get(usize::from(device.get()))?;
        Some(contents.lock().await)
    }

    fn no_such(&self, device: DeviceNumber) -> BackendError {
        let devices = self.0.geometry.devices();
        BackendError::invalid(format!(
            "the VM has no VPMEM device {device}, but {devices} from 0"
        ))
    }

    /// Does work on files that hold up to so many bytes, where that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        what: &str,
        bytes: u64,
        work: impl FnOnce(&AtomicBool) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let copying = Duration::from_secs(bytes.div_ceil(SLOWEST_COPY));
        open_file::blocking(what, self.0.qmp.deadlines().call + copying, work).await
    }
}

fn used_otherwise(device: DeviceNumber) -> BackendError {
    let message = format!("VPMEM device {device} is in use, and not in this way; detach it first");
    BackendError::conflict(message)
}

impl fmt::Debug for QemuVpmem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.0.kind {
            Kind::VirtioPmem { .. } => "virtio-pmem-pci",
            Kind::Nvdimm => "nvdimm",
        };
        f.debug_struct("QemuVpmem")
            .field("kind", &kind)
            .field("geometry", &self.0.geometry)
            .finish_non_exhaustive()
    }
}
