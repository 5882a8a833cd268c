//! Looking at what is activated.

use serde::{Deserialize, Serialize};

use super::super::entry::{Entry, Holding};
use super::Activations;

/// One activation, for people and programs that watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ActivationStatus {
    /// The virtual machine that it is in, where the service has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// Its number in its guest, which is in the names of its mount points.
    pub id: u64,
    /// How it is.
    pub state: ActivationState,
    /// How many mounts of its list are up.
    pub mounts: usize,
    /// Whether it ends with the server.
    pub temporary: bool,
    /// Why it could not be taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// How an activation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ActivationState {
    /// It is up.
    Up,
    /// It is up, of an earlier process, and no client has asked for it since.
    Unclaimed,
    /// It is being deactivated.
    Ending,
    /// It could not be deactivated, or not all of it; deactivating it again tries it again.
    Pending,
}

impl Activations {
    /// All that is activated, by namespace and name. It claims nothing.
    pub fn inspect(&self) -> Vec<ActivationStatus> {
        let mut seen: Vec<_> = self.table().values().map(status).collect();
        seen.sort_by(|one, other| {
            (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name))
        });
        seen
    }
}

fn status(entry: &Entry) -> ActivationStatus {
    let (state, why) = match &entry.held {
        Holding::Up(_) if entry.unclaimed => (ActivationState::Unclaimed, None),
        Holding::Up(_) => (ActivationState::Up, None),
        Holding::Taken => (ActivationState::Ending, None),
        Holding::Unreleased(error) => (ActivationState::Pending, Some(error.to_string())),
    };
    let info = &entry.record.info;
    ActivationStatus {
        vm: entry.vm.called().map(str::to_owned),
        namespace: info.namespace.clone(),
        name: info.name.clone(),
        id: entry.record.id,
        state,
        mounts: info.active.len(),
        temporary: entry.record.temporary,
        why,
    }
}
