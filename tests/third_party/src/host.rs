//! The host's half: disks are plugged into ports by QMP.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockmount::placement::{Occupant, Placement};
use blockmount::slots::{Occupied, Policy, Slot, Slots};
use blockmount::{
    BackendError, DeviceLocator, Disk, DiskId, DiskKind, ErrorKind, Presence, Transport, blocking,
};
use blockmount_qemu::{Qmp, QmpError};
use serde_json::{Value, json};

use crate::SCHEME;

/// How long QEMU may take to take out a disk that its guest has released.
const REMOVAL: Duration = Duration::from_secs(30);

/// Where QEMU lists the devices that were plugged in.
const PERIPHERAL: &str = "/machine/peripheral";

/// The ports of a VM, as a [`Transport`].
#[derive(Debug)]
pub struct VirtioBlkTransport {
    qmp: Qmp,
    /// What QEMU calls the ports.
    ports: Vec<String>,
    slots: Slots,
    placement: Placement<(Occupied, u16)>,
}

impl VirtioBlkTransport {
    /// A disk for each of these `pcie-root-port`s, by their ids.
    ///
    /// # Errors
    ///
    /// `Invalid` unless there are 1 to 16,384 ports.
    pub fn new<I: Into<String>>(
        qmp: Qmp,
        ports: impl IntoIterator<Item = I>,
    ) -> Result<Self, BackendError> {
        let ports: Vec<String> = ports.into_iter().map(Into::into).collect();
        let invalid = || BackendError::invalid(format!("a VM cannot have {} ports", ports.len()));
        let count = u16::try_from(ports.len()).map_err(|_| invalid())?;
        let slots = Slots::new(1, count, Policy::LowestFirst).map_err(|_| invalid())?;
        let placement = Placement::new("port", []);
        Ok(VirtioBlkTransport {
            qmp,
            ports,
            slots,
            placement,
        })
    }

    fn allocate_at(&self, index: u16) -> Option<(Occupied, u16)> {
        let slot = self.slots.reserve_at(Slot { group: 0, index }).ok()?;
        Some((slot.fill(), index))
    }

    /// Which ports have a disk, whoever plugged it, by the file that QEMU has open for it.
    async fn list(&self) -> Result<Vec<Occupant<u16>>, BackendError> {
        let nodes = self.ask("query-named-block-nodes", json!({})).await?;
        let devices = self.ask("qom-list", json!({ "path": PERIPHERAL })).await?;
        let mut list = Vec::new();
        for port in (0..).take(self.ports.len()) {
            let name = Self::id(port);
            let node = nodes.iter().find(|node| node["node-name"] == *name);
            if node.is_none() && devices.iter().all(|device| device["name"] != *name) {
                continue;
            }
            let file = node.and_then(|node| node["image"]["filename"].as_str());
            let id = file
                .and_then(|file| std::fs::metadata(file).ok())
                .map(id_of);
            list.push(Occupant::new(port, id));
        }
        Ok(list)
    }

    fn id(port: u16) -> String {
        format!("{SCHEME}-{port}")
    }

    async fn plug(&self, port: u16, disk: &Disk, id: &DiskId) -> Result<(), BackendError> {
        let name = Self::id(port);
        let path = std::path::absolute(disk.source()).map_err(|error| {
            BackendError::other("there is no working directory").with_source(error)
        })?;
        let node = json!({
            "node-name": name, "driver": "raw", "read-only": disk.is_read_only(),
            "file": { "driver": "file", "filename": path, "read-only": disk.is_read_only() },
        });
        if let Err(error) = self.qmp.execute("blockdev-add", node).await {
            let refused = self.take_back(port, error).await;
            if refused.as_ref().map_err(BackendError::kind) != Err(ErrorKind::Uncertain) {
                // QEMU does not say whether it was the file that was missing.
                self.identify(disk).await?;
            }
            return refused;
        }
        // QEMU has the file open now: whatever the name means from here on, this is what it meant.
        if self.identify(disk).await.ok().as_ref() != Some(id) {
            self.unplug(port).await.map_err(|error| {
                BackendError::uncertain(format!("cannot take back {name}")).with_source(error)
            })?;
            return Err(BackendError::conflict(format!("disk {disk} was replaced")));
        }
        let bus = &self.ports[usize::from(port)];
        let device = json!({
            "driver": "virtio-blk-pci", "id": name, "drive": name, "bus": bus, "serial": name,
            "werror": "report", "rerror": "report",
        });
        match self.qmp.execute("device_add", device).await {
            Ok(_) => Ok(()),
            Err(error) => self.take_back(port, error).await,
        }
    }

