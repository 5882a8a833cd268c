//! A backend of one's own: a transport, and the conformance suite over it.
//!
//! ```console
//! $ cargo run --features testing --example own_backend
//! ```
//!
//! The "hypervisor" is a directory in which each attached disk is a link in a file named after its port. What it
//! shows is what every transport does: identify, reserve, attach, say what happened, and find again after a restart.

use std::error::Error;
use std::io;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use blockmount::placement::{Occupant, Placement};
use blockmount::slots::{Occupied, Policy, Slot, Slots};
use blockmount::testing::conformance::{self, TransportFixture};
use blockmount::{BackendError, DeviceLocator, Disk, DiskId, Presence, Transport};

/// Disks as links in a directory: `port:3` is the link `3`.
struct Ports {
    directory: PathBuf,
    slots: Slots,
    /// Remembers which disk is at which port, and what is in doubt.
    placement: Placement<(Occupied, u16)>,
}

impl Ports {
    fn new(directory: &Path, ports: u16) -> Result<Self, Box<dyn Error>> {
        Ok(Ports {
            directory: directory.to_owned(),
            slots: Slots::new(1, ports, Policy::LowestFirst)?,
            placement: Placement::new("port", []),
        })
    }

    fn link(&self, port: u16) -> PathBuf {
        self.directory.join(port.to_string())
    }

    fn reserve_at(&self, index: u16) -> Option<(Occupied, u16)> {
        let slot = self.slots.reserve_at(Slot { group: 0, index }).ok()?;
        Some((slot.fill(), index))
    }

    /// What the hypervisor has, whoever attached it.
    fn list(&self) -> Result<Vec<Occupant<u16>>, BackendError> {
        let trouble = |error| failed("cannot list the ports".to_owned(), error);
        let mut list = Vec::new();
        for entry in std::fs::read_dir(&self.directory).map_err(trouble)? {
            let entry = entry.map_err(trouble)?;
            let Ok(port) = entry.file_name().to_string_lossy().parse() else {
                continue;
            };
            let id = std::fs::metadata(entry.path()).ok();
            let id = id.map(|found| DiskId::inode(found.dev(), found.ino()));
            list.push(Occupant::new(port, id));
        }
        Ok(list)
    }
}

/// What a failed system call means for a caller.
fn failed(tried: String, error: io::Error) -> BackendError {
    match error.kind() {
        io::ErrorKind::NotFound => BackendError::not_found(tried),
        _ => BackendError::other(tried),
    }
    .with_source(error)
}

#[async_trait]
impl Transport for Ports {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        disk.options().require_only(&[])?; // refuses what this hypervisor does not know
        let metadata = std::fs::metadata(disk.source())
            .map_err(|error| failed(format!("cannot find disk {disk}"), error))?;
        Ok(DiskId::inode(metadata.dev(), metadata.ino()))
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        // What somebody else has at a port is never taken out: no disk is given that port.
        let survey = self
            .placement
            .survey(async { self.list() }, |port| self.reserve_at(*port));
        survey.await?;
        let call = self.placement.attach(disk, || {
            let slot = self.slots.reserve()?;
            let port = slot.slot().index;
            Some((slot.fill(), port))
        })?;
        let call = call.ok_or_else(|| BackendError::full("all ports are taken"))?;
        let port = call.address();
        let link = symlink(disk.source(), self.link(port));
        let linked = link.map_err(|error| failed(format!("cannot attach disk {disk}"), error));
        // The name may mean another file by now: what was identified is what is attached.
        let proven = match (linked, self.identify(disk).await) {
            (Ok(()), Ok(now)) if now == *id => Ok(()),
            (Ok(()), now) => {
                std::fs::remove_file(self.link(port)).map_err(|error| {
                    let tried = format!("cannot take back disk {disk}");
                    BackendError::uncertain(tried).with_source(error)
                })?;
                let replaced = || BackendError::conflict(format!("disk {disk} was replaced"));
                Err(now.err().unwrap_or_else(replaced))
            }
            (Err(error), _) => Err(error),
        };
        call.attached(proven)?;
        Ok(DeviceLocator::new("port", port).expect("a number is an address"))
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let Some(call) = self.placement.detach(disk)? else {
            return Ok(()); // it is not attached
        };
        let answer = match std::fs::remove_file(self.link(call.address())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(format!("cannot detach disk {disk}"), error))
            }
            _ => Ok(()),
        };
        call.detached(answer)
    }

    async fn resize(&self, _: &Disk, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable("disks of ports keep their size"))
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let port = match locator {
            Some(locator) if locator.transport() == "port" => locator.address().parse().ok(),
            Some(_) => return Ok(Presence::Absent), // of another transport
            None => None, // the attach was cut off: looked for by the disk
        };
        let found = self.placement.adopt(
            disk,
            id,
            port,
            self.list(),
            |port| self.reserve_at(*port),
            PartialEq::eq,
        )?;
        Ok(found.map(|port| DeviceLocator::new("port", port).expect("a number is an address")))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()?;
    let directory = std::env::temp_dir().join(format!("own-backend-{}", std::process::id()));
    let (images, ports) = (directory.join("images"), directory.join("ports"));
    std::fs::create_dir_all(&images)?;
    std::fs::create_dir(&ports)?;
    let mut disks = Vec::new();
    for number in 0..5 {
        let image = images.join(number.to_string());
        std::fs::write(&image, [number])?;
        disks.push(Disk::virtual_disk(image));
    }

    // What the suite compares before and after: what is really there, not what the transport believes.
    let listed = ports.clone();
    let snapshot = move || {
        let entries = std::fs::read_dir(&listed).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.file_name().display().to_string())
            .collect();
        names.sort();
        names
    };
    let missing = Disk::virtual_disk(images.join("missing"));
    let transport = Ports::new(&ports, 4)?;
    let restarted = move || Ports::new(&ports, 4).expect("4 ports are a table of slots");
    let fixture = TransportFixture::new(disks, missing, snapshot)
        .capacity(4)
        .successor(restarted);
    let passed = runtime.block_on(conformance::transport(&transport, &fixture));
    println!("{passed:?}");
    std::fs::remove_dir_all(&directory)?;
    Ok(())
}

#[test]
fn it_passes_the_suite() {
    main().unwrap();
}
