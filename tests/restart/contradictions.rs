//! Records that make no sense, or that a recovery must not make worse.

use std::path::Path;

use blockmount::journal::{Journal, MountRecord, Progress, Record, RecordKey, StackRecord};
use blockmount::testing::{Gate, Key, VmStep};
use blockmount::{
    Binder, Error, ErrorKind, FoundState, HolderName, LayerCombiner, Mounter, Recovery,
    StackRequest, Step, ViewOptions, ViewRequest,
};

use crate::common::{calls, layer, ro, rw, scratch};
use crate::process::World;

const TEAR_DOWN: [VmStep; 4] = [
    VmStep::Separate,
    VmStep::Unmount,
    VmStep::Unplug,
    VmStep::Detach,
];

fn name(text: &str) -> HolderName {
    HolderName::new(text).unwrap()
}

fn kind<T>(outcome: Result<T, Error>) -> ErrorKind {
    outcome.err().map(|error| error.kind()).unwrap()
}

/// A stack `s` of disks 0, 1 and 2, a mount `m` of disk 3 and an attachment `a` of disk 4.
async fn with_holders() -> World {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager();
    let request = StackRequest::new("/tree").layer(layer(0), ro());
    let request = request.layer(layer(1), ro()).scratch(scratch(2), rw());
    let stack = manager.stack(&request.held_by(name("s"))).await.unwrap();
    let mount = ro().at("/m").held_by(name("m"));
    let mount = manager.add(&layer(3), &mount).await.unwrap();
    let attachment = manager.attach_held_by(&layer(4), &name("a")).await;
    std::mem::forget((stack, mount, attachment.unwrap()));
    drop(recovery);
    world.restart()
}

/// Writes the records anew as `change` leaves them.
fn rewrite(world: &World, mut change: impl FnMut(&mut Record)) {
    for mut record in world.journal.load().unwrap() {
        let key = record.key();
        change(&mut record);
        if record.key() != key {
            world.journal.remove(&key).unwrap();
        }
        world.journal.put(&record).unwrap();
    }
}

fn stack_record(world: &World) -> StackRecord {
    let records = world.journal.load().unwrap().into_iter();
    let mut stacks = records.filter_map(|record| match record {
        Record::Stack(stack) => Some(stack),
        _ => None,
    });
    stacks.next().unwrap()
}

fn mount_record(world: &World, disk: usize) -> MountRecord {
    let records = world.journal.load().unwrap();
    let of_disk = |record: Record| match record {
        Record::Attachment(one) => (one.disk == layer(disk)).then_some(one.id),
        _ => None,
    };
    let id = records.iter().cloned().find_map(of_disk).unwrap();
    let mut mounts = records.into_iter().filter_map(|record| match record {
        Record::Mount(mount) if mount.disk.as_ref() == Some(&id) => Some(mount),
        _ => None,
    });
    mounts.next().unwrap()
}

fn refused(recovery: &Recovery) -> Vec<RecordKey> {
    let found = recovery.report().found.iter();
    let found = found.filter(|one| one.state == FoundState::Refused);
    let mut refused = Vec::new();
    for one in found {
        let error = one.error.as_ref().unwrap();
        assert!(matches!(
            error.kind(),
            ErrorKind::Invalid | ErrorKind::Conflict
        ));
        refused.push(one.what.clone());
    }
    refused
}

/// A layer was taken away behind our back, and the tree is in use.
#[tokio::test(start_paused = true)]
async fn r02_the_record_of_a_stack_keeps_layers_that_are_gone() {
    let mut world = with_holders().await;
    let before = stack_record(&world);
    // As a recovery does that finds the mount of a layer gone.
    let gone = RecordKey::Mount(before.layers[0].clone());
    world.journal.remove(&gone).unwrap();
    for attempt in 0..3 {
        let busy = Gate::Err(ErrorKind::Busy);
        world.vm.gate_always(VmStep::Separate, busy);
        let recovery = world.recover().await;
        assert_eq!(refused(&recovery), []);
        if attempt == 0 {
            assert_eq!(kind(recovery.claim(&name("s"))), ErrorKind::NotFound);
        }
        std::mem::forget(recovery.claim(&name("m")).unwrap());
        std::mem::forget(recovery.claim(&name("a")).unwrap());
        let settled = recovery.settle().await;
        let mut failed = settled.failed.iter();
        assert!(
            failed.any(|error| error.step() == Step::Separate),
            "{settled:?}"
        );
        let after = stack_record(&world);
        let mut expected = before.clone();
        expected.progress = Progress::Ending;
        assert_eq!(after, expected, "attempt {attempt}");
        world = world.restart();
    }
    world.vm.open_gates();
    let recovery = world.recover().await;
    let manager = recovery.manager().clone();
    drop(recovery.settle().await);
    world.vm.unmount(&before.overlay.layers[0]).await.unwrap();
    assert!(manager.drain().await.is_clean() && world.journal.is_empty());
    world.vm.assert_empty();
}

