//! The undo lists of all targets, in memory and in the journal.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockmount::{BackendError, MountOptions};

use crate::device::number::DeviceNumber;
use crate::mount::kernel_log;
use crate::mount::parents::{Parent, Parents};
use crate::mount::target::{FileId, Target};
use crate::mount::writes::Writes;
use crate::undo::journal::{Journal, Note};
use crate::undo::locks::{Held, Key, Locks};
use crate::undo::record::Record;
use crate::undo::step::{DirectoryStep, MountStep, Undo};

/// What there is to undo, by target.
///
/// A thing that several targets share (a directory, a partition, a byte range) is a step of each of their lists, and
/// is undone with the last of them: the lists are the only count. A call that puts such a step on a list, or undoes
/// it, holds the lock of the thing.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    journal: Option<Arc<Journal>>,
    /// Held across a write to the journal, which is in memory, so that both say the same.
    lists: Mutex<Lists>,
    locks: Locks,
    /// What mapped devices are marked with.
    device_mark: Option<String>,
    parents: Parents,
    /// Whether the next step fails, for tests of what is left then.
    at_step: Option<StepHook>,
}

/// By the paths of the targets, which are written in one way: as bytes, since a path as a key is hashed component by component.
type Lists = HashMap<OsString, List>;

/// What tests make steps fail with.
pub(crate) type StepHook = fn() -> Result<(), BackendError>;

/// In the order in which the steps were made.
#[derive(Debug, Default)]
struct List {
    steps: Vec<Undo>,
    note: Option<Note>,
    /// Whether the journal has all steps. It may have more: they are found to be undone.
    saved: bool,
    /// Whether nothing is mounted any more, and what is on the list could not be undone: such as a directory with
    /// somebody else's files. Who shares it may undo it.
    left: bool,
    /// Of a writable mount that this process made.
    writes: Option<Writes>,
    /// Why writes to the mount were lost, until the tear-down has ended and says so.
    lost: Option<BackendError>,
}

impl List {
    /// Puts the steps on record; without a journal, there is none.
    fn save(&mut self, target: &Path, journal: Option<&Arc<Journal>>) -> Result<(), BackendError> {
        let Some(journal) = journal.filter(|_| !self.saved) else {
            return Ok(());
        };
        let record = Record {
            target: target.into(),
            steps: self.steps.clone(),
        };
        self.note
            .get_or_insert_with(|| journal.blank())
            .write(&record)?;
        self.saved = true;
        Ok(())
    }

    fn retain(&mut self, is_wanted: impl Fn(&Undo) -> bool) {
        let before = self.steps.len();
        self.steps.retain(is_wanted);
        self.saved &= before == self.steps.len();
    }

    fn replace_last(&mut self, step: Undo) {
        // What is known already needs no write, which may be impossible.
        self.saved &= self.steps.pop().as_ref() == Some(&step);
        self.steps.push(step);
    }

    fn replace(&mut self, step: &Undo, by: Undo) {
        if let Some(own) = self.steps.iter_mut().find(|own| *own == step) {
            self.saved &= *own == by;
            *own = by;
        }
    }

    fn remove_record(self) {
        if let Some(note) = self.note {
            note.done();
        }
    }
}

impl Ledger {
    pub(crate) fn new(journal: Option<Arc<Journal>>) -> Self {
        Ledger {
            journal,
            ..Ledger::default()
        }
    }

    /// Has each step fail that the hook lets fail.
    pub(crate) fn fail_at(&mut self, hook: Option<StepHook>) {
        self.at_step = hook;
    }

    /// Has mapped devices be marked.
    pub(crate) fn mark_devices(&mut self, mark: Option<String>) {
        self.device_mark = mark;
    }

    /// Has locks be awaited as long as a filesystem may take to be made.
    pub(crate) fn wait_for_formats(&mut self, format: Duration) {
        self.locks.wait_for_formats(format);
    }

    /// A call is under way until the answer is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Underway {
        self.parents.enter();
        Underway(Arc::clone(self))
    }

    /// The list of a target, whether or not there is anything on it.
    pub(crate) fn list<'a>(&'a self, target: &'a Target) -> UndoList<'a> {
        UndoList {
            ledger: self,
            target,
        }
    }

    /// Takes over the list that an earlier process has left for a target, as one of which nothing is in use.
    /// Gives the note back if the target has a list already.
    pub(crate) fn adopt(&self, target: &Target, note: Note, steps: Vec<Undo>) -> Result<(), Note> {
        let mut lists = self.lists();
        if lists.contains_key(target.key()) {
            return Err(note);
        }
        let list = List {
            steps,
            note: Some(note),
            saved: true,
            left: true,
            ..List::default()
        };
        lists.insert(target.key().to_owned(), list);
        Ok(())
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        // Every change under the lock is one insertion or removal: a panic leaves nothing half done.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is under way.
#[derive(Debug)]
pub(crate) struct Underway(Arc<Ledger>);

impl Drop for Underway {
    fn drop(&mut self) {
        if self.0.parents.leave() {
            kernel_log::close_idle();
        }
    }
}

/// The undo list of one target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UndoList<'a> {
    ledger: &'a Ledger,
    target: &'a Target,
}

