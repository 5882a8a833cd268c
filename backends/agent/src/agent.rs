//! The agent itself: what is served to a host, over whatever stream.

use std::io;
use std::path::PathBuf;

use blockmount_bridge::{GuestServer, gcs};
use blockmount_linux::{LinuxGuest, Transports};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use crate::clock;
use crate::error::Context;
use crate::guest::AgentGuest;
use crate::{AgentError, GuestTransport, Service, ServiceError, Timeouts};

/// Below these the hosts that are known mount: Hyper-V's (the first three), and our own.
pub const ROOTS: [&str; 4] = ["/run/mounts", "/run/gcs", "/run/layers", "/run/blockmount"];

/// Mounts, combines and unplugs in this guest what its host asks for. Cloning is cheap; clones are one agent.
///
/// What is mounted stays mounted when an agent ends. There is one agent in a guest at a time: the journal is locked.
#[derive(Debug, Clone)]
pub struct Agent {
    server: GuestServer,
    /// For hosts of Hyper-V. The engine keeps the order of calls for one target over both.
    gcs: gcs::GuestServer,
}

impl Agent {
    /// An agent that knows no transport yet.
    pub fn builder() -> AgentBuilder {
        AgentBuilder::default()
    }
}

impl Service for Agent {
    /// Serves a host of ours, or one of Hyper-V: its first bytes tell which.
    async fn serve<S>(&self, mut stream: S) -> Result<(), ServiceError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let mut first = [0; 4];
        match stream.read_exact(&mut first).await {
            // The host has said nothing that could be answered.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        let (reader, writer) = tokio::io::split(stream);
        let whole = tokio::io::join((&first[..]).chain(reader), writer);
        match gcs::is_begun_by(first) {
            true => Ok(self.gcs.serve(whole).await?),
            false => Ok(self.server.serve(whole).await?),
        }
    }
}

/// Configures an [`Agent`].
#[derive(Debug)]
pub struct AgentBuilder {
    pub(crate) transports: Vec<Box<dyn GuestTransport>>,
    pub(crate) roots: Vec<PathBuf>,
    pub(crate) journal: PathBuf,
    pub(crate) keys: Option<PathBuf>,
    pub(crate) sets_clock: bool,
    pub(crate) timeouts: Timeouts,
}

impl Default for AgentBuilder {
    fn default() -> Self {
        AgentBuilder {
            transports: Vec::new(),
            roots: ROOTS.map(PathBuf::from).into(),
            journal: "/run/blockmount-agent".into(),
            keys: None,
            sets_clock: false,
            timeouts: Timeouts::default(),
        }
    }
}

impl AgentBuilder {
    /// Registers a transport, in place of one with the same scheme.
    #[must_use]
    pub fn transport(mut self, transport: impl GuestTransport + 'static) -> Self {
        self.transports
            .retain(|known| known.scheme() != transport.scheme());
        self.transports.push(Box::new(transport));
        self
    }

    /// Mounts only below these directories, and stacks only what is there, in place of [`ROOTS`].
    #[must_use]
    pub fn roots<P: Into<PathBuf>>(mut self, roots: impl IntoIterator<Item = P>) -> Self {
        self.roots = roots.into_iter().map(Into::into).collect();
        self
    }

    /// Where what is mounted is noted, so that the agent that is started after a killed one can undo it, in place of
    /// `/run/blockmount-agent`.
    #[must_use]
    pub fn journal(mut self, directory: impl Into<PathBuf>) -> Self {
        self.journal = directory.into();
        self
    }

    /// Where keys are that a host may name by their file: a private directory of root with private files of 64 bytes.
    /// Without it, hosts can name only keys of the keyring of root.
    #[must_use]
    pub fn keys(mut self, directory: impl Into<PathBuf>) -> Self {
        self.keys = Some(directory.into());
        self
    }

    /// Sets this machine's clock to that of each host that connects, and seeds its random numbers with the host's: for a
    /// machine that may be restored from a saved state. By default only the agent of a machine whose pid 1 is this program
    /// does so.
    #[must_use]
    pub fn set_clock(mut self) -> Self {
        self.sets_clock = true;
        self
    }

    /// Waits so long, in place of the defaults.
    #[must_use]
    pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
        self.timeouts = timeouts;
        self
    }

    /// The kernel modules that its transports need, by name: a guest's image must have them.
    pub fn modules(&self) -> Vec<&str> {
        let transports = self.transports.iter();
        transports
            .flat_map(|known| known.modules())
            .copied()
            .collect()
    }

    /// The agent, with what an earlier one has left to it.
    ///
    /// # Errors
    ///
    /// If the journal cannot be used, most of all because another agent uses it.
    pub async fn build(self) -> Result<Agent, AgentError> {
        let mut transports = Transports::new();
        for transport in &self.transports {
            if let Some(devices) = transport.devices(self.timeouts) {
                let scheme = transport.scheme();
                transports = transports
                    .with(scheme, devices.resolver)
                    .with_unplugger(scheme, devices.unplugger);
            }
        }
        let mut engine = LinuxGuest::builder()
            .transports(transports)
            .busy_timeout(self.timeouts.busy)
            .format_timeout(self.timeouts.format)
            .allow_targets_under(&self.roots);
        if let Some(keys) = self.keys {
            engine = engine.key_directory(keys);
        }
        let engine = engine
            .journal(&self.journal)
            .await
            .context(|| format!("cannot use the journal in {}", self.journal.display()))?;
        let guest = AgentGuest {
            engine,
            roots: self.roots.into(),
            makes_scratch: false,
        };
        let of_hyper_v = AgentGuest {
            makes_scratch: true,
            ..guest.clone()
        };
        Ok(Agent {
            server: match self.sets_clock {
                true => GuestServer::with_greeting(guest, clock::learn),
                false => GuestServer::new(guest),
            },
            gcs: gcs::GuestServer::new(of_hyper_v),
        })
    }
}
