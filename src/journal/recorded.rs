//! The records of a journal, sorted and checked against each other.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::PathBuf;

use super::{
    AttachmentRecord, HolderRecord, MountKey, MountRecord, Progress, Record, RecordKey,
    StackRecord, ViewRecord,
};
use crate::{BackendError, DeviceLocator, DiskId, Error, Step};

impl MountRecord {
    /// A device of the mount at which the disk that is recorded for it is not up.
    fn without_disk(&self, up: &HashSet<(DiskId, DeviceLocator)>) -> Option<&DeviceLocator> {
        let devices = self.key.options.devices().iter();
        let devices = devices.map(|device| &device.locator);
        let disks = self.devices.iter().map(Some).chain(std::iter::repeat(None));
        // Without any, they were attached without this manager.
        let devices = devices.zip(disks).filter(|_| !self.devices.is_empty());
        let mounted = self.disk.iter();
        let mounted = mounted.map(|disk| (&self.key.device, Some(disk)));
        let is_up = |device: &DeviceLocator, disk: Option<&DiskId>| {
            disk.is_some_and(|disk| up.contains(&(disk.clone(), device.clone())))
        };
        let mut all = mounted.chain(devices);
        let missing = all.find(|(device, disk)| !is_up(device, *disk));
        missing.map(|(device, _)| device)
    }
}

/// The records of one journal, by kind.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) attachments: Vec<AttachmentRecord>,
    pub(crate) mounts: Vec<MountRecord>,
    pub(crate) stacks: Vec<StackRecord>,
    pub(crate) views: Vec<ViewRecord>,
    pub(crate) holders: Vec<HolderRecord>,
    /// What no manager can have recorded, and why.
    pub(crate) refused: HashMap<RecordKey, String>,
}

impl Recorded {
    /// Sorts records, and tells those that no manager can have written. What is recorded of something whose record is
    /// gone already is none of them: a recovery that was killed leaves that.
    pub(crate) fn sort(records: Vec<Record>) -> Self {
        let mut keys = HashSet::new();
        let mut recorded = Recorded::default();
        for record in records {
            let key = record.key();
            if !keys.insert(key.clone()) {
                recorded.refuse(key, "it is recorded twice");
                continue;
            }
            match record {
                Record::Attachment(record) => recorded.attachments.push(record),
                Record::Mount(record) => {
                    if record.devices.len() > record.key.options.devices().len() {
                        recorded.refuse(key, "it has more disks than devices");
                    }
                    recorded.mounts.push(record);
                }
                Record::Stack(record) => {
                    if record.overlay.layers.len() != record.layers.len()
                        || record.overlay.scratch.is_some() != record.scratch.is_some()
                    {
                        recorded.refuse(key, "it does not say which mount each layer is");
                    }
                    recorded.stacks.push(record);
                }
                Record::View(record) => recorded.views.push(record),
                Record::Holder(record) => recorded.holders.push(record),
            }
        }
        recorded.tell_locators_apart();
        recorded.refuse_written();
        recorded.refuse_strange_views();
        recorded.refuse_doubles();
        recorded
    }

    fn refuse(&mut self, key: RecordKey, why: impl Into<String>) {
        self.refused.entry(key).or_insert_with(|| why.into());
    }

    /// The error that something is refused with, if it is.
    pub(crate) fn refusal(&self, key: &RecordKey) -> Option<Error> {
        let why = self.refused.get(key)?;
        let why = format!("the record of {key} makes no sense: {why}");
        Some(Error::new(Step::Recover, BackendError::invalid(why)))
    }

    /// A transport gives a locator to the next disk as soon as a detach has taken effect, which is before the record of the
    /// first one goes. That one is found by its disk alone.
    fn tell_locators_apart(&mut self) {
        let (ending, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.attachments)
            .into_iter()
            .partition(|record| record.progress == Progress::Ending);
        let mut taken = HashMap::new();
        for mut record in others.into_iter().chain(ending) {
            if let Some(locator) = &record.locator
                && let Some(first) = taken.insert(locator.clone(), record.id.clone())
            {
                taken.insert(locator.clone(), first.clone());
                if record.progress == Progress::Ending {
                    record.locator = None;
                } else {
                    for id in [first, record.id.clone()] {
                        let why = format!("two disks are recorded at {locator}");
                        self.refuse(RecordKey::Attachment(id), why);
                    }
                }
            }
            self.attachments.push(record);
        }
    }

