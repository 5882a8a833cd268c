//! The manager that is compared with the model.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use blockmount::testing::{FakeVm, Gate, MemoryJournal, VmStep};
use blockmount::{Disk, Linger, Manager, ManagerBuilder, MountRequest, ReleaseError, StackRequest};
use proptest_state_machine::StateMachineTest;
use tokio::runtime::Runtime;

use super::reference::{Has, Model};
use super::{
    ALIAS, Act, LINGER, MountKey, OPTIONS, SCRATCH_TARGET, SLOTS, Said, TARGETS, TREES, WRITABLE,
    is_in_guest, name_of, sorted,
};
use crate::harness::{Held, builder_of, calls, clean, disk, request, soon};

/// The manager, and what its caller holds in the order of the model.
pub(crate) struct Real {
    runtime: Rc<Runtime>,
    vm: FakeVm,
    journal: MemoryJournal,
    manager: Manager,
    /// How often each step was called when this process had recovered.
    before: [usize; VmStep::ALL.len()],
    handles: Vec<Held>,
    errors: Vec<ReleaseError>,
    is_gone: bool,
}

impl Real {
    /// Does what the model has predicted.
    async fn act(&mut self, act: Act, model: &Model) -> Said {
        let holder = name_of(model.requests);
        match act {
            Act::Attach { name, read_only } => {
                let disk = named(name, read_only);
                let got = match &holder {
                    Some(holder) => self.manager.attach_held_by(&disk, holder).await,
                    None => self.manager.attach(&disk).await,
                };
                self.got(got.map(Held::Attachment))
            }
            Act::Add {
                name,
                read_only,
                options,
                target,
            } => {
                let request = request(OPTIONS[options], target.map(|target| TARGETS[target].0));
                let request = match holder {
                    Some(holder) => request.held_by(holder),
                    None => request,
                };
                let got = self.manager.add(&named(name, read_only), &request).await;
                self.got(got.map(Held::Mount))
            }
            Act::Stack {
                layers,
                scratch,
                tree,
            } => {
                let stack = stack(&layers, scratch, tree);
                let stack = match holder {
                    Some(holder) => stack.held_by(holder),
                    None => stack,
                };
                let got = self.manager.stack(&stack).await;
                self.got(got.map(Held::Stack))
            }
            Act::Release(index) => {
                let released = self.handles.swap_remove(index).release().await;
                self.released(released)
            }
            Act::Drop(index) => {
                drop(self.handles.swap_remove(index));
                Said::Nothing
            }
            Act::Retry(index) => {
                let retried = self.errors.swap_remove(index).retry().await;
                self.released(retried)
            }
            Act::Drain => {
                let drained = self.manager.drain().await;
                let kinds = drained.failed.iter().map(blockmount::Error::kind).collect();
                Said::Drained(sorted(kinds), drained.in_use)
            }
            Act::Wait => {
                tokio::time::sleep(LINGER).await;
                Said::Nothing
            }
            Act::Fault(step, gate) => {
                self.vm.gate_next(step, 1, gate);
                Said::Nothing
            }
            Act::LoseLine { happened } => {
                self.vm.gate_by(move |call| match is_in_guest(call.step) {
                    true => Gate::Uncertain { happened },
                    false => Gate::Ok,
                });
                Said::Nothing
            }
            Act::MendLine => {
                self.vm.gate_by(|_| Gate::Ok);
                Said::Nothing
            }
            Act::EndVm => {
                self.vm.open_gates();
                self.vm.kill();
                self.is_gone = true;
                Said::Nothing
            }
            Act::Restart { .. } => {
                self.restart(model).await;
                Said::Nothing
            }
        }
    }

    /// Ends the process as a kill does, and has the next one recover, in which the holders of the model come back.
    async fn restart(&mut self, model: &Model) {
        let handles = std::mem::take(&mut self.handles);
        std::mem::forget((handles, std::mem::take(&mut self.errors)));
        self.vm.open_gates();
        self.vm.check().unwrap();
        self.vm = match self.is_gone {
            true => new_vm(),
            false => self.vm.restart(),
        };
        self.journal = self.journal.restart();
        let recovery = soon(
            "recover",
            builder(&self.vm, model).recover(self.journal.clone()),
        )
        .await;
        let recovery = recovery.unwrap();
        self.manager = recovery.manager().clone();
        let mut holders = recovery.report().holders.iter();
        assert!(
            holders.all(|holder| holder.is_up != self.is_gone),
            "{recovery:?}"
        );
        self.is_gone = false;
        for (_, request) in &model.handles {
            let name = name_of(*request).unwrap();
            self.handles.push(match recovery.claim(&name).unwrap() {
                blockmount::Held::Attachment(attachment) => Held::Attachment(attachment),
                blockmount::Held::Mount(mount) => Held::Mount(mount),
                blockmount::Held::Stack(stack) => Held::Stack(stack),
                held => panic!("{held:?} is new to this test"),
            });
        }
        let settled = soon("settle", recovery.settle()).await;
        assert!(settled.failed.is_empty(), "{settled:?}");
        self.before = calls(&self.vm);
    }

    fn got(&mut self, got: Result<Held, blockmount::Error>) -> Said {
        match got {
            Ok(held) => {
                self.handles.push(held);
                Said::Got
            }
            Err(error) => Said::Refused(vec![error.kind()]),
        }
    }

    fn released(&mut self, released: Result<(), ReleaseError>) -> Said {
        let Err(error) = released else {
            return Said::Released(Vec::new());
        };
        let kinds = sorted(error.errors().map(blockmount::Error::kind).collect());
        self.errors.push(error);
        Said::Released(kinds)
    }

