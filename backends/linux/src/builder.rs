//! Configuring the engine, and starting it with or without a journal of an earlier one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockmount::{BackendError, Resolver, Unplugger};

use crate::errno::{blocking, retry_while_busy};
use crate::guest::{Config, LinuxGuest};
use crate::kernel::Kernel;
use crate::transports::Transports;
use crate::undo::journal::Journal;
use crate::undo::ledger::{Ledger, StepHook};
use crate::undo::recovery;

/// Configures a [`LinuxGuest`].
#[derive(Debug, Clone)]
pub struct LinuxGuestBuilder {
    config: Config,
    device_mark: Option<String>,
    at_journal_change: Option<fn()>,
    at_step: Option<StepHook>,
}

impl Default for LinuxGuestBuilder {
    fn default() -> Self {
        LinuxGuestBuilder {
            config: Config {
                transports: Transports::new(),
                busy_timeout: Duration::from_secs(1),
                device_timeout: Duration::from_secs(10),
                format_timeout: Duration::from_secs(60),
                allowed: Vec::new(),
                keys: None,
                overlay_mark: "blockmount".to_owned(),
                kernel: Kernel::default(),
            },
            device_mark: None,
            at_journal_change: None,
            at_step: None,
        }
    }
}

impl LinuxGuest {
    /// Starts from the defaults: no transports, every target that is not the system's.
    pub fn builder() -> LinuxGuestBuilder {
        LinuxGuestBuilder::default()
    }
}

impl LinuxGuestBuilder {
    /// The transports whose devices can be mounted and unplugged.
    #[must_use]
    pub fn transports(mut self, transports: Transports) -> Self {
        self.config.transports = transports;
        self
    }

    /// Adds the resolver of one transport.
    #[must_use]
    pub fn resolver(mut self, scheme: impl Into<String>, resolver: Arc<dyn Resolver>) -> Self {
        self.config.transports = self.config.transports.with(scheme, resolver);
        self
    }

    /// Adds the unplugger of one transport.
    #[must_use]
    pub fn unplugger(mut self, scheme: impl Into<String>, unplugger: Arc<dyn Unplugger>) -> Self {
        self.config.transports = self.config.transports.with_unplugger(scheme, unplugger);
        self
    }

    /// How long a mount or unmount of what is in use is tried again before it is `Busy`; one second by
    /// default.
    #[must_use]
    pub fn busy_timeout(mut self, timeout: Duration) -> Self {
        self.config.busy_timeout = timeout;
        self
    }

    /// How long a resolved device may take to become ready, and a partition to appear; ten seconds
    /// by default. How long a device may take to be found is up to its resolver.
    #[must_use]
    pub fn device_timeout(mut self, timeout: Duration) -> Self {
        self.config.device_timeout = timeout;
        self
    }

    /// How long making a filesystem may take, and checking one, after which the tool is killed; and giving the files of a
    /// volume to a [group](blockmount::FsGroup). One minute by default. Making one on a fresh disk takes less than a second,
    /// giving 10,000 files a fraction of one.
    #[must_use]
    pub fn format_timeout(mut self, timeout: Duration) -> Self {
        self.config.format_timeout = timeout;
        self
    }

    /// Allows targets only below these directories, and not at them. Without any, every target is
    /// allowed that is no directory of the system.
    #[must_use]
    pub fn allow_targets_under<P: Into<PathBuf>>(
        mut self,
        roots: impl IntoIterator<Item = P>,
    ) -> Self {
        self.config
            .allowed
            .extend(roots.into_iter().map(Into::into));
        self
    }

