//! A manager that is frozen, and one that goes on with what it had on another host.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockmount::testing::{Gate, MemoryJournal, VmStep};
use blockmount::{
    ErrorKind, FoundState, HolderName, Manager, Snapshot, StackRequest, ViewOptions, ViewRequest,
};

use crate::common::{layer, ro, rw, scratch};
use crate::process::World;

fn name(text: &str) -> HolderName {
    HolderName::new(text).unwrap()
}

/// A manager with a mount, a stack, an attachment and two views that have holders, and a mount of several devices that has none.
async fn busy(world: &World) -> Manager {
    let manager = world.builder().build();
    let mount = manager
        .add(&layer(0), &ro().held_by(name("m")))
        .await
        .unwrap();
    let request = StackRequest::new("/tree")
        .layer(layer(1), ro())
        .scratch(scratch(2), rw())
        .held_by(name("s"));
    let stack = manager.stack(&request).await.unwrap();
    let attachment = manager.attach_held_by(&layer(3), &name("a")).await.unwrap();
    let other = ro().with_device(layer(5)).with_device(layer(6));
    let other = manager.add(&layer(4), &other).await.unwrap();
    let view = ViewRequest::new("/view", ViewOptions::default()).held_by(name("v"));
    let view = manager.view(&other, &view).await.unwrap();
    let tree = ViewRequest::new("/seen", ViewOptions::default()).held_by(name("t"));
    let tree = manager.view(&stack, &tree).await.unwrap();
    std::mem::forget((mount, stack, attachment, other, view, tree));
    manager
}

