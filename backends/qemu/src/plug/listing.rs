//! What a QEMU has, by whoever added it.

use std::collections::HashMap;

use blockmount::{BackendError, DiskId};
use serde_json::{Value, json};

use super::{Backend, DEVICES, Node, Object, Presence};
use crate::qmp::{Kept, Qmp, QmpError};

/// What QEMU has, by whoever added it.
#[derive(Debug)]
pub(crate) struct Found {
    /// What there is by names with our prefix.
    pub(crate) ours: HashMap<String, Presence>,
    /// The files that QEMU keeps, by their owners.
    pub(crate) kept: HashMap<String, Kept>,
    /// Devices of other names, with the path of the bus that each is on.
    pub(crate) others: Vec<(String, String)>,
}

impl Found {
    /// Which disk was attached under a name, where QEMU shows that.
    pub(crate) fn disk(&self, name: &str) -> Option<DiskId> {
        self.kept.get(name).map(|kept| kept.id.clone())
    }
}

/// Asks QEMU for all devices, and for what devices of ours are made on.
pub(crate) async fn find(qmp: &Qmp, backend: Backend, prefix: &str) -> Result<Found, BackendError> {
    let failed = |error: QmpError| error.while_trying("cannot list the disks of the VM");
    let devices = objects(qmp, DEVICES).await.map_err(failed)?;
    let backends = backend.names(qmp).await.map_err(failed)?;
    let kept = qmp.kept().await.map_err(failed)?;
    let (devices, others): (Vec<String>, Vec<String>) = devices
        .into_iter()
        .partition(|name| name.starts_with(prefix));
    let mut found = Found {
        ours: HashMap::new(),
        kept,
        others: Vec::new(),
    };
    for name in devices {
        found.ours.entry(name).or_default().device = true;
    }
    for name in backends.into_iter().filter(|name| name.starts_with(prefix)) {
        found.ours.entry(name).or_default().backend = true;
    }
    for name in others {
        if let Some(bus) = property(qmp, &name, "parent_bus").await.map_err(failed)?
            && let Some(bus) = bus.as_str()
        {
            found.others.push((name, bus.to_owned()));
        }
    }
    Ok(found)
}

/// A property of a device; none if the device has no such property, or has just gone.
pub(crate) async fn property(
    qmp: &Qmp,
    device: &str,
    property: &str,
) -> Result<Option<Value>, QmpError> {
    let arguments = json!({"path": format!("{DEVICES}/{device}"), "property": property});
    match qmp.execute("qom-get", arguments).await {
        Ok(value) => Ok(Some(value)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What there is in QEMU whose name begins with a prefix: `device bm-scsi-0-3`, `node bm-scsi-0-3` and so on, in order.
pub(crate) async fn left(
    qmp: &Qmp,
    backend: Backend,
    prefix: &str,
) -> Result<Vec<String>, BackendError> {
    let failed = |error: QmpError| error.while_trying("cannot list the disks of the VM");
    let devices = objects(qmp, DEVICES).await.map_err(failed)?;
    let backends = backend.names(qmp).await.map_err(failed)?;
    let devices = devices.into_iter().map(|name| ("device", name));
    let backends = backends.into_iter().map(|name| (backend.noun(), name));
    let ours = devices
        .chain(backends)
        .filter(|(_, name)| name.starts_with(prefix));
    let mut left: Vec<String> = ours.map(|(what, name)| format!("{what} {name}")).collect();
    left.sort();
    Ok(left)
}

/// How large a node is for its guest, in bytes; nothing if there is no such node.
pub(crate) async fn size_of_node(qmp: &Qmp, name: &str) -> Result<Option<u64>, QmpError> {
    let mut nodes = nodes(qmp).await?.into_iter();
    let node = nodes.find(|node| node.name == name);
    Ok(node.and_then(|node| node.image).map(|image| image.size))
}

pub(super) async fn nodes(qmp: &Qmp) -> Result<Vec<Node>, QmpError> {
    let flat = json!({"flat": true});
    qmp.query("query-named-block-nodes", flat).await
}

pub(super) async fn objects(qmp: &Qmp, path: &str) -> Result<Vec<String>, QmpError> {
    let objects: Vec<Object> = qmp.query("qom-list", json!({"path": path})).await?;
    Ok(objects.into_iter().map(|object| object.name).collect())
}

/// The ids of the devices of one type.
#[cfg(feature = "launch")]
pub(crate) async fn of_type(qmp: &Qmp, name: &str) -> Result<Vec<String>, QmpError> {
    let devices: Vec<Object> = qmp.query("qom-list", json!({"path": DEVICES})).await?;
    let (kind, devices) = (format!("child<{name}>"), devices.into_iter());
    let of_it = devices.filter(|device| device.kind == kind);
    Ok(of_it.map(|device| device.name).collect())
}
