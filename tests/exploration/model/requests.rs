//! Which requests come in which state, and what the model answers to them.

use blockmount::ErrorKind;
use blockmount::testing::{Gate, VmStep};
use proptest::prelude::*;
use proptest_state_machine::ReferenceStateMachine;

use super::reference::{Failed, Has, Model, PendingRelease};
use super::{ALIAS, Act, DISKS, Kinds, OPTIONS, SLOTS, Said, TARGETS, TREES, sorted};

impl Model {
    pub(crate) fn owed_trees(&self) -> Vec<PendingRelease> {
        let pending = self.trees.iter().filter(|(_, tree)| tree.pending);
        pending
            .map(|(tree, left)| PendingRelease::Tree(*tree, left.id))
            .collect()
    }

    pub(crate) fn owed_mounts(&self) -> Vec<PendingRelease> {
        let pending = self.mounted.iter().filter(|(_, mount)| mount.pending);
        pending
            .map(|(key, left)| PendingRelease::Mount(*key, left.id))
            .collect()
    }

    pub(crate) fn owed_attachments(&self) -> Vec<PendingRelease> {
        let pending = self.attached.iter().filter(|(_, disk)| disk.pending);
        pending
            .map(|(disk, left)| PendingRelease::Attachment(*disk, left.id))
            .collect()
    }

    pub(crate) fn in_use(&self) -> [usize; 3] {
        [
            self.attached
                .values()
                .filter(|disk| !disk.pending && disk.leases > 0)
                .count(),
            self.mounted
                .values()
                .filter(|mount| !mount.pending && mount.leases > 0)
                .count(),
            self.trees.values().filter(|tree| !tree.pending).count(),
        ]
    }

    fn drain(&mut self) -> Said {
        let mut failed = Vec::new();
        let mut retry = |model: &mut Model, owed: fn(&Model) -> Vec<PendingRelease>| {
            for pending in owed(model) {
                failed.extend(model.retry(&pending).into_iter().map(|(kind, _)| kind));
            }
        };
        retry(self, Model::owed_trees);
        // Also what a tree has just let go of.
        for has in std::mem::take(&mut self.lingering) {
            match has {
                Has::Attachment(disk) => self.attached.get_mut(&disk).unwrap().pending = true,
                Has::Mount(key) => self.mounted.get_mut(&key).unwrap().pending = true,
                Has::Stack(tree) => panic!("tree {tree} lingers"),
            }
        }
        retry(self, Model::owed_mounts);
        retry(self, Model::owed_attachments);
        Said::Drained(sorted(failed), self.in_use().iter().sum())
    }

    fn got(&mut self, outcome: Result<Has, Kinds>) -> Said {
        match outcome {
            Ok(has) => {
                self.handles.push((has, self.requests));
                Said::Got
            }
            Err(kinds) => Said::Refused(kinds),
        }
    }

    fn released(&mut self, failed: Failed) -> Said {
        let (kinds, pending): (Kinds, Vec<PendingRelease>) = failed.into_iter().unzip();
        if !pending.is_empty() {
            self.errors.push(pending);
        }
        Said::Released(sorted(kinds))
    }

    /// Whether a fault waits for a call of which a request may make several at once: which of them it
    /// hits is then anybody's guess.
    fn has_faults_for_parallel_calls(&self) -> bool {
        let alone = [VmStep::Combine as usize, VmStep::Separate as usize];
        self.faults.keys().any(|step| !alone.contains(step))
    }
}

impl ReferenceStateMachine for Model {
    type State = Model;
    type Transition = Act;

    fn init_state() -> BoxedStrategy<Model> {
        let keeps = prop::sample::select(vec![0, 0, 1, 2, 9]);
        let model = keeps.prop_map(|keeps| Model {
            keeps,
            ..Model::default()
        });
        model.boxed()
    }

