//! The model: what is attached, mounted and combined, and the rule for each change of it.

use std::collections::BTreeMap;
use std::path::Path;

use blockmount::ErrorKind;
use blockmount::testing::VmStep;

use super::{
    DISKS, Kinds, MountKey, SCRATCH_TARGET, SLOTS, SUPERBLOCK, Said, TARGETS, TREES, WRITABLE,
    is_in_guest, name_of,
};

/// What a caller can hold.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Has {
    Attachment(usize),
    Mount(MountKey),
    Stack(usize),
}

/// A pending tear-down, by what has it and which one of its kind it was.
#[derive(Debug, Clone)]
pub(crate) enum PendingRelease {
    Attachment(usize, u64),
    Mount(MountKey, u64),
    Tree(usize, u64),
}

#[derive(Debug, Clone)]
pub(crate) struct Attached {
    pub(crate) id: u64,
    pub(crate) read_only: bool,
    pub(crate) leases: usize,
    /// Whether it is in a slot, or has one kept for it.
    pub(crate) slot: bool,
    pub(crate) may_linger: bool,
    pub(crate) pending: bool,
    pub(crate) unplugged: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Mounted {
    pub(crate) id: u64,
    pub(crate) path: Option<&'static str>,
    pub(crate) leases: usize,
    pub(crate) may_linger: bool,
    pub(crate) pending: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Combined {
    pub(crate) id: u64,
    /// The scratch first.
    pub(crate) mounts: Vec<MountKey>,
    pub(crate) pending: bool,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    pub(crate) attached: BTreeMap<usize, Attached>,
    pub(crate) mounted: BTreeMap<MountKey, Mounted>,
    pub(crate) trees: BTreeMap<usize, Combined>,
    /// How many are kept after their last release.
    pub(crate) keeps: usize,
    /// What is kept, the least recently used first.
    pub(crate) lingering: Vec<Has>,
    /// Whether the last request has met something that lingers.
    pub(crate) met_lingering: bool,
    pub(crate) faults: BTreeMap<usize, ErrorKind>,
    pub(crate) calls: [usize; VmStep::ALL.len()],
    /// What callers hold, each with the number of its request.
    pub(crate) handles: Vec<(Has, u32)>,
    /// How many requests there were.
    pub(crate) requests: u32,
    pub(crate) line_is_lost: bool,
    pub(crate) gone: bool,
    pub(crate) errors: Vec<Vec<PendingRelease>>,
    pub(crate) ids: u64,
    pub(crate) said: Said,
}

/// What went wrong in a tear-down, and what is pending for it.
pub(crate) type Failed = Vec<(ErrorKind, PendingRelease)>;

impl Model {
    fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn call(&mut self, step: VmStep) -> Result<(), ErrorKind> {
        self.calls[step as usize] += 1;
        self.answer(step)
    }

    fn answer(&mut self, step: VmStep) -> Result<(), ErrorKind> {
        match self.faults.remove(&(step as usize)) {
            _ if self.gone => Err(ErrorKind::Gone),
            Some(fault) => Err(fault),
            None if self.line_is_lost && is_in_guest(step) => Err(ErrorKind::Uncertain),
            None => Ok(()),
        }
    }

    /// What was in a VM that has ended is torn down.
    fn call_down(&mut self, step: VmStep) -> Result<(), ErrorKind> {
        match self.call(step) {
            Err(ErrorKind::Gone) => Ok(()),
            answer => answer,
        }
    }

    /// What the next process has once its holders have come back, and all else is released. It is not predicted which
    /// calls of the tear-downs that were pending it has to repeat.
    pub(crate) fn restart(&mut self, back: u64) {
        self.faults.clear();
        (self.line_is_lost, self.errors) = (false, Vec::new());
        if self.gone {
            let (requests, keeps) = (self.requests, self.keeps);
            *self = Model {
                requests,
                keeps,
                ..Model::default()
            };
            return;
        }
        // Of what a process before has set up no version is known.
        let disks = self.attached.values_mut();
        disks.for_each(|disk| disk.may_linger = false);
        let mounts = self.mounted.values_mut();
        mounts.for_each(|mount| mount.may_linger = false);
        self.end_lingering();
        let handles = std::mem::take(&mut self.handles).into_iter().enumerate();
        for (index, (has, request)) in handles {
            match name_of(request) {
                Some(_) if back >> (index % 64) & 1 == 1 => self.handles.push((has, request)),
                _ => drop(self.give(&has)),
            }
        }
        let owed = [
            Model::owed_trees,
            Model::owed_mounts,
            Model::owed_attachments,
        ];
        for owed in owed {
            for pending in owed(self) {
                self.retry(&pending);
            }
        }
        self.calls = Default::default();
    }

    /// Tears down the least recently used. Whether all of it is down.
    fn end_first(&mut self) -> bool {
        let pending = match self.lingering.remove(0) {
            Has::Attachment(disk) => {
                let left = self.attached.get_mut(&disk).unwrap();
                left.pending = true;
                PendingRelease::Attachment(disk, left.id)
            }
            Has::Mount(key) => {
                let left = self.mounted.get_mut(&key).unwrap();
                left.pending = true;
                PendingRelease::Mount(key, left.id)
            }
            Has::Stack(tree) => panic!("tree {tree} lingers"),
        };
        self.retry(&pending).is_empty()
    }

    /// Tears down all that lingers. Whether one of them is down.
    pub(crate) fn end_lingering(&mut self) -> bool {
        let mut down = false;
        while !self.lingering.is_empty() {
            down |= self.end_first();
        }
        down
    }

    /// Keeps what was released. What is too much is torn down in the background.
    fn keep(&mut self, has: Has) -> Failed {
        self.lingering.push(has);
        while self.lingering.len() > self.keeps {
            self.end_first();
        }
        Vec::new()
    }

    /// Asks, and asks again while something that lingers may be in the way.
    fn making_room<T>(
        &mut self,
        mut ask: impl FnMut(&mut Model) -> Result<T, ErrorKind>,
    ) -> Result<T, ErrorKind> {
        loop {
            let answer = ask(self);
            let room = match answer.as_ref().err() {
                Some(ErrorKind::Full) => self.make_one_room(),
                Some(ErrorKind::Conflict) => {
                    self.met_lingering |= !self.lingering.is_empty();
                    self.end_lingering()
                }
                _ => false,
            };
            if !room {
                return answer;
            }
        }
    }

    fn make_one_room(&mut self) -> bool {
        self.met_lingering |= !self.lingering.is_empty();
        while !self.lingering.is_empty() {
            if self.end_first() {
                return true;
            }
        }
        false
    }

    pub(crate) fn attach(&mut self, name: usize, read_only: bool) -> Result<usize, ErrorKind> {
        self.call(VmStep::Identify)?;
        self.making_room(|model| model.attach_once(name % DISKS, read_only))
    }

    fn attach_once(&mut self, disk: usize, read_only: bool) -> Result<usize, ErrorKind> {
        match self.attached.get_mut(&disk) {
            Some(up) if !up.pending => {
                if up.read_only != read_only {
                    return Err(ErrorKind::Conflict);
                }
                up.leases += 1;
                self.lingering.retain(|has| *has != Has::Attachment(disk));
                return Ok(disk);
            }
            Some(_) => self.lower_attachment(disk)?,
            None => {}
        }
        let slot = self.attached.values().filter(|other| other.slot).count() < SLOTS;
        let id = self.id();
        let up = Attached {
            id,
            read_only,
            leases: 1,
            slot,
            may_linger: self.keeps > 0 && read_only,
            pending: false,
            unplugged: false,
        };
        match self.call(VmStep::Attach) {
            Ok(()) if slot => drop(self.attached.insert(disk, up)),
            Ok(()) => return Err(ErrorKind::Full),
            Err(ErrorKind::Uncertain) => {
                // The guest was never told of it, so there is nothing to unplug.
                self.attached.insert(
                    disk,
                    Attached {
                        pending: true,
                        unplugged: true,
                        ..up
                    },
                );
                let _owed = self.lower_attachment(disk);
                return Err(ErrorKind::Uncertain);
            }
            Err(kind) => return Err(kind),
        }
        Ok(disk)
    }

    fn lower_attachment(&mut self, disk: usize) -> Result<(), ErrorKind> {
        if !self.attached[&disk].unplugged {
            self.call_down(VmStep::Unplug)?;
        }
        self.attached.get_mut(&disk).unwrap().unplugged = true;
        self.call_down(VmStep::Detach)?;
        self.attached.remove(&disk);
        Ok(())
    }

    fn give_attachment(&mut self, disk: usize, may_linger: bool) -> Failed {
        let up = self.attached.get_mut(&disk).unwrap();
        up.leases -= 1;
        if up.leases > 0 {
            return Vec::new();
        }
        if may_linger && up.may_linger {
            return self.keep(Has::Attachment(disk));
        }
        up.pending = true;
        let pending = PendingRelease::Attachment(disk, up.id);
        self.retry(&pending)
    }

    pub(crate) fn add(
        &mut self,
        name: usize,
        read_only: bool,
        options: usize,
        target: Option<usize>,
    ) -> Result<MountKey, ErrorKind> {
        if read_only && options == WRITABLE {
            return Err(ErrorKind::Invalid);
        }
        let disk = self.attach(name, read_only)?;
        let key = (disk, options);
        let mounted = self.making_room(|model| model.mount(key, target));
        if let Err(kind) = mounted {
            // An uncertain mount whose tear-down is pending keeps its attachment.
            match self.mounted.get_mut(&key) {
                Some(left) if left.leases == 1 => left.leases = 0,
                _ => drop(self.give_attachment(disk, false)),
            }
            return Err(kind);
        }
        Ok(key)
    }

    /// Mounts what is attached; on success it is the mount that holds the attachment.
    fn mount(&mut self, key: MountKey, target: Option<usize>) -> Result<(), ErrorKind> {
        match self.mounted.get_mut(&key) {
            Some(up) if !up.pending => {
                up.leases += 1;
                self.lingering.retain(|has| *has != Has::Mount(key));
                self.give_attachment(key.0, false);
                return Ok(());
            }
            Some(_) => drop(self.lower_mount(key)?),
            None => {}
        }
        let mut others = self.mounted.keys().filter(|(disk, _)| *disk == key.0);
        let ours = SUPERBLOCK[key.1];
        if !others.all(|(_, other)| ours.is_some() && SUPERBLOCK[*other] == ours) {
            return Err(ErrorKind::Conflict);
        }
        let path = target
            .map(|target| self.free(TARGETS[target].1, None))
            .transpose()?;
        let id = self.id();
        let up = Mounted {
            id,
            path,
            leases: 1,
            may_linger: key.1 != WRITABLE && self.attached[&key.0].may_linger,
            pending: false,
        };
        self.calls[VmStep::Mount as usize] += 1;
        match self
            .call(VmStep::Resolve)
            .and_then(|()| self.answer(VmStep::Mount))
        {
            Ok(()) => drop(self.mounted.insert(key, up)),
            Err(ErrorKind::Uncertain) => {
                self.mounted.insert(
                    key,
                    Mounted {
                        pending: true,
                        ..up
                    },
                );
                if self.call_down(VmStep::Unmount).is_ok() {
                    self.mounted.remove(&key);
                }
                return Err(ErrorKind::Uncertain);
            }
            Err(kind) => return Err(kind),
        }
        Ok(())
    }

    /// The one form of a path at which nothing is, nor above nor below. `inside` may be above.
    fn free(
        &self,
        path: Option<&'static str>,
        inside: Option<&Path>,
    ) -> Result<&'static str, ErrorKind> {
        let path = path.ok_or(ErrorKind::Invalid)?;
        let trees = self.trees.keys().map(|tree| TREES[*tree].1.unwrap());
        let taken: Vec<&str> = self
            .mounted
            .values()
            .filter_map(|mount| mount.path)
            .chain(trees)
            .collect();
        let below = taken.iter().any(|taken| Path::new(taken).starts_with(path));
        let is_taken = |above: &&Path| taken.iter().any(|taken| Path::new(taken) == *above);
        let above = Path::new(path).ancestors().skip(1).find(is_taken);
        if below || above.is_some_and(|above| Some(above) != inside) {
            return Err(ErrorKind::Conflict);
        }
        Ok(path)
    }

    fn lower_mount(&mut self, key: MountKey) -> Result<Failed, ErrorKind> {
        self.call_down(VmStep::Unmount)?;
        self.mounted.remove(&key);
        Ok(self.give_attachment(key.0, false))
    }

    fn give_mount(&mut self, key: MountKey, may_linger: bool) -> Failed {
        let up = self.mounted.get_mut(&key).unwrap();
        up.leases -= 1;
        if up.leases > 0 {
            return Vec::new();
        }
        if may_linger && up.may_linger {
            return self.keep(Has::Mount(key));
        }
        up.pending = true;
        let pending = PendingRelease::Mount(key, up.id);
        self.retry(&pending)
    }

    pub(crate) fn stack(
        &mut self,
        layers: &[MountKey],
        scratch: Option<(usize, bool)>,
        tree: usize,
    ) -> Result<(), Kinds> {
        let layers = layers
            .iter()
            .map(|(disk, options)| self.add(*disk, true, *options, None));
        let mut added: Vec<_> = layers.collect();
        if let Some((disk, named)) = scratch {
            added.insert(
                0,
                self.add(disk, false, WRITABLE, named.then_some(SCRATCH_TARGET)),
            );
        }
        let refusals: Kinds = added.iter().filter_map(|added| added.err()).collect();
        let mounts: Vec<MountKey> = added.into_iter().flatten().collect();
        if !refusals.is_empty() {
            mounts
                .into_iter()
                .for_each(|mount| drop(self.give_mount(mount, false)));
            return Err(refusals);
        }
        let (held, before) = (mounts.clone(), self.tree_id(tree));
        self.combine(mounts, scratch.is_some(), tree)
            .map_err(|kind| {
                // An uncertain overlay whose tear-down is pending keeps its mounts.
                if self.tree_id(tree).is_none_or(|id| Some(id) == before) {
                    held.into_iter()
                        .for_each(|mount| drop(self.give_mount(mount, false)));
                }
                if kind == ErrorKind::Conflict {
                    self.met_lingering |= !self.lingering.is_empty();
                }
                vec![kind]
            })
    }

    fn tree_id(&self, tree: usize) -> Option<u64> {
        self.trees.get(&tree).map(|tree| tree.id)
    }

    fn combine(
        &mut self,
        mounts: Vec<MountKey>,
        scratch: bool,
        tree: usize,
    ) -> Result<(), ErrorKind> {
        match self.trees.get(&tree) {
            Some(up) if !up.pending => return Err(ErrorKind::Conflict),
            Some(_) => drop(self.lower_tree(tree)?),
            None => {}
        }
        let inside = if scratch {
            self.mounted[&mounts[0]].path
        } else {
            None
        };
        self.free(TREES[tree].1, inside.map(Path::new))?;
        let id = self.id();
        match self.call(VmStep::Combine) {
            Err(ErrorKind::Uncertain) if self.call_down(VmStep::Separate).is_err() => {
                self.trees.insert(
                    tree,
                    Combined {
                        id,
                        mounts,
                        pending: true,
                    },
                );
                Err(ErrorKind::Uncertain)
            }
            Err(kind) => Err(kind),
            Ok(()) => {
                self.trees.insert(
                    tree,
                    Combined {
                        id,
                        mounts,
                        pending: false,
                    },
                );
                Ok(())
            }
        }
    }

    fn lower_tree(&mut self, tree: usize) -> Result<Failed, ErrorKind> {
        self.call_down(VmStep::Separate)?;
        let down = self.trees.remove(&tree).unwrap();
        Ok(down
            .mounts
            .into_iter()
            .flat_map(|mount| self.give_mount(mount, true))
            .collect())
    }

    /// Tears down what is pending, unless that is done.
    pub(crate) fn retry(&mut self, pending: &PendingRelease) -> Failed {
        let outcome = match pending {
            PendingRelease::Attachment(disk, id)
                if self.attached.get(disk).is_some_and(|now| now.id == *id) =>
            {
                self.lower_attachment(*disk).map(|()| Vec::new())
            }
            PendingRelease::Mount(key, id)
                if self.mounted.get(key).is_some_and(|now| now.id == *id) =>
            {
                self.lower_mount(*key)
            }
            PendingRelease::Tree(tree, id)
                if self.trees.get(tree).is_some_and(|now| now.id == *id) =>
            {
                self.lower_tree(*tree)
            }
            _ => Ok(Vec::new()),
        };
        outcome.unwrap_or_else(|kind| vec![(kind, pending.clone())])
    }

    pub(crate) fn give(&mut self, has: &Has) -> Failed {
        match has {
            Has::Attachment(disk) => self.give_attachment(*disk, true),
            Has::Mount(key) => self.give_mount(*key, true),
            Has::Stack(tree) => {
                let up = self.trees.get_mut(tree).unwrap();
                up.pending = true;
                let pending = PendingRelease::Tree(*tree, up.id);
                self.retry(&pending)
            }
        }
    }
}