/// A disk was detached under its mount, which cannot be unmounted yet.
#[tokio::test(start_paused = true)]
async fn r02_the_record_of_a_mount_keeps_a_disk_that_is_gone() {
    let world = with_holders().await;
    let before = mount_record(&world, 3);
    let disk = Key::Disk(before.disk.clone().unwrap());
    let target = Key::Target(before.target.as_path().into());
    world.vm.take_out(&layer(3));
    world.vm.gate_by(move |call| match call.step {
        VmStep::Adopt if *call.key == target => Gate::Uncertain { happened: true },
        VmStep::Unmount if *call.key == target => Gate::Err(ErrorKind::Busy),
        _ => Gate::Ok,
    });
    let recovery = world.recover().await;
    let gone = recovery.report().found.iter().find(|one| match &one.what {
        RecordKey::Attachment(id) => Key::Disk(id.clone()) == disk,
        _ => false,
    });
    assert_eq!(gone.unwrap().state, FoundState::Gone);
    assert_eq!(recovery.settle().await.failed.len(), 1);
    let records = world.journal.load().unwrap().into_iter();
    let mut mounts = records.filter_map(|record| match record {
        Record::Mount(mount) => Some(mount.disk),
        _ => None,
    });
    assert_eq!(mounts.next().unwrap(), before.disk);
}

#[tokio::test(start_paused = true)]
async fn r02_a_record_that_makes_no_sense_loses_no_other_holder() {
    let world = with_holders().await;
    rewrite(&world, |record| {
        if let Record::Stack(stack) = record {
            drop(stack.layers.pop());
        }
    });
    let broken = stack_record(&world);
    let recovery = world.recover().await;
    assert_eq!(refused(&recovery), [RecordKey::Stack("/tree".into())]);
    for _ in 0..2 {
        assert_eq!(kind(recovery.claim(&name("s"))), ErrorKind::Invalid);
    }
    let manager = recovery.manager().clone();
    let taken = manager.attach_held_by(&layer(5), &name("s")).await;
    assert_eq!(kind(taken), ErrorKind::Conflict);
    let taken = manager.add(&layer(5), &ro().at("/tree")).await;
    assert_eq!(kind(taken), ErrorKind::Conflict);
    let mount = recovery.claim(&name("m")).unwrap();
    let attachment = recovery.claim(&name("a")).unwrap();
    let before = calls(&world.vm, TEAR_DOWN);
    let settled = recovery.settle().await;
    assert!(settled.failed.is_empty(), "{settled:?}");
    assert_eq!(calls(&world.vm, TEAR_DOWN), before);
    mount.release().await.unwrap();
    attachment.release().await.unwrap();
    assert!(manager.drain().await.failed.is_empty());
    assert_eq!(world.vm.left().len(), 7, "three disks, mounts, an overlay");
    drop(manager);
    assert_eq!(stack_record(&world), broken);

    // Somebody takes the overlay away: then it stands in nobody's way.
    let next = world.restart();
    next.vm.separate(Path::new("/tree")).await.unwrap();
    let recovery = next.recover().await;
    assert_eq!(refused(&recovery), []);
    assert!(recovery.settle().await.is_clean() && next.journal.is_empty());
    next.vm.assert_empty();
}

type Change = fn(&mut Record, &MountRecord);

/// Each way in which records contradict each other: who is not concerned has its handle, and nothing that is named is
/// touched.
#[tokio::test(start_paused = true)]
async fn r02_what_contradicts_another_record_stays_as_it_is() {
    let changes: [(&str, Change); 4] = [
        ("two disks at one locator", |record, mount| {
            if let Record::Attachment(one) = record
                && one.disk == layer(4)
            {
                one.locator = Some(mount.key.device.clone());
            }
        }),
        ("a writable mount of a read-only disk", |record, mount| {
            if let Record::Mount(one) = record
                && one.target == mount.target
            {
                one.key.options = Default::default();
            }
        }),
        ("a stack at the path of a mount", |record, _| {
            if let Record::Mount(one) = record
                && one.target == Path::new("/m")
            {
                one.target = "/tree".into();
            }
        }),
        ("two disks of one name", |record, _| {
            if let Record::Attachment(one) = record
                && one.disk == layer(4)
            {
                one.disk = layer(3);
            }
        }),
    ];
    for (what, change) in changes {
        let world = with_holders().await;
        let mount = mount_record(&world, 3);
        rewrite(&world, |record| change(record, &mount));
        let left = world.vm.left();
        // What is asked for like this is not found, and may be there all the same.
        world
            .vm
            .gate_always(VmStep::Adopt, Gate::Uncertain { happened: true });
        let recovery = world.recover().await;
        assert!(!refused(&recovery).is_empty(), "{what}");
        assert_eq!(recovery.report().found.len(), 10, "{what}");
        drop(recovery);
        assert_eq!(world.vm.left(), left, "{what}");

        let next = world.restart();
        next.vm.open_gates();
        next.vm.gate_by(|_| Gate::Ok);
        let recovery = next.recover().await;
        let stack = recovery.claim(&name("s"));
        let named = refused(&recovery);
        let concerned = named.contains(&RecordKey::Stack("/tree".into()));
        assert_eq!(stack.is_ok(), !concerned, "{what}: {stack:?}");
        // A mount whose record says something else is not found; what is below it is then in use.
        let failed = recovery.settle().await.failed;
        let in_use = failed.iter().all(|error| error.kind() == ErrorKind::Busy);
        assert!(in_use, "{what}: {failed:?}");
        for key in named {
            let records = next.journal.load().unwrap();
            let kept = records.iter().any(|record| record.key() == key);
            assert!(kept, "{what}: {key}");
            if let RecordKey::Attachment(id) = key {
                let disks = next.vm.left().join("\n");
                assert!(disks.contains(&id.to_string()), "{what}: {id} of {disks}");
            }
        }
    }
}