    fn transitions(model: &Model) -> BoxedStrategy<Act> {
        let (handles, errors) = (model.handles.len(), model.errors.len());
        let read_only = || prop::bool::weighted(0.8);
        let layer = (0..DISKS, 0..2usize);
        let scratch = prop::option::of((0..DISKS, any::<bool>()));
        let gate = prop::sample::select(vec![
            Gate::Err(ErrorKind::Other),
            Gate::Err(ErrorKind::Busy),
            Gate::Uncertain { happened: true },
            Gate::Uncertain { happened: false },
            Gate::Panic { happened: true },
            Gate::Panic { happened: false },
        ]);
        let mut asked = VmStep::ALL.to_vec();
        asked.retain(|step| *step != VmStep::Adopt);
        let mut acts = vec![
            (
                3,
                (0..=ALIAS, read_only())
                    .prop_map(|(name, read_only)| Act::Attach { name, read_only })
                    .boxed(),
            ),
            (
                8,
                (
                    0..=ALIAS,
                    read_only(),
                    0..OPTIONS.len(),
                    prop::option::of(0..TARGETS.len()),
                )
                    .prop_map(|(name, read_only, options, target)| Act::Add {
                        name,
                        read_only,
                        options,
                        target,
                    })
                    .boxed(),
            ),
            (
                4,
                (prop::collection::vec(layer, 1..3), scratch, 0..TREES.len())
                    .prop_map(|(layers, scratch, tree)| Act::Stack {
                        layers,
                        scratch,
                        tree,
                    })
                    .boxed(),
            ),
            (1, Just(Act::Drain).boxed()),
            (
                4,
                (prop::sample::select(asked), gate)
                    .prop_map(|(step, gate)| Act::Fault(step, gate))
                    .boxed(),
            ),
            (
                1,
                any::<bool>()
                    .prop_map(|happened| Act::LoseLine { happened })
                    .boxed(),
            ),
            (
                2,
                any::<u64>().prop_map(|back| Act::Restart { back }).boxed(),
            ),
        ];
        if !model.lingering.is_empty() {
            acts.push((2, Just(Act::Wait).boxed()));
        }
        if model.line_is_lost {
            acts.push((6, Just(Act::MendLine).boxed()));
        }
        if model.requests > 6 {
            acts.push((1, Just(Act::EndVm).boxed()));
        }
        if handles > 0 {
            acts.push((6, (0..handles).prop_map(Act::Release).boxed()));
            acts.push((2, (0..handles).prop_map(Act::Drop).boxed()));
        }
        if errors > 0 {
            acts.push((3, (0..errors).prop_map(Act::Retry).boxed()));
        }
        prop::strategy::Union::new_weighted(acts).boxed()
    }

    fn preconditions(model: &Model, act: &Act) -> bool {
        let guess = model.has_faults_for_parallel_calls();
        match act {
            // Such a caller tears down what is pending first, in an order that the model does not know.
            Act::Attach { .. } | Act::Add { .. } | Act::Stack { .. }
                if meets_pending(model, act) =>
            {
                false
            }
            Act::Attach { .. } | Act::Add { .. } => true,
            Act::Stack {
                layers,
                scratch,
                tree,
            } => {
                let mut disks: Vec<usize> = layers
                    .iter()
                    .map(|(disk, _)| *disk)
                    .chain(scratch.map(|(disk, _)| disk))
                    .collect();
                let all = disks.len();
                disks.sort_unstable();
                disks.dedup();
                let fresh = disks
                    .iter()
                    .filter(|disk| !model.attached.contains_key(disk))
                    .count();
                // Layers that need each other's slot or disk depend on who comes first.
                let independent = disks.len() == all && model.attached.len() + fresh <= SLOTS;
                independent && !(guess && (all > 1 || model.trees.contains_key(tree)))
            }
            Act::Release(index) | Act::Drop(index) => match model.handles.get(*index) {
                Some((Has::Stack(_), _)) => !guess,
                has => has.is_some(),
            },
            Act::Retry(index) => match model.errors.get(*index).map(Vec::as_slice) {
                Some([PendingRelease::Attachment(..) | PendingRelease::Mount(..)]) => true,
                pending => pending.is_some() && !guess,
            },
            Act::Drain => {
                let (trees, mounts) = (model.owed_trees().len(), model.owed_mounts().len());
                let all = mounts + model.owed_attachments().len() + model.lingering.len();
                let lonely = trees == 0 && all <= 1;
                trees <= 1 && (lonely || !guess)
            }
            Act::Wait => model.lingering.len() == 1 || (!model.lingering.is_empty() && !guess),
            Act::Fault(step, _) => {
                let is_new = !model.faults.contains_key(&(*step as usize));
                is_new && model.faults.len() < 2 && !model.gone
            }
            Act::LoseLine { .. } => !model.line_is_lost && !model.gone,
            Act::MendLine => model.line_is_lost,
            Act::EndVm => !model.gone,
            Act::Restart { .. } => true,
        }
    }

