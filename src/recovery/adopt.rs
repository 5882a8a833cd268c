//! Asks the backends what is there, and puts it into the tables.

use std::collections::{HashMap, HashSet};

use futures_util::future::join_all;
use parking_lot::Mutex;

use super::{Claim, Found, FoundHolder, FoundState, Held, Recovery, Report};
use crate::holders::Holders;
use crate::journal::{
    AttachmentRecord, MountKey, MountRecord, Progress, RecordKey, Recorded, StackRecord, ViewRecord,
};
use crate::lease::Left;
use crate::mount::Attachments;
use crate::{
    Attachment, DeviceLocator, DiskId, Error, ErrorKind, HolderName, Manager, Mount, Presence,
    Stack, View, stack, view,
};

type Answer<T> = Result<Presence<T>, Error>;

/// The records, each with the answer of its backend.
pub(super) struct Adopted {
    recorded: Recorded,
    attachments: Vec<Answer<DeviceLocator>>,
    mounts: Vec<Answer<()>>,
    stacks: Vec<Answer<()>>,
    views: Vec<Answer<()>>,
}

impl Adopted {
    /// From the bottom up: a mounter may need the devices, a combiner the mounts.
    pub(super) async fn ask(manager: &Manager, recorded: Recorded) -> Self {
        let disks = recorded.attachments.iter();
        let attachments = join_all(disks.map(|one| manager.attachments().adopt(one))).await;
        let mounts = recorded.mounts.iter();
        let mounts = join_all(mounts.map(|one| manager.mounts().adopt(one))).await;
        let stacks = recorded.stacks.iter();
        let stacks = join_all(stacks.map(|one| stack::adopt(&manager.stacks, one))).await;
        let views = recorded.views.iter();
        let views = join_all(views.map(|one| view::adopt(&manager.views, one))).await;
        Adopted {
            recorded,
            attachments,
            mounts,
            stacks,
            views,
        }
    }

    /// Never waits: a recovery is whole, or it never was.
    pub(super) fn restore(self, manager: Manager, holders: Holders) -> Result<Recovery, Error> {
        let mut restoring = Restoring {
            mounted: self.recorded.mounted(),
            shown: self.recorded.shown(),
            manager,
            holders,
            report: Report::default(),
            attachments: HashMap::new(),
            mounts: HashMap::new(),
            stacks: HashMap::new(),
            views: HashMap::new(),
            used: HashSet::new(),
        };
        match restoring.everything(self) {
            Ok(claims) => Ok(restoring.finish(claims)),
            Err(error) => {
                // Dropping the handles would tear down what they stand for.
                std::mem::forget(restoring);
                Err(error)
            }
        }
    }
}

/// What has been put into the tables so far, with one share of each.
struct Restoring {
    manager: Manager,
    holders: Holders,
    report: Report,
    /// The disks that have mounts.
    mounted: HashSet<DiskId>,
    /// The mounts that are layers of stacks, or have views.
    shown: HashSet<MountKey>,
    attachments: HashMap<DiskId, (Attachment, Left)>,
    mounts: HashMap<MountKey, (Mount, Left)>,
    stacks: HashMap<RecordKey, Stack>,
    views: HashMap<RecordKey, View>,
    /// What others keep up.
    used: HashSet<RecordKey>,
}

impl Restoring {
    fn everything(&mut self, adopted: Adopted) -> Result<HashMap<HolderName, Claim>, Error> {
        let Recorded {
            attachments,
            mounts,
            stacks,
            views,
            holders,
        } = adopted.recorded;
        for (record, answer) in attachments.into_iter().zip(adopted.attachments) {
            self.attachment(record, answer)?;
        }
        for (record, answer) in mounts.iter().zip(adopted.mounts) {
            self.mount(record, answer)?;
        }
        for (record, answer) in stacks.iter().zip(adopted.stacks) {
            self.stack(record, answer)?;
        }
        for (record, answer) in views.iter().zip(adopted.views) {
            self.view(record, answer)?;
        }
        let mut claims = HashMap::new();
        for holder in holders {
            let claim = self.claim(&holder.name, &holder.of);
            self.report.holders.push(FoundHolder {
                name: holder.name.clone(),
                of: holder.of,
                is_up: matches!(claim, Claim::Held(_)),
            });
            claims.insert(holder.name, claim);
        }
        Ok(claims)
    }

    fn attachment(
        &mut self,
        mut record: AttachmentRecord,
        answer: Answer<DeviceLocator>,
    ) -> Result<(), Error> {
        let id = record.id.clone();
        let mut whole = record.progress == Progress::Up && !record.unplugged;
        if let Ok(Presence::Present(locator)) = &answer {
            whole &= record.locator.as_ref() == Some(locator);
            record.locator = Some(locator.clone());
        }
        let below = self.mounted.contains(&id) && record.locator.is_some();
        let key = RecordKey::Attachment(id.clone());
        if let Some(left) = self.what_is_left(key, answer, whole, below)
            && let Some(attachment) = self.manager.attachments().restore(&record, left)?
        {
            self.attachments.insert(id, (attachment, left));
        }
        Ok(())
    }

