//! Looking at stacks.

use super::Combining;
use crate::MountPoint;
use crate::inspect::StackStatus;
use crate::lease::Table;

pub(crate) fn inspect(table: &Table<Combining>) -> Vec<StackStatus> {
    let at = |point: &MountPoint| point.path().to_string_lossy().into_owned();
    table.inspect(|target, up, lease| StackStatus {
        target: target.to_string_lossy().into_owned(),
        layers: up.map_or(Vec::new(), |up| up.layers.iter().map(at).collect()),
        scratch: up.and_then(|up| up.scratch.as_ref().map(at)),
        lease,
    })
}