    fn apply(mut model: Model, act: &Act) -> Model {
        if matches!(
            act,
            Act::Attach { .. } | Act::Add { .. } | Act::Stack { .. }
        ) {
            model.requests += 1;
        }
        model.met_lingering = false;
        model.said = match act {
            Act::Attach { name, read_only } => {
                let disk = model.attach(*name, *read_only);
                model.got(disk.map(Has::Attachment).map_err(|kind| vec![kind]))
            }
            Act::Add {
                name,
                read_only,
                options,
                target,
            } => {
                let key = model.add(*name, *read_only, *options, *target);
                model.got(key.map(Has::Mount).map_err(|kind| vec![kind]))
            }
            Act::Stack {
                layers,
                scratch,
                tree,
            } => {
                let stack = model.stack(layers, *scratch, *tree);
                model.got(stack.map(|()| Has::Stack(*tree)))
            }
            Act::Release(index) => {
                let (has, _) = model.handles.swap_remove(*index);
                let failed = model.give(&has);
                model.released(failed)
            }
            Act::Drop(index) => {
                let (has, _) = model.handles.swap_remove(*index);
                model.give(&has);
                Said::Nothing
            }
            Act::Retry(index) => {
                let pending = model.errors.swap_remove(*index);
                let failed = pending
                    .iter()
                    .flat_map(|pending| model.retry(pending))
                    .collect();
                model.released(failed)
            }
            Act::Drain => model.drain(),
            Act::Wait => {
                model.end_lingering();
                Said::Nothing
            }
            Act::Fault(step, gate) => {
                let kind = match gate {
                    Gate::Err(kind) => *kind,
                    _ => ErrorKind::Uncertain,
                };
                model.faults.insert(*step as usize, kind);
                Said::Nothing
            }
            Act::LoseLine { .. } | Act::MendLine => {
                model.line_is_lost = !model.line_is_lost;
                Said::Nothing
            }
            Act::EndVm => {
                model.faults.clear();
                (model.gone, model.line_is_lost) = (true, false);
                Said::Nothing
            }
            Act::Restart { back } => {
                model.restart(*back);
                Said::Nothing
            }
        };
        model
    }
}

/// Whether a request is refused for a slot or a path while something is pending, or needs what lingers torn down in a way
/// that cannot be predicted: beside what is pending, beside other layers, or several at once while one of them fails.
fn meets_pending(model: &Model, act: &Act) -> bool {
    let is_pending = |model: &Model| {
        let (trees, mounts) = (model.owed_trees().len(), model.owed_mounts().len());
        trees + mounts + model.owed_attachments().len() > 0
    };
    let after = <Model as ReferenceStateMachine>::apply(model.clone(), act);
    let refused = match &after.said {
        Said::Refused(kinds) => kinds
            .iter()
            .any(|kind| matches!(kind, ErrorKind::Conflict | ErrorKind::Full)),
        _ => false,
    };
    let several = model.lingering.len() > 1 && model.has_faults_for_parallel_calls();
    let makes_room =
        after.met_lingering && (is_pending(model) || several || matches!(act, Act::Stack { .. }));
    makes_room || (refused && (is_pending(model) || is_pending(&after)))
}
