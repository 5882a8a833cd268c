//! Asks the backends what is there, and puts it into the tables.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tracing::warn;

use super::{Claim, Found, FoundHolder, FoundState, Held, Recovery, Report};
use crate::holders::Holders;
use crate::journal::{
    AttachmentRecord, MountKey, MountRecord, Progress, RecordKey, Recorded, StackRecord, ViewRecord,
};
use crate::lease::Left;
use crate::mount::Attachments;
use crate::view::Source;
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
    pub(super) fn restore(self, manager: Manager, holders: Holders) -> Recovery {
        let mut restoring = Restoring {
            mounted: self.recorded.mounted(),
            shown: self.recorded.shown(),
            shown_stacks: self.recorded.shown_stacks(),
            kept: HashSet::new(),
            refused: HashMap::new(),
            manager,
            holders,
            report: Report::default(),
            attachments: HashMap::new(),
            mounts: HashMap::new(),
            stacks: HashMap::new(),
            views: HashMap::new(),
            used: HashSet::new(),
        };
        let claims = restoring.everything(self);
        restoring.finish(claims)
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
    /// Where stacks are that have views.
    shown_stacks: HashSet<PathBuf>,
    /// What is named by what is refused, and must stay up.
    kept: HashSet<RecordKey>,
    /// What is refused, and why.
    refused: HashMap<RecordKey, Error>,
    attachments: HashMap<DiskId, (Attachment, Left)>,
    mounts: HashMap<MountKey, (Mount, Left)>,
    stacks: HashMap<RecordKey, (Stack, Left)>,
    views: HashMap<RecordKey, (View, Left)>,
    /// What others keep up.
    used: HashSet<RecordKey>,
}