#[tokio::test(start_paused = true)]
async fn a_frozen_manager_refuses_work_and_tears_nothing_down() {
    let world = World::new();
    let manager = world.builder().build();
    let held = manager
        .add(&layer(0), &ro().held_by(name("m")))
        .await
        .unwrap();
    let other = manager.attach(&layer(1)).await.unwrap();
    // What is under way is waited for.
    world.vm.delay(VmStep::Attach, Duration::from_secs(5));
    let (slow, disk) = (manager.clone(), layer(2));
    let slow = tokio::spawn(async move { slow.add(&disk, &ro()).await });
    world.vm.until_called(VmStep::Attach, 3).await;
    let frozen = manager.freeze().await.unwrap();
    let slow = slow.await.unwrap().unwrap();
    assert_eq!(manager.freeze().await.unwrap_err().kind(), ErrorKind::Busy);
    for kind in [
        manager.add(&layer(0), &ro()).await.map(drop),
        manager.attach(&layer(5)).await.map(drop),
        manager
            .stack(&StackRequest::new("/t").layer(layer(0), ro()))
            .await
            .map(drop),
    ] {
        assert_eq!(kind.unwrap_err().kind(), ErrorKind::Busy);
    }
    let before = (world.vm.left(), frozen.snapshot().records().len());
    drop(held);
    assert_eq!(other.release().await.unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(manager.drain().await.failed.len(), 2);
    assert_eq!((world.vm.left(), frozen.snapshot().records().len()), before);
    let drained = frozen.thaw().await;
    assert_eq!(
        (drained.failed.len(), drained.in_use),
        (0, 2),
        "{drained:?}"
    );
    let again = manager
        .add(&layer(0), &ro().held_by(name("m")))
        .await
        .unwrap();
    again.release().await.unwrap();
    slow.release().await.unwrap();
    assert!(manager.drain().await.is_clean());
    world.vm.check().unwrap();
    world.vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_is_given_up_thaws() {
    let world = World::new();
    let manager = world.builder().build();
    world.vm.delay(VmStep::Attach, Duration::from_secs(5));
    let (slow, disk) = (manager.clone(), layer(0));
    let slow = tokio::spawn(async move { slow.attach(&disk).await });
    world.vm.until_called(VmStep::Attach, 1).await;
    let given_up = tokio::time::timeout(Duration::from_secs(1), manager.freeze()).await;
    assert!(given_up.is_err());
    slow.await.unwrap().unwrap().release().await.unwrap();
    manager
        .attach(&layer(1))
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
    assert!(manager.drain().await.is_clean());
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_restored_under_the_names_of_another_host() {
    let world = World::new();
    let frozen = busy(&world).await.freeze().await.unwrap();
    let mut snapshot = frozen.snapshot();
    let before = world.vm.left();
    let next = world.restart();
    for number in 0..7 {
        next.vm.alias(
            format!("/here/{number}.img"),
            format!("/images/{number}.img"),
        );
    }
    let here = |path: &Path| Path::new("/here").join(path.file_name().unwrap());
    snapshot.rewrite_sources(here).unwrap();
    let journal = MemoryJournal::new();
    let restored = next
        .builder()
        .restore(snapshot.clone(), Some(Arc::new(journal.clone())));
    let recovery = restored.await.unwrap();
    assert_eq!(next.vm.left(), before);
    assert!(
        recovery
            .report()
            .found
            .iter()
            .all(|one| one.state == FoundState::Up)
    );
    let again = next
        .builder()
        .restore(snapshot, Some(Arc::new(journal.clone())));
    assert_eq!(again.await.unwrap_err().kind(), ErrorKind::Conflict);
    let mount = recovery.claim(&name("m")).unwrap();
    let stack = recovery.claim(&name("s")).unwrap();
    let attachment = recovery
        .claim(&name("a"))
        .unwrap()
        .into_attachment()
        .unwrap();
    assert_eq!(attachment.disk().source(), Path::new("/here/3.img"));
    let view = recovery.claim(&name("v")).unwrap().into_view().unwrap();
    assert_eq!(view.target(), Path::new("/view"));
    let tree = recovery.claim(&name("t")).unwrap().into_view().unwrap();
    assert_eq!((tree.source(), tree.mount()), (Path::new("/tree"), None));
    let manager = recovery.manager().clone();
    assert!(recovery.settle().await.failed.is_empty());
    view.release().await.unwrap();
    tree.release().await.unwrap();
    mount.release().await.unwrap();
    stack.release().await.unwrap();
    attachment.release().await.unwrap();
    assert!(manager.drain().await.is_clean() && journal.is_empty());
    next.vm.check().unwrap();
    next.vm.assert_empty();
}

fn read(text: &str) -> Result<Snapshot, String> {
    serde_json::from_str(text).map_err(|error: serde_json::Error| error.to_string())
}

#[tokio::test(start_paused = true)]
async fn n16_a_snapshot_that_cannot_be_is_refused() {
    let world = World::new();
    let snapshot = busy(&world).await.freeze().await.unwrap().snapshot();
    let text = serde_json::to_string(&snapshot).unwrap();
    assert_eq!(read(&text).unwrap(), snapshot);
    let cases: [(&str, &str); 6] = [
        ("\"version\":1", "\"version\":2"),
        ("\"locator\":\"fake:0\"", "\"locator\":\"fake:1\""),
        ("\"locator\":\"fake:0\"", "\"locator\":\"fake:77\""),
        ("\"locator\":\"fake:0\"", "\"locator\":\"0\""),
        ("\"name\":\"m\"", "\"name\":\"\""),
        (
            "\"of\":{\"Stack\":\"/tree\"}",
            "\"of\":{\"Stack\":\"/other\"}",
        ),
    ];
    for (from, to) in cases {
        assert!(text.contains(from), "{from} in {text}");
        let changed = text.replacen(from, to, 1);
        assert!(read(&changed).is_err(), "{to}");
    }
    // Any record may be missing or twice: it is refused, or nothing stands on it.
    let records = serde_json::to_value(snapshot.records()).unwrap();
    let records = records.as_array().unwrap();
    for index in 0..records.len() {
        let mut twice = records.clone();
        twice.push(records[index].clone());
        let twice = serde_json::json!({ "version": 1, "records": twice });
        assert!(read(&twice.to_string()).is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn n17_what_was_never_up_or_half_down_is_not_restored_as_up() {
    let world = World::new();
    let manager = world.builder().build();
    let held = manager.add(&layer(0), &ro()).await.unwrap();
    world
        .vm
        .gate_next(VmStep::Unmount, 2, Gate::Err(ErrorKind::Busy));
    drop(held.release().await.unwrap_err());
    let snapshot = manager.freeze().await.unwrap().snapshot();
    let snapshot = read(&serde_json::to_string(&snapshot).unwrap()).unwrap();
    let next = world.restart();
    next.vm.open_gates();
    let recovery = next.builder().restore(snapshot, None).await.unwrap();
    let states: Vec<_> = recovery
        .report()
        .found
        .iter()
        .map(|one| one.state)
        .collect();
    assert_eq!(states, [FoundState::Up, FoundState::Pending]);
    assert!(recovery.settle().await.is_clean());
    next.vm.check().unwrap();
    next.vm.assert_empty();
}

#[tokio::test(start_paused = true)]
async fn n18_two_disks_are_never_rewritten_to_one_name() {
    let world = World::new();
    let mut snapshot = busy(&world).await.freeze().await.unwrap().snapshot();
    let before = snapshot.clone();
    let error = snapshot
        .rewrite_sources(|_| "/images/one.img".into())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(snapshot, before);
}

#[tokio::test(start_paused = true)]
async fn n19_a_snapshot_has_everything() {
    let world = World::new();
    let snapshot = busy(&world).await.freeze().await.unwrap().snapshot();
    let text = serde_json::to_string(&snapshot).unwrap();
    assert_eq!(read(&text).unwrap(), snapshot);
    let next = world.restart();
    let recovery = next
        .builder()
        .restore(read(&text).unwrap(), None)
        .await
        .unwrap();
    assert_eq!(recovery.report().holders.len(), 5);
    assert_eq!(recovery.report().found.len(), 7 + 4 + 1 + 2);
    let manager = recovery.manager().clone();
    assert!(recovery.settle().await.is_clean());
    assert!(manager.drain().await.is_clean());
    next.vm.assert_empty();
}