    /// Leaves nothing of a plug that failed, or answers `Uncertain`.
    async fn take_back(&self, port: u16, failure: QmpError) -> Result<(), BackendError> {
        let tried = format!("cannot plug {}", Self::id(port));
        match self.unplug(port).await {
            Ok(()) if failure.kind() == ErrorKind::Uncertain => Err(BackendError::other(tried)),
            Ok(()) => Err(BackendError::new(failure.kind(), tried)),
            Err(error) if error.kind() == ErrorKind::Gone => Err(BackendError::gone(tried)),
            Err(_) => Err(BackendError::uncertain(tried)),
        }
        .map_err(|error| error.with_source(failure))
    }

    /// Takes out whatever is in a port, from whatever half of the way.
    async fn unplug(&self, port: u16) -> Result<(), BackendError> {
        let name = Self::id(port);
        let failed = |error: QmpError| error.while_trying(format!("cannot unplug {name}"));
        let mut deletions = self.qmp.events("DEVICE_DELETED");
        if self
            .lists("qom-list", json!({ "path": PERIPHERAL }), "name", &name)
            .await?
        {
            let deleted = self.qmp.execute("device_del", json!({ "id": name })).await;
            match deleted {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                // A guest that has ejected the disk is done; the event says so.
                Ok(_) | Err(QmpError::Refused { .. }) => {
                    let is_ours =
                        |event: &blockmount_qemu::qmp::Event| event.data["device"] == name.as_str();
                    deletions.find(REMOVAL, is_ours).await.map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
        if self
            .lists("query-named-block-nodes", json!({}), "node-name", &name)
            .await?
        {
            self.delete_node(&name).await.map_err(failed)?;
        }
        Ok(())
    }

    /// A device that its guest has ejected holds its node for a moment longer, and nothing announces the end of that.
    async fn delete_node(&self, name: &str) -> Result<(), QmpError> {
        let end = Instant::now() + REMOVAL;
        loop {
            let arguments = json!({ "node-name": name });
            match self.qmp.execute("blockdev-del", arguments).await {
                Err(QmpError::Refused { .. }) if Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                outcome => return outcome.map(drop),
            }
        }
    }

    /// Whether an answer of QEMU's has an entry whose `key` is `name`.
    async fn lists(
        &self,
        command: &str,
        arguments: Value,
        key: &str,
        name: &str,
    ) -> Result<bool, BackendError> {
        let entries = self.ask(command, arguments).await?;
        Ok(entries.iter().any(|entry| entry[key] == name))
    }

    /// The entries of an answer of QEMU's.
    async fn ask(&self, command: &str, arguments: Value) -> Result<Vec<Value>, BackendError> {
        let answer = self.qmp.execute(command, arguments).await;
        let answer = answer.map_err(|error| error.while_trying(format!("cannot {command}")))?;
        Ok(answer.as_array().cloned().unwrap_or_default())
    }
}

fn id_of(found: Metadata) -> DiskId {
    DiskId::inode(found.dev(), found.ino())
}

#[async_trait]
impl Transport for VirtioBlkTransport {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        if *disk.kind() != DiskKind::VirtualDisk {
            let message =
                format!("disk {disk} is no image file, which is all that is plugged here");
            return Err(BackendError::unsuitable(message));
        }
        disk.options().require_only(&[])?;
        let disk = disk.clone();
        blocking(move || {
            let found = File::open(disk.source()).and_then(|file| file.metadata());
            match found {
                Ok(found) => Ok(id_of(found)),
                Err(error) => {
                    Err(BackendError::not_found(format!("there is no disk {disk}"))
                        .with_source(error))
                }
            }
        })
        .await
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        self.placement
            .survey(self.list(), |port| self.allocate_at(*port))
            .await?;
        let call = self.placement.attach(disk, || {
            let slot = self.slots.reserve()?;
            let port = slot.slot().index;
            Some((slot.fill(), port))
        })?;
        let full = || BackendError::full(format!("all {} ports are taken", self.ports.len()));
        let call = call.ok_or_else(full)?;
        let port = call.address();
        let plugged = self.plug(port, disk, id).await;
        call.attached(plugged)?;
        Ok(locator_of(port))
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let Some(call) = self.placement.detach(disk)? else {
            return Ok(());
        };
        let unplugged = self.unplug(call.address()).await;
        call.detached(unplugged)
    }

    async fn resize(&self, _: &Disk, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable(
            "disks of this transport keep their size",
        ))
    }

    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let port = match locator {
            Some(locator) if locator.transport() == SCHEME => locator.address().parse().ok(),
            Some(_) => return Ok(Presence::Absent),
            None => None,
        };
        let list = self.list().await;
        let allocate = |port: &u16| self.allocate_at(*port);
        let found = self
            .placement
            .adopt(disk, id, port, list, allocate, PartialEq::eq)?;
        Ok(found.map(locator_of))
    }
}

fn locator_of(port: u16) -> DeviceLocator {
    DeviceLocator::new(SCHEME, port).expect("a number is an address")
}
