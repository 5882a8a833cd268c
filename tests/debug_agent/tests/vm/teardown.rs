//! Taking disks out that somebody uses, and an agent that dies meanwhile.

use std::path::Path;

use blockmount::{ErrorKind, MountOptions, MountRequest, StackRequest};
use serde_json::json;

use crate::rig::{Rig, read_only};

fn hold(path: &Path) -> serde_json::Value {
    json!({ "hold": { "path": path } })
}

fn release(path: &Path) -> serde_json::Value {
    json!({ "release": { "path": path } })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_disk_in_use_refuses_its_release_and_stays_usable() {
    let rig = Rig::start().await;
    let mount = rig
        .manager
        .add(&rig.layer("used"), &read_only())
        .await
        .unwrap();
    let file = mount.path().join("id");
    rig.ask(hold(&file)).await;
    let refused = mount.release().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    // Who uses it is named, and the disk is as it was.
    let cause = refused.error().cause().message().to_owned();
    assert!(cause.contains("in use by process "), "{cause}");
    rig.assert_content(&file, "used").await;
    rig.ask(release(&file)).await;
    refused.retry().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_g21_a_device_that_somebody_has_open_is_not_unplugged() {
    use blockmount::Unplugger;
    let rig = Rig::start().await;
    let attachment = rig.manager.attach(&rig.layer("open")).await.unwrap();
    let locator = attachment.locator().clone();
    // Mounted by somebody else than the agent, behind its back.
    let mount = rig
        .manager
        .add(&rig.layer("open"), &read_only())
        .await
        .unwrap();
    let error = rig.guest.unplug(&locator).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    rig.assert_content(&mount.path().join("id"), "open").await;
    mount.release().await.unwrap();
    attachment.release().await.unwrap();
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_agent_that_was_killed_undoes_what_it_had_done() {
    let rig = Rig::start().await;
    let stack = StackRequest::new("/run/containers/c/rootfs")
        .layer(rig.layer("layer"), read_only())
        .scratch(rig.scratch("scratch"), MountRequest::default());
    let stack = rig.manager.stack(&stack).await.unwrap();
    let single = rig
        .manager
        .add(&rig.layer("single"), &read_only())
        .await
        .unwrap();
    let killed = rig.ask(json!("kill_agent")).await;
    assert!(killed["pid"].is_number(), "{killed}");
    // The next agent goes on: what is mounted stays so, can be shared, and is undone.
    let disk = rig.layer("after");
    let other = match rig.manager.add(&disk, &read_only()).await {
        // It was on its way when the connection ended, and has been taken back since.
        Err(error) if error.kind() == ErrorKind::Uncertain => {
            rig.manager.add(&disk, &read_only()).await
        }
        added => added,
    };
    let other = other.unwrap();
    rig.assert_content(&other.path().join("id"), "after").await;
    rig.assert_content(&stack.target().join("id"), "layer")
        .await;
    rig.ask(json!("kill_agent")).await;
    for released in [
        stack.release().await,
        single.release().await,
        other.release().await,
    ] {
        match released {
            Err(doubtful) if doubtful.kind() == ErrorKind::Uncertain => {
                doubtful.retry().await.unwrap();
            }
            released => released.unwrap(),
        }
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_an_agent_that_is_killed_during_the_work_leaves_nothing() {
    let rig = Rig::start().await;
    let disks: Vec<_> = (0..16).map(|n| rig.layer(&format!("layer-{n}"))).collect();
    for _ in 0..4 {
        let request = read_only();
        let adding = disks.iter().map(|disk| rig.manager.add(disk, &request));
        let adding = futures_util::future::join_all(adding);
        let (added, _) = tokio::join!(adding, rig.ask(json!("kill_agent")));
        for outcome in added {
            match outcome {
                Ok(mount) => mount.release().await.unwrap(),
                // It may have been done, or the agent was not there.
                Err(error) => assert!(
                    matches!(error.kind(), ErrorKind::Uncertain | ErrorKind::Other),
                    "{error}: {}",
                    error.cause()
                ),
            }
        }
        let drained = rig.manager.drain().await;
        assert!(drained.is_clean(), "{drained:?}");
        rig.assert_as_at_first().await;
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_target_outside_of_the_agent_s_roots_is_refused() {
    let rig = Rig::start().await;
    for target in [
        "/run/other",
        "/etc/x",
        "/run/mounts/../other",
        "/run/mounts",
    ] {
        let request = MountRequest::new(MountOptions::read_only()).at(target);
        let error = rig
            .manager
            .add(&rig.layer("x"), &request)
            .await
            .unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::Invalid,
            "{target}: {error}: {}",
            error.cause()
        );
    }
    // Nothing was harmed by that.
    let mount = rig
        .manager
        .add(&rig.layer("y"), &read_only())
        .await
        .unwrap();
    mount.release().await.unwrap();
    rig.end().await;
}
