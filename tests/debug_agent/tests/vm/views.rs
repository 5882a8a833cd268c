//! One volume at many places of a real guest.

use std::path::Path;

use blockmount::{
    BindMount, Binder, Disk, ErrorKind, FsGroup, IdMap, MountOptions, MountRequest, Presence,
    StackRequest, ViewOptions, ViewRequest,
};
use blockmount_debug_agent::kit::images;
use serde_json::{Value, json};

use crate::rig::Rig;

fn options(names: &[&str]) -> ViewOptions {
    ViewOptions::new(names.iter().copied()).unwrap()
}

fn write(path: &Path, text: &str) -> Value {
    json!({ "write": { "path": path, "content": text } })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u15_u21_u22_a_volume_is_seen_in_several_ways_and_with_other_owners() {
    let rig = Rig::start().await;
    let volume = rig.scratch("volume");
    let volume = rig.manager.add(&volume, &MountRequest::default()).await;
    let volume = volume.unwrap();
    let map: IdMap = "0:100000:65536".parse().unwrap();
    let at = |target: &str, options| ViewRequest::new(target, options);
    let mut views = Vec::new();
    for request in [
        at("/run/containers/1/data", options(&["nosuid"])),
        at("/run/containers/2/data", options(&["ro", "noexec"])),
        at("/run/containers/3/data", options(&[]).with_id_map(map)),
    ] {
        views.push(rig.manager.view(&volume, &request).await.unwrap());
    }
    // The views keep the mount.
    volume.release().await.unwrap();
    let [writer, reader, mapped] = [0, 1, 2].map(|n| views[n].target().join("file"));
    rig.ask(write(&writer, "written")).await;
    for file in [&writer, &reader, &mapped] {
        rig.assert_content(file, "written").await;
    }
    let refused = rig.ask_and_see(write(&reader, "other")).await;
    assert!(refused.get("failed").is_some(), "{refused}");
    // Nobody in the guest appears there, so nobody can write.
    let refused = rig
        .ask_and_see(write(&mapped.with_file_name("new"), "x"))
        .await;
    assert!(refused.get("failed").is_some(), "{refused}");
    // One directory of it, which must be there, and be no way out.
    let second = rig.scratch("second");
    let second = rig.manager.add(&second, &MountRequest::default()).await;
    let second = second.unwrap();
    let absent = options(&[]).with_subpath("absent").unwrap();
    let absent = at("/run/containers/4/data", absent);
    let error = rig.manager.view(&second, &absent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    second.release().await.unwrap();
    for view in views {
        view.release().await.unwrap();
    }
    mapped_layers(&rig).await;
    given_to_a_group(&rig).await;
    rig.end().await;
}

async fn owner(rig: &Rig, path: &Path) -> Value {
    rig.ask(json!({ "owner": { "path": path } })).await["owner"].clone()
}

/// The layers of a stack appear as those of a container, each mapped by itself; a view shows the tree at a second place.
async fn mapped_layers(rig: &Rig) {
    let ext4 = rig.path("base");
    images::image("ext4", &ext4, &[("base", "of base")]);
    let ext4 = Disk::virtual_disk(ext4).read_only();
    let map: IdMap = "0:100000:65536".parse().unwrap();
    let mapped = MountOptions::builder().read_only().id_map(map).build();
    let mapped = MountRequest::new(mapped.unwrap());
    let tree = Path::new("/run/containers/5/rootfs");
    let request = StackRequest::new(tree)
        .layer(rig.layer("top"), mapped.clone())
        .layer(ext4, mapped)
        .scratch(rig.scratch("changes"), MountRequest::default());
    let stack = rig.manager.stack(&request).await.unwrap();
    let seen = ViewRequest::new("/run/containers/5/seen", options(&["ro"]));
    let seen = rig.manager.view(&stack, &seen).await.unwrap();
    rig.ask(write(&tree.join("base"), "changed")).await;
    for path in [
        tree.to_owned(),
        tree.join("id"),
        tree.join("base"),
        seen.target().join("id"),
    ] {
        let owner = owner(rig, &path).await;
        assert_eq!(
            (&owner[0], &owner[1]),
            (&json!(100_000), &json!(100_000)),
            "{path:?}"
        );
    }
    rig.assert_content(&seen.target().join("base"), "changed")
        .await;
    // In the scratch the files are as they appear.
    let upper = stack.scratch().unwrap().path().join("upper/base");
    assert_eq!(owner(rig, &upper).await[0], json!(100_000));
    stack.release().await.unwrap();
    seen.release().await.unwrap();
    assert!(rig.manager.drain().await.is_clean());
}

async fn given_to_a_group(rig: &Rig) {
    let path = rig.path("data");
    images::image("ext4", &path, &[("file", "text"), ("below/file", "text")]);
    let options = MountOptions::builder().fs_group(FsGroup::new(2000)).build();
    let request = MountRequest::new(options.unwrap());
    let volume = rig.manager.add(&Disk::virtual_disk(path), &request).await;
    let volume = volume.unwrap();
    for (name, mode) in [
        ("", 0o2770),
        ("file", 0o660),
        ("below", 0o2770),
        ("below/file", 0o660),
    ] {
        let owner = owner(rig, &volume.path().join(name)).await;
        assert_eq!(owner[1], json!(2000), "{name}");
        assert_eq!(owner[2].as_u64().unwrap() & mode, mode, "{name} {owner}");
    }
    volume.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vm_u15_an_agent_that_was_killed_knows_its_views() {
    let rig = Rig::start().await;
    let volume = rig.scratch("volume");
    let volume = rig.manager.add(&volume, &MountRequest::default()).await;
    let volume = volume.unwrap();
    let read_only = options(&["ro"]);
    let request = ViewRequest::new("/run/containers/1/data", read_only.clone());
    let view = rig.manager.view(&volume, &request).await.unwrap();
    rig.ask(json!("kill_agent")).await;
    let guest = rig.vm.guest("blockmount.agent.next").await.unwrap();
    for (options, presence) in [
        (read_only, Presence::Present(())),
        (options(&[]), Presence::Absent),
    ] {
        let bind = BindMount::new(volume.path(), view.target(), options);
        let found = Binder::adopt(&guest, &bind).await;
        assert_eq!(found.unwrap(), presence);
    }
    // It keeps the VM.
    drop(guest);
    volume.release().await.unwrap();
    view.release().await.unwrap();
    rig.end().await;
}