    /// A disk that the VM cannot write to has no mount that can.
    fn refuse_written(&mut self) {
        let read_only = self
            .attachments
            .iter()
            .filter(|one| one.disk.is_read_only());
        let read_only: HashSet<&DiskId> = read_only.map(|one| &one.id).collect();
        let written = self.mounts.iter().filter(|mount| {
            let mut disks = mount.disks();
            !mount.key.options.is_read_only() && disks.any(|disk| read_only.contains(disk))
        });
        let written: Vec<_> = written.map(|mount| mount.key.clone()).collect();
        for key in written {
            let why = "it is recorded as writable, and its disk as read-only";
            self.refuse(RecordKey::Mount(key), why);
        }
    }

    /// A view shows what is at its source.
    fn refuse_strange_views(&mut self) {
        let mounts = self.mounts.iter();
        let mounts: HashMap<_, _> = mounts.map(|one| (&one.key, &one.target)).collect();
        let is_strange = |view: &&ViewRecord| {
            let at = view.mount.as_ref().and_then(|mount| mounts.get(mount));
            at.is_some_and(|at| **at != view.bind.source)
        };
        let strange = self.views.iter().filter(is_strange);
        let strange: Vec<_> = strange.map(|view| view.bind.target.clone()).collect();
        for target in strange {
            let why = "it shows something else than the mount that it names";
            self.refuse(RecordKey::View(target), why);
        }
    }

    /// A manager has each name of a disk once, and each path.
    fn refuse_doubles(&mut self) {
        let disks = self.attachments.iter();
        let disks = disks.map(|one| (&one.disk, RecordKey::Attachment(one.id.clone())));
        let mounts = self.mounts.iter();
        let mounts = mounts.map(|one| (&one.target, RecordKey::Mount(one.key.clone())));
        let stacks = self.stacks.iter().map(|one| &one.overlay.target);
        let stacks = stacks.map(|target| (target, RecordKey::Stack(target.clone())));
        let views = self.views.iter().map(|one| &one.bind.target);
        let views = views.map(|target| (target, RecordKey::View(target.clone())));
        let disks = doubles(disks).map(|key| (key, "two disks of its name are recorded"));
        let paths = doubles(mounts.chain(stacks).chain(views))
            .map(|key| (key, "its path is recorded twice"));
        let refused: Vec<_> = disks.chain(paths).collect();
        for (key, why) in refused {
            self.refuse(key, why);
        }
    }

