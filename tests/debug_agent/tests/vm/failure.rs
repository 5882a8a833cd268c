//! A VM that dies, and one whose guest is hostile.

use std::time::{Duration, Instant};

use blockmount::ErrorKind;
use futures_util::future::join_all;

use crate::rig::{Rig, read_only};
use blockmount_debug_agent::kit;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_when_qemu_is_killed_every_call_ends_and_nothing_is_pending() {
    let rig = Rig::start().await;
    let disks: Vec<_> = (0..24).map(|n| rig.layer(&format!("layer-{n}"))).collect();
    let (held, adding) = disks.split_at(8);
    let request = read_only();
    let added = join_all(held.iter().map(|disk| rig.manager.add(disk, &request))).await;
    let mounts: Vec<_> = added.into_iter().map(Result::unwrap).collect();
    let dying = async {
        // In the middle of what the others do.
        tokio::time::sleep(Duration::from_millis(60)).await;
        rig.vm.kill();
        Instant::now()
    };
    let all = join_all(adding.iter().map(|disk| rig.manager.add(disk, &request)));
    let (outcomes, killed) = tokio::join!(all, dying);
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    for outcome in outcomes {
        match outcome {
            // It was done before, and is given back now.
            Ok(mount) => mount.release().await.unwrap(),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Gone, "{error}: {}", error.cause()),
        }
    }
    for mount in mounts {
        // What a dead VM had is released.
        mount.release().await.unwrap();
    }
    let drained = rig.manager.drain().await;
    assert!(drained.is_clean(), "{drained:?}");
    let error = rig.manager.add(&disks[0], &request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    assert!(rig.vm.ended().await.contains("SIGKILL"));
    rig.end_as_it_is().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_vm_that_is_dropped_is_gone_with_its_files() {
    let rig = Rig::start().await;
    let directory = rig.vm.directory().to_owned();
    assert!(directory.exists());
    drop(rig);
    kit::eventually("the removal of the VM's files", || !directory.exists());
    let marker = directory.display().to_string();
    kit::eventually("the end of the process", || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        !processes
            .filter_map(|process| std::fs::read(process.path().join("cmdline")).ok())
            .any(|line| String::from_utf8_lossy(&line).contains(&marker))
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_guest_that_answers_garbage_is_given_up_on_and_harms_nobody() {
    let rig = Rig::start().await;
    let mount = rig
        .manager
        .add(&rig.layer("before"), &read_only())
        .await
        .unwrap();
    // The debug agent speaks another language: what it says is no frame of the bridge.
    rig.release_debug_agent().await;
    let started = Instant::now();
    let error = rig.vm.guest("blockmount.debug").await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(30), "{error}");
    rig.reconnect_debug_agent().await;
    rig.assert_content(&mount.path().join("id"), "before").await;
    mount.release().await.unwrap();
    rig.end().await;
}
