//! Several transports as one: each disk goes to the first that takes it.

use async_trait::async_trait;
use dashmap::DashMap;
use tracing::debug;

use crate::{BackendError, DeviceLocator, Disk, DiskId, ErrorKind, Presence, Transport};

/// Transports of one VM, tried in order. One that answers `Unsuitable` or `Full` passes the disk on.
pub(crate) struct Transports {
    in_order: Vec<Box<dyn Transport>>,
    /// The transport that was called to attach a disk and has not refused it.
    taken_by: DashMap<Disk, usize>,
}

impl Transports {
    pub(crate) fn new(in_order: Vec<Box<dyn Transport>>) -> Self {
        Transports {
            in_order,
            taken_by: DashMap::new(),
        }
    }
}

/// Whether another transport may be tried.
fn passes_on(error: &BackendError) -> bool {
    matches!(error.kind(), ErrorKind::Unsuitable | ErrorKind::Full)
}

/// The error when no transport takes a disk, with all refusals.
fn refused_by_all(refusals: &[BackendError]) -> BackendError {
    let full = refusals
        .iter()
        .any(|refusal| refusal.kind() == ErrorKind::Full);
    let kind = if full {
        ErrorKind::Full
    } else {
        ErrorKind::Unsuitable
    };
    let said: Vec<&str> = refusals.iter().map(BackendError::message).collect();
    match said[..] {
        [] => BackendError::new(kind, "the manager was built without a transport"),
        [only] => BackendError::new(kind, only),
        _ => BackendError::new(kind, format!("no transport takes it: {}", said.join("; "))),
    }
}

#[async_trait]
impl Transport for Transports {
    /// The transports of one VM sit on one host, so the first that knows the kind of disk answers for
    /// all.
    async fn identify(&self, disk: &Disk) -> Result<DiskId, BackendError> {
        let mut refusals = Vec::new();
        for transport in &self.in_order {
            match transport.identify(disk).await {
                Err(error) if passes_on(&error) => refusals.push(error),
                outcome => return outcome,
            }
        }
        Err(refused_by_all(&refusals))
    }

    async fn attach(&self, disk: &Disk, id: &DiskId) -> Result<DeviceLocator, BackendError> {
        let mut refusals = Vec::new();
        for (index, transport) in self.in_order.iter().enumerate() {
            // Recorded before the call: one that never returns must be followed by a detach.
            self.taken_by.insert(disk.clone(), index);
            match transport.attach(disk, id).await {
                Err(error) if passes_on(&error) => {
                    debug!(%error, "passed on");
                    refusals.push(error);
                }
                Err(error) if error.kind() != ErrorKind::Uncertain => {
                    self.taken_by.remove(disk);
                    return Err(error);
                }
                outcome => return outcome,
            }
        }
        self.taken_by.remove(disk);
        Err(refused_by_all(&refusals))
    }

    async fn detach(&self, disk: &Disk) -> Result<(), BackendError> {
        let Some(index) = self.taken_by.get(disk).map(|index| *index) else {
            return Ok(());
        };
        self.in_order[index].detach(disk).await?;
        self.taken_by.remove(disk);
        Ok(())
    }

    async fn resize(&self, disk: &Disk, bytes: u64) -> Result<(), BackendError> {
        let Some(index) = self.taken_by.get(disk).map(|index| *index) else {
            return Err(BackendError::not_found(format!(
                "disk {disk} is not attached"
            )));
        };
        self.in_order[index].resize(disk, bytes).await
    }

    /// The first transport that has the disk has it for good. One that cannot tell is to detach it, unless another
    /// one has it.
    async fn adopt(
        &self,
        disk: &Disk,
        id: &DiskId,
        locator: Option<&DeviceLocator>,
    ) -> Result<Presence<DeviceLocator>, BackendError> {
        let mut in_doubt = None;
        for (index, transport) in self.in_order.iter().enumerate() {
            match transport.adopt(disk, id, locator).await {
                Ok(Presence::Absent) => {}
                Err(error) if passes_on(&error) || error.kind() == ErrorKind::Gone => {}
                Ok(Presence::Present(locator)) => {
                    self.taken_by.insert(disk.clone(), index);
                    return Ok(Presence::Present(locator));
                }
                unknown => {
                    in_doubt.get_or_insert((index, unknown));
                }
            }
        }
        let Some((index, unknown)) = in_doubt else {
            return Ok(Presence::Absent);
        };
        self.taken_by.insert(disk.clone(), index);
        unknown
    }
}