    /// Refuses records that no manager can have written, and those of things that stand on nothing, or on what is not up:
    /// nothing was interrupted that could have left them so.
    pub(crate) fn ensure_whole(&self) -> Result<(), Error> {
        let refused = self.refused.keys().find_map(|key| self.refusal(key));
        refused.map_or(Ok(()), Err)?;
        let invalid = |why: String| Err(Error::new(Step::Recover, BackendError::invalid(why)));
        let mut up = HashSet::new();
        for record in &self.attachments {
            if record.progress == Progress::Up {
                let Some(locator) = &record.locator else {
                    return invalid(format!(
                        "disk {} is up, and nobody knows where",
                        record.disk
                    ));
                };
                up.insert((record.id.clone(), locator.clone()));
            }
        }
        let mut mounts = HashSet::new();
        for record in self
            .mounts
            .iter()
            .filter(|one| one.progress == Progress::Up)
        {
            if let Some(device) = record.without_disk(&up) {
                let target = record.target.display();
                return invalid(format!("{target} mounts {device}, which has not its disk"));
            }
            mounts.insert(record.key.clone());
        }
        let mut stacks = HashSet::new();
        for record in self
            .stacks
            .iter()
            .filter(|one| one.progress == Progress::Up)
        {
            let target = &record.overlay.target;
            let layers = record.layers.iter().chain(&record.scratch);
            if !layers.into_iter().all(|layer| mounts.contains(layer)) {
                return invalid(format!("a layer of {} is not mounted", target.display()));
            }
            stacks.insert(target.clone());
        }
        let mut views = HashSet::new();
        for record in self.views.iter().filter(|one| one.progress == Progress::Up) {
            let target = &record.bind.target;
            let is_shown = match &record.mount {
                Some(mount) => mounts.contains(mount),
                None => stacks.contains(&record.bind.source),
            };
            if !is_shown {
                return invalid(format!("what {} shows is not mounted", target.display()));
            }
            views.insert(target.clone());
        }
        for HolderRecord { name, of } in &self.holders {
            let there = match of {
                RecordKey::Attachment(disk) => up.iter().any(|(up, _)| up == disk),
                RecordKey::Mount(key) => mounts.contains(key),
                RecordKey::Stack(target) => stacks.contains(target),
                RecordKey::View(target) => views.contains(target),
                RecordKey::Holder(_) => false,
            };
            if !there {
                return invalid(format!("holder {name} has {of}, which is not up"));
            }
        }
        Ok(())
    }

    /// The disks that have mounts, or are further devices of some.
    pub(crate) fn mounted(&self) -> HashSet<DiskId> {
        let disks = self.mounts.iter().flat_map(MountRecord::disks);
        disks.cloned().collect()
    }

    /// The mounts that are layers of stacks, or have views.
    pub(crate) fn shown(&self) -> HashSet<MountKey> {
        let stacks = self.stacks.iter();
        let layers = stacks.flat_map(|stack| stack.layers.iter().chain(&stack.scratch));
        let views = self.views.iter().filter_map(|view| view.mount.as_ref());
        let mut shown: HashSet<MountKey> = layers.chain(views).cloned().collect();
        for stack in &self.stacks {
            let key = RecordKey::Stack(stack.overlay.target.clone());
            if self.refused.contains_key(&key) {
                let mounts = self.mounts.iter().filter(|mount| stack.may_have(mount));
                shown.extend(mounts.map(|mount| mount.key.clone()));
            }
        }
        for view in &self.views {
            let key = RecordKey::View(view.bind.target.clone());
            if self.refused.contains_key(&key) {
                let mounts = self.mounts.iter().filter(|mount| view.may_show(mount));
                shown.extend(mounts.map(|mount| mount.key.clone()));
            }
        }
        shown
    }

    /// Where stacks are that have views.
    pub(crate) fn shown_stacks(&self) -> HashSet<PathBuf> {
        let views = self.views.iter();
        let of_stacks = views.filter(|view| {
            let key = RecordKey::View(view.bind.target.clone());
            view.mount.is_none() || self.refused.contains_key(&key)
        });
        of_stacks.map(|view| view.bind.source.clone()).collect()
    }
}

/// The records that share what each must have alone.
fn doubles<T: Eq + Hash>(
    records: impl Iterator<Item = (T, RecordKey)>,
) -> impl Iterator<Item = RecordKey> {
    let mut sharing: HashMap<T, Vec<RecordKey>> = HashMap::new();
    for (of, key) in records {
        sharing.entry(of).or_default().push(key);
    }
    let doubles = sharing.into_values().filter(|keys| keys.len() > 1);
    doubles.flatten()
}

impl StackRecord {
    /// Whether a mount may be one of its layers, also if the record makes no sense: it is named, or at the path of a layer.
    pub(crate) fn may_have(&self, mount: &MountRecord) -> bool {
        let scratch = self.overlay.scratch.as_ref();
        self.layers.contains(&mount.key)
            || self.scratch.as_ref() == Some(&mount.key)
            || self.overlay.layers.contains(&mount.target)
            || scratch.is_some_and(|scratch| scratch.starts_with(&mount.target))
    }
}
