//! The virtual machines of a service, of which each activation is in one.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64};

use blockmount::{BackendError, Manager, Recovery, blocking};
use thiserror::Error;
use tonic::Status;

use super::activations::Options;
use super::identifiers::is_identifier;
use super::record::{Record, id_of};
use super::store::Store;

/// The label of an activation with the name of the virtual machine that it is in.
pub const VM_LABEL: &str = "blockmount.vm";

/// The name of a virtual machine: up to 76 letters and digits, with single `.`, `-` or `_` between them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

/// What is no name of a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "the name of a virtual machine is up to 76 letters and digits, with single '.', '-' or '_' between them"
)]
#[non_exhaustive]
pub struct InvalidVmName {}

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = InvalidVmName;

    fn from_str(text: &str) -> Result<Self, InvalidVmName> {
        match is_identifier(text) {
            true => Ok(VmName(text.to_owned())),
            false => Err(InvalidVmName {}),
        }
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A virtual machine, or the one guest of a service without names.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) name: Option<VmName>,
    pub(super) manager: Manager,
    pub(super) root: PathBuf,
    /// Whether it is this host.
    pub(super) here: bool,
    pub(super) store: Store,
    /// The number of the next activation.
    pub(super) next: AtomicU64,
    /// Why what is activated there is lost, once that is so.
    pub(super) lost: OnceLock<String>,
    /// Whether it is to go as soon as nothing is activated there.
    pub(super) is_retired: AtomicBool,
}

impl Vm {
    /// Reads the records of what is activated there, and changes nothing.
    pub(super) async fn load(
        name: Option<VmName>,
        recovery: &Recovery,
        options: &Options,
    ) -> Result<(Self, Vec<Record>), BackendError> {
        let directory = options.records.clone();
        let loaded = blocking(move || {
            let store = Store::open(&directory)?;
            let records = store.load()?;
            Ok((store, records))
        });
        let (store, records) = loaded.await?;
        let held = recovery.report().holders.iter();
        let held = held.filter_map(|holder| id_of(&holder.name));
        let last = held.chain(records.iter().map(|record| record.id)).max();
        let vm = Vm {
            name,
            manager: recovery.manager().clone(),
            root: options.root.clone(),
            here: options.here,
            store,
            next: AtomicU64::new(last.map_or(0, |last| last + 1)),
            lost: OnceLock::new(),
            is_retired: AtomicBool::new(false),
        };
        Ok((vm, records))
    }

    /// Its name as text, if it has one.
    pub(super) fn called(&self) -> Option<&str> {
        self.name.as_ref().map(VmName::as_str)
    }

    /// That it is lost and why, if it is.
    pub(super) fn why_lost(&self) -> Option<String> {
        let why = self.lost.get()?;
        Some(match self.called() {
            Some(name) => format!("the virtual machine {name} is lost: {why}"),
            None => format!("the guest is lost: {why}"),
        })
    }

    /// Has the labels of an activation say that it is here, where it stays.
    pub(super) fn label(&self, labels: &mut BTreeMap<String, String>) -> Result<(), Status> {
        let before = match &self.name {
            Some(name) => labels.insert(VM_LABEL.to_owned(), name.to_string()),
            None => labels.get(VM_LABEL).cloned(),
        };
        match before {
            Some(other) if self.called() != Some(&other) => Err(Status::invalid_argument(format!(
                "the label {VM_LABEL} is the service's, and an activation stays in its virtual machine"
            ))),
            _ => Ok(()),
        }
    }
}
