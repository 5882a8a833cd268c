//! Putting a manager together.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::missing::Missing;
use super::{DEFAULT_TIMEOUT, Manager};
use crate::claims::Claims;
use crate::holders::Holders;
use crate::inspect::{Observed, Timed};
use crate::lease::{Lingering, Table, Tables};
use crate::stack::Combining;
use crate::transports::Transports;
use crate::view::Viewing;
use crate::{
    AttachManager, Binder, BlockMountManager, LayerCombiner, Linger, Mounter, SlotStatus,
    Transport, Unplugger,
};

/// Puts a [`Manager`] together from backends.
#[must_use]
pub struct ManagerBuilder {
    transports: Vec<Box<dyn Transport>>,
    unplugger: Option<Box<dyn Unplugger>>,
    mounter: Option<Box<dyn Mounter>>,
    combiner: Box<dyn LayerCombiner>,
    binder: Box<dyn Binder>,
    mount_root: PathBuf,
    timeout: Duration,
    observed: Observed,
    linger: Linger,
}

impl Default for ManagerBuilder {
    fn default() -> Self {
        ManagerBuilder {
            transports: Vec::new(),
            unplugger: None,
            mounter: None,
            combiner: Box::new(Missing("a combiner")),
            binder: Box::new(Missing("a binder")),
            mount_root: PathBuf::from("/run/mounts/blockmount"),
            timeout: DEFAULT_TIMEOUT,
            observed: Observed::default(),
            linger: Linger::OFF,
        }
    }
}

impl ManagerBuilder {
    /// Adds a transport after those that are there. They are tried in order: one that answers
    /// `Unsuitable` or `Full` passes the disk on.
    pub fn transport(mut self, transport: impl Transport) -> Self {
        self.transports.push(Box::new(transport));
        self
    }

    /// Unplugs devices in the guest before the host detaches them. A manager without one only attaches, and
    /// a detach is the host's alone ([`AttachManager::without_unplugger`]): it refuses to mount.
    pub fn unplugger(mut self, unplugger: impl Unplugger) -> Self {
        self.unplugger = Some(Box::new(unplugger));
        self
    }

    /// Mounts devices in the guest. A manager without one can only attach.
    pub fn mounter(mut self, mounter: impl Mounter) -> Self {
        self.mounter = Some(Box::new(mounter));
        self
    }

    /// Stacks layers as an overlay. A manager without one makes no stacks.
    pub fn combiner(mut self, combiner: impl LayerCombiner) -> Self {
        self.combiner = Box::new(combiner);
        self
    }

    /// Shows mounts at further places. A manager without one makes no views.
    pub fn binder(mut self, binder: impl Binder) -> Self {
        self.binder = Box::new(binder);
        self
    }

    /// Where paths are made up for mounts that name none; an absolute path in the guest. Two managers
    /// of one guest need two roots. Default: `/run/mounts/blockmount`.
    pub fn mount_root(mut self, root: impl Into<PathBuf>) -> Self {
        self.mount_root = root.into();
        self
    }

    /// How long a caller waits for one answer before it gets `Uncertain`; what it waits for goes on.
    /// Default: [`DEFAULT_TIMEOUT`].
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Where the manager reads which slots are in use when it is [inspected](Manager::inspect). It must neither block nor call
    /// the manager. Without one an inspection shows no slots.
    pub fn slots(mut self, slots: impl Fn() -> Vec<SlotStatus> + Send + Sync + 'static) -> Self {
        self.observed.slots = Some(Box::new(slots));
        self
    }

    /// Keeps what was released for the next caller, for a while. Default: [`Linger::OFF`].
    pub fn linger(mut self, linger: Linger) -> Self {
        self.linger = linger;
        self
    }

    /// The manager, without a journal: what it does is forgotten when its process ends. With one it is made by
    /// [`recover`](Self::recover).
    pub fn build(self) -> Manager {
        self.build_with(Holders::default())
    }

    pub(crate) fn build_with(self, holders: Holders) -> Manager {
        let ManagerBuilder {
            mut transports,
            unplugger,
            mounter,
            combiner,
            binder,
            mount_root,
            timeout,
            observed,
            linger,
        } = self;
        let only = if transports.len() == 1 {
            transports.pop()
        } else {
            None
        };
        let transport: Box<dyn Transport> = match only {
            Some(only) => only,
            None => Box::new(Transports::new(transports)),
        };
        let mounter: Box<dyn Mounter> = match (mounter, &unplugger) {
            (Some(mounter), Some(_)) => mounter,
            (None, _) => Box::new(Missing("a mounter")),
            // What is mounted must be unplugged before it is detached.
            (Some(_), None) => Box::new(Missing("an unplugger")),
        };
        let latencies = &observed.latencies;
        let transport = Timed::new(transport, latencies);
        let unplugger = unplugger.map(|unplugger| Timed::new(unplugger, latencies));
        let mounter = Timed::new(mounter, latencies);
        let combiner = Timed::new(combiner, latencies);
        let binder = Timed::new(binder, latencies);
        let (claims, lingering) = (Claims::new(mount_root), Lingering::new(linger));
        let combining = Combining::new(combiner, claims.clone(), holders.clone());
        let viewing = Viewing::new(binder, claims.clone(), holders.clone());
        let mut manager = Manager {
            attachments: AttachManager::with_holders(
                transport,
                unplugger,
                timeout,
                holders.clone(),
                lingering.clone(),
            ),
            mounts: BlockMountManager::with_claims(mounter, claims, timeout, holders, lingering),
            stacks: Table::new(combining, Lingering::default(), timeout),
            views: Table::new(viewing, Lingering::default(), timeout),
            resizing: Arc::default(),
            observed: Arc::new(observed),
        };
        let (mounts, attachments) = (&manager.mounts.tables, &manager.attachments.tables);
        let all = attachments
            .below(mounts)
            .below(&Tables::one(&manager.stacks))
            .below(&Tables::one(&manager.views));
        manager.mounts.tables = all.clone();
        manager.attachments.tables = all;
        manager
    }
}

impl fmt::Debug for ManagerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManagerBuilder")
            .field("transports", &self.transports.len())
            .field("mount_root", &self.mount_root)
            .field("timeout", &self.timeout)
            .field("linger", &self.linger)
            .finish_non_exhaustive()
    }
}