impl<'a> UndoList<'a> {
    pub(crate) fn target(&self) -> &'a Target {
        self.target
    }

    /// What mapped devices are marked with.
    pub(crate) fn device_mark(&self) -> Option<String> {
        self.ledger.device_mark.clone()
    }

    /// The directory that the target is in, which calls that are under way share.
    ///
    /// # Errors
    ///
    /// As for [`Parents::of`].
    pub(crate) fn parent(&self) -> rustix::io::Result<Arc<Parent>> {
        self.ledger.parents.of(self.target)
    }

    /// Locks a thing that other targets may share.
    pub(crate) fn hold(&self, key: Key) -> Result<Held<'a>, BackendError> {
        self.ledger.locks.hold(key)
    }

    /// Takes the target, so that steps can be added.
    ///
    /// # Errors
    ///
    /// `Conflict` if it has a mount, or one that could not be undone.
    pub(crate) fn begin(&self) -> Result<(), BackendError> {
        let path = self.target.path();
        let mut lists = self.ledger.lists();
        let list = lists.entry(self.target.key().to_owned()).or_insert(List {
            left: true,
            ..List::default()
        });
        if !list.left {
            let message = format!("cannot mount at {}: it is in use already", path.display());
            return Err(BackendError::conflict(message));
        }
        list.left = false;
        Ok(())
    }

    /// Whether the target is taken: something is mounted there, is being mounted, or could not be unmounted.
    pub(crate) fn is_in_use(&self) -> bool {
        self.get(|list| !list.left).unwrap_or(false)
    }

    /// The steps, in the order in which they were made.
    pub(crate) fn steps(&self) -> Vec<Undo> {
        self.get(|list| list.steps.clone()).unwrap_or_default()
    }

    /// A point at which a step can fail.
    pub(crate) fn step(&self) -> Result<(), BackendError> {
        self.ledger.at_step.map_or(Ok(()), |hook| hook())
    }

    fn get<T>(&self, look: impl FnOnce(&List) -> T) -> Option<T> {
        self.ledger.lists().get(self.target.key()).map(look)
    }

    fn change<T>(
        &self,
        change: impl FnOnce(&mut List) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let mut lists = self.ledger.lists();
        change(lists.entry(self.target.key().to_owned()).or_default())
    }

    fn save(&self, list: &mut List) -> Result<(), BackendError> {
        list.save(self.target.path(), self.ledger.journal.as_ref())
    }

    /// Adds a step that is about to be made, on record first.
    pub(crate) fn add(&self, step: Undo) -> Result<(), BackendError> {
        self.step()?;
        self.change(|list| {
            list.steps.push(step);
            list.saved = false;
            self.save(list).inspect_err(|_| drop(list.steps.pop()))
        })?;
        // As if what is on record now could not be made.
        self.step()
    }

    /// Replaces the last step by what is known of it now, and puts it on record.
    pub(crate) fn amend(&self, step: Undo) -> Result<(), BackendError> {
        self.step()?;
        self.change(|list| {
            list.replace_last(step);
            self.save(list)
        })
    }

    /// Replaces the last step; the journal learns of it with the next write.
    pub(crate) fn replace_last(&self, step: Undo) {
        if let Some(list) = self.ledger.lists().get_mut(self.target.key()) {
            list.replace_last(step);
        }
    }

    /// Replaces a step; the journal learns of it with the next write.
    pub(crate) fn replace(&self, step: &Undo, by: Undo) {
        if let Some(list) = self.ledger.lists().get_mut(self.target.key()) {
            list.replace(step, by);
        }
    }

    /// Drops the steps that are not wanted any more, undone or not. The journal learns of it with the next write.
    pub(crate) fn retain(&self, is_wanted: impl Fn(&Undo) -> bool) {
        if let Some(list) = self.ledger.lists().get_mut(self.target.key()) {
            list.retain(is_wanted);
        }
    }

    /// Drops the steps for directories that were made in a filesystem of the disk: they stay, once there is what they were made for.
    pub(crate) fn keep_made_inside(&self) {
        self.retain(|step| {
            !matches!(
                step,
                Undo::RemoveDirectory(DirectoryStep { scratch: true, .. })
            )
        });
    }

    /// Shares a thing that is on any list: its step is added to this one, and returned. It is on record with the next
    /// write, and before the other list gives it up.
    pub(crate) fn join(&self, is_it: impl Fn(&Undo) -> bool) -> Option<Undo> {
        let mut lists = self.ledger.lists();
        let step = lists
            .values()
            .find_map(|list| list.steps.iter().find(|step| is_it(step)))?
            .clone();
        let list = lists.entry(self.target.key().to_owned()).or_default();
        if !list.steps.iter().any(|own| own.is_same(&step)) {
            list.steps.push(step.clone());
            list.saved = false;
        }
        Some(step)
    }

    /// The directories of ours on the way to the target, on whatever list.
    pub(crate) fn made_above(&self) -> Vec<PathBuf> {
        let target = self.target.path().as_os_str().as_bytes();
        let made = |step: &Undo| match step {
            Undo::RemoveDirectory(made) => {
                // By bytes, which is several times as fast as by component.
                let path = made.path.0.as_os_str().as_bytes();
                let below = target.strip_prefix(path)?;
                below.starts_with(b"/").then(|| made.path.0.clone())
            }
            _ => None,
        };
        let mut made = self.look_for(made);
        made.sort_unstable();
        made.dedup();
        made
    }

    /// Drops a step if another target in use needs it, and says so.
    pub(crate) fn hand_over(&self, step: &Undo) -> bool {
        self.leave_to(step, |other| !other.left)
    }

    fn leave_to(&self, step: &Undo, can_take: impl Fn(&List) -> bool) -> bool {
        let mut lists = self.ledger.lists();
        let own = self.target.key();
        let other = lists.iter_mut().find(|(path, other)| {
            let has_it = || other.steps.iter().any(|other| other.is_same(step));
            *path != own && can_take(other) && has_it()
        });
        let Some((path, other)) = other else {
            return false;
        };
        let path = Path::new(path);
        if let Err(error) = other.save(path, self.ledger.journal.as_ref()) {
            // No tear-down waits for a journal that cannot be written.
            tracing::warn!(path = %blockmount::printable(path.display()), %error, "a record lacks a step until it can be written");
        }
        if let Some(list) = lists.get_mut(self.target.key()) {
            list.retain(|own| !own.is_same(step));
        }
        true
    }

    /// Drops a step that is undone, also from the lists of what is left.
    pub(crate) fn undone(&self, step: &Undo) {
        self.retain(|own| own != step);
        let mut over = Vec::new();
        let mut lists = self.ledger.lists();
        lists.retain(|_, list| {
            if list.left {
                list.retain(|other| !other.is_same(step));
            }
            let is_over = list.left && list.steps.is_empty();
            if is_over {
                over.push(std::mem::take(list));
            }
            !is_over
        });
        drop(lists);
        over.into_iter().for_each(List::remove_record);
    }

    /// Keeps what tells of the writes to a mount, for as long as the list lives or until it is taken.
    pub(crate) fn keep_writes(&self, writes: Option<Writes>) {
        if let Some(list) = self.ledger.lists().get_mut(self.target.key()) {
            list.writes = writes;
        }
    }

    pub(crate) fn take_writes(&self) -> Option<Writes> {
        let mut lists = self.ledger.lists();
        lists.get_mut(self.target.key())?.writes.take()
    }

    /// Remembers that writes were lost on the way out.
    pub(crate) fn lost(&self, error: BackendError) {
        if let Some(list) = self.ledger.lists().get_mut(self.target.key()) {
            list.lost = Some(error);
        }
    }

    /// The end of an attempt that has undone what it could: the record of a list without steps is removed. A step
    /// that stays is on one list. Answers what [`lost`](Self::lost) remembered.
    pub(crate) fn end(&self) -> Option<BackendError> {
        for step in self.steps() {
            self.leave_to(&step, |_| true);
        }
        let mut lists = self.ledger.lists();
        let mut lost = None;
        let is_over = lists.get_mut(self.target.key()).is_some_and(|list| {
            list.left = true;
            lost = list.lost.take();
            list.steps.is_empty()
        });
        let over = is_over.then(|| lists.remove(self.target.key())).flatten();
        drop(lists);
        match over {
            Some(list) => list.remove_record(),
            None => self.save_or_warn(),
        }
        lost
    }

    /// Puts on record what is left; if that fails, the record has more steps than there are.
    pub(crate) fn save_or_warn(&self) {
        let mut lists = self.ledger.lists();
        let list = lists.get_mut(self.target.key());
        if let Some(Err(error)) = list.map(|list| self.save(list)) {
            let path = self.target.path().display();
            tracing::warn!(path = %blockmount::printable(&path), %error, "a record is less exact than it could be");
        }
    }

    /// Takes the target for a mount of an earlier process that is there still.
    pub(crate) fn keep(&self) {
        if let Some(list) = self.ledger.lists().get_mut(self.target.key()) {
            list.left = false;
        }
        self.save_or_warn();
    }

    /// Takes the record of a list out of use, for people to look at.
    pub(crate) fn set_aside(&self, why: &str) {
        let list = self.ledger.lists().remove(self.target.key());
        if let Some(note) = list.and_then(|list| list.note) {
            note.set_aside(why);
        }
    }

    /// How the other mounts of a device are mounted, and how it is exposed.
    pub(crate) fn mounts_of(&self, device: DeviceNumber) -> Vec<MountOptions> {
        let options = |step: &Undo| {
            let used = step.device_use()?;
            (used.number == device).then(|| used.options.clone())
        };
        self.look_for(options)
    }

    /// Whether an overlay has this scratch directory.
    pub(crate) fn has_scratch(&self, directory: FileId) -> bool {
        let is = |step: &Undo| match step {
            Undo::Unmount(mount) if mount.scratch == Some(directory) => Some(()),
            _ => None,
        };
        !self.look_for(is).is_empty()
    }

    /// Whether a directory is in a mount whose files appear with other owners.
    pub(crate) fn has_id_map(&self, directory: &Path) -> bool {
        // As a target it is written as the keys are.
        let Ok(directory) = Target::directory(directory) else {
            return false;
        };
        let lists = self.ledger.lists();
        let mut ancestors = directory.path().ancestors();
        let around = ancestors.find_map(|path| lists.get(path.as_os_str()));
        let mount = around.and_then(|list| match list.steps.last() {
            Some(Undo::Unmount(step)) => Some(step),
            _ => None,
        });
        mount.is_some_and(|step| step.id_map().is_some())
    }

    /// The mount at a target, unless it is a view.
    pub(crate) fn mount_at(&self, target: &Target) -> Option<MountStep> {
        let lists = self.ledger.lists();
        let list = lists.get(target.key()).filter(|list| !list.left)?;
        match list.steps.last() {
            Some(Undo::Unmount(step)) if step.view.is_none() => Some((**step).clone()),
            _ => None,
        }
    }

    /// Where the mount at this target is shown as well.
    pub(crate) fn view_of_it(&self) -> Option<PathBuf> {
        let source = self.target.path();
        let shows = |step: &Undo| match step {
            Undo::Unmount(step) => step
                .view
                .as_ref()
                .is_some_and(|view| view.source.is(source)),
            _ => false,
        };
        let lists = self.ledger.lists();
        let mut views = lists
            .iter()
            .filter(|(_, list)| list.steps.iter().any(shows));
        views.next().map(|(at, _)| at.into())
    }

    fn look_for<T>(&self, look: impl Fn(&Undo) -> Option<T>) -> Vec<T> {
        let lists = self.ledger.lists();
        let steps = lists.values().flat_map(|list| &list.steps);
        steps.filter_map(look).collect()
    }

    /// Whether the lists are on record.
    pub(crate) fn has_journal(&self) -> bool {
        self.ledger.journal.is_some()
    }

    /// A first name for a directory, if there is a journal to put it on record.
    pub(crate) fn staged_name(&self) -> Option<String> {
        self.ledger.journal.as_ref().map(|j| j.staged_name())
    }
}

#[cfg(test)]
mod tests {
    use blockmount::{IdMap, ViewOptions};

    use super::*;
    use crate::undo::step::{Identity, ViewUse};

    #[test]
    fn a_layer_is_found_however_its_path_is_written() {
        let map: IdMap = "0:100000:65536".parse().unwrap();
        let step = MountStep {
            mount: Identity::Expected {
                filesystem: "ext4".to_owned(),
                source: Path::new("/dev/loop3").into(),
                further_sources: Vec::new(),
                options: Vec::new(),
            },
            device: None,
            scratch: None,
            view: Some(ViewUse {
                source: Path::new("/run/other").into(),
                options: ViewOptions::default().with_id_map(map),
            }),
        };
        let ledger = Ledger::default();
        let target = Target::directory(Path::new("/run/layer")).unwrap();
        let list = ledger.list(&target);
        list.begin().unwrap();
        list.add(Undo::Unmount(Box::new(step))).unwrap();
        for (path, is_in_it) in [
            ("/run/layer", true),
            ("/run/layer/", true),
            ("//run//layer/fs/", true),
            ("/run/layer-2", false),
            ("/run", false),
        ] {
            assert_eq!(list.has_id_map(Path::new(path)), is_in_it, "{path}");
        }
    }
}
