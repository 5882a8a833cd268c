//! The device stack: from what a resolver found to what is mounted.
//!
//! Each layer is a device that is opened from the one below it, and puts what it makes on the undo list before it makes
//! it: the device itself, then a byte range or a partition of it, then what checks its
//! integrity, or what encrypts it, with tags for its blocks below that if they are to be authenticated. The order is fixed. A hash tree on a device of its own is opened before what it checks.

use std::fs::File;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmount::{
    BackendError, BlockDevice, Encryption, ErrorKind, Expose, MountOptions, Overwrite,
};

use crate::device::crypt::{Encrypted, Worth};
use crate::device::number::DeviceNumber;
use crate::device::verity::Checked;
use crate::device::{
    cipher, crypt, dm_linear, free, integrity, luks, node, partition, subrange, verity,
};
use crate::errno::{blocking, retry_while_busy};
use crate::mount::target::Target;
use crate::undo::ledger::{Ledger, UndoList};

/// A device of the stack. As long as it is open, the kernel keeps what was read of it.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) node: PathBuf,
    /// Its resolver may use the same handle: it is read by position ([`ReadAt`](node::ReadAt)).
    pub(crate) open: Arc<File>,
    known: Known,
}

/// What is known of a device besides its node.
#[derive(Debug)]
enum Known {
    Nothing,
    Checked(Checked),
    Encrypted(Encrypted),
}

impl Layer {
    async fn open(node: PathBuf, deadline: Instant) -> Result<Self, BackendError> {
        let open = node::await_open(&node, deadline).await?;
        Ok(Layer::of(node, Arc::new(open)))
    }

    fn of(node: PathBuf, open: Arc<File>) -> Self {
        let known = Known::Nothing;
        Layer { node, open, known }
    }

    /// What is on it.
    pub(crate) fn worth(&self) -> Worth {
        match &self.known {
            Known::Encrypted(encrypted) => encrypted.worth,
            Known::Nothing | Known::Checked(_) => Worth::Kept,
        }
    }

    /// Adds to an error of reading or mounting what the layers know of it. Blocks.
    pub(crate) fn explained(&self, error: BackendError) -> BackendError {
        match &self.known {
            Known::Nothing => error,
            Known::Checked(checked) => checked.explained(error),
            Known::Encrypted(encrypted) => encrypted.explained(&self.node, error),
        }
    }
}

/// How long the layers of a device may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) ready: Duration,
    pub(crate) busy: Duration,
}

/// Opens what was found of a device, or a partition of it.
async fn open_found(
    ledger: &Arc<Ledger>,
    target: &Target,
    found: BlockDevice,
    partition: Option<NonZeroU32>,
    timeouts: Timeouts,
) -> Result<Layer, BackendError> {
    let deadline = Instant::now() + timeouts.ready;
    let mut layer = Layer::open(found.path, deadline).await?;
    if let Some(meant) = found.open {
        let (node, open) = (layer.node.clone(), layer.open.clone());
        blocking(move || DeviceNumber::of(&meant)?.ensure_is(DeviceNumber::of(&open)?, &node))
            .await?;
    }
    match (found.range, partition) {
        (None, None) => {}
        (None, Some(number)) => {
            let disk = &layer.open;
            let node = partition::open(ledger, target, disk, number, deadline).await?;
            layer = Layer::open(node, deadline).await?;
        }
        (Some(mut range), number) => {
            // The kernel looks for no partitions of a range: one is a smaller range.
            if let Some(number) = number {
                let at = layer.node.clone();
                let find = move || subrange::partition(&at, &layer.open, range, number);
                range = blocking(find).await?;
            }
            let node = layer.node.clone();
            let open = move |list: &UndoList<'_>| dm_linear::open(list, &node, range.clone());
            let node = attempt(ledger, target, layer.node, timeouts.busy, open).await?;
            layer = Layer::open(node, deadline).await?;
        }
    }
    Ok(layer)
}

/// What there is for a mount.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) device: BlockDevice,
    /// The device with the hash tree, if it is another one.
    pub(crate) tree: Option<BlockDevice>,
    /// The directory of the owner's keys.
    pub(crate) keys: Option<PathBuf>,
}

