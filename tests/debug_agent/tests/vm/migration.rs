//! A VM that migrates to another QEMU with its disks, and whose manager goes on there.
//!
//! All disks that migrate are on SCSI. QEMU (7.2) sends no state of virtio-pmem (`-dump-vmstate` has none), so that the guest's
//! driver would meet a device that nobody has set up; nvdimm devices can never be released. So a VM with persistent memory is refused.

use std::path::PathBuf;
use std::time::Duration;

use blockmount::journal::Record;
use blockmount::{FoundState, HolderName, Mount, MountRequest, Snapshot, Stack, StackRequest};
use blockmount_qemu::qmp::NONE;
use blockmount_qemu::{IncomingVm, Vm};
use blockmount_scsi::{Attacher as _, ScsiAddress};
use blockmount_vpmem::Mode;
use serde_json::{Value, json};

use crate::rig::{self, Rig, read_only};

const MIGRATING: Duration = Duration::from_secs(300);

fn name(name: &str) -> HolderName {
    HolderName::new(name).unwrap()
}

/// 8 disks, three of them in a stack whose scratch has been written to.
async fn set_up(rig: &Rig) -> (Vec<Mount>, Stack) {
    let mut mounts = Vec::new();
    for n in 0..5 {
        let text = format!("layer-{n}");
        let request = read_only().held_by(name(&text));
        mounts.push(rig.manager.add(&rig.layer(&text), &request).await.unwrap());
    }
    let request = StackRequest::new("/run/containers/c/rootfs")
        .layer(rig.layer("top"), read_only())
        .layer(rig.layer("bottom"), read_only())
        .scratch(rig.scratch("scratch"), MountRequest::default())
        .held_by(name("stack"));
    let stack = rig.manager.stack(&request).await.unwrap();
    write(rig, &stack, "before").await;
    (mounts, stack)
}

async fn write(rig: &Rig, stack: &Stack, text: &str) {
    let path = stack.target().join(text);
    rig.ask(json!({ "write": { "path": path, "content": text } }))
        .await;
    rig.assert_content(&path, text).await;
}

/// A QEMU that has the disks of a snapshot, each at its address.
async fn incoming(snapshot: &Snapshot) -> (IncomingVm, PathBuf) {
    let incoming = rig::builder().await.start_incoming().await.unwrap();
    let attacher = incoming.vm().scsi();
    let mut disks = 0;
    for record in snapshot.records() {
        if let Record::Attachment(record) = record {
            let address = ScsiAddress::try_from(record.locator.as_ref().unwrap()).unwrap();
            let id = attacher.identify(&record.disk).await.unwrap();
            attacher.attach(address, &record.disk, &id).await.unwrap();
            disks += 1;
        }
    }
    assert_eq!(disks, 8);
    let socket = incoming.vm().directory().join("state");
    incoming.listen(&socket).await.unwrap();
    (incoming, socket)
}

