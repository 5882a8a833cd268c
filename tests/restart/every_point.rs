//! A process that is killed at every point of add, attach, stack, release and drain, and at every point of the recovery.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use blockmount::testing::FakeVm;
use blockmount::{ErrorKind, Held, HolderName, Manager, StackRequest, ViewOptions, ViewRequest};

use crate::common::{layer, ro, rw, scratch};
use crate::process::{Killing, World, run};

/// Where each holder has its handle: what its caller was given and has not released.
type Handles = Arc<Mutex<BTreeMap<String, PathBuf>>>;

fn name(text: &str) -> HolderName {
    HolderName::new(text).unwrap()
}

/// Everything that a manager does, with named handles and others.
async fn everything(world: World, journal: Killing, handles: Handles) {
    let recovery = world.alive(world.builder().recover(journal).await).await;
    let manager = recovery.manager().clone();
    let drained = recovery.settle().await;
    let clean = drained.is_clean().then_some(()).ok_or(drained);
    world.alive(clean).await;
    let got = |name: &str, path: &std::path::Path| {
        handles
            .lock()
            .unwrap()
            .insert(name.to_owned(), path.to_owned());
    };
    let left = |name: &str| drop(handles.lock().unwrap().remove(name));

    let attachment = world
        .alive(manager.attach_held_by(&layer(1), &name("a")).await)
        .await;
    got("a", attachment.disk().source());
    let mount = world
        .alive(manager.add(&layer(0), &ro().held_by(name("m"))).await)
        .await;
    got("m", mount.path());
    let shared = world.alive(manager.add(&layer(0), &ro()).await).await;
    let fixed = ro().at("/fixed").with_device(layer(5));
    let fixed = fixed.with_device(layer(6)).held_by(name("at"));
    let at = world.alive(manager.add(&layer(4), &fixed).await).await;
    got("at", at.path());
    let request = ViewRequest::new("/view", ViewOptions::default()).held_by(name("v"));
    let view = world.alive(manager.view(&at, &request).await).await;
    got("v", view.target());
    let request = StackRequest::new("/tree")
        .layer(layer(0), ro())
        .layer(layer(2), ro())
        .scratch(scratch(3), rw())
        .held_by(name("s"));
    let stack = world.alive(manager.stack(&request).await).await;
    got("s", stack.target());
    let request = ViewRequest::new("/seen", ViewOptions::default()).held_by(name("t"));
    let tree = world.alive(manager.view(&stack, &request).await).await;
    got("t", tree.target());
    let other = StackRequest::new("/other").layer(layer(2), ro());
    let other = world.alive(manager.stack(&other).await).await;

    left("m");
    world.alive(mount.release().await).await;
    let again = world
        .alive(manager.add(&layer(0), &ro().held_by(name("m"))).await)
        .await;
    got("m", again.path());
    drop(shared);
    world.alive(other.release().await).await;
    left("s");
    world.alive(stack.release().await).await;
    left("a");
    drop(attachment);
    drop(manager.drain().await);
    left("t");
    world.alive(tree.release().await).await;
    left("at");
    world.alive(at.release().await).await;
    left("v");
    world.alive(view.release().await).await;
    left("m");
    drop(again);
    let drained = manager.drain().await;
    let clean = drained.is_clean().then_some(()).ok_or(drained);
    world.alive(clean).await;
}