    /// Where the keys of encrypted disks are that a request names by their file
    /// ([`KeySource::File`](blockmount::KeySource::File)). Directory and files must belong to the user of this process and be
    /// private; a key has 64 bytes, and one for a volume of LUKS2 what that wants. By default there are none.
    #[must_use]
    pub fn key_directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.config.keys = Some(directory.into());
        self
    }

    /// What overlays have as their source in the table of mounts, so that a clean-up can
    /// tell them; `blockmount` by default.
    #[must_use]
    pub fn overlay_mark(mut self, mark: impl Into<String>) -> Self {
        self.config.overlay_mark = mark.into();
        self
    }

    /// What the UUIDs of mapped devices end with, by which a clean-up can tell whose they are:
    /// [`DeviceMapper::marked`](crate::mapper::DeviceMapper::marked). Up to 40 visible characters of ASCII without a slash. By
    /// default nothing.
    #[must_use]
    pub fn device_mark(mut self, mark: impl Into<String>) -> Self {
        self.device_mark = Some(mark.into());
        self
    }

    /// Does without what this version of Linux did not have yet. For tests of the old ways.
    #[doc(hidden)]
    #[must_use]
    pub fn as_on_linux(mut self, major: u32, minor: u32) -> Self {
        self.config.kernel = Kernel::version(major, minor);
        self
    }

    /// Calls this before and after each change of the journal. For tests that kill the process there.
    #[doc(hidden)]
    #[must_use]
    pub fn at_journal_change(mut self, hook: fn()) -> Self {
        self.at_journal_change = Some(hook);
        self
    }

    /// Calls this at each step of a mount and of its tear-down, which fails if this does. For tests of what is left then.
    #[doc(hidden)]
    #[must_use]
    pub fn at_step(mut self, hook: fn() -> Result<(), BackendError>) -> Self {
        self.at_step = Some(hook);
        self
    }

    /// The guest. Nothing is touched before it is asked for something.
    pub fn build(self) -> LinuxGuest {
        let mut ledger = Ledger::default();
        ledger.fail_at(self.at_step);
        ledger.mark_devices(self.device_mark);
        ledger.wait_for_formats(self.config.format_timeout);
        LinuxGuest::new(self.config, ledger)
    }

    /// The guest, with a journal in this directory of all there is to undo: one that is killed at any
    /// moment and built again with the same journal unmounts by the target what the earlier one has
    /// mounted, and keeps to what it has promised about devices and scratch directories.
    ///
    /// Mounts of the earlier process that are there still are taken over, what it left half done is
    /// undone, and what others have put in the place of its mounts is not touched. A record that
    /// cannot be used is renamed to `*.aside` and reported in the log.
    ///
    /// A record of another version of this crate is one that cannot be used.
    ///
    /// The directory is made if it is missing. It should live as long as the mounts do, and be as
    /// quick as memory: in `/run`, such as `/run/blockmount/agent`. In a journal that outlived a
    /// reboot, all records are set aside.
    ///
    /// # Errors
    ///
    /// `Conflict` if the journal is about another namespace of mounts: what it is about may be there, so nothing is changed.
    /// `Busy` if another process uses the journal, which is awaited for as long as the
    /// [`busy_timeout`](Self::busy_timeout), because one that was killed may not be gone yet;
    /// `Invalid` if others could write to the directory; otherwise as the system answers. Nothing
    /// that is found in the journal is an error.
    ///
    /// # Cancel safety
    ///
    /// What is begun is finished, and the journal is closed afterwards.
    pub async fn journal(self, directory: impl Into<PathBuf>) -> Result<LinuxGuest, BackendError> {
        let (config, hook, directory) = (self.config, self.at_journal_change, directory.into());
        let (at_step, device_mark) = (self.at_step, self.device_mark);
        let open = move || Journal::open(&directory, hook);
        let journal = retry_while_busy(config.busy_timeout, open).await?;
        let kernel = config.kernel;
        let (mut ledger, left) = blocking(move || recovery::recover(journal, kernel)).await?;
        ledger.fail_at(at_step);
        ledger.mark_devices(device_mark);
        ledger.wait_for_formats(config.format_timeout);
        let guest = LinuxGuest::new(config, ledger);
        guest.undo_left(left).await;
        Ok(guest)
    }
}
