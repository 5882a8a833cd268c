//! The device stack: from what a resolver found to what is mounted.
//!
//! Each layer is a device that is opened from the one below it, and puts what it makes on the undo list before it makes
//! it: the device itself, then a byte range or a partition of it. Layers to come (verity, encryption) go on top.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmount::{BackendError, BlockDevice, ErrorKind, MountOptions};

use crate::device::{dm_linear, free, node, partition, subrange};
use crate::errno::{blocking, retry_while_busy};
use crate::mount::target::Target;
use crate::undo::ledger::Ledger;

/// A device of the stack. As long as it is open, the kernel keeps what was read of it.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) node: PathBuf,
    pub(crate) open: File,
}

impl Layer {
    async fn open(node: PathBuf, deadline: Instant) -> Result<Self, BackendError> {
        let open = node::await_open(&node, deadline).await?;
        Ok(Layer { node, open })
    }
}

/// How long the layers of a device may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) ready: Duration,
    pub(crate) busy: Duration,
}

/// Opens the device that is to be mounted at a target. What was made of it until an error is on the target's undo list.
pub(crate) async fn open(
    ledger: &Arc<Ledger>,
    target: &Target,
    found: BlockDevice,
    options: &MountOptions,
    timeouts: Timeouts,
) -> Result<Layer, BackendError> {
    let deadline = Instant::now() + timeouts.ready;
    let mut layer = Layer::open(found.path, deadline).await?;
    match (found.range, options.partition()) {
        (None, None) => return Ok(layer),
        (None, Some(number)) => {
            let disk = &layer.open;
            layer.node = partition::open(ledger, target, disk, number, deadline).await?;
        }
        (Some(mut range), number) => {
            // The kernel looks for no partitions of a range: one is a smaller range.
            if let Some(number) = number {
                let at = layer.node.clone();
                let find = move || subrange::partition(&at, &layer.open, range, number);
                range = blocking(find).await?;
            }
            let (ledger, target, node) = (ledger.clone(), target.clone(), layer.node.clone());
            let attempt = move || dm_linear::open(&ledger.list(&target), &node, range.clone());
            layer.node = match retry_while_busy(timeouts.busy, attempt).await {
                Err(error) if error.kind() == ErrorKind::Busy => {
                    return blocking(move || Err(free::name_users(&layer.node, error))).await;
                }
                made => made?,
            };
        }
    }
    Layer::open(layer.node, deadline).await
}