async fn status(vm: &Vm) -> Value {
    vm.qmp().execute("query-status", NONE).await.unwrap()["status"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_8_disks_go_on_in_another_qemu_and_are_released_there() {
    let source = Rig::start().await;
    let (mounts, stack) = set_up(&source).await;
    let paths: Vec<PathBuf> = mounts.iter().map(|mount| mount.path().into()).collect();
    let mut trees = Vec::new();
    for path in paths.iter().map(PathBuf::as_path).chain([stack.target()]) {
        trees.push((path.to_owned(), source.tree(path).await));
    }
    let tables = source.tables().await;

    let frozen = source.manager.freeze().await.unwrap();
    let sent = serde_json::to_string(&frozen.snapshot()).unwrap();
    let mut snapshot: Snapshot = serde_json::from_str(&sent).unwrap();
    // The other host has the images elsewhere.
    let elsewhere = source.path("elsewhere");
    std::os::unix::fs::symlink(source.dir.path(), &elsewhere).unwrap();
    let rewrite = |path: &std::path::Path| elsewhere.join(path.file_name().unwrap());
    snapshot.rewrite_sources(rewrite).unwrap();
    let (incoming, socket) = incoming(&snapshot).await;
    source.vm.migrate(&socket, MIGRATING).await.unwrap();
    let vm = incoming.arrived().await.unwrap();
    assert_eq!(status(&source.vm).await, "postmigrate");
    // They tear nothing down: the VM is elsewhere.
    drop((mounts, stack, frozen));

    let (rig, recovery) = source.go_on_in(vm, snapshot).await;
    assert_eq!(status(&rig.vm).await, "running");
    let found = &recovery.report().found;
    assert_eq!(found.len(), 8 + 8 + 1);
    assert!(
        found.iter().all(|one| one.state == FoundState::Up),
        "{found:#?}"
    );
    assert_eq!(rig.tables().await, tables);
    for (path, tree) in trees {
        assert_eq!(rig.tree(&path).await, tree, "{path:?}");
    }
    let mut claimed = Vec::new();
    for (n, path) in paths.iter().enumerate() {
        let held = recovery.claim(&name(&format!("layer-{n}"))).unwrap();
        let mount = held.into_mount().unwrap();
        assert_eq!(mount.path(), path);
        claimed.push(mount);
    }
    let stack = recovery.claim(&name("stack")).unwrap();
    let stack = stack.into_stack().unwrap();
    let settled = recovery.settle().await;
    assert!(settled.failed.is_empty(), "{settled:?}");
    write(&rig, &stack, "after").await;
    rig.assert_content(&stack.target().join("before"), "before")
        .await;
    stack.release().await.unwrap();
    for mount in claimed {
        mount.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_a_migration_that_is_called_off_leaves_all_as_it_was() {
    let rig = Rig::start().await;
    let (mut mounts, stack) = set_up(&rig).await;
    let frozen = rig.manager.freeze().await.unwrap();
    let (incoming, socket) = incoming(&frozen.snapshot()).await;
    let other = incoming.vm().clone();
    // So slow that it cannot end.
    let slow = json!({ "max-bandwidth": 64 << 10 });
    let qmp = rig.vm.qmp();
    qmp.execute("migrate-set-parameters", slow).await.unwrap();
    let error = rig.vm.migrate(&socket, Duration::from_secs(2)).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the VM cannot migrate"), "{error}");
    incoming.arrived().await.unwrap_err();
    assert!(!other.is_running());
    assert_eq!(status(&rig.vm).await, "running");
    rig.reconnect_debug_agent().await;

    let released = mounts.pop().unwrap();
    let path = released.path().to_owned();
    drop(released);
    rig.assert_content(&path.join("id"), "layer-4").await;
    let thawed = frozen.thaw().await;
    assert!(thawed.failed.is_empty(), "{thawed:?}");
    let gone = rig.ask_and_see(json!({ "tree": { "path": path.join("id") } }));
    assert!(gone.await.get("failed").is_some());
    for (n, mount) in mounts.iter().enumerate() {
        let text = format!("layer-{n}");
        rig.assert_content(&mount.path().join("id"), &text).await;
    }
    write(&rig, &stack, "after").await;
    stack.release().await.unwrap();
    for mount in mounts {
        mount.release().await.unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_persistent_memory_keeps_a_vm_from_migrating() {
    let rig = Rig::start_with_vpmem(Mode::WholeDevices).await;
    // QEMU says of which devices it has a state to send.
    let described = rig.path("vmstate.json");
    let mut qemu = std::process::Command::new("qemu-system-x86_64");
    qemu.args(["-M", "q35", "-dump-vmstate"]).arg(&described);
    assert!(qemu.output().unwrap().status.success());
    let described = std::fs::read(described).unwrap();
    let described: serde_json::Map<String, Value> = serde_json::from_slice(&described).unwrap();
    assert!(described.contains_key("virtio-scsi-device"));
    let memory = described.keys().find(|name| name.contains("virtio-pmem"));
    assert_eq!(memory, None, "it can migrate by now: lift the refusal");

    let mount = rig.manager.add(&rig.layer("layer"), &read_only()).await;
    let mount = mount.unwrap();
    assert_eq!(mount.locator().as_str(), "vpmem:0");
    let error = rig.vm.migrate(&rig.path("socket"), MIGRATING).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("bm-vpmem-0"), "{error}");
    // The lines into the guest are as before, too.
    rig.assert_content(&mount.path().join("id"), "layer").await;
    mount.release().await.unwrap();
    rig.end().await;
}
