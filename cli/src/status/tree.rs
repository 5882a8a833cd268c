//! What a run says of itself: one tree, which the table, the page and the metrics are made of.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use blockmount::{Inspection, Manager};
use blockmount_containerd::service::{ActivationStatus, Activations};
use serde::{Deserialize, Serialize};

/// A run that holds something, at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The run's id.
    pub(crate) run: String,
    pub(crate) process: u32,
    /// `mount` or `serve`.
    pub(crate) command: String,
    /// The name that it was given.
    pub(crate) name: Option<String>,
    /// The name of the virtual machine, where a server has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) vm: Option<String>,
    /// `local`, `qemu`, or `foreign` for a virtual machine that somebody else has started.
    pub(crate) guest: String,
    /// The tree of a mount, the socket of a server.
    pub(crate) at: String,
    /// Since when it holds it.
    pub(crate) up_seconds: u64,
    /// Why what is in its guest is lost, once that is so: its virtual machine has ended, or its agent does not come back.
    #[serde(default)]
    pub(crate) lost: Option<String>,
    /// What clients of a server have activated.
    pub(crate) activations: Vec<ActivationStatus>,
    pub(crate) manager: Inspection,
}

/// Where a run reads its status.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) run: String,
    pub(crate) command: &'static str,
    pub(crate) name: Option<String>,
    pub(crate) vm: Option<String>,
    pub(crate) guest: &'static str,
    pub(crate) at: String,
    pub(crate) since: Instant,
    /// Set by whoever sees it.
    pub(crate) lost: Arc<OnceLock<String>>,
    pub(crate) manager: Manager,
    pub(crate) activations: Option<Activations>,
}

impl Source {
    pub(crate) fn read(&self) -> Status {
        let activations = self.activations.as_ref().map(Activations::inspect);
        let mut activations = activations.unwrap_or_default();
        activations.retain(|activation| activation.vm == self.vm);
        Status {
            run: self.run.clone(),
            process: std::process::id(),
            command: self.command.to_owned(),
            name: self.name.clone(),
            vm: self.vm.clone(),
            guest: self.guest.to_owned(),
            at: self.at.clone(),
            up_seconds: self.since.elapsed().as_secs(),
            lost: self.lost.get().cloned(),
            activations,
            manager: self.manager.inspect(),
        }
    }
}