/// A view of a mount of disk 0, and another mount, of disk 1.
async fn with_a_view() -> World {
    let world = World::new();
    let recovery = world.recover().await;
    let manager = recovery.manager();
    let shown = manager.add(&layer(0), &ro().at("/shown")).await.unwrap();
    let other = manager.add(&layer(1), &ro().at("/other")).await.unwrap();
    let view = ViewRequest::new("/view", ViewOptions::default()).held_by(name("v"));
    let view = manager.view(&shown, &view).await.unwrap();
    std::mem::forget((shown, other, view));
    drop(recovery);
    world.restart()
}

fn view_record(world: &World) -> Option<Record> {
    let mut records = world.journal.load().unwrap().into_iter();
    records.find(|record| matches!(record, Record::View(_)))
}

/// The record of a mount is lost, and its view is in use.
#[tokio::test(start_paused = true)]
async fn r02_the_record_of_a_view_keeps_a_mount_that_is_gone() {
    let mut world = with_a_view().await;
    let gone = RecordKey::Mount(mount_record(&world, 0).key);
    world.journal.remove(&gone).unwrap();
    let Some(Record::View(before)) = view_record(&world) else {
        panic!("the view is recorded");
    };
    for attempt in 0..3 {
        world
            .vm
            .gate_always(VmStep::Unbind, Gate::Err(ErrorKind::Busy));
        let recovery = world.recover().await;
        assert_eq!(refused(&recovery), []);
        assert_eq!(kind(recovery.claim(&name("v"))), ErrorKind::NotFound);
        let settled = recovery.settle().await;
        let mut failed = settled.failed.iter();
        assert!(
            failed.any(|error| error.step() == Step::Unbind),
            "attempt {attempt}: {settled:?}"
        );
        let Some(Record::View(after)) = view_record(&world) else {
            panic!("the view is recorded still");
        };
        assert_eq!(after.mount, before.mount);
        assert_eq!(after.progress, Progress::Ending);
        world = world.restart();
    }
    world.vm.open_gates();
    drop(world.recover().await.settle().await);
    assert_eq!(view_record(&world), None);
}

/// A record says that a view shows another mount than it names: both stay for as long as it may be there.
#[tokio::test(start_paused = true)]
async fn r02_a_view_whose_record_makes_no_sense_keeps_what_it_may_show() {
    let world = with_a_view().await;
    rewrite(&world, |record| {
        if let Record::View(view) = record {
            view.bind.source = "/other".into();
        }
    });
    let broken = view_record(&world);
    let left = world.vm.left();
    let view = Key::Target(Path::new("/view").into());
    world.vm.gate_by(move |call| match call.step {
        VmStep::Adopt if *call.key == view => Gate::Uncertain { happened: true },
        _ => Gate::Ok,
    });
    let recovery = world.recover().await;
    assert_eq!(refused(&recovery), [RecordKey::View("/view".into())]);
    assert_eq!(kind(recovery.claim(&name("v"))), ErrorKind::Invalid);
    let manager = recovery.manager().clone();
    assert!(recovery.settle().await.failed.is_empty());
    assert!(manager.drain().await.failed.is_empty());
    assert_eq!(world.vm.left(), left);
    assert_eq!(view_record(&world), broken);
    drop(manager);
    // Somebody takes it away: then it stands in nobody's way.
    let next = world.restart();
    next.vm.gate_by(|_| Gate::Ok);
    next.vm.unbind(Path::new("/view")).await.unwrap();
    let recovery = next.recover().await;
    assert_eq!(refused(&recovery), []);
    assert!(recovery.settle().await.is_clean());
    next.assert_all_down();
}