/// The next process: every holder comes back, one of them with something new; then everything is released.
async fn come_back(world: World, journal: Killing, handles: Handles) {
    let recovery = world.alive(world.builder().recover(journal).await).await;
    let expected = handles.lock().unwrap().clone();
    let mut held = Vec::new();
    for text in ["a", "m", "at", "s", "v", "t"] {
        match (recovery.claim(&name(text)), expected.get(text)) {
            (Ok(handle), path) => {
                check(&world.vm, &handle, path);
                held.push(handle);
            }
            (Err(error), None) => assert_eq!(error.kind(), ErrorKind::NotFound),
            (Err(error), Some(path)) => panic!("{text} has lost {}: {error:?}", path.display()),
        }
        let twice = recovery.claim(&name(text)).unwrap_err().kind();
        assert!(matches!(twice, ErrorKind::Conflict | ErrorKind::NotFound));
    }
    let manager: Manager = recovery.manager().clone();
    let settled = recovery.settle().await;
    let clean = settled.failed.is_empty().then_some(()).ok_or(settled);
    world.alive(clean).await;
    for handle in &held {
        check(&world.vm, handle, None);
    }
    let new = world.alive(manager.add(&layer(2), &ro()).await).await;
    world.alive(new.release().await).await;
    handles.lock().unwrap().clear();
    for handle in held {
        world.alive(handle.release().await).await;
    }
    let drained = manager.drain().await;
    let clean = drained.is_clean().then_some(()).ok_or(drained);
    world.alive(clean).await;
}

/// What a handle says is so.
fn check(vm: &FakeVm, held: &Held, path: Option<&PathBuf>) {
    let there = match held {
        Held::Attachment(attachment) => {
            assert_eq!(
                vm.locator_of(attachment.disk()).as_ref(),
                Some(attachment.locator())
            );
            attachment.disk().source()
        }
        Held::Mount(mount) => {
            assert_eq!(vm.device_at(mount.path()).as_ref(), Some(mount.locator()));
            mount.path()
        }
        Held::Stack(stack) => {
            let tree = format!("{} overlays 2 layers", stack.target().display());
            let scratch = format!("{} overlays 3 layers", stack.target().display());
            assert!(vm.left().contains(&tree) || vm.left().contains(&scratch));
            stack.target()
        }
        Held::View(view) => {
            let shown = view.source().display();
            let shows = format!("{} shows {shown}", view.target().display());
            assert!(vm.left().contains(&shows));
            view.target()
        }
        held => panic!("{held:?} is new to this test"),
    };
    if let Some(path) = path {
        assert_eq!(there, path);
    }
}

/// Nothing is left but what is not ours, and nobody broke a contract.
fn end(world: &World, foreign: &[String]) {
    world.vm.check().unwrap();
    assert_eq!(world.vm.left(), foreign);
    assert!(world.journal.is_empty(), "{:?}", world.journal);
}

fn world() -> (World, Vec<String>) {
    let world = World::new();
    world.vm.attach_foreign(&layer(9));
    let foreign = world.vm.left();
    (world, foreign)
}

const NEVER: usize = usize::MAX;

fn finish(mut world: World, handles: &Handles, foreign: &[String], kill_at: usize) -> bool {
    let outcome = run(&world, kill_at, |world, journal| {
        come_back(world, journal, handles.clone())
    });
    let killed = match outcome {
        Ok(()) => false,
        Err(next) => {
            world = next;
            let last = run(&world, NEVER, |world, journal| {
                come_back(world, journal, handles.clone())
            });
            assert!(last.is_ok());
            true
        }
    };
    end(&world, foreign);
    killed
}

#[test]
fn a_process_that_is_killed_at_any_point_is_recovered() {
    let (mut points, mut twice) = (0, 0);
    loop {
        let (world, foreign) = world();
        let handles = Handles::default();
        let first = run(&world, points, |world, journal| {
            everything(world, journal, handles.clone())
        });
        let Err(_) = first else {
            end(&world, &foreign);
            break;
        };
        // Once recovered in peace, and once killed at each point of the recovery as well.
        for kill_at in 0.. {
            let (world, foreign) = self::world();
            let handles = Handles::default();
            let main = |world, journal| everything(world, journal, handles.clone());
            let next = run(&world, points, main).unwrap_err();
            twice += 1;
            if !finish(next, &handles, &foreign, kill_at) {
                break;
            }
        }
        points += 1;
    }
    println!("{points} points, {twice} pairs");
    assert!(
        points > 80 && twice > 1_000,
        "{points} points, {twice} pairs"
    );
}