impl Found {
    /// The device, if it is to be mounted as it is and is open already. Only a mount proves afterwards which device it is of.
    pub(crate) fn as_it_is(&self, options: &MountOptions) -> Option<Layer> {
        let is_mounted_as_it_is = self.device.range.is_none()
            && options.partition().is_none()
            && options.verity().is_none()
            && options.encryption().is_none()
            && options.format().is_none()
            && options.check().is_none()
            && options.expose() == Expose::Filesystem;
        let open = self.device.open.as_ref().filter(|_| is_mounted_as_it_is)?;
        Some(Layer::of(self.device.path.clone(), Arc::clone(open)))
    }
}

/// Opens the device that is to be mounted at a target. What was made of it until an error is on the target's undo list.
pub(crate) async fn open(
    ledger: &Arc<Ledger>,
    target: &Target,
    found: Found,
    options: &MountOptions,
    timeouts: Timeouts,
) -> Result<Layer, BackendError> {
    let partition = options.partition();
    let mut layer = open_found(ledger, target, found.device, partition, timeouts).await?;
    let deadline = Instant::now() + timeouts.ready;
    if let Some(options) = options.verity() {
        let tree = match found.tree {
            Some(tree) => Some(open_plain(ledger, target, tree, timeouts).await?.node),
            None => None,
        };
        let (node, options) = (layer.node.clone(), options.clone());
        let open = move |list: &UndoList<'_>| verity::open(list, &node, tree.as_deref(), &options);
        let made = attempt(ledger, target, layer.node, timeouts.busy, open).await?;
        let (node, checked) = made;
        layer = Layer::open(node, deadline).await?;
        layer.known = Known::Checked(checked);
    }
    if let Some(encryption) = options.encryption() {
        if !options.is_read_only() {
            let node = layer.node.clone();
            blocking(move || crypt::ensure_writable(&node)).await?;
        }
        let format = options.format();
        let volume = match encryption {
            Encryption::Luks2(key) => {
                Some(luks::unlock(&layer.node, key, found.keys.clone()).await?)
            }
            _ => None,
        };
        let wanted = crypt::Wanted {
            encryption: encryption.clone(),
            read_only: options.is_read_only(),
            may_destroy: format.is_some_and(|format| format.overwrite == Overwrite::Everything),
            disk: layer.node.clone(),
            keys: found.keys,
            volume,
        };
        if encryption.has_integrity() {
            let (node, may_destroy) = (layer.node.clone(), wanted.may_destroy);
            let tag = cipher::tag_length(encryption)?;
            let open = move |list: &UndoList<'_>| integrity::open(list, &node, tag, may_destroy);
            let node = attempt(ledger, target, layer.node, timeouts.busy, open).await?;
            layer = Layer::open(node, deadline).await?;
        }
        let node = layer.node.clone();
        let open = move |list: &UndoList<'_>| crypt::open(list, &node, &wanted);
        let made = attempt(ledger, target, layer.node, timeouts.busy, open).await?;
        let (node, encrypted) = made;
        layer = Layer::open(node, deadline).await?;
        layer.known = Known::Encrypted(encrypted);
    }
    Ok(layer)
}

/// Opens a further device of a mount: all of what was found.
pub(crate) async fn open_plain(
    ledger: &Arc<Ledger>,
    target: &Target,
    found: BlockDevice,
    timeouts: Timeouts,
) -> Result<Layer, BackendError> {
    open_found(ledger, target, found, None, timeouts).await
}

/// Tries to make a layer as long as the device below may be busy, and says who uses it if it stays so.
async fn attempt<T: Send + 'static>(
    ledger: &Arc<Ledger>,
    target: &Target,
    below: PathBuf,
    timeout: Duration,
    open: impl Fn(&UndoList<'_>) -> Result<T, BackendError> + Clone + Send + 'static,
) -> Result<T, BackendError> {
    let (ledger, target) = (ledger.clone(), target.clone());
    let attempt = move || open(&ledger.list(&target));
    match retry_while_busy(timeout, attempt).await {
        Err(error) if error.kind() == ErrorKind::Busy => {
            blocking(move || Err(free::name_users(&below, error))).await
        }
        made => made,
    }
}
