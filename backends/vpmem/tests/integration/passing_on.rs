//! VPMEM in front of SCSI: what does not fit the one goes to the other, and comes out of the right one.

// A panic is the failure message, in helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::common::guest::{Guest, Log};
use crate::common::{Answer, GIB, MIB, MODES, Vm, Vpmem, disk, two_addresses};
use async_trait::async_trait;
use blockmount::placement::Occupant;
use blockmount::{
    BackendError, Disk, DiskId, ErrorKind, Manager, Mount, MountOptions, MountRequest,
};
use blockmount_scsi::{Geometry, ScsiAddress, ScsiTransport};

#[derive(Default)]
struct ScsiBus(Mutex<BTreeMap<ScsiAddress, Disk>>);

#[async_trait]
impl blockmount_scsi::Attacher for ScsiBus {
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        Ok(DiskId::name(&disk.source().to_string_lossy()))
    }

    async fn attach(
        &self,
        address: ScsiAddress,
        disk: &Disk,
        _: &DiskId,
    ) -> Result<(), BackendError> {
        self.0.lock().unwrap().insert(address, disk.clone());
        Ok(())
    }

    async fn detach(&self, address: ScsiAddress) -> Result<(), BackendError> {
        self.0.lock().unwrap().remove(&address);
        Ok(())
    }

    async fn resize(&self, _: ScsiAddress, _: &Disk, _: u64) -> Result<(), BackendError> {
        Err(BackendError::unsuitable("disks of this VM keep their size"))
    }

    async fn list(&self) -> Result<Vec<Occupant<ScsiAddress>>, BackendError> {
        let bus = self.0.lock().unwrap();
        Ok(bus.keys().map(|at| Occupant::new(*at, None)).collect())
    }
}

struct Both {
    vm: Arc<Vm>,
    vpmem: Arc<Vpmem>,
    bus: Arc<ScsiBus>,
    manager: Manager,
    log: Log,
    guest: Guest,
}

/// Two disks fit on VPMEM, four on SCSI.
fn both(mode: blockmount_vpmem::Mode) -> Both {
    let (vm, vpmem, _) = two_addresses(mode);
    let bus = Arc::new(ScsiBus::default());
    let scsi = ScsiTransport::new(bus.clone(), Geometry::new(1, 4).unwrap(), &[]).unwrap();
    let guest = Guest::default();
    let (manager, log) = guest.manager(vec![vpmem.clone(), Arc::new(scsi)]);
    Both {
        vm,
        vpmem,
        bus,
        manager,
        log,
        guest,
    }
}

impl Both {
    async fn add(&self, disk: &Disk) -> Mount {
        let options = if disk.is_read_only() {
            MountOptions::read_only()
        } else {
            MountOptions::default()
        };
        self.manager
            .add(disk, &MountRequest::new(options))
            .await
            .unwrap()
    }

    fn counts(&self) -> (usize, usize) {
        (self.vm.present().len(), self.bus.0.lock().unwrap().len())
    }

    async fn release_all(&self, mounts: Vec<Mount>) {
        for mount in mounts {
            mount.release().await.unwrap();
        }
        assert!(self.manager.drain().await.is_clean());
        assert_eq!((self.counts(), self.guest.mounts()), ((0, 0), 0));
        assert_eq!(self.vpmem.slot_map(), []);
    }
}

#[tokio::test]
async fn vpmem_full_passes_on_to_scsi() {
    for mode in MODES {
        let both = both(mode);
        let mut mounts = Vec::new();
        for number in 0..4 {
            mounts.push(both.add(&disk(number)).await);
        }
        let transports: Vec<_> = mounts
            .iter()
            .map(|mount| mount.locator().transport())
            .collect();
        assert_eq!(transports, ["vpmem", "vpmem", "scsi", "scsi"]);
        assert_eq!(both.counts(), (2, 2));
        let log = both.log.take();
        assert_eq!(log[4..6], ["attach: full", "attach scsi:0/0"]);
        // Room on VPMEM is used again, and a disk on SCSI stays there.
        mounts.remove(0).release().await.unwrap();
        mounts.push(both.add(&disk(4)).await);
        assert_eq!(mounts.last().unwrap().locator().transport(), "vpmem");
        both.release_all(mounts).await;
    }
}

#[tokio::test]
async fn what_vpmem_cannot_hold_passes_on_to_scsi() {
    for mode in MODES {
        let both = both(mode);
        let scratch = Disk::virtual_disk("/images/10.vhd");
        both.vm.set_size(&disk(1), 3 * GIB);
        let mut mounts = Vec::new();
        for disk in [disk(0), disk(1), scratch] {
            mounts.push(both.add(&disk).await);
        }
        let transports: Vec<_> = mounts
            .iter()
            .map(|mount| mount.locator().transport())
            .collect();
        assert_eq!(transports, ["vpmem", "scsi", "scsi"]);
        both.release_all(mounts).await;
    }
}

#[tokio::test]
async fn a_disk_in_doubt_on_vpmem_is_not_passed_on() {
    for mode in MODES {
        let both = both(mode);
        both.vm.set_size(&disk(0), MIB);
        both.vm.next(Answer::DoneButUncertain);
        let request = MountRequest::new(MountOptions::read_only());
        let error = both.manager.add(&disk(0), &request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Uncertain);
        assert!(both.bus.0.lock().unwrap().is_empty());
        let mount = both.add(&disk(0)).await;
        assert_eq!(mount.locator().transport(), "vpmem");
        assert_eq!(both.counts(), (1, 0));
        both.release_all(vec![mount]).await;
    }
}