    fn mount(&mut self, record: &MountRecord, answer: Answer<()>) -> Result<(), Error> {
        let is_up = |disk: &DiskId| matches!(self.attachments.get(disk), Some((_, Left::Up)));
        let on_whole = record.disks().all(is_up);
        let share = |disk: &DiskId| Some(self.attachments.get(disk)?.0.share(None));
        let under = Attachments {
            mounted: record.disk.as_ref().and_then(share),
            devices: record.devices.iter().filter_map(share).collect(),
        };
        let whole = record.progress == Progress::Up && on_whole;
        let below = self.shown.contains(&record.key);
        let key = RecordKey::Mount(record.key.clone());
        let Some(left) = self.what_is_left(key, answer, whole, below) else {
            return Ok(());
        };
        let disks = under.mounted.iter().chain(&under.devices);
        self.used.extend(disks.map(Attachment::key));
        if let Some(mount) = self.manager.mounts().restore(record, under, left)? {
            self.mounts.insert(record.key.clone(), (mount, left));
        }
        Ok(())
    }

    fn stack(&mut self, record: &StackRecord, answer: Answer<()>) -> Result<(), Error> {
        let under = |key: &MountKey| self.mounts.get(key);
        let all = || record.layers.iter().chain(&record.scratch);
        let on_whole = all().all(|key| under(key).is_some_and(|(_, left)| *left == Left::Up));
        let whole = record.progress == Progress::Up && on_whole;
        let key = RecordKey::Stack(record.overlay.target.clone());
        let Some(left) = self.what_is_left(key.clone(), answer, whole, false) else {
            return Ok(());
        };
        let share = |key: &MountKey| Some(self.mounts.get(key)?.0.share(None));
        let layers: Vec<Mount> = record.layers.iter().filter_map(share).collect();
        let scratch = record.scratch.as_ref().and_then(share);
        self.used
            .extend(layers.iter().chain(&scratch).map(Mount::key));
        let stacks = &self.manager.stacks;
        if let Some(stack) = stack::restore(stacks, record, layers, scratch, left)? {
            self.stacks.insert(key, stack);
        }
        Ok(())
    }

    fn view(&mut self, record: &ViewRecord, answer: Answer<()>) -> Result<(), Error> {
        let mount = self.mounts.get(&record.mount);
        let on_whole = mount.is_some_and(|(_, left)| *left == Left::Up);
        let mount = mount.map(|(mount, _)| mount.share(None));
        let whole = record.progress == Progress::Up && on_whole;
        let key = RecordKey::View(record.bind.target.clone());
        let Some(left) = self.what_is_left(key.clone(), answer, whole, false) else {
            return Ok(());
        };
        self.used.extend(mount.iter().map(Mount::key));
        let views = &self.manager.views;
        if let Some(view) = view::restore(views, record, mount, left)? {
            self.views.insert(key, view);
        }
        Ok(())
    }

    /// What is left of something: nothing, if its record is gone as well. `below`: it has something above it that goes first.
    fn what_is_left<T>(
        &mut self,
        key: RecordKey,
        answer: Answer<T>,
        whole: bool,
        below: bool,
    ) -> Option<Left> {
        let gone = match &answer {
            Ok(Presence::Absent) => true,
            Err(error) => error.kind() == ErrorKind::Gone,
            _ => false,
        };
        let left = if gone {
            self.holders.records().remove(|| key.clone());
            None
        } else if whole && matches!(answer, Ok(Presence::Present(_))) {
            Some(Left::Up)
        } else if below {
            Some(Left::Doubtful)
        } else {
            Some(Left::Pending)
        };
        let state = match left {
            Some(Left::Up) => FoundState::Up,
            Some(_) => FoundState::Pending,
            None => FoundState::Gone,
        };
        self.report.found.push(Found {
            what: key,
            state,
            error: answer.err(),
        });
        left
    }

    fn claim(&mut self, name: &HolderName, of: &RecordKey) -> Claim {
        let holders = self.holders.clone();
        let holder = || holders.restore(name.clone(), of.clone());
        let held = match of {
            RecordKey::Attachment(disk) => match self.attachments.get(disk) {
                Some((there, Left::Up)) => Held::Attachment(there.share(Some(holder()))),
                _ => return Claim::Lost(of.clone()),
            },
            RecordKey::Mount(key) => match self.mounts.get(key) {
                Some((there, Left::Up)) => Held::Mount(there.share(Some(holder()))),
                _ => return Claim::Lost(of.clone()),
            },
            RecordKey::View(_) => match self.views.get(of) {
                Some(there) => Held::View(there.share(Some(holder()))),
                None => return Claim::Lost(of.clone()),
            },
            _ => match self.stacks.get(of) {
                Some(there) => Held::Stack(there.share(Some(holder()))),
                None => return Claim::Lost(of.clone()),
            },
        };
        self.used.insert(of.clone());
        Claim::Held(held)
    }

    /// The recovery keeps one share of what nothing else keeps up.
    fn finish(self, claims: HashMap<HolderName, Claim>) -> Recovery {
        let mut unclaimed = Vec::new();
        let attachments = self.attachments.into_values();
        let mounts = self.mounts.into_values();
        let all = attachments
            .map(|(attachment, _)| (attachment.key(), Held::Attachment(attachment)))
            .chain(mounts.map(|(mount, _)| (mount.key(), Held::Mount(mount))))
            .chain(
                self.stacks
                    .into_iter()
                    .map(|(key, stack)| (key, Held::Stack(stack))),
            )
            .chain(
                self.views
                    .into_iter()
                    .map(|(key, view)| (key, Held::View(view))),
            );
        for (key, held) in all {
            match self.used.contains(&key) {
                // Others have a share, so this one is not the last.
                true => drop(held),
                false => unclaimed.push(held),
            }
        }
        Recovery {
            manager: self.manager,
            holders: self.holders,
            report: self.report,
            claims: Mutex::new(claims),
            unclaimed,
            settled: false,
        }
    }
}