impl Restoring {
    fn everything(&mut self, adopted: Adopted) -> HashMap<HolderName, Claim> {
        let refused = adopted.recorded.refused.keys();
        let refused = refused.filter_map(|key| Some((key.clone(), adopted.recorded.refusal(key)?)));
        self.refused = refused.collect();
        let Recorded {
            attachments,
            mounts,
            stacks,
            views,
            holders,
            refused: _,
        } = adopted.recorded;
        for (record, answer) in attachments.into_iter().zip(adopted.attachments) {
            self.attachment(record, answer);
        }
        for (record, answer) in mounts.iter().zip(adopted.mounts) {
            self.mount(record, answer);
        }
        for (record, answer) in stacks.iter().zip(adopted.stacks) {
            self.stack(record, answer, &mounts);
        }
        for (record, answer) in views.iter().zip(adopted.views) {
            self.view(record, answer, &mounts);
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
        claims
    }

    fn attachment(&mut self, mut record: AttachmentRecord, answer: Answer<DeviceLocator>) {
        let id = record.id.clone();
        let mut whole = record.progress == Progress::Up && !record.unplugged;
        if let Ok(Presence::Present(locator)) = &answer {
            whole &= record.locator.as_ref() == Some(locator);
            record.locator = Some(locator.clone());
        }
        let below = self.mounted.contains(&id) && record.locator.is_some();
        let key = RecordKey::Attachment(id.clone());
        let Some(left) = self.what_is_left(&key, &answer, whole, below) else {
            return;
        };
        let (attachment, refused) = self.manager.attachments().restore(&record, left);
        let left = self.found(key, left, answer.err(), refused);
        if let Some(attachment) = attachment {
            self.attachments.insert(id, (attachment, left));
        }
    }

    fn mount(&mut self, record: &MountRecord, answer: Answer<()>) {
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
        let Some(left) = self.what_is_left(&key, &answer, whole, below) else {
            return;
        };
        let disks = under.mounted.iter().chain(&*under.devices);
        self.used.extend(disks.map(Attachment::key));
        let (mount, refused) = self.manager.mounts().restore(record, under, left);
        let left = self.found(key, left, answer.err(), refused);
        if let Some(mount) = mount {
            self.mounts.insert(record.key.clone(), (mount, left));
        }
    }

    fn stack(&mut self, record: &StackRecord, answer: Answer<()>, mounts: &[MountRecord]) {
        let under = |key: &MountKey| self.mounts.get(key);
        let all = || record.layers.iter().chain(&record.scratch);
        let on_whole = all().all(|key| under(key).is_some_and(|(_, left)| *left == Left::Up));
        let whole = record.progress == Progress::Up && on_whole;
        let below = self.shown_stacks.contains(&record.overlay.target);
        let key = RecordKey::Stack(record.overlay.target.clone());
        let Some(left) = self.what_is_left(&key, &answer, whole, below) else {
            return;
        };
        let share = |key: &MountKey| Some(self.mounts.get(key)?.0.share(None));
        let layers: Vec<Mount> = record.layers.iter().filter_map(share).collect();
        let scratch = record.scratch.as_ref().and_then(share);
        self.used
            .extend(layers.iter().chain(&scratch).map(Mount::key));
        let stacks = &self.manager.stacks;
        let (stack, refused) = stack::restore(stacks, record, layers, scratch, left);
        let left = self.found(key.clone(), left, answer.err(), refused);
        if left == Left::Refused {
            let below = mounts.iter().filter(|mount| record.may_have(mount));
            self.kept
                .extend(below.map(|mount| RecordKey::Mount(mount.key.clone())));
        }
        if let Some(stack) = stack {
            self.stacks.insert(key, (stack, left));
        }
    }

    fn view(&mut self, record: &ViewRecord, answer: Answer<()>, mounts: &[MountRecord]) {
        let (source, on_whole) = self.source_of(record);
        let whole = record.progress == Progress::Up && on_whole;
        let key = RecordKey::View(record.bind.target.clone());
        let Some(left) = self.what_is_left(&key, &answer, whole, false) else {
            return;
        };
        self.used.extend(source.iter().map(Source::key));
        let views = &self.manager.views;
        let (view, refused) = view::restore(views, record, source, left);
        let left = self.found(key.clone(), left, answer.err(), refused);
        if left == Left::Refused {
            let below = mounts.iter().filter(|mount| record.may_show(mount));
            self.kept
                .extend(below.map(|mount| RecordKey::Mount(mount.key.clone())));
            self.kept
                .insert(RecordKey::Stack(record.bind.source.clone()));
        }
        if let Some(view) = view {
            self.views.insert(key, (view, left));
        }
    }

    /// One more share of what a view shows, and whether that is up in whole.
    fn source_of(&self, record: &ViewRecord) -> (Option<Source>, bool) {
        let shared = match &record.mount {
            Some(key) => {
                let mount = self.mounts.get(key);
                mount.map(|(mount, left)| (Source::Mount(mount.share(None)), *left))
            }
            None => {
                let stack = self
                    .stacks
                    .get(&RecordKey::Stack(record.bind.source.clone()));
                stack.map(|(stack, left)| (Source::Stack(stack.share(None)), *left))
            }
        };
        match shared {
            Some((source, left)) => (Some(source), left == Left::Up),
            None => (None, false),
        }
    }

    /// What is left of something: nothing, if its record is gone as well. `below`: it has something above it that goes first.
    fn what_is_left<T>(
        &mut self,
        key: &RecordKey,
        answer: &Answer<T>,
        whole: bool,
        below: bool,
    ) -> Option<Left> {
        let gone = match &answer {
            Ok(Presence::Absent) => true,
            Err(error) => error.kind() == ErrorKind::Gone,
            _ => false,
        };
        if gone {
            self.holders.records().remove(|| key.clone());
            self.refused.remove(key);
            self.report.found.push(Found {
                what: key.clone(),
                state: FoundState::Gone,
                error: answer.as_ref().err().cloned(),
            });
            return None;
        }
        Some(if self.refused.contains_key(key) {
            Left::Refused
        } else if whole && matches!(answer, Ok(Presence::Present(_))) {
            Left::Up
        } else if below {
            Left::Doubtful
        } else {
            Left::Pending
        })
    }

    /// Reports what is put into the tables; what is left of it, which is refused if it contradicts what was put there before.
    fn found(
        &mut self,
        what: RecordKey,
        left: Left,
        error: Option<Error>,
        refused: Option<Error>,
    ) -> Left {
        if let Some(refused) = refused {
            self.refused.insert(what.clone(), refused);
        }
        let refused = self.refused.get(&what).cloned();
        let (left, state) = match left {
            _ if refused.is_some() => (Left::Refused, FoundState::Refused),
            Left::Up => (left, FoundState::Up),
            _ => (left, FoundState::Pending),
        };
        if let Some(error) = &refused {
            warn!(%what, %error, "what the journal has of it makes no sense; it is left as it is");
        }
        self.report.found.push(Found {
            what,
            state,
            error: refused.or(error),
        });
        left
    }

    fn claim(&mut self, name: &HolderName, of: &RecordKey) -> Claim {
        let holders = self.holders.clone();
        let holder = || holders.restore(name.clone(), of.clone());
        let own = RecordKey::Holder(name.clone());
        let refused = self.refused.get(&own).or_else(|| self.refused.get(of));
        if let Some(error) = refused {
            holder().keep();
            self.kept.insert(of.clone());
            return Claim::Refused(error.clone());
        }
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
                Some((there, Left::Up)) => Held::View(there.share(Some(holder()))),
                _ => return Claim::Lost(of.clone()),
            },
            _ => match self.stacks.get(of) {
                Some((there, Left::Up)) => Held::Stack(there.share(Some(holder()))),
                _ => return Claim::Lost(of.clone()),
            },
        };
        self.used.insert(of.clone());
        Claim::Held(held)
    }

    /// The recovery keeps one share of what nothing else keeps up.
    fn finish(self, claims: HashMap<HolderName, Claim>) -> Recovery {
        let mut unclaimed = Vec::new();
        let attachments = self.attachments.into_values();
        let attachments =
            attachments.map(|(held, left)| (held.key(), Held::Attachment(held), left));
        let mounts = self.mounts.into_values();
        let mounts = mounts.map(|(held, left)| (held.key(), Held::Mount(held), left));
        let stacks = self.stacks.into_iter();
        let stacks = stacks.map(|(key, (held, left))| (key, Held::Stack(held), left));
        let views = self.views.into_iter();
        let views = views.map(|(key, (held, left))| (key, Held::View(held), left));
        let all = attachments.chain(mounts).chain(stacks).chain(views);
        for (key, held, left) in all {
            let kept = left == Left::Refused || self.kept.contains(&key);
            match self.used.contains(&key) {
                _ if kept => held.abandon(),
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
