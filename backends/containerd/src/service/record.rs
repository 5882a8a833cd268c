//! What is known of an activation, and kept for the next process.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockmount::HolderName;
use serde::{Deserialize, Serialize};
use tonic::Status;

use crate::{Mount, Plan};

/// One list that is activated (`containerd.types.ActivationInfo`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Info {
    /// The namespace in which the name is its own.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What is up, in the order of the list.
    pub active: Vec<ActiveMount>,
    /// What is left for the caller to mount, after that.
    pub system: Vec<Mount>,
    /// Its labels, as the caller gave them.
    pub labels: BTreeMap<String, String>,
}

/// A mount that is up (`containerd.types.ActiveMount`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ActiveMount {
    /// The mount, with its transforms done.
    pub mount: Mount,
    /// Since when, as time since 1970.
    pub mounted_at: Duration,
    /// Where in the guest; empty for a `loop` whose disk a later mount of the list has taken.
    pub mount_point: PathBuf,
}

/// An activation, with what is needed to take it over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) id: u64,
    pub(super) progress: Progress,
    /// Whether it ends with the server.
    pub(super) temporary: bool,
    pub(super) info: Info,
    /// Whether something in its list can be written to. Records of earlier versions do not say.
    #[serde(default)]
    pub(super) is_writable: bool,
    /// By which names its handles are held in the manager's journal.
    pub(super) holders: Vec<HolderName>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Progress {
    /// Being activated: perhaps nothing of it is up.
    Begun,
    Up,
    /// Being deactivated: perhaps not all of it is up.
    Ending,
}

impl Info {
    /// What is up once a plan was performed, in its final words.
    pub(super) fn fill(&mut self, placed: Plan, temporary: bool) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mounted_at = now.unwrap_or_default();
        let active = placed.steps.into_iter().map(|step| ActiveMount {
            mount: step.mount,
            mounted_at,
            mount_point: step.mount_point,
        });
        self.active = active.collect();
        self.system = placed.system;
        // Who asks for a short time mounts what is left without a look at what is up: containerd adds this too.
        if let (true, true, Some(last)) = (temporary, self.system.is_empty(), self.active.last()) {
            let source = last.mount_point.display().to_string();
            self.system.push(Mount::new("bind", source).option("rbind"));
        }
    }

    /// Changes labels: `labels` among the fields replaces all, `labels.KEY` the one that is given, or removes it; no field at all
    /// means all labels.
    pub(super) fn update_labels(
        &mut self,
        labels: BTreeMap<String, String>,
        fields: &[String],
    ) -> Result<(), Status> {
        let all = fields.is_empty() || fields.iter().any(|field| field == "labels");
        for field in fields.iter().filter(|field| *field != "labels") {
            let Some(label) = field.strip_prefix("labels.") else {
                return Err(Status::invalid_argument(format!(
                    "{field:?} cannot be changed; labels can"
                )));
            };
            match labels.get(label) {
                Some(value) => drop(self.labels.insert(label.to_owned(), value.clone())),
                None => drop(self.labels.remove(label)),
            }
        }
        if all {
            self.labels = labels;
        }
        Ok(())
    }

    pub(super) fn key(&self) -> Key {
        (self.namespace.clone(), self.name.clone())
    }
}

/// Namespace and name.
pub(super) type Key = (String, String);

/// The name by which the handles of an activation are held begins so.
pub(super) fn holder_of(id: u64) -> String {
    format!("activation {id}")
}

/// The number in such a name.
pub(super) fn id_of(holder: &HolderName) -> Option<u64> {
    let rest = holder.as_str().strip_prefix("activation ")?;
    rest.split('/').next()?.parse().ok()
}