    /// Who shares has the same place, and it is the one that was asked for first.
    fn check_places(&self, model: &Model) {
        let mut locators = BTreeMap::new();
        let mut paths = BTreeMap::new();
        assert_eq!(self.handles.len(), model.handles.len());
        for (held, (has, _)) in self.handles.iter().zip(&model.handles) {
            if !model.gone {
                held.check(&self.vm);
            }
            match (held, has) {
                (Held::Attachment(attachment), Has::Attachment(disk)) => {
                    let there = locators
                        .entry(*disk)
                        .or_insert_with(|| attachment.locator().clone());
                    assert_eq!(there, attachment.locator());
                }
                (Held::Mount(mount), Has::Mount(key)) => {
                    let there = locators
                        .entry(key.0)
                        .or_insert_with(|| mount.locator().clone());
                    assert_eq!(there, mount.locator());
                    let path = paths.entry(*key).or_insert_with(|| mount.path().to_owned());
                    assert_eq!(path, mount.path());
                    match model.mounted[key].path {
                        Some(asked) => assert_eq!(mount.path(), Path::new(asked)),
                        None => assert!(mount.path().starts_with("/run/m"), "{mount:?}"),
                    }
                }
                (Held::Stack(stack), Has::Stack(tree)) => {
                    assert_eq!(stack.target(), Path::new(TREES[*tree].0));
                    let mounts = stack.layers().len() + stack.scratch().iter().len();
                    assert_eq!(mounts, model.trees[tree].mounts.len());
                }
                (_, has) => panic!("the model has {has:?} there"),
            }
        }
    }
}

fn builder(vm: &FakeVm, model: &Model) -> ManagerBuilder {
    let (at_most, how_many) = (LINGER, model.keeps);
    builder_of(vm).linger(Linger { at_most, how_many })
}

fn new_vm() -> FakeVm {
    let vm = FakeVm::with_slots(SLOTS as u32);
    vm.alias("/links/0.img", "/images/0.img");
    vm
}

fn named(name: usize, read_only: bool) -> Disk {
    match (name, read_only) {
        (ALIAS, true) => Disk::virtual_disk("/links/0.img").read_only(),
        (ALIAS, false) => Disk::virtual_disk("/links/0.img"),
        _ => disk(name, read_only),
    }
}

fn stack(layers: &[MountKey], scratch: Option<(usize, bool)>, tree: usize) -> StackRequest {
    let layer = |stack: StackRequest, (of, options): &MountKey| {
        let options: MountRequest = request(OPTIONS[*options], None);
        stack.layer(disk(*of, true), options)
    };
    let stack = layers.iter().fold(StackRequest::new(TREES[tree].0), layer);
    match scratch {
        Some((of, named)) => {
            let target = named.then_some(TARGETS[SCRATCH_TARGET].0);
            stack.scratch(disk(of, false), request(OPTIONS[WRITABLE], target))
        }
        None => stack,
    }
}

impl StateMachineTest for Real {
    type SystemUnderTest = Real;
    type Reference = Model;

    fn init_test(model: &Model) -> Real {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        let runtime = Rc::new(runtime.unwrap());
        let (vm, journal) = (new_vm(), MemoryJournal::new());
        let recovery = runtime.block_on(builder(&vm, model).recover(journal.clone()));
        Real {
            runtime,
            manager: recovery.unwrap().manager().clone(),
            vm,
            journal,
            before: Default::default(),
            handles: Vec::new(),
            errors: Vec::new(),
            is_gone: false,
        }
    }

    fn apply(mut real: Real, model: &Model, act: Act) -> Real {
        let what = format!("{act:?}");
        let runtime = Rc::clone(&real.runtime);
        let said = runtime.block_on(async {
            let said = soon(&what, real.act(act, model)).await;
            // What was dropped is torn down in the background.
            tokio::time::sleep(Duration::from_secs(1)).await;
            said
        });
        match (&said, &model.said) {
            (Said::Refused(one), Said::Refused(any)) => {
                assert!(any.contains(&one[0]), "{what}: {one:?}, not {any:?}")
            }
            (said, predicted) => assert_eq!(said, predicted, "{what}"),
        }
        real
    }

    fn check_invariants(real: &Real, model: &Model) {
        let (mut called, before) = (calls(&real.vm), real.before);
        called
            .iter_mut()
            .zip(before)
            .for_each(|(now, before)| *now -= before);
        assert_eq!(called, model.calls, "calls of {:?}", VmStep::ALL);
        let [attachments, mounts, trees] = model.in_use();
        assert_eq!(real.manager.attachments().in_use(), attachments);
        assert_eq!(real.manager.mounts().in_use(), mounts);
        let owed = [
            model.owed_trees(),
            model.owed_mounts(),
            model.owed_attachments(),
        ]
        .concat();
        if owed.is_empty() && !model.gone {
            let left = real.vm.left();
            let there = attachments + mounts + trees + model.lingering.len();
            assert_eq!(left.len(), there, "{left:?}");
        }
        real.check_places(model);
        real.vm.check().unwrap();
    }

    fn teardown(mut real: Real, mut model: Model) {
        model.restart(u64::MAX);
        let runtime = Rc::clone(&real.runtime);
        runtime.block_on(async {
            real.restart(&model).await;
            real.check_places(&model);
            real.handles.clear();
            assert_eq!(clean(&real.vm, &real.manager).await, 1);
            assert!(real.journal.is_empty(), "{:?}", real.journal);
        });
    }
}
